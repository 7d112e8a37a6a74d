"""Proposals of a data set in one file that is mapped into memory, keyed by image id.

Opening costs the same for ten images and for a hundred thousand: only the header is read. An image is found by binary
search over the sorted ids, and its boxes are copied out of the map. The format is described in
`detpipe.proposal_files.store_format`.

Whether a store belongs to the images that it is used for is told in one line for each kind of fault, with its likely cause.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from detpipe.proposal_files.box_checks import TOLERANCE, find_faults, reaches_beyond
from detpipe.proposal_files.store_format import content_hash, image_digest, read_header
from detpipe.proposal_files.store_writer import ProposalWriter
from detpipe.support.errors import DataError
from detpipe.support.files import refuse_special

SHOWN = 5  # images that a line names


def missing(store: ProposalStore, names: list[str], total: int) -> str:
    """Say which images have no entry.

    Args:
        store: the store.
        names: the ids that it has not.
        total: how many were wanted.

    Returns:
        The line.
    """
    first = names[0]
    near = next((form for form in (first.lstrip("0"), first.zfill(6), first.zfill(12)) if form in store), None)
    cause = "is the store of another data set or split?"
    if near is not None:
        cause = f"the store names images otherwise ({near!r} for {first!r}): convert again with --images FILE.json"
    shown = f"the first are {_first(names)}" if len(names) > 1 else _first(names)
    return f"{store.path}: no proposals for {len(names)} of {total} images: {shown} ({examples(store)}); {cause}"


def other_frame(store: ProposalStore, names: list[str], made: npt.NDArray[Any], given: npt.NDArray[Any]) -> list[str]:
    """Find images of another size than those that the boxes were made for.

    Args:
        store: the store.
        names: N ids that it has.
        made: ``[N, 2]`` height and width that the store knows, zeros where unknown.
        given: ``[N, 2]`` height and width of the data set's images.

    Returns:
        One line, or none.
    """
    bad = np.flatnonzero((made[:, 0] > 0) & (made != given).any(axis=1)).tolist()
    if not bad:
        return []
    shown = [f"{names[i]!r} ({_size(made[i])}, the data has {_size(given[i])})" for i in bad[:SHOWN]]
    return [
        f"{store.path}: {len(bad)} of {len(names)} images have another size (height x width) than those that the proposals "
        f"were made for: {', '.join(shown)}; make the proposals from these images"
    ]


def outside(store: ProposalStore, names: list[str], extents: npt.NDArray[Any], given: npt.NDArray[Any]) -> list[str]:
    """Find images whose boxes reach beyond them.

    Args:
        store: the store.
        names: N ids that it has.
        extents: ``[N, 4]`` least x1, least y1, greatest x2, greatest y2 of each image's boxes.
        given: ``[N, 2]`` height and width of the data set's images.

    Returns:
        One line, or none.
    """
    bad = np.flatnonzero(reaches_beyond(extents, given)).tolist()
    if not bad:
        return []
    shown = []
    for i in bad[:SHOWN]:
        boxes = store[names[i]].boxes
        first = int(np.argmax(reaches_beyond(boxes, given[i])))
        shown.append(f"{names[i]!r} (box {first} is {boxes[first].tolist()}, the image {_size(given[i])})")
    cause = "are they of other images or of resized ones?"
    if not reaches_beyond(extents[:, [1, 0, 3, 2]], given).any():
        cause = "with x and y swapped all would lie inside: convert again with --boxes yxyx, yxyx0 or yxyx1"
    return [
        f"{store.path}: {len(bad)} of {len(names)} images (height x width) have boxes (x1, y1, x2, y2) that reach more than "
        f"{TOLERANCE:g} pixel beyond them: {', '.join(shown)}; {cause}"
    ]


def examples(store: ProposalStore) -> str:
    """Say how many images a store has, with a few of its ids."""
    names = [name for name, _ in zip(store, range(3), strict=False)]
    return f"it has {len(store)} images" + (f", such as {', '.join(map(repr, names))}" if names else "")


def _first(names: list[str]) -> str:
    return ", ".join(map(repr, names[:SHOWN]))


def _size(size: npt.NDArray[Any]) -> str:
    return f"{size[0]} x {size[1]}"


__all__ = ["ProposalRecord", "ProposalStore", "ProposalWriter", "write_store"]


class ProposalRecord(NamedTuple):
    """The proposals of one image, best first; the arrays are the caller's own."""

    boxes: npt.NDArray[np.float32]  # [P, 4] xyxy, continuous pixel edges in the frame of the image file
    scores: npt.NDArray[np.float32]  # [P] descending


class ProposalStore(Mapping[str, ProposalRecord]):
    """Reads a proposal store.

    Stores are safe to use in forked data workers, and pickle by their path: a copy in another process maps the same
    file. Two stores are equal if their content hashes are.

    Args:
        path: a file that `ProposalWriter` or ``detpipe proposals convert`` wrote.

    Raises:
        DataError: the file is missing, something else, cut off, damaged, or of a newer version.

    Example:
        >>> import tempfile
        >>> folder = tempfile.TemporaryDirectory()
        >>> records = {"139": ([[0, 0, 9, 9], [5, 5, 20, 30]], [0.2, 0.8])}
        >>> store = write_store(Path(folder.name) / "boxes.safetensors", records, source="by hand")
        >>> store["139"].boxes.tolist()
        [[5.0, 5.0, 20.0, 30.0], [0.0, 0.0, 9.0, 9.0]]
        >>> "140" in store, len(store)
        (False, 1)
        >>> folder.cleanup()
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        refuse_special(self.path)
        try:
            with self.path.open("rb") as file:
                file_bytes = file.seek(0, 2)
                file.seek(0)
                self._description, self._layout = read_header(file, self.path, file_bytes)
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except FileNotFoundError as error:
            raise DataError(f"{self.path}: no such file: check the path") from error
        except IsADirectoryError as error:
            raise DataError(f"{self.path}: is a folder: name the store in it") from error
        ends = [self._whole("offsets", row)[0] for row in (0, len(self))]
        id_ends = [self._whole("id_offsets", row)[0] for row in (0, len(self))]
        if ends != [0, self._layout.boxes] or id_ends != [0, self._layout.id_bytes]:
            raise self._damaged("its index does not fit its arrays")

    @classmethod
    def open(cls, path: str | Path) -> ProposalStore:
        """Open a store; the same as calling the class."""
        return cls(path)

    @property
    def source(self) -> str:
        """The name of what made the boxes."""
        return self._description.source

    @property
    def settings(self) -> dict[str, Any]:
        """The settings of what made the boxes."""
        return self._description.settings

    @property
    def content_hash(self) -> str:
        """64 hexadecimal digits that name the content; `verify` compares them with it."""
        return self._description.content_hash

    @property
    def version(self) -> int:
        """The version of the file format."""
        return self._description.version

    @property
    def num_boxes(self) -> int:
        """How many boxes all images have together."""
        return self._layout.boxes

    def __len__(self) -> int:
        return self._layout.images

    def __iter__(self) -> Iterator[str]:
        return (self._name(row).decode() for row in range(len(self)))

    def __contains__(self, image_id: object) -> bool:
        return self._find(image_id) is not None

    def __getitem__(self, image_id: str) -> ProposalRecord:
        row = self._find(image_id)
        if row is None:
            raise KeyError(f"{self.path}: no proposals for image {image_id!r} ({examples(self)})")
        return self._record(row)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ProposalStore) and self.content_hash == other.content_hash

    def __hash__(self) -> int:
        return hash(self.content_hash)

    def __repr__(self) -> str:
        return f"ProposalStore({str(self.path)!r}: {len(self)} images, {self.num_boxes} boxes of {self.source!r})"

    def __getstate__(self) -> dict[str, Any]:
        return {"path": str(self.path.absolute()), "content_hash": self.content_hash}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["path"])
        if self.content_hash != state["content_hash"]:
            raise DataError(f"{self.path}: replaced by another store since this process opened it: start again")

    def size(self, image_id: str) -> tuple[int, int] | None:
        """Return the size of the image that boxes were made for.

        Args:
            image_id: an id of the store.

        Returns:
            Height and width, or None where the store does not say.

        Raises:
            KeyError: the store has no such image.
        """
        row = self._find(image_id)
        if row is None:
            raise KeyError(f"{self.path}: no proposals for image {image_id!r} ({examples(self)})")
        return self._size(row)

    def box_counts(self) -> npt.NDArray[np.int64]:
        """Return the number of boxes of each image, in the order of the ids: ``[I]``."""
        return np.diff(self._array("offsets", "<i8", len(self) + 1))

    def num_sizes(self) -> int:
        """How many images have a known size."""
        return int((self._array("sizes", "<i4", 2 * len(self))[::2] > 0).sum())

    def check(self, image_ids: Iterable[str], sizes: Any = None) -> list[str]:
        """Compare the store with the images that it shall be used for.

        Args:
            image_ids: N ids of the data set.
            sizes: ``[N, 2]`` height and width of the images; None skips what needs them.

        Returns:
            One line for each kind of fault: images without an entry, entries made for an image of another size, boxes
            that reach more than a pixel beyond their image. An empty list if all is well.

        Raises:
            DataError: the ids of the store are not in order.
            ValueError: ``sizes`` has another shape.
            TypeError: an id is not text.
        """
        wanted = list(image_ids)
        for name in wanted:
            _require_text(name)
        rows = self._rows()
        there = [place for place, name in enumerate(wanted) if name in rows]
        lines = []
        if len(there) < len(wanted):
            lines.append(missing(self, [name for name in wanted if name not in rows], len(wanted)))
        if sizes is None:
            return lines
        given = np.asarray(sizes).reshape(-1, 2)
        if len(given) != len(wanted):
            raise ValueError(f"sizes must be [{len(wanted)}, 2], one for each image, got {list(np.shape(sizes))}")
        names = [wanted[place] for place in there]
        chosen = np.array([rows[name] for name in names], dtype=np.int64)
        made = self._array("sizes", "<i4", 2 * len(self)).reshape(-1, 2)[chosen]
        extents = self._array("extents", "<f4", 4 * len(self)).reshape(-1, 4)[chosen]
        lines += other_frame(self, names, made, given[there])
        return lines + outside(self, names, extents, given[there])

    def verify(self) -> None:
        """Read the whole store and check everything that it says about itself.

        Raises:
            DataError: the content differs from its hash, or is not as the format demands; the image is named.
        """
        rows = self._rows()
        digests = []
        extents = self._array("extents", "<f4", 4 * len(self)).reshape(-1, 4)
        for name, row in rows.items():
            boxes, scores = self._record(row)
            if find_faults(boxes.astype(np.float64), scores.astype(np.float64)) or (np.diff(scores) > 0).any():
                raise self._damaged(f"image {name!r} has boxes that are not finite, of negative size, or not in order")
            if len(boxes) and not np.array_equal(
                extents[row], np.concatenate([boxes[:, :2].min(axis=0), boxes[:, 2:].max(axis=0)])
            ):
                raise self._damaged(f"image {name!r}: its extent {extents[row].tolist()} is not that of its boxes")
            digests.append(image_digest(name.encode(), self._size(row) or (0, 0), boxes, scores))
        found = content_hash(self.source, self.settings, digests)
        if found != self.content_hash:
            raise self._damaged(f"its content has the hash {found[:12]}..., not {self.content_hash[:12]}...")

    def _find(self, image_id: object) -> int | None:
        """The row of an image, by binary search."""
        key = _require_text(image_id).encode("utf-8", "surrogatepass")
        low, high = 0, len(self)
        while low < high:
            middle = (low + high) // 2
            name = self._name(middle)
            if name == key:
                return middle
            low, high = (middle + 1, high) if name < key else (low, middle)
        return None

    def _name(self, row: int) -> bytes:
        start, end = self._whole("id_offsets", row, 2)
        if not 0 <= start < end <= self._layout.id_bytes:
            raise self._damaged(f"the id of entry {row} lies outside the ids")
        first = self._layout.starts["id_bytes"]
        return self._map[first + start : first + end]

    def _record(self, row: int) -> ProposalRecord:
        start, end = self._whole("offsets", row, 2)
        if not 0 <= start <= end <= self._layout.boxes:
            raise self._damaged(f"the boxes of image {self._name(row).decode()!r} lie outside the boxes")
        boxes = self._array("boxes", "<f4", 4 * (end - start), 16 * start).reshape(-1, 4)
        return ProposalRecord(boxes, self._array("scores", "<f4", end - start, 4 * start))

    def _size(self, row: int) -> tuple[int, int] | None:
        height, width = struct.unpack_from("<ii", self._map, self._layout.starts["sizes"] + 8 * row)
        return (height, width) if height > 0 else None

    def _whole(self, name: str, row: int, count: int = 1) -> tuple[int, ...]:
        return struct.unpack_from(f"<{count}q", self._map, self._layout.starts[name] + 8 * row)

    def _array(self, name: str, kind: str, count: int, skip: int = 0) -> npt.NDArray[Any]:
        """A copy of a part of an array: the map itself is read-only and would have to outlive it."""
        return np.frombuffer(self._map, kind, count, self._layout.starts[name] + skip).copy()

    def _rows(self) -> dict[str, int]:
        """All ids and their rows."""
        names = [self._name(row) for row in range(len(self))]
        for row in range(1, len(names)):
            if names[row] <= names[row - 1]:
                fault = "twice" if names[row] == names[row - 1] else "out of order"
                raise self._damaged(f"the image id {names[row].decode(errors='replace')!r} (entry {row}) is {fault}")
        try:
            return {name.decode(): row for row, name in enumerate(names)}
        except UnicodeDecodeError as error:
            raise self._damaged(f"an image id is not UTF-8 text ({error.object!r})") from error

    def _damaged(self, reason: str) -> DataError:
        return DataError(f"{self.path}: damaged: {reason}; copy or write it again")


def write_store(
    path: str | Path,
    records: Mapping[str, tuple[Any, Any]] | Iterable[tuple[Any, ...]],
    source: str,
    settings: dict[str, Any] | None = None,
) -> ProposalStore:
    """Write a store in one call.

    Args:
        path: the store to write, ``*.safetensors``; an existing one is replaced.
        records: image id -> (boxes ``[P, 4]``, scores ``[P]``), or an iterable of (id, boxes, scores) or (id, boxes,
            scores, (height, width)), which is not held in memory.
        source: the name of what made the boxes.
        settings: its settings, as JSON can hold them.

    Returns:
        The store, open.

    Raises:
        ValueError: what `ProposalWriter` refuses; nothing is written.
    """
    with ProposalWriter(path, source, {} if settings is None else settings) as writer:
        for row in _as_rows(records):
            writer.add(*row)
    return ProposalStore(path)


def _as_rows(records: Any) -> Iterable[tuple[Any, ...]]:
    if isinstance(records, Mapping):
        return ((name, boxes, scores) for name, (boxes, scores) in records.items())
    return records


def _require_text(image_id: object) -> str:
    if not isinstance(image_id, str):
        raise TypeError(f"image ids are text, such as '139'; got {image_id!r}")
    return image_id

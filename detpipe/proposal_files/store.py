"""Proposals of a data set in one file that is mapped into memory, keyed by image id.

Opening costs the same for ten images and for a hundred thousand: only the header is read. An image is found by binary
search over the sorted ids, and its boxes are copied out of the map. The format is described in
`detpipe.proposal_files.store_format`.

Whether a store belongs to the images that it is used for is told in one line for each kind of fault, with its likely cause.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from detpipe.proposal_files.box_checks import TOLERANCE, find_faults, reaches_beyond
from detpipe.proposal_files.store_format import ProposalWriter, content_hash, damaged, extent, image_digest, read_header
from detpipe.support.errors import DataError
from detpipe.support.files import refuse_special

SHOWN = 5  # images that a line names

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

    Attributes:
        source: the name of what made the boxes.
        settings: those of what made them.
        content_hash: 64 hexadecimal digits that name the content; `verify` compares them with it.
        version: of the file format.

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
                description, places = read_header(file, self.path, file_bytes)
                mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except FileNotFoundError as error:
            raise DataError(f"{self.path}: no such file: check the path") from error
        except IsADirectoryError as error:
            raise DataError(f"{self.path}: is a folder: name the store in it") from error
        self.source, self.settings = description.source, description.settings
        self.content_hash, self.version = description.content_hash, description.version
        arrays = {name: place.view(mapped) for name, place in places.items()}  # nothing is read before it is asked for
        self._offsets, self._boxes, self._scores = arrays["offsets"], arrays["boxes"], arrays["scores"]
        self._id_offsets, self._id_bytes = arrays["id_offsets"], arrays["id_bytes"]
        self._sizes, self._extents = arrays["sizes"], arrays["extents"]
        for offsets, rows in ((self._offsets, self._boxes), (self._id_offsets, self._id_bytes)):
            if offsets[0] != 0 or offsets[-1] != len(rows):
                raise damaged(self.path, "its index does not fit its arrays")

    @classmethod
    def open(cls, path: str | Path) -> ProposalStore:
        """Open a store; the same as calling the class."""
        return cls(path)

    @property
    def num_boxes(self) -> int:
        """How many boxes all images have together."""
        return len(self._boxes)

    def __len__(self) -> int:
        return len(self._sizes)

    def __iter__(self) -> Iterator[str]:
        return (self._text(self._name(row)) for row in range(len(self)))

    def __contains__(self, image_id: object) -> bool:
        return self._find(image_id) is not None

    def __getitem__(self, image_id: str) -> ProposalRecord:
        return self._record(self._row(image_id))

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
        """Height and width of the image that boxes were made for, None if not known; a KeyError without such an image."""
        height, width = self._sizes[self._row(image_id)].tolist()
        return (height, width) if height > 0 else None

    def box_counts(self) -> npt.NDArray[np.int64]:
        """Return the number of boxes of each image, in the order of the ids: ``[I]``."""
        return np.diff(self._offsets)

    def num_sizes(self) -> int:
        """How many images have a known size."""
        return int((self._sizes[:, 0] > 0).sum())

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
        lines = []
        absent = [name for name in wanted if name not in rows]
        if absent:
            lines.append(self._missing(absent, len(wanted)))
        if sizes is None:
            return lines
        given = np.asarray(sizes).reshape(-1, 2)
        if len(given) != len(wanted):
            raise ValueError(f"sizes must be [{len(wanted)}, 2], one for each image, got {list(np.shape(sizes))}")
        there = [place for place, name in enumerate(wanted) if name in rows]
        names = [wanted[place] for place in there]
        chosen = np.array([rows[name] for name in names], dtype=np.int64)
        lines += self._other_frame(names, self._sizes[chosen], given[there])
        return lines + self._outside(names, self._extents[chosen], given[there])

    def verify(self) -> None:
        """Read the whole store and check everything that it says about itself; a DataError names the image at fault."""
        rows = self._rows()
        digests = []
        for name, row in rows.items():
            boxes, scores = self._record(row)
            if find_faults(boxes.astype(np.float64), scores.astype(np.float64)) or (np.diff(scores) > 0).any():
                raise damaged(
                    self.path, f"image {name!r} has boxes that are not finite, of negative size, or not in order"
                )
            if len(boxes) and not np.array_equal(self._extents[row], extent(boxes)):
                raise damaged(
                    self.path, f"image {name!r}: its extent {self._extents[row].tolist()} is not that of its boxes"
                )
            digests.append(image_digest(name.encode(), self._sizes[row].tolist(), boxes, scores))
        found = content_hash(self.source, self.settings, digests)
        if found != self.content_hash:
            raise damaged(self.path, f"its content has the hash {found[:12]}..., not {self.content_hash[:12]}...")

    def _row(self, image_id: str) -> int:
        row = self._find(image_id)
        if row is None:
            raise KeyError(f"{self.path}: no proposals for image {image_id!r} ({self._examples()})")
        return row

    def _find(self, image_id: object) -> int | None:
        """The row of an image, by binary search."""
        key = _require_text(image_id).encode("utf-8", "surrogatepass")
        low, high = 0, len(self)
        while low < high:  # unlike bisect's, this search ends where it meets the id
            middle = (low + high) // 2
            name = self._name(middle)
            if name == key:
                return middle
            low, high = (middle + 1, high) if name < key else (low, middle)
        return None

    def _name(self, row: int) -> bytes:
        start, end = self._id_offsets[row : row + 2].tolist()
        if not 0 <= start < end <= len(self._id_bytes):
            raise damaged(self.path, f"the id of entry {row} lies outside the ids")
        return self._id_bytes[start:end].tobytes()

    def _text(self, name: bytes) -> str:
        try:
            return name.decode()
        except UnicodeDecodeError as error:
            raise damaged(self.path, f"an image id is not UTF-8 text ({name!r})") from error

    def _record(self, row: int) -> ProposalRecord:
        start, end = self._offsets[row : row + 2].tolist()
        if not 0 <= start <= end <= len(self._boxes):
            raise damaged(self.path, f"the boxes of image {self._text(self._name(row))!r} lie outside the boxes")
        return ProposalRecord(self._boxes[start:end].copy(), self._scores[start:end].copy())

    def _rows(self) -> dict[str, int]:
        names = [self._name(row) for row in range(len(self))]
        for row in range(1, len(names)):
            if names[row] <= names[row - 1]:
                fault = "twice" if names[row] == names[row - 1] else "out of order"
                raise damaged(
                    self.path, f"the image id {names[row].decode(errors='replace')!r} (entry {row}) is {fault}"
                )
        return {self._text(name): row for row, name in enumerate(names)}

    def _examples(self) -> str:
        names = [name for name, _ in zip(self, range(3), strict=False)]
        return f"it has {len(self)} images" + (f", such as {', '.join(map(repr, names))}" if names else "")

    def _missing(self, names: list[str], total: int) -> str:
        """Say which of the images that are wanted have no entry, with the likely cause."""
        first, shown = names[0], ", ".join(map(repr, names[:SHOWN]))
        near = next((form for form in (first.lstrip("0"), first.zfill(6), first.zfill(12)) if form in self), None)
        cause = "is the store of another data set or split?"
        if near is not None:
            cause = f"the store names images otherwise ({near!r} for {first!r}): convert again with --images FILE.json"
        shown = f"the first are {shown}" if len(names) > 1 else shown
        return f"{self.path}: no proposals for {len(names)} of {total} images: {shown} ({self._examples()}); {cause}"

    def _other_frame(self, names: list[str], made: npt.NDArray[Any], given: npt.NDArray[Any]) -> list[str]:
        """Find images whose height and width [N, 2] are not those that the boxes were made for."""
        bad = np.flatnonzero((made[:, 0] > 0) & (made != given).any(axis=1)).tolist()
        if not bad:
            return []
        shown = [f"{names[i]!r} ({_text(made[i])}, the data has {_text(given[i])})" for i in bad[:SHOWN]]
        return [
            f"{self.path}: {len(bad)} of {len(names)} images have another size (height x width) than those that the proposals "
            f"were made for: {', '.join(shown)}; make the proposals from these images"
        ]

    def _outside(self, names: list[str], extents: npt.NDArray[Any], given: npt.NDArray[Any]) -> list[str]:
        """Find images of height and width [N, 2] whose boxes, of the extents [N, 4], reach beyond them."""
        bad = np.flatnonzero(reaches_beyond(extents, given)).tolist()
        if not bad:
            return []
        shown = []
        for i in bad[:SHOWN]:
            boxes = self[names[i]].boxes
            first = int(np.argmax(reaches_beyond(boxes, given[i])))
            shown.append(f"{names[i]!r} (box {first} is {boxes[first].tolist()}, the image {_text(given[i])})")
        cause = "are they of other images or of resized ones?"
        if not reaches_beyond(extents[:, [1, 0, 3, 2]], given).any():
            cause = "with x and y swapped all would lie inside: convert again with --boxes yxyx, yxyx0 or yxyx1"
        return [
            f"{self.path}: {len(bad)} of {len(names)} images (height x width) have boxes (x1, y1, x2, y2) that reach more than "
            f"{TOLERANCE:g} pixel beyond them: {', '.join(shown)}; {cause}"
        ]


def _text(size: npt.NDArray[Any]) -> str:
    return f"{size[0]} x {size[1]}"


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
        rows: Any = records
        if isinstance(records, Mapping):
            rows = ((name, *record) for name, record in records.items())
        for row in rows:
            writer.add(*row)
    return ProposalStore(path)


def _require_text(image_id: object) -> str:
    if not isinstance(image_id, str):
        raise TypeError(f"image ids are text, such as '139'; got {image_id!r}")
    return image_id

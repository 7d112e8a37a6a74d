"""Write a proposal store image by image, in any order, without holding the boxes in memory.

The boxes go to a nameless temporary file beside the target, of which nothing is left when the process dies; `close`
copies them in the order of the ids. The index that stays in memory is about 500 bytes an image. The bytes of a store
depend on its content alone, neither on the order of adding nor on time or machine.
"""

from __future__ import annotations

import struct
import tempfile
from collections.abc import Iterator
from itertools import accumulate
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from detpipe.proposal_files.box_checks import explain, find_faults, read_boxes, read_scores
from detpipe.proposal_files.store_format import (
    SUFFIX,
    Description,
    build_header,
    canonical_settings,
    content_hash,
    image_digest,
)
from detpipe.support.errors import DataError
from detpipe.support.files import atomic_write


class _Entry(NamedTuple):
    start: int  # first byte of its boxes in the temporary file; its scores follow
    count: int
    size: tuple[int, int]
    extent: bytes
    digest: bytes


class ProposalWriter:
    """Writes a proposal store; nothing appears under its name before `close`.

    As a context manager it closes at the end of the block, and drops everything after an exception.

    Args:
        path: the store to write, ``*.safetensors``; an existing one is replaced.
        source: the name of what made the boxes, such as ``"selective_search"``.
        settings: its settings, as JSON can hold them.

    Raises:
        ValueError: another suffix, an empty source, or settings that JSON cannot hold.

    Example:
        >>> folder = tempfile.TemporaryDirectory()
        >>> path = Path(folder.name) / "boxes.safetensors"
        >>> with ProposalWriter(path, source="by hand", settings={}) as writer:
        ...     writer.add("139", [[0, 0, 10, 20]], [0.5])
        >>> path.is_file()
        True
        >>> folder.cleanup()
    """

    def __init__(self, path: str | Path, source: str, settings: dict[str, Any]) -> None:
        self.path = Path(path)
        if self.path.suffix != SUFFIX:
            raise ValueError(f"{self.path}: the name of a proposal store must end in {SUFFIX}")
        if not isinstance(source, str) or not source or not _is_utf8(source):
            raise ValueError(f"{self.path}: source must name what made the boxes, got {source!r}")
        canonical_settings(settings)
        self.source, self.settings = source, settings
        self._entries: dict[bytes, _Entry] = {}
        self._end = 0
        self._boxes: BinaryIO | None = None
        self._done = False

    def __enter__(self) -> ProposalWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            self.abort()

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, image_id: str) -> bool:
        return image_id.encode() in self._entries

    def add(self, image_id: str, boxes: Any, scores: Any, size: tuple[int, int] | None = None) -> None:
        """Add the boxes of one image.

        Args:
            image_id: COCO's number in decimal, or VOC's file stem.
            boxes: ``[P, 4]`` xyxy, continuous pixel edges in the frame of the image file.
            scores: ``[P]``; boxes are sorted by descending score, those with equal scores keep their order.
            size: height and width of the image in pixels, None where unknown; with it, use of the store for other
                images or a resized frame is found out, and boxes that reach beyond the image are refused.

        Raises:
            DataError: an id twice, a wrong shape, a number that is not finite, or a box of negative size; the store,
                the image, the box and its value are named, and the image is not added.
            ValueError: the writer was closed before.
        """
        if self._done:
            raise ValueError(f"{self.path}: the writer is closed; make another one for another store")
        name = _encode_id(image_id, self.path)
        where = f"{self.path}: image {image_id!r}"
        if name in self._entries:
            raise DataError(f"{where}: added twice; a store has one entry for each image")
        numbers = read_boxes(boxes, where)
        values = read_scores(scores, len(numbers), where)
        known = _read_size(size, where)
        for reason, rows in find_faults(numbers, values, known).items():
            row = int(np.flatnonzero(rows)[0])
            raise DataError(f"{where}: box {row} {explain(reason, numbers[row], float(values[row]), known)}")
        stored_scores = values.astype("<f4") + np.float32(0)  # no negative zeros, which hash differently
        order = np.argsort(-stored_scores, kind="stable")
        stored, stored_scores = numbers.astype("<f4")[order] + np.float32(0), stored_scores[order]
        extent = np.zeros(4, dtype="<f4")
        if len(stored):
            extent = np.concatenate([stored[:, :2].min(axis=0), stored[:, 2:].max(axis=0)])
        digest = image_digest(name, known or (0, 0), stored, stored_scores)
        file = self._open()
        file.write(stored.tobytes())
        file.write(stored_scores.tobytes())
        self._entries[name] = _Entry(self._end, len(stored), known or (0, 0), extent.tobytes(), digest)
        self._end += 20 * len(stored)

    def close(self) -> None:
        """Write the store under its name; nothing happens if that was done or given up before.

        Raises:
            OSError: the disk is full or the folder cannot be written to; what was under the name stays.
        """
        if self._done:
            return
        names = sorted(self._entries)
        digest = content_hash(self.source, self.settings, (self._entries[name].digest for name in names))
        description = Description(self.source, self.settings, digest)
        try:
            with atomic_write(self.path) as temporary, temporary.open("wb") as file:
                file.write(build_header(description, len(names), self._end // 20, sum(map(len, names))))
                for part in self._parts(names):
                    file.write(part)
        finally:
            self.abort()

    def abort(self) -> None:
        """Drop what was added; the store is not written."""
        if self._boxes is not None:
            self._boxes.close()
        self._boxes = None
        self._entries, self._end, self._done = {}, 0, True

    def _open(self) -> BinaryIO:
        if self._boxes is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._boxes = tempfile.TemporaryFile(dir=self.path.parent)  # noqa: SIM115 (closed by close and abort)
        return self._boxes

    def _parts(self, names: list[bytes]) -> Iterator[bytes]:
        """The arrays in the order of `store_format.arrays`, piece by piece."""
        entries = [self._entries[name] for name in names]
        yield np.fromiter(accumulate((e.count for e in entries), initial=0), dtype="<i8").tobytes()
        yield np.fromiter(accumulate(map(len, names), initial=0), dtype="<i8").tobytes()
        yield b"".join(entry.extent for entry in entries)
        yield b"".join(struct.pack("<ii", *entry.size) for entry in entries)
        for first, length in ((0, 16), (16, 4)):  # bytes of a box, then of a score
            for entry in entries:
                if entry.count:
                    file = self._open()
                    file.seek(entry.start + first * entry.count)
                    yield file.read(length * entry.count)
        yield b"".join(names)


def _encode_id(image_id: Any, path: Path) -> bytes:
    if not isinstance(image_id, str) or not image_id or not _is_utf8(image_id):
        raise DataError(f"{path}: an image id must be text that is not empty, such as '139', got {image_id!r}")
    return image_id.encode()


def _is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _read_size(size: Any, where: str) -> tuple[int, int] | None:
    if size is None:
        return None
    if len(size) != 2 or not all(isinstance(side, int | np.integer) and 0 < side < 2**31 for side in size):
        raise DataError(f"{where}: size must be height and width in pixels, got {size!r}")
    return int(size[0]), int(size[1])

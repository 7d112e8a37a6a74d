"""Write one shard: a tar file that webdataset and any tar program read, whose bytes depend on its content alone."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
import numpy.typing as npt

from detpipe.datasets.decode import decoded_size, image_format, image_size
from detpipe.datasets.records import SizeError, check_size
from detpipe.datasets.shards.index import KEYS, sample_key
from detpipe.proposal_files import ProposalStore
from detpipe.support.errors import DataError
from detpipe.support.files import atomic_write, refuse_special
from detpipe.types import Annotations

_BLOCK = tarfile.BLOCKSIZE
_SUFFIXES = {"JPEG": "jpg", "MPO": "jpg", "TIFF": "tif"}  # others are called as Pillow calls them


class Place(NamedTuple):
    """Where a part of an image lies in its shard."""

    offset: int = 0
    length: int = 0
    crc32: int = 0


class Written(NamedTuple):
    """A shard that is on the disk.

    Args:
        number: of the shard.
        bytes: of the file.
        sha256: of the file.
        rows: the images in it, in their order.
        images: where their files are.
        proposals: where their proposals are; empty without.
        skipped: row, reason and message of each image that was left out.
    """

    number: int
    bytes: int
    sha256: str
    rows: list[int]
    images: list[Place]
    proposals: list[Place]
    skipped: list[tuple[int, str, str]]


class Contents:
    """What goes into the shards of a split.

    Args:
        annotations: the ground truth; its images are read from its root.
        key: what proposal stores call the images, one of `KEYS`.
        lengths: [I] bytes of each image file when the shards were planned.
        proposals: a store of the images' proposals; None for none.
        decode: whether each image is decoded, to refuse damaged ones; else only its header is read.
        skip: whether bad images are left out and counted.
    """

    def __init__(
        self,
        annotations: Annotations,
        key: str,
        lengths: npt.NDArray[np.int64],
        proposals: str | Path | None = None,
        decode: bool = True,
        skip: bool = False,
    ) -> None:
        self.annotations, self.key, self.lengths = annotations, key, lengths
        self.proposals = None if proposals is None else ProposalStore(proposals)
        self.decode, self.skip = decode, skip

    def describe(self, row: int) -> bytes:
        """The annotations of an image as JSON."""
        a = self.annotations
        rows = slice(int(a.offsets[row]), int(a.offsets[row + 1]))
        height, width = a.sizes[row].tolist()
        labels = a.labels[rows].tolist()
        content = {
            "image_id": int(a.image_ids[row]),
            "file_name": str(a.file_names[row]),
            "height": height,
            "width": width,
            "boxes": a.boxes[rows].tolist(),
            "labels": labels,
            "category_ids": [a.category_ids[label - 1] for label in labels],
            "iscrowd": a.iscrowd[rows].tolist(),
            "difficult": a.difficult[rows].tolist(),
            "area": a.area[rows].tolist(),
        }
        return json.dumps(content, separators=(",", ":")).encode()

    def boxes(self, row: int) -> bytes | None:
        """The proposals of an image as ``.npy``: [P, 5] float32, xyxy and score, best first."""
        if self.proposals is None:
            return None
        record = self.proposals[KEYS[self.key](self.annotations, row)]
        file = io.BytesIO()
        np.save(file, np.column_stack([record.boxes, record.scores]).astype("<f4"), allow_pickle=False)
        return file.getvalue()

    def tar_bytes(self, row: int) -> int:
        """How much longer a shard becomes by an image."""
        boxes = self.boxes(row)
        parts = [int(self.lengths[row]), len(self.describe(row)), *([] if boxes is None else [len(boxes)])]
        return sum(_BLOCK + -(-length // _BLOCK) * _BLOCK for length in parts)

    def read(self, row: int) -> bytes:
        """The bytes of an image file.

        Raises:
            BadImageError: it cannot be read, or is not as annotated.
            DataError: it is not the file that it was.
        """
        a = self.annotations
        path = a.root / str(a.file_names[row])
        refuse_special(path)
        try:
            content = path.read_bytes()
        except OSError as error:
            raise BadImageError("unreadable", f"{path}: cannot be read ({error.strerror})") from error
        if len(content) != self.lengths[row]:
            raise DataError(
                f"{path}: has {len(content)} bytes, but had {self.lengths[row]} when the shards were planned: let the images "
                "rest while shards are made, and begin anew"
            )
        try:
            if self.decode:
                height, width = decoded_size(path, content)
            else:
                height, width = image_size(path, content)
            check_size(path, (height, width), tuple(a.sizes[row].tolist()))
        except SizeError as error:
            raise BadImageError("size differs from the annotation", str(error)) from error
        except DataError as error:
            raise BadImageError("unreadable", str(error)) from error
        return content


class BadImageError(Exception):
    """An image that cannot be used."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(reason, message)
        self.reason, self.message = reason, message


def write_shard(
    path: Path, number: int, rows: Sequence[int], contents: Contents, told: Callable[[], None] | None = None
) -> Written:
    """Write a shard; it is complete when it is visible.

    Args:
        path: to write; an existing file is replaced.
        number: of the shard.
        rows: the images, in the order in which they are to lie.
        contents: of the split.
        told: called after each image.

    Returns:
        What was written.

    Raises:
        DataError: an image that is bad, unless such are skipped; nothing is written then.
    """
    kept: list[int] = []
    images: list[Place] = []
    proposals: list[Place] = []
    skipped: list[tuple[int, str, str]] = []
    with atomic_write(path) as temporary, temporary.open("wb") as file:
        shard = _Tar(file)
        for row in rows:
            try:
                image = contents.read(row)
            except BadImageError as error:
                if not contents.skip:
                    raise DataError(error.message) from error
                skipped.append((row, error.reason, error.message))
            else:
                name, boxes = sample_key(row), contents.boxes(row)
                kind = image_format(image)
                shard.add(f"{name}.json", contents.describe(row))
                images.append(shard.add(f"{name}.{_SUFFIXES.get(kind, kind.lower())}", image))
                if boxes is not None:
                    proposals.append(shard.add(f"{name}.proposals.npy", boxes))
                kept.append(row)
            if told is not None:
                told()
        length, sha256 = shard.close()
    return Written(number, length, sha256, kept, images, proposals, skipped)


class _Tar:
    """A tar file in the plainest format (ustar), without anything of who wrote it, when and where."""

    def __init__(self, file: BinaryIO) -> None:
        self._out = _Hashing(file)
        self._tar = tarfile.TarFile(fileobj=self._out, mode="w", format=tarfile.USTAR_FORMAT)  # type: ignore[arg-type]

    def add(self, name: str, content: bytes) -> Place:
        """Append a file."""
        member = tarfile.TarInfo(name)
        member.size, member.mode = len(content), 0o644
        place = Place(self._out.tell() + _BLOCK, len(content), zlib.crc32(content))
        self._tar.addfile(member, io.BytesIO(content))
        return place

    def close(self) -> tuple[int, str]:
        """End the file; its length and sha256."""
        self._tar.close()
        return self._out.tell(), self._out.sha256.hexdigest()


class _Hashing:
    """A file that knows the hash of what was written to it."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._length = file, 0
        self.sha256 = hashlib.sha256()

    def write(self, content: bytes) -> int:
        """Append."""
        self.sha256.update(content)
        self._length += len(content)
        return self._file.write(content)

    def tell(self) -> int:
        """The length so far."""
        return self._length

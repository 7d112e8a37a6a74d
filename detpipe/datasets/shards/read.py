"""The bytes of images and proposals out of shards, by one seek and one read each; and whether shards are what was written."""

from __future__ import annotations

import hashlib
import io
import json
import os
import tarfile
import zlib
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from detpipe.datasets.shards.index import Places, ShardSet, check_files, read_index
from detpipe.datasets.stored_proposals import BoxesByImage
from detpipe.datasets.workers import share_with_workers
from detpipe.support.errors import DataError

_COPY_AGAIN = "copy it again, or write the shards again"
share_with_workers(ShardSet)

Opened = tuple[int, Path]  # a file descriptor, and what was opened


@dataclass(eq=False)
class ShardFiles:
    """The image files of a split, as `detpipe.datasets.dataset.Contents`, in shards that a process opens when it first reads them.

    Reading neither moves nor needs a position in a file, so that a forked data worker may go on with the files of its parent; a
    pickled copy opens its own. ``opener`` opens the shard of a number, for which it may fetch it; by default that in the folder
    of the split. ``most_open`` files stay open. ``where`` is what messages call the folder; by default its path.
    """

    shards: ShardSet
    opener: Callable[[int], Opened] | None = None
    most_open: int = 64
    where: str = ""

    def __post_init__(self) -> None:
        self.where = self.where or str(self.shards.folder)
        self._open: OrderedDict[int, Opened] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_open": OrderedDict()}

    def __del__(self) -> None:
        while getattr(self, "_open", None):
            os.close(self._open.popitem()[1][0])

    def name(self, index: int) -> str:
        """What a message calls an image: its shard and its own file name."""
        shard = self.shards.shards[int(self.shards.shard[index])]
        return f"{self.where}/{shard.name} ({self.shards.annotations.file_names[index]})"

    def size(self, index: int) -> int:
        """How many bytes an image file has."""
        return int(self.shards.images[index, 1])

    def read(self, index: int) -> bytes:
        """The bytes of an image file; errors are those of :meth:`read_part`."""
        return self.read_part(index, self.shards.images, "file")

    def read_part(self, index: int, places: Places, what: str) -> bytes:
        """Read a part of an image, which messages call ``what``, and compare it with its checksum.

        A DataError names shard and image if the shard is missing, ends early, or was changed.
        """
        number = int(self.shards.shard[index])
        offset, length, crc32 = places[index].tolist()
        file, path = self._file(number)
        try:
            content = os.pread(file, length, offset)
            while 0 < len(content) < length and (more := os.pread(file, length - len(content), offset + len(content))):
                content += more  # one call reads at most 2 GiB, and a network's file system may give less
        except OSError as error:
            raise DataError(f"{path}: cannot be read ({error.strerror}), wanted for {self.name(index)}") from error
        if len(content) != length or zlib.crc32(content) != crc32:
            fault = "cut off" if len(content) != length else "damaged or changed since its index was written"
            advice = f"copy {path.name} again" if self.opener is None else f"remove {path}, and it is fetched again"
            raise DataError(
                f"{self.name(index)}: the {what} of image id {self.shards.annotations.image_ids[index]} at byte {offset} is "
                f"{fault}; {advice}, or write the shards again"
            )
        return content

    def _file(self, number: int) -> Opened:
        if number in self._open:
            self._open.move_to_end(number)
            return self._open[number]
        path = self.shards.folder / self.shards.shards[number].name
        try:
            file, path = (os.open(path, os.O_RDONLY), path) if self.opener is None else self.opener(number)
        except OSError as error:
            raise DataError(f"{error.filename or path}: cannot be opened ({error.strerror}); {_COPY_AGAIN}") from error
        found, expected = os.fstat(file).st_size, self.shards.shards[number].bytes
        if found != expected:
            os.close(file)
            raise DataError(
                f"{path}: has {found} bytes, but its index says {expected}: cut off or changed; {_COPY_AGAIN}"
            )
        self._open[number] = file, path
        if len(self._open) > self.most_open:
            os.close(self._open.popitem(last=False)[1][0])
        return file, path


class ShardProposals(BoxesByImage):
    """The proposals that ride in shards, by image id; read when they are asked for."""

    def __init__(self, files: ShardFiles, places: Places) -> None:
        super().__init__(files.shards.annotations)
        self.files, self._places = files, places

    def boxes(self, row: int) -> npt.NDArray[np.float32]:
        """``[P, 4]`` xyxy in pixels of the image file, best first."""
        content = self.files.read_part(row, self._places, "list of proposals")
        try:
            boxes = np.lib.format.read_array(io.BytesIO(content), allow_pickle=False)
        except (ValueError, MemoryError) as error:  # the latter where a header announces more than any machine has
            raise DataError(f"{self.files.name(row)}: its proposals are no .npy file ({error})") from error
        if boxes.dtype != np.float32 or boxes.ndim != 2 or boxes.shape[1] != 5 or not np.isfinite(boxes).all():
            raise DataError(
                f"{self.files.name(row)}: its proposals are not finite float32 [P, 5]; write the shards again"
            )
        return boxes[:, :4]


def verify_shards(folder: str | Path, progress: Callable[[int, int], None] | None = None) -> ShardSet:
    """Compare the shards of a split with their index: hashes, names of members, and where images lie.

    ``progress`` is called with the number of shards done and of all, after each. A DataError if a file is missing, damaged or
    changed, or a tar file has members that are not those of the index.
    """
    shards = read_index(folder)
    check_files(shards)
    for number in range(len(shards.shards)):
        path = shards.folder / shards.shards[number].name
        _check_members(path, shards, number)
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != shards.shards[number].sha256:
            raise DataError(
                f"{path}: its content has another hash than its index says: damaged or changed; {_COPY_AGAIN}"
            )
        if progress is not None:
            progress(number + 1, len(shards.shards))
    return shards


def _check_members(path: Path, shards: ShardSet, number: int) -> None:
    """Refuse members that a tar program would write elsewhere, and look whether each image lies where the index says."""
    rows = np.flatnonzero(shards.shard == number)
    wanted = {int(shards.images[row, 0]): int(row) for row in rows}
    keys: dict[str, int] = {}
    described: dict[str, int] = {}
    try:
        with tarfile.open(path, mode="r:") as tar:
            for member in tar:
                key, _, kind = member.name.partition(".")
                if not member.isreg() or not key.isdigit() or "/" in kind or not kind:
                    raise DataError(
                        f"{path}: the member {member.name!r} is not safe: expected plain files such as 000000000.jpg; {_COPY_AGAIN}"
                    )
                file = tar.extractfile(member)
                assert file is not None  # of a plain file
                content = file.read()
                if kind == "json":
                    described[key] = int(json.loads(content)["image_id"])
                elif member.offset_data in wanted:
                    keys[key] = wanted.pop(member.offset_data)
                    if zlib.crc32(content) != int(shards.images[keys[key], 2]):
                        raise DataError(f"{path}: the member {member.name!r} is damaged or changed; {_COPY_AGAIN}")
    except (tarfile.TarError, OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{path}: cannot be read as a tar file of ours ({error}); {_COPY_AGAIN}") from error
    ids = shards.annotations.image_ids
    if wanted or described != {key: int(ids[row]) for key, row in keys.items()}:
        raise DataError(f"{path}: its members are not the {len(rows)} images that its index says; {_COPY_AGAIN}")

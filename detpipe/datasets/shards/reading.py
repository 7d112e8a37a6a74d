"""Read images and proposals out of shards: one seek and one read each, through files that stay open."""

from __future__ import annotations

import io
import os
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from detpipe.datasets.handover import share_with_workers
from detpipe.datasets.shards.index import Places, ShardSet
from detpipe.support.errors import DataError

share_with_workers(ShardSet, Places)

Opened = tuple[int, Path]  # a file descriptor, and what was opened
_OPEN = 64  # files that a process keeps open


class ShardFiles:
    """The open shards of a split, in one process.

    Reading neither moves nor needs a position in a file, so that a forked data worker may go on with the files of its parent; a
    pickled copy opens its own.

    Args:
        shards: the split.
        opener: opens the shard of a number, for which it may fetch it; by default that in the folder of the split.
        most_open: files that a process keeps open.
        where: what messages call the folder of the split; by default its path.
    """

    def __init__(
        self,
        shards: ShardSet,
        opener: Callable[[int], Opened] | None = None,
        most_open: int | None = None,
        where: str | None = None,
    ) -> None:
        self.shards, self._opener, self._where = shards, opener, where or str(shards.folder)
        self._most_open = _OPEN if most_open is None else most_open
        self._open: OrderedDict[int, Opened] = OrderedDict()

    def of(self, shards: ShardSet) -> ShardFiles:
        """The same files for a part of the split."""
        return ShardFiles(shards, self._opener, self._most_open, self._where)

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_open": OrderedDict()}

    def __del__(self) -> None:
        while getattr(self, "_open", None):
            os.close(self._open.popitem()[1][0])

    def name(self, row: int) -> str:
        """What a message calls an image: its shard and its own file name."""
        shard = self.shards.shards[int(self.shards.shard[row])]
        return f"{self._where}/{shard.name} ({self.shards.annotations.file_names[row]})"

    def read(self, row: int, places: Places, what: str) -> bytes:
        """Read a part of an image, and compare it with its checksum.

        Args:
            row: of the image.
            places: where that part of every image is.
            what: the part, for a message.

        Returns:
            The bytes.

        Raises:
            DataError: the shard is missing, ends early, or was changed; it is named with the image.
        """
        number = int(self.shards.shard[row])
        offset, length = int(places.offset[row]), int(places.length[row])
        file, path = self._file(number)
        try:
            content = os.pread(file, length, offset)
            while 0 < len(content) < length and (more := os.pread(file, length - len(content), offset + len(content))):
                content += more  # one call reads at most 2 GiB, and a network's file system may give less
        except OSError as error:
            raise DataError(f"{path}: cannot be read ({error.strerror}), wanted for {self.name(row)}") from error
        if len(content) != length or zlib.crc32(content) != int(places.crc32[row]):
            fault = "cut off" if len(content) != length else "damaged or changed since its index was written"
            advice = f"copy {path.name} again" if self._opener is None else f"remove {path}, and it is fetched again"
            raise DataError(
                f"{self.name(row)}: the {what} of image id {self.shards.annotations.image_ids[row]} at byte {offset} is "
                f"{fault}; {advice}, or write the shards again"
            )
        return content

    def _file(self, number: int) -> Opened:
        if number in self._open:
            self._open.move_to_end(number)
            return self._open[number]
        file, path = self._open_here(number) if self._opener is None else self._opener(number)
        found, expected = os.fstat(file).st_size, self.shards.shards[number].bytes
        if found != expected:
            os.close(file)
            raise DataError(
                f"{path}: has {found} bytes, but its index says {expected}: cut off or changed; copy it again, or write the "
                "shards again"
            )
        self._open[number] = file, path
        if len(self._open) > self._most_open:
            os.close(self._open.popitem(last=False)[1][0])
        return file, path

    def _open_here(self, number: int) -> Opened:
        path = self.shards.folder / self.shards.shards[number].name
        try:
            return os.open(path, os.O_RDONLY | os.O_CLOEXEC), path
        except OSError as error:
            raise DataError(
                f"{path}: cannot be opened ({error.strerror}); copy it again, or write the shards again"
            ) from error


class ShardImages:
    """The image files of a split, as `detpipe.datasets.dataset.Contents`.

    Args:
        files: the shards.
    """

    def __init__(self, files: ShardFiles) -> None:
        self.files = files

    def name(self, index: int) -> str:
        """What a message calls an image."""
        return self.files.name(index)

    def size(self, index: int) -> int:
        """How many bytes an image file has."""
        return int(self.files.shards.images.length[index])

    def read(self, index: int) -> bytes:
        """The bytes of an image file."""
        return self.files.read(index, self.files.shards.images, "file")


class ShardProposals(Mapping[int, npt.NDArray[np.float32]]):
    """The proposals that ride in shards, by image id; read when they are asked for.

    Args:
        files: the shards.
        places: where the proposals are in them.
    """

    def __init__(self, files: ShardFiles, places: Places) -> None:
        self.files, self._places = files, places
        self._order = np.argsort(files.shards.annotations.image_ids)

    def __getitem__(self, image_id: int) -> npt.NDArray[np.float32]:
        """``[P, 4]`` xyxy in pixels of the image file, best first."""
        ids = self.files.shards.annotations.image_ids
        place = int(np.searchsorted(ids, image_id, sorter=self._order))
        if place == len(ids) or ids[self._order[place]] != image_id:
            raise KeyError(image_id)
        row = int(self._order[place])
        content = self.files.read(row, self._places, "list of proposals")
        try:
            boxes = np.lib.format.read_array(io.BytesIO(content), allow_pickle=False)
        except (ValueError, MemoryError) as error:  # the latter where a header announces more than any machine has
            raise DataError(f"{self.files.name(row)}: its proposals are no .npy file ({error})") from error
        if boxes.dtype != np.float32 or boxes.ndim != 2 or boxes.shape[1] != 5 or not np.isfinite(boxes).all():
            raise DataError(
                f"{self.files.name(row)}: its proposals are not finite float32 [P, 5]; write the shards again"
            )
        return boxes[:, :4]

    def __len__(self) -> int:
        return len(self.files.shards.annotations)

    def __iter__(self) -> Iterator[int]:
        return iter(self.files.shards.annotations.image_ids.tolist())

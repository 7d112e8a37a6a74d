"""The image files of a data set by path, whether they are files of their own or lie in shards."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from tqdm import tqdm

from detpipe.datasets.dataset import Contents
from detpipe.support.errors import DataError
from detpipe.support.files import refuse_special
from detpipe.types import Annotations

_HEAD = 2**16  # bytes of an image file that tell it from others of its length; more are read where they do not


class ImageFiles:
    """Reads, measures and copies image files; those of splits in shards have paths too, under which nothing lies on the disk.

    Args:
        packed: annotations of splits, and where their image files are if not at their names; other images are plain files.
    """

    def __init__(self, packed: Iterable[tuple[Annotations, Contents | None]] = ()) -> None:
        self._packed: dict[str, tuple[Contents, int]] = {}
        for split, contents in packed:
            if contents is not None:
                paths = map(os.path.abspath, image_paths(split))
                self._packed.update({path: (contents, row) for row, path in enumerate(paths)})

    def __contains__(self, path: Path) -> bool:
        """Whether an image lies in a shard."""
        return os.path.abspath(path) in self._packed

    def size(self, path: Path) -> int:
        """The bytes that an image file has; errors are those of `read`."""
        packed = self._packed.get(os.path.abspath(path))
        with _named(path):
            return path.stat().st_size if packed is None else packed[0].size(packed[1])

    def read(self, path: Path, length: int = -1) -> bytes:
        """The bytes of an image file, or the first of them; a DataError if it cannot be read, or its shard is damaged."""
        packed = self._packed.get(os.path.abspath(path))
        if packed is not None:
            return packed[0].read(packed[1])[: length if length >= 0 else None]
        refuse_special(path)
        with _named(path), path.open("rb") as stream:
            return stream.read(length)

    def name(self, path: Path) -> str:
        """What a message calls an image."""
        packed = self._packed.get(os.path.abspath(path))
        return str(path) if packed is None else packed[0].name(packed[1])

    def copy(self, source: Path, target: Path) -> None:
        """Write an image file anew."""
        if source in self:
            target.write_bytes(self.read(source))
        else:
            shutil.copyfile(source, target)

    def link(self, source: Path, target: Path) -> None:
        """Give an image file a second name, on the same disk, or raise a DataError."""
        if source in self:
            raise DataError(f"{self.name(source)}: cannot be linked, it is a part of a shard: copy the images instead")
        try:
            os.link(source.resolve(), target)
        except OSError as error:
            raise DataError(f"{source}: cannot be linked ({error.strerror}): copy the images instead") from error


@contextmanager
def _named(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from error


PLAIN_FILES = ImageFiles()


def image_paths(annotations: Annotations) -> list[Path]:
    """The paths of the images of a split."""
    return [annotations.root / str(name) for name in annotations.file_names]


def content_keys(
    paths: Sequence[Path], source: ImageFiles, damaged: Callable[[Path, DataError], None] | None = None
) -> list[bytes]:
    """[I] what tells the content of an image file: equal for equal files only.

    ``damaged`` is told of an image that cannot be read, which is then like no other; by default that is a DataError.
    """
    keys: list[tuple[bytes, int]] = []
    for path in tqdm(paths, desc="comparing images", unit="image", disable=None, leave=False):
        try:
            keys.append((hashlib.sha256(source.read(path, _HEAD)).digest(), source.size(path)))
        except DataError as error:
            if damaged is None:
                raise
            damaged(path, error)
            keys.append((os.fsencode(path), -1))
    count = Counter(keys)
    return [
        hashlib.sha256(source.read(path)).digest() if count[key] > 1 and key[1] > _HEAD else key[0] + b"%d" % key[1]
        for path, key in zip(paths, keys, strict=True)
    ]

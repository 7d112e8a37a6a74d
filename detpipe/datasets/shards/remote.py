"""Shards on a server or in an object store: fetched when they are first read, and kept in a folder that holds only so many.

::

    FOLDER/splits/HASH/index.json             of a split, by its address; asked for again at every start
    FOLDER/shards/SHA256-BYTES/shard-0000.tar a shard, by its content: what changes on the server is another shard
    FOLDER/locks/...                          one process fetches a shard, the others wait for it

A shard appears under its name when it is whole and has the checksum of the index. The one that was opened least lately goes first
when room is needed; who has it open can go on reading, and its place on the disk is free when that one closes it.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import filelock

from detpipe.datasets.fetch import RemoteFile, fetch, read_url
from detpipe.datasets.shards.index import ARRAYS, INDEX, Shard, ShardSet, read_index, read_json
from detpipe.datasets.shards.read import Opened, ShardFiles
from detpipe.support.errors import DataError
from detpipe.support.files import atomic_write

_MOST = 2**28  # bytes of an index: two million shards
_WINDOWS = 2  # that are read at the same time: batches are mixed over the border of two
_ADVICE = "look whether a folder that 'detpipe data shards' wrote lies there"


@dataclass(frozen=True)
class ShardCache:
    """Where shards that are fetched are kept, and how many.

    Args:
        folder: a folder on a local disk, which several trainings and their processes may share; None for
            ``$XDG_CACHE_HOME/detpipe/shards``, by default ``~/.cache/detpipe/shards``.
        gigabytes: that it may hold, of 10^9 bytes; the shards that are read at the same time have to fit.

    Raises:
        ValueError: ``gigabytes`` is not positive.
    """

    folder: str | None = None
    gigabytes: float = 50.0

    def __post_init__(self) -> None:
        if not self.gigabytes > 0:
            raise ValueError(f"cache.gigabytes must be positive, got {self.gigabytes}")

    @property
    def path(self) -> Path:
        """The folder."""
        if self.folder is not None:
            return Path(self.folder)
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "detpipe" / "shards"

    @property
    def limit(self) -> int:
        """Bytes."""
        return int(self.gigabytes * 1e9)


def open_remote(root: str, split: str, cache: ShardCache, window: int) -> ShardFiles:
    """Fetch what is known of a split, the folder ``split`` of an address, and get ready to fetch its shards when they are read.

    A DownloadError if the server cannot be reached, or has no such split; a DataError if what it has is no index of shards, or
    the cache has no room for two windows.
    """
    address = f"{root.rstrip('/')}/{split}"
    shards = _fetch_index(address, cache)
    together = _WINDOWS * window
    largest = sorted((shard.bytes for shard in shards.shards), reverse=True)[:together]
    if sum(largest) > cache.limit:
        raise DataError(
            f"{address}: {len(largest)} shards that are read at the same time take {sum(largest) / 1e9:.3g} GB, but "
            f"cache.gigabytes is {cache.gigabytes:g}: raise it, or lower window"
        )
    return ShardFiles(shards, partial(_open_shard, address, shards.shards, cache), most_open=together, where=address)


def _open_shard(address: str, shards: tuple[Shard, ...], cache: ShardCache, number: int) -> Opened:
    """Open a shard of a split that lies at an address, and fetch it before if it is not there."""
    shard = shards[number]
    folder = _folder(cache, shard)
    path = folder / shard.name
    with lock_of(cache, folder.name):
        if not path.is_file() or path.stat().st_size != shard.bytes:
            path.unlink(missing_ok=True)
            _make_room(cache, folder)
            remote = RemoteFile(f"{address}/{shard.name}", shard.bytes, "sha256", shard.sha256)
            fetch(remote, folder, advice=_ADVICE, progress=False)
        os.utime(folder)  # opened last
        return os.open(path, os.O_RDONLY), path


def _fetch_index(address: str, cache: ShardCache) -> ShardSet:
    """Fetch index and arrays of a split; arrays that are there already are not fetched again."""
    name = hashlib.sha256(address.encode()).hexdigest()
    folder = cache.path / "splits" / name
    with lock_of(cache, name):
        content = read_url(f"{address}/{INDEX}", _MOST, _ADVICE)
        with atomic_write(folder / INDEX) as temporary:
            temporary.write_bytes(content)
        arrays = read_json(folder, f"{address}/{INDEX}").arrays
        remote = RemoteFile(f"{address}/{ARRAYS}", arrays.bytes, "sha256", arrays.sha256)
        kept = folder / ARRAYS
        if kept.is_file() and hashlib.sha256(kept.read_bytes()).hexdigest() != remote.checksum:
            kept.unlink()  # of other shards, or damaged
        fetch(remote, folder, advice=_ADVICE)
        return read_index(folder)


def _make_room(cache: ShardCache, coming: Path) -> None:
    """Make the folder of a shard, and delete those that were opened least lately, until all fit; what is being fetched stays.

    A folder counts as large as its shard will be from here on, so that several that come at the same time have room.
    """
    with lock_of(cache, "room"):
        coming.mkdir(parents=True, exist_ok=True)
        os.utime(coming)
        kept = sorted((folder.stat().st_mtime_ns, folder) for folder in coming.parent.iterdir())
        total = sum(_bytes(folder) for _, folder in kept)
        for _, folder in kept:
            if total <= cache.limit:
                break
            with suppress(filelock.Timeout), lock_of(cache, folder.name).acquire(timeout=0):  # what is coming is locked
                shutil.rmtree(folder)
                total -= _bytes(folder)


def _folder(cache: ShardCache, shard: Shard) -> Path:
    return cache.path / "shards" / f"{shard.sha256}-{shard.bytes}"


def _bytes(folder: Path) -> int:
    return int(folder.name.rpartition("-")[2])


def lock_of(cache: ShardCache, name: str) -> filelock.BaseFileLock:
    """What one process of all that use the folder can hold at a time; it is free when that one ends in whatever way."""
    folder = cache.path / "locks"
    folder.mkdir(parents=True, exist_ok=True)
    return filelock.FileLock(folder / name)

"""Read whole shards, and compare them with their index: what a copy over a network is worth."""

from __future__ import annotations

import hashlib
import json
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np

from detpipe.datasets.shards.index import ShardSet, check_files, read_index
from detpipe.support.errors import DataError

_CHUNK = 1 << 20
_AGAIN = "copy it again, or write the shards again"


def verify_shards(folder: str | Path, progress: Callable[[int, int], None] | None = None) -> ShardSet:
    """Compare the shards of a split with their index: hashes, names of members, and where images lie.

    Args:
        folder: of the split.
        progress: called with the number of shards done and of all, after each.

    Returns:
        The split.

    Raises:
        DataError: a file is missing, damaged or changed, or a tar file has members that are not those of the index.
    """
    shards = read_index(folder)
    check_files(shards)
    for number in range(len(shards.shards)):
        verify_shard(shards.folder / shards.shards[number].name, shards, number)
        if progress is not None:
            progress(number + 1, len(shards.shards))
    return shards


def verify_shard(path: Path, shards: ShardSet, number: int) -> None:
    """Compare one shard with its index.

    Args:
        path: of the shard, which may lie elsewhere.
        shards: the split.
        number: of the shard.

    Raises:
        DataError: it is not the shard that was written.
    """
    _check_members(path, shards, number)
    sha256 = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            sha256.update(chunk)
    if sha256.hexdigest() != shards.shards[number].sha256:
        raise DataError(f"{path}: its content has another hash than its index says: damaged or changed; {_AGAIN}")


def _check_members(path: Path, shards: ShardSet, number: int) -> None:
    """Refuse members that a tar program would write elsewhere, and look whether each image lies where the index says."""
    rows = np.flatnonzero(shards.shard == number)
    wanted = {int(shards.images.offset[row]): int(row) for row in rows}
    keys: dict[str, int] = {}
    described: dict[str, int] = {}
    try:
        with tarfile.open(path, mode="r:") as tar:
            for member in tar:
                key, _, kind = member.name.partition(".")
                if not member.isreg() or not key.isdigit() or "/" in kind or not kind:
                    raise DataError(
                        f"{path}: the member {member.name!r} is not safe: expected plain files such as 000000000.jpg; {_AGAIN}"
                    )
                file = tar.extractfile(member)
                assert file is not None  # of a plain file
                content = file.read()
                if kind == "json":
                    described[key] = int(json.loads(content)["image_id"])
                elif member.offset_data in wanted:
                    keys[key] = wanted.pop(member.offset_data)
                    if zlib.crc32(content) != int(shards.images.crc32[keys[key]]):
                        raise DataError(f"{path}: the member {member.name!r} is damaged or changed; {_AGAIN}")
    except (tarfile.TarError, OSError, ValueError, KeyError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{path}: cannot be read as a tar file of ours ({error}); {_AGAIN}") from error
    ids = shards.annotations.image_ids
    if wanted or described != {key: int(ids[row]) for key, row in keys.items()}:
        raise DataError(f"{path}: its members are not the {len(rows)} images that its index says; {_AGAIN}")

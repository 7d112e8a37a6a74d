"""Write the shards of a split in a pool of processes; a kill at any moment costs nothing but the shards in work.

Which image lies where is decided before anything is written, by the annotations and the lengths of the files alone, and each shard
is written by one process: the shards do not depend on how many processes there are, nor on how often they were stopped.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from detpipe.datasets.shards.index import (
    INDEX,
    KEYS,
    VERSION,
    Places,
    Shard,
    ShardSet,
    read_index,
    read_plan,
    write_index,
)
from detpipe.datasets.shards.journal import WorkFolder
from detpipe.datasets.shards.tar_files import Contents, Place, Written, write_shard
from detpipe.proposal_files import ProposalStore
from detpipe.support.errors import DataError
from detpipe.support.resumable import Work, run
from detpipe.types import Annotations

_END = 10_240  # bytes that a tar file ends with, at most


@dataclass(frozen=True)
class Sharding:
    """How shards are made.

    Args:
        shard_bytes: the length that no shard exceeds, unless one image alone does.
        images_per_shard: the number of images of every shard but the last; null for as many as there is room for.
        decode: whether every image is decoded, to refuse damaged ones; else only headers are read.
        skip: whether bad images are left out and counted, instead of an error.
        seed: decides which images share a shard: they are shuffled once, so that sorted data do not stay so.
        workers: processes; 1 works in this one.
    """

    shard_bytes: int = 256_000_000
    images_per_shard: int | None = None
    decode: bool = True
    skip: bool = False
    seed: int = 0
    workers: int = 1

    def __post_init__(self) -> None:
        if self.shard_bytes < 1 or (self.images_per_shard is not None and self.images_per_shard < 1):
            raise ValueError(
                f"shard_bytes and images_per_shard must be at least 1, got {self.shard_bytes} and {self.images_per_shard}"
            )
        if self.workers < 1 or self.seed < 0:
            raise ValueError(f"workers must be at least 1 and seed at least 0, got {self.workers} and {self.seed}")


@dataclass(frozen=True)
class Made:
    """What a run did.

    Args:
        shards: the split as it is now.
        there: how many of its shards an earlier run had written.
        skipped: row, reason and message of each image that was left out.
    """

    shards: ShardSet
    there: int
    skipped: tuple[tuple[int, str, str], ...]


def make_shards(
    annotations: Annotations,
    folder: Path,
    split: str,
    key: str = "file",
    sharding: Sharding = Sharding(),
    proposals: str | Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Made:
    """Write a split as shards, going on where an earlier run stopped.

    Args:
        annotations: the ground truth.
        folder: a new one.
        split: what it is called.
        key: what proposal stores call the images, one of `KEYS`.
        sharding: how shards are made.
        proposals: a store whose boxes are to ride along.
        progress: called with the number of images done and of all, from time to time.

    Returns:
        What was done; where the same shards are there already, nothing.

    Raises:
        DataError: the folder is there with something else, an interrupted run had other data or settings, or an image is bad.
    """
    _check_proposals(annotations, key, proposals)
    contents = Contents(annotations, key, _file_lengths(annotations), proposals, sharding.decode, sharding.skip)
    groups = plan_shards(contents, sharding)
    plan = _digest(contents, sharding, split, groups)
    names = [f"shard-{number:06d}.tar" for number in range(len(groups))]
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        if not (folder / INDEX).is_file() or read_plan(folder) != plan:
            raise DataError(
                f"{folder} is there already, with something else in it: name a new folder, or remove it first"
            )
        _tell(progress, len(annotations))
        return Made(read_index(folder), len(groups), ())
    if folder.is_dir():
        folder.rmdir()  # empty, and the rename at the end is not to depend on it
    with WorkFolder(folder, plan, names) as work:
        there = len(groups) if work.complete else len(work.done)
        if not work.complete:
            jobs = [_Job(work.path / names[number], number, rows) for number, rows in enumerate(groups)]
            left = [job for job in jobs if job.number not in work.done]
            for written in write_all(contents, left, sharding.workers, len(annotations), progress):
                work.add(written)
            done = [work.done[number] for number in range(len(groups))]
            write_index(_assemble(contents, work.path, split, names, done, plan))
        work.finish()
        _tell(progress, len(annotations))
        skipped = [] if not work.done else [one for number in range(len(groups)) for one in work.done[number].skipped]
    return Made(read_index(folder), there, tuple(sorted(skipped)))


class _Job(NamedTuple):
    """A shard to write."""

    path: Path
    number: int
    rows: Sequence[int]


def write_all(
    contents: Contents,
    jobs: Sequence[_Job],
    workers: int,
    images: int,
    progress: Callable[[int, int], None] | None = None,
) -> Iterator[Written]:
    """Write shards, in any order, telling the number of images done and of all, those of earlier runs included."""
    done = images - sum(len(job.rows) for job in jobs)

    def tell(more: int = 0) -> None:
        nonlocal done
        done += more
        if progress is not None:
            progress(done, images)

    tell()
    for _, written in run(partial(_writer, contents), jobs, workers, "detpipe.datasets.shards.tar_files", tell):
        yield written


def _writer(contents: Contents) -> Work[_Job, Written]:
    """What writes shards in a process of its own."""
    return lambda job, step: write_shard(*job, contents, step)


def _tell(progress: Callable[[int, int], None] | None, images: int) -> None:
    if progress is not None:
        progress(images, images)


def plan_shards(contents: Contents, sharding: Sharding) -> list[list[int]]:
    """Decide which images lie in which shard.

    Args:
        contents: of the split.
        sharding: how shards are made.

    Returns:
        The images of each shard, in the order in which they lie.
    """
    order = np.random.default_rng(sharding.seed).permutation(len(contents.annotations)).tolist()
    if sharding.images_per_shard is not None:
        size = sharding.images_per_shard
        return [order[start : start + size] for start in range(0, len(order), size)]
    groups: list[list[int]] = []
    room = -1
    for row in order:
        length = contents.tar_bytes(row)
        if length > room:
            groups.append([])
            room = sharding.shard_bytes - _END
        groups[-1].append(row)
        room -= length
    return groups


def _check_proposals(annotations: Annotations, key: str, proposals: str | Path | None) -> None:
    if annotations.federation is not None:
        raise DataError(f"{annotations.root}: shards do not keep for which classes each image was searched (LVIS)")
    if proposals is not None:
        ids = [KEYS[key](annotations, row) for row in range(len(annotations))]
        faults = ProposalStore(proposals).check(ids, annotations.sizes)
        if faults:
            raise DataError(" ".join(faults))


def _file_lengths(annotations: Annotations) -> npt.NDArray[np.int64]:
    lengths = np.zeros(len(annotations), dtype=np.int64)
    for row, name in enumerate(annotations.file_names.tolist()):
        try:
            lengths[row] = os.stat(annotations.root / name).st_size
        except OSError:
            continue  # whoever reads it says what is wrong
    return lengths


def _digest(contents: Contents, sharding: Sharding, split: str, groups: Sequence[Sequence[int]]) -> str:
    """Name everything that decides about the shards."""
    a, store = contents.annotations, contents.proposals
    settings = {
        "version": VERSION,
        "split": split,
        "key": contents.key,
        "skip": sharding.skip,
        "decode": sharding.decode,
        "classes": [a.class_names, a.category_ids],
        "counts": a.counts,
        "proposals": None if store is None else store.content_hash,
        "files": a.file_names.tolist(),
        "groups": [list(group) for group in groups],
    }
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for array in (
        *(contents.lengths, a.image_ids, a.sizes, a.offsets),
        *(a.boxes, a.labels, a.iscrowd, a.difficult, a.area),
    ):
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def _assemble(
    contents: Contents, folder: Path, split: str, names: Sequence[str], done: Sequence[Written], plan: str
) -> ShardSet:
    """What is known of a split whose shards are all written."""
    a = contents.annotations
    shard = np.full(len(a), -1, dtype=np.int32)
    images, proposals = ([Place()] * len(a) for _ in range(2))
    counts = dict(a.counts)
    for written in done:
        shard[written.rows] = written.number
        for part, places in ((images, written.images), (proposals, written.proposals)):
            for row, place in zip(written.rows, places, strict=False):
                part[row] = place
        for row, reason, _ in written.skipped:
            boxes = int(a.offsets[row + 1] - a.offsets[row])
            for name, n in ((f"images skipped: {reason}", 1), ("boxes skipped: image skipped", boxes)):
                counts[name] = counts.get(name, 0) + n
    rows = np.flatnonzero(shard >= 0)
    if not len(rows):
        raise DataError(f"{a.root}: no image of {len(a)} is left: all were skipped")
    kept = a.subset(rows)
    counts |= {"images used": len(kept), "boxes used": len(kept.boxes)}
    store = contents.proposals
    return ShardSet(
        folder=folder,
        split=split,
        key=contents.key,
        annotations=replace(kept, counts=counts),
        shards=tuple(Shard(names[w.number], len(w.rows), w.bytes, w.sha256) for w in done),
        shard=shard[rows],
        images=_places(images, rows),
        proposals=None if store is None else _places(proposals, rows),
        source=None if store is None else {"source": store.source, "settings": store.settings},
        plan=plan,
    )


def _places(places: Sequence[Place], rows: npt.NDArray[np.intp]) -> Places:
    kept = [places[row] for row in rows.tolist()]
    offset, length, crc32 = zip(*kept, strict=True)
    return Places(np.array(offset, np.int64), np.array(length, np.int64), np.array(crc32, np.uint32))

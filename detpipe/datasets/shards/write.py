"""Write the shards of a split in a pool of processes; a kill at any moment costs nothing but the shards in work.

Which image lies where is decided before anything is written, by the annotations and the lengths of the files alone, and each shard
is written by one process: the shards do not depend on how many processes there are, nor on how often they were stopped.

They are written in ``FOLDER.partial``, which becomes the folder by a rename: what is visible under its name is complete. There,
``shard-000000.json`` is written after ``shard-000000.tar`` and says what is in it: a shard with both is finished.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import tarfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import msgspec
import numpy as np

from detpipe.datasets.annotations import count_skipped, image_fault
from detpipe.datasets.decode import image_format
from detpipe.datasets.shards import index
from detpipe.proposal_files import ProposalStore
from detpipe.support.errors import DataError
from detpipe.support.files import atomic_write, refuse_special, remove_orphans, sole_writer, synchronize, write_text
from detpipe.support.numbers import check_whole
from detpipe.support.resumable import Work, run
from detpipe.types import Annotations

SUFFIX, PLAN = ".partial", "plan.txt"
_END = 10_240  # bytes that a tar file ends with, at most
_BLOCK = tarfile.BLOCKSIZE
_SUFFIXES = {"JPEG": "jpg", "MPO": "jpg", "TIFF": "tif"}  # others are called as Pillow calls them
_REMEDY = "move it away, or name another folder"

Progress = Callable[[int, int], None]  # gets the number of images done and of all


@dataclass(frozen=True)
class Sharding:
    """How shards are made."""

    shard_bytes: int = 256_000_000  # the length that no shard exceeds, unless one image alone does
    images_per_shard: int | None = None  # of every shard but the last; None for as many as there is room for
    decode: bool = True  # whether every image is decoded, to refuse damaged ones; else only headers are read
    skip: bool = False  # whether bad images are left out and counted, instead of an error
    seed: int = 0  # decides which images share a shard: they are shuffled once, so that sorted data do not stay so
    workers: int = 1  # processes; 1 works in this one

    def __post_init__(self) -> None:
        check_whole(shard_bytes=self.shard_bytes, images_per_shard=self.images_per_shard, workers=self.workers)
        check_whole(0, seed=self.seed)


@dataclass(frozen=True)
class Made:
    """What a run did: the split as it is now, how many of its shards were there, and row, reason, message of images left out."""

    shards: index.ShardSet
    there: int
    skipped: tuple[tuple[int, str, str], ...]


class Written(msgspec.Struct):
    """A shard that is on the disk."""

    number: int  # of the shard
    bytes: int = 0  # of the file
    sha256: str = ""  # of the file
    rows: list[int] = []  # the images in it, in their order
    images: list[list[int]] = []  # offset, length and CRC-32 of each of their files
    proposals: list[list[int]] = []  # the same of their proposals; empty without
    skipped: list[tuple[int, str, str]] = []  # row, reason and message of each image that was left out


def make_shards(
    annotations: Annotations,
    folder: Path,
    split: str,
    key: str = "file",
    sharding: Sharding = Sharding(),
    proposals: str | Path | None = None,
    progress: Progress | None = None,
) -> Made:
    """Write a split as shards, going on where an earlier run stopped; where the same shards are there already, nothing.

    ``key`` is what proposal stores call the images, one of `KEYS`; the boxes of the store ``proposals`` ride along. ``progress``
    is called with the number of images done and of all, from time to time. A DataError if the folder is there with something
    else, an interrupted run had other data or settings, or an image is bad.
    """
    contents = Contents(annotations, key, sharding, proposals)
    groups = plan_shards(contents)
    plan = _digest(contents, split, groups)
    report = progress or (lambda done, of: None)
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        if not (folder / index.INDEX).is_file() or index.read_json(folder).plan != plan:
            raise DataError(
                f"{folder} is there already, with something else in it: name a new folder, or remove it first"
            )
        report(len(annotations), len(annotations))
        return Made(index.read_index(folder), len(groups), ())
    if folder.is_dir():
        folder.rmdir()  # empty, and the rename at the end is not to depend on it
    with work_folder(folder, plan) as work:
        done, complete = finished_shards(work, len(groups)), (work / index.INDEX).is_file()
        there, written = len(groups) if complete else len(done), []
        if not complete:
            done |= write_all(contents, work, {n: rows for n, rows in enumerate(groups) if n not in done}, report)
            written = [done[number] for number in range(len(groups))]
            index.write_index(_assemble(contents, work, split, written, plan))
        _finish(work, folder)
    report(len(annotations), len(annotations))
    return Made(index.read_index(folder), there, tuple(sorted(one for shard in written for one in shard.skipped)))


def shard_name(number: int) -> str:
    """What a shard is called."""
    return f"shard-{number:06d}.tar"


@contextmanager
def work_folder(folder: Path, plan: str) -> Iterator[Path]:
    """Begin or go on with the folder that shards are written in until it becomes ``folder``, for this process alone.

    A DataError if it is of another plan, holds what is not ours, or another process writes it.
    """
    work = folder.with_name(folder.name + SUFFIX)
    if work.exists() and not work.is_dir():
        raise DataError(f"{work}: is in the way: {_REMEDY}")
    folder.parent.mkdir(parents=True, exist_ok=True)
    busy = DataError(f"{work}: another process is writing it; wait for it, or name another folder")
    with sole_writer(work, busy):
        if folder.exists():
            raise DataError(f"{folder} is there already: another process made it just now")
        work.mkdir(exist_ok=True)
        _refuse_strangers(work)
        remove_orphans(work)
        if not (work / PLAN).exists() and not (work / index.INDEX).exists():
            if any(work.iterdir()):
                raise DataError(f"{work}: holds shards, but not the plan that they were made by: {_REMEDY}")
            write_text(work / PLAN, plan)
        begun = not (work / index.INDEX).exists()
        if ((work / PLAN).read_text(errors="replace") if begun else index.read_json(work).plan) != plan:
            raise DataError(
                f"{work}: an interrupted run left it with other data or settings than are asked for now; delete it to begin "
                "anew, or ask for the same"
            )
        yield work


def finished_shards(work: Path, count: int) -> dict[int, Written]:
    """Those of ``count`` shards that are on the disk as their sidecars say; a sidecar that is no JSON is as good as none."""
    done: dict[int, Written] = {}
    for path in (work / shard_name(number) for number in range(count)):
        try:
            written = msgspec.json.decode(path.with_suffix(".json").read_bytes(), type=Written)
            if path.stat().st_size == written.bytes:
                done[written.number] = written
        except (FileNotFoundError, msgspec.MsgspecError, ValueError):
            continue
    return done


def _refuse_strangers(work: Path) -> None:
    ours = {PLAN, index.INDEX, index.ARRAYS}
    for path in sorted(work.iterdir()):
        name = path.name.split(".partial-")[0]
        if name not in ours and not index.SHARD_NAME.fullmatch(str(Path(name).with_suffix(".tar"))):
            raise DataError(f"{path}: is not of shards that are being made: {_REMEDY}")


def _finish(work: Path, folder: Path) -> None:
    """Give the work folder its name, once its index is written."""
    for path in [work / PLAN, *work.glob("shard-*.json")]:
        path.unlink(missing_ok=True)
    remove_orphans(work, sole_writer=True)
    _refuse_strangers(work)
    os.rename(work, folder)
    synchronize(folder)
    synchronize(folder.parent)


def write_all(
    contents: Contents, work: Path, groups: Mapping[int, Sequence[int]], report: Progress
) -> dict[int, Written]:
    """Write shards and their sidecars, telling the number of images done, those of earlier runs included."""
    images = len(contents.annotations)
    left = sum(map(len, groups.values()))

    def tell(more: int = 0) -> None:
        nonlocal left
        left -= more
        report(images - left, images)

    tell()
    done: dict[int, Written] = {}
    jobs = [(work / shard_name(number), number, rows) for number, rows in groups.items()]
    for (path, *_), written in run(partial(_writer, contents), jobs, contents.sharding.workers, __name__, tell):
        write_text(path.with_suffix(".json"), msgspec.json.encode(written).decode())
        done[written.number] = written
    return done


def _writer(contents: Contents) -> Work[tuple[Path, int, Sequence[int]], Written]:
    return lambda job, step: write_shard(*job, contents, step)


class Contents:
    """What goes into the shards of a split; proposals of a store may ride along.

    ``lengths`` is [I] the bytes of each image file when the shards were planned. A DataError if the annotations have what shards
    cannot keep, or the proposals are of other images.
    """

    def __init__(
        self, annotations: Annotations, key: str, sharding: Sharding, proposals: str | Path | None = None
    ) -> None:
        if annotations.federation is not None:
            raise DataError(f"{annotations.root}: shards do not keep for which classes each image was searched (LVIS)")
        if annotations.windows is not None:
            raise DataError(
                f"{annotations.root}: shards keep whole images; cut tiles where they are read, by data.tiles"
            )
        self.annotations, self.key, self.sharding = annotations, key, sharding
        self.proposals = None if proposals is None else ProposalStore(proposals)
        if self.proposals is not None:
            ids = [index.KEYS[key](annotations, row) for row in range(len(annotations))]
            if faults := self.proposals.check(ids, annotations.sizes):
                raise DataError(" ".join(faults))
        paths = [os.path.join(annotations.root, name) for name in annotations.file_names.tolist()]
        # of one that is missing 0: whoever reads it says what is wrong
        self.lengths = np.array(
            [os.path.getsize(path) if os.path.exists(path) else 0 for path in paths], dtype=np.int64
        )

    def describe(self, row: int) -> bytes:
        """The annotations of an image as JSON."""
        a = self.annotations
        rows = slice(*a.offsets[row : row + 2].tolist())
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
        record = self.proposals[index.KEYS[self.key](self.annotations, row)]
        file = io.BytesIO()
        np.save(file, np.column_stack([record.boxes, record.scores]).astype("<f4"), allow_pickle=False)
        return file.getvalue()

    def tar_bytes(self, row: int) -> int:
        """How much longer a shard becomes by an image."""
        boxes = self.boxes(row)
        parts = [int(self.lengths[row]), len(self.describe(row)), *([] if boxes is None else [len(boxes)])]
        return sum(_BLOCK + -(-length // _BLOCK) * _BLOCK for length in parts)

    def read(self, row: int) -> tuple[bytes, tuple[str, str] | None]:
        """The bytes of an image file, and why it cannot be used, as of `image_fault`; a DataError if it is not the file it was."""
        a = self.annotations
        path = a.root / str(a.file_names[row])
        refuse_special(path)
        try:
            content = path.read_bytes()
        except OSError as error:
            return b"", ("unreadable", f"{path}: cannot be read ({error.strerror})")
        if len(content) != self.lengths[row]:
            raise DataError(
                f"{path}: has {len(content)} bytes, but had {self.lengths[row]} when the shards were planned: let the images "
                "rest while shards are made, and begin anew"
            )
        return content, image_fault(path, content, a.sizes[row].tolist(), decode=self.sharding.decode)


def write_shard(path: Path, number: int, rows: Sequence[int], contents: Contents, told: Callable[[], None]) -> Written:
    """Write a shard of the images of some rows, in their order; it is complete when it is visible.

    A plain tar file (ustar), without anything of who wrote it, when and where: its bytes depend on its content alone. ``told`` is
    called after each image. A DataError for an image that is bad, unless such are skipped; nothing is written then.
    """
    written = Written(number)
    with atomic_write(path) as temporary:
        with tarfile.open(temporary, "w:", format=tarfile.USTAR_FORMAT) as tar:
            for row in rows:
                image, fault = contents.read(row)
                if fault is not None and not contents.sharding.skip:
                    raise DataError(fault[1])
                if fault is not None:
                    written.skipped.append((row, *fault))
                else:
                    key, kind, boxes = f"{row:09d}", image_format(image), contents.boxes(row)
                    _add(tar, f"{key}.json", contents.describe(row))
                    written.images.append(_add(tar, f"{key}.{_SUFFIXES.get(kind, kind.lower())}", image))
                    if boxes is not None:
                        written.proposals.append(_add(tar, f"{key}.proposals.npy", boxes))
                    written.rows.append(row)
                told()
        with temporary.open("rb") as file:
            written.sha256 = hashlib.file_digest(file, "sha256").hexdigest()
            written.bytes = file.tell()
            return written


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> list[int]:
    """Append a file; its offset, length and CRC-32."""
    member = tarfile.TarInfo(name)
    member.size, member.mode = len(content), 0o644
    place = [tar.offset + _BLOCK, len(content), zlib.crc32(content)]
    tar.addfile(member, io.BytesIO(content))
    return place


def plan_shards(contents: Contents) -> list[list[int]]:
    """Decide which images lie in which shard, and in which order."""
    sharding = contents.sharding
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


def _digest(contents: Contents, split: str, groups: Sequence[Sequence[int]]) -> str:
    a, store, sharding = contents.annotations, contents.proposals, contents.sharding
    settings = {
        "version": index.VERSION,
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


def _assemble(contents: Contents, folder: Path, split: str, done: Sequence[Written], plan: str) -> index.ShardSet:
    a, store = contents.annotations, contents.proposals
    skipped: Counter[str] = Counter()
    for row, reason, _ in (one for written in done for one in written.skipped):
        skipped.update({f"images skipped: {reason}": 1, "boxes skipped: image skipped": len(a.rows_of(row))})
    rows = np.array([row for written in done for row in written.rows], dtype=np.intp)
    if not len(rows):
        raise DataError(f"{a.root}: no image of {len(a)} is left: all were skipped")
    order = np.argsort(rows)
    shard = np.repeat(np.arange(len(done), dtype=np.int32), [len(written.rows) for written in done])

    places = [place for written in done for place in written.proposals]
    return index.ShardSet(
        folder=folder,
        split=split,
        key=contents.key,
        annotations=count_skipped(a.subset(rows[order]), skipped),
        shards=tuple(index.Shard(shard_name(n), len(w.rows), w.bytes, w.sha256) for n, w in enumerate(done)),
        shard=shard[order],
        images=np.array([place for written in done for place in written.images], dtype=np.int64)[order],
        proposals=None if store is None else np.array(places, dtype=np.int64)[order],
        source=None if store is None else {"source": store.source, "settings": store.settings},
        plan=plan,
    )

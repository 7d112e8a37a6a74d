"""What is known of a split in shards without reading them: annotations in packed arrays, and where each image lies.

::

    FOLDER/index.json            this format and its version, classes, counts, and name, bytes and sha256 of each file beside it
    FOLDER/arrays.safetensors    annotations, and shard, offset, length and CRC-32 of each image
    FOLDER/shard-000000.tar      for each image KEY.json, KEY.jpg (its file as it was) and, where there are, KEY.proposals.npy

A KEY is the number of the image in the annotations, in nine digits. Images I, shards S.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
import numpy as np
import numpy.typing as npt
from msgspec import Meta
from safetensors import SafetensorError
from safetensors.numpy import load, save

from detpipe.datasets.stored_proposals import ImageKey, coco_key, file_key, voc_key
from detpipe.support.errors import DataError
from detpipe.support.files import atomic_write, refuse_special, write_text
from detpipe.support.strict_json import load_json
from detpipe.types import Annotations

FORMAT, VERSION = "detpipe.shards", 1
INDEX, ARRAYS = "index.json", "arrays.safetensors"
SHARD_NAME = re.compile(r"shard-[0-9]{6,9}\.tar")

KEYS: dict[str, ImageKey] = {"coco": coco_key, "voc": voc_key, "file": file_key}
_AGAIN = "write the shards again, or copy them again"
_KINDS: dict[
    str, tuple[type, str, tuple[int, ...]]
] = {  # type, what the rows are of if that is known, and the other axes
    "image_ids": (np.int64, "images", ()),
    "sizes": (np.int32, "images", (2,)),
    "offsets": (np.int64, "", ()),
    "boxes": (np.float64, "boxes", (4,)),
    "labels": (np.int64, "boxes", ()),
    "iscrowd": (np.bool_, "boxes", ()),
    "difficult": (np.bool_, "boxes", ()),
    "area": (np.float64, "boxes", ()),
    "name_bytes": (np.uint8, "", ()),
    "name_offsets": (np.int64, "", ()),
    "shard": (np.int32, "images", ()),
    "offset": (np.int64, "images", ()),
    "length": (np.int64, "images", ()),
    "crc32": (np.uint32, "images", ()),
}
_PACKED = tuple(_KINDS)[:8]  # of Annotations
_PLACES = ("offset", "length", "crc32")
Places = npt.NDArray[np.int64]  # [I, 3] offset, bytes and CRC-32 of a part of each image in its shard

_Count = Annotated[int, Meta(ge=0, le=2**63 - 1)]
_SHA256 = Annotated[str, Meta(pattern=r"\A[0-9a-f]{64}\Z")]  # names of folders are made of it


class Shard(msgspec.Struct, frozen=True):
    """One tar file."""

    name: Annotated[str, Meta(pattern=rf"\A{SHARD_NAME.pattern}\Z")]
    images: _Count
    bytes: _Count
    sha256: _SHA256


class Arrays(msgspec.Struct, frozen=True):
    """The file of the arrays."""

    bytes: _Count
    sha256: _SHA256
    name: str = ARRAYS


class Index(msgspec.Struct, frozen=True, kw_only=True):
    """What ``index.json`` says."""

    format: str = FORMAT
    version: int = VERSION
    split: str
    image_key: Literal["coco", "voc", "file"]
    images: _Count
    boxes: _Count
    class_names: tuple[str, ...]
    category_ids: tuple[Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)], ...]
    counts: dict[str, int]
    proposals: dict[str, Any] | None = None
    plan: str
    arrays: Arrays
    shards: tuple[Shard, ...]


@dataclass(frozen=True)
class ShardSet:
    """A split in shards."""

    folder: Path  # that holds index and shards
    split: str  # what the split was called
    key: str  # what proposal stores call its images, one of `KEYS`
    annotations: Annotations  # the ground truth; its root is the folder
    shards: tuple[Shard, ...]  # [S]
    shard: npt.NDArray[np.int32]  # [I] the number of the shard that holds each image
    images: Places  # where the image files are
    proposals: Places | None  # where the proposals are; None if none ride along
    source: dict[str, Any] | None  # who made the proposals with which settings; None without
    plan: str  # 64 hexadecimal digits that name what the shards were made of

    def subset(self, rows: npt.NDArray[np.intp]) -> ShardSet:
        """Only some images, which lie where they lay."""
        return replace(
            self,
            annotations=self.annotations.subset(rows),
            shard=self.shard[rows],
            images=self.images[rows],
            proposals=None if self.proposals is None else self.proposals[rows],
        )


def write_index(made: ShardSet) -> None:
    """Write index and arrays; the index comes last, so that shards with one are complete."""
    a = made.annotations
    names = [str(name).encode() for name in a.file_names]
    arrays = {name: getattr(a, name) for name in _PACKED}
    arrays["name_bytes"] = np.frombuffer(b"".join(names), dtype=np.uint8)
    arrays["name_offsets"] = np.cumsum([0, *map(len, names)])
    arrays["shard"] = made.shard
    for prefix, places in (("", made.images), ("proposal_", made.proposals)):
        arrays |= {prefix + name: places[:, k] for k, name in enumerate(_PLACES) if places is not None}
    kinds = {name: _KINDS[name.removeprefix("proposal_")][0] for name in arrays}
    content = save({name: np.ascontiguousarray(value, dtype=kinds[name]) for name, value in arrays.items()})
    with atomic_write(made.folder / ARRAYS) as temporary:
        temporary.write_bytes(content)
    index = Index(
        split=made.split,
        image_key=made.key,  # type: ignore[arg-type]
        images=len(a),
        boxes=len(a.boxes),
        class_names=a.class_names,
        category_ids=a.category_ids,
        counts=a.counts,
        proposals=made.source,
        plan=made.plan,
        arrays=Arrays(len(content), hashlib.sha256(content).hexdigest()),
        shards=made.shards,
    )
    write_text(made.folder / INDEX, json.dumps(msgspec.to_builtins(index), indent=1) + "\n")


def find_splits(root: Path) -> dict[str, Path]:
    """The folders of the splits in a folder, by name, those that are only begun left out; a folder of one split is that split."""
    files = [root / INDEX] if (root / INDEX).is_file() else sorted(root.glob(f"*/{INDEX}"))
    return {file.parent.name: file.parent for file in files if file.with_name(ARRAYS).is_file()}


def read_index(folder: str | Path) -> ShardSet:
    """Read what is known of a split in shards; the shards themselves are not looked at.

    A DataError if index or arrays are missing, damaged, changed, of another version, or contradict each other.
    """
    folder = Path(folder)
    index = read_json(folder)
    arrays = _read_arrays(folder, index)

    def places(prefix: str) -> Places:
        return np.column_stack([arrays[prefix + name] for name in _PLACES]).astype(np.int64)

    made = ShardSet(
        folder=folder,
        split=index.split,
        key=index.image_key,
        annotations=_annotations(folder, index, arrays),
        shards=index.shards,
        shard=arrays["shard"],
        images=places(""),
        proposals=None if index.proposals is None else places("proposal_"),
        source=index.proposals,
        plan=index.plan,
    )
    _check(made)
    return made


def read_json(folder: Path, where: str | Path = "") -> Index:
    """Read the index of a folder alone, which messages call ``where``, by default by its path; errors are those of `read_index`."""
    path = folder / INDEX
    where = where or path
    if not path.is_file():
        raise DataError(
            f"{path}: no such file; expected a folder that 'detpipe data shards' wrote to the end, with index and shards"
        )
    index = load_json(path)
    if not isinstance(index, dict) or index.get("format") != FORMAT:
        raise DataError(f"{where}: this is no index of shards; 'detpipe data shards' writes them")
    if index.get("version") != VERSION:
        raise DataError(
            f"{where}: has the version {index.get('version')!r}, this detpipe reads {VERSION}; write the shards again, or take "
            "the detpipe that wrote them"
        )
    try:
        return msgspec.convert(index, Index)
    except msgspec.ValidationError as error:
        raise DataError(f"{where}: {error}; {_AGAIN}") from error


def _read_arrays(folder: Path, index: Index) -> dict[str, npt.NDArray[Any]]:
    path, record = folder / ARRAYS, index.arrays
    refuse_special(path)
    try:
        content = path.read_bytes()
    except FileNotFoundError as error:
        raise DataError(f"{path}: no such file, but {INDEX} names it; {_AGAIN}") from error
    if len(content) != record.bytes:
        raise DataError(
            f"{path}: has {len(content)} bytes, but {INDEX} says {record.bytes}: cut off or changed; {_AGAIN}"
        )
    if hashlib.sha256(content).hexdigest() != record.sha256:
        raise DataError(f"{path}: its content has another hash than {INDEX} says: changed or damaged; {_AGAIN}")
    try:
        arrays = load(content)
    except SafetensorError as error:
        raise DataError(f"{path}: cannot be read ({error}); {_AGAIN}") from error
    for name in (*_KINDS, *(f"proposal_{name}" for name in _PLACES if index.proposals is not None)):
        kind, axis, rest = _KINDS[name.removeprefix("proposal_")]
        shape = (getattr(index, axis), *rest) if axis else (len(arrays.get(name, ())), *rest)
        if name not in arrays or arrays[name].dtype != kind or arrays[name].shape != shape:
            raise DataError(
                f"{path}: the array {name!r} is missing or not {kind.__name__} {list(shape)}, as {INDEX} says; {_AGAIN}"
            )
    return arrays


def _annotations(folder: Path, index: Index, arrays: dict[str, npt.NDArray[Any]]) -> Annotations:
    ends, text = arrays["name_offsets"].tolist(), arrays["name_bytes"].tobytes()
    try:
        names = [text[start:end].decode() for start, end in pairwise(ends)]
    except UnicodeDecodeError as error:
        raise DataError(f"{folder / ARRAYS}: a file name is not UTF-8 text; {_AGAIN}") from error
    return Annotations(
        root=folder,
        file_names=np.array(names, dtype=np.str_),
        **{name: arrays[name] for name in _PACKED},  # type: ignore[arg-type]
        class_names=index.class_names,
        category_ids=index.category_ids,
        counts=index.counts,
    )


def _check(made: ShardSet) -> None:
    """Refuse arrays that do not fit each other or the shards, so that nothing is read where nothing lies."""
    a, images, S = made.annotations, len(made.annotations), len(made.shards)
    parts = [places for places in (made.images, made.proposals) if places is not None]
    bytes_of = np.array([shard.bytes for shard in made.shards], dtype=np.int64)
    counts = np.bincount(made.shard, minlength=S).tolist() if (made.shard >= 0).all() else []
    tests: dict[str, Callable[[], bool]] = {
        "images": lambda: len(a.file_names) == images > 0,
        "boxes": lambda: len(a.boxes) == a.offsets[-1],
        "offsets": lambda: len(a.offsets) == images + 1 and a.offsets[0] == 0 and bool((np.diff(a.offsets) >= 0).all()),
        "class_names": lambda: len(a.class_names) == len(a.category_ids) == len(set(a.class_names)) > 0,
        "labels": lambda: bool(((a.labels >= 1) & (a.labels <= a.num_classes)).all()),
        "sizes": lambda: bool((a.sizes > 0).all()),
        "boxes and sizes": lambda: _inside(a),
        "image_ids": lambda: len(np.unique(a.image_ids)) == images,
        "shards": lambda: counts == [shard.images for shard in made.shards],
        "offset and length": lambda: all(
            bool((p >= 0).all()) and bool((p[:, 1] <= bytes_of[made.shard] - p[:, 0]).all())  # a sum might overflow
            for p in parts
        ),
    }
    for name, holds in tests.items():
        if not holds():
            raise DataError(
                f"{made.folder / INDEX}: {name} do not fit {ARRAYS}: the two are of different shards, or damaged; {_AGAIN}"
            )


def _inside(a: Annotations) -> bool:
    """Whether all boxes have a size and lie in their images; false for what is no number."""
    size = a.sizes[a.box_image, ::-1]  # [B, 2] width, height
    low, high = a.boxes[:, :2], a.boxes[:, 2:]
    return bool(((low >= 0) & (high > low) & (high <= size)).all() and np.isfinite(a.area).all())


def check_files(made: ShardSet) -> None:
    """Look whether every shard is there and as long as it was; a DataError counts those that are not, and names the first."""
    faults = []
    for shard in made.shards:
        path = made.folder / shard.name
        try:
            found = path.stat().st_size
        except FileNotFoundError:
            faults.append(f"{path}: no such file")
            continue
        if found != shard.bytes:
            faults.append(f"{path}: has {found} bytes, but {INDEX} says {shard.bytes}: cut off or changed")
    if faults:
        more = f" (and {len(faults) - 1} more of {len(made.shards)} shards)" if len(faults) > 1 else ""
        raise DataError(f"{faults[0]}{more}; {_AGAIN}")

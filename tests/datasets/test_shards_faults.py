"""What a damaged, missing or changed file of shards does: one line that names it, before or during training."""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import tarfile
import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save

from detpipe.datasets import Shards
from detpipe.datasets.shards.index import ARRAYS, INDEX, ShardSet, read_index
from detpipe.datasets.shards.read import verify_shards
from detpipe.support.errors import DataError

from .shard_cases import shards_in, tiny_shards


def spoil(path: Path, place: int) -> None:
    """Flip a bit."""
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(bytes(content))


def change_index(folder: Path, **changes: Any) -> None:
    index = json.loads((folder / INDEX).read_text())
    (folder / INDEX).write_text(json.dumps({**index, **changes}))


def change_arrays(folder: Path, **changes: Any) -> None:
    """Other arrays, which the index knows: what a program that writes wrong shards would leave."""
    content = save({**load_file(folder / ARRAYS), **changes})
    (folder / ARRAYS).write_bytes(content)
    change_index(folder, arrays={"name": ARRAYS, "bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()})


def index(split: str = "train", **changes: Any) -> Callable[[Path], None]:
    return lambda root: change_index(root / split, **changes)


def in_index(value: Any, *place: str | int) -> Callable[[Path], None]:
    def spoil(root: Path) -> None:
        content = part = json.loads((root / "train" / INDEX).read_text())
        for key in place[:-1]:
            part = part[key]
        part[place[-1]] = value
        (root / "train" / INDEX).write_text(json.dumps(content))

    return spoil


def arrays(changes: Callable[[ShardSet], dict[str, Any]]) -> Callable[[Path], None]:
    return lambda root: change_arrays(root / "train", **changes(read_index(root / "train")))


def shortened(name: str, by: int) -> Callable[[Path], None]:
    return lambda root: os.truncate(root / "train" / name, (root / "train" / name).stat().st_size - by)


def without(*names: str) -> Callable[[Path], None]:
    return lambda root: [(root / "train" / name).unlink() for name in names]  # type: ignore[return-value]


def moved(values: np.ndarray, to: int) -> np.ndarray:
    values = values.copy()
    values[0] = to
    return values


NAMES = len("0.jpg") * 9 + len("10.jpg") * 2
SHARD = "shard-000002.tar"
# what is done to the shards, and what is said before training
AT_START: list[tuple[Callable[[Path], None], str]] = [
    (without(SHARD, "shard-000004.tar"), r"shard-000002\.tar: no such file \(and 1 more of 6 shards\); write the shards"),
    *[(shortened(SHARD, by), r"shard-000002\.tar: has \d+ bytes, but index\.json says \d+: cut") for by in (1, -1)],
    (shortened(INDEX, 700), r"index\.json: line \d+ column \d+: not valid JSON"),
    (shortened(ARRAYS, 5), r"arrays\.safetensors: has \d+ bytes, but index\.json says"),
    (lambda root: spoil(root / "train" / ARRAYS, -100), r"arrays\.safetensors: its content has another hash"),
    (without(ARRAYS), r"arrays\.safetensors: no such file, but index\.json names it"),
    (index(version=2), r"index\.json: has the version 2, this detpipe reads 1; write the shards again"),
    (index(version=None), r"index\.json: has the version None"),
    (index(format="other"), r"index\.json: this is no index of shards"),
    (index(images=12), r"arrays\.safetensors: the array 'image_ids' is missing or not int64 \[12\], as index\.json says"),
    (index(boxes=5), r"the array 'boxes' is missing or not float64 \[5, 4\]"),
    (index(class_names=["cat"]), r"index\.json: class_names do not fit"),
    (index(class_names=["a", "b"], category_ids=[1, 2]), r"index\.json: labels do not fit"),
    (index(image_key="x"), r"index\.json: Invalid enum value 'x' - at `\$\.image_key`"),
    (index(shards=3), r"index\.json: Expected `array`, got `int` - at `\$\.shards`"),
    (index(plan=None), r"index\.json: Expected `str`, got `null` - at `\$\.plan`"),
    (index(category_ids=["x"]), r"index\.json: Expected `int`, got `str` - at `\$\.category_ids\[0\]`"),
    (index(proposals={}), r"arrays\.safetensors: the array 'proposal_offset' is missing"),
    (index("val", image_key="voc"), r"index\.json: calls images as 'voc', another split as 'coco'"),
    (index("val", class_names=["cat", "dog", "fox"]), r"the classes of train .* and val .* differ: only in train: 'owl'"),  # row 12
    *[(in_index(name, "shards", 1, "name"), r"index\.json: Expected `str` matching regex .* - at `\$\.shards\[1\]\.name`")  # row 30
      for name in ("../shard-000000.tar", "/etc/passwd", "shard-0.tar", "shard-000000.tar/..", "a\0b")],
    *[(in_index(digits, *place, "sha256"), r"index\.json: Expected `str`.* - at `\$\.(shards\[1\]|arrays)\.sha256`")
      for place in (("shards", 1), ("arrays",)) for digits in ("../../../x", "0" * 63, "A" * 64, "0" * 64 + "\n", "", 7)],
    (arrays(lambda s: {"offset": moved(s.images[:, 0], 2**62)}), "offset and length do not fit"),
    (arrays(lambda s: {"length": s.images[:, 1] + 2**40}), "offset and length do not fit"),
    (arrays(lambda s: {"offset": s.images[:, 0] - 2**20}), "offset and length do not fit"),
    (arrays(lambda s: {"shard": moved(s.shard, s.shard[0] + 1)}), "shards do not fit"),
    (arrays(lambda s: {"shard": s.shard - 1}), "shards do not fit"),
    (arrays(lambda s: {"image_ids": s.annotations.image_ids * 0}), "image_ids do not fit"),
    (arrays(lambda s: {"sizes": s.annotations.sizes * 0}), "sizes do not fit"),
    (arrays(lambda s: {"boxes": s.annotations.boxes + 100}), "boxes and sizes do not fit"),
    (arrays(lambda s: {"boxes": s.annotations.boxes * 0}), "boxes and sizes do not fit"),
    (arrays(lambda s: {"boxes": s.annotations.boxes * np.nan}), "boxes and sizes do not fit"),
    (arrays(lambda s: {"area": s.annotations.area * np.nan}), "boxes and sizes do not fit"),
    (arrays(lambda s: {"labels": s.annotations.labels * 0}), "labels do not fit"),
    (arrays(lambda s: {"offsets": s.annotations.offsets[::-1].copy()}), "do not fit"),
    (arrays(lambda s: {"iscrowd": s.annotations.iscrowd[1:]}), "the array 'iscrowd' is missing or not bool"),
    (arrays(lambda s: {"crc32": s.images[1:, 2].astype(np.uint32)}), "the array 'crc32' is missing or not uint32"),
    (arrays(lambda s: {"boxes": s.annotations.boxes.astype(np.float32)}), "the array 'boxes' is missing or not float64"),
    (arrays(lambda s: {"sizes": s.annotations.sizes.ravel()}), "the array 'sizes' is missing or not int32"),
    (arrays(lambda s: {"name_bytes": np.full(NAMES, 255, np.uint8)}), "not UTF-8"),
]  # fmt: skip


@pytest.mark.parametrize(("spoil", "message"), AT_START)
def test_what_is_wrong_is_said_at_the_start(packed: Path, spoil: Callable[[Path], None], message: str) -> None:
    spoil(packed)
    with pytest.raises(DataError, match=message):
        shards_in(packed).setup("fit")


def test_a_split_that_is_not_there_is_named_with_those_that_are(packed: Path, tmp_path: Path) -> None:
    found = r"trian: no shards here, wanted for train='trian'; splits found in .*: train, val"
    with pytest.raises(DataError, match=found):
        Shards(str(packed), train="trian").setup("fit")
    with pytest.raises(DataError, match="no test split: set the argument test"):
        shards_in(packed).annotations("test")
    with pytest.raises(DataError, match=r"splits found in .*: none; 'detpipe data shards' writes them"):
        shards_in(tmp_path / "nowhere").annotations("train")


def spoil_image(packed: Path) -> ShardSet:
    """Damage the image of row 4."""
    shards = read_index(packed / "train")
    spoil(packed / "train" / shards.shards[int(shards.shard[4])].name, int(shards.images[4, 0]) + 100)
    return shards


@pytest.mark.parametrize("workers", [0, 1])
def test_rows_23_and_33_a_shard_that_changes_later_names_itself_and_the_image(packed: Path, workers: int) -> None:
    data = shards_in(packed, workers)
    data.setup("fit")
    spoil_image(packed)
    says = r"shard-00000\d\.tar \(4\.jpg\): the file of image id 14 at byte \d+ is damaged or changed"
    with pytest.raises(DataError, match=says):
        list(data.train_dataloader())


def test_row_23_unreadable_images_are_left_out_and_counted_where_they_may_be_skipped(packed: Path) -> None:
    shards = spoil_image(packed)
    data = shards_in(packed, on_bad="skip")
    left = data.annotations("train")
    assert sorted(left.image_ids.tolist()) == sorted(set(shards.annotations.image_ids.tolist()) - {14})
    assert left.counts["images skipped: unreadable"] == 1
    assert sum(len(images) for images, _ in data.train_dataloader()) == len(left)


@pytest.mark.parametrize("opened", [False, True])
def test_a_shard_that_is_cut_off_later_names_itself(packed: Path, opened: bool) -> None:
    dataset, shards = shards_in(packed).dataset("train"), read_index(packed / "train")
    if opened:
        dataset[0, 0]
    path = packed / "train" / shards.shards[int(shards.shard[0])].name
    os.truncate(path, int(shards.images[0, 0]) + 10)
    with pytest.raises(DataError, match=rf"{path.name}.*cut off"):
        dataset[0, 0]


def test_a_shard_that_goes_away_before_it_is_opened_names_itself(packed: Path) -> None:
    dataset = shards_in(packed).dataset("train")
    shutil.rmtree(packed / "train")
    with pytest.raises(DataError, match=r"shard-00000\d\.tar: cannot be opened \(No such file or directory\)"):
        dataset[0, 0]


def test_row_25_a_size_that_differs_from_the_index_names_the_shard(packed: Path) -> None:
    sizes = read_index(packed / "train").annotations.sizes.copy()
    sizes[0] = sizes[0, ::-1]
    change_arrays(packed / "train", sizes=sizes)
    with pytest.raises(DataError, match=r"shard-00000\d\.tar \(0\.jpg\): the image is 60 x 40 pixels.*swapped"):
        shards_in(packed).dataset("train")[0, 0]


def test_an_image_that_was_packed_unseen_names_the_shard(tmp_path: Path) -> None:
    shards, row = tiny_shards(tmp_path, 3, 3, decode=False).shards, 1
    path = shards.folder / shards.shards[0].name
    start, length = int(shards.images[row, 0]), int(shards.images[row, 1])
    content = bytearray(path.read_bytes())
    content[start + 40 : start + length] = bytes(length - 40)  # the header stays
    path.write_bytes(bytes(content))
    crc32 = shards.images[:, 2].astype(np.uint32)
    crc32[row] = zlib.crc32(bytes(content[start : start + length]))
    change_arrays(shards.folder, crc32=crc32)
    with pytest.raises(DataError, match=r"shard-000000\.tar \(001\.png\): cannot be decoded as an image"):
        shards_in(tmp_path / "shards").dataset("train")[0, row]


def tar_of(name: str, kind: bytes = tarfile.REGTYPE, content: bytes = b"x") -> bytes:
    file, member = io.BytesIO(), tarfile.TarInfo(name)
    member.type, member.size, member.linkname = kind, len(content), "/etc/passwd"
    with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        tar.addfile(member, io.BytesIO(content))
    return file.getvalue()


def replaced(content: bytes, path: Path, *_: int) -> None:
    """Another file of the same length."""
    length = path.stat().st_size
    path.write_bytes(content[:length].ljust(length, b"\0"))


UNSAFE, OTHERS = (
    r"the member .* is not safe: expected plain files",
    "its members are not the 2 images that its index says",
)
# what is done to a shard, of which the offset of an image is known, and what its comparison with the index says
IN_SHARDS: list[tuple[Callable[[Path, int], None], str]] = [
    (lambda path, _: spoil(path, path.stat().st_size - 100), "its content has another hash"),  # after the last member
    (lambda path, offset: spoil(path, offset + 50), r"the member '0000000\d\d\.jpg' is damaged or changed"),
    (lambda path, offset: spoil(path, offset - 400), OTHERS),  # a header, where tar programs stop
    *[(partial(replaced, tar_of(name)), UNSAFE)
      for name in ("../000000001.jpg", "/etc/000000001.jpg", "000000001.jpg/../../x", "000000001")],
    *[(partial(replaced, tar_of("000000001.jpg", kind, b"")), UNSAFE)
      for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE)],
    (partial(replaced, b"x" * 10**6), "cannot be read as a tar file of ours"),
    (partial(replaced, tar_of("000000001.json", content=b'{"image_id": 3}')), OTHERS),
]  # fmt: skip


@pytest.mark.parametrize(("spoil", "message"), IN_SHARDS)
def test_row_30_verifying_reads_everything(packed: Path, spoil: Callable[[Path, int], None], message: str) -> None:
    told: list[tuple[int, int]] = []
    assert len(verify_shards(packed / "train", lambda *now: told.append(now)).annotations) == 11
    assert told == [(n, 6) for n in range(1, 7)]
    shards = read_index(packed / "train")
    spoil(packed / "train" / "shard-000003.tar", int(shards.images[np.flatnonzero(shards.shard == 3)[0], 0]))
    with pytest.raises(DataError, match=rf"shard-000003\.tar: {message}"):
        verify_shards(packed / "train")

"""What a damaged, missing or changed file of shards does: one line that names it, before or during training."""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import tarfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save

from detpipe.datasets import Shards
from detpipe.datasets.shards.index import ARRAYS, INDEX, read_index
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


def test_a_split_that_is_not_there_is_named_with_those_that_are(packed: Path, tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"trian: no shards here, wanted for train='trian'; splits found in .*: train, val"
    ):
        Shards(str(packed), train="trian").setup("fit")
    with pytest.raises(DataError, match="no test split: set the argument test"):
        shards_in(packed).annotations("test")
    with pytest.raises(DataError, match=r"splits found in .*: none; 'detpipe data shards' writes them"):
        shards_in(tmp_path / "nowhere").annotations("train")


def test_missing_shards_are_an_error_at_the_start(packed: Path) -> None:
    (packed / "train" / "shard-000002.tar").unlink()
    (packed / "train" / "shard-000004.tar").unlink()
    with pytest.raises(
        DataError, match=r"shard-000002\.tar: no such file \(and 1 more of 6 shards\); write the shards"
    ):
        shards_in(packed).setup("fit")


@pytest.mark.parametrize("change", [-1, 1])
def test_a_shard_of_another_length_is_an_error_at_the_start(packed: Path, change: int) -> None:
    path = packed / "val" / "shard-000001.tar"
    size = path.stat().st_size
    os.truncate(path, size + change)
    with pytest.raises(
        DataError, match=rf"shard-000001\.tar: has {size + change} bytes, but index\.json says {size}: cut"
    ):
        shards_in(packed).setup("fit")


@pytest.mark.parametrize("workers", [0, 1])
def test_rows_23_and_33_a_shard_that_changes_later_names_itself_and_the_image(packed: Path, workers: int) -> None:
    data = shards_in(packed, workers)
    data.setup("fit")
    shards = read_index(packed / "train")
    row = 4
    path = packed / "train" / shards.shards[int(shards.shard[row])].name
    spoil(path, int(shards.images.offset[row]) + 100)
    with pytest.raises(
        DataError, match=rf"{path.name} \(4\.jpg\): the file of image id 14 at byte \d+ is damaged or changed"
    ):
        list(data.train_dataloader())


def test_row_23_unreadable_images_are_left_out_and_counted_where_they_may_be_skipped(packed: Path) -> None:
    shards = read_index(packed / "train")
    spoil(packed / "train" / shards.shards[int(shards.shard[4])].name, int(shards.images.offset[4]) + 100)
    data = shards_in(packed, on_bad="skip")
    left = data.annotations("train")
    assert sorted(left.image_ids.tolist()) == sorted(set(shards.annotations.image_ids.tolist()) - {14})
    assert left.counts["images skipped: unreadable"] == 1
    assert sum(len(images) for images, _ in data.train_dataloader()) == len(left)


@pytest.mark.parametrize("when", ["before it is opened", "after it was opened"])
def test_a_shard_that_is_cut_off_later_names_itself(packed: Path, when: str) -> None:
    data = shards_in(packed)
    dataset = data.dataset("train")
    shards = read_index(packed / "train")
    if when.startswith("after"):
        dataset[0, 0]
    path = packed / "train" / shards.shards[int(shards.shard[0])].name
    os.truncate(path, int(shards.images.offset[0]) + 10)
    with pytest.raises(DataError, match=rf"{path.name}.*cut off"):
        dataset[0, 0]
    path.unlink()
    again = shards_in(packed)
    with pytest.raises(DataError, match=rf"{path.name}: no such file"):
        again.setup("fit")


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
    made = tiny_shards(tmp_path, 3, 3, decode=False)
    shards = made.shards
    row = 1
    path = shards.folder / shards.shards[0].name
    start, length = int(shards.images.offset[row]), int(shards.images.length[row])
    content = bytearray(path.read_bytes())
    content[start + 40 : start + length] = bytes(length - 40)  # the header stays
    path.write_bytes(bytes(content))
    crc32 = shards.images.crc32.copy()
    crc32[row] = zlib.crc32(bytes(content[start : start + length]))
    change_arrays(shards.folder, crc32=crc32)
    with pytest.raises(DataError, match=r"shard-000000\.tar \(001\.png\): cannot be decoded as an image"):
        shards_in(tmp_path / "shards").dataset("train")[0, row]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"version": 2}, r"index\.json: has the version 2, this detpipe reads 1; write the shards again"),
        ({"version": None}, r"index\.json: has the version None"),
        ({"format": "other"}, r"index\.json: this is no index of shards"),
        ({"images": 12}, r"index\.json: images do not fit arrays\.safetensors"),
        ({"boxes": 5}, r"index\.json: boxes do not fit"),
        ({"class_names": ["cat"]}, r"index\.json: class_names do not fit"),
        ({"class_names": ["a", "b"], "category_ids": [1, 2]}, r"index\.json: labels do not fit"),
        ({"image_key": "x"}, r"'image_key' is 'x': expected one of coco, voc, file"),
        ({"shards": 3}, r"index\.json: the field 'shards' is 3"),
        ({"plan": None}, r"index\.json: the field 'plan' is None"),
        ({"proposals": {}}, r"arrays\.safetensors: the array 'proposal_offset' is missing"),
    ],
)
def test_an_index_that_is_wrong_is_named(packed: Path, changes: dict[str, Any], message: str) -> None:
    change_index(packed / "train", **changes)
    with pytest.raises(DataError, match=message):
        shards_in(packed).annotations("train")


SPOILED = [
    *[(("shards", 1, "name"), name, r"shard 1: the name .* is not safe")  # row 30
      for name in ("../shard-000000.tar", "/etc/passwd", "shard-0.tar", "shard-000000.tar/..", "a\0b")],
    *[((*field, "sha256"), digits, r"(shard 1|arrays): the field 'sha256' is .*expected")
      for field in (("shards", 1), ("arrays",)) for digits in ("../../../x", "0" * 63, "A" * 64, "0" * 64 + "\n", "", 7)],
]  # fmt: skip


def test_what_leads_elsewhere_is_refused(packed: Path) -> None:
    text = (packed / "train" / INDEX).read_text()
    for (*path, last), value, message in SPOILED:
        index = part = json.loads(text)
        for key in path:
            part = part[key]
        part[last] = value
        (packed / "train" / INDEX).write_text(json.dumps(index))
        with pytest.raises(DataError, match=rf"index\.json: {message}"):
            shards_in(packed).annotations("train")
    (packed / "train" / INDEX).write_text(text[: len(text) // 2])
    with pytest.raises(DataError, match=r"index\.json: line \d+ column \d+: not valid JSON"):
        shards_in(packed).annotations("train")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_key": "voc"}, r"index\.json: calls images as 'voc', another split as 'coco'"),
        (
            {"class_names": ["cat", "dog", "fox"]},
            r"the classes of train .* and val .* differ: only in train: 'owl'",
        ),  # row 12
    ],
)
def test_splits_that_do_not_belong_together_are_refused(packed: Path, changes: dict[str, Any], message: str) -> None:
    change_index(packed / "val", **changes)
    with pytest.raises(DataError, match=message):
        shards_in(packed).setup("fit")


def test_arrays_that_are_missing_cut_off_or_changed_are_named(packed: Path) -> None:
    path = packed / "train" / ARRAYS
    content = path.read_bytes()
    spoil(path, len(content) // 2)
    with pytest.raises(DataError, match=r"arrays\.safetensors: its content has another hash"):
        shards_in(packed).annotations("train")
    path.write_bytes(content[:-5])
    with pytest.raises(DataError, match=r"arrays\.safetensors: has \d+ bytes, but index\.json says"):
        shards_in(packed).annotations("train")
    path.unlink()
    with pytest.raises(DataError, match=r"arrays\.safetensors: no such file, but index\.json names it"):
        shards_in(packed).annotations("train")


def wrong_arrays(shards: Any) -> list[tuple[dict[str, Any], str]]:
    a, places = shards.annotations, shards.images
    far = places.offset.copy()
    far[0] = 2**62
    elsewhere = shards.shard.copy()
    elsewhere[0] += 1
    return [
        ({"offset": far}, "offset and length do not fit"),
        ({"length": places.length + 2**40}, "offset and length do not fit"),
        ({"offset": places.offset - 2**20}, "offset and length do not fit"),
        ({"shard": elsewhere}, "shards do not fit"),
        ({"shard": shards.shard - 1}, "shards do not fit"),
        ({"image_ids": a.image_ids * 0}, "image_ids do not fit"),
        ({"sizes": a.sizes * 0}, "sizes do not fit"),
        ({"boxes": a.boxes + 100}, "boxes and sizes do not fit"),
        ({"boxes": a.boxes * 0}, "boxes and sizes do not fit"),
        ({"boxes": a.boxes * np.nan}, "boxes and sizes do not fit"),
        ({"area": a.area * np.nan}, "boxes and sizes do not fit"),
        ({"labels": a.labels * 0}, "labels do not fit"),
        ({"offsets": a.offsets[::-1].copy()}, "do not fit"),
        ({"iscrowd": a.iscrowd[1:]}, "flags do not fit"),
        ({"crc32": places.crc32[1:]}, "places do not fit"),
        ({"boxes": a.boxes.astype(np.float32)}, "the array 'boxes' is missing or not float64"),
        ({"sizes": a.sizes.ravel()}, "the array 'sizes' is missing or not int32"),
        ({"name_bytes": np.full(len("0.jpg") * 9 + len("10.jpg") * 2, 255, np.uint8)}, "not UTF-8"),
    ]


def test_arrays_that_contradict_the_index_are_refused(packed: Path) -> None:
    good = {name: (packed / "train" / name).read_bytes() for name in (INDEX, ARRAYS)}
    for changes, message in wrong_arrays(read_index(packed / "train")):
        change_arrays(packed / "train", **changes)
        with pytest.raises(DataError, match=message):
            shards_in(packed).annotations("train")
        for name, content in good.items():
            (packed / "train" / name).write_bytes(content)


def test_verifying_reads_everything(packed: Path) -> None:
    told: list[tuple[int, int]] = []
    assert len(verify_shards(packed / "train", lambda *now: told.append(now)).annotations) == 11
    assert told == [(n, 6) for n in range(1, 7)]
    path = packed / "train" / "shard-000003.tar"
    content = path.read_bytes()
    shards = read_index(packed / "train")
    row = int(np.flatnonzero(shards.shard == 3)[0])
    for place, message in (
        (len(content) - 100, "its content has another hash"),  # after the last member
        (int(shards.images.offset[row]) + 50, r"the member '0000000\d\d\.jpg' is damaged or changed"),
        (int(shards.images.offset[row]) - 400, "its members are not the 2 images"),  # a header, where tar programs stop
    ):
        spoil(path, place)
        with pytest.raises(DataError, match=rf"shard-000003\.tar: {message}"):
            verify_shards(packed / "train")
        path.write_bytes(content)


def tar_of(members: list[tuple[str, bytes, bytes]], length: int) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for name, kind, content in members:
            member = tarfile.TarInfo(name)
            member.type, member.size = kind, len(content)
            if kind == tarfile.SYMTYPE:
                member.linkname = "/etc/passwd"
            tar.addfile(member, io.BytesIO(content))
    return file.getvalue()[:length].ljust(length, b"\0")


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("../000000001.jpg", tarfile.REGTYPE),
        ("/etc/000000001.jpg", tarfile.REGTYPE),
        ("000000001.jpg/../../x", tarfile.REGTYPE),
        ("000000001.jpg", tarfile.SYMTYPE),
        ("000000001.jpg", tarfile.LNKTYPE),
        ("000000001", tarfile.REGTYPE),
        ("000000001.jpg", tarfile.CHRTYPE),
    ],
)
def test_row_30_members_with_unsafe_names_are_refused(packed: Path, name: str, kind: bytes) -> None:
    path = packed / "train" / "shard-000000.tar"
    content = b"x" if kind == tarfile.REGTYPE else b""
    path.write_bytes(tar_of([(name, kind, content)], path.stat().st_size))
    with pytest.raises(DataError, match=r"shard-000000\.tar: the member .* is not safe: expected plain files"):
        verify_shards(packed / "train")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"x", "cannot be read as a tar file of ours"),
        (
            tar_of([("000000001.json", tarfile.REGTYPE, b'{"image_id": 3}')], 2048),
            "its members are not the 2 images that its index says",
        ),
    ],
)
def test_another_file_in_the_place_of_a_shard_is_named(packed: Path, content: bytes, message: str) -> None:
    path = packed / "train" / "shard-000000.tar"
    path.write_bytes(content.ljust(path.stat().st_size, content[-1:]))
    with pytest.raises(DataError, match=rf"shard-000000\.tar: {message}"):
        verify_shards(packed / "train")

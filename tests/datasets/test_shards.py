from __future__ import annotations

import gc
import json
import pickle
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from detpipe.datasets import VOC, YOLO, Augment, DetectionData, Shards, VOCFormat
from detpipe.datasets.shards.index import read_index
from detpipe.datasets.shards.read import ShardFiles
from detpipe.datasets.shards.write import Sharding, make_shards
from detpipe.proposal_files import write_store
from detpipe.support.errors import DataError
from detpipe.types import Annotations

from .builders import write_voc, write_yolo
from .shard_cases import digest, files_in, hashes, pack, shards_in, tiny_annotations, tiny_shards

ARRAYS = ("file_names", "image_ids", "sizes", "offsets", "boxes", "labels", "iscrowd", "difficult", "area")


def same_annotations(first: Annotations, second: Annotations) -> bool:
    equal = all(np.array_equal(getattr(first, name), getattr(second, name)) for name in ARRAYS)
    kinds = all(getattr(first, name).dtype == getattr(second, name).dtype for name in ARRAYS[1:])
    names = (first.class_names, first.category_ids) == (second.class_names, second.category_ids)
    return equal and kinds and names


def test_annotations_are_those_of_the_files_to_the_last_bit(eleven: Path) -> None:
    files, shards = files_in(eleven / "files"), shards_in(eleven / "shards")
    for split in ("train", "val"):
        assert same_annotations(files.annotations(split), shards.annotations(split))
        assert files.annotations(split).counts == shards.annotations(split).counts
        assert files.describe(split) == shards.describe(split)
        assert shards.annotations(split).root == eleven / "shards" / split
    assert shards.category_ids == (1, 7, 90)  # row 9: gaps stay


def test_every_field_of_annotations_is_kept() -> None:
    """A field that is added to annotations must be packed into shards, or refused there as ``federation`` is."""
    assert {field.name for field in fields(Annotations)} == {
        *ARRAYS,
        *("root", "class_names", "category_ids", "federation", "counts"),
        "windows",  # of tiles, which shards refuse
        "segmentations",  # only there where an augmentation asks a data set for them, which shards refuse
    }


def test_in_one_window_every_batch_is_that_of_the_files(eleven: Path) -> None:
    files, shards = files_in(eleven / "files"), shards_in(eleven / "shards", window=6)
    assert hashes(shards, 3) == hashes(files, 3)
    assert [digest(batch) for batch in shards.val_dataloader()] == [digest(batch) for batch in files.val_dataloader()]


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_p2_batches_do_not_depend_on_the_number_of_workers(eleven: Path) -> None:
    expected = hashes(shards_in(eleven / "shards", window=2))
    assert expected != hashes(shards_in(eleven / "shards", window=6))
    for workers in (1, 3):
        assert hashes(shards_in(eleven / "shards", workers, window=2)) == expected


def test_a_batch_is_made_of_the_images_of_few_shards(tmp_path: Path) -> None:
    tiny_shards(tmp_path, 400, 4, decode=False)  # 100 shards
    data = shards_in(tmp_path / "shards", batch_size=2, augment=None, window=3)
    shard = read_index(tmp_path / "shards" / "train").shard
    batches = data.train_dataloader().batch_sampler.batches  # type: ignore[union-attr]
    orders = []
    for epoch in range(2):
        rows = [row for batch in batches(epoch) for row in batch]
        pools = [shard[rows[start : start + 64]] for start in range(0, len(rows), 64)]  # 32 batches
        assert max(len(set(pool)) for pool in pools) <= 64 // 4 + 2 * 3  # whole windows, and two that are cut
        places: dict[int, list[int]] = {}
        for place, number in enumerate(shard[rows].tolist()):
            places.setdefault(number, []).append(place)
        assert max(found[-1] - found[0] for found in places.values()) < 2 * 64  # read in one go, then not again
        orders.append(rows)
    assert sorted(orders[0]) == sorted(orders[1]) == list(range(400))
    assert orders[0] != orders[1]
    together = [{frozenset(batch) for batch in batches(epoch)} for epoch in range(2)]
    assert len(together[0] & together[1]) < 20  # other neighbors in another epoch


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("workers", [1, 3])
def test_every_image_comes_exactly_once_through_more_workers_than_shards(tmp_path: Path, workers: int) -> None:
    tiny_shards(tmp_path, 13, 7)  # two shards
    data = shards_in(tmp_path / "shards", workers, batch_size=2, augment=None, window=1)
    ids = sorted(data.annotations("val").image_ids.tolist())
    for loader in (data.train_dataloader(), data.val_dataloader()):
        assert sorted(int(target["image_id"]) for _, targets in loader for target in targets) == ids


def test_a_dataset_can_be_sent_to_another_process(eleven: Path) -> None:
    dataset = shards_in(eleven / "shards").dataset("train")
    image = dataset[0, 1][0]
    copy = pickle.loads(pickle.dumps(dataset))
    del dataset  # closes its files
    assert torch.equal(copy[0, 1][0], image)


def test_more_shards_than_files_may_be_open(tmp_path: Path) -> None:
    tiny_shards(tmp_path, 20, 1)
    data = shards_in(tmp_path / "shards", augment=None, window=20)
    files: ShardFiles = data.contents("train")  # type: ignore[assignment]
    files.most_open = 2
    for _ in range(2):
        assert sum(len(images) for images, _ in data.train_dataloader()) == 20
    assert len(files._open) == 2


@pytest.mark.parametrize("layout", ["coco", "voc", "file"])
def test_stores_call_images_as_in_the_layout_that_was_packed(tmp_path: Path, layout: str) -> None:
    if layout == "coco":
        files: DetectionData = files_in(tmp_path / "data")
    elif layout == "voc":
        files = VOC(str(write_voc(tmp_path / "data")), "train", "train", format=VOCFormat("auto"))
    else:
        files = YOLO(str(write_yolo(tmp_path / "data")), "train", "train")
    a = files.annotations("val")
    names = {files.image_key(a, row): a.sizes[row].tolist() for row in range(len(a))}

    def store(name: str, boxes: list[list[int]], **more: Any) -> Path:
        records = [
            (key, [[0, 0, row + 1, 5], *boxes], [0.9] * (1 + len(boxes)), tuple(names[key]))
            for row, key in enumerate(names)
        ]
        return write_store(tmp_path / name, records, source="by hand", **more).path

    riding = store("boxes.safetensors", [[1, 1, 9, 9]], settings={"depth": 1})
    made = make_shards(a, tmp_path / "shards" / "val", "val", layout, Sharding(images_per_shard=2), riding)
    assert made.shards.source == {"source": "by hand", "settings": {"depth": 1}}
    shards = Shards(str(tmp_path / "shards"), "val", "val", augment=Augment(flip=1.0))
    for row, (_, width) in enumerate(names.values()):
        assert shards.dataset("val")[0, row][1]["proposals"].tolist() == [[0, 0, row + 1, 5], [1, 1, 9, 9]]
        flipped = shards.dataset("val", augmented=True)[0, row][1]["proposals"]
        assert flipped[1].tolist() == [width - 9, 1, width - 1, 9]
    proposals = shards.proposals("val")
    assert proposals is not None
    assert set(proposals) == set(a.image_ids.tolist())
    with pytest.raises(KeyError):
        proposals[-1]
    given = {"val": str(store("other.safetensors", []))}
    other = Shards(str(tmp_path / "shards"), "val", "val", proposals=given)
    assert other.dataset("val")[0, 0][1]["proposals"].tolist() == [[0, 0, 1, 5]]


def test_proposals_that_lack_images_are_refused(tmp_path: Path) -> None:
    a = tiny_annotations(tmp_path / "images", 4)
    store = write_store(tmp_path / "b.safetensors", {"000.png": ([[0, 0, 1, 1]], [1.0])}, source="x")
    with pytest.raises(DataError, match=r"b\.safetensors.*3 of 4"):
        make_shards(a, tmp_path / "s", "train", "file", proposals=store.path)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # webdataset closes no files
def test_plain_webdataset_reads_them(tmp_path: Path) -> None:
    webdataset = pytest.importorskip("webdataset")
    files = files_in(tmp_path / "files")
    a = files.annotations("train")
    store = write_store(
        tmp_path / "b.safetensors", {str(i): ([[0, 0, 5, 5]], [0.5]) for i in a.image_ids.tolist()}, source="x"
    )
    pack(files, tmp_path / "shards", proposals=store.path)
    urls = sorted(str(path) for path in (tmp_path / "shards" / "train").glob("*.tar"))
    samples = list(webdataset.WebDataset(urls, shardshuffle=False).decode("rgb8"))
    assert len(samples) == len(a)
    by_id = {sample["json"]["image_id"]: sample for sample in samples}
    for row, image_id in enumerate(a.image_ids.tolist()):
        sample, target = by_id[image_id], files.dataset("train").target(row)
        assert sample["json"]["boxes"] == a.boxes[a.offsets[row] : a.offsets[row + 1]].tolist()
        assert sample["json"]["labels"] == target["labels"].tolist()
        assert sample["json"]["category_ids"] == [a.category_ids[k - 1] for k in sample["json"]["labels"]]
        assert (sample["json"]["height"], sample["json"]["width"]) == sample["jpg"].shape[:2]
        np.testing.assert_allclose(sample["proposals.npy"], [[0, 0, 5, 5, 0.5]])
    raw = {
        json.loads(sample["json"])["file_name"]: sample["jpg"]
        for sample in webdataset.WebDataset(urls, shardshuffle=False)
    }
    assert raw == {name: (a.root / name).read_bytes() for name in a.file_names.tolist()}  # as they were
    gc.collect()

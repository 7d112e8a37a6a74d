"""What data workers cost and how they end: rows 33 and 34 of the fault matrix."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from detpipe.datasets import COCO, Loader, load_coco
from detpipe.datasets.dataset import DetectionDataset
from detpipe.datasets.workers import collate
from detpipe.support.errors import DataError
from detpipe.types import Annotations

from .builders import coco_content, write_coco

MIB = 2**20


def test_row_33_an_error_keeps_its_kind_and_the_path_on_the_way_from_a_worker(tmp_path: Path) -> None:
    path, folder = write_coco(tmp_path, coco_content(((40, 60),) * 4))
    annotations = load_coco(path, folder)
    (folder / "2.jpg").write_bytes(b"not a picture")
    batches = Loader(batch_size=1, num_workers=1).load(
        DetectionDataset(annotations), annotations.sizes, 0, False, collate
    )
    with pytest.raises(DataError, match=r"train/2\.jpg"):
        list(batches)


class Targets(DetectionDataset):
    """Everything but the pixels, and what the worker keeps to itself."""

    def __getitem__(self, key: tuple[int, int]) -> Any:
        target = self.target(key[1])
        private = psutil.Process().memory_full_info().uss if key[1] % 100 == 0 else 0
        return os.getpid(), private, len(target["boxes"])


def private_memory(dataset: Targets, sizes: Any, epochs: int) -> list[int]:
    """The most private memory of any worker in each epoch, in bytes."""
    batches = Loader(batch_size=50, num_workers=2).load(dataset, sizes, 0, True, list)
    return [max(private for batch in batches for _, private, _ in batch) for _ in range(epochs)]


def many_records(root: Path) -> Annotations:
    images = [{"id": i, "file_name": f"{i}.jpg", "height": 40, "width": 60} for i in range(6000)]
    boxes = [
        {"id": b, "image_id": b % 6000, "category_id": 1, "bbox": [1.5, 2.5, 10, 20], "area": 200, "iscrowd": 0}
        for b in range(60_000)
    ]
    (root / "images").mkdir()
    for image in images:
        (root / "images" / str(image["file_name"])).touch()
    path = root / "a.json"
    path.write_text(json.dumps({"images": images, "annotations": boxes, "categories": [{"id": 1, "name": "x"}]}))
    return load_coco(path, root / "images")


@pytest.mark.usefixtures("no_collection")
@pytest.mark.slow
def test_row_34_workers_do_not_grow_with_the_epochs(tmp_path: Path) -> None:
    annotations = many_records(tmp_path)
    assert len(annotations.boxes) == 60_000
    first, _, third = private_memory(Targets(annotations), annotations.sizes, 3)
    assert third < 1.2 * first
    assert third - first < 4 * MIB


@pytest.mark.usefixtures("no_collection")
@pytest.mark.slow
def test_row_34_the_annotations_are_shared_and_not_copied(tmp_path: Path) -> None:
    annotations = many_records(tmp_path)
    few = annotations.subset(torch.arange(200).numpy())
    alone = private_memory(Targets(few), few.sizes, 3)[-1]
    assert private_memory(Targets(annotations), annotations.sizes, 3)[-1] - alone < 4 * MIB


def test_the_timeout_of_the_settings_reaches_the_loader(tmp_path: Path) -> None:
    write_coco(tmp_path, split="val")
    data = COCO(str(tmp_path), "val", "val", loader=Loader(num_workers=1, timeout=7))
    assert data.val_dataloader().timeout == 7

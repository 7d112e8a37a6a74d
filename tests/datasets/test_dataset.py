"""Augmented images as a data set hands them out: the same for any number of workers, and errors before training."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from detpipe.datasets import COCO, Augment, Resize
from detpipe.datasets.augment.settings import (
    Combine,
    CopyPaste,
    Degrade,
    MixUp,
    Mosaic,
    Photometric,
    SafeCrop,
    Transform,
)
from detpipe.support.errors import DataError

from .builders import coco_content, write_coco, write_voc
from .shard_cases import SEVEN, digest, files_in, hashes

COMBINE = Combine(CopyPaste(p=0.7), Mosaic(p=0.5), MixUp(p=0.5))
EVERYTHING = Augment(
    *(0.5, (0.7, 1.4), 0.3, 0.2, 0.1, 0.5),
    safe_crop=SafeCrop(),
    photometric=Photometric(gray=0.2),
    degrade=Degrade(0.5, 0.5, 0.5),
    combine=COMBINE,
    transforms=(Transform("Affine", {"rotate": [-10, 10], "p": 0.5}), Transform("PlasmaShadow", {"p": 0.5})),
)


def data_in(root: Path, workers: int = 0, augment: Augment = EVERYTHING, **changes: Any) -> COCO:
    """Seven images whose boxes are their own outlines."""
    content = coco_content(SEVEN)
    for record in content["annotations"]:
        x, y, w, h = record["bbox"]
        record["segmentation"] = [[x, y, x + w, y, x + w, y + h, x, y + h]]
    if not (root / "train").exists():
        write_coco(root, content, "train")
        write_coco(root, content, "val")
    return files_in(root, workers, augment=augment, **changes)


def test_p2_row_35_any_number_of_workers_draws_the_same(tmp_path: Path) -> None:
    for more in ({}, {"resize": Resize("shortest_side", [30, 40, 50], 90)}):
        expected = hashes(data_in(tmp_path, **more))
        assert expected[0] != expected[1]
        for workers in (1, 2):
            assert hashes(data_in(tmp_path, workers, **more)) == expected
        assert hashes(data_in(tmp_path, seed=1, **more)) != expected


def test_row_35_epochs_and_images_draw_anew(tmp_path: Path) -> None:
    dataset = data_in(tmp_path).dataset("train", augmented=True)
    drawn = {digest(([image], [target])) for image, target in (dataset[e, i] for e in range(4) for i in range(7))}
    assert len(drawn) == 28
    image, target = dataset[3, 2]
    for other in (dataset[1, 5], dataset[3, 2]):  # what was drawn between does not matter
        last = other
    assert digest(([image], [target])) == digest(([last[0]], [last[1]]))


@pytest.mark.parametrize(
    "alone", [Combine(mosaic=Mosaic(p=1.0)), Combine(mixup=MixUp(p=1.0)), Combine(CopyPaste(p=1.0))]
)
def test_neighbors_change_from_epoch_to_epoch(tmp_path: Path, alone: Combine) -> None:
    dataset = data_in(tmp_path, augment=Augment(flip=0, combine=alone)).dataset("train", augmented=True)
    read: list[int] = []
    plain = dataset.read
    dataset.read = lambda index: (read.append(index), plain(index))[1]  # type: ignore[method-assign]
    neighbors = set()
    for epoch in range(12):
        read.clear()
        dataset[epoch, 0]
        assert 0 not in read
        neighbors.add(tuple(read))
    assert len(neighbors) > 3


@pytest.mark.parametrize("workers", [0, 1])
def test_row_33_a_neighbor_that_cannot_be_read_is_named(tmp_path: Path, workers: int) -> None:
    data = data_in(tmp_path, workers, Augment(combine=Combine(mosaic=Mosaic(p=1.0))))
    data.setup("fit")
    (tmp_path / "train" / "4.jpg").write_bytes(b"\xff\xd8\xff")
    with pytest.raises(DataError, match=r"4\.jpg: cannot be decoded"):
        list(data.train_dataloader())
    dataset = data.dataset("train", augmented=True)
    with pytest.raises(DataError, match=r"4\.jpg: cannot be decoded"):
        _ = [dataset[epoch, 0] for epoch in range(20)]  # which is sound itself


def test_targets_stay_whole_and_keep_the_first_image(tmp_path: Path) -> None:
    data = data_in(tmp_path)
    data.set_proposals("train", {10 + i: torch.tensor([[1.0, 2, 11, 22]]).numpy() for i in range(7)})
    dataset = data.dataset("train", augmented=True)
    for epoch in range(10):
        image, target = dataset[epoch, 2]
        assert (target["image_id"], target["file_name"]) == (12, "2.jpg")  # type: ignore[typeddict-item]
        height, width = image.shape[1:]
        for name in ("boxes", "proposals"):
            box = target[name]  # type: ignore[literal-required]
            assert (box >= 0).all()
            assert (box <= torch.tensor([width, height] * 2)).all()
            assert (box[:, 2:] > box[:, :2]).all()
        counts = {len(target[name]) for name in ("boxes", "labels", "iscrowd", "difficult", "area")}  # type: ignore[literal-required]
        assert len(counts) == 1


def test_too_few_images_are_found_before_training(tmp_path: Path) -> None:
    write_coco(tmp_path)
    data = COCO(str(tmp_path), "train", "train", augment=Augment(combine=Combine(mosaic=Mosaic())))
    with pytest.raises(
        DataError, match=r"train: augment.combine: mosaic needs 4 images or more, got 3; set it to null"
    ):
        data.setup("fit")
    COCO(str(tmp_path), "train", "train", augment=Augment(combine=Combine(mosaic=Mosaic(p=0.0)))).setup("fit")


def test_copy_paste_needs_masks(tmp_path: Path) -> None:
    from detpipe.datasets import VOC

    paste = Augment(combine=Combine(CopyPaste()))
    data = VOC(str(write_voc(tmp_path)), "train", "train", augment=paste)
    with pytest.raises(
        DataError, match="copy_paste needs instance masks, and the annotations have none; use data in COCO"
    ):
        data.setup("fit")
    sound = data_in(tmp_path / "coco", augment=paste)
    sound.setup("fit")
    bare = replace(sound.annotations("train"), segmentations=None)
    from detpipe.datasets import DetectionDataset

    with pytest.raises(DataError, match="copy_paste needs instance masks, and the annotations have none"):
        DetectionDataset(bare, paste)

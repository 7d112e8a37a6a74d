from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from jsonargparse import ArgumentParser
from lightning.pytorch import LightningModule, Trainer

from detpipe.datasets import COCO, VOC, Augment, DetectionData, Loader, Shards
from detpipe.datasets.annotations import AnnotationBuilder
from detpipe.datasets.faults import Faults
from detpipe.support.errors import DataError

from .builders import coco_content, write_coco
from .shard_cases import SEVEN, files_in

data_in = partial(files_in, sizes=SEVEN)


def test_batches_are_lists_of_images_and_targets(tmp_path: Path) -> None:
    images, targets = next(iter(data_in(tmp_path).val_dataloader()))
    assert [image.dtype for image in images] == [torch.uint8]
    assert images[0].shape == (3, 30, 50)  # the smallest size first, alone
    (target,) = targets
    assert target["image_id"] == 13
    assert target["file_name"] == "3.jpg"
    assert {name: target[name].dtype for name in ("boxes", "labels", "iscrowd", "difficult", "area")} == {
        "boxes": torch.float32,
        "labels": torch.int64,
        "iscrowd": torch.bool,
        "difficult": torch.bool,
        "area": torch.float32,
    }
    assert target["boxes"].shape == (0, 4)


def test_the_timeout_of_the_settings_reaches_the_loader(tmp_path: Path) -> None:
    assert data_in(tmp_path, workers=1, loader=Loader(num_workers=1, timeout=7)).val_dataloader().timeout == 7


def test_validation_is_not_augmented(tmp_path: Path) -> None:
    dataset = data_in(tmp_path).dataset("val")
    assert torch.equal(dataset[0, 0][0], dataset[5, 0][0])


def test_loading_leaves_the_global_random_state_alone(tmp_path: Path) -> None:
    before = torch.get_rng_state()
    list(data_in(tmp_path).train_dataloader())
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("workers", [0, 1])
def test_row_33_an_error_in_a_worker_names_the_file(tmp_path: Path, workers: int) -> None:
    data = data_in(tmp_path, workers)
    data.setup("fit")
    (tmp_path / "train" / "4.jpg").write_bytes(b"\xff\xd8\xff")
    with pytest.raises(DataError, match=r"4\.jpg: cannot be decoded"):
        list(data.train_dataloader())


def test_row_25_a_size_that_differs_is_an_error_with_a_hint(tmp_path: Path) -> None:
    data = data_in(tmp_path)
    data.setup("fit")
    (tmp_path / "train" / "0.jpg").write_bytes((tmp_path / "train" / "1.jpg").read_bytes())
    with pytest.raises(DataError, match=r"0\.jpg: the image is 40 x 60 .* width 60, height 40 \(swapped.*EXIF"):
        data.dataset("train")[0, 0]
    (tmp_path / "train" / "0.jpg").write_bytes((tmp_path / "train" / "3.jpg").read_bytes())
    with pytest.raises(DataError, match=r"0\.jpg: the image is 50 x 30 .* width 60, height 40;"):
        data.dataset("train")[0, 0]


@pytest.mark.parametrize(
    ("categories", "differences"),
    [
        (
            [(7, "dog"), (90, "fox"), (1, "cat")],
            ["only in train: 'owl' (id 90)", "only in val: 'fox' (id 90)", "(2 in"],
        ),
        ([(7, "cat"), (90, "owl"), (1, "dog")], ["'cat' has id 1 in train and 7 in val", "'dog' has id 7"]),
        ([(7, "dog"), (90, "owl"), (1, "cat"), (2, "ant")], ["only in val: 'ant' (id 2)", "(1 in total)"]),
    ],
)
def test_row_12_splits_with_other_classes(tmp_path: Path, categories: list, differences: list[str]) -> None:
    content = coco_content()
    content["categories"] = [{"id": key, "name": name} for key, name in categories]
    write_coco(tmp_path)
    write_coco(tmp_path, content, "val")
    with pytest.raises(DataError) as caught:
        COCO(str(tmp_path), "train", "val").setup("fit")
    for difference in differences:
        assert difference in str(caught.value)


def test_row_39_a_label_beyond_the_classes_is_an_error_at_load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, folder = write_coco(tmp_path)
    from detpipe.datasets.formats import coco

    class FewerClasses(AnnotationBuilder):
        def __init__(self, faults: Faults, class_names: tuple[str, ...], category_ids: tuple[int, ...]) -> None:
            super().__init__(faults, class_names[:2], category_ids)

    monkeypatch.setattr(coco, "AnnotationBuilder", FewerClasses)
    for on_bad in ("error", "skip"):
        with pytest.raises(DataError, match=r"instances_train\.json: annotation id 102 .*label 3 is outside 1\.\.2"):
            coco.load_coco(path, folder, on_bad)


def test_classes_are_known_right_after_construction_without_reading_the_training_split(tmp_path: Path) -> None:
    data = data_in(tmp_path)
    (tmp_path / "annotations" / "instances_train.json").unlink()
    assert (data.num_classes, data.class_names, data.category_ids) == (3, ("cat", "dog", "owl"), (1, 7, 90))


def test_describe_counts_everything(tmp_path: Path) -> None:
    content = coco_content()
    content["annotations"][0]["bbox"] = [50, 5, 20, 20]
    content["annotations"][1].update(bbox=[5, 5, 0, 0])
    content["annotations"][2]["iscrowd"] = 1
    write_coco(tmp_path, content)
    line = COCO(str(tmp_path), "train", on_bad="skip").describe("train")
    assert line == (
        "train: 3 images, 3 boxes (cat 1, dog 1, owl 1); 1 crowd; 1 images without boxes; boxes clipped: 1; "
        "boxes skipped: zero or negative size: 1"
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({12: None}, r"train: .* 1 images, such as image id 12: no proposals"),
        ({12: np.zeros((3, 5))}, r"image id 12: proposals must be finite \[P, 4\], got shape \[3, 5\]"),
        ({12: np.full((1, 4), np.nan)}, r"image id 12: proposals must be finite"),
    ],
)
def test_wrong_proposals_are_refused_at_once(tmp_path: Path, change: dict, message: str) -> None:
    proposals = {10 + i: np.zeros((0, 4)) for i in range(7)} | change
    with pytest.raises(DataError, match=message):
        data_in(tmp_path).set_proposals("train", {k: v for k, v in proposals.items() if v is not None})


class Recorder(LightningModule):
    """Notes which images each epoch saw."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.seen: dict[int, list[list[int]]] = {}
        self.validated: list[int] = []

    def training_step(self, batch: tuple[list, list]) -> torch.Tensor:
        self.seen.setdefault(self.current_epoch, []).append([target["image_id"] for target in batch[1]])
        return self.weight.sum()

    def validation_step(self, batch: tuple[list, list]) -> None:
        self.validated += [target["image_id"] for target in batch[1]]

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("workers", [0, 1])
def test_lightning_sets_the_epoch_of_the_batches(tmp_path: Path, workers: int) -> None:
    data, model = data_in(tmp_path, workers), Recorder()
    Trainer(
        max_epochs=3, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, num_sanity_val_steps=0, default_root_dir=tmp_path,
    ).fit(model, datamodule=data)  # fmt: skip
    batches = data.train_dataloader().batch_sampler
    for epoch in range(3):
        expected = [[10 + index for index in batch] for batch in batches.batches(epoch)]  # type: ignore[union-attr]
        assert model.seen[epoch] == expected
    assert sorted(model.validated) == sorted(list(range(10, 17)) * 3)


def test_a_config_builds_every_data_set(tmp_path: Path) -> None:
    parser = ArgumentParser()
    parser.add_subclass_arguments(DetectionData, "data")
    coco = {
        "class_path": "detpipe.datasets.COCO",
        "init_args": {
            "root": str(tmp_path),
            "train": {"annotations": "a.json", "images": "pictures"},
            "loader": {"batch_size": 4},
            "augment": {"scale_jitter": [0.5, 2.0]},
        },
    }
    voc = {
        "class_path": "detpipe.datasets.VOC",
        "init_args": {"root": "x", "train": ["2007:trainval", "2012:trainval"], "format": {"class_names": "auto"}},
    }
    shards = {"class_path": "detpipe.datasets.Shards", "init_args": {"root": str(tmp_path), "window": 3}}
    built = [parser.instantiate(parser.parse_object({"data": config})).data for config in (coco, voc, shards)]
    assert isinstance(built[0], COCO)
    assert built[0].augment == Augment(scale_jitter=(0.5, 2.0))
    assert (built[0].loader.batch_size, built[0].splits["train"].images) == (4, "pictures")
    assert isinstance(built[1], VOC)
    assert built[1].format.class_names == "auto"
    assert built[1].splits["train"] == ["2007:trainval", "2012:trainval"]
    assert isinstance(built[2], Shards)
    assert (built[2].window, built[2].loader) == (3, Loader())

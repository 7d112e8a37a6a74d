from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import runs
import torch
from lightning import Trainer
from PIL import Image
from torch import Tensor, nn

from detpipe.backbones import SEResNet
from detpipe.cli import main
from detpipe.datasets import Loader
from detpipe.datasets.masks import open_masks
from detpipe.demo import Demo, DemoScenes
from detpipe.evaluation.segmentation import all_background, confusion_matrix, segmentation_scores
from detpipe.optimization import Optimizer
from detpipe.pictures.localization_plots import localization_picture
from detpipe.regions.superpixel_localizer import SuperpixelLocalizer, image_classes
from detpipe.regions.superpixel_pooling import Localization, segment
from detpipe.regions.superpixels import Segmentation
from detpipe.stages import Backbone
from detpipe.support.errors import DataError
from detpipe.types import Features, PixelFormat, Target

POOLINGS = pytest.mark.parametrize("pooling", ["superpixel", "none"])


class Net(Backbone):
    """Colors, nothing else, at a stride of 4."""

    def __init__(self) -> None:
        super().__init__()
        self.strides, self.out_channels, self.pixel_format = {"c2": 4}, 8, PixelFormat()
        self.layer = nn.Conv2d(3, 8, 4, 4)

    def forward(self, images: Tensor) -> Features:
        return {"c2": self.layer(images).relu()}


def localizer(classes: int = 3, pooling: str = "superpixel", **settings: Any) -> SuperpixelLocalizer:
    localization = Localization(channels=16, pooling=pooling, **settings)  # type: ignore[arg-type]
    common: dict[str, Any] = {"min_size": 48, "max_size": 64, "optimizer": Optimizer("adamw", 0.01)}
    return SuperpixelLocalizer(Net(), classes, localization, Segmentation(30), **common).eval()


def pictures() -> list[Tensor]:
    """Of several sizes: one as it is, one enlarged, one reduced."""
    smooth = [torch.rand(3, 5, 6), torch.rand(3, 4, 4), torch.rand(3, 7, 6)]
    sizes = [(48, 64), (30, 40), (100, 77)]
    return [
        nn.functional.interpolate(one[None], size, mode="bilinear")[0] for one, size in zip(smooth, sizes, strict=True)
    ]


def target(*labels: int) -> Target:
    return Target(boxes=torch.rand(len(labels), 4), labels=torch.tensor(labels, dtype=torch.long), file_name="a.jpg")


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Demo:
    root = tmp_path_factory.mktemp("localizer") / "demo"
    return Demo(str(root), scenes=DemoScenes(train=4, val=3, size=64), loader=Loader(batch_size=2, num_workers=0))


@POOLINGS
def test_maps_come_back_in_the_size_of_their_image(pooling: str) -> None:
    images = pictures()
    maps = localizer(pooling=pooling)(images)
    assert [list(one.shape) for one in maps] == [[3, 48, 64], [3, 30, 40], [3, 100, 77]]
    assert all(one.min() >= 0 and one.max() <= 1 for one in maps)


def test_maps_are_constant_on_the_superpixels_that_are_shown() -> None:
    model, images = localizer(), pictures()
    for maps, superpixels in zip(model(images), model.superpixels(images), strict=True):
        assert maps.shape[1:] == superpixels.shape
        assert 10 < len(superpixels.unique()) < 60
        for label in superpixels.unique():
            values = maps[:, superpixels == label]
            assert (values == values[:, :1]).all()
        assert len(maps.unique()) > 5


def test_a_map_lies_over_its_object() -> None:
    """A red rectangle on blue: with weights that see red, its place in the image is where the map is high."""
    model = localizer(1)
    with torch.no_grad():
        model.backbone.layer.weight.zero_()
        model.backbone.layer.weight[:, 0] = 1.0  # type: ignore[index]
        model.backbone.layer.weight[:, 2] = -1.0  # type: ignore[index]
        model.backbone.layer.bias.zero_()  # type: ignore[union-attr]
        for parameter in model.head.parameters():
            parameter.abs_()
    for height, width, box in ((48, 64, (10, 30, 16, 40)), (90, 70, (20, 50, 50, 66))):
        image = torch.zeros(3, height, width)
        image[2] = 1
        y1, y2, x1, x2 = box
        image[0, y1:y2, x1:x2], image[2, y1:y2, x1:x2] = 1, 0
        [maps] = model([image])
        inside = torch.zeros(height, width, dtype=torch.bool)
        inside[y1:y2, x1:x2] = True
        found = segment(maps, 0.5 * maps.max().item()) == 1
        assert (found & inside).sum() / (found | inside).sum() > 0.7


@POOLINGS
def test_images_do_not_see_each_other(pooling: str) -> None:
    model, images = localizer(pooling=pooling), pictures()
    images = [*images, images[0].flip(2)]
    together = model(images)
    for image, maps in zip(images, together, strict=True):
        assert torch.allclose(model([image])[0], maps, atol=1e-5)


@POOLINGS
def test_boxes_are_never_read(pooling: str) -> None:
    """The same losses, to the bit, and the same gradients, whatever boxes there are, or none; and in whatever order."""
    model, images = localizer(pooling=pooling).train(), pictures()
    targets = [target(1, 2, 2), target(), target(3, 1)]

    def run(changed: list[Target]) -> tuple[list[float], list[Tensor]]:
        model.zero_grad()
        torch.manual_seed(0)
        losses = model.losses(images, changed)
        torch.stack(list(losses.values())).sum().backward()
        return [value.item() for value in losses.values()], [
            p.grad.clone() for p in model.parameters() if p.grad is not None
        ]

    reference = run(targets)
    nothing = torch.full((3, 4), math.nan)
    for changed in (
        [Target(boxes=nothing[: len(one["labels"])], labels=one["labels"]) for one in targets],
        [Target(boxes=one["boxes"].flip(0).flip(1), labels=one["labels"]) for one in targets],
        [Target(labels=one["labels"].flip(0)) for one in targets],
        [Target(labels=one["labels"].unique()) for one in targets],  # a set: how often does not count
    ):
        losses, gradients = run(changed)
        assert losses == reference[0]
        assert all(torch.equal(a, b) for a, b in zip(gradients, reference[1], strict=True))
    other, _ = run([target(1, 2), target(), target(3, 2)])
    assert other != reference[0]


def test_images_without_objects_are_all_negative() -> None:
    model = localizer().train()
    losses = model.losses(pictures(), [target(), target(), target()])
    torch.stack(list(losses.values())).sum().backward()
    assert all(value.isfinite() for value in losses.values())
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    with pytest.raises(ValueError, match="expected at least one image, got an empty list"):
        model([])


def test_given_classes_are_the_only_ones() -> None:
    model, images = localizer(), pictures()
    present = torch.tensor([[1.0, 0, 0], [0, 0, 0], [0, 1, 1]])
    for maps, row in zip(model(images, present), present, strict=True):
        assert torch.equal(maps.amax((1, 2)) > 0, (row > 0) & (maps.amax((1, 2)) > 0))
        assert set(maps.amax((1, 2)).tolist()) <= {0.0, 1.0}
    with pytest.raises(ValueError, match=r"present must be \[3, 3\], got \[2, 3\]"):
        model(images, present[:2])


@POOLINGS
def test_two_images_are_learned_by_heart(pooling: str) -> None:
    """Two classes, each a color: from the classes of the images alone, pixels are found far better than by chance."""
    images, masks = [], []
    for label, color, (y, x) in ((1, (1.0, 0.1, 0.1), (6, 8)), (2, (0.1, 1.0, 0.1), (22, 36))):
        image = torch.full((3, 48, 64), 0.4)
        image[:, y : y + 20, x : x + 20] = torch.tensor(color)[:, None, None]
        mask = np.zeros((48, 64), int)
        mask[y : y + 20, x : x + 20] = label
        images.append(image.clamp(max=1))
        masks.append(mask)
    model, targets = localizer(2, pooling).train(), [target(1), target(2)]
    optimizer = model.optimizer.build(model.backbone, model.head)
    for _ in range(25):
        optimizer.zero_grad()
        loss = torch.stack(list(model.losses(images, targets).values())).sum()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.6
    confusion = sum(
        confusion_matrix(mask, segment(maps, 0.5).numpy(), 3)
        for mask, maps in zip(masks, model.eval()(images), strict=True)
    )
    scores = segmentation_scores(np.asarray(confusion), ["red", "green"])
    blind = segmentation_scores(all_background(np.asarray(confusion)), ["red", "green"])
    assert scores["mIoU"] > 0.6
    assert blind["mIoU"] < 0.3


def test_superpixels_are_remembered() -> None:
    model, images = localizer().train(), pictures()
    for _ in range(3):
        model.losses(images, [target(1)] * 3)
    assert model.segmenter.computed == 3
    model.losses([image.flip(2) for image in images], [target(1)] * 3)
    assert model.segmenter.computed == 6


@pytest.mark.filterwarnings("ignore:.*does not have many workers", "ignore:.*LeafSpec:FutureWarning")
def test_training_and_validation(demo: Demo, capsys: pytest.CaptureFixture[str]) -> None:
    model = SuperpixelLocalizer(SEResNet(18, levels=["c3"]), 10, Localization(16), min_size=64, max_size=64)
    trainer = Trainer(
        max_epochs=2,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        log_every_n_steps=1,
    )
    trainer.fit(model, datamodule=demo)
    values = {name: float(value) for name, value in trainer.callback_metrics.items()}
    assert {"val/mIoU", "val/mIoU_classes_given", "val/mIoU_background", "val/loss", "train/loss"} <= set(values)
    assert SuperpixelLocalizer.watched in values
    assert all(math.isfinite(value) for value in values.values())
    assert model.segmenter.computed == 7  # each image once: the second epoch remembers
    said = capsys.readouterr().out
    assert (
        said.count("mIoU is measured on superpixel-majority masks of boxes (400 SLIC superpixels an image): Demo") == 1
    )
    scores = model.eval().evaluate(demo)
    for name, score in scores.items():
        assert values[f"val/{name}"] == pytest.approx(score["mIoU"], abs=1e-6)
    assert list(scores["mIoU"]["per_class"]) == ["background", *"0123456789"]


def test_mean_iou_is_that_of_all_pixels_together(demo: Demo) -> None:
    model = SuperpixelLocalizer(Net(), 10, Localization(8, threshold=0.2), min_size=96, max_size=96).eval()
    scores, masks, dataset = model.evaluate(demo, "val", "boxes"), open_masks(demo, "val", "boxes"), demo.dataset("val")
    truths, found, given = [], [], []
    for row in range(3):
        image, one = dataset[(0, row)]
        truths.append(masks.read(image, one).ravel())
        found.append(segment(model([image])[0], 0.2).numpy().ravel())
        given.append(segment(model([image], image_classes([one], 10))[0], 0.2).numpy().ravel())
    truth = np.concatenate(truths)
    for name, predicted in (("mIoU", np.concatenate(found)), ("mIoU_classes_given", np.concatenate(given))):
        assert scores[name] == segmentation_scores(confusion_matrix(truth, predicted, 11), demo.class_names)
    blind = segmentation_scores(confusion_matrix(truth, np.zeros_like(truth), 11), demo.class_names)
    assert scores["mIoU_background"] == blind


def test_what_cannot_be_evaluated(demo: Demo) -> None:
    with pytest.raises(ValueError, match="the model is in training mode"):
        localizer().train().evaluate(demo)
    with pytest.raises(ValueError, match="the model has 3 classes, the data set 10"):
        localizer().evaluate(demo)
    with pytest.raises(DataError, match="no true masks to compare with"):
        localizer().validation_step((pictures(), [target()] * 3), 0)


def test_classes_of_images_by_hand() -> None:
    targets = [target(2, 2, 1), target(), Target(labels=torch.tensor([4]))]
    assert image_classes(targets, 4).tolist() == [[1, 1, 0, 0], [0, 0, 0, 0], [0, 0, 0, 1]]


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        ([target(1)], "expected one target for each image, got 1 targets for 2 images"),
        ([target(1), target(4)], r"image a\.jpg: labels \[4\] are not all in 1\.\.3"),
        ([target(0), target(1)], r"image a\.jpg: labels \[0\] are not all in 1\.\.3"),
        ([target(1), Target(image_id=7)], "image 7: the target has no labels"),
    ],
)
def test_bad_targets(targets: list[Target], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        localizer().losses(pictures()[:2], targets)


@pytest.mark.parametrize(
    "arguments",
    [{"num_classes": 0}, {"min_size": 0}, {"min_size": 80, "max_size": 70}],
    ids=["classes", "zero", "order"],
)
def test_bad_arguments(arguments: dict[str, int]) -> None:
    with pytest.raises(
        ValueError, match=r"num_classes must be at least 1|expected 0 < min_size <= max_size, got min_size="
    ):
        SuperpixelLocalizer(Net(), **{"num_classes": 2, **arguments})


def test_a_picture(demo: Demo, tmp_path: Path) -> None:
    model, (image, one) = localizer(10), demo.dataset("val")[(0, 0)]
    truth = open_masks(demo, "val", "boxes").read(image, one)
    [maps], [superpixels] = model([image]), model.superpixels([image])
    localization_picture(image, superpixels, truth, maps, demo.class_names, tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as picture:
        assert picture.width > 900
        assert len(np.unique(np.array(picture.convert("RGB")).reshape(-1, 3), axis=0)) > 100
    with pytest.raises(ValueError, match=r"expected superpixels and truth \[64, 64\] and maps \[10, 64, 64\]"):
        localization_picture(image, superpixels[:5], truth, maps, demo.class_names, tmp_path / "b.png")


def documented() -> list[str]:
    page = (Path(__file__).resolve().parents[2] / "docs" / "superpixels.md").read_text(encoding="utf-8")
    return re.findall(r"^```python\n(.*?)^```", page, flags=re.MULTILINE | re.DOTALL)


def test_the_documented_example() -> None:
    code, _ = documented()
    names: dict[str, Any] = {}
    exec(compile(code, "superpixels.md", "exec"), names)
    assert names["maps"].shape == (3, 160, 200)
    assert all(loss.isfinite() for loss in names["losses"].values())


@pytest.mark.slow
def test_the_documented_picture_of_a_trained_model(demo_root: Path, tmp_path: Path) -> None:
    _, code = documented()
    command = ["train_regions", str(runs.CONFIGS / "superpixel_weak.yaml"), "--output", str(tmp_path / "run")]
    short = ["--model.init_args.min_size", "64", "--model.init_args.max_size", "96", *runs.demo(demo_root)]
    steps = ["--trainer.max_epochs", "1", "--trainer.limit_train_batches", "2", "--trainer.accelerator", "cpu"]
    assert main([*command, *short, *steps, "--data.init_args.loader.batch_size", "2"]) == 0
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert 0 < summary["mIoU_background"] < 0.2
    assert 0 <= summary["mIoU"] <= 1
    code = code.replace("RUN/", f"{tmp_path}/run/").replace("Demo()", "data").replace('"localized.png"', "out")
    assert "Demo()" not in code
    data = Demo(str(demo_root), scenes=json_scenes(demo_root))
    names: dict[str, Any] = {"data": data, "out": str(tmp_path / "localized.png")}
    exec(compile(code, "superpixels.md", "exec"), names)
    assert (tmp_path / "localized.png").is_file()
    assert names["scores"]["mIoU"]["per_class"].keys() == {"background", *"0123456789"}


def json_scenes(root: Path) -> DemoScenes:
    return DemoScenes(**json.loads((root / "demo.json").read_text())["scenes"])

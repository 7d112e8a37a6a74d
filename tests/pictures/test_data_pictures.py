from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import runs
import torch
from PIL import Image

from detpipe.datasets.resize import Resize
from detpipe.pictures import data_plots
from detpipe.pictures.data_plots import _ticks, plot_boxes, plot_classes, plot_images
from detpipe.pictures.visualize import IGNORED_COLOR, class_color, contact_sheet, draw_target
from detpipe.types import Annotations, Target


def target(**changes: object) -> Target:
    values = {
        "boxes": torch.tensor([[20.0, 40.0, 60.0, 90.0], [80.0, 40.0, 120.0, 90.0]]),
        "labels": torch.tensor([1, 2]),
        "iscrowd": torch.tensor([False, False]),
        "difficult": torch.tensor([False, False]),
        "file_name": "folder/a.jpg",
    }
    return Target(**{**values, **changes})  # type: ignore[typeddict-item]


def colors_in(image: torch.Tensor) -> set[tuple[int, ...]]:
    return {tuple(color) for color in image.permute(1, 2, 0).reshape(-1, 3).unique(dim=0).tolist()}


@pytest.mark.parametrize("flag", ["iscrowd", "difficult"])
def test_flagged_objects_are_gray(flag):
    image = torch.zeros(3, 160, 200, dtype=torch.uint8)
    plain = colors_in(draw_target(image, target(), ["cat", "dog"], min_side=0))
    assert {class_color(1), class_color(2)} <= plain
    assert IGNORED_COLOR not in plain
    flagged = colors_in(draw_target(image, target(**{flag: torch.tensor([False, True])}), ["cat", "dog"], min_side=0))
    assert {class_color(1), IGNORED_COLOR} <= flagged
    assert class_color(2) not in flagged


def test_images_of_more_channels_and_of_floating_point_are_on_a_sheet():
    image, nothing = (
        torch.arange(4 * 50 * 60).view(4, 50, 60) % 256,
        Target(boxes=torch.zeros(0, 4), labels=torch.zeros(0)),
    )
    picture = contact_sheet([image[:3].byte()], [nothing], ["cat"])
    assert torch.equal(contact_sheet([image / 255], [nothing], ["cat"]), picture)


def test_a_sheet_holds_every_image_at_its_place():
    red, blue = (torch.zeros(3, 30, 60, dtype=torch.uint8) for _ in range(2))
    red[0], blue[2] = 255, 255
    empty = target(boxes=torch.zeros(0, 4), labels=torch.zeros(0, dtype=torch.int64), iscrowd=torch.zeros(0).bool(),
                   difficult=torch.zeros(0).bool())  # fmt: skip
    sheet = contact_sheet([red, blue, blue.permute(0, 2, 1)], [empty] * 3, ["cat"], "title", side=100)
    assert sheet.shape == (3, 34 + (50 + 20 + 10) + (100 + 20 + 10), 2 * 110 + 10)
    assert sheet[:, 34 + 45, 50].tolist() == [255, 0, 0]
    assert sheet[:, 34 + 45, 170].tolist() == [0, 0, 255]
    assert sheet[:, 34 + 80 + 60, 30].tolist() == [0, 0, 255]
    with pytest.raises(ValueError, match="expected one target for each of at least one image, got 0 and 0"):
        contact_sheet([], [], ["cat"])


def annotations(boxes: int) -> Annotations:
    rng = np.random.default_rng(0)
    low = rng.uniform(0, 40, (boxes, 2))
    xyxy = np.concatenate([low, low + rng.uniform(1, 20, (boxes, 2))], axis=1)
    return Annotations(
        root=Path(),
        file_names=np.array(["a.jpg", "b.jpg"]),
        image_ids=np.array([1, 2]),
        sizes=np.array([[60, 60], [80, 60]], dtype=np.int32),
        offsets=np.array([0, boxes, boxes]),
        boxes=xyxy,
        labels=rng.integers(1, 61, boxes),
        iscrowd=np.zeros(boxes, dtype=bool),
        difficult=np.zeros(boxes, dtype=bool),
        area=np.ones(boxes),
        class_names=tuple(f"class {k}" for k in range(60)),
        category_ids=tuple(range(60)),
    )


@pytest.mark.parametrize("boxes", runs.mostly_slow([1, 300], 1))
def test_plots_of_few_and_of_many_boxes(tmp_path, boxes):
    a = annotations(boxes)
    plot_classes({"train": a, "val": a}, tmp_path / "classes.png")
    plot_boxes(a, "train", [8, 16], Resize(min_size=120, max_size=200), tmp_path / "boxes.png")
    plot_images({"train": a, "val": a}, tmp_path / "images.png")
    for name in ("classes", "boxes", "images"):
        pixels = np.asarray(Image.open(tmp_path / f"{name}.png").convert("RGB"))
        assert min(pixels.shape[:2]) > 400
        assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 50


@pytest.mark.parametrize("boxes", [3, 300])
def test_every_image_counts_in_the_histogram_of_boxes(boxes, tmp_path, monkeypatch):
    figures: list[Any] = []
    monkeypatch.setattr(data_plots, "save_figure", lambda figure, out: figures.append(figure))
    plot_boxes(annotations(boxes), "train", [8], Resize(min_size=120, max_size=200), tmp_path / "boxes.png")
    bars = figures[0].axes[4].patches
    assert sum(bar.get_height() for bar in bars) == 2
    assert len(bars) <= 61


def test_dollars_and_letters_of_other_scripts_in_names_are_drawn_as_they_are(tmp_path):
    a = replace(
        annotations(3), class_names=(r"a $\foo$ b", "$x_{$", "猫", "\udce9", *(f"class {k}" for k in range(56)))
    )
    plot_classes({r"$\bar$": a}, tmp_path / "classes.png")
    plot_boxes(a, r"$\bar$", [8], Resize(min_size=120, max_size=200), tmp_path / "boxes.png")
    plot_images({r"$\bar$": a}, tmp_path / "images.png")


def test_ticks_of_a_logarithmic_axis():
    assert _ticks(20, 300) == [20, 50, 100, 200]
    assert _ticks(0.05, 700) == [0.1, 1, 10, 100]
    assert _ticks(3, 4) == [3.5]

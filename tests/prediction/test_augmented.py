from __future__ import annotations

from typing import Any

import pytest
import torch

from detpipe import FastRCNNHead, PrecomputedProposals, SEResNet, TwoStageDetector
from detpipe.heads import Postprocess
from detpipe.prediction import AugmentedDetector, TiledDetector
from detpipe.proposals import DenseGrid
from tests.prediction.bright import Bright, rows, scene


def small_detector(source: Any, max_size: int = 128) -> TwoStageDetector:
    torch.manual_seed(0)
    backbone = SEResNet(18, levels=["c2"], out_channels=8)
    head = FastRCNNHead(
        backbone.out_channels, 3, backbone.strides, fc=[16], postprocess=Postprocess(score_threshold=0.01, nms_iou=0.6)
    )
    return TwoStageDetector(backbone, source, head, min_size=64, max_size=max_size).eval()


@pytest.mark.parametrize("flips", [("",), ("x",), ("y",), ("xy",), ("", "x", "y", "xy")])
def test_boxes_come_back_where_they_were(flips):
    boxes = [[3, 5, 20, 30], [40, 2, 60, 12], [30, 40, 64, 48]]
    images = [scene(48, 64, boxes), scene(30, 20, [[0, 0, 7, 9]])]
    first, second = AugmentedDetector(Bright(), flips, (1.0,))(images)
    assert rows(first) == sorted([1, *map(float, box)] for box in boxes)
    assert rows(second) == [[1, 0, 0, 7, 9]]
    assert (first["scores"].diff() <= 0).all()


@torch.inference_mode()
def test_one_view_is_the_detector_itself():
    detector = small_detector(DenseGrid(scales=[24]))
    images = [torch.rand(3, 40, 60), torch.rand(3, 64, 64)]
    for mine, own in zip(AugmentedDetector(detector, ("",), (1.0,), iou=1.0)(images), detector(images), strict=True):
        assert len(own["scores"])
        for key in own:
            torch.testing.assert_close(mine[key], own[key])


@torch.inference_mode()
def test_views_are_those_of_a_detector_of_other_sizes():
    """A score is the mean over the views, and the detector stays as it was."""
    image, proposals = torch.rand(3, 64, 64), torch.tensor([[10.0, 10.0, 40.0, 50.0]])
    detector = small_detector(PrecomputedProposals(max_boxes=None))
    targets = [{"proposals": proposals}]
    [found] = AugmentedDetector(detector, ("", "x"), (1.0, 1.5))([image], targets)
    assert (detector.min_size, detector.max_size) == (64, 128)
    scores = []
    for scale in (1.0, 1.5):
        for flipped in (False, True):
            view = image.flip(-1) if flipped else image
            boxes = torch.tensor([[24.0, 10.0, 54.0, 50.0]]) if flipped else proposals
            detector.min_size, detector.max_size = round(64 * scale), round(128 * scale)
            [one] = detector([view], [{"proposals": boxes}])
            scores.append(float(one["scores"][one["labels"] == found["labels"][0]][0]))
    assert float(found["scores"][0]) == pytest.approx(sum(scores) / 4, rel=1e-4)


@torch.inference_mode()
@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_images_that_the_data_have_resized(scale):
    """At its own scale a picture is taken as it is, at others it is resized; padding is left out."""
    detector = small_detector(DenseGrid(scales=[24]))
    picture = torch.rand(3, 48, 56)
    padded = torch.nn.functional.pad(picture, (0, 8, 0, 16))
    target = {"content_size": (48, 56), "file_size": (480, 560)}
    [found] = AugmentedDetector(detector, ("",), (scale,), iou=1.0)([padded], [target])
    if scale != 1:
        detector.min_size, detector.max_size = 32, 64
    [own] = detector([picture], [{"content_size": (48, 56)}] if scale == 1 else None)
    assert len(own["scores"])
    torch.testing.assert_close(found["boxes"], own["boxes"])


def test_no_more_detections_than_the_richest_view_has():
    images = [scene(64, 64, [[5 * k, 5 * k, 5 * k + 4, 5 * k + 4] for k in range(9)]), torch.zeros(3, 64, 64)]
    many, none = AugmentedDetector(Bright(), ("", "x"), (1.0,))(images)
    assert len(many["scores"]) == 9
    assert len(none["scores"]) == 0


def test_tiles_of_views():
    boxes = [[10, 10, 30, 30], [50, 8, 90, 20], [100, 40, 104, 60]]
    [found] = TiledDetector(AugmentedDetector(Bright(), ("", "x"), (1.0,)), 64, 0.25)([scene(64, 150, boxes)])
    assert rows(found) == sorted([1, *map(float, box)] for box in boxes)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"flips": ()}, "expected flips of"),
        ({"flips": ("z",)}, "expected flips of"),
        ({"iou": 0.0}, "iou in"),
        ({"scales": ()}, "one or more positive scales"),
        ({"scales": (0.0,)}, "one or more positive scales"),
    ],
)
def test_settings_are_checked(settings, message):
    with pytest.raises(ValueError, match=message):
        AugmentedDetector(Bright(), **settings)

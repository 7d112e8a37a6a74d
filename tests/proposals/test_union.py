import json
from typing import ClassVar

import numpy as np
import pytest
import torch
from samples import random_boxes
from torchvision.models.detection.image_list import ImageList

from detpipe.backbones import SEResNet
from detpipe.boxes import iou
from detpipe.detector import TwoStageDetector
from detpipe.heads import FastRCNNHead
from detpipe.proposals import RPN, Anchors, DenseGrid, Union
from detpipe.proposals.image_source import Candidates, ImageProposals
from detpipe.proposals.rpn_objective import RPNObjective
from detpipe.stages import ProposalSource
from detpipe.support.errors import DataError
from detpipe.types import PixelFormat

from .needs import PLACES, best_overlap, is_the_same_every_time, planted, scikit_image

IMAGES = ImageList(torch.zeros(2, 3, 64, 96), [(64, 96), (40, 50)])


class Given(ProposalSource):
    """The same boxes for each image, and a loss if asked for."""

    def __init__(self, boxes, loss=None, name="loss_given"):
        super().__init__()
        self.boxes, self.loss, self.loss_name = torch.as_tensor(boxes, dtype=torch.float32).reshape(-1, 4), loss, name
        self.inner = torch.nn.Dropout()

    def forward(self, images, features, targets=None):
        losses = {self.loss_name: torch.tensor(self.loss)} if self.loss is not None and self.training else {}
        return [self.boxes] * len(images.image_sizes), losses


class Corner(ImageProposals):
    """Boxes in the upper left corner, of sizes that are given."""

    name: ClassVar[str] = "corner"

    def __init__(self, sizes=(4, 8), max_boxes=None, min_size=0.0, pixel_format=None):
        super().__init__(max_boxes, min_size, pixel_format)
        self.sizes = sizes

    def find(self, image):
        boxes = [[0, 0, size, size] for size in self.sizes]
        return Candidates(np.array(boxes, np.float32).reshape(-1, 4), -np.arange(len(boxes), dtype=np.float32))


def square(number, size=5):
    return [number * 10, 0, number * 10 + size, size]


def slow_union(parts, duplicate_iou, max_boxes):
    """Take turns box by box."""
    kept = []
    for turn in range(max(map(len, parts))):
        for part in parts:
            if turn < len(part):
                box = part[turn]
                if all(iou(box[None], other[None]).item() <= duplicate_iou for other in kept) or duplicate_iou == 1:
                    kept.append(box)
    return torch.stack(kept)[:max_boxes]


def test_turns_by_hand():
    sources = [Given([square(0), square(1), square(2)]), Given([square(3)]), Given([square(4), square(5)])]
    boxes, losses = Union(sources)(IMAGES, {})
    assert len(boxes) == 2
    assert losses == {}
    for found in boxes:
        assert (found[:, 0] / 10).tolist() == [0, 3, 4, 1, 5, 2]
    boxes, _ = Union(sources, max_boxes=4)(IMAGES, {})
    assert (boxes[0][:, 0] / 10).tolist() == [0, 3, 4, 1]


@pytest.mark.parametrize("duplicate_iou", [0.3, 0.7, 1.0])
@pytest.mark.parametrize("max_boxes", [None, 25])
def test_equals_a_slow_loop(duplicate_iou, max_boxes):
    parts = [random_boxes(count, whole=True) for count in (30, 7, 18)]
    boxes, _ = Union([Given(part) for part in parts], max_boxes, duplicate_iou)(IMAGES, {})
    assert torch.equal(boxes[1], slow_union(parts, duplicate_iou, max_boxes))


def test_near_duplicates_go_and_the_earlier_one_stays():
    first, near, far = [0, 0, 10, 10], [0, 0, 10, 10.5], [0, 0, 10, 13]
    boxes, _ = Union([Given([far]), Given([near, first])])(IMAGES, {})
    assert boxes[0].tolist() == [far, near]
    boxes, _ = Union([Given([first]), Given([first])], duplicate_iou=1)(IMAGES, {})
    assert boxes[0].tolist() == [first, first]


def test_no_boxes_are_boxes_too():
    boxes, _ = Union([Given([]), Given([])])(IMAGES, {})
    assert [found.shape for found in boxes] == [(0, 4), (0, 4)]
    boxes, _ = Union([Given([]), Given([square(1)])])(IMAGES, {})
    assert boxes[0].tolist() == [square(1)]
    found, scores = Union([Corner([]), Corner([])]).propose(np.zeros((9, 9, 3), np.uint8))
    assert (found.shape, scores.shape) == ((0, 4), (0,))


def test_losses_of_all_sources_are_there():
    sources = [Given([], 1.0), Given([], 2.0), Given([], 3.0, "loss_other"), Given([])]
    union = Union(sources).train()
    _, losses = union(IMAGES, {})
    assert {name: value.item() for name, value in losses.items()} == {
        "loss_given": 1.0,
        "loss_given_1": 2.0,
        "loss_other": 3.0,
    }
    assert union.eval()(IMAGES, {})[1] == {}


def test_the_mode_is_handed_on_but_layers_inside_stay():
    union = Union([Given([], 1.0)]).train()
    union.training = False  # as a detector asks for boxes of a source that trains
    assert union(IMAGES, {})[1] == {}
    assert union.sources[0].inner.training
    assert union.sources[0].training  # as before


def test_offline_by_hand():
    found, scores = Union([Corner((4, 8)), Corner((6, 2, 3))]).propose(np.zeros((20, 20, 3), np.uint8))
    assert found[:, 2].tolist() == [4, 6, 8, 2, 3]
    assert scores.tolist() == pytest.approx([1, 1, 1 / 2, 1 / 2, 1 / 3])
    assert found.dtype == scores.dtype == np.float32
    assert found.flags.c_contiguous


def test_offline_and_in_a_detector_are_the_same():
    image = torch.randint(0, 256, (1, 3, 64, 96), dtype=torch.uint8)
    union = Union([Corner((4, 20, 30)), DenseGrid([16, 32], [1.0])], duplicate_iou=1)
    in_detector, _ = union(ImageList(image / 255, [(64, 96)]), {})
    alone, _ = union.propose(image[0].permute(1, 2, 0).numpy())
    assert {tuple(box) for box in alone.tolist()} == {tuple(box) for box in in_detector[0].tolist()}


@scikit_image
def test_a_real_union_is_the_same_every_time_and_finds_objects():
    from detpipe.proposals import make_source

    union = make_source("dense_grid+selective_search")
    for seed, box in enumerate(PLACES):
        boxes, scores = union.propose(planted(box, seed=seed))
        assert best_overlap(boxes, box) > 0.8
        assert (np.diff(scores) <= 0).all()
        overlaps = iou(torch.from_numpy(boxes), torch.from_numpy(boxes)).fill_diagonal_(0)
        assert overlaps.max() <= 0.9
        assert 200 < len(boxes) <= 2000
    is_the_same_every_time(lambda: make_source("selective_search+dense_grid"))


def test_settings_name_the_sources():
    union = Union([Corner((4,)), DenseGrid([16], [1.0]), Union([Corner()], 9, 0.5)], 50)
    assert json.loads(json.dumps(union.settings)) == {
        "sources": [
            {"source": "corner", "settings": {"sizes": [4], "max_boxes": None, "min_size": 0.0}},
            {"source": "dense_grid", "settings": DenseGrid([16], [1.0]).settings},
            {
                "source": "union",
                "settings": {
                    "sources": [
                        {"source": "corner", "settings": {"sizes": [4, 8], "max_boxes": None, "min_size": 0.0}}
                    ],
                    "max_boxes": 9,
                    "duplicate_iou": 0.5,
                },
            },
        ],
        "max_boxes": 50,
        "duplicate_iou": 0.9,
    }


def test_the_pixel_format_reaches_all_sources():
    bgr = PixelFormat(channel_order="bgr")
    inner = Corner()
    union = Union([DenseGrid(), Corner(), Union([inner])], pixel_format=bgr)
    assert union.sources[1].pixel_format == inner.pixel_format == bgr
    union = Union([Corner(pixel_format=bgr)])
    assert union.sources[0].pixel_format == bgr
    union.set_pixel_format(PixelFormat())
    assert union.sources[0].pixel_format == PixelFormat()


def test_a_source_that_needs_features_is_named_offline():
    union = Union([DenseGrid(), RPN(4, {"c4": 16}, anchors=Anchors([[16]]))])
    message = "RPN needs the features of a network: a union with it works in a detector only"
    with pytest.raises(TypeError, match=message):
        union.propose(np.zeros((64, 64, 3), np.uint8))
    with pytest.raises(TypeError, match=message):
        _ = union.settings


@scikit_image
def test_an_image_too_small_for_one_source_is_too_small():
    from detpipe.proposals import make_source

    with pytest.raises(DataError, match="too small for selective_search"):
        make_source("dense_grid+selective_search").propose(np.zeros((5, 60, 3), np.uint8))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sources": []}, "a union needs at least one source"),
        ({"max_boxes": 0}, "max_boxes must be at least 1"),
        ({"duplicate_iou": 0}, "duplicate_iou must be in 0..1, above 0, got 0"),
        ({"duplicate_iou": 1.1}, "duplicate_iou must be .* got 1.1"),
        ({"duplicate_iou": float("nan")}, "duplicate_iou must be .* got nan"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message) as caught:
        Union(**{"sources": [DenseGrid()], **arguments})
    assert "\n" not in str(caught.value)


def detector_with(proposals, backbone):
    head = FastRCNNHead(backbone.out_channels, num_classes=2, strides=backbone.strides, fc=[16])
    return TwoStageDetector(backbone, proposals, head, min_size=64, max_size=128)


def test_in_a_detector_an_rpn_beside_a_grid_learns():
    backbone = SEResNet(18, levels=["c3"])
    objective = RPNObjective(32)
    rpn = RPN(backbone.out_channels, backbone.strides, anchors=Anchors([[16, 32]]), objective=objective)
    detector = detector_with(Union([DenseGrid([32], [1.0]), rpn], 100), backbone)
    images = [torch.from_numpy(planted(box)).permute(2, 0, 1) for box in PLACES[:2]]
    targets = [{"boxes": torch.tensor([box], dtype=torch.float32), "labels": torch.tensor([1])} for box in PLACES[:2]]
    for mode in (True, False):  # losses are returned in evaluation mode too
        losses = detector.train(mode).losses(images, targets)
        assert {"loss_objectness", "loss_rpn_box_reg", "loss_classifier", "loss_box_reg"} <= set(losses)
        assert all(value.isfinite() for value in losses.values())
        assert [module.training for module in detector.modules()] == [mode] * len(list(detector.modules()))
    torch.stack([value for name, value in losses.items() if name.startswith("loss_")]).sum().backward()
    assert all(parameter.grad is not None for parameter in rpn.parameters())
    assert any(parameter.grad.abs().sum() > 0 for parameter in rpn.parameters())
    for mode in (True, False):
        found = detector.train(mode)(images)
        assert [sorted(each) for each in found] == [["boxes", "labels", "scores"]] * 2
        assert [module.training for module in detector.modules()] == [mode] * len(list(detector.modules()))


def test_weights_of_networks_inside_are_saved():
    union = Union([DenseGrid(), RPN(4, {"c4": 16}, anchors=Anchors([[16]]))])
    assert {name.split(".")[1] for name in union.state_dict()} == {"1"}

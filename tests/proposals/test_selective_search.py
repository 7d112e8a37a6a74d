import sys

import numpy as np
import pytest
import torch

from detpipe.backbones import SEResNet
from detpipe.detector import TwoStageDetector
from detpipe.heads import FastRCNNHead, Postprocess
from detpipe.proposals import SelectiveSearch
from detpipe.proposals.region_grouping import Grouping
from detpipe.proposals.selective_search import COLOR_SPACES, convert, in_random_order
from detpipe.support.errors import DataError, UsageError

from .needs import PLACES, planted, scikit_image
from .recall import recall
from .source_checks import (
    finds_planted_objects,
    is_the_same_every_time,
    settings_make_the_source_again,
    takes_any_image,
)


@scikit_image
def test_planted_objects_are_found():
    finds_planted_objects(SelectiveSearch())


@scikit_image
@pytest.mark.parametrize("space", COLOR_SPACES)
def test_one_color_space_and_one_strategy_find_them_too(space):
    finds_planted_objects(SelectiveSearch([space], strategies=[["size", "fill"]]))


@scikit_image
def test_odd_images():
    takes_any_image(SelectiveSearch())
    takes_any_image(SelectiveSearch(["gray"], [1, 500], min_region=1, max_boxes=5, min_size=0))


@scikit_image
def test_a_constant_image_is_one_box():
    boxes, _ = SelectiveSearch().propose(np.full((30, 50, 3), 128, np.uint8))
    assert [0, 0, 50, 30] in boxes.tolist()


@scikit_image
def test_the_same_every_time():
    is_the_same_every_time(SelectiveSearch)
    settings_make_the_source_again(
        SelectiveSearch(["rgb", "gray"], [30, 80.5], [["color"], ["fill", "size"]], 20, 0.6, 99, 2)
    )


@scikit_image
def test_the_seed_changes_the_order_alone():
    image = planted(PLACES[0])
    one, other = (SelectiveSearch(max_boxes=None, seed=seed).propose(image)[0] for seed in (0, 1))
    assert not np.array_equal(one, other)
    assert np.array_equal(np.unique(one, axis=0), np.unique(other, axis=0))


@scikit_image
def test_more_strategies_and_spaces_add_boxes_and_lose_none():
    image = planted(PLACES[1])
    few = SelectiveSearch(["lab"], [50], [["size", "fill"]], max_boxes=None).propose(image)[0]
    many = SelectiveSearch(["hsv", "lab"], [50, 90], [["color"], ["size", "fill"]], max_boxes=None).propose(image)[0]
    assert {tuple(box) for box in few.tolist()} < {tuple(box) for box in many.tolist()}
    cut, scores = SelectiveSearch(["hsv", "lab"], [50, 90], [["color"], ["size", "fill"]], max_boxes=20).propose(image)
    assert np.array_equal(cut, many[:20])
    assert len(scores) == 20


@scikit_image
def test_an_image_that_is_too_small():
    with pytest.raises(
        DataError, match="7 x 40 pixels is too small for selective_search, which needs at least 8 pixels"
    ):
        SelectiveSearch().propose(np.zeros((40, 7, 3), np.uint8))


def test_the_order_is_the_rank_times_chance():
    ranks = np.arange(1, 501, dtype=np.int32)
    boxes = np.arange(2000, dtype=np.float32).reshape(500, 4)
    found = in_random_order(Grouping(boxes, np.zeros(500, np.int32), ranks), 3)
    assert found.boxes is boxes
    chance = found.scores / -ranks
    assert ((chance >= 0) & (chance < 1)).all()
    assert abs(chance.mean() - 0.5) < 0.05
    order = np.argsort(-found.scores)
    assert ranks[order[:50]].mean() < 150 < ranks[order[-50:]].mean()  # wholes come sooner, but not all of them


@pytest.mark.parametrize("space", COLOR_SPACES)
def test_color_spaces_use_the_whole_range(space):
    values = np.arange(256, dtype=np.uint8)
    image = np.stack(np.meshgrid(values[::15], values[::15], values[::15]), axis=-1).reshape(18, -1, 3)
    found = convert(image, space)
    assert found.dtype == np.uint8
    assert found.shape == (18, image.shape[1], 1 if space == "gray" else 3)
    assert found.min() == 0
    assert (found.reshape(-1, found.shape[2]).max(axis=0) >= 220).all()


def test_colors_by_hand():
    image = np.array([[[255, 0, 0], [0, 255, 0], [30, 60, 90]]], np.uint8)
    assert convert(image, "rgb").tolist() == image.tolist()
    assert convert(image, "gray").tolist() == [[[76], [150], [54]]]
    assert convert(image, "hsv")[0, :2].tolist() == [[0, 255, 255], [85, 255, 255]]
    assert convert(image, "rgi").tolist() == [[[254, 0, 85], [0, 254, 85], [42, 84, 60]]]
    dark = convert(np.zeros((2, 2, 3), np.uint8), "rgi")
    assert dark.tolist() == np.zeros((2, 2, 3)).tolist()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"color_spaces": ["hvs"]}, "color_spaces: unknown 'hvs'.*did you mean 'hsv'"),
        ({"color_spaces": []}, r"color_spaces must be a list of at least one of rgb, hsv, lab, rgi, gray; got \[\]"),
        ({"color_spaces": "hsv"}, "color_spaces must be a list .* got 'hsv'"),
        ({"strategies": []}, "strategies must be a list of at least one of color, texture, size, fill"),
        ({"strategies": [[]]}, "strategies must be a list"),
        ({"strategies": ["size"]}, "strategies must be a list .* got 'size'"),
        ({"strategies": [["size", "shape"]]}, "strategies: unknown 'shape'"),
        ({"scales": []}, r"expected scales and sigma above 0.*scales=\[\]"),
        ({"scales": [50, 0]}, r"scales=\[50, 0\]"),
        ({"sigma": 0}, "sigma=0"),
        ({"sigma": float("nan")}, "sigma=nan"),
        ({"min_region": 0}, "min_region=0"),
        ({"seed": -1}, "seed=-1"),
        ({"max_boxes": 0}, "max_boxes must be positive or null, got 0"),
        ({"min_size": -1}, "min_size must be 0 or more pixels, got -1"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message) as caught:
        SelectiveSearch(**arguments)
    assert "\n" not in str(caught.value)


def test_without_scikit_image_the_package_to_install_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "skimage.segmentation", None)
    monkeypatch.setitem(sys.modules, "skimage", None)
    with pytest.raises(
        UsageError, match=r"^selective_search needs scikit-image, .* pip install 'detpipe\[proposals\]'$"
    ):
        SelectiveSearch()


@scikit_image
def test_in_a_detector_it_serves_training_and_detection():
    backbone = SEResNet(18, levels=["c3"])
    every = Postprocess(score_threshold=0.0)
    head = FastRCNNHead(backbone.out_channels, num_classes=2, strides=backbone.strides, fc=[16], postprocess=every)
    detector = TwoStageDetector(backbone, SelectiveSearch(max_boxes=60), head, min_size=64, max_size=128)
    images = [torch.from_numpy(planted(box)).permute(2, 0, 1) for box in PLACES[:2]]
    targets = [{"boxes": torch.tensor([box], dtype=torch.float32), "labels": torch.tensor([1])} for box in PLACES[:2]]
    losses = detector.train().losses(images, targets)
    sum(value for name, value in losses.items() if name.startswith("loss_")).backward()
    assert {name for name in losses if name.startswith("loss_")} >= {"loss_classifier", "loss_box_reg"}
    assert all(value.isfinite() for value in losses.values())
    assert any(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in backbone.parameters())
    found = detector.eval()(images)
    assert [sorted(each) for each in found] == [["boxes", "labels", "scores"]] * 2
    for each in found:
        assert len(each["boxes"]) > 0
        assert (each["boxes"] >= 0).all()
        assert (each["boxes"][:, 2:] <= torch.tensor([140, 100])).all()


@scikit_image
def test_recall_on_blood_cells(shared_data):
    assert recall(SelectiveSearch(), "bccd", shared_data) > 0.8


@scikit_image
def test_recall_on_photographs(shared_data):
    assert recall(SelectiveSearch(), "coco_mini", shared_data) > 0.6

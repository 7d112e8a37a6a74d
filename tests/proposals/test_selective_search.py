import numpy as np
import pytest

from detpipe.proposals import SelectiveSearch
from detpipe.proposals.region_grouping import Grouping
from detpipe.proposals.selective_search import COLOR_SPACES, convert, in_random_order

from .needs import PLACES, planted, scikit_image


@scikit_image
def test_a_constant_image_is_one_box():
    boxes, _ = SelectiveSearch().propose(np.full((30, 50, 3), 128, np.uint8))
    assert [0, 0, 50, 30] in boxes.tolist()


@scikit_image
def test_more_strategies_and_spaces_add_boxes_and_lose_none():
    image = planted(PLACES[1])
    few = SelectiveSearch(["lab"], [50], [["size", "fill"]], max_boxes=None).propose(image)[0]
    many = SelectiveSearch(["hsv", "lab"], [50, 90], [["color"], ["size", "fill"]], max_boxes=None).propose(image)[0]
    assert {tuple(box) for box in few.tolist()} < {tuple(box) for box in many.tolist()}
    cut, scores = SelectiveSearch(["hsv", "lab"], [50, 90], [["color"], ["size", "fill"]], max_boxes=20).propose(image)
    assert np.array_equal(cut, many[:20])
    assert len(scores) == 20


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

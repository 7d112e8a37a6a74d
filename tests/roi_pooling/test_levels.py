import math

import pytest
import torch

from detpipe.roi_pooling.levels import FPNLevels

assign_levels = FPNLevels()


def square(side: float) -> list[float]:
    return [5.0, 7.0, 5.0 + side, 7.0 + side]


@pytest.mark.parametrize(
    ("side", "level"),  # P2 to P5: 224 is pooled from P4 (index 2); twice the side is a level higher
    [(1, 0), (111.9, 0), (112, 1), (223.9, 1), (224, 2), (447.9, 2), (448, 3), (5000, 3)],
)
def test_by_hand(side, level):
    assert assign_levels(torch.tensor([square(side)]), [4, 8, 16, 32]).tolist() == [level]


@pytest.mark.parametrize(("side", "level"), [(79, 0), (80, 1), (158, 1), (159, 2), (316, 2), (317, 3)])
def test_nearest_rounds_in_the_middle_of_an_octave(side, level):
    assert FPNLevels(rounding="nearest")(torch.tensor([square(side)]), [4, 8, 16, 32]).tolist() == [level]


def test_other_canonical_boxes():
    boxes = torch.tensor([square(side) for side in (55.9, 56, 112, 224, 448)])
    assert FPNLevels(56, 4)(boxes, [4, 8, 16, 32]).tolist() == assign_levels(boxes, [4, 8, 16, 32]).tolist()
    assert FPNLevels(448)(boxes, [4, 8, 16, 32]).tolist() == [0, 0, 0, 1, 2]


@pytest.mark.parametrize(
    "change", [{"canonical_size": 0}, {"canonical_size": math.nan}, {"canonical_stride": -4}, {"rounding": "up"}]
)
def test_bad_settings_are_named(change):
    with pytest.raises(ValueError, match=next(iter(change))):
        FPNLevels(**change)


def test_only_the_area_counts():
    boxes = torch.tensor([[0.0, 0.0, 448.0, 112.0], [0.0, 0.0, 56.0, 896.0]])
    assert assign_levels(boxes, [4, 8, 16, 32]).tolist() == [2, 2]


@pytest.mark.parametrize("strides", [[4, 8, 16, 32], [8, 16], [16, 32, 64], [16], [4, 32], [4, 16], [8, 8, 8]])
def test_equals_a_slow_loop(strides):
    sides = torch.rand(200) * 1500 + 1
    boxes = torch.stack((sides * 0, sides * 0, sides, sides), dim=1)
    expected = []
    for side in sides.tolist():
        wanted = math.floor(4 + math.log2(side / 224))  # equation 1; 2**level is its stride
        distances = [abs(math.log2(stride) - wanted) for stride in strides]
        expected.append(distances.index(min(distances)))
    assert assign_levels(boxes, strides).tolist() == expected


def test_degenerate_boxes_have_a_level():
    boxes = torch.tensor([[3.0, 3.0, 3.0, 3.0], [5.0, 5.0, 4.0, 9.0], [math.nan, 0.0, 1.0, 1.0]])
    assert assign_levels(boxes, [8, 16]).tolist()[:2] == [0, 0]
    assert assign_levels(boxes, [8, 16])[2] in (0, 1)


def test_no_boxes():
    assert assign_levels(torch.zeros(0, 4), [4, 8]).tolist() == []

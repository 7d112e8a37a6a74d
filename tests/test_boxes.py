import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from samples import overlap, random_boxes
from torch import Tensor
from torchvision.ops import box_iou

from detpipe import boxes as box_ops

CORNERS = st.tuples(*[st.integers(-3, 6)] * 4)  # touching, equal, empty and inverted boxes are all likely
LISTS = st.lists(CORNERS, max_size=6)


def as_boxes(corners: list[tuple[int, ...]]) -> Tensor:
    return torch.tensor(corners, dtype=torch.float64).reshape(-1, 4)


def slow_area(box: tuple[float, ...]) -> float:
    return max(box[2] - box[0], 0) * max(box[3] - box[1], 0)


@settings(deadline=None)
@given(LISTS, LISTS)
def test_overlaps_equal_a_slow_loop(first, second):
    iou, coverage = torch.zeros(len(first), len(second)).double(), torch.zeros(len(first), len(second)).double()
    for i, a in enumerate(first):
        for j, b in enumerate(second):
            iou[i, j], coverage[i, j] = overlap(a, b), overlap(a, b, over_first=True)
    boxes, others = as_boxes(first), as_boxes(second)
    assert torch.equal(box_ops.iou(boxes, others), iou)
    assert torch.equal(box_ops.coverage(boxes, others), coverage)
    assert box_ops.area(boxes).tolist() == [slow_area(box) for box in first]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_iou_equals_torchvision_and_is_batched(dtype):
    boxes = torch.stack([random_boxes(20), random_boxes(20)]).to(dtype)
    others = torch.stack([random_boxes(7), random_boxes(7)]).to(dtype)
    expected = torch.stack([box_iou(a, b) for a, b in zip(boxes, others, strict=True)])
    torch.testing.assert_close(box_ops.iou(boxes, others), expected, rtol=1e-6, atol=0)


def test_coverage_of_a_crowd_region_is_what_pycocotools_computes():
    from pycocotools import mask

    boxes, regions = random_boxes(30).double(), random_boxes(5).double()
    as_xywh = [torch.cat((b[:, :2], b[:, 2:] - b[:, :2]), dim=1).numpy() for b in (boxes, regions)]
    expected = torch.from_numpy(mask.iou(*as_xywh, [1] * 5))
    torch.testing.assert_close(box_ops.coverage(boxes, regions), expected, rtol=1e-12, atol=0)


@settings(deadline=None)
@given(LISTS, st.integers(1, 5), st.integers(1, 5))
def test_clip_moves_each_corner_to_the_nearest_point_of_the_image(corners, height, width):
    expected = [
        [min(max(x1, 0), width), min(max(y1, 0), height), min(max(x2, 0), width), min(max(y2, 0), height)]
        for x1, y1, x2, y2 in corners
    ]
    assert box_ops.clip(as_boxes(corners), height, width).tolist() == expected


def test_clip_takes_one_size_an_image():
    boxes = torch.tensor([[[-1.0, -1.0, 9.0, 9.0]], [[2.0, 3.0, 90.0, 90.0]]])
    heights, widths = torch.tensor([[4], [50]]), torch.tensor([[6], [70]])
    assert box_ops.clip(boxes, heights, widths).tolist() == [[[0, 0, 6, 4]], [[2, 3, 70, 50]]]


@pytest.mark.parametrize(
    ("box", "expected"),
    [
        ([0.0, 0.0, 2.0, 3.0], True),
        ([0.0, 0.0, 1.0, 3.0], False),  # as wide as min_size
        ([2.0, 0.0, 0.0, 3.0], False),  # inside out
        ([0.0, 0.0, math.nan, 3.0], False),
        ([0.0, 0.0, 2.0, math.inf], False),
        ([-math.inf, 0.0, 2.0, 3.0], False),
    ],
)
def test_valid(box, expected):
    assert box_ops.valid(torch.tensor([box]), min_size=1.0).tolist() == [expected]


def test_clip_and_overlaps_do_not_hide_nan():
    box = torch.tensor([[math.nan, 0.0, 2.0, 2.0]])
    assert not box_ops.valid(box_ops.clip(box, 4, 4)).any()
    assert not (box_ops.iou(box, torch.tensor([[0.0, 0.0, 2.0, 2.0]])) > 0).any()


@settings(deadline=None)
@given(st.integers(0, 10_000), st.floats(0.02, 40))
def test_decode_inverts_encode(seed, scale):
    torch.manual_seed(seed)
    references = random_boxes(10).double()
    center = (references[:, :2] + references[:, 2:]) / 2 + torch.randn(10, 2)
    half = (references[:, 2:] - references[:, :2]) / 2 * scale * torch.rand(10, 2).clamp(min=0.1)
    boxes = torch.cat((center - half, center + half), dim=1)
    restored = box_ops.decode(box_ops.encode(boxes, references), references)
    torch.testing.assert_close(restored, boxes, rtol=1e-9, atol=1e-9)


def test_encode_by_hand():
    deltas = box_ops.encode(torch.tensor([[4.0, 6.0, 12.0, 8.0]]), torch.tensor([[0.0, 0.0, 4.0, 8.0]]))
    # centers (8, 7) and (2, 4), sizes (8, 2) and (4, 8)
    expected = [10 * (8 - 2) / 4, 10 * (7 - 4) / 8, 5 * math.log(2), 5 * math.log(1 / 4)]
    assert deltas[0].tolist() == pytest.approx(expected, rel=1e-6)
    deltas = box_ops.encode(torch.tensor([[4.0, 6.0, 12.0, 8.0]]), torch.tensor([[0.0, 0.0, 4.0, 8.0]]), (1, 1, 1, 1))
    assert deltas[0].tolist() == pytest.approx([1.5, 0.375, math.log(2), math.log(1 / 4)], rel=1e-6)


def test_decode_caps_the_growth_and_stays_finite():
    huge = torch.tensor([[0.0, 0.0, 1e6, 1e6]])
    x1, y1, x2, y2 = box_ops.decode(huge, torch.tensor([[10.0, 10.0, 12.0, 14.0]]))[0].tolist()
    assert (x2 - x1, y2 - y1) == pytest.approx((2 * 62.5, 4 * 62.5), rel=1e-5)


def test_gradients_are_right():
    references, boxes = random_boxes(4).double(), random_boxes(4).double().requires_grad_()
    deltas = torch.randn(4, 4).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda b: box_ops.encode(b, references), boxes)
    assert torch.autograd.gradcheck(lambda d: box_ops.decode(d, references), deltas)
    assert torch.autograd.gradcheck(lambda b: box_ops.iou(b, references), boxes)


@pytest.mark.parametrize("shape", [(0, 4), (2, 0, 4)])
def test_no_boxes(shape):
    none = torch.zeros(shape)
    assert box_ops.encode(none, none).shape == box_ops.decode(none, none).shape == shape
    assert box_ops.iou(none, none).shape == (*shape[:-1], 0)
    assert box_ops.clip(none, 3, 4).shape == shape
    assert box_ops.valid(none).shape == box_ops.area(none).shape == shape[:-1]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_overlaps_of_large_boxes_in_half_precision(dtype):
    boxes = torch.tensor([[0.0, 0.0, 640.0, 512.0], [0.0, 0.0, 640.0, 256.0]], dtype=dtype)
    for function in (box_ops.iou, box_ops.coverage):
        torch.testing.assert_close(function(boxes, boxes), function(boxes.float(), boxes.float()))
    assert box_ops.area(boxes).tolist() == [640 * 512, 640 * 256]

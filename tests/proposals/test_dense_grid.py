import pytest
import torch
from samples import random_boxes

from detpipe.boxes import iou, valid
from detpipe.proposals import DenseGrid
from detpipe.proposals.dense_grid import CACHED_SIZES
from detpipe.stages import ImageList

from .needs import Emptied


def batch(*sizes: tuple[int, int]) -> ImageList:
    height, width = (max(size[axis] for size in sizes) for axis in (0, 1))
    return ImageList(torch.zeros(len(sizes), 3, height, width), list(sizes))


def test_counts_by_hand():
    # 64 x 96 at stride 16 holds 4 x 6 centers, for each of two scales and three shapes
    boxes, losses = DenseGrid([16, 32], [0.5, 1, 2], stride=16, spacing=0)(batch((64, 96)), {})
    assert boxes[0].shape == (2 * 3 * 4 * 6, 4)
    assert losses == {}
    # with a spacing of half a side, boxes of 64 stand 32 apart: 2 x 3; those of 16 keep the stride: 4 x 6
    boxes, _ = DenseGrid([16, 64], [1], stride=16, spacing=0.5)(batch((64, 96)), {})
    assert boxes[0].shape == (4 * 6 + 2 * 3, 4)


def test_boxes_by_hand():
    boxes = DenseGrid([8], [4.0], stride=32, spacing=0).boxes((32, 64))  # 16 high, 4 wide
    assert boxes.tolist() == [[14, 8, 18, 24], [46, 8, 50, 24]]


def test_order_is_scale_shape_row_column():
    boxes = DenseGrid([4, 8], [1, 4], stride=16, spacing=0).boxes((32, 32))
    sizes = (boxes[:, 2:] - boxes[:, :2]).tolist()
    assert sizes == [[4, 4]] * 4 + [[2, 8]] * 4 + [[8, 8]] * 4 + [[4, 16]] * 4
    assert ((boxes[:4, :2] + boxes[:4, 2:]) / 2).tolist() == [[8, 8], [24, 8], [8, 24], [24, 24]]


@pytest.mark.parametrize("size", [(1, 1), (3, 200), (160, 160), (600, 801)])
def test_boxes_lie_inside_their_own_image(size):
    boxes, _ = DenseGrid(max_boxes=500)(batch(size, (700, 900)), {})
    for found, (height, width) in zip(boxes, (size, (700, 900)), strict=True):
        assert 0 < len(found) <= 500
        assert valid(found).all()
        assert found.min() >= 0
        assert (found[:, 2:] <= torch.tensor([width, height])).all()


def test_the_same_for_every_call_and_independent_of_the_neighbors():
    grid = DenseGrid()
    alone, _ = grid(batch((200, 300)), {})
    beside, _ = DenseGrid()(batch((400, 500), (200, 300)), {})
    again, _ = grid(batch((200, 300)), {})
    assert torch.equal(alone[0], beside[1])
    assert torch.equal(alone[0], again[0])


def test_thinning_keeps_all_scales():
    full, thin = DenseGrid(max_boxes=10**6).boxes((600, 800)), DenseGrid(max_boxes=300).boxes((600, 800))
    assert len(thin) == 300
    rows = [(full == box).all(dim=1).nonzero()[0].item() for box in thin]
    assert rows == sorted(rows)
    assert rows[0] == 0
    gaps = torch.tensor(rows).unique().diff()
    assert gaps.max() - gaps.min() <= 1  # evenly


def test_recall():
    grid = DenseGrid(scales=[19, 26, 36, 50], ratios=[1.3], stride=5, spacing=0.25)  # the demo set's
    center = 30 + 100 * torch.rand(500, 2)
    side, shape = 19 + 31 * torch.rand(500, 1), (1.3 * torch.empty(500, 1).uniform_(0.8, 1.25)).sqrt()
    half = torch.cat((side / shape, side * shape), dim=1) / 2
    best = iou(torch.cat((center - half, center + half), dim=1), grid.boxes((160, 160))).amax(dim=1)
    assert (best >= 0.5).all()
    assert (best >= 0.7).float().mean() > 0.7
    anything = random_boxes(500, 600, 800, smallest=40)
    assert (iou(anything, DenseGrid().boxes((600, 800))).amax(dim=1) >= 0.5).float().mean() > 0.65


def test_boxes_first_made_without_gradients_serve_training():
    grid = DenseGrid()
    with torch.inference_mode():
        grid(batch((64, 64)), {})
    scale = torch.ones((), requires_grad=True)
    boxes, _ = grid(batch((64, 64)), {})
    (boxes[0] * scale).sum().backward()
    assert scale.grad is not None


def test_the_boxes_of_a_few_hundred_sizes_are_kept():
    grid = DenseGrid(scales=[32])
    for width in range(40, 340):
        grid.boxes((40, width))
    assert 0 < len(grid._cache) <= CACHED_SIZES < 300
    grid._cache = Emptied()
    assert grid.boxes((40, 40)).shape == (12, 4)


def test_callers_may_write_to_the_boxes():
    grid = DenseGrid()
    boxes, _ = grid(batch((64, 64), (64, 64)), {})
    before = boxes[1].clone()
    boxes[0].zero_()
    assert torch.equal(boxes[1], before)
    assert torch.equal(grid(batch((64, 64)), {})[0][0], before)


@pytest.mark.parametrize(
    "arguments",
    [
        {"scales": []},
        {"ratios": []},
        {"scales": [0]},
        {"ratios": [-1]},
        {"stride": 0},
        {"max_boxes": 0},
        {"max_boxes": float("inf")},
        {"stride": float("nan")},
        {"spacing": -1},
    ],
)
def test_bad_arguments(arguments):
    with pytest.raises(ValueError, match=rf"{next(iter(arguments))}.* (need at least one|must)"):
        DenseGrid(**arguments)

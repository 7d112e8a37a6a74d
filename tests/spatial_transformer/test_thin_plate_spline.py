import copy
import math

import pytest
import torch

from detpipe.spatial_transformer import AffineGrid, ThinPlateSplineGrid
from tests.spatial_transformer.definitions import grid_of, some_theta

SIZE = (4, 5)


def spline(offsets, count):
    """The textbook's spline through the moved control points, one coordinate and one point at a time."""
    side = [2 * i / (count - 1) - 1 for i in range(count)]
    control = [(x, y) for y in side for x in side]
    targets = [(x + dx, y + dy) for (x, y), (dx, dy) in zip(control, offsets, strict=True)]

    def bend(a, b):
        r = math.dist(a, b)
        return r**2 * math.log(r**2) if r else 0.0

    n = len(control)
    system = torch.zeros(n + 3, n + 3, dtype=torch.float64)
    for i, a in enumerate(control):
        for j, b in enumerate(control):
            system[i, j] = bend(a, b)
        for j, term in enumerate((1.0, *a)):
            system[i, n + j] = system[n + j, i] = term
    right = torch.zeros(n + 3, 2, dtype=torch.float64)
    right[:n] = torch.tensor(targets, dtype=torch.float64)
    weights = torch.linalg.solve(system, right)

    def warp(x, y):
        terms = torch.tensor([*(bend((x, y), c) for c in control), 1.0, x, y], dtype=torch.float64)
        return tuple((terms @ weights).tolist())

    return warp


@pytest.mark.parametrize("count", [2, 3, 4])
def test_equals_the_textbook(count):
    grid = ThinPlateSplineGrid(count).double()
    theta = some_theta(grid)
    result = grid(theta, SIZE)
    for row in range(2):
        expected = grid_of(spline(theta[row].view(-1, 2).tolist(), count), SIZE)
        torch.testing.assert_close(result[row : row + 1], expected, rtol=1e-9, atol=1e-9)


def test_goes_through_its_control_points_row_by_row_x_before_y():
    grid = ThinPlateSplineGrid(3).double()
    theta = torch.zeros(1, 18, dtype=torch.float64)
    theta[0, 2 * 5] = 0.25  # second row, right end: x
    theta[0, 2 * 7 + 1] = -0.5  # last row, middle: y
    points = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, -1.0], [0.0, 0.0]], dtype=torch.float64)
    moved = torch.tensor([[1.25, 0.0], [0.0, 0.5], [-1.0, -1.0], [0.0, 0.0]], dtype=torch.float64)
    torch.testing.assert_close(grid.warp(theta, points)[0], moved, rtol=0, atol=1e-12)


def test_offsets_that_are_affine_make_that_affine_transform_even_far_outside():
    grid, matrix = ThinPlateSplineGrid(4).double(), some_theta(AffineGrid(), 1)
    side = torch.linspace(-1, 1, 4, dtype=torch.float64)
    control = torch.stack([side.repeat(4), side.repeat_interleave(4)], dim=-1)
    theta = (AffineGrid().warp(matrix, control) - control).flatten(1)
    points = 5 * torch.randn(20, 2, dtype=torch.float64)
    torch.testing.assert_close(grid.warp(theta, points), AffineGrid().warp(matrix, points), rtol=0, atol=1e-9)


def test_bounded_offsets():
    free, bound = ThinPlateSplineGrid(3).double(), ThinPlateSplineGrid(3, max_offset=0.3).double()
    theta = some_theta(free, spread=1.0)
    torch.testing.assert_close(bound(theta, SIZE), free(0.3 * torch.tanh(theta / 0.3), SIZE))


def test_the_solution_is_exact_in_every_precision_and_not_stored():
    grid = ThinPlateSplineGrid(4)
    theta = some_theta(grid, dtype=torch.float32)
    expected = grid(theta, SIZE)
    assert not grid.state_dict()
    assert not list(grid.parameters())
    assert torch.equal(copy.deepcopy(grid).half()(theta, SIZE), expected)
    assert torch.equal(copy.deepcopy(grid).double().bfloat16().float()(theta, SIZE), expected)
    exact = copy.deepcopy(grid).half().double()(theta.double(), SIZE)
    assert torch.equal(exact, ThinPlateSplineGrid(4).double()(theta.double(), SIZE))
    torch.testing.assert_close(exact.float(), expected, rtol=0, atol=2e-6)
    assert copy.deepcopy(grid).to("meta").solution.device.type == "meta"
    with torch.device("meta"):
        empty = ThinPlateSplineGrid(4)
    assert torch.equal(empty.to_empty(device="cpu")(theta, SIZE), expected)


@pytest.mark.parametrize("points", [1, 0, -2])
def test_too_few_points_are_refused(points):
    with pytest.raises(ValueError, match="points must be at least 2"):
        ThinPlateSplineGrid(points)


def test_a_limit_that_leaves_nothing_is_refused():
    with pytest.raises(ValueError, match="max_offset must be positive"):
        ThinPlateSplineGrid(3, max_offset=0)

import pytest
import torch

from detpipe.spatial_transformer import AffineGrid, cell_centers
from tests.spatial_transformer.definitions import GRIDS, grid_of, some_theta

all_grids = pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)
SIZES = [(1, 1), (1, 7), (3, 4), (7, 10), (11, 33)]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_centers_are_those_of_the_definition(size, dtype):
    centers = cell_centers(size, dtype=dtype)
    assert centers.shape == (*size, 2)
    assert centers.dtype == dtype
    torch.testing.assert_close(centers.double(), grid_of(lambda x, y: (x, y), size)[0], rtol=0, atol=1e-7)
    assert torch.equal(centers, -centers.flip(0, 1))  # symmetric, to the bit


@all_grids
@pytest.mark.parametrize("size", SIZES)
def test_identity_is_the_grid_of_centers_to_the_bit(grid, size):
    theta = grid.identity().expand(2, -1)
    assert theta.shape == (2, grid.parameters_count)
    assert torch.equal(grid(theta, size), cell_centers(size).expand(2, -1, -1, -1))


@all_grids
def test_gradient_in_the_parameters(grid):
    theta = some_theta(grid).requires_grad_()
    assert torch.autograd.gradcheck(lambda theta: grid(theta, (3, 4)), theta)
    assert torch.autograd.gradgradcheck(lambda theta: grid(theta, (2, 2)), theta)


@all_grids
def test_identity_has_a_gradient_in_every_parameter(grid):
    theta = grid.identity().expand(1, -1).clone().requires_grad_()
    (grid(theta, (3, 4)) * torch.randn(1, 3, 4, 2)).sum().backward()
    assert (theta.grad != 0).all()


@all_grids
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_parameters_that_are_not_finite_make_the_identity_of_that_image_alone(grid, bad):
    theta = some_theta(grid, 3, dtype=torch.float32)
    expected = grid(theta, (3, 4))
    theta[1, -1] = bad
    theta.requires_grad_()
    result = grid(theta, (3, 4))
    assert torch.equal(result[[0, 2]], expected[[0, 2]])
    assert torch.equal(result[1], cell_centers((3, 4)))
    result.sum().backward()
    assert theta.grad.isfinite().all()
    assert (theta.grad[1] == 0).all()
    assert (theta.grad[0] != 0).any()


@all_grids
@pytest.mark.parametrize("extreme", [0.0, -1.0, 1.0, 100.0, -1e4, 1e30, -1e30])
def test_points_and_gradients_are_finite_for_extreme_parameters(grid, extreme):
    theta = torch.full((2, grid.parameters_count), extreme, requires_grad=True)
    points = grid(theta, (4, 5))
    points.sum().backward()
    assert points.isfinite().all()
    assert theta.grad.isfinite().all()


@all_grids
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_parameters_and_modules_make_a_float32_grid(grid, dtype):
    theta = some_theta(grid, dtype=torch.float32).to(dtype)
    expected = grid(theta.float(), (5, 4000))
    assert torch.equal(grid(theta, (5, 4000)), expected)
    with torch.autocast("cpu", torch.bfloat16):
        result = grid(theta, (5, 4000))
    assert result.dtype == torch.float32
    assert torch.equal(result, expected)


@all_grids
def test_empty_batch(grid):
    theta = torch.zeros(0, grid.parameters_count, requires_grad=True)
    points = grid(theta, (3, 4))
    assert points.shape == (0, 3, 4, 2)
    points.sum().backward()
    assert theta.grad.shape == theta.shape


@all_grids
def test_warp_takes_points_of_any_shape(grid):
    theta = some_theta(grid)
    expected = grid(theta, (3, 4))
    points = cell_centers((3, 4), dtype=torch.float64)
    assert torch.equal(grid.warp(theta, points.flatten(0, 1)), expected.flatten(1, 2))
    torch.testing.assert_close(grid.warp(theta, points[1, 2]), expected[:, 1, 2], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("theta", [torch.zeros(2, 5), torch.zeros(6), torch.zeros(2, 6, 1), torch.zeros(2, 6).long()])
def test_other_parameters_are_refused(theta):
    with pytest.raises(ValueError, match=r"theta must be floating-point \[N, 6\] for AffineGrid, got \["):
        AffineGrid()(theta, (3, 4))


@pytest.mark.parametrize("size", [(0, 3), (3, -1)])
def test_other_sizes_are_refused(size):
    with pytest.raises(ValueError, match="at least 1"):
        AffineGrid()(torch.zeros(1, 6), size)

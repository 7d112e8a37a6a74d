import math

import pytest
import torch
from torch.nn import functional

from detpipe.spatial_transformer import AffineGrid, AttentionGrid, ProjectiveGrid, SimilarityGrid
from tests.spatial_transformer.definitions import grid_of, some_theta

SIZE = (3, 5)


def close(result, expected):
    torch.testing.assert_close(result, expected, rtol=1e-12, atol=1e-12)


def by_rows(grid, theta, warp):
    """Every image of a batch against a function of its parameters and (x, y)."""
    result = grid(theta, SIZE)
    for row, parameters in enumerate(theta.tolist()):
        close(result[row : row + 1], grid_of(lambda x, y, p=parameters: warp(x, y, *p), SIZE))


def squash(value, limit):
    return limit * math.tanh(value / limit)


def test_affine_is_equation_1_and_that_of_torch():
    grid = AffineGrid()
    theta = some_theta(grid, 3, spread=1.0)
    by_rows(grid, theta, lambda x, y, a, b, c, d, e, f: (a * x + b * y + c, d * x + e * y + f))
    expected = functional.affine_grid(theta.unflatten(1, (2, 3)), [3, 1, *SIZE], align_corners=False)
    close(grid(theta, SIZE), expected)
    assert grid.parameters_count == 6


def test_bounded_affine():
    grid = AffineGrid(max_change=0.4, max_shift=0.5)
    by_rows(
        grid,
        some_theta(grid, 3, spread=2.0),
        lambda x, y, a, b, c, d, e, f: (
            (1 + squash(a - 1, 0.4)) * x + squash(b, 0.4) * y + squash(c, 0.5),
            squash(d, 0.4) * x + (1 + squash(e - 1, 0.4)) * y + squash(f, 0.5),
        ),
    )


@pytest.mark.parametrize("aspect", [1.0, 1.5])
def test_similarity(aspect):
    grid = SimilarityGrid(aspect=aspect)

    def warp(x, y, angle, log_scale, shift_x, shift_y):
        turned = math.exp(log_scale) * complex(math.cos(angle), math.sin(angle)) * complex(x * aspect, y)
        return turned.real / aspect + shift_x, turned.imag + shift_y

    by_rows(grid, some_theta(grid, 3, spread=1.0), warp)


def test_bounded_similarity():
    grid = SimilarityGrid(max_angle=1.0, max_log_scale=0.7, max_shift=0.5)
    theta = some_theta(grid, 3, spread=3.0)
    limits = torch.tensor([1.0, 0.7, 0.5, 0.5], dtype=torch.float64)
    close(grid(theta, SIZE), SimilarityGrid()(limits * torch.tanh(theta / limits), SIZE))


def test_attention_is_equation_2():
    grid = AttentionGrid()
    by_rows(grid, some_theta(grid, 3, spread=1.0), lambda x, y, s, tx, ty: (math.exp(s) * x + tx, math.exp(s) * y + ty))


def test_bounded_attention_stays_in_its_bounds():
    grid = AttentionGrid(max_log_scale=math.log(2), max_shift=0.25)
    points = grid(torch.tensor([[99.0, 99.0, -99.0], [-99.0, 0.0, 0.0]]), (1, 2))
    torch.testing.assert_close(points[:, 0], torch.tensor([[[-0.75, -0.25], [1.25, -0.25]], [[-0.25, 0], [0.25, 0]]]))


def homography(x, y, a, b, c, d, e, f, g, h, margin=0.1):
    denominator = g * x + h * y + 1
    reciprocal = 1 / denominator if denominator >= margin else 1 / margin - (denominator - margin) / margin**2
    return (a * x + b * y + c) * reciprocal, (d * x + e * y + f) * reciprocal


def test_projective():
    grid = ProjectiveGrid()
    theta = some_theta(grid, 4, spread=0.4)
    by_rows(grid, theta, homography)
    theta[:, 6:] = torch.tensor([[0.3, 0.3], [0.9, 0.5], [-3.0, 1.0], [0.0, -8.0]])  # the horizon comes into the output
    by_rows(grid, theta, homography)


def test_projective_gradient_survives_a_vanishing_denominator():
    """d = 1 + 2 x: zero at x = -.5, negative left of it."""
    theta = torch.tensor([[1.0, 0, 0, 0, 1, 0, 2, 0]], dtype=torch.float64, requires_grad=True)
    grid, points = ProjectiveGrid(), torch.tensor([[-0.5, 0.1], [-0.45, 0.1], [-0.9, 0.1]], dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda theta: grid.warp(theta, points), theta)
    for point in points:
        (gradient,) = torch.autograd.grad(grid.warp(theta, point)[0, 0], theta)
        assert gradient[0, 6].abs() > 1e-3
    x = grid.warp(theta, points)[0, :, 0]
    assert (x < -1).all()  # still on the side on which it left


def test_projective_is_continuous_and_smooth_at_the_margin():
    grid = ProjectiveGrid(margin=0.25)
    theta = torch.tensor([[1.0, 0, 0, 0, 1, 0, 1, 0]], dtype=torch.float64)
    at = torch.tensor([-0.75 - 1e-7, -0.75 + 1e-7], dtype=torch.float64, requires_grad=True)
    x = grid.warp(theta, torch.stack([at, torch.zeros_like(at)], dim=-1))[0, :, 0]
    (slope,) = torch.autograd.grad(x.sum(), at)
    torch.testing.assert_close(x[0], x[1], rtol=0, atol=1e-5)
    torch.testing.assert_close(slope[0], slope[1], rtol=0, atol=1e-4)


def test_bounded_projective_keeps_the_horizon_out():
    grid = ProjectiveGrid(max_perspective=0.44)
    theta = torch.tensor([[1.0, 0, 0, 0, 1, 0, 99, -99]], dtype=torch.float64)
    close(grid(theta, SIZE), grid_of(lambda x, y: homography(x, y, 1, 0, 0, 0, 1, 0, 0.44, -0.44, margin=0), SIZE))


@pytest.mark.parametrize("limit", [0.0, -1.0, math.inf, math.nan])
@pytest.mark.parametrize(
    ("kind", "name"),
    [
        (AffineGrid, "max_change"),
        (AffineGrid, "max_shift"),
        (SimilarityGrid, "max_angle"),
        (SimilarityGrid, "max_log_scale"),
        (SimilarityGrid, "aspect"),
        (AttentionGrid, "max_log_scale"),
        (AttentionGrid, "max_shift"),
        (ProjectiveGrid, "max_perspective"),
        (ProjectiveGrid, "max_change"),
    ],
)
def test_limits_that_leave_nothing_are_refused(kind, name, limit):
    with pytest.raises(ValueError, match=f"{name} must be positive"):
        kind(**{name: limit})


@pytest.mark.parametrize("margin", [0.0, -0.1, 1.0, math.nan])
def test_margins_that_do_not_protect_are_refused(margin):
    with pytest.raises(ValueError, match="margin must be"):
        ProjectiveGrid(margin=margin)

import math

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from detpipe.roi_pooling import FPNLevels, RoIAlign, pool_points
from detpipe.spatial_transformer import cell_centers

STRIDES = {"c3": 8, "c4": 16}


def regular(boxes: torch.Tensor, h: int, w: int, s: int) -> torch.Tensor:
    """The points at which RoIAlign samples boxes ``[N, P, 4]``."""
    grid = (
        cell_centers((h * s, w * s), dtype=boxes.dtype).reshape(h, s, w, s, 2).transpose(1, 2).reshape(h, w, s * s, 2)
    )
    center, half = (boxes[..., :2] + boxes[..., 2:]) / 2, (boxes[..., 2:] - boxes[..., :2]) / 2
    return center[..., None, None, None, :] + grid * half[..., None, None, None, :]


def random_case(seed: int, dtype=torch.float64):
    torch.manual_seed(seed)
    size = torch.randint(1, 14, (2,)).tolist()
    features = {
        "c3": torch.randn(2, 3, *size, dtype=dtype),
        "c4": torch.randn(2, 3, -(-size[0] // 2), -(-size[1] // 2), dtype=dtype),
    }
    low = torch.rand(2, 5, 2, dtype=dtype) * 8 * max(size) * 1.3 - 20
    return features, torch.cat((low, low + 1 + 300 * torch.rand(2, 5, 2, dtype=dtype)), dim=-1)


@pytest.mark.parametrize("seed", range(40))
def test_regular_points_give_roi_align(seed):
    features, boxes = random_case(seed)
    h, w, s = torch.randint(1, 4, (3,)).tolist()
    got = pool_points(features, regular(boxes, h, w, s), boxes, STRIDES)
    want = RoIAlign((h, w), sampling_ratio=s)(features, boxes, STRIDES)
    assert got.shape == want.shape == (2, 5, 3, h, w)
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


def slow(features, points, boxes):
    """From the definition: each point reads the four cells around it."""
    images, count, h, w, samples = points.shape[:5]
    result = torch.zeros(images, count, features["c3"].shape[1], h, w, dtype=points.dtype)
    for n in range(images):
        for p in range(count):
            level = ("c3", "c4")[int(FPNLevels()(boxes[n, p][None], [8, 16]))]
            values, stride = features[level][n], STRIDES[level]
            rows, columns = values.shape[1:]
            for i, j, k in torch.cartesian_prod(*(torch.arange(size) for size in (h, w, samples))).tolist():
                x, y = (points[n, p, i, j, k] / stride - 0.5).tolist()
                if not (-1 <= x <= columns and -1 <= y <= rows):  # which a NaN is not either
                    continue
                x, y = min(max(x, 0), columns - 1), min(max(y, 0), rows - 1)
                for row, column in ((r, c) for r in range(rows) for c in range(columns)):
                    weight = max(0, 1 - abs(y - row)) * max(0, 1 - abs(x - column))
                    result[n, p, :, i, j] += weight * values[:, row, column] / samples
    return result


@pytest.mark.parametrize("seed", range(4))
def test_free_points_equal_a_slow_loop(seed):
    features, boxes = random_case(seed)
    points = torch.randn(2, 5, 2, 3, 2, 2, dtype=torch.float64) * 40 + 40
    points[0, 0, 0, 0, 0] = math.nan
    points[1, 1, 0, 1, 0] = math.inf
    got = pool_points(features, points, boxes, STRIDES)
    torch.testing.assert_close(got, slow(features, points, boxes), rtol=1e-9, atol=1e-9)


def test_gradients_in_features_and_points_of_both_orders():
    torch.manual_seed(0)
    features = torch.randn(2, 2, 5, 6, dtype=torch.float64, requires_grad=True)
    boxes = torch.tensor([[[0.0, 0.0, 40.0, 40.0]], [[8.0, 8.0, 30.0, 40.0]]], dtype=torch.float64)
    points = (torch.rand(2, 1, 2, 2, 2, 2, dtype=torch.float64) * 50 - 4).requires_grad_()

    def pool(values, where):
        return pool_points({"c3": values}, where, boxes, {"c3": 8})

    assert gradcheck(pool, (features, points))
    assert gradgradcheck(pool, (features, points))


def test_points_that_are_not_numbers_leave_finite_gradients():
    features = torch.randn(1, 2, 4, 4, requires_grad=True)
    points = torch.tensor([[math.nan, 3.0], [1e30, 3.0], [10.0, 12.0]]).reshape(1, 1, 1, 1, 3, 2).requires_grad_()
    pool_points({"c3": features}, points, torch.tensor([[[0.0, 0, 9, 9]]]), {"c3": 8}).sum().backward()
    assert features.grad.isfinite().all()
    assert features.grad.abs().sum() > 0
    assert points.grad[..., 2, :].abs().sum() > 0
    assert points.grad[..., 2, :].isfinite().all()
    assert (points.grad[..., 1, :] == 0).all()


def test_half_precision_keeps_its_type_and_float32_coordinates():
    features = {"c3": torch.randn(1, 4, 100, 200, dtype=torch.bfloat16)}
    boxes = torch.tensor([[[1500.0, 700.0, 1590.0, 790.0]]])
    got = pool_points(features, regular(boxes, 3, 3, 2), boxes, {"c3": 8})
    want = pool_points({"c3": features["c3"].float()}, regular(boxes, 3, 3, 2), boxes, {"c3": 8})
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got.float(), want, rtol=1e-2, atol=1e-2)


def test_no_regions_give_an_empty_result_with_a_gradient():
    features = torch.randn(2, 3, 4, 4, requires_grad=True)
    pooled = pool_points({"c3": features}, torch.zeros(2, 0, 3, 3, 4, 2), torch.zeros(2, 0, 4), {"c3": 8})
    assert pooled.shape == (2, 0, 3, 3, 3)
    pooled.sum().backward()
    assert (features.grad == 0).all()


@pytest.mark.parametrize("shape", [(1, 1, 3, 3, 2), (1, 2, 3, 3, 4, 2), (1, 1, 3, 3, 4, 3), (1, 1, 3, 3, 0, 2)])
def test_points_of_another_shape_are_refused(shape):
    with pytest.raises(ValueError, match=r"points must be \[N, P, h, w, S, 2\]"):
        pool_points({"c3": torch.zeros(1, 1, 4, 4)}, torch.zeros(shape), torch.tensor([[[0.0, 0, 8, 8]]]), {"c3": 8})
    with pytest.raises(ValueError, match=r"points must be .* got \[1, 1, 3, 3, 4, 2\] and list"):
        pool_points({"c3": torch.zeros(1, 1, 4, 4)}, torch.zeros(1, 1, 3, 3, 4, 2), [torch.zeros(1, 4)], {"c3": 8})


def test_the_gradient_to_points_on_cells_is_the_slope_to_the_right():
    torch.manual_seed(0)
    features = {"c3": torch.randn(1, 2, 5, 6, dtype=torch.float64)}
    boxes = torch.tensor([[[0.0, 0, 9, 9]]], dtype=torch.float64)
    y, x = torch.meshgrid(torch.arange(-2, 7), torch.arange(-2, 8), indexing="ij")
    points = ((torch.stack((x, y), dim=-1).double() + 0.5) * 8).reshape(1, 1, 9, 10, 1, 2).requires_grad_()

    def pool(points):
        return pool_points(features, points, boxes, {"c3": 8}).sum(2).flatten()

    pool(points).sum().backward()
    for axis, (along, extent) in enumerate(((x, 6), (y, 5))):
        step = torch.zeros(2, dtype=torch.float64)
        step[axis] = 1e-4
        slope = ((pool(points.detach() + step) - pool(points.detach())) / 1e-4).view(9, 10)
        inside = (along > -1) & (along < extent) & (x >= -1) & (x <= 6) & (y >= -1) & (y <= 5)  # steps over no border
        torch.testing.assert_close(points.grad[0, 0, :, :, 0, axis][inside], slope[inside], rtol=1e-6, atol=1e-6)

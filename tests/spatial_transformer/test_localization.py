import pytest
import torch
from torch import nn

from detpipe.spatial_transformer import AffineGrid, ConvLocalization, PooledLocalization, ThetaLayer
from tests.spatial_transformer.definitions import GRIDS

KINDS = {
    "convolutions": lambda grid: ConvLocalization(3, grid, widths=(4, 6), cells=2, hidden=8),
    "mean": lambda grid: PooledLocalization(3, grid, hidden=8),
    "means of cells": lambda grid: PooledLocalization(3, grid, cells=3, hidden=8),
    "own": lambda grid: nn.Sequential(nn.AdaptiveMaxPool2d(1), nn.Flatten(), ThetaLayer(3, grid)),
}
all_kinds = pytest.mark.parametrize("make", KINDS.values(), ids=KINDS)


@all_kinds
@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)
def test_starts_at_the_identity_of_its_grid(make, grid):
    theta = make(grid)(torch.randn(4, 3, 9, 14))
    assert torch.equal(theta, grid.identity().expand(4, -1))


@all_kinds
@pytest.mark.parametrize("size", [(1, 1), (1, 9), (7, 7), (33, 20)])
def test_takes_maps_of_any_size_and_no_images_at_all(make, size):
    localization = make(AffineGrid())
    assert localization(torch.randn(2, 3, *size)).shape == (2, 6)
    empty = localization(torch.randn(0, 3, *size))
    assert empty.shape == (0, 6)
    empty.sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in localization.parameters())


@all_kinds
def test_learns_from_the_second_step_on_in_every_layer(make):
    localization, features = make(AffineGrid()), torch.randn(8, 3, 9, 14)
    optimizer = torch.optim.SGD(localization.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        (localization(features) - torch.randn(8, 6)).square().mean().backward()
        optimizer.step()
    assert all((parameter.grad != 0).any() for parameter in localization.parameters())


@all_kinds
def test_the_last_layer_computes_in_float32_under_autocast(make):
    localization, features = make(AffineGrid()), torch.randn(2, 3, 9, 14)
    with torch.no_grad():
        for parameter in localization.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    expected = localization(features)
    with torch.autocast("cpu", torch.bfloat16):
        theta = localization(features)
    assert theta.dtype == torch.float32
    torch.testing.assert_close(theta, expected, rtol=0.05, atol=0.05)
    assert localization.bfloat16()(features.bfloat16()).dtype == torch.float32
    assert localization.double()(features.double()).dtype == torch.float64


def test_pooled_localization_is_the_formula():
    localization, features = (
        PooledLocalization(2, AffineGrid(), cells=2, hidden=5).double(),
        torch.randn(1, 2, 4, 6).double(),
    )
    nn.init.normal_(localization.theta.weight)
    means = [features[0, c, y : y + 2, x : x + 3].mean() for c in range(2) for y in (0, 2) for x in (0, 3)]
    hidden = (localization.hidden.weight @ torch.stack(means) + localization.hidden.bias).clamp(min=0)
    expected = localization.theta.weight @ hidden + localization.theta.bias
    torch.testing.assert_close(localization(features)[0], expected)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ConvLocalization(0, AffineGrid()), "channels=0"),
        (lambda: ConvLocalization(3, AffineGrid(), widths=()), r"widths=\[\]"),
        (lambda: ConvLocalization(3, AffineGrid(), widths=(4, 0)), r"widths=\[4, 0\]"),
        (lambda: ConvLocalization(3, AffineGrid(), kernel_size=4), "kernel_size must be odd, got 4"),
        (lambda: PooledLocalization(3, AffineGrid(), cells=0), "cells=0"),
        (lambda: PooledLocalization(3, AffineGrid(), hidden=0), "hidden=0"),
    ],
)
def test_other_numbers_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()

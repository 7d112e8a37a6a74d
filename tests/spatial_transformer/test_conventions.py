"""The convention of the package, on maps small enough to be worked by hand."""

import math

import pytest
import torch

from detpipe.spatial_transformer import (
    AffineGrid,
    AttentionGrid,
    ProjectiveGrid,
    Sampler,
    SimilarityGrid,
    ThinPlateSplineGrid,
)

MAP = torch.tensor([[[[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]]])  # [1, 1, 2, 3]


def seen(grid, theta, size, features=MAP, **settings):
    return Sampler(**settings)(features, grid(torch.tensor([theta], dtype=features.dtype), size))


@pytest.mark.parametrize("mode", ["bilinear", "bicubic", "nearest"])
def test_a_quarter_turn_of_a_map_that_is_not_square(mode):
    """x' = -y, y' = x: what is looked at turns clockwise, the content counter-clockwise."""
    expected = torch.tensor([[[[3.0, 6.0], [2.0, 5.0], [1.0, 4.0]]]])
    torch.testing.assert_close(seen(AffineGrid(), [0, -1, 0, 1, 0, 0], (3, 2), mode=mode), expected)
    torch.testing.assert_close(seen(SimilarityGrid(), [math.pi / 2, 0, 0, 0], (3, 2), mode=mode), expected)
    projective = seen(ProjectiveGrid(), [0, -1, 0, 1, 0, 0, 0, 0], (3, 2), mode=mode)
    torch.testing.assert_close(projective, expected)
    # (-1, -1) -> (1, -1), (1, -1) -> (1, 1), (-1, 1) -> (-1, -1), (1, 1) -> (-1, 1)
    corners = [2, 0, 0, 2, 0, -2, -2, 0]
    torch.testing.assert_close(seen(ThinPlateSplineGrid(2), corners, (3, 2), mode=mode), expected)
    assert torch.equal(expected, MAP.rot90(1, (2, 3)))


def test_a_quarter_turn_as_seen_keeps_the_size_and_fills_up_with_zeros():
    """Of 2 x 4 cells, the middle 2 x 2 turn, and what is beside them comes from above and below the map."""
    features = torch.arange(1.0, 9).view(1, 1, 2, 4)  # 1 2 3 4 / 5 6 7 8
    result = seen(SimilarityGrid(aspect=2.0), [math.pi / 2, 0, 0, 0], (2, 4), features, mode="nearest")
    assert result.tolist() == [[[[0, 3, 7, 0], [0, 2, 6, 0]]]]


@pytest.mark.parametrize(
    ("padding", "expected"), [("zeros", [[2, 3, 0], [5, 6, 0]]), ("border", [[2, 3, 3], [5, 6, 6]])]
)
def test_a_shift_by_a_whole_cell_to_the_right_moves_the_content_to_the_left(padding, expected):
    for grid, theta in (
        (AffineGrid(), [1, 0, 2 / 3, 0, 1, 0]),
        (SimilarityGrid(), [0, 0, 2 / 3, 0]),
        (AttentionGrid(), [0, 2 / 3, 0]),
        (ProjectiveGrid(), [1, 0, 2 / 3, 0, 1, 0, 0, 0]),
        (ThinPlateSplineGrid(2), [2 / 3, 0] * 4),
    ):
        result = seen(grid, theta, (2, 3), padding=padding)
        torch.testing.assert_close(result, torch.tensor([[expected]]).float(), rtol=0, atol=1e-5)


def test_a_zoom_by_two_shows_the_middle_half():
    features = torch.arange(16.0).view(1, 1, 4, 4)
    for grid, theta in ((AffineGrid(), [0.5, 0, 0, 0, 0.5, 0]), (AttentionGrid(), [math.log(0.5), 0, 0])):
        torch.testing.assert_close(seen(grid, theta, (2, 2), features), features[:, :, 1:3, 1:3])
        # twice as many cells for the same place: between the centers 5, 6, 9, 10 in quarters
        quarters = torch.tensor([-0.25, 0.25, 0.75, 1.25])
        expected = 5 + quarters + 4 * quarters[:, None]
        torch.testing.assert_close(seen(grid, theta, (4, 4), features)[0, 0], expected)


def test_minus_one_and_one_are_the_edges_of_the_first_and_the_last_cell():
    """With zeros outside, half of the cell is left at its edge, and a quarter at its corner."""
    points = torch.tensor([[[[-1.0, 0.5], [1.0, 0.5], [-2 / 3, -0.5], [-1.0, -1.0], [-2 / 3, -1.0]]]])
    expected = [4 / 2, 6 / 2, 1, 1 / 4, 1 / 2]
    torch.testing.assert_close(Sampler()(MAP, points)[0, 0, 0], torch.tensor(expected))
    torch.testing.assert_close(Sampler(padding="border")(MAP, points)[0, 0, 0], torch.tensor([4.0, 6, 1, 1, 1]))

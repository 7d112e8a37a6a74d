from __future__ import annotations

import numpy as np
import pytest
import torch

from detpipe.datasets.classification import Views, center_square


def gradient(height: int, width: int) -> torch.Tensor:
    """Red tells the column, green the row, both from 0 to 250."""
    y, x = torch.meshgrid(torch.linspace(0, 250, height), torch.linspace(0, 250, width), indexing="ij")
    return torch.stack([x, y, torch.zeros_like(x)]).round().to(torch.uint8)


def test_evaluation_shows_the_center() -> None:
    view = Views(size=50, center=0.5).evaluation(gradient(100, 200))
    assert (view.shape, view.dtype) == ((3, 50, 50), torch.uint8)
    x, y = view[0].float(), view[1].float()
    # the shorter side of 100 becomes 100, its center 50: columns 75 to 125 of 200, rows 25 to 75 of 100
    assert x[0, 0].item() == pytest.approx(75.5 / 200 * 250, abs=2)
    assert x[0, -1].item() == pytest.approx(124.5 / 200 * 250, abs=2)
    assert y[0, 0].item() == pytest.approx(25.5 / 100 * 250, abs=2)
    assert y[-1, 0].item() == pytest.approx(74.5 / 100 * 250, abs=2)
    assert torch.equal(view, Views(size=50, center=0.5).evaluation(gradient(100, 200)))


@pytest.mark.parametrize("shape", [(1, 1), (1, 30000), (30000, 1), (3, 5), (500, 333)])
def test_images_of_any_size_become_squares(shape: tuple[int, int]) -> None:
    views, image = Views(size=32, color=0.4), gradient(*shape)
    for view in (views.evaluation(image), views.training(image, (0, 0, 0))):
        assert (view.shape, view.dtype) == ((3, 32, 32), torch.uint8)


def test_training_crops_cover_the_area_that_is_asked_for() -> None:
    views, image, areas = Views(size=32, scale=(0.2, 0.5), flip=0.0), gradient(200, 200), []
    for seed in range(60):
        view = views.training(image, seed).float() / 250
        areas.append(((view[0].max() - view[0].min()) * (view[1].max() - view[1].min())).item())
    assert 0.15 < min(areas) < 0.28
    assert 0.4 < max(areas) < 0.52


def test_flips_are_as_frequent_as_asked_and_independent_of_the_crop() -> None:
    image = gradient(64, 64)
    drawn = []
    for seed in range(200):
        x = Views(size=16, scale=(0.5, 0.5), ratio=(1.0, 1.0)).training(image, seed)[0].float()
        drawn.append((bool(x[0, 0] > x[0, -1]), x.mean().item()))
    flipped = np.array([flip for flip, _ in drawn])
    place = np.array([mean for _, mean in drawn])
    assert 0.38 < flipped.mean() < 0.62
    assert abs(place[flipped].mean() - place[~flipped].mean()) < 10
    for p in (0.0, 1.0):
        views = [Views(size=16, flip=p).training(image, seed)[0].float() for seed in range(20)]
        assert all(bool(x[0, 0] > x[0, -1]) == (p == 1) for x in views)


def test_color_is_changed_only_where_asked() -> None:
    grey = torch.full((3, 20, 20), 100, dtype=torch.uint8)
    assert {int(Views(size=16).training(grey, seed).float().mean()) for seed in range(10)} == {100}
    assert len({int(Views(size=16, color=0.5).training(grey, seed).float().mean()) for seed in range(10)}) > 4


def test_a_seed_gives_one_view_whatever_was_drawn_before() -> None:
    views, image = Views(size=16, color=0.3), gradient(50, 70)
    first = views.training(image, (1, 2, 3))
    views.training(image, (1, 2, 4))
    assert torch.equal(views.training(image, (1, 2, 3)), first)
    assert not torch.equal(views.training(image, (1, 3, 3)), first)


def test_large_images_are_averaged_not_sampled() -> None:
    board = (torch.arange(256)[:, None] + torch.arange(256)) % 2 * 255  # sampling it gives black or white
    image = board.to(torch.uint8).expand(3, 256, 256)
    view = Views(size=64, center=1.0).evaluation(image).float()
    assert view.mean().item() == pytest.approx(127.5, abs=2)
    assert view.std().item() < 5


def test_center_square() -> None:
    image = torch.arange(3 * 4 * 7).view(3, 4, 7)
    assert torch.equal(center_square(image), image[:, :, 1:5])
    assert torch.equal(center_square(image.transpose(1, 2)), image.transpose(1, 2)[:, 1:5])

from __future__ import annotations

import pytest
import runs
import torch
from torch import Tensor

from detpipe.demo.scenes import load_stock
from detpipe.spatial_transformer import ProjectiveGrid
from stn_digits import digits
from stn_digits.digits import DISTORTIONS, SIDES, DistortedDigits, Distortion, distort


def dot(x: int, y: int, side: int = 2) -> Tensor:
    """A digit that is one square of ink, its upper left corner at (x, y) of 32 x 32."""
    digit = torch.zeros(1, 1, 32, 32)
    digit[..., y : y + side, x : x + side] = 1
    return digit


def center(images: Tensor) -> Tensor:
    """Center of the ink of each image, (x, y) in pixels from the middle of the image, ``[N, 2]``."""
    side = images.shape[3]
    places = torch.arange(side) + 0.5 - side / 2
    weights = images[:, 0] / images[:, 0].sum(dim=(1, 2), keepdim=True)
    return torch.stack([weights.sum(dim=1) @ places, weights.sum(dim=2) @ places], dim=1)


def random(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("distortion", runs.mostly_slow(DISTORTIONS, "RTS"))
def test_an_epoch_is_a_function_of_seed_and_epoch(distortion: Distortion) -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    images, labels = DistortedDigits(distortion, seed=3).train_epoch(2)
    assert torch.equal(torch.get_rng_state(), before)
    assert images.shape == (1438, 1, SIDES[distortion], SIDES[distortion])
    assert images.dtype == torch.float32
    assert 0 <= images.min() < images.max() <= 1
    assert labels.bincount(minlength=10).min() > 100
    torch.manual_seed(6)
    again, same = DistortedDigits(distortion, seed=3, batch_size=7, test_views=2).train_epoch(2)
    assert torch.equal(again, images)
    assert torch.equal(same, labels)
    for other in (DistortedDigits(distortion, seed=3).train_epoch(1), DistortedDigits(distortion).train_epoch(2)):
        assert not torch.equal(other[1], labels)
        assert not torch.equal(other[0].sum(dim=(1, 2, 3)).sort().values, images.sum(dim=(1, 2, 3)).sort().values)


def test_the_test_set_stays_and_its_digits_are_never_trained_on() -> None:
    images, labels = DistortedDigits("R", test_views=2, seed=0).test_set()
    again, _ = DistortedDigits("R", test_views=2, seed=9).test_set()
    assert images.shape == (2 * 359, 1, 28, 28)
    assert torch.equal(images, again)
    assert torch.equal(labels[:359], labels[359:])
    assert not torch.equal(images[:359], images[359:])  # other views of the same digits
    stock = load_stock(0)
    assert not set(stock["train"].samples) & set(stock["val"].samples)
    assert labels[:359].tolist() == stock["val"].labels.tolist()
    other, _ = DistortedDigits("R", test_views=2, split=1).test_set()
    assert not torch.equal(other, images)


def test_batches_are_the_epoch_that_was_chosen() -> None:
    data = DistortedDigits("E", batch_size=100)
    loader = data.train_dataloader()
    loader.sampler.set_epoch(4)  # as Lightning does
    batches = list(loader)
    assert len(batches) == len(loader) == 15
    assert [len(labels) for _, labels in batches] == [100] * 14 + [38]
    images, labels = data.train_epoch(4)
    assert torch.equal(torch.cat([batch[0] for batch in batches]), images)
    assert torch.equal(torch.cat([batch[1] for batch in batches]), labels)
    held_out = data.test_dataloader()
    assert len(list(held_out)) == len(held_out) == 18
    assert torch.equal(torch.cat([batch[0] for batch in held_out]), data.test_set()[0])


def test_r_turns_by_up_to_a_right_angle() -> None:
    found = center(distort(dot(22, 15).repeat(2000, 1, 1, 1), "R", random()))  # 7 to the right of the middle
    assert (found.norm(dim=1) - 7).abs().max() < 0.2
    angles = torch.atan2(found[:, 1], found[:, 0]).rad2deg()
    assert -91 < angles.min() < -85
    assert 85 < angles.max() < 91
    assert angles.mean().abs() < 4


def test_rts_turns_scales_and_shifts_inside_of_the_image() -> None:
    images = distort(dot(12, 12, side=8).repeat(2000, 1, 1, 1), "RTS", random())
    shifts = center(images)
    assert (shifts.amax(dim=0) > 6.7).all()
    assert (shifts.abs().amax(dim=0) < 7.1).all()
    areas = images.sum(dim=(1, 2, 3)) / 64  # of the ink, in its own
    assert 0.7**2 - 0.05 < areas.min() < 0.7**2 + 0.05
    assert 1.2**2 - 0.05 < areas.max() < 1.2**2 + 0.05
    images, _ = DistortedDigits("RTS").train_epoch(0)
    edges = torch.cat([images[..., 0, :], images[..., -1, :], images[..., 0], images[..., -1]], dim=2)
    assert (edges.amax(dim=(1, 2)) > 0.5).float().mean() < 0.01  # hardly a digit is cut


def test_p_reads_the_corners_of_the_upright_digit_where_they_were_moved() -> None:
    theta = digits._askew(500, random())
    assert theta.isfinite().all()
    draws = random()
    scale = 0.75 + 0.25 * torch.rand(500, 1, 1, generator=draws)
    moved = (5 * torch.randn(500, 4, 2, generator=draws)).clamp(-7, 7) / 14
    square = torch.tensor([[-1.0, -1.0], [1.0, -1.0], [1.0, 1.0], [-1.0, 1.0]])
    corners = scale * square + moved
    read = torch.cat(
        [ProjectiveGrid(margin=1e-4).warp(one[None], four) for one, four in zip(theta, corners, strict=True)]
    )
    ahead = 1 + (theta[:, None, 6:] * corners).sum(dim=2) > 0.01  # a corner behind the horizon is read elsewhere
    assert ahead.float().mean() > 0.97
    torch.testing.assert_close(read[ahead], (square * 28 / 32).expand_as(read)[ahead], atol=2e-3, rtol=0)


def test_e_bends_and_does_no_more() -> None:
    found = center(distort(dot(15, 15).repeat(2000, 1, 1, 1), "E", random()))
    assert 2.5 < found.abs().max() < 4.5  # points move by up to 3.5, and the ink is stretched
    assert found.mean(dim=0).abs().max() < 0.1


def test_clutter_adds_pieces_of_digits_to_a_whole_one() -> None:
    stock = torch.cat([dot(x, y) for x in (6, 12, 18) for y in (6, 12, 18)]).repeat(50, 1, 1, 1)
    images = distort(stock, "clutter", random())
    ink = images.sum(dim=(1, 2, 3))
    assert ink.min() > 3.9  # the digit's own
    assert (ink > 6).float().mean() > 0.5
    alone = distort(torch.zeros(4, 1, 32, 32), "clutter", random())
    assert alone.sum() == 0


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"distortion": "X"}, "distortion must be one of R, RTS, P, E, clutter, got 'X'"),
        ({"batch_size": 0}, "batch_size and test_views of at least 1.*batch_size=0"),
        ({"test_views": 0}, "test_views=0"),
        ({"seed": -1}, "seed=-1"),
        ({"split": -1}, "split=-1"),
    ],
)
def test_bad_arguments(given: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DistortedDigits(**given)  # type: ignore[arg-type]

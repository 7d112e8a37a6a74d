"""Digits that are rotated, shifted, scaled, seen askew, bent, or lost in clutter: what spatial transformers are shown on.

Jaderberg et al., "Spatial Transformer Networks", 2015, arXiv 1506.02025, section 4.1: R is a rotation by up to 90 degrees to
either side; RTS one by up to 45, a scale of .7 to 1.2 and a random place; P a projective and E an elastic distortion; clutter
is a digit at a random place among pieces of others. A digit is some 21 pixels high in images of 28 x 28 pixels (R, P, E), 42 x 42
(RTS) and 48 x 48 (clutter).

Deviations:
1. The digits are the 1,797 that come with scikit-learn, 8 x 8 cells that are smoothed, instead of MNIST's 70,000: four
   fifths to train on, distorted anew in each epoch, and the rest to test on, each distorted ``test_views`` times.
2. How strong the paper's P and E are was not found. Here P shrinks a digit to .75 to 1 and moves each corner by a normal
   distribution of 5 pixels along each axis, at most 7, so that hardly a digit is turned inside out; in E a thin-plate spline moves
   4 x 4 points by up to 3.5 pixels along each axis.
3. clutter: 48 x 48 pixels instead of 60 x 60, since a plain network's time grows with the area, and 10 pieces of 6 x 6; where
   ink meets ink, the stronger counts.

N digits, S pixels a side of the image. The grids are those of :mod:`detpipe.spatial_transformer`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import cache
from typing import Literal, get_args

import numpy as np
import torch
from lightning import LightningDataModule
from torch import Generator, Tensor

from detpipe.demo.scenes import load_stock
from detpipe.spatial_transformer import AffineGrid, ProjectiveGrid, Sampler, ThinPlateSplineGrid

Distortion = Literal["R", "RTS", "P", "E", "clutter"]
DISTORTIONS: tuple[Distortion, ...] = get_args(Distortion)
SIDES: dict[Distortion, int] = {"R": 28, "RTS": 42, "P": 28, "E": 28, "clutter": 48}  # S, pixels
CLASSES = 10

_SOURCE = 32  # pixels a side of an undistorted digit, at the scale of the images; its ink is within the middle 21
_UPRIGHT = 28  # pixels around an undistorted digit: the image in which a distortion takes place
_ANGLES = {"R": 90.0, "RTS": 45.0}  # degrees
_SCALES = {"RTS": (0.7, 1.2), "P": (0.75, 1.0)}
_CORNER_DEVIATION, _CORNER_LIMIT = 5.0, 7.0  # pixels
_BEND = 3.5  # pixels
_PIECES, _PIECE_SIDE = 10, 6
_TRAIN, _TEST = 0, 1  # of the seeds


class DistortedDigits(LightningDataModule):
    """Distorted digits in batches; an image is a function of the seed, the epoch and the distortion alone.

    Args:
        distortion: "R", "RTS", "P", "E" or "clutter".
        batch_size: images a batch; the last one of an epoch may be smaller.
        test_views: how often each digit that is kept for the test is distorted.
        seed: of the order and the distortions in training.
        split: decides which digits are kept for the test, and how these are distorted.

    Raises:
        ValueError: an unknown distortion, or a number below its least.

    Example:
        >>> images, labels = next(iter(DistortedDigits("R", batch_size=4).train_dataloader()))
        >>> images.shape, labels.shape
        (torch.Size([4, 1, 28, 28]), torch.Size([4]))
    """

    def __init__(
        self, distortion: Distortion = "RTS", batch_size: int = 64, test_views: int = 5, seed: int = 0, split: int = 0
    ) -> None:
        super().__init__()
        if distortion not in DISTORTIONS:
            raise ValueError(f"distortion must be one of {', '.join(DISTORTIONS)}, got {distortion!r}")
        if batch_size < 1 or test_views < 1 or min(seed, split) < 0:
            raise ValueError(
                "expected batch_size and test_views of at least 1, seed and split of at least 0, "
                f"got {batch_size=}, {test_views=}, {seed=}, {split=}"
            )
        self.distortion: Distortion = distortion
        self.batch_size, self.test_views, self.seed, self.split = batch_size, test_views, seed, split

    def train_epoch(self, epoch: int) -> tuple[Tensor, Tensor]:
        """Distort all digits of the training split, in random order.

        Args:
            epoch: from 0.

        Returns:
            Images ``[N, 1, S, S]`` float32 in 0..1, ink is 1, and labels ``[N]`` int64 in 0..9.
        """
        digits, labels = _digits("train", self.split)
        random = _random(_TRAIN, self.split, self.seed, epoch)
        order = torch.randperm(len(digits), generator=random)
        return distort(digits[order], self.distortion, random), labels[order]

    def test_set(self) -> tuple[Tensor, Tensor]:
        """Distort the digits that are kept for the test; the same whatever ``seed`` is.

        Returns:
            As :meth:`train_epoch`: all digits once, then all again, ``test_views`` times.
        """
        digits, labels = _digits("val", self.split)
        images = distort(digits.repeat(self.test_views, 1, 1, 1), self.distortion, _random(_TEST, self.split))
        return images, labels.repeat(self.test_views)

    def train_dataloader(self) -> TrainingBatches:
        """Make the batches of training."""
        return TrainingBatches(self.train_epoch, len(_digits("train", self.split)[0]), self.batch_size)

    def test_dataloader(self) -> Batches:
        """Make the batches of the test."""
        count = self.test_views * len(_digits("val", self.split)[0])
        return Batches(lambda _: self.test_set(), count, self.batch_size)


class Batches:
    """The batches of an epoch, distorted when they are asked for.

    Args:
        make: epoch -> images ``[N, 1, S, S]`` and labels ``[N]``.
        images: N.
        size: of a batch.
    """

    def __init__(self, make: Callable[[int], tuple[Tensor, Tensor]], images: int, size: int) -> None:
        self.make, self.images, self.size, self.epoch = make, images, size, 0

    def __len__(self) -> int:
        return math.ceil(self.images / self.size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        images, labels = self.make(self.epoch)
        return zip(images.split(self.size), labels.split(self.size), strict=True)


class TrainingBatches(Batches):
    """Batches whose epoch Lightning chooses, through what it takes for their sampler."""

    @property
    def sampler(self) -> TrainingBatches:
        """Itself."""
        return self

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch of the next iteration."""
        self.epoch = epoch


def distort(digits: Tensor, distortion: Distortion, random: Generator) -> Tensor:
    """Distort each of the digits ``[N, 1, 32, 32]`` float32 in 0..1, ink is 1, in a way of its own; pieces of them are the clutter.

    Returns:
        ``[N, 1, S, S]`` in 0..1.
    """
    side = SIDES[distortion]
    if distortion == "P":
        grid = ProjectiveGrid()(_askew(len(digits), random), (side, side))
    elif distortion == "E":
        spline = ThinPlateSplineGrid(points=4)
        offsets = _uniform((len(digits), spline.parameters_count), _BEND / (_UPRIGHT / 2), random)
        grid = spline(offsets, (side, side)) * (_UPRIGHT / _SOURCE)
    else:
        grid = AffineGrid()(_placed(len(digits), distortion, random), (side, side))
    images = Sampler()(digits, grid)
    return _cluttered(images, digits, random) if distortion == "clutter" else images


def _placed(count: int, distortion: Distortion, random: Generator) -> Tensor:
    """Rotations, scales and shifts as affine parameters ``[N, 6]``: where in the digit each pixel of the image is read."""
    side = SIDES[distortion]
    angle = _uniform((count,), math.radians(_ANGLES.get(distortion, 0.0)), random)
    low, high = _SCALES.get(distortion, (1.0, 1.0))
    step = side / (_SOURCE * (low + (high - low) * torch.rand(count, generator=random)))
    x, y = _uniform((2, count), 1 - _UPRIGHT / side, random)  # so far that all of an upright digit stays inside
    cos, sin = step * angle.cos(), step * angle.sin()
    return torch.stack([cos, sin, -cos * x - sin * y, -sin, cos, sin * x - cos * y], dim=1)


def _askew(count: int, random: Generator) -> Tensor:
    """Homographies ``[N, 8]`` that read, at four corners which were moved, the corners of the upright digit."""
    low, high = _SCALES["P"]
    square = torch.tensor([[-1.0, -1.0], [1.0, -1.0], [1.0, 1.0], [-1.0, 1.0]])
    scale = low + (high - low) * torch.rand(count, 1, 1, generator=random)
    moved = _CORNER_DEVIATION * torch.randn(count, 4, 2, generator=random)
    corners = scale * square + moved.clamp(-_CORNER_LIMIT, _CORNER_LIMIT) / (_UPRIGHT / 2)
    x, y = corners.double().unbind(dim=2)  # [N, 4]
    u, v = (square * (_UPRIGHT / _SOURCE)).double().expand(count, 4, 2).unbind(dim=2)
    one, zero = torch.ones_like(x), torch.zeros_like(x)
    # u (h31 x + h32 y + 1) = h11 x + h12 y + h13, and so for v: two equations a corner
    first = torch.stack([x, y, one, zero, zero, zero, -u * x, -u * y], dim=2)
    second = torch.stack([zero, zero, zero, x, y, one, -v * x, -v * y], dim=2)
    return torch.linalg.solve(torch.cat([first, second], dim=1), torch.cat([u, v], dim=1)).float()


def _cluttered(images: Tensor, digits: Tensor, random: Generator) -> Tensor:
    """Lay pieces of digits over images ``[N, 1, S, S]``."""
    count, side, shape = len(images), images.shape[3], (len(images), _PIECES, 1, 1)
    margin = (_SOURCE - 21) // 2
    donor = torch.randint(count, shape, generator=random)
    from_y, from_x = torch.randint(margin, _SOURCE - margin - _PIECE_SIDE, (2, *shape), generator=random)
    to_y, to_x = torch.randint(side - _PIECE_SIDE + 1, (2, *shape), generator=random)
    column, row = torch.arange(_PIECE_SIDE), torch.arange(_PIECE_SIDE)[:, None]
    pieces = digits[donor, 0, from_y + row, from_x + column]  # [N, pieces, 6, 6]
    places = (to_y + row) * side + to_x + column
    flat = images.flatten(1).scatter_reduce(1, places.flatten(1), pieces.flatten(1), "amax")
    return flat.view_as(images)


def _uniform(shape: tuple[int, ...], limit: float, random: Generator) -> Tensor:
    return limit * (2 * torch.rand(shape, generator=random) - 1)


def _random(*seeds: int) -> Generator:
    """A stream of random numbers of its own for each list of seeds."""
    [state] = np.random.SeedSequence(seeds).generate_state(1, np.uint64)
    return Generator().manual_seed(int(state >> 1))


@cache
def _digits(part: Literal["train", "val"], split: int) -> tuple[Tensor, Tensor]:
    """Upright digits ``[N, 1, 32, 32]`` and labels ``[N]``; read only."""
    stock = load_stock(split)[part]
    ink = torch.from_numpy(np.stack(stock.ink))[:, None]
    return torch.nn.functional.avg_pool2d(ink, ink.shape[3] // _SOURCE), torch.from_numpy(stock.labels)

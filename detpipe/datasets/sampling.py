"""How often each image comes in an epoch of training: more often where its classes are rare.

Repeat factors: Gupta, Dollar and Girshick, "LVIS", 2019, arXiv 1908.03195: a class that is in a fraction f of the images is wanted
max(1, sqrt(t / f)) times, and an image as often as the class of it that is wanted most. Classes in turns: Shen, Lin and Huang,
"Relay Backpropagation for Effective Learning of Deep Convolutional Neural Networks", 2015, arXiv 1512.05830 (class-aware sampling).

Deviations:
1. The fractions of repeat factors are rounded together (systematic sampling: Madow, 1949, DOI 10.1214/aoms/1177729988) instead of
   each by itself: an image still comes as often as its factor says on average, but each epoch has the same length, the sum of the
   factors, rounded up; what is left over is an image drawn from all.
2. Where classes take turns, every turn has each class once, in a new order, and every class goes through all of its images before
   one comes again; batches are cut from the turns in order, so that each is balanced.

Letters: I images, M pairs of an image and a class in it, K classes, L images of an epoch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from detpipe.support.errors import DataError
from detpipe.support.numbers import check_numbers
from detpipe.support.terminal import printable
from detpipe.types import Annotations

Indices = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Presence:
    """Which classes are in which images."""

    images: int  # I, how many there are
    rows: Indices  # ``[M]`` the image of each pair of an image and a class in it, no pair twice
    classes: Indices  # ``[M]`` the class, from 0
    names: tuple[str, ...]  # K names of classes

    @staticmethod
    def of(annotations: Annotations) -> Presence:
        """What is trained on: boxes that are neither crowd regions nor difficult."""
        a = annotations
        pairs = np.column_stack([a.box_image, a.labels - 1])[~(a.iscrowd | a.difficult)]
        pairs = np.unique(pairs.astype(np.int64), axis=0)
        return Presence(len(a), pairs[:, 0], pairs[:, 1], a.class_names)

    @property
    def counts(self) -> Indices:
        """``[K]`` the number of images that each class is in."""
        return np.bincount(self.classes, minlength=len(self.names))


def describe_sampling(sampling: Sampling | None, presence: Callable[[Any], Presence]) -> str:
    """One line to be said before training, and its end; empty where each image comes once an epoch."""
    return "" if sampling is None else f"{printable(sampling.describe(presence('train')))}\n"


@dataclass(frozen=True)
class Plan:
    """What an epoch consists of."""

    presence: Presence  # of the images
    # ``[I]`` how often each image comes, on average; None where classes take turns
    factors: npt.NDArray[np.float64] | None
    length: int  # L

    def draw(self, random: np.random.Generator) -> Indices:
        """``[L]`` indices of the images of an epoch, in the order in which they come."""
        return self._in_turns(random) if self.factors is None else self._repeated(self.factors, random)

    def _repeated(self, factors: npt.NDArray[np.float64], random: np.random.Generator) -> Indices:
        whole = np.floor(factors).astype(np.int64)
        order = random.permutation(len(factors))  # or neighbors would be chosen together
        ends = np.cumsum((factors - whole)[order])
        marks = np.floor(ends + random.random()).astype(np.int64)
        whole[order] += np.diff(marks, prepend=0)
        drawn = np.repeat(np.arange(len(factors)), whole)
        missing = self.length - len(drawn)  # 0 or 1, in floating point perhaps -1
        drawn = random.permutation(np.concatenate([drawn, random.integers(0, len(factors), max(0, missing))]))
        return drawn[: self.length]

    def _in_turns(self, random: np.random.Generator) -> Indices:
        present = np.flatnonzero(self.presence.counts)
        turns = -(-self.length // len(present))
        order = np.concatenate([random.permutation(present) for _ in range(turns)])[: self.length]
        drawn = np.empty(self.length, dtype=np.int64)
        rows = np.split(
            self.presence.rows[np.argsort(self.presence.classes, kind="stable")], np.cumsum(self.presence.counts)
        )
        for label in present.tolist():
            places = np.flatnonzero(order == label)
            rounds = -(-len(places) // len(rows[label]))
            drawn[places] = np.concatenate([random.permutation(rows[label]) for _ in range(rounds)])[: len(places)]
        return drawn


@dataclass(frozen=True)
class Sampling:
    """How often images of rare classes are trained on; one of both.

    Args:
        repeat_factor: t: images of classes that are in a smaller fraction of the images come more often, an image of a class in a
            fraction f sqrt(t / f) times; 0.001 for LVIS. Every image comes at least once.
        class_balanced: classes take turns, each as often as any other; an epoch has as many images as the data. Images without
            objects never come.

    Raises:
        ValueError: none or both, or a fraction outside of 0..1.
    """

    repeat_factor: float | None = None
    class_balanced: bool = False

    def __post_init__(self) -> None:
        if (self.repeat_factor is None) is not self.class_balanced:
            raise ValueError(
                "loader.sampling must give one of repeat_factor, such as 0.001, and class_balanced: true; got repeat_factor "
                f"{self.repeat_factor} and class_balanced {str(self.class_balanced).lower()}"
            )
        check_numbers("must be in 0..1, above 0", "loader.sampling.", repeat_factor=self.repeat_factor)

    def plan(self, presence: Presence) -> Plan:
        """Plan the epochs of a split; a DataError if there are no objects where classes are to take turns."""
        if self.repeat_factor is None:
            if not len(presence.rows):
                raise DataError("loader.sampling.class_balanced: no training image has an object; set sampling to null")
            return Plan(presence, None, presence.images)
        factors = np.ones(presence.images)
        np.maximum.at(factors, presence.rows, self.class_factors(presence)[presence.classes])
        return Plan(presence, factors, int(np.ceil(round(float(factors.sum()), 6))))

    def class_factors(self, presence: Presence) -> npt.NDArray[np.float64]:
        """``[K]`` how often an image of each class alone comes; 1 for classes without images."""
        fraction = np.maximum(presence.counts, 1) / max(1, presence.images)
        factors = np.maximum(1.0, np.sqrt((self.repeat_factor or 0.0) / fraction))
        return np.where(presence.counts > 0, factors, 1.0)

    def describe(self, presence: Presence) -> str:
        """One line: how long an epoch is, and how often the rarest class comes."""
        plan, counts = self.plan(presence), presence.counts
        length = f"{plan.length:,} images an epoch of {presence.images:,}"
        if not counts.any():
            return f"repeat-factor sampling: {length}; there are no objects"
        rarest = int(np.where(counts > 0, counts, np.iinfo(np.int64).max).argmin())
        name = presence.names[rarest]
        if plan.factors is not None:
            return f"repeat-factor sampling: {length}; rarest class {name!r} {self.class_factors(presence)[rarest]:.1f} times"
        times = plan.length / np.count_nonzero(counts) / counts[rarest]
        return f"class-balanced sampling: {length}; rarest class {name!r}, in {counts[rarest]:,} images, {times:.1f} times each"

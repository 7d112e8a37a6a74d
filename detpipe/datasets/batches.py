"""Which images share a batch: a pure function of (seed, epoch), so that a stopped run can repeat them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np
import numpy.typing as npt
from torch.utils.data import Sampler

from detpipe.datasets.sampling import Plan
from detpipe.support.errors import DataError
from detpipe.support.processes import rank_and_size

# epoch, index, and where the epoch has the image again, how often before: what a dataset needs to draw the same augmentation in
# any worker
Key = tuple[int, ...]


class Repeat(tuple[int, ...]):
    """The key of an image that keeps a process busy while others have it: it must not count a second time."""


_AGAIN = 2


def draws_again(again: Sequence[int]) -> tuple[int, ...]:
    """What decides the draws of an image that an epoch has again, beside seed, epoch and index: apart from those of its size."""
    return (_AGAIN, *again) if again else ()


_POOL = 32  # batches that are shuffled together before they are sorted by shape


@dataclass(frozen=True)
class Locality:
    """Which images lie together in one file, so that few files are read at a time."""

    shard: npt.NDArray[np.int32]  # [I] the number of the file that holds each image, from 0
    window: int  # files whose images are shuffled together

    def windows(self, random: np.random.Generator | None = None) -> npt.NDArray[np.int64]:
        """[I] the number of the window of each image, in the order in which windows are read: shuffled, or as the files are."""
        count = int(self.shard.max(initial=-1)) + 1
        places = np.arange(count) if random is None else random.permutation(count)
        return places[self.shard] // self.window


@dataclass(eq=False)
class EpochBatches(Sampler[list[Key]]):
    """Yields batches of ``(epoch, index)`` keys; images of like shape share a batch, so that little is padded.

    For training, the images are shuffled, cut into pools of 32 batches, sorted by aspect ratio within each pool, cut
    into batches, and the batches are shuffled; the incomplete last batch is kept. For evaluation, only images of
    exactly the same size share a batch, so that padding never changes a result, and every image comes once.

    Several processes share the images. For training, batches are made as for one process with as many times the images, and each
    takes its part of every batch: all make the same number of steps, and the images of a step depend on their total number
    alone. Where a last batch has fewer images than there are processes, the others repeat them, under a `Repeat` as key; a
    training step gives these no weight (:func:`detpipe.support.processes.sharing_counts`). For evaluation, whole batches
    are dealt out in turns, so that every image comes once, and some processes may have a batch less; batches are halved until each
    process has one, since what follows an evaluation is done together.

    With a `Plan`, an epoch of training has some images several times, each time with draws of its own. Where classes take turns,
    batches are cut from the turns in order, whatever the shapes.

    With a `Locality`, the files of a few shards at a time are shuffled (training) or sorted by size (evaluation), those of the next
    after them; batches are shuffled within their pool. Where all shards are in one window, batches are as without it.

    Raises:
        ValueError: classes that take turns with a locality of several windows.
    """

    sizes: npt.NDArray[np.int32]  # [I, 2] height and width of each image
    batch_size: int  # images a batch of one process
    seed: int = 0  # decides the order, with the epoch
    training: bool = True  # whether to shuffle
    smallest: int = 1  # an incomplete last batch with fewer images for each process is left out of training
    locality: Locality | None = None  # which images lie together; None where it does not matter
    plan: Plan | None = None  # which images an epoch of training has, and how often; None for each once

    def __post_init__(self) -> None:
        self.plan = self.plan if self.training else None
        self._length = len(self.sizes) if self.plan is None else self.plan.length  # images an epoch
        self.epoch = 0
        self.fixed = False  # True: every epoch is the first one again, with its draws
        self._done = (0, 0)  # an epoch, and how many of its batches the next iteration leaves out
        if self.locality is not None and self.locality.windows().max(initial=0) == 0:
            self.locality = None  # images lie everywhere
        if self.locality is not None and self.plan is not None and self.plan.factors is None:
            raise ValueError(
                "loader.sampling.class_balanced takes images from everywhere, but only those of window shards are read together; "
                "set window to the number of shards, or take repeat_factor"
            )
        self._evaluation = [] if self.training else self._same_size_batches()

    @property
    def sampler(self) -> EpochBatches:
        """Itself: Lightning looks for ``set_epoch`` on the sampler of a batch sampler."""
        return self

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch of the next iteration; Lightning calls this."""
        self.epoch = 0 if self.fixed else epoch

    def resume(self, epoch: int, batches: int) -> None:
        """Leave out the first batches, which this process was trained on, of the next iteration, if it is that of this epoch."""
        self._done = (0 if self.fixed else epoch, batches)

    def batches(self, epoch: int) -> list[list[int]]:
        """The indices of every batch of an epoch that is this process' to load."""
        return [[index for index, _ in batch] for batch, _ in self._dealt(epoch)]

    def __iter__(self) -> Iterator[list[Key]]:
        return self._keys(self.epoch)

    def _keys(self, epoch: int) -> Iterator[list[Key]]:
        stopped, done = self._done  # looked at with the first batch, since PyTorch makes iterators that it never uses
        self._done = (0, 0)
        for batch, repeated in islice(self._dealt(epoch), done if epoch == stopped else 0, None):
            keys = ((epoch, index, copy) if copy else (epoch, index) for index, copy in batch)  # there may be millions
            yield [Repeat(key) if repeated else key for key in keys]

    def __len__(self) -> int:
        rank, size = rank_and_size()
        if not self.training:
            return len(self._evaluation_batches(rank, size))
        whole, rest = divmod(self._length, self.batch_size * size)
        return whole + (rest >= self._least(size))

    def _dealt(self, epoch: int) -> list[tuple[list[tuple[int, int]], bool]]:
        """The batches of this process, of images and how often each came before, and whether each is a repeat."""
        rank, size = rank_and_size()
        if not self.training:
            return [([(index, 0) for index in batch], False) for batch in self._evaluation_batches(rank, size)]
        return [
            (batch[rank::size], False) if rank < len(batch) else ([batch[rank % len(batch)]], True)
            for batch in self._shuffled_batches(epoch, size)
        ]

    def _evaluation_batches(self, rank: int, processes: int) -> list[list[int]]:
        batches = self._evaluation
        if 0 < len(self.sizes) < processes:
            raise DataError(f"{len(self.sizes)} images cannot be shared among {processes} processes: use fewer devices")
        while 0 < len(batches) < processes:
            halves = ((batch[: (len(batch) + 1) // 2], batch[(len(batch) + 1) // 2 :]) for batch in batches)
            batches = [half for pair in halves for half in pair if half]
        return batches[rank::processes]

    def _least(self, processes: int) -> int:
        """The fewest images of a last batch of all processes."""
        return 1 if self.smallest <= 1 else min(self.smallest, self.batch_size) * processes

    def _shuffled_batches(self, epoch: int, processes: int) -> list[list[tuple[int, int]]]:
        batch_size = self.batch_size * processes
        random = np.random.default_rng((self.seed, epoch))
        order = random.permutation(len(self.sizes)) if self.plan is None else self.plan.draw(random)
        if self.locality is not None:
            windows = self.locality.windows(random)
            order = order[np.argsort(windows[order], kind="stable")]
        drawn = np.column_stack([order, _times_before(order)])
        in_turns = self.plan is not None and self.plan.factors is None
        aspect = self.sizes[:, 0] / self.sizes[:, 1]
        area = self.sizes.astype(np.int64).prod(1)
        pools: list[list[list[tuple[int, int]]]] = []
        for start in range(0, len(order), _POOL * batch_size):
            pool = drawn[start : start + _POOL * batch_size]
            if not in_turns:  # stable: images of one shape stay shuffled
                pool = pool[np.lexsort((area[pool[:, 0]], aspect[pool[:, 0]]))]
            pairs: list[tuple[int, int]] = [(index, copy) for index, copy in pool.tolist()]
            pools.append([pairs[i : i + batch_size] for i in range(0, len(pairs), batch_size)])
        if pools and len(pools[-1][-1]) < self._least(processes):
            pools[-1].pop()
        if self.locality is None:
            pools = [[batch for pool in pools for batch in pool]]
        return [pool[i] for pool in pools for i in random.permutation(len(pool))]

    def _same_size_batches(self) -> list[list[int]]:
        window = np.zeros(len(self.sizes), dtype=np.int64) if self.locality is None else self.locality.windows()
        keys = np.column_stack([window, self.sizes])
        order = np.lexsort((keys[:, 2], keys[:, 1], keys[:, 0]))
        changes = np.flatnonzero((np.diff(keys[order], axis=0) != 0).any(1)) + 1
        groups = np.split(order, changes)
        return [g[i : i + self.batch_size].tolist() for g in groups for i in range(0, len(g), self.batch_size)]


def _times_before(order: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """How often each entry stands before its place: [7, 3, 7, 7] -> [0, 0, 1, 2]."""
    by_image = np.argsort(order, kind="stable")
    counts = np.bincount(order)
    before = np.empty_like(order)
    before[by_image] = np.arange(len(order)) - np.repeat(np.cumsum(counts) - counts, counts)
    return before

"""Which images share a batch: a pure function of (seed, epoch), so that a stopped run can repeat them."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
from torch.utils.data import Sampler

Key = tuple[int, int]  # epoch, index: what a dataset needs to draw the same augmentation in any worker

_POOL = 32  # batches that are shuffled together before they are sorted by shape


class EpochBatches(Sampler[list[Key]]):
    """Yields batches of ``(epoch, index)`` keys; images of like shape share a batch, so that little is padded.

    For training, the images are shuffled, cut into pools of 32 batches, sorted by aspect ratio within each pool, cut
    into batches, and the batches are shuffled; the incomplete last batch is kept. For evaluation, only images of
    exactly the same size share a batch, so that padding never changes a result, and every image comes once.

    Args:
        sizes: [I, 2] height and width of each image.
        batch_size: images a batch, at least 1.
        seed: decides the order, with the epoch.
        training: whether to shuffle; False for evaluation.
        smallest: an incomplete last batch of fewer images is left out of training.
    """

    def __init__(
        self,
        sizes: npt.NDArray[np.int32],
        batch_size: int,
        seed: int = 0,
        training: bool = True,
        smallest: int = 1,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        self.smallest = smallest
        self.sizes = sizes
        self.batch_size = batch_size
        self.seed = seed
        self.training = training
        self.epoch = 0
        self._evaluation = [] if training else self._same_size_batches()

    @property
    def sampler(self) -> EpochBatches:
        """Itself: Lightning looks for ``set_epoch`` on the sampler of a batch sampler."""
        return self

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch of the next iteration; Lightning calls this."""
        self.epoch = epoch

    def batches(self, epoch: int) -> list[list[int]]:
        """The indices of every batch of an epoch."""
        return self._shuffled_batches(epoch) if self.training else self._evaluation

    def __iter__(self) -> Iterator[list[Key]]:
        epoch = self.epoch
        return (
            [(epoch, index) for index in batch] for batch in self.batches(epoch)
        )  # a batch at a time: there may be millions

    def __len__(self) -> int:
        if not self.training:
            return len(self._evaluation)
        whole, rest = divmod(len(self.sizes), self.batch_size)
        return whole + (rest >= max(self.smallest, 1))

    def _shuffled_batches(self, epoch: int) -> list[list[int]]:
        random = np.random.default_rng((self.seed, epoch))
        order = random.permutation(len(self.sizes))
        aspect = self.sizes[:, 0] / self.sizes[:, 1]
        area = self.sizes.astype(np.int64).prod(1)
        batches: list[list[int]] = []
        for start in range(0, len(order), _POOL * self.batch_size):
            pool = order[start : start + _POOL * self.batch_size]
            pool = pool[np.lexsort((area[pool], aspect[pool]))]  # stable: images of one shape stay shuffled
            batches += [pool[i : i + self.batch_size].tolist() for i in range(0, len(pool), self.batch_size)]
        if batches and len(batches[-1]) < min(self.smallest, self.batch_size):
            batches.pop()
        return [batches[i] for i in random.permutation(len(batches))]

    def _same_size_batches(self) -> list[list[int]]:
        order = np.lexsort((self.sizes[:, 1], self.sizes[:, 0]))
        changes = np.flatnonzero((np.diff(self.sizes[order], axis=0) != 0).any(1)) + 1
        groups = np.split(order, changes)
        return [g[i : i + self.batch_size].tolist() for g in groups for i in range(0, len(g), self.batch_size)]

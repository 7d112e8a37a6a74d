"""Which images are looked at together, and by whom: decided by the images alone, so that every machine knows it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, TypeVar

from detpipe.images import Size

T = TypeVar("T")
MOST_PIXELS = 1 << 26  # of the images of a batch: they are held as decoded, and once as floating point


class Part(NamedTuple):
    """A share of the images."""

    number: int  # from 1 on
    of: int

    def take(self, items: Sequence[T]) -> list[T]:
        """What of some items is this part's."""
        return list(items[self.number - 1 :: self.of])


WHOLE = Part(1, 1)


def plan_batches(sizes: Sequence[Size | None], batch_size: int) -> list[list[int]]:
    """Put images of one size together, so that padding never decides about a detection.

    Args:
        sizes: height and width of each image; one whose size is None is looked at alone.
        batch_size: the most images of a batch, which has at most 2^26 pixels, or one image.

    Returns:
        The rows of each batch, in the order of their first.

    Example:
        >>> plan_batches([(4, 4), (4, 6), (4, 4), None, (4, 4)], 2)
        [[0, 2], [1], [3], [4]]
    """
    batches: list[list[int]] = []
    open_batches: dict[Size, list[int]] = {}
    for row, size in enumerate(sizes):
        if size is None:
            batches.append([row])
            continue
        batch = open_batches.get(size)
        if batch is None:
            batch = open_batches[size] = []
            batches.append(batch)
        batch.append(row)
        if len(batch) >= min(batch_size, MOST_PIXELS // (size[0] * size[1])):
            del open_batches[size]
    return batches

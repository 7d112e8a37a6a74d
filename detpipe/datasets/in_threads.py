"""Look at every image of a data set in as many threads as there are cores: decoders work outside of the interpreter's lock."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from tqdm import tqdm

_AT_ONCE = 512  # images that are asked for before the first of them is there
T = TypeVar("T")


def look_at_images(look: Callable[[int], T], rows: Sequence[int]) -> Iterator[T]:
    """Call a function for each image, with a bar that shows progress.

    Args:
        look: what is done with the image of a row; several threads call it at the same time.
        rows: of the images.

    Yields:
        What it returns, in the order of the rows.
    """
    with (
        warnings.catch_warnings(),  # the decoder's own, which it sets and takes back in each thread, would stay or be lost
        ThreadPoolExecutor(usable_cores()) as pool,
        tqdm(desc="checking images", total=len(rows), unit="image", disable=None, leave=False) as bar,
    ):
        warnings.simplefilter("ignore")
        for start in range(0, len(rows), _AT_ONCE):
            for found in pool.map(look, rows[start : start + _AT_ONCE]):
                yield found
                bar.update()


def usable_cores() -> int:
    """How many of the processors' cores this process may use, at least 1."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1

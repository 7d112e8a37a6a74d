"""Lists of bounded length: boxes a few at a time, and the entries of groups of different sizes."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import torch
from torch import Tensor


def cut_boxes(cost: Tensor, most: int) -> Iterator[slice]:
    """Cut boxes of these costs, ``[R]``, into parts that cost as much as is allowed, or one box more; waits for the device."""
    if not len(cost):
        return
    ends = cost.cumsum(0).contiguous()
    steps = torch.arange(most, max(most, int(ends[-1]) + 1), most, device=ends.device, dtype=ends.dtype)
    for begin, end in pairwise(sorted({0, *torch.searchsorted(ends, steps).tolist(), len(cost)})):
        yield slice(begin, end)


def list_entries(first: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """List the entries of groups of these sizes, ``[G]``: the group of each, and its number, counted from the group's first."""
    ends = counts.cumsum(0)
    total = int(ends[-1]) if len(ends) else 0
    group = torch.repeat_interleave(torch.arange(len(counts), device=counts.device), counts, output_size=total)
    number = (first - (ends - counts)).index_select(0, group)
    number += torch.arange(total, device=counts.device)
    return group, number

"""Several processes that train one model: who works on what, and numbers that belong to all of them.

PyTorch averages the gradients of the processes. A loss that each divides by its own count of samples then differs from the loss of
one process with all the images, wherever counts differ: an image with few proposals, a last batch that is smaller. So a training
step divides by `count_per_rank`, the mean count of all processes: the averaged gradients are those of the whole batch. A process
for which a last batch holds no image takes part with one that another has too, and nothing of it counts.

Two things are not exact: norms that look at the batch see that of their process, and parts of other packages (torchvision's RPN and
heads) divide by their own counts.

Nothing here communicates unless a process group is there, and counts only inside `sharing_counts`, which the training step of a
detector enters: a stage in somebody else's training never waits for another process.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as group
from torch import Tensor

T = TypeVar("T")
_weight: float | None = None  # of what this process counts; None: it speaks for itself


def is_first() -> bool:
    """Tell, before processes have met, whether this one was not started by, or with, another that has precedence.

    Launchers (Lightning's, torchrun, SLURM) number processes in the environment.
    """
    return all(
        int(os.environ.get(name) or 0) == 0
        for name in ("RANK", "LOCAL_RANK", "SLURM_PROCID", "NODE_RANK", "GROUP_RANK")
    )


def rank_and_size() -> tuple[int, int]:
    """Return the number of this process, from 0 on, and that of all processes; 0 and 1 where it is alone."""
    return (group.get_rank(), group.get_world_size()) if _joined() else (0, 1)


def is_repeat(targets: Sequence[Mapping[str, Any]]) -> bool:
    """Tell whether a batch only keeps this process busy: its image is another process' (``repeated`` in its target)."""
    return any(target.get("repeated", False) for target in targets)


@contextmanager
def sharing_counts(counted: bool = True) -> Iterator[None]:
    """Within it `count_per_rank` and the others speak of all processes; all of them must enter it, and make the same calls.

    Args:
        counted: False where the batch of this process is a repeat: it then adds nothing to any count. Its loss must not count
            either: multiply it by 0, which keeps the gradients that the other processes wait for.
    """
    global _weight
    before, _weight = _weight, float(counted)
    try:
        yield
    finally:
        _weight = before


def count_per_rank(count: Tensor) -> Tensor:
    """Say by what each process shall divide its sum, so that the mean over processes is a mean over all samples.

    Returns:
        float32 scalar: samples of all processes (at least 1) divided by the number of processes.
    """
    return _total(count[None])[0].clamp(min=1) / _size()


def weight_per_rank(weight: Tensor) -> Tensor:
    """As `count_per_rank`, of samples that count differently: the mean weight of all processes, which may be 0."""
    return _total(weight[None])[0] / _size()


def mean_over_ranks(total: Tensor, count: Tensor) -> Tensor:
    """Average over the samples of all processes, from the sum over those of this one; float32 scalar, 0 where there are none."""
    sums = _total(torch.stack((total.float(), count.float())))
    return sums[0] / sums[1].clamp(min=1)


def mean_factor(images: int, device: torch.device) -> Tensor:
    """Say by what a mean over the images of this process is multiplied, so that the mean over processes is one over all images.

    Returns:
        float32 scalar on ``device``: 1 where all have equally many, 0 for a repeat.
    """
    count = torch.tensor(float(images), device=device)
    return count * (1.0 if _weight is None else _weight) / count_per_rank(count)


def any_rank(condition: bool, device: torch.device) -> bool:
    """Tell whether a condition holds in any process; all of them must ask, on a device that the process group can speak to."""
    return bool(largest(int(condition), device))


def any_sharing_rank(condition: bool, device: torch.device) -> bool:
    """As `any_rank` within `sharing_counts`; elsewhere the condition of this process, so that none waits for another."""
    return condition if _weight is None else any_rank(condition, device)


def largest(value: int, device: torch.device) -> int:
    """Tell the largest of the numbers of all processes; all of them must ask, on a device that the process group can speak to."""
    if not _joined():
        return value
    answer = torch.tensor(value, device=device)
    group.all_reduce(answer, group.ReduceOp.MAX)
    return int(answer)


def gather_objects(value: T) -> list[T]:
    """Collect a small object of each process, in their order; all of them must call."""
    if not _joined():
        return [value]
    values: list[T] = [value] * group.get_world_size()
    group.all_gather_object(values, value)
    return values


class MeanValues:
    """Means of named numbers over the images of all processes, of which some may have none."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._images: dict[str, int] = {}

    def add(self, values: Mapping[str, Tensor], images: int) -> None:
        """Note numbers by name, scalars that are means of so many images."""
        for name, value in values.items():
            self._sums[name] = self._sums.get(name, 0.0) + images * value.detach().float()
            self._images[name] = self._images.get(name, 0) + images

    def means(self) -> dict[str, float]:
        """Average over everything that was noted, weighed by images; all processes must call, and get the same."""
        parts = gather_objects({name: (total.item(), self._images[name]) for name, total in self._sums.items()})
        names = dict.fromkeys(name for part in parts for name in part)
        totals = {
            name: [sum(column) for column in zip(*(p[name] for p in parts if name in p), strict=True)] for name in names
        }
        return {name: total / images for name, (total, images) in totals.items()}


def _total(values: Tensor) -> Tensor:
    values = values.detach().float()
    if _weight is not None and _joined():
        values = values * _weight
        group.all_reduce(values)
    return values


def _size() -> int:
    return group.get_world_size() if _weight is not None and _joined() else 1


def _joined() -> bool:
    return group.is_available() and group.is_initialized()

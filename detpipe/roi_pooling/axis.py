"""Which cells each bin reads along one axis, and with what weight: the one sampler behind every axis-aligned operator.

RoIAlign and precise RoI pooling are separable: the weight of a cell in a bin is a weight along y times a weight along x.
This file computes those weights, differentiable in the boxes; :mod:`detpipe.roi_pooling.separable` applies them.

He et al., "Mask R-CNN", 2017, arXiv 1703.06870; Jiang et al., "Acquisition of Localization Confidence for Accurate Object
Detection", 2018, arXiv 1807.11590, equations 4 and 5.

Convention: coordinates are in cells, and the value of cell k sits at coordinate k (an aligned operator has subtracted the
half cell before). Functions take, of each box, where its first bin begins (``start``), the size of a bin and the cells of its map
(``extent``, int64), all ``[R]``; and ``bound``, T where it is known: None finds the smallest that is enough, which waits for the
device. R boxes, B bins along the axis, T cells a bin at most, S samples.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from detpipe.roi_pooling.operators import is_batched

Axis = tuple[Tensor, Tensor, Tensor, int]  # start [R], bin size [R], cells of the map [R], number of bins
TERMS = 7  # samples that may touch one cell: five, and two that rounding may put before them
FEW = 1 << 15  # cells whose terms are computed at once


class AxisTaps(NamedTuple):
    """The cells that each bin reads along one axis."""

    cell: Tensor  # [R, B, T] int32, -1 where there are fewer than T; those that exist come first
    weight: Tensor  # [R, B, T], 0 where there is no cell


def fixed_samples(
    start: Tensor, bin_size: Tensor, extent: Tensor, bins: int, samples: int, ascending: bool = True
) -> AxisTaps:
    """Average S linear samples a bin, the i-th (i + .5) / S into it: T = 2 S; ``ascending`` if no bin size is negative."""
    point = sample_points(start, bin_size, bins, _arange(samples, start), samples)
    if not ascending:
        point = point.where(bin_size[:, None, None] >= 0, point.flip(-1))
    return merge_samples(point, extent)


def merge_samples(point: Tensor, extent: Tensor) -> AxisTaps:
    """Average samples at ``[R, B, S]`` points, ascending in S, where cells that several share are merged: T = 2 S."""
    point, inside = _onto_map(point, extent)
    last = (extent - 1)[:, None, None]
    low = point.detach().floor().minimum((last - 1).clamp(min=0).to(point.dtype))
    share = inside.to(point.dtype) / point.shape[-1]
    high_weight = (point - low) * share
    low_weight = (low + 1 - point) * share
    low = low.long()
    # sample s writes slots f(s) and f(s) + 1; it shares both, one or none with the sample before it
    slot = torch.nn.functional.pad(low.diff(dim=-1).clamp(0, 2).cumsum(-1), (1, 0))
    slots = torch.cat((slot, slot + 1), dim=-1)
    cells = torch.cat((low, low + 1), dim=-1)
    cell = torch.full_like(cells, -1).scatter(-1, slots, cells)
    cell = cell.where((cell <= last) & inside.any(-1, keepdim=True), -1)
    weight = torch.zeros_like(cells, dtype=point.dtype)
    weight = weight.scatter_add(-1, slots, torch.cat((low_weight, high_weight), dim=-1))
    return AxisTaps(cell.int(), weight * (cell >= 0))


def adaptive_samples(start: Tensor, bin_size: Tensor, extent: Tensor, bins: int, bound: int | None) -> AxisTaps:
    """Average as many linear samples a bin as it has cells, rounded up.

    Neighboring samples are at most a cell apart, and at least half a cell where there are several, so that no more than
    five of them touch one cell: each cell's weight is a sum of a few terms, however large the box. The taps are all cells
    between the first and the last that a bin touches, ``bound`` of them.
    """
    samples = bin_size.detach().ceil().clamp(min=1)[:, None, None]
    with torch.no_grad():
        first_sample = sample_points(start, bin_size, bins, torch.zeros_like(samples), samples)[..., 0]  # [R, B]
        last_sample = sample_points(start, bin_size, bins, samples - 1, samples)[..., 0]
        size = extent[:, None].to(start.dtype)
        touches = (first_sample <= size) & (last_sample >= -1) & (bin_size[:, None] > 0)  # no area has no samples
        first = first_sample.clamp(min=0).minimum(size - 1).floor().where(touches, 0.0)
        last = (last_sample.clamp(min=0).floor() + 1).minimum(size - 1)
        cell = _span(first.long(), last.where(touches, -1.0).long(), bound)
        # the first sample that can touch the cell; rounding may find one that is too early, never one too late
        spacing = (bin_size[:, None, None] / samples).clamp(min=torch.finfo(start.dtype).tiny)
        begin = (start[:, None] + _arange(bins, start) * bin_size[:, None])[..., None]
        earliest = ((cell - 1 - begin) / spacing - 0.5).floor().clamp(min=0)
    weight = torch.zeros_like(earliest)
    at = cell.to(start.dtype)[..., None]
    steps = _arange(TERMS, start)
    for part in steps.split(TERMS if earliest.numel() <= FEW else 1):  # one pass, or little memory
        index = (earliest[..., None] + part).flatten(2)  # [R, B, T * terms]
        point, inside = _onto_map(sample_points(start, bin_size, bins, index, samples), extent)
        counts = (inside & (index < samples)).unflatten(2, (-1, len(part)))
        weight = weight + (_hat(point.unflatten(2, (-1, len(part))) - at) * counts).sum(-1)
    return AxisTaps(cell.int(), (weight / samples).where(cell >= 0, 0.0))


def along_both(axes: Sequence[Axis], sample: Callable[[Tensor, Tensor, Tensor, int], AxisTaps]) -> list[AxisTaps]:
    """Compute the taps of two axes, in one go where they have the same number of bins."""
    first, second = axes
    if first[3] != second[3]:
        return [sample(*first), sample(*second)]
    start, bin_size, extent = (torch.cat(pair) for pair in zip(first[:3], second[:3], strict=True))
    cell, weight = sample(start, bin_size, extent, first[3])
    return [AxisTaps(*pair) for pair in zip(cell.chunk(2), weight.chunk(2), strict=True)]


def integral(start: Tensor, bin_size: Tensor, extent: Tensor, bins: int, bound: int | None) -> AxisTaps:
    """Average the linear surface over each bin, in closed form; it falls to zero within a cell outside the map.

    The taps are all cells within one of the bin, ``bound`` of them.
    """
    low = start[:, None] + _arange(bins, start) * bin_size[:, None]  # [R, B]
    high = low + bin_size[:, None]
    with torch.no_grad():
        last = (extent - 1)[:, None]
        first, stop = low.floor().clamp(min=-1), high.ceil().minimum(last.to(low.dtype))
        touches = (first <= last) & (stop >= -1)  # false if either is not a number
        cell = _span(first.clamp(min=0).where(touches, 0.0).long(), stop.where(touches, -1.0).long(), bound)
    at, has_area = cell.to(start.dtype), bin_size[:, None, None] > 0
    before, up_to = (((edge[..., None] - at).clamp(-1, 1)) for edge in (low, high))
    # the hat of a cell is integrated up to an edge at t by t - t|t| / 2, whose derivative has no jump
    weight = (up_to - up_to * up_to.abs() / 2) - (before - before * before.abs() / 2)
    weight = weight / bin_size[:, None, None].where(has_area, 1.0)
    return AxisTaps(cell.int(), weight.where((cell >= 0) & has_area, 0.0))


def split_evenly(length: Tensor, count: int) -> Tensor:
    """Divide by a number of bins, rounded alike everywhere.

    CUDA multiplies with the reciprocal of a Python number, which is off by a bit at times: a box of seven cells then gets an
    eighth, once that is rounded up.
    """
    return length / length.new_full((), count)


def _arange(count: int, like: Tensor) -> Tensor:
    return torch.arange(count, device=like.device, dtype=like.dtype)


def sample_points(start: Tensor, bin_size: Tensor, bins: int, index: Tensor, samples: Tensor | int) -> Tensor:
    """Place the samples of these numbers, broadcast to ``[R, B, S]``, in bins that have so many.

    The order of the operations is that of the peers' kernels, so that rounding decides alike at the border.
    """
    begin = start[:, None] + _arange(bins, start) * bin_size[:, None]  # [R, B]
    return begin[..., None] + (index + 0.5) * bin_size[:, None, None] / samples


def _onto_map(point: Tensor, extent: Tensor) -> tuple[Tensor, Tensor]:
    """Move samples into the map, and say which lay within a cell of it and count; one that is not a number does not."""
    size = extent[:, None, None].to(point.dtype)
    last = size - 1
    # where a sample lies on a cell, its gradient is that of the cells behind it, and 0 at the last one
    return torch.where(point < last, point.where(point >= 0, 0.0), last), (point >= -1) & (point <= size)


def _hat(past: Tensor) -> Tensor:
    """Weigh a cell by how far past it a sample lies; the gradient is that to the right, at the kinks as well."""
    if past.requires_grad or torch.compiler.is_compiling() or is_batched(past):
        return torch.where(past < 0, 1 + past, 1 - past) * ((past >= -1) & (past < 1))
    return (1 - past.abs()).clamp(min=0)


def _span(first: Tensor, last: Tensor, bound: int | None) -> Tensor:
    """``[R, B]`` first and last cells -> ``[R, B, T]`` cells, -1 behind the last."""
    if bound is None:
        bound = int((last - first).max()) + 1 if first.numel() else 1
        bound = max(bound, 1)
    cell = first[..., None] + torch.arange(bound, device=first.device)
    return cell.where(cell <= last[..., None], -1)

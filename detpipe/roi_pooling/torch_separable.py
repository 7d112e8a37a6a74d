"""Separable pooling on PyTorch's own kernels: what CPUs run, and devices without Triton.

Pooling is a weighted ``embedding_bag`` over channels-last rows, and its transpose the same after a stable sort of the taps by
cell: sums are taken in a fixed order, and nothing of the size of taps times channels is ever made. The taps are listed for a
bounded number of boxes at a time.

R boxes, h x w bins, Ty and Tx cells a bin along each axis, C channels, T cells of all maps, K taps.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from detpipe.roi_pooling.axis import AxisTaps
from detpipe.roi_pooling.bags import dot_bags, sum_bags, sum_bags_adjoint
from detpipe.roi_pooling.blocks import cut_boxes, list_entries
from detpipe.roi_pooling.maps import geometry

FEW_TAPS = 1 << 15
TAPS_AT_ONCE = 1 << 20  # bounds the memory of one pass: some 30 bytes a tap


class _Taps(NamedTuple):
    """Single taps of some boxes, bin by bin."""

    row: Tensor  # [K] int64, a row of the table
    weight: Tensor | None  # [K], the product of both
    bin: Tensor | None  # [K] int64
    offsets: Tensor  # [boxes * h * w + 1] int64, where each bin begins
    y_slot: Tensor | None  # [K] int64, which of the R * h * Ty weights
    x_slot: Tensor | None  # [K] int64, which of the R * w * Tx weights


def _expand(first: Tensor, width: Tensor, y: AxisTaps, x: AxisTaps, want_bin: bool, want_slots: bool) -> _Taps:
    """List the taps of all bins: first by bin, then by row (run), then by column."""
    boxes, h, y_most = y.cell.shape
    w, x_most = x.cell.shape[1:]
    if boxes * h * w * y_most * x_most <= FEW_TAPS:
        return _expand_padded(first, width, y, x, want_bin, want_slots)
    y_count, x_count = (y.cell >= 0).sum(-1)[:, :, None], (x.cell >= 0).sum(-1)[:, None, :]
    y_first = torch.arange(0, boxes * h * y_most, y_most, device=first.device).view(boxes, h, 1)  # slots of weights
    x_first = torch.arange(0, boxes * w * x_most, x_most, device=first.device).view(boxes, 1, w)
    # runs: the cells of one bin in one row
    run_bin, run_y = list_entries(_per_bin(y_first, boxes, h, w), (y_count * (x_count > 0)).flatten())
    run_x, lengths = (_per_bin(each, boxes, h, w).index_select(0, run_bin) for each in (x_first, x_count))
    # taps: the single cells
    run, x_slot = list_entries(run_x, lengths)
    y_row = (first[:, None, None] + y.cell * width[:, None, None]).flatten().index_select(0, run_y)
    row = y_row.index_select(0, run)
    row += x.cell.flatten().index_select(0, x_slot)
    weight = y_slot = bin_of = None
    if want_slots:
        y_slot = run_y.index_select(0, run)
    else:
        weight = y.weight.flatten().index_select(0, run_y).index_select(0, run)
        weight *= x.weight.flatten().index_select(0, x_slot)
    if want_bin:
        bin_of = run_bin.index_select(0, run)
    offsets = torch.nn.functional.pad((y_count * x_count).flatten().cumsum(0), (1, 0))
    return _Taps(row, weight, bin_of, offsets, y_slot, x_slot if want_slots else None)


def _per_bin(values: Tensor, boxes: int, h: int, w: int) -> Tensor:
    return values.expand(boxes, h, w).flatten()


def _expand_padded(first: Tensor, width: Tensor, y: AxisTaps, x: AxisTaps, want_bin: bool, want_slots: bool) -> _Taps:
    """List the same number of taps for every bin, some of weight 0: less to do where there are few bins."""
    boxes, h, y_most = y.cell.shape
    w, x_most = x.cell.shape[1:]
    bins, most = boxes * h * w, y_most * x_most
    shape = (boxes, h, w, y_most, x_most)
    numbers = torch.arange(max(bins + 1, boxes * h * y_most, boxes * w * x_most), device=first.device)
    y_cell, x_cell = y.cell.clamp(min=0), x.cell.clamp(min=0)
    y_row = (first[:, None, None] + y_cell * width[:, None, None]).view(boxes, h, 1, y_most, 1)
    row = (y_row + x_cell.view(boxes, 1, w, 1, x_most)).flatten()
    weight = y_slot = x_slot = None
    if want_slots:
        y_slot = numbers[: boxes * h * y_most].view(boxes, h, 1, y_most, 1).expand(shape).flatten()
        x_slot = numbers[: boxes * w * x_most].view(boxes, 1, w, 1, x_most).expand(shape).flatten()
    else:
        y_weight = (y.weight * (y.cell >= 0)).view(boxes, h, 1, y_most, 1)
        weight = (y_weight * (x.weight * (x.cell >= 0)).view(boxes, 1, w, 1, x_most)).flatten()
    bin_of = numbers[:bins, None].expand(bins, most).flatten().contiguous() if want_bin else None
    return _Taps(row, weight, bin_of, numbers[: bins + 1] * most, y_slot, x_slot)


def _blocks(
    chosen: Tensor,
    images: int,
    sizes: list[int],
    y: AxisTaps,
    x: AxisTaps,
    want_bin: bool = False,
    want_slots: bool = False,
) -> Iterator[tuple[slice, _Taps]]:
    """Expand the boxes in order, some at a time, so that the taps of a pass stay few."""
    first, _, width = geometry(images, list(zip(sizes[::2], sizes[1::2], strict=True)), chosen)
    if y.cell.numel() * x.cell.shape[1] * x.cell.shape[2] <= FEW_TAPS:
        yield slice(0, len(chosen)), _expand(first, width, y, x, want_bin, want_slots)
        return
    taps = (y.cell >= 0).sum((1, 2)) * (x.cell >= 0).sum((1, 2))
    for part in cut_boxes(taps, TAPS_AT_ONCE):
        y_part, x_part = AxisTaps(y.cell[part], y.weight[part]), AxisTaps(x.cell[part], x.weight[part])
        yield part, _expand(first[part], width[part], y_part, x_part, want_bin, want_slots)


def pool(rows: Tensor, chosen: Tensor, images: int, sizes: list[int], y: AxisTaps, x: AxisTaps) -> Tensor:
    """Pool, not differentiable: rows ``[T, C]`` -> ``[R, h, w, C]``; see :func:`detpipe.roi_pooling.separable.pool_separable`."""
    shape = (len(chosen), y.cell.shape[1], x.cell.shape[1], rows.shape[1])
    exact = rows.to(torch.promote_types(rows.dtype, torch.float32))
    pooled = None
    for part, taps in _blocks(chosen, images, sizes, y, x):
        assert taps.weight is not None
        result = sum_bags(exact, taps.row, taps.weight, taps.offsets).to(rows.dtype).view(-1, *shape[1:])
        if len(result) == len(chosen):
            return result
        pooled = rows.new_empty(shape) if pooled is None else pooled
        pooled[part] = result
    return rows.new_zeros(shape) if pooled is None else pooled


def pool_adjoint(grad: Tensor, chosen: Tensor, images: int, sizes: list[int], y: AxisTaps, x: AxisTaps) -> Tensor:
    """Send gradients ``[R, h, w, C]`` back to the cells ``[T, C]``."""
    cells = images * sum(height * width for height, width in zip(sizes[::2], sizes[1::2], strict=True))
    exact = torch.promote_types(grad.dtype, torch.float32)
    total = None
    for part, taps in _blocks(chosen, images, sizes, y, x, want_bin=True):
        assert taps.weight is not None
        assert taps.bin is not None
        piece = grad[part].flatten(0, 2).to(exact)
        result = sum_bags_adjoint(piece, taps.row, taps.weight, taps.bin, cells)
        total = result if total is None else total.add_(result)
    return grad.new_zeros((cells, grad.shape[-1])) if total is None else total.to(grad.dtype)


def weight_grad(
    grad: Tensor, rows: Tensor, chosen: Tensor, images: int, sizes: list[int], y: AxisTaps, x: AxisTaps, axis: int
) -> Tensor:
    """Send gradients ``[R, h, w, C]`` back to the weights along y (axis 0, ``[R, h, Ty]``) or x (axis 1, ``[R, w, Tx]``)."""
    own, other = (y, x) if axis == 0 else (x, y)
    result = torch.zeros_like(own.cell, dtype=other.weight.dtype)
    for part, taps in _blocks(chosen, images, sizes, y, x, want_bin=True, want_slots=True):
        assert taps.bin is not None
        assert taps.y_slot is not None
        assert taps.x_slot is not None
        dots = dot_bags(grad[part].flatten(0, 2), rows, taps.row, taps.bin)
        slot, other_slot = (taps.y_slot, taps.x_slot) if axis == 0 else (taps.x_slot, taps.y_slot)
        weight = (other.weight[part] * (other.cell[part] >= 0)).flatten()
        dots = dots.to(result.dtype) * weight[other_slot]
        result[part] = torch.zeros_like(result[part]).flatten().index_add_(0, slot, dots).view_as(result[part])
    return result * (own.cell >= 0)

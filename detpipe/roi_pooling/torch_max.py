"""The largest cell in a rectangle, and its gradient, on PyTorch's own kernels: what CPUs run, and devices without Triton.

On a CPU a maximum over bins is a sparse matrix product that reduces with a maximum instead of a sum. Which cells won is found
on the way back, and kept nowhere. The product can tell it, eight times as slowly; where there are many cells, value and cell
are packed into one number first instead: the 32 bits of a float32, put in the order of its values, and 20 for a row of the
table, in the 52 of a float64 that follow its exponent. On other devices the bins' cells are gathered and reduced.

R boxes, h x w bins, C channels, T cells of all maps (``rows``), K cells of all bins.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from detpipe.roi_pooling.bags import bag_of_entries, use_sparse_csr
from detpipe.roi_pooling.blocks import cut_boxes

VALUES_AT_ONCE = 1 << 18  # of the result, so that what is computed on the way stays in the cache
TAPS_AT_ONCE = 1 << 18
GATHERED_AT_ONCE = 1 << 22  # values that are gathered in one pass where there is no sparse product
LAST_ROW = (1 << 20) - 1  # that a packed number can name


class Bins(NamedTuple):
    """The cells of each bin of boxes that lie on maps in a table of cells."""

    first: Tensor  # [R] int64, where the map of each box begins in the table
    width: Tensor  # [R] int64, of that map
    y: Tensor  # [R, h, 2] int64, the first row of each bin and the one behind its last; within the map
    x: Tensor  # [R, w, 2] int64, the same for columns


class _Block(NamedTuple):
    """The cells of the bins of some boxes."""

    boxes: slice  # of R
    row: Tensor  # [K] int64, a row of the table
    offsets: Tensor  # [bins + 1] int64, where each bin begins


def largest(rows: Tensor, bins: Bins) -> Tensor:
    """Take the largest cell in each bin: ``[R, h, w, C]``, 0 for an empty bin, NaN where a cell is NaN."""
    out = rows.new_empty((len(bins.first), bins.y.shape[1], bins.x.shape[1], rows.shape[1]))
    exact = rows.to(torch.promote_types(rows.dtype, torch.float32))
    for block in _blocks(bins, rows):
        part = out[block.boxes].flatten(0, 2)
        part.copy_(_product(exact, block) if rows.device.type == "cpu" else _gathered(exact, block)[0])
    return out


def send_to_winners(grad: Tensor, rows: Tensor, bins: Bins) -> Tensor:
    """Add up gradients at the cells that won, the first of equal cells, row by row: the transpose of :func:`read_winners`.

    The result is ``[T, C]`` in the dtype of ``grad``; sums are float32, or float64 for float64.
    """
    exact = torch.promote_types(grad.dtype, torch.float32)
    total = grad.new_zeros(rows.numel() + rows.shape[1], dtype=exact)  # the last row takes what empty bins send
    turned = grad.permute(0, 3, 1, 2)
    channels_first = turned.is_contiguous()  # winners are written in the order of the gradient, which costs less
    grad = turned if channels_first else grad
    for boxes, winner in _winners(rows, bins, channels_first):
        total.scatter_add_(0, winner.flatten(), grad[boxes].to(exact).reshape(-1))
    return total[: rows.numel()].view(rows.shape).to(grad.dtype)


def read_winners(values: Tensor, rows: Tensor, bins: Bins) -> Tensor:
    """Read other values ``[T, C]`` where the winning cells are: ``[R, h, w, C]``, 0 for an empty bin."""
    out = values.new_empty((len(bins.first), bins.y.shape[1], bins.x.shape[1], rows.shape[1]))
    padded = torch.nn.functional.pad(values, (0, 0, 0, 1)).flatten()
    for boxes, winner in _winners(rows, bins):
        torch.index_select(padded, 0, winner.flatten(), out=out[boxes].flatten())
    return out


def _winners(rows: Tensor, bins: Bins, channels_first: bool = False) -> Iterator[tuple[slice, Tensor]]:
    """Say where the largest cells are in the flat table, or in one more row for a bin without cells.

    Yields:
        Some boxes at a time, and ``[boxes, h * w, C]`` int64, or ``[boxes, C, h * w]``.
    """
    exact, (count, channels) = rows.to(torch.promote_types(rows.dtype, torch.float32)), rows.shape
    keys = _pack(exact) if _is_worth_packing(exact, bins) else None
    for block in _blocks(bins, rows):
        if keys is None:
            tap = (_product_with_winner if rows.device.type == "cpu" else _gathered)(exact, block)[1]
            row = torch.nn.functional.pad(block.row, (0, 1), value=count).index_select(0, tap.flatten()).view(tap.shape)
            first, step = 0, channels
        else:
            row = _product(keys, block).view(torch.int64).bitwise_and_(LAST_ROW)  # counted from the last one
            row.index_fill_(0, (block.offsets.diff() == 0).nonzero()[:, 0], LAST_ROW - count)
            first, step = LAST_ROW * channels, -channels
        row = row.view(block.boxes.stop - block.boxes.start, -1, channels)
        channel = torch.arange(first, first + channels, device=rows.device)
        if channels_first:
            row, channel = row.transpose(1, 2), channel[:, None]
        yield block.boxes, torch.add(channel, row, alpha=step, out=row.new_empty(row.shape))


def _blocks(bins: Bins, rows: Tensor) -> Iterator[_Block]:
    """List the cells of all bins, and hand them out for as many boxes at a time as have few cells and few results."""
    (first, width, y, x), (h, w), channels = bins, (bins.y.shape[1], bins.x.shape[1]), rows.shape[1]
    most = TAPS_AT_ONCE if rows.device.type == "cpu" else max(1, GATHERED_AT_ONCE // channels)
    high, wide = y[..., 1] - y[..., 0], x[..., 1] - x[..., 0]
    step = max(1, VALUES_AT_ONCE // (h * w * max(1, channels)))
    for part in cut_boxes(high.sum(1) * wide.sum(1), most):
        corner = y[part, :, None, 0] * width[part, None, None] + x[part, None, :, 0] + first[part, None, None]
        row = _list_cells(corner, high[part], wide[part], width[part])
        offsets = torch.nn.functional.pad((high[part, :, None] * wide[part, None]).flatten().cumsum(0), (1, 0))
        cuts = [*range(0, part.stop - part.start, step), part.stop - part.start]
        ends = offsets[:: h * w][cuts].tolist()
        for (begin, end), (from_row, to_row) in zip(pairwise(cuts), pairwise(ends), strict=True):
            own = offsets[begin * h * w : end * h * w + 1] - from_row
            yield _Block(slice(part.start + begin, part.start + end), row[from_row:to_row], own)


def _list_cells(corner: Tensor, rows: Tensor, columns: Tensor, width: Tensor) -> Tensor:
    """List cells bin by bin, in it row by row of the map, from each bin's first cell, its rows and its columns."""
    runs = torch.where(columns[:, None] > 0, rows[..., None], 0).flatten()  # rows of cells in each bin
    ends = runs.cumsum(0)
    stride = width[:, None, None].expand(corner.shape).flatten()
    per_bin = torch.stack(
        (corner.flatten() - (ends - runs) * stride, stride, columns[:, None].expand(corner.shape).flatten())
    )
    begin, stride, length = torch.repeat_interleave(per_bin, runs, dim=1, output_size=int(ends[-1]))
    begin = torch.arange(len(begin), device=runs.device).mul_(stride).add_(begin)
    ends = length.cumsum(0)
    total = int(ends[-1]) if len(ends) else 0
    return torch.repeat_interleave(begin - (ends - length), length, output_size=total).add_(
        torch.arange(total, device=runs.device)
    )


def _product(rows: Tensor, block: _Block) -> Tensor:
    """``[bins, C]``: the largest cell of each bin, 0 if it has none."""
    return torch.sparse.mm(_matrix(rows, block), rows, "amax")


def _product_with_winner(rows: Tensor, block: _Block) -> tuple[Tensor, Tensor]:
    """The same, and which of the K cells it was, the first of equals: ``[bins, C]`` int64, K if there is none."""
    with torch.enable_grad():  # what torch.sparse.mm does for its own backward pass
        leaf = rows.detach().requires_grad_()
        best, tap = torch.ops.aten._sparse_mm_reduce_impl(_matrix(rows, block), leaf, "amax")
    if not len(block.row):  # of no cells the product tells an empty tensor
        tap = torch.zeros_like(best, dtype=torch.int64)
    return best.detach(), tap


def _matrix(rows: Tensor, block: _Block) -> Tensor:
    """``[bins, T]``: 1 where a bin has a cell."""
    use_sparse_csr()
    ones = rows.new_ones(len(block.row))
    return torch.sparse_csr_tensor(
        block.offsets, block.row, ones, (len(block.offsets) - 1, len(rows)), check_invariants=False
    )


def _gathered(rows: Tensor, block: _Block) -> tuple[Tensor, Tensor]:
    """The same from cells that are gathered and reduced."""
    bins, taps, channels = len(block.offsets) - 1, len(block.row), rows.shape[1]
    bin_of = bag_of_entries(block.offsets, taps)
    target = bin_of[:, None].expand(-1, channels)
    values = rows.index_select(0, block.row)
    best = rows.new_full((bins, channels), -torch.inf).scatter_reduce_(0, target, values, "amax")
    found = best.index_select(0, bin_of)
    wins = (values == found) | (values.isnan() & found.isnan())
    number = torch.where(wins, torch.arange(taps, device=rows.device)[:, None], taps)
    tap = torch.full_like(best, taps, dtype=torch.int64).scatter_reduce_(0, target, number, "amin")
    return torch.where(block.offsets.diff()[:, None] > 0, best, 0), tap


def _is_worth_packing(rows: Tensor, bins: Bins) -> bool:
    """Whether the product of packed numbers, with what packing costs, is faster than the one that tells the winner."""
    if rows.device.type != "cpu" or rows.dtype != torch.float32 or len(rows) > LAST_ROW:
        return False
    taps = ((bins.y[..., 1] - bins.y[..., 0]).sum(1) * (bins.x[..., 1] - bins.x[..., 0]).sum(1)).sum()
    return int(taps) > 2 * len(rows)


def _pack(rows: Tensor) -> Tensor:
    """Write float32 values and their rows as float64: what is larger, and of equals comes first, is the larger number."""
    code = 3 * 2.0**51 + torch.arange(LAST_ROW, LAST_ROW - len(rows), -1, dtype=torch.float64)  # 2 ** 52, all bits >= 0
    packed, most = torch.empty(rows.shape, dtype=torch.float64), torch.iinfo(torch.int32).max
    step = max(1, VALUES_AT_ONCE // max(1, rows.shape[1]))
    for values, number, out in zip(rows.split(step), code.split(step), packed.split(step), strict=True):
        bits = (values + 0.0).view(torch.int32)  # a copy, in which -0 is 0
        bits ^= (bits >> 31).bitwise_and_(most)  # whole numbers in the order of the values
        bits.masked_fill_(values.isnan(), most)
        torch.add(number[:, None], bits, alpha=LAST_ROW + 1, out=out)
    return packed

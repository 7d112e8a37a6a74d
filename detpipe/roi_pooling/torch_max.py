"""The largest cell in a rectangle, and its gradient, on PyTorch's own kernels: what CPUs run, and devices without Triton.

On a CPU a maximum over bins is a sparse matrix product that reduces with a maximum instead of a sum. It can tell the winner
too, eight times as slowly; where there are many cells, value and cell are packed into one number first instead: the 32 bits
of a float32, put in the order of its values, and 20 for a cell, in a float64, which holds whole numbers of 53. On other
devices the bins' cells are gathered and reduced.

R boxes, h x w bins, C channels, T cells of all maps, K cells of all bins.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from detpipe.roi_pooling.bags import bag_of_entries, use_sparse_csr
from detpipe.roi_pooling.maps import geometry

VALUES_AT_ONCE = 1 << 19  # of the result, so that what is computed on the way stays in the cache
TAPS_AT_ONCE = 1 << 18
GATHERED_AT_ONCE = 1 << 22  # values that are gathered in one pass where there is no sparse product
CELL_BITS = 20
SIGN = -(1 << 31)


class _Block(NamedTuple):
    """The cells of the bins of some boxes."""

    bins: slice  # of R * h * w
    row: Tensor  # [K] int64, a row of the table
    cell: Tensor  # [K] int32, the same counted from the beginning of its map
    offsets: Tensor  # [bins + 1] int64, where each bin begins


def range_max(
    rows: Tensor, chosen: Tensor, images: int, sizes: list[int], y: Tensor, x: Tensor, want_argmax: bool
) -> tuple[Tensor, Tensor | None]:
    """Take the largest cell in each bin.

    Args:
        rows: ``[T, C]`` cells.
        chosen: ``[R]`` int64, the map of each box.
        images: N.
        sizes: H_0, W_0, H_1, W_1, ... of the levels.
        y: ``[R, h, 2]`` int32, the first row of each bin and the one behind its last; within the map.
        x: ``[R, w, 2]`` int32, the first column of each bin and the one behind its last.
        want_argmax: say which cell it was.

    Returns:
        ``[R, h, w, C]`` in the dtype of ``rows``, 0 for an empty bin, NaN where a cell is NaN; and the winning cell
        ``y * W + x`` as ``[R, h, w, C]`` int32, or None. The first of equal cells wins, row by row;
        -1 for an empty bin.
    """
    shape = (len(chosen), y.shape[1], x.shape[1], rows.shape[1])
    out = rows.new_empty(shape)
    argmax = torch.empty(shape, dtype=torch.int32, device=rows.device) if want_argmax else None
    if not out.numel():
        return out, argmax
    exact = rows.detach().to(torch.promote_types(rows.dtype, torch.float32))
    first, _, width = geometry(images, list(zip(sizes[::2], sizes[1::2], strict=True)), chosen)
    on_cpu, flat = rows.device.type == "cpu", out.flatten(0, 2)
    blocks = _blocks(first, width, y, x, shape[3], TAPS_AT_ONCE if on_cpu else max(1, GATHERED_AT_ONCE // shape[3]))
    flat_argmax = None if argmax is None else argmax.flatten(0, 2)
    packed = on_cpu and flat_argmax is not None and _is_worth_packing(exact, images, sizes, y, x)
    keys = _pack(exact, images, sizes) if packed else exact
    for block in blocks:
        if not len(block.row):
            flat[block.bins] = 0
            if flat_argmax is not None:
                flat_argmax[block.bins] = -1
        elif flat_argmax is None:
            flat[block.bins] = _product(exact, block) if on_cpu else _gathered(exact, block)[0]
        elif packed:
            _unpack(_product(keys, block, "amin"), block, flat[block.bins], flat_argmax[block.bins])
        else:
            flat[block.bins], tap = _product_with_winner(exact, block) if on_cpu else _gathered(exact, block)
            flat_argmax[block.bins] = torch.nn.functional.pad(block.cell, (0, 1), value=-1).take(tap)
    return out, argmax


def scatter_argmax(grad: Tensor, argmax: Tensor, chosen: Tensor, images: int, sizes: list[int]) -> Tensor:
    """Add up gradients at the cells that won, the transpose of :func:`gather_argmax`.

    Args:
        grad: ``[R, h, w, C]``.
        argmax: ``[R, h, w, C]`` int32, the cell ``y * W + x`` of the box's map, or -1.
        chosen: ``[R]`` int64, the map of each box.
        images: N.
        sizes: H_0, W_0, H_1, W_1, ... of the levels.

    Returns:
        ``[T, C]`` in the dtype of ``grad``; accumulated in float32, or float64 for float64.
    """
    cells = images * sum(height * width for height, width in zip(sizes[::2], sizes[1::2], strict=True))
    exact = torch.promote_types(grad.dtype, torch.float32)
    total = grad.new_zeros((cells + 1, grad.shape[3]), dtype=exact)  # the last row takes what empty bins send
    for part, row in _winning_rows(argmax, chosen, images, sizes, cells):
        total.scatter_add_(0, row, grad[part].to(exact).flatten(0, 2))
    return total[:cells].to(grad.dtype)


def gather_argmax(rows: Tensor, argmax: Tensor, chosen: Tensor, images: int, sizes: list[int]) -> Tensor:
    """Read the cells that won.

    Args:
        rows: ``[T, C]``.
        argmax: ``[R, h, w, C]`` int32, the cell ``y * W + x`` of the box's map, or -1.
        chosen: ``[R]`` int64, the map of each box.
        images: N.
        sizes: H_0, W_0, H_1, W_1, ... of the levels.

    Returns:
        ``[R, h, w, C]``, 0 where ``argmax`` is -1.
    """
    out = rows.new_empty(argmax.shape)
    padded = torch.nn.functional.pad(rows, (0, 0, 0, 1))
    for part, row in _winning_rows(argmax, chosen, images, sizes, len(rows)):
        out[part] = padded.gather(0, row).view_as(argmax[part])
    return out


def _winning_rows(
    argmax: Tensor, chosen: Tensor, images: int, sizes: list[int], none: int
) -> Iterator[tuple[slice, Tensor]]:
    """Turn cells into rows of the table, ``none`` for -1, for some boxes at a time."""
    first, _, _ = geometry(images, list(zip(sizes[::2], sizes[1::2], strict=True)), chosen)
    if argmax.numel():
        step = max(1, (VALUES_AT_ONCE if argmax.device.type == "cpu" else GATHERED_AT_ONCE) // argmax[0].numel())
        for begin in range(0, len(argmax), step):
            part = slice(begin, min(begin + step, len(argmax)))
            row = argmax[part] + first[part, None, None, None]
            if argmax[part].amin() < 0:
                row.masked_fill_(argmax[part] < 0, none)
            yield part, row.flatten(0, 2)


def _blocks(first: Tensor, width: Tensor, y: Tensor, x: Tensor, channels: int, most: int) -> Iterator[_Block]:
    """List the cells of all bins, for as many boxes at a time as have few cells and few results."""
    y, x, (h, w) = y.long(), x.long(), (y.shape[1], x.shape[1])
    rows, columns = y[..., 1] - y[..., 0], x[..., 1] - x[..., 0]
    cost = torch.maximum(rows.sum(1) * columns.sum(1) / most, torch.tensor(h * w * channels / VALUES_AT_ONCE))
    ends = cost.cumsum(0)
    steps = torch.arange(1, int(ends[-1]) + 1, device=ends.device, dtype=ends.dtype)
    cuts = sorted({0, *torch.searchsorted(ends, steps).tolist(), len(first)})
    for begin, end in pairwise(cuts):
        part = slice(begin, end)
        cell, box = _list_cells(rows[part], columns[part], y[part, :, 0], x[part, :, 0], width[part])
        offsets = torch.nn.functional.pad((rows[part, :, None] * columns[part, None]).flatten().cumsum(0), (1, 0))
        row = cell + first[part].index_select(0, box)
        yield _Block(slice(begin * h * w, end * h * w), row, cell.to(torch.int32), offsets)


def _list_cells(rows: Tensor, columns: Tensor, top: Tensor, left: Tensor, width: Tensor) -> tuple[Tensor, Tensor]:
    """List cells of maps and their boxes: bin by bin, then row by row of the map, then column by column."""
    shape = (*rows.shape, columns.shape[1])
    runs = torch.where(columns[:, None] > 0, rows[..., None], 0).flatten()  # rows of cells in each bin
    ends = runs.cumsum(0)
    total = int(ends[-1])
    bin_of = torch.repeat_interleave(torch.arange(len(runs), device=runs.device), runs, output_size=total)
    stride = width[:, None, None].expand(shape).flatten()
    begin = ((top * width[:, None])[..., None] + left[:, None]).flatten() - (ends - runs) * stride
    begin = begin.index_select(0, bin_of) + torch.arange(total, device=runs.device) * stride.index_select(0, bin_of)
    length = columns[:, None].expand(shape).flatten().index_select(0, bin_of)
    ends = length.cumsum(0)
    total = int(ends[-1]) if len(ends) else 0
    run_of = torch.repeat_interleave(torch.arange(len(length), device=runs.device), length, output_size=total)
    cell = (begin - (ends - length)).index_select(0, run_of) + torch.arange(total, device=runs.device)
    bins = shape[1] * shape[2]
    return cell, (bin_of // bins).index_select(0, run_of)


def _matrix(rows: Tensor, block: _Block) -> Tensor:
    """``[bins, T]``: 1 where a bin has a cell."""
    use_sparse_csr()
    ones = rows.new_ones(len(block.row))
    return torch.sparse_csr_tensor(
        block.offsets, block.row, ones, (len(block.offsets) - 1, len(rows)), check_invariants=False
    )


def _product(rows: Tensor, block: _Block, reduce: str = "amax") -> Tensor:
    """``[bins, C]``: the largest cell of each bin, 0 if it has none."""
    return torch.sparse.mm(_matrix(rows, block), rows, reduce)


def _product_with_winner(rows: Tensor, block: _Block) -> tuple[Tensor, Tensor]:
    """The same, and which of the K cells it was, the first of equals: ``[bins, C]`` int64, K if there is none."""
    with torch.enable_grad():  # what torch.sparse.mm does for its own backward pass
        leaf = rows.detach().requires_grad_()
        best, tap = torch.ops.aten._sparse_mm_reduce_impl(_matrix(rows, block), leaf, "amax")
    return best.detach(), tap


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


def _is_worth_packing(rows: Tensor, images: int, sizes: list[int], y: Tensor, x: Tensor) -> bool:
    """Whether the packed product, with what packing costs, is faster than the one that tells the winner."""
    fits = rows.dtype == torch.float32 and _most_cells(sizes) <= 1 << CELL_BITS
    taps = ((y[..., 1] - y[..., 0]).sum(1) * (x[..., 1] - x[..., 0]).sum(1)).sum()
    return fits and int(taps) > 2 * (len(rows) + y.shape[0] * y.shape[1] * x.shape[1])


def _most_cells(sizes: list[int]) -> int:
    return max(height * width for height, width in zip(sizes[::2], sizes[1::2], strict=True))


def _pack(rows: Tensor, images: int, sizes: list[int]) -> Tensor:
    """Write float32 values and their cells as whole numbers, in the reversed order of the values, then of the cells."""
    bits = (rows + 0.0).view(torch.int32)  # a copy, in which -0 is 0
    if rows.amax().isnan():
        bits.masked_fill_(rows.isnan(), ~SIGN)  # the largest
    bits ^= (bits >> 31).bitwise_not_().bitwise_or_(SIGN)
    areas = [height * width for height, width in zip(sizes[::2], sizes[1::2], strict=True)]
    cell = torch.cat([torch.arange(area, dtype=torch.float64).repeat(images) for area in areas])
    return torch.add(cell[:, None], bits, alpha=1 << CELL_BITS)


def _unpack(keys: Tensor, block: _Block, value: Tensor, cell: Tensor) -> None:
    """Put values and cells into ``value`` and ``cell``, 0 and -1 where a bin is empty."""
    high = (keys * 2.0**-CELL_BITS).floor_()
    bits = value.view(torch.int32) if value.dtype == torch.float32 else cell.new_empty(cell.shape)
    bits.copy_(high)
    bits ^= (bits >> 31).bitwise_or_(SIGN)
    cell.copy_(keys.sub_(high, alpha=1 << CELL_BITS))
    if value.dtype != torch.float32:
        value.copy_(bits.view(torch.float32))
    empty = (block.offsets.diff() == 0).nonzero()[:, 0]
    if len(empty):
        value.index_fill_(0, empty, 0)
        cell.index_fill_(0, empty, -1)

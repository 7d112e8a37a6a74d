"""What the Triton kernels share: which bins read a tile of cells, found without a list of taps and without a sort of them.

A gradient to a feature map is a sum over the bins that read each cell. One program owns a small tile of cells and a block
of channels, and walks over the boxes of its map in the order in which they were given, so that nothing is written twice,
no atomics are needed, and every sum is taken in the same order each time. Two small tables tell it where to look: for each
box, the first bin and the number of bins whose cells touch a strip of cells, along y and along x. The program reads the
numbers of 64 boxes at once, sums them up, and then takes the bins of all of them a few at a time: small and large boxes,
crowded and empty tiles cost what they hold, and loads of several rows are always on their way.

Nothing here waits for the device: all sizes that the host needs are known from shapes.

R boxes, N images, C channels, P = R positions of the boxes once they are ordered by map.
"""

# Triton annotates its functions as they are on the host; compiled, its loops and tensors are something else.
# pyright: reportOperatorIssue=false, reportAttributeAccessIssue=false

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS = 2  # cells of a tile along y
COLUMNS = 4  # and along x
BOXES = 64  # whose numbers of bins are read at once
BINS = 8  # that are read at once, each a row of channels
TILE = {"ROWS": ROWS, "COLUMNS": COLUMNS, "BOXES": BOXES, "BINS": BINS}
GEOMETRY = ["first_map", "maps", "first_row", "height", "width"]  # differ with each image: not worth a compilation


class Level(NamedTuple):
    """Maps of one size that follow each other in the table of cells."""

    first_map: int
    maps: int
    first_row: int
    height: int
    width: int


class Walk(NamedTuple):
    """Boxes ordered by map."""

    order: Tensor  # [P] int64, the box at each position
    starts: Tensor  # [maps + 1] int64, where the boxes of each map begin


class Strips(NamedTuple):
    """Which bins touch each strip of cells along one axis."""

    first: Tensor  # [strips, P] int32
    count: Tensor  # [strips, P] int32, 0 where none does
    weight: Tensor  # [P, bins, cells], of each cell in each bin; empty if bins have no weights


def levels(images: int, sizes: Sequence[int]) -> list[Level]:
    """List the levels of a table; neighbors of one size are one, since one launch serves them.

    Args:
        images: N.
        sizes: H_0, W_0, H_1, W_1, ...

    Returns:
        At most one a level.
    """
    found: list[Level] = []
    maps = rows = 0
    for height, width in zip(sizes[::2], sizes[1::2], strict=True):
        if found and (found[-1].height, found[-1].width) == (height, width):
            found[-1] = found[-1]._replace(maps=found[-1].maps + images)
        else:
            found.append(Level(maps, images, rows, height, width))
        maps, rows = maps + images, rows + images * height * width
    return found


def cells(images: int, sizes: Sequence[int]) -> int:
    """Count the rows of a table: T."""
    return images * sum(height * width for height, width in zip(sizes[::2], sizes[1::2], strict=True))


def accumulator(dtype: torch.dtype) -> tl.dtype:
    """Name what sums of this type are kept in: float32, or float64 for float64."""
    return tl.float64 if dtype == torch.float64 else tl.float32


def channel_block(channels: int, most: int, like: Tensor, rows: int = 1) -> tuple[int, int]:
    """Choose how many channels a program takes, and how many warps.

    Args:
        channels: C.
        most: the largest block, a power of two, of numbers of 4 bytes; of 8 bytes, half as many.
        like: gives the size of a number.
        rows: rows of channels that the program loads at once, a warp each at most where a row fills a warp.

    Returns:
        The block, a power of two, and the warps: one for each 512 bytes of a row, 16 for each of 32 threads.
    """
    block = min(triton.next_power_of_2(channels), most if like.element_size() <= 4 else most // 2)
    bytes_in_flight = block * like.element_size() * rows
    return block, max(1, min(4, bytes_in_flight // 512))


def launch(kernel: Any, grid: tuple[int, ...], tensor: Tensor, *operands: Any, **constants: Any) -> None:
    """Start a kernel on the device of its first operand.

    Args:
        kernel: a function compiled by Triton.
        grid: programs along each axis, none of them 0.
        tensor: the first operand.
        operands: all others.
        constants: of the compilation, and its options.
    """
    with torch.cuda.device_of(tensor):
        # fused multiply-adds are wanted, whatever a version of Triton takes for its default
        kernel[grid](tensor, *operands, **constants, enable_fp_fusion=True)


def walk(chosen: Tensor, maps: int) -> Walk:
    """Order boxes by map; within one they keep their order."""
    found, order = torch.sort(chosen, stable=True)
    return Walk(order, torch.searchsorted(found, torch.arange(maps + 1, device=chosen.device)))


def strips(order: Tensor, cell: Tensor, weight: Tensor | None, extent: int, width: int) -> Strips:
    """Tabulate which bins touch each strip of cells.

    Args:
        order: ``[P]`` int64, the box at each position.
        cell: ``[R, bins, T]`` int32 cells of each bin along the axis, -1 for none; all between the smallest and the largest
            are taken as touched.
        weight: ``[R, bins, T]`` of each of them; a bin names a cell once at most. None for bins without weights.
        extent: cells of the largest map.
        width: cells of a strip.

    Returns:
        The tables.
    """
    boxes, bins, most = cell.shape
    count = triton.cdiv(extent, width)
    tables = cell.new_empty((2, count, boxes))
    shape = (boxes, bins, count * width) if weight is not None else (0,)
    dense = torch.zeros(shape, dtype=torch.float32 if weight is None else weight.dtype, device=cell.device)
    block = min(128, triton.next_power_of_2(count))
    launch(
        _strips_kernel,
        (boxes, triton.cdiv(count, block)),
        *(cell, dense if weight is None else weight, order, *tables, dense, boxes, bins, most, count * width, count),
        WIDTH=width,
        MOST=triton.next_power_of_2(most),
        BLOCK=block,
        WEIGHTED=weight is not None,
        num_warps=1,
    )
    return Strips(tables[0], tables[1], dense)


@triton.jit(do_not_specialize=["boxes", "bins", "most", "extent", "count"])
def _strips_kernel(
    cell, weight, order, first_of, count_of, dense,
    boxes, bins, most, extent, count,
    WIDTH: tl.constexpr, MOST: tl.constexpr, BLOCK: tl.constexpr, WEIGHTED: tl.constexpr,
):  # fmt: skip
    """One program: one box, a block of strips."""
    position = tl.program_id(0).to(tl.int64)
    box = tl.load(order + position)
    strip = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    tap = tl.arange(0, MOST)
    first = tl.full([BLOCK], -1, tl.int32)
    last = tl.full([BLOCK], -2, tl.int32)
    for b in range(bins):
        at = (box * bins + b) * most + tap
        own = tl.load(cell + at, mask=tap < most, other=-1)
        if WEIGHTED and tl.program_id(1) == 0:
            value = tl.load(weight + at, mask=own >= 0, other=0.0)
            tl.store(dense + (position * bins + b) * extent + own, value, mask=own >= 0)
        low = tl.min(tl.where(own >= 0, own, 1 << 30), 0)
        high = tl.max(own, 0)
        touched = (low < (strip + 1) * WIDTH) & (high >= strip * WIDTH)
        first = tl.where(touched & (first < 0), b, first)
        last = tl.where(touched, b, last)
    at = strip.to(tl.int64) * boxes + position
    tl.store(first_of + at, first, mask=strip < count)
    tl.store(count_of + at, tl.where(first < 0, 0, last - first + 1), mask=strip < count)


@triton.jit
def bins_in_reach(y_count, x_count, begin, end, BOXES: tl.constexpr):
    """Read how many bins each of the next boxes has in a tile.

    Returns:
        ``[BOXES]`` int32, how many these and the boxes before them have, and the last of these.
    """
    at = begin + tl.arange(0, BOXES)
    rows = tl.load(y_count + at, mask=at < end, other=0)
    columns = tl.load(x_count + at, mask=at < end, other=0)
    until = tl.cumsum(rows * columns, 0)
    return until, tl.max(until, 0)


@triton.jit
def bins_of(nth, total, until, begin, y_first, x_first, x_count, BOXES: tl.constexpr):
    """Find the n-th bins that a tile is touched by, among the boxes that ``bins_in_reach`` has read.

    Returns:
        Position of the box (int64), row and column of the bin in it, each of the shape of ``nth``; of the first box and
        its first bin where there are not as many.
    """
    # the number of boxes whose bins all come earlier, and of their bins: both at once, since a reduction costs a barrier
    behind = until.to(tl.int64) * (2 * BOXES) + tl.arange(0, BOXES) + 1
    last = tl.max(tl.where(until[None, :] <= nth[:, None], behind[None, :], 0), 1)
    boxes, ahead = last % (2 * BOXES), last // (2 * BOXES)
    position = begin + tl.where(nth < total, boxes, 0)
    columns = tl.load(x_count + position, mask=nth < total, other=1)
    rest = tl.where(nth < total, nth - ahead.to(tl.int32), 0)
    row = tl.load(y_first + position, mask=nth < total, other=0) + rest // columns
    column = tl.load(x_first + position, mask=nth < total, other=0) + rest % columns
    return position, row, column

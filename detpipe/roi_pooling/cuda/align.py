"""RoIAlign and precise RoI pooling as Triton kernels that read the boxes themselves.

Forward: a program owns a row of bins of a box and a block of channels, whatever level the box is pooled from. Its transpose,
the gradient to the maps: a program owns a tile of cells and a block of channels, walks over the boxes in the order in which
they were given, and takes the bins of those that touch it a few at a time. The gradient to the boxes: a program owns a box.

Nothing is written twice, there are no atomics, every sum is taken in the same order each time, and nothing waits for the
device. Sums are float32, or float64 for float64 maps.

N images, L levels, R boxes, h x w bins, C channels, T cells of all maps.
"""

# ruff: noqa: RUF005 (tuples of tensors are added in Triton, not unpacked)
# ruff: noqa: RET505 (a return in a branch that is chosen by the compiler needs its else)
# Triton annotates its functions as they are on the host; compiled, its loops and tensors are something else.
# pyright: reportGeneralTypeIssues=false, reportArgumentType=false, reportOperatorIssue=false
# pyright: reportAttributeAccessIssue=false, reportIndexIssue=false, reportCallIssue=false

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from detpipe.roi_pooling import scene as scenes
from detpipe.roi_pooling.cuda.geometry import (
    VARYING,
    divide,
    find_tile,
    hits,
    launch_boxes,
    launch_tiles,
    load_columns,
    map_of,
    read_sides,
    store_cell,
    store_columns,
    store_map,
)
from detpipe.roi_pooling.scene import Scene

ADAPTIVE = tl.constexpr(scenes.ADAPTIVE)  # as many samples as a bin has cells, rounded up
PRECISE = tl.constexpr(scenes.PRECISE)  # no samples: the integral of the bilinear surface
TERMS = tl.constexpr(7)  # adaptive samples that may touch one cell: five, and two that rounding may put before them
SLACK = tl.constexpr(1 / 64)  # cells that rounding moves a sample by at most
FAR = tl.constexpr(1 << 20)  # cells; what lies beyond is there
TAPS = 2  # cells of a row that are on their way at once
ROWS, COLUMNS = 2, 4  # cells of a tile
BOXES = 64  # that a tile looks at at once
BINS = 8  # that a tile reads at once, each a row of channels


def pool(maps: Sequence[Tensor], scene: Scene) -> Tensor:
    """Pool L maps ``[N, H_l, W_l, C]``, contiguous and of one type: one launch for all levels.

    Returns:
        ``[R, h, w, C]`` in the type of the maps; 0 for a box that is not finite, or of no image.
    """
    out = maps[0].new_empty((scene.count, scene.h, scene.w, maps[0].shape[3]))
    if out.numel():
        kernel, constants = (
            (sample_kernel, {}) if scene.samples > 0 else (cell_kernel, {"TAPS": TAPS, **registers(80, out)})
        )
        launch_boxes(kernel, scene.count * scene.h, out, scene, out, tuple(maps), **constants)
    return out


def adjoint(grad: Tensor, scene: Scene) -> Tensor:
    """Apply the transpose of :func:`pool` to ``[R, h, w, C]``, contiguous: two launches, to ``[T, C]``, level by level."""
    constants = {"ROWS": ROWS, "COLUMNS": COLUMNS, "BOXES": BOXES, "BINS": BINS, **registers(128, grad)}
    return launch_tiles(adjoint_kernel, (prepare_kernel,), grad, scene, 4, rows=BINS, **constants)


def slopes(grad: Tensor, maps: Sequence[Tensor], scene: Scene) -> Tensor:
    """Compute the gradient to the boxes, as they were given, 0 for the index of an image: one launch."""
    out = torch.empty_like(scene.boxes, memory_format=torch.contiguous_format)
    if out.numel():
        launch_boxes(slopes_kernel, scene.count, grad, scene, out, grad, tuple(maps), loops=True, TAPS=TAPS)
    return out


def registers(most: int, like: Tensor) -> dict[str, int]:
    """Let a thread use that many registers, which ptxas otherwise saves on by spilling; numbers of 8 bytes take what they need."""
    return {"maxnreg": most} if like.element_size() <= 4 else {}


@triton.jit
def edges(low, high, scale, BINS: tl.constexpr, TASK: tl.constexpr):
    """Where the first bin along an axis begins, and the size of a bin, in the order of operations of the peers."""
    low, high = low * scale, high * scale
    if TASK.aligned:
        low, high = low - 0.5, high - 0.5
    length = high - low
    if TASK.samples >= 0 and not TASK.aligned:  # RoIAlign makes a box a cell long; NaN stays
        length = tl.where(length < 1.0, 1.0, length)
    return low, divide(length, length * 0 + BINS)


@triton.jit
def read_box(scene, r, exists, TASK: tl.constexpr):
    """Read box r, one number or many.

    Returns:
        Image, -1 where nothing is pooled, level, height and width of its map, start and size of bins along y and along x.
    """
    image, level, height, width, y_scale, x_scale, x1, y1, x2, y2 = read_sides(scene, r, exists, TASK)
    y_start, y_size = edges(y1, y2, y_scale, TASK.h, TASK)
    x_start, x_size = edges(x1, x2, x_scale, TASK.w, TASK)
    finite = (y_start - y_start == 0) & (y_size - y_size == 0) & (x_start - x_start == 0) & (x_size - x_size == 0)
    if TASK.samples <= 0:  # a box without area has no samples, and no integral
        finite = finite & (y_size > 0) & (x_size > 0)
    return tl.where(finite, image, -1), level, height, width, y_start, y_size, x_start, x_size


@triton.jit
def touched(start, size, BINS: tl.constexpr):
    """The first and the last cell that bins may read, on the map or not."""
    end = start + size * BINS
    low = tl.floor(tl.where(start < end, start, end) - SLACK)
    high = tl.floor(tl.where(start < end, end, start) + SLACK) + 1
    low = tl.where(low > -FAR, low, -FAR)
    high = tl.where(high < FAR, high, FAR)
    return tl.where(low < FAR, low, FAR).to(tl.int32), tl.where(high > -FAR, high, -FAR).to(tl.int32)


@triton.jit(do_not_specialize=VARYING)
def prepare_kernel(where, frame, scene, boxes_in_all, TASK: tl.constexpr, BLOCK: tl.constexpr):
    """One program: BLOCK boxes, one a lane."""
    r = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    exists = r < boxes_in_all
    image, level, _, _, y_start, y_size, x_start, x_size = read_box(scene, r, exists, TASK)
    y_first, y_last = touched(y_start, y_size, TASK.h)
    x_first, x_last = touched(x_start, x_size, TASK.w)
    store_map(where, r, exists, boxes_in_all, scene, image, level, y_first, y_last, x_first, x_last)
    store_columns(frame, r, exists, boxes_in_all, (y_start, y_size, x_start, x_size))


@triton.jit
def sample_point(start, size, bin, index, samples):
    """The coordinate of a sample of a bin, in the order of operations of the peers."""
    return start + bin * size + divide((index + 0.5) * size, size * 0 + samples)


@triton.jit
def hat(point, cell, extent):
    """The share of cells in samples at points: 0 more than a cell outside the map, else moved onto it."""
    inside = (point >= -1.0) & (point <= extent)
    point = tl.minimum(tl.maximum(point, 0.0), extent - 1.0)
    return tl.where(inside, tl.maximum(1.0 - tl.abs(point - cell), 0.0), 0.0)


@triton.jit
def slope(point, cell, extent):
    """The derivative of :func:`hat` to the right of a point; a point that is moved onto the map does not move on it."""
    past = point - cell
    rise = tl.where((past < -1.0) | (past >= 1.0), 0.0, tl.where(past < 0.0, 1.0, -1.0))
    return rise * tl.where((point < 0.0) | (point >= extent - 1.0), 0.0, 1.0)


@triton.jit
def hat_integral(past):
    """The integral of the hat of a cell up to a point that lies this far past it, up to a constant."""
    past = tl.minimum(tl.maximum(past, -1.0), 1.0)
    return past - past * tl.abs(past) * 0.5


@triton.jit
def first_sample(cell, start, size, bin, samples):
    """The first adaptive sample that can touch a cell; rounding may find one that is too early, never one too late."""
    ahead = cell - 1.0 - (start + bin * size)
    return tl.maximum(tl.floor(divide(ahead * samples, ahead * 0 + size) - 0.5), 0.0)


@triton.jit
def weight(cell, start, size, bin, extent, SAMPLES: tl.constexpr):
    """The weight of cells in bins along an axis; all are floating-point, and broadcast."""
    if SAMPLES == PRECISE:
        past = start + bin * size - cell
        return divide(hat_integral(past + size) - hat_integral(past), past * 0 + size)
    else:
        total = (start + size + bin + cell + extent) * 0.0
        if SAMPLES == ADAPTIVE:
            samples = tl.ceil(size)
            first = first_sample(cell, start, size, bin, samples)
            for k in range(TERMS):
                share = hat(sample_point(start, size, bin, first + k, samples), cell, extent)
                total += tl.where(first + k < samples, share, 0.0)
            return divide(total, total * 0 + samples)
        else:
            for k in tl.range(0, SAMPLES, loop_unroll_factor=4):
                total += hat(sample_point(start, size, bin, k, SAMPLES), cell, extent)
            return total * (1.0 / SAMPLES)


@triton.jit
def weight_slopes(cell, start, size, bin, extent, SAMPLES: tl.constexpr):
    """The weight of cells in bins along an axis, and its derivatives in start and size of the bins."""
    share = weight(cell, start, size, bin, extent, SAMPLES)
    if SAMPLES == PRECISE:
        past = start + bin * size - cell
        low = tl.maximum(1.0 - tl.abs(past), 0.0)
        high = tl.maximum(1.0 - tl.abs(past + size), 0.0)
        size = past * 0 + size
        return share, divide(high - low, size), divide((bin + 1.0) * high - bin * low - share, size)
    else:
        to_start = share * 0.0
        to_size = share * 0.0
        if SAMPLES == ADAPTIVE:
            samples = tl.ceil(size)
            first = first_sample(cell, start, size, bin, samples)
            for k in range(TERMS):
                rise = slope(sample_point(start, size, bin, first + k, samples), cell, extent)
                rise = tl.where(first + k < samples, rise, 0.0)
                to_start += rise
                to_size += rise * (bin + divide(first + k + 0.5, samples + first * 0))
            return share, divide(to_start, samples + to_start * 0), divide(to_size, samples + to_size * 0)
        else:
            for k in tl.range(0, SAMPLES, loop_unroll_factor=4):
                rise = slope(sample_point(start, size, bin, k, SAMPLES), cell, extent)
                to_start += rise
                to_size += rise * (bin + (k + 0.5) * (1.0 / SAMPLES))
            return share, to_start * (1.0 / SAMPLES), to_size * (1.0 / SAMPLES)


@triton.jit
def bin_cells(start, size, bin, extent, is_pooled):
    """The first cell that a bin may read, and the one behind the last."""
    low = start + bin * size
    high = low + size
    first = tl.floor(tl.minimum(tl.maximum(tl.minimum(low, high), 0.0), extent - 1.0))
    end = tl.floor(tl.minimum(tl.maximum(tl.maximum(low, high) + 2.0, 1.0), extent))
    first = tl.where(is_pooled, first, 0.0)  # before it is made a whole number: it may be no number
    return first.to(tl.int32), tl.where(is_pooled, end, 0.0).to(tl.int32)


@triton.jit
def neighbors(start, size, bin, sample, extent, SAMPLES: tl.constexpr):
    """The two cells along an axis that a sample lies between, its share in both, and whether it counts."""
    point = sample_point(start, size, bin, sample, SAMPLES)
    counts = (point >= -1.0) & (point <= extent)
    point = tl.where(counts, tl.minimum(tl.maximum(point, 0.0), extent - 1.0), 0.0)
    first = tl.floor(point)
    behind = point - first
    second = tl.minimum(first + 1.0, extent - 1.0)
    return first.to(tl.int32), second.to(tl.int32), 1.0 - behind, behind, counts


@triton.jit
def sample_kernel(out, maps, scene, channels, TASK: tl.constexpr, BLOCK: tl.constexpr):
    """One program: a row of bins of a box, a block of channels; a fixed number of samples."""
    line = tl.program_id(0).to(tl.int64)
    box = line // TASK.h
    i = line % TASK.h
    image, level, height, width, y_start, y_size, x_start, x_size = read_box(scene, box, box >= 0, TASK)
    c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    pooled = tl.where(image >= 0, channels, 0)
    origin = map_of(maps, level, image, height, width, channels, TASK) + c
    for j in range(TASK.w):
        total = tl.zeros([BLOCK], TASK.exact)
        for k in tl.range(0, TASK.samples * TASK.samples, loop_unroll_factor=4):
            top, bottom, above, below, y_counts = neighbors(
                y_start,
                y_size,
                tl.cast(i, TASK.exact),
                tl.cast(k // TASK.samples, TASK.exact),
                height.to(TASK.exact),
                TASK.samples,
            )
            left, right, before, behind, x_counts = neighbors(
                x_start,
                x_size,
                tl.cast(j, TASK.exact),
                tl.cast(k % TASK.samples, TASK.exact),
                width.to(TASK.exact),
                TASK.samples,
            )
            read = c < tl.where(y_counts & x_counts, pooled, 0)
            upper, lower = (
                origin + (top * width).to(tl.int64) * channels,
                origin + (bottom * width).to(tl.int64) * channels,
            )
            left, right = left.to(tl.int64) * channels, right.to(tl.int64) * channels
            total = tl.fma(above * before, tl.load(upper + left, mask=read, other=0.0).to(TASK.exact), total)
            total = tl.fma(above * behind, tl.load(upper + right, mask=read, other=0.0).to(TASK.exact), total)
            total = tl.fma(below * before, tl.load(lower + left, mask=read, other=0.0).to(TASK.exact), total)
            total = tl.fma(below * behind, tl.load(lower + right, mask=read, other=0.0).to(TASK.exact), total)
        total = total * (1.0 / (TASK.samples * TASK.samples))
        tl.store(out + (line * TASK.w + j) * channels + c, total.to(out.dtype.element_ty), mask=c < channels)


@triton.jit
def cell_kernel(out, maps, scene, channels, TASK: tl.constexpr, BLOCK: tl.constexpr, TAPS: tl.constexpr):
    """One program: a row of bins of a box, a block of channels; every cell of a bin is read once."""
    line = tl.program_id(0).to(tl.int64)
    box = line // TASK.h
    i = (line % TASK.h).to(TASK.exact)
    image, level, height, width, y_start, y_size, x_start, x_size = read_box(scene, box, box >= 0, TASK)
    c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    origin = map_of(maps, level, image, height, width, channels, TASK)
    y_extent, x_extent = height.to(TASK.exact), width.to(TASK.exact)
    y_first, y_end = bin_cells(y_start, y_size, i, y_extent, image >= 0)
    for j in range(TASK.w):
        bin = tl.cast(j, TASK.exact)
        x_first, x_end = bin_cells(x_start, x_size, bin, x_extent, image >= 0)
        total = tl.zeros([TAPS, BLOCK], TASK.exact)
        for begin in range(x_first, x_end, TAPS):
            x = begin + tl.arange(0, TAPS)
            x_share = tl.where(x < x_end, weight(x.to(TASK.exact), x_start, x_size, bin, x_extent, TASK.samples), 0.0)
            for y in range(y_first, y_end):
                share = x_share * weight(tl.cast(y, TASK.exact), y_start, y_size, i, y_extent, TASK.samples)
                at = (y * width + x).to(tl.int64) * channels
                read = (share != 0.0)[:, None] & (c < channels)[None, :]
                value = tl.load(origin + at[:, None] + c[None, :], mask=read, other=0.0).to(TASK.exact)
                total = tl.fma(share[:, None], value, total)
        pooled = tl.sum(total, 0).to(out.dtype.element_ty)
        tl.store(out + (line * TASK.w + j) * channels + c, pooled, mask=c < channels)


@triton.jit
def bins_near(start, size, first, CELLS: tl.constexpr, BINS: tl.constexpr):
    """The first of the bins along an axis that may read some cells, and the number of them; generous to rounding."""
    low = divide(first - 1.0 - SLACK - start, size) - SLACK
    high = divide(first + CELLS + SLACK - start, size) + SLACK
    low = tl.floor(tl.minimum(tl.maximum(low, 0.0), BINS * 1.0))
    high = tl.floor(tl.minimum(tl.maximum(high, -1.0), BINS - 1.0))
    is_ahead = size > 0.0  # a box that ends before it begins may read them with any bin
    low, high = tl.where(is_ahead, low, 0.0).to(tl.int32), tl.where(is_ahead, high, BINS - 1.0).to(tl.int32)
    return low, tl.maximum(high - low + 1, 0)


@triton.jit
def near_bins(frame, r, exists, boxes_in_all, top, left, ROWS: tl.constexpr, COLUMNS: tl.constexpr, TASK: tl.constexpr):
    """Start and size of bins along y and x of boxes, and the first bin near a tile and their number along y and x."""
    y_start, y_size, x_start, x_size = load_columns(frame, r, exists, boxes_in_all, 4)  # pyright: ignore
    y_bin, y_count = bins_near(y_start, y_size, top.to(TASK.exact), ROWS, TASK.h)
    x_bin, x_count = bins_near(x_start, x_size, left.to(TASK.exact), COLUMNS, TASK.w)
    return y_start, y_size, x_start, x_size, y_bin, y_count, x_bin, x_count


@triton.jit
def count_bins(
    frame, r, exists, boxes_in_all, top, left, ROWS: tl.constexpr, COLUMNS: tl.constexpr, TASK: tl.constexpr
):
    """How many bins of boxes are near a tile."""
    _, _, _, _, _, y_count, _, x_count = near_bins(frame, r, exists, boxes_in_all, top, left, ROWS, COLUMNS, TASK)
    return y_count * x_count


@triton.jit(do_not_specialize=VARYING)
def adjoint_kernel(
    out, grad, where, frame, scene, boxes_in_all, channels, TASK: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, BOXES: tl.constexpr, BINS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program: a tile of cells of a map, a block of channels."""
    own, first_cell, height, width, top, left = find_tile(tl.program_id(0), scene, ROWS, COLUMNS, TASK)
    c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    y_extent, x_extent = height.to(TASK.exact), width.to(TASK.exact)
    totals = ()  # one a cell of the tile, by nth bin and channel
    for _ in tl.static_range(ROWS * COLUMNS):
        totals = totals + (tl.zeros([BINS, BLOCK], TASK.exact),)
    for begin in range(0, boxes_in_all, BOXES):
        lane = tl.arange(0, BOXES)
        touches = hits(where, begin + lane, own, top, left, boxes_in_all, ROWS, COLUMNS)
        near = count_bins(frame, begin + lane, touches, boxes_in_all, top, left, ROWS, COLUMNS, TASK)
        until = tl.cumsum(tl.where(touches, near, 0), 0)
        total = tl.max(until, 0)
        # boxes whose bins all come earlier and the number of these bins: both at once, since a reduction costs a barrier
        earlier = until.to(tl.int64) * (2 * BOXES) + lane + 1
        for some in range(0, total, BINS):
            nth = some + tl.arange(0, BINS)
            exists = nth < total
            last = tl.max(tl.where(until[None, :] <= nth[:, None], earlier[None, :], 0), 1)
            box = begin + tl.where(exists, last % (2 * BOXES), 0)
            y_start, y_size, x_start, x_size, y_bin, _y_count, x_bin, x_count = near_bins(
                frame, box, exists, boxes_in_all, top, left, ROWS, COLUMNS, TASK
            )
            rest = tl.where(exists, nth - (last // (2 * BOXES)).to(tl.int32), 0)
            x_count = tl.maximum(x_count, 1)
            i, j = y_bin + rest // x_count, x_bin + rest % x_count
            row = ((box * TASK.h + i) * TASK.w + j) * channels
            value = tl.load(
                grad + row[:, None] + c[None, :], mask=exists[:, None] & (c < channels)[None, :], other=0.0
            ).to(TASK.exact)
            added = ()
            for cell in tl.static_range(ROWS * COLUMNS):  # column by column, so that few weights are kept
                y = (top + cell % ROWS).to(TASK.exact)
                x = (left + cell // ROWS).to(TASK.exact)
                share = weight(y, y_start, y_size, i.to(TASK.exact), y_extent, TASK.samples)
                share *= weight(x, x_start, x_size, j.to(TASK.exact), x_extent, TASK.samples)
                added = added + (tl.fma(share[:, None], value, totals[cell]),)
            totals = added
    for cell in tl.static_range(ROWS * COLUMNS):
        y, x = top + cell % ROWS, left + cell // ROWS
        store_cell(out, tl.sum(totals[cell], 0), y, x, first_cell, height, width, c, channels)


@triton.jit
def slopes_kernel(out, grad, maps, scene, channels, TASK: tl.constexpr, BLOCK: tl.constexpr, TAPS: tl.constexpr):
    """One program: one box."""
    box = tl.program_id(0).to(tl.int64)
    image, level, height, width, y_start, y_size, x_start, x_size = read_box(scene, box, box >= 0, TASK)
    origin = map_of(maps, level, image, height, width, channels, TASK)
    y_extent, x_extent = height.to(TASK.exact), width.to(TASK.exact)
    to_y_start = tl.zeros([TAPS, BLOCK], TASK.exact)
    to_y_size = tl.zeros([TAPS, BLOCK], TASK.exact)
    to_x_start = tl.zeros([TAPS, BLOCK], TASK.exact)
    to_x_size = tl.zeros([TAPS, BLOCK], TASK.exact)
    for bin in range(TASK.h * TASK.w):
        i, j = tl.cast(bin // TASK.w, TASK.exact), tl.cast(bin % TASK.w, TASK.exact)
        y_first, y_end = bin_cells(y_start, y_size, i, y_extent, image >= 0)
        x_first, x_end = bin_cells(x_start, x_size, j, x_extent, image >= 0)
        for begin in range(x_first, x_end, TAPS):
            x = begin + tl.arange(0, TAPS)
            x_share, x_to_start, x_to_size = weight_slopes(x.to(TASK.exact), x_start, x_size, j, x_extent, TASK.samples)
            x_reads = tl.where(x < x_end, tl.abs(x_share) + tl.abs(x_to_start), 0.0)
            for y in range(y_first, y_end):
                y_share, y_to_start, y_to_size = weight_slopes(
                    tl.cast(y, TASK.exact), y_start, y_size, i, y_extent, TASK.samples
                )
                reads = x_reads * (tl.abs(y_share) + tl.abs(y_to_start)) > 0.0
                at = (y * width + x).to(tl.int64) * channels
                for first in range(0, channels, BLOCK):
                    c = first + tl.arange(0, BLOCK)
                    vector = tl.load(
                        grad + (box * (TASK.h * TASK.w) + bin) * channels + c, mask=c < channels, other=0.0
                    ).to(TASK.exact)
                    value = tl.load(
                        origin + at[:, None] + c[None, :], mask=reads[:, None] & (c < channels)[None, :], other=0.0
                    ).to(TASK.exact)
                    value = value * vector[None, :]
                    to_y_start = tl.fma((y_to_start * x_share)[:, None], value, to_y_start)
                    to_y_size = tl.fma((y_to_size * x_share)[:, None], value, to_y_size)
                    to_x_start = tl.fma((y_share * x_to_start)[:, None], value, to_x_start)
                    to_x_size = tl.fma((y_share * x_to_size)[:, None], value, to_x_size)
    _, _, _, _, y_scale, x_scale, x1, y1, x2, y2 = read_sides(scene, box, box >= 0, TASK)
    to_y1, to_y2 = side_grads(y1, y2, y_scale, to_y_start, to_y_size, TASK.h, TASK)
    to_x1, to_x2 = side_grads(x1, x2, x_scale, to_x_start, to_x_size, TASK.w, TASK)
    out += box * (4 + (TASK.layout == "rows"))
    if TASK.layout == "rows":
        tl.store(out, 0.0)
        out += 1
    sides = (to_x1, to_y1, to_x2, to_y2)
    for k in tl.static_range(4):
        tl.store(out + k, sides[k].to(out.dtype.element_ty))


@triton.jit
def side_grads(low, high, scale, to_start, to_size, BINS: tl.constexpr, TASK: tl.constexpr):
    """The gradients to two sides from those to start and size of the bins between them."""
    to_start, to_size = tl.sum(tl.sum(to_start, 1), 0), tl.sum(tl.sum(to_size, 1), 0)
    if TASK.samples >= 0 and not TASK.aligned:  # a box that was made a cell long stays so
        to_size = tl.where(high * scale - low * scale < 1.0, 0.0, to_size)
    to_high = divide(to_size * scale, scale * 0 + BINS)
    return to_start * scale - to_high, to_high

"""Max pooling as Triton kernels, from boxes as they were given: one launch forward, two on the way back.

Forward, a program owns a row of bins and a block of channels. Back, one lane a box writes which cells it reads
(:func:`prepare_kernel`, 36 bytes a box); then a program owns a tile of cells and a block of channels, scans the boxes in the
order given, and adds up what the bins that touch the tile send to its cells. Nothing is written twice, there are no atomics,
and every sum is taken in the same order each time.

N images, L levels, R boxes, h x w bins, C channels, T cells of all maps.
"""

# Triton annotates its functions as they are on the host; compiled, its loops and tensors are something else.
# ruff: noqa: RET505 (a return in a branch that is chosen by the compiler needs its else)
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

EQUAL_STEP = tl.constexpr(scenes.EQUAL_STEP)
FARTHEST = tl.constexpr(float(1 << 30))  # cells; coordinates beyond are moved there
TAPS = 8  # cells of a bin that are on their way at once
ROWS, COLUMNS = 2, 4  # cells of a tile
BOXES = 64  # that are looked at at once
BINS = 4  # that are on their way at once, each a row of channels
FARTHEST_CELL = torch.iinfo(torch.int16).max  # that int16 can name


def pool(maps: Sequence[Tensor], scene: Scene, want_winner: bool) -> tuple[Tensor, Tensor]:
    """Take the largest cell of L maps ``[N, H_l, W_l, C]``, contiguous, in each bin: one launch.

    Returns:
        ``[R, h, w, C]``, 0 for an empty bin, NaN where a cell is NaN; and, if it is wanted, the winning cell ``y * W + x`` of
        the box's map as ``[R, h, w, C]``, int16 where that is enough, or int32. The first of equal cells wins, row by row; -1
        for an empty bin.
    """
    channels = maps[0].shape[3]
    out = maps[0].new_empty((scene.count, scene.h, scene.w, channels))
    most = max(height * width for height, width in scene.levels)
    dtype = torch.int16 if not want_winner or most <= FARTHEST_CELL else torch.int32
    winner = out.new_empty(out.shape if want_winner else (0,), dtype=dtype)
    if out.numel():
        constants = {"WINNER": want_winner, "TAPS": TAPS}
        launch_boxes(max_kernel, scene.count * scene.h, out, scene, out, winner, tuple(maps), **constants)
    return out, winner


def read_winners(maps: Sequence[Tensor], winner: Tensor, scene: Scene) -> Tensor:
    """Read the cells of such maps that won, ``[R, h, w, C]``, 0 where there is no winner: one launch."""
    out = maps[0].new_empty(winner.shape)
    if out.numel():
        launch_boxes(read_kernel, scene.count * scene.h, out, scene, out, winner, tuple(maps))
    return out


def adjoint(grad: Tensor, winner: Tensor, scene: Scene) -> Tensor:
    """Add up gradients ``[R, h, w, C]``, contiguous, at the cells that won: two launches.

    Returns:
        ``[T, C]`` in the dtype of ``grad``; accumulated in float32, or float64 for float64.
    """
    constants = {"ROWS": ROWS, "COLUMNS": COLUMNS, "BOXES": BOXES, "BINS": BINS}
    return launch_tiles(adjoint_kernel, (prepare_kernel,), grad, scene, 4, winner, **constants)


@triton.jit
def _round(edge):
    """Round halves away from zero, as C does."""
    whole = tl.where(edge < 0, tl.ceil(edge), tl.floor(edge))
    away = tl.where(edge < 0, -1.0, 1.0)
    return whole + tl.where(tl.abs(edge - whole) >= 0.5, away, 0.0)


@triton.jit
def _steps(low, high, scale, BINS: tl.constexpr, TASK: tl.constexpr):
    """The first cell of a box along an axis, the step between bins, and the cell behind its last, whole numbers but the step."""
    low, high = low * scale, high * scale
    low = tl.minimum(tl.maximum(low, -FARTHEST), FARTHEST)
    high = tl.minimum(tl.maximum(high, -FARTHEST), FARTHEST)
    if TASK.samples == EQUAL_STEP:
        low, high = tl.floor(low), tl.floor(high)
        length = tl.maximum(high.to(tl.int64) - low.to(tl.int64), 0)
        return low, (length // BINS).to(low.dtype), high
    else:
        low, high = _round(low), _round(high)
        length = tl.maximum(high.to(tl.int64) - low.to(tl.int64) + 1, 1).to(low.dtype)
        return low, divide(length, length * 0 + BINS), high


@triton.jit
def _bin_cells(first, step, end, bin, extent, BINS: tl.constexpr, TASK: tl.constexpr):
    """The first cell of a bin that is on the map, and the one behind its last, as int32."""
    if TASK.samples == EQUAL_STEP:
        begin = bin * step.to(tl.int64) + first.to(tl.int64)
        stop = tl.where(bin == BINS - 1, end.to(tl.int64), begin + step.to(tl.int64))
    else:
        at = (bin + first * 0).to(step.dtype)
        begin = tl.floor(at * step).to(tl.int64) + first.to(tl.int64)
        stop = tl.ceil((at + 1) * step).to(tl.int64) + first.to(tl.int64)
    begin = tl.minimum(tl.maximum(begin, 0), extent).to(tl.int32)
    return begin, tl.minimum(tl.maximum(stop, 0), extent).to(tl.int32)


@triton.jit
def _read_box(scene, r, exists, TASK: tl.constexpr):
    """Read box r, one number or many.

    Returns:
        Image, -1 where nothing is pooled, level, height and width of its map; first cell, step and end along y and along x.
    """
    image, level, height, width, y_scale, x_scale, x1, y1, x2, y2 = read_sides(scene, r, exists, TASK)
    number = (x1 == x1) & (y1 == y1) & (x2 == x2) & (y2 == y2)
    x1, y1 = tl.where(number, x1, 0.0), tl.where(number, y1, 0.0)
    x2, y2 = tl.where(number, x2, 0.0), tl.where(number, y2, 0.0)
    y_first, y_step, y_end = _steps(y1, y2, y_scale, TASK.h, TASK)
    x_first, x_step, x_end = _steps(x1, x2, x_scale, TASK.w, TASK)
    return tl.where(number, image, -1), level, height, width, y_first, y_step, y_end, x_first, x_step, x_end


@triton.jit
def max_kernel(
    out, winner_out, maps, scene, channels, TASK: tl.constexpr,
    WINNER: tl.constexpr, TAPS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program: a row of bins of a box, a block of channels."""
    line = tl.program_id(0).to(tl.int64)
    r = line // TASK.h
    c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    image, level, height, width, y_first, y_step, y_end, x_first, x_step, x_end = _read_box(scene, r, r >= 0, TASK)
    origin = map_of(maps, level, image, height, width, channels, TASK) + c
    y_begin, y_stop = _bin_cells(y_first, y_step, y_end, line % TASK.h, height, TASK.h, TASK)
    rows = tl.where(image >= 0, y_stop - y_begin, 0)
    for j in range(TASK.w):
        x_begin, x_stop = _bin_cells(x_first, x_step, x_end, j, width, TASK.w, TASK)
        columns = tl.maximum(x_stop - x_begin, 1)
        cells = tl.where(x_stop > x_begin, rows * columns, 0)
        best = tl.full([BLOCK], float("-inf"), TASK.exact)
        winner = tl.full([BLOCK], -1, tl.int32)
        for begin in range(0, cells, TAPS):
            for tap in tl.static_range(TAPS):
                nth = begin + tap
                cell = (y_begin + nth // columns) * width + x_begin + nth % columns
                exists = c < tl.where(nth < cells, channels, 0)
                value = tl.load(origin + cell.to(tl.int64) * channels, mask=exists, other=float("-inf")).to(TASK.exact)
                # a NaN beats all but a NaN; the first cell wins even if it is -inf
                wins = exists & ((value > best) | ((value != value) & (best == best)) | (winner < 0))
                best = tl.where(wins, value, best)
                winner = tl.where(wins, cell, winner)
        at = (line * TASK.w + j) * channels + c
        tl.store(out + at, tl.where(winner < 0, 0.0, best).to(out.dtype.element_ty), mask=c < channels)
        if WINNER:
            tl.store(winner_out + at, winner.to(winner_out.dtype.element_ty), mask=c < channels)


@triton.jit
def read_kernel(out, winner_of, maps, scene, channels, TASK: tl.constexpr, BLOCK: tl.constexpr):
    """One program: a row of bins of a box, a block of channels."""
    line = tl.program_id(0).to(tl.int64)
    r = line // TASK.h
    c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    image, level, height, width, _, _, _, _, _, _ = _read_box(scene, r, r >= 0, TASK)
    origin = map_of(maps, level, image, height, width, channels, TASK) + c
    for j in range(TASK.w):
        at = (line * TASK.w + j) * channels + c
        winner = tl.load(winner_of + at, mask=c < channels, other=-1).to(tl.int64)
        value = tl.load(origin + winner * channels, mask=winner >= 0, other=0.0)
        tl.store(out + at, value, mask=c < channels)


@triton.jit(do_not_specialize=VARYING)
def prepare_kernel(where, frame, scene, boxes_in_all, TASK: tl.constexpr, BLOCK: tl.constexpr):
    """One program: BLOCK boxes, one a lane."""
    r = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    exists = r < boxes_in_all
    image, level, height, width, y_first, y_step, y_end, x_first, x_step, x_end = _read_box(scene, r, exists, TASK)
    y_low, _ = _bin_cells(y_first, y_step, y_end, 0, height, TASK.h, TASK)
    _, y_high = _bin_cells(y_first, y_step, y_end, TASK.h - 1, height, TASK.h, TASK)
    x_low, _ = _bin_cells(x_first, x_step, x_end, 0, width, TASK.w, TASK)
    _, x_high = _bin_cells(x_first, x_step, x_end, TASK.w - 1, width, TASK.w, TASK)
    store_map(where, r, exists, boxes_in_all, scene, image, level, y_low, y_high - 1, x_low, x_high - 1)
    store_columns(frame, r, exists, boxes_in_all, (y_first, y_step, x_first, x_step))


@triton.jit(do_not_specialize=VARYING)
def adjoint_kernel(
    out, grad, winner_of, where, frame, scene, boxes_in_all, channels, TASK: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, BOXES: tl.constexpr, BINS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program: a tile of cells of a map, a block of channels."""
    own, first_cell, height, width, top, left = find_tile(tl.program_id(0), scene, ROWS, COLUMNS, TASK)
    c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    lane = tl.arange(0, BOXES)
    bin_row, bin_column = tl.arange(0, triton.next_power_of_2(TASK.h)), tl.arange(0, triton.next_power_of_2(TASK.w))
    corner = top * width + left
    totals = ()  # one a cell of the tile
    for _ in tl.static_range(ROWS * COLUMNS):
        totals = totals + (tl.zeros([BLOCK], TASK.exact),)  # noqa: RUF005
    for begin in range(0, boxes_in_all, BOXES):
        hit = hits(where, begin + lane, own, top, left, boxes_in_all, ROWS, COLUMNS)
        next = tl.min(tl.where(hit, lane, BOXES), 0)
        while next < BOXES:
            box = begin + next
            y_first, y_step, x_first, x_step = load_columns(frame, box, box >= 0, boxes_in_all, 4)  # pyright: ignore
            y_end, x_end = tl.load(where + 2 * boxes_in_all + box) + 1, tl.load(where + 4 * boxes_in_all + box) + 1
            y_begin, y_stop = _bin_cells(y_first, y_step, y_end, bin_row, height, TASK.h, TASK)
            x_begin, x_stop = _bin_cells(x_first, x_step, x_end, bin_column, width, TASK.w, TASK)
            touched = (y_begin < top + ROWS) & (y_stop > top) & (y_begin < y_stop) & (bin_row < TASK.h)
            first_i, last_i = tl.min(tl.where(touched, bin_row, TASK.h), 0), tl.max(tl.where(touched, bin_row, -1), 0)
            touched = (x_begin < left + COLUMNS) & (x_stop > left) & (x_begin < x_stop) & (bin_column < TASK.w)
            first_j, last_j = (
                tl.min(tl.where(touched, bin_column, TASK.w), 0),
                tl.max(tl.where(touched, bin_column, -1), 0),
            )
            columns = tl.maximum(last_j - first_j + 1, 1)
            count = tl.where(first_j <= last_j, (last_i - first_i + 1) * columns, 0)
            for some in range(0, count, BINS):
                winners, values = (), ()
                for k in tl.static_range(BINS):
                    i, j = first_i + (some + k) // columns, first_j + (some + k) % columns
                    entry = ((box.to(tl.int64) * TASK.h + i) * TASK.w + j) * channels + c
                    wanted = c < tl.where(some + k < count, channels, 0)
                    winners = winners + (tl.load(winner_of + entry, mask=wanted, other=-1),)  # noqa: RUF005
                    values = values + (tl.load(grad + entry, mask=wanted, other=0.0),)  # noqa: RUF005
                added = ()
                for cell in tl.static_range(ROWS * COLUMNS):
                    total, own_cell = totals[cell], corner + cell // COLUMNS * width + cell % COLUMNS
                    for k in tl.static_range(BINS):
                        total += tl.where(winners[k].to(tl.int32) == own_cell, values[k].to(TASK.exact), 0.0)
                    added = added + (total,)  # noqa: RUF005
                totals = added
            next = tl.min(tl.where(hit & (lane > next), lane, BOXES), 0)
    for cell in tl.static_range(ROWS * COLUMNS):
        y, x = top + cell // COLUMNS, left + cell % COLUMNS
        store_cell(out, totals[cell], y, x, first_cell, height, width, c, channels)

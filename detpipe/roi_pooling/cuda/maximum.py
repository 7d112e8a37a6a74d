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

from detpipe.roi_pooling.cuda.geometry import (
    BOXES_A_PROGRAM,
    VARYING,
    Scene,
    accumulator,
    channel_block,
    choose_level,
    divide,
    launch,
    map_scale,
    map_size,
    read_image,
)

FARTHEST = tl.constexpr(float(1 << 30))  # cells; coordinates beyond are moved there
TAPS = 8  # cells of a bin that are on their way at once
ROWS = 2  # cells of a tile along y
COLUMNS = 4  # and along x
BOXES = 64  # that are looked at at once
BINS = 4  # that are on their way at once, each a row of channels
FARTHEST_CELL = torch.iinfo(torch.int16).max  # that int16 can name


def winner_type(sizes: Sequence[int]) -> torch.dtype:
    """Choose what names a cell of the largest map: int16 where that is enough."""
    most = max(height * width for height, width in zip(sizes[::2], sizes[1::2], strict=True))
    return torch.int16 if most <= FARTHEST_CELL else torch.int32


def pool(
    maps: Sequence[Tensor], scene: Scene, size: tuple[int, int], equal_step: bool, normalized: bool, want_winner: bool
) -> tuple[Tensor, Tensor]:
    """Take the largest cell in each bin: one launch.

    Args:
        maps: L tensors ``[N, H_l, W_l, C]``, contiguous.
        scene: the boxes.
        size: h x w bins.
        equal_step: how boxes and bins are rounded to cells.
        normalized: the boxes are relative to the map.
        want_winner: say which cell it was.

    Returns:
        ``[R, h, w, C]``, 0 for an empty bin, NaN where a cell is NaN; and the winning cell ``y * W + x`` of the box's map as
        ``[R, h, w, C]``, int16 or int32, or an empty tensor. The first of equal cells wins, row by row; -1 for an empty bin.
    """
    channels = maps[0].shape[3]
    out = maps[0].new_empty((scene.count, *size, channels))
    winner = out.new_empty(out.shape if want_winner else (0,), dtype=winner_type(scene.sizes))
    if out.numel():
        block, warps = channel_block(channels, 256, out)
        launch(
            max_kernel,
            (scene.count * size[0], triton.cdiv(channels, block)),
            *(out, winner, tuple(maps), *scene.operands(), channels),
            **scene.constants(out.dtype, normalized),
            h=size[0],
            w=size[1],
            EQUAL_STEP=equal_step,
            WINNER=want_winner,
            TAPS=TAPS,
            BLOCK=block,
            num_warps=warps,
        )
    return out, winner


def read_winners(maps: Sequence[Tensor], winner: Tensor, scene: Scene, equal_step: bool, normalized: bool) -> Tensor:
    """Read the cells that won: one launch.

    Args:
        maps: L tensors ``[N, H_l, W_l, C]``, contiguous.
        winner: ``[R, h, w, C]``.
        scene: the boxes.
        equal_step: how boxes and bins are rounded to cells.
        normalized: the boxes are relative to the map.

    Returns:
        ``[R, h, w, C]``, 0 where there is no winner.
    """
    boxes, h, w, channels = winner.shape
    out = maps[0].new_empty(winner.shape)
    if out.numel():
        block, warps = channel_block(channels, 256, out)
        launch(
            read_kernel,
            (boxes * h, triton.cdiv(channels, block)),
            *(out, winner, tuple(maps), *scene.operands(), channels),
            **scene.constants(out.dtype, normalized),
            h=h,
            w=w,
            EQUAL_STEP=equal_step,
            BLOCK=block,
            num_warps=warps,
        )
    return out


def adjoint(grad: Tensor, winner: Tensor, scene: Scene, equal_step: bool, normalized: bool) -> Tensor:
    """Add up gradients at the cells that won: two launches.

    Args:
        grad: ``[R, h, w, C]``, contiguous.
        winner: ``[R, h, w, C]``, the cell ``y * W + x`` of the box's map, or -1.
        scene: the boxes.
        equal_step: how boxes and bins are rounded to cells.
        normalized: the boxes are relative to the map.

    Returns:
        ``[T, C]`` in the dtype of ``grad``; accumulated in float32, or float64 for float64.
    """
    boxes, h, w, channels = grad.shape
    levels = list(zip(scene.sizes[::2], scene.sizes[1::2], strict=True))
    cells = scene.images * sum(height * width for height, width in levels)
    out = grad.new_empty((cells, channels))
    if not out.numel():
        return out
    where = grad.new_empty((5, boxes), dtype=torch.int32)
    frame = grad.new_empty((4, boxes), dtype=torch.promote_types(grad.dtype, torch.float32))
    if boxes:
        launch(
            prepare_kernel,
            (triton.cdiv(boxes, BOXES_A_PROGRAM),),
            *(where, frame, *scene.operands(), boxes),
            **scene.constants(grad.dtype, normalized),
            h=h,
            w=w,
            EQUAL_STEP=equal_step,
            BLOCK=BOXES_A_PROGRAM,
        )
    tiles = scene.images * sum(triton.cdiv(height, ROWS) * triton.cdiv(width, COLUMNS) for height, width in levels)
    block, _ = channel_block(channels, 128, grad)
    launch(
        adjoint_kernel,
        (tiles, triton.cdiv(channels, block)),
        *(out, grad, winner, where, frame, scene.operands()[7], scene.images, boxes, channels),
        EXACT=accumulator(grad.dtype),
        LEVELS=len(levels),
        EQUAL_STEP=equal_step,
        h=h,
        w=w,
        ROWS=ROWS,
        COLUMNS=COLUMNS,
        BOXES=BOXES,
        BINS=BINS,
        BLOCK=block,
        num_warps=1,
    )
    return out


@triton.jit
def _round(edge):
    """Round halves away from zero, as C does."""
    whole = tl.where(edge < 0, tl.ceil(edge), tl.floor(edge))
    away = tl.where(edge < 0, -1.0, 1.0)
    return whole + tl.where(tl.abs(edge - whole) >= 0.5, away, 0.0)


@triton.jit
def _steps(low, high, scale, BINS: tl.constexpr, EQUAL_STEP: tl.constexpr):
    """The first cell of a box along an axis, the step between bins, and the cell behind its last, whole numbers but the step."""
    low, high = low * scale, high * scale
    low = tl.minimum(tl.maximum(low, -FARTHEST), FARTHEST)
    high = tl.minimum(tl.maximum(high, -FARTHEST), FARTHEST)
    if EQUAL_STEP:
        low, high = tl.floor(low), tl.floor(high)
        length = tl.maximum(high.to(tl.int64) - low.to(tl.int64), 0)
        return low, (length // BINS).to(low.dtype), high
    else:
        low, high = _round(low), _round(high)
        length = tl.maximum(high.to(tl.int64) - low.to(tl.int64) + 1, 1).to(low.dtype)
        return low, divide(length, length * 0 + BINS), high


@triton.jit
def _bin_cells(first, step, end, bin, extent, BINS: tl.constexpr, EQUAL_STEP: tl.constexpr):
    """The first cell of a bin that is on the map, and the one behind its last, as int32."""
    if EQUAL_STEP:
        begin = bin * step.to(tl.int64) + first.to(tl.int64)
        stop = tl.where(bin == BINS - 1, end.to(tl.int64), begin + step.to(tl.int64))
    else:
        at = (bin + first * 0).to(step.dtype)
        begin = tl.floor(at * step).to(tl.int64) + first.to(tl.int64)
        stop = tl.ceil((at + 1) * step).to(tl.int64) + first.to(tl.int64)
    begin = tl.minimum(tl.maximum(begin, 0), extent).to(tl.int32)
    return begin, tl.minimum(tl.maximum(stop, 0), extent).to(tl.int32)


@triton.jit
def _read_box(
    boxes, stride_box, stride_side, level_of, ends, per_image, images, sizes, scales, areas, r, exists,
    h: tl.constexpr, w: tl.constexpr, EQUAL_STEP: tl.constexpr,
    LEVELS: tl.constexpr, LAYOUT: tl.constexpr, LEVEL_GIVEN: tl.constexpr,
    NORMALIZED: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """Read box r, one number or many.

    Returns:
        Image, -1 where nothing is pooled, level, height and width of its map; first cell, step and end along y and along x.
    """
    image, at = read_image(boxes, stride_box, stride_side, ends, per_image, images, r, exists, LAYOUT)
    x1 = tl.load(at, mask=exists, other=0.0).to(EXACT)
    y1 = tl.load(at + stride_side, mask=exists, other=0.0).to(EXACT)
    x2 = tl.load(at + 2 * stride_side, mask=exists, other=0.0).to(EXACT)
    y2 = tl.load(at + 3 * stride_side, mask=exists, other=0.0).to(EXACT)
    if LEVEL_GIVEN:
        level = tl.load(level_of + r, mask=exists, other=0).to(tl.int32)
    else:
        level = choose_level((x2 - x1) * (y2 - y1), areas, LEVELS, EXACT)
    height, width = map_size(sizes, level, LEVELS)
    y_scale, x_scale = map_scale(scales, level, height, width, LEVELS, NORMALIZED, EXACT)
    number = (x1 == x1) & (y1 == y1) & (x2 == x2) & (y2 == y2)
    x1, y1 = tl.where(number, x1, 0.0), tl.where(number, y1, 0.0)
    x2, y2 = tl.where(number, x2, 0.0), tl.where(number, y2, 0.0)
    y_first, y_step, y_end = _steps(y1, y2, y_scale, h, EQUAL_STEP)
    x_first, x_step, x_end = _steps(x1, x2, x_scale, w, EQUAL_STEP)
    return tl.where(number, image, -1), level, height, width, y_first, y_step, y_end, x_first, x_step, x_end


@triton.jit
def map_of(maps, level, image, height, width, channels, LEVELS: tl.constexpr):
    """The address of a map's first cell."""
    first = maps[0]
    for k in tl.static_range(1, LEVELS):
        first = tl.where(level == k, maps[k], first)
    return first + image.to(tl.int64) * height * width * channels


@triton.jit(do_not_specialize=VARYING)
def max_kernel(
    out, winner_out, maps,
    boxes, stride_box, stride_side, level_of, ends, per_image, images, sizes, scales, areas, channels,
    h: tl.constexpr, w: tl.constexpr, EQUAL_STEP: tl.constexpr,
    LEVELS: tl.constexpr, LAYOUT: tl.constexpr, LEVEL_GIVEN: tl.constexpr,
    NORMALIZED: tl.constexpr, EXACT: tl.constexpr,
    WINNER: tl.constexpr, TAPS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program: a row of bins of a box, a block of channels."""
    line = tl.program_id(0).to(tl.int64)
    r = line // h
    c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    image, level, height, width, y_first, y_step, y_end, x_first, x_step, x_end = _read_box(
        boxes, stride_box, stride_side, level_of, ends, per_image, images, sizes, scales, areas, r, r >= 0,
        h, w, EQUAL_STEP, LEVELS, LAYOUT, LEVEL_GIVEN, NORMALIZED, EXACT,
    )  # fmt: skip
    origin = map_of(maps, level, image, height, width, channels, LEVELS) + c
    y_begin, y_stop = _bin_cells(y_first, y_step, y_end, line % h, height, h, EQUAL_STEP)
    rows = tl.where(image >= 0, y_stop - y_begin, 0)
    for j in range(w):
        x_begin, x_stop = _bin_cells(x_first, x_step, x_end, j, width, w, EQUAL_STEP)
        columns = tl.maximum(x_stop - x_begin, 1)
        cells = tl.where(x_stop > x_begin, rows * columns, 0)
        best = tl.full([BLOCK], float("-inf"), EXACT)
        winner = tl.full([BLOCK], -1, tl.int32)
        for begin in range(0, cells, TAPS):
            for tap in tl.static_range(TAPS):
                nth = begin + tap
                cell = (y_begin + nth // columns) * width + x_begin + nth % columns
                exists = c < tl.where(nth < cells, channels, 0)
                value = tl.load(origin + cell.to(tl.int64) * channels, mask=exists, other=float("-inf")).to(EXACT)
                # a NaN beats all but a NaN; the first cell wins even if it is -inf
                wins = exists & ((value > best) | ((value != value) & (best == best)) | (winner < 0))
                best = tl.where(wins, value, best)
                winner = tl.where(wins, cell, winner)
        at = (line * w + j) * channels + c
        tl.store(out + at, tl.where(winner < 0, 0.0, best).to(out.dtype.element_ty), mask=c < channels)
        if WINNER:
            tl.store(winner_out + at, winner.to(winner_out.dtype.element_ty), mask=c < channels)


@triton.jit(do_not_specialize=VARYING)
def read_kernel(
    out, winner_of, maps,
    boxes, stride_box, stride_side, level_of, ends, per_image, images, sizes, scales, areas, channels,
    h: tl.constexpr, w: tl.constexpr, EQUAL_STEP: tl.constexpr,
    LEVELS: tl.constexpr, LAYOUT: tl.constexpr, LEVEL_GIVEN: tl.constexpr,
    NORMALIZED: tl.constexpr, EXACT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program: a row of bins of a box, a block of channels."""
    line = tl.program_id(0).to(tl.int64)
    r = line // h
    c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    image, level, height, width, _, _, _, _, _, _ = _read_box(
        boxes, stride_box, stride_side, level_of, ends, per_image, images, sizes, scales, areas, r, r >= 0,
        h, w, EQUAL_STEP, LEVELS, LAYOUT, LEVEL_GIVEN, NORMALIZED, EXACT,
    )  # fmt: skip
    origin = map_of(maps, level, image, height, width, channels, LEVELS) + c
    for j in range(w):
        at = (line * w + j) * channels + c
        winner = tl.load(winner_of + at, mask=c < channels, other=-1).to(tl.int64)
        value = tl.load(origin + winner * channels, mask=winner >= 0, other=0.0)
        tl.store(out + at, value, mask=c < channels)


@triton.jit(do_not_specialize=[*VARYING, "boxes_in_all"])
def prepare_kernel(
    where, frame,
    boxes, stride_box, stride_side, level_of, ends, per_image, images, sizes, scales, areas, boxes_in_all,
    h: tl.constexpr, w: tl.constexpr, EQUAL_STEP: tl.constexpr,
    LEVELS: tl.constexpr, LAYOUT: tl.constexpr, LEVEL_GIVEN: tl.constexpr,
    NORMALIZED: tl.constexpr, EXACT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK boxes, one a lane."""
    r = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    exists = r < boxes_in_all
    image, level, height, width, y_first, y_step, y_end, x_first, x_step, x_end = _read_box(
        boxes, stride_box, stride_side, level_of, ends, per_image, images, sizes, scales, areas, r, exists,
        h, w, EQUAL_STEP, LEVELS, LAYOUT, LEVEL_GIVEN, NORMALIZED, EXACT,
    )  # fmt: skip
    y_low, _ = _bin_cells(y_first, y_step, y_end, 0, height, h, EQUAL_STEP)
    _, y_high = _bin_cells(y_first, y_step, y_end, h - 1, height, h, EQUAL_STEP)
    x_low, _ = _bin_cells(x_first, x_step, x_end, 0, width, w, EQUAL_STEP)
    _, x_high = _bin_cells(x_first, x_step, x_end, w - 1, width, w, EQUAL_STEP)
    tl.store(where + r, tl.where(image >= 0, level * images + image, -1), mask=exists)
    tl.store(where + boxes_in_all + r, y_low, mask=exists)
    tl.store(where + 2 * boxes_in_all + r, y_high, mask=exists)
    tl.store(where + 3 * boxes_in_all + r, x_low, mask=exists)
    tl.store(where + 4 * boxes_in_all + r, x_high, mask=exists)
    tl.store(frame + r, y_first, mask=exists)
    tl.store(frame + boxes_in_all + r, y_step, mask=exists)
    tl.store(frame + 2 * boxes_in_all + r, x_first, mask=exists)
    tl.store(frame + 3 * boxes_in_all + r, x_step, mask=exists)


@triton.jit
def tile_of(sizes, images, LEVELS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Map, first cell of the map among all, its height and width, and the upper left cell of the program's tile."""
    tile = tl.program_id(0)
    first_map = tile * 0
    first_cell = tile.to(tl.int64) * 0
    ahead_maps, ahead_tiles, ahead_cells = tile * 0, tile * 0, tile.to(tl.int64) * 0
    height, width = map_size(sizes, first_map, LEVELS)
    begin = tile * 0
    for k in tl.static_range(1, LEVELS):
        before_height, before_width = map_size(sizes, first_map * 0 + k - 1, LEVELS)
        ahead_tiles += images * ((before_height + ROWS - 1) // ROWS) * ((before_width + COLUMNS - 1) // COLUMNS)
        ahead_cells += images * before_height.to(tl.int64) * before_width
        ahead_maps += images
        own_height, own_width = map_size(sizes, first_map * 0 + k, LEVELS)
        later = tile >= ahead_tiles
        begin = tl.where(later, ahead_tiles, begin)
        first_cell = tl.where(later, ahead_cells, first_cell)
        first_map = tl.where(later, ahead_maps, first_map)
        height, width = tl.where(later, own_height, height), tl.where(later, own_width, width)
    columns = (width + COLUMNS - 1) // COLUMNS
    tiles = ((height + ROWS - 1) // ROWS) * columns
    image, tile = (tile - begin) // tiles, (tile - begin) % tiles
    first_cell += image.to(tl.int64) * height * width
    return first_map + image, first_cell, height, width, (tile // columns) * ROWS, (tile % columns) * COLUMNS


@triton.jit(do_not_specialize=["images", "boxes_in_all"])
def adjoint_kernel(
    out, grad, winner_of, where, frame, sizes, images, boxes_in_all, channels,
    EXACT: tl.constexpr, LEVELS: tl.constexpr, EQUAL_STEP: tl.constexpr, h: tl.constexpr, w: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, BOXES: tl.constexpr, BINS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program: a tile of cells of a map, a block of channels."""
    own, first_cell, height, width, top, left = tile_of(sizes, images, LEVELS, ROWS, COLUMNS)
    c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    lane = tl.arange(0, BOXES)
    bin_row, bin_column = tl.arange(0, triton.next_power_of_2(h)), tl.arange(0, triton.next_power_of_2(w))
    corner = top * width + left
    totals = ()  # one a cell of the tile
    for _ in tl.static_range(ROWS * COLUMNS):
        totals = totals + (tl.zeros([BLOCK], EXACT),)  # noqa: RUF005
    for begin in range(0, boxes_in_all, BOXES):
        r = begin + lane
        exists = r < boxes_in_all
        at = where + r
        hit = tl.load(at, mask=exists, other=-1) == own
        hit = hit & (tl.load(at + boxes_in_all, mask=exists, other=0) < top + ROWS)
        hit = hit & (tl.load(at + 2 * boxes_in_all, mask=exists, other=0) > top)
        hit = hit & (tl.load(at + 3 * boxes_in_all, mask=exists, other=0) < left + COLUMNS)
        hit = hit & (tl.load(at + 4 * boxes_in_all, mask=exists, other=0) > left)
        next = tl.min(tl.where(hit, lane, BOXES), 0)
        while next < BOXES:
            box = begin + next
            y_end, x_end = tl.load(where + 2 * boxes_in_all + box), tl.load(where + 4 * boxes_in_all + box)
            y_first, y_step = tl.load(frame + box), tl.load(frame + boxes_in_all + box)
            x_first, x_step = tl.load(frame + 2 * boxes_in_all + box), tl.load(frame + 3 * boxes_in_all + box)
            y_begin, y_stop = _bin_cells(y_first, y_step, y_end, bin_row, height, h, EQUAL_STEP)
            x_begin, x_stop = _bin_cells(x_first, x_step, x_end, bin_column, width, w, EQUAL_STEP)
            touched = (y_begin < top + ROWS) & (y_stop > top) & (y_begin < y_stop) & (bin_row < h)
            first_i, last_i = tl.min(tl.where(touched, bin_row, h), 0), tl.max(tl.where(touched, bin_row, -1), 0)
            touched = (x_begin < left + COLUMNS) & (x_stop > left) & (x_begin < x_stop) & (bin_column < w)
            first_j, last_j = tl.min(tl.where(touched, bin_column, w), 0), tl.max(tl.where(touched, bin_column, -1), 0)
            columns = tl.maximum(last_j - first_j + 1, 1)
            count = tl.where(first_j <= last_j, (last_i - first_i + 1) * columns, 0)
            for some in range(0, count, BINS):
                winners, values = (), ()
                for k in tl.static_range(BINS):
                    i, j = first_i + (some + k) // columns, first_j + (some + k) % columns
                    entry = ((box.to(tl.int64) * h + i) * w + j) * channels + c
                    wanted = c < tl.where(some + k < count, channels, 0)
                    winners = winners + (tl.load(winner_of + entry, mask=wanted, other=-1),)  # noqa: RUF005
                    values = values + (tl.load(grad + entry, mask=wanted, other=0.0),)  # noqa: RUF005
                added = ()
                for cell in tl.static_range(ROWS * COLUMNS):
                    total, own_cell = totals[cell], corner + cell // COLUMNS * width + cell % COLUMNS
                    for k in tl.static_range(BINS):
                        total += tl.where(winners[k].to(tl.int32) == own_cell, values[k].to(EXACT), 0.0)
                    added = added + (total,)  # noqa: RUF005
                totals = added
            next = tl.min(tl.where(hit & (lane > next), lane, BOXES), 0)
    for cell in tl.static_range(ROWS * COLUMNS):
        y, x = top + cell // COLUMNS, left + cell % COLUMNS
        exists = c < tl.where((y < height) & (x < width), channels, 0)
        at = out + (first_cell + y * width + x) * channels + c
        tl.store(at, totals[cell].to(out.dtype.element_ty), mask=exists)

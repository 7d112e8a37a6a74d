"""RoIAlign and precise RoI pooling as Triton kernels that read the boxes themselves.

Forward: a program owns a row of bins of a box and a block of channels, whatever level the box is pooled from. Its transpose,
the gradient to the maps: a program owns a tile of cells and a block of channels, walks over the boxes in the order in which
they were given, and takes the bins of those that touch it a few at a time. The gradient to the boxes: a program owns a box.

Nothing is written twice, there are no atomics, every sum is taken in the same order each time, and nothing waits for the
device. Sums are float32, or float64 for float64 maps.

N images, L levels, R boxes, h x w bins, C channels, T cells of all maps.
"""

# ruff: noqa: RUF005 (tuples of tensors are added in Triton, not unpacked)
# Triton annotates its functions as they are on the host; compiled, its loops and tensors are something else.
# pyright: reportGeneralTypeIssues=false, reportArgumentType=false, reportOperatorIssue=false
# pyright: reportAttributeAccessIssue=false, reportIndexIssue=false, reportCallIssue=false

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from detpipe.roi_pooling.cuda.geometry import (
    SLACK,
    VARYING,
    Scene,
    accumulator,
    channel_block,
    divide,
    launch,
    map_scale,
    map_size,
    prepare,
    read_box,
    read_image,
    sample_point,
    weight,
    weight_slopes,
)

TAPS = 2  # cells of a row that are on their way at once
ROWS, COLUMNS = 2, 4  # cells of a tile
BOXES = 64  # that a tile looks at at once
BINS = 8  # that a tile reads at once, each a row of channels


def pool(
    maps: Sequence[Tensor], scene: Scene, size: tuple[int, int], samples: int, aligned: bool, normalized: bool
) -> Tensor:
    """Pool: one launch for all levels.

    Args:
        maps: L maps ``[N, C, H_l, W_l]``, channels last, of one type.
        scene: the boxes.
        size: h x w bins.
        samples: along each axis of a bin, or ``ADAPTIVE`` or ``PRECISE``.
        aligned: shift by half a cell.
        normalized: the boxes are relative to the map.

    Returns:
        ``[R, h, w, C]`` in the type of the maps; 0 for a box that is not finite, or of no image.
    """
    channels = maps[0].shape[1]
    out = maps[0].new_empty((scene.count, *size, channels))
    if out.numel():
        block, warps = channel_block(channels, 256, out)
        launch(
            sample_kernel if samples > 0 else cell_kernel,
            (scene.count * size[0], triton.cdiv(channels, block)),
            *(*scene.operands(), tuple(maps), out, channels),
            **scene.constants(out.dtype, normalized),
            h=size[0],
            w=size[1],
            SAMPLES=samples,
            ALIGNED=aligned,
            BLOCK=block,
            num_warps=warps,
            **({} if samples > 0 else {"TAPS": TAPS, **registers(80, out)}),
        )
    return out


def pool_adjoint(grad: Tensor, scene: Scene, samples: int, aligned: bool, normalized: bool) -> Tensor:
    """Apply the transpose of :func:`pool`, the gradient to the maps: two launches.

    Args:
        grad: ``[R, h, w, C]``, contiguous.
        scene: the boxes.
        samples: as in :func:`pool`, like everything that follows.
        aligned: shift by half a cell.
        normalized: the boxes are relative to the map.

    Returns:
        ``[T, C]``: the maps, level by level, each ``[N, H_l, W_l, C]``.
    """
    _, h, w, channels = grad.shape
    sizes = list(zip(scene.sizes[::2], scene.sizes[1::2], strict=True))
    out = grad.new_empty((scene.images * sum(height * width for height, width in sizes), channels))
    if not grad.numel() or not out.numel():
        return out.zero_()
    where, frame = prepare(scene, grad.dtype, (h, w), samples, aligned, normalized)
    block, _ = channel_block(channels, 128, grad)
    tiles = scene.images * sum(triton.cdiv(height, ROWS) * triton.cdiv(width, COLUMNS) for height, width in sizes)
    launch(
        adjoint_kernel,
        (tiles, triton.cdiv(channels, block)),
        *(grad, where, frame, out, tuple(map(float, scene.sizes)), scene.images, scene.count, channels),
        h=h,
        w=w,
        SAMPLES=samples,
        LEVELS=len(sizes),
        EXACT=accumulator(grad.dtype),
        ROWS=ROWS,
        COLUMNS=COLUMNS,
        BOXES=BOXES,
        BINS=BINS,
        BLOCK=block,
        num_warps=max(1, block * BINS // 128),  # a warp each row, where a row fills it
        **registers(128, grad),
    )
    return out


def box_grad(
    grad: Tensor, maps: Sequence[Tensor], scene: Scene, samples: int, aligned: bool, normalized: bool
) -> Tensor:
    """Compute the gradient of :func:`pool` to the boxes: one launch.

    Args:
        grad: ``[R, h, w, C]``, contiguous.
        maps: as in :func:`pool`, like everything that follows.
        scene: the boxes.
        samples: along each axis of a bin, or ``ADAPTIVE`` or ``PRECISE``.
        aligned: shift by half a cell.
        normalized: the boxes are relative to the map.

    Returns:
        As the boxes were given, 0 for the index of an image.
    """
    _, h, w, channels = grad.shape
    out = torch.empty_like(scene.boxes, memory_format=torch.contiguous_format)
    if not out.numel():
        return out
    block, warps = channel_block(channels, 256, grad)
    launch(
        box_grad_kernel,
        (scene.count,),
        *(*scene.operands(), grad, tuple(maps), out, channels),
        **scene.constants(grad.dtype, normalized),
        h=h,
        w=w,
        SAMPLES=samples,
        ALIGNED=aligned,
        BLOCK=block,
        TAPS=TAPS,
        num_warps=warps,
    )
    return out


def registers(most: int, like: Tensor) -> dict[str, int]:
    """Let a thread use that many registers, which ptxas otherwise saves on by spilling; numbers of 8 bytes take what they need."""
    return {"maxnreg": most} if like.element_size() <= 4 else {}


@triton.jit
def map_of(maps, level, LEVELS: tl.constexpr):
    """The address of the maps of a level."""
    found = maps[0]
    for k in tl.static_range(1, LEVELS):
        found = tl.where(level == k, maps[k], found)
    return found


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


@triton.jit(do_not_specialize=VARYING)
def sample_kernel(
    boxes, stride_box, stride_side, level_of, ends, per_image, images, sizes, scales, areas, maps, out, channels,
    h: tl.constexpr, w: tl.constexpr, SAMPLES: tl.constexpr, ALIGNED: tl.constexpr,
    LEVELS: tl.constexpr, LAYOUT: tl.constexpr, LEVEL_GIVEN: tl.constexpr,
    NORMALIZED: tl.constexpr, EXACT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program: a row of bins of a box, a block of channels; a fixed number of samples."""
    line = tl.program_id(0).to(tl.int64)
    box = line // h
    i = line % h
    image, level, height, width, y_start, y_size, x_start, x_size = read_box(
        boxes, stride_box, stride_side, level_of, ends, per_image, images, sizes, scales, areas, box, box >= 0,
        h, w, SAMPLES, ALIGNED, LEVELS, LAYOUT, LEVEL_GIVEN, NORMALIZED, EXACT,
    )  # fmt: skip
    c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    pooled = tl.where(image >= 0, channels, 0)
    origin = map_of(maps, level, LEVELS) + image.to(tl.int64) * height * width * channels + c
    for j in range(w):
        total = tl.zeros([BLOCK], EXACT)
        for k in tl.range(0, SAMPLES * SAMPLES, loop_unroll_factor=4):
            top, bottom, above, below, y_counts = neighbors(
                y_start, y_size, tl.cast(i, EXACT), tl.cast(k // SAMPLES, EXACT), height.to(EXACT), SAMPLES
            )
            left, right, before, behind, x_counts = neighbors(
                x_start, x_size, tl.cast(j, EXACT), tl.cast(k % SAMPLES, EXACT), width.to(EXACT), SAMPLES
            )
            read = c < tl.where(y_counts & x_counts, pooled, 0)
            upper, lower = (
                origin + (top * width).to(tl.int64) * channels,
                origin + (bottom * width).to(tl.int64) * channels,
            )
            left, right = left.to(tl.int64) * channels, right.to(tl.int64) * channels
            total = tl.fma(above * before, tl.load(upper + left, mask=read, other=0.0).to(EXACT), total)
            total = tl.fma(above * behind, tl.load(upper + right, mask=read, other=0.0).to(EXACT), total)
            total = tl.fma(below * before, tl.load(lower + left, mask=read, other=0.0).to(EXACT), total)
            total = tl.fma(below * behind, tl.load(lower + right, mask=read, other=0.0).to(EXACT), total)
        total = total * (1.0 / (SAMPLES * SAMPLES))
        tl.store(out + (line * w + j) * channels + c, total.to(out.dtype.element_ty), mask=c < channels)


@triton.jit(do_not_specialize=VARYING)
def cell_kernel(
    boxes, stride_box, stride_side, level_of, ends, per_image, images, sizes, scales, areas, maps, out, channels,
    h: tl.constexpr, w: tl.constexpr, SAMPLES: tl.constexpr, ALIGNED: tl.constexpr,
    LEVELS: tl.constexpr, LAYOUT: tl.constexpr, LEVEL_GIVEN: tl.constexpr,
    NORMALIZED: tl.constexpr, EXACT: tl.constexpr, BLOCK: tl.constexpr, TAPS: tl.constexpr,
):  # fmt: skip
    """One program: a row of bins of a box, a block of channels; every cell of a bin is read once."""
    line = tl.program_id(0).to(tl.int64)
    box = line // h
    i = (line % h).to(EXACT)
    image, level, height, width, y_start, y_size, x_start, x_size = read_box(
        boxes, stride_box, stride_side, level_of, ends, per_image, images, sizes, scales, areas, box, box >= 0,
        h, w, SAMPLES, ALIGNED, LEVELS, LAYOUT, LEVEL_GIVEN, NORMALIZED, EXACT,
    )  # fmt: skip
    c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    origin = map_of(maps, level, LEVELS) + image.to(tl.int64) * height * width * channels
    y_extent, x_extent = height.to(EXACT), width.to(EXACT)
    y_first, y_end = bin_cells(y_start, y_size, i, y_extent, image >= 0)
    for j in range(w):
        bin = tl.cast(j, EXACT)
        x_first, x_end = bin_cells(x_start, x_size, bin, x_extent, image >= 0)
        total = tl.zeros([TAPS, BLOCK], EXACT)
        for begin in range(x_first, x_end, TAPS):
            x = begin + tl.arange(0, TAPS)
            x_share = tl.where(x < x_end, weight(x.to(EXACT), x_start, x_size, bin, x_extent, SAMPLES), 0.0)
            for y in range(y_first, y_end):
                share = x_share * weight(tl.cast(y, EXACT), y_start, y_size, i, y_extent, SAMPLES)
                at = (y * width + x).to(tl.int64) * channels
                read = (share != 0.0)[:, None] & (c < channels)[None, :]
                value = tl.load(origin + at[:, None] + c[None, :], mask=read, other=0.0).to(EXACT)
                total = tl.fma(share[:, None], value, total)
        pooled = tl.sum(total, 0).to(out.dtype.element_ty)
        tl.store(out + (line * w + j) * channels + c, pooled, mask=c < channels)


@triton.jit
def find_tile(tile, sizes, images, ROWS: tl.constexpr, COLUMNS: tl.constexpr, LEVELS: tl.constexpr):
    """The level of a tile, its image, its first row and column, height and width of its map, and the first cell of that."""
    level = tile * 0
    height, width = map_size(sizes, level, LEVELS)
    first = level.to(tl.int64)
    for k in tl.static_range(1, LEVELS):
        tiles = images * tl.cdiv(height, ROWS) * tl.cdiv(width, COLUMNS)
        is_beyond = (level == k - 1) & (tile >= tiles)
        first += tl.where(is_beyond, images.to(tl.int64) * height * width, 0)
        tile = tl.where(is_beyond, tile - tiles, tile)
        level = tl.where(is_beyond, k, level)
        height, width = map_size(sizes, level, LEVELS)
    columns = tl.cdiv(width, COLUMNS)
    each = tl.cdiv(height, ROWS) * columns
    image, tile = tile // each, tile % each
    first += image.to(tl.int64) * height * width
    return level, image, tile // columns * ROWS, tile % columns * COLUMNS, height, width, first


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
def near_bins(frame, position, exists, boxes_in_all, top, left, EXACT: tl.constexpr,
              h: tl.constexpr, w: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):  # fmt: skip
    """Start and size of bins along y and x of boxes, and the first bin near a tile and their number along y and x."""
    y_start = tl.load(frame + position, mask=exists, other=0.0)
    y_size = tl.load(frame + boxes_in_all + position, mask=exists, other=1.0)
    x_start = tl.load(frame + 2 * boxes_in_all + position, mask=exists, other=0.0)
    x_size = tl.load(frame + 3 * boxes_in_all + position, mask=exists, other=1.0)
    y_bin, y_count = bins_near(y_start, y_size, top.to(EXACT), ROWS, h)
    x_bin, x_count = bins_near(x_start, x_size, left.to(EXACT), COLUMNS, w)
    return y_start, y_size, x_start, x_size, y_bin, y_count, x_bin, x_count


@triton.jit
def count_bins(frame, position, exists, boxes_in_all, top, left, EXACT: tl.constexpr,
               h: tl.constexpr, w: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):  # fmt: skip
    """How many bins of boxes are near a tile."""
    _, _, _, _, _, y_count, _, x_count = near_bins(
        frame, position, exists, boxes_in_all, top, left, EXACT, h, w, ROWS, COLUMNS
    )
    return y_count * x_count


@triton.jit(do_not_specialize=["images", "boxes_in_all"])
def adjoint_kernel(
    grad, where, frame, out, sizes, images, boxes_in_all, channels,
    h: tl.constexpr, w: tl.constexpr, SAMPLES: tl.constexpr, LEVELS: tl.constexpr, EXACT: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, BOXES: tl.constexpr, BINS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program: a tile of cells of a map, a block of channels."""
    level, image, top, left, height, width, first_cell = find_tile(
        tl.program_id(0), sizes, images, ROWS, COLUMNS, LEVELS
    )
    c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    y_extent, x_extent = height.to(EXACT), width.to(EXACT)
    totals = ()  # one a cell of the tile, by nth bin and channel
    for _ in tl.static_range(ROWS * COLUMNS):
        totals = totals + (tl.zeros([BINS, BLOCK], EXACT),)
    for begin in range(0, boxes_in_all, BOXES):
        lane = tl.arange(0, BOXES)
        at = where + begin + lane
        touches = tl.load(at, mask=begin + lane < boxes_in_all, other=-1) == level * images + image
        touches &= tl.load(at + boxes_in_all, mask=touches, other=top + ROWS) < top + ROWS
        touches &= tl.load(at + 2 * boxes_in_all, mask=touches, other=-1) >= top
        touches &= tl.load(at + 3 * boxes_in_all, mask=touches, other=left + COLUMNS) < left + COLUMNS
        touches &= tl.load(at + 4 * boxes_in_all, mask=touches, other=-1) >= left
        near = count_bins(frame, begin + lane, touches, boxes_in_all, top, left, EXACT, h, w, ROWS, COLUMNS)
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
                frame, box, exists, boxes_in_all, top, left, EXACT, h, w, ROWS, COLUMNS
            )
            rest = tl.where(exists, nth - (last // (2 * BOXES)).to(tl.int32), 0)
            x_count = tl.maximum(x_count, 1)
            i, j = y_bin + rest // x_count, x_bin + rest % x_count
            row = ((box * h + i) * w + j) * channels
            value = tl.load(
                grad + row[:, None] + c[None, :], mask=exists[:, None] & (c < channels)[None, :], other=0.0
            ).to(EXACT)
            added = ()
            for cell in tl.static_range(ROWS * COLUMNS):  # column by column, so that few weights are kept
                y = (top + cell % ROWS).to(EXACT)
                x = (left + cell // ROWS).to(EXACT)
                share = weight(y, y_start, y_size, i.to(EXACT), y_extent, SAMPLES)
                share *= weight(x, x_start, x_size, j.to(EXACT), x_extent, SAMPLES)
                added = added + (tl.fma(share[:, None], value, totals[cell]),)
            totals = added
    for cell in tl.static_range(ROWS * COLUMNS):
        y, x = top + cell % ROWS, left + cell // ROWS
        at = out + (first_cell + y * width + x) * channels + c
        exists = c < tl.where((y < height) & (x < width), channels, 0)
        tl.store(at, tl.sum(totals[cell], 0).to(out.dtype.element_ty), mask=exists)


@triton.jit(do_not_specialize=VARYING)
def box_grad_kernel(
    boxes, stride_box, stride_side, level_of, ends, per_image, images, sizes, scales, areas, grad, maps, out, channels,
    h: tl.constexpr, w: tl.constexpr, SAMPLES: tl.constexpr, ALIGNED: tl.constexpr,
    LEVELS: tl.constexpr, LAYOUT: tl.constexpr, LEVEL_GIVEN: tl.constexpr,
    NORMALIZED: tl.constexpr, EXACT: tl.constexpr, BLOCK: tl.constexpr, TAPS: tl.constexpr,
):  # fmt: skip
    """One program: one box."""
    box = tl.program_id(0).to(tl.int64)
    image, level, height, width, y_start, y_size, x_start, x_size = read_box(
        boxes, stride_box, stride_side, level_of, ends, per_image, images, sizes, scales, areas, box, box >= 0,
        h, w, SAMPLES, ALIGNED, LEVELS, LAYOUT, LEVEL_GIVEN, NORMALIZED, EXACT,
    )  # fmt: skip
    origin = map_of(maps, level, LEVELS) + image.to(tl.int64) * height * width * channels
    y_extent, x_extent = height.to(EXACT), width.to(EXACT)
    to_y_start = tl.zeros([TAPS, BLOCK], EXACT)
    to_y_size = tl.zeros([TAPS, BLOCK], EXACT)
    to_x_start = tl.zeros([TAPS, BLOCK], EXACT)
    to_x_size = tl.zeros([TAPS, BLOCK], EXACT)
    for bin in range(h * w):
        i, j = tl.cast(bin // w, EXACT), tl.cast(bin % w, EXACT)
        y_first, y_end = bin_cells(y_start, y_size, i, y_extent, image >= 0)
        x_first, x_end = bin_cells(x_start, x_size, j, x_extent, image >= 0)
        for begin in range(x_first, x_end, TAPS):
            x = begin + tl.arange(0, TAPS)
            x_share, x_to_start, x_to_size = weight_slopes(x.to(EXACT), x_start, x_size, j, x_extent, SAMPLES)
            x_reads = tl.where(x < x_end, tl.abs(x_share) + tl.abs(x_to_start), 0.0)
            for y in range(y_first, y_end):
                y_share, y_to_start, y_to_size = weight_slopes(tl.cast(y, EXACT), y_start, y_size, i, y_extent, SAMPLES)
                reads = x_reads * (tl.abs(y_share) + tl.abs(y_to_start)) > 0.0
                at = (y * width + x).to(tl.int64) * channels
                for first in range(0, channels, BLOCK):
                    c = first + tl.arange(0, BLOCK)
                    vector = tl.load(grad + (box * (h * w) + bin) * channels + c, mask=c < channels, other=0.0).to(
                        EXACT
                    )
                    value = tl.load(
                        origin + at[:, None] + c[None, :], mask=reads[:, None] & (c < channels)[None, :], other=0.0
                    ).to(EXACT)
                    value = value * vector[None, :]
                    to_y_start = tl.fma((y_to_start * x_share)[:, None], value, to_y_start)
                    to_y_size = tl.fma((y_to_size * x_share)[:, None], value, to_y_size)
                    to_x_start = tl.fma((y_share * x_to_start)[:, None], value, to_x_start)
                    to_x_size = tl.fma((y_share * x_to_size)[:, None], value, to_x_size)
    y_scale, x_scale = map_scale(scales, level, height, width, LEVELS, NORMALIZED, EXACT)
    _, at = read_image(boxes, stride_box, stride_side, ends, per_image, images, box, box >= 0, LAYOUT)
    y1, y2 = side_grads(
        at + stride_side, at + 3 * stride_side, y_scale, to_y_start, to_y_size, h, SAMPLES, ALIGNED, EXACT
    )
    x1, x2 = side_grads(at, at + 2 * stride_side, x_scale, to_x_start, to_x_size, w, SAMPLES, ALIGNED, EXACT)
    out += box * (4 + (LAYOUT == "rows"))
    if LAYOUT == "rows":
        tl.store(out, (y1 * 0.0).to(out.dtype.element_ty))
        out += 1
    tl.store(out, x1.to(out.dtype.element_ty))
    tl.store(out + 1, y1.to(out.dtype.element_ty))
    tl.store(out + 2, x2.to(out.dtype.element_ty))
    tl.store(out + 3, y2.to(out.dtype.element_ty))


@triton.jit
def side_grads(low, high, scale, to_start, to_size, BINS: tl.constexpr,
               SAMPLES: tl.constexpr, ALIGNED: tl.constexpr, EXACT: tl.constexpr):  # fmt: skip
    """The gradients to two sides from those to start and size of the bins between them."""
    to_start, to_size = tl.sum(tl.sum(to_start, 1), 0), tl.sum(tl.sum(to_size, 1), 0)
    if SAMPLES >= 0 and not ALIGNED:  # a box that was made a cell long stays so
        length = tl.load(high).to(EXACT) * scale - tl.load(low).to(EXACT) * scale
        to_size = tl.where(length < 1.0, 0.0, to_size)
    to_high = divide(to_size * scale, scale * 0 + BINS)
    return to_start * scale - to_high, to_high

"""Bilinear samples at free points and in rotated boxes as Triton kernels, from boxes as they were given.

A box has samples in rows and columns. Those of a rotated box lie on its turned grid, and which of them can lie on a part of
the map is known; free points are a row a bin. Forward, a program owns a row of bins and a block of channels. Back,
:func:`prepare_kernel` writes which cells a box reads (52 bytes); then a program owns a tile of cells and a block of channels,
and scans the boxes in the order given. Nothing is written twice, there are no atomics, and every sum is taken in the same
order each time. The gradients to boxes and points are one more launch.

N images, L levels, R boxes, h x w bins, S samples a bin, C channels, T cells of all maps.
"""

# Triton annotates its functions as they are on the host; compiled, its loops and tensors are something else.
# ruff: noqa: RET505 (a return in a branch that is chosen by the compiler needs its else)
# pyright: reportGeneralTypeIssues=false, reportArgumentType=false, reportOperatorIssue=false
# pyright: reportAttributeAccessIssue=false, reportIndexIssue=false, reportCallIssue=false

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from detpipe.roi_pooling.cuda.geometry import (
    FAR,
    RADIAN,
    VARYING,
    Scene,
    channel_block,
    choose_level,
    divide,
    hits,
    launch,
    map_scale,
    map_size,
    read_image,
    span,
    turn,
)
from detpipe.roi_pooling.cuda.maximum import map_of, tile_of

ROWS = 2  # cells of a tile along y
COLUMNS = 4  # and along x
BOXES = 64  # that are looked at at once
LANES = 32  # samples that are looked at at once
MOST_SAMPLES = tl.constexpr(
    float(1 << 30)
)  # of a bin along one axis: what lies on the map is then a vanishing part of it


def pool(
    maps: Sequence[Tensor], points: Tensor | None, scene: Scene, size: tuple[int, int], samples: int, normalized: bool
) -> Tensor:
    """Average bilinear samples: one launch.

    Args:
        maps: L tensors ``[N, H_l, W_l, C]``, contiguous.
        points: ``[R, h, w, S, 2]`` (x, y) in the boxes' unit, contiguous; None for rotated boxes.
        scene: the boxes, rotated ones if there are no points.
        size: h x w bins.
        samples: S, or of rotated boxes those along each axis of a bin, 0 for as many as it has cells.
        normalized: the boxes are relative to the map.

    Returns:
        ``[R, h, w, C]``.
    """
    channels = maps[0].shape[3]
    out = maps[0].new_empty((scene.count, *size, channels))
    if out.numel():
        block, warps = channel_block(channels, 256, out)
        launch(
            pool_kernel,
            (scene.count * size[0], triton.cdiv(channels, block)),
            *(out, tuple(maps), out if points is None else points, *scene.operands(), channels),
            **_constants(scene, out.dtype, points, size, samples, normalized),
            BLOCK=block,
            num_warps=warps,
        )
    return out


def adjoint(grad: Tensor, points: Tensor | None, scene: Scene, samples: int, normalized: bool) -> Tensor:
    """Send gradients ``[R, h, w, C]``, contiguous, back to the cells, ``[T, C]``: two launches; the rest as of :func:`pool`."""
    boxes, h, w, channels = grad.shape
    levels = list(zip(scene.sizes[::2], scene.sizes[1::2], strict=True))
    out = grad.new_empty((scene.images * sum(height * width for height, width in levels), channels))
    if not out.numel():
        return out
    where = grad.new_empty((5, boxes), dtype=torch.int32)
    frame = grad.new_empty((8, boxes), dtype=torch.promote_types(grad.dtype, torch.float32))
    constants = _constants(scene, grad.dtype, points, (h, w), samples, normalized)
    source = grad if points is None else points
    if boxes:
        launch(prepare_kernel, (boxes,), *(where, frame, source, *scene.operands(), boxes), **constants, BLOCK=128)
    tiles = scene.images * sum(triton.cdiv(height, ROWS) * triton.cdiv(width, COLUMNS) for height, width in levels)
    block, _ = channel_block(channels, 128, grad)
    launch(
        adjoint_kernel,
        (tiles, triton.cdiv(channels, block)),
        *(out, grad, source, where, frame, scene.operands()[7], scene.images, boxes, channels),
        **{name: constants[name] for name in ("EXACT", "LEVELS", "ROTATED", "SAMPLES", "h", "w")},
        ROWS=ROWS,
        COLUMNS=COLUMNS,
        BOXES=BOXES,
        LANES=LANES,
        BLOCK=block,
        num_warps=1,
    )
    return out


def slopes(
    grad: Tensor, maps: Sequence[Tensor], points: Tensor | None, scene: Scene, samples: int, normalized: bool
) -> Tensor:
    """Differentiate in the points, ``[R, h, w, S, 2]``, or in rotated boxes, ``[R, 5]``: one launch.

    ``grad`` is ``[R, h, w, C]``, contiguous, and the rest as of :func:`pool`; the result is in float32 at least.
    """
    boxes, h, w, channels = grad.shape
    shape = (boxes, 5) if points is None else points.shape
    out = grad.new_empty(shape, dtype=torch.promote_types(grad.dtype, torch.float32))
    if not grad.numel():
        return out.zero_()
    block, warps = channel_block(channels, 256, grad)
    launch(
        slopes_kernel,
        (boxes if points is None else boxes * h,),
        *(out, grad, tuple(maps), grad if points is None else points, *scene.operands(), channels),
        **_constants(scene, grad.dtype, points, (h, w), samples, normalized),
        BLOCK=block,
        num_warps=warps,
    )
    return out


def _constants(
    scene: Scene, dtype: torch.dtype, points: Tensor | None, size: tuple[int, int], samples: int, normalized: bool
) -> dict[str, Any]:
    own = scene.constants(dtype, normalized)
    return {**own, "ROTATED": points is None, "SAMPLES": samples, "h": size[0], "w": size[1]}


@triton.jit
def _read_box(
    boxes, stride_box, stride_side, level_of, ends, per_image, images, sizes, scales, areas, r,
    ROTATED: tl.constexpr, SAMPLES: tl.constexpr, h: tl.constexpr, w: tl.constexpr,
    LEVELS: tl.constexpr, LAYOUT: tl.constexpr, LEVEL_GIVEN: tl.constexpr,
    NORMALIZED: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """Read box r.

    Returns:
        Image, -1 where nothing is pooled, level, height and width of its map, cells a unit along y and x; of y and of x the
        center, what the height adds, what the width; the samples of a bin along the height and the width; cosine and sine.
    """
    image, at = read_image(boxes, stride_box, stride_side, ends, per_image, images, r, r >= 0, LAYOUT)
    a, b = tl.load(at).to(EXACT), tl.load(at + stride_side).to(EXACT)
    c, d = tl.load(at + 2 * stride_side).to(EXACT), tl.load(at + 3 * stride_side).to(EXACT)
    if LEVEL_GIVEN:
        level = tl.load(level_of + r).to(tl.int32)
    elif ROTATED:
        level = choose_level(c * d, areas, LEVELS, EXACT)
    else:
        level = choose_level((c - a) * (d - b), areas, LEVELS, EXACT)
    height, width = map_size(sizes, level, LEVELS)
    y_scale, x_scale = map_scale(scales, level, height, width, LEVELS, NORMALIZED, EXACT)
    cos, sin = a * 0, a * 0
    y, x, tall, wide = b * y_scale - 0.5, a * x_scale - 0.5, d * y_scale, c * x_scale
    many_y, many_x = a * 0 + 1, a * 0 + SAMPLES
    if ROTATED:
        angle = tl.load(at + 4 * stride_side).to(EXACT)
        cos, sin = turn(angle)
        many_y = many_x
        if SAMPLES == 0:
            many_y = tl.minimum(tl.ceil(divide(tall, tall * 0 + h)), MOST_SAMPLES)
            many_x = tl.minimum(tl.ceil(divide(wide, wide * 0 + w)), MOST_SAMPLES)
        sound = (y + x + tall + wide + angle) * 0 == 0
        if SAMPLES == 0:
            sound = sound & (many_y > 0) & (many_x > 0)  # a box without area has no samples
        image = tl.where(sound, image, -1)
    return (
        image, level, height, width, y_scale, x_scale,
        y, tall * cos, -wide * sin, x, tall * sin, wide * cos, many_y, many_x, cos, sin,
    )  # fmt: skip


@triton.jit
def _sample(points, r, a, b, scale, y, y_tall, y_wide, x, x_tall, x_wide, rows, columns,
            exists, ROTATED: tl.constexpr, EXACT: tl.constexpr):  # fmt: skip
    """The coordinates of samples in row a and column b of box r, and their offsets along the box's height and width."""
    if ROTATED:
        # of whole numbers, so that rounding comes last
        v = divide((2 * a + 1 - rows).to(EXACT), (2 * rows + a * 0).to(EXACT))
        u = divide((2 * b + 1 - columns).to(EXACT), (2 * columns + b * 0).to(EXACT))
        return y + v * y_tall + u * y_wide, x + v * x_tall + u * x_wide, v, u
    else:
        at = points + ((r * rows + a) * columns + b) * 2
        own_x = tl.load(at, mask=exists, other=0.0).to(EXACT) * scale - 0.5
        own_y = tl.load(at + 1, mask=exists, other=0.0).to(EXACT) * scale - 0.5
        return own_y, own_x, own_y * 0, own_y * 0


@triton.jit
def _ranges(y, y_tall, y_wide, x, x_tall, x_wide, many_y, many_x, top, bottom, left, right,
            ROTATED: tl.constexpr, SAMPLES: tl.constexpr, h: tl.constexpr, w: tl.constexpr):  # fmt: skip
    """How many rows and columns of samples a box has, and which of them may lie in a rectangle: first and last of each."""
    if ROTATED:
        rows, columns = many_y.to(tl.int64) * h, many_x.to(tl.int64) * w
        first_a, last_a = span(y, x, y_tall, x_tall, rows, top, bottom, left, right)
        first_b, last_b = span(y, x, y_wide, x_wide, columns, top, bottom, left, right)
        return rows, columns, first_a, last_a, first_b, last_b
    else:
        zero = many_y.to(tl.int64) * 0
        return zero + h * w, zero + SAMPLES, zero, zero + h * w - 1, zero, zero + SAMPLES - 1


@triton.jit
def _load_frame(frame, r, boxes_in_all, ROTATED: tl.constexpr, SAMPLES: tl.constexpr):
    """What :func:`prepare_kernel` has written of box r: cells a pixel, or the rest."""
    first = tl.load(frame + r)
    if ROTATED:
        y_tall, y_wide = tl.load(frame + boxes_in_all + r), tl.load(frame + 2 * boxes_in_all + r)
        x, x_tall = tl.load(frame + 3 * boxes_in_all + r), tl.load(frame + 4 * boxes_in_all + r)
        x_wide, many_y = tl.load(frame + 5 * boxes_in_all + r), tl.load(frame + 6 * boxes_in_all + r)
        return first, first, y_tall, y_wide, x, x_tall, x_wide, many_y, tl.load(frame + 7 * boxes_in_all + r)
    else:
        return first, first, first, first, first, first, first, first * 0 + 1, first * 0 + SAMPLES


@triton.jit
def _bin_span(first, last, bin, many):
    """What of a span of samples belongs to a bin: the first, and the one behind the last."""
    begin = bin * many.to(tl.int64)
    return tl.maximum(begin, first), tl.minimum(begin + many.to(tl.int64), last + 1)


@triton.jit
def _bin_of(a, b, many_y, many_x, w: tl.constexpr, ROTATED: tl.constexpr):
    """The bin, row by row, of samples in row a and column b."""
    if ROTATED:
        return (a // many_y.to(tl.int64)) * w + b // many_x.to(tl.int64)
    else:
        return a


@triton.jit
def _on_map(y, x, height, width):
    """Whether samples count, and where they are once they are moved onto the map."""
    inside = (y >= -1) & (y <= height) & (x >= -1) & (x <= width)
    y, x = tl.where(inside, y, 0.0), tl.where(inside, x, 0.0)
    return inside, tl.minimum(tl.maximum(y, 0.0), height - 1.0), tl.minimum(tl.maximum(x, 0.0), width - 1.0)


@triton.jit
def _four(y, x, height, width, channels):
    """Of the cells around a sample the first's offset, how far the lower and the right ones are, and the sample's way past it."""
    top, left = y.to(tl.int32), x.to(tl.int32)
    down = tl.where(top + 1 < height, width.to(tl.int64) * channels, 0)
    right = tl.where(left + 1 < width, channels, 0)
    return (top.to(tl.int64) * width + left) * channels, down, right, y - top, x - left


@triton.jit(do_not_specialize=VARYING)
def pool_kernel(
    out, maps, points,
    boxes, stride_box, stride_side, level_of, ends, per_image, images, sizes, scales, areas, channels,
    ROTATED: tl.constexpr, SAMPLES: tl.constexpr, h: tl.constexpr, w: tl.constexpr,
    LEVELS: tl.constexpr, LAYOUT: tl.constexpr, LEVEL_GIVEN: tl.constexpr,
    NORMALIZED: tl.constexpr, EXACT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program: a row of bins of a box, a block of channels."""
    line = tl.program_id(0).to(tl.int64)
    r, i = line // h, line % h
    c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    image, level, height, width, scale, _, y, y_tall, y_wide, x, x_tall, x_wide, many_y, many_x, _, _ = _read_box(
        boxes, stride_box, stride_side, level_of, ends, per_image, images, sizes, scales, areas, r,
        ROTATED, SAMPLES, h, w, LEVELS, LAYOUT, LEVEL_GIVEN, NORMALIZED, EXACT,
    )  # fmt: skip
    origin = map_of(maps, level, image, height, width, channels, LEVELS) + c
    rows, columns, first_a, last_a, first_b, last_b = _ranges(
        y, y_tall, y_wide, x, x_tall, x_wide, many_y, many_x, -1.0, height * 1.0, -1.0, width * 1.0,
        ROTATED, SAMPLES, h, w,
    )  # fmt: skip
    last_a = tl.where(image >= 0, last_a, -1)
    for j in range(w):
        if ROTATED:
            a_begin, a_end = _bin_span(first_a, last_a, i, many_y)
            b_begin, b_end = _bin_span(first_b, last_b, j, many_x)
        else:
            a_begin, b_begin, b_end = i * w + j, first_b, last_b + 1
            a_end = tl.minimum(a_begin, last_a) + 1
        total = tl.zeros([BLOCK], EXACT)
        for a in range(a_begin, a_end):
            for b in range(b_begin, b_end):
                own_y, own_x, _v, _u = _sample(
                    points, r, tl.cast(a, tl.int64), tl.cast(b, tl.int64), scale, y, y_tall, y_wide, x, x_tall, x_wide,
                    rows, columns, r >= 0, ROTATED, EXACT,
                )  # fmt: skip
                inside, own_y, own_x = _on_map(own_y, own_x, height, width)
                at, down, right, up, past = _four(own_y, own_x, height, width, channels)
                wanted = c < tl.where(inside, channels, 0)
                upper_left = tl.load(origin + at, mask=wanted, other=0.0).to(EXACT)
                upper_right = tl.load(origin + at + right, mask=wanted, other=0.0).to(EXACT)
                lower_left = tl.load(origin + at + down, mask=wanted, other=0.0).to(EXACT)
                lower_right = tl.load(origin + at + down + right, mask=wanted, other=0.0).to(EXACT)
                upper, lower = (
                    (1 - past) * upper_left + past * upper_right,
                    (1 - past) * lower_left + past * lower_right,
                )
                total += (1 - up) * upper + up * lower
        total = tl.where(image >= 0, total * divide(many_y * 0 + 1.0, many_y * many_x), 0.0)
        tl.store(out + (line * w + j) * channels + c, total.to(out.dtype.element_ty), mask=c < channels)


@triton.jit(do_not_specialize=[*VARYING, "boxes_in_all"])
def prepare_kernel(
    where, frame, points,
    boxes, stride_box, stride_side, level_of, ends, per_image, images, sizes, scales, areas, boxes_in_all,
    ROTATED: tl.constexpr, SAMPLES: tl.constexpr, h: tl.constexpr, w: tl.constexpr,
    LEVELS: tl.constexpr, LAYOUT: tl.constexpr, LEVEL_GIVEN: tl.constexpr,
    NORMALIZED: tl.constexpr, EXACT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program: one box; what it writes is its map, the cells that it may read, and what its samples follow from."""
    r = tl.program_id(0).to(tl.int64)
    image, level, height, width, scale, _, y, y_tall, y_wide, x, x_tall, x_wide, many_y, many_x, _, _ = _read_box(
        boxes, stride_box, stride_side, level_of, ends, per_image, images, sizes, scales, areas, r,
        ROTATED, SAMPLES, h, w, LEVELS, LAYOUT, LEVEL_GIVEN, NORMALIZED, EXACT,
    )  # fmt: skip
    if ROTATED:
        half_y, half_x = (tl.abs(y_tall) + tl.abs(y_wide)) * 0.5 + 1, (tl.abs(x_tall) + tl.abs(x_wide)) * 0.5 + 1
        top, bottom, left, right = y - half_y, y + half_y, x - half_x, x + half_x
    else:
        least_y, least_x = tl.full([BLOCK], float("inf"), EXACT), tl.full([BLOCK], float("inf"), EXACT)
        most_y, most_x = tl.full([BLOCK], float("-inf"), EXACT), tl.full([BLOCK], float("-inf"), EXACT)
        for begin in range(0, h * w * SAMPLES, BLOCK):
            index = begin + tl.arange(0, BLOCK)
            exists = index < h * w * SAMPLES
            own_y, own_x, _v, _u = _sample(
                points, r, index * 0, index, scale, y, y_tall, y_wide, x, x_tall, x_wide,
                many_y.to(tl.int64) * (h * w), many_x.to(tl.int64), exists, ROTATED, EXACT,
            )  # fmt: skip
            inside, own_y, own_x = _on_map(own_y, own_x, height, width)
            inside = inside & exists
            least_y = tl.minimum(least_y, tl.where(inside, own_y, float("inf")))
            least_x = tl.minimum(least_x, tl.where(inside, own_x, float("inf")))
            most_y = tl.maximum(most_y, tl.where(inside, own_y, float("-inf")))
            most_x = tl.maximum(most_x, tl.where(inside, own_x, float("-inf")))
        top, bottom = tl.min(least_y, 0) - 1, tl.max(most_y, 0) + 1
        left, right = tl.min(least_x, 0) - 1, tl.max(most_x, 0) + 1
    tl.store(where + r, tl.where(image >= 0, level * images + image, -1))
    edges = (tl.floor(top), tl.ceil(bottom), tl.floor(left), tl.ceil(right))
    for k in tl.static_range(4):
        edge = tl.minimum(tl.maximum(edges[k], -FAR), FAR).to(tl.int32)
        tl.store(where + (k + 1) * boxes_in_all + r, edge)
    frames = (y, y_tall, y_wide, x, x_tall, x_wide, many_y, many_x) if ROTATED else (scale,)
    for k in tl.static_range(len(frames)):
        tl.store(frame + k * boxes_in_all + r, frames[k])


@triton.jit(do_not_specialize=["images", "boxes_in_all"])
def adjoint_kernel(
    out, grad, points, where, frame, sizes, images, boxes_in_all, channels,
    EXACT: tl.constexpr, LEVELS: tl.constexpr, ROTATED: tl.constexpr, SAMPLES: tl.constexpr, h: tl.constexpr, w: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, BOXES: tl.constexpr, LANES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program: a tile of cells of a map, a block of channels."""
    own, first_cell, height, width, top, left = tile_of(sizes, images, LEVELS, ROWS, COLUMNS)
    lane, sample, c = tl.arange(0, BOXES), tl.arange(0, LANES), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    totals = ()  # one a cell of the tile
    for _ in tl.static_range(ROWS * COLUMNS):
        totals = totals + (tl.zeros([BLOCK], EXACT),)  # noqa: RUF005
    for begin in range(0, boxes_in_all, BOXES):
        hit = hits(where, begin + lane, own, top, left, boxes_in_all, ROWS, COLUMNS)
        next = tl.min(tl.where(hit, lane, BOXES), 0)
        while next < BOXES:
            r = (begin + next).to(tl.int64)
            scale, y, y_tall, y_wide, x, x_tall, x_wide, many_y, many_x = _load_frame(
                frame, r, boxes_in_all, ROTATED, SAMPLES
            )
            rows, columns, first_a, last_a, first_b, last_b = _ranges(
                y, y_tall, y_wide, x, x_tall, x_wide, many_y, many_x,
                top - 1.0, top + ROWS * 1.0, left - 1.0, left + COLUMNS * 1.0, ROTATED, SAMPLES, h, w,
            )  # fmt: skip
            share = divide(y * 0 + 1.0, many_y * many_x)
            wide = tl.maximum(last_b - first_b + 1, 1)
            count = tl.where(last_b >= first_b, tl.maximum(last_a - first_a + 1, 0) * wide, 0)
            for some in range(0, count, LANES):
                nth = some + sample
                a, b = first_a + nth // wide, first_b + nth % wide
                own_y, own_x, _v, _u = _sample(
                    points, r, a, b, scale, y, y_tall, y_wide, x, x_tall, x_wide,
                    rows, columns, nth < count, ROTATED, EXACT,
                )  # fmt: skip
                inside, own_y, own_x = _on_map(own_y, own_x, height, width)
                touches = inside & (nth < count) & (own_y > top - 1) & (own_y < top + ROWS)
                touches = touches & (own_x > left - 1) & (own_x < left + COLUMNS)
                bin = _bin_of(a, b, many_y, many_x, w, ROTATED)
                found = tl.min(tl.where(touches, sample, LANES), 0)
                while found < LANES:
                    at_y = tl.sum(tl.where(sample == found, own_y, 0.0), 0)
                    at_x = tl.sum(tl.where(sample == found, own_x, 0.0), 0)
                    at_bin = tl.sum(tl.where(sample == found, bin, 0), 0)
                    entry = grad + (r * (h * w) + at_bin) * channels + c
                    value = tl.load(entry, mask=c < channels, other=0.0).to(EXACT) * share
                    added = ()
                    for cell in tl.static_range(ROWS * COLUMNS):
                        near = tl.maximum(1.0 - tl.abs(at_y - (top + cell // COLUMNS)), 0.0)
                        near = near * tl.maximum(1.0 - tl.abs(at_x - (left + cell % COLUMNS)), 0.0)
                        added = added + (totals[cell] + near * value,)  # noqa: RUF005
                    totals = added
                    found = tl.min(tl.where(touches & (sample > found), sample, LANES), 0)
            next = tl.min(tl.where(hit & (lane > next), lane, BOXES), 0)
    for cell in tl.static_range(ROWS * COLUMNS):
        y_cell, x_cell = top + cell // COLUMNS, left + cell % COLUMNS
        wanted = c < tl.where((y_cell < height) & (x_cell < width), channels, 0)
        tl.store(
            out + (first_cell + y_cell * width + x_cell) * channels + c,
            totals[cell].to(out.dtype.element_ty),
            mask=wanted,
        )


@triton.jit
def _products(cell, down, right, up, past, grad, channels, EXACT: tl.constexpr, BLOCK: tl.constexpr):
    """How the product of a gradient with the surface around a sample changes downwards and to the right."""
    down_sum, right_sum = tl.zeros([BLOCK], EXACT), tl.zeros([BLOCK], EXACT)
    for begin in range(0, channels, BLOCK):
        c = begin + tl.arange(0, BLOCK)
        upper_left = tl.load(cell + c, mask=c < channels, other=0.0).to(EXACT)
        upper_right = tl.load(cell + right + c, mask=c < channels, other=0.0).to(EXACT)
        lower_left = tl.load(cell + down + c, mask=c < channels, other=0.0).to(EXACT)
        lower_right = tl.load(cell + down + right + c, mask=c < channels, other=0.0).to(EXACT)
        sent = tl.load(grad + c, mask=c < channels, other=0.0).to(EXACT)
        down_sum += sent * ((1 - past) * (lower_left - upper_left) + past * (lower_right - upper_right))
        right_sum += sent * ((1 - up) * (upper_right - upper_left) + up * (lower_right - lower_left))
    return tl.sum(down_sum, 0), tl.sum(right_sum, 0)


@triton.jit(do_not_specialize=VARYING)
def slopes_kernel(
    out, grad, maps, points,
    boxes, stride_box, stride_side, level_of, ends, per_image, images, sizes, scales, areas, channels,
    ROTATED: tl.constexpr, SAMPLES: tl.constexpr, h: tl.constexpr, w: tl.constexpr,
    LEVELS: tl.constexpr, LAYOUT: tl.constexpr, LEVEL_GIVEN: tl.constexpr,
    NORMALIZED: tl.constexpr, EXACT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program: a rotated box, or the points of a row of bins."""
    line = tl.program_id(0).to(tl.int64)
    r = line if ROTATED else line // h
    image, level, height, width, scale, x_scale, y, y_tall, y_wide, x, x_tall, x_wide, many_y, many_x, cos, sin = (
        _read_box(
            boxes, stride_box, stride_side, level_of, ends, per_image, images, sizes, scales, areas, r,
            ROTATED, SAMPLES, h, w, LEVELS, LAYOUT, LEVEL_GIVEN, NORMALIZED, EXACT,
        )
    )  # fmt: skip
    origin = map_of(maps, level, image, height, width, channels, LEVELS)
    share = divide(y * 0 + 1.0, many_y * many_x)
    rows, columns, first_a, last_a, first_b, last_b = _ranges(
        y, y_tall, y_wide, x, x_tall, x_wide, many_y, many_x, -1.0, height * 1.0, -1.0, width * 1.0,
        ROTATED, SAMPLES, h, w,
    )  # fmt: skip
    if ROTATED:
        last_a = tl.where(image >= 0, last_a, -1)
    else:
        first_a, last_a = (line % h) * w, (line % h) * w + w - 1
    # the derivative in y times 1, v and u, and that in x
    sums = (y * 0, y * 0, y * 0, y * 0, y * 0, y * 0)
    for a_index in range(first_a, last_a + 1):
        for b_index in range(first_b, last_b + 1):
            a, b = tl.cast(a_index, tl.int64), tl.cast(b_index, tl.int64)
            at_y, at_x, v, u = _sample(
                points, r, a, b, scale, y, y_tall, y_wide, x, x_tall, x_wide, rows, columns, r >= 0, ROTATED, EXACT
            )
            inside, own_y, own_x = _on_map(at_y, at_x, height, width)
            inside = inside & (image >= 0)
            at, down, right, up, past = _four(own_y, own_x, height, width, channels)
            bin = _bin_of(a, b, many_y, many_x, w, ROTATED)
            own, count = grad + (r * (h * w) + bin) * channels, tl.where(inside, channels, 0)
            down_sum, right_sum = _products(origin + at, down, right, up, past, own, count, EXACT, BLOCK)
            by_y = tl.where(at_y >= 0, down_sum * share, 0.0)
            by_x = tl.where(at_x >= 0, right_sum * share, 0.0)
            if ROTATED:
                sums = (
                    sums[0] + by_y, sums[1] + by_y * v, sums[2] + by_y * u,
                    sums[3] + by_x, sums[4] + by_x * v, sums[5] + by_x * u,
                )  # fmt: skip
            else:
                at_point = out + ((r * (h * w) + a) * SAMPLES + b) * 2
                tl.store(at_point, by_x * scale)
                tl.store(at_point + 1, by_y * scale)
    if ROTATED:
        # cosine and sine times height and width are in the frame
        turned = sums[4] * y_tall - sums[1] * x_tall - sums[2] * x_wide + sums[5] * y_wide
        wider, taller = sums[5] * cos - sums[2] * sin, sums[1] * cos + sums[4] * sin
        result = (sums[3] * x_scale, sums[0] * scale, wider * x_scale, taller * scale, turned * RADIAN)
        for k in tl.static_range(5):
            tl.store(out + r * 5 + k, tl.where(image >= 0, result[k], 0.0))

"""Bilinear samples at free points and in rotated boxes as Triton kernels, from boxes as they were given.

A box has samples in rows and columns. Those of a rotated box lie on its turned grid, and which of them can lie on a part of
the map is known; free points are a row a bin. Forward, a program owns a row of bins and a block of channels. Back,
:func:`prepare_kernel` writes which cells a box reads (at most 52 bytes); then a program owns a tile of cells and a block of
channels, and scans the boxes in the order given. Nothing is written twice, there are no atomics, and every sum is taken in the same
order each time. The gradients to boxes and points are one more launch.

What samples follow from is a frame: cells a pixel; of y and of x the center, what the height of a rotated box adds, what its width;
and the samples of a bin along height and width.

N images, L levels, R boxes, h x w bins, S samples a bin, C channels, T cells of all maps.
"""

# Triton annotates its functions as they are on the host; compiled, its loops and tensors are something else.
# ruff: noqa: RET505 (a return in a branch that is chosen by the compiler needs its else)
# pyright: reportGeneralTypeIssues=false, reportArgumentType=false, reportOperatorIssue=false
# pyright: reportAttributeAccessIssue=false, reportIndexIssue=false, reportCallIssue=false

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from detpipe.roi_pooling.cuda.geometry import (
    VARYING,
    divide,
    find_tile,
    hits,
    launch_boxes,
    launch_tiles,
    load_columns,
    map_of,
    read_image,
    read_sides,
    store_cell,
    store_columns,
    store_map,
)
from detpipe.roi_pooling.scene import Scene

ROWS, COLUMNS = 2, 4  # cells of a tile
BOXES = 64  # that are looked at at once
LANES = 32  # samples that are looked at at once
FAR = tl.constexpr(1 << 20)  # cells; what lies beyond is there
MARGIN = tl.constexpr(0.01)  # cells by which the search for samples is too generous, so that rounding loses none
RADIAN = tl.constexpr(math.pi / 180)
MOST_SAMPLES = tl.constexpr(
    float(1 << 30)
)  # of a bin along one axis: what lies on the map is then a vanishing part of it


def pool(maps: Sequence[Tensor], points: Tensor | None, scene: Scene) -> Tensor:
    """Average bilinear samples: one launch.

    Args:
        maps: L tensors ``[N, H_l, W_l, C]``, contiguous.
        points: ``[R, h, w, S, 2]`` (x, y) in the boxes' unit; None for rotated boxes.
        scene: the boxes, rotated ones if there are no points.

    Returns:
        ``[R, h, w, C]``.
    """
    out = maps[0].new_empty((scene.count, scene.h, scene.w, maps[0].shape[3]))
    if out.numel():
        launch_boxes(pool_kernel, scene.count * scene.h, out, scene, out, tuple(maps), _source(points, out))
    return out


def adjoint(grad: Tensor, points: Tensor | None, scene: Scene) -> Tensor:
    """Send gradients ``[R, h, w, C]``, contiguous, back to the cells, ``[T, C]``: two launches; the rest as of :func:`pool`."""
    source, frames = _source(points, grad), 8 if points is None else 1
    constants = {"ROWS": ROWS, "COLUMNS": COLUMNS, "BOXES": BOXES, "LANES": LANES}
    return launch_tiles(adjoint_kernel, (prepare_kernel, source), grad, scene, frames, source, **constants)


def slopes(grad: Tensor, maps: Sequence[Tensor], points: Tensor | None, scene: Scene) -> Tensor:
    """Differentiate in the points, or in rotated boxes, as they were given: one launch.

    ``grad`` is ``[R, h, w, C]``, contiguous, and the rest as of :func:`pool`; the index of an image has a gradient of 0.
    """
    place = scene.boxes if points is None else points
    out = torch.empty_like(place, memory_format=torch.contiguous_format)
    if not grad.numel():
        return out.zero_()
    programs, source = scene.count * (1 if points is None else scene.h), _source(points, grad)
    launch_boxes(slopes_kernel, programs, grad, scene, out, grad, tuple(maps), source, loops=True)
    return out


def _source(points: Tensor | None, other: Tensor) -> Tensor:
    """The points, contiguous, or for rotated boxes any tensor, which is not read."""
    return other if points is None else points.contiguous()


@triton.jit
def _turn(angle):
    """Cosine and sine of degrees; CUDA's own keep a table in local memory for angles of many turns."""
    angle = angle - tl.floor(divide(angle, angle * 0 + 360.0)) * 360.0
    quarter = tl.floor(divide(angle, angle * 0 + 90.0) + 0.5)
    rest = (angle - quarter * 90.0) * RADIAN  # within an eighth of a turn, where Taylor's series are soon exact
    square, even, odd = rest * rest, angle * 0 + 1.0, angle * 0 + 1.0
    for k in tl.static_range(9):
        even = 1.0 - square * even * (1.0 / ((17 - 2 * k) * (18 - 2 * k)))
        odd = 1.0 - square * odd * (1.0 / ((18 - 2 * k) * (19 - 2 * k)))
    odd = rest * odd
    turned = (quarter == 1) | (quarter == 3)
    cos, sin = tl.where(turned, -odd, even), tl.where(turned, even, odd)
    opposite = (quarter == 2) | (quarter == 3)
    return tl.where(opposite, -cos, cos), tl.where(opposite, -sin, sin)


@triton.jit
def _span(y, x, along_y, along_x, count, top, bottom, left, right):
    """The first and the last row of samples (or column) of a rotated box that may lie in a rectangle."""
    length = tl.maximum(tl.sqrt(along_y * along_y + along_x * along_x), 1e-30)
    unit_y, unit_x = divide(along_y, length), divide(along_x, length)
    low = tl.minimum((top - y) * unit_y, (bottom - y) * unit_y) + tl.minimum((left - x) * unit_x, (right - x) * unit_x)
    high = tl.maximum((top - y) * unit_y, (bottom - y) * unit_y) + tl.maximum((left - x) * unit_x, (right - x) * unit_x)
    count = count.to(length.dtype)
    middle = (count - 1) * 0.5
    first = tl.floor(divide((low - MARGIN) * count, length) + middle)
    last = tl.ceil(divide((high + MARGIN) * count, length) + middle)
    first = tl.minimum(tl.maximum(first, 0.0), count)
    return first.to(tl.int64), tl.minimum(tl.maximum(last, -1.0), count - 1).to(tl.int64)


@triton.jit
def _read_box(scene, r, TASK: tl.constexpr):
    """Read box r.

    Returns:
        Image, -1 where nothing is pooled; level, height and width of its map; cells a unit along x; cosine and sine; the frame.
    """
    image, level, height, width, y_scale, x_scale, a, b, c, d = read_sides(scene, r, r >= 0, TASK)
    cos, sin = a * 0, a * 0
    y, x, tall, wide = b * y_scale - 0.5, a * x_scale - 0.5, d * y_scale, c * x_scale
    many_y, many_x = a * 0 + 1, a * 0 + TASK.samples
    if TASK.rotated:
        _, at = read_image(scene, r, r >= 0, TASK)
        angle = tl.load(at + 4 * tl.cast(scene[2][1], tl.int64)).to(TASK.exact)
        cos, sin = _turn(angle)
        many_y = many_x
        if TASK.samples == 0:
            many_y = tl.minimum(tl.ceil(divide(tall, tall * 0 + TASK.h)), MOST_SAMPLES)
            many_x = tl.minimum(tl.ceil(divide(wide, wide * 0 + TASK.w)), MOST_SAMPLES)
        sound = (y + x + tall + wide + angle) * 0 == 0
        if TASK.samples == 0:
            sound = sound & (many_y > 0) & (many_x > 0)  # a box without area has no samples
        image = tl.where(sound, image, -1)
    frame = (y_scale, y, tall * cos, -wide * sin, x, tall * sin, wide * cos, many_y, many_x)
    return image, level, height, width, x_scale, cos, sin, frame


@triton.jit
def _sample(points, r, a, b, frame, rows, columns, exists, TASK: tl.constexpr):
    """The coordinates of samples in row a and column b of box r, and their offsets along the box's height and width."""
    scale, y, y_tall, y_wide, x, x_tall, x_wide, _, _ = frame
    if TASK.rotated:
        # of whole numbers, so that rounding comes last
        v = divide((2 * a + 1 - rows).to(TASK.exact), (2 * rows + a * 0).to(TASK.exact))
        u = divide((2 * b + 1 - columns).to(TASK.exact), (2 * columns + b * 0).to(TASK.exact))
        return y + v * y_tall + u * y_wide, x + v * x_tall + u * x_wide, v, u
    else:
        at = points + ((r * rows + a) * columns + b) * 2
        own_x = tl.load(at, mask=exists, other=0.0).to(TASK.exact) * scale - 0.5
        own_y = tl.load(at + 1, mask=exists, other=0.0).to(TASK.exact) * scale - 0.5
        return own_y, own_x, own_y * 0, own_y * 0


@triton.jit
def _ranges(frame, top, bottom, left, right, TASK: tl.constexpr):
    """How many rows and columns of samples a box has, and which of them may lie in a rectangle: first and last of each."""
    _, y, y_tall, y_wide, x, x_tall, x_wide, many_y, many_x = frame
    if TASK.rotated:
        rows, columns = many_y.to(tl.int64) * TASK.h, many_x.to(tl.int64) * TASK.w
        first_a, last_a = _span(y, x, y_tall, x_tall, rows, top, bottom, left, right)
        first_b, last_b = _span(y, x, y_wide, x_wide, columns, top, bottom, left, right)
        return rows, columns, first_a, last_a, first_b, last_b
    else:
        zero = many_y.to(tl.int64) * 0
        rows, columns = zero + TASK.h * TASK.w, zero + TASK.samples
        return rows, columns, zero, rows - 1, zero, columns - 1


@triton.jit
def _load_frame(frame, r, boxes_in_all, TASK: tl.constexpr):
    """Read the frame of box r that :func:`prepare_kernel` has written; of points that is cells a pixel alone."""
    if TASK.rotated:
        y, y_tall, y_wide, x, x_tall, x_wide, many_y, many_x = load_columns(frame, r, r >= 0, boxes_in_all, 8)  # pyright: ignore
        return y, y, y_tall, y_wide, x, x_tall, x_wide, many_y, many_x
    else:
        scale = tl.load(frame + r)
        return scale, scale, scale, scale, scale, scale, scale, scale * 0 + 1, scale * 0 + TASK.samples


@triton.jit
def _bin_span(first, last, bin, many):
    """What of a span of samples belongs to a bin: the first, and the one behind the last."""
    begin = bin * many.to(tl.int64)
    return tl.maximum(begin, first), tl.minimum(begin + many.to(tl.int64), last + 1)


@triton.jit
def _bin_of(a, b, frame, TASK: tl.constexpr):
    """The bin, row by row, of samples in row a and column b."""
    if TASK.rotated:
        return (a // frame[7].to(tl.int64)) * TASK.w + b // frame[8].to(tl.int64)
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


@triton.jit
def pool_kernel(out, maps, points, scene, channels, TASK: tl.constexpr, BLOCK: tl.constexpr):
    """One program: a row of bins of a box, a block of channels."""
    line = tl.program_id(0).to(tl.int64)
    r, i = line // TASK.h, line % TASK.h
    c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    image, level, height, width, _, _, _, box = _read_box(scene, r, TASK)
    origin = map_of(maps, level, image, height, width, channels, TASK) + c
    rows, columns, first_a, last_a, first_b, last_b = _ranges(box, -1.0, height * 1.0, -1.0, width * 1.0, TASK)
    last_a = tl.where(image >= 0, last_a, -1)
    many_y, many_x = box[7], box[8]
    for j in range(TASK.w):
        if TASK.rotated:
            a_begin, a_end = _bin_span(first_a, last_a, i, many_y)
            b_begin, b_end = _bin_span(first_b, last_b, j, many_x)
        else:
            a_begin, b_begin, b_end = i * TASK.w + j, first_b, last_b + 1
            a_end = tl.minimum(a_begin, last_a) + 1
        total = tl.zeros([BLOCK], TASK.exact)
        for a in range(a_begin, a_end):
            for b in range(b_begin, b_end):
                own_y, own_x, _v, _u = _sample(
                    points, r, tl.cast(a, tl.int64), tl.cast(b, tl.int64), box, rows, columns, r >= 0, TASK
                )
                inside, own_y, own_x = _on_map(own_y, own_x, height, width)
                at, down, right, up, past = _four(own_y, own_x, height, width, channels)
                wanted = c < tl.where(inside, channels, 0)
                upper_left = tl.load(origin + at, mask=wanted, other=0.0).to(TASK.exact)
                upper_right = tl.load(origin + at + right, mask=wanted, other=0.0).to(TASK.exact)
                lower_left = tl.load(origin + at + down, mask=wanted, other=0.0).to(TASK.exact)
                lower_right = tl.load(origin + at + down + right, mask=wanted, other=0.0).to(TASK.exact)
                upper, lower = (
                    (1 - past) * upper_left + past * upper_right,
                    (1 - past) * lower_left + past * lower_right,
                )
                total += (1 - up) * upper + up * lower
        total = tl.where(image >= 0, total * divide(many_y * 0 + 1.0, many_y * many_x), 0.0)
        tl.store(out + (line * TASK.w + j) * channels + c, total.to(out.dtype.element_ty), mask=c < channels)


@triton.jit(do_not_specialize=VARYING)
def prepare_kernel(where, frame, scene, boxes_in_all, points, TASK: tl.constexpr, BLOCK: tl.constexpr):
    """One program: one box; what it writes is its map, the cells that it may read, and what its samples follow from."""
    r = tl.program_id(0).to(tl.int64)
    image, level, height, width, _, _, _, box = _read_box(scene, r, TASK)
    if TASK.rotated:
        _, y, y_tall, y_wide, x, x_tall, x_wide, _, _ = box
        half_y, half_x = (tl.abs(y_tall) + tl.abs(y_wide)) * 0.5 + 1, (tl.abs(x_tall) + tl.abs(x_wide)) * 0.5 + 1
        top, bottom, left, right = y - half_y, y + half_y, x - half_x, x + half_x
    else:
        least_y, least_x = tl.full([BLOCK], float("inf"), TASK.exact), tl.full([BLOCK], float("inf"), TASK.exact)
        most_y, most_x = tl.full([BLOCK], float("-inf"), TASK.exact), tl.full([BLOCK], float("-inf"), TASK.exact)
        rows, columns = box[7].to(tl.int64) * (TASK.h * TASK.w), box[8].to(tl.int64)
        for begin in range(0, TASK.h * TASK.w * TASK.samples, BLOCK):
            index = begin + tl.arange(0, BLOCK)
            exists = index < TASK.h * TASK.w * TASK.samples
            own_y, own_x, _v, _u = _sample(points, r, index * 0, index, box, rows, columns, exists, TASK)
            inside, own_y, own_x = _on_map(own_y, own_x, height, width)
            inside = inside & exists
            least_y = tl.minimum(least_y, tl.where(inside, own_y, float("inf")))
            least_x = tl.minimum(least_x, tl.where(inside, own_x, float("inf")))
            most_y = tl.maximum(most_y, tl.where(inside, own_y, float("-inf")))
            most_x = tl.maximum(most_x, tl.where(inside, own_x, float("-inf")))
        top, bottom = tl.min(least_y, 0) - 1, tl.max(most_y, 0) + 1
        left, right = tl.min(least_x, 0) - 1, tl.max(most_x, 0) + 1
    edges = (tl.floor(top), tl.ceil(bottom), tl.floor(left), tl.ceil(right))
    cells = ()
    for k in tl.static_range(4):
        cells = cells + (tl.minimum(tl.maximum(edges[k], -FAR), FAR).to(tl.int32),)  # noqa: RUF005
    store_map(where, r, r >= 0, boxes_in_all, scene, image, level, cells[0], cells[1], cells[2], cells[3])
    store_columns(frame, r, r >= 0, boxes_in_all, box[1:] if TASK.rotated else box[:1])


@triton.jit(do_not_specialize=VARYING)
def adjoint_kernel(
    out, grad, points, where, frame, scene, boxes_in_all, channels, TASK: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, BOXES: tl.constexpr, LANES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program: a tile of cells of a map, a block of channels."""
    own, first_cell, height, width, top, left = find_tile(tl.program_id(0), scene, ROWS, COLUMNS, TASK)
    lane, sample, c = tl.arange(0, BOXES), tl.arange(0, LANES), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    totals = ()  # one a cell of the tile
    for _ in tl.static_range(ROWS * COLUMNS):
        totals = totals + (tl.zeros([BLOCK], TASK.exact),)  # noqa: RUF005
    for begin in range(0, boxes_in_all, BOXES):
        hit = hits(where, begin + lane, own, top, left, boxes_in_all, ROWS, COLUMNS)
        next = tl.min(tl.where(hit, lane, BOXES), 0)
        while next < BOXES:
            r = (begin + next).to(tl.int64)
            box = _load_frame(frame, r, boxes_in_all, TASK)
            rows, columns, first_a, last_a, first_b, last_b = _ranges(
                box, top - 1.0, top + ROWS * 1.0, left - 1.0, left + COLUMNS * 1.0, TASK
            )
            share = divide(box[0] * 0 + 1.0, box[7] * box[8])
            wide = tl.maximum(last_b - first_b + 1, 1)
            count = tl.where(last_b >= first_b, tl.maximum(last_a - first_a + 1, 0) * wide, 0)
            for some in range(0, count, LANES):
                nth = some + sample
                a, b = first_a + nth // wide, first_b + nth % wide
                own_y, own_x, _v, _u = _sample(points, r, a, b, box, rows, columns, nth < count, TASK)
                inside, own_y, own_x = _on_map(own_y, own_x, height, width)
                touches = inside & (nth < count) & (own_y > top - 1) & (own_y < top + ROWS)
                touches = touches & (own_x > left - 1) & (own_x < left + COLUMNS)
                bin = _bin_of(a, b, box, TASK)
                found = tl.min(tl.where(touches, sample, LANES), 0)
                while found < LANES:
                    at_y = tl.sum(tl.where(sample == found, own_y, 0.0), 0)
                    at_x = tl.sum(tl.where(sample == found, own_x, 0.0), 0)
                    at_bin = tl.sum(tl.where(sample == found, bin, 0), 0)
                    entry = grad + (r * (TASK.h * TASK.w) + at_bin) * channels + c
                    value = tl.load(entry, mask=c < channels, other=0.0).to(TASK.exact) * share
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
        store_cell(out, totals[cell], y_cell, x_cell, first_cell, height, width, c, channels)


@triton.jit
def _products(cell, down, right, up, past, grad, channels, TASK: tl.constexpr, BLOCK: tl.constexpr):
    """How the product of a gradient with the surface around a sample changes downwards and to the right."""
    down_sum, right_sum = tl.zeros([BLOCK], TASK.exact), tl.zeros([BLOCK], TASK.exact)
    for begin in range(0, channels, BLOCK):
        c = begin + tl.arange(0, BLOCK)
        upper_left = tl.load(cell + c, mask=c < channels, other=0.0).to(TASK.exact)
        upper_right = tl.load(cell + right + c, mask=c < channels, other=0.0).to(TASK.exact)
        lower_left = tl.load(cell + down + c, mask=c < channels, other=0.0).to(TASK.exact)
        lower_right = tl.load(cell + down + right + c, mask=c < channels, other=0.0).to(TASK.exact)
        sent = tl.load(grad + c, mask=c < channels, other=0.0).to(TASK.exact)
        down_sum += sent * ((1 - past) * (lower_left - upper_left) + past * (lower_right - upper_right))
        right_sum += sent * ((1 - up) * (upper_right - upper_left) + up * (lower_right - lower_left))
    return tl.sum(down_sum, 0), tl.sum(right_sum, 0)


@triton.jit
def slopes_kernel(out, grad, maps, points, scene, channels, TASK: tl.constexpr, BLOCK: tl.constexpr):
    """One program: a rotated box, or the points of a row of bins."""
    line = tl.program_id(0).to(tl.int64)
    r = line if TASK.rotated else line // TASK.h
    image, level, height, width, x_scale, cos, sin, box = _read_box(scene, r, TASK)
    scale, _, y_tall, y_wide, _, x_tall, x_wide, many_y, many_x = box
    origin = map_of(maps, level, image, height, width, channels, TASK)
    share = divide(scale * 0 + 1.0, many_y * many_x)
    rows, columns, first_a, last_a, first_b, last_b = _ranges(box, -1.0, height * 1.0, -1.0, width * 1.0, TASK)
    if TASK.rotated:
        last_a = tl.where(image >= 0, last_a, -1)
    else:
        first_a, last_a = (line % TASK.h) * TASK.w, (line % TASK.h) * TASK.w + TASK.w - 1
    # the derivative in y times 1, v and u, and that in x
    none = scale * 0
    sums = (none, none, none, none, none, none)
    for a_index in range(first_a, last_a + 1):
        for b_index in range(first_b, last_b + 1):
            a, b = tl.cast(a_index, tl.int64), tl.cast(b_index, tl.int64)
            at_y, at_x, v, u = _sample(points, r, a, b, box, rows, columns, r >= 0, TASK)
            inside, own_y, own_x = _on_map(at_y, at_x, height, width)
            inside = inside & (image >= 0)
            at, down, right, up, past = _four(own_y, own_x, height, width, channels)
            bin = _bin_of(a, b, box, TASK)
            own, count = grad + (r * (TASK.h * TASK.w) + bin) * channels, tl.where(inside, channels, 0)
            down_sum, right_sum = _products(origin + at, down, right, up, past, own, count, TASK, BLOCK)
            by_y = tl.where(at_y >= 0, down_sum * share, 0.0)
            by_x = tl.where(at_x >= 0, right_sum * share, 0.0)
            if TASK.rotated:
                sums = (
                    sums[0] + by_y, sums[1] + by_y * v, sums[2] + by_y * u,
                    sums[3] + by_x, sums[4] + by_x * v, sums[5] + by_x * u,
                )  # fmt: skip
            else:
                at_point = out + ((r * (TASK.h * TASK.w) + a) * TASK.samples + b) * 2
                tl.store(at_point, (by_x * scale).to(out.dtype.element_ty))
                tl.store(at_point + 1, (by_y * scale).to(out.dtype.element_ty))
    if TASK.rotated:
        # cosine and sine times height and width are in the frame
        turned = sums[4] * y_tall - sums[1] * x_tall - sums[2] * x_wide + sums[5] * y_wide
        wider, taller = sums[5] * cos - sums[2] * sin, sums[1] * cos + sums[4] * sin
        result = (sums[3] * x_scale, sums[0] * scale, wider * x_scale, taller * scale, turned * RADIAN)
        out += r * (5 + (TASK.layout == "rows"))
        if TASK.layout == "rows":
            tl.store(out, 0.0)
            out += 1
        for k in tl.static_range(5):
            tl.store(out + k, tl.where(image >= 0, result[k], 0.0).to(out.dtype.element_ty))

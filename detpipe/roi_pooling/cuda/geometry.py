"""What the Triton kernels share: boxes in any layout, the level of each, its bins, and the weight of a cell in a bin.

A kernel is given the boxes as the user has them, and computes in registers what the operator needs of them: no tensor of
cells or weights is made. On the way back, one small kernel (:func:`prepare`) writes 36 bytes a box, which the program of each
tile of cells scans.

Numbers that differ from call to call travel as float32, since Triton compiles anew for some values of whole numbers in a
tuple: sizes of maps and ends of lists are exact up to 2 ** 24, and a scale is the sum of three of them, exact in float64.

Coordinates are in cells, and the value of cell k sits at coordinate k. Divisions are rounded as IEEE says (Triton's ``/`` of
float32 is not), and nothing is fused that decides how many samples a bin has.

N images, L levels, R boxes, h x w bins, H x W cells of a map.
"""

# Triton annotates its functions as they are on the host; compiled, its loops and tensors are something else.
# ruff: noqa: RET505 (a return in a branch that is chosen by the compiler needs its else)
# pyright: reportGeneralTypeIssues=false, reportArgumentType=false, reportOperatorIssue=false
# pyright: reportAttributeAccessIssue=false, reportIndexIssue=false, reportCallIssue=false

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

ADAPTIVE = tl.constexpr(0)  # in the place of a number of samples: as many as a bin has cells, rounded up
PRECISE = tl.constexpr(-1)  # no samples: the integral of the bilinear surface
TERMS = tl.constexpr(7)  # adaptive samples that may touch one cell: five, and two that rounding may put before them
SLACK = tl.constexpr(1 / 64)  # cells that rounding moves a sample by at most
FAR = tl.constexpr(1 << 20)  # cells; what lies beyond is there
BOXES_A_PROGRAM = 128
MARGIN = tl.constexpr(0.01)  # cells by which the search for samples is too generous, so that rounding loses none
RADIAN = tl.constexpr(math.pi / 180)
# arguments that differ with each call: not worth a compilation
VARYING = ["stride_box", "stride_side", "per_image", "images", "boxes_in_all"]


class Scene(NamedTuple):
    """Boxes as they were given, and the sizes of the maps that they lie on."""

    boxes: Tensor  # [R, 1 + S] with the image first, [N, P, S], or [R, S] with the ends of each image's boxes
    level: Tensor | None  # [R] int64, where the user's own rule chooses it
    ends: Sequence[int]  # for each image the number of boxes up to its last one
    images: int  # N
    sizes: Sequence[int]  # H_0, W_0, H_1, W_1, ...
    scales: Sequence[float]  # cells a pixel of each level
    areas: Sequence[float]  # w * h of the smallest box of each level but the first, in pixels

    @property
    def count(self) -> int:
        """R."""
        return self.boxes.shape[0] * (self.boxes.shape[1] if self.boxes.ndim == 3 else 1)

    def operands(self) -> tuple[Any, ...]:
        """Arguments of a kernel, named as in :func:`read_box`."""
        boxes = self.boxes.flatten(0, 1) if self.boxes.ndim == 3 else self.boxes
        level = boxes if self.level is None else self.level
        per_image = self.boxes.shape[1] if self.boxes.ndim == 3 else 0
        sizes, ends = (tuple(map(float, values)) or (0.0,) for values in (self.sizes, self.ends))
        return (
            *(boxes, boxes.stride(0), boxes.stride(1), level, ends, per_image, self.images, sizes),
            *(exact_parts(tuple(self.scales)), exact_parts(tuple(self.areas)) or (0.0,)),
        )

    def constants(self, dtype: torch.dtype, normalized: bool = False) -> dict[str, Any]:
        """Constants of a kernel, named as in :func:`read_box`; ``dtype`` is that of the maps."""
        layout = "padded" if self.boxes.ndim == 3 else "lists" if self.ends else "rows"
        return {
            "LEVELS": len(self.scales),
            "LAYOUT": layout,
            "LEVEL_GIVEN": self.level is not None,
            "NORMALIZED": normalized,
            "EXACT": accumulator(dtype),
        }


class Prepared(NamedTuple):
    """What a program of cells scans to find the boxes that touch it, 36 bytes a box."""

    where: Tensor  # [5, R] int32: map (level * N + image, or -1), first and last cell along y, and along x
    frame: Tensor  # [4, R] start and size of a bin along y, and along x


@cache
def exact_parts(values: tuple[float, ...]) -> tuple[float, ...]:
    """Write each number as three of float32, whose sum it is."""
    parts: list[float] = []
    for value in values:
        rest = value
        for _ in range(3):
            parts += struct.unpack("f", struct.pack("f", rest))
            rest -= parts[-1]
    return tuple(parts)


def accumulator(dtype: torch.dtype) -> tl.dtype:
    """Name what coordinates and sums of this type are computed in: float32, or float64 for float64."""
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
        # fused multiply-adds would change how many samples a bin has: sums that may be fused say so
        kernel[grid](tensor, *operands, **constants, enable_fp_fusion=False)


def prepare(
    scene: Scene, dtype: torch.dtype, size: tuple[int, int], samples: int, aligned: bool, normalized: bool
) -> Prepared:
    """Write what the programs of cells scan: one launch.

    Args:
        scene: the boxes.
        dtype: of the maps.
        size: h x w bins.
        samples: along each axis of a bin, or ``ADAPTIVE`` or ``PRECISE``.
        aligned: shift by half a cell.
        normalized: the boxes are relative to the map.

    Returns:
        The tables; the map of a box that no cell can belong to is -1.
    """
    exact = torch.promote_types(dtype, torch.float32)
    where = scene.boxes.new_empty((5, scene.count), dtype=torch.int32)
    frame = scene.boxes.new_empty((4, scene.count), dtype=exact)
    if scene.count:
        launch(
            prepare_kernel,
            (triton.cdiv(scene.count, BOXES_A_PROGRAM),),
            *(*scene.operands(), where, frame, scene.count),
            **scene.constants(dtype, normalized),
            h=size[0],
            w=size[1],
            SAMPLES=samples,
            ALIGNED=aligned,
            BLOCK=BOXES_A_PROGRAM,
        )
    return Prepared(where, frame)


@triton.jit
def divide(a, b):
    """Divide as IEEE says."""
    if a.dtype == tl.float64:
        return a / b
    else:
        return tl.div_rn(a, b)


@triton.jit
def turn(angle):
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
def exact_part(parts, k: tl.constexpr, EXACT: tl.constexpr):
    """The k-th number of ``exact_parts``."""
    return tl.cast(parts[3 * k], EXACT) + (tl.cast(parts[3 * k + 1], EXACT) + tl.cast(parts[3 * k + 2], EXACT))


@triton.jit
def read_image(boxes, stride_box, stride_side, ends, per_image, images, r, exists, LAYOUT: tl.constexpr):
    """The image of box r, -1 for none, and the address of its first side; r is one number or many."""
    at = boxes + r.to(tl.int64) * stride_box
    if LAYOUT == "rows":
        number = tl.load(at, mask=exists, other=-1.0).to(tl.float32)
        image = tl.where((number >= 0) & (number < images), number, -1.0).to(tl.int32)
        at += stride_side
    elif LAYOUT == "padded":
        image = (r // per_image).to(tl.int32)
    else:
        image = (r < 0).to(tl.int32)
        for k in tl.static_range(len(ends)):
            image += (r >= ends[k]).to(tl.int32)
    return image, at


@triton.jit
def choose_level(area, areas, LEVELS: tl.constexpr, EXACT: tl.constexpr):
    """The level of boxes of an area in pixels."""
    level = (area != area).to(tl.int32) * 0
    for k in tl.static_range(LEVELS - 1):
        level += (area >= exact_part(areas, k, EXACT)).to(tl.int32)
    return level


@triton.jit
def map_size(sizes, level, LEVELS: tl.constexpr):
    """Height and width of a level, as int32."""
    height, width = tl.cast(sizes[0], tl.int32), tl.cast(sizes[1], tl.int32)
    for k in tl.static_range(1, LEVELS):
        height = tl.where(level == k, tl.cast(sizes[2 * k], tl.int32), height)
        width = tl.where(level == k, tl.cast(sizes[2 * k + 1], tl.int32), width)
    return height, width


@triton.jit
def map_scale(scales, level, height, width, LEVELS: tl.constexpr, NORMALIZED: tl.constexpr, EXACT: tl.constexpr):
    """Cells a unit of the boxes along y and along x."""
    if NORMALIZED:
        return height.to(EXACT), width.to(EXACT)
    else:
        scale = exact_part(scales, 0, EXACT)
        for k in tl.static_range(1, LEVELS):
            scale = tl.where(level == k, exact_part(scales, k, EXACT), scale)
        return scale, scale


@triton.jit
def edges(low, high, scale, BINS: tl.constexpr, SAMPLES: tl.constexpr, ALIGNED: tl.constexpr):
    """Where the first bin along an axis begins, and the size of a bin, in the order of operations of the peers."""
    low, high = low * scale, high * scale
    if ALIGNED:
        low, high = low - 0.5, high - 0.5
    length = high - low
    if SAMPLES >= 0 and not ALIGNED:  # RoIAlign makes a box a cell long; NaN stays
        length = tl.where(length < 1.0, 1.0, length)
    return low, divide(length, length * 0 + BINS)


@triton.jit
def read_box(
    boxes, stride_box, stride_side, level_of, ends, per_image, images, sizes, scales, areas, r, exists,
    h: tl.constexpr, w: tl.constexpr, SAMPLES: tl.constexpr, ALIGNED: tl.constexpr,
    LEVELS: tl.constexpr, LAYOUT: tl.constexpr, LEVEL_GIVEN: tl.constexpr,
    NORMALIZED: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """Read box r, one number or many.

    Returns:
        Image, -1 where nothing is pooled, level, height and width of its map, start and size of bins along y and along x.
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
    y_start, y_size = edges(y1, y2, y_scale, h, SAMPLES, ALIGNED)
    x_start, x_size = edges(x1, x2, x_scale, w, SAMPLES, ALIGNED)
    finite = (y_start - y_start == 0) & (y_size - y_size == 0) & (x_start - x_start == 0) & (x_size - x_size == 0)
    if SAMPLES <= 0:  # a box without area has no samples, and no integral
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
def prepare_kernel(
    boxes, stride_box, stride_side, level_of, ends, per_image, images, sizes, scales, areas,
    where, frame, boxes_in_all,
    h: tl.constexpr, w: tl.constexpr, SAMPLES: tl.constexpr, ALIGNED: tl.constexpr,
    LEVELS: tl.constexpr, LAYOUT: tl.constexpr, LEVEL_GIVEN: tl.constexpr,
    NORMALIZED: tl.constexpr, EXACT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK boxes, one a lane."""
    r = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    exists = r < boxes_in_all
    image, level, _, _, y_start, y_size, x_start, x_size = read_box(
        boxes, stride_box, stride_side, level_of, ends, per_image, images, sizes, scales, areas, r, exists,
        h, w, SAMPLES, ALIGNED, LEVELS, LAYOUT, LEVEL_GIVEN, NORMALIZED, EXACT,
    )  # fmt: skip
    y_first, y_last = touched(y_start, y_size, h)
    x_first, x_last = touched(x_start, x_size, w)
    at = where + r
    tl.store(at, tl.where(image >= 0, level * images + image, -1), mask=exists)
    tl.store(at + boxes_in_all, y_first, mask=exists)
    tl.store(at + 2 * boxes_in_all, y_last, mask=exists)
    tl.store(at + 3 * boxes_in_all, x_first, mask=exists)
    tl.store(at + 4 * boxes_in_all, x_last, mask=exists)
    at = frame + r
    tl.store(at, y_start, mask=exists)
    tl.store(at + boxes_in_all, y_size, mask=exists)
    tl.store(at + 2 * boxes_in_all, x_start, mask=exists)
    tl.store(at + 3 * boxes_in_all, x_size, mask=exists)


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
def hits(where, r, own, top, left, boxes_in_all, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Whether boxes r of a table of maps and first and last cells touch a tile of a map."""
    at, exists = where + r, r < boxes_in_all
    hit = tl.load(at, mask=exists, other=-1) == own
    hit = hit & (tl.load(at + boxes_in_all, mask=exists, other=0) < top + ROWS)
    hit = hit & (tl.load(at + 2 * boxes_in_all, mask=exists, other=0) >= top)
    hit = hit & (tl.load(at + 3 * boxes_in_all, mask=exists, other=0) < left + COLUMNS)
    return hit & (tl.load(at + 4 * boxes_in_all, mask=exists, other=0) >= left)


@triton.jit
def span(y, x, along_y, along_x, count, top, bottom, left, right):
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

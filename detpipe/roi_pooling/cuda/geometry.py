"""What the Triton kernels share: boxes in any layout, the level of each, its bins, and the weight of a cell in a bin.

A kernel is given the boxes as the user has them, and computes in registers what the operator needs of them: no tensor of
cells or weights is made. On the way back, one small kernel (see :func:`prepare`) writes some numbers of each box, which the
program of each tile of cells scans.

A kernel takes a scene as one tuple (:func:`operands`), and what it is compiled for as one constant (:class:`Task`).

Numbers that differ from call to call travel as float32, since Triton compiles anew for some values of whole numbers in a
tuple: sizes of maps, ends of lists and strides of boxes are exact up to 2 ** 24, and a scale is the sum of three of them, exact
in float64.

Coordinates are in cells, and the value of cell k sits at coordinate k. Divisions are rounded as IEEE says (Triton's ``/`` of
float32 is not), and nothing is fused that decides how many samples a bin has.

N images, L levels, R boxes, h x w bins, H x W cells of a map.
"""

# Triton annotates its functions as they are on the host; compiled, its loops and tensors are something else.
# ruff: noqa: RET505 (a return in a branch that is chosen by the compiler needs its else)
# pyright: reportGeneralTypeIssues=false, reportArgumentType=false, reportOperatorIssue=false
# pyright: reportAttributeAccessIssue=false, reportIndexIssue=false, reportCallIssue=false

from __future__ import annotations

import struct
from functools import cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from detpipe.roi_pooling.scene import Scene

FARTHEST_EXACT = 1 << 24  # whole numbers up to which float32 is exact
BOXES_A_PROGRAM = 128  # of those that prepare them, or samples
VARYING = ["boxes_in_all"]  # differs with each call: not worth a compilation


class Task(NamedTuple):
    """What a kernel is compiled for."""

    h: int
    w: int
    samples: int
    aligned: bool
    normalized: bool
    rotated: bool
    levels: int  # L
    layout: str  # of boxes: "rows", "lists" or "padded"
    level_given: bool
    exact: tl.dtype  # of coordinates and sums


def make_task(scene: Scene, dtype: torch.dtype) -> Task:
    """Say what a kernel is compiled for; ``dtype`` is that of the maps."""
    layout = "padded" if scene.boxes.ndim == 3 else "lists" if scene.ends else "rows"
    return Task(*scene[7:], len(scene.scales), layout, scene.level is not None, accumulator(dtype))


def operands(scene: Scene) -> tuple[Any, ...]:
    """Write a scene as kernels take it: boxes, level, their strides with P and N, ends, sizes, scales, areas."""
    is_padded = scene.boxes.ndim == 3
    boxes = scene.boxes.flatten(0, 1) if is_padded else scene.boxes
    if max(boxes.stride()) >= FARTHEST_EXACT:
        boxes = boxes.contiguous()
    whole = (*boxes.stride(), scene.boxes.shape[1] if is_padded else 0, scene.images)
    numbers, ends, sizes = (tuple(map(float, values)) or (0.0,) for values in (whole, scene.ends, scene.sizes))
    scales, areas = exact_parts(tuple(scene.scales)), exact_parts(tuple(scene.areas)) or (0.0,)
    return boxes, boxes if scene.level is None else scene.level, numbers, ends, sizes, scales, areas


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


def launch_boxes(
    kernel: Any, programs: int, like: Tensor, scene: Scene, *tensors: Any, loops: bool = False, **constants: Any
) -> None:
    """Start a kernel whose programs own boxes, or rows of their bins.

    Args:
        kernel: takes tensors, the scene, C, the task and the channels of a block.
        programs: for each block of channels.
        like: ``[..., C]`` in the type of the maps.
        scene: the boxes.
        tensors: what comes first.
        loops: a program takes the blocks of channels one after the other.
        constants: of the kernel, beside the task and the block.
    """
    channels = like.shape[3]
    block, warps = channel_block(channels, 256, like)
    launch(
        *(kernel, (programs,) if loops else (programs, triton.cdiv(channels, block))),
        *(*tensors, operands(scene), channels),
        TASK=make_task(scene, like.dtype),
        BLOCK=block,
        num_warps=warps,
        **constants,
    )


def launch_tiles(
    kernel: Any, first: Any, grad: Tensor, scene: Scene, frames: int, *others: Any, rows: int = 1, **constants: Any
) -> Tensor:
    """Add up at cells what bins send to them: two launches, of which the programs of the second own tiles of cells.

    Args:
        kernel: takes the result, ``grad``, others, both tables of :func:`prepare`, the scene, R, C, the task, the channels of a
            block and constants.
        first: the kernel that prepares the tables, and the operands that it takes beside.
        grad: ``[R, h, w, C]``, contiguous.
        scene: the boxes.
        frames: as of :func:`prepare`.
        others: operands of the kernel.
        rows: rows of channels that a program takes at once, a warp each where a row fills it.
        constants: of the kernel: ROWS and COLUMNS of a tile, and more.

    Returns:
        ``[T, C]``, level by level, in the type of ``grad``; sums are float32, or float64 for float64.
    """
    channels = grad.shape[3]
    out = grad.new_empty((scene.cells, channels))
    if not grad.numel() or not out.numel():
        return out.zero_()
    task = make_task(scene, grad.dtype)
    where, frame = prepare(first[0], scene, task, frames, *first[1:])
    block, _ = channel_block(channels, 128, grad)
    launch(
        *(kernel, (count_tiles(scene, constants["ROWS"], constants["COLUMNS"]), triton.cdiv(channels, block))),
        *(out, grad, *others, where, frame, operands(scene), scene.count, channels),
        TASK=task,
        BLOCK=block,
        num_warps=max(1, block * rows // 128),
        **constants,
    )
    return out


def prepare(kernel: Any, scene: Scene, task: Task, frames: int, *others: Any) -> tuple[Tensor, Tensor]:
    """Write what the programs of tiles scan: one launch.

    Args:
        kernel: takes both tables, the scene, R, other operands, the task and the boxes, or samples, that a program looks at.
        scene: the boxes.
        task: what the kernel is compiled for.
        frames: numbers of a box in the second table.
        others: operands of the kernel, whose programs then own a box each.

    Returns:
        ``[5, R]`` int32: map (level * N + image, or -1 where no cell can belong to the box), first and last cell along y,
        and along x; and ``[frames, R]``, whatever the kernel of tiles takes, float32 or float64.
    """
    exact = torch.float64 if task.exact == tl.float64 else torch.float32
    where = scene.boxes.new_empty((5, scene.count), dtype=torch.int32)
    frame = scene.boxes.new_empty((frames, scene.count), dtype=exact)
    if scene.count:
        programs = scene.count if others else triton.cdiv(scene.count, BOXES_A_PROGRAM)
        boxes = (where, frame, operands(scene), scene.count)
        launch(kernel, (programs,), *boxes, *others, TASK=task, BLOCK=BOXES_A_PROGRAM)
    return where, frame


def count_tiles(scene: Scene, rows: int, columns: int) -> int:
    """Count the tiles of cells of all maps."""
    return scene.images * sum(triton.cdiv(height, rows) * triton.cdiv(width, columns) for height, width in scene.levels)


@triton.jit
def divide(a, b):
    """Divide as IEEE says."""
    if a.dtype == tl.float64:
        return a / b
    else:
        return tl.div_rn(a, b)


@triton.jit
def exact_part(parts, k: tl.constexpr, EXACT: tl.constexpr):
    """The k-th number of ``exact_parts``."""
    return tl.cast(parts[3 * k], EXACT) + (tl.cast(parts[3 * k + 1], EXACT) + tl.cast(parts[3 * k + 2], EXACT))


@triton.jit
def read_image(scene, r, exists, TASK: tl.constexpr):
    """The image of box r, -1 for none, and the address of its first side; r is one number or many."""
    boxes, numbers, ends = scene[0], scene[2], scene[3]
    at = boxes + r.to(tl.int64) * tl.cast(numbers[0], tl.int64)
    if TASK.layout == "rows":
        number = tl.load(at, mask=exists, other=-1.0).to(tl.float32)
        image = tl.where((number >= 0) & (number < numbers[3]), number, -1.0).to(tl.int32)
        at += tl.cast(numbers[1], tl.int64)
    elif TASK.layout == "padded":
        image = (r // tl.cast(numbers[2], tl.int32)).to(tl.int32)
    else:
        image = (r < 0).to(tl.int32)
        for k in tl.static_range(len(ends)):
            image += (r >= ends[k]).to(tl.int32)
    return image, at


@triton.jit
def map_size(sizes, level, TASK: tl.constexpr):
    """Height and width of a level, as int32."""
    height, width = tl.cast(sizes[0], tl.int32), tl.cast(sizes[1], tl.int32)
    for k in tl.static_range(1, TASK.levels):
        height = tl.where(level == k, tl.cast(sizes[2 * k], tl.int32), height)
        width = tl.where(level == k, tl.cast(sizes[2 * k + 1], tl.int32), width)
    return height, width


@triton.jit
def map_scale(scales, level, height, width, TASK: tl.constexpr):
    """Cells a unit of the boxes along y and along x."""
    if TASK.normalized:
        return height.to(TASK.exact), width.to(TASK.exact)
    else:
        scale = exact_part(scales, 0, TASK.exact)
        for k in tl.static_range(1, TASK.levels):
            scale = tl.where(level == k, exact_part(scales, k, TASK.exact), scale)
        return scale, scale


@triton.jit
def read_sides(scene, r, exists, TASK: tl.constexpr):
    """Read box r, one number or many.

    Returns:
        Its image, -1 for none; level, height and width of its map; cells a unit along y and along x; its first four numbers.
    """
    level_of, numbers, sizes, scales, areas = scene[1], scene[2], scene[4], scene[5], scene[6]
    image, at = read_image(scene, r, exists, TASK)
    step = tl.cast(numbers[1], tl.int64)
    a = tl.load(at, mask=exists, other=0.0).to(TASK.exact)
    b = tl.load(at + step, mask=exists, other=0.0).to(TASK.exact)
    c = tl.load(at + 2 * step, mask=exists, other=0.0).to(TASK.exact)
    d = tl.load(at + 3 * step, mask=exists, other=0.0).to(TASK.exact)
    if TASK.level_given:
        level = tl.load(level_of + r, mask=exists, other=0).to(tl.int32)
    else:
        area = c * d if TASK.rotated else (c - a) * (d - b)
        level = (area != area).to(tl.int32) * 0
        for k in tl.static_range(TASK.levels - 1):
            level += (area >= exact_part(areas, k, TASK.exact)).to(tl.int32)
    height, width = map_size(sizes, level, TASK)
    y_scale, x_scale = map_scale(scales, level, height, width, TASK)
    return image, level, height, width, y_scale, x_scale, a, b, c, d


@triton.jit
def map_of(maps, level, image, height, width, channels, TASK: tl.constexpr):
    """The address of a map's first cell."""
    first = maps[0]
    for k in tl.static_range(1, TASK.levels):
        first = tl.where(level == k, maps[k], first)
    return first + image.to(tl.int64) * height * width * channels


@triton.jit
def store_columns(table, r, exists, boxes_in_all, values):
    """Write a number of each column of a table for boxes r."""
    for k in tl.static_range(len(values)):
        tl.store(table + k * boxes_in_all + r, values[k], mask=exists)


@triton.jit
def load_columns(table, r, exists, boxes_in_all, COLUMNS: tl.constexpr):
    """Read what :func:`store_columns` wrote; 1 for a box that is not there, which can be divided by."""
    values = ()
    for k in tl.static_range(COLUMNS):
        values = values + (tl.load(table + k * boxes_in_all + r, mask=exists, other=1.0),)  # noqa: RUF005
    return values


@triton.jit
def store_map(where, r, exists, boxes_in_all, scene, image, level, top, bottom, left, right):
    """Write the map of boxes r, -1 if none, and the first and the last cell that they may read along y and along x."""
    own = tl.where(image >= 0, level * tl.cast(scene[2][3], tl.int32) + image, -1)
    store_columns(where, r, exists, boxes_in_all, (own, top, bottom, left, right))


@triton.jit
def find_tile(tile, scene, ROWS: tl.constexpr, COLUMNS: tl.constexpr, TASK: tl.constexpr):
    """Of a tile its map, the first cell of that map among all, height and width of it, and the tile's upper left cell."""
    sizes, images = scene[4], tl.cast(scene[2][3], tl.int32)
    level = tile * 0
    height, width = map_size(sizes, level, TASK)
    first = level.to(tl.int64)
    for k in tl.static_range(1, TASK.levels):
        tiles = images * tl.cdiv(height, ROWS) * tl.cdiv(width, COLUMNS)
        is_beyond = (level == k - 1) & (tile >= tiles)
        first += tl.where(is_beyond, images.to(tl.int64) * height * width, 0)
        tile = tl.where(is_beyond, tile - tiles, tile)
        level = tl.where(is_beyond, k, level)
        height, width = map_size(sizes, level, TASK)
    columns = tl.cdiv(width, COLUMNS)
    each = tl.cdiv(height, ROWS) * columns
    image, tile = tile // each, tile % each
    first += image.to(tl.int64) * height * width
    return level * images + image, first, height, width, tile // columns * ROWS, tile % columns * COLUMNS


@triton.jit
def hits(where, r, own, top, left, boxes_in_all, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Whether boxes r touch a tile of a map, by what :func:`store_map` wrote of them."""
    at = where + r
    touches = tl.load(at, mask=r < boxes_in_all, other=-1) == own
    touches &= tl.load(at + boxes_in_all, mask=touches, other=0) < top + ROWS
    touches &= tl.load(at + 2 * boxes_in_all, mask=touches, other=0) >= top
    touches &= tl.load(at + 3 * boxes_in_all, mask=touches, other=0) < left + COLUMNS
    return touches & (tl.load(at + 4 * boxes_in_all, mask=touches, other=0) >= left)


@triton.jit
def store_cell(out, total, y, x, first_cell, height, width, c, channels):
    """Write the sum of a cell of a tile, if the cell is on the map."""
    at = out + (first_cell + y * width + x) * channels + c
    exists = c < tl.where((y < height) & (x < width), channels, 0)
    tl.store(at, total.to(out.dtype.element_ty), mask=exists)

"""Feature maps as one table of cells, so that boxes of all images and pyramid levels are pooled in one call.

N images, L levels, C channels, R boxes, T cells of all maps.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class CellTable(NamedTuple):
    """The cells of N images at L levels, a row each: level by level, image by image, row by row.

    Map ``m = level * N + image`` begins at ``offset(m)``, and its cell (y, x) is row ``offset(m) + y * W_level + x``.
    """

    rows: Tensor  # [T, C], T = sum over levels of N * H_l * W_l
    images: int  # N
    sizes: tuple[tuple[int, int], ...]  # (H_l, W_l) of each level


def cell_table(levels: Sequence[Tensor]) -> CellTable:
    """Lay out maps ``[N, C, H_l, W_l]`` with the channels last, which costs one copy, or none for a single such map."""
    rows = [level.flatten(0, 2) for level in channels_last(levels)]
    sizes = tuple((level.shape[2], level.shape[3]) for level in levels)
    return CellTable(rows[0] if len(rows) == 1 else torch.cat(rows), levels[0].shape[0], sizes)


def cut_table(rows: Tensor, images: int, sizes: Sequence[int]) -> list[Tensor]:
    """Cut the cells of all maps, ``[T, C]``, into L maps ``[N, C, H_l, W_l]`` of the sizes H_0, W_0, H_1, W_1, ..."""
    levels = list(zip(sizes[::2], sizes[1::2], strict=True))
    parts = rows.split([images * height * width for height, width in levels])
    shapes = [(images, *size, rows.shape[1]) for size in levels]
    return [part.view(shape).permute(0, 3, 1, 2) for part, shape in zip(parts, shapes, strict=True)]


def channels_last(maps: Sequence[Tensor]) -> list[Tensor]:
    """Lay maps out as ``[N, H_l, W_l, C]``, which costs nothing where their channels are last in memory."""
    return [one.permute(0, 2, 3, 1).contiguous() for one in maps]


def per_map(values: Sequence[float], images: int, like: Tensor) -> Tensor:
    """Spread one number a level to one a map, ``[L * N]``, without a copy from the host."""
    return torch.cat([like.new_full((images,), value) for value in values])


def geometry(images: int, sizes: Sequence[tuple[int, int]], chosen: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Look up where each chosen map begins in the table, its height and its width: ``[R]`` int64 each."""
    if len(sizes) == 1:
        [(height, width)] = sizes
        return chosen * (height * width), torch.full_like(chosen, height), torch.full_like(chosen, width)
    heights, widths = (per_map([size[axis] for size in sizes], images, chosen) for axis in (0, 1))
    cells = heights * widths
    first = cells.cumsum(0) - cells
    return first[chosen], heights[chosen], widths[chosen]

"""Boxes on the maps that they are pooled from, in units of cells.

N images, L levels, R boxes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from detpipe.roi_pooling.axis import Axis, split_evenly
from detpipe.roi_pooling.layouts import is_plain
from detpipe.roi_pooling.maps import CellTable, cell_table, geometry, per_map
from detpipe.roi_pooling.scene import Scene


class Placement(NamedTuple):
    """Boxes on the maps that they are pooled from."""

    table: CellTable
    chosen: Tensor  # [R] int64, the map of each box
    first: Tensor  # [R] int64, where that map begins in the table
    height: Tensor  # [R] int64, its cells
    width: Tensor  # [R] int64
    scale: Tensor  # [R, 2] cells a unit of the boxes along x and y
    boxes: Tensor  # [R, 4] or [R, 5], as they were given


def place(maps: Sequence[Tensor], scene: Scene) -> Placement:
    """Check the boxes of a scene and put each on its map; ``boxes * scale`` is in cells."""
    rois, level = scene.read(maps[0])
    table = cell_table(maps)
    chosen = rois.image if level is None else level * table.images + rois.image
    first, height, width = geometry(table.images, table.sizes, chosen)
    if scene.normalized:
        scale = torch.stack((width, height), dim=1).to(rois.boxes.dtype)
    elif level is None:
        scale = rois.boxes.new_full((), scene.scales[0]).expand(len(chosen), 2)
    else:
        scale = per_map(scene.scales, 1, rois.boxes)[level, None].expand(-1, 2)
    return Placement(table, chosen, first, height, width, scale, rois.boxes)


def bin_edges(
    placement: Placement, size: tuple[int, int], aligned: bool, at_least: float | None = None
) -> tuple[Axis, Axis]:
    """Divide xyxy boxes into bins, along y and along x, in cells; ``at_least`` makes shorter boxes that long."""
    cells = placement.boxes * placement.scale.repeat(1, 2)
    if aligned:
        cells = cells - 0.5
    axes = []
    for low, high, extent, bins in ((1, 3, placement.height, size[0]), (0, 2, placement.width, size[1])):
        length = cells[:, high] - cells[:, low]
        if at_least is not None:
            length = length.where(~(length < at_least), at_least)  # at the least, the gradient is that of a longer box
        axes.append((cells[:, low], split_evenly(length, bins), extent, bins))
    return axes[0], axes[1]


def static_bound(placement: Placement) -> int | None:
    """How many cells a bin reads at most, where looking at the boxes is not possible or would wait for the device."""
    if placement.boxes.device.type == "cpu" and is_plain(placement.boxes):
        return None
    return max(max(size) for size in placement.table.sizes)

"""What an operator is called with: boxes as they were given, the maps that they lie on, and how bins are read.

Every function and kernel of means and maxima takes maps and one scene. Operators take its fields one by one, in this order.

N images, L levels, R boxes, h x w bins, T cells of all maps.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from detpipe.roi_pooling.layouts import (
    MOST_LISTED,
    ROTATED_SIDES,
    SIDES,
    GivenBoxes,
    RoIs,
    describe,
    is_plain,
    looks_at_values,
    read_values,
    with_images,
)
from detpipe.roi_pooling.levels import FPNLevels, choose_level
from detpipe.roi_pooling.operators import Operator, operator

ADAPTIVE, PRECISE = 0, -1  # in the place of a number of samples
EQUAL_STEP, FAST_RCNN = -2, -3  # the largest cell, with one of two roundings
FIELDS = (
    "Tensor boxes, Tensor? level, SymInt[] ends, float[] scales, float[] areas, SymInt images, SymInt[] sizes, "
    "SymInt h, SymInt w, SymInt samples, bool aligned, bool normalized, bool rotated"
)


class Scene(NamedTuple):
    """Boxes, maps and bins of one call."""

    boxes: Tensor  # [R, 1 + B] with the image first, [N, P, B], or [R, B] with the ends of each image's boxes
    level: Tensor | None  # [R] int64, where the user's own rule chooses it
    ends: Sequence[int]  # for each image the number of boxes up to its last one, where they were given as a list
    scales: Sequence[float]  # cells a pixel of each level
    areas: Sequence[float]  # w * h of the smallest box of each level but the first, in pixels, where they choose it
    images: int  # N
    sizes: Sequence[int]  # H_0, W_0, H_1, W_1, ...
    h: int  # bins
    w: int
    samples: int = ADAPTIVE  # along each axis of a bin; or ADAPTIVE, PRECISE, EQUAL_STEP, FAST_RCNN
    aligned: bool = True  # shifted by half a cell
    normalized: bool = False  # boxes are relative to the map, and the scales are not used
    rotated: bool = False

    @property
    def count(self) -> int:
        """R."""
        return self.boxes.shape[:-1].numel()

    @property
    def cells(self) -> int:
        """T."""
        return self.images * sum(height * width for height, width in self.levels)

    @property
    def levels(self) -> list[tuple[int, int]]:
        """(H_l, W_l) of each level."""
        return list(zip(self.sizes[::2], self.sizes[1::2], strict=True))

    @property
    def sides(self) -> str:
        """Names of the numbers of a box."""
        return ROTATED_SIDES if self.rotated else SIDES

    def read(self, features: Tensor) -> tuple[RoIs, Tensor | None]:
        """Check the boxes and write them row by row, and tell the level of each, or None if there is one."""
        rois = read_values(GivenBoxes(self.boxes, tuple(self.ends), ()), features, self.sides)
        if not self.areas:
            return rois, self.level
        sides = rois.boxes[:, 2:4] if self.rotated else rois.boxes[:, 2:] - rois.boxes[:, :2]
        return rois, choose_level(sides[:, 0] * sides[:, 1], self.areas)

    def for_kernels(self) -> Scene:
        """Write the image of each box out where the list of ends is too long to be an argument of a kernel."""
        if len(self.ends) <= MOST_LISTED:
            return self
        return self._replace(boxes=with_images(GivenBoxes(self.boxes, tuple(self.ends), ())).boxes, ends=())


class Choice(NamedTuple):
    """How the level of each box is chosen; the fields are those of a scene."""

    scales: Sequence[float]
    level: Tensor | None = None
    areas: Sequence[float] = ()


def make_scene(maps: Sequence[Tensor], given: GivenBoxes, choice: Choice, size: tuple[int, int], **bins: Any) -> Scene:
    """Put boxes on maps.

    Args:
        maps: L tensors ``[N, C, H_l, W_l]``.
        given: the boxes.
        choice: the scale of each level, and how a level is chosen.
        size: h x w bins.
        bins: the last fields of a scene, by name.

    Returns:
        The scene.
    """
    sizes = [side for one in maps for side in one.shape[2:]]
    scales, level, areas = choice
    ends = list(given.ends)
    return Scene(given.boxes, level, ends, list(scales), list(areas), maps[0].shape[0], sizes, *size, **bins)


def choose_levels(
    levels: Callable[[Tensor, Sequence[int]], Tensor],
    features: Tensor,
    given: GivenBoxes,
    strides: list[int],
    sides: str = SIDES,
) -> Choice:
    """Say how a level is chosen: by areas, which kernels compare, or for each box by what the user's own rule tells."""
    scales = [1.0 / stride for stride in strides]
    if len(strides) == 1:
        return Choice(scales)
    if type(levels) is FPNLevels and strides == sorted(set(strides)):
        return Choice(scales, areas=levels.areas(strides))
    boxes = read_values(given, features, sides).boxes.detach()
    if sides != SIDES:  # as if they were not rotated
        boxes = torch.cat((boxes[:, :2] - boxes[:, 2:4] / 2, boxes[:, :2] + boxes[:, 2:4] / 2), dim=1)
    level = levels(boxes, strides)
    if not isinstance(level, Tensor) or level.shape != boxes.shape[:1] or level.is_floating_point():
        found = f"{describe(level)} {getattr(level, 'dtype', '')}"
        raise ValueError(f"levels must tell an index into the strides a box, integers [{len(boxes)}], got {found}")
    if is_plain(level) and looks_at_values(level) and ((level < 0) | (level >= len(strides))).any():
        raise ValueError(f"levels must tell indices in 0..{len(strides) - 1}, got {level.unique().tolist()}")
    return Choice(scales, level)


def scene_operator(name: str, own: str, result: str = "Tensor") -> Callable[[Callable], Operator]:
    """Register an operator of some arguments of its own, in the language of schemas, and the fields of a scene."""
    return operator(name, f"({own}, {FIELDS}) -> {result}")

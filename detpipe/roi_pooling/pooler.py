"""What every RoI pooler shares: the choice of a pyramid level for each box, and one call for all levels."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from numbers import Real

import torch
from torch import Tensor, nn

from detpipe.roi_pooling.layouts import (
    SIDES,
    Boxes,
    as_given,
    check_features,
    describe,
    read_layout,
    read_output_size,
    to_rois,
)
from detpipe.roi_pooling.levels import FPNLevels
from detpipe.roi_pooling.scene import Scene, choose_levels, make_scene


class RoIPooler(nn.Module, ABC):
    """Cut the same small map out of the features for every box.

    Args:
        output_size: cells of the result, one number or (height, width).
        levels: which pyramid level a box is pooled from; in Python any function (boxes ``[R, 4]``, strides) -> ``[R]``.
    """

    sides = SIDES  # the numbers that a box consists of
    has_box_gradient = True  # False where boxes are rounded

    def __init__(
        self,
        output_size: int | tuple[int, int],
        levels: FPNLevels = FPNLevels(),  # noqa: B008 (frozen)
    ) -> None:
        super().__init__()
        self.output_size: tuple[int, int] = read_output_size(output_size)
        self.levels = levels

    @abstractmethod
    def pool(self, maps: list[Tensor], scene: Scene) -> Tensor:
        """Pool the boxes of a scene, each from the map of its level: ``[R, C, h, w]``."""

    def forward(self, features: dict[str, Tensor], boxes: Boxes, strides: dict[str, int]) -> Tensor:
        """Pool each box from the level that suits its size.

        Args:
            features: level name -> ``[N, C, H_l, W_l]``.
            boxes: ``[R, 5]``, a list of N tensors ``[P_i, 4]``, or ``[N, P, 4]``, xyxy in image pixels.
            strides: image pixels a cell of each level; the same names as ``features``.

        Returns:
            ``[R, C, h, w]``, or ``[N, P, C, h, w]`` for boxes ``[N, P, 4]``.

        Raises:
            ValueError: ``features`` lacks a level of ``strides``, or the boxes have another layout, are not finite or
                have no area.
        """
        maps = read_levels(features, strides)
        given = read_layout(boxes, maps[0], self.sides)
        choice = choose_levels(self.levels, maps[0], given, list(strides.values()), self.sides)
        return as_given(self.pool(maps, make_scene(maps, given, choice, self.output_size)), given)


def check_strides(strides: dict[str, int]) -> None:
    """Refuse what is not level name -> image pixels a cell.

    Raises:
        ValueError: another type, no strides, or one that is not positive.
    """
    is_named = isinstance(strides, Mapping) and len(strides) > 0
    if not is_named or not all(isinstance(one, Real) and 0 < one < math.inf for one in strides.values()):
        raise ValueError(f"strides must name at least one level, each with a positive stride, got {strides}")


def read_levels(features: dict[str, Tensor], strides: dict[str, int]) -> list[Tensor]:
    """Take the maps of the declared levels.

    Args:
        features: level name -> ``[N, C, H_l, W_l]``.
        strides: level name -> image pixels a cell.

    Returns:
        The maps, in the order of the strides.

    Raises:
        ValueError: no strides, one that is not positive, a level that is missing, or maps that differ in images, channels
            or type.
    """
    check_strides(strides)
    if not isinstance(features, Mapping):
        raise ValueError(f"features must be a dictionary, level name -> [N, C, H, W], got {describe(features)}")
    missing = [level for level in strides if level not in features]
    if missing:
        raise ValueError(f"features lack the levels {missing}: strides has {list(strides)}, got {list(features)}")
    maps = [features[level] for level in strides]
    for level, values in zip(strides, maps, strict=True):
        check_features(values, f"features[{level!r}]")
        if values.shape[:2] != maps[0].shape[:2] or values.dtype != maps[0].dtype:
            raise ValueError(
                f"features[{level!r}] is {list(values.shape)} {values.dtype}, but the first level is "
                f"{list(maps[0].shape)} {maps[0].dtype}: images, channels and type must agree"
            )
    return maps


def pool_every_level(
    pool: Callable[[Tensor, Tensor, float], Tensor],
    features: dict[str, Tensor],
    boxes: Boxes,
    strides: dict[str, int],
    levels: Callable[[Tensor, Sequence[int]], Tensor],
) -> Tensor:
    """Pool every box from every level, and take the right one: what ONNX knows is pooling from one map.

    Args:
        pool: map ``[N, C, H, W]``, boxes ``[R, 5]`` and cells a pixel -> ``[R, C, h, w]``.
        features: as of :meth:`RoIPooler.forward`.
        boxes: as there.
        strides: as there.
        levels: which pyramid level a box is pooled from.

    Returns:
        As there.
    """
    maps, rois = read_levels(features, strides), to_rois(boxes)
    chosen = levels(rois[:, 1:], list(strides.values()))[:, None, None, None]
    pooled = None
    for index, (level, stride) in enumerate(zip(maps, strides.values(), strict=True)):
        here = pool(level, rois, 1.0 / stride)
        pooled = here if pooled is None else torch.where(chosen == index, here, pooled)
    assert pooled is not None
    return pooled.unflatten(0, boxes.shape[:2]) if isinstance(boxes, Tensor) and boxes.ndim == 3 else pooled


class MultiLevel(nn.Module):
    """A pooler with the strides of its pyramid, for use outside a detector.

    Args:
        pooler: cuts the maps out, and chooses the level of each box.
        strides: level name -> image pixels a cell, finest first; declared, never guessed from sizes.

    Raises:
        ValueError: no strides, or one that is not positive.

    Example:
        >>> from detpipe.roi_pooling import RoIAlign
        >>> pyramid = {"p2": torch.ones(1, 2, 16, 16), "p3": torch.ones(1, 2, 8, 8)}
        >>> pool = MultiLevel(RoIAlign(3), {"p2": 4, "p3": 8})
        >>> pool(pyramid, [torch.tensor([[0.0, 0.0, 30.0, 20.0]])]).shape
        torch.Size([1, 2, 3, 3])
    """

    def __init__(self, pooler: RoIPooler, strides: dict[str, int]) -> None:
        super().__init__()
        check_strides(strides)
        self.pooler, self.strides = pooler, dict(strides)

    def forward(self, features: dict[str, Tensor], boxes: Boxes) -> Tensor:
        """Pool each box from the level that suits its size.

        Args:
            features: level name -> ``[N, C, H_l, W_l]``.
            boxes: ``[R, 5]``, a list of N tensors ``[P_i, 4]``, or ``[N, P, 4]``, xyxy in image pixels.

        Returns:
            ``[R, C, h, w]``, or ``[N, P, C, h, w]`` for boxes ``[N, P, 4]``.
        """
        return self.pooler(features, boxes, self.strides)

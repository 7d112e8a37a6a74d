"""What every RoI pooler shares: box layouts, and the choice of a pyramid level for each box."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from detpipe.roi_pooling.levels import assign_levels
from detpipe.types import Features

Boxes = Tensor | Sequence[Tensor]


def to_rois(boxes: Boxes) -> Tensor:
    """Write boxes in the ``[R, 5]`` layout of RoI operators.

    Args:
        boxes: ``[R, 5]`` (image index, x1, y1, x2, y2), a list of N tensors ``[P_i, 4]``, or ``[N, P, 4]``.

    Returns:
        ``[R, 5]``.

    Raises:
        ValueError: none of the three layouts.
    """
    if isinstance(boxes, Tensor):
        if boxes.ndim == 2 and boxes.shape[1] == 5:
            return boxes
        if boxes.ndim != 3 or boxes.shape[2] != 4:
            raise ValueError(f"boxes must be [R, 5], a list of [P_i, 4], or [N, P, 4]; got {list(boxes.shape)}")
        images, count = boxes.shape[:2]
        index = torch.arange(images, device=boxes.device, dtype=boxes.dtype).repeat_interleave(count)
        return torch.cat((index[:, None], boxes.flatten(0, 1)), dim=1)
    if not boxes or any(box.ndim != 2 or box.shape[1] != 4 for box in boxes):
        raise ValueError(f"a list of boxes must hold [P_i, 4] tensors; got {[list(box.shape) for box in boxes]}")
    return torch.cat([torch.nn.functional.pad(box, (1, 0), value=float(i)) for i, box in enumerate(boxes)])


class RoIPooler(nn.Module, ABC):
    """Cut the same small map out of the features for every box.

    Args:
        output_size: cells of the result, one number or (height, width).
    """

    def __init__(self, output_size: int | tuple[int, int]) -> None:
        super().__init__()
        size = (output_size, output_size) if isinstance(output_size, int) else tuple(output_size)
        if len(size) != 2 or min(size) < 1:
            raise ValueError(f"output_size must be one or two positive numbers, got {output_size}")
        self.output_size: tuple[int, int] = (size[0], size[1])

    @abstractmethod
    def pool(self, features: Tensor, rois: Tensor, stride: int) -> Tensor:
        """Pool one level: ``[N, C, H, W]`` and ``[R, 5]`` in image pixels -> ``[R, C, h, w]``."""

    def forward(self, features: Features, boxes: Boxes, strides: dict[str, int]) -> Tensor:
        """Pool each box from the level that suits its size.

        Args:
            features: level name -> ``[N, C, H_l, W_l]``.
            boxes: ``[R, 5]``, a list of N tensors ``[P_i, 4]``, or ``[N, P, 4]``, xyxy in image pixels.
            strides: image pixels a cell of each level; the same names as ``features``.

        Returns:
            ``[R, C, h, w]``, or ``[N, P, C, h, w]`` for boxes ``[N, P, 4]``.

        Raises:
            ValueError: ``features`` lacks a level of ``strides``, or the boxes have another layout.
        """
        missing = [level for level in strides if level not in features]
        if missing:
            raise ValueError(f"features lack the levels {missing}: strides has {list(strides)}, got {list(features)}")
        rois = to_rois(boxes)
        if len(strides) == 1:
            [(level, stride)] = strides.items()
            pooled = self.pool(features[level], rois, stride)
        else:
            pooled = self._pool_levels(features, rois, strides)
        return pooled.unflatten(0, boxes.shape[:2]) if isinstance(boxes, Tensor) and boxes.ndim == 3 else pooled

    def _pool_levels(self, features: Features, rois: Tensor, strides: dict[str, int]) -> Tensor:
        first = features[next(iter(strides))]
        pooled = first.new_zeros((len(rois), first.shape[1], *self.output_size))
        chosen = assign_levels(rois[:, 1:], list(strides.values()))
        for index, (level, stride) in enumerate(strides.items()):
            rows = torch.where(chosen == index)[0]
            pooled = pooled.index_put((rows,), self.pool(features[level], rois[rows], stride).to(pooled.dtype))
        return pooled

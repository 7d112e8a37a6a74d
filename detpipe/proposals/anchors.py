"""Anchors: reference boxes of a few sizes and shapes around the center of every cell of a feature map.

Ren et al., "Faster R-CNN", 2015, arXiv 1506.01497, section 3.1.1; one size a level of a pyramid: Lin et al., "Feature
Pyramid Networks", 2017, arXiv 1612.03144, section 4.1.

Convention: cell (i, j) at stride s is centered on ``((j + offset) * s, (i + offset) * s)``, x before y, in pixels of the
padded batch. With an offset of .5, the default, that is the middle of the pixels that the cell stands for, as RoI pooling
here has it. ``offset=0, rounded=True`` gives torchvision's anchors: centered on the cell's top left corner, with corners at
whole pixels around it; with ``measured=True`` its strides as well, whole pixels of the batch a cell by axis. A ratio is height
divided by width; anchors of one size have one area.

A shapes a cell, numbered ratio by ratio and within a ratio size by size; H x W cells. Anchors of a level are ordered by row,
column and shape, levels follow each other.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from detpipe.support.numbers import check_numbers


@dataclass(frozen=True)
class AnchorGrid:
    """The anchors of one level. Their edges are kept apart, because what holds for a row holds for all its columns."""

    x: Tensor  # [A, W, 2] left and right edge
    y: Tensor  # [A, H, 2] top and bottom edge

    @property
    def size(self) -> tuple[int, int]:
        """H, W."""
        return self.y.shape[1], self.x.shape[1]

    @property
    def count(self) -> int:
        """H W A, the number of anchors."""
        return self.x.shape[0] * self.x.shape[1] * self.y.shape[1]

    def boxes(self) -> Tensor:
        """Write the anchors out: ``[H * W * A, 4]`` xyxy."""
        shapes, (height, width) = len(self.x), self.size
        x = self.x.transpose(0, 1)[None].expand(height, width, shapes, 2)
        y = self.y.transpose(0, 1)[:, None].expand(height, width, shapes, 2)
        return torch.stack((x[..., 0], y[..., 0], x[..., 1], y[..., 1]), dim=-1).reshape(-1, 4)


@dataclass(frozen=True)
class Anchors:
    """Which anchors there are.

    Args:
        sizes: square roots of the anchors' areas, in pixels of the resized image: for each level, finest first, a list, all
            equally long; or one flat list for all levels, which is dealt to them in equal parts in its order. None: 8 times
            the stride of each level of a pyramid, 8, 16 and 32 times that of a single level.
        ratios: height divided by width.
        offset: where in its cell an anchor is centered: .5 is the middle, 0 the top left corner.
        rounded: round half sides to whole pixels, as torchvision does.
        measured: the stride of an axis is the side of the batch by the number of cells, rounded down, not the declared one.

    Raises:
        ValueError: a size or ratio that is not positive, levels with unequal numbers of sizes, an offset outside 0..1.

    Example:
        >>> Anchors(sizes=[[32]], ratios=[1.0]).grids([(1, 2)], [16])[0].boxes().tolist()
        [[-8.0, -8.0, 24.0, 24.0], [8.0, -8.0, 40.0, 24.0]]
        >>> Anchors(sizes=[32, 64, 128, 256]).level_sizes([8, 16])
        [[32, 64], [128, 256]]
    """

    sizes: Sequence[float] | Sequence[Sequence[float]] | None = None
    ratios: Sequence[float] = (0.5, 1.0, 2.0)
    offset: float = 0.5
    rounded: bool = False
    measured: bool = False

    def __post_init__(self) -> None:
        if not self.ratios or not all(0 < ratio < math.inf for ratio in self.ratios):
            raise ValueError(f"anchors need ratios above 0 (height divided by width), got {self.ratios}")
        check_numbers("must be in 0..1", offset=self.offset)
        if self.sizes is None:
            return
        flat = [size for size in self.sizes if not isinstance(size, Sequence)]
        lists = [sizes for sizes in self.sizes if isinstance(sizes, Sequence)]
        if flat and lists:
            raise ValueError(f"anchor sizes are either numbers or a list for each level, not both; got {self.sizes}")
        if not self.sizes or not all(0 < size < math.inf for sizes in [*lists, flat] for size in sizes):
            raise ValueError(f"anchors need sizes above 0 in pixels, flat or a list for each level; got {self.sizes}")
        if lists and (not lists[0] or len({len(sizes) for sizes in lists}) > 1):
            raise ValueError(f"every level needs as many sizes (they share a network), at least one; got {self.sizes}")

    def level_sizes(self, strides: Sequence[int]) -> list[list[float]]:
        """List the sizes of each level.

        Args:
            strides: of the levels, finest first.

        Returns:
            For each level its sizes in pixels.

        Raises:
            ValueError: ``sizes`` are given for another number of levels, or cannot be dealt to them in equal parts.
        """
        if self.sizes is None:
            factors = (8, 16, 32) if len(strides) == 1 else (8,)
            return [[float(factor * stride) for factor in factors] for stride in strides]
        lists = [list(sizes) for sizes in self.sizes if isinstance(sizes, Sequence)]
        if lists and len(lists) != len(strides):
            raise ValueError(
                f"anchor sizes are given for {len(lists)} levels, but there are {len(strides)} (strides "
                f"{list(strides)}); give one list for each, finest first, extra levels included: got {self.sizes}"
            )
        if lists:
            return lists
        flat: list[float] = [size for size in self.sizes if not isinstance(size, Sequence)]
        share, rest = divmod(len(flat), len(strides))
        if rest:
            raise ValueError(
                f"{len(flat)} anchor sizes cannot be dealt to {len(strides)} levels (strides {list(strides)}) in equal "
                f"parts; give a multiple of {len(strides)}, extra levels included: got {self.sizes}"
            )
        return [flat[level * share : (level + 1) * share] for level in range(len(strides))]

    def per_cell(self, strides: Sequence[int]) -> int:
        """Count A, the anchors of a cell, for levels of these strides."""
        return len(self.ratios) * len(self.level_sizes(strides)[0])

    def grids(
        self,
        cells: Sequence[tuple[int, int]],
        strides: Sequence[int],
        device: torch.device | None = None,
        batch: tuple[int, int] | None = None,
    ) -> list[AnchorGrid]:
        """Lay the anchors of every level.

        Args:
            cells: height and width of each level in cells.
            strides: pixels a cell of each level.
            device: where the anchors shall be.
            batch: height and width of the padded images; needed where strides are measured.

        Returns:
            One grid a level, float32.

        Raises:
            ValueError: strides are measured, and ``batch`` is not given.
        """
        if self.measured and batch is None:
            raise ValueError("anchors with measured strides need the height and width of the batch")
        grids = []
        for (height, width), stride, sizes in zip(cells, strides, self.level_sizes(strides), strict=True):
            shapes = self._shapes(sizes, device)  # [A, 2] half width, half height
            half_width, half_height = shapes[:, None, None].unbind(-1)  # [A, 1, 1] each
            signs = torch.tensor([-1.0, 1.0], dtype=torch.float32, device=device)
            steps = (stride, stride)
            if self.measured and batch is not None:
                steps = (batch[1] // width, batch[0] // height)
            counts = (torch.arange(count, dtype=torch.float32, device=device) for count in (width, height))
            x, y = (((count + self.offset) * step)[:, None] for count, step in zip(counts, steps, strict=True))
            grids.append(AnchorGrid(x + half_width * signs, y + half_height * signs))
        return grids

    def _shapes(self, sizes: Sequence[float], device: torch.device | None) -> Tensor:
        height = torch.tensor(self.ratios, dtype=torch.float32, device=device).sqrt()
        size = torch.tensor(sizes, dtype=torch.float32, device=device)
        width, height = ((side[:, None] * size).flatten() for side in (1 / height, height))
        half = torch.stack((width, height), dim=1) / 2
        return half.round() if self.rounded else half

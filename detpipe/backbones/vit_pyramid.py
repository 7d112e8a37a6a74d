"""A pyramid on the one map of a plain vision transformer.

Li et al., "Exploring Plain Vision Transformer Backbones for Object Detection", 2022, arXiv 2203.16527, section 3: all levels
come from the last map, by transposed convolutions (each halves the width) and pooling, without top-down sums; then a 1 x 1
and a 3 x 3 convolution, each followed by layer normalization over the channels of a cell.

Deviations:
1. The backbone may be any with a single level, of any stride that is a power of two from 4 on; at stride s the levels have the
   strides s / 4, s / 2, s and 2 s.
2. One coarser level may be added by taking every second cell, as in the feature pyramid network.
3. Sides need not be multiples of 2 s: the level of stride 2 s keeps the last, incomplete cell, so that its sides are rounded up.

C is the width of the map, p_k the level of stride 2^k.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch.nn.functional as F
from torch import Tensor, nn

from detpipe.backbones.fpn import level_name
from detpipe.stages import Backbone
from detpipe.support.numbers import check_whole
from detpipe.types import Features

ExtraLevels = Literal["max_pool"]


class ViTPyramid(Backbone):
    """The simple feature pyramid: four levels from a backbone's only one.

    RoI pooling uses the levels in ``roi_strides``; a region proposal network looks at all levels, those in ``strides``.

    Args:
        backbone: yields a single level, such as ``Extractor("timm/vit_small_patch16_224", ["c4"])``.
        out_channels: C of every level of the pyramid.
        extra_levels: "max_pool" adds a coarser level for the region proposal network, every second cell of the coarsest;
            None adds none. A detector pads its batches to a multiple of the coarsest stride.

    Raises:
        ValueError: a backbone of several levels, a stride that is no power of two or below 4, fewer than 4 channels or a number
            that is no multiple of 4, ``out_channels`` below 1, or an unknown name.

    Example:
        >>> import torch
        >>> from detpipe.backbones import SEResNet
        >>> pyramid = ViTPyramid(SEResNet(18, levels=["c4"]), 64, extra_levels="max_pool")
        >>> {level: list(map_.shape) for level, map_ in pyramid(torch.zeros(1, 3, 64, 96)).items()}
        {'p2': [1, 64, 16, 24], 'p3': [1, 64, 8, 12], 'p4': [1, 64, 4, 6], 'p5': [1, 64, 2, 3], 'p6': [1, 64, 1, 2]}
        >>> pyramid.roi_strides
        {'p2': 4, 'p3': 8, 'p4': 16, 'p5': 32}
    """

    def __init__(self, backbone: Backbone, out_channels: int = 256, extra_levels: ExtraLevels | None = None) -> None:
        super().__init__()
        _check(backbone.strides, out_channels, extra_levels)
        self.backbone, self.out_channels, self.pixel_format = backbone, out_channels, backbone.pixel_format
        ((self._level, stride),) = backbone.strides.items()
        channels = backbone.level_channels[self._level]
        if channels < 4 or channels % 4:
            raise ValueError(f"a ViTPyramid needs a multiple of 4 channels to halve twice, the backbone has {channels}")
        self._roi_strides = {level_name(step): step for step in (stride // 4, stride // 2, stride, stride * 2)}
        self.strides = {**self._roi_strides, **({level_name(stride * 4): stride * 4} if extra_levels else {})}
        resized = (
            nn.Sequential(_up(channels), LayerNorm2d(channels // 2), nn.GELU(), _up(channels // 2)),
            _up(channels),
            nn.Identity(),
            nn.MaxPool2d(2, ceil_mode=True),
        )
        widths = (channels // 4, channels // 2, channels, channels)
        self.levels = nn.ModuleDict(
            {
                level: nn.Sequential(resize, _smooth(width, out_channels))
                for level, resize, width in zip(self._roi_strides, resized, widths, strict=True)
            }
        )

    @property
    def roi_strides(self) -> dict[str, int]:
        """Image pixels a cell of the levels to pool from: all without the extra one."""
        return dict(self._roi_strides)

    def forward(self, images: Tensor) -> Features:
        """Compute the pyramid: ``[N, C, H, W]`` -> level name -> ``[N, C, H_l, W_l]``."""
        features = self.backbone(images)[self._level]
        maps = {name: level(features) for name, level in self.levels.items()}
        for name in self.strides.keys() - maps.keys():  # at most one
            maps[name] = F.max_pool2d(list(maps.values())[-1], 1, stride=2)
        return maps


class LayerNorm2d(nn.Module):
    """Normalize the channels of each cell: ``[N, C, H, W]`` -> ``[N, C, H, W]``."""

    def __init__(self, channels: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels, eps)

    def forward(self, features: Tensor) -> Tensor:
        """Normalize: ``[N, C, H, W]`` -> ``[N, C, H, W]``."""
        return self.norm(features.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def _up(channels: int) -> nn.Module:
    return nn.ConvTranspose2d(channels, channels // 2, 2, stride=2)


def _smooth(channels: int, out_channels: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(channels, out_channels, 1, bias=False),
        LayerNorm2d(out_channels),
        nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False),
        LayerNorm2d(out_channels),
    )


def _check(strides: dict[str, int], out_channels: int, extra_levels: str | None) -> None:
    if len(strides) != 1:
        raise ValueError(f"a ViTPyramid takes a backbone of one level, got {list(strides)}; an FPN takes several")
    ((level, stride),) = strides.items()
    if stride < 4 or stride & (stride - 1):
        raise ValueError(f"a ViTPyramid needs a stride that is a power of two, 4 or more, level {level!r} has {stride}")
    check_whole(out_channels=out_channels)
    if extra_levels is not None and extra_levels not in get_args(ExtraLevels):
        raise ValueError(f"extra_levels of a ViTPyramid must be 'max_pool' or None, got {extra_levels!r}")

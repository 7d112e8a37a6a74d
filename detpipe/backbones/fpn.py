"""The feature pyramid network: levels of a backbone, each enriched from the coarser ones, all of one width.

Lin et al., "Feature Pyramid Networks for Object Detection", 2017, arXiv 1612.03144, section 3: a 1 x 1 convolution brings each
level to one width, each sum is upsampled to the next finer level and added there, a 3 x 3 convolution smooths each sum.
Levels beyond the coarsest: section 4.1, footnote 1 (p6 as every second cell of p5), and Lin et al., "Focal Loss for Dense
Object Detection", 2017, arXiv 1708.02002, section 4 (p6 and p7 by convolutions). The pyramid itself is torchvision's
``FeaturePyramidNetwork``; its weights fit in ``FPN.pyramid``.

Deviations:
1. A map is upsampled to the very size of the finer one, so that sides need not be multiples of a stride.
2. p6 is convolved from p5, not from c5, as in torchvision's ``retinanet_resnet50_fpn``.
3. The pyramid's convolutions start uniform after He et al. 2015 with slope 1, as torchvision's.

p_k is the level of stride 2^k.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Literal, get_args

from torch import Tensor, nn
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool, LastLevelP6P7

from detpipe.backbones.regime import GROUPS
from detpipe.stages import Backbone
from detpipe.support.numbers import check_whole
from detpipe.types import Features

ExtraLevels = Literal["max_pool", "convolutions"]
Norm = Literal["batch", "group"]


class FPN(Backbone):
    """A pyramid on the levels of another backbone: c2 to c5 become p2 to p5.

    Frozen parameters and frozen statistics of the backbone stay so. RoI pooling uses the levels in ``roi_strides``, which are
    those that the backbone has; a region proposal network looks at all levels, those in ``strides``.

    Args:
        backbone: yields two levels or more; give it ``out_channels="own"``, so that it does not project them itself.
        out_channels: C of every level of the pyramid.
        extra_levels: coarser levels for the region proposal network: "max_pool" adds one, every second cell of the coarsest;
            "convolutions" adds two, by 3 x 3 convolutions of stride 2; None adds none. A detector pads its batches to a
            multiple of the coarsest stride.
        norm: after each convolution of the pyramid: "batch" normalization, "group" normalization (32 groups), or None.
        equal_strides: accept levels of equal stride, as torchvision's detectors on MobileNet have; RoIs are pooled from the first.

    Raises:
        ValueError: a backbone of one level, strides that are not rising powers of two, ``out_channels`` below 1 (or not a
            multiple of 32 for group normalization), or an unknown name.

    Example:
        >>> import torch
        >>> from detpipe.backbones import SEResNet
        >>> fpn = FPN(SEResNet(18, levels=["c3", "c4"], out_channels="own"), 64, extra_levels="max_pool")
        >>> {level: list(map_.shape) for level, map_ in fpn(torch.zeros(1, 3, 64, 96)).items()}
        {'p3': [1, 64, 8, 12], 'p4': [1, 64, 4, 6], 'p5': [1, 64, 2, 3]}
        >>> fpn.strides, fpn.roi_strides
        ({'p3': 8, 'p4': 16, 'p5': 32}, {'p3': 8, 'p4': 16})
    """

    def __init__(
        self,
        backbone: Backbone,
        out_channels: int = 256,
        extra_levels: ExtraLevels | None = None,
        norm: Norm | None = None,
        equal_strides: bool = False,
    ) -> None:
        super().__init__()
        _check(backbone.strides, out_channels, extra_levels, norm, equal_strides)
        self.backbone, self.out_channels, self.pixel_format = backbone, out_channels, backbone.pixel_format
        strides = list(backbone.strides.values())
        levels = dict(zip(level_names(strides, "p"), strides, strict=True))
        self._roi_strides = {name: stride for name, stride in levels.items() if name == level_name(stride)}
        coarsest = max(backbone.strides.values())
        extra = {None: (), "max_pool": (2,), "convolutions": (2, 4)}[extra_levels]
        self.strides = {**levels, **{level_name(coarsest * step): coarsest * step for step in extra}}
        widths = [backbone.level_channels[level] for level in backbone.strides]
        blocks = {"max_pool": LastLevelMaxPool, "convolutions": partial(LastLevelP6P7, out_channels, out_channels)}
        norms = {None: None, "batch": nn.BatchNorm2d, "group": partial(nn.GroupNorm, GROUPS)}
        block = None if extra_levels is None else blocks[extra_levels]()
        self.pyramid = FeaturePyramidNetwork(widths, out_channels, block, norms[norm])

    @property
    def roi_strides(self) -> dict[str, int]:
        """Image pixels a cell of the levels to pool from: those of the backbone, the first of equal ones, without extra ones."""
        return dict(self._roi_strides)

    def forward(self, images: Tensor) -> Features:
        """Compute the pyramid: ``[N, C, H, W]`` -> level name -> ``[N, C, ceil(H / stride), ceil(W / stride)]``."""
        features = self.backbone(images)
        levels = self.pyramid({level: features[level] for level in self.backbone.strides})
        return dict(zip(self.strides, levels.values(), strict=True))


def level_name(stride: int, letter: str = "p") -> str:
    """Name a level by its stride, 2^k: ``p5`` for 32."""
    return f"{letter}{stride.bit_length() - 1}"


def level_names(strides: Sequence[int], letter: str) -> list[str]:
    """Name levels by their strides: ``p5``, and ``p5b``, ``p5c`` for more of the same stride.

    Example:
        >>> level_names([16, 32, 32], "c")
        ['c4', 'c5', 'c5b']
    """
    before = [list(strides[:index]).count(stride) for index, stride in enumerate(strides)]
    return [
        f"{level_name(stride, letter)}{chr(ord('a') + number) if number else ''}"
        for stride, number in zip(strides, before, strict=True)
    ]


def _check(
    strides: dict[str, int], out_channels: int, extra_levels: str | None, norm: str | None, equal_strides: bool
) -> None:
    if len(strides) < 2:
        raise ValueError(
            f"an FPN needs two levels of its backbone or more, got {list(strides)}; for example levels: [c2, c3, c4, c5]"
        )
    before = 0
    for level, stride in strides.items():
        if stride < before or (stride == before and not equal_strides) or stride & (stride - 1):
            raise ValueError(
                "an FPN needs levels whose strides are powers of two, each coarser than the one before, but the backbone's "
                f"are {strides}; leave {level!r} out or change its stride"
            )
        before = stride
    check_whole(out_channels=out_channels)
    for name, value, choices in (("extra_levels", extra_levels, ExtraLevels), ("norm", norm, Norm)):
        if value is not None and value not in get_args(choices):
            raise ValueError(f"{name} must be {' or '.join(map(repr, get_args(choices)))} or None, got {value!r}")
    if norm == "group" and out_channels % GROUPS:
        raise ValueError(f"norm 'group' needs out_channels that are a multiple of {GROUPS}, got {out_channels}")

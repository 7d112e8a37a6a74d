"""ResNet and ResNeXt with squeeze-and-excitation, or other attention, in their blocks.

He et al., "Deep Residual Learning for Image Recognition", 2015, arXiv 1512.03385;
Xie et al., "Aggregated Residual Transformations for Deep Neural Networks", 2016, arXiv 1611.05431;
Hu et al., "Squeeze-and-Excitation Networks", 2018, arXiv 1709.01507, figure 3: the gate comes before the sum.

Deviations: those of :mod:`detpipe.backbones.residual`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from detpipe.backbones.laterals import Width
from detpipe.backbones.pretrained import Pretrained
from detpipe.backbones.regime import Regime
from detpipe.backbones.residual import BLOCKS, Choice, ResidualNetwork, is_deep
from detpipe.backbones.residual_blocks import Variant
from detpipe.types import PixelFormat


class SEResNet(ResidualNetwork):
    """SE-ResNet from 18 to 152 layers.

    Args:
        depth: 18, 26, 34, 50, 101 or 152.
        attention: what each block has: "se", "sse", "scse" (squeeze-and-excitation of channels, places, both), "eca", "cbam", "sk"
            (selective kernels in the place of the 3 x 3 convolution), or None; or stage (c2 to c5) -> one of them.
        variant: reduction, bias and rounding of the gates, stem, shortcuts.
        levels: which of c2, c3, c4, c5 to return; stages after the last one are not built.
        output_stride: no level is coarser than this (4, 8, 16 or 32).
        out_channels: project every level to this width; None keeps the width, for a single level; "own" lets each level
            keep its own, for an FPN.
        weights: a local file (``.pth``, ``.pt``, ``.safetensors``, or ``.ckpt`` of a run;
            never downloads): ours, torchvision's or timm's; the name of
            torchvision weights of the plain network (``DEFAULT``), or ``timm/NAME``, such as ``timm/seresnet50.ra2_in1k``.
        regime: normalization, frozen stages (of stem, c2 to c5), checkpointing, drop path.
        in_channels: C of the images; weights of three channels are spread over others. In a configuration it follows the data.
        padding: zeros added on every side, in pixels: half of a level's stride centers its cells on the pixels that anchors and
            RoI pooling take them for, half a pixel off; 0 leaves them.
        pixel_format: what the weights expect of pixels; None: torchvision's, RGB by ImageNet's mean and deviation.

    Raises:
        ValueError: an argument outside these choices, or a reduction that is larger than the channels.
        UsageError: an unknown name of weights, or a stage to freeze that is not built.
        CheckpointError: weights that are missing or belong to another network.

    Example:
        >>> import torch
        >>> backbone = SEResNet(18, levels=["c3", "c4"], out_channels=64)
        >>> {level: list(map_.shape) for level, map_ in backbone(torch.zeros(1, 3, 64, 96)).items()}
        {'c3': [1, 64, 8, 12], 'c4': [1, 64, 4, 6]}
    """

    def __init__(
        self,
        depth: int = 50,
        attention: Choice = "se",
        variant: Variant = Variant(),  # noqa: B008 (frozen)
        levels: Sequence[str] = ("c4",),
        output_stride: int = 32,
        out_channels: Width = None,
        weights: str | Pretrained | None = None,
        regime: Regime = Regime(),  # noqa: B008 (frozen)
        in_channels: int = 3,
        padding: int = 0,
        pixel_format: PixelFormat | None = None,
    ) -> None:
        choices = (attention, variant, levels, output_stride, out_channels, weights, regime)
        super().__init__(depth, 1, 64, *choices, in_channels, padding, pixel_format)

    @property
    def torchvision_name(self) -> str | None:
        """Such as ``resnet50``; None for a depth that torchvision does not have."""
        return None if self.depth == 26 else f"resnet{self.depth}"


class SEResNeXt(ResidualNetwork):
    """SE-ResNeXt: SE-ResNet whose 3 x 3 convolutions have groups.

    Args:
        size: depth, groups and channels of a group in the first stage, such as "50_32x4d".
        attention: as of :class:`SEResNet`.
        variant: reduction, bias and rounding of the gates, stem, shortcuts.
        levels: which of c2, c3, c4, c5 to return; stages after the last one are not built.
        output_stride: no level is coarser than this (4, 8, 16 or 32).
        out_channels: project every level to this width; None keeps the width, for a single level; "own" lets each level
            keep its own, for an FPN.
        weights: as of :class:`SEResNet`, such as ``timm/seresnext50_32x4d.racm_in1k``.
        regime: normalization, frozen stages (of stem, c2 to c5), checkpointing, drop path.
        in_channels: C of the images; weights of three channels are spread over others. In a configuration it follows the data.
        padding: zeros added on every side, in pixels: half of a level's stride centers its cells on the pixels that anchors and
            RoI pooling take them for, half a pixel off; 0 leaves them.
        pixel_format: what the weights expect of pixels; None: torchvision's, RGB by ImageNet's mean and deviation.

    Raises:
        ValueError: an argument outside these choices, or a reduction that is larger than the channels.
        UsageError: an unknown name of weights, or a stage to freeze that is not built.
        CheckpointError: weights that are missing or belong to another network.

    Example:
        >>> import torch
        >>> backbone = SEResNeXt("26_32x4d", levels=["c4"], out_channels=64)
        >>> list(backbone(torch.zeros(1, 3, 64, 96))["c4"].shape)
        [1, 64, 4, 6]
    """

    def __init__(
        self,
        size: str = "50_32x4d",
        attention: Choice = "se",
        variant: Variant = Variant(),  # noqa: B008 (frozen)
        levels: Sequence[str] = ("c4",),
        output_stride: int = 32,
        out_channels: Width = None,
        weights: str | Pretrained | None = None,
        regime: Regime = Regime(),  # noqa: B008 (frozen)
        in_channels: int = 3,
        padding: int = 0,
        pixel_format: PixelFormat | None = None,
    ) -> None:
        depths = [depth for depth in BLOCKS if is_deep(depth)]
        found = re.fullmatch(r"(\d+)_(\d+)x(\d+)d", size)
        if found is None or int(found[1]) not in depths or not int(found[2]) or not int(found[3]):
            raise ValueError(
                f"size must be DEPTH_GROUPSxWIDTHd with a depth of {depths}, such as '50_32x4d', got {size!r}"
            )
        depth, groups, width = (int(number) for number in found.groups())
        choices = (attention, variant, levels, output_stride, out_channels, weights, regime)
        super().__init__(depth, groups, width, *choices, in_channels, padding, pixel_format)

    @property
    def torchvision_name(self) -> str | None:
        """Such as ``resnext50_32x4d``; None for a size that torchvision does not have."""
        name = f"resnext{self.depth}_{self.groups}x{self.group_width}d"
        return name if name in ("resnext50_32x4d", "resnext101_32x8d", "resnext101_64x4d") else None

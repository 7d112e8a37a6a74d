"""ResNet and ResNeXt with squeeze-and-excitation, or other attention, in their blocks; and SKNet.

He et al., "Deep Residual Learning for Image Recognition", 2015, arXiv 1512.03385;
Xie et al., "Aggregated Residual Transformations for Deep Neural Networks", 2016, arXiv 1611.05431;
Hu et al., "Squeeze-and-Excitation Networks", 2018, arXiv 1709.01507, figure 3: the gate comes before the sum;
Li et al., "Selective Kernel Networks", 2019, arXiv 1903.06586, table 1: SKNet-50 has 27.5 M parameters and 4.47 GFLOPs at 224 x
224 pixels.

Deviations: those of :mod:`detpipe.backbones.residual` and :mod:`detpipe.attention.selective_kernel`.
"""

from __future__ import annotations

import re
from typing import Any

from detpipe.backbones.residual import BLOCKS, Choice, ResidualNetwork, is_deep
from detpipe.backbones.residual_blocks import Variant

_PLAIN = Variant()


class SEResNet(ResidualNetwork):
    """SE-ResNet from 18 to 152 layers.

    Args:
        depth: 18, 26, 34, 50, 101 or 152.
        attention: one kind for all blocks, or stage -> kind, as of :class:`~detpipe.backbones.residual.ResidualNetwork`.
        variant: reduction, bias and rounding of the gates, stem, shortcuts.
        common: ``levels``, ``output_stride``, ``out_channels``, ``weights``, ``regime``, ``in_channels``, ``padding``
            and ``pixel_format``, and errors: as of :class:`~detpipe.backbones.residual.ResidualNetwork`.

    Example:
        >>> import torch
        >>> backbone = SEResNet(18, levels=["c3", "c4"], out_channels=64)
        >>> {level: list(map_.shape) for level, map_ in backbone(torch.zeros(1, 3, 64, 96)).items()}
        {'c3': [1, 64, 8, 12], 'c4': [1, 64, 4, 6]}
    """

    def __init__(self, depth: int = 50, attention: Choice = "se", variant: Variant = _PLAIN, **common: Any) -> None:
        super().__init__(depth, 1, 64, attention, variant, **common)

    @property
    def torchvision_name(self) -> str | None:
        """Such as ``resnet50``; None for a depth that torchvision does not have."""
        return None if self.depth == 26 else f"resnet{self.depth}"


class SEResNeXt(ResidualNetwork):
    """SE-ResNeXt: SE-ResNet whose 3 x 3 convolutions have groups.

    Args:
        size: depth, groups and channels of a group in the first stage, such as "50_32x4d".
        attention: as of :class:`SEResNet`.
        variant: as of :class:`SEResNet`.
        common: as of :class:`SEResNet`.

    Raises:
        ValueError: another size.

    Example:
        >>> import torch
        >>> backbone = SEResNeXt("26_32x4d", levels=["c4"], out_channels=64)
        >>> list(backbone(torch.zeros(1, 3, 64, 96))["c4"].shape)
        [1, 64, 4, 6]
    """

    def __init__(
        self, size: str = "50_32x4d", attention: Choice = "se", variant: Variant = _PLAIN, **common: Any
    ) -> None:
        depths = [depth for depth in BLOCKS if is_deep(depth)]
        found = re.fullmatch(r"(\d+)_(\d+)x(\d+)d", size)
        if found is None or int(found[1]) not in depths or not int(found[2]) or not int(found[3]):
            raise ValueError(
                f"size must be DEPTH_GROUPSxWIDTHd with a depth of {depths}, such as '50_32x4d', got {size!r}"
            )
        depth, groups, width = (int(number) for number in found.groups())
        super().__init__(depth, groups, width, attention, variant, **common)

    @property
    def torchvision_name(self) -> str | None:
        """Such as ``resnext50_32x4d``; None for a size that torchvision does not have."""
        name = f"resnext{self.depth}_{self.groups}x{self.group_width}d"
        return name if name in ("resnext50_32x4d", "resnext101_32x8d", "resnext101_64x4d") else None


class SKNet(ResidualNetwork):
    """SKNet-50 or SKNet-101: 32 groups of 4 channels, two branches of 3 x 3 and 5 x 5.

    Args:
        depth: 50 or 101; 26 is a smaller one of our own.
        variant: reduction and least width of the selective kernels, stem, shortcuts.
        common: as of :class:`SEResNet`, but for ``pixel_format``; weights are ours or timm's.

    Raises:
        ValueError: another depth.

    Example:
        >>> import torch
        >>> backbone = SKNet(26, levels=["c4"], out_channels=64)
        >>> list(backbone(torch.zeros(1, 3, 64, 96))["c4"].shape)
        [1, 64, 4, 6]
    """

    def __init__(self, depth: int = 50, variant: Variant = _PLAIN, **common: Any) -> None:
        if depth not in (26, 50, 101):
            raise ValueError(f"depth must be one of [26, 50, 101], got {depth}")
        super().__init__(depth, 32, 4, "sk", variant, pixel_format=None, **common)  # as timm's: torchvision's

    @property
    def torchvision_name(self) -> str | None:
        """None: torchvision has no selective kernels."""
        return None

"""SKNet: ResNeXt whose 3 x 3 convolutions choose their kernel size.

Li et al., "Selective Kernel Networks", 2019, arXiv 1903.06586, table 1: SKNet-50 has 27.5 M parameters and 4.47 GFLOPs at 224 x
224 pixels.

Deviations: those of :mod:`detpipe.backbones.residual` and :mod:`detpipe.attention.selective_kernel`.
"""

from __future__ import annotations

from collections.abc import Sequence

from detpipe.backbones.laterals import Width
from detpipe.backbones.pretrained import Pretrained
from detpipe.backbones.regime import Regime
from detpipe.backbones.residual import ResidualNetwork
from detpipe.backbones.residual_blocks import Variant


class SKNet(ResidualNetwork):
    """SKNet-50 or SKNet-101: 32 groups of 4 channels, two branches of 3 x 3 and 5 x 5.

    Args:
        depth: 50 or 101; 26 is a smaller one of our own.
        variant: reduction and least width of the selective kernels, stem, shortcuts.
        levels: which of c2, c3, c4, c5 to return; stages after the last one are not built.
        output_stride: no level is coarser than this (4, 8, 16 or 32).
        out_channels: project every level to this width; None keeps the width, for a single level; "own" lets each level
            keep its own, for an FPN.
        weights: a local file (ours or timm's), or ``timm/skresnext50_32x4d.ra_in1k``, which is SKNet-50.
        regime: normalization, frozen stages (of stem, c2 to c5), checkpointing, drop path.
        in_channels: C of the images; weights of three channels are spread over others. In a configuration it follows the data.
        padding: as of :class:`~detpipe.backbones.se_resnet.SEResNet`.

    Raises:
        ValueError: an argument outside these choices.
        UsageError: an unknown name of weights, or a stage to freeze that is not built.
        CheckpointError: weights that are missing or belong to another network.

    Example:
        >>> import torch
        >>> backbone = SKNet(26, levels=["c4"], out_channels=64)
        >>> list(backbone(torch.zeros(1, 3, 64, 96))["c4"].shape)
        [1, 64, 4, 6]
    """

    def __init__(
        self,
        depth: int = 50,
        variant: Variant = Variant(),  # noqa: B008 (frozen)
        levels: Sequence[str] = ("c4",),
        output_stride: int = 32,
        out_channels: Width = None,
        weights: str | Pretrained | None = None,
        regime: Regime = Regime(),  # noqa: B008 (frozen)
        in_channels: int = 3,
        padding: int = 0,
    ) -> None:
        if depth not in (26, 50, 101):
            raise ValueError(f"depth must be one of [26, 50, 101], got {depth}")
        rest = (variant, levels, output_stride, out_channels, weights, regime, in_channels, padding)
        super().__init__(depth, 32, 4, "sk", *rest)

    @property
    def torchvision_name(self) -> str | None:
        """None: torchvision has no selective kernels."""
        return None

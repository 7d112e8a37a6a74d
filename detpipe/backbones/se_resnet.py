"""ResNet with a squeeze-and-excitation gate in every block, at any of its levels.

He et al., "Deep Residual Learning for Image Recognition", 2015, arXiv 1512.03385;
Hu et al., "Squeeze-and-Excitation Networks", 2018, arXiv 1709.01507, figure 3: the gate comes before the sum.

Deviations:
1. Bottlenecks have their stride in the 3 x 3 convolution, as torchvision's.
2. ``output_stride`` replaces the strides of late stages by dilation (Chen et al. 2017, arXiv 1706.05587), for small
   images.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from torch import Tensor, nn
from torchvision.ops import FrozenBatchNorm2d

from detpipe.attention.squeeze_excitation import SqueezeExcitation
from detpipe.backbones.laterals import Laterals, Width
from detpipe.stages import Backbone
from detpipe.types import Features, PixelFormat

BLOCKS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}
LEVELS = ("c2", "c3", "c4", "c5")
BatchNorm = Literal["live", "frozen"]


class SEResNet(Backbone):
    """SE-ResNet from 18 to 152 layers.

    Args:
        depth: 18, 34, 50, 101 or 152.
        reduction: channels of a block divided by the width of its gate's hidden layer.
        attention: False builds the plain ResNet of the same depth.
        levels: which of c2, c3, c4, c5 to return; stages after the last one are not built.
        output_stride: no level is coarser than this (4, 8, 16 or 32).
        out_channels: project every level to this width; None keeps the width, for a single level; "own" lets each level
            keep its own, for an FPN.
        frozen_stages: how many of stem, c2, c3, c4, c5 keep their weights, from the input on.
        batch_norm: "live" normalizes by the batch, "frozen" by stored statistics.

    Raises:
        ValueError: an argument outside these choices.

    Example:
        >>> import torch
        >>> backbone = SEResNet(18, levels=["c3", "c4"], out_channels=64)
        >>> {level: list(map_.shape) for level, map_ in backbone(torch.zeros(1, 3, 64, 96)).items()}
        {'c3': [1, 64, 8, 12], 'c4': [1, 64, 4, 6]}
    """

    def __init__(
        self,
        depth: int = 50,
        reduction: int = 16,
        attention: bool = True,
        levels: Sequence[str] = ("c4",),
        output_stride: int = 32,
        out_channels: Width = None,
        frozen_stages: int = 0,
        batch_norm: BatchNorm = "live",
    ) -> None:
        super().__init__()
        _check(depth, levels, output_stride, frozen_stages, batch_norm)
        norm = nn.BatchNorm2d if batch_norm == "live" else FrozenBatchNorm2d
        block = BasicBlock if depth < 50 else Bottleneck
        self.pixel_format = PixelFormat()
        self.levels = tuple(level for level in LEVELS if level in levels)
        self.frozen_stages = frozen_stages
        self.stem = nn.Sequential(
            nn.Conv2d(3, 64, 7, stride=2, padding=3, bias=False),
            norm(64),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(3, stride=2, padding=1),
        )
        self.stages = nn.ModuleDict()
        self.strides, widths = {}, {}
        channels, stride, dilation = 64, 4, 1
        for index, level in enumerate(LEVELS[: LEVELS.index(self.levels[-1]) + 1]):
            step = 1 if index == 0 else 2
            if stride * step > output_stride:
                step, dilation = 1, dilation * 2
            stride *= step
            width = 64 * 2**index
            stage = []
            for _ in range(BLOCKS[depth][index]):
                gate = SqueezeExcitation(width * block.expansion, reduction) if attention else nn.Identity()
                stage.append(block(channels, width, step, dilation, norm, gate))
                channels, step = width * block.expansion, 1
            self.stages[level] = nn.Sequential(*stage)
            if level in self.levels:
                self.strides[level], widths[level] = stride, channels
        self.laterals = Laterals(widths, out_channels)
        _initialize(self)
        for stage in self._frozen():
            stage.requires_grad_(False)
        self.train()  # a new module is in training mode, the batch norm of frozen stages must not be

    @property
    def out_channels(self) -> int:
        """C, the same at every level; a ValueError where each level keeps its own width."""
        return self.laterals.out_channels

    @property
    def level_channels(self) -> dict[str, int]:
        """Channels of each level."""
        return dict(self.laterals.level_channels)

    def forward(self, images: Tensor) -> Features:
        """Compute the levels: ``[N, 3, H, W]`` -> level name -> ``[N, C, ceil(H / stride), ceil(W / stride)]``."""
        features = {}
        x = self.stem(images)
        for level, stage in self.stages.items():
            x = stage(x)
            if level in self.levels:
                features[level] = x
        return self.laterals(features)

    def train(self, mode: bool = True) -> SEResNet:
        """Switch to training, except for the batch norm of frozen stages, which keeps its statistics."""
        super().train(mode)
        for stage in self._frozen():
            stage.eval()
        return self

    def _frozen(self) -> list[nn.Module]:
        return [self.stem, *self.stages.values()][: self.frozen_stages]


class BasicBlock(nn.Module):
    """Two 3 x 3 convolutions around a shortcut, gated before the sum."""

    expansion = 1

    def __init__(
        self, channels: int, width: int, stride: int, dilation: int, norm: type[nn.Module], gate: nn.Module
    ) -> None:
        super().__init__()
        self.residual = nn.Sequential(
            nn.Conv2d(channels, width, 3, stride, padding=dilation, dilation=dilation, bias=False),
            norm(width),
            nn.ReLU(inplace=True),
            nn.Conv2d(width, width, 3, padding=dilation, dilation=dilation, bias=False),
            norm(width),
        )
        self.gate = gate
        self.shortcut = _shortcut(channels, width, stride, norm)

    def forward(self, x: Tensor) -> Tensor:
        """``[N, C, H, W]`` -> ``[N, width, ceil(H / stride), ceil(W / stride)]``."""
        return (self.gate(self.residual(x)) + self.shortcut(x)).relu_()


class Bottleneck(nn.Module):
    """1 x 1, 3 x 3 and 1 x 1 convolutions around a shortcut, gated before the sum."""

    expansion = 4

    def __init__(
        self, channels: int, width: int, stride: int, dilation: int, norm: type[nn.Module], gate: nn.Module
    ) -> None:
        super().__init__()
        self.residual = nn.Sequential(
            nn.Conv2d(channels, width, 1, bias=False),
            norm(width),
            nn.ReLU(inplace=True),
            nn.Conv2d(width, width, 3, stride, padding=dilation, dilation=dilation, bias=False),
            norm(width),
            nn.ReLU(inplace=True),
            nn.Conv2d(width, width * 4, 1, bias=False),
            norm(width * 4),
        )
        self.gate = gate
        self.shortcut = _shortcut(channels, width * 4, stride, norm)

    def forward(self, x: Tensor) -> Tensor:
        """``[N, C, H, W]`` -> ``[N, 4 * width, ceil(H / stride), ceil(W / stride)]``."""
        return (self.gate(self.residual(x)) + self.shortcut(x)).relu_()


def _shortcut(channels: int, width: int, stride: int, norm: type[nn.Module]) -> nn.Module:
    if channels == width and stride == 1:
        return nn.Identity()
    return nn.Sequential(nn.Conv2d(channels, width, 1, stride, bias=False), norm(width))


def _initialize(network: nn.Module) -> None:
    """He initialization for a network of ReLUs; each residual branch starts at zero where batch norm is live."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    for module in network.modules():
        last = module.residual[-1] if isinstance(module, BasicBlock | Bottleneck) else None
        if isinstance(last, nn.BatchNorm2d):
            nn.init.zeros_(last.weight)


def _check(depth: int, levels: Sequence[str], output_stride: int, frozen_stages: int, batch_norm: str) -> None:
    if depth not in BLOCKS:
        raise ValueError(f"depth must be one of {list(BLOCKS)}, got {depth}")
    if isinstance(levels, str) or not levels or not set(levels) <= set(LEVELS) or len(set(levels)) < len(levels):
        raise ValueError(f"levels must be distinct names out of {list(LEVELS)}, got {levels!r}")
    if output_stride not in (4, 8, 16, 32):
        raise ValueError(f"output_stride must be 4, 8, 16 or 32, got {output_stride}")
    if not 0 <= frozen_stages <= 5:
        raise ValueError(f"frozen_stages must be in 0..5 (stem, c2, c3, c4, c5), got {frozen_stages}")
    if batch_norm not in ("live", "frozen"):
        raise ValueError(f"batch_norm must be 'live' or 'frozen', got {batch_norm!r}")

"""Residual networks with attention in any of their stages: the ground of SEResNet, SEResNeXt and SKNet.

He et al., "Deep Residual Learning for Image Recognition", 2015, arXiv 1512.03385; Xie et al., "Aggregated Residual
Transformations for Deep Neural Networks", 2016, arXiv 1611.05431 (groups); gates before the sum: Hu et al. 2018, arXiv
1709.01507, figure 3; selective kernels in the place of the 3 x 3 convolution: Li et al. 2019, arXiv 1903.06586, section 3.2;
deep stem and averaging shortcut: He et al. 2018, arXiv 1812.01187, section 4.

Deviations:
1. Bottlenecks have their stride in the 3 x 3 convolution, as torchvision's, unless ``stride_in_1x1`` is set, as in the papers.
2. ``output_stride`` replaces the strides of late stages by dilation (Chen et al. 2017, arXiv 1706.05587), for small images.
3. ``padding`` moves the cells. Every convolution here is padded by half of its kernel, so that cell k of stride s is centered on
   the first of its own pixels, s k + .5, while anchors and RoI pooling take the middle, s k + s / 2: 3.5 pixels further at stride
   8. With ``padding`` of s / 2 the image is padded by as much, the first cell of each axis is left out, and the others lie half
   a pixel from there. A pyramid has no padding that does this for all of its levels.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import StochasticDepth

from detpipe.attention.choice import GATINGS, by_stage
from detpipe.backbones.input_channels import check_channels, format_of
from detpipe.backbones.laterals import Laterals, Width
from detpipe.backbones.pretrained import Pretrained, load_pretrained
from detpipe.backbones.regime import Regime, convert_norm, drop_path_rates, names_within
from detpipe.backbones.residual_blocks import BasicBlock, Block, Bottleneck, Layout, Variant, make_stem
from detpipe.backbones.residual_names import to_own_names
from detpipe.backbones.staged import LEVELS, StagedBackbone, choose_levels
from detpipe.stages import initialize
from detpipe.support.numbers import check_whole
from detpipe.types import Features, PixelFormat

BLOCKS = {
    18: (2, 2, 2, 2),
    26: (2, 2, 2, 2),
    34: (3, 4, 6, 3),
    50: (3, 4, 6, 3),
    101: (3, 4, 23, 3),
    152: (3, 8, 36, 3),
}
Kind = Literal["se", "sse", "scse", "eca", "cbam", "sk"]
Choice = Kind | None | dict[str, Kind | None]


class ResidualNetwork(StagedBackbone, ABC):
    """A stem and four stages of residual blocks.

    Args:
        depth: 18 or 34 (basic blocks), 26, 50, 101 or 152 (bottlenecks).
        groups: of the 3 x 3 convolutions.
        group_width: channels of a group in the first stage, of a bottleneck.
        attention: what each block has: "se", "sse", "scse" (squeeze-and-excitation of channels, places, both), "eca", "cbam", "sk"
            (selective kernels in the place of the 3 x 3 convolution), or None; or stage (c2 to c5) -> one of them.
        variant: reduction, bias and rounding of the gates or selective kernels, stem, shortcuts.
        levels: which of c2, c3, c4, c5 to return; stages after the last one are not built.
        output_stride: no level is coarser than this (4, 8, 16 or 32).
        out_channels: project every level to this width; None keeps the width, for a single level; "own" lets each level
            keep its own, for an FPN.
        weights: a local file (``.pth``, ``.pt``, ``.safetensors``, or ``.ckpt`` of a run; never downloads): ours, torchvision's
            or timm's; the name of torchvision weights of the plain network (``DEFAULT``), or ``timm/NAME``, such as
            ``timm/seresnet50.ra2_in1k``, ``timm/seresnext50_32x4d.racm_in1k`` or ``timm/skresnext50_32x4d.ra_in1k``.
        regime: normalization, frozen stages (of stem, c2 to c5), checkpointing, drop path.
        in_channels: C of the images; weights of three channels are spread over others. In a configuration it follows the data.
        padding: zeros added on every side, in pixels: half of a level's stride centers its cells on the pixels that anchors and
            RoI pooling take them for, half a pixel off; 0 leaves them.
        pixel_format: what the weights expect of pixels; None: torchvision's, RGB by ImageNet's mean and deviation.

    Raises:
        ValueError: an argument outside these choices, or a reduction that is larger than the channels.
        UsageError: an unknown name of weights, or a stage to freeze that is not built.
        CheckpointError: weights that are missing or belong to another network.
    """

    def __init__(
        self,
        depth: int,
        groups: int,
        group_width: int,
        attention: Choice,
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
        super().__init__()
        if depth not in BLOCKS:
            raise ValueError(f"depth must be one of {list(BLOCKS)}, got {depth}")
        self.levels = choose_levels(levels)
        if output_stride not in (4, 8, 16, 32):
            raise ValueError(f"output_stride must be 4, 8, 16 or 32, got {output_stride}")
        self.depth, self.groups, self.group_width = depth, groups, group_width
        self.attention = by_stage(attention, LEVELS, (*GATINGS, "sk"))
        self.regime, self.pixel_format = regime, format_of(pixel_format or PixelFormat(), check_channels(in_channels))
        self.stem = make_stem(variant.stem, in_channels)
        self.stages = nn.ModuleDict()
        self.strides: dict[str, int] = {}
        widths = self._build(variant, output_stride)
        check_whole(0, padding=padding)
        if padding and any(2 * padding != stride for stride in self.strides.values()):
            raise ValueError(
                f"padding must be half of the stride of every level, which only levels of one stride have, or 0; got {padding} "
                f"for the strides {self.strides}"
            )
        self.padding = padding
        self.laterals = Laterals(widths, out_channels)
        initialize(self)
        if regime.norm != "frozen":  # each residual branch starts at zero where its last norm can learn
            for module in self.modules():
                if isinstance(module, Block):
                    nn.init.zeros_(module.last_norm.weight)
        convert_norm(self, regime.norm, regime.eps)
        if weights is not None:
            load_pretrained(self, weights, self.torchvision_name, to_own_names)
        self.frozen = names_within(regime.frozen, ("stem", *self.stages))
        self.train()  # a new module is in training mode, the batch norm of frozen stages must not be

    @property
    @abstractmethod
    def torchvision_name(self) -> str | None:
        """Name of torchvision's network of this architecture without attention, None where it has none."""

    def forward(self, images: Tensor) -> Features:
        """Compute the levels: ``[N, C, H, W]`` -> level name -> ``[N, C, ceil(H / stride), ceil(W / stride)]``.

        Raises:
            ValueError: images smaller than the coarsest stride.
        """
        self.check_size(images)
        x = self.stem(F.pad(images, [self.padding] * 4) if self.padding else images)
        maps = self._through(self.stages.items(), x, self.levels)
        return self.laterals({level: x[..., 1:, 1:] for level, x in maps.items()} if self.padding else maps)

    def _build(self, variant: Variant, output_stride: int) -> dict[str, int]:
        """Build the stages and declare the strides; returns the width of each level."""
        count = LEVELS.index(self.levels[-1]) + 1
        drops = drop_path_rates(self.regime.drop_path, sum(BLOCKS[self.depth]))
        widths, channels, stride, dilation = {}, 64, 4, 1
        for index, level in enumerate(LEVELS[:count]):
            step, before = 1 if index == 0 else 2, dilation
            if stride * step > output_stride:
                step, dilation = 1, dilation * 2
            stride *= step
            stage = []
            for number in range(BLOCKS[self.depth][index]):
                # the first block looks at a map of the stride before, and so spaces its kernel by the dilation before
                layout = Layout(
                    width=64 * 2**index,
                    stride=step if number == 0 else 1,
                    dilation=(before if number == 0 else dilation, dilation),
                    groups=self.groups,
                    group_width=self.group_width,
                )
                rate = drops.pop(0)
                drop = StochasticDepth(rate, "row") if rate > 0 else nn.Identity()
                kind = Bottleneck if is_deep(self.depth) else BasicBlock
                block = kind(channels, layout, self.attention[level], variant, drop)
                stage.append(block)
                channels = block.out_channels
            self.stages[level] = nn.Sequential(*stage)
            if level in self.levels:
                self.strides[level], widths[level] = stride, channels
        return widths


def is_deep(depth: int) -> bool:
    """Whether a depth is built of bottlenecks."""
    return depth not in (18, 34)

"""The blocks and stems of residual networks.

Sources and deviations as in :mod:`detpipe.backbones.residual`. Modules are named by their order (conv1, norm1, relu1, conv2, ...).
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torchvision.ops import FrozenBatchNorm2d

from detpipe.attention.base import Gating
from detpipe.attention.choice import make_gating
from detpipe.attention.selective_kernel import SelectiveKernel
from detpipe.support.numbers import check_whole

Stem = Literal["single", "deep", "tiered"]
STEMS: dict[str, tuple[int, ...]] = {"single": (64,), "deep": (32, 32, 64), "tiered": (24, 32, 64)}


@dataclass(frozen=True)
class Variant:
    """What residual networks of one depth differ in, from paper to paper and from library to library.

    Args:
        reduction: channels divided by the width of the hidden layer of a gate or of a selective kernel.
        gate_bias: whether the layers of the gates have a bias.
        gate_divisor: the hidden width of a gate is a multiple of it, at least one; 1 divides plainly.
        kernel_min_width: least hidden width of a selective kernel.
        split_input: selective kernels give each branch a part of the channels, as timm's ``skresnet`` do.
        stem: "single" is one 7 x 7 convolution, "deep" three of 3 x 3 with 32, 32 and 64 channels, "tiered" with 24, 32, 64.
        stride_in_1x1: bottlenecks have their stride in the first convolution, as He et al. 2015 and Hu et al. 2018.
        average_shortcut: shortcuts with a stride average before their 1 x 1 convolution.

    Raises:
        ValueError: an unknown stem, or a number below 1.
    """

    reduction: int = 16
    gate_bias: bool = True
    gate_divisor: int = 8
    kernel_min_width: int = 32
    split_input: bool = False
    stem: Stem = "single"
    average_shortcut: bool = False
    stride_in_1x1: bool = False

    def __post_init__(self) -> None:
        widths = {"gate_divisor": self.gate_divisor, "kernel_min_width": self.kernel_min_width}
        check_whole(1, "variant.", reduction=self.reduction, **widths)
        if self.stem not in STEMS:
            raise ValueError(f"stem must be one of {list(STEMS)}, got {self.stem!r}")


@dataclass(frozen=True)
class Layout:
    """Sizes of a block: width of its stage, stride, dilation of first and later 3 x 3 convolutions, groups."""

    width: int
    stride: int
    dilation: tuple[int, int]
    groups: int
    group_width: int


class Steps(nn.Sequential):
    """Convolutions, norms and rectifiers, one after the other.

    A frozen norm is not computed as two passes over the map: with gradients it becomes part of the weights of the convolution
    before it, through which the gradient goes; without, it is one pass.
    """

    def forward(self, x: Tensor) -> Tensor:
        """``[N, C, H, W]`` -> ``[N, C', H', W']``."""
        layers = list(self)
        while layers:
            step, *layers = layers
            following = layers[0] if layers else None
            if not _is_plain(step, x):
                x = step(x)
            elif type(step) is FrozenBatchNorm2d and not torch.is_grad_enabled():
                weight, bias, mean, variance = _buffers(step)
                # not that of functional, which in torch 2.11 refuses an eps of 0, as torchvision's published weights have it
                x = torch.batch_norm(
                    x, weight, bias, mean, variance, False, 0.0, step.eps, torch.backends.cudnn.enabled
                )
            elif (
                torch.is_grad_enabled()
                and type(step) is nn.Conv2d
                and step.bias is None
                and type(following) is FrozenBatchNorm2d
                and _is_plain(following, x)
            ):
                x = step._conv_forward(x, *_fold(step, following))
                del layers[0]
            else:
                x = step(x)
        return x


class Block(nn.Module):
    """A residual branch, gated before it is added to a shortcut."""

    def __init__(
        self,
        steps: dict[str, nn.Module],
        channels: tuple[int, int],
        stride: int,
        kind: str | None,
        variant: Variant,
        drop: nn.Module,
    ) -> None:
        super().__init__()
        self.out_channels = channels[1]
        self.residual = Steps(OrderedDict(steps))
        self.attention = _gate(kind, self.out_channels, variant)
        self.shortcut = _shortcut(*channels, stride, variant.average_shortcut)
        self.drop = drop

    @property
    def last_norm(self) -> nn.BatchNorm2d:
        """The normalization at the end of the residual branch."""
        return self.residual[-1]  # pyright: ignore[reportReturnType]

    def forward(self, x: Tensor) -> Tensor:
        """``[N, C, H, W]`` -> ``[N, out_channels, ceil(H / stride), ceil(W / stride)]``; a gate and the sum are one pass."""
        residual, shortcut = self.residual(x), self.shortcut(x)
        if isinstance(self.attention, Gating) and isinstance(self.drop, nn.Identity):
            return self.attention(residual, shortcut).relu_()
        return (self.drop(self.attention(residual)) + shortcut).relu_()


class BasicBlock(Block):
    """Two 3 x 3 convolutions around a shortcut: ``width`` channels."""

    def __init__(self, channels: int, layout: Layout, kind: str | None, variant: Variant, drop: nn.Module) -> None:
        if layout.groups != 1:
            raise ValueError("networks of depth 18 and 34 have no groups; take depth 26 or more")
        width, (first, later) = layout.width, layout.dilation
        steps = _convolution(1, channels, width, layout.stride, first, 1, kind, variant)
        steps |= {
            "conv2": nn.Conv2d(width, width, 3, padding=later, dilation=later, bias=False),
            "norm2": nn.BatchNorm2d(width),
        }
        super().__init__(steps, (channels, width), layout.stride, kind, variant, drop)


class Bottleneck(Block):
    """1 x 1, 3 x 3 and 1 x 1 convolutions around a shortcut: 4 ``width`` channels."""

    def __init__(self, channels: int, layout: Layout, kind: str | None, variant: Variant, drop: nn.Module) -> None:
        inner, width = layout.width * layout.group_width // 64 * layout.groups, 4 * layout.width
        steps: dict[str, nn.Module] = {
            "conv1": nn.Conv2d(channels, inner, 1, layout.stride if variant.stride_in_1x1 else 1, bias=False),
            "norm1": nn.BatchNorm2d(inner),
            "relu1": nn.ReLU(inplace=True),
        }
        stride = 1 if variant.stride_in_1x1 else layout.stride
        steps |= _convolution(2, inner, inner, stride, layout.dilation[0], layout.groups, kind, variant)
        steps |= {"conv3": nn.Conv2d(inner, width, 1, bias=False), "norm3": nn.BatchNorm2d(width)}
        super().__init__(steps, (channels, width), layout.stride, kind, variant, drop)


def make_stem(stem: Stem, channels: int = 3) -> nn.Sequential:
    """Build the layers before the first stage: ``[N, C, H, W]`` -> ``[N, 64, ceil(H / 4), ceil(W / 4)]``."""
    steps: dict[str, nn.Module] = {}
    for number, width in enumerate(STEMS[stem], start=1):
        side = 7 if stem == "single" else 3
        stride = 2 if number == 1 else 1
        steps[f"conv{number}"] = nn.Conv2d(channels, width, side, stride, padding=side // 2, bias=False)
        steps[f"norm{number}"] = nn.BatchNorm2d(width)
        steps[f"relu{number}"] = nn.ReLU(inplace=True)
        channels = width
    return Steps(OrderedDict(steps)).append(nn.MaxPool2d(3, stride=2, padding=1))


def _convolution(
    number: int, channels: int, width: int, stride: int, dilation: int, groups: int, kind: str | None, variant: Variant
) -> dict[str, nn.Module]:
    """A 3 x 3 convolution with normalization and ReLU, or a selective kernel, which has its own."""
    if kind == "sk":
        kernel = SelectiveKernel(
            channels,
            width,
            stride,
            reduction=variant.reduction,
            min_width=variant.kernel_min_width,
            groups=groups,
            dilation=dilation,
            split_input=variant.split_input,
        )
        return {f"conv{number}": kernel}
    convolution = nn.Conv2d(channels, width, 3, stride, padding=dilation, dilation=dilation, groups=groups, bias=False)
    return {
        f"conv{number}": convolution,
        f"norm{number}": nn.BatchNorm2d(width),
        f"relu{number}": nn.ReLU(inplace=True),
    }


def _buffers(norm: nn.Module) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    get = norm.get_buffer
    return get("weight"), get("bias"), get("running_mean"), get("running_var")


def _fold(conv: nn.Conv2d, norm: FrozenBatchNorm2d) -> tuple[Tensor, Tensor]:
    """Weight and bias of a convolution that does what both do."""
    weight, bias, mean, variance = _buffers(norm)
    scale = weight * (variance + norm.eps).rsqrt()
    return conv.weight * scale[:, None, None, None], bias - mean * scale


def _is_plain(step: nn.Module, x: Tensor) -> bool:
    """Whether nobody listens to a step, and it works in the type of its input."""
    heard = step._forward_hooks or step._forward_pre_hooks or step._backward_hooks or step._backward_pre_hooks
    own, device = getattr(step, "weight", x), x.device.type
    lowered = device != "meta" and torch.is_autocast_enabled(device)  # others have it
    return not heard and own.dtype == x.dtype and not lowered


def _gate(kind: str | None, channels: int, variant: Variant) -> nn.Module:
    if kind is None or kind == "sk":
        return nn.Identity()
    return make_gating(kind, channels, variant.reduction, variant.gate_bias, variant.gate_divisor)


def _shortcut(channels: int, width: int, stride: int, average: bool) -> nn.Module:
    if channels == width and stride == 1:
        return nn.Identity()
    steps: dict[str, nn.Module] = {}
    if average and stride > 1:
        steps["pool"] = nn.AvgPool2d(2, stride, ceil_mode=True, count_include_pad=False)
        stride = 1
    steps["conv"] = nn.Conv2d(channels, width, 1, stride, bias=False)
    steps["norm"] = nn.BatchNorm2d(width)
    return Steps(OrderedDict(steps))

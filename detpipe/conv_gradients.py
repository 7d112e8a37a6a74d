"""Gradients of 3 x 3 convolutions on CPUs without AVX-512, whose kernels take up to three times as long on channels-last maps.

The convolution itself runs on channels-last maps, its backward pass on copies in PyTorch's own order: the same but for rounding.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

LEAST_CHANNELS = 64


class QuickGradients(TorchFunctionMode):
    """While it is entered, convolutions that gain from it compute their gradients so.

    Example:
        >>> conv = torch.nn.Conv2d(64, 64, 3, padding=1).to(memory_format=torch.channels_last)
        >>> with QuickGradients():
        ...     found = conv(torch.rand(1, 64, 8, 8).to(memory_format=torch.channels_last))
        >>> found.sum().backward()
        >>> conv.weight.grad.shape
        torch.Size([64, 64, 3, 3])
    """

    @staticmethod
    def are_quicker() -> bool:
        """Whether this processor is one that gains."""
        return torch.backends.cpu.get_cpu_capability() == "AVX2"

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Compute what is asked for, a convolution that suits by :class:`_Convolution`."""
        if func is torch.conv2d and not kwargs and len(args) == 7 and _suits(*args[:2], *args[3:]):
            return _Convolution.apply(*args)
        return func(*args, **(kwargs or {}))


def _suits(images: Tensor, weight: Tensor, stride: Any, padding: Any, dilation: Any, groups: int) -> bool:
    return (
        weight.shape[2:] == (3, 3)
        and min(weight.shape[:2]) >= LEAST_CHANNELS
        and groups == 1
        and isinstance(padding, tuple)
        and images.ndim == 4
        and images.is_cpu
        and images.dtype == weight.dtype == torch.float32
        and images.is_contiguous(memory_format=torch.channels_last)
    )


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        images, weight, bias, *settings = args
        ctx.save_for_backward(images, weight)
        ctx.widths, ctx.settings = None if bias is None else [len(bias)], settings
        return torch.conv2d(images, weight, bias, *settings)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        images, weight = ctx.saved_tensors
        stride, padding, dilation, groups = ctx.settings
        tensors = (tensor.contiguous() for tensor in (gradients[0], images, weight))
        wanted = [*ctx.needs_input_grad[:3]]
        found = torch.ops.aten.convolution_backward(
            *tensors, ctx.widths, stride, padding, dilation, False, [0, 0], groups, wanted
        )
        last = [value if value is None else value.contiguous(memory_format=torch.channels_last) for value in found[:2]]
        return (*last, found[2], None, None, None, None)

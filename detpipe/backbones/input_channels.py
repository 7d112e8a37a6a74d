"""The first layer of a network for images of other channels than RGB, and weights that were learned on RGB spread over them.

The rule is timm's ``adapt_input_conv`` (Wightman, "PyTorch Image Models", 2019): for one channel the weights of the three are
summed, so that a grey image gives what it gave as three equal channels; for C others they are repeated in order and multiplied by
3 / C, so that sums keep their size.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from detpipe.support.numbers import check_whole
from detpipe.types import MOST_CHANNELS, PixelFormat

_RGB = 3


def check_channels(channels: int) -> int:
    """Refuse a number of channels that no image has, by a ValueError."""
    check_whole(in_channels=channels)
    if channels > MOST_CHANNELS:
        raise ValueError(f"in_channels must lie in 1..{MOST_CHANNELS}, got {channels}")
    return channels


def spread_weight(weight: Tensor, channels: int) -> Tensor:
    """Spread the weights ``[O, 3, h, w]`` of a first convolution, learned on RGB, over C channels: ``[O, C, h, w]``.

    Example:
        >>> spread_weight(torch.tensor([1.0, 2.0, 4.0]).reshape(1, 3, 1, 1), 1).flatten().tolist()
        [7.0]
        >>> spread_weight(torch.tensor([4.0, 8.0, 12.0]).reshape(1, 3, 1, 1), 4).flatten().tolist()
        [3.0, 6.0, 9.0, 3.0]
    """
    if channels == _RGB:
        return weight
    if channels == 1:
        return weight.sum(1, keepdim=True)
    return weight.repeat(1, -(-channels // _RGB), 1, 1)[:, :channels] * (_RGB / channels)


def spread_weights(given: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Fit weights that were learned on RGB to a network of other channels, whose tensors have the same names.

    Returns:
        The weights; those whose only difference is that they take 3 channels where the network takes others, spread over these.
    """
    fitted = dict(given)
    for name, wanted in own.items():
        weight = given.get(name)
        if weight is None or weight.ndim != 4 or wanted.ndim != 4 or weight.shape == wanted.shape:
            continue
        if weight.shape[1] == _RGB and (weight.shape[0], *weight.shape[2:]) == (wanted.shape[0], *wanted.shape[2:]):
            fitted[name] = spread_weight(weight, wanted.shape[1])
    return fitted


def set_input_channels(network: nn.Module, channels: int) -> None:
    """Give a network with random weights a first convolution of C channels, whose outputs are as large; in place.

    For three channels nothing is changed, nor is anything drawn. A ValueError where the first convolution is not one of three.
    """
    if check_channels(channels) == _RGB:
        return
    first = next((module for module in network.modules() if isinstance(module, nn.Conv2d)), None)
    if first is None or first.in_channels != _RGB or first.groups != 1:
        raise ValueError(
            f"in_channels is {channels}, but {type(network).__name__} does not begin with a convolution of three channels, which "
            "could be changed; give another network, or images of three channels"
        )
    first.in_channels = channels
    with torch.no_grad():
        weight = first.weight.new_empty(first.out_channels, channels, *first.kernel_size)
        weight.normal_(0, float(first.weight.std()) * (_RGB / channels) ** 0.5)
    first.weight = nn.Parameter(weight, requires_grad=first.weight.requires_grad)


def format_of(known: PixelFormat, channels: int) -> PixelFormat:
    """The pixel format for C channels, from that of RGB, or one that was given for C; a ValueError for any other."""
    if known.channels not in (_RGB, channels):
        raise ValueError(f"pixel_format has a mean and std of {known.channels} channels, but in_channels is {channels}")
    return known.spread(channels)

"""Attention by name, as configurations choose it."""

from __future__ import annotations

from collections.abc import Callable

from detpipe.attention.base import Gating
from detpipe.attention.cbam import CBAM
from detpipe.attention.efficient_channel import ECA
from detpipe.attention.squeeze_excitation import (
    ConcurrentSqueezeExcitation,
    SpatialSqueezeExcitation,
    SqueezeExcitation,
)
from detpipe.suggest import did_you_mean

GATINGS: dict[str, Callable[[int], Gating]] = {
    "se": SqueezeExcitation,
    "sse": SpatialSqueezeExcitation,
    "scse": ConcurrentSqueezeExcitation,
    "eca": ECA,
    "cbam": CBAM,
}


def make_gating(name: str, channels: int, reduction: int = 16, bias: bool = True, divisor: int = 8) -> Gating:
    """Build the attention of a name.

    Args:
        name: "se", "sse", "scse", "eca" or "cbam".
        channels: C of the map.
        reduction: of those that squeeze channels ("se", "scse", "cbam"): C divided by the hidden width.
        bias: of their hidden layers.
        divisor: what their hidden width is a multiple of.

    Returns:
        The module, ``[N, C, H, W]`` to the same shape.

    Raises:
        ValueError: an unknown name, or ``reduction`` above ``channels``.
    """
    if name not in GATINGS:
        raise ValueError(f"unknown attention {name!r}: expected one of {list(GATINGS)}{did_you_mean(name, GATINGS)}")
    if name == "se":
        return SqueezeExcitation(channels, reduction, bias, divisor)
    if name == "scse":
        return ConcurrentSqueezeExcitation(channels, reduction, bias=bias, divisor=divisor)
    if name == "cbam":
        return CBAM(channels, reduction, bias=bias, divisor=divisor)
    return GATINGS[name](channels)

"""Attention by name, as configurations choose it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import nn

from detpipe.attention.base import Gating
from detpipe.attention.cbam import CBAM
from detpipe.attention.efficient_channel import ECA
from detpipe.attention.squeeze_excitation import (
    ConcurrentSqueezeExcitation,
    SpatialSqueezeExcitation,
    SqueezeExcitation,
)
from detpipe.support.suggest import did_you_mean

OPEN = 4.0  # a gate of sigmoid(4) = .98; eleven of them in a row leave .82
GATINGS: dict[str, Callable[..., Gating]] = {
    "se": SqueezeExcitation,
    "sse": SpatialSqueezeExcitation,
    "scse": ConcurrentSqueezeExcitation,
    "eca": ECA,
    "cbam": CBAM,
}


def make_gating(name: str, channels: int, reduction: int = 16, bias: bool = True, divisor: int = 8) -> Gating:
    """Build the attention of a name in `GATINGS`, for maps of C channels; a ValueError for another name.

    ``reduction`` (C divided by the hidden width), ``bias`` and ``divisor`` (what the hidden width is a multiple of) are for those
    that squeeze channels: "se", "scse", "cbam".
    """
    if name not in GATINGS:
        raise ValueError(f"unknown attention {name!r}: expected one of {list(GATINGS)}{did_you_mean(name, GATINGS)}")
    squeezing = name in ("se", "scse", "cbam")
    return GATINGS[name](channels, **({"reduction": reduction, "bias": bias, "divisor": divisor} if squeezing else {}))


def by_stage(
    attention: str | Mapping[str, str | None] | None, stages: Sequence[str], kinds: Sequence[str] = tuple(GATINGS)
) -> dict[str, str | None]:
    """Spell out the attention, one kind for all or stage -> kind, of each stage that can have one: stage -> kind or None.

    Raises:
        ValueError: an unknown stage or kind.

    Example:
        >>> by_stage({"c4": "se"}, ("c3", "c4"))
        {'c3': None, 'c4': 'se'}
    """
    chosen = dict(attention) if isinstance(attention, Mapping) else dict.fromkeys(stages, attention)
    for stage, kind in chosen.items():
        if stage not in stages:
            raise ValueError(
                f"attention: unknown stage {stage!r}, expected some of {list(stages)}{did_you_mean(stage, stages)}"
            )
        if kind is not None and kind not in kinds:
            raise ValueError(
                f"attention: unknown kind {kind!r}, expected null or one of {list(kinds)}{did_you_mean(str(kind), kinds)}"
            )
    return {stage: chosen.get(stage) for stage in stages}


def open_gates(network: nn.Module) -> None:
    """Let gates begin near one, by their biases, in place; ECA has none, and two half-open gates of scSE already sum to one.

    Put into a trained network, half-open gates would shrink what the layers after them are used to: eleven in a row two
    thousandfold.
    """
    concurrent = [module for module in network.modules() if isinstance(module, ConcurrentSqueezeExcitation)]
    halves = {part for module in concurrent for part in (module.channel, module.spatial)}
    for module in network.modules():
        if module in halves:
            continue
        if isinstance(module, SqueezeExcitation):
            _fill(module.excite, OPEN)
        elif isinstance(module, SpatialSqueezeExcitation):
            _fill(module.squeeze, OPEN)
        elif isinstance(module, CBAM):
            _fill(module.excite, OPEN / 2)  # of the mean and of the maximum
            _fill(module.spatial, OPEN)


def _fill(layer: nn.Conv2d, value: float) -> None:
    if layer.bias is not None:
        with torch.no_grad():
            layer.bias.fill_(value)

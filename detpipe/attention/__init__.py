"""Attention over feature maps: channels, places or kernel sizes weighted by what the map contains."""

from detpipe.attention.base import Attention, Gating
from detpipe.attention.cbam import CBAM
from detpipe.attention.efficient_channel import ECA
from detpipe.attention.insertion import add_attention
from detpipe.attention.selective_kernel import SelectiveKernel
from detpipe.attention.squeeze_excitation import (
    ConcurrentSqueezeExcitation,
    SpatialSqueezeExcitation,
    SqueezeExcitation,
)

__all__ = [
    "CBAM",
    "ECA",
    "Attention",
    "ConcurrentSqueezeExcitation",
    "Gating",
    "SelectiveKernel",
    "SpatialSqueezeExcitation",
    "SqueezeExcitation",
    "add_attention",
]

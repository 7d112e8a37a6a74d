"""Attention over feature maps: ``[N, C, H, W]`` to the same shape."""

from detpipe.attention.squeeze_excitation import SqueezeExcitation

__all__ = ["SqueezeExcitation"]

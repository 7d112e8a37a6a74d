"""Backbones: normalized images to feature maps."""

from detpipe.backbones.extractor import Extractor, Level
from detpipe.backbones.fpn import FPN
from detpipe.backbones.pretrained import Pretrained
from detpipe.backbones.regime import Regime
from detpipe.backbones.residual_blocks import Variant
from detpipe.backbones.se_inception import SEInceptionV3
from detpipe.backbones.se_resnet import SEResNet, SEResNeXt, SKNet
from detpipe.backbones.vit_pyramid import ViTPyramid

__all__ = [
    "FPN",
    "Extractor",
    "Level",
    "Pretrained",
    "Regime",
    "SEInceptionV3",
    "SEResNeXt",
    "SEResNet",
    "SKNet",
    "Variant",
    "ViTPyramid",
]

"""Backbones: normalized images to feature maps."""

from detpipe.backbones.extractor import Extractor, Level
from detpipe.backbones.fpn import FPN
from detpipe.backbones.se_resnet import SEResNet

__all__ = ["FPN", "Extractor", "Level", "SEResNet"]

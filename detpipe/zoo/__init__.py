"""Detectors with published weights, built of detpipe's stages."""

from detpipe.zoo.torchvision_models import from_torchvision

__all__ = ["from_torchvision"]

"""Detectors with published weights, built of detpipe's stages."""

from detpipe.zoo.published import entries, load, read, settings_by_name
from detpipe.zoo.torchvision_models import from_torchvision

__all__ = ["entries", "from_torchvision", "load", "read", "settings_by_name"]

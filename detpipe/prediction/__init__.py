"""Prediction at the size of real work: many images, large images, several views of one image, several machines.

What detects is any `Detector`: ``TwoStageDetector``, and what is put around one here::

    detector = TiledDetector(AugmentedDetector(detector), size=640)   # images -> detections, as the detector
"""

from detpipe.prediction.augmented import AugmentedDetector
from detpipe.prediction.detector import Detector, PlacedDetector
from detpipe.prediction.merging import Merge
from detpipe.prediction.tiles import TiledDetector
from detpipe.prediction.windows import ImageWindows, Windows

__all__ = ["AugmentedDetector", "Detector", "ImageWindows", "Merge", "PlacedDetector", "TiledDetector", "Windows"]

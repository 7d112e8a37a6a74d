"""Tiles and test-time augmentation under Lightning's Trainer, which predicts with modules."""

from __future__ import annotations

from lightning import LightningModule
from torch import Tensor

from detpipe.detector import TwoStageDetector
from detpipe.images import detections_to_files
from detpipe.prediction.augmented import AugmentedDetector
from detpipe.prediction.detector import Detector
from detpipe.prediction.tiles import TiledDetector
from detpipe.types import Detection, Target


class PredictionModule(LightningModule):
    """A detector for ``trainer.predict``, in place of itself.

    Args:
        detector: what is put into it.
        augmented: whether it looks at each image, or tile, mirrored and at other sizes too.
        tiles: height and width of tiles; None looks at whole images.
        overlap: share of a tile that the next one has too.
    """

    def __init__(
        self, detector: TwoStageDetector, augmented: bool = False, tiles: int | None = None, overlap: float = 0.2
    ) -> None:
        super().__init__()
        self.detector = detector
        detect: Detector = AugmentedDetector(detector) if augmented else detector
        self._detect = detect if tiles is None else TiledDetector(detect, tiles, overlap)

    def predict_step(self, batch: tuple[list[Tensor], list[Target]], batch_idx: int) -> list[Detection]:
        """Detect objects in a batch; boxes are in pixels of the image files."""
        images, targets = batch
        return detections_to_files(self._detect(images, targets), targets)

"""Pictures of a run while it goes on: what it trains on, truth beside detections, and curves."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor

from detpipe import images as frames
from detpipe.pictures import visualize
from detpipe.pictures.curves import plot_curves
from detpipe.types import Detection, Target

Batch = tuple[list[Tensor], list[Target]]


class TrainingPicture(Callback):
    """Draw the first images that a run trains on, as they come to the model, augmented, to ``training.png`` in the run folder."""

    def __init__(self, folder: Path, class_names: tuple[str, ...], images: int = 12) -> None:
        self.folder, self.class_names, self.images = folder, class_names, images
        self._seen: list[tuple[Tensor, Target]] | None = []  # None: they are drawn

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Batch, batch_idx: int) -> None:
        """Keep the images, and draw them, before the step, when there are enough."""
        if self._seen is None or not trainer.is_global_zero:
            return
        self._seen += zip(batch[0], batch[1], strict=True)
        if len(self._seen) >= self.images or batch_idx + 1 == trainer.num_training_batches:
            images, targets = zip(*self._seen[: self.images], strict=True)
            title = f"training images of epoch {trainer.current_epoch}, as the model gets them"
            sheet = visualize.contact_sheet(images, targets, self.class_names, title)
            _save(self.folder, "training", sheet, trainer)
            self._seen = None


class ValidationPicture(Callback):
    """Draw truth and detections of a few images after every validation epoch, to ``validation.png`` in the run folder."""

    def __init__(
        self, folder: Path, class_names: tuple[str, ...], images: int = 12, score_threshold: float = 0.5
    ) -> None:
        self.folder, self.class_names = folder, class_names
        self.images, self.score_threshold = images, score_threshold
        self._shown: list[tuple[Tensor, Target, Detection]] = []

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forget the last epoch."""
        self._shown = []

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Batch, *index: int
    ) -> None:
        """Keep the first images."""
        room = self.images - len(self._shown)
        drawn = frames.detections_to_files(outputs[:room], batch[1][:room], back=True)
        self._shown += list(zip(batch[0][:room], batch[1][:room], drawn, strict=True))

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw."""
        if trainer.sanity_checking or not self._shown or not trainer.is_global_zero:
            return
        images, targets, detections = (list(column) for column in zip(*self._shown, strict=True))
        grid = visualize.comparison_grid(images, targets, detections, self.class_names, self.score_threshold)
        _save(self.folder, "validation", grid, trainer)


class Curves(Callback):
    """Draw ``curves.png`` from what is logged, after epochs and at the end; needs matplotlib.

    Args:
        folder: the run folder.
        pause: seconds between two drawings, so that short epochs do not wait for pictures.
    """

    def __init__(self, folder: Path, pause: float = 20.0) -> None:
        self.folder, self.pause = folder, pause
        self._last = time.monotonic()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw, unless that was a moment ago."""
        if time.monotonic() - self._last >= self.pause:
            self._draw(trainer)
            self._last = time.monotonic()

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw."""
        self._draw(trainer)

    def _draw(self, trainer: Trainer) -> None:
        if not trainer.is_global_zero:
            return
        if trainer.logger is not None:
            trainer.logger.save()
        metrics = self.folder / "metrics.csv"
        if metrics.is_file():
            plot_curves(metrics, self.folder / "curves.png")


def _save(folder: Path, name: str, picture: Tensor, trainer: Trainer) -> None:
    visualize.save_png(folder / f"{name}.png", picture)
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger):
            logger.experiment.add_image(name, picture, trainer.global_step)

"""What happens around training: random state, scores, speed, pictures, and the stop at a NaN."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from detpipe import processes
from detpipe.errors import NonFiniteStepError, TrainingError
from detpipe.evaluation.metrics import CocoEvaluator
from detpipe.files import atomic_write
from detpipe.training.checkpoint import KEY, Description
from detpipe.types import Target

NONFINITE_BATCH = "nonfinite_batch.pt"
NAMES_SHOWN = 20  # images that the message names
Batch = tuple[list[Tensor], list[Target]]


def names_of_targets(batch: Batch) -> list[str]:
    """The file names that a batch of a detector carries in its targets, the image ids where it has none."""
    return [str(target.get("file_name", target.get("image_id"))) for target in batch[1]]


class StepSeed(Callback):
    """Make every random draw of a training step a function of the seed and the step alone.

    It is another one in each process, and for each of the batches whose gradients are accumulated for a step. A resumed run then
    draws what the undisturbed one would have drawn.

    Args:
        seed: of the run.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Batch, batch_idx: int) -> None:
        """Seed the global generators for this step."""
        accumulated = trainer.accumulate_grad_batches
        part = trainer.global_step * accumulated + batch_idx % accumulated
        torch.manual_seed((self.seed * 1_000_003 + part * trainer.world_size + trainer.global_rank) % 2**63)


class ValidateLastStep(Callback):
    """Validate and save after the last step where ``trainer.max_steps`` ends training in the middle of an epoch."""

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        """Ask for the stop that validates first; Lightning's own at the last step does not."""
        if trainer.global_step == trainer.max_steps:
            trainer.should_stop = True


class DescribeCheckpoint(Callback):
    """Write the model's configuration and the names of the classes into every checkpoint.

    Args:
        description: what to write.
    """

    def __init__(self, description: Description) -> None:
        self.description = description

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Add the entry."""
        checkpoint[KEY] = self.description.to_dict()


class MeanAveragePrecision(Callback):
    """Evaluate the detections of each validation epoch.

    Logs ``val/AP`` and ``val/AP50`` (COCO's definitions, in 0..1). Each checkpoint carries all the numbers of its weights.
    """

    def __init__(self) -> None:
        self.metrics: dict[str, Any] = {}
        self._evaluator: CocoEvaluator | None = None

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forget the last epoch."""
        annotations = trainer.datamodule.annotations("val")  # type: ignore[attr-defined]
        self._evaluator = CocoEvaluator(annotations).to(pl_module.device)

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Batch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Keep the detections of a batch."""
        assert self._evaluator is not None
        self._evaluator.update(outputs, [int(target["image_id"]) for target in batch[1]])  # type: ignore[typeddict-item]

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Evaluate and log."""
        assert self._evaluator is not None
        self.metrics = self._evaluator.compute()
        self.metrics["epoch"] = trainer.current_epoch
        for name in ("AP", "AP50"):
            pl_module.log(f"val/{name}", float(self.metrics[name]), prog_bar=True)

    def state_dict(self) -> dict[str, Any]:
        """The numbers, for the checkpoint."""
        return {"metrics": json.dumps(self.metrics)}

    @classmethod
    def stored(cls, checkpoint: dict[str, Any]) -> dict[str, Any]:
        """Read the numbers of a checkpoint.

        Args:
            checkpoint: Lightning's dict.

        Returns:
            As from :func:`detpipe.evaluation.evaluate`, and ``epoch``.
        """
        return json.loads(checkpoint["callbacks"][cls.__qualname__]["metrics"])


class Throughput(Callback):
    """Show and log training images a second, of all processes; evaluation and saving do not count."""

    def __init__(self) -> None:
        self.images, self.seconds = 0, 0.0
        self._mark = 0.0

    @property
    def images_per_second(self) -> float:
        """Training images a second, waiting for data included."""
        return self.images / self.seconds if self.seconds else 0.0

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock."""
        self._mark = time.perf_counter()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        """Count a batch."""
        now = time.perf_counter()
        self.images, self.seconds = self.images + len(batch[0]) * trainer.world_size, self.seconds + now - self._mark
        self._mark = now
        pl_module.log("images/s", self.images_per_second, prog_bar=True, on_step=True, batch_size=len(batch[0]))


class StopOnNonFinite(Callback):
    """Stop before a NaN or an infinity reaches the weights, and say which images caused it (row 36 of the fault matrix).

    The batch is stored as ``NONFINITE_BATCH`` in the run folder: images, targets (or labels), file names, step.

    Args:
        folder: the run folder.
        file_names: of a batch, for the message.
    """

    def __init__(self, folder: Path, file_names: Callable[[Any], list[str]] = names_of_targets) -> None:
        self.folder, self.file_names = folder, file_names
        self._batch: Any = None

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Batch, batch_idx: int) -> None:
        """Remember the batch."""
        self._batch = batch

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Check the loss; all processes stop at the same step."""
        bad = not torch.isfinite(loss)
        if processes.anywhere(bad, loss.device):
            if not bad:
                raise TrainingError(
                    f"step {trainer.global_step}: stopped, since the loss is not finite in another process"
                )
            self._stop(trainer, f"the loss is {loss.item()}")

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        """Check the gradients; with a loss scaler (16-mixed) an infinite gradient is its business."""
        if trainer.precision == "16-mixed":
            return
        gradients = [p.grad for p in pl_module.parameters() if p.grad is not None]
        if gradients and not torch.isfinite(torch.nn.utils.get_total_norm(gradients)):
            names = [
                n for n, p in pl_module.named_parameters() if p.grad is not None and not torch.isfinite(p.grad).all()
            ]
            self._stop(trainer, f"the gradient of {', '.join(names[:3])} is not finite")

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Keep the batch of a step that has no loss, since its proposals are not finite, and say so in the error."""
        if isinstance(exception, NonFiniteStepError) and trainer.training:
            exception.args = (self._kept(trainer, exception.what),)

    def _stop(self, trainer: Trainer, what: str) -> None:
        raise TrainingError(self._kept(trainer, what))

    def _kept(self, trainer: Trainer, what: str) -> str:
        """Store the batch, and word the error."""
        batch = self._batch
        names = self.file_names(batch)
        path = self.folder / NONFINITE_BATCH
        kept = {"images": batch[0], "targets": batch[1], "file_names": names, "step": trainer.global_step}
        with atomic_write(path) as temporary:
            torch.save(kept, temporary)
        more = f" and {len(names) - NAMES_SHOWN} more" if len(names) > NAMES_SHOWN else ""
        return (
            f"step {trainer.global_step}: {what}; the weights were not changed. Images of the batch: "
            f"{', '.join(names[:NAMES_SHOWN])}{more} (saved in {path}). Check them, or lower optimizer.lr or set "
            "trainer.gradient_clip_val"
        )


class Accuracy(Callback):
    """Keep top-1, top-5 and loss of each validation of a classifier.

    Each checkpoint carries the numbers of the last validation, and the epoch that it followed.
    """

    def __init__(self) -> None:
        self.metrics: dict[str, Any] = {}

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take over what the classifier has logged."""
        self.metrics = {name: float(trainer.callback_metrics[f"val/{name}"]) for name in ("top1", "top5", "loss")}
        self.metrics["epoch"] = trainer.current_epoch

    def state_dict(self) -> dict[str, Any]:
        """The numbers, for the checkpoint."""
        return {"metrics": json.dumps(self.metrics)}

    @classmethod
    def stored(cls, checkpoint: dict[str, Any]) -> dict[str, Any]:
        """Read the numbers of a checkpoint.

        Args:
            checkpoint: Lightning's dict.

        Returns:
            ``top1``, ``top5`` (0..1), ``loss`` and ``epoch``.
        """
        return json.loads(checkpoint["callbacks"][cls.__qualname__]["metrics"])

"""What happens around training: random state, scores, averages of the weights, speed, and the stop at a NaN or without progress."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, EarlyStopping, WeightAveraging
from torch import Tensor
from tqdm import tqdm

from detpipe.evaluation.metrics import CocoEvaluator
from detpipe.support import processes
from detpipe.support.errors import NonFiniteStepError, TrainingError
from detpipe.support.files import atomic_write
from detpipe.types import Target

NONFINITE_BATCH = "nonfinite_batch.pt"
NAMES_SHOWN = 20  # images that the message names
Batch = tuple[list[Tensor], list[Target]]


def names_of_targets(batch: Batch) -> list[str]:
    """The file names that a batch of a detector carries in its targets, the image ids where it has none."""
    return [str(target.get("file_name", target.get("image_id"))) for target in batch[1]]


class StepSeed(Callback):
    """Make every random draw of a training step, and of a validation, a function of the run's seed and the step alone.

    It is another one in each process, and for each of the batches whose gradients are accumulated for a step. A resumed run then
    draws what the undisturbed one would have drawn.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Batch, batch_idx: int) -> None:
        """Seed the global generators for this step."""
        accumulated = trainer.accumulate_grad_batches
        self._set(trainer, trainer.global_step * accumulated + batch_idx % accumulated)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Seed them for the validation: its losses are those of sampled RoIs."""
        self._set(trainer, -1 - trainer.global_step)

    def _set(self, trainer: Trainer, part: int) -> None:
        torch.manual_seed((self.seed * 1_000_003 + part * trainer.world_size + trainer.global_rank) % 2**63)


class ValidateLastStep(Callback):
    """Validate and save after the last step where ``trainer.max_steps`` ends training in the middle of an epoch."""

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        """Ask for the stop that validates first; Lightning's own at the last step does not."""
        if trainer.global_step == trainer.max_steps:
            trainer.should_stop = True


class ValidationNumbers(Callback):
    """Keep the numbers of each validation, so that every checkpoint carries those of its weights, and the epoch that they followed.

    Args:
        monitor: the logged number, named ``val/...``, of which the highest makes the best checkpoint.
    """

    def __init__(self, monitor: str) -> None:
        self.monitor = monitor
        self.metrics: dict[str, Any] = {}
        self._told = False

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say once that only a part of the images is validated, if so."""
        loader: Any = trainer.val_dataloaders
        seen, every = sum(trainer.num_val_batches), len(loader)
        if seen < every and trainer.is_global_zero and not (self._told or trainer.sanity_checking):
            self._told = True
            tqdm.write(
                f"the numbers are those of {seen} of {every} batches of validation images, since trainer limits them"
            )

    def on_sanity_check_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forget the numbers of weights that were not trained yet."""
        self.metrics = {}

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take over what the model has logged, the monitored number first; a TrainingError if that is not there."""
        logged = {name: float(v) for name, v in trainer.callback_metrics.items() if name.startswith("val/")}
        if self.monitor not in logged and not trainer.barebones:
            raise TrainingError(
                f"{type(pl_module).__name__} is to be watched by {self.monitor!r}, but logged {sorted(logged) or 'nothing'}"
            )
        ordered = {name: logged[name] for name in (self.monitor, *logged) if name in logged}
        self.metrics = {name.removeprefix("val/"): value for name, value in ordered.items()}
        self.metrics["epoch"] = trainer.current_epoch

    def state_dict(self) -> dict[str, Any]:
        """The numbers, for the checkpoint."""
        return {"metrics": dict(self.metrics)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with the numbers of a checkpoint."""
        self.metrics = _numbers(state_dict)

    @classmethod
    def stored(cls, checkpoint: dict[str, Any]) -> dict[str, Any]:
        """Read the numbers of Lightning's dict, by name without ``val/``, and ``epoch``; nothing before the first validation."""
        return _numbers(checkpoint["callbacks"].get(cls.__qualname__, {}))


def _numbers(state: dict[str, Any]) -> dict[str, Any]:
    found = state.get("metrics", {})
    return json.loads(found) if isinstance(found, str) else found  # text in checkpoints of before


class Accuracy(ValidationNumbers):
    """Keep the numbers of a classifier: ``top1``, ``top5`` (0..1) and ``loss``."""

    def __init__(self) -> None:
        super().__init__("val/top1")


class MeanAveragePrecision(ValidationNumbers):
    """Evaluate the detections of each validation epoch.

    Logs ``val/AP`` and ``val/AP50`` (COCO's definitions, in 0..1), and keeps all numbers of :func:`detpipe.evaluation.evaluate`.
    """

    def __init__(self) -> None:
        super().__init__("val/AP")
        self._evaluator: CocoEvaluator | None = None

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forget the last epoch."""
        annotations = trainer.datamodule.annotations("val")  # type: ignore[attr-defined]
        self._evaluator = CocoEvaluator(annotations).to(pl_module.device)

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Batch, *index: int
    ) -> None:
        """Keep the detections of a batch."""
        assert self._evaluator is not None
        self._evaluator.update(outputs, [int(target["image_id"]) for target in batch[1]])  # type: ignore[typeddict-item]

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Evaluate and log."""
        assert self._evaluator is not None
        self.metrics = self._evaluator.compute()
        self.metrics["epoch"] = trainer.current_epoch
        if self._evaluator.images_seen < len(self._evaluator.annotations):
            self.metrics["images"] = self._evaluator.images_seen
        for name in ("AP", "AP50"):
            pl_module.log(f"val/{name}", float(self.metrics[name]), prog_bar=True)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The numbers are there already."""


class AveragedWeights(WeightAveraging):
    """Average the weights over the steps of training, from the first one on, and validate, save and predict with the average.

    The average after step t is ``d * average + (1 - d) * weights`` with ``d = min(decay, (1 + t) / (10 + t))``: it follows the
    weights closely at first (the warm-up of TensorFlow's ``ExponentialMovingAverage``). Statistics of norms are averaged too.
    Tarvainen and Valpola, "Mean teachers are better role models", 2017, arXiv 1703.01780.

    Args:
        decay: d after the warm-up, 0 to 1, 1 excluded.

    Raises:
        ValueError: ``decay`` outside its range.
    """

    def __init__(self, decay: float) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"ema must be at least 0 and less than 1, got {decay}")
        super().__init__(multi_avg_fn=self._average)
        self.decay = decay
        self._swapped = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Average in float64 where weights will be; in float32 else, since half precision would lose small steps."""
        super().setup(trainer, pl_module, stage)
        if stage == "fit" and trainer.precision == "64-true":
            assert self._average_model is not None
            self._average_model.double()

    def _average(self, averages: Any, values: Any, count: Any) -> None:
        step = self._latest_update_step + 1  # count lies on the device
        decay = min(self.decay, (1 + step) / (10 + step))
        if torch.is_floating_point(averages[0]):
            values = [value.to(average.dtype) for average, value in zip(averages, values, strict=True)]
            torch._foreach_lerp_(averages, values, 1 - decay)  # pyright: ignore[reportPrivateImportUsage]
        else:  # counters
            for average, value in zip(averages, values, strict=True):
                average.copy_(value)

    def _swap_models(self, pl_module: LightningModule) -> None:
        super()._swap_models(pl_module)
        self._swapped = not self._swapped

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Store the average as the weights, and what is trained beside it, during a validation too."""
        super().on_save_checkpoint(trainer, pl_module, checkpoint)
        if self._swapped:
            average, trained = checkpoint["current_model_state"], checkpoint["state_dict"]
            checkpoint["state_dict"], checkpoint["current_model_state"] = average, trained


class StopEarly(EarlyStopping):
    """End training when so many validations, 1 or more, have brought no better number; the highest is the best."""

    def __init__(self, monitor: str, patience: int) -> None:
        if patience < 1:
            raise ValueError(f"early_stopping must be at least 1 epoch, got {patience}")
        super().__init__(monitor, patience=patience, mode="max", check_finite=False, check_on_train_epoch_end=False)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on counting, by the patience that is configured now."""
        super().load_state_dict({**state_dict, "patience": self.patience})

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """End at once where the run that goes on had ended here."""
        trainer.should_stop = trainer.should_stop or self.wait_count >= self.patience


class Throughput(Callback):
    """Show and log training images a second, of all processes; evaluation and saving do not count."""

    def __init__(self) -> None:
        self.images, self.seconds = 0, 0.0
        self._mark = 0.0

    @property
    def images_per_second(self) -> float:
        """Training images a second, waiting for data included."""
        return self.images / self.seconds if self.seconds else 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock."""
        self._mark = time.perf_counter()

    on_train_epoch_start = on_train_start

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop the clock."""
        self._mark -= time.perf_counter()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Let it go on."""
        self._mark += time.perf_counter()

    def leave_out(self, seconds: float) -> None:
        """Do not count the last seconds."""
        self._mark += seconds

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
        if processes.any_rank(bad, loss.device):
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

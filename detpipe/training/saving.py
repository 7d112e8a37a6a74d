"""When a training is saved: in good time, at the end of epochs, where validation is best, and when it is asked to stop.

A save in the middle of an epoch happens between two steps, when everything that belongs to the first is done: its validation,
its row in the metrics. What goes on from it repeats no batch, and leaves none out.
"""

from __future__ import annotations

import math
import os
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, Literal

from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, Checkpoint, StochasticWeightAveraging

from detpipe.support import processes
from detpipe.support.errors import StoppedBySignal
from detpipe.training.callbacks import Throughput, ValidationNumbers
from detpipe.training.checkpoint import BEST, KEY, LAST, Description

SIGNALS = ("SIGINT", "SIGTERM", "SIGUSR1", "SIGHUP")
_KEEP, _SAVE, _STOP = 0, 1, 2
Moment = Literal["step", "stop", "validation"]  # of a save that Lightning has no hook for


@dataclass(frozen=True)
class CheckpointSettings:
    """How much of a training a kill may cost at most; the end of an epoch is saved in any case.

    Args:
        every_n_steps: steps between two checkpoints; None for no limit.
        every_minutes: minutes between two checkpoints; None for no limit.

    Raises:
        ValueError: a limit that is not positive.
    """

    every_n_steps: int | None = 500
    every_minutes: float | None = 15.0

    def __post_init__(self) -> None:
        for name in ("every_n_steps", "every_minutes"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"checkpoint.{name} must be positive, or null, got {value}")


class SaveCheckpoints(Checkpoint):
    """Write ``best.ckpt`` after a validation that was better than all before, and ``last.ckpt``, into the run folder.

    Every checkpoint carries the description of the model, and the entries of ``record``: what it was trained with.
    """

    def __init__(
        self,
        folder: Path,
        numbers: ValidationNumbers,
        settings: CheckpointSettings,
        description: Description,
        record: Mapping[str, Any],
    ) -> None:
        self.folder, self.numbers, self.settings = folder, numbers, settings
        self.description, self.record = description, record
        self.monitor = numbers.monitor
        self.best: float | None = None
        self.best_numbers: dict[str, Any] | None = None  # None: those of a checkpoint of an earlier version
        self.saved_step = 0
        self._time = time.monotonic()
        self._moment: Moment | None = None

    def due(self, step: int) -> bool:
        """Whether so many steps, or so much time, have passed since the last save."""
        limits = self.settings
        steps, minutes = step - self.saved_step, (time.monotonic() - self._time) / 60
        return (limits.every_n_steps is not None and steps >= limits.every_n_steps) or (
            limits.every_minutes is not None and steps > 0 and minutes >= limits.every_minutes
        )

    def save(self, trainer: Trainer, moment: Moment | None = None) -> None:
        """Write ``last.ckpt``, in all processes.

        The moment is "step" when the next batch has come and its step has not begun; "stop" when an epoch was ended before its last
        batch; "validation" while one runs: it is repeated.
        """
        for logger in trainer.loggers:
            logger.save()  # rows of the steps that are saved must not be lost either
        self._moment = moment
        try:
            trainer.save_checkpoint(self.folder / LAST)
        finally:
            self._moment = None
        self.saved_step, self._time = trainer.global_step, time.monotonic()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock."""
        self.saved_step, self._time = trainer.global_step, time.monotonic()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the best weights."""
        if trainer.sanity_checking or self.monitor not in trainer.callback_metrics:
            return
        score = float(trainer.callback_metrics[self.monitor])
        if self.best is None or score > self.best or math.isnan(self.best):
            self.best, self.best_numbers = score, dict(self.numbers.metrics)
            trainer.save_checkpoint(self.folder / BEST)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the end of the epoch, or what there is of it where training is stopped within it."""
        whole = trainer.fit_loop.epoch_loop._num_ready_batches_reached()
        self.save(trainer, None if whole else "stop")

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the average that `StochasticWeightAveraging` gives to the model only now."""
        if any(isinstance(one, StochasticWeightAveraging) for one in vars(trainer)["callbacks"]):
            self.save(trainer)

    def state_dict(self) -> dict[str, Any]:
        """The best number so far, and the others of its validation."""
        return {"monitor": self.monitor, "best": self.best, "numbers": self.best_numbers}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from the best number, where its weights lie in this folder."""
        if state_dict["monitor"] == self.monitor and (self.folder / BEST).is_file():
            self.best, self.best_numbers = state_dict["best"], state_dict.get("numbers")

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Find the best number in checkpoints of earlier versions, which Lightning's callback wrote."""
        for key, state in checkpoint["callbacks"].items():
            if key.startswith("ModelCheckpoint") and state.get("monitor") == self.monitor:
                score = state.get("best_model_score")
                self.load_state_dict({"monitor": self.monitor, "best": None if score is None else float(score)})

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Add what a checkpoint says about itself, and let Lightning's loops go on from the moment of the save."""
        checkpoint[KEY] = self.description.to_dict()
        checkpoint.update(self.record)
        loops = checkpoint["loops"]["fit_loop"]
        batches = loops["epoch_loop.batch_progress"]["current"]["ready"]
        if self._moment == "step":
            _between_steps(loops, 1)
        elif self._moment == "stop":
            _between_steps(loops, batches % trainer.accumulate_grad_batches)
            for counts in loops["epoch_progress"].values():
                counts["processed"] -= 1
        elif self._moment == "validation":
            _before_validation(loops["epoch_loop.val_loop.batch_progress"])


def _between_steps(loops: dict[str, Any], begun: int) -> None:
    """As when Lightning saves in ``on_train_batch_end``, the only place within an epoch from which its loops know how to go on.

    Batches of a step that is not done, ``begun`` of them, count as not fetched.
    """
    progress = loops["epoch_loop.batch_progress"]
    for counts in (progress["total"], progress["current"]):
        ready = counts["ready"] - begun
        counts.update(ready=ready, started=ready, processed=ready, completed=ready - 1)  # the loops add one
    progress["is_last_batch"] = False
    loops["epoch_loop.state_dict"]["_batches_that_stepped"] -= 1  # so they do here


def _before_validation(progress: dict[str, Any]) -> None:
    """As in the first batch of a validation: the loops then validate before they train."""
    done = progress["total"]["completed"] - progress["current"]["completed"]
    for counts, before in ((progress["total"], done), (progress["current"], 0)):
        counts.update(ready=before + 1, started=before + 1, processed=before, completed=before)
    progress["is_last_batch"] = False


class ResumeBatches(Callback):
    """Let the data begin where the epoch was stopped: Lightning goes on counting, but would load its first batches again."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Tell the batches how many of the epoch are done."""
        loop = trainer.fit_loop
        total: Any = loop.epoch_progress.total
        epoch: Any = loop.epoch_progress.current
        batches: Any = loop.epoch_loop.batch_progress.current
        if not loop.is_resuming:
            return
        if epoch.ready > epoch.processed:
            sampler = trainer.train_dataloader.batch_sampler  # type: ignore[union-attr]
            sampler.resume(epoch.processed, batches.processed)
            return
        # The epoch was finished. With max_steps Lightning would finish it once more.
        epoch.completed, total.completed = epoch.processed, total.processed
        for one in (loop, loop.epoch_loop, loop.epoch_loop.val_loop):
            one._restarting = False
        loop.reset_restart_stage()


class StopOnSignal(Callback):
    """Save when it is time; and after SIGTERM, SIGUSR1, SIGHUP or Ctrl-C finish the step, save, and end.

    All processes save and stop together, whichever of them was asked to. A second Ctrl-C ends at once. The time of saving does not
    count in ``speed``.
    """

    def __init__(self, saves: SaveCheckpoints | None, speed: Throughput) -> None:
        self.saves, self.speed = saves, speed
        self.received = 0
        self._batches = 0  # of a validation, that every process has

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the place of Lightning's handlers, which it puts back itself."""
        if threading.current_thread() is not threading.main_thread():
            return
        numbers = {getattr(signal, name) for name in SIGNALS if hasattr(signal, name)}
        environment = trainer._accelerator_connector.cluster_environment
        if isinstance(environment, SLURMEnvironment) and environment.requeue_signal is not None:
            numbers.add(environment.requeue_signal)
        for number in numbers:
            signal.signal(number, self._receive)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.received and number == signal.SIGINT:
            raise KeyboardInterrupt
        if not self.received and processes.is_first():
            with suppress(OSError):  # the terminal may be gone
                print(f"\n{signal.Signals(number).name}: stopping after this step", file=sys.stderr)
        self.received = number

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Save and stop between two steps; StoppedBySignal if a signal came."""
        if batch_idx % trainer.accumulate_grad_batches:
            return  # in the middle of a step
        step, saves = trainer.global_step, self.saves
        wanted = _STOP if self.received else _SAVE if saves is not None and saves.due(step) else _KEEP
        wanted = processes.largest(wanted, pl_module.device)
        if wanted == _KEEP:
            return
        start = time.perf_counter()
        if saves is not None and step > saves.saved_step:
            saves.save(trainer, "step")
        self.speed.leave_out(time.perf_counter() - start)
        if wanted == _STOP:
            self._stop(trainer)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Count the batches that every process has: only there can they agree."""
        self._batches = min(processes.gather_objects(int(sum(trainer.num_val_batches))))

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Stop within a validation, which is then repeated; StoppedBySignal if a signal came.

        One in the middle of a step is finished, and so is the step: gradients are not saved.
        """
        if trainer.sanity_checking or trainer.fit_loop._should_accumulate():
            return
        if batch_idx >= self._batches or not processes.any_rank(self.received > 0, pl_module.device):
            return
        if self.saves is not None and trainer.global_step > self.saves.saved_step:
            self.saves.save(trainer, "validation")
        self._stop(trainer)

    def _stop(self, trainer: Trainer) -> None:
        number = processes.largest(self.received, trainer.strategy.root_device)
        name = signal.Signals(number).name
        where = "nothing was saved"
        path = None if self.saves is None else self.saves.folder / LAST
        if path is not None and path.is_file():
            again = f"--output {shlex.quote(str(path.parent))} and --ckpt_path last"
            where = f"saved {path}; go on with the same command, {again}"
        status = 130 if number == signal.SIGINT else 128 + number if name == "SIGHUP" else 143
        if trainer.is_global_zero:
            _requeue(trainer, number)
        raise StoppedBySignal(f"{name}: stopped after step {trainer.global_step}; {where}", status)


def _requeue(trainer: Trainer, number: int) -> None:
    """Put a job of Slurm into the queue again where its time is up, as Lightning does."""
    environment = trainer._accelerator_connector.cluster_environment
    if not isinstance(environment, SLURMEnvironment) or not environment.auto_requeue:
        return
    array = [os.environ.get(f"SLURM_ARRAY_{part}_ID") for part in ("JOB", "TASK")]
    job = "_".join(filter(None, array)) if all(array) else environment.job_id()
    if number == environment.requeue_signal and job is not None and shutil.which("scontrol"):
        subprocess.run(["scontrol", "requeue", str(job)], check=False, stdin=subprocess.DEVNULL)

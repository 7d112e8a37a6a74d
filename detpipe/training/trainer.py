"""Lightning's Trainer as it is configured: what a command needs runs beside the callbacks, loggers and plugins of the user."""

from __future__ import annotations

import csv
import dis
import logging
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lightning.fabric.plugins.io import CheckpointIO
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback, Checkpoint, ProgressBar, TQDMProgressBar, WeightAveraging
from lightning.pytorch.loggers import Logger
from lightning.pytorch.plugins.io.wrapper import _WrappingCheckpointIO
from lightning.pytorch.plugins.precision import HalfPrecision
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor

from detpipe.prediction.machines import processes_and_machines
from detpipe.support.errors import TrainingError, UsageError
from detpipe.support.files import atomic_write
from detpipe.support.numbers import check_numbers, check_whole
from detpipe.training.config_errors import explain

DEFAULTS = {  # where a configuration says nothing
    "max_epochs": 10,
    "num_sanity_val_steps": 0,
    "log_every_n_steps": 10,
    "use_distributed_sampler": False,
    "enable_model_summary": False,
}
FLUSHED = 50  # rows of metrics.csv that are written together


def build_trainer(
    settings: Mapping[str, Any],
    folder: Path | None = None,
    callbacks: Sequence[Callback] = (),
    loggers: Sequence[Logger] = (),
    checkpoint_io: CheckpointIO | None = None,
) -> Trainer:
    """Build the trainer of a configuration: ``settings`` are arguments of ``lightning.Trainer``, with all that they name built.

    What a command adds: callbacks, a progress bar unless there is one or none is wanted, loggers unless ``logger`` is false, and
    what writes checkpoints unless the plugins of the settings do; ``folder`` is where Lightning writes if they say nothing.

    Raises:
        UsageError: what the trainer refuses, or what would not have an effect.
    """
    given = _as_launched(settings)
    own = as_list(given.get("callbacks"))
    if given.get("barebones"):
        _leave_out(given)
    elif given.get("enable_progress_bar") is not False and not any(isinstance(one, ProgressBar) for one in own):
        own = [*own, TQDMProgressBar(refresh_rate=1 if sys.stderr.isatty() else 50)]
    given["callbacks"] = [*callbacks, *own]
    averaging = [type(one).__name__ for one in given["callbacks"] if isinstance(one, WeightAveraging)]
    if len(averaging) > 1:
        raise UsageError(
            f"weights are averaged twice, by {' and '.join(averaging)}: leave out ema or trainer.callbacks"
        )
    if not any(isinstance(one, Checkpoint) for one in given["callbacks"]):
        given["enable_checkpointing"] = False  # or Lightning would add checkpoints of its own
    given["logger"] = _loggers(given.get("logger"), loggers) or (None if given.get("barebones") else False)
    given["plugins"] = _plugins(as_list(given.get("plugins")), checkpoint_io)
    if given.get("precision") in ("bf16-true", "16-true") and given.get("strategy") in (None, "auto", "ddp"):
        given["plugins"].append(HalfPrecisionWeights(given.pop("precision")))
    if given.get("default_root_dir") is None and folder is not None:
        given["default_root_dir"] = str(folder)
    if given.get("profiler") is not None:  # its table goes through a log that is silent else
        logging.getLogger("lightning.pytorch.profilers.profiler").setLevel(logging.INFO)
    try:
        _check_numbers(given)
        trainer = Trainer(**given)
    except (ValueError, TypeError, RuntimeError, MisconfigurationException) as error:
        raise UsageError(f"trainer: {explain(str(error))}") from error
    _check_processes(trainer, bool(given.get("use_distributed_sampler")))
    return trainer


@contextmanager
def told_as_usage() -> Iterator[None]:
    """Turn what Lightning itself refuses while it works, such as a number that a callback shall watch, into a UsageError."""
    try:
        yield
    except (MisconfigurationException, ValueError, RuntimeError, AttributeError) as error:
        place: Any = error.__traceback__
        while place.tb_next is not None:
            place = place.tb_next
        raised_there = place.tb_frame.f_code.co_code[place.tb_lasti] == dis.opmap["RAISE_VARARGS"]
        if not raised_there or not place.tb_frame.f_globals["__name__"].startswith("lightning."):
            raise
        raise UsageError(" ".join(str(error).split())) from error


def _check_numbers(given: Mapping[str, Any]) -> None:
    """Refuse what Lightning would divide by, or take as something else; a ValueError."""
    check_whole(accumulate_grad_batches=given.get("accumulate_grad_batches"))
    check_whole(check_val_every_n_epoch=given.get("check_val_every_n_epoch"))
    check_whole(0, log_every_n_steps=given.get("log_every_n_steps"))
    check_whole(-1, num_sanity_val_steps=given.get("num_sanity_val_steps"))
    check_numbers("must not be negative or infinite", gradient_clip_val=given.get("gradient_clip_val"))
    if isinstance(given.get("val_check_interval"), int | float):  # or text, a duration
        check_numbers("must be positive and finite", val_check_interval=given["val_check_interval"])


class HalfPrecisionWeights(HalfPrecision):
    """Weights and images in half precision; targets stay in float32: in bfloat16, 301.3 pixels would be 302.

    Args:
        precision: "bf16-true" or "16-true".
    """

    def convert_input(self, data: Any) -> Any:
        """Convert tensors of a batch, but for those of dictionaries, which are targets."""
        if isinstance(data, list | tuple):
            return [self.convert_input(one) for one in data]
        return data if isinstance(data, dict) else super().convert_input(data)


def _as_launched(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Take as many devices and machines as torchrun or Slurm has started processes for, unless they are set to others than one."""
    given = dict(settings)
    devices, machines = processes_and_machines()
    if devices * machines > 1 and given.get("devices") in (None, "auto", 1) and given.get("num_nodes") in (None, 1):
        given.update(devices=devices, num_nodes=machines)
        if given.get("strategy") in (None, "auto"):
            given["strategy"] = "ddp"
    return given


def _leave_out(given: dict[str, Any]) -> None:
    """Remove settings that cost time, which ``barebones`` does without and Lightning would refuse; those of the user are named."""
    for name, free in (("log_every_n_steps", 0), ("num_sanity_val_steps", 0), ("enable_model_summary", False)):
        if given.get(name) not in (None, free, DEFAULTS[name]):
            print(f"note: trainer.{name} has no effect, since trainer.barebones is true", file=sys.stderr)
        given[name] = None


def as_list(value: Any) -> list[Any]:
    """What Lightning takes as one object, several or none, as a list."""
    if value is None:
        return []
    return list(value) if isinstance(value, list | tuple) else [value]


def _loggers(given: Any, loggers: Sequence[Logger]) -> list[Logger]:
    """The user's come first: a module's ``self.logger`` is the first one."""
    if given is False:
        return []
    return [*([] if given is None or given is True else as_list(given)), *loggers]


def _plugins(given: list[Any], checkpoint_io: CheckpointIO | None) -> list[Any]:
    others = [plugin for plugin in given if isinstance(plugin, CheckpointIO)]
    for plugin in others:
        if isinstance(plugin, _WrappingCheckpointIO) and plugin.checkpoint_io is None and checkpoint_io is not None:
            plugin.checkpoint_io = checkpoint_io  # such as AsyncCheckpointIO, which writes by another one
    return given if others or checkpoint_io is None else [*given, checkpoint_io]


def _check_processes(trainer: Trainer, distributed_sampler: bool) -> None:
    if trainer.world_size == 1:
        return
    launcher = trainer.strategy.launcher
    if not isinstance(trainer.strategy, DDPStrategy) or isinstance(launcher, _MultiProcessingLauncher):
        raise UsageError(
            f"trainer.strategy: {trainer.world_size} processes under {type(trainer.strategy).__name__}; give 'ddp', which "
            "starts the command once for each of them"
        )
    if distributed_sampler:
        raise UsageError(
            "trainer.use_distributed_sampler: the data deal their images out to the processes themselves; leave it out"
        )


class MetricsTable(Logger):
    """Write what is logged to ``metrics.csv``, a row for each step or validation, so that a killed run goes on with the same table.

    Args:
        folder: of the file.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.path = folder / "metrics.csv"
        self._columns: list[str] = []
        self._rows: list[dict[str, Any]] = []

    def begin(self, first_step: int) -> None:
        """Take over the rows of earlier steps, none for the first step 0, and drop others and a line that a kill cut off.

        A TrainingError if the file is none that this class has written.
        """
        try:
            rows = self._stored() if first_step else []
            kept = [row for row in rows if row["step"].isdigit() and int(row["step"]) < first_step]
        except (KeyError, ValueError, csv.Error) as error:
            raise TrainingError(f"{self.path}: not the table that was written there; move it away") from error
        if kept:
            self._columns = sorted(kept[0])
            self._write(kept, self._columns)
        else:
            self.path.unlink(missing_ok=True)

    @property
    def name(self) -> str:
        """Empty: the file lies in the folder itself."""
        return ""

    @property
    def version(self) -> str:
        """Empty."""
        return ""

    @property
    def save_dir(self) -> str:
        """The folder."""
        return str(self.path.parent)

    @rank_zero_only
    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """``config.yaml`` has them."""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Add a row."""
        values = {name: value.item() if isinstance(value, Tensor) else value for name, value in metrics.items()}
        self._rows.append({**values, "step": step})
        if len(self._rows) >= FLUSHED:
            self.save()

    @rank_zero_only
    def save(self) -> None:
        """Write the rows, and wait until they are on the disk; a TrainingError if they cannot be written."""
        if not self._rows:
            return
        columns = sorted({*self._columns, *(name for row in self._rows for name in row)})
        try:
            if columns != self._columns:
                self._write([*self._stored(), *self._rows], columns)
            else:
                with self.path.open("a", newline="", encoding="utf-8") as stream:
                    csv.DictWriter(stream, columns).writerows(self._rows)
                    stream.flush()
                    os.fsync(stream.fileno())
        except OSError as error:
            raise TrainingError(
                f"{self.path} cannot be written: {error.strerror or error}; checkpoints are intact"
            ) from error
        self._columns, self._rows = columns, []

    def _stored(self) -> list[dict[str, str]]:
        if not self.path.is_file():
            return []
        with self.path.open(newline="", encoding="utf-8") as stream:
            return [row for row in csv.DictReader(stream) if None not in row and None not in row.values()]

    def _write(self, rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> None:
        with atomic_write(self.path) as temporary, temporary.open("w", newline="", encoding="utf-8") as stream:
            writer = csv.DictWriter(stream, columns)
            writer.writeheader()
            writer.writerows(rows)

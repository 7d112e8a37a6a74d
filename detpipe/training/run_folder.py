"""What every training leaves behind: a run folder, from the first step to the summary.

A run folder holds ``config.yaml``, ``metrics.csv``, ``tensorboard/``, ``best.ckpt`` and ``last.ckpt`` with their check sums,
``curves.png`` and, when training has ended, ``summary.json``.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import Logger, TensorBoardLogger

from detpipe.pictures.run_pictures import Curves
from detpipe.support import processes
from detpipe.support.allocator import peak_gpu_memory, peak_memory
from detpipe.support.errors import CheckpointError, DataError, TrainingError, UsageError
from detpipe.support.files import remove_orphans, sole_writer, write_text
from detpipe.support.terminal import say
from detpipe.training import callbacks, checkpoint, fine_tuning, resume
from detpipe.training.checkpoint import BEST, LAST, PREVIOUS, SUM_SUFFIX
from detpipe.training.saving import CheckpointSettings, ResumeBatches, SaveCheckpoints, StopOnSignal
from detpipe.training.trainer import MetricsTable, build_trainer, told_as_usage

_FOLDER = "DETPIPE_RUN_FOLDER"  # in the environment of the processes that the first one starts


@dataclass(frozen=True)
class Task:
    """What a command trains, and how it is watched.

    Args:
        numbers: a new callback that keeps the numbers of validations; its ``monitor`` makes the best checkpoint.
        description: what checkpoints say about themselves.
        pictures: makes callbacks that draw, for a run folder.
        file_names: of a batch, for the message when its loss is not finite.
    """

    numbers: callbacks.ValidationNumbers
    description: checkpoint.Description
    pictures: Callable[[Path], list[Callback]] = lambda _: []
    file_names: Callable[[Any], list[str]] = callbacks.names_of_targets


@dataclass(frozen=True)
class Options:
    """How a training begins, is saved and ends.

    Args:
        ckpt_path: checkpoint to go on from, or "last"; None to begin.
        accepted: changes that a training may go on with, of :data:`detpipe.training.resume.CHANGES`.
        init_from: checkpoint whose weights are where training begins; None for none.
        read: reads that; others than the default know other sources by name.
        ema: decay of averaged weights; None for none.
        early_stopping: validations without a better number, after which training ends; None for none.
        checkpoint: how often a checkpoint is written.
        seed: of the random draws of steps.
        trainer: arguments of ``lightning.Trainer``.
        settings: all that is configured, which a checkpoint must agree with where it decides about the weights.
        config: text of ``config.yaml``.
    """

    ckpt_path: str | None = None
    accepted: tuple[str, ...] = ()
    init_from: str | None = None
    read: Callable[[str | Path], tuple[dict[str, Any], checkpoint.Description]] = checkpoint.read
    ema: float | None = None
    early_stopping: int | None = None
    checkpoint: CheckpointSettings = field(default_factory=CheckpointSettings)
    seed: int = 0
    trainer: Mapping[str, Any] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    config: str = ""


@dataclass(frozen=True)
class Run:
    """A training that has ended."""

    folder: Path
    checkpoint: Path | None  # the best; the last where nothing was validated; None where nothing was saved
    numbers: dict[str, Any]  # of the last validation of the checkpoint
    summary: dict[str, Any]  # what any run can say about itself

    def write_summary(self, more: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Write ``summary.json``, by which a folder is known to hold a finished run, with what more this kind of run says."""
        summary = {**self.numbers, **(more or {}), **self.summary}
        write_text(self.folder / "summary.json", json.dumps(summary, indent=2) + "\n")
        return summary

    def result(self, numbers: str) -> str:
        """The last line that a command prints: the numbers, and where the checkpoint is."""
        where = "nothing was saved" if self.checkpoint is None else f"checkpoint {self.checkpoint}"
        return f"{numbers} {where}".strip()


def fit(model: LightningModule, data: LightningDataModule, folder: Path, task: Task, options: Options) -> Run:
    """Train a model, or go on with a training, in a run folder; the summary is still to be written.

    Raises:
        SystemExit: after training, in all processes but the first.
        DetpipeError: what users can mend.
    """
    first, speed, start = processes.is_first(), callbacks.Throughput(), time.perf_counter()
    with ExitStack() as stack:
        if first:
            stack.enter_context(_locked(folder, speed))
        found = None if options.ckpt_path is None else resume.find(options.ckpt_path, folder)
        unfinished = first and any((folder / name).exists() for name in (LAST, BEST))
        if unfinished and (found is None or found.path.parent.resolve() != folder.resolve()):
            raise DataError(
                f"{folder} holds a training that has not ended: go on with --ckpt_path last, give another --output, or remove it"
            )
        record = resume.record(options.settings, data)
        saves = SaveCheckpoints(folder, task.numbers, options.checkpoint, task.description, {resume.RECORD: record})
        if options.trainer.get("enable_checkpointing") is False or options.trainer.get("barebones"):
            saves = None
        table = MetricsTable(folder) if first and _logs(options.trainer) else None
        step = 0 if found is None else found.stored["global_step"]
        loggers = [] if table is None else [table, *_tensorboard(folder, step)]
        added = _callbacks(folder, task, options, speed, saves, table is not None)
        trainer = build_trainer(options.trainer, folder, added, loggers, checkpoint.AtomicCheckpointIO())
        _check_validation(trainer, options)
        record["processes"] = trainer.world_size
        if found is not None:
            _go_on(found, model, task, options, record)
            _load_once(trainer, found.stored)
        elif options.init_from is not None:
            names = task.description.class_names
            say(fine_tuning.load_fitting(model, options.init_from, names, options.read))
        if first:
            write_text(folder / "config.yaml", options.config)
            say(f"run folder {folder}")
        if table is not None:
            table.begin(step)
        stack.enter_context(_told(folder))
        path = None if found is None else str(found.path)
        del found  # the state of the optimizer is large: Lightning lets go of it once it is loaded
        with told_as_usage():
            trainer.fit(model, datamodule=data, ckpt_path=path, weights_only=True)
        if not trainer.is_global_zero:
            raise SystemExit(0)  # what follows is the first process' to do
        return _ended(trainer, folder, task, options, speed, time.perf_counter() - start, saves)


def choose_folder(output: str | None, name: str) -> Path:
    """Choose the folder of a run: that asked for, or ``runs/NAME/DATE-TIME``; in processes that others started, that of the first.

    Raises:
        DataError: the folder asked for holds a finished run.
        UsageError: it is a file; or the folder of the first process is not known.
    """
    if not processes.is_first():
        folder = os.environ.get(_FOLDER, output)
        if folder is None:
            raise UsageError(
                "--output is missing: processes that are not started by detpipe must be told the run folder"
            )
        return Path(folder)
    if output is None:
        return Path("runs") / name / datetime.now().strftime("%Y%m%d-%H%M%S-%f")[:-3]
    if Path(output).is_file():
        raise UsageError(f"--output {output}: is a file: name a folder")
    if (Path(output) / "summary.json").exists():
        raise DataError(f"{output} holds a finished run (summary.json); give another --output or remove it")
    return Path(output)


@contextmanager
def _told(folder: Path) -> Iterator[None]:
    """Tell the processes that Lightning starts where the run is: the name of the folder holds the time."""
    before = os.environ.get(_FOLDER)
    os.environ[_FOLDER] = str(folder.resolve())
    try:
        yield
    finally:
        if before is None:
            del os.environ[_FOLDER]
        else:
            os.environ[_FOLDER] = before


@contextmanager
def _locked(folder: Path, speed: callbacks.Throughput) -> Iterator[None]:
    """Make the folder and keep other processes out of it; leave it as it was if the run failed before its first step."""
    new, config = not folder.exists(), folder / "config.yaml"
    before = config.read_text(encoding="utf-8") if config.is_file() else None
    folder.mkdir(parents=True, exist_ok=True)
    busy = TrainingError(f"{folder} is in use: another process trains there; wait for it, or give another --output")
    with sole_writer(f"{folder}{os.sep}", busy):
        try:
            remove_orphans(folder, sole_writer=True)
            yield
        except BaseException as error:
            # what ends a step leaves its batch there, perhaps in another process
            if not speed.images and before is not None:
                write_text(config, before)
            elif new and not speed.images and not isinstance(error, TrainingError):
                shutil.rmtree(folder)
            raise


def _go_on(
    found: resume.Found, model: LightningModule, task: Task, options: Options, record: Mapping[str, Any]
) -> None:
    """Refuse a checkpoint of other classes, weights or settings."""
    checkpoint.check_class_names(found.description, task.description.class_names, found.path)
    checkpoint.load_weights(model, found.stored, found.path)
    if not {"loops", "callbacks", "optimizer_states"} <= found.stored.keys():
        raise CheckpointError(
            f"checkpoint {found.path} has weights alone, nothing to go on from; begin with --init_from"
        )
    for line in resume.check_changes(found.stored, record, options.accepted, found.path):
        say(f"note: {line}")
    if options.ema is None and resume.averaged(found.stored):
        found.stored["state_dict"] = found.stored["current_model_state"]
    say(f"going on from {found.path}, step {found.stored['global_step']}")


def _load_once(trainer: Trainer, stored: dict[str, Any]) -> None:
    """Give the trainer a checkpoint that has been read and checked, whichever plugin reads others."""

    def load(*arguments: Any, **settings: Any) -> dict[str, Any]:
        del trainer.strategy.load_checkpoint
        return stored

    trainer.strategy.load_checkpoint = load


def _logs(trainer: Mapping[str, Any]) -> bool:
    """Whether the run folder gets its metrics."""
    if trainer.get("barebones") or trainer.get("logger") is False:
        print("no metrics.csv and no curves.png: trainer.logger is false, or trainer.barebones true", file=sys.stderr)
        return False
    return not trainer.get("fast_dev_run")


def _tensorboard(folder: Path, first_step: int) -> list[Logger]:
    """A log whose later events, where a run goes on, take the place of what was logged from the step of the checkpoint on."""
    if not importlib.util.find_spec("tensorboard"):
        print("no TensorBoard log: install it with pip install 'detpipe[train]'", file=sys.stderr)
        return []
    more: dict[str, Any] = {"purge_step": first_step} if first_step else {}
    return [TensorBoardLogger(str(folder), name="tensorboard", version="", **more)]


def _callbacks(
    folder: Path, task: Task, options: Options, speed: callbacks.Throughput, saves: SaveCheckpoints | None, logged: bool
) -> list[Callback]:
    more: list[Callback] = []
    try:
        if options.ema is not None:
            more.append(callbacks.AveragedWeights(options.ema))
        if options.early_stopping is not None:
            more.append(callbacks.StopEarly(task.numbers.monitor, options.early_stopping))
    except ValueError as error:
        raise UsageError(str(error)) from error
    if logged and importlib.util.find_spec("matplotlib"):
        more.append(Curves(folder))
    elif logged:
        print("no curves.png: install matplotlib with pip install 'detpipe[train]'", file=sys.stderr)
    return [
        StopOnSignal(saves, speed),  # first: what follows it belongs to the next step already
        resume.UseConfigured(),
        ResumeBatches(),
        callbacks.StepSeed(options.seed),
        callbacks.ValidateLastStep(),
        callbacks.StopOnNonFinite(folder, task.file_names),
        speed,
        task.numbers,
        *task.pictures(folder),
        *more,
        *([] if saves is None else [saves]),
    ]


def _check_validation(trainer: Trainer, options: Options) -> None:
    """Say before training what there will not be."""
    if trainer.limit_train_batches == 0:
        raise UsageError("trainer.limit_train_batches is 0: there is nothing to train on")
    if options.early_stopping is not None and trainer.barebones:
        raise UsageError("early_stopping needs numbers that trainer.barebones does not log; remove one of them")
    if trainer.limit_val_batches == 0:
        if options.early_stopping is not None:
            raise UsageError("early_stopping needs validations, but trainer.limit_val_batches is 0; remove one of them")
        if trainer.is_global_zero:
            print("nothing is validated, so there is no best.ckpt: trainer.limit_val_batches is 0", file=sys.stderr)


def _ended(
    trainer: Trainer,
    folder: Path,
    task: Task,
    options: Options,
    speed: callbacks.Throughput,
    seconds: float,
    saves: SaveCheckpoints | None,
) -> Run:
    """Collect what a run has come to."""
    path = next((folder / name for name in (BEST, LAST) if saves is not None and (folder / name).is_file()), None)
    numbers = task.numbers.metrics
    if path is not None and path.name == BEST and saves is not None:
        numbers = saves.best_numbers or type(task.numbers).stored(checkpoint.read(path)[0])
    for name in (PREVIOUS, f"{PREVIOUS}{SUM_SUFFIX}"):
        (folder / name).unlink(missing_ok=True)  # the last one is sound
    for callback in vars(trainer)["callbacks"]:
        if isinstance(callback, callbacks.StopEarly) and callback.wait_count >= callback.patience:
            print(
                f"ended after epoch {callback.stopped_epoch}: {callback.patience} validations brought no better {callback.monitor}"
            )
    general: dict[str, Any] = {
        "seconds": round(seconds, 1),
        "images_per_second": round(speed.images_per_second, 2),
        "checkpoint": None if path is None else str(path),
        "seed": options.seed,
        "epochs": trainer.current_epoch,
    }
    if (peak := peak_memory()) is not None:
        general["peak_memory_mib"] = round(peak)
    if (peak := peak_gpu_memory()) is not None:
        general["peak_gpu_memory_mib"] = round(peak)
    return Run(folder, path, numbers, general)

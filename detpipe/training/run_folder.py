"""What every training leaves behind: a run folder, from the first step to the summary.

A run folder holds ``config.yaml``, ``metrics.csv``, ``tensorboard/``, ``best.ckpt``, ``last.ckpt``, ``curves.png`` and, when
training has ended, ``summary.json``.
"""

from __future__ import annotations

import csv
import importlib.util
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import yaml
from lightning import Trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint, TQDMProgressBar
from lightning.pytorch.cli import LightningArgumentParser
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger

from detpipe import processes
from detpipe.allocator import peak_gpu_memory, peak_memory
from detpipe.errors import DataError, TrainingError, UsageError
from detpipe.files import atomic_write, remove_orphans
from detpipe.pictures.run_pictures import Curves
from detpipe.training import callbacks, checkpoint
from detpipe.training.configuration import CommandCLI, positional_configs

_FOLDER = "DETPIPE_RUN_FOLDER"  # in the environment of the processes that the first one starts


@dataclass(frozen=True)
class Watched:
    """What a command adds to its training.

    Args:
        monitor: the logged number of which the highest makes the best checkpoint.
        own: makes the command's own callbacks, of which one logs ``monitor``, for the run folder.
        file_names: of a batch, for the message when its loss is not finite.
    """

    monitor: str
    own: Callable[[Path], list[Callback]]
    file_names: Callable[[Any], list[str]] = callbacks.names_of_targets


@dataclass(frozen=True)
class Run:
    """A training that has ended."""

    folder: Path
    best: str  # the best checkpoint
    summary: dict[str, Any]  # what any run can say about itself

    def write_summary(self, numbers: dict[str, Any]) -> dict[str, Any]:
        """Write ``summary.json``, by which a folder is known to hold a finished run.

        Args:
            numbers: what this kind of run says, in front of the rest.

        Returns:
            All that was written.
        """
        summary = {**numbers, **self.summary}
        with atomic_write(self.folder / "summary.json") as temporary:
            temporary.write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
        return summary


def add_arguments(parser: LightningArgumentParser) -> None:
    """Add ``--output`` and ``--ckpt_path`` to a command that trains."""
    parser.add_argument("--output", type=str | None, default=None, help="run folder; runs/CONFIG/DATE-TIME by default")
    parser.add_argument("--ckpt_path", type=str | None, default=None, help="resume from this checkpoint (last.ckpt)")


def fit(cli: CommandCLI, arguments: Sequence[str], description: checkpoint.Description, watched: Watched) -> Run:
    """Train the model of a command, or go on with a training, in a run folder.

    Args:
        cli: built model and data.
        arguments: of the command, for the name of the folder.
        description: what the checkpoints say about themselves.
        watched: what the command adds.

    Returns:
        The run, whose summary is still to be written.

    Raises:
        SystemExit: after training, in all processes but the first.
        DetpipeError: what users can mend.
    """
    config, step = cli.config, 0
    if config.ckpt_path is not None:
        stored, known = checkpoint.read(config.ckpt_path)
        checkpoint.check_class_names(known, description.class_names, config.ckpt_path)
        checkpoint.load_weights(cli.model, stored, config.ckpt_path)
        step = stored["global_step"]
    first, speed = processes.is_first(), callbacks.Throughput()
    folder = choose_folder(config.output, arguments) if first else _folder_of_the_first(config.output)
    start = time.perf_counter()
    with _made(folder, speed) if first else nullcontext():
        trainer = cli.trainer_with(
            default_root_dir=str(folder),
            logger=_loggers(folder, step) if first else False,
            plugins=[checkpoint.AtomicCheckpointIO()],
            callbacks=_callbacks(folder, description, int(config.seed_everything or 0), speed, watched),
        )
        if first:
            with atomic_write(folder / "config.yaml") as temporary:
                temporary.write_text(
                    _reusable(cli.parser.dump(config, skip_link_targets=True, skip_unset=False)), encoding="utf-8"
                )
            print(f"run folder {folder}")
        with _told(folder):
            trainer.fit(cli.model, datamodule=cli.datamodule, ckpt_path=config.ckpt_path)
    if not trainer.is_global_zero:
        raise SystemExit(0)  # what follows is the first process' to do
    best = _best(trainer)
    general = {
        "seconds": round(time.perf_counter() - start, 1),
        "images_per_second": round(speed.images_per_second, 2),
        "checkpoint": best,
        "seed": config.seed_everything,
        "epochs": trainer.current_epoch,
    }
    if (peak := peak_memory()) is not None:
        general["peak_memory_mib"] = round(peak)
    if (peak := peak_gpu_memory()) is not None:
        general["peak_gpu_memory_mib"] = round(peak)
    return Run(folder, best, general)


def choose_folder(output: str | None, arguments: Sequence[str]) -> Path:
    """Choose the folder of a run.

    Args:
        output: as asked for, or None for ``runs/NAME OF THE FIRST CONFIGURATION/DATE-TIME``.
        arguments: of the command, for that name.

    Returns:
        The folder, which need not exist.

    Raises:
        DataError: the folder asked for holds a finished run.
    """
    if output is None:
        configs = positional_configs(arguments)
        name = Path(configs[1]).stem if configs[:1] == ["--config"] else "detector"
        folder = Path("runs") / name / datetime.now().strftime("%Y%m%d-%H%M%S-%f")[:-3]
    else:
        folder = Path(output)
        if (folder / "summary.json").exists():
            raise DataError(f"{folder} holds a finished run (summary.json); give another --output or remove it")
    return folder


def _folder_of_the_first(output: str | None) -> Path:
    """Where the first process, which starts the others or is started with them, keeps the run."""
    folder = os.environ.get(_FOLDER, output)
    if folder is None:
        raise UsageError("--output is missing: processes that are not started by detpipe must be told the run folder")
    return Path(folder)


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
def _made(folder: Path, speed: callbacks.Throughput) -> Iterator[None]:
    """Make the folder, and remove it again if the run failed before its first step, with nothing to look at."""
    new = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    remove_orphans(folder)
    try:
        yield
    except BaseException:
        if new and not speed.images and not (folder / callbacks.NONFINITE_BATCH).exists():
            shutil.rmtree(folder)
        raise


def _reusable(text: str) -> str:
    """Leave out of a configuration what belongs to one run: the file then trains again, and evaluates."""
    settings = yaml.safe_load(text)
    return yaml.safe_dump({k: v for k, v in settings.items() if k not in ("output", "ckpt_path")}, sort_keys=False)


def _loggers(folder: Path, first_step: int) -> list[Logger]:
    """Make the loggers; where a run goes on in its own folder, its metrics up to the step of the checkpoint stay."""
    path = folder / "metrics.csv"
    rows = []
    if first_step and path.is_file():
        with path.open(newline="", encoding="utf-8") as stream:
            rows = list(csv.DictReader(stream))
    table = CSVLogger(str(folder), name="", version="", flush_logs_every_n_steps=50)
    if rows:
        table.experiment.metrics_keys = list(rows[0])  # makes the logger, which deletes the file
        with atomic_write(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as stream:
            writer = csv.DictWriter(stream, list(rows[0]))
            writer.writeheader()
            writer.writerows(row for row in rows if int(row["step"]) < first_step)
    if not importlib.util.find_spec("tensorboard"):
        print("no TensorBoard log: install it with pip install 'detpipe[train]'", file=sys.stderr)
        return [table]
    return [table, TensorBoardLogger(str(folder), name="tensorboard", version="")]


def _callbacks(
    folder: Path, description: checkpoint.Description, seed: int, speed: callbacks.Throughput, watched: Watched
) -> list[Callback]:
    return [
        callbacks.StepSeed(seed),
        callbacks.ValidateLastStep(),
        callbacks.DescribeCheckpoint(description),
        callbacks.StopOnNonFinite(folder, watched.file_names),
        speed,
        *watched.own(folder),
        *_curves(folder),
        ModelCheckpoint(folder, "best", monitor=watched.monitor, mode="max", enable_version_counter=False),
        # a second one, because save_last of the first is only written when the best one is
        ModelCheckpoint(folder, "last", save_on_train_epoch_end=True, enable_version_counter=False),
        TQDMProgressBar(refresh_rate=1 if sys.stderr.isatty() else 50),
    ]


def _curves(folder: Path) -> list[Callback]:
    if importlib.util.find_spec("matplotlib"):
        return [Curves(folder)]
    print("no curves.png: install matplotlib with pip install 'detpipe[train]'", file=sys.stderr)
    return []


def _best(trainer: Trainer) -> str:
    saved = trainer.checkpoint_callback
    best = saved.best_model_path if isinstance(saved, ModelCheckpoint) else ""
    if not best:
        raise TrainingError(
            "training ended before the first validation; nothing was saved (trainer.max_epochs too small?)"
        )
    return best

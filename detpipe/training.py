"""The ``train`` command: from a configuration to a run folder.

A run folder holds ``config.yaml``, ``metrics.csv``, ``tensorboard/``, ``best.ckpt``, ``last.ckpt``, ``validation.png``,
``curves.png`` and, when training has ended, ``summary.json``.
"""

from __future__ import annotations

import csv
import importlib.util
import json
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

import yaml
from lightning import Trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint, TQDMProgressBar
from lightning.pytorch.cli import LightningArgumentParser
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger

from detpipe import callbacks, checkpoint
from detpipe.configuration import CLI, positional_configs, quiet
from detpipe.datasets.stored_proposals import StoredProposals
from detpipe.errors import DataError, TrainingError
from detpipe.evaluation.proposal_faults import recall_note
from detpipe.files import atomic_write, remove_orphans


def train(arguments: Sequence[str]) -> int:
    """Train, evaluate, and leave everything in a run folder; the last line printed is the result.

    Args:
        arguments: ``CONFIG.yaml [MORE.yaml ...] [--key.path value ...]``; ``--output FOLDER`` names the run folder,
            ``--ckpt_path CHECKPOINT`` resumes.

    Returns:
        The exit status.

    Raises:
        DetpipeError: what users can mend.
    """
    quiet()
    cli = CLI(arguments, _add_arguments)
    data, config = cli.datamodule, cli.config
    for split in ("train", "val"):
        print(data.describe(split))
    if not len(data.annotations("train")):
        raise DataError("the training split has no images")
    _report_recall(data)
    description = checkpoint.Description(
        checkpoint.describe_model(config.model),
        tuple(data.class_names),
        tuple(data.category_ids),
        _source_of(data.proposals("train")),
    )
    resume = config.ckpt_path
    if resume is not None:
        stored, known = checkpoint.read(resume)
        checkpoint.check_class_names(known, description.class_names, resume)
        checkpoint.load_weights(cli.model, stored, resume)
    folder, speed = run_folder(config.output, arguments), callbacks.Throughput()
    start = time.perf_counter()
    with _made(folder, speed):
        trainer = cli.trainer_with(
            default_root_dir=str(folder),
            logger=_loggers(folder, 0 if resume is None else stored["global_step"]),
            plugins=[checkpoint.AtomicCheckpointIO()],
            callbacks=_callbacks(folder, data, description, int(config.seed_everything or 0), speed),
        )
        with atomic_write(folder / "config.yaml") as temporary:
            temporary.write_text(
                _reusable(cli.parser.dump(config, skip_link_targets=True, skip_unset=False)), encoding="utf-8"
            )
        print(f"run folder {folder}")
        trainer.fit(cli.model, datamodule=data, ckpt_path=resume)
    summary = _summarize(trainer, speed, time.perf_counter() - start, config)
    with atomic_write(folder / "summary.json") as temporary:
        temporary.write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    print(f"AP {summary['AP']:.3f} AP50 {summary['AP50']:.3f} checkpoint {summary['checkpoint']}")
    return 0


def _report_recall(data: Any) -> None:
    """Say what precomputed boxes can find at best, and warn where that is little."""
    for split in ("train", "val"):
        proposals = data.proposals(split)
        if proposals is not None:
            line, warnings = recall_note(data.annotations(split), proposals, split)
            print(line)
            for warning in warnings:
                print(warning, file=sys.stderr)


def _source_of(proposals: Any) -> dict[str, Any] | None:
    if not isinstance(proposals, StoredProposals):
        return None
    return {"source": proposals.store.source, "settings": proposals.store.settings}


def run_folder(output: str | None, arguments: Sequence[str]) -> Path:
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


def _add_arguments(parser: LightningArgumentParser) -> None:
    parser.add_argument("--output", type=str | None, default=None, help="run folder; runs/CONFIG/DATE-TIME by default")
    parser.add_argument("--ckpt_path", type=str | None, default=None, help="resume from this checkpoint (last.ckpt)")


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
    folder: Path,
    data: Any,
    description: checkpoint.Description,
    seed: int,
    speed: callbacks.Throughput,
) -> list[Callback]:
    curves = importlib.util.find_spec("matplotlib") is not None
    if not curves:
        print("no curves.png: install matplotlib with pip install 'detpipe[train]'", file=sys.stderr)
    return [
        callbacks.StepSeed(seed),
        callbacks.ValidateLastStep(),
        callbacks.DescribeCheckpoint(description),
        callbacks.StopOnNonFinite(folder),
        callbacks.MeanAveragePrecision(),
        speed,
        callbacks.Pictures(folder, data.class_names, curves),
        ModelCheckpoint(folder, "best", monitor="val/AP", mode="max", enable_version_counter=False),
        # a second one, because save_last of the first is only written when the best one is
        ModelCheckpoint(folder, "last", save_on_train_epoch_end=True, enable_version_counter=False),
        TQDMProgressBar(refresh_rate=1 if sys.stderr.isatty() else 50),
    ]


def _summarize(trainer: Trainer, speed: callbacks.Throughput, seconds: float, config: Any) -> dict[str, Any]:
    saved = trainer.checkpoint_callback
    best = saved.best_model_path if isinstance(saved, ModelCheckpoint) else ""
    if not best:
        raise TrainingError(
            "training ended before the first validation; nothing was saved (trainer.max_epochs too small?)"
        )
    return {
        **callbacks.MeanAveragePrecision.stored(checkpoint.read(best)[0]),
        "seconds": round(seconds, 1),
        "images_per_second": round(speed.images_per_second, 2),
        "checkpoint": best,
        "seed": config.seed_everything,
        "epochs": trainer.current_epoch,
    }

"""The ``train`` command: from a configuration to a run folder; and what all commands that train have in common.

Beside what every run leaves there (:mod:`detpipe.training.run_folder`) the folder holds ``training.png`` and ``validation.png``.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch.callbacks import Callback
from lightning.pytorch.cli import LightningArgumentParser

from detpipe.datasets.sampling import describe_sampling
from detpipe.datasets.stored_proposals import StoredProposals
from detpipe.evaluation.proposal_faults import recall_note
from detpipe.pictures.run_pictures import TrainingPicture, ValidationPicture
from detpipe.support.errors import DataError, UsageError
from detpipe.training import checkpoint, resume, run_folder
from detpipe.training.callbacks import MeanAveragePrecision
from detpipe.training.configuration import CLI, CommandCLI, quiet


def train(arguments: Sequence[str]) -> int:
    """Train, evaluate, and leave everything in a run folder; the last line printed is the result.

    Args:
        arguments: ``CONFIG.yaml [MORE.yaml ...] [--key.path value ...]``; ``--output FOLDER`` names the run folder,
            ``--ckpt_path CHECKPOINT`` goes on with a training, ``--init_from CHECKPOINT`` begins with its weights.

    Returns:
        The exit status.

    Raises:
        DetpipeError: what users can mend.
    """
    quiet()
    cli = CLI(arguments, add_arguments)
    data = cli.datamodule
    for split in ("train", "val"):
        print(data.describe(split))
    if not len(data.annotations("train")):
        raise DataError("the training split has no images")
    print(describe_sampling(data.loader.sampling, data), end="")
    _report_recall(data)
    names = tuple(data.class_names)
    source = _source_of(data.proposals("train"))
    description = checkpoint.Description(
        checkpoint.describe_model(cli.config.model), names, tuple(data.category_ids), source, data.pixels
    )

    def pictures(folder: Path) -> list[Callback]:
        return [TrainingPicture(folder, names), ValidationPicture(folder, names)]

    run = run_training(cli, run_folder.Task(MeanAveragePrecision(), description, pictures))
    summary = run.write_summary()
    print(run.result(f"AP {summary['AP']:.3f} AP50 {summary['AP50']:.3f}" if "AP" in summary else ""))
    return 0


def add_arguments(parser: LightningArgumentParser) -> None:
    """Add what a command that trains takes beside its configuration."""
    parser.add_argument("--output", type=str | None, default=None, help="run folder; runs/CONFIG/DATE-TIME by default")
    parser.add_argument(
        "--ckpt_path",
        type=str | None,
        default=None,
        help="go on from this checkpoint; 'last': from the newest sound one in --output, or anew where there is none",
    )
    parser.add_argument(
        "--accept_changes",
        type=str | None,
        default=None,
        help=f"go on though these are not as in the checkpoint, with commas between: {', '.join(resume.CHANGES)}, all",
    )
    parser.add_argument(
        "--init_from",
        type=str | None,
        default=None,
        help="begin with the weights of this checkpoint that fit, of a model with other classes, heads or levels",
    )


def run_training(cli: CommandCLI, task: run_folder.Task) -> run_folder.Run:
    """Train what a configuration has built.

    Args:
        cli: model, data and settings.
        task: what is trained, and how it is watched.

    Returns:
        The run, whose summary is still to be written.

    Raises:
        SystemExit: after training, in all processes but the first.
        DetpipeError: what users can mend.
    """
    config = cli.config
    if config.init_from is not None and config.ckpt_path not in (None, "last"):
        raise UsageError("--init_from begins a training, --ckpt_path goes on with one: give one of them")
    if config.ckpt_path == "last" and config.output is None:
        raise UsageError("--ckpt_path last needs the folder of the run: give --output RUN")
    options = run_folder.Options(
        ckpt_path=config.ckpt_path,
        accepted=resume.read_accepted(config.accept_changes),
        init_from=config.init_from,
        ema=config.ema,
        early_stopping=config.early_stopping,
        checkpoint=cli.config_init["checkpoint"],
        seed=int(config.seed_everything or 0),
        trainer=cli.trainer_settings,
        settings=config.as_dict(),
        config=cli.reusable(),
    )
    return run_folder.fit(cli.model, cli.datamodule, run_folder.choose_folder(config.output, cli.name), task, options)


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

"""The ``train`` command: from a configuration to a run folder.

Beside what every run leaves there (:mod:`detpipe.training.run_folder`) the folder holds ``training.png`` and ``validation.png``.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch.callbacks import Callback

from detpipe.datasets.stored_proposals import StoredProposals
from detpipe.errors import DataError
from detpipe.evaluation.proposal_faults import recall_note
from detpipe.pictures.run_pictures import TrainingPicture, ValidationPicture
from detpipe.training import callbacks, checkpoint, run_folder
from detpipe.training.configuration import CLI, quiet
from detpipe.training.run_folder import add_arguments as _add_arguments


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
    data = cli.datamodule
    for split in ("train", "val"):
        print(data.describe(split))
    if not len(data.annotations("train")):
        raise DataError("the training split has no images")
    _report_recall(data)
    description = checkpoint.Description(
        checkpoint.describe_model(cli.config.model),
        tuple(data.class_names),
        tuple(data.category_ids),
        _source_of(data.proposals("train")),
    )

    def own(folder: Path) -> list[Callback]:
        names = tuple(data.class_names)
        return [callbacks.MeanAveragePrecision(), TrainingPicture(folder, names), ValidationPicture(folder, names)]

    run = run_folder.fit(cli, arguments, description, run_folder.Watched("val/AP", own))
    summary = run.write_summary(callbacks.MeanAveragePrecision.stored(checkpoint.read(run.best)[0]))
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

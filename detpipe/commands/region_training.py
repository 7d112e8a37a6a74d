"""The ``train_regions`` command: train other models on the data of detectors, such as a classifier of given boxes.

``model`` names a class, any LightningModule that

- has a class attribute ``watched``, the logged number of which the highest makes the best checkpoint, such as
  ``val/mean_class_accuracy``;
- logs it and its other validation numbers, named ``val/...``, with ``self.log`` once an epoch;
- takes batches ``(images, targets)`` of `DetectionData` in its steps, and ``num_classes``, which follows the data, if it needs it.

It takes what it needs of a backbone, its channels and strides, from the backbone itself.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.cli import LightningArgumentParser

from detpipe.datasets import DetectionData
from detpipe.errors import DataError, TrainingError, UsageError
from detpipe.pictures.run_pictures import TrainingPicture
from detpipe.region_classifier import RegionClassifier
from detpipe.superpixel_localizer import SuperpixelLocalizer
from detpipe.training import checkpoint, run_folder
from detpipe.training.configuration import CommandCLI, quiet

MODELS = (RegionClassifier, SuperpixelLocalizer)  # short names work for classes that are imported


class RegionCLI(CommandCLI):
    """A model of any class, and its data."""

    model_type = LightningModule
    model_is_named = True
    data_type = DetectionData

    def link(self, parser: LightningArgumentParser) -> None:
        """The model follows the classes of the data, if it asks for their number."""
        parser.link_arguments("data.num_classes", "model.init_args.num_classes", apply_on="instantiate")


class ValidationNumbers(Callback):
    """Keep the numbers of each validation for the checkpoint.

    Args:
        watched: the number that must be among them.
    """

    def __init__(self, watched: str) -> None:
        self.watched = watched
        self.metrics: dict[str, Any] = {}

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take over what the model has logged.

        Raises:
            TrainingError: the number that is watched is not there.
        """
        logged = {name: float(v) for name, v in trainer.callback_metrics.items() if name.startswith("val/")}
        if self.watched not in logged:
            raise TrainingError(
                f"{type(pl_module).__name__} is to be watched by {self.watched!r}, but logged {sorted(logged) or 'nothing'}"
            )
        others = {name: value for name, value in logged.items() if name != self.watched}
        numbers = {self.watched: logged[self.watched], **others}
        self.metrics = {name.removeprefix("val/"): value for name, value in numbers.items()}
        self.metrics["epoch"] = trainer.current_epoch

    def state_dict(self) -> dict[str, Any]:
        """The numbers, for the checkpoint."""
        return {"metrics": json.dumps(self.metrics)}

    @classmethod
    def stored(cls, stored: dict[str, Any]) -> dict[str, Any]:
        """Read the numbers of a checkpoint.

        Args:
            stored: Lightning's dict.

        Returns:
            The numbers by name, without ``val/``, the one that was watched first; and ``epoch``.
        """
        return json.loads(stored["callbacks"][cls.__qualname__]["metrics"])


def train_regions(arguments: Sequence[str]) -> int:
    """Train a model, validate it, and leave everything in a run folder; the last line printed is the result.

    Args:
        arguments: ``CONFIG.yaml [MORE.yaml ...] [--key.path value ...]``; ``--output FOLDER`` names the run folder,
            ``--ckpt_path CHECKPOINT`` resumes.

    Returns:
        The exit status.

    Raises:
        DetpipeError: what users can mend.
    """
    quiet()
    cli = RegionCLI(arguments, run_folder.add_arguments)
    watched = _watched(cli.model)
    data = cli.datamodule
    for split in ("train", "val"):
        print(data.describe(split))
        if not len(data.annotations(split)):
            raise DataError(f"the {split} split has no images")
    model = checkpoint.describe_model(cli.config.model)
    description = checkpoint.Description(model, tuple(data.class_names), tuple(data.category_ids))

    def own(folder: Path) -> list[Callback]:
        return [ValidationNumbers(watched), TrainingPicture(folder, tuple(data.class_names))]

    run = run_folder.fit(cli, arguments, description, run_folder.Watched(watched, own))
    numbers = ValidationNumbers.stored(checkpoint.read(run.best)[0])
    run.write_summary(numbers)
    shown = [f"{name} {value:.3f}" for name, value in numbers.items() if name not in ("loss", "epoch")]
    print(f"{' '.join(shown)} checkpoint {run.best}")
    return 0


def _watched(model: LightningModule) -> str:
    watched = getattr(model, "watched", None)
    if not isinstance(watched, str):
        raise UsageError(
            f"model: {type(model).__name__} cannot be trained by this command, it has no class attribute 'watched'; expected "
            f"{', '.join(known.__name__ for known in MODELS)}, or a LightningModule that says which logged number is best when "
            "it is highest"
        )
    return watched

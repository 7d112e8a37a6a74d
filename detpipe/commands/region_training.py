"""The ``train_regions`` command: train other models on the data of detectors, such as a classifier of given boxes.

``model`` names a class, any LightningModule that

- has a class attribute ``watched``, the logged number of which the highest makes the best checkpoint, such as
  ``val/mean_class_accuracy``;
- logs it and its other validation numbers, named ``val/...``, with ``self.log`` once an epoch;
- takes batches ``(images, targets)`` of `DetectionData` in its steps, and ``num_classes``, which follows the data, if it needs it.

It takes what it needs of a backbone, its channels and strides, from the backbone itself.
"""

from __future__ import annotations

from collections.abc import Sequence

from lightning import LightningModule
from lightning.pytorch.cli import LightningArgumentParser

from detpipe.commands.training import add_arguments, run_training
from detpipe.datasets import DetectionData
from detpipe.datasets.sampling import describe_sampling
from detpipe.pictures.run_pictures import TrainingPicture
from detpipe.regions.region_classifier import RegionClassifier
from detpipe.regions.superpixel_localizer import SuperpixelLocalizer
from detpipe.support.errors import DataError, UsageError
from detpipe.training import checkpoint, run_folder
from detpipe.training.callbacks import ValidationNumbers
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


def train_regions(arguments: Sequence[str]) -> int:
    """Train a model, validate it, and leave everything in a run folder; the last line printed is the result.

    Arguments, status and errors are those of :func:`detpipe.commands.training.train`.
    """
    quiet()
    cli = RegionCLI(arguments, add_arguments)
    watched = _watched(cli.model)
    data = cli.datamodule
    for split in ("train", "val"):
        print(data.describe(split))
        if not len(data.annotations(split)):
            raise DataError(f"the {split} split has no images")
    print(describe_sampling(data.loader.sampling, data), end="")
    names = tuple(data.class_names)
    description = checkpoint.Description(checkpoint.describe_model(cli.config.model), names, tuple(data.category_ids))
    task = run_folder.Task(ValidationNumbers(watched), description, lambda folder: [TrainingPicture(folder, names)])
    run = run_training(cli, task)
    run.write_summary()
    shown = [f"{name} {value:.3f}" for name, value in run.numbers.items() if name not in ("loss", "epoch")]
    print(run.result(" ".join(shown)))
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

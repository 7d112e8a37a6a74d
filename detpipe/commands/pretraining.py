"""The ``pretrain`` command: train a backbone as a classifier, and export its weights for detectors.

Beside what every run leaves in its folder (:mod:`detpipe.training.run_folder`) there is ``backbone.safetensors``: the weights of
the backbone in the best checkpoint, by its own names, without the projections of its levels (``laterals``), which belong to a
detector; of a pyramid, those of the network below it. Its metadata have one entry, ``detpipe``, in JSON: ``class_path``,
``init_args``, ``num_classes``, ``top1``, ``top5`` and ``version``.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from lightning.pytorch.cli import LightningArgumentParser
from safetensors.torch import save_file
from torch import Tensor

from detpipe.backbones.weights import network_state
from detpipe.commands.training import add_arguments, run_training
from detpipe.datasets import ClassificationData
from detpipe.datasets.sampling import describe_sampling
from detpipe.regions.image_classifier import ImageClassifier
from detpipe.stages import Backbone
from detpipe.support.errors import DataError
from detpipe.support.files import atomic_write
from detpipe.training import checkpoint, run_folder
from detpipe.training.callbacks import Accuracy
from detpipe.training.configuration import CommandCLI, quiet

WEIGHTS = "backbone.safetensors"


class PretrainingCLI(CommandCLI):
    """A classifier and its data."""

    model_type = ImageClassifier
    data_type = ClassificationData

    def link(self, parser: LightningArgumentParser) -> None:
        """The classifier follows the classes of the data."""
        parser.link_arguments("data.num_classes", "model.num_classes", apply_on="instantiate")


def pretrain(arguments: Sequence[str]) -> int:
    """Train a classifier, validate it, and leave everything in a run folder; the last line printed is the result.

    Arguments, status and errors are those of :func:`detpipe.commands.training.train`.
    """
    quiet()
    cli = PretrainingCLI(arguments, add_arguments)
    data = cli.datamodule
    for split in ("train", "val"):
        print(data.describe(split))
    print(describe_sampling(data.loader.sampling, data), end="")
    if not len(data.train_dataloader()):
        raise DataError(f"the training split has {len(data.images('train'))} images; expected at least 2")
    if data.num_classes < 2:
        raise DataError(
            f"the data have one class, {data.class_names[0]!r}, and nothing to tell it from; expected at least 2"
        )
    model, class_names = checkpoint.describe_model(cli.config.model), tuple(data.class_names)
    description = checkpoint.Description(model, class_names, tuple(range(len(class_names))))
    run = run_training(cli, run_folder.Task(Accuracy(), description, file_names=lambda batch: list(batch[2])))
    if run.checkpoint is not None:
        checkpoint.load_weights(cli.model, checkpoint.read(run.checkpoint)[0], run.checkpoint)
    scores = {name: round(run.numbers[name], 6) for name in ("top1", "top5") if name in run.numbers}
    facts = {"num_classes": len(class_names), **scores}
    weights = export_backbone(cli.model.backbone, run.folder / WEIGHTS, model["backbone"], facts)
    run.write_summary({"weights": str(weights)})
    shown = [f"{label} {scores[name]:.3f}" for name, label in (("top1", "top-1"), ("top5", "top-5")) if name in scores]
    print(" ".join([*shown, f"weights {weights}"]))
    return 0


def export_backbone(
    backbone: Backbone, path: str | Path, config: dict[str, Any], facts: dict[str, Any] | None = None
) -> Path:
    """Write the weights of a backbone to a file that ``weights`` of the same backbone takes.

    Args:
        backbone: with its trained weights; of a pyramid, the network below it is written.
        path: of the file, complete when it is visible.
        config: ``class_path`` and ``init_args`` of ``backbone``.
        facts: what else to say of it, such as its accuracy.

    Returns:
        The path.
    """
    while isinstance(inner := getattr(backbone, "backbone", None), Backbone):
        backbone, config = inner, config["init_args"]["backbone"]
    known = {"class_path": config["class_path"], "init_args": config.get("init_args", {}), "version": _version()}
    # one entry: several would be written in any order
    metadata = {checkpoint.KEY: json.dumps({**known, **(facts or {})})}
    path = Path(path)
    with atomic_write(path) as temporary:
        save_file(backbone_weights(backbone), temporary, metadata)
    return path


def backbone_weights(backbone: Backbone) -> dict[str, Tensor]:
    """Collect the weights that make sense in another detector.

    Args:
        backbone: any; an `Extractor` gives those of the network that it cuts, by that network's names.

    Returns:
        name -> tensor on the CPU, without ``laterals``.
    """
    state = network_state(backbone.state_dict())
    return {name: value.detach().cpu().clone().contiguous() for name, value in state.items()}


def _version() -> str:
    try:
        return version("detpipe")
    except PackageNotFoundError:  # run from a checkout that is not installed
        return "unknown"

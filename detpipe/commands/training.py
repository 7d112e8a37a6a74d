"""The commands that train: from a configuration to a run folder.

``train`` trains a detector, ``pretrain`` a backbone as a classifier, and ``train_regions`` any LightningModule that

- has a class attribute ``watched``, the logged number of which the highest makes the best checkpoint, such as
  ``val/mean_class_accuracy``;
- logs it and its other validation numbers, named ``val/...``, with ``self.log`` once an epoch;
- takes batches ``(images, targets)`` of `DetectionData` in its steps, and ``num_classes``, which follows the data, if it needs it.

It takes what it needs of a backbone, its channels and strides, from the backbone itself.

Beside what every run leaves there (:mod:`detpipe.training.run_folder`) the folder holds pictures, and that of ``pretrain`` the
weights of the backbone: ``backbone.safetensors`` has them as they are in the best checkpoint, by their own names, without the
projections of levels (``laterals``), which belong to a detector; of a pyramid, those of the network below it. Its metadata have one
entry, ``detpipe``, in JSON: ``class_path``, ``init_args``, ``num_classes``, ``top1``, ``top5`` and ``version``.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from lightning import LightningModule
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.cli import LightningArgumentParser
from safetensors.torch import save_file
from torch import Tensor, nn

from detpipe import zoo
from detpipe.backbones.weights import network_state
from detpipe.datasets import ClassificationData, DetectionData
from detpipe.datasets.sampling import describe_sampling
from detpipe.datasets.stored_proposals import StoredProposals
from detpipe.evaluation.proposal_faults import recall_note
from detpipe.pictures.run_pictures import TrainingPicture, ValidationPicture
from detpipe.regions.image_classifier import ImageClassifier
from detpipe.regions.region_classifier import RegionClassifier
from detpipe.regions.superpixel_localizer import SuperpixelLocalizer
from detpipe.stages import Backbone
from detpipe.support.errors import DataError, UsageError
from detpipe.support.files import atomic_write
from detpipe.support.processes import is_first
from detpipe.support.terminal import package_version
from detpipe.training import callbacks, checkpoint, resume, run_folder
from detpipe.training.configuration import CLI, CommandCLI, quiet
from detpipe.types import RGB

WEIGHTS = "backbone.safetensors"
LEAST_IMAGES = 8  # that the statistics of batch normalization need; Wu and He 2018, arXiv 1803.08494, figure 1
REGION_MODELS = (RegionClassifier, SuperpixelLocalizer)  # short names work for classes that are imported


class PretrainingCLI(CommandCLI):
    """A classifier and its data."""

    model_type = ImageClassifier
    data_type = ClassificationData

    def link(self, parser: LightningArgumentParser) -> None:
        """Let the classifier follow the classes of the data."""
        parser.link_arguments("data.num_classes", "model.num_classes", apply_on="instantiate")


class RegionCLI(CommandCLI):
    """A model of any class, and its data."""

    model_type = LightningModule
    model_is_named = True
    data_type = DetectionData

    def link(self, parser: LightningArgumentParser) -> None:
        """Let the model follow the classes of the data, if it asks for their number."""
        parser.link_arguments("data.num_classes", "model.init_args.num_classes", apply_on="instantiate")


def train(arguments: Sequence[str]) -> int:
    """Train, evaluate, and leave everything in a run folder; the last line printed is the result."""
    cli = build(CLI, arguments)
    data, names = cli.datamodule, tuple(cli.datamodule.class_names)
    if not len(data.annotations("train")):
        raise DataError("the training split has no images")
    _report_recall(data)
    source, proposals = None, data.proposals("train")
    if isinstance(proposals, StoredProposals):
        source = {"source": proposals.store.source, "settings": proposals.store.settings}
    description = _describe(cli, source)

    def pictures(folder: Path) -> list[Callback]:
        return [TrainingPicture(folder, names), ValidationPicture(folder, names)]

    run = fit(cli, run_folder.Task(callbacks.MeanAveragePrecision(), description, pictures))
    summary = run.write_summary()
    print(run.result(f"AP {summary['AP']:.3f} AP50 {summary['AP50']:.3f}" if "AP" in summary else ""))
    return 0


def pretrain(arguments: Sequence[str]) -> int:
    """Train a classifier, and export the weights of its backbone."""
    cli = build(PretrainingCLI, arguments)
    data = cli.datamodule
    if not len(data.train_dataloader()):
        raise DataError(f"the training split has {len(data.images('train'))} images; expected at least 2")
    if data.num_classes < 2:
        raise DataError(
            f"the data have one class, {data.class_names[0]!r}, and nothing to tell it from; expected at least 2"
        )
    description = _describe(cli)
    run = fit(cli, run_folder.Task(callbacks.Accuracy(), description, file_names=lambda batch: list(batch[2])))
    if run.checkpoint is not None:
        checkpoint.load_weights(cli.model, checkpoint.read(run.checkpoint)[0], run.checkpoint)
    scores = {name: round(run.numbers[name], 6) for name in ("top1", "top5") if name in run.numbers}
    facts = {"num_classes": len(description.class_names), **scores}
    weights = export_backbone(cli.model.backbone, run.folder / WEIGHTS, description.model["backbone"], facts)
    run.write_summary({"weights": str(weights)})
    shown = [f"{label} {scores[name]:.3f}" for name, label in (("top1", "top-1"), ("top5", "top-5")) if name in scores]
    print(" ".join([*shown, f"weights {weights}"]))
    return 0


def train_regions(arguments: Sequence[str]) -> int:
    """Train another model on the data of detectors."""
    cli = build(RegionCLI, arguments, _watched)
    for split in ("train", "val"):
        if not len(cli.datamodule.annotations(split)):
            raise DataError(f"the {split} split has no images")
    description = _describe(cli)
    numbers = callbacks.ValidationNumbers(_watched(cli.model))
    task = run_folder.Task(numbers, description, lambda folder: [TrainingPicture(folder, description.class_names)])
    run = fit(cli, task)
    run.write_summary()
    shown = [f"{name} {value:.3f}" for name, value in run.numbers.items() if name not in ("loss", "epoch")]
    print(run.result(" ".join(shown)))
    return 0


def build(
    kind: type[CommandCLI], arguments: Sequence[str], check: Callable[[Any], object] = lambda model: None
) -> CommandCLI:
    """Build what a configuration says, with a check of the model before the data are read, and print what the data are."""
    quiet()
    cli = kind(arguments, add_arguments)
    check(cli.model)
    for split in ("train", "val"):
        print(cli.datamodule.describe(split))
    print(describe_sampling(cli.datamodule.loader.sampling, cli.datamodule.presence), end="")
    return cli


def fit(cli: CommandCLI, task: run_folder.Task) -> run_folder.Run:
    """Train what a configuration has built; the summary of the run is still to be written.

    Raises:
        SystemExit: after training, in all processes but the first.
        DetpipeError: what users can mend.
    """
    config = cli.config
    if config.init_from is not None and config.ckpt_path not in (None, "last"):
        raise UsageError("--init_from begins a training, --ckpt_path goes on with one: give one of them")
    if config.ckpt_path == "last" and config.output is None:
        raise UsageError("--ckpt_path last needs the folder of the run: give --output RUN")
    if config.accept_changes is not None and config.ckpt_path is None:
        raise UsageError("--accept_changes is for a training that goes on: add --ckpt_path, or leave it out")
    options = run_folder.Options(
        ckpt_path=config.ckpt_path,
        accepted=resume.read_accepted(config.accept_changes),
        init_from=config.init_from or config.get("published"),
        read=zoo.read,
        ema=config.ema,
        early_stopping=config.early_stopping,
        checkpoint=cli.config_init["checkpoint"],
        seed=int(config.seed_everything or 0),
        trainer=cli.trainer_settings,
        settings=config.as_dict(),
        config=cli.reusable(),
    )
    warning = small_batches(cli.model, cli.datamodule.loader.batch_size)
    if warning is not None and is_first():
        print(warning, file=sys.stderr)
    return run_folder.fit(cli.model, cli.datamodule, run_folder.choose_folder(config.output, cli.name), task, options)


def small_batches(model: nn.Module, images: int) -> str | None:
    """Warn in a line where a model in training mode trains batch normalization on fewer images a device than its statistics need.

    What is frozen is left out, and so are statistics of all processes (``sync``).
    """
    kinds = (nn.BatchNorm2d, nn.BatchNorm1d)
    if images >= LEAST_IMAGES or not any(isinstance(part, kinds) and part.training for part in model.modules()):
        return None
    return (
        f"warning: batch normalization is trained on {images} images a device; with fewer than {LEAST_IMAGES} give another, "
        "--model.backbone.init_args.regime.norm group, or with pretrained weights frozen; or --data.loader.batch_size "
        f"{LEAST_IMAGES}"
    )


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
        help="begin with the weights that fit of this checkpoint, or name of 'detpipe zoo', of other classes, heads or levels",
    )


def _describe(cli: CommandCLI, proposals: dict[str, Any] | None = None) -> checkpoint.Description:
    """What checkpoints shall say about the model, the classes and the images."""
    names = tuple(cli.datamodule.class_names)
    ids = tuple(getattr(cli.datamodule, "category_ids", range(len(names))))
    pixels = getattr(cli.datamodule, "pixels", RGB)
    return checkpoint.Description(checkpoint.describe_model(cli.config.model), names, ids, proposals, pixels)


def _report_recall(data: Any) -> None:
    """Say what precomputed boxes can find at best, and warn where that is little."""
    for split in ("train", "val"):
        proposals = data.proposals(split)
        if proposals is not None:
            line, warnings = recall_note(data.annotations(split), proposals, split)
            print(line)
            for warning in warnings:
                print(warning, file=sys.stderr)


def _watched(model: LightningModule) -> str:
    watched = getattr(model, "watched", None)
    if not isinstance(watched, str):
        raise UsageError(
            f"model: {type(model).__name__} cannot be trained by this command, it has no class attribute 'watched'; expected "
            f"{', '.join(known.__name__ for known in REGION_MODELS)}, or a LightningModule that says which logged number "
            "is best when it is highest"
        )
    return watched


def export_backbone(
    backbone: Backbone, path: str | Path, config: dict[str, Any], facts: dict[str, Any] | None = None
) -> Path:
    """Write the weights of a backbone, or of the network below a pyramid, to a file that ``weights`` of the same backbone takes.

    ``config`` is its ``class_path`` and ``init_args``; ``facts`` are what else to say of it, such as its accuracy.
    """
    while isinstance(inner := getattr(backbone, "backbone", None), Backbone):
        backbone, config = inner, config["init_args"]["backbone"]
    known = {"class_path": config["class_path"], "init_args": config.get("init_args", {}), "version": package_version()}
    # one entry: several would be written in any order
    metadata = {checkpoint.KEY: json.dumps({**known, **(facts or {})})}
    path = Path(path)
    with atomic_write(path) as temporary:
        save_file(backbone_weights(backbone), temporary, metadata)
    return path


def backbone_weights(backbone: Backbone) -> dict[str, Tensor]:
    """Collect the weights that make sense in another detector, on the CPU; of an `Extractor` by the names of its network."""
    state = network_state(backbone.state_dict())
    return {name: value.detach().cpu().clone().contiguous() for name, value in state.items()}

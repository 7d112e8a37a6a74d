"""Models that ``detpipe train_regions`` trained, rebuilt from their checkpoints alone."""

from __future__ import annotations

from pathlib import Path

from jsonargparse import ArgumentParser
from lightning import LightningModule

from detpipe.checkpoint import Description, read, rebuild
from detpipe.errors import CheckpointError
from detpipe.region_classifier import RegionClassifier


def load_region_classifier(path: str | Path) -> tuple[RegionClassifier, Description]:
    """Rebuild a `RegionClassifier` from its checkpoint alone.

    Args:
        path: a local file.

    Returns:
        The model in evaluation mode, and what the checkpoint says about itself.

    Raises:
        CheckpointError: as of :func:`load_region_model`; or the checkpoint is of another model.
    """
    model, description = load_region_model(path)
    if not isinstance(model, RegionClassifier):
        raise CheckpointError(f"checkpoint {path} is of a {type(model).__name__}; expected one of a RegionClassifier")
    return model, description


def load_region_model(path: str | Path) -> tuple[LightningModule, Description]:
    """Rebuild what ``detpipe train_regions`` trained from its checkpoint alone.

    Args:
        path: a local file.

    Returns:
        The model in evaluation mode, and what the checkpoint says about itself.

    Raises:
        CheckpointError: the file is missing, damaged, or no checkpoint of this package; or it names classes of other packages; or
            it is of a detector or a classifier of whole images.
    """
    checkpoint, description = read(path)
    if "class_path" not in description.model:
        kind = "a detector" if "head" in description.model else "a classifier of whole images"
        raise CheckpointError(f"checkpoint {path} is of {kind}; expected one that 'detpipe train_regions' wrote")
    return rebuild(path, checkpoint, description, add_region_model), description


def add_region_model(parser: ArgumentParser) -> None:
    """Let a parser build what ``model`` names by its class, with ``num_classes``."""
    import detpipe.backbones  # noqa: F401  (short names work for classes that are imported)

    parser.add_argument("--num_classes", type=int)
    parser.add_subclass_arguments(LightningModule, "model")
    parser.link_arguments("num_classes", "model.init_args.num_classes")

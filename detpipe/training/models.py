"""Models rebuilt from their checkpoints alone: detectors, classifiers, and what ``detpipe train_regions`` trained."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser
from lightning import LightningModule

from detpipe.detector import TwoStageDetector
from detpipe.regions.image_classifier import ImageClassifier
from detpipe.regions.region_classifier import RegionClassifier
from detpipe.support.errors import CheckpointError, UsageError
from detpipe.training.allowed import only_allowed, where_classes_are
from detpipe.training.checkpoint import Description, load_weights, read, without_weights
from detpipe.training.config_errors import explain
from detpipe.training.configuration import link_stages

_KINDS = {  # of a model -> its class, what its classes set, and the command that trains it
    "a detector": (TwoStageDetector, "model.head.init_args.num_classes", "detpipe train"),
    "a classifier": (ImageClassifier, "model.num_classes", "detpipe pretrain"),
    "a region model": (LightningModule, "model.init_args.num_classes", "detpipe train_regions"),
}


def load_detector(path: str | Path, trust: Sequence[str] = ()) -> tuple[TwoStageDetector, Description]:
    """Rebuild a detector in evaluation mode from its checkpoint, a local file, alone.

    ``trust`` names modules whose classes it may name too, such as ("my_head",); they are imported, and their code runs.

    Raises:
        CheckpointError: as of :func:`detpipe.training.checkpoint.read`; or the checkpoint names classes that are not allowed, is of
            another kind of model, or of one that this version cannot build.
    """
    return _load(path, "a detector", trust)


def load_classifier(path: str | Path, trust: Sequence[str] = ()) -> tuple[ImageClassifier, Description]:
    """Rebuild a classifier of whole images from its checkpoint alone; arguments and errors as of :func:`load_detector`."""
    return _load(path, "a classifier", trust)


def load_region_classifier(path: str | Path, trust: Sequence[str] = ()) -> tuple[RegionClassifier, Description]:
    """Rebuild a `RegionClassifier` from its checkpoint alone; arguments and errors as of :func:`load_detector`."""
    model, description = load_region_model(path, trust)
    if not isinstance(model, RegionClassifier):
        raise CheckpointError(f"checkpoint {path} is of a {type(model).__name__}; expected one of a RegionClassifier")
    return model, description


def load_region_model(path: str | Path, trust: Sequence[str] = ()) -> tuple[LightningModule, Description]:
    """Rebuild what ``detpipe train_regions`` trained from its checkpoint; arguments and errors as of :func:`load_detector`."""
    return _load(path, "a region model", trust)


def _load(path: str | Path, kind: str, trust: Sequence[str]) -> Any:
    checkpoint, description = read(path)
    _check_kind(path, description.model, kind)
    return rebuild(path, checkpoint, description, kind, trust), description


def rebuild(
    path: str | Path,
    checkpoint: dict[str, Any],
    description: Description,
    kind: str = "a detector",
    trust: Sequence[str] = (),
) -> Any:
    """Build the model of a description in evaluation mode, with the weights of a checkpoint that was read.

    Raises:
        CheckpointError: as of :func:`load_detector`; it names ``path``.
    """
    kind_of_model, follows, _ = _KINDS[kind]
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--num_classes", type=int)
    add = parser.add_subclass_arguments if kind_of_model is LightningModule else parser.add_class_arguments
    add(kind_of_model, "model", fail_untyped=False)
    parser.link_arguments("num_classes", follows)
    if kind == "a detector":
        link_stages(parser)
    settings = where_classes_are(without_weights(description.model))
    try:
        with only_allowed(trust):
            parsed = parser.parse_object({"model": settings, "num_classes": len(description.class_names)})
            model = parser.instantiate(parsed).model
    except UsageError as error:
        raise CheckpointError(f"checkpoint {path}: {error}") from error
    except Exception as error:
        reason = re.sub(r"give --trust (\S+)", r"give --trust \1, in Python trust=('\1',)", explain(str(error), parser))
        if "is not one of detpipe's" in reason or "is not allowed" in reason:
            raise CheckpointError(f"checkpoint {path}: {reason}") from error
        raise CheckpointError(
            f"checkpoint {path}: its model cannot be built by this version: {reason or type(error).__name__}"
        ) from error
    load_weights(model, checkpoint, path)
    return model.eval()


def _check_kind(path: str | Path, model: dict[str, Any], kind: str) -> None:
    """Refuse a checkpoint of another kind of model."""
    found = told = "a detector" if "head" in model else "a classifier"
    if "class_path" in model:
        found, told = "a region model", f"a {str(model['class_path']).rpartition('.')[2]}"
    if found == kind:
        return
    expected = f"expected {'a detector' if kind == 'a detector' else 'one'} that '{_KINDS[kind][2]}' wrote"
    if found == "a classifier":
        told += " of whole images"
        if kind == "a detector":
            expected = "a detector takes the backbone.safetensors beside it as weights of its backbone"
    raise CheckpointError(f"checkpoint {path} is of {told}; {expected}")

"""Models rebuilt from their checkpoints alone: detectors, classifiers, and what ``detpipe train_regions`` trained."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
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


def load_detector(path: str | Path, trust: Sequence[str] = ()) -> tuple[TwoStageDetector, Description]:
    """Rebuild a detector from its checkpoint alone.

    Args:
        path: a local file.
        trust: modules whose classes the checkpoint may name too, such as ("my_head",); they are imported, and their code runs.

    Returns:
        The detector in evaluation mode, and what the checkpoint says about itself.

    Raises:
        CheckpointError: as in :func:`read`; or the checkpoint names classes that are not allowed, or is of another kind of model.
    """
    return _load(path, "a detector", add_model, trust)


def load_classifier(path: str | Path, trust: Sequence[str] = ()) -> tuple[ImageClassifier, Description]:
    """Rebuild a classifier of whole images from its checkpoint alone; arguments and errors as of :func:`load_detector`."""
    return _load(path, "a classifier", add_classifier, trust)


def load_region_classifier(path: str | Path, trust: Sequence[str] = ()) -> tuple[RegionClassifier, Description]:
    """Rebuild a `RegionClassifier` from its checkpoint alone; arguments and errors as of :func:`load_detector`."""
    model, description = load_region_model(path, trust)
    if not isinstance(model, RegionClassifier):
        raise CheckpointError(f"checkpoint {path} is of a {type(model).__name__}; expected one of a RegionClassifier")
    return model, description


def load_region_model(path: str | Path, trust: Sequence[str] = ()) -> tuple[LightningModule, Description]:
    """Rebuild what ``detpipe train_regions`` trained from its checkpoint; arguments and errors as of :func:`load_detector`."""
    return _load(path, "a region model", add_region_model, trust)


def _load(path: str | Path, kind: str, add: Callable[[ArgumentParser], None], trust: Sequence[str]) -> Any:
    """A model of a kind, and what its checkpoint says about itself."""
    checkpoint, description = read(path)
    found, told = _kind(description.model)
    if found != kind:
        raise CheckpointError(f"checkpoint {path} is of {told}; {_EXPECTED.get((found, kind), _EXPECTED[kind])}")
    return rebuild(path, checkpoint, description, add, trust), description


def _kind(model: dict[str, Any]) -> tuple[str, str]:
    """The kind of a model, and what a message calls it."""
    if "class_path" in model:
        return "a region model", f"a {str(model['class_path']).rpartition('.')[2]}"
    return ("a detector", "a detector") if "head" in model else ("a classifier", "a classifier of whole images")


_EXPECTED: dict[Any, str] = {
    "a detector": "expected a detector that 'detpipe train' wrote",
    "a classifier": "expected one that 'detpipe pretrain' wrote",
    "a region model": "expected one that 'detpipe train_regions' wrote",
    ("a classifier", "a detector"): "a detector takes the backbone.safetensors beside it as weights of its backbone",
}


def rebuild(
    path: str | Path,
    checkpoint: dict[str, Any],
    description: Description,
    add: Callable[[ArgumentParser], None],
    trust: Sequence[str] = (),
) -> Any:
    """Build a model from a checkpoint that has been read.

    Args:
        path: of the checkpoint, for messages.
        checkpoint: Lightning's dict.
        description: what it says about itself.
        add: lets a parser build the model from ``model`` and ``num_classes``.
        trust: modules whose classes may be named too.

    Returns:
        The model in evaluation mode.

    Raises:
        CheckpointError: it names classes that are not allowed, or its model cannot be built, or the weights do not fit.
    """
    parser = ArgumentParser(exit_on_error=False)
    add(parser)
    settings = {
        "model": where_classes_are(without_weights(description.model)),
        "num_classes": len(description.class_names),
    }
    try:
        with only_allowed(trust):
            model = parser.instantiate(parser.parse_object(settings)).model
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


def add_region_model(parser: ArgumentParser) -> None:
    """Let a parser build what ``model`` names by its class, with ``num_classes``."""
    import detpipe.backbones  # noqa: F401  (short names work for classes that are imported)

    parser.add_argument("--num_classes", type=int)
    parser.add_subclass_arguments(LightningModule, "model", fail_untyped=False)
    parser.link_arguments("num_classes", "model.init_args.num_classes")


def add_model(parser: ArgumentParser) -> None:
    """Let a parser build a detector from ``model`` and ``num_classes``; the widths of its stages follow each other."""
    import detpipe.backbones
    import detpipe.heads
    import detpipe.proposals  # noqa: F401  (short names work for classes that are imported)

    parser.add_argument("--num_classes", type=int)
    parser.add_class_arguments(TwoStageDetector, "model", fail_untyped=False)
    parser.link_arguments("num_classes", "model.head.init_args.num_classes")
    link_stages(parser)


def add_classifier(parser: ArgumentParser) -> None:
    """Let a parser build a classifier from ``model`` and ``num_classes``."""
    import detpipe.backbones  # noqa: F401  (short names work for classes that are imported)

    parser.add_argument("--num_classes", type=int)
    parser.add_class_arguments(ImageClassifier, "model", fail_untyped=False)
    parser.link_arguments("num_classes", "model.num_classes")

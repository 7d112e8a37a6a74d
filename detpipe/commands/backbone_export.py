"""The weights of a trained backbone in a file of their own, for detectors.

``backbone.safetensors`` holds the weights of the backbone in the best checkpoint, by its own names, without the projections of its
levels (``laterals``), which belong to a detector; of a pyramid, those of the network below it. Its metadata have one entry,
``detpipe``, in JSON: ``class_path``, ``init_args``, ``num_classes``, ``top1``, ``top5`` and ``version``.
"""

from __future__ import annotations

import json
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from detpipe.backbones.weights import network_state
from detpipe.stages import Backbone
from detpipe.support.files import atomic_write
from detpipe.training import checkpoint

WEIGHTS = "backbone.safetensors"


def export_backbone(
    backbone: Backbone, path: str | Path, config: dict[str, Any], facts: dict[str, Any] | None = None
) -> Path:
    """Write the weights of a backbone, or of the network below a pyramid, to a file that ``weights`` of the same backbone takes.

    ``config`` is its ``class_path`` and ``init_args``; ``facts`` are what else to say of it, such as its accuracy.
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
    """Collect the weights that make sense in another detector, on the CPU; of an `Extractor` by the names of its network."""
    state = network_state(backbone.state_dict())
    return {name: value.detach().cpu().clone().contiguous() for name, value in state.items()}


def _version() -> str:
    try:
        return version("detpipe")
    except PackageNotFoundError:  # run from a checkout that is not installed
        return "unknown"

"""Checkpoints: complete once they are visible, self-describing, and read without running code in them.

A checkpoint is Lightning's, with one entry more, ``detpipe``: the format's version, the model's configuration, and the
names of the classes. :mod:`detpipe.training.models` rebuilds models from it alone.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import NoneType
from typing import Any

import torch
from jsonargparse import Namespace
from lightning.pytorch.plugins.io import TorchCheckpointIO
from torch import Tensor, nn

from detpipe.backbones.weights import load_saved, local_file
from detpipe.support.errors import CheckpointError, TrainingError, UsageError
from detpipe.support.files import atomic_write, write_text
from detpipe.support.strict_json import shorten
from detpipe.support.untrusted import check_tree, plain_parts
from detpipe.types import RGB, PixelType

FORMAT = 1
KEY = "detpipe"
BEST, LAST, PREVIOUS, SUM_SUFFIX = "best.ckpt", "last.ckpt", "previous.ckpt", ".sha256"
_MOST_SUMS = 2**16  # characters of a side file
_MOST_SETTINGS = 20_000  # objects in the description of a model
_PATHS = {"best_model_path", "kth_best_model_path", "last_model_path"}  # in the state of a callback


@dataclass(frozen=True)
class Description:
    """What a checkpoint says about itself."""

    # the configuration of TwoStageDetector or ImageClassifier; of others class_path and init_args
    model: dict[str, Any]
    class_names: tuple[str, ...]
    category_ids: tuple[int, ...]
    proposals: dict[str, Any] | None = None  # source and settings of the store that the training boxes came from
    pixels: PixelType = RGB  # what the images were read as

    def to_dict(self) -> dict[str, Any]:
        """Plain containers only, so that safe loading takes them."""
        return {
            "format": FORMAT,
            "model": self.model,
            "class_names": list(self.class_names),
            "category_ids": list(self.category_ids),
            "proposals": self.proposals,
            "pixels": plain(vars(self.pixels)),
        }


class AtomicCheckpointIO(TorchCheckpointIO):
    """Write each checkpoint beside its final name, and move it there when it is on disk, with its check sum beside it.

    Where ``last.ckpt`` is replaced, the one before stays as ``previous.ckpt``.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Save a checkpoint under its final name, or leave what was there before; a TrainingError if it cannot be written."""
        path = Path(path)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with atomic_write(path) as temporary:
                torch.save(checkpoint, temporary)
                if path.name == LAST and path.is_file():
                    _keep_previous(path)
                # until the file is replaced, the side file knows all, also those of saves that were cut off
                write_check_sums(path, [_hash(temporary), *check_sums(path)])
            write_check_sums(path, check_sums(path)[:1])
        except (OSError, RuntimeError) as error:
            if isinstance(error, RuntimeError) and "inline_container" not in str(error):
                raise
            raise TrainingError(_unwritten(path, checkpoint, error)) from error

    def load_checkpoint(self, path: str | Path, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Load a checkpoint as :func:`read` does, whatever Lightning asks for."""
        return read(path)[0]

    def remove_checkpoint(self, path: str | Path) -> None:
        """Delete a checkpoint that a callback of the user no longer keeps, and its check sum."""
        super().remove_checkpoint(path)
        _side_file(Path(path)).unlink(missing_ok=True)


def _side_file(path: Path) -> Path:
    return path.with_name(f"{path.name}{SUM_SUFFIX}")


def check_sums(path: Path) -> list[str]:
    """Read the SHA-256 sums in the side file of a checkpoint: none or one; more where saves were cut off between the two files."""
    side = _side_file(path)
    if not side.is_file():
        return []
    with side.open(encoding="utf-8", errors="replace") as stream:
        lines = stream.read(_MOST_SUMS).splitlines()
    return [line.split()[0] for line in lines if line.strip()]


def write_check_sums(path: Path, sums: Sequence[str]) -> None:
    """Write the side file of a checkpoint, as ``sha256sum`` does."""
    write_text(_side_file(path), "".join(f"{one}  {path.name}\n" for one in sums))


def _keep_previous(path: Path) -> None:
    """Give the last checkpoint a second name, which takes no space and no time where the file system has hard links."""
    previous, sums = path.with_name(PREVIOUS), check_sums(path)
    write_check_sums(previous, [*sums, *check_sums(previous)])
    with atomic_write(previous) as temporary:
        try:
            os.link(path, temporary)
        except OSError:  # a file system without hard links
            shutil.copyfile(path, temporary)
    write_check_sums(previous, sums)


def _hash(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _unwritten(path: Path, checkpoint: dict[str, Any], error: Exception) -> str:
    """What a user needs to know of a checkpoint that could not be written."""
    reason = getattr(error, "strerror", None) or "the disk is full, or the file may not be so large"
    free = shutil.disk_usage(path.parent).free / 2**20 if path.parent.is_dir() else 0
    intact = [name for name in (BEST, LAST, PREVIOUS) if path.with_name(name).is_file()]
    return (
        f"{path} could not be written after step {checkpoint.get('global_step')}: {reason}; {free:.0f} MiB are free there. Intact: "
        f"{', '.join(intact) or 'no other checkpoint'}. Make room, and go on with --ckpt_path last"
    )


def read(path: str | Path) -> tuple[dict[str, Any], Description]:
    """Read Lightning's dict of a local checkpoint without running code in it, and what it says about itself.

    Raises:
        CheckpointError: the file is missing, damaged, or not a checkpoint of this package.
    """
    path = local_file(path, "checkpoint")
    if path.is_dir():
        raise CheckpointError(f"checkpoint {path} is a folder; give a file in it, such as {path / BEST}")
    if not path.is_file():
        raise CheckpointError(f"checkpoint {path} does not exist; expected a file such as RUN/best.ckpt")
    if path.suffix in (".onnx", ".pt2"):
        raise CheckpointError(f"{path} is what 'detpipe export' wrote; give the checkpoint that it was made of")
    try:
        sums = check_sums(path)
        if sums and _hash(path) not in sums:
            raise ValueError(f"it does not match its check sum in {path.name}{SUM_SUFFIX}")
        checkpoint = load_saved(path)
    except Exception as error:  # what a damaged file makes the reader raise is any of a dozen types
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(
            f"checkpoint {path} is damaged or holds more than tensors and plain data: {reason}"
        ) from error
    entry = checkpoint.get(KEY) if isinstance(checkpoint, dict) else None
    if not isinstance(entry, dict) or "state_dict" not in checkpoint:
        raise CheckpointError(
            f"{path} is not a checkpoint of detpipe; give one that 'detpipe train' or 'detpipe pretrain' wrote"
        )
    if entry.get("format") != FORMAT:
        raise CheckpointError(
            f"checkpoint {path} has format {shorten(entry.get('format'))}, this version reads format {FORMAT}"
        )
    weights = checkpoint["state_dict"]
    if not isinstance(weights, dict) or not all(isinstance(value, Tensor) for value in weights.values()):
        raise CheckpointError(f"checkpoint {path}: its weights are no tensors by name; give one that detpipe wrote")
    missing = [key for key in ("model", "class_names", "category_ids") if key not in entry]
    if missing:
        raise CheckpointError(f"checkpoint {path} lacks {', '.join(missing)} in its description; train again")
    drop_foreign_paths(checkpoint, path.parent)
    return checkpoint, _description(entry, path)


def _description(entry: dict[str, Any], path: Path) -> Description:
    try:
        check_tree([entry["model"], entry.get("proposals"), entry.get("pixels")], _MOST_SETTINGS, _plain_parts)
    except ValueError as error:
        raise CheckpointError(f"checkpoint {path}: its description is none: {error}") from error
    model, names, ids = entry["model"], entry["class_names"], entry["category_ids"]
    if not isinstance(model, dict):
        raise CheckpointError(f"checkpoint {path} describes its model by {shorten(model)}, expected keys; train again")
    if not _is_list_of(str, names) or not _is_list_of(int, ids):
        raise CheckpointError(
            f"checkpoint {path}: its class_names and category_ids are no lists of text and of numbers"
        )
    try:
        pixels = PixelType(**(entry.get("pixels") or {}))
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"checkpoint {path}: its pixels are none: {error}") from error
    return Description(model, tuple(names), tuple(ids), entry.get("proposals"), pixels)


def _is_list_of(kind: type, value: Any) -> bool:
    return type(value) is list and all(type(item) is kind for item in value)


def _plain_parts(value: Any) -> Iterable[Any]:
    if not isinstance(value, dict | list | str | int | float | NoneType):
        raise ValueError(f"it holds a {type(value).__name__}")
    return plain_parts(value)


def drop_foreign_paths(checkpoint: dict[str, Any], folder: Path) -> None:
    """Take out of the states of callbacks what a resumed run would delete or write outside its checkpoint's folder.

    Lightning's ``ModelCheckpoint`` deletes what its state calls the best and the last checkpoint once there is a newer one. A state
    that names any file but ``*.ckpt`` in the checkpoint's own folder loses all of its paths, as after a move of that folder.
    """
    states = checkpoint.get("callbacks")
    for state in states.values() if isinstance(states, dict) else ():
        if not isinstance(state, dict) or not _PATHS & state.keys():
            continue
        many = state.get("best_k_models")
        named = [value for key in _PATHS for value in [state.get(key)] if value] + list(
            many if isinstance(many, dict) else ()
        )
        inside = all(isinstance(name, str) and _is_inside(Path(name), folder) for name in named)
        if not inside or os.path.realpath(str(state.get("dirpath"))) != os.path.realpath(folder):
            state |= {**dict.fromkeys(_PATHS, ""), "best_k_models": {}, "dirpath": ""}


def _is_inside(path: Path, folder: Path) -> bool:
    return path.suffix == ".ckpt" and os.path.realpath(path.parent) == os.path.realpath(folder)


def load_weights(model: nn.Module, checkpoint: dict[str, Any], path: str | Path) -> None:
    """Put a checkpoint's weights into a model; ``path`` is for messages.

    Raises:
        CheckpointError: the weights are those of another model; some of the differences are named.
    """
    own, given = model.state_dict(), checkpoint["state_dict"]
    differences = [f"{key} is missing" for key in own if key not in given]
    differences += [f"{key} is unknown" for key in given if key not in own]
    differences += [
        f"{key} has shape {list(given[key].shape)}, expected {list(own[key].shape)}"
        for key in own
        if key in given and own[key].shape != given[key].shape
    ]
    if differences:
        raise CheckpointError(
            f"checkpoint {path} belongs to another model ({len(differences)} differences: {'; '.join(differences[:3])}); "
            "use the configuration that it was trained with"
        )
    model.load_state_dict(given)


def check_class_names(description: Description, class_names: tuple[str, ...], path: str | Path) -> None:
    """Refuse a checkpoint that was trained on classes of another number, order or spelling than those of the data."""
    own = description.class_names
    if own == tuple(class_names):
        return
    differing = [f"{a!r} / {b!r}" for a, b in zip(own, class_names, strict=False) if a != b][:3]
    raise CheckpointError(
        f"checkpoint {path} knows {len(own)} classes, the data have {len(class_names)}"
        f"{'; they differ in ' + ', '.join(differing) if differing else ''}; give data with the classes of training"
    )


def check_pixels(description: Description, pixels: PixelType, path: str | Path) -> None:
    """Refuse a checkpoint that was trained on images of other channels or values than those of the data."""
    if pixels != description.pixels:
        raise UsageError(
            f"checkpoint {path} was trained on {description.pixels}, the data give {pixels}; set channels and range of the data as "
            "in RUN/config.yaml"
        )


def settings_by_key(value: Any, key: str = "") -> dict[str, Any]:
    """Flatten nested settings: dotted key, without ``init_args``, -> value."""
    if not isinstance(value, dict) or not value:
        return {key: value}
    parts = (
        settings_by_key(v, f"{key}.{name}".removeprefix(".").replace(".init_args", "")) for name, v in value.items()
    )
    return {name: item for part in parts for name, item in part.items()}


def differing_settings(description: Description, model: dict[str, Any]) -> list[str]:
    """Name, a line a setting, what a checkpoint was trained with and is now run without, such as other anchors."""
    before, now = settings_by_key(description.model, "model"), settings_by_key(model, "model")
    common = sorted(before.keys() & now.keys())
    return [f"{key} was {before[key]!r}, is {now[key]!r}" for key in common if before[key] != now[key]]


def describe_model(config: Namespace | dict[str, Any]) -> dict[str, Any]:
    """Turn the parsed configuration of a model into the plain containers that its checkpoints store, without pretrained weights."""
    return without_weights(plain(config.as_dict() if isinstance(config, Namespace) else config))


def without_weights(value: Any) -> Any:
    """Leave out the files and names of pretrained weights, at any depth: a checkpoint has weights of its own."""
    if isinstance(value, dict):
        return {
            key: None if key == "weights" and isinstance(item, str | dict) else without_weights(item)
            for key, item in value.items()
        }
    return [without_weights(item) for item in value] if isinstance(value, list) else value


def plain(value: Any) -> Any:
    """Turn settings into what safe loading takes: dicts, lists, text and numbers; text in place of anything else."""
    if isinstance(value, Namespace):
        value = value.as_dict()
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return value if isinstance(value, str | int | float | NoneType) else str(value)

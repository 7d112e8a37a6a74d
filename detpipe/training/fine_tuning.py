"""Weights of one detector as the start of another: what fits is taken over, and what does not is said."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from detpipe.backbones.input_channels import spread_weights
from detpipe.support.errors import CheckpointError
from detpipe.training import checkpoint

_GROUP_PARTS = 2  # of a tensor's name: head.classifier, backbone.stages


def load_fitting(
    model: nn.Module,
    path: str | Path,
    class_names: Sequence[str],
    read: Callable[[str | Path], tuple[dict[str, Any], checkpoint.Description]] = checkpoint.read,
) -> str:
    """Load the weights of a checkpoint that fit a model by name and shape, and say in a line what was loaded, and what not.

    Outputs of classes (:func:`detpipe.stages.mark_class_outputs`) are taken over by the names of classes; those of new ones stay.
    ``read`` reads the checkpoint; others than the default know other sources by name.

    Raises:
        CheckpointError: the checkpoint cannot be read, or nothing in it fits.
    """
    stored, description = read(path)
    own = model.state_dict()
    given: Mapping[str, Tensor] = spread_weights(stored["state_dict"], own)
    outputs = dict(_class_outputs(model))
    kept = [name for name in class_names if name in description.class_names]
    missing, shapes = [name for name in own if name not in given], list[str]()
    taken: dict[str, Tensor] = {}
    for name in (name for name in own if name in given):
        value: Tensor | None = given[name]
        if name in outputs:
            value = _rows(own[name], given[name], outputs[name], class_names, description.class_names)
        if value is None or value.shape != own[name].shape:
            shapes.append(name)
        else:
            taken[name] = value
    if not any(name for name in taken if not name.endswith("num_batches_tracked")):
        raise CheckpointError(
            f"--init_from {path}: none of its {len(given)} tensors fits this model, by name and shape"
        )
    model.load_state_dict(taken, strict=False)
    parts = [f"from {path}: {len(taken)} of {len(own)} tensors"]
    if outputs:
        parts.append(f"outputs of {len(kept)} of {len(class_names)} classes{_listed(kept)}")
    unused = [name for name in given if name not in own]
    for names, what in ((missing, "new"), (shapes, "of another shape"), (unused, "not used")):
        if names:
            parts.append(f"{what}: {_groups(names)}")
    return "; ".join(parts)


def _class_outputs(model: nn.Module) -> Iterator[tuple[str, tuple[int, int]]]:
    """Names of tensors with a row, or several, for each class -> rows of the background, rows of a class."""
    for name, module in model.named_modules():
        outputs: Any = getattr(module, "class_outputs", None)
        if outputs is not None:
            for parameter, _ in module.named_parameters(recurse=False):
                yield f"{name}.{parameter}", outputs


def _rows(
    own: Tensor, given: Tensor, outputs: tuple[int, int], names: Sequence[str], known: Sequence[str]
) -> Tensor | None:
    """The model's own tensor with the rows of the background, and of classes that both know, of another; None: it does not fit.

    Rows behind those of classes are outputs of none, which either may have.
    """
    background, each = outputs
    ends = background + each * len(names), background + each * len(known)
    if own.shape[0] < ends[0] or given.shape[0] < ends[1] or own.shape[1:] != given.shape[1:]:
        return None
    rows = own.clone()
    rows[:background] = given[:background]
    for index, name in enumerate(names):
        if name in known:
            there = background + each * list(known).index(name)
            here = background + each * index
            rows[here : here + each] = given[there : there + each]
    if rows[ends[0] :].shape == given[ends[1] :].shape:
        rows[ends[0] :] = given[ends[1] :]
    return rows


def _listed(names: Sequence[str], most: int = 5) -> str:
    if not names:
        return ""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return f" ({', '.join(names[:most])}{more})"


def _groups(names: Sequence[str]) -> str:
    counts: dict[str, int] = {}
    for name in names:
        group = ".".join(name.split(".")[:_GROUP_PARTS])
        counts[group] = counts.get(group, 0) + 1
    return ", ".join(f"{group} ({count})" for group, count in counts.items())

"""Pretrained weights from a local file or by torchvision's name; nothing is loaded by halves."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torchvision import models

from detpipe.backbones.input_channels import spread_weights
from detpipe.support.errors import CheckpointError, UsageError
from detpipe.support.files import refuse_special
from detpipe.support.suggest import did_you_mean
from detpipe.support.untrusted import check_saved, check_tree, plain_parts

MOST = 1_000_000  # objects in a file
SUFFIXES = (".pth", ".pt", ".safetensors", ".ckpt")
CHECKPOINT = "detpipe"  # the entry that tells a checkpoint of ours
_INNER = "backbone."


def load_part(
    part: nn.Module,
    full: nn.Module,
    state: Mapping[str, Tensor],
    weights: str,
    network: str,
    statistics: bool = True,
    plain: Callable[[str], str] = str,
) -> None:
    """Load the ``state`` of a network of another library, by its name, into the part of it that is used.

    The weights, which messages call ``weights``, may have all tensors of the full network, and none else; those of the part must
    be there, but for ``statistics`` of batch normalization that are not needed. ``plain`` makes names equal that mean the same
    tensor. Else it is a CheckpointError.
    """
    own, known = part.state_dict(), {plain(key): key for key in full.state_dict()}
    given, needed = {plain(key): key for key in state}, {plain(key): key for key in own}
    missing = sorted(known[key] for key in needed.keys() - given.keys() if not can_be_missing(known[key], statistics))
    foreign = sorted(given[key] for key in given.keys() - known.keys())
    both = needed.keys() & given.keys()
    spread = spread_weights({key: state[given[key]] for key in both}, {key: own[needed[key]] for key in both})
    unequal = sorted(given[key] for key in both if own[needed[key]].shape != spread[key].shape)
    refuse_differences(weights, network, missing, foreign, unequal)
    part.load_state_dict({needed[key]: spread[key] for key in both}, strict=False)


def can_be_missing(key: str, statistics: bool) -> bool:
    """Whether weights may lack a tensor: counters, and statistics of batch normalization where they are not needed."""
    tensor = key.rpartition(".")[2]
    return tensor == "num_batches_tracked" or (not statistics and tensor in ("running_mean", "running_var"))


def fetch(weights: str, network: str | None, others: str = "") -> dict[str, Tensor]:
    """Read weights from a local file, or by the name of those that torchvision has for a network, if it has the network.

    Raises:
        UsageError: an unknown name; ``others`` are named as possible, too.
        CheckpointError: see :func:`read_state` and :func:`download`.
    """
    if is_file(weights):
        return read_state(weights)
    known = {} if network is None else models.get_model_weights(network).__members__
    if weights not in known:
        names = f"{network}'s {sorted(known)}" if known else "no name of torchvision's, which has no such network"
        raise UsageError(
            f"unknown weights {weights!r}: expected a local file ({', '.join(SUFFIXES)}){others} or {names}"
            f"{did_you_mean(weights, known)}"
        )
    return download(weights, lambda: known[weights].get_state_dict(progress=True, check_hash=True))


def is_file(weights: str) -> bool:
    """Whether weights are named by a path."""
    return Path(weights).suffix in SUFFIXES or "/" in weights


def timm_with(architecture: str, user: str) -> ModuleType:
    """Import timm for a user of one of its networks; a UsageError where there is no timm, or no such network."""
    try:
        import timm
    except ImportError as error:
        raise UsageError(f"{user} needs timm: pip install 'detpipe[timm]'") from error
    if not timm.is_model(architecture):
        raise UsageError(f"timm has no network {architecture!r}{did_you_mean(architecture, timm.list_models())}")
    return timm


def timm_tags(timm: ModuleType, architecture: str) -> list[str]:
    """The weights that timm has for a network."""
    return [name.partition(".")[2] for name in timm.list_pretrained(f"{architecture}.*")]


def refuse_differences(
    weights: str,
    network: str,
    missing: Sequence[str],
    foreign: Sequence[str],
    unequal: Sequence[str],
    advice: str | None = None,
) -> None:
    """Refuse weights that lack tensors of a network, have foreign ones, or ones of unequal shapes, by a CheckpointError."""
    for keys, problem in ((missing, "lacks"), (foreign, "has unknown"), (unequal, "has other shapes for")):
        if keys:
            raise CheckpointError(
                f"{weights} does not fit {network}: it {problem} {len(keys)} tensors, {', '.join(keys[:5])}"
                f"{', ...' if len(keys) > 5 else ''}; {advice or f'give weights of {network}'}"
            )


def download(name: str, fetch: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    """Fetch weights over the network, or from where a library has put them before; a CheckpointError if they cannot be had."""
    try:
        return fetch()
    except OSError as error:
        reason = str(error).strip().partition("\n")[0]
        raise CheckpointError(
            f"weights {name} cannot be downloaded ({reason}); check the connection, or give a local file"
        ) from error


def read_state(weights: str | Path) -> dict[str, Tensor]:
    """Read the tensors of a weights file without running code in it.

    Args:
        weights: a ``.safetensors`` file, a ``.pth`` or ``.pt`` file with a state dict, or a ``.ckpt`` file of a run of ours.

    Returns:
        tensor name -> tensor; of a checkpoint of ours those of :func:`network_state`.

    Raises:
        CheckpointError: the file is missing, damaged, or holds something other than tensors; or it is an address.
    """
    path = local_file(weights, "weights")
    if not path.is_file():
        raise CheckpointError(f"weights file {path}: no such file; give the path of a file with the backbone's weights")
    try:
        state = load_file(path) if path.suffix == ".safetensors" else load_saved(path)
    except Exception as error:  # what a damaged file makes the readers raise is any of a dozen types
        reason = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
        raise CheckpointError(f"weights file {path} cannot be read as a state dict of tensors: {reason}") from error
    ours = isinstance(state, dict) and CHECKPOINT in state
    if path.suffix == ".ckpt" and not ours:
        raise CheckpointError(f"weights {path} are no checkpoint of detpipe; give one, or a state dict as .pth")
    if isinstance(state, dict) and isinstance(state.get("state_dict"), dict):
        state = state["state_dict"]
    if not isinstance(state, dict):
        raise CheckpointError(
            f"weights file {path} must hold a state dict (name -> tensor), got {type(state).__name__}"
        )
    for name, value in state.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise CheckpointError(
                f"weights file {path} must hold a state dict (name -> tensor), got {name!r} -> {type(value).__name__}"
            )
    if not ours:
        return state
    backbone = {name: value for name, value in state.items() if name.startswith(_INNER)}
    if not backbone:
        raise CheckpointError(f"weights {path}: the model in this checkpoint has no backbone; give one that has")
    return network_state(backbone)


def local_file(path: str | Path, what: str) -> Path:
    """Take a path; a CheckpointError where it is an address, or no regular file."""
    if "://" in str(path):
        raise CheckpointError(f"{what} {path}: addresses are not loaded, download the file first and give its path")
    refuse_special(path, CheckpointError)
    return Path(path)


def load_saved(path: Path) -> Any:
    """Load a file of ``torch.save`` without running code in it; what it raises where that is damaged is any of a dozen types."""
    check_saved(path)
    content = torch.load(path, map_location="cpu", weights_only=True)
    check_tree(content, MOST, _tensor_parts)
    return content


def network_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Choose what makes sense in another model from the tensors of a backbone; ``backbone.*`` is one within, as in a pyramid.

    Returns:
        Those of the innermost backbone, without ``laterals``; of an `Extractor` by the names of the network that it cuts.
    """
    while any(name.startswith(_INNER) for name in state):
        state = {name.removeprefix(_INNER): value for name, value in state.items() if name.startswith(_INNER)}
    state = {name: value for name, value in state.items() if not name.startswith("laterals.")}
    cut = all(name.startswith("body.") for name in state)
    return {name.removeprefix("body.") if cut else name: value for name, value in state.items()}


def _tensor_parts(value: Any) -> Iterable[Any]:
    """What a container holds, for :func:`~detpipe.support.untrusted.check_tree`.

    Raises:
        ValueError: a tensor claims more than is stored for it, as one that repeats a number does.
    """
    if not isinstance(value, Tensor):
        return plain_parts(value)
    if value.layout != torch.strided or value.numel() * value.element_size() > value.untyped_storage().nbytes():
        raise ValueError(f"a tensor of shape {list(value.shape)} has fewer numbers than that")
    return ()

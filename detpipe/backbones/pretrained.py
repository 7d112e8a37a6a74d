"""Weights of whole networks for ours: from a file or a name, by our tensor names or those of others; nothing by halves.

What a network has but the weights lack, and what the weights have but the network does not, is an error that names the tensors.
Left out without a word are only: the classifier, stages that the backbone does not build, counters of batches, and stored
statistics where the network normalizes by groups.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from detpipe.attention.base import Attention
from detpipe.attention.choice import open_gates
from detpipe.backbones.input_channels import spread_weights
from detpipe.backbones.weights import SUFFIXES, download, fetch, refuse_differences, timm_tags, timm_with
from detpipe.stages import Backbone
from detpipe.support.errors import CheckpointError, UsageError
from detpipe.support.suggest import did_you_mean

TIMM = "timm/"


@dataclass(frozen=True)
class Pretrained:
    """Where weights come from.

    Args:
        source: a local file (``.pth``, ``.pt``, ``.safetensors``, or ``.ckpt`` of a run; never downloads), the name of
            torchvision weights (``DEFAULT``, ``IMAGENET1K_V1``) or of a timm network (``timm/seresnet50.ra2_in1k``); names
            download once.
        new_gates: accept weights of the same network without attention; its gates then start anew, almost open where they have
            a bias.
    """

    source: str
    new_gates: bool = False


@dataclass(frozen=True)
class Foreign:
    """Another library's tensors by our names, and the names of those that a backbone does not need."""

    tensors: dict[str, Tensor]
    unused: Sequence[str]


def load_pretrained(
    network: Backbone,
    weights: str | Pretrained,
    torchvision_name: str | None,
    translate: Callable[[Mapping[str, Tensor]], Foreign | None],
) -> None:
    """Load weights into a backbone, whose ``laterals`` keep their own.

    ``torchvision_name`` is torchvision's network of this architecture, for names of weights; ``translate`` gives another library's
    state dict by our names, or None if it is ours.

    Raises:
        UsageError: an unknown name.
        CheckpointError: the file is missing or unreadable, or tensors are missing, unknown, or of other shapes.
    """
    wanted = Pretrained(weights) if isinstance(weights, str) else weights
    state = _fetch(wanted.source, torchvision_name)
    foreign = translate(state)
    tensors = state if foreign is None else foreign.tensors
    own = {name: value for name, value in network.state_dict().items() if not name.startswith("laterals.")}
    tensors = spread_weights(tensors, own)
    optional = _gate_names(network) if wanted.new_gates else set()
    if optional & set(tensors):
        raise CheckpointError(
            f"{wanted.source} has weights of gates; leave new_gates out, which is for networks without"
        )
    counters = {name for name in {*own, *tensors} if name.endswith("num_batches_tracked")}
    missing = sorted(set(own) - set(tensors) - counters - optional)
    unknown = sorted(name for name in set(tensors) - set(own) - counters if not _left_out(name, network, own))
    shapes = sorted(name for name in set(own) & set(tensors) - counters if own[name].shape != tensors[name].shape)
    advice = "give weights of the same architecture (depth, attention and variant decide)"
    if missing and set(missing) <= _gate_names(network):
        advice = (
            "they are of a network without attention: give attention null, or new_gates true to start the gates anew"
        )
    refuse_differences(wanted.source, type(network).__name__, missing, unknown, shapes, advice)
    if wanted.new_gates:
        open_gates(network)
        network.new_layers = (*network.new_layers, *_gates(network))
    network.load_state_dict({name: tensors[name] for name in set(own) & set(tensors)}, strict=False)


def _fetch(source: str, torchvision_name: str | None) -> dict[str, Tensor]:
    if source.startswith(TIMM) and Path(source).suffix not in SUFFIXES:
        return _from_timm(source.removeprefix(TIMM))
    return fetch(source, torchvision_name, f", {TIMM}NAME,")


def _from_timm(name: str) -> dict[str, Tensor]:
    architecture, _, tag = name.partition(".")
    timm = timm_with(architecture, f"weights {TIMM}{name}")
    tags = timm_tags(timm, architecture)
    if not tags or (tag and tag not in tags):
        raise UsageError(f"timm has no weights {name!r}, of {architecture} it has {tags}{did_you_mean(tag, tags)}")
    return download(f"{TIMM}{name}", lambda: timm.create_model(name, pretrained=True).state_dict())


def _gate_names(network: nn.Module) -> set[str]:
    """Names of all tensors inside attention modules."""
    gates = tuple(f"{gate}." for gate in _gates(network))
    return {tensor for tensor in network.state_dict() if tensor.startswith(gates)}


def _gates(network: nn.Module) -> list[str]:
    return [name for name, module in network.named_modules() if isinstance(module, Attention)]


def _left_out(name: str, network: nn.Module, own: Mapping[str, Tensor]) -> bool:
    """Whether a tensor belongs to what the backbone does not build, or to statistics that it does not keep."""
    module, _, tensor = name.rpartition(".")
    if tensor in ("running_mean", "running_var") and f"{module}.weight" in own:
        return True
    if name.startswith("laterals."):
        return True
    built = getattr(network, "stages", None)
    return isinstance(built, nn.ModuleDict) and any(
        name.startswith(f"stages.{stage}.") for stage in ("c2", "c3", "c4", "c5") if stage not in built
    )

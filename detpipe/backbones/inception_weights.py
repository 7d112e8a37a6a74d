"""Weights for Inception-v3 with gates: our own, or torchvision's, which have none."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

from torch import Tensor, nn

from detpipe.backbones.inception_blocks import STAGES
from detpipe.backbones.pretrained import Foreign, Pretrained, load_pretrained
from detpipe.stages import Backbone


def load_inception(network: Backbone, weights: str | Pretrained) -> None:
    """Load weights into an :class:`~detpipe.backbones.se_inception.SEInceptionV3`.

    The auxiliary classifier starts anew, as a whole, unless the weights have one of as many classes.

    Args:
        network: gets the weights; its ``laterals`` keep their own.
        weights: a local file, a name of torchvision's, or one of these with permission to start gates anew.

    Raises:
        UsageError: an unknown name.
        CheckpointError: the file is missing or unreadable, or tensors are missing, unknown, or of other shapes.
    """
    load_pretrained(network, weights, "inception_v3", partial(to_own_names, network=network))


def to_own_names(state: Mapping[str, Tensor], network: nn.Module) -> Foreign:
    """Rename tensors of torchvision's Inception-v3, and complete them by what it does not have.

    Args:
        state: a state dict of torchvision's or ours.
        network: whose auxiliary classifier takes the place of one with other classes, or none.

    Returns:
        The tensors by our names, and the names of those that the network does not need.
    """
    own = network.state_dict()
    ours = any(name.startswith("stem.") for name in state)
    places = {part: "stem" if stage == "stem" else f"stages.{stage}" for stage in STAGES for part in STAGES[stage]}
    tensors, unused = {}, []
    for name, tensor in state.items():
        part, _, rest = name.partition(".")
        if part == "fc":
            unused.append(name)
        elif part == "AuxLogits":
            tensors[f"auxiliary.{rest}"] = tensor
        else:
            tensors[f"{places[part]}.{part}.block.{rest}" if part in places and not ours else name] = tensor
    last = "auxiliary.fc.bias"
    if last not in own or last not in tensors or own[last].shape != tensors[last].shape:
        unused += [name for name in tensors if name.startswith("auxiliary.")]
        tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith("auxiliary.")}
        tensors |= {name: tensor for name, tensor in own.items() if name.startswith("auxiliary.")}
    return Foreign(tensors, unused)

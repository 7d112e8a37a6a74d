"""Weights for Inception-v3 with gates: our own, or torchvision's, which have none."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

from torch import Tensor, nn

from detpipe.backbones.inception_blocks import STAGES
from detpipe.backbones.pretrained import Foreign, Pretrained, load_pretrained
from detpipe.stages import Backbone


def load_inception(network: Backbone, weights: str | Pretrained) -> None:
    """Load weights into an :class:`~detpipe.backbones.se_inception.SEInceptionV3`; errors as of :func:`load_pretrained`.

    The auxiliary classifier starts anew, as a whole, unless the weights have one of as many classes.
    """
    load_pretrained(network, weights, "inception_v3", partial(to_own_names, network=network))


def to_own_names(state: Mapping[str, Tensor], network: nn.Module) -> Foreign:
    """Rename tensors of torchvision's Inception-v3, or ours, and complete them by what the weights do not have.

    The network's auxiliary classifier takes the place of one with other classes, or none.
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

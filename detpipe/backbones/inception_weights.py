"""The tensor names of torchvision's Inception-v3 in ours."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from detpipe.backbones.inception_blocks import STAGES
from detpipe.backbones.pretrained import Foreign


def to_own_names(state: Mapping[str, Tensor], network: nn.Module) -> Foreign:
    """Rename tensors of torchvision's Inception-v3, or ours, and complete them by what the weights do not have.

    The network's own auxiliary classifier, which starts anew as a whole, takes the place of one with other classes, or none.
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

"""The tensor names of torchvision's and timm's residual networks in ours, for weights that others trained.

torchvision: ``layer1.0.conv1.weight``, ``layer1.0.downsample.0.weight``; timm the same, with ``se.fc1`` and ``se.fc2`` for a gate,
``conv1.0`` to ``conv1.6`` for a deep stem, ``conv2.paths.0.conv`` and ``conv2.attn.fc_reduce`` for a selective kernel.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

from detpipe.backbones.pretrained import Foreign

_DEEP_STEM = {"0": "conv1", "1": "norm1", "3": "conv2", "4": "norm2", "6": "conv3"}
_INNER = (  # inside a block
    (r"^(conv\d)\.paths\.(\d)\.conv\.", r"residual.\1.branches.\2.0."),
    (r"^(conv\d)\.paths\.(\d)\.bn\.", r"residual.\1.branches.\2.1."),
    (r"^(conv\d)\.attn\.fc_reduce\.", r"residual.\1.squeeze."),
    (r"^(conv\d)\.attn\.bn\.", r"residual.\1.norm."),
    (r"^(conv\d)\.attn\.fc_select\.", r"residual.\1.select."),
    (r"^(conv\d)\.conv\.", r"residual.\1."),
    (r"^conv(\d)\.bn\.", r"residual.norm\1."),
    (r"^(conv\d)\.", r"residual.\1."),
    (r"^bn(\d)\.", r"residual.norm\1."),
    (r"^se\.fc1\.", "attention.squeeze."),
    (r"^se\.fc2\.", "attention.excite."),
    (r"^se\.conv\.", "attention.conv."),
)


def to_own_names(state: Mapping[str, Tensor]) -> Foreign | None:
    """Rename the tensors of a residual network of torchvision or timm; None where a state dict is no such network's."""
    if not any(name.startswith("layer1.0.conv1.") for name in state):
        return None
    deep = "conv1.0.weight" in state
    renamed, unused = {}, []
    for name, tensor in state.items():
        if name.startswith("fc."):
            unused.append(name)
        else:
            renamed[_rename(name, deep, state)] = tensor
    return Foreign(renamed, unused)


def _rename(name: str, deep: bool, state: Mapping[str, Tensor]) -> str:
    block = re.fullmatch(r"layer(\d)\.(\d+)\.(.+)", name)
    if block is None:
        first, _, rest = name.partition(".")
        if first == "bn1":
            return f"stem.{'norm3' if deep else 'norm1'}.{rest}"
        if first == "conv1" and deep:
            index, _, tensor = rest.partition(".")
            return f"stem.{_DEEP_STEM.get(index, index)}.{tensor}"
        return f"stem.{name}" if first == "conv1" else name
    layer, number, inner = block.groups()
    own = f"stages.c{int(layer) + 1}.{number}."
    shortcut = re.fullmatch(r"downsample\.(\d)\.(.+)", inner)
    if shortcut is not None:
        averaged = f"layer{layer}.{number}.downsample.2.weight" in state
        return f"{own}shortcut.{'conv' if shortcut[1] == str(int(averaged)) else 'norm'}.{shortcut[2]}"
    for pattern, replacement in _INNER:
        renamed, found = re.subn(pattern, replacement, inner)
        if found:
            return own + renamed
    return own + inner

"""The parts of Inception-v3 in stages, and the paddings that put their cells in place.

Szegedy et al., "Rethinking the Inception Architecture for Computer Vision", 2015, arXiv 1512.00567; the parts are torchvision's.

Where cells lie. Cell i of a level of stride s belongs on pixels i * s to (i + 1) * s - 1, the middle of which is no pixel.
Kernels of three cells look around a whole one, so that each halving moves the next map by a quarter of its own cells to the left
or to the right, which its padding decides. The offsets of levels of strides s and 2 s therefore differ by at least s / 2 pixels,
and half a pixel is the least for one level. The best paddings, which a search over all of them finds, have offsets of .5 pixels
for a single level, and of .5, -1.5, 2.5 and -5.5 for c2 to c5 together.
"""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial

import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.inception import BasicConv2d, InceptionA, InceptionB, InceptionC, InceptionD, InceptionE

from detpipe.backbones.pretrained import Foreign

STAGES: dict[str, dict[str, Callable[[], nn.Module]]] = {  # stage -> torchvision's name of a part -> the part
    "stem": {
        "Conv2d_1a_3x3": partial(BasicConv2d, 3, 32, kernel_size=3, stride=2),
        "Conv2d_2a_3x3": partial(BasicConv2d, 32, 32, kernel_size=3),
        "Conv2d_2b_3x3": partial(BasicConv2d, 32, 64, kernel_size=3, padding=1),
        "maxpool1": partial(nn.MaxPool2d, 3, stride=2),
    },
    "c2": {
        "Conv2d_3b_1x1": partial(BasicConv2d, 64, 80, kernel_size=1),
        "Conv2d_4a_3x3": partial(BasicConv2d, 80, 192, kernel_size=3),
    },
    "c3": {
        "maxpool2": partial(nn.MaxPool2d, 3, stride=2),
        "Mixed_5b": partial(InceptionA, 192, pool_features=32),
        "Mixed_5c": partial(InceptionA, 256, pool_features=64),
        "Mixed_5d": partial(InceptionA, 288, pool_features=64),
    },
    "c4": {
        "Mixed_6a": partial(InceptionB, 288),
        "Mixed_6b": partial(InceptionC, 768, channels_7x7=128),
        "Mixed_6c": partial(InceptionC, 768, channels_7x7=160),
        "Mixed_6d": partial(InceptionC, 768, channels_7x7=160),
        "Mixed_6e": partial(InceptionC, 768, channels_7x7=192),
    },
    "c5": {
        "Mixed_7a": partial(InceptionD, 768),
        "Mixed_7b": partial(InceptionE, 1280),
        "Mixed_7c": partial(InceptionE, 2048),
    },
}
BLOCKS = {  # the Inception blocks and the channels of their outputs
    "Mixed_5b": 256,
    **dict.fromkeys(("Mixed_5c", "Mixed_5d"), 288),
    **dict.fromkeys(("Mixed_6a", "Mixed_6b", "Mixed_6c", "Mixed_6d", "Mixed_6e"), 768),
    "Mixed_7a": 1280,
    **dict.fromkeys(("Mixed_7b", "Mixed_7c"), 2048),
}
STRIDES = {"c2": 4, "c3": 8, "c4": 16, "c5": 32}
WIDTHS = {"c2": 192, "c3": 288, "c4": 768, "c5": 2048}
UNPADDED = {  # the parts that look at three cells without padding -> their stride
    **dict.fromkeys(("Conv2d_1a_3x3", "maxpool1", "maxpool2", "Mixed_6a", "Mixed_7a"), 2),
    **dict.fromkeys(("Conv2d_2a_3x3", "Conv2d_4a_3x3"), 1),
}
CENTERED, SHIFTED = (1, 1), (0, 2)  # paddings before and after: the first output looks around cell 0, or around cell 1

Paddings = Mapping[str, tuple[int, int]]


class Unit(nn.Module):
    """A part of the network, with zeros around its input, and attention, or None, to its output.

    Zeros suit the pools, too: what comes in is not negative. ``padding`` is before the first and after the last row and column.
    """

    def __init__(self, block: nn.Module, padding: tuple[int, int], gate: nn.Module | None) -> None:
        super().__init__()
        self.block, self.padding, self.gate = block, padding, gate

    def forward(self, x: Tensor) -> Tensor:
        """``[N, C, H, W]`` -> ``[N, C', H', W']``."""
        if any(self.padding):
            x = F.pad(x, [*self.padding, *self.padding])
        x = self.block(x)
        return x if self.gate is None else self.gate(x)


def build_stage(stage: str, paddings: Paddings, make_gate: Callable[[int], nn.Module] | None) -> nn.Sequential:
    """Build one of `STAGES`: its parts in their order, by torchvision's names.

    ``make_gate`` makes attention for a number of channels; it goes to the output of each Inception block.
    """
    units = OrderedDict()
    for name, make in STAGES[stage].items():
        gate = make_gate(BLOCKS[name]) if make_gate is not None and name in BLOCKS else None
        units[name] = Unit(make(), paddings.get(name, (0, 0)), gate)
    return nn.Sequential(units)


def unpadded_until(level: str) -> Iterator[tuple[str, int]]:
    """Go through the parts that are not padded, up to a level: torchvision's name, stride."""
    for stage, parts in STAGES.items():
        yield from ((name, UNPADDED[name]) for name in parts if name in UNPADDED)
        if stage == level:
            return


def best_paddings(levels: Sequence[str]) -> dict[str, tuple[int, int]]:
    """Choose paddings with which every map has ceil(side / stride) cells, as near to their places as can be.

    Returns:
        Part -> its padding; of all choices the one whose greatest offset at a level, in cells, is the least.
    """
    parts = dict(unpadded_until(levels[-1]))
    halving = [name for name, stride in parts.items() if stride == 2]
    fixed = dict.fromkeys(
        parts, CENTERED
    )  # other paddings of the rest, or larger ones, would add whole cells to offsets
    choices = [
        fixed | dict(zip(halving, choice, strict=True))
        for choice in itertools.product((CENTERED, SHIFTED), repeat=len(halving))
    ]
    return min(choices, key=lambda paddings: max(abs(offset(level, paddings)) / STRIDES[level] for level in levels))


def offset(level: str, paddings: Paddings) -> float:
    """Compute by how many pixels the middle of cell i of a level lies right of (i + .5) * stride, or below."""
    middle, spacing = 0.5, 1  # of the first pixel; pixels from cell to cell
    for name, stride in unpadded_until(level):
        middle += spacing * (1 - paddings.get(name, (0, 0))[0])
        spacing *= stride
    return middle - spacing / 2


def smallest_side(level: str, cells: int, padded: bool) -> int:
    """Compute how many pixels an image needs for a number of cells in a row of a level."""
    if padded:
        return (cells - 1) * STRIDES[level] + 1
    for _, stride in reversed(list(unpadded_until(level))):
        cells = (cells - 1) * stride + 3
    return cells


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

"""Where attention goes in somebody else's network: the last module of a residual block's branch, or a module named in full.

Blocks are known by the class that they are made of, so that timm need not be installed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import nn
from torchvision.ops import SqueezeExcitation as TorchvisionSqueezeExcitation

from detpipe.support.suggest import did_you_mean


@dataclass(frozen=True)
class Place:
    """Where one attention module goes."""

    site: str  # full name of the module whose output is gated
    block: str | None = None  # full name of the block whose branch ends there; None for a module that was named itself
    slot: str = ""  # name of the block's own free slot for attention, if it has one
    channels_last: bool = False  # the module returns [N, H, W, C]
    replaced: bool = False  # the module gives its place to the attention instead of being gated


# class of a block -> the modules that may end its branch before the sum, the first one that the block has being the last
# to run; a block that does not add its input ends there too
_ENDS = {
    "torchvision.models.resnet.BasicBlock": ("bn2",),
    "torchvision.models.resnet.Bottleneck": ("bn3",),
    "torchvision.models.regnet.ResBottleneckBlock": ("f",),
    "torchvision.models.mnasnet._InvertedResidual": ("layers",),
    "torchvision.models.mobilenetv2.InvertedResidual": ("conv",),
    "torchvision.models.mobilenetv3.InvertedResidual": ("block",),
    "torchvision.models.efficientnet.MBConv": ("block",),
    "torchvision.models.efficientnet.FusedMBConv": ("block",),
    "torchvision.models.convnext.CNBlock": ("block",),
    "timm.models.resnet.BasicBlock": ("se", "bn2"),
    "timm.models.resnet.Bottleneck": ("se", "bn3"),
    "timm.models.sknet.SelectiveKernelBasic": ("se", "conv2"),
    "timm.models.sknet.SelectiveKernelBottleneck": ("se", "conv3"),
    "timm.models.regnet.Bottleneck": ("conv3",),
    "timm.models._efficientnet_blocks.DepthwiseSeparableConv": ("bn2",),
    "timm.models._efficientnet_blocks.InvertedResidual": ("bn3",),
    "timm.models._efficientnet_blocks.EdgeResidual": ("bn2",),
    "timm.models._efficientnet_blocks.UniversalInvertedResidual": ("dw_end",),
    "timm.models._efficientnet_blocks.MobileAttention": ("attn",),
    "timm.models.convnext.ConvNeXtBlock": ("mlp",),
}
_FAMILIES = (
    "ResNet, ResNeXt, SKNet, RegNet, MNASNet, MobileNet, EfficientNet and ConvNeXt blocks of torchvision and timm"
)


def find_places(network: nn.Module, where: Sequence[str] | None = None, replace: bool = False) -> list[Place]:
    """Find where attention goes, in the order of the network, each place once; arguments are those of `add_attention`.

    Raises:
        ValueError: no blocks, an unknown name (near names are listed), or a pattern without a block.
    """
    modules = dict(network.named_modules())
    blocks = {name: place for name in modules if (place := _in_block(name, modules[name], replace)) is not None}
    if where is None:
        if not blocks:
            some = next((name for name, module in modules.items() if isinstance(module, nn.Conv2d)), "features.3")
            raise ValueError(
                f"{type(network).__name__} has no blocks that are known: looked for {_FAMILIES}; name modules that return "
                f"a map [N, C, H, W], for example where=[{some!r}]"
            )
        return list(blocks.values())
    names = [where] if isinstance(where, str) else list(where)
    if not names:
        raise ValueError("where is empty: name modules or blocks, or leave it None for every block")
    chosen = {place for name in names for place in _named(name, blocks, modules)}
    order = {name: index for index, name in enumerate(modules)}
    return sorted(chosen, key=lambda place: order[place.site])


def _named(name: str, blocks: dict[str, Place], modules: dict[str, nn.Module]) -> list[Place]:
    if name in blocks:
        return [blocks[name]]
    if any(character in name for character in "*?["):
        matched = [place for block, place in blocks.items() if fnmatchcase(block, name)]
        if not matched:
            known = f"the blocks are {_shortened(list(blocks))}" if blocks else f"looked for {_FAMILIES}"
            raise ValueError(f"where: no block matches {name!r}; {known}; modules other than blocks are named in full")
        return matched
    if not name or name not in modules:
        near = did_you_mean(name, [known for known in modules if known])
        raise ValueError(f"where: the network has no module {name!r}{near or f', but {_shortened(list(modules)[1:])}'}")
    return [Place(name)]


def _in_block(name: str, block: nn.Module, replace: bool) -> Place | None:
    kinds = [kind for base in type(block).__mro__ if (kind := f"{base.__module__}.{base.__qualname__}") in _ENDS]
    if not kinds:
        return None
    prefix = f"{name}." if name else ""
    own = _own_attention(block) if replace else None
    if own is not None:
        return Place(prefix + own, name, replaced=True)
    ends = _ENDS[kinds[0]]
    end = next(end for end in ends if isinstance(getattr(block, end, None), nn.Module))
    channels_last = kinds[0] == "timm.models.convnext.ConvNeXtBlock" and not getattr(block, "use_conv_mlp", False)
    return Place(prefix + end, name, "se" if "se" in ends and end != "se" else "", channels_last)


def _own_attention(block: nn.Module) -> str | None:
    """Name the block's squeeze-and-excitation, in torchvision's and in timm's way of writing blocks."""
    for name, module in block.named_modules():
        is_slot = name == "se" and not isinstance(module, nn.Identity)
        if name and (is_slot or isinstance(module, TorchvisionSqueezeExcitation)):
            return name
    return None


def _shortened(names: list[str], most: int = 8) -> str:
    return ", ".join(names[:most]) + (f", ... {names[-1]}" if len(names) > most else "")

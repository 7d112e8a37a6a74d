"""Attention put into a network of torchvision or timm, in place.

Where it goes: before the residual sum of every block, where the papers have it; a block without a sum is gated at its end.
ConvNeXt is gated before its layer scale, which would hide the map from the gates while it is small.

What stays: the names of all entries of the state dict, so that pretrained weights load before or after; deep copies, pickling,
torchvision's ``create_feature_extractor`` (which does not see forward hooks), timm's ``features_only`` networks and
``torch.compile``. How, in the order of choice:

1. torchvision's ResNet blocks become a subclass of themselves with a child ``attention``;
2. timm's ResNet blocks have a slot for it, ``se``;
3. a plain ``nn.Sequential`` gets ``attention`` as its last child;
4. any other module is held by a :class:`~detpipe.attention.gated.Gated` in its place. In a graph that
   ``create_feature_extractor`` cuts out of the network, this one's weights are called ``NAME.module.*``: load weights before
   the cut, or into the network that it shares its weights with.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck

from detpipe.attention.base import Attention, Gating
from detpipe.attention.gated import AttentiveBasicBlock, AttentiveBottleneck, Gated
from detpipe.attention.places import Place, find_places

PROBES = (64, 128, 224, 299)  # sides of the probe images, in pixels: the first that the network can run on
_ATTENTIVE = {BasicBlock: AttentiveBasicBlock, Bottleneck: AttentiveBottleneck}


def add_attention(
    network: nn.Module,
    attention: Callable[[int], nn.Module],
    where: Sequence[str] | None = None,
    replace: bool = False,
) -> list[str]:
    """Put attention into a network, in place; nothing is changed where this raises.

    Args:
        network: of torchvision or timm, or one made of their blocks; its mode, weights and statistics stay.
        attention: makes a module ``[N, C, H, W]`` -> ``[N, C, H, W]`` from the number of channels C, which is measured by a
            probe image: a class such as :class:`~detpipe.attention.SqueezeExcitation`, or a function.
        where: None for every block that is known, or a list of
            names of blocks, such as "layer4.0", gated before their sum;
            patterns for such names, such as "layer[34].*";
            full names of any other modules, such as "features.3", whose output is gated.
        replace: a block that has squeeze-and-excitation of its own (MobileNetV3, EfficientNet, timm's ``seresnet``) gives its
            place to the new one, whose weights are then missing from what was saved before. Otherwise both act, so that
            pretrained weights keep their meaning.

    Returns:
        The full names of the new modules, in the order of the network: ``network.get_submodule(name)``.

    Raises:
        ValueError: no known blocks, an unknown name (near names are listed), a pattern without a block, a module that does
            not return a map or does not run exactly once, one that has attention already, attention that cannot be built
            for the channels or does not keep the shape, or a network that runs on none of the probe images.
        TypeError: ``attention`` is a module instead of what makes one.

    Example:
        >>> from torchvision.models import resnet18
        >>> from detpipe.attention import SqueezeExcitation
        >>> add_attention(resnet18(), SqueezeExcitation, where=["layer4.*"])
        ['layer4.0.attention', 'layer4.1.attention']
    """
    if isinstance(attention, nn.Module):
        raise TypeError(
            f"attention must be a class or a function that makes a module from the number of channels, got a module: "
            f"{type(attention).__name__}(...); give {type(attention).__name__} itself, or lambda channels: ..."
        )
    _check_gates(attention)
    places = find_places(network, where, replace)
    for place in places:
        _check_free(network, place)
    probed = _probe(network, {place.site for place in places})
    made = [_make(place, attention, probed[place.site]) for place in places]
    if len({id(module) for module in made}) < len(made):
        raise ValueError("attention must make a new module each time, but it gave the same one for several places")
    parents = [network.get_submodule(place.site.rpartition(".")[0]) for place in places]  # before their names change
    blocks = [None if place.block is None else network.get_submodule(place.block) for place in places]
    for place, module, parent, block in zip(places, made, parents, blocks, strict=True):
        _insert(place, module, parent, block)
    names = {id(module): name for name, module in network.named_modules()}
    return [names[id(module)] for module in made]


def _check_gates(kind: object) -> None:
    if isinstance(kind, type) and issubclass(kind, Attention) and not issubclass(kind, Gating):
        raise ValueError(
            f"{kind.__name__} is a convolution that may change the shape of a map, so it cannot gate one; use a network that "
            "is built with it, as SKNet is, or a module such as SqueezeExcitation"
        )


def _check_free(network: nn.Module, place: Place) -> None:
    holders = [place.site] if place.block is None else [place.site, place.block]
    for name in holders:
        module = network.get_submodule(name)
        if isinstance(module, Attention) or "attention" in module._modules:
            raise ValueError(f"{name} has attention already: add it once, or name other modules in where")


@dataclass
class _Outputs:
    """What a module returned for two probe images, the second one twice as wide."""

    found: list[object] = field(default_factory=list)

    def __call__(self, module: nn.Module, inputs: object, output: object) -> None:
        self.found.append(output)

    def map_of(self, place: Place) -> Tensor:
        """Return the smaller map, ``[1, C, H, W]``, where all is as it must be."""
        if len(self.found) != 2:
            raise ValueError(
                f"{place.site} runs {len(self.found) / 2:g} times for one image: name a module that runs once"
            )
        maps = [output for output in self.found if isinstance(output, Tensor) and output.ndim == 4]
        if place.channels_last:
            maps = [output.permute(0, 3, 1, 2) for output in maps]
        if len(maps) != 2 or maps[0].shape[:3] != maps[1].shape[:3] or maps[0].shape[3] >= maps[1].shape[3]:
            first, second = (
                str(list(output.shape)) if isinstance(output, Tensor) else f"a {type(output).__name__}"
                for output in self.found
            )
            raise ValueError(
                f"{place.site} does not return a map: expected [1, C, H, W] that grows with the image, but it returns "
                f"{first}, and {second} for an image twice as wide; name another module in where"
            )
        return maps[0]


@torch.no_grad()
def _probe(network: nn.Module, sites: set[str]) -> dict[str, _Outputs]:
    modes = {module: module.training for module in network.modules()}
    network.eval()
    try:
        return _first_that_runs(network, sites)
    finally:
        for module, training in modes.items():
            module.training = training


def _first_that_runs(network: nn.Module, sites: set[str]) -> dict[str, _Outputs]:
    stem = next((module for module in network.modules() if isinstance(module, nn.Conv2d)), None)
    like = next((p for p in network.parameters() if p.is_floating_point()), torch.empty(0))
    failure: Exception | None = None
    for side in PROBES:
        outputs = {site: _Outputs() for site in sites}
        handles = [network.get_submodule(site).register_forward_hook(outputs[site]) for site in sites]
        try:
            for width in (side, 2 * side):
                network(like.new_zeros(1, stem.in_channels if stem else 3, side, width))
            return outputs
        except (RuntimeError, ValueError, AssertionError, IndexError) as error:
            failure = error
        finally:
            for handle in handles:
                handle.remove()
    raise ValueError(
        f"{type(network).__name__} cannot run on probe images of {', '.join(map(str, PROBES))} pixels and twice as wide: {failure}"
    ) from failure


def _make(place: Place, attention: Callable[[int], nn.Module], outputs: _Outputs) -> nn.Module:
    features = outputs.map_of(place)
    channels = features.shape[1]
    try:
        module = attention(channels)
    except (TypeError, ValueError) as error:
        name = getattr(attention, "__name__", "attention")
        raise ValueError(f"{place.site}, {channels} channels: {name} cannot be built from them: {error}") from error
    if not isinstance(module, nn.Module):
        raise ValueError(f"attention must make a module, got {module!r} for {channels} channels ({place.site})")
    _check_gates(type(module))
    module = module.to(features.device, features.dtype)
    with torch.no_grad():
        shape = list(module.eval()(features.new_zeros(2, channels, 3, 4)).shape)
    if shape != [2, channels, 3, 4]:
        raise ValueError(f"{place.site}: attention must keep the shape, but {[2, channels, 3, 4]} became {shape}")
    return module


def _insert(place: Place, attention: nn.Module, parent: nn.Module, block: nn.Module | None) -> None:
    child = place.site.rpartition(".")[2]
    site = parent.get_submodule(child)
    attention.train(site.training)
    if place.replaced:
        setattr(parent, child, attention)
    elif block is not None and type(block) in _ATTENTIVE:
        block.__class__ = _ATTENTIVE[type(block)]
        block.attention = attention
    elif block is not None and place.slot:
        setattr(block, place.slot, attention)
    elif isinstance(site, nn.Sequential) and type(site).forward is nn.Sequential.forward:
        site.add_module("attention", attention)
    else:
        setattr(parent, child, Gated(site, attention, place.channels_last))

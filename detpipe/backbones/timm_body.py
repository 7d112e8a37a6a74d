"""Any network of timm (Wightman, "PyTorch Image Models", 2019) that yields feature maps, cut where timm cuts it."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from types import ModuleType
from typing import Any, cast

import torch
from torch import Tensor, nn

from detpipe.backbones.bodies import Body, Level, Levels
from detpipe.backbones.regime import Regime, recomputed
from detpipe.backbones.weights import (
    SUFFIXES,
    download,
    is_file,
    load_part,
    read_state,
    timm_tags,
    timm_with,
)
from detpipe.support.errors import UsageError
from detpipe.support.suggest import did_you_mean
from detpipe.types import PixelFormat

# what lets networks with positions or windows take images of any size
ANY_SIZE = {"dynamic_img_size": True, "strict_img_size": False}
ODD = (101, 67)  # an image whose sides are odd at several strides
CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


class TimmBody(Body):
    """A network of timm, and the places where timm returns maps of it.

    Args:
        name: of a network, such as ``convnext_tiny``; or of one with its weights, such as ``convnext_tiny.fb_in22k``, which
            decides what ``DEFAULT`` means and which pixels are expected.
        levels: names c1 to c6, of strides 2 to 64, or level name -> where it is cut; nodes are modules that timm lists.
        weights: a local file, ``DEFAULT``, the tag of pretrained weights, or None.
        regime: its paths are dropped, and statistics that its normalization does not keep may be missing from the weights.
        in_channels: C of the images.

    Raises:
        UsageError: timm is not installed; an unknown network, level, node or name of weights.
        CheckpointError: the weights are missing or belong to another network.
        ValueError: a network that yields no maps, takes images of one size only, or has no paths to drop; weights that expect
            other images.
    """

    def __init__(self, name: str, levels: Levels, weights: str | None, regime: Regime, in_channels: int = 3) -> None:
        self.name = name
        architecture, _, tag = name.partition(".")
        timm = timm_with(architecture, f"network timm/{name}")
        if tag and tag not in timm_tags(timm, architecture):
            raise _unknown_weights(timm, architecture, tag)
        source = _source(timm, name, weights)
        channels = {} if in_channels == 3 else {"in_chans": in_channels}
        full = timm.create_model(name, **channels)
        places = _places(full, name)
        self._indices = _places_of(levels, places, name)
        declared = levels if isinstance(levels, Mapping) else {level: places[i] for level, i in self._indices.items()}
        self.strides = {level: cut.stride for level, cut in declared.items()}
        config = timm.get_pretrained_cfg(name)
        own = PixelFormat() if config is None else PixelFormat(tuple(config.mean), tuple(config.std))
        self.pixel_format = own.spread(in_channels)
        self._depths = _depths(timm, full)
        self._used = sorted(set(self._indices.values()))
        options = {key: value for key, value in ANY_SIZE.items() if key in inspect.signature(type(full)).parameters}
        options |= channels
        self.network = _features(timm, name, self._used, regime.drop_path, options)
        coarsest = (max(self.strides.values()), max(place.stride for place in places))
        self.multiple = _multiple(self.network, name, coarsest, in_channels)
        _leave_out_the_rest(self.network, places[self._used[-1]].node, self.multiple, in_channels)
        self._channels_last = str(getattr(self.network, "output_fmt", "NCHW")).endswith("NHWC")
        if weights is not None:
            if source is None:
                state, origin = read_state(weights), weights
            else:
                state = download(f"timm/{source}", lambda: timm.create_model(source, pretrained=True).state_dict())
                origin = f"timm's {source}"
            load_part(self.network, full, state, origin, f"timm/{name}", regime.norm != "group", _plain)

    def maps(self, images: Tensor) -> dict[str, Tensor]:
        """Compute the levels: ``[N, C, H, W]`` -> level name -> ``[N, C_l, H_l, W_l]``."""
        found = dict(zip(self._used, self.network(images), strict=True))
        if self._channels_last:
            found = {index: features.permute(0, 3, 1, 2) for index, features in found.items()}
        return {level: found[index] for level, index in self._indices.items()}

    def depths(self) -> dict[str, int]:
        """Tell how deep each parameter lies, by timm's own groups of layers where it has some."""
        if self._depths is None:
            return super().depths()
        plain = {name: _plain(name.replace(".module.", ".")) for name, _ in self.network.named_parameters()}
        return {name: self._depths[key] for name, key in plain.items() if key in self._depths}

    def checkpoint(self) -> None:
        """Store activations only between the outermost blocks of the network; a ValueError if there are none."""
        children = list(self.network.children())
        whole = children[0] if len(children) == 1 else self.network  # timm may wrap the network as it was
        blocks = [block for block in _blocks(whole) if not _hooked_within(block)]
        if not blocks:
            raise ValueError(f"checkpointing: timm/{self.name} has no blocks to compute again; leave it false")
        for block in blocks:
            block.forward = partial(_forward, block)


def _depths(timm: ModuleType, full: nn.Module) -> dict[str, int] | None:
    matcher = getattr(full, "group_matcher", None)
    if matcher is None:
        return None
    depths = timm.models.group_parameters(full, matcher(coarse=False), reverse=True)
    return {_plain(name): depth for name, depth in depths.items()}


def _forward(block: nn.Module, *inputs: Any, **options: Any) -> Any:
    """What replaces ``forward`` of one block; the state dict stays as it is."""
    function = partial(type(block).forward, block)
    if not (block.training and torch.is_grad_enabled()):
        return function(*inputs, **options)
    return recomputed(function, [block], *inputs, **options)


def _blocks(network: nn.Module) -> Iterator[nn.Module]:
    """The outermost modules with parts, without those that only hold others."""
    for child in network.children():
        if type(child) in CONTAINERS:
            yield from _blocks(child)
        elif any(True for _ in child.children()):
            yield child


def _hooked_within(block: nn.Module) -> bool:
    """Whether something listens inside, which would hear a second computation."""
    return any(part._forward_hooks or part._forward_pre_hooks for part in block.modules() if part is not block)


def _unknown_weights(timm: ModuleType, architecture: str, weights: str) -> UsageError:
    known = timm_tags(timm, architecture)
    choice = f"DEFAULT, or one of {known}" if known else "nothing else, since timm has none of it"
    return UsageError(
        f"unknown weights {weights!r} of timm's {architecture}: expected a local file ({', '.join(SUFFIXES)}), {choice}"
        f"{did_you_mean(weights, ['DEFAULT', *known])}"
    )


def _source(timm: ModuleType, name: str, weights: str | None) -> str | None:
    """Find the name of the weights to download; None for a local file or none at all."""
    if weights is None or is_file(weights):
        return None
    architecture = name.partition(".")[0]
    config = timm.get_pretrained_cfg(name)
    if weights == "DEFAULT" and config is not None and config.has_weights:
        return name
    if weights not in timm_tags(timm, architecture):
        raise _unknown_weights(timm, architecture, weights)
    source = f"{architecture}.{weights}"
    network, given = (timm.get_pretrained_cfg(known) for known in (name, source))
    for key in ("mean", "std", "input_size"):
        if getattr(network, key) != getattr(given, key):
            raise ValueError(
                f"weights {weights!r} of timm's {architecture} expect images of {key} {getattr(given, key)}, but timm/{name} "
                f"of {getattr(network, key)}; give network timm/{source} and weights DEFAULT"
            )
    return source


def _places(full: nn.Module, name: str) -> list[Level]:
    """Where timm can cut a network, from the input on."""
    info = getattr(full, "feature_info", None)
    if not info:
        raise ValueError(f"timm/{name} yields no feature maps; give another network")
    entries = cast(Sequence[Mapping[str, Any]], getattr(info, "info", info))
    return [Level(entry["module"], entry["reduction"]) for entry in entries]


def _places_of(levels: Levels, places: Sequence[Level], name: str) -> dict[str, int]:
    """Level name -> which of the places."""
    if isinstance(levels, Mapping):
        nodes = [place.node for place in places]
        for cut in levels.values():
            if cut.node not in nodes:
                near = did_you_mean(cut.node, nodes)
                raise UsageError(f"timm/{name} has no node {cut.node!r}{near}; expected some of {nodes}")
        return {level: nodes.index(cut.node) for level, cut in levels.items()}
    if isinstance(levels, str) or not levels or len(set(levels)) < len(levels):
        raise ValueError(f"levels must be distinct names such as [c3, c4, c5], got {levels!r}")
    strides = {index: place.stride for index, place in enumerate(places) if place.stride.bit_count() == 1}
    by_name = {f"c{stride.bit_length() - 1}": index for index, stride in strides.items()}  # the last of equal strides
    for level in levels:
        if level not in by_name:
            raise UsageError(f"timm/{name} has no level {level!r}; expected some of {list(by_name)}")
    return {level: by_name[level] for level in levels}


def _features(
    timm: ModuleType, name: str, indices: Iterable[int], drop_path: float, options: Mapping[str, Any]
) -> nn.Module:
    dropping = {"drop_path_rate": drop_path} if drop_path else {}
    try:
        network = timm.create_model(name, features_only=True, out_indices=tuple(indices), **options, **dropping)
    except TypeError as error:
        if "drop_path_rate" not in str(error):
            raise
        raise ValueError(f"drop_path: timm/{name} has no paths to drop; leave it 0") from error
    if drop_path and not any(getattr(module, "drop_prob", 0) for module in network.modules()):
        raise ValueError(f"drop_path: timm/{name} has no paths to drop; leave it 0")
    return network


def _multiple(network: nn.Module, name: str, strides: Iterable[int], channels: int) -> int:
    """Find what the sides of images must be multiples of: networks of patches, and some pyramids, take whole cells only."""
    refusal = _refusal(network, channels, *ODD)
    if refusal is None:
        return 1
    for stride in strides:
        refusal = _refusal(network, channels, 3 * stride, 5 * stride)
        if refusal is None:
            return stride
    raise ValueError(f"timm/{name} does not take images of any size: {refusal}; give a network that does")


@torch.no_grad()
def _refusal(network: nn.Module, channels: int, height: int, width: int) -> str | None:
    """Why a network does not take an image of a size; None if it does."""
    try:
        network.eval()(torch.zeros(1, channels, height, width))
    except (AssertionError, RuntimeError) as error:
        return str(error).partition("\n")[0] or type(error).__name__
    return None


def _leave_out_the_rest(network: nn.Module, last: str, multiple: int, channels: int) -> None:
    """Drop blocks beyond the last level, which timm leaves in some networks, and train nothing else that has no effect."""
    sequence, _, index = last.rpartition(".")
    if isinstance(blocks := getattr(network, sequence, None), nn.Sequential):
        setattr(network, sequence, blocks[: int(index) + 1])
    parameters = [parameter for parameter in network.parameters() if parameter.requires_grad]
    side = -(-max(ODD) // multiple) * multiple
    with torch.enable_grad():
        sums = [features.sum() for features in network.eval()(torch.zeros(1, channels, side, side))]
        gradients = torch.autograd.grad(sums, parameters, allow_unused=True)
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.requires_grad_(gradient is not None)


def _plain(key: str) -> str:
    """A name without what timm's cutting does to it: ``stages_0.blocks.1`` and ``model.stages.0.blocks.1`` are one tensor."""
    return key.removeprefix("model.").removeprefix("body.").replace(".", "_")

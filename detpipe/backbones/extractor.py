"""Any torchvision classification network as a backbone, cut at named nodes.

Deviation from a plain cut: ``padding`` adds zeros (the mean color) around the image before the network sees it, for
networks whose own convolutions are not padded. SqueezeNet's first cell at stride 16 is centered on pixel 15.5; with
``padding: 8`` it is centered on 7.5, half a pixel from where RoI pooling takes it to be, and no cell is lost at the
border.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision import models
from torchvision.models.feature_extraction import create_feature_extractor
from torchvision.ops import FrozenBatchNorm2d

from detpipe.backbones.laterals import Laterals, Width
from detpipe.backbones.weights import load_weights
from detpipe.errors import UsageError
from detpipe.stages import Backbone
from detpipe.suggest import did_you_mean
from detpipe.types import Features, PixelFormat

PROBES = (128, 256)  # sides of the images that check the declared strides


@dataclass(frozen=True)
class Level:
    """Where a network is cut.

    Args:
        node: name of the module or operation whose output is returned, such as ``features.12``.
        stride: image pixels a cell of it.
    """

    node: str
    stride: int


class Extractor(Backbone):
    """Feature maps of a torchvision network.

    Args:
        network: name of a torchvision classification network, such as ``resnet50``.
        levels: level name -> where it is cut, finest first.
        weights: a local file (``.pth``, ``.pt`` or ``.safetensors``; never downloads), the name of torchvision weights
            (``DEFAULT``, ``IMAGENET1K_V1``; downloads once), or None for random ones.
        pixel_format: what the weights expect; the default is torchvision's.
        out_channels: project every level to this width; None keeps the width, for a single level; "own" lets each level
            keep its own, for an FPN.
        padding: zeros added on every side before the network, in pixels.
        frozen_batch_norm: keep the stored statistics; advised with pretrained weights and small batches.
        frozen_modules: modules whose weights stay, by name prefix, such as ``features.0``.

    Raises:
        UsageError: an unknown network or node (near names are listed).
        CheckpointError: the weights are missing or belong to another network.
        ValueError: a declared stride that the network does not have, or unequal widths without ``out_channels``.

    Example:
        >>> backbone = Extractor("squeezenet1_1", {"c4": Level("features.12", 16)}, padding=8)
        >>> list(backbone(torch.zeros(1, 3, 64, 96))["c4"].shape)
        [1, 512, 4, 6]
    """

    def __init__(
        self,
        network: str,
        levels: dict[str, Level],
        weights: str | None = None,
        pixel_format: PixelFormat = PixelFormat(),  # noqa: B008 (frozen)
        out_channels: Width = None,
        padding: int = 0,
        frozen_batch_norm: bool = True,
        frozen_modules: tuple[str, ...] = (),
    ) -> None:
        super().__init__()
        if not levels:
            raise ValueError("levels must name at least one place to cut the network, for example c4: {node, stride}")
        if network not in models.list_models(module=models):
            raise UsageError(
                f"unknown network {network!r}: expected a torchvision classification network"
                f"{did_you_mean(network, models.list_models(module=models))}"
            )
        self.pixel_format, self.padding = pixel_format, padding
        self.strides = {name: level.stride for name, level in levels.items()}
        self.body = _cut(network, {level.node: name for name, level in levels.items()}, weights)
        if frozen_batch_norm:
            _freeze_batch_norm(self.body)
        self.laterals = Laterals(self._probe(), out_channels)
        self._freeze(frozen_modules)

    @property
    def out_channels(self) -> int:
        """C, the same at every level; a ValueError where each level keeps its own width."""
        return self.laterals.out_channels

    @property
    def level_channels(self) -> dict[str, int]:
        """Channels of each level."""
        return dict(self.laterals.level_channels)

    def forward(self, images: Tensor) -> Features:
        """Compute the levels: ``[N, 3, H, W]`` -> level name -> ``[N, C, H_l, W_l]``."""
        if self.padding:
            images = F.pad(images, [self.padding] * 4)
        features = self.body(images)
        return self.laterals({level: features[level] for level in self.strides})

    @torch.no_grad()
    def _probe(self) -> dict[str, int]:
        """Measure the width of each level, and hold the declared strides against what the network does."""
        training = self.body.training
        small, large = (self.body.eval()(torch.zeros(1, 3, side, side)) for side in PROBES)
        self.body.train(training)
        for level, stride in self.strides.items():
            shape = list(large[level].shape)
            more = shape[-1] - small[level].shape[-1]  # cells; the difference is free of what is lost at the borders
            if len(shape) != 4 or more < 1:
                raise ValueError(
                    f"level {level!r}: expected a map [1, C, H, W] that grows with the image, but an image of "
                    f"{PROBES[1]} pixels gives {shape}; cut elsewhere"
                )
            real = round((PROBES[1] - PROBES[0]) / more)
            if stride != real:
                raise ValueError(f"level {level!r}: stride {stride} is declared, but it is {real}; declare {real}")
        return {level: large[level].shape[1] for level in self.strides}

    def _freeze(self, prefixes: tuple[str, ...]) -> None:
        for prefix in prefixes:
            named = [p for name, p in self.body.named_parameters() if name == prefix or name.startswith(f"{prefix}.")]
            if not named:
                names = sorted({name.rpartition(".")[0] for name, _ in self.body.named_parameters()})
                raise UsageError(f"frozen_modules: no parameters under {prefix!r}{did_you_mean(prefix, names)}")
            for parameter in named:
                parameter.requires_grad_(False)


def _cut(network: str, nodes: dict[str, str], weights: str | None) -> nn.Module:
    options = {"aux_logits": True, "init_weights": True} if network in ("inception_v3", "googlenet") else {}
    full = models.get_model(network, weights=None, **options)
    graph_nodes = _node_names(full)
    for node in nodes:
        if node not in graph_nodes:
            raise UsageError(f"{network} has no node {node!r}{did_you_mean(node, sorted(graph_nodes))}")
    body = create_feature_extractor(full, return_nodes=nodes, suppress_diff_warning=True)
    if weights is not None:
        load_weights(full, body, network, weights)  # the cut shares its parameters with the full network
    return body


def _node_names(network: nn.Module) -> set[str]:
    from torchvision.models.feature_extraction import get_graph_node_names

    train_nodes, eval_nodes = get_graph_node_names(network, suppress_diff_warning=True)
    leaves = set(train_nodes) & set(eval_nodes)
    modules = {name.rsplit(".", depth)[0] for name in leaves for depth in range(1, name.count(".") + 1)}
    return leaves | modules


def _freeze_batch_norm(network: nn.Module) -> None:
    for name, module in list(network.named_modules()):
        if isinstance(module, nn.BatchNorm2d):
            frozen = FrozenBatchNorm2d(module.num_features, module.eps)
            for key in ("weight", "bias", "running_mean", "running_var"):
                getattr(frozen, key).copy_(getattr(module, key).detach())
            parent, _, child = name.rpartition(".")
            setattr(network.get_submodule(parent), child, frozen)

"""A network cut for its feature maps, whichever library it comes from; the torchvision ones."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, fx, nn
from torchvision import models
from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names
from torchvision.ops import StochasticDepth

from detpipe.backbones.checkpointed_graph import CheckpointedGraph
from detpipe.backbones.input_channels import set_input_channels
from detpipe.backbones.regime import Regime, drop_path_rates
from detpipe.backbones.weights import fetch, load_part
from detpipe.stages import depths_of
from detpipe.support.errors import UsageError
from detpipe.support.numbers import check_whole
from detpipe.support.suggest import did_you_mean
from detpipe.types import PixelFormat


@dataclass(frozen=True)
class Level:
    """Where a network is cut.

    Args:
        node: name of the module or operation whose output is returned, such as ``features.12``.
        stride: image pixels a cell of it.

    Raises:
        ValueError: a stride that is no whole number of at least 1.
    """

    node: str
    stride: int

    def __post_init__(self) -> None:
        check_whole(stride=self.stride)


Levels = Mapping[str, Level] | Sequence[str]


class Body(ABC):
    """A network and how its maps are got.

    Attributes:
        network: what is trained.
        strides: image pixels a cell of each level, as declared.
        pixel_format: what the network expects of its pixels, unless its weights say otherwise.
        multiple: images must have sides that are multiples of this many pixels.
    """

    network: nn.Module
    strides: dict[str, int]
    pixel_format: PixelFormat
    multiple: int = 1

    @abstractmethod
    def maps(self, images: Tensor) -> dict[str, Tensor]:
        """Compute the levels: ``[N, C, H, W]`` -> level name -> ``[N, C_l, H_l, W_l]``."""

    def depths(self) -> dict[str, int]:
        """Tell how deep each parameter of the network lies; those that were put in later are left out."""
        return depths_of(self.network)

    @abstractmethod
    def checkpoint(self) -> None:
        """Store few activations from now on, and compute the others again in the backward pass."""


class TorchvisionBody(Body):
    """A traced network of torchvision, cut at nodes of its graph.

    Args:
        name: of a classification network.
        levels: level name -> where it is cut.
        weights: a local file, the name of torchvision weights, or None.
        regime: its paths are dropped, and statistics that its normalization does not keep may be missing from the weights.
        in_channels: C of the images.

    Raises:
        UsageError: an unknown network, node or name of weights.
        CheckpointError: the weights are missing or belong to another network.
        ValueError: levels without nodes, or a network without paths to drop.
    """

    def __init__(self, name: str, levels: Levels, weights: str | None, regime: Regime, in_channels: int = 3) -> None:
        known = models.list_models(module=models)
        if name not in known:
            raise UsageError(
                f"unknown network {name!r}: expected a torchvision classification network, or timm/NAME"
                f"{did_you_mean(name, known)}"
            )
        if not isinstance(levels, Mapping):
            raise ValueError(
                f"levels of torchvision's {name} need the node and stride of each, such as c4: {{node: layer3, stride: 16}}; "
                f"got {list(levels)}"
            )
        self.strides = {level: cut.stride for level, cut in levels.items()}
        self.pixel_format = PixelFormat().spread(in_channels)
        options = {"aux_logits": True, "init_weights": True} if name in ("inception_v3", "googlenet") else {}
        full = models.get_model(name, weights=None, **options)
        _drop_paths(full, name, regime.drop_path)
        set_input_channels(full, in_channels)
        self.network = self._traced = _cut(full, name, {cut.node: level for level, cut in levels.items()})
        if weights is not None:
            load_part(self.network, full, fetch(weights, name), weights, name, regime.norm != "group")
        self._checkpointed: CheckpointedGraph | None = None

    def maps(self, images: Tensor) -> dict[str, Tensor]:
        """Compute the levels: ``[N, C, H, W]`` -> level name -> ``[N, C_l, H_l, W_l]``."""
        if self._checkpointed is None or not self.network.training or not torch.is_grad_enabled():
            return self.network(images)
        return self._checkpointed(images)

    def checkpoint(self) -> None:
        """Store activations only at some cuts of the graph."""
        self._checkpointed = CheckpointedGraph(self._traced)


def _drop_paths(network: nn.Module, name: str, rate: float) -> None:
    paths = [module for module in network.modules() if isinstance(module, StochasticDepth)]
    if rate and not paths:
        raise ValueError(f"drop_path: torchvision's {name} has no paths to drop; leave it 0")
    for path, own_rate in zip(paths, drop_path_rates(rate, len(paths)), strict=True):
        path.p = own_rate


def _cut(full: nn.Module, name: str, nodes: dict[str, str]) -> fx.GraphModule:
    train_nodes, eval_nodes = get_graph_node_names(full, suppress_diff_warning=True)
    leaves = set(train_nodes) & set(eval_nodes)
    known = leaves | {leaf.rsplit(".", depth)[0] for leaf in leaves for depth in range(1, leaf.count(".") + 1)}
    for node in nodes:
        if node not in known:
            raise UsageError(f"{name} has no node {node!r}{did_you_mean(node, sorted(known))}")
    return cast(fx.GraphModule, create_feature_extractor(full, return_nodes=nodes, suppress_diff_warning=True))

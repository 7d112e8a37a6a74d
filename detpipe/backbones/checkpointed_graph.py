"""A traced network in parts, of which the backward pass computes the activations again.

Chen et al., "Training Deep Nets with Sublinear Memory Cost", 2016, arXiv 1604.06174, section 4.2: some sqrt(n) parts of a
network of n layers, so that what is stored between the parts and within the one at hand is least.

Deviations:
1. A cut is made only where a single value is alive, and where none of those that take it writes into it.
"""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass
from typing import Any, cast

from torch import Tensor, fx, nn
from torch.fx.node import map_arg

from detpipe.backbones.regime import recomputed

IN_PLACE = (operator.iadd, operator.isub, operator.imul, operator.itruediv)


class CheckpointedGraph:
    """A call of a traced network that stores little; parameters and modules stay those of the network.

    Args:
        network: as torchvision's ``create_feature_extractor`` makes it: one input, a dict of outputs.
    """

    def __init__(self, network: fx.GraphModule) -> None:
        self.network = network
        graph = cast(fx.Graph, network.train_graph)
        nodes = [node for node in graph.nodes if node.op not in ("placeholder", "output", "get_attr")]
        first = next(node for node in graph.nodes if node.op == "placeholder")
        self.outputs = cast(dict[str, fx.Node], next(node for node in graph.nodes if node.op == "output").args[0])
        self.parts = _split(network, first, nodes, set(self.outputs.values()))

    def __reduce__(self) -> tuple[type[CheckpointedGraph], tuple[fx.GraphModule]]:
        """A copy cuts the graph of its own network; nodes cannot be copied one by one."""
        return CheckpointedGraph, (self.network,)

    def __call__(self, images: Tensor) -> dict[str, Tensor]:
        """Compute ``[N, C, H, W]`` -> name -> ``[N, C, H', W']``."""
        kept: dict[fx.Node, Any] = {}
        value: Any = images
        for part in self.parts:
            modules = [self.network.get_submodule(name) for name in part.modules]
            value, *outputs = recomputed(self._run, modules, part, value)
            kept.update(zip(part.outputs, outputs, strict=True))
        return {name: kept[node] for name, node in self.outputs.items()}

    def _run(self, part: _Part, value: Any) -> tuple[Any, ...]:
        values = {part.input: value}

        def look_up(node: fx.Node) -> Any:
            return operator.attrgetter(str(node.target))(self.network) if node.op == "get_attr" else values[node]

        for node in part.nodes:
            args, kwargs = map_arg(node.args, look_up), map_arg(node.kwargs, look_up)
            if node.op == "call_module":
                values[node] = self.network.get_submodule(str(node.target))(*args, **kwargs)
            elif node.op == "call_method":
                values[node] = getattr(args[0], str(node.target))(*args[1:], **kwargs)
            else:
                values[node] = node.target(*args, **kwargs)  # pyright: ignore[reportCallIssue]
            for done in part.last_used_by.get(node, ()):
                del values[done]
        return values[part.nodes[-1]], *(values[node] for node in part.outputs)


@dataclass(frozen=True)
class _Part:
    input: fx.Node
    nodes: list[fx.Node]
    outputs: list[fx.Node]  # those of the whole graph that lie in this part
    last_used_by: dict[fx.Node, list[fx.Node]]  # what is not needed any more after a node

    @property
    def modules(self) -> list[str]:
        return [str(node.target) for node in self.nodes if node.op == "call_module"]


def _split(network: nn.Module, first: fx.Node, nodes: list[fx.Node], outputs: set[fx.Node]) -> list[_Part]:
    position = {first: -1, **{node: index for index, node in enumerate(nodes)}}
    last_use = {node: max([position[node], *(position.get(user, -1) for user in node.users)]) for node in position}
    enough = math.isqrt(len(nodes))
    parts, begun, alive = [], 0, {first}
    for index, node in enumerate(nodes):
        alive = {value for value in {*alive, node} if last_use[value] > index}
        free = alive == {node} and not any(_writes(user, network) for user in node.users)
        if index == len(nodes) - 1 or (free and index + 1 - begun >= enough):
            parts.append(_part(first, nodes[begun : index + 1], outputs, last_use, nodes))
            first, begun = node, index + 1
    return parts


def _part(
    first: fx.Node, own: list[fx.Node], outputs: set[fx.Node], last_use: dict[fx.Node, int], nodes: list[fx.Node]
) -> _Part:
    returned = [node for node in own if node in outputs]
    last_used_by: dict[fx.Node, list[fx.Node]] = {}
    for node in own[:-1]:
        if node not in outputs:
            last_used_by.setdefault(nodes[last_use[node]], []).append(node)
    return _Part(first, own, returned, last_used_by)


def _writes(node: fx.Node, network: nn.Module) -> bool:
    """Whether an operation may write into what it takes; rather once too often than too seldom."""
    if node.op == "call_module":
        leaf = next(part for part in network.get_submodule(str(node.target)).modules() if not list(part.children()))
        return bool(getattr(leaf, "inplace", False))
    if node.op == "call_method":
        return str(node.target).endswith("_")
    return node.target in IN_PLACE or bool(node.kwargs.get("inplace")) or any(arg is True for arg in node.args)

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchvision.models.feature_extraction import create_feature_extractor

from detpipe.backbones.checkpointed_graph import CheckpointedGraph


class Network(nn.Module):
    """Shortcuts, a parameter and a buffer of its own, and operations that write in place."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList([nn.Conv2d(3, 4, 3, padding=1), *(nn.Conv2d(4, 4, 3, padding=1) for _ in range(9))])
        self.norms = nn.ModuleList(nn.BatchNorm2d(4) for _ in range(10))
        self.hard = nn.Hardswish(inplace=True)
        self.drop = nn.Dropout(0.2)
        self.scale = nn.Parameter(torch.rand(4, 1, 1))
        self.register_buffer("offset", torch.rand(4, 1, 1))

    def forward(self, x):
        for index, (conv, norm) in enumerate(zip(self.convs, self.norms, strict=True)):
            y = self.hard(norm(conv(x)))  # written in place, and no fixed point of the operation
            x = y if index == 0 else x + self.drop(y)
            if index == 4:
                x = F.silu(x, inplace=True)
            if index % 3 == 2:
                x = x * self.scale + self.offset
                x.mul_(0.5)
        return F.max_pool2d(x, 2)


def network(outputs: dict[str, str]):
    torch.manual_seed(0)
    return create_feature_extractor(Network(), return_nodes=outputs, suppress_diff_warning=True)


def step(body, call):
    torch.manual_seed(1)
    images = torch.randn(2, 3, 8, 10)
    maps = call(images)
    sum(map_.square().sum() for map_ in maps.values()).backward()
    return maps, {name: p.grad for name, p in body.named_parameters()}, body.state_dict()


@pytest.mark.parametrize(
    "outputs", [{"max_pool2d": "top"}, {"norms.3": "low", "add_4": "middle", "max_pool2d": "top"}, {"add": "only"}]
)
def test_it_computes_the_same(outputs):
    body = network(outputs)
    other = copy.deepcopy(body)
    call = CheckpointedGraph(other)
    torch.testing.assert_close(step(other, call), step(body, body), rtol=0, atol=0)
    assert other.state_dict()["norms.0.num_batches_tracked"] == 1


def test_cuts_are_where_one_value_is_alive_and_nobody_writes_into_it():
    call = CheckpointedGraph(network({"max_pool2d": "top"}))
    assert len(call.parts) >= 4
    for part in call.parts[1:]:
        first = [node for node in part.nodes if part.input in node.all_input_nodes]
        assert first
        assert not any("silu" in node.name or "mul_" in node.name or "hard" in node.name for node in first)
    assert sum(len(part.nodes) for part in call.parts) == len({node for part in call.parts for node in part.nodes})


def test_it_stores_less():
    body = network({"max_pool2d": "top"})

    def stored(call) -> int:
        sizes = {}
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t: sizes.update({t.data_ptr(): t.numel()}) or t, lambda t: t
        ):
            call(torch.randn(2, 3, 32, 32))
        return sum(sizes.values())

    assert stored(CheckpointedGraph(body)) < stored(body) / 3


def test_a_copy_cuts_the_graph_of_its_own_network():
    body = network({"max_pool2d": "top"})
    both = {"body": body, "call": CheckpointedGraph(body)}
    copied = copy.deepcopy(both)
    assert copied["call"].network is copied["body"] is not body
    torch.testing.assert_close(step(copied["body"], copied["call"]), step(body, body), rtol=0, atol=0)


def test_values_that_move_are_found_again():
    body = network({"max_pool2d": "top"})
    call = CheckpointedGraph(body)
    body.double()  # replaces buffers
    assert call(torch.zeros(1, 3, 8, 8, dtype=torch.float64))["top"].dtype == torch.float64

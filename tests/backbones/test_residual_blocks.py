"""Frozen norms behind convolutions: the numbers and gradients of one layer after the other, whatever way is taken."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torchvision.ops import FrozenBatchNorm2d

from detpipe.backbones.residual_blocks import Steps


def steps(kind: type[nn.Sequential]) -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.Conv2d(4, 6, 3, 2, 1, bias=False), FrozenBatchNorm2d(6), nn.ReLU(inplace=True)]
    layers += [nn.Conv2d(6, 5, 1, bias=False), FrozenBatchNorm2d(5, eps=0.0), nn.Conv2d(5, 5, 1), FrozenBatchNorm2d(5)]
    for norm in layers:
        if isinstance(norm, FrozenBatchNorm2d):
            for name, value in norm.named_buffers():
                value.copy_(torch.rand_like(value) + 0.5 * (name == "running_var"))
    return kind(*layers).double()


@pytest.mark.parametrize("gradients", [True, False])
def test_the_numbers_are_those_of_one_layer_after_the_other(gradients: bool) -> None:
    images = torch.randn(2, 4, 9, 7, dtype=torch.float64, requires_grad=gradients)
    both = [steps(kind) for kind in (Steps, nn.Sequential)]
    with torch.set_grad_enabled(gradients):
        found, wanted = (network(images) for network in both)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    if gradients:
        given, right = (
            torch.autograd.grad(values.square().sum(), [images, *network.parameters()])
            for values, network in zip((found, wanted), both, strict=True)
        )
        torch.testing.assert_close(given, right, rtol=1e-12, atol=1e-12)


def test_who_listens_to_a_layer_hears_it() -> None:
    network, heard = steps(Steps), []

    def hear(module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
        heard.append(output)

    for step in network:
        step.register_forward_hook(hear)
    images = torch.randn(1, 4, 6, 6, dtype=torch.float64)
    network(images)
    with torch.no_grad():
        network(images)
    assert len(heard) == 2 * len(network)


def test_statistics_that_change_are_seen() -> None:
    network, images = steps(Steps), torch.randn(1, 4, 6, 6, dtype=torch.float64)
    with torch.no_grad():
        network(images)
        network[1].running_mean.data += 1.0  # of which no counter of versions knows
        wanted = nn.Sequential(*copy.deepcopy(network))(images)
        torch.testing.assert_close(network(images), wanted, rtol=1e-12, atol=1e-12)

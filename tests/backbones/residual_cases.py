"""Random networks of torchvision and timm for comparison with ours."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn


def random_norms(network: nn.Module) -> nn.Module:
    """Give batch norms something to do; a fresh one is nearly the identity, or zero."""
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.0)
            nn.init.normal_(module.bias, std=0.1)
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
    return network


def saved(network: nn.Module, folder: Path) -> str:
    """A file with the network's weights."""
    path = folder / "weights.pth"
    torch.save(network.state_dict(), path)
    return str(path)


def largest_difference(got: torch.Tensor, expected: torch.Tensor) -> float:
    """As a part of the largest value."""
    return float((got - expected).abs().max() / expected.abs().max())

"""How much autograd keeps for the backward pass, each storage counted once: what several benchmarks report."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn


def kept_memory(network: nn.Module, step: Callable[[], object]) -> float:
    """Count while a training step runs.

    Args:
        network: its parameters are left out.
        step: a forward and a backward pass.

    Returns:
        MiB.
    """
    own = {parameter.untyped_storage().data_ptr() for parameter in network.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        step()
    return sum(kept.values()) / 2**20

"""Registers operators with PyTorch, so that compilation, export and tracing see one node and not what is inside.

``torch.library.custom_op`` does the same, but imports the compiler at the first call, which takes a second; what is used
here are the parts that it is made of.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


class Operator:
    """An operator of the namespace ``detpipe``, called as ``torch.ops.detpipe.NAME``."""

    def __init__(self, name: str) -> None:
        self.name = f"detpipe::{name}"

    def register_fake(self, function: Callable) -> None:
        """Tell shapes and types of the results without computing them."""
        torch.library.register_fake(self.name, function)

    def register_autograd(self, backward: Callable, setup_context: Callable | None = None) -> None:
        """Make it differentiable; ``backward`` consists of differentiable operations too."""
        torch.library.register_autograd(self.name, backward, setup_context=setup_context)

    def register_vmap(self, function: Callable) -> None:
        """Say how one call stands for many inside ``torch.func.vmap``."""
        torch.library.register_vmap(self.name, function)


def operator(name: str) -> Callable[[Callable], Operator]:
    """Register a function of tensors as ``torch.ops.detpipe.NAME``, on every device.

    Args:
        name: of the operator.

    Returns:
        A decorator; the function's annotations are the operator's schema. It changes none of its arguments, and its
        result shares no memory with them.
    """

    def register(function: Callable) -> Operator:
        created = Operator(name)
        schema = torch.library.infer_schema(function, mutates_args=())
        torch.library.define(created.name, schema, tags=(torch.Tag.pt2_compliant_tag,))
        torch.library.impl(created.name, "default", function)
        return created

    return register


def fold_maps(info, in_dims: Sequence[int | None], args: Sequence, chosen_at: int) -> list:
    """Write a vmapped call as one call: its maps become further levels, its boxes further boxes.

    Args:
        info: what ``torch.func.vmap`` says of the call.
        in_dims: the vmapped dimension of each argument.
        args: of the operator; all tensors have cells or boxes first.
        chosen_at: where ``chosen``, ``images`` and ``sizes`` stand.

    Returns:
        The arguments of the one call.
    """
    count, maps = info.batch_size, args[chosen_at + 1] * len(args[chosen_at + 2]) // 2
    folded = list(args)
    for index, (arg, dim) in enumerate(zip(args, in_dims, strict=True)):
        if isinstance(arg, Tensor):
            batched = arg.movedim(dim, 0) if dim is not None else arg.expand(count, *arg.shape)
            if index == chosen_at:
                batched = batched + maps * torch.arange(count, device=arg.device)[:, None]
            folded[index] = batched.flatten(0, 1)
    folded[chosen_at + 2] = list(args[chosen_at + 2]) * count
    return folded


def unfold_maps(result: Tensor, info) -> Tensor:
    """Give a folded call's result its vmapped dimension back, as the first."""
    return result.unflatten(0, (info.batch_size, result.shape[0] // info.batch_size))


def is_batched(tensor: Tensor) -> bool:
    """Say whether a tensor stands for several inside ``torch.func.vmap``, where no value can be looked at."""
    return torch._C._functorch.is_functorch_wrapped_tensor(tensor)  # pyright: ignore[reportAttributeAccessIssue]

"""Registers operators with PyTorch, so that compilation, export and tracing see one node and not what is inside.

``torch.library.custom_op`` does the same, but imports the compiler at the first call, which takes a second; what is used
here are the parts that it is made of.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


class Operator:
    """An operator of the namespace ``detpipe``, called as ``torch.ops.detpipe.NAME``."""

    def __init__(self, name: str) -> None:
        self.name = f"detpipe::{name}"
        self.call: Callable  # once it is registered

    def __call__(self, *args):
        """Call it as everybody else does."""
        return self.call(*args)

    def register_fake(self, function: Callable) -> None:
        """Tell shapes and types of the results without computing them."""
        torch.library.register_fake(self.name, function)

    def register_autograd(self, backward: Callable, setup_context: Callable | None = None) -> None:
        """Make it differentiable; ``backward`` consists of differentiable operations too."""
        torch.library.register_autograd(self.name, backward, setup_context=setup_context)

    def register_multilinear(self, factors: int) -> None:
        """Make an operator differentiable that computes a derivative of a number linear in each of its first arguments.

        One of these is None: it is the derivative in that one which is computed from the others. The gradients of the result
        are then derivatives of the same number, and computed by the same operator, to any order.
        """

        def keep(ctx, inputs, output):
            ctx.save_for_backward(*(one if isinstance(one, Tensor) else None for one in inputs))
            ctx.rest = [None if isinstance(one, Tensor) else one for one in inputs]

        def backward(ctx, change):
            inputs = [rest if one is None else one for one, rest in zip(ctx.saved_tensors, ctx.rest, strict=True)]
            inputs[:factors] = [change if one is None else one for one in inputs[:factors]]
            grads = [None] * len(inputs)
            for index in range(factors):
                if ctx.needs_input_grad[index]:
                    found = self(*inputs[:index], None, *inputs[index + 1 :])
                    grads[index] = found.to(inputs[index].dtype)
            return tuple(grads)

        self.register_autograd(backward, setup_context=keep)

    def register_vmap(self, function: Callable) -> None:
        """Say how one call stands for many inside ``torch.func.vmap``."""
        torch.library.register_vmap(self.name, function)


def operator(name: str, schema: str | None = None) -> Callable[[Callable], Operator]:
    """Register a function of tensors as ``torch.ops.detpipe.NAME``, on every device.

    Args:
        name: of the operator.
        schema: of its arguments and results; by default what the function's annotations say.

    Returns:
        A decorator. The function changes none of its arguments, and its result shares no memory with them.
    """

    def register(function: Callable) -> Operator:
        created = Operator(name)
        own = schema or torch.library.infer_schema(function, mutates_args=())
        torch.library.define(created.name, own, tags=(torch.Tag.pt2_compliant_tag,))
        torch.library.impl(created.name, "default", function)
        created.call = getattr(torch.ops.detpipe, name)
        return created

    return register


def stack(info, arg, dim) -> Any:
    """``[V, ...]`` of an argument of a vmapped call, or of each of several; what is no tensor stays."""
    if isinstance(arg, list | tuple) and arg and isinstance(arg[0], Tensor):
        return [stack(info, one, own) for one, own in zip(arg, dim, strict=True)]
    if not isinstance(arg, Tensor):
        return arg
    return arg.expand(info.batch_size, *arg.shape) if dim is None else arg.movedim(dim, 0)


def fold(info, in_dims: Sequence, args: Sequence, shifts: dict[int, int] | None = None) -> list[Any]:
    """Write a vmapped call as one call, with what comes first in each tensor behind one another.

    Args:
        info: what ``torch.func.vmap`` says of the call.
        in_dims: the vmapped dimension of each argument.
        args: of the operator.
        shifts: position of an argument -> how much larger its numbers, the first of each row, are from call to call.

    Returns:
        The arguments of the one call.
    """
    folded: list[Any] = []
    for index, (arg, dim) in enumerate(zip(args, in_dims, strict=True)):
        stacked = stack(info, arg, dim)
        if shifts and index in shifts:
            shift = shifts[index] * torch.arange(info.batch_size, device=stacked.device)
            if stacked.ndim == 2:
                stacked = stacked + shift[:, None]
            else:
                stacked = torch.cat((stacked[..., :1] + shift[:, None, None], stacked[..., 1:]), dim=-1)
        if isinstance(stacked, list):
            folded.append([one.flatten(0, 1) if isinstance(one, Tensor) else one for one in stacked])
        else:
            folded.append(stacked.flatten(0, 1) if isinstance(stacked, Tensor) else stacked)
    return folded


def unfold(result: Tensor, info) -> Tensor:
    """Give a folded call's result its vmapped dimension back, as the first."""
    return result.unflatten(0, (info.batch_size, result.shape[0] // info.batch_size))


def is_batched(tensor: Tensor) -> bool:
    """Say whether a tensor stands for several inside ``torch.func.vmap``, where no value can be looked at."""
    if torch.compiler.is_compiling():  # which does not know the question
        return False
    return torch._C._functorch.is_functorch_wrapped_tensor(tensor)  # pyright: ignore[reportAttributeAccessIssue]

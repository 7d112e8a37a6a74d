"""The largest cell in a rectangle of cells, and everything that its gradients need.

    out[r, i, j, c] = max over y in rows of bin i, x in columns of bin j, of  map[r][y, x, c]

The gradient goes to the cell that won. Adding gradients up there and reading the winners are each other's transpose, so that
the operators are closed under differentiation to any order.

The kernels are in :mod:`detpipe.roi_pooling.torch_max` and, for CUDA, :mod:`detpipe.roi_pooling.triton_max`.

R boxes, h x w bins, C channels, T cells of all maps.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from detpipe.roi_pooling.backend import kernels_for
from detpipe.roi_pooling.maps import CellTable
from detpipe.roi_pooling.operators import fold_maps, operator, unfold_maps
from detpipe.roi_pooling.placement import is_batched
from detpipe.roi_pooling.torch_max import gather_argmax, range_max, scatter_argmax


def pool_range_max(table: CellTable, chosen: Tensor, y: Tensor, x: Tensor) -> Tensor:
    """Take the largest cell in each bin.

    Args:
        table: the cells of all maps.
        chosen: ``[R]`` int64, the map of each box.
        y: ``[R, h, 2]`` int32, the first row of each bin and the one behind its last; within the map.
        x: ``[R, w, 2]`` int32, the same for columns.

    Returns:
        ``[R, C, h, w]``, channels last in memory, 0 for an empty bin. Differentiable in the cells, any number of times.
    """
    sizes = [side for size in table.sizes for side in size]
    operands = (table.rows, chosen, table.images, sizes, y, x)
    if torch.is_grad_enabled() and (table.rows.requires_grad or is_batched(table.rows)):  # vmap hides what requires it
        pooled, _ = torch.ops.detpipe.range_max(*operands)
    else:
        pooled = torch.ops.detpipe.range_max_values(*operands)
    return pooled.permute(0, 3, 1, 2)


@operator("range_max")
def _range_max(
    rows: Tensor, chosen: Tensor, images: int, sizes: Sequence[int], y: Tensor, x: Tensor
) -> tuple[Tensor, Tensor]:
    """``[T, C]`` -> ``[R, h, w, C]`` values and the cells that they are from."""
    pooled, argmax = _pool(rows, chosen, images, sizes, y, x, want_argmax=True)
    assert argmax is not None
    return pooled, argmax


@operator("range_max_values")
def _range_max_values(rows: Tensor, chosen: Tensor, images: int, sizes: Sequence[int], y: Tensor, x: Tensor) -> Tensor:
    """``[T, C]`` -> ``[R, h, w, C]``: values alone, which is faster."""
    return _pool(rows, chosen, images, sizes, y, x, want_argmax=False)[0]


def _pool(
    rows: Tensor, chosen: Tensor, images: int, sizes: Sequence[int], y: Tensor, x: Tensor, want_argmax: bool
) -> tuple[Tensor, Tensor | None]:
    if kernels_for(rows) == "triton":
        from detpipe.roi_pooling import triton_max

        return triton_max.range_max(rows, chosen, images, sizes, y, x, want_argmax)
    return range_max(rows, chosen, images, list(sizes), y, x, want_argmax)


@operator("scatter_argmax")
def _scatter_argmax(grad: Tensor, argmax: Tensor, chosen: Tensor, images: int, sizes: Sequence[int]) -> Tensor:
    """``[R, h, w, C]`` -> ``[T, C]``: the gradient to the cells."""
    if kernels_for(grad) == "triton":
        from detpipe.roi_pooling import triton_max

        return triton_max.scatter_argmax(grad, argmax, chosen, images, sizes)
    return scatter_argmax(grad, argmax, chosen, images, list(sizes))


@operator("gather_argmax")
def _gather_argmax(rows: Tensor, argmax: Tensor, chosen: Tensor, images: int, sizes: Sequence[int]) -> Tensor:
    """``[T, C]`` -> ``[R, h, w, C]``: the cells that won."""
    return gather_argmax(rows, argmax, chosen, images, list(sizes))


@_range_max.register_fake
def _(rows, chosen, images, sizes, y, x):
    shape = (chosen.shape[0], y.shape[1], x.shape[1], rows.shape[1])
    return rows.new_empty(shape), rows.new_empty(shape, dtype=torch.int32)


@_range_max_values.register_fake
def _(rows, chosen, images, sizes, y, x):
    return rows.new_empty((chosen.shape[0], y.shape[1], x.shape[1], rows.shape[1]))


@_scatter_argmax.register_fake
def _(grad, argmax, chosen, images, sizes):
    cells = images * sum(height * width for height, width in zip(sizes[::2], sizes[1::2], strict=True))
    return grad.new_empty((cells, grad.shape[3]))


@_gather_argmax.register_fake
def _(rows, argmax, chosen, images, sizes):
    return rows.new_empty(argmax.shape)


def _keep_winners(ctx, inputs, output):
    _, chosen, images, sizes, _, _ = inputs
    ctx.set_materialize_grads(False)  # no zeros for the winners, which have no gradient
    ctx.save_for_backward(output[1], chosen)
    ctx.images, ctx.sizes = images, list(sizes)


def _max_backward(ctx, grad, _):
    if grad is None:
        return (None,) * 6
    argmax, chosen = ctx.saved_tensors
    rows = torch.ops.detpipe.scatter_argmax(grad, argmax, chosen, ctx.images, ctx.sizes)
    return rows, None, None, None, None, None


def _keep_operands(ctx, inputs, output):
    _, argmax, chosen, images, sizes = inputs
    ctx.save_for_backward(argmax, chosen)
    ctx.images, ctx.sizes = images, list(sizes)


def _scatter_backward(ctx, grad_rows):
    argmax, chosen = ctx.saved_tensors
    grad = torch.ops.detpipe.gather_argmax(grad_rows.contiguous(), argmax, chosen, ctx.images, ctx.sizes)
    return grad, None, None, None, None


def _gather_backward(ctx, grad):
    argmax, chosen = ctx.saved_tensors
    rows = torch.ops.detpipe.scatter_argmax(grad, argmax, chosen, ctx.images, ctx.sizes)
    return rows, None, None, None, None


_range_max.register_autograd(_max_backward, setup_context=_keep_winners)
_scatter_argmax.register_autograd(_scatter_backward, setup_context=_keep_operands)
_gather_argmax.register_autograd(_gather_backward, setup_context=_keep_operands)


@_range_max.register_vmap
def _(info, in_dims, *args):
    pooled, argmax = torch.ops.detpipe.range_max(*fold_maps(info, in_dims, args, 1))
    return (unfold_maps(pooled, info), unfold_maps(argmax, info)), (0, 0)


@_range_max_values.register_vmap
def _(info, in_dims, *args):
    return unfold_maps(torch.ops.detpipe.range_max_values(*fold_maps(info, in_dims, args, 1)), info), 0


@_scatter_argmax.register_vmap
def _(info, in_dims, *args):
    return unfold_maps(torch.ops.detpipe.scatter_argmax(*fold_maps(info, in_dims, args, 2)), info), 0


@_gather_argmax.register_vmap
def _(info, in_dims, *args):
    return unfold_maps(torch.ops.detpipe.gather_argmax(*fold_maps(info, in_dims, args, 2)), info), 0

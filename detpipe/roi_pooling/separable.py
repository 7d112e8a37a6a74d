"""Pooling whose weights are a product of one along y and one along x, and everything that its gradients need.

    out[r, i, j, c] = sum over cells (y, x) of  weight_y[r, i, y] * weight_x[r, j, x] * map[r][y, x, c]

The operation is linear in the map, in the weights along y and in those along x. Its gradients are therefore of three kinds
only, each linear in its own arguments again, so that four operators are closed under differentiation to any order: pooling,
its transpose (gradient to the map), and the gradients to the two kinds of weights.

They are PyTorch's own kernels, in :mod:`detpipe.roi_pooling.torch_separable`: what CPUs run, and what is left of RoIAlign
where kernels read the boxes themselves (:mod:`detpipe.roi_pooling.mean_ops`), the second derivative in the boxes.

R boxes, h x w bins, Ty and Tx cells a bin along each axis, C channels, T cells of all maps.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from detpipe.roi_pooling.axis import AxisTaps
from detpipe.roi_pooling.maps import CellTable
from detpipe.roi_pooling.operators import Operator, fold, operator, unfold
from detpipe.roi_pooling.torch_separable import pool, pool_adjoint, weight_grad


def pool_separable(table: CellTable, chosen: Tensor, y: AxisTaps, x: AxisTaps) -> Tensor:
    """Apply separable weights to maps.

    Args:
        table: the cells of all maps.
        chosen: ``[R]`` int64, the map of each box.
        y: weights of rows, ``[R, h, Ty]``.
        x: weights of columns, ``[R, w, Tx]``.

    Returns:
        ``[R, h, w, C]``. Differentiable in the cells and in the weights, any number of times.
    """
    sizes = [side for size in table.sizes for side in size]
    exact = torch.promote_types(table.rows.dtype, torch.float32)
    return torch.ops.detpipe.separable(
        table.rows, chosen, table.images, sizes, y.cell, y.weight.to(exact), x.cell, x.weight.to(exact)
    )


@operator("separable")
def _separable(
    rows: Tensor,
    chosen: Tensor,
    images: int,
    sizes: Sequence[int],
    y_cell: Tensor,
    y_weight: Tensor,
    x_cell: Tensor,
    x_weight: Tensor,
) -> Tensor:
    """``[T, C]`` -> ``[R, h, w, C]``: pooling."""
    return pool(rows, chosen, images, list(sizes), AxisTaps(y_cell, y_weight), AxisTaps(x_cell, x_weight))


@operator("separable_adjoint")
def _separable_adjoint(
    grad: Tensor,
    chosen: Tensor,
    images: int,
    sizes: Sequence[int],
    y_cell: Tensor,
    y_weight: Tensor,
    x_cell: Tensor,
    x_weight: Tensor,
) -> Tensor:
    """``[R, h, w, C]`` -> ``[T, C]``: the gradient to the cells."""
    return pool_adjoint(grad, chosen, images, list(sizes), AxisTaps(y_cell, y_weight), AxisTaps(x_cell, x_weight))


@operator("separable_weight_grad")
def _separable_weight_grad(
    grad: Tensor,
    rows: Tensor,
    chosen: Tensor,
    images: int,
    sizes: Sequence[int],
    y_cell: Tensor,
    x_cell: Tensor,
    other_weight: Tensor,
    axis: int,
) -> Tensor:
    """``[R, h, w, C]`` -> ``[R, h, Ty]`` (axis 0) or ``[R, w, Tx]`` (axis 1): the gradient to the weights of an axis."""
    y, x = AxisTaps(y_cell, other_weight), AxisTaps(x_cell, other_weight)  # only the other axis's weights are read
    return weight_grad(grad, rows, chosen, images, list(sizes), y, x, axis)


@_separable.register_fake
def _(rows, chosen, images, sizes, y_cell, y_weight, x_cell, x_weight):
    return rows.new_empty((chosen.shape[0], y_cell.shape[1], x_cell.shape[1], rows.shape[1]))


@_separable_adjoint.register_fake
def _(grad, chosen, images, sizes, y_cell, y_weight, x_cell, x_weight):
    cells = images * sum(height * width for height, width in zip(sizes[::2], sizes[1::2], strict=True))
    return grad.new_empty((cells, grad.shape[3]))


@_separable_weight_grad.register_fake
def _(grad, rows, chosen, images, sizes, y_cell, x_cell, other_weight, axis):
    return other_weight.new_empty((y_cell if axis == 0 else x_cell).shape)


def _keep_operands(ctx, inputs, output):
    values, chosen, images, sizes, y_cell, y_weight, x_cell, x_weight = inputs
    ctx.save_for_backward(values, chosen, y_cell, y_weight, x_cell, x_weight)
    ctx.images, ctx.sizes = images, list(sizes)


def _separable_backward(ctx, grad):
    rows, chosen, y_cell, y_weight, x_cell, x_weight = ctx.saved_tensors
    ops, maps = torch.ops.detpipe, (chosen, ctx.images, ctx.sizes)
    to_rows, _, _, _, _, to_y, _, to_x = ctx.needs_input_grad
    grad = grad.contiguous()
    grads = [None] * 8
    if to_rows:
        grads[0] = ops.separable_adjoint(grad, *maps, y_cell, y_weight, x_cell, x_weight).to(rows.dtype)
    if to_y:
        grads[5] = ops.separable_weight_grad(grad, rows, *maps, y_cell, x_cell, x_weight, 0)
    if to_x:
        grads[7] = ops.separable_weight_grad(grad, rows, *maps, y_cell, x_cell, y_weight, 1)
    return tuple(grads)


def _adjoint_backward(ctx, grad_rows):
    grad, chosen, y_cell, y_weight, x_cell, x_weight = ctx.saved_tensors
    ops, maps = torch.ops.detpipe, (chosen, ctx.images, ctx.sizes)
    to_grad, _, _, _, _, to_y, _, to_x = ctx.needs_input_grad
    grad_rows = grad_rows.contiguous()
    grads = [None] * 8
    if to_grad:
        grads[0] = ops.separable(grad_rows, *maps, y_cell, y_weight, x_cell, x_weight).to(grad.dtype)
    if to_y:
        grads[5] = ops.separable_weight_grad(grad, grad_rows, *maps, y_cell, x_cell, x_weight, 0)
    if to_x:
        grads[7] = ops.separable_weight_grad(grad, grad_rows, *maps, y_cell, x_cell, y_weight, 1)
    return tuple(grads)


def _keep_weight_grad(ctx, inputs, output):
    grad, rows, chosen, images, sizes, y_cell, x_cell, other_weight, axis = inputs
    ctx.save_for_backward(grad, rows, chosen, y_cell, x_cell, other_weight)
    ctx.images, ctx.sizes, ctx.axis = images, list(sizes), axis


def _weight_grad_backward(ctx, grad_weight):
    grad, rows, chosen, y_cell, x_cell, other = ctx.saved_tensors
    ops, maps = torch.ops.detpipe, (chosen, ctx.images, ctx.sizes)
    to_grad, to_rows, _, _, _, _, _, to_other, _ = ctx.needs_input_grad
    y_weight, x_weight = (grad_weight, other) if ctx.axis == 0 else (other, grad_weight)
    taps = (y_cell, y_weight.contiguous(), x_cell, x_weight.contiguous())
    grads = [None] * 9
    if to_grad:
        grads[0] = ops.separable(rows, *maps, *taps).to(grad.dtype)
    if to_rows:
        grads[1] = ops.separable_adjoint(grad, *maps, *taps).to(rows.dtype)
    if to_other:
        grads[7] = ops.separable_weight_grad(grad, rows, *maps, y_cell, x_cell, grad_weight.contiguous(), 1 - ctx.axis)
    return tuple(grads)


_separable.register_autograd(_separable_backward, setup_context=_keep_operands)
_separable_adjoint.register_autograd(_adjoint_backward, setup_context=_keep_operands)
_separable_weight_grad.register_autograd(_weight_grad_backward, setup_context=_keep_weight_grad)


def _register_vmap(registered: Operator, call: Callable[..., Tensor], chosen_at: int) -> None:
    """Under vmap the maps of the vmapped calls are further levels, and their boxes further boxes."""

    def folded(info, in_dims, *args):
        images, sizes = args[chosen_at + 1 : chosen_at + 3]
        folded = fold(info, in_dims, args, {chosen_at: images * len(sizes) // 2})
        folded[chosen_at + 2] = list(sizes) * info.batch_size
        return unfold(call(*folded), info), 0

    registered.register_vmap(folded)


_register_vmap(_separable, torch.ops.detpipe.separable, 1)
_register_vmap(_separable_adjoint, torch.ops.detpipe.separable_adjoint, 1)
_register_vmap(_separable_weight_grad, torch.ops.detpipe.separable_weight_grad, 2)

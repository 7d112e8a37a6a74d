"""Pooling whose weights are a product of one along y and one along x, and everything that its gradients need.

    out[r, i, j, c] = sum over cells (y, x) of  weight_y[r, i, y] * weight_x[r, j, x] * map[r][y, x, c]

The sum of products of the result with a gradient is linear in each of four tensors: gradient, map, weights along y, weights
along x. What follows from three of them, the derivative in the fourth, is one operator: pooling is the derivative in the
gradient, its transpose that in the map. The derivatives of these derivatives are the same four again, to any order.

They are PyTorch's own kernels, in :mod:`detpipe.roi_pooling.torch_separable`: what CPUs run, and what is left of RoIAlign
where kernels read the boxes themselves (:mod:`detpipe.roi_pooling.mean_ops`), the second derivative in the boxes.

R boxes, h x w bins, Ty and Tx cells a bin along each axis, C channels, T cells of all maps.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from detpipe.roi_pooling.axis import AxisTaps
from detpipe.roi_pooling.maps import CellTable
from detpipe.roi_pooling.operators import fold, operator, unfold
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
    return _separable(
        None, table.rows, y.weight.to(exact), x.weight.to(exact), chosen, table.images, sizes, y.cell, x.cell
    )


@operator("separable")
def _separable(
    grad: Tensor | None,
    rows: Tensor | None,
    y_weight: Tensor | None,
    x_weight: Tensor | None,
    chosen: Tensor,
    images: int,
    sizes: Sequence[int],
    y_cell: Tensor,
    x_cell: Tensor,
) -> Tensor:
    """The one of ``[R, h, w, C]``, ``[T, C]``, ``[R, h, Ty]`` and ``[R, w, Tx]`` that is None, from the others."""
    where = (chosen, images, list(sizes))
    if y_weight is None or x_weight is None:  # only the other axis's weights are read
        axis, other = (0, x_weight) if y_weight is None else (1, y_weight)
        assert grad is not None
        assert rows is not None
        assert other is not None
        return weight_grad(grad, rows, *where, AxisTaps(y_cell, other), AxisTaps(x_cell, other), axis)
    y, x = AxisTaps(y_cell, y_weight), AxisTaps(x_cell, x_weight)
    if rows is not None:
        return pool(rows, *where, y, x)
    assert grad is not None
    return pool_adjoint(grad, *where, y, x)


@_separable.register_fake
def _(grad, rows, y_weight, x_weight, chosen, images, sizes, y_cell, x_cell):
    if grad is None:
        return rows.new_empty((chosen.shape[0], y_cell.shape[1], x_cell.shape[1], rows.shape[1]))
    if rows is None:
        cells = images * sum(height * width for height, width in zip(sizes[::2], sizes[1::2], strict=True))
        return grad.new_empty((cells, grad.shape[3]))
    return x_weight.new_empty(y_cell.shape) if y_weight is None else y_weight.new_empty(x_cell.shape)


_separable.register_multilinear(4)


@_separable.register_vmap
def _(info, in_dims, *args):
    """The maps of the vmapped calls are further levels, and their boxes further boxes."""
    images, sizes = args[5:7]
    folded = fold(info, in_dims, args, {4: images * len(sizes) // 2})
    folded[6] = list(sizes) * info.batch_size
    return unfold(_separable(*folded), info), 0

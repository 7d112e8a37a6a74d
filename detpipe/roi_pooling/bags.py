"""Weighted sums of gathered rows, and everything that their gradients need.

    bag_sum:          out[b] = sum of weight[k] * rows[index[k]] over the entries k of bag b
    bag_sum_adjoint:  out[t] = sum of weight[k] * grad[bag of k] over the entries k with index[k] = t
    bag_dot:          out[k] = <grad[bag of k], rows[index[k]]>

Each is linear in each of its arguments, and the gradients of each are the other two, so that the three are closed under
differentiation to any order. Sums are taken in a fixed order, without atomics, and nothing of the size of entries times
channels is ever made.

T rows of C channels, B bags, K entries; a table of bags may be written ``[*shape, C]``. Bag b holds the entries
``offsets[b]`` to ``offsets[b + 1] - 1``; the first offset is 0 and the last K. Indices are in 0..T - 1. Half and bfloat16
rows are computed in float32.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from detpipe.roi_pooling.backend import kernels_for
from detpipe.roi_pooling.operators import operator, stack

BLOCK_BYTES = {"cpu": 1 << 20}  # of a buffer of gathered rows: on a CPU it stays in the cache
LARGE_BLOCK_BYTES = 1 << 26  # elsewhere: enough to fill a GPU
CHANNELS = 64  # of a gradient that are laid out at once, where channels are not last


def sum_bags(rows: Tensor, index: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    """Sum weighted rows, bag by bag, with PyTorch's own kernels; not differentiable.

    Args:
        rows: ``[T, C]``.
        index: ``[K]`` int64, a row an entry.
        weight: ``[K]``.
        offsets: ``[B + 1]`` int64.

    Returns:
        ``[B, C]`` in the dtype of ``rows``.
    """
    if not index.shape[0] or not rows.shape[1] or offsets.shape[0] == 1:
        return rows.new_zeros((offsets.shape[0] - 1, rows.shape[1]))
    exact = _exact(rows)
    result = embedding_bag(
        index, exact, offsets, mode="sum", per_sample_weights=weight.detach().to(exact.dtype), include_last_offset=True
    )
    return result.to(rows.dtype)


def transpose_bags(index: Tensor, weight: Tensor, bag_of: Tensor, rows: int) -> tuple[Tensor, Tensor, Tensor]:
    """Make a bag of each row: the entries that read it, in the order in which they stand.

    Args:
        index: ``[K]`` int64, a row an entry.
        weight: ``[K]``.
        bag_of: ``[K]`` int64, the bag of each entry.
        rows: T.

    Returns:
        ``[K]`` bags, ``[K]`` weights and ``[T + 1]`` offsets: index, weight and offsets of the transposed sum.
    """
    key, order = torch.sort(index.to(_smallest_integer(rows)), stable=True)
    ends = torch.arange(rows + 1, device=index.device).to(key.dtype)
    return bag_of[order], weight[order], torch.searchsorted(key, ends)


def sum_bags_adjoint(grad: Tensor, index: Tensor, weight: Tensor, bag_of: Tensor, rows: int) -> Tensor:
    """Send each bag's gradient back to the rows that it was summed from; not differentiable.

    Args:
        grad: ``[B, C]``.
        index: ``[K]`` int64, a row an entry.
        weight: ``[K]``.
        bag_of: ``[K]`` int64, the bag of each entry, in any order.
        rows: T.

    Returns:
        ``[T, C]`` in the dtype of ``grad``.
    """
    return sum_bags(grad, *transpose_bags(index, weight, bag_of, rows))


def _by_channels(grad: Tensor, entries: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """Sum rows of a gradient ``[*shape, C]`` in any order of memory, without a copy of all of it."""
    channels = grad.shape[-1]
    if grad.is_contiguous() or channels <= CHANNELS:
        return sum_bags(grad.flatten(0, -2), *entries)
    total = grad.new_empty((entries[2].shape[0] - 1, channels))
    for part, some in zip(total.split(CHANNELS, dim=1), grad.split(CHANNELS, dim=-1), strict=True):
        part.copy_(sum_bags(some.flatten(0, -2), *entries))
    return total


def dot_bags(grad: Tensor, rows: Tensor, index: Tensor, bag_of: Tensor) -> Tensor:
    """Multiply each entry's row with its bag's gradient, summed over channels; not differentiable.

    Args:
        grad: ``[B, C]``.
        rows: ``[T, C]``.
        index: ``[K]`` int64, a row an entry.
        bag_of: ``[K]`` int64, the bag of each entry, ascending.

    Returns:
        ``[K]``, in float32 at least.
    """
    if not _has_sampled_product(grad, rows, index):
        return _dot_blocks(grad, rows, index, bag_of)
    bags = torch.arange(grad.shape[0] + 1, device=bag_of.device)
    return _dot_sampled(grad, rows, index, torch.searchsorted(bag_of, bags))


def bag_of_entries(offsets: Tensor, entries: int) -> Tensor:
    """Tell each entry its bag.

    Args:
        offsets: ``[B + 1]`` int64.
        entries: K.

    Returns:
        ``[K]`` int64.
    """
    bags = torch.arange(offsets.shape[0] - 1, device=offsets.device)
    return torch.repeat_interleave(bags, offsets.diff(), output_size=entries)


def _exact(values: Tensor) -> Tensor:
    return values.detach().to(torch.promote_types(values.dtype, torch.float32)).contiguous()


def _smallest_integer(count: int) -> torch.dtype:
    """The sort of 800,000 keys takes 4.5 ms as int16, 9 ms as int32, 17 ms as int64."""
    return next(dtype for dtype in (torch.int16, torch.int32, torch.int64) if count <= torch.iinfo(dtype).max)


def _has_sampled_product(grad: Tensor, rows: Tensor, index: Tensor) -> bool:
    """Whether there is a sparse matrix for the entries: PyTorch's hold no more than a full matrix of B x T would."""
    return grad.device.type == "cpu" and index.shape[0] <= grad.shape[0] * rows.shape[0]


@cache
def use_sparse_csr() -> None:
    """Take the one notice that PyTorch gives of the beta state of its CSR tensors, so that no user has to."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        empty = torch.zeros(1, dtype=torch.int64)
        torch.sparse_csr_tensor(empty, empty[:0], empty[:0], size=(0, 1), check_invariants=False)


def _dot_sampled(grad: Tensor, rows: Tensor, index: Tensor, offsets: Tensor) -> Tensor:
    """The product of ``grad`` and transposed ``rows`` where there is an entry: 6 times as fast as by blocks on a CPU."""
    use_sparse_csr()
    grad, rows = _exact(grad), _exact(rows)
    if not index.shape[0] or not grad.shape[1]:
        return grad.new_zeros(index.shape[0])
    pattern = torch.sparse_csr_tensor(
        offsets,
        index,
        grad.new_zeros(index.shape[0]),
        size=(grad.shape[0], rows.shape[0]),
        check_invariants=False,  # entries of a bag are in any order and may be equal
    )
    return torch.sparse.sampled_addmm(pattern, grad, rows.t(), beta=0.0).values()


def _dot_blocks(grad: Tensor, rows: Tensor, index: Tensor, bag_of: Tensor) -> Tensor:
    """The same by blocks of gathered rows, whose two buffers are used again and again."""
    grad, rows = _exact(grad), _exact(rows)
    entries, channels = index.shape[0], grad.shape[1]
    result = grad.new_zeros(entries)
    row_bytes = max(1, channels * grad.element_size())
    block = min(entries, max(1, BLOCK_BYTES.get(grad.device.type, LARGE_BLOCK_BYTES) // row_bytes))
    left, right = grad.new_empty((block, channels)), grad.new_empty((block, channels))
    for begin in range(0, entries, max(1, block)):
        part = slice(begin, min(entries, begin + block))
        size = part.stop - begin
        torch.index_select(grad, 0, bag_of[part], out=left[:size])
        torch.index_select(rows, 0, index[part], out=right[:size])
        torch.sum(left[:size].mul_(right[:size]), dim=1, out=result[part])
    return result


@operator("bag_sum")
def _bag_sum(
    rows: Tensor, index: Tensor, weight: Tensor, offsets: Tensor, shape: Sequence[int] | None = None
) -> Tensor:
    """``[T, C]`` -> ``[B, C]``, or ``[*shape, C]`` where there is a shape, of B bags in all."""
    if kernels_for(rows) == "triton":
        from detpipe.roi_pooling.cuda import bags as kernels

        total = kernels.bag_sum(rows, index, weight, offsets)
    else:
        total = sum_bags(rows, index, weight, offsets)
    return total if shape is None else total.view(*shape, rows.shape[1])


@operator("bag_sum_adjoint")
def _bag_sum_adjoint(grad: Tensor, index: Tensor, weight: Tensor, offsets: Tensor, rows: int) -> Tensor:
    """``[*shape, C]`` -> ``[T, C]``."""
    entries = transpose_bags(index, weight, bag_of_entries(offsets, index.shape[0]), rows)
    if kernels_for(grad) == "triton":
        from detpipe.roi_pooling.cuda import bags as kernels

        return kernels.bag_sum(grad.flatten(0, -2), *entries)
    return _by_channels(grad, entries)


@operator("bag_dot")
def _bag_dot(grad: Tensor, rows: Tensor, index: Tensor, offsets: Tensor) -> Tensor:
    """``[*shape, C]``, ``[T, C]`` -> ``[K]``."""
    grad = grad.flatten(0, -2)
    if kernels_for(grad) == "triton":
        from detpipe.roi_pooling.cuda import bags as kernels

        return kernels.bag_dot(grad, rows, index, offsets)
    if _has_sampled_product(grad, rows, index):
        return _dot_sampled(grad, rows, index, offsets)
    return _dot_blocks(grad, rows, index, bag_of_entries(offsets, index.shape[0]))


@_bag_sum.register_fake
def _(rows, index, weight, offsets, shape=None):
    return rows.new_empty((*((offsets.shape[0] - 1,) if shape is None else shape), rows.shape[1]))


@_bag_sum_adjoint.register_fake
def _(grad, index, weight, offsets, rows):
    return grad.new_empty((rows, grad.shape[-1]))


@_bag_dot.register_fake
def _(grad, rows, index, offsets):
    return grad.new_empty(index.shape[0], dtype=torch.promote_types(grad.dtype, torch.float32))


def _keep(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:4])


def _sum_backward(ctx, out):
    rows, index, weight, offsets = ctx.saved_tensors
    to_rows, _, to_weight, *rest = ctx.needs_input_grad  # without the shape where it was not given
    adjoint, dot = torch.ops.detpipe.bag_sum_adjoint, torch.ops.detpipe.bag_dot
    return (
        adjoint(out, index, weight, offsets, rows.shape[0]).to(rows.dtype) if to_rows else None,
        None,
        dot(out, rows, index, offsets).to(weight.dtype) if to_weight else None,
        *(None for _ in rest),
    )


def _adjoint_backward(ctx, out):
    grad, index, weight, offsets = ctx.saved_tensors
    to_grad, _, to_weight, _, _ = ctx.needs_input_grad
    return (
        torch.ops.detpipe.bag_sum(out, index, weight, offsets, grad.shape[:-1]).to(grad.dtype) if to_grad else None,
        None,
        torch.ops.detpipe.bag_dot(grad, out, index, offsets).to(weight.dtype) if to_weight else None,
        None,
        None,
    )


def _dot_backward(ctx, out):
    grad, rows, index, offsets = ctx.saved_tensors
    to_grad, to_rows, _, _ = ctx.needs_input_grad
    return (
        torch.ops.detpipe.bag_sum(rows, index, out, offsets, grad.shape[:-1]).to(grad.dtype) if to_grad else None,
        torch.ops.detpipe.bag_sum_adjoint(grad, index, out, offsets, rows.shape[0]).to(rows.dtype) if to_rows else None,
        None,
        None,
    )


_bag_sum.register_autograd(_sum_backward, setup_context=_keep)
_bag_sum_adjoint.register_autograd(_adjoint_backward, setup_context=_keep)
_bag_dot.register_autograd(_dot_backward, setup_context=_keep)


def _shift(stacked: Tensor, by: int) -> Tensor:
    return stacked + by * torch.arange(stacked.shape[0], device=stacked.device)[:, None]


def _join_offsets(offsets: Tensor, entries: int) -> Tensor:
    """``[V, B + 1]`` -> ``[V * B + 1]``."""
    return torch.cat((offsets[0, :1], _shift(offsets[:, 1:], entries).flatten()))


@_bag_sum.register_vmap
def _(info, in_dims, *args):
    rows, index, weight, offsets = (stack(info, arg, dim) for arg, dim in zip(args[:4], in_dims[:4], strict=True))
    shape = args[4] if len(args) > 4 and args[4] is not None else [offsets.shape[1] - 1]
    index = _shift(index, rows.shape[1])
    offsets = _join_offsets(offsets, index.shape[1])
    shape = [info.batch_size * shape[0], *shape[1:]]
    result = torch.ops.detpipe.bag_sum(rows.flatten(0, 1), index.flatten(), weight.flatten(), offsets, shape)
    return result.unflatten(0, (info.batch_size, -1)), 0


@_bag_sum_adjoint.register_vmap
def _(info, in_dims, *args):
    grad, index, weight, offsets = (stack(info, arg, dim) for arg, dim in zip(args[:4], in_dims[:4], strict=True))
    rows, offsets = args[4], _join_offsets(offsets, index.shape[1])
    index = _shift(index, rows).flatten()
    total = torch.ops.detpipe.bag_sum_adjoint(
        grad.flatten(0, 1), index, weight.flatten(), offsets, rows * info.batch_size
    )
    return total.unflatten(0, (info.batch_size, rows)), 0


@_bag_dot.register_vmap
def _(info, in_dims, *args):
    grad, rows, index, offsets = (stack(info, arg, dim) for arg, dim in zip(args, in_dims, strict=True))
    index = _shift(index, rows.shape[1])
    offsets = _join_offsets(offsets, index.shape[1])
    result = torch.ops.detpipe.bag_dot(grad.flatten(0, 1), rows.flatten(0, 1), index.flatten(), offsets)
    return result.unflatten(0, (info.batch_size, -1)), 0

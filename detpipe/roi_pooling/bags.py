"""Weighted sums of gathered rows, and everything that their gradients need.

    bag_sum:          out[b] = sum of weight[k] * rows[index[k]] over the entries k of bag b
    bag_sum_adjoint:  out[t] = sum of weight[k] * grad[bag of k] over the entries k with index[k] = t
    bag_dot:          out[k] = <grad[bag of k], rows[index[k]]>

The sum of products of the result with a gradient is linear in rows, weights and gradient, and each of the three is its derivative
in one of these; so one operator computes all of them, and their gradients to any order. Sums are taken in a fixed order, without
atomics, and nothing of the size of entries times channels is ever made.

T rows of C channels, B bags, K entries. Everywhere ``index`` is the row of each entry, ``weight`` and ``bag_of`` its weight and
its bag, all ``[K]``; whole numbers are int64. A table of bags may be written ``[*shape, C]``. Bag b holds the entries
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
from detpipe.roi_pooling.operators import fold, operator, stack, unfold

BLOCK_BYTES = {"cpu": 1 << 20}  # of a buffer of gathered rows: on a CPU it stays in the cache
LARGE_BLOCK_BYTES = 1 << 26  # elsewhere: enough to fill a GPU
CHANNELS = 64  # of a gradient that are laid out at once, where channels are not last


def sum_bags(rows: Tensor, index: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    """Sum weighted rows ``[T, C]``, bag by bag, to ``[B, C]`` of the same type with PyTorch's own kernels; has no gradient."""
    if not index.shape[0] or not rows.shape[1] or offsets.shape[0] == 1:
        return rows.new_zeros((offsets.shape[0] - 1, rows.shape[1]))
    exact = _exact(rows)
    result = embedding_bag(
        index, exact, offsets, mode="sum", per_sample_weights=weight.detach().to(exact.dtype), include_last_offset=True
    )
    return result.to(rows.dtype)


def transpose_bags(index: Tensor, weight: Tensor, bag_of: Tensor, rows: int) -> tuple[Tensor, Tensor, Tensor]:
    """Make a bag of each of T rows, of the entries that read it, in order: index, weight and offsets of the transposed sum."""
    key, order = torch.sort(index.to(_smallest_integer(rows)), stable=True)
    ends = torch.arange(rows + 1, device=index.device).to(key.dtype)
    return bag_of[order], weight[order], torch.searchsorted(key, ends)


def sum_bags_adjoint(grad: Tensor, index: Tensor, weight: Tensor, bag_of: Tensor, rows: int) -> Tensor:
    """Send each bag's gradient ``[B, C]`` back to the T rows that it was summed from; has no gradient."""
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
    """Multiply each entry's row with its bag's gradient, to ``[K]``, float32 at least; has no gradient, ``bag_of`` ascends."""
    if not _has_sampled_product(grad, rows, index):
        return _dot_blocks(grad, rows, index, bag_of)
    bags = torch.arange(grad.shape[0] + 1, device=bag_of.device)
    return _dot_sampled(grad, rows, index, torch.searchsorted(bag_of, bags))


def bag_of_entries(offsets: Tensor, entries: int) -> Tensor:
    """Tell each entry its bag: ``[K]`` int64."""
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


def bag_sum(rows: Tensor, index: Tensor, weight: Tensor, offsets: Tensor, shape: Sequence[int] | None = None) -> Tensor:
    """``[T, C]`` -> ``[B, C]``, or ``[*shape, C]`` where there is a shape, of B bags in all."""
    return _bag(None, rows, weight, index, offsets, rows.shape[0], [offsets.shape[0] - 1] if shape is None else shape)


def bag_sum_adjoint(grad: Tensor, index: Tensor, weight: Tensor, offsets: Tensor, rows: int) -> Tensor:
    """``[*shape, C]`` -> ``[T, C]``."""
    return _bag(grad, None, weight, index, offsets, rows, grad.shape[:-1])


def bag_dot(grad: Tensor, rows: Tensor, index: Tensor, offsets: Tensor) -> Tensor:
    """``[*shape, C]``, ``[T, C]`` -> ``[K]``, in float32 at least."""
    return _bag(grad, rows, None, index, offsets, rows.shape[0], grad.shape[:-1])


@operator("bag")
def _bag(
    grad: Tensor | None,
    rows: Tensor | None,
    weight: Tensor | None,
    index: Tensor,
    offsets: Tensor,
    cells: int,
    shape: Sequence[int],
) -> Tensor:
    """The one of ``[*shape, C]``, ``[T, C]`` and ``[K]`` that is None, from the others."""
    has_kernels = kernels_for(index) == "triton"
    if has_kernels:
        from detpipe.roi_pooling.cuda import bags as kernels
    if weight is not None and rows is not None:
        total = (kernels.bag_sum if has_kernels else sum_bags)(rows, index, weight, offsets)
        return total.view(*shape, rows.shape[1])
    assert grad is not None
    if weight is not None:
        entries = transpose_bags(index, weight, bag_of_entries(offsets, index.shape[0]), cells)
        return kernels.bag_sum(grad.flatten(0, -2), *entries) if has_kernels else _by_channels(grad, entries)
    assert rows is not None
    grad = grad.flatten(0, -2)
    if has_kernels:
        return kernels.bag_dot(grad, rows, index, offsets)
    if _has_sampled_product(grad, rows, index):
        return _dot_sampled(grad, rows, index, offsets)
    return _dot_blocks(grad, rows, index, bag_of_entries(offsets, index.shape[0]))


@_bag.register_fake
def _(grad, rows, weight, index, offsets, cells, shape):
    if grad is None:
        return rows.new_empty((*shape, rows.shape[1]))
    if rows is None:
        return grad.new_empty((cells, grad.shape[-1]))
    return grad.new_empty(index.shape[0], dtype=torch.promote_types(grad.dtype, torch.float32))


_bag.register_multilinear(3)


@_bag.register_vmap
def _(info, in_dims, *args):
    """The rows and the bags of the vmapped calls are behind one another."""
    *folded, _, cells, shape = fold(info, in_dims, args, {3: args[5]})
    calls, index, offsets = info.batch_size, folded[3], stack(info, args[4], in_dims[4])
    shift = len(index) // calls * torch.arange(calls, device=index.device)[:, None]
    joined = torch.cat((offsets[0, :1], (offsets[:, 1:] + shift).flatten()))
    return unfold(_bag(*folded, joined, cells * calls, [calls * shape[0], *shape[1:]]), info), 0

"""Weighted sums of gathered rows as Triton kernels; :mod:`detpipe.roi_pooling.bags` says what they compute.

One program owns a bag and a block of channels, and takes its entries a fixed number at a time, in order: nothing is written
twice, and every sum is taken in the same order each time.

T rows of C channels, B bags, K entries.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from detpipe.roi_pooling.cuda.geometry import accumulator, channel_block, launch

ENTRIES = 16  # rows that are on their way at once


def bag_sum(rows: Tensor, index: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    """Sum weighted rows, bag by bag.

    Args:
        rows: ``[T, C]``, float16, bfloat16, float32 or float64.
        index: ``[K]`` int64, a row an entry.
        weight: ``[K]``.
        offsets: ``[B + 1]`` int64, where the entries of each bag begin.

    Returns:
        ``[B, C]`` in the dtype of ``rows``; an empty bag gives 0. Accumulated in float32, or float64 for float64.
    """
    bags, channels = offsets.shape[0] - 1, rows.shape[1]
    out = rows.new_empty((bags, channels))
    if out.numel():
        block, warps = channel_block(channels, 128, rows, ENTRIES)
        launch(
            _sum_kernel,
            (bags, triton.cdiv(channels, block)),
            *(rows.contiguous(), index.contiguous(), weight.contiguous(), offsets.contiguous(), out, channels),
            ACC=accumulator(rows.dtype),
            ENTRIES=ENTRIES,
            BLOCK=block,
            num_warps=warps,
        )
    return out


def bag_dot(grad: Tensor, rows: Tensor, index: Tensor, offsets: Tensor) -> Tensor:
    """Multiply each gathered row with the vector of its bag.

    Args:
        grad: ``[B, C]``, a vector a bag.
        rows: ``[T, C]``.
        index: ``[K]`` int64, a row an entry.
        offsets: ``[B + 1]`` int64, where the entries of each bag begin.

    Returns:
        ``[K]`` inner products, float32, or float64 for float64.
    """
    bags, channels = grad.shape
    exact = torch.promote_types(grad.dtype, torch.float32)
    out = torch.zeros(index.shape[0], dtype=exact, device=grad.device)
    if out.numel() and bags and channels:
        block, warps = channel_block(channels, 128, rows, ENTRIES)
        launch(
            _dot_kernel,
            (bags,),
            *(grad.contiguous(), rows.contiguous(), index.contiguous(), offsets.contiguous(), out, channels),
            ACC=accumulator(exact),
            ENTRIES=ENTRIES,
            BLOCK=block,
            num_warps=warps,
        )
    return out


@triton.jit
def _sum_kernel(
    rows, index, weight, offsets, out, channels,
    ACC: tl.constexpr, ENTRIES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program: one bag, a block of channels."""
    bag = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    begin, end = tl.load(offsets + bag), tl.load(offsets + bag + 1)
    total = tl.zeros([ENTRIES, BLOCK], ACC)
    for start in range(begin, end, ENTRIES):
        entry = start + tl.arange(0, ENTRIES)
        row = tl.load(index + entry, mask=entry < end, other=0)
        share = tl.load(weight + entry, mask=entry < end, other=0.0).to(ACC)
        exists = (entry < end)[:, None] & (c < channels)[None, :]
        value = tl.load(rows + row[:, None] * channels + c[None, :], mask=exists, other=0.0)
        total += share[:, None] * value.to(ACC)
    tl.store(out + bag * channels + c, tl.sum(total, 0).to(out.dtype.element_ty), mask=c < channels)


@triton.jit
def _dot_kernel(
    grad, rows, index, offsets, out, channels,
    ACC: tl.constexpr, ENTRIES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program: one bag, all of its entries."""
    bag = tl.program_id(0).to(tl.int64)
    begin, end = tl.load(offsets + bag), tl.load(offsets + bag + 1)
    for start in range(begin, end, ENTRIES):
        entry = start + tl.arange(0, ENTRIES)
        row = tl.load(index + entry, mask=entry < end, other=0)
        total = tl.zeros([ENTRIES, BLOCK], ACC)
        for begin_channel in range(0, channels, BLOCK):
            c = begin_channel + tl.arange(0, BLOCK)
            exists = (entry < end)[:, None] & (c < channels)[None, :]
            value = tl.load(rows + row[:, None] * channels + c[None, :], mask=exists, other=0.0)
            vector = tl.load(grad + bag * channels + c, mask=c < channels, other=0.0)
            total += value.to(ACC) * vector.to(ACC)[None, :]
        tl.store(out + entry, tl.sum(total, 1).to(out.dtype.element_ty), mask=entry < end)

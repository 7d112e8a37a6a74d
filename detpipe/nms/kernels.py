"""Non-maximum suppression as two Triton kernels.

The first tells for each box which later ones it overlaps, a bit each, 32 to a word. The second goes through each row of boxes, 32
at a time: it settles these among themselves, and strikes out what those that are kept overlap.

B rows of M boxes, W words for M bits.
"""

# Triton annotates its functions as they are on the host; compiled, its loops and tensors are something else.
# pyright: reportOperatorIssue=false, reportAttributeAccessIssue=false, reportCallIssue=false, reportGeneralTypeIssues=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BITS = 32


def keep_best(boxes: Tensor, groups: Tensor | None, iou: float) -> Tensor:
    """Say which boxes are kept; see :func:`detpipe.nms.keep_best`."""
    rows, count = boxes.shape[:2]
    kept = torch.zeros((rows, count), dtype=torch.bool, device=boxes.device)
    if not kept.numel():
        return kept
    boxes = boxes.contiguous()
    words = triton.cdiv(count, BITS)
    overlaps = torch.empty((rows, count, words), dtype=torch.int32, device=boxes.device)
    labels = kept if groups is None else groups.contiguous()
    most = boxes.new_full((1,), iou, dtype=torch.float64)  # a number would be passed on in float32
    with torch.cuda.device_of(boxes):
        _overlap_kernel[(words, words, rows)](
            boxes, labels, overlaps, most, count, words, GROUPED=groups is not None, BITS=BITS, num_warps=2
        )
        block = triton.next_power_of_2(words)
        _sweep_kernel[(rows,)](boxes, overlaps, kept, count, words, BITS=BITS, BLOCK=block, num_warps=4)
    return kept


@triton.jit
def _corners(boxes, at, exists):
    """The edges of boxes, zeros where there are none."""
    x1, y1 = tl.load(boxes + at * 4, mask=exists, other=0.0), tl.load(boxes + at * 4 + 1, mask=exists, other=0.0)
    x2, y2 = tl.load(boxes + at * 4 + 2, mask=exists, other=0.0), tl.load(boxes + at * 4 + 3, mask=exists, other=0.0)
    return x1, y1, x2, y2


@triton.jit(do_not_specialize=["count", "words"])
def _overlap_kernel(
    boxes, groups, overlaps, most, count, words,
    GROUPED: tl.constexpr, BITS: tl.constexpr,
):  # fmt: skip
    """One program: 32 boxes of a row, and the 32 of a word, which come later."""
    word, block, row = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    bit = tl.arange(0, BITS)
    own, other = block * BITS + bit, word * BITS + bit
    bits = tl.zeros([BITS], tl.int32)
    if word >= block:
        x1, y1, x2, y2 = _corners(boxes, row * count + own, own < count)
        a1, b1, a2, b2 = _corners(boxes, row * count + other, other < count)
        width = tl.minimum(x2[:, None], a2[None, :]) - tl.maximum(x1[:, None], a1[None, :])
        height = tl.minimum(y2[:, None], b2[None, :]) - tl.maximum(y1[:, None], b1[None, :])
        shared = tl.where((width > 0) & (height > 0), width * height, 0.0)
        union = ((x2 - x1) * (y2 - y1))[:, None] + ((a2 - a1) * (b2 - b1))[None, :] - shared
        solid = ((x2 > x1) & (y2 > y1))[:, None] & ((a2 > a1) & (b2 > b1))[None, :]
        overlap = (shared / tl.where(solid, union, 1.0)).to(tl.float64)
        drops = solid & (own[:, None] < other[None, :]) & (overlap > tl.load(most))
        if GROUPED:
            mine = tl.load(groups + row * count + own, mask=own < count, other=-1)
            its = tl.load(groups + row * count + other, mask=other < count, other=-1)
            drops = drops & (mine[:, None] == its[None, :])
        bits = tl.sum(tl.where(drops, (tl.full([BITS], 1, tl.int32) << bit)[None, :], 0), 1)
    tl.store(overlaps + (row * count + own) * words + word, bits, mask=own < count)


@triton.jit
def _either(first, second):
    return first | second


@triton.jit(do_not_specialize=["count", "words"])
def _sweep_kernel(boxes, overlaps, kept, count, words, BITS: tl.constexpr, BLOCK: tl.constexpr):
    """One program: a row of boxes."""
    row = tl.program_id(0).to(tl.int64)
    bit, word = tl.arange(0, BITS), tl.arange(0, BLOCK)
    dropped = tl.zeros([BLOCK], tl.int32)
    for block in range(words):
        alive = ~tl.sum(tl.where(word == block, dropped, 0), 0)
        for k in tl.static_range(BITS):
            at = block * BITS + k
            overlapped = tl.load(overlaps + (row * count + at) * words + block, mask=at < count, other=0)
            alive = tl.where(((alive >> k) & 1) != 0, alive & ~overlapped, alive)
        own = block * BITS + bit
        lives = ((alive >> bit) & 1) != 0
        x1, y1, x2, y2 = _corners(boxes, row * count + own, own < count)
        tl.store(kept + row * count + own, lives & (x2 > x1) & (y2 > y1), mask=own < count)
        wanted = (lives & (own < count))[:, None] & (word < words)[None, :]
        later = tl.load(overlaps + (row * count + own)[:, None] * words + word[None, :], mask=wanted, other=0)
        dropped = dropped | tl.reduce(later, 0, _either)

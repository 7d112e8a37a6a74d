"""What a region proposal network is trained on: which anchors are objects, and which of them enter the loss.

Ren et al., "Faster R-CNN", 2015, arXiv 1506.01497, sections 3.1.2 and 3.1.3: an anchor is positive if its IoU with an object
is at least .7, or the highest of all anchors with that object; negative if its best IoU is below .3; 256 of an image are drawn.

Deviations:
1. Anchors that cross the image's border, or lie in the padding of the batch, take part like all others, as in torchvision.
2. An anchor that is not positive is ignored where it overlaps a difficult object (VOC) or lies inside a crowd region (COCO).
3. An object that no anchor touches makes no anchor positive (in torchvision it makes every anchor without overlap so).

An anchor's left and right edge are those of its column, top and bottom those of its row. So the shared area of all anchors
with an object is an outer product of widths and heights, and IoU need not be computed: with s = shared / (area + area),
IoU = s / (1 - s), which rises with s. Equal overlaps are equal up to rounding, a relative ``ROUNDING``.

N images, G ground truths of the fullest image, P anchors of an image, S of them sampled; A shapes a cell, H x W cells.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from detpipe import boxes as box_ops
from detpipe import matching
from detpipe.matching import GroundTruth
from detpipe.proposals.anchors import AnchorGrid
from detpipe.support.numbers import check_numbers, check_whole
from detpipe.types import Target

ROUNDING = 5e-7
BLOCK = {"cpu": 2**20}  # overlaps computed at a time, which stay in the cache of a CPU ...
LARGE_BLOCK = 2**27  # ... and elsewhere: bounds memory when there are many objects
WEIGHTS = (1.0, 1.0, 1.0, 1.0)  # of the deltas: those of a proposal network are not scaled


@dataclass(frozen=True)
class AnchorTargets:
    """The anchors of a training step, a fixed number S of each image, positives first."""

    index: Tensor  # [N, S] int64 into the P anchors of all levels
    valid: Tensor  # [N, S] bool, False where an image has fewer (the index is then 0)
    positive: Tensor  # [N, S] bool
    deltas: Tensor  # [N, S, 4] from the anchor to its object, 0 where not positive


@dataclass(frozen=True)
class RPNObjective:
    """How anchors are matched and sampled, and how their boxes are compared.

    Args:
        anchors_per_image: S, how many anchors of each image are trained on.
        positive_fraction: at most this part of them is positive.
        positive_iou: an anchor is positive from this IoU with an object on.
        negative_iou: an anchor is negative if its best IoU is below this.
        allow_low_quality: the anchors with the highest IoU with an object are positive, however low that is.
        ignore_overlap: an anchor is ignored from this IoU with a difficult object, or part inside a crowd region, on.
        beta: where smooth L1 of the deltas turns from quadratic to linear.

    Raises:
        ValueError: a number outside its range.
    """

    anchors_per_image: int = 256
    positive_fraction: float = 0.5
    positive_iou: float = 0.7
    negative_iou: float = 0.3
    allow_low_quality: bool = True
    ignore_overlap: float = 0.5
    beta: float = 1 / 9

    def __post_init__(self) -> None:
        check_whole(anchors_per_image=self.anchors_per_image)
        check_numbers("must be in 0..1", positive_fraction=self.positive_fraction, negative_iou=self.negative_iou)
        check_numbers("must be in 0..1, above 0", positive_iou=self.positive_iou, ignore_overlap=self.ignore_overlap)
        check_numbers("must not be negative or infinite", beta=self.beta)
        if self.negative_iou > self.positive_iou:
            raise ValueError(f"negative_iou must not exceed positive_iou {self.positive_iou}, got {self.negative_iou}")

    @torch.no_grad()
    def __call__(self, grids: Sequence[AnchorGrid], anchors: Tensor, targets: Sequence[Target]) -> AnchorTargets:
        """Match and sample.

        Args:
            grids: the anchors of each level.
            anchors: the same anchors written out, ``[P, 4]``.
            targets: N targets in the same frame.

        Returns:
            S anchors of each image.
        """
        truth = matching.gather_targets(targets)
        positive, negative = self.assign(grids, truth)
        index, valid = sample(positive, negative, self.anchors_per_image, self.positive_fraction)
        chosen = positive.gather(1, index) & valid
        if index.shape[1] == 0 or truth.boxes.shape[1] == 0:
            return AnchorTargets(index, valid, chosen, anchors.new_zeros((*index.shape, 4)))
        references = anchors[index]
        boxes = truth.boxes.float()
        overlaps = box_ops.iou(references, boxes).masked_fill(~truth.valid[:, None], -1.0)  # [N, S, G]
        wanted = box_ops.take(boxes, overlaps.argmax(-1))
        # what is not positive is compared with itself: log() stays finite
        wanted = torch.where(chosen[..., None], wanted, references)
        return AnchorTargets(index, valid, chosen, box_ops.encode(wanted, references, WEIGHTS))

    @torch.no_grad()
    def assign(self, grids: Sequence[AnchorGrid], truth: GroundTruth) -> tuple[Tensor, Tensor]:
        """Say which anchors are objects.

        Args:
            grids: the anchors of each level.
            truth: the objects of the batch.

        Returns:
            positive and negative ``[N, P]`` bool, disjoint; what is neither is ignored.
        """
        overlaps = _Overlaps(grids, truth)
        best = overlaps.best()
        positive = best >= _share(self.positive_iou) * (1 - ROUNDING)
        negative = best < _share(self.negative_iou) * (1 - ROUNDING)
        if self.allow_low_quality and truth.boxes.shape[1]:
            positive |= overlaps.is_closest()
        if truth.any_ignored:
            negative &= ~overlaps.ignored(self.ignore_overlap)
        return positive, negative & ~positive


class _Overlaps:
    """How the anchors overlap the objects. The columns W of all levels lie side by side, and so do their rows H."""

    def __init__(self, grids: Sequence[AnchorGrid], truth: GroundTruth) -> None:
        self.boxes, self.truth = truth.boxes.float(), truth
        self.rows, self.columns = ([grid.size[axis] for grid in grids] for axis in (0, 1))
        self.x = _shared(_joined([grid.x for grid in grids], 1), self.boxes[..., 0::2])  # [N, G, A, W] pixels
        self.y = _shared(_joined([grid.y for grid in grids], 1), self.boxes[..., 1::2])  # [N, G, A, H]
        x, y = (
            torch.stack([edges[:, 0] for edges in level]) for level in zip(*((g.x, g.y) for g in grids), strict=True)
        )
        area = (x[..., 1] - x[..., 0]) * (y[..., 1] - y[..., 0])  # [L, A]
        self.area = self._spread(list(area.unsqueeze(-1)), self.columns)  # [A, W]
        self.areas = box_ops.area(self.boxes)[..., None, None] + self.area  # [N, G, A, W]
        self.share = self.x * _inverse(self.areas, truth.valid)  # times y: shared / (area + area)

    def best(self) -> Tensor:
        """Find the highest shared / (area + area) of each anchor with an object that counts: ``[N, P]``."""
        return self._of_anchors(_highest_product, self.y, self.share)

    def is_closest(self) -> Tensor:
        """Find the anchors whose overlap with some object is the highest of all with it, if above 0: ``[N, P]`` bool."""
        widest = [level.amax(-1, keepdim=True) for level in self.share.split(self.columns, -1)]  # L of [N, G, A, 1]
        highest = [level.amax(-1, keepdim=True) for level in self.y.split(self.rows, -1)]
        peak = _joined(widest, -1) * _joined(highest, -1)  # [N, G, A, L]
        least = peak.amax((-2, -1), keepdim=True).clamp(min=torch.finfo(peak.dtype).tiny) * (1 - 2 * ROUNDING)
        attained = list((peak >= least).unsqueeze(-2).unbind(-1))
        row = self.y >= self._spread(highest, self.rows) * (1 - ROUNDING)
        row &= self._spread(attained, self.rows)
        column = self.share >= self._spread(widest, self.columns) * (1 - ROUNDING)
        return self._of_anchors(_objects_in_both, row.float(), column.float()) > 0

    def ignored(self, overlap: float) -> Tensor:
        """Find the anchors inside crowd regions or on difficult objects: ``[N, P]`` bool."""
        inside = _inverse(self.area.expand_as(self.areas), self.truth.crowd) / overlap
        upon = _inverse(self.areas, self.truth.difficult) / _share(overlap)
        return self._of_anchors(_highest_product, self.y, self.x * (inside + upon)) >= 1 - ROUNDING

    def _spread(self, levels: Sequence[Tensor], counts: Sequence[int]) -> Tensor:
        """Repeat a value a level, ``[..., 1]`` each, for its rows or columns."""
        wide = [level.expand(*level.shape[:-1], count) for level, count in zip(levels, counts, strict=True)]
        return _joined(wide, -1)

    def _of_anchors(self, product: Callable[[Tensor, Tensor], Tensor], y: Tensor, x: Tensor) -> Tensor:
        """Let a product of rows and columns say something about each anchor: ``[N, P]``."""
        levels = zip(y.split(self.rows, -1), x.split(self.columns, -1), strict=True)
        # [N, A, H, W] -> [N, H * W * A]
        return _joined([product(*level).permute(0, 2, 3, 1).flatten(1) for level in levels], 1)


def sample(positive: Tensor, negative: Tensor, size: int, positive_fraction: float) -> tuple[Tensor, Tensor]:
    """Draw a fixed number of anchors of each image at random, without sorting all of them.

    Args:
        positive: ``[N, P]`` bool.
        negative: ``[N, P]`` bool, disjoint from it.
        size: how many to draw of each image; S = min(size, P).
        positive_fraction: at most this part of ``size`` is positive; negatives fill the rest.

    Returns:
        ``[N, S]`` int64 indices into P, positives first, and ``[N, S]`` bool, False where an image has fewer.
    """
    images, anchors = positive.shape
    count = min(size, anchors)
    noise = torch.rand((images, anchors), device=positive.device)
    values, index = noise.where(positive, noise.new_full((), -1.0)).topk(min(int(size * positive_fraction), anchors))
    drawn = values >= 0
    others, other_index = noise.where(negative, noise.new_full((), -1.0)).topk(count)
    room = size - drawn.sum(1, keepdim=True)
    fills = (others >= 0) & (torch.arange(count, device=room.device) < room)
    drawn, index = torch.cat((drawn, fills), dim=1), torch.cat((index, other_index), dim=1)
    front = drawn.byte().argsort(dim=1, descending=True, stable=True)[:, :count]
    valid = drawn.gather(1, front)
    return index.gather(1, front).masked_fill(~valid, 0), valid


def _share(iou: float) -> float:
    """IoU -> shared / (area + area)."""
    return iou / (1 + iou)


def _shared(edges: Tensor, others: Tensor) -> Tensor:
    """``[A, W, 2]`` and ``[N, G, 2]`` -> ``[N, G, A, W]``, the shared length."""
    others = others[:, :, None, None]
    low, high = torch.maximum(edges[..., 0], others[..., 0]), torch.minimum(edges[..., 1], others[..., 1])
    return (high - low).clamp_(min=0)


def _inverse(areas: Tensor, wanted: Tensor) -> Tensor:
    """``[N, G, A, W]`` and ``[N, G]`` bool -> ``[N, G, A, W]``: 1 / area where wanted, else 0."""
    return wanted[..., None, None] / areas


def _joined(levels: Sequence[Tensor], dim: int) -> Tensor:
    return levels[0] if len(levels) == 1 else torch.cat(list(levels), dim=dim)


def _objects_in_both(row: Tensor, column: Tensor) -> Tensor:
    """``[N, G, A, H]`` and ``[N, G, A, W]`` of 0 and 1 -> ``[N, A, H, W]``, for how many of the G both are 1."""
    return torch.matmul(row.permute(0, 2, 3, 1), column.permute(0, 2, 1, 3))


def _highest_product(y: Tensor, x: Tensor) -> Tensor:
    """``[N, G, A, H]`` and ``[N, G, A, W]``, at least 0 -> ``[N, A, H, W]``, the highest of the G outer products."""
    images, objects, shapes, height = y.shape
    size = images * shapes * height * x.shape[-1]
    step = max(1, BLOCK.get(y.device.type, LARGE_BLOCK) // max(1, size))
    highest = None
    for start in range(0, objects, step):
        part = slice(start, start + step)
        products = y[:, part, ..., None] * x[:, part, :, None]
        best = products.amax(1) if step > 1 else products[:, 0]
        highest = best if highest is None else torch.maximum(highest, best, out=highest)
    return y.new_zeros((images, shapes, height, x.shape[-1])) if highest is None else highest

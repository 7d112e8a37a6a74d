"""Detections in views of one image, some of which cut objects: each object once.

Akyon, Altinuc and Temizel, "Slicing Aided Hyper Inference", 2022, arXiv 2202.06934, section 3; Solovyev, Wang and Gabruseva,
"Weighted boxes fusion", 2021, arXiv 1910.13302.

Deviations from SAHI:
1. It merges every pair of boxes of which one covers half of the smaller. Here only boxes that end at an inner border of their view
   are treated so, since they alone can be parts: a small object before a large one of its class stays.
2. Two parts of one object, cut at facing borders of two views that overlap, become the box around both if they agree on what both
   views see. SAHI finds such an object only where some view holds the whole of it.

D detections of all views of an image.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from detpipe import boxes as box_ops
from detpipe.heads.suppression import box_fusion
from detpipe.nms import keep_best
from detpipe.types import Detection

Method = Literal["nms", "box_fusion"]
_NEAR = 0.01  # of the side of a view: a box that ends so close to its border is cut there
_AGREE = 0.5  # IoU of two parts of one object, where both views see it
_INSIDE = 0.7  # share of a cut box that lies in a larger one, of which it is a part then
_CREDIBLE = 0.5  # that larger one's score is at least so much of the cut one's
_PAIRS = 1 << 22  # of boxes that are compared at a time


@dataclass(frozen=True)
class Merge:
    """How detections of several views become those of one image.

    Args:
        method: ``nms`` drops a box that overlaps a better one of its class; ``box_fusion`` takes their mean, weighted with scores.
        iou: boxes of one class with a higher IoU are of one object.

    Raises:
        ValueError: another method, or an IoU outside (0, 1].
    """

    method: Method = "nms"
    iou: float = 0.5

    def __post_init__(self) -> None:
        if self.method not in get_args(Method) or not 0 < self.iou <= 1:
            raise ValueError(f"expected method {' or '.join(get_args(Method))} and iou in (0, 1], got {self}")

    def __call__(self, found: Sequence[Detection], views: Sequence[tuple[int, int, int, int]]) -> Detection:
        """Merge what was found in the views of one image.

        Args:
            found: detections of V views, in pixels of the whole image.
            views: x1, y1, x2, y2 of each in the whole image.

        Returns:
            The detections of the image, best first.
        """
        boxes, scores, labels = (torch.cat([one[key] for one in found]) for key in ("boxes", "scores", "labels"))
        zones = torch.tensor(views, dtype=boxes.dtype, device=boxes.device)
        limits = torch.cat([zones[:, :2].amin(0), zones[:, 2:].amax(0)])
        inner = zones != limits  # [V, 4]: sides at which the image goes on
        counts = torch.tensor([len(one["scores"]) for one in found], device=boxes.device)
        zones, inner = zones.repeat_interleave(counts, dim=0), inner.repeat_interleave(counts, dim=0)
        near = _NEAR * (zones[:, 2:] - zones[:, :2]).repeat(1, 2)
        parts = _Parts(boxes, scores, labels, zones, inner & ((boxes - zones).abs() <= near))
        parts = _without_parts_of_others(_joined(parts))
        return self._merged(parts.boxes, parts.scores, parts.labels)

    def _merged(self, boxes: Tensor, scores: Tensor, labels: Tensor) -> Detection:
        order = scores.argsort(descending=True, stable=True)
        boxes, scores, labels = boxes[order], scores[order], labels[order]
        if self.method == "box_fusion" and len(boxes):
            fused = box_fusion(boxes[None], scores[None], labels[None], torch.ones_like(labels[None]) > 0, self.iou)
            return Detection(boxes=fused.boxes[0], scores=fused.scores[0], labels=fused.labels[0])
        keep = keep_best(boxes.double()[None], self.iou, labels[None])[0]
        return Detection(boxes=boxes[keep], scores=scores[keep], labels=labels[keep])


class _Parts(NamedTuple):
    boxes: Tensor  # [D, 4]
    scores: Tensor  # [D]
    labels: Tensor  # [D]
    zones: Tensor  # [D, 4] of the view of each
    cut: Tensor  # [D, 4] bool: whether the view ends at this side, and the object may go on

    def take(self, rows: Tensor) -> _Parts:
        return _Parts(*(values[rows] for values in self))


def _joined(parts: _Parts) -> _Parts:
    """Put the box around parts of one object in their place, with the best score of them."""
    rows = parts.cut.any(1).nonzero()[:, 0]
    groups = _groups(_pairs(parts.take(rows)), len(rows))
    if not groups:
        return parts
    whole = []
    for group in groups:
        own = parts.take(rows[torch.tensor(group, device=rows.device)])
        around = torch.cat([own.boxes[:, :2].amin(0), own.boxes[:, 2:].amax(0)])
        zone = torch.cat([own.zones[:, :2].amin(0), own.zones[:, 2:].amax(0)])
        cut = (own.cut & (own.zones == zone)).any(0)
        best = own.scores.max()
        whole.append(_Parts(around[None], best[None], own.labels[:1], zone[None], cut[None]))
    keep = torch.ones(len(parts.scores), dtype=torch.bool, device=rows.device)
    keep[rows[torch.tensor([row for group in groups for row in group], device=rows.device)]] = False
    return _Parts(*map(torch.cat, zip(parts.take(keep), *whole, strict=True)))


def _pairs(parts: _Parts) -> list[tuple[int, int]]:
    """Rows of two parts of one object, each cut where the view of the other goes on."""
    pairs: list[tuple[int, int]] = []
    everything = torch.arange(len(parts.scores), device=parts.scores.device)
    for some in everything.split(_rows_at_a_time(len(everything))):
        one = parts.take(some)
        facing = (one.cut[:, None, [0, 1, 2, 3]] & parts.cut[None, :, [2, 3, 0, 1]]).any(-1)
        possible = facing & (one.labels[:, None] == parts.labels) & (box_ops.intersection(one.boxes, parts.boxes) > 0)
        mine, other = possible.nonzero(as_tuple=True)
        seen = _within(one.zones[mine], parts.zones[other])
        a, b = _within(one.boxes[mine], seen), _within(parts.boxes[other], seen)
        shared = box_ops.area(_within(a, b))
        agree = shared > _AGREE * (box_ops.area(a) + box_ops.area(b) - shared)
        pairs += zip(some[mine[agree]].tolist(), other[agree].tolist(), strict=True)
    return pairs


def _rows_at_a_time(others: int) -> int:
    return max(1, _PAIRS // max(1, others))


def _within(boxes: Tensor, others: Tensor) -> Tensor:
    """What each of ``[M, 4]`` shares with its other, turned inside out where that is nothing."""
    return torch.cat([torch.maximum(boxes[:, :2], others[:, :2]), torch.minimum(boxes[:, 2:], others[:, 2:])], dim=1)


def _groups(pairs: Sequence[tuple[int, int]], count: int) -> list[list[int]]:
    """The rows that pairs connect, where they connect any."""
    root = list(range(count))

    def find(row: int) -> int:
        while root[row] != row:
            root[row] = row = root[root[row]]
        return row

    for one, other in pairs:
        root[find(other)] = find(one)
    groups: dict[int, list[int]] = {}
    for row in range(count):
        groups.setdefault(find(row), []).append(row)
    return [group for group in groups.values() if len(group) > 1]


def _without_parts_of_others(parts: _Parts) -> _Parts:
    """Leave out cut boxes most of which lies in a larger box of their class from another view."""
    rows = parts.cut.any(1).nonzero()[:, 0]
    keep = torch.ones(len(parts.scores), dtype=torch.bool, device=rows.device)
    for some in rows.split(_rows_at_a_time(len(keep))):
        own = parts.take(some)
        larger = box_ops.area(parts.boxes) > box_ops.area(own.boxes)[:, None]
        elsewhere = (own.zones[:, None] != parts.zones).any(-1)
        credible = parts.scores >= _CREDIBLE * own.scores[:, None]
        same = own.labels[:, None] == parts.labels
        inside = box_ops.coverage(own.boxes, parts.boxes) > _INSIDE
        keep[some] = ~(larger & elsewhere & credible & same & inside).any(1)
    return parts.take(keep)

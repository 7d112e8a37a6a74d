"""What else than non-maximum suppression becomes of boxes that overlap: their scores fall, or they become one.

Bodla et al., "Soft-NMS: Improving Object Detection With One Line of Code", 2017, arXiv 1704.04503, equation 3; Solovyev, Wang and
Gabruseva, "Weighted boxes fusion", 2021, arXiv 1910.13302, section 3.

Both run on the whole batch: a step takes one box of every image.

Deviations:
1. The score of a fused box is the highest of its members where they come from one detector, whose boxes are no independent votes.

N images, M candidates of an image, best first, D detections.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from detpipe import boxes as box_ops


class Kept(NamedTuple):
    """What is left of the candidates, best first; a score of -1 where an image has fewer."""

    boxes: Tensor  # [N, D, 4] xyxy
    scores: Tensor  # [N, D]
    labels: Tensor  # [N, D]
    index: Tensor  # [N, D] int64: the candidate that it was, or the best of those that became it


def soft_nms(boxes: Tensor, scores: Tensor, labels: Tensor, keep: Tensor, sigma: float, count: int) -> Kept:
    """Take the best box again and again, and lower the scores of others of its class by how much they overlap it.

    Args:
        boxes: ``[N, M, 4]`` xyxy.
        scores: ``[N, M]`` in 0..1.
        labels: ``[N, M]`` int64.
        keep: ``[N, M]`` bool, False for candidates that are none.
        sigma: a score is multiplied with ``exp(-IoU^2 / sigma)``.
        count: D, take so many.

    Returns:
        The best ``min(D, M)`` boxes of each image with their lowered scores.

    Example:
        >>> boxes = torch.tensor([[[0.0, 0.0, 2.0, 2.0], [0.0, 0.0, 2.0, 1.0]]])
        >>> one = torch.ones(1, 2, dtype=torch.int64)
        >>> soft_nms(boxes, torch.tensor([[0.9, 0.8]]), one, one > 0, 0.5, 2).scores  # .8 exp(-.25 / .5)
        tensor([[0.9000, 0.4852]])
    """
    scores, taken = scores.masked_fill(~keep, -1.0), []
    for _ in range(min(count, boxes.shape[1])):
        score, index = scores.max(dim=1, keepdim=True)  # [N, 1]
        taken.append((score, index))
        best = box_ops.take(boxes, index)
        overlap = box_ops.iou(boxes, best)[..., 0] * (labels == labels.gather(1, index))  # [N, M]
        scores = torch.where(scores > 0, scores * torch.exp(-(overlap**2) / sigma), scores).scatter(1, index, -1.0)
    if not taken:
        return Kept(boxes, scores, labels, labels)
    score, index = (torch.cat(values, dim=1) for values in zip(*taken, strict=True))
    return Kept(box_ops.take(boxes, index), score, labels.gather(1, index), index)


def box_fusion(
    boxes: Tensor, scores: Tensor, labels: Tensor, keep: Tensor, iou: float, detectors: int | None = None
) -> Kept:
    """Let boxes of one class that overlap become one: their mean, weighted with their scores.

    Each candidate, best first, joins the fused box that it overlaps most, or starts one.

    Args:
        boxes: ``[N, M, 4]`` xyxy.
        scores: ``[N, M]`` in 0..1, descending.
        labels: ``[N, M]`` int64.
        keep: ``[N, M]`` bool, False for candidates that are none.
        iou: candidates join a fused box above this IoU with it.
        detectors: how many detectors the candidates come from, whose mean the score is: one that found nothing counts as 0.
            None for one, the score is then the highest.

    Returns:
        The fused boxes, at most M.

    Example:
        >>> boxes = torch.tensor([[[0.0, 0.0, 2.0, 2.0], [0.0, 0.0, 2.0, 3.0]]])
        >>> one = torch.ones(1, 2, dtype=torch.int64)
        >>> box_fusion(boxes, torch.tensor([[0.6, 0.4]]), one, one > 0, 0.5).boxes
        tensor([[[0.0000, 0.0000, 2.0000, 2.4000]]])
    """
    order = (~keep).to(torch.uint8).argsort(dim=1, stable=True)  # candidates first, best first
    most = int(keep.sum(1).max()) if keep.numel() else 0
    order = order[:, :most]
    boxes = box_ops.take(boxes, order)
    scores, labels, keep = (values.gather(1, order) for values in (scores, labels, keep))
    total = torch.zeros_like(boxes)  # of weighted corners
    weight, members = torch.zeros_like(scores), torch.zeros_like(scores)
    label, first = torch.zeros_like(labels), torch.zeros_like(labels)
    used = torch.zeros(len(boxes), 1, dtype=torch.int64, device=boxes.device)
    for step in range(most):
        box, score, mine = boxes[:, step : step + 1], scores[:, step : step + 1], labels[:, step : step + 1]
        overlap = box_ops.iou(_mean(total, weight), box)[..., 0].masked_fill((label != mine) | (weight == 0), -1.0)
        value, best = overlap.max(dim=1, keepdim=True)
        counts, joins = keep[:, step : step + 1], value > iou
        where = torch.where(joins, best, used.clamp(max=most - 1))
        added = score.clamp(min=torch.finfo(score.dtype).tiny) * counts  # of scores of 0, the mean is the plain one
        total = total.scatter_add(1, where[..., None].expand(-1, -1, 4), box * added[..., None])
        weight, members = weight.scatter_add(1, where, added), members.scatter_add(1, where, counts.to(scores.dtype))
        starts = counts & ~joins
        label = label.scatter(1, where, torch.where(starts, mine, label.gather(1, where)))
        first = first.scatter(1, where, torch.where(starts, step, first.gather(1, where)))
        used = used + starts
    score = scores.gather(1, first)
    if detectors is not None:
        score = weight / members.clamp(min=1) * (members / detectors).clamp(max=1)
    score, best = score.masked_fill(members == 0, -1.0).sort(dim=1, descending=True, stable=True)
    count = int(used.max()) if most else 0
    score, best = score[:, :count], best[:, :count]
    return Kept(
        box_ops.take(_mean(total, weight), best), score, label.gather(1, best), order.gather(1, first.gather(1, best))
    )


def _mean(total: Tensor, weight: Tensor) -> Tensor:
    """``[N, M, 4]`` by ``[N, M]``, which may be as small as scores are."""
    return total / weight.clamp(min=torch.finfo(weight.dtype).tiny)[..., None]

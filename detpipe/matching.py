"""Which proposal is which object: batched IoU assignment and fixed-size sampling, without a copy to the host.

Girshick, "Fast R-CNN", 2015, arXiv 1504.08083, section 2.3: a RoI is foreground if its IoU with an object is at least
.5, background if its best IoU lies in [.1, .5); a quarter of those sampled are foreground.

Deviations:
1. The lower bound of background is an argument and 0 by default, as in Faster R-CNN, where proposals are not curated.
2. Proposals mostly inside a crowd region (COCO) or overlapping a difficult object (VOC) are neither.
3. Batches are padded to fixed sizes and masked, so that nothing waits for the device.

N images, P proposals an image, G ground truths of the fullest image, S RoIs sampled an image.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from detpipe import boxes as box_ops
from detpipe.types import Target


@dataclass(frozen=True)
class GroundTruth:
    """The objects of a batch, padded to the fullest image."""

    boxes: Tensor  # [N, G, 4]
    labels: Tensor  # [N, G] in 1..K, 0 where padded
    valid: Tensor  # [N, G] bool: an object to be found
    crowd: Tensor  # [N, G] bool: a region of many objects
    difficult: Tensor  # [N, G] bool: an object that does not count
    any_ignored: bool = True  # False where there is certainly neither a crowd nor a difficult object


@dataclass(frozen=True)
class Assignment:
    """What each proposal is."""

    foreground: Tensor  # [N, P] bool
    background: Tensor  # [N, P] bool; what is neither is ignored
    matched: Tensor  # [N, P] int64, index of the object with the highest IoU (0 where there is none)
    overlap: Tensor  # [N, P] IoU with that object


def pad(rows: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Stack tensors of unequal length.

    Args:
        rows: N tensors ``[P_i, ...]``, one at least.

    Returns:
        ``[N, P, ...]`` with the longest P_i, filled with zeros, and ``[N, P]`` bool, True where a row has an entry.
    """
    [padded], present = _pad_alike([rows])
    return padded, present


def _pad_alike(columns: Sequence[Sequence[Tensor]]) -> tuple[list[Tensor], Tensor]:
    """Pad several lists of N tensors, whose lengths are those of the first list: in as many operations for any N."""
    lengths = [len(row) for row in columns[0]]
    images, most, device = len(lengths), max(lengths), columns[0][0].device
    if min(lengths) == most:
        stacked = [torch.stack(list(rows)) for rows in columns]
        return stacked, torch.ones((images, most), dtype=torch.bool, device=device)
    sizes, place = torch.tensor(lengths)[:, None], torch.arange(most)
    present = place < sizes
    index = torch.where(present, sizes.cumsum(0) - sizes + place, sum(lengths))  # what is absent: the zeros at the end
    index, present = (values.to(device, non_blocking=True) for values in (index, present))
    zeros = [rows[0].new_zeros((1, *rows[0].shape[1:])) for rows in columns]
    return [torch.cat((*rows, zero))[index] for rows, zero in zip(columns, zeros, strict=True)], present


def gather_targets(targets: Sequence[Target]) -> GroundTruth:
    """Pack the objects of a batch.

    Args:
        targets: N targets with ``boxes`` and ``labels``; ``iscrowd`` and ``difficult`` are False where absent.

    Returns:
        Padded tensors, boxes in float32 at least.

    Raises:
        ValueError: a target lacks ``boxes`` or ``labels``, or they differ in length.
    """
    boxes_of, labels_of = [], []
    for index, target in enumerate(targets):
        if "boxes" not in target or "labels" not in target:
            raise ValueError(f"targets[{index}] needs 'boxes' and 'labels' in training, got {sorted(target)}")
        boxes, labels = target["boxes"], target["labels"]
        if boxes.shape != (len(labels), 4):
            raise ValueError(
                f"targets[{index}]: boxes must be [G, 4] and labels [G], "
                f"got {list(boxes.shape)} and {list(labels.shape)}"
            )
        boxes_of.append(boxes.to(torch.promote_types(boxes.dtype, torch.float32)))
        labels_of.append(labels)
    flagged = any("iscrowd" in target or "difficult" in target for target in targets)
    flags = [
        [_flags(target, name, labels) for target, labels in zip(targets, labels_of, strict=True)]
        for name in ("iscrowd", "difficult")
        if flagged
    ]
    (boxes, labels, *found), present = _pad_alike([boxes_of, labels_of, *flags])
    if not flagged:
        none = torch.zeros_like(present)
        return GroundTruth(boxes, labels, present, none, none, any_ignored=False)
    crowd, difficult = found
    ignored = crowd | difficult
    # a look costs nothing on a CPU; elsewhere it waits for the device
    maybe = not ignored.is_cpu or bool(ignored.any())
    return GroundTruth(boxes, labels, present & ~ignored, crowd, difficult & ~crowd, maybe)


def check_objects(targets: Sequence[Target], num_classes: int) -> None:
    """Refuse objects with labels outside 1..K or boxes that are not finite, on the CPU only, where a look costs nothing.

    Raises:
        ValueError: there is one that counts: its image and box are named.
    """
    for index, target in enumerate(targets):
        labels = target.get("labels")
        if labels is None or not labels.is_cpu:
            continue
        counts = ~(_flags(target, "iscrowd", labels) | _flags(target, "difficult", labels))
        for box in (counts & ((labels < 1) | (labels > num_classes))).nonzero()[:1, 0].tolist():
            raise ValueError(f"targets[{index}], box {box}: label {int(labels[box])}, expected 1..{num_classes}")
        boxes = target.get("boxes")
        if boxes is not None and len(boxes) == len(labels):
            for box in (counts & ~boxes.isfinite().all(-1)).nonzero()[:1, 0].tolist():
                raise ValueError(f"targets[{index}], box {box}: expected finite numbers, got {boxes[box].tolist()}")


def _flags(target: Target, name: str, labels: Tensor) -> Tensor:
    return target[name].bool() if name in target else torch.zeros_like(labels, dtype=torch.bool)


def assign(
    proposals: Tensor,
    present: Tensor,
    truth: GroundTruth,
    positive_iou: float = 0.5,
    negative_iou: tuple[float, float] = (0.0, 0.5),
    ignore_overlap: float = 0.5,
) -> Assignment:
    """Match proposals with objects.

    Args:
        proposals: ``[N, P, 4]`` xyxy.
        present: ``[N, P]`` bool, False for padding.
        truth: the objects, in the same frame.
        positive_iou: a proposal is foreground from this IoU on.
        negative_iou: a proposal is background if its best IoU lies in [low, high).
        ignore_overlap: a proposal that is not foreground is ignored from this IoU with a difficult object on, or
            with this part of its area inside a crowd region.

    Returns:
        Masks and the matched object of each proposal.
    """
    if truth.boxes.shape[1] == 0:
        none = torch.zeros_like(present)
        low = negative_iou[0] <= 0
        overlap = proposals.new_zeros(present.shape)
        return Assignment(none, present & low, torch.zeros_like(present, dtype=torch.int64), overlap)
    overlaps = box_ops.iou(proposals, truth.boxes)  # [N, P, G]
    overlap, matched = overlaps.masked_fill(~truth.valid[:, None], -1.0).max(dim=-1)
    foreground = present & (overlap >= positive_iou)
    overlap = overlap.clamp(min=0)
    low, high = negative_iou
    background = present & ~foreground & (overlap < high)
    if low > 0:
        background &= overlap >= low
    if truth.any_ignored:
        in_crowd = box_ops.coverage(proposals, truth.boxes).masked_fill(~truth.crowd[:, None], 0.0).amax(-1)
        on_difficult = overlaps.masked_fill(~truth.difficult[:, None], 0.0).amax(-1)
        background &= (in_crowd < ignore_overlap) & (on_difficult < ignore_overlap)
    return Assignment(foreground, background, matched, overlap)


def sample(
    foreground: Tensor,
    background: Tensor,
    size: int,
    positive_fraction: float,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """Draw a fixed number of proposals of each image at random, foreground first.

    Args:
        foreground: ``[N, P]`` bool.
        background: ``[N, P]`` bool, disjoint from it.
        size: S, how many to draw of each image.
        positive_fraction: at most this part of S is foreground; background fills the rest.
        generator: source of randomness on the masks' device; torch's own by default.

    Returns:
        ``[N, S]`` int64 indices into P, foreground before background, and ``[N, S]`` bool, False where an image has
        fewer proposals than S (the index is then 0).
    """
    images, count = foreground.shape
    noise = torch.rand((images, count), generator=generator, device=foreground.device)
    order = torch.argsort(noise.masked_fill(~foreground, 2.0), dim=1)
    rank = torch.empty_like(order).scatter_(1, order, torch.arange(count, device=order.device).expand_as(order))
    drawn = foreground & (rank < int(size * positive_fraction))
    keys = torch.where(drawn, noise + 1.0, torch.where(background, noise, -1.0))
    best, indices = keys.topk(min(size, count), dim=1)
    chosen = best >= 0
    if count < size:
        indices = torch.nn.functional.pad(indices, (0, size - count))
        chosen = torch.nn.functional.pad(chosen, (0, size - count))
    return indices.masked_fill(~chosen, 0), chosen

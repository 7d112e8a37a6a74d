"""Which proposals a head is trained on, and what it shall say about each."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from detpipe import boxes as box_ops
from detpipe import matching
from detpipe.support.numbers import check_numbers, check_whole
from detpipe.types import Target


@dataclass(frozen=True)
class RoITargets:
    """The RoIs of a training step, a fixed number S for each of N images."""

    rois: Tensor  # [N, S, 4] xyxy, a unit box where not valid
    labels: Tensor  # [N, S] int64, 0 for background
    boxes: Tensor  # [N, S, 4] the matched object's box (its own box for background)
    valid: Tensor  # [N, S] bool, False where an image has fewer than S
    foreground: Tensor  # [N, S] bool

    def first(self, size: int) -> RoITargets:
        """Keep the first RoIs of each image, where the foreground is: ``[N, min(size, S)]``."""
        return RoITargets(*(value[:, :size] for value in vars(self).values()))

    def cycled(self) -> Tensor:
        """The RoIs, where valid ones stand in, in turn, for those that are not: what norms of a batch may see."""
        order = self.valid.byte().argsort(dim=1, descending=True, stable=True)
        turn = torch.arange(self.valid.shape[1], device=order.device) % self.valid.sum(1, keepdim=True).clamp(min=1)
        return torch.where(self.valid[..., None], self.rois, box_ops.take(self.rois, order.gather(1, turn)))

    def repeated(self, times: int) -> RoITargets:
        """Put the RoIs of each image behind one another, several times: ``[N, times S]``."""
        return RoITargets(*(value.repeat(1, times, *(1,) * (value.ndim - 2)) for value in vars(self).values()))


@dataclass(frozen=True)
class RoISampler:
    """How RoIs are matched and sampled in training (Fast R-CNN, section 2.3).

    Args:
        rois_per_image: S, how many RoIs of each image are trained on.
        positive_fraction: at most this part of them is foreground.
        positive_iou: a proposal is foreground from this IoU with an object on.
        negative_iou: a proposal is background if its best IoU lies in [low, high).
        ignore_overlap: a proposal is ignored from this IoU with a difficult object, or part inside a crowd region, on.
        add_ground_truth: train on the boxes of the objects too.

    Raises:
        ValueError: a number outside its range.
    """

    rois_per_image: int = 128
    positive_fraction: float = 0.25
    positive_iou: float = 0.5
    negative_iou: tuple[float, float] = (0.0, 0.5)
    ignore_overlap: float = 0.5
    add_ground_truth: bool = True

    def __post_init__(self) -> None:
        check_whole(rois_per_image=self.rois_per_image)
        check_numbers("must be in 0..1", positive_fraction=self.positive_fraction, positive_iou=self.positive_iou)
        check_numbers("must be in 0..1", negative_iou=self.negative_iou)
        check_numbers("must be positive and finite", ignore_overlap=self.ignore_overlap)  # above 1: never
        ious = (*self.negative_iou, self.positive_iou)
        if len(ious) != 3 or sorted(ious) != [*ious]:
            raise ValueError(
                "expected 0 <= negative_iou[0] <= negative_iou[1] <= positive_iou <= 1, got "
                f"negative_iou {self.negative_iou} and positive_iou {self.positive_iou}"
            )

    @torch.no_grad()
    def __call__(self, proposals: list[Tensor], targets: list[Target]) -> RoITargets:
        """Match and sample.

        Args:
            proposals: N tensors ``[P_i, 4]`` xyxy.
            targets: N targets in the same frame.

        Returns:
            S RoIs of each image.
        """
        truth = matching.gather_targets(targets)
        boxes, present = matching.pad(proposals)
        boxes = boxes.to(truth.boxes.dtype)
        if self.add_ground_truth:
            boxes = torch.cat((boxes, truth.boxes), dim=1)
            present = torch.cat((present, truth.valid), dim=1)
        present = present & box_ops.valid(boxes)
        if boxes.shape[1] == 0:  # one that is not there, so that there is one to take
            boxes, present = boxes.new_zeros((len(boxes), 1, 4)), present.new_zeros((len(boxes), 1))
        found = matching.assign(boxes, present, truth, self.positive_iou, self.negative_iou, self.ignore_overlap)
        index, valid = matching.sample(found.foreground, found.background, self.rois_per_image, self.positive_fraction)
        # where an image has too few, index 0 stands in, which may be a box that is not valid
        rois, foreground = box_ops.fill(box_ops.take(boxes, index), valid), found.foreground.gather(1, index) & valid
        return _about(rois, valid, foreground, found.matched.gather(1, index), truth)

    @torch.no_grad()
    def rematch(self, rois: Tensor, valid: Tensor, targets: list[Target], positive_iou: float) -> RoITargets:
        """Match moved RoIs anew, all of them, without sampling: the later stages of a cascade.

        Args:
            rois: ``[N, S, 4]`` xyxy, finite; those without an area take no part.
            valid: ``[N, S]`` bool.
            targets: N targets in the same frame.
            positive_iou: a RoI is foreground from this IoU with an object on, and else background unless it is ignored.

        Returns:
            The same RoIs.
        """
        truth = matching.gather_targets(targets)
        valid = valid & box_ops.valid(rois)
        rois = box_ops.fill(rois.to(truth.boxes.dtype), valid)
        found = matching.assign(rois, valid, truth, positive_iou, (0.0, positive_iou), self.ignore_overlap)
        return _about(rois, found.foreground | found.background, found.foreground, found.matched, truth)


def _about(rois: Tensor, valid: Tensor, foreground: Tensor, matched: Tensor, truth: matching.GroundTruth) -> RoITargets:
    """What a head shall say about RoIs, by the object that each is matched with."""
    if truth.boxes.shape[1] == 0:
        return RoITargets(rois, torch.zeros_like(matched), rois, valid, foreground)
    labels = truth.labels.gather(1, matched).where(foreground, torch.zeros_like(matched))
    wanted = torch.where(foreground[..., None], box_ops.take(truth.boxes, matched), rois)
    return RoITargets(rois, labels, wanted, valid, foreground)

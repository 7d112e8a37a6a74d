"""What box heads are trained on: the class of each sampled RoI, and the box of each that is an object.

Girshick, "Fast R-CNN", 2015, arXiv 1504.08083, equations 1 to 3. On request in their place:

- focal: Lin et al., "Focal Loss for Dense Object Detection", 2017, arXiv 1708.02002, equation 4, over the softmax.
- seesaw: Wang et al., "Seesaw Loss for Long-Tailed Instance Segmentation", 2021, arXiv 2008.10032, equations 2 to 6.
- giou, diou, ciou: Rezatofighi et al. 2019, arXiv 1902.09630; Zheng et al. 2020, arXiv 1911.08287; torchvision's functions.
- hardest: Shrivastava et al., "Training Region-based Object Detectors with Online Hard Example Mining", 2016, arXiv 1604.03540.
- quality: the predicted IoU ranks detections; Huang et al., "Mask Scoring R-CNN", 2019, arXiv 1903.00241, for boxes.

Deviations:
1. Losses are sums over the sampled RoIs divided by max(1, their number), so that a batch without any is finite; with
   several processes by the mean number (:mod:`detpipe.support.processes`). The quality is divided by the number of objects.
2. Smooth L1 acts on weighted deltas, see :mod:`detpipe.boxes`; torchvision has it turn linear at 1/9 of them, detectron2 at 0.
3. Seesaw's objectness is the background's output, by a sigmoid; the paper adds two outputs. As in its authors' code, the
   probability that others are compared with is .01 at least.
4. The hardest RoIs are chosen among the sampled ones, without suppressing those that overlap.
5. The quality is trained by binary cross-entropy; the paper regresses it.

N images, S sampled RoIs an image, K foreground classes, B = K boxes a RoI (1 if class-agnostic).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import complete_box_iou_loss, distance_box_iou_loss, generalized_box_iou_loss

from detpipe import boxes as box_ops
from detpipe.boxes import DELTA_WEIGHTS, DeltaWeights
from detpipe.heads.sampling import RoITargets
from detpipe.stages import Losses, check_tensor
from detpipe.support.numbers import check_numbers, check_whole
from detpipe.support.processes import count_per_rank

ClassKind = Literal["cross_entropy", "focal", "seesaw"]
BoxKind = Literal["smooth_l1", "giou", "diou", "ciou"]
_KIND_OF_OPTION: dict[str, ClassKind] = {
    "label_smoothing": "cross_entropy",
    "gamma": "focal",
    "mitigation": "seesaw",
    "compensation": "seesaw",
}
_OVERLAP_LOSSES = {"giou": generalized_box_iou_loss, "diou": distance_box_iou_loss, "ciou": complete_box_iou_loss}
_LEAST_SIDE = 1e-3  # pixels of a predicted box: the aspect ratio of one without sides is no number


def _check(kind: str, known: object, weight: float, where: str) -> None:
    if kind not in get_args(known):
        raise ValueError(f"{where}.kind must be one of {', '.join(get_args(known))}, got {kind!r}")
    check_numbers("must be positive and finite", f"{where}.", weight=weight)


@dataclass(frozen=True)
class ClassLoss:
    """What the classifier is trained on.

    Args:
        kind: cross_entropy; focal, which counts RoIs less that are classified well; seesaw, for classes of very different
            numbers, which pushes rare classes down less for objects of frequent ones.
        label_smoothing: of cross_entropy, the part of the probability that is spread over all classes.
        gamma: of focal, how much less; 0 is cross_entropy.
        mitigation: p of seesaw: how much the numbers of objects count.
        compensation: q of seesaw: how much mistaken classes count.
        weight: factor of the loss.

    Raises:
        ValueError: an unknown kind, or a number outside its range.
    """

    kind: ClassKind = "cross_entropy"
    label_smoothing: float = 0.0
    gamma: float = 2.0
    mitigation: float = 0.8
    compensation: float = 2.0
    weight: float = 1.0

    def __post_init__(self) -> None:
        _check(self.kind, ClassKind, self.weight, "classes")
        check_numbers("must be in 0..1, below 1", "classes.", label_smoothing=self.label_smoothing)
        exponents = {"gamma": self.gamma, "mitigation": self.mitigation, "compensation": self.compensation}
        check_numbers("must not be negative or infinite", "classes.", **exponents)
        for name, kind in _KIND_OF_OPTION.items():
            if self.kind != kind and getattr(self, name) != getattr(ClassLoss, name):
                raise ValueError(f"classes.{name} is for the kind {kind}, got it with {self.kind}; leave it out")

    def probabilities(self, logits: Tensor) -> Tensor:
        """Turn outputs ``[..., K + 1]`` of a classifier trained on this loss into probabilities ``[..., K + 1]``."""
        if self.kind != "seesaw":
            return F.softmax(logits.float(), dim=-1)
        background, classes = logits.float().split((1, logits.shape[-1] - 1), dim=-1)
        return torch.cat((background.sigmoid(), (-background).sigmoid() * classes.softmax(-1)), dim=-1)

    def of_each(self, logits: Tensor, labels: Tensor, seen: Tensor | None = None) -> Tensor:
        """Compute the loss of each RoI.

        Args:
            logits: ``[R, K + 1]`` float32.
            labels: ``[R]`` int64, 0 for background.
            seen: ``[K]``, how many RoIs of each class were trained on; of seesaw, else not read.

        Returns:
            ``[R]``.
        """
        if self.kind == "seesaw":
            return self.weight * self._seesaw(
                logits, labels, logits.new_ones(logits.shape[1] - 1) if seen is None else seen
            )
        entropy = F.cross_entropy(logits, labels, reduction="none", label_smoothing=self.label_smoothing)
        if self.kind == "focal":
            entropy = entropy * (1 - torch.exp(-entropy)).clamp(min=0) ** self.gamma
        return self.weight * entropy

    def _seesaw(self, logits: Tensor, labels: Tensor, seen: Tensor) -> Tensor:
        background, classes = logits[:, 0], logits[:, 1:]
        is_object = labels > 0
        objectness = F.binary_cross_entropy_with_logits(-background, is_object.to(logits.dtype), reduction="none")
        own = (labels - 1).clamp(min=0)[:, None]
        number = seen.to(logits.dtype).clamp(min=1)
        fewer = (number / number[own]).clamp(max=1) ** self.mitigation  # [R, K]: M_ij of the label i
        score = classes.detach().softmax(-1)
        mistaken = (score / score.gather(1, own).clamp(min=1e-2)).clamp(min=1) ** self.compensation  # C_ij
        factor = (fewer * mistaken).scatter(1, own, 1.0)
        entropy = F.cross_entropy(classes + factor.clamp(min=1e-12).log(), own[:, 0], reduction="none")
        return objectness + torch.where(is_object, entropy, torch.zeros_like(entropy))


@dataclass(frozen=True)
class BoxLoss:
    """What the box regressor is trained on.

    Args:
        kind: smooth_l1 of the deltas; giou, diou or ciou of the box that they make, whose losses do not depend on its size.
        beta: of smooth_l1, from this difference on it is linear; 0 is L1.
        weight: factor of the loss.

    Raises:
        ValueError: an unknown kind, or a number outside its range.
    """

    kind: BoxKind = "smooth_l1"
    beta: float = 1.0
    weight: float = 1.0

    def __post_init__(self) -> None:
        _check(self.kind, BoxKind, self.weight, "boxes")
        check_numbers("must not be negative or infinite", "boxes.", beta=self.beta)

    def of_each(self, deltas: Tensor, rois: Tensor, boxes: Tensor, weights: DeltaWeights) -> Tensor:
        """Compute the loss of each RoI.

        Args:
            deltas: ``[..., 4]`` float32, weighted.
            rois: ``[..., 4]`` xyxy, what the deltas refine.
            boxes: ``[..., 4]`` xyxy, what they should give.
            weights: factors of dx, dy, dw, dh.

        Returns:
            ``[..., 4]``, one for each number, or ``[..., 1]`` for a box as a whole.
        """
        if self.kind == "smooth_l1":
            wanted = box_ops.encode(boxes, rois, weights)
            return self.weight * F.smooth_l1_loss(deltas, wanted, reduction="none", beta=self.beta)
        corner, far = box_ops.decode(deltas, rois, weights).split(2, dim=-1)
        least = _LEAST_SIDE * (1 + 1e-3 * corner.detach().abs())  # above the rounding of a corner that is far off
        predicted = torch.cat((corner, torch.maximum(far, corner + least)), dim=-1)
        return self.weight * _OVERLAP_LOSSES[self.kind](predicted, boxes, reduction="none")[..., None]


@dataclass(frozen=True)
class Objective:
    """The losses of a head.

    Args:
        classes: of the classifier.
        boxes: of the regressor.
        hardest: train on so many sampled RoIs of each image, those of the highest loss; None for all.
        quality: factor of the loss of a further output, the IoU of the refined box with its object, which detection multiplies
            scores with; 0 for none.

    Raises:
        ValueError: a number outside its range.
    """

    classes: ClassLoss = ClassLoss()
    boxes: BoxLoss = BoxLoss()
    hardest: int | None = None
    quality: float = 0.0

    def __post_init__(self) -> None:
        check_whole(1, "objective.", hardest=self.hardest)
        check_numbers("must not be negative or infinite", "objective.", quality=self.quality)


def box_losses(
    targets: RoITargets,
    logits: Tensor,
    deltas: Tensor,
    weights: DeltaWeights = DELTA_WEIGHTS,
    objective: Objective = Objective(),
    seen: Tensor | None = None,
    quality: Tensor | None = None,
) -> Losses:
    """Compute the losses of a stage.

    Args:
        targets: S RoIs of each image.
        logits: ``[N, S, K + 1]``.
        deltas: ``[N, S, B, 4]``.
        weights: factors of dx, dy, dw, dh.
        objective: which losses.
        seen: ``[K]``, how many RoIs of each class were trained on, for the kind seesaw.
        quality: ``[N, S, B]`` logits of the IoU of the refined boxes.

    Returns:
        ``loss_classifier`` and ``loss_box_reg``, and ``loss_quality`` if it is given; float32 scalars.

    Raises:
        ValueError: logits or deltas of another shape.
    """
    check_tensor("box_losses", "logits", logits, "N, S, K + 1", (*targets.labels.shape, None))
    check_tensor("box_losses", "deltas", deltas, "N, S, B, 4", (*targets.labels.shape, None, 4))
    logits, valid, foreground = logits.float(), targets.valid, targets.foreground
    class_loss = objective.classes.of_each(logits.flatten(0, 1), targets.labels.flatten(), seen).view_as(targets.labels)
    # what is not foreground is compared with itself: log() stays finite, and the mask takes it out
    rois, boxes = box_ops.fill(targets.rois, foreground), box_ops.fill(targets.boxes, foreground)
    chosen = of_label(deltas.float(), targets.labels).masked_fill(~foreground[..., None], 0.0)
    box_loss = objective.boxes.of_each(chosen, rois, boxes, weights)
    if objective.hardest is not None:
        valid = _hardest((class_loss + box_loss.sum(-1) * foreground).detach(), valid, objective.hardest)
    count, learnt = count_per_rank(valid.sum()), (valid & foreground)[..., None]
    losses = {"loss_classifier": (class_loss * valid).sum() / count, "loss_box_reg": (box_loss * learnt).sum() / count}
    if quality is not None:
        overlap = box_ops.iou(box_ops.decode(chosen.detach(), rois, weights)[..., None, :], boxes[..., None, :])[
            ..., 0, 0
        ]
        predicted = of_label(quality.float()[..., None], targets.labels)[..., 0]
        entropy = F.binary_cross_entropy_with_logits(predicted, overlap, reduction="none") * foreground
        losses["loss_quality"] = objective.quality * entropy.sum() / count_per_rank(foreground.sum())
    return losses


def _hardest(losses: Tensor, valid: Tensor, count: int) -> Tensor:
    """Mark the ``count`` valid RoIs ``[N, S]`` of each image that have the highest losses."""
    order = losses.masked_fill(~valid, -1.0).argsort(dim=1, descending=True, stable=True)[:, :count]
    return torch.zeros_like(valid).scatter(1, order, True) & valid


def of_label(deltas: Tensor, labels: Tensor) -> Tensor:
    """Take the box of each RoI's label.

    Args:
        deltas: ``[..., B, D]``.
        labels: ``[...]`` int64, 0 for background, which gets the box of the first class.

    Returns:
        ``[..., D]``.
    """
    column = torch.zeros_like(labels) if deltas.shape[-2] == 1 else (labels - 1).clamp(min=0)
    return deltas.gather(-2, column[..., None, None].expand(*labels.shape, 1, deltas.shape[-1])).squeeze(-2)

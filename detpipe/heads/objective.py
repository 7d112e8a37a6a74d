"""What box heads are trained on: the class of each sampled RoI, and the box of each that is an object.

Girshick, "Fast R-CNN", 2015, arXiv 1504.08083, equations 1 to 3.

Deviations:
1. Both losses are sums over the sampled RoIs divided by max(1, their number), so that a batch without any is finite; with
   several processes by the mean number (:mod:`detpipe.support.processes`).
2. Smooth L1 acts on weighted deltas, see :mod:`detpipe.boxes`; torchvision has it turn linear at 1/9 of them, detectron2 at 0.

N images, S sampled RoIs an image, K foreground classes, B = K boxes a RoI (1 if class-agnostic).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from detpipe import boxes as box_ops
from detpipe.boxes import DELTA_WEIGHTS, DeltaWeights
from detpipe.heads.sampling import RoITargets
from detpipe.stages import Losses, check_tensor
from detpipe.support.processes import count_per_rank


def box_losses(
    targets: RoITargets,
    logits: Tensor,
    deltas: Tensor,
    weights: DeltaWeights = DELTA_WEIGHTS,
    beta: float = 1.0,
) -> Losses:
    """Compute the losses of a stage.

    Args:
        targets: S RoIs of each image.
        logits: ``[N, S, K + 1]``.
        deltas: ``[N, S, B, 4]``.
        weights: factors of dx, dy, dw, dh.
        beta: where smooth L1 turns from quadratic to linear.

    Returns:
        ``loss_classifier`` and ``loss_box_reg``, float32 scalars.

    Raises:
        ValueError: logits or deltas of another shape.
    """
    check_tensor("box_losses", "logits", logits, "N, S, K + 1", (*targets.labels.shape, None))
    check_tensor("box_losses", "deltas", deltas, "N, S, B, 4", (*targets.labels.shape, None, 4))
    logits, deltas = logits.float(), deltas.float()
    count = count_per_rank(targets.valid.sum())
    entropy = F.cross_entropy(logits.flatten(0, 1), targets.labels.flatten(), reduction="none")
    loss_classifier = (entropy * targets.valid.flatten()).sum() / count
    chosen = of_label(deltas, targets.labels)
    # what is not foreground is compared with itself: log() stays finite, and the mask takes it out
    counts = targets.foreground[..., None]
    rois, boxes = box_ops.fill(targets.rois, counts[..., 0]), box_ops.fill(targets.boxes, counts[..., 0])
    wanted = box_ops.encode(boxes, rois, weights)
    distance = F.smooth_l1_loss(chosen, wanted, reduction="none", beta=beta) * counts
    return {"loss_classifier": loss_classifier, "loss_box_reg": distance.sum() / count}


def of_label(deltas: Tensor, labels: Tensor) -> Tensor:
    """Take the box of each RoI's label.

    Args:
        deltas: ``[..., B, 4]``.
        labels: ``[...]`` int64, 0 for background, which gets the box of the first class.

    Returns:
        ``[..., 4]``.
    """
    column = torch.zeros_like(labels) if deltas.shape[-2] == 1 else (labels - 1).clamp(min=0)
    return deltas.gather(-2, column[..., None, None].expand(*labels.shape, 1, 4)).squeeze(-2)

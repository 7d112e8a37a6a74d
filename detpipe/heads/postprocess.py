"""Scores and boxes to detections: threshold, suppression for each class, the best of what is left.

One call serves the whole batch. Boxes of different images and classes are moved apart in float64, where the shift is
exact, so that an image's detections do not depend on its neighbors in the batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn.functional import pad

from detpipe import boxes as box_ops
from detpipe.heads.suppression import Kept, box_fusion, soft_nms
from detpipe.nms import keep_best
from detpipe.support.numbers import check_numbers, check_whole
from detpipe.types import Detection

Suppression = Literal["nms", "soft_nms", "box_fusion"]


@dataclass(frozen=True)
class Postprocess:
    """What becomes a detection.

    Args:
        score_threshold: a detection's score exceeds it.
        nms_iou: of two boxes of one class with a higher IoU the lower-scoring one is dropped; of box_fusion, both become one.
        detections_per_image: keep at most this many.
        candidates_per_image: at most this many (box, class) pairs of an image, the best, enter suppression.
        suppression: nms; soft_nms, which lowers scores by the overlap with better boxes instead of dropping them; box_fusion,
            which takes the mean of boxes of one class that overlap, weighted with their scores.
        sigma: of soft_nms, in squared IoU: scores fall with ``exp(-IoU^2 / sigma)``.
        min_size: width and height of a detection exceed it, in pixels of the batch.

    Raises:
        ValueError: a number outside its range, or an unknown suppression.
    """

    score_threshold: float = 0.05
    nms_iou: float = 0.5
    detections_per_image: int = 100
    candidates_per_image: int = 1000
    suppression: Suppression = "nms"
    sigma: float = 0.5
    min_size: float = 0.0

    def __post_init__(self) -> None:
        check_numbers("must be in 0..1, below 1", score_threshold=self.score_threshold)
        check_numbers("must be in 0..1, above 0", nms_iou=self.nms_iou)
        check_whole(detections_per_image=self.detections_per_image, candidates_per_image=self.candidates_per_image)
        check_numbers("must be positive and finite", sigma=self.sigma)
        check_numbers("must not be negative or infinite", min_size=self.min_size)
        if self.suppression not in get_args(Suppression):
            choices = ", ".join(get_args(Suppression))
            raise ValueError(f"suppression must be one of {choices}, got {self.suppression!r}")
        if self.suppression != "soft_nms" and self.sigma != Postprocess.sigma:
            raise ValueError(f"sigma is for the suppression soft_nms, got it with {self.suppression}; leave it out")

    def __call__(
        self, scores: Tensor, boxes: Tensor, valid: Tensor, image_sizes: list[tuple[int, int]]
    ) -> list[Detection]:
        """Select detections.

        Args:
            scores: ``[N, P, K]`` in 0..1, of the foreground classes.
            boxes: ``[N, P, K, 4]`` or, for all classes, ``[N, P, 1, 4]``, xyxy.
            valid: ``[N, P]`` bool, False for padding.
            image_sizes: height and width of each image inside the batch; boxes are clipped to it.

        Returns:
            N detections, best first.
        """
        return self.select(scores, boxes, valid, image_sizes)[0]

    def select(
        self, scores: Tensor, boxes: Tensor, valid: Tensor, image_sizes: list[tuple[int, int]]
    ) -> tuple[list[Detection], list[Tensor]]:
        """Select detections, and tell which proposals they came from.

        Args:
            scores: as of a call.
            boxes: as of a call.
            valid: as of a call.
            image_sizes: as of a call.

        Returns:
            N detections, best first, and N tensors ``[D]`` int64 in 0..P-1.
        """
        kept, counts = self.padded(scores, boxes, valid, image_sizes)
        found, sources = [], []
        for boxes, scores, labels, rows, count in zip(*kept, counts.tolist(), strict=True):
            found.append(Detection(boxes=boxes[:count], scores=scores[:count], labels=labels[:count]))
            sources.append(rows[:count])
        return found, sources

    def padded(
        self,
        scores: Tensor,
        boxes: Tensor,
        valid: Tensor,
        image_sizes: list[tuple[int, int]],
        threshold: Tensor | float | None = None,
    ) -> tuple[Kept, Tensor]:
        """Select detections as tensors ``[N, D, ...]``; in a compiled or exported graph without a look at any value.

        Args:
            scores: as of a call.
            boxes: as of a call.
            valid: as of a call.
            image_sizes: as of a call, or one size for all.
            threshold: in the place of ``score_threshold``.

        Returns:
            Detections, best first, whose ``index`` is that of their proposal; and ``[N]`` int64, how many each image has.
        """
        classes, threshold = scores.shape[2], self.score_threshold if threshold is None else threshold
        known = valid[..., None] & (scores >= 0)  # what is no number would be sorted before all others
        scores = scores.float().masked_fill(~known, -1.0).flatten(1)
        pairs, count = scores.shape[1], self.candidates_per_image
        if isinstance(pairs, int):
            count = min(count, pairs)
        else:  # a symbol: there are as many candidates as may be, whatever it is
            scores = pad(scores, (0, count), value=-1.0)
        scores, order = scores.sort(dim=1, descending=True, stable=True)
        if not torch.compiler.is_compiling():  # those below the threshold need not be sorted out one by one
            count = min(count, int((scores > threshold).sum(1).max()) if scores.numel() else 0)
        scores, order = scores[:, :count], order[:, :count]  # [N, M]
        order = order if isinstance(pairs, int) else order.clamp(max=pairs - 1)
        row, label = order // max(classes, 1), order % max(classes, 1)
        flat = boxes.flatten(1, 2)
        index = row if boxes.shape[2] == 1 else order
        chosen = box_ops.take(flat, index).float()
        chosen = box_ops.clip(chosen, *box_ops.image_sides(image_sizes, chosen))
        keep = (scores > threshold) & box_ops.valid(chosen, self.min_size)
        if self.suppression == "nms":
            kept = self._nms(chosen, scores, label + 1, keep)
        elif self.suppression == "soft_nms":
            kept = soft_nms(chosen, scores, label + 1, keep, self.sigma, self.detections_per_image)
        else:
            kept = box_fusion(chosen, scores, label + 1, keep, self.nms_iou)
        counts = (kept.scores > threshold).sum(1).clamp(max=self.detections_per_image)
        return kept._replace(index=row.gather(1, kept.index)), counts

    def _nms(self, boxes: Tensor, scores: Tensor, labels: Tensor, keep: Tensor) -> Kept:
        exact = boxes.double().masked_fill(~keep[..., None], 0.0)
        keep = keep & keep_best(exact, self.nms_iou, labels)
        first = keep.byte().argsort(dim=1, descending=True, stable=True)[:, : self.detections_per_image]
        scores = scores.masked_fill(~keep, -1.0).gather(1, first)
        return Kept(box_ops.take(boxes, first), scores, labels.gather(1, first), first)

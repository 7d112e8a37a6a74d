"""Scores and boxes to detections: threshold, non-maximum suppression for each class, the best of what is left.

One call serves the whole batch. Boxes of different images and classes are moved apart in float64, where the shift is
exact, so that an image's detections do not depend on its neighbors in the batch.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torchvision.ops import nms

from detpipe import boxes as box_ops
from detpipe.types import Detection


@dataclass(frozen=True)
class Postprocess:
    """What becomes a detection.

    Args:
        score_threshold: a detection's score exceeds it.
        nms_iou: of two boxes of one class with a higher IoU the lower-scoring one is dropped.
        detections_per_image: keep at most this many.
        candidates_per_image: at most this many (box, class) pairs of an image, the best, enter suppression.
        min_size: width and height of a detection exceed it, in pixels of the batch.

    Raises:
        ValueError: a number outside its range.
    """

    score_threshold: float = 0.05
    nms_iou: float = 0.5
    detections_per_image: int = 100
    candidates_per_image: int = 1000
    min_size: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.score_threshold < 1 or not 0 < self.nms_iou <= 1:
            raise ValueError(f"score_threshold must be in 0..1 and nms_iou in (0, 1], got {self}")
        if min(self.detections_per_image, self.candidates_per_image) < 1 or self.min_size < 0:
            raise ValueError(
                f"detections_per_image and candidates_per_image must be positive, min_size not negative, got {self}"
            )

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
        images, proposals, classes = scores.shape
        count = min(self.candidates_per_image, proposals * classes)
        scores = scores.float().masked_fill(~valid[..., None], -1.0).flatten(1)
        scores, order = scores.sort(dim=1, descending=True, stable=True)
        scores, order = scores[:, :count], order[:, :count]  # [N, M]
        row, label = order // max(classes, 1), order % max(classes, 1)
        flat = boxes.flatten(1, 2)
        index = row if boxes.shape[2] == 1 else order
        chosen = flat.gather(1, index[..., None].expand(-1, -1, 4)).float()
        heights, widths = scores.new_tensor(image_sizes).reshape(images, 2, 1).unbind(1)
        chosen = box_ops.clip(chosen, heights, widths)
        keep = (scores > self.score_threshold) & box_ops.valid(chosen, self.min_size)
        return self._suppress(scores, chosen, label + 1, row, keep)

    def _suppress(
        self, scores: Tensor, boxes: Tensor, labels: Tensor, rows: Tensor, keep: Tensor
    ) -> tuple[list[Detection], list[Tensor]]:
        image, column = keep.nonzero(as_tuple=True)
        scores, boxes, labels, rows = (values[image, column] for values in (scores, boxes, labels, rows))
        if len(boxes):
            group = image * (labels.max() + 1) + labels
            apart = boxes.double() + (group * (boxes.max().double() + 1))[:, None]
            kept = nms(apart, scores.double(), self.nms_iou)  # best first
            image, scores, boxes, labels, rows = (values[kept] for values in (image, scores, boxes, labels, rows))
        found, sources = [], []
        for index in range(len(keep)):
            best = (image == index).nonzero()[: self.detections_per_image, 0]
            found.append(Detection(boxes=boxes[best], scores=scores[best], labels=labels[best]))
            sources.append(rows[best])
        return found, sources

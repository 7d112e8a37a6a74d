"""Test-time augmentation: an image as it is, mirrored and at other sizes, and what is found in all of them as one.

Solovyev, Wang and Gabruseva, "Weighted boxes fusion: ensembling boxes from different object detection models", 2021, arXiv
1910.13302: a fused score is the mean over all views, of which one that found nothing counts as 0.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from detpipe import boxes as box_ops
from detpipe.detector import TwoStageDetector
from detpipe.heads.suppression import box_fusion
from detpipe.prediction.detector import Detector
from detpipe.types import Detection, Target


@dataclass(frozen=True)
class AugmentedDetector:
    """A detector that looks at each image several times, in as many forward passes as there are flips and scales.

    Args:
        detector: what looks at the images; for other scales than 1 a `TwoStageDetector`.
        flips: the axes that each view is mirrored along: "" for none, "x" for left and right, "y" for top and bottom.
        scales: factors of the detector's ``min_size`` and ``max_size``.
        iou: boxes of one class that overlap more become one.

    Raises:
        ValueError: no view, a factor that is not positive, another flip, an IoU outside (0, 1], or scales of a detector whose sizes
            are not known.
    """

    detector: Detector
    flips: tuple[str, ...] = ("", "x")
    scales: tuple[float, ...] = (0.8, 1.0, 1.25)
    iou: float = 0.55

    def __post_init__(self) -> None:
        if not self.flips or not set(self.flips) <= {"", "x", "y", "xy"} or not 0 < self.iou <= 1:
            raise ValueError(
                f"expected flips of '', 'x', 'y' and 'xy', and iou in (0, 1], got {self.flips} and {self.iou}"
            )
        if not self.scales or min(self.scales) <= 0:
            raise ValueError(f"expected one or more positive scales, got {self.scales}")
        if set(self.scales) != {1.0} and not isinstance(self.detector, TwoStageDetector):
            raise ValueError(f"scales {self.scales} need a TwoStageDetector, whose sizes they change; give (1.0,)")

    def __call__(self, images: Sequence[Tensor], targets: Sequence[Target] | None = None) -> list[Detection]:
        """Detect in N images ``[C, H_i, W_i]`` as the detector does; at most as many as its richest view has."""
        views = [self._look(images, targets, flip, scale) for scale, flip in product(self.scales, self.flips)]
        return _fused([list(own) for own in zip(*views, strict=True)], self.iou)

    def _look(
        self, images: Sequence[Tensor], targets: Sequence[Target] | None, flip: str, scale: float
    ) -> list[Detection]:
        detector = self.detector
        if isinstance(detector, TwoStageDetector) and scale != 1:
            detector = copy.copy(detector)  # the same stages; only its sizes are other ones
            detector.min_size, detector.max_size = (
                max(1, round(side * scale)) for side in (detector.min_size, detector.max_size)
            )
        views = [_view(image, {} if targets is None else targets[k], flip, scale) for k, image in enumerate(images)]
        found = detector([view for view, _ in views], None if targets is None else [target for _, target in views])
        return [
            Detection(boxes=_mirrored(one["boxes"], view, flip), scores=one["scores"], labels=one["labels"])
            for one, (view, _) in zip(found, views, strict=True)
        ]


def _view(image: Tensor, target: Target, flip: str, scale: float) -> tuple[Tensor, Target]:
    """An image mirrored, and of its target what detection needs; one that the data have resized without its padding."""
    changed: Target = {}
    content = target.get("content_size")
    if content is not None:
        image = image[:, : content[0], : content[1]]
        if scale == 1:
            changed["content_size"] = content
    if "proposals" in target:
        changed["proposals"] = _mirrored(target["proposals"], image, flip)
    return image.flip([{"x": -1, "y": -2}[axis] for axis in flip]), changed


def _mirrored(boxes: Tensor, image: Tensor, flip: str) -> Tensor:
    """Boxes ``[..., 4]`` in an image ``[C, H, W]`` that is mirrored."""
    x1, y1, x2, y2 = boxes.unbind(-1)
    if "x" in flip:
        x1, x2 = image.shape[2] - x2, image.shape[2] - x1
    if "y" in flip:
        y1, y2 = image.shape[1] - y2, image.shape[1] - y1
    return torch.stack((x1, y1, x2, y2), dim=-1)


def _fused(found: Sequence[Sequence[Detection]], iou: float) -> list[Detection]:
    """For each image what its views hold together: one call for all images, on the CPU, since it goes box by box."""
    most = [max(len(view["scores"]) for view in views) for views in found]
    joined = {
        key: [torch.cat([view[key] for view in views]).cpu() for views in found]
        for key in ("boxes", "scores", "labels")
    }
    scores = pad_sequence(joined["scores"], batch_first=True, padding_value=-1.0)  # [N, M]
    scores, order = scores.sort(dim=1, descending=True, stable=True)
    boxes = box_ops.take(pad_sequence(joined["boxes"], batch_first=True), order)
    labels = pad_sequence(joined["labels"], batch_first=True).gather(1, order)
    fused = box_fusion(boxes, scores, labels, scores >= 0, iou, len(found[0]))
    device = found[0][0]["scores"].device
    counts = map(min, most, (fused.scores >= 0).sum(1).tolist())
    return [
        Detection(**{name: getattr(fused, name)[k, :count].to(device) for name in ("boxes", "scores", "labels")})
        for k, count in enumerate(counts)
    ]

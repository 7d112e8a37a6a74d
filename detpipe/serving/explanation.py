"""A detection with what led to it: proposals, scores of all classes, glimpses, and the time of each stage.

P proposals, D detections, K classes.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from detpipe import boxes as box_ops
from detpipe.detector import TwoStageDetector
from detpipe.heads import ProposalHead
from detpipe.heads.postprocess import Postprocess
from detpipe.images import Size, scale_boxes, to_picture
from detpipe.serving.given_boxes import at_given_boxes
from detpipe.types import Detection


@dataclass
class Explanation:
    """What a detector did with an image. Boxes are in its pixels, tensors on the CPU."""

    picture: Tensor  # [3, H, W] uint8, the image
    found: Detection
    proposals: Tensor | None = None  # [P, 4]
    class_scores: Tensor | None = None  # [D, K] of the proposal that each detection came from; None of a head of others
    seconds: dict[str, float] = field(default_factory=dict)  # of each stage

    def above(self, threshold: float) -> Explanation:
        """What has a score of the threshold or more."""
        keep = self.found["scores"] >= threshold
        found = {name: values[keep] for name, values in cast(dict[str, Tensor], self.found).items()}
        scores = None if self.class_scores is None else self.class_scores[keep]
        return replace(self, found=cast(Detection, found), class_scores=scores)


@torch.inference_mode()
def explain(detector: TwoStageDetector, image: Tensor, boxes: Tensor | None = None) -> Explanation:
    """Detect in one image, and keep what the stages say.

    Args:
        detector: in evaluation mode.
        image: ``[C, H, W]``.
        boxes: ``[P, 4]`` to look at in the place of the detector's own; None for these.

    Returns:
        The detections, with ``proposals`` and ``glimpses`` where the head tells them, and the rest.
    """
    picture, image = to_picture(image), image.to(detector.device)
    given = None if boxes is None else [{"proposals": boxes.to(detector.device)}]
    with (
        nullcontext() if boxes is None else at_given_boxes(detector),
        _watched(detector, (image.shape[1], image.shape[2])) as kept,
    ):
        [found] = detector([image], given)
    found = {name: values.cpu() for name, values in cast(dict[str, Tensor], found).items()}
    return Explanation(picture, cast(Detection, found), **kept)


@contextmanager
def _watched(detector: TwoStageDetector, size: Size) -> Iterator[dict[str, Any]]:
    """Collect the seconds of the stages, proposals and scores, while it lasts."""
    seconds: dict[str, float] = {}
    kept: dict[str, Any] = {"seconds": seconds}

    def keep(module: nn.Module, inputs: Any, output: Any) -> None:
        boxes = scale_boxes(output[0][0], inputs[0].image_sizes[0], size)
        kept["proposals"] = boxes[box_ops.valid(boxes)].cpu()

    def start(name: str) -> Any:
        return lambda *_: seconds.update({name: -_now(detector)})

    def stop(name: str) -> Any:
        return lambda *_: seconds.update({name: seconds[name] + _now(detector)})

    head = detector.head
    handles = []
    for name, stage in {"backbone": detector.backbone, "proposals": detector.proposals, "head": head}.items():
        handles += [stage.register_forward_pre_hook(start(name)), stage.register_forward_hook(stop(name))]
    handles.append(detector.proposals.register_forward_hook(keep))
    before = vars(head).copy()
    if isinstance(head, ProposalHead):
        head.return_glimpses, head.postprocess = True, cast(Postprocess, _Kept(head.postprocess, kept))
    try:
        yield kept
    finally:
        vars(head).update(before)
        for handle in handles:
            handle.remove()


@dataclass(frozen=True)
class _Kept:
    """A postprocess that keeps the scores of all classes of what it selects in the first image."""

    inner: Postprocess
    kept: dict[str, Any]

    def select(self, scores: Tensor, *others: Any) -> Any:
        found, rows = self.inner.select(scores, *others)
        self.kept["class_scores"] = scores[0, rows[0]].float().cpu()
        return found, rows


def _now(detector: TwoStageDetector) -> float:
    """The clock, once a GPU has done what it was given."""
    if detector.device.type == "cuda":
        torch.cuda.synchronize(detector.device)
    return time.perf_counter()

"""A detection with what led to it: proposals, scores of all classes, glimpses, and the time of each stage.

P proposals, D detections, K classes.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn

from detpipe import boxes as box_ops
from detpipe.detector import TwoStageDetector
from detpipe.heads import ProposalHead
from detpipe.heads.postprocess import Postprocess
from detpipe.images import scale_boxes
from detpipe.serving.given_boxes import at_given_boxes
from detpipe.types import Detection


@dataclass
class Explanation:
    """What a detector did with an image. Boxes are in its pixels, tensors on the CPU."""

    found: Detection = field(default_factory=lambda: Detection(boxes=torch.zeros(0, 4)))  # type: ignore[typeddict-item]
    proposals: Tensor | None = None  # [P, 4]
    class_scores: Tensor | None = None  # [D, K] of the proposal that each detection came from; None of a head of others
    seconds: dict[str, float] = field(default_factory=dict)  # of each stage


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
    told = Explanation()
    image = image.to(detector.device)
    with nullcontext() if boxes is None else at_given_boxes(detector), _watched(detector, tuple(image.shape[1:]), told):
        start = _now(detector)
        [found] = detector([image], None if boxes is None else [{"proposals": boxes.to(detector.device)}])
        told.seconds["all"] = _now(detector) - start
    told.found = cast(Detection, {name: values.cpu() for name, values in cast(dict[str, Tensor], found).items()})
    return told


@contextmanager
def _watched(detector: TwoStageDetector, size: Any, told: Explanation) -> Iterator[None]:
    """Time the stages, and keep proposals and scores, while it lasts."""
    started: dict[str, float] = {}

    def begin(name: str) -> Any:
        return lambda module, inputs: started.update({name: _now(detector)})

    def end(name: str) -> Any:
        def keep(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            told.seconds[name] = _now(detector) - started[name]
            if name == "proposals":
                boxes = scale_boxes(output[0][0], inputs[0].image_sizes[0], size)
                told.proposals = boxes[box_ops.valid(boxes)].cpu()

        return keep

    head = detector.head
    stages = {"backbone": detector.backbone, "proposals": detector.proposals, "head": head}
    handles = [stage.register_forward_pre_hook(begin(name)) for name, stage in stages.items()]
    handles += [stage.register_forward_hook(end(name)) for name, stage in stages.items()]
    before = vars(head).copy()
    if isinstance(head, ProposalHead):
        head.return_glimpses, head.postprocess = True, cast(Postprocess, _Kept(head.postprocess, told))
    try:
        yield
    finally:
        vars(head).update(before)
        for handle in handles:
            handle.remove()


@dataclass(frozen=True)
class _Kept:
    """A postprocess that keeps the scores of all classes of what it selects in the first image."""

    inner: Postprocess
    told: Explanation

    def select(self, scores: Tensor, *others: Any) -> Any:
        found, rows = self.inner.select(scores, *others)
        self.told.class_scores = scores[0, rows[0]].float().cpu()
        return found, rows


def _now(detector: TwoStageDetector) -> float:
    """The clock, once a GPU has done what it was given."""
    if detector.device.type == "cuda":
        torch.cuda.synchronize(detector.device)
    return time.perf_counter()

"""The protocols by name, and one function for all of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from detpipe.evaluation.coco import MAX_DETECTIONS, Backend, evaluate_coco
from detpipe.evaluation.lvis import evaluate_lvis
from detpipe.evaluation.voc import evaluate_voc
from detpipe.types import Annotations, DetectionArrays

PROTOCOLS = ("coco", "voc07", "voc10", "lvis")


def evaluate(
    annotations: Annotations,
    detections: DetectionArrays,
    protocol: str = "coco",
    *,
    backend: Backend = "detpipe",
    iou_threshold: float = 0.5,
    strict: bool = False,
    max_detections: Sequence[int] | None = None,
) -> dict[str, Any]:
    """Compute mean average precision by a named protocol.

    Args:
        annotations: the ground truth of I images.
        detections: D detections in pixels of the original images, in any order.
        protocol: ``"coco"`` (:func:`~detpipe.evaluation.coco.evaluate_coco`), ``"voc07"`` (11 points) or ``"voc10"`` (area under
            the curve; :func:`~detpipe.evaluation.voc.evaluate_voc`), or ``"lvis"``
            (:func:`~detpipe.evaluation.lvis.evaluate_lvis`); each says what it returns, -1.0 where there is nothing to find.
        backend: for ``"coco"``: who counts, ``"detpipe"``, or ``"pycocotools"``, the reference.
        iou_threshold: for VOC: the overlap that makes a match.
        strict: for VOC: the overlap must exceed the threshold instead of reaching it.
        max_detections: for ``"coco"``: how many detections of a class in an image count, rising; None: 1, 10 and 100.

    Raises:
        ValueError: no such protocol, or ``max_detections`` that do not rise or that the protocol has no place for.
        DataError: a fault in detections or ground truth.
    """
    if protocol == "coco":
        return evaluate_coco(
            annotations, detections, backend, MAX_DETECTIONS if max_detections is None else max_detections
        )
    if max_detections is not None:
        raise ValueError(f"max_detections belongs to the protocol 'coco', got {protocol!r}: leave it out")
    if protocol == "voc07" or protocol == "voc10":
        return evaluate_voc(annotations, detections, protocol, iou_threshold, strict)
    if protocol == "lvis":
        return evaluate_lvis(annotations, detections)
    raise ValueError(f"protocol must be one of {', '.join(PROTOCOLS)}; got {protocol!r}")

"""Detections of single images, as the detector gives them, to packed arrays of a data set, as evaluation takes them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from detpipe.types import Detection, DetectionArrays


def pack(detections: Sequence[Detection], image_ids: Sequence[int]) -> DetectionArrays:
    """Put the detections of a batch into packed arrays, with one copy to the host for each kind of tensor.

    Args:
        detections: of N images, boxes in pixels of the original images; on any device.
        image_ids: N ids, each once.

    Returns:
        All D detections; float32 values are kept exactly.

    Raises:
        ValueError: N detections and N ids differ in number, an id occurs twice, or boxes, scores and labels of an image
            differ in length.

    Example:
        >>> boxes = torch.tensor([[0.0, 0.0, 4.0, 3.0]])
        >>> one = {"boxes": boxes, "scores": torch.tensor([0.5]), "labels": torch.tensor([2])}
        >>> pack([one], [139]).image_ids
        array([139])
    """
    if len(detections) != len(image_ids):
        raise ValueError(f"one image id an image is needed: got {len(detections)} images and {len(image_ids)} ids")
    if len(set(image_ids)) != len(image_ids):
        raise ValueError(f"image ids must differ, or detections would count twice: got {list(image_ids)}")
    for image_id, found in zip(image_ids, detections, strict=True):
        lengths = {key: len(found[key]) for key in ("boxes", "scores", "labels")}
        if len(set(lengths.values())) != 1:
            raise ValueError(f"image id {image_id}: boxes, scores and labels must be equally many, got {lengths}")
    if not detections:
        return concatenate([])
    return DetectionArrays(
        image_ids=np.repeat(np.asarray(image_ids, np.int64), [len(found["scores"]) for found in detections]),
        boxes=torch.cat([found["boxes"].detach().reshape(-1, 4) for found in detections]).cpu().double().numpy(),
        scores=torch.cat([found["scores"].detach() for found in detections]).cpu().double().numpy(),
        labels=torch.cat([found["labels"].detach() for found in detections]).cpu().long().numpy(),
    )


def concatenate(parts: Sequence[DetectionArrays], drop_repeated_images: bool = False) -> DetectionArrays:
    """Join packed detections of several batches or processes.

    Args:
        parts: any number of packed arrays.
        drop_repeated_images: an image that occurs in several parts is taken from the first that has it. Distributed
            samplers pad the last batches with images that other processes have seen; without this they count twice.

    Returns:
        The joined arrays; none at all give arrays of length 0.
    """
    if drop_repeated_images:
        parts = _without_repeats(parts)
    return DetectionArrays(
        image_ids=np.concatenate([np.zeros(0, np.int64), *(part.image_ids for part in parts)]),
        boxes=np.concatenate([np.zeros((0, 4)), *(part.boxes for part in parts)]),
        scores=np.concatenate([np.zeros(0), *(part.scores for part in parts)]),
        labels=np.concatenate([np.zeros(0, np.int64), *(part.labels for part in parts)]),
    )


def _without_repeats(parts: Sequence[DetectionArrays]) -> list[DetectionArrays]:
    kept: list[DetectionArrays] = []
    seen = np.zeros(0, np.int64)
    for part in parts:
        new = ~np.isin(part.image_ids, seen)
        kept.append(part.take(new))
        seen = np.union1d(seen, part.image_ids)
    return kept

"""Small ground truths and detections, written down in the tests that use them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from detpipe.types import Annotations, DetectionArrays

Box = tuple[float, float, float, float]


def truth(
    objects: Sequence[tuple[int, int, Box]],
    image_ids: Sequence[int],
    classes: Sequence[str] = ("cat",),
    crowd: Sequence[int] = (),
    difficult: Sequence[int] = (),
    category_ids: Sequence[int] | None = None,
) -> Annotations:
    """Objects are (image id, label, xyxy); crowd and difficult list their positions."""
    rows = sorted(range(len(objects)), key=lambda i: list(image_ids).index(objects[i][0]))
    boxes = np.array([objects[i][2] for i in rows], np.float64).reshape(-1, 4)
    counts = [sum(image == one[0] for one in objects) for image in image_ids]
    return Annotations(
        root=Path("truth"),
        file_names=np.array([f"{i}.jpg" for i in image_ids]),
        image_ids=np.array(image_ids, np.int64),
        sizes=np.full((len(image_ids), 2), 1000, np.int32),
        offsets=np.concatenate(([0], np.cumsum(counts))).astype(np.int64),
        boxes=boxes,
        labels=np.array([objects[i][1] for i in rows], np.int64),
        iscrowd=np.array([i in crowd for i in rows], np.bool_),
        difficult=np.array([i in difficult for i in rows], np.bool_),
        area=(boxes[:, 2:] - boxes[:, :2]).prod(axis=1),
        class_names=tuple(classes),
        category_ids=tuple(category_ids or range(1, len(classes) + 1)),
    )


def found(rows: Sequence[tuple[int, int, float, Box]]) -> DetectionArrays:
    """Rows are (image id, label, score, xyxy)."""
    return DetectionArrays(
        image_ids=np.array([row[0] for row in rows], np.int64),
        boxes=np.array([row[3] for row in rows], np.float64).reshape(-1, 4),
        scores=np.array([row[2] for row in rows], np.float64),
        labels=np.array([row[1] for row in rows], np.int64),
    )


def perfect(annotations: Annotations) -> DetectionArrays:
    """Every object that counts, found exactly."""
    keep = ~(annotations.iscrowd | annotations.difficult)
    images = np.repeat(annotations.image_ids, np.diff(annotations.offsets))
    scores = np.linspace(0.9, 0.5, len(images))
    return DetectionArrays(images[keep], annotations.boxes[keep], scores[keep], annotations.labels[keep])


def shuffled(detections: DetectionArrays, seed: int) -> DetectionArrays:
    """The same detections in another order."""
    order = np.random.default_rng(seed).permutation(len(detections.scores))
    return DetectionArrays(
        detections.image_ids[order], detections.boxes[order], detections.scores[order], detections.labels[order]
    )


def jittered(annotations: Annotations, seed: int, extra: int = 200) -> DetectionArrays:
    """Detections as a mediocre detector gives them: shifted, doubled, missed, invented, with equal scores."""
    rng = np.random.default_rng(seed)
    images = np.repeat(annotations.image_ids, np.diff(annotations.offsets))
    rows = rng.integers(0, len(images), 3 * len(images))
    sizes = np.tile(annotations.boxes[rows, 2:] - annotations.boxes[rows, :2], 2)
    near = annotations.boxes[rows] + rng.normal(0, 0.12, (len(rows), 4)) * sizes
    corner = rng.uniform(0, 400, (extra, 2))
    far = np.concatenate((corner, corner + rng.uniform(5, 200, (extra, 2))), axis=1)
    boxes = np.concatenate((near, far)).round(2)
    boxes[:, 2:] = np.maximum(boxes[:, 2:], boxes[:, :2])
    return DetectionArrays(
        image_ids=np.concatenate((images[rows], rng.choice(annotations.image_ids, extra))),
        boxes=boxes,
        scores=rng.random(len(boxes)).round(2),
        labels=np.concatenate((annotations.labels[rows], rng.integers(1, annotations.num_classes + 1, extra))),
    )

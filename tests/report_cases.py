"""A small evaluation with everything a report can show, and names that a careless page would take for its own code."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image

from detpipe.evaluation.analysis import Analysis, AnalysisSettings, analyze
from detpipe.types import Annotations, DetectionArrays

EVIL = ("</script><script>throw 1</script>", "a & b \"c\" 'd' <!-- ", "$\\frac{x$", "plain")
SIZE = 160


def evil_truth(images: int = 6, seed: int = 0) -> Annotations:
    """Objects of three of four classes; file names that need escaping."""
    rng = np.random.default_rng(seed)
    counts = rng.integers(1, 5, images)
    corner = rng.uniform(0, 100, (int(counts.sum()), 2))
    boxes = np.concatenate((corner, corner + rng.uniform(10, 60, corner.shape)), axis=1).round(1)
    total = len(boxes)
    return Annotations(
        root=Path("truth"),
        file_names=np.array([f"<img src=x onerror=alert({i})> & 'quoted'.png" for i in range(images)]),
        image_ids=np.arange(10, 10 + images),
        sizes=np.full((images, 2), SIZE, np.int32),
        offsets=np.concatenate(([0], np.cumsum(counts))),
        boxes=boxes,
        labels=rng.integers(1, 4, total),
        iscrowd=np.arange(total) == 3,
        difficult=np.arange(total) == 5,
        area=(boxes[:, 2:] - boxes[:, :2]).prod(axis=1),
        class_names=EVIL,
        category_ids=(1, 2, 3, 4),
    )


def some_detections(annotations: Annotations, seed: int = 0) -> DetectionArrays:
    """Objects found in place, shifted, doubled, under another class; and some that are nowhere."""
    rng = np.random.default_rng(seed)
    owners = np.repeat(annotations.image_ids, np.diff(annotations.offsets))
    rows = rng.integers(0, len(owners), 4 * len(owners))
    boxes = annotations.boxes[rows] + rng.normal(0, 4, (len(rows), 4))
    boxes[:, 2:] = np.maximum(boxes[:, 2:], boxes[:, :2] + 1)
    labels = np.where(rng.random(len(rows)) < 0.2, rng.integers(1, 5, len(rows)), annotations.labels[rows])
    boxes[::7] += 70
    return DetectionArrays(owners[rows], boxes, rng.random(len(rows)).round(3), labels)


def write_images(annotations: Annotations, folder: Path) -> Path:
    """A gray picture for each image."""
    folder.mkdir(parents=True, exist_ok=True)
    for index, name in enumerate(annotations.file_names.tolist()):
        pixels = np.full((SIZE, SIZE, 3), 90 + 10 * index, np.uint8)
        Image.fromarray(pixels).save(folder / name)
    return folder


def evil_analysis(runs: Sequence[str] = ("<b>run</b>",), settings: AnalysisSettings | None = None) -> Analysis:
    """The analysis of as many runs as there are names."""
    annotations = evil_truth()
    found = {name: some_detections(annotations, seed) for seed, name in enumerate(runs)}
    chosen = replace(settings or AnalysisSettings(), resamples=30)
    return analyze(annotations, found, chosen)

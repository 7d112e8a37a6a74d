"""Is COCO's mAP of 5,000 images with 100 detections each had in a fifth of pycocotools' time, and in less than 1 GiB?

Made-up boxes of COCO val2017's size: 36,312 objects of 80 classes, 100 detections an image of which a third are objects that
were moved a little. Each contestant evaluates the same set in a process of its own, round by round in turns, and must reach the
same numbers to 1e-12:

| contestant | what runs |
| --- | --- |
| `CocoEvaluator` | tensors, image by image, into the metric, then ``compute()``: what validation does |
| `evaluate_coco` | packed arrays |
| pycocotools | its own recipe: dicts, ``loadRes``, evaluate, accumulate, summarize |

Time is from tensors, arrays or dicts to the numbers, without making the set and without imports. Memory is the peak of the
process, imports included, and its growth from before the evaluation, when the set is there in the form that the contestant takes.
Linux and macOS.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np

from detpipe.support.allocator import peak_memory
from detpipe.types import Annotations, DetectionArrays

NUMBERS = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")
SIDE, CLASSES = 640, 80


def make_set(images: int, objects: int, detections: int) -> tuple[Annotations, DetectionArrays]:
    """Draw ground truth and detections; classes follow a power law, as COCO's do."""
    random = np.random.default_rng(0)
    weight = 1 / np.arange(1, CLASSES + 1) ** 0.9

    def boxes(count: int) -> np.ndarray:
        size = np.exp(random.uniform(np.log(8), np.log(400), (count, 2)))
        corner = random.random((count, 2)) * (SIDE - size)
        return np.concatenate((corner, corner + size), axis=1)

    owner = np.sort(random.integers(0, images, objects))
    truth = boxes(objects)
    labels = random.choice(CLASSES, objects, p=weight / weight.sum()) + 1
    annotations = Annotations(
        root=Path("synthetic"),
        file_names=np.array([f"{i}.jpg" for i in range(images)]),
        image_ids=np.arange(1, images + 1),
        sizes=np.full((images, 2), SIDE, np.int32),
        offsets=np.searchsorted(owner, np.arange(images + 1)),
        boxes=truth,
        labels=labels,
        iscrowd=random.random(objects) < 0.01,
        difficult=np.zeros(objects, bool),
        area=(truth[:, 2:] - truth[:, :2]).prod(1) * random.uniform(0.5, 1, objects),
        class_names=tuple(f"class {k}" for k in range(1, CLASSES + 1)),
        category_ids=tuple(range(1, CLASSES + 1)),
    )
    image = np.repeat(np.arange(images), detections)
    found, found_labels = boxes(len(image)), random.choice(CLASSES, len(image), p=weight / weight.sum()) + 1
    near = np.flatnonzero((np.diff(annotations.offsets)[image] > 0) & (random.random(len(image)) < 1 / 3))
    span = np.diff(annotations.offsets)[image[near]]
    chosen = annotations.offsets[image[near]] + (random.random(len(near)) * span).astype(np.int64)
    found[near] = truth[chosen] + random.normal(0, 6, (len(near), 4))
    found[:, 2:] = np.maximum(found[:, 2:], found[:, :2] + 1)
    found_labels[near] = labels[chosen]
    boxes_found, scores = (part.astype(np.float32).astype(np.float64) for part in (found, random.random(len(image))))
    return annotations, DetectionArrays(image + 1, boxes_found, scores, found_labels)  # float32, as detectors give them


def as_dicts(annotations: Annotations, found: DetectionArrays) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The set as the libraries' own recipes take it."""
    owner = np.repeat(annotations.image_ids, np.diff(annotations.offsets)).tolist()
    truth = [
        {"id": b + 1, "image_id": i, "category_id": k, "bbox": box, "area": area, "iscrowd": int(crowd)}
        for b, (i, k, box, area, crowd) in enumerate(
            zip(
                owner,
                annotations.labels.tolist(),
                _xywh(annotations.boxes),
                annotations.area.tolist(),
                annotations.iscrowd,
                strict=True,
            )
        )
    ]
    dataset = {
        "info": {},
        "images": [{"id": i, "width": SIDE, "height": SIDE} for i in annotations.image_ids.tolist()],
        "categories": [{"id": k, "name": name} for k, name in enumerate(annotations.class_names, start=1)],
        "annotations": truth,
    }
    columns = (found.image_ids.tolist(), found.labels.tolist(), _xywh(found.boxes), found.scores.tolist())
    names = ("image_id", "category_id", "bbox", "score")
    return dataset, [dict(zip(names, row, strict=True)) for row in zip(*columns, strict=True)]


def _xywh(boxes: np.ndarray) -> list[list[float]]:
    return np.concatenate((boxes[:, :2], boxes[:, 2:] - boxes[:, :2]), axis=1).tolist()


def prepare(contestant: str, annotations: Annotations, found: DetectionArrays) -> Callable[[], list[float]]:
    """Bring the set into the form that a contestant takes, import it, and return what is timed."""
    if contestant == "evaluate_coco":
        from detpipe.evaluation import evaluate_coco

        return lambda: _numbers(evaluate_coco(annotations, found))
    if contestant == "CocoEvaluator":
        return _metric(annotations, found)
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval as Evaluator

    dataset, results = as_dicts(annotations, found)

    def run() -> list[float]:
        with contextlib.redirect_stdout(io.StringIO()):
            truth: Any = COCO()
            truth.dataset = dataset
            truth.createIndex()
            evaluator: Any = Evaluator(truth, truth.loadRes(results), iouType="bbox")
            evaluator.evaluate()
            evaluator.accumulate()
            evaluator.summarize()
        return [float(value) for value in evaluator.stats[: len(NUMBERS)]]

    return run


def _metric(annotations: Annotations, found: DetectionArrays) -> Callable[[], list[float]]:
    import torch

    from detpipe.evaluation.metrics import CocoEvaluator
    from detpipe.types import Detection

    metric = CocoEvaluator(annotations)
    ends = np.searchsorted(found.image_ids, annotations.image_ids[1:]).tolist()
    parts = (torch.from_numpy(part).tensor_split(ends) for part in (found.boxes, found.scores, found.labels))
    images = [  # tensors of their own, which go when they have been taken, as a detector's do
        (Detection(boxes=boxes.float(), scores=scores.float(), labels=labels.clone()), image_id)
        for boxes, scores, labels, image_id in zip(*parts, annotations.image_ids.tolist(), strict=True)
    ][::-1]

    def run() -> list[float]:
        while images:
            detection, image_id = images.pop()
            metric.update([detection], [image_id])
        return _numbers(metric.compute())

    return run


def _numbers(metrics: dict[str, Any]) -> list[float]:
    return [metrics[name] for name in NUMBERS]


def measure(contestant: str, size: tuple[int, int, int]) -> dict[str, Any]:
    """Evaluate once, in this process."""
    run = prepare(contestant, *make_set(*size))  # which keeps what it needs, and no more
    before = peak_memory() or 0.0
    start = time.perf_counter()
    numbers = run()
    seconds = time.perf_counter() - start
    peak = peak_memory() or 0.0
    return {"seconds": seconds, "peak": peak, "grown": peak - before, "numbers": numbers}


CONTESTANTS = ("CocoEvaluator", "evaluate_coco", "pycocotools")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--images", type=int, default=5_000)
    parser.add_argument("--objects", type=int, default=36_312)
    parser.add_argument("--detections", type=int, default=100, help="an image")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--measure", choices=CONTESTANTS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    size = (options.images, options.objects, options.detections)
    if options.measure:
        print(json.dumps(measure(options.measure, size)))
        return
    load = f"load {os.getloadavg()[0]:.2f}"
    print(f"{platform.machine()}, {os.cpu_count()} cores, {load}, Python {platform.python_version()}")
    print(f"{options.images:,} images, {options.objects:,} objects, {options.detections} detections an image\n")
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in CONTESTANTS}
    for _ in range(options.rounds):
        for name in CONTESTANTS:
            command = [sys.executable, __file__, "--measure", name]
            command += [
                f"--{key}={value}" for key, value in zip(("images", "objects", "detections"), size, strict=True)
            ]
            runs[name].append(json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout))
    reference = runs["pycocotools"]
    largest = max(
        np.abs(np.subtract(run["numbers"], reference[0]["numbers"])).max() for r in runs.values() for run in r
    )
    print("| contestant | seconds | of pycocotools' time | peak of the process, MiB | growth, MiB |")
    print("| --- | ---: | --- | ---: | ---: |")
    for name, found in runs.items():
        ratios = [run["seconds"] / other["seconds"] for run, other in zip(found, reference, strict=True)]
        seconds, peak, grown = (statistics.median(run[key] for run in found) for key in ("seconds", "peak", "grown"))
        span = f"{statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})"
        print(f"| {name} | {seconds:.1f} | {span} | {peak:.0f} | {grown:.0f} |")
    print(f"\nlargest difference of the twelve numbers: {largest:.1e}; AP {reference[0]['numbers'][0]:.4f}")
    assert largest <= 1e-12, "all must reach the same numbers"


if __name__ == "__main__":
    main()

"""What scenes of thousands of objects cost, against scenes of twenty: a training step, an evaluation, and joining what tiles find.

``python benchmarks/dense_scenes.py --objects 20 2000``; CPU seconds of all threads, and the peak of the memory that PyTorch and the
rest take beyond what there was before (in a process of its own for each row).
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from detpipe import FPN, RPN, Anchors, FastRCNNHead, SEResNet, TwoStageDetector
from detpipe import boxes as box_ops
from detpipe.datasets.tiling import tile_views
from detpipe.evaluation import evaluate_coco
from detpipe.prediction import Merge
from detpipe.types import Annotations, Detection, DetectionArrays, Target


def scene(objects: int, side: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Boxes of 10 to 60 pixels, and labels of 3 classes."""
    torch.manual_seed(seed)
    corner = torch.rand(objects, 2) * (side - 60)
    return torch.cat([corner, corner + 10 + 50 * torch.rand(objects, 2)], dim=1), torch.randint(1, 4, (objects,))


def training_step(objects: int) -> Callable[[], str]:
    """Losses and gradients of two images of 800 pixels."""
    backbone = FPN(SEResNet(18, levels=["c3", "c4"], out_channels=64), out_channels=64)
    source = RPN(backbone.out_channels, backbone.strides, anchors=Anchors(sizes=[16, 32, 64, 128]))
    head = FastRCNNHead(backbone.out_channels, 3, backbone.strides)
    detector = TwoStageDetector(backbone, source, head, min_size=800, max_size=800)
    targets = [Target(boxes=boxes, labels=labels) for boxes, labels in (scene(objects, 800, seed) for seed in (0, 1))]
    images = [torch.rand(3, 800, 800), torch.rand(3, 800, 800)]

    def step() -> str:
        sum(detector.losses(images, targets).values()).backward()  # type: ignore[union-attr]
        return "2 images"

    return step


def evaluation(objects: int) -> Callable[[], str]:
    """COCO's numbers of 20 images, with twice as many detections as objects, of which 1000 a class count."""
    count = 20
    all_boxes, all_labels = (
        torch.cat(parts) for parts in zip(*(scene(objects, 4000, k) for k in range(count)), strict=True)
    )
    boxes, labels = all_boxes.double().numpy(), all_labels.numpy()
    ids = np.repeat(np.arange(1, count + 1), objects)
    none = np.zeros(len(boxes), np.bool_)
    truth = Annotations(
        Path(), np.array([str(k) for k in range(count)]), np.arange(1, count + 1), np.full((count, 2), 4000, np.int32),
        np.arange(0, len(boxes) + 1, objects), boxes, labels, none, none, (boxes[:, 2:] - boxes[:, :2]).prod(1),
        ("a", "b", "c"), (1, 2, 3),
    )  # fmt: skip
    draw = np.random.default_rng(0)
    found = np.concatenate([boxes + draw.normal(0, 2, (len(boxes), 1)), boxes + 30])
    detections = DetectionArrays(np.tile(ids, 2), found, draw.random(len(found)), np.tile(labels, 2))

    def run() -> str:
        return f"AP {evaluate_coco(truth, detections, max_detections=(1, 100, 1000))['AP']:.3f}"

    return run


def merging(objects: int) -> Callable[[], str]:
    """Tiles of 640 pixels and the whole of an image of 4000."""
    boxes, labels = scene(objects, 4000)
    views = [*tile_views(4000, 4000, 640, 0.2), (0, 0, 4000, 4000)]
    found = []
    for x1, y1, x2, y2 in views:
        corner = torch.tensor([x1, y1, x1, y1])
        inside = box_ops.clip(boxes - corner, y2 - y1, x2 - x1)
        seen = box_ops.valid(inside, 4.0)
        moved = inside[seen] + corner + torch.randn(int(seen.sum()), 4)
        found.append(Detection(boxes=moved, scores=0.5 + torch.rand(len(moved)) / 2, labels=labels[seen]))

    def run() -> str:
        return f"{sum(len(one['scores']) for one in found)} boxes to {len(Merge()(found, views)['scores'])}"

    return run


def measure(build: Callable[[int], Callable[[], str]], objects: int) -> None:
    """Print the second of two runs."""
    torch.set_num_threads(1)
    work = build(objects)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    work()
    start = time.process_time()
    told = work()
    used, peak = time.process_time() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    print(f"{build.__name__:15} {objects:7} objects {used:9.2f} s {peak / 1024:8.0f} MiB   {told}", flush=True)


def main() -> None:
    """Measure everything."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--objects", type=int, nargs="+", default=[20, 2000], help="an image")
    options = parser.parse_args()
    context = multiprocessing.get_context("fork")
    for build in (training_step, evaluation, merging):
        for objects in options.objects:
            process = context.Process(target=measure, args=(build, objects))
            process.start()
            process.join()
            if process.exitcode:
                raise SystemExit(process.exitcode)


if __name__ == "__main__":
    main()

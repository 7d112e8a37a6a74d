"""What do keeping freed memory and channels-last convolutions bring to a training step on a CPU?

``detpipe train`` does both (``detpipe/support/allocator.py``, ``TwoStageDetector``). Each mode runs in processes of its own, since
the setting belongs to the process; processes of the modes take turns, and the medians over all their steps are compared.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from detpipe.backbones import Extractor, Level
from detpipe.detector import TwoStageDetector, total_loss
from detpipe.heads import FastRCNNHead
from detpipe.proposals import DenseGrid
from detpipe.roi_pooling import RoIAlign
from detpipe.support.allocator import keep_freed_memory
from detpipe.types import Target

MODES = ("neither", "channels-last", "kept memory", "both")


def steps(mode: str, count: int) -> list[float]:
    """Time training steps of SqueezeNet 1.1 with the Fast R-CNN head: 4 images of 480 x 640, 128 RoIs an image.

    Args:
        mode: one of ``MODES``.
        count: steps that are timed, after two that are not.

    Returns:
        ``count`` wall-clock seconds.
    """
    if mode in ("kept memory", "both"):
        keep_freed_memory()
    torch.manual_seed(0)
    backbone = Extractor("squeezenet1_1", {"c4": Level("features.12", 16)}, padding=8, out_channels=128)
    grid = DenseGrid(scales=[40, 80, 105, 200], ratios=[1.0], stride=16)
    head = FastRCNNHead(128, 3, backbone.strides, RoIAlign(7, sampling_ratio=0), [512])
    detector = TwoStageDetector(backbone, grid, head, min_size=480, max_size=640)
    if mode in ("neither", "kept memory"):
        backbone.to(memory_format=torch.contiguous_format)
    corners = torch.rand(4, 14, 2) * 400
    images = [torch.randint(0, 255, (3, 480, 640), dtype=torch.uint8) for _ in range(4)]
    targets = [
        Target(boxes=torch.cat((corner, corner + 80), dim=1), labels=torch.randint(1, 4, (14,))) for corner in corners
    ]
    seconds = []
    for _ in range(count + 2):
        start = time.perf_counter()
        total_loss(detector.losses(images, targets)).backward()
        detector.zero_grad(set_to_none=True)
        seconds.append(time.perf_counter() - start)
    return seconds[2:]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the modes in turns and print a table.

    Args:
        arguments: of the command line.

    Returns:
        The exit status.
    """
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=5, help="timed steps of each process")
    parser.add_argument("--rounds", type=int, default=3, help="processes of each mode")
    parser.add_argument("--mode", choices=MODES, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.mode is not None:
        print(json.dumps(steps(options.mode, options.steps)))
        return 0
    seconds: dict[str, list[float]] = {mode: [] for mode in MODES}
    for _ in range(options.rounds):
        for mode in MODES:
            command = [sys.executable, __file__, "--mode", mode, "--steps", str(options.steps)]
            run = subprocess.run(command, capture_output=True, text=True, check=True)
            seconds[mode] += json.loads(run.stdout)
    load = os.getloadavg()[0]
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {os.cpu_count()} cores, load {load:.1f}\n")
    print("| mode | median s | minimum s | ratio of the medians |\n| --- | --- | --- | --- |")
    base = statistics.median(seconds["neither"])
    for mode, values in seconds.items():
        median = statistics.median(values)
        print(f"| {mode} | {median:.2f} | {min(values):.2f} | {median / base:.2f} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())

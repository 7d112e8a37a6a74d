"""How long the detectors of a study take for an image, taking turns, so that what else the machine does meets all of them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping
from itertools import islice
from pathlib import Path

import torch

from detpipe.commands.training import add_arguments
from detpipe.training.configuration import CLI, quiet
from detpipe.training.models import load_detector
from detpipe.types import Target

TURNS, IMAGES = 5, 4


def milliseconds_an_image(folders: Mapping[str, Path]) -> dict[str, float]:
    """Measure detection, from pixels to boxes, of the checkpoint in a run folder of each variant.

    The median over turns; images are the first of the validation split, one at a time, on a GPU if there is one.
    """
    quiet()
    data = CLI([str(next(iter(folders.values())) / "config.yaml")], add_arguments).datamodule
    pairs = [
        ([image], [target])
        for images, targets in islice(data.val_dataloader(), IMAGES)
        for image, target in zip(images, targets, strict=True)
    ][:IMAGES]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    wait = torch.cuda.synchronize if device.type == "cuda" else (lambda: None)
    pairs = [([image.to(device) for image in images], targets) for images, targets in pairs]
    detectors = {name: load_detector(folder / "best.ckpt")[0].eval().to(device) for name, folder in folders.items()}
    seconds: dict[str, list[float]] = {name: [] for name in detectors}
    with torch.inference_mode():
        for turn in range(TURNS + 1):
            for name, detector in detectors.items():
                start = time.perf_counter()
                for images, targets in pairs:
                    detector(
                        images,
                        [
                            Target(proposals=one["proposals"].to(device)) if "proposals" in one else Target()
                            for one in targets
                        ],
                    )
                wait()
                if turn:  # the first one warms up
                    seconds[name].append((time.perf_counter() - start) / len(pairs))
    return {name: 1000 * statistics.median(values) for name, values in seconds.items()}

"""What prediction takes beyond the model's own time: reading, drawing and writing photographs while the model runs.

``python benchmarks/prediction.py --images 16 --megapixels 12`` makes photographs of noise on gradients, whose JPEG files are as
large as real ones, runs a detector of random weights over them in memory, and then all that ``detpipe predict`` does: JPEG files
in, JSON lines and drawings out. They take turns; the table has medians, and the ratios to the model's own time of all rounds; CPU
seconds too, of all threads, which a busy machine disturbs less.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from detpipe import FastRCNNHead, SEResNet, TwoStageDetector
from detpipe.datasets.workers import usable_cores
from detpipe.heads import Postprocess
from detpipe.prediction import ImageWindows, PlacedDetector
from detpipe.prediction.batches import WHOLE, plan_batches
from detpipe.prediction.inputs import find_inputs
from detpipe.prediction.job import Job
from detpipe.proposals import DenseGrid
from detpipe.types import RGB


def photograph(height: int, width: int, seed: int) -> Image.Image:
    """A picture that is as hard to compress as a photograph."""
    draw = np.random.default_rng(seed)
    coarse = Image.fromarray(draw.integers(0, 256, (height // 64, width // 64, 3), dtype=np.uint8))
    smooth = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC), dtype=np.int16)
    return Image.fromarray((smooth + draw.integers(-8, 9, (height, width, 1))).clip(0, 255).astype(np.uint8))


def build(device: torch.device, detections: int) -> PlacedDetector:
    """A detector of random weights that finds so many objects in each image."""
    torch.manual_seed(0)
    backbone = SEResNet(18, levels=["c4"], out_channels=128)
    settings = Postprocess(score_threshold=0.0, detections_per_image=detections)
    head = FastRCNNHead(backbone.out_channels, 20, backbone.strides, postprocess=settings)
    return PlacedDetector(TwoStageDetector(backbone, DenseGrid(scales=[64, 128, 256]), head).eval().to(device), device)


def main() -> None:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--images", type=int, default=16)
    parser.add_argument("--megapixels", type=float, default=12.0, help="of each photograph, 3 : 4")
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--detections", type=int, default=20, help="that are drawn on each")
    parser.add_argument("--workers", type=int, default=usable_cores())
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    device = torch.device(options.device)
    width = round((options.megapixels * 1e6 * 4 / 3) ** 0.5)
    height = round(width * 3 / 4)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "images"
        folder.mkdir()
        for index in range(options.images):
            photograph(height, width, index).save(folder / f"{index:05}.jpg", quality=88)
        size = sum(path.stat().st_size for path in folder.iterdir()) / options.images / 2**20
        kind = f"{width} x {height} pixels, {size:.1f} MiB each"
        print(f"{options.images} images of {kind}; {options.device}, {options.workers} threads")
        inputs = find_inputs([str(folder)])
        detector = build(device, options.detections)
        look = detector.__call__
        held = [inputs[k].read(RGB) for k in range(min(options.images, 2 * options.batch_size))]  # memory for few
        batches = plan_batches([one.size() for one in inputs], options.batch_size)

        def model() -> None:
            for batch in batches:
                look([held[row % len(held)] for row in batch])

        def whole(drawings: str | None) -> Callable[[], None]:
            def run() -> None:
                with tempfile.TemporaryDirectory() as out:
                    names = [str(k) for k in range(1, 21)]
                    job = Job(inputs, Path(out), "", names, "detections", {}, drawings, options.batch_size)
                    job.do(
                        WHOLE,
                        lambda one: ImageWindows(one.read(RGB)),
                        lambda _, images: look([image.whole() for image in images]),
                        options.workers,
                        False,
                        lambda *_: None,
                    )
                    job.finish(1)

            return run

        contestants = {"the model alone": model, "without drawings": whole(None), "with JPEG drawings": whole("jpg")}
        model()  # warm
        times: dict[str, list[float]] = {name: [] for name in contestants}
        work_times: dict[str, list[float]] = {name: [] for name in contestants}
        for _ in range(options.repeats):
            for name, work in contestants.items():
                start, used = time.perf_counter(), time.process_time()
                work()
                if device.type == "cuda":
                    torch.cuda.synchronize()
                times[name].append(time.perf_counter() - start)
                work_times[name].append(time.process_time() - used)
        print(f"{'':20} {'s an image':>10} {'ratio (all rounds)':>24} {'CPU s an image':>16} {'ratio':>6}")
        for name, seconds in times.items():
            ratios = [mine / own for mine, own in zip(seconds, times["the model alone"], strict=True)]
            shown = f"{statistics.median(ratios):.2f} ({', '.join(f'{ratio:.2f}' for ratio in sorted(ratios))})"
            used, own = (statistics.median(work_times[one]) for one in (name, "the model alone"))
            each = statistics.median(seconds) / options.images
            print(f"{name:20} {each:10.3f} {shown:>24} {used / options.images:16.3f} {used / own:6.2f}", flush=True)


if __name__ == "__main__":
    main()

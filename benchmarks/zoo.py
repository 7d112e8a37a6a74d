"""Is a detector of the zoo as fast as the torchvision model whose weights it has: in detection, and in a training step?

Both have the same random weights, spread as those of trained models, and take turns on the same images, each round in another
order. The result is the median over the rounds of (seconds of detpipe / seconds of torchvision), for each number of threads.

Detection: an image of 480 x 640, and a batch of four sizes; in evaluation mode, without gradients. Training: two such images
with some objects, to updated weights and freed gradients, SGD with momentum; the norms of ``fasterrcnn_resnet50_fpn`` are frozen,
everything else is trained. With one thread the seconds are those that the thread computed: other programs do not count.

Memory is the peak of a process that detects the mixed batch, above what it held before; each model has a process of its own.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import Tensor, nn
from torchvision.models import detection

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from zoo.random_models import scene, spread  # pyright: ignore[reportMissingImports] (of the tests)

from detpipe.backbones.regime import convert_norm
from detpipe.detector import total_loss
from detpipe.zoo import from_torchvision

ONE = ((480, 640),)
MIXED = ((480, 640), (640, 427), (375, 500), (500, 500))
CASES = {"one image": ONE, "four sizes": MIXED, "training step": ONE * 2}


def models(options: argparse.Namespace) -> dict[str, nn.Module]:
    """Build both models with the same weights."""
    torch.manual_seed(0)
    sizes = {"min_size": options.min_size, "max_size": options.max_size}
    make = getattr(detection, options.model)
    theirs = make(weights=None, weights_backbone=None, **sizes)
    if options.model == "fasterrcnn_resnet50_fpn":
        convert_norm(theirs.backbone.body, "frozen", 0.0)  # as the model with its weights has them
    spread(theirs, (240, 320))
    return {"detpipe": from_torchvision(theirs).eval(), "torchvision": theirs.eval()}


def detection_of(model: nn.Module, images: list[Tensor]) -> Callable[[], Any]:
    """What is timed: the detections of some images."""

    def run() -> Any:
        with torch.no_grad():
            return model(images)

    return run


def step_of(model: nn.Module, images: list[Tensor]) -> Callable[[], Any]:
    """What is timed: a training step on some images, each with three objects."""
    boxes = torch.tensor([[20.0, 30.0, 220.0, 250.0], [300.0, 100.0, 420.0, 300.0], [50.0, 300.0, 180.0, 400.0]])
    targets = [{"boxes": boxes, "labels": torch.tensor([1, 2, 3])} for _ in images]
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=1e-6, momentum=0.9)

    def run() -> None:
        model.train()
        losses: Any = getattr(model, "losses", model)
        total_loss(losses(images, targets)).backward()
        optimizer.step()
        optimizer.zero_grad()

    return run


def compare(runs: dict[str, Callable[[], Any]], rounds: int) -> tuple[list[float], dict[str, list[float]]]:
    """Let the models take turns; the ratio of each round, and the seconds of each model."""
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    for run in runs.values():
        run()
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for index in range(rounds):
        names = list(runs) if index % 2 else list(runs)[::-1]
        for name in names:
            start = clock()
            runs[name]()
            seconds[name].append(clock() - start)
    ours, theirs = seconds.values()
    return [mine / its for mine, its in zip(ours, theirs, strict=True)], seconds


def profile(runs: dict[str, Callable[[], Any]]) -> None:
    """Print the costliest operations of each model."""
    for name, run in runs.items():
        run()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as seen:
            run()
        print(
            f"\n{name}\n{seen.key_averages().table(sort_by='self_cpu_time_total', row_limit=20, max_name_column_width=50)}"
        )


def peak_of(name: str, options: argparse.Namespace) -> float:
    """MiB that the detection of the mixed batch takes above what was held, in this process."""
    run = detection_of(models(options)[name], [scene(*size, seed) for seed, size in enumerate(MIXED)])
    Path("/proc/self/clear_refs").write_text("5")  # Linux begins a new peak
    held = _status("VmRSS")
    run()
    return _status("VmHWM") - held


def _status(key: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(key))


def main() -> None:
    """Measure, and print a line for each case and number of threads."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="fasterrcnn_resnet50_fpn")
    parser.add_argument("--min-size", type=int, default=800, help="as of the models; 480 takes a third of the time")
    parser.add_argument("--max-size", type=int, default=1333)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--profile", action="store_true", help="print the costliest operations instead")
    parser.add_argument("--memory", action="store_true", help="measure peak memory, too")
    parser.add_argument("--peak-of", choices=("detpipe", "torchvision"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.peak_of:
        print(peak_of(options.peak_of, options))
        return
    print(
        f"{options.model}, {options.min_size} to {options.max_size} pixels; {platform.processor() or platform.machine()}, ",
        end="",
    )
    print(f"torch {torch.__version__}, torchvision {torchvision.__version__}")
    both = models(options)
    for case in options.cases:
        images = [scene(*size, seed) for seed, size in enumerate(CASES[case])]
        what = step_of if case == "training step" else detection_of
        runs = {name: what(model, images) for name, model in both.items()}
        for threads in options.threads:
            torch.set_num_threads(threads)
            if options.profile:
                profile(runs)
                continue
            ratios, seconds = compare(runs, options.rounds)
            low, median, high = statistics.quantiles(ratios, method="inclusive")
            medians = ", ".join(f"{name} {statistics.median(values):.3f} s" for name, values in seconds.items())
            print(
                f"{case:14} {threads} threads  {median:.3f} of torchvision's time (quartiles {low:.3f} to {high:.3f}); {medians}",
                flush=True,
            )
        for model in both.values():
            model.eval()
    if options.memory:
        command = [
            sys.executable,
            __file__,
            "--min-size",
            str(options.min_size),
            "--max-size",
            str(options.max_size),
            "--model",
            options.model,
        ]
        peaks = {
            name: float(
                subprocess.run([*command, "--peak-of", name], check=True, capture_output=True, text=True).stdout
            )
            for name in both
        }
        print(
            f"memory of the batch of four sizes, MiB: {', '.join(f'{name} {value:.0f}' for name, value in peaks.items())}"
        )


if __name__ == "__main__":
    main()

"""Is a training step of detpipe's RPN no dearer than torchvision's on the same features?

A step is forward (proposals and losses) and backward to the weights and to the features, which stand for a backbone that is
trained along. All contestants hold the same weights, anchors and settings (256 anchors an image, half of them positive,
IoU .7 and .3, 2000 candidates a level, 2000 proposals, suppression at .7), and take turns on the same features and objects in
one process, each round in another order, so that what else the machine does hits all of them. Warm-up rounds are not counted.
The result is the median over the rounds of (seconds of detpipe / seconds of torchvision). Inference is measured likewise.

What differs, because the programs do:
1. detpipe computes the loss from the cells around the sampled anchors alone. ``detpipe, dense`` is the same code with that
   switched off; the difference between the two is what it brings.
2. detpipe keeps weights channels last, as its backbones give features. Both layouts of features are measured; with features
   that are not, its copies into that layout and back are part of its time.
3. Each draws its own random anchors.

``proposals`` is the mean number of an image: equal numbers say that both did the same suppression.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torchvision
from torch import Tensor, nn
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from detpipe.proposals.anchors import Anchors
from detpipe.proposals.rpn import RPN
from detpipe.types import Target

RATIOS = (0.5, 1.0, 2.0)
THEIR_NAMES = {
    "head.convs.0": "head.conv.0.0",
    "head.objectness": "head.cls_logits",
    "head.regressor": "head.bbox_pred",
}


@dataclass(frozen=True)
class Case:
    """Features and anchors."""

    images: int
    channels: int
    cells: tuple[int, int]  # of the finest level
    strides: tuple[int, ...]
    sizes: tuple[tuple[int, ...], ...]


CASES = {
    "single level": Case(4, 512, (30, 40), (16,), ((32, 64, 128, 256, 512),)),
    "pyramid": Case(2, 256, (200, 272), (4, 8, 16, 32, 64), ((32,), (64,), (128,), (256,), (512,))),
}


@dataclass
class Contestant:
    """A proposal network and what was measured of it."""

    name: str
    model: nn.Module
    seconds: list[float] = field(default_factory=list)
    proposals: list[int] = field(default_factory=list)

    def measure(self, images: ImageList, features: dict[str, Tensor], targets: list[Target], training: bool) -> None:
        """Run and time one step."""
        self.model.train(training)
        leaves = {name: level.detach().requires_grad_(training) for name, level in features.items()}
        wait: Callable[[], None] = torch.cuda.synchronize if images.tensors.is_cuda else (lambda: None)
        wait()
        start = time.perf_counter()
        with torch.set_grad_enabled(training):
            boxes, losses = self.model(images, leaves, targets if training else None)
        if training:
            torch.stack(list(losses.values())).sum().backward()
        wait()
        self.seconds.append(time.perf_counter() - start)
        self.proposals += [len(rows) for rows in boxes]
        self.model.zero_grad(set_to_none=True)


def make_contestants(case: Case, device: str) -> list[Contestant]:
    """Build ours, ours with a dense backward pass, and torchvision's, with equal weights."""
    levels = len(case.strides)
    generator = AnchorGenerator(case.sizes, (RATIOS,) * levels)
    top = {"training": 2000, "testing": 1000}
    head = RPNHead(case.channels, generator.num_anchors_per_location()[0])
    theirs = RegionProposalNetwork(generator, head, 0.7, 0.3, 256, 0.5, top, top, 0.7)
    weights = theirs.state_dict()
    found = []
    for name in ("detpipe", "detpipe, dense"):
        strides = {f"p{level}": stride for level, stride in enumerate(case.strides)}
        ours = RPN(case.channels, strides, Anchors(case.sizes, RATIOS, offset=0.0, rounded=True))
        ours.load_state_dict({key: weights[_their_key(key)] for key in ours.state_dict()})
        if name.endswith("dense"):
            ours.head.computes_less_at = lambda features, anchors: False  # type: ignore[method-assign]
        found.append(Contestant(name, ours))
    found.append(Contestant("torchvision", theirs))
    for contestant in found:
        contestant.model.to(device)
    return found


def _their_key(key: str) -> str:
    layer, _, kind = key.rpartition(".")
    return f"{THEIR_NAMES[layer]}.{kind}"


def make_inputs(case: Case, layout: str, device: str) -> tuple[ImageList, dict[str, Tensor], list[Target]]:
    """Draw features and objects."""
    generator = torch.Generator().manual_seed(0)
    order = torch.channels_last if layout == "channels last" else torch.contiguous_format
    height, width = (side * case.strides[0] for side in case.cells)
    features = {}
    for level, stride in enumerate(case.strides):
        shape = (case.images, case.channels, -(-height // stride), -(-width // stride))
        features[f"p{level}"] = torch.randn(shape, generator=generator).to(device).contiguous(memory_format=order)
    targets = []
    for _ in range(case.images):
        count = int(torch.randint(3, 13, (1,), generator=generator))
        side = 24 * 16 ** torch.rand(count, 2, generator=generator)
        corner = torch.rand(count, 2, generator=generator) * (torch.tensor([width, height]) - side)
        boxes = torch.cat((corner, corner + side), dim=1).to(device)
        targets.append(Target(boxes=boxes, labels=torch.ones(count, dtype=torch.int64, device=device)))
    images = ImageList(torch.zeros(case.images, 3, height, width, device=device), [(height, width)] * case.images)
    return images, features, targets


def compare(case: Case, layout: str, training: bool, options: argparse.Namespace) -> list[Contestant]:
    """Let the contestants take turns."""
    torch.manual_seed(0)
    contestants = make_contestants(case, options.device)
    inputs = make_inputs(case, layout, options.device)
    for index in range(options.warmup + options.rounds):
        first = index % len(contestants)
        for contestant in contestants[first:] + contestants[:first]:
            contestant.measure(*inputs, training)
    for contestant in contestants:
        del contestant.seconds[: options.warmup]
    return contestants


def report(name: str, layout: str, training: bool, contestants: list[Contestant]) -> str:
    """Write one line for each contestant."""
    peer = contestants[-1]
    lines = []
    for contestant in contestants:
        ratios = [mine / its for mine, its in zip(contestant.seconds, peer.seconds, strict=True)]
        low, median, high = statistics.quantiles(ratios, method="inclusive")
        cells = (
            f"{statistics.median(contestant.seconds):.3f}",
            f"{min(contestant.seconds):.3f}",
            f"{median:.3f}",
            f"{low:.3f}-{high:.3f}",
            f"{statistics.mean(contestant.proposals):.0f}",
        )
        what = (name, layout, "training" if training else "inference", contestant.name)
        lines.append(" ".join((*(f"{cell:14}" for cell in what), *(f"{cell:>12}" for cell in cells))))
    return "\n".join(lines)


def _describe(options: argparse.Namespace) -> str:
    listing = Path("/proc/cpuinfo")
    entries = listing.read_text(encoding="utf-8").splitlines() if listing.exists() else []
    cpu = next((entry.partition(":")[2].strip() for entry in entries if entry.startswith("model name")), "unknown CPU")
    gpu = f", {torch.cuda.get_device_name(options.device)}" if options.device.startswith("cuda") else ""
    load = f", load {os.getloadavg()[0]:.1f} at the start" if hasattr(os, "getloadavg") else ""
    cases = [
        f"{name}: {case.images} images, {case.channels} channels, from {case.cells[0]} x {case.cells[1]} cells, strides "
        f"{', '.join(map(str, case.strides))}"
        for name, case in CASES.items()
    ]
    machine = f"{cpu} ({platform.machine()}), {os.cpu_count()} cores, {torch.get_num_threads()} threads{gpu}{load}"
    versions = f"torch {torch.__version__}, torchvision {torchvision.__version__}, Python {platform.python_version()}"
    turns = f"{options.rounds} rounds after {options.warmup} of warm-up, on {options.device}"
    return "\n".join((*cases, turns, machine, versions))


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line, by default that of the process."""
    parser = argparse.ArgumentParser(description="A training step of detpipe's RPN against torchvision's.")
    parser.add_argument("--rounds", type=int, default=10, help="measured steps of each (10)")
    parser.add_argument("--warmup", type=int, default=2, help="steps before these (2)")
    parser.add_argument("--case", choices=list(CASES), action="append", help="default: all")
    parser.add_argument("--layout", choices=["contiguous", "channels last"], action="append", help="default: both")
    parser.add_argument("--phase", choices=["training", "inference"], action="append", help="default: both")
    parser.add_argument("--threads", type=int, help="of torch on the CPU; its own choice by default")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N (cpu)")
    parser.add_argument("--profile", action="store_true", help="print the costliest operations of each as well")
    options = parser.parse_args(arguments)
    if options.rounds < 2 or options.warmup < 0 or (options.threads is not None and options.threads < 1):
        parser.error("--rounds must be at least 2 (for the quartiles), --warmup at least 0, --threads at least 1")
    return options


def profile(case: Case, layout: str, training: bool, options: argparse.Namespace) -> None:
    """Print the operations that cost each contestant most, over one step."""
    inputs = make_inputs(case, layout, options.device)
    cuda = options.device.startswith("cuda")
    activities = [torch.profiler.ProfilerActivity.CPU, *([torch.profiler.ProfilerActivity.CUDA] if cuda else [])]
    for contestant in make_contestants(case, options.device):
        contestant.measure(*inputs, training)
        with torch.profiler.profile(activities=activities) as record:
            contestant.measure(*inputs, training)
        print(f"\n{contestant.name}")
        key = "self_device_time_total" if cuda else "self_cpu_time_total"
        print(record.key_averages().table(sort_by=key, row_limit=20, max_name_column_width=60))


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print the table, and return the exit status."""
    options = parse(arguments)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    print(_describe(options), flush=True)
    heads = ("case", "features", "phase", "network"), ("median s", "minimum s", "ratio", "quartiles", "proposals")
    print(" ".join((*(f"{cell:14}" for cell in heads[0]), *(f"{cell:>12}" for cell in heads[1]))), flush=True)
    for name in options.case or CASES:
        for layout in options.layout or ("channels last", "contiguous"):
            for phase in options.phase or ("training", "inference"):
                training = phase == "training"
                print(report(name, layout, training, compare(CASES[name], layout, training, options)), flush=True)
                if options.profile:
                    profile(CASES[name], layout, training, options)
    return 0


if __name__ == "__main__":
    sys.exit(main())

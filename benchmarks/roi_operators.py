"""How fast are detpipe's RoI operators, and how much memory do they take, next to torchvision's?

For each case the two take turns on the same features and boxes, and medians are compared. ``forward`` is the call,
``both`` the call and the backward pass to the features. Features are in PyTorch's ordinary layout; so is the gradient that
comes back, as it does from a flattened linear layer. detpipe's result is channels last in memory; the row ``contiguous``
adds its copy into the ordinary layout, so that nothing is left out of the comparison.

``deterministic`` compares with the path that torchvision takes on a GPU under ``torch.use_deterministic_algorithms(True)``,
plain PyTorch operations, run without compilation. Its ordinary CPU kernel is deterministic too: on one thread, and it is the
peer of all other rows. detpipe has one path, which is always deterministic.

``peak memory`` is the highest amount above what features and boxes take, over forward and backward: on a CPU the resident
memory of a process of its own (Linux), on a GPU the highest allocation.

``bandwidth`` divides the bytes that must be moved at least (read the map and write the result; read the gradient and write
the map's) by the time, as a share of the bandwidth of a large copy measured in the same run.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import torchvision
from torch import Tensor
from torchvision.ops import roi_align as peer_align
from torchvision.ops import roi_pool as peer_pool

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from torchvision.ops import MultiScaleRoIAlign

from detpipe.roi_pooling import RoIAlign, precise_roi_pool, roi_align, roi_max_pool

STRIDE, BINS = 16, 7
SCALE = 1 / STRIDE
PYRAMID = (4, 8, 16, 32)
Features = list[Tensor]  # one map, or those of a pyramid
Operator = Callable[[Features, Tensor], Tensor]


class Case(NamedTuple):
    """Sizes of the operands."""

    images: int
    rois: int  # of each image
    channels: int
    height: int = 50  # of the map, in cells of 16 pixels
    width: int = 68


CASES = {"standard": Case(2, 512, 256), "tiny": Case(1, 8, 256), "large": Case(8, 2000, 512)}


def _peer_deterministic(features: Features, boxes: Tensor) -> Tensor:
    path = importlib.import_module("torchvision.ops.roi_align")._roi_align
    with torch.compiler.set_stance("force_eager"):
        return path(features[0], boxes, SCALE, BINS, BINS, 2, True)


def _peer_pyramid(features: Features, boxes: Tensor) -> Tensor:
    names = [str(stride) for stride in PYRAMID]
    size = (features[0].shape[2] * PYRAMID[0], features[0].shape[3] * PYRAMID[0])
    own = list(boxes[:, 1:].split(len(boxes) // len(features[0])))  # as many boxes in each image
    pool = MultiScaleRoIAlign(names, BINS, 2)
    return pool(dict(zip(names, features, strict=True)), own, [size] * len(own))


def _pyramid(features: Features, boxes: Tensor) -> Tensor:
    names = [str(stride) for stride in PYRAMID]
    return RoIAlign(BINS, 2)(dict(zip(names, features, strict=True)), boxes, dict(zip(names, PYRAMID, strict=True)))


# name -> torchvision's, detpipe's
OPERATORS: dict[str, tuple[Operator | None, Operator]] = {
    "RoIAlign 2 x 2": (
        lambda features, boxes: peer_align(features[0], boxes, BINS, SCALE, 2, aligned=True),
        lambda features, boxes: roi_align(features[0], boxes, BINS, SCALE, 2),
    ),
    "RoIAlign 2 x 2, contiguous": (
        lambda features, boxes: peer_align(features[0], boxes, BINS, SCALE, 2, aligned=True),
        lambda features, boxes: roi_align(features[0], boxes, BINS, SCALE, 2).contiguous(),
    ),
    "RoIAlign adaptive": (
        lambda features, boxes: peer_align(features[0], boxes, BINS, SCALE, 0, aligned=True),
        lambda features, boxes: roi_align(features[0], boxes, BINS, SCALE, 0),
    ),
    "RoI max pooling": (
        lambda features, boxes: peer_pool(features[0], boxes, BINS, SCALE),
        lambda features, boxes: roi_max_pool(features[0], boxes, BINS, SCALE),
    ),
    "RoIAlign of a pyramid": (_peer_pyramid, _pyramid),
    "precise": (None, lambda features, boxes: precise_roi_pool(features[0], boxes, BINS, SCALE)),  # no peer has it
    "deterministic": (
        _peer_deterministic,
        lambda features, boxes: roi_align(features[0], boxes, BINS, SCALE, 2),
    ),
}


def make_operands(case: Case, spread: str, device: str, name: str = "") -> tuple[Features, Tensor]:
    """Draw features and boxes.

    Args:
        case: their sizes.
        spread: "proposals": sides log-uniform from 16 to 480 pixels, centers anywhere, so that some reach over the border;
            "uniform": two corners anywhere in the image, which makes large boxes.
        device: where to put them.
        name: of the operator, whether it takes a pyramid.

    Returns:
        Maps ``[N, C, H, W]``, and ``[R, 5]``.
    """
    generator = torch.Generator().manual_seed(0)
    height, width = case.height * STRIDE, case.width * STRIDE
    strides = PYRAMID if "pyramid" in name else (STRIDE,)
    features = [
        torch.randn(case.images, case.channels, height // stride, width // stride, generator=generator)
        for stride in strides
    ]
    count = case.images * case.rois
    extent = torch.tensor([width, height])
    if spread == "uniform":
        corners = (torch.rand(count, 2, 2, generator=generator) * extent).sort(dim=1).values
        boxes = torch.cat((corners[:, 0], torch.maximum(corners[:, 1], corners[:, 0] + 4)), dim=1)
    else:
        half = 8 * 30 ** torch.rand(count, 2, generator=generator)
        center = torch.rand(count, 2, generator=generator) * extent
        boxes = torch.cat((center - half, center + half), dim=1)
    image = torch.arange(case.images).repeat_interleave(case.rois)
    rois = torch.cat((image[:, None], boxes), dim=1).to(device)
    return [level.to(device) for level in features], rois


def run(operator: Operator, features: Features, boxes: Tensor) -> tuple[float, float]:
    """Time one forward and one backward pass, in seconds."""
    leaves = [level.clone().requires_grad_() for level in features]
    wait = torch.cuda.synchronize if boxes.is_cuda else (lambda: None)
    wait()
    start = time.perf_counter()
    pooled = operator(leaves, boxes)
    wait()
    middle = time.perf_counter()
    grad = torch.ones(pooled.shape, device=boxes.device)
    wait()
    resumed = time.perf_counter()
    pooled.backward(grad)
    wait()
    return middle - start, time.perf_counter() - resumed


def peak_memory(name: str, case: Case, spread: str, device: str, which: int) -> int:
    """Measure the bytes that forward and backward take above their operands."""
    features, boxes = make_operands(case, spread, device, name)
    operator = OPERATORS[name][which]
    assert operator is not None
    run(operator, *make_operands(CASES["tiny"], spread, device, name))  # what is loaded or compiled at the first call
    if device != "cpu":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run(operator, features, boxes)
        return torch.cuda.max_memory_allocated() - before
    Path("/proc/self/clear_refs").write_text("5")  # the highest resident size starts again from the present one
    before = _status("VmRSS")
    run(operator, features, boxes)
    return _status("VmHWM") - before


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) * 1024


def peak_in_own_process(name: str, case_name: str, options: argparse.Namespace, spread: str, which: int) -> int | None:
    """Measure in a fresh process; None where the system has no such figure."""
    if options.device == "cpu" and not Path("/proc/self/clear_refs").exists():
        return None
    job = json.dumps([name, case_name, spread, options.device, which, options.threads])
    done = subprocess.run([sys.executable, __file__, "--job", job], capture_output=True, text=True, check=True)
    return int(done.stdout.split()[-1])


def copy_bandwidth(device: str) -> float:
    """Measure bytes a second, read and written, of copying 256 MiB."""
    source = torch.ones(1 << 26, device=device)
    target = torch.empty_like(source)
    seconds = []
    for _ in range(7):
        start = time.perf_counter()
        target.copy_(source)
        if device != "cpu":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return 2 * source.nbytes / min(seconds)


class Measured(NamedTuple):
    """What was measured of an operator, torchvision's first; None where it has none, or where there is no such figure."""

    forward: tuple[float | None, float]  # seconds, medians
    both: tuple[float | None, float]
    peaks: tuple[int | None, int | None]  # bytes
    floors: tuple[float, float]  # seconds of a copy of the bytes that must be moved, forward and both

    def ratio(self, both: bool) -> float | None:
        """How many times as fast detpipe is."""
        peer, own = self.both if both else self.forward
        return None if peer is None else peer / own


def measure(
    name: str, case_name: str, spread: str, options: argparse.Namespace, bandwidth: float, memory: bool = True
) -> Measured:
    """Let the two take turns."""
    case, contestants = CASES[case_name], [which for which in (0, 1) if OPERATORS[name][which] is not None]
    features, boxes = make_operands(case, spread, options.device, name)
    repeats = options.repeats * (10 if case_name == "tiny" else 1)
    seconds: list[list[tuple[float, float]]] = [[], []]
    for index in range(repeats + 1):
        for which in contestants if index % 2 else contestants[::-1]:
            operator = OPERATORS[name][which]
            assert operator is not None
            timed = run(operator, features, boxes)
            if index:  # the first is warm-up
                seconds[which].append(timed)
    forward = [statistics.median(one[0] for one in own) if own else None for own in seconds]
    both = [statistics.median(sum(one) for one in own) if own else None for own in seconds]
    peaks = [
        peak_in_own_process(name, case_name, options, spread, which) if memory and which in contestants else None
        for which in (0, 1)
    ]
    assert forward[1] is not None
    assert both[1] is not None
    pooled = case.images * case.rois * BINS**2 * case.channels * 4
    floor = (sum(level.nbytes for level in features) + pooled) / bandwidth
    return Measured((forward[0], forward[1]), (both[0], both[1]), (peaks[0], peaks[1]), (floor, 2 * floor))


def row(name: str, where: str, measured: Measured) -> str:
    """Write a row of the table."""
    (peer, own), (peer_both, own_both), peaks = measured.forward, measured.both, measured.peaks
    memory = "not measured"
    if peaks[0] is not None and peaks[1] is not None:
        memory = f"{peaks[0] / 2**20:.0f} / {peaks[1] / 2**20:.0f} = {peaks[1] / peaks[0]:.2f}"
    cells = (
        where,
        name,
        f"{'' if peer is None else f'{peer * 1e3:.1f} / '}{own * 1e3:.1f}",
        "" if peer is None else f"{peer / own:.2f}",
        f"{'' if peer_both is None else f'{peer_both * 1e3:.1f} / '}{own_both * 1e3:.1f}",
        "" if peer_both is None else f"{peer_both / own_both:.2f}",
        memory,
        f"{measured.floors[0] / own:.0%} / {measured.floors[1] / own_both:.0%}",
    )
    return "| " + " | ".join(cells) + " |"


def describe(options: argparse.Namespace, bandwidth: float) -> str:
    """Name the machine and the setting."""
    listing = Path("/proc/cpuinfo")
    entries = listing.read_text(encoding="utf-8").splitlines() if listing.exists() else []
    cpu = next((entry.partition(":")[2].strip() for entry in entries if entry.startswith("model name")), "unknown CPU")
    if options.device == "cpu":
        where = f"{cpu}, {torch.get_num_threads()} threads of {os.cpu_count()} cores"
        gpu = "" if torch.cuda.is_available() else "; no GPU was to be had, so no figure here says anything about one"
    else:
        where, gpu = torch.cuda.get_device_name(), ""
    return (
        f"{where}, load {os.getloadavg()[0]:.1f}{gpu}\n"
        f"torch {torch.__version__}, torchvision {torchvision.__version__}, Python {platform.python_version()}; "
        f"medians of {options.repeats} turns; a copy moves {bandwidth / 1e9:.1f} GB/s\n"
        + "; ".join(
            f"{name}: {case.images} x {case.channels} x {case.height} x {case.width}, {case.rois} RoIs an image"
            for name, case in CASES.items()
        )
        + f"; {BINS} x {BINS} bins, float32\n"
    )


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="RoI operators of detpipe and torchvision, side by side.")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--threads", type=int, default=2, help="of PyTorch on a CPU (2)")
    parser.add_argument(
        "--repeats", type=int, default=7, help="measured turns of each, ten times as many of tiny ones (7)"
    )
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--operators", nargs="+", default=list(OPERATORS), choices=list(OPERATORS), metavar="OPERATOR")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if min(options.threads, options.repeats) < 1:
        parser.error("--threads and --repeats must be positive")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: PyTorch finds no GPU here")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print the table, and return the exit status."""
    options = parse(arguments)
    if options.job is not None:
        name, case_name, spread, device, which, threads = json.loads(options.job)
        torch.set_num_threads(threads)
        print(peak_memory(name, CASES[case_name], spread, device, which))
        return 0
    torch.set_num_threads(options.threads)
    bandwidth = copy_bandwidth(options.device)
    print(describe(options, bandwidth))
    print("Times are torchvision / detpipe in ms, ratios say how many times as fast detpipe is, memory is in MiB.\n")
    print("| case, boxes | operator | forward | ratio | both | ratio | peak memory | bandwidth, forward / both |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for case_name in options.cases:
        for spread in ("proposals", "uniform") if case_name != "large" else ("proposals",):
            for name in options.operators:
                if name == "deterministic" and case_name == "large":
                    continue  # torchvision's path would take more than 50 GB
                measured = measure(name, case_name, spread, options, bandwidth)
                print(row(name, f"{case_name}, {spread}", measured), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())

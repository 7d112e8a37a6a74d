"""What a GPU says: every figure with a target, from the benchmarks beside this file, in one run; ``gpu.sh`` starts it.

A part that fails is a row that says so, and the others go on; parts that would begin after ``--minutes`` are left out by name. Exit
status 0: everything ran, whatever it found; 1 else. With ``--smoke`` sizes are tiny and a figure says nothing but that it was made.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(ROOT / "benchmarks"))

NEEDED = {"torch": "torch", "torchvision": "torchvision", "lightning": "lightning", "torchmetrics": "torchmetrics"}
# for tests, and for configurations
WANTED = {
    **{name: name for name in ("triton", "pytest", "hypothesis", "albumentations", "pycocotools", "jsonargparse")},
    **{name: name for name in ("defusedxml", "msgspec", "safetensors", "filelock", "fsspec")},
}


class Row(NamedTuple):
    """One figure."""

    part: str
    what: str
    value: float | str
    target: str = ""  # such as ">= 1.6"

    @property
    def met(self) -> bool | None:
        """Whether the target is met; None where there is none, or no figure."""
        sign, _, number = self.target.partition(" ")
        if not number or isinstance(self.value, str):
            return None
        return self.value >= float(number) if sign == ">=" else self.value <= float(number)


def missing(packages: dict[str, str]) -> list[str]:
    """Name what is not installed."""
    return [name for module, name in packages.items() if importlib.util.find_spec(module) is None]


def tests(options: argparse.Namespace) -> Iterator[Row]:
    """The tests that need a GPU; files that lack a package are left out by pytest, with its message."""
    marked = [path for path in sorted((ROOT / "tests").rglob("test_*.py")) if "mark.gpu" in path.read_text("utf-8")]
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-m",
        "gpu",
        "--continue-on-collection-errors",
        "-p",
        "no:cacheprovider",
    ]
    done = subprocess.run([*command, *map(str, marked)], cwd=ROOT, capture_output=True, text=True, check=False)
    (options.out / "pytest.txt").write_text(done.stdout + done.stderr, "utf-8")
    lines = done.stdout.strip().splitlines() or ["no output"]
    yield Row("tests", "pytest -m gpu", lines[-1].strip("= "))
    for line in lines:
        if line.startswith(("FAILED", "ERROR")):
            yield Row("tests", line.partition(" - ")[0], "failed")


def operators(options: argparse.Namespace) -> Iterator[Row]:
    """Forward and both passes against torchvision's, and against a copy of the bytes that must be moved."""
    import roi_operators as bench

    if options.smoke:
        bench.CASES.update(dict.fromkeys(bench.CASES, bench.Case(1, 4, 8, 10, 12)))
    settings = bench.parse(["--device", options.device, "--repeats", "2" if options.smoke else "9"])
    bandwidth = bench.copy_bandwidth(options.device)
    yield Row("operators", "bandwidth of a copy, GB/s", bandwidth / 1e9)
    targets = {"standard": (">= 1.6", ">= 3"), "large": (">= 2.5", ">= 6")}
    names = [name for name in bench.OPERATORS if name not in ("deterministic", "RoIAlign 2 x 2, contiguous")]
    for case in ("standard", "tiny", "large"):
        for name in names:
            found = bench.measure(name, case, "proposals", settings, bandwidth, memory=False)
            wanted = targets.get(case, ("", "")) if name == "RoIAlign 2 x 2" else ("", "")
            if name == "RoI max pooling":
                wanted = (">= 1.0", ">= 1.5")
            for both, target in zip((False, True), wanted, strict=True):
                what = f"{name}, {case}, {'both' if both else 'forward'}"
                own = (found.both if both else found.forward)[1]
                ratio = found.ratio(both)
                if ratio is not None:
                    yield Row("operators", f"{what}: times as fast as torchvision", ratio, target)
                floor = "<= 3" if case == "large" and name == "RoIAlign 2 x 2" else ""
                yield Row("operators", f"{what}: times the copy of its bytes", own / found.floors[both], floor)
                yield Row("operators", f"{what}: ms", own * 1e3)


def deterministic(options: argparse.Namespace) -> Iterator[Row]:
    """Gradients in a fixed order, against torchvision's path under ``use_deterministic_algorithms``."""
    import roi_operators as bench

    case = "standard"
    if options.smoke:
        bench.CASES[case] = bench.Case(1, 4, 8, 10, 12)
    settings = bench.parse(["--device", options.device, "--repeats", "2" if options.smoke else "5"])
    found = bench.measure("deterministic", case, "proposals", settings, bench.copy_bandwidth(options.device))
    ratio = found.ratio(both=True)
    assert ratio is not None
    yield Row("deterministic", "forward and backward: times as fast as torchvision", ratio, ">= 10")
    if found.peaks[0] and found.peaks[1] is not None:
        yield Row("deterministic", "peak memory, part of torchvision's", found.peaks[1] / found.peaks[0], "<= 0.1")


def train_step(options: argparse.Namespace) -> Iterator[Row]:
    """A step, from images to updated weights, against torchvision's FasterRCNN."""
    import train_step as bench

    tiny = [
        "--image-size",
        "64",
        "96",
        "--batch",
        "2",
        "--rois",
        "8",
        "--widths",
        "16",
        "16",
        "--steps",
        "2",
        "--warmup",
        "1",
    ]
    full = ["--steps", "30", "--warmup", "6", "--batch", "8"]
    for backbone, size in (("resnet50_fpn", ["--image-size", "800", "1216", "--rois", "512"]), ("squeezenet", [])):
        arguments = [*(tiny if options.smoke else [*full, *size]), "--backbone", backbone, "--device", options.device]
        settings = bench.parse(arguments)
        contestants = bench.make_contestants(settings)
        bench.compare(contestants, bench.make_batches(settings), settings)
        (options.out / f"train_step_{backbone}.txt").write_text(bench.report(contestants, settings), "utf-8")
        ours, peer = contestants[:2]
        ratio = bench.statistics.median(a / b for a, b in zip(ours.seconds, peer.seconds, strict=True))
        yield Row("training step", f"{backbone}: part of torchvision's time", ratio, "<= 0.66")
        yield Row("training step", f"{backbone}: ms", bench.statistics.median(ours.seconds) * 1e3)
        if ours.peaks and peer.peaks:
            yield Row(
                "training step", f"{backbone}: part of torchvision's peak memory", max(ours.peaks) / max(peer.peaks)
            )
        step = partial(ours.step, bench.make_batches(settings)[0])
        yield from _waiting(f"training step of {backbone}", step, options)


def heads(options: argparse.Namespace) -> Iterator[Row]:
    """A training step and detection of each head beside the plain one's, and what it asks the device for."""
    import heads as bench
    import torch

    if options.smoke:
        bench.IMAGES, bench.ROIS, bench.SIZE = 1, 8, (96, 128)
        bench.COMMON = {"fc": [16, 16], "sampler": bench.RoISampler(8, 0.25)}
    device, turns = torch.device(options.device), 2 if options.smoke else 21
    data = bench.inputs(device)
    targets = {"affine glimpse": "<= 1.25", "AOD, T = 2, REINFORCE n = 8": "<= 2.0", "AOD, T = 2, pathwise": "<= 2.0"}
    for name, make in bench.HEADS.items():
        if name not in targets and options.smoke:
            continue
        head = make()
        pair = [head.to(device), bench.plain(head.pooler).to(device)]
        for what, measure in (("training step", bench.step), ("detection", bench.detect)):
            seconds, (_, ratio, _) = bench.in_turns(measure, pair, data, turns)
            target = targets.get(name, "") if measure is bench.step else ""
            yield Row("heads", f"{name}, {what}: times the plain head's", ratio, target)
            yield Row("heads", f"{name}, {what}: ms", seconds * 1e3)
        for label, one in ((name, pair[0]), (f"the plain head beside {name}", pair[1])):
            yield from _launches(label, partial(bench.step, one, data), options)
    plain, (features, proposals, truth) = bench.plain(bench.ALIGN).to(device).train(), data

    def step() -> None:
        bench.total_loss(plain(features, proposals, [bench.SIZE] * bench.IMAGES, truth)[1]).backward()

    yield from _waiting("training step of the plain head", step, options)
    if device.type == "cuda":
        yield Row("heads", "the plain head's step as a CUDA graph", _captured(plain, data, bench))


def _launches(name: str, step: Callable[[], object], options: argparse.Namespace) -> Iterator[Row]:
    """Operations that a step asks for, and on a GPU the kernels that the profiler saw launched."""
    import torch
    from launches import Launches

    with Launches(options.device) as counted, torch.autograd.set_multithreading_enabled(False):
        step()
    yield Row("launches", f"{name}: operations", counted.total())
    if options.device == "cuda":
        kinds = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
        with torch.profiler.profile(activities=kinds) as record:
            step()
        kernels = [event.count for event in record.key_averages() if "LaunchKernel" in event.key]
        yield Row("launches", f"{name}: kernels", sum(kernels))


def _waiting(name: str, step: Callable[[], object], options: argparse.Namespace) -> Iterator[Row]:
    """Whether losses, gradients and update of a step make the host wait, by PyTorch's own check."""
    import torch

    if options.device != "cuda":
        return
    step()  # what the first call compiles and lays out
    torch.cuda.synchronize()
    answer = "no"
    try:
        torch.cuda.set_sync_debug_mode("error")
        step()
    except RuntimeError as error:
        answer = f"yes: {str(error).splitlines()[0]}"
    finally:
        torch.cuda.set_sync_debug_mode("default")
    yield Row("waiting", f"{name} waits for the GPU", answer)


def _captured(head: Any, data: Any, bench: Any) -> str:
    """Whether losses and gradients on fixed RoIs can be a CUDA graph, and its replay in ms."""
    import torch

    features, proposals, targets = data
    head.train()
    rois = head.sampler(proposals, targets)

    def step() -> None:
        bench.total_loss(head.losses(features, rois, [bench.SIZE] * bench.IMAGES, targets)).backward()

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(20):
        graph.replay()
    torch.cuda.synchronize()
    return f"captured; a replay takes {(time.perf_counter() - start) / 20 * 1e3:.2f} ms"


PARTS: dict[str, Callable[[argparse.Namespace], Iterator[Row]]] = {
    "tests": tests,
    "operators": operators,
    "heads": heads,
    "train_step": train_step,
    "deterministic": deterministic,
}


def machine(options: argparse.Namespace) -> dict[str, str]:
    """Where this was measured."""
    import torch
    import torchvision

    where = torch.cuda.get_device_name() if options.device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    versions = {"torch": torch.__version__, "torchvision": torchvision.__version__, "Python": platform.python_version()}
    return {"device": where, "load": f"{os.getloadavg()[0]:.1f}", **versions}


def table(rows: Sequence[Row], where: dict[str, str]) -> str:
    """Write all rows as Markdown."""
    lines = [", ".join(f"{name} {value}" for name, value in where.items()), ""]
    lines += ["| part | what | measured | target | met |", "| --- | --- | ---: | --- | --- |"]
    for row in rows:
        value = row.value if isinstance(row.value, str) else f"{row.value:.4g}"
        met = {None: "", True: "yes", False: "**no**"}[row.met]
        lines.append(f"| {row.part} | {row.what} | {value} | {row.target} | {met} |")
    return "\n".join(lines) + "\n"


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="gpu.sh", description="All that is measured on a GPU, with targets.")
    parser.add_argument("--out", type=Path, default=Path("gpu_results"), help="folder of gpu.json and gpu.md")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes: does it run?")
    parser.add_argument("--minutes", type=float, default=8.0, help="begin no part after so long (8)")
    parser.add_argument("--only", nargs="+", choices=list(PARTS), default=list(PARTS))
    options = parser.parse_args(arguments)
    if lacking := missing(NEEDED):
        parser.error(f"not installed: {', '.join(lacking)}; the head of gpu.sh says how to bring wheels")
    import torch

    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("PyTorch finds no GPU here; --device cpu --smoke tries the script out")
    options.out = options.out.resolve()
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, write both files, print the table, and return the exit status."""
    options = parse(arguments)
    if lacking := missing(WANTED):
        print(
            f"not installed, some tests are left out: {', '.join(lacking)} (the head of gpu.sh says how to bring wheels)"
        )
    options.out.mkdir(parents=True, exist_ok=True)
    rows: list[Row] = []
    start, where, failed = time.monotonic(), machine(options), False
    for name in options.only:
        began = time.monotonic()
        if began - start > 60 * options.minutes:
            rows.append(Row(name, "not begun", "no time left"))
            failed = True
            continue
        try:
            for row in PARTS[name](options):
                row = row._replace(target="") if options.smoke else row
                rows.append(row)
                print(f"{row.part}: {row.what}: {row.value} {row.target}", flush=True)
        except Exception as error:  # the parts after it are worth their time
            traceback.print_exc()
            rows.append(Row(name, "failed", f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"))
            failed = True
        rows.append(Row(name, "seconds of this part", time.monotonic() - began))
        (options.out / "gpu.json").write_text(
            json.dumps({"machine": where, "rows": [{**row._asdict(), "met": row.met} for row in rows]}, indent=1),
            "utf-8",
        )
        (options.out / "gpu.md").write_text(table(rows, where), "utf-8")
    print(f"\n{table(rows, where)}\n{options.out / 'gpu.json'}")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())

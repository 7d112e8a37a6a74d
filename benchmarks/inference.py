"""Which way of running a detector takes least time, and how does it compare with torchvision's FasterRCNN?

One image of 480 x 640, one thread and two. All contestants have SqueezeNet 1.1 up to stride 16, a proposal network of its width, as
many proposals, RoIAlign of 7 x 7 bins with 2 x 2 samples, and as wide a head; weights are random, spread so that boxes differ. They
take turns round by round in one process, each round in another order, and the ratio is the median over rounds of (seconds / seconds
of torchvision's detector as it is). The aim is a best ratio of at most .6.

What differs: torchvision has 4 (K + 1) box outputs, detpipe 4 K; the weights of both are not the same, so that as many boxes as are
proposed enter the heads, which the table shows. In 8 bits others are found, which this does not say; see docs/export.md.

    python benchmarks/inference.py [--rounds 15] [--threads 1 2] [--proposals 1000] [--no-compile]
"""

from __future__ import annotations

import argparse
import collections
import functools
import json
import os
import platform
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.ops import MultiScaleRoIAlign

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from detpipe.backbones import Extractor, Level
from detpipe.detector import TwoStageDetector
from detpipe.exporting.files import export
from detpipe.exporting.program import Program
from detpipe.heads import FastRCNNHead
from detpipe.proposals import RPN, Anchors, ProposalSelection
from detpipe.roi_pooling import RoIAlign

WHOLE, SMALL = "model.onnx", "int8.onnx"
FILES = {WHOLE: "f32", SMALL: "int8"}
SIZES, RATIOS, CLASSES = [32, 64, 128, 256, 512], [0.5, 1.0, 2.0], 20
STEPS = {
    "Conv": "convolutions",
    "RoiAlign": "RoIAlign",
    "Gemm": "linear layers",
    "MatMul": "linear layers",
    "NonMaxSuppression": "suppression",
    "TopK": "sorting",
    "Resize": "resizing",
}


class Widened(nn.Module):
    """SqueezeNet as torchvision wants a backbone."""

    def __init__(self, extractor: Extractor) -> None:
        super().__init__()
        self.extractor, self.out_channels = extractor, extractor.out_channels

    def forward(self, images: Tensor) -> Tensor:
        """Compute the map."""
        return self.extractor(images)["c4"]


def build(proposals: int) -> tuple[TwoStageDetector, FasterRCNN]:
    """Make both detectors, with the same backbone."""
    backbone = Extractor("squeezenet1_1", {"c4": Level("features.12", 16)}, padding=8)
    selection = ProposalSelection(pre_nms_top_n=(2000, proposals), post_nms_top_n=(2000, proposals))
    source = RPN(backbone.out_channels, backbone.strides, Anchors(sizes=[SIZES], ratios=RATIOS), selection=selection)
    head = FastRCNNHead(backbone.out_channels, CLASSES, backbone.strides, pooler=RoIAlign(7))
    own = TwoStageDetector(backbone, source, head, min_size=480, max_size=640)
    peer = FasterRCNN(
        Widened(backbone),
        CLASSES + 1,
        min_size=480,
        max_size=640,
        rpn_anchor_generator=AnchorGenerator((tuple(SIZES),), (tuple(RATIOS),)),
        rpn_pre_nms_top_n_test=proposals,
        rpn_post_nms_top_n_test=proposals,
        box_roi_pool=MultiScaleRoIAlign(["0"], 7, 2),
    )
    for model in (own, peer):
        for name, parameter in model.named_parameters():
            if any(part in name for part in ("objectness", "cls_logits", "classifier", "cls_score")):
                nn.init.normal_(parameter, std=0.05)
    return own.eval().requires_grad_(False), peer.eval().requires_grad_(False)


def contestants(
    own: TwoStageDetector, peer: FasterRCNN, image: Tensor, folder: Path, options: Any, threads: int
) -> dict[str, Any]:
    """Name -> what detects once."""
    batch = image[None]
    found: dict[str, Callable[[], Any]] = {
        "torchvision, eager": lambda: peer([image / 255]),
        "detpipe, eager": lambda: own([image]),
    }
    if not options.no_compile:
        compiled = torch.compile(Program(own), fullgraph=True)
        found["detpipe, compiled"] = lambda: compiled(batch)
    feed = {"images": batch.numpy()}
    for name in FILES:
        session = open_session(folder / name, threads)
        found[f"detpipe, ONNX Runtime {FILES[name]}"] = functools.partial(session.run, None, feed)
    try:
        import openvino  # pyright: ignore[reportMissingImports]
    except ImportError:
        print("openvino is not installed: left out")
    else:
        for name, precision in ((WHOLE, "f32"), (WHOLE, "bf16"), (SMALL, "f32")):  # bf16 and int8 need instructions
            settings = {"INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": precision}
            model = openvino.Core().compile_model(str(folder / name), "CPU", settings)
            kind = precision if name == WHOLE else FILES[name]
            found[f"detpipe, OpenVINO {kind}"] = functools.partial(model, feed)
    return found


def open_session(path: Path, threads: int, profiled: bool = False) -> Any:
    """Open a file with onnxruntime."""
    import onnxruntime

    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads, settings.inter_op_num_threads = threads, 1
    settings.enable_profiling, settings.profile_file_prefix = profiled, str(path.with_name("profile"))
    return onnxruntime.InferenceSession(str(path), settings, providers=["CPUExecutionProvider"])


@torch.inference_mode()
def measure(runs: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each, round by round."""
    taken: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        run()
        run()
    order = random.Random(0)
    for _ in range(rounds):
        for name in order.sample(list(runs), len(runs)):
            began = time.perf_counter()
            runs[name]()
            taken[name].append(time.perf_counter() - began)
    return taken


def table(taken: dict[str, list[float]], threads: int) -> None:
    """Print medians, and ratios to the first."""
    [first, *_] = taken.values()
    print(f"\n{threads} thread(s)\n{'':24}  ms     ratio (quartiles)")
    for name, seconds in taken.items():
        ratios = sorted(mine / peer for mine, peer in zip(seconds, first, strict=True))
        low, middle, high = statistics.quantiles(ratios, n=4)
        print(f"{name:24}  {1e3 * statistics.median(seconds):6.1f} {middle:.3f} ({low:.3f} to {high:.3f})")


def where_time_goes(path: Path, image: Tensor, rounds: int) -> None:
    """Print the shares of operators in onnxruntime's time on one thread."""
    session = open_session(path, 1, profiled=True)
    for _ in range(rounds):
        session.run(None, {"images": image[None].numpy()})
    totals: collections.Counter[str] = collections.Counter()
    for event in json.loads(Path(session.end_profiling()).read_text()):
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            totals[STEPS.get(event["args"]["op_name"].removeprefix("Fused"), "other")] += event["dur"]
    whole = sum(totals.values())
    print("\nONNX Runtime, one thread, by step")
    for name, duration in sorted(totals.items(), key=lambda item: -item[1]):
        print(f"{name:16} {duration / whole:6.1%}  {duration / rounds / 1e3:7.1f} ms")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--proposals", type=int, default=1000)
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out, which takes minutes")
    options = parser.parse_args()
    torch.manual_seed(0)
    own, peer = build(options.proposals)
    coarse = torch.rand(1, 3, 12, 16)
    image = (nn.functional.interpolate(coarse, (480, 640), mode="bicubic")[0].clamp(0, 1) * 255).to(torch.uint8)
    print(
        f"{platform.processor() or platform.machine()}, load {os.getloadavg()[0]:.1f}; torch {torch.__version__}, ",
        end="",
    )
    print(f"torchvision {torchvision.__version__}; {options.proposals} proposals at most")
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        export(own, place / WHOLE, check=False)
        export(own, place / SMALL, check=False, calibration=[image])
        for threads in options.threads:
            torch.set_num_threads(threads)
            torch.compiler.reset()
            table(measure(contestants(own, peer, image, place, options, threads), options.rounds), threads)
        where_time_goes(place / WHOLE, image, options.rounds)


if __name__ == "__main__":
    main()

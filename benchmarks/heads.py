"""What does looking again cost? A training step and detection of each head beside the plain Fast R-CNN head.

Features are those of two images of 600 x 1000 pixels at stride 16 with 256 channels, 256 sampled RoIs each, 64 of them
foreground; a head and the plain one, with the same pooler and the same two layers of 1024, take turns, and the ratio is the
median over the turns. Memory is what autograd keeps for the backward pass, each storage counted once.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from kept_memory import kept_memory

from detpipe.detector import total_loss
from detpipe.heads import (
    AttentionalHead,
    CascadeHead,
    FastRCNNHead,
    GlimpseSequence,
    GlimpseSettings,
    Pathwise,
    ProposalHead,
    Reinforce,
    RoISampler,
)
from detpipe.roi_pooling import RoIAlign, RoIMaxPool
from detpipe.support.allocator import keep_freed_memory
from detpipe.types import Features, Target

IMAGES, ROIS, CHANNELS, CLASSES, STRIDE = 2, 256, 256, 20, 16
SIZE = (600, 1000)
ALIGN, MAX = RoIAlign(7, sampling_ratio=2), RoIMaxPool(7)
SHAPE = (CHANNELS, CLASSES, {"c4": STRIDE})
COMMON: dict[str, Any] = {"fc": [1024, 1024], "sampler": RoISampler(ROIS, 0.25)}


def glimpsing(kind: str, fuse: str) -> Callable[[], ProposalHead]:
    """A head with a spatial transformer."""
    settings = GlimpseSettings(kind, fuse)  # type: ignore[arg-type]
    return lambda: FastRCNNHead(*SHAPE, ALIGN, **COMMON, glimpse=settings)


def attentional(pooler: Any, length: int, estimator: Any) -> Callable[[], ProposalHead]:
    """A head with a sequence of glimpses."""
    return lambda: AttentionalHead(*SHAPE, pooler, **COMMON, glimpses=GlimpseSequence(length), estimator=estimator)


HEADS: dict[str, Callable[[], ProposalHead]] = {
    **{f"{kind} glimpse": glimpsing(kind, "sum") for kind in ("affine", "attention", "projective", "tps")},
    "affine glimpse, concat": glimpsing("affine", "concat"),
    "AOD, T = 2, REINFORCE n = 8": attentional(MAX, 2, Reinforce(8)),
    "AOD, T = 3, REINFORCE n = 8": attentional(MAX, 3, Reinforce(8)),
    "AOD, T = 2, pathwise": attentional(ALIGN, 2, Pathwise()),
    "AOD, T = 3, pathwise": attentional(ALIGN, 3, Pathwise()),
    "cascade of 3": lambda: CascadeHead(*SHAPE, ALIGN, **COMMON),
}


def plain(pooler: Any) -> ProposalHead:
    """What all are compared with."""
    return FastRCNNHead(*SHAPE, pooler, **COMMON)


def inputs(device: torch.device) -> tuple[Features, list[Tensor], list[Target]]:
    """Features, proposals of which a part is near objects, and eight objects an image."""
    torch.manual_seed(0)
    maps = torch.randn(IMAGES, CHANNELS, -(-SIZE[0] // STRIDE), -(-SIZE[1] // STRIDE)).to(device).requires_grad_()
    proposals, targets = [], []
    for _ in range(IMAGES):
        low = torch.rand(8, 2) * torch.tensor([800.0, 400.0])
        objects = torch.cat((low, low + 40 + 150 * torch.rand(8, 2)), dim=1)
        near = (objects.repeat(40, 1) + 6 * torch.randn(320, 4)).clamp(min=0)
        low = torch.rand(700, 2) * torch.tensor([900.0, 500.0])
        far = torch.cat((low, low + 20 + 80 * torch.rand(700, 2)), dim=1)
        proposals.append(torch.cat((near, far)).to(device))
        targets.append(Target(boxes=objects.to(device), labels=torch.randint(1, CLASSES + 1, (8,)).to(device)))
    return {"c4": maps}, proposals, targets


def wait() -> None:
    """Until what was asked of a GPU is done."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def step(head: ProposalHead, data: tuple[Features, list[Tensor], list[Target]]) -> float:
    """Seconds of a forward and a backward pass, sampling included."""
    features, proposals, targets = data
    head.train()
    start = time.perf_counter()
    total_loss(head(features, proposals, [SIZE] * IMAGES, targets)[1]).backward()
    wait()
    seconds = time.perf_counter() - start
    head.zero_grad(set_to_none=True)
    features["c4"].grad = None
    return seconds


def detect(head: ProposalHead, data: tuple[Features, list[Tensor], list[Target]]) -> float:
    """Seconds of classifying and refining 1000 proposals an image."""
    features, proposals, _ = data
    boxes = torch.stack([rows[:1000] for rows in proposals])
    head.eval()
    with torch.inference_mode():
        start = time.perf_counter()
        head.detect(
            features, boxes, [SIZE] * IMAGES, torch.ones(boxes.shape[:2], dtype=torch.bool, device=boxes.device)
        )
        wait()
        return time.perf_counter() - start


def in_turns(
    measure: Callable[..., float], pair: Sequence[ProposalHead], data: Any, turns: int
) -> tuple[float, tuple[float, float, float]]:
    """Seconds of the first head, and how many times as long as the second it takes: quartiles."""
    seconds = [[measure(head, data) for head in pair] for _ in range(turns + 1)][1:]
    low, middle, high = statistics.quantiles([first / second for first, second in seconds], n=4)
    return statistics.median(first for first, _ in seconds), (low, middle, high)


def cell(seconds: float, ratios: tuple[float, float, float]) -> str:
    """Write what `in_turns` found."""
    low, middle, high = ratios
    milliseconds = 1000 * seconds
    return f"{milliseconds:{'.0f' if milliseconds >= 100 else '.3g'}} | **{middle:.2f}** ({low:.2f} to {high:.2f})"


def main(arguments: Sequence[str] | None = None) -> int:
    """Compare the heads and print a table.

    Args:
        arguments: of the command line.

    Returns:
        The exit status.
    """
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--turns", type=int, default=11, help="timed turns")
    parser.add_argument("--only", nargs="+", choices=HEADS, help="some of the heads")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: PyTorch finds no GPU here")
    keep_freed_memory()
    device = torch.device(options.device)
    data = inputs(device)
    where = torch.cuda.get_device_name() if device.type == "cuda" else f"{torch.get_num_threads()} threads"
    print(f"{where}, {IMAGES * ROIS} RoIs, torch {torch.__version__}\n")
    print(
        "| head | parameters, M | training step, ms | times as long | detection, ms | times as long | kept for backward, MiB |"
    )
    print("| --- | ---: | ---: | --- | ---: | --- | ---: |")
    for name, make in HEADS.items():
        if options.only is not None and name not in options.only:
            continue
        head = make()
        pair = [head.to(device), plain(head.pooler).to(device)]
        sizes = (sum(parameter.numel() for parameter in one.parameters()) / 1e6 for one in pair)
        cells = [name, " (".join(f"{size:.2f}" for size in sizes) + ")"]
        cells += [cell(*in_turns(measure, pair, data, options.turns)) for measure in (step, detect)]
        cells.append(" (".join(f"{kept_memory(one, partial(step, one, data)):.0f}" for one in pair) + ")")
        print(f"| {' | '.join(cells)} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""What does attention cost? Parameters, operations, speed and memory of each network beside its plain counterpart.

A network and its counterpart take turns, forward passes and training steps apart, so that what else the machine does meets both;
the ratio is the median over the turns. Memory is what autograd keeps for the backward pass, each storage counted once.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from torchvision import models

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from kept_memory import kept_memory

from detpipe.backbones import SEInceptionV3, SEResNet, SEResNeXt, SKNet, Variant
from detpipe.stages import Backbone
from detpipe.support.allocator import keep_freed_memory

PAPER = Variant(stride_in_1x1=True)
SPLIT = Variant(split_input=True)
Make = Callable[[], nn.Module]
PAIRS: dict[str, tuple[Make, str, Make]] = {
    "SE-ResNet-18": (lambda: SEResNet(18, levels=["c5"]), "ResNet-18", lambda: SEResNet(18, None, levels=["c5"])),
    "SE-ResNet-50": (lambda: SEResNet(50, levels=["c5"]), "ResNet-50", lambda: SEResNet(50, None, levels=["c5"])),
    "SE-ResNet-50, stride in 1 x 1": (
        lambda: SEResNet(50, variant=PAPER, levels=["c5"]),
        "ResNet-50, stride in 1 x 1",
        lambda: SEResNet(50, None, PAPER, levels=["c5"]),
    ),
    "ECA-ResNet-50": (
        lambda: SEResNet(50, "eca", levels=["c5"]),
        "ResNet-50",
        lambda: SEResNet(50, None, levels=["c5"]),
    ),
    "CBAM-ResNet-50": (
        lambda: SEResNet(50, "cbam", levels=["c5"]),
        "ResNet-50",
        lambda: SEResNet(50, None, levels=["c5"]),
    ),
    "SK-ResNet-50, split": (
        lambda: SEResNet(50, "sk", SPLIT, levels=["c5"]),
        "ResNet-50",
        lambda: SEResNet(50, None, levels=["c5"]),
    ),
    "SE-ResNeXt-50": (
        lambda: SEResNeXt("50_32x4d", levels=["c5"]),
        "ResNeXt-50",
        lambda: SEResNeXt("50_32x4d", None, levels=["c5"]),
    ),
    "SKNet-50": (lambda: SKNet(50, levels=["c5"]), "ResNeXt-50", lambda: SEResNeXt("50_32x4d", None, levels=["c5"])),
    "SE-Inception-v3": (
        lambda: SEInceptionV3(levels=["c5"]),
        "Inception-v3",
        lambda: SEInceptionV3(None, levels=["c5"]),
    ),
    "ResNet-50 of detpipe": (
        lambda: SEResNet(50, None, levels=["c5"]),
        "torchvision's",
        lambda: models.get_model("resnet50", weights=None),
    ),
}
CLASSES = 1000


def output(network: nn.Module, images: Tensor) -> Tensor:
    """The last level of a backbone, or the logits of torchvision's."""
    result = network(images)
    return result["c5"] if isinstance(result, dict) else result


def parameters(network: nn.Module) -> float:
    """Millions, a classifier of 1000 classes included."""
    head = (network.out_channels + 1) * CLASSES if isinstance(network, Backbone) else 0
    return (sum(parameter.numel() for parameter in network.parameters()) + head) / 1e6


def operations(network: nn.Module, side: int) -> float:
    """Billions of multiplications, each with an addition, for one image."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        output(network.eval(), torch.zeros(1, 3, side, side))
    head = network.out_channels * CLASSES if isinstance(network, Backbone) else 0
    return (counter.get_total_flops() / 2 + head) / 1e9


def infer(network: nn.Module, images: Tensor) -> float:
    """Seconds of a forward pass."""
    network.eval()
    with torch.inference_mode():
        start = time.perf_counter()
        output(network, images)
        return time.perf_counter() - start


def step(network: nn.Module, images: Tensor) -> float:
    """Seconds of a forward and a backward pass."""
    network.train()
    start = time.perf_counter()
    output(network, images).square().mean().backward()
    seconds = time.perf_counter() - start
    network.zero_grad(set_to_none=True)
    return seconds


def in_turns(
    measure: Callable[[nn.Module, Tensor], float], pair: Sequence[nn.Module], images: Tensor, turns: int
) -> str:
    """Images a second of the first network, and by how much longer it takes than the second."""
    seconds = [[measure(network, images) for network in pair] for _ in range(turns + 1)][1:]
    ratios = [first / second for first, second in seconds]
    low, _, high = statistics.quantiles(ratios, n=4)
    speed = len(images) / statistics.median(first for first, _ in seconds)
    return f"{speed:.1f} | **{statistics.median(ratios):.2f}** ({low:.2f} to {high:.2f})"


def main(arguments: Sequence[str] | None = None) -> int:
    """Compare the pairs and print a table.

    Args:
        arguments: of the command line.

    Returns:
        The exit status.
    """
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--turns", type=int, default=15, help="timed turns")
    parser.add_argument("--batch", type=int, default=4, help="images a turn")
    parser.add_argument("--size", type=int, default=224, help="side of the images in pixels; Inception takes 299")
    parser.add_argument("--only", nargs="+", choices=PAIRS, help="some of the networks")
    options = parser.parse_args(arguments)
    keep_freed_memory()
    print(f"{torch.get_num_threads()} threads, batches of {options.batch}, torch {torch.__version__}\n")
    print(
        "| network (beside) | parameters, M | GFLOPs | inference, images/s | times as long | training, images/s | times as long "
        "| kept for backward, MiB an image |"
    )
    print("| --- | ---: | ---: | ---: | --- | ---: | --- | ---: |")
    for name, (make, plain_name, make_plain) in PAIRS.items():
        if options.only is not None and name not in options.only:
            continue
        side = 299 if "Inception" in name else options.size
        pair = [build().to(memory_format=torch.channels_last) for build in (make, make_plain)]
        images = torch.randn(options.batch, 3, side, side).contiguous(memory_format=torch.channels_last)
        cells = [f"{name} ({plain_name})"]
        cells.append(" (".join(f"{parameters(network):.2f}" for network in pair) + ")")
        cells.append(" (".join(f"{operations(network, side):.2f}" for network in pair) + ")")
        cells += [in_turns(measure, pair, images, options.turns) for measure in (infer, step)]
        cells.append(
            " (".join(f"{kept_memory(network, partial(step, network, images)) / len(images):.0f}" for network in pair)
            + ")"
        )
        print(f"| {' | '.join(cells)} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())

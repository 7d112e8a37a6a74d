"""Is one training step of detpipe as fast as torchvision's on the same network, images and number of RoIs?

A step is everything between two batches: normalize, resize and pad the images, forward, losses, backward, optimizer
step, gradients freed. All contestants run in one process and take turns step by step, each time in another order and on
the same batch, so that what else the machine does hits all of them. Warm-up steps are not counted. The result is the
median over the steps of (seconds of detpipe / seconds of the peer in the same round).

The same for all: backbone and its first weights, float images in 0..1, objects, number of RoIs that the head computes,
7 x 7 RoIAlign with 2 x 2 samples a bin, two hidden layers, SGD with momentum, nothing frozen.

What differs, because the designs do:
1. ``torchvision FasterRCNN`` also runs and trains its region proposal network (a 3 x 3 convolution over the features,
   15 anchors a cell, non-maximum suppression). detpipe's head takes a dense grid of boxes of the same scales and shapes,
   which costs nothing. That is the choice of design that this comparison prices.
2. ``torchvision, dense boxes`` is torchvision's detector with detpipe's grid in the place of its proposal network: no
   contestant has a learned proposal stage, and what is left is code for equal work. Read this ratio for overhead.
3. Torchvision's box layer has outputs for the background too (4 x (K + 1), detpipe 4 x K), it interpolates images even
   where the size stays, its smooth L1 loss has beta 1/9 (detpipe 1), and its RoIAlign is not shifted by half a pixel.
4. Torchvision computes as many RoIs as it sampled; detpipe always the full number, padded where an image has fewer.
   The table shows the numbers.

Memory is reported on CUDA only: the highest allocation during a step above what was held before it. On a CPU the
largest resident size belongs to the process, which holds all contestants, so it would say nothing about one of them.
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
from typing import Any

import torch
import torchvision
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor
from torchvision.ops import MultiScaleRoIAlign

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from detpipe.backbones import Extractor, Level, SEResNet
from detpipe.detector import TwoStageDetector, total_loss
from detpipe.heads import FastRCNNHead, RoISampler
from detpipe.proposals import DenseGrid
from detpipe.roi_pooling import RoIAlign
from detpipe.stages import Backbone
from detpipe.types import Target

Batch = tuple[list[Tensor], list[Target]]

SCALES, RATIOS = (32, 64, 128, 256, 512), (0.5, 1.0, 2.0)  # torchvision's default anchors, in one level
NUM_CLASSES = 3
OBJECTS = (8, 16)  # the least and the most objects of an image: 12 on average
OBJECT_SIDES = (30, 160)  # pixels
POOLED = 7  # cells along each side
BATCHES = 4  # different ones, taken in turn
OURS, PEER, DENSE_PEER = "detpipe", "torchvision FasterRCNN", "torchvision, dense boxes"


@dataclass
class Contestant:
    """A model that can be trained on a batch, and what was measured of it."""

    name: str
    model: nn.Module
    losses: Callable[[list[Tensor], list[Target]], dict[str, Tensor]]
    proposer: nn.Module  # returns (boxes of each image, losses)
    hidden: nn.Module  # the shared layers of the head: one row of the input is a RoI
    optimizer: torch.optim.Optimizer = field(init=False)
    seconds: list[float] = field(default_factory=list)
    peaks: list[int] = field(default_factory=list)  # bytes
    proposals: list[int] = field(default_factory=list)  # of each image, in warm-up
    rois: list[int] = field(default_factory=list)  # of each batch, in warm-up

    def __post_init__(self) -> None:
        parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.SGD(parameters, lr=1e-3, momentum=0.9, weight_decay=5e-4)

    def step(self, batch: Batch) -> None:
        """Train on one batch.

        Args:
            batch: images and targets.
        """
        loss = total_loss(self.losses(*batch))
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def count(self, batch: Batch) -> None:
        """Train on one batch and note how many boxes were proposed and how many RoIs the head computed.

        Args:
            batch: images and targets.
        """

        def proposed(module: nn.Module, inputs: Any, outputs: Any) -> None:
            self.proposals += [len(boxes) for boxes in outputs[0]]

        def pooled(module: nn.Module, inputs: tuple[Tensor]) -> None:
            self.rois.append(len(inputs[0]))

        hooks = self.proposer.register_forward_hook(proposed), self.hidden.register_forward_pre_hook(pooled)
        self.step(batch)
        for hook in hooks:
            hook.remove()


def measure(contestant: Contestant, batch: Batch, device: torch.device) -> None:
    """Train on one batch and note the time and, on CUDA, the memory.

    Args:
        contestant: whose lists grow by one.
        batch: images and targets on the device.
        device: waited for before the clock starts and before it stops.
    """
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
    held = torch.cuda.memory_allocated(device) if cuda else 0
    start = time.perf_counter()
    contestant.step(batch)
    if cuda:
        torch.cuda.synchronize(device)
    contestant.seconds.append(time.perf_counter() - start)
    if cuda:
        contestant.peaks.append(torch.cuda.max_memory_allocated(device) - held)


def make_backbone(name: str, weights: str | None) -> Backbone:
    """Build the backbone that all contestants share.

    Args:
        name: ``squeezenet`` or ``se_resnet18``.
        weights: a local file for SqueezeNet, or None for random ones.

    Returns:
        One level ``c4`` of stride 16.
    """
    if name == "squeezenet":
        return Extractor("squeezenet1_1", {"c4": Level("features.12", 16)}, weights=weights)
    return SEResNet(18, levels=["c4"])


def make_ours(backbone: Backbone, widths: Sequence[int], rois: int, size: tuple[int, int]) -> Contestant:
    """Build detpipe's contestant.

    Args:
        backbone: becomes part of it.
        widths: of the head's hidden layers.
        rois: RoIs of each image that the head is trained on.
        size: height and width of the images.

    Returns:
        A detector with a dense grid and a Fast R-CNN head.
    """
    pooler = RoIAlign(POOLED, sampling_ratio=2)
    head = FastRCNNHead(
        backbone.out_channels, NUM_CLASSES, backbone.strides, pooler, widths, sampler=RoISampler(rois_per_image=rois)
    )
    grid = DenseGrid(SCALES, RATIOS)
    detector = TwoStageDetector(backbone, grid, head, min_size=min(size), max_size=max(size))
    return Contestant(OURS, detector, detector.losses, grid, head.shared)


class PeerHead(nn.Sequential):
    """Torchvision's ``TwoMLPHead`` with any number of layers of any width."""

    def __init__(self, inputs: int, widths: Sequence[int]) -> None:
        layers: list[nn.Module] = [nn.Flatten()]
        for before, after in zip((inputs, *widths), widths, strict=False):
            layers += [nn.Linear(before, after), nn.ReLU(inplace=True)]
        super().__init__(*layers)


class PeerBackbone(nn.Module):
    """One of detpipe's networks as torchvision wants it: images to one map."""

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self.backbone, self.out_channels = backbone, backbone.out_channels

    def forward(self, images: Tensor) -> Tensor:
        """``[N, 3, H, W]`` -> ``[N, C, H / 16, W / 16]``."""
        return self.backbone(images)["c4"]


def make_peer(name: str, network: nn.Module, widths: Sequence[int], rois: int, size: tuple[int, int]) -> Contestant:
    """Build torchvision's contestant.

    Args:
        name: ``PEER``, or ``DENSE_PEER`` for one without a proposal network.
        network: with an attribute ``out_channels``; becomes part of it.
        widths: of the head's hidden layers.
        rois: RoIs of each image that the head is trained on.
        size: height and width of the images.

    Returns:
        A ``FasterRCNN``.
    """
    model = FasterRCNN(
        network,
        min_size=min(size),
        max_size=max(size),
        rpn_anchor_generator=AnchorGenerator((SCALES,), (RATIOS,)),
        box_roi_pool=MultiScaleRoIAlign(["0"], POOLED, sampling_ratio=2),
        box_head=PeerHead(network.out_channels * POOLED**2, widths),  # pyright: ignore[reportOperatorIssue]
        box_predictor=FastRCNNPredictor(widths[-1], NUM_CLASSES + 1),
        box_batch_size_per_image=rois,
    )
    if name == DENSE_PEER:
        model.rpn = DenseGrid(SCALES, RATIOS)
    return Contestant(name, model.train(), model, model.rpn, model.roi_heads.box_head)


def make_contestants(options: argparse.Namespace) -> list[Contestant]:
    """Build all contestants with the same first weights in the backbone.

    Args:
        options: of the command line.

    Returns:
        detpipe, torchvision, and torchvision on dense boxes, in training mode on the device.
    """
    torch.manual_seed(options.seed)
    size = (options.image_size[0], options.image_size[1])
    settings = (options.widths, options.rois, size)
    backbone = make_backbone(options.backbone, options.weights)
    networks = []
    for _ in (PEER, DENSE_PEER):
        if options.backbone == "squeezenet":  # torchvision's own module, as its users build it
            network = torchvision.models.squeezenet1_1()
            network.load_state_dict(backbone.get_submodule("body").state_dict(), strict=False)
            network.features.out_channels = backbone.out_channels  # pyright: ignore[reportArgumentType]
            networks.append(network.features)
        else:
            copy = make_backbone(options.backbone, None)
            copy.load_state_dict(backbone.state_dict())
            networks.append(PeerBackbone(copy))
    for network in networks:
        mine, its = (list(module.parameters()) for module in (backbone, network))
        if len(mine) != len(its) or not all(map(torch.equal, mine, its)):
            raise RuntimeError(f"the contestants' backbones start from different weights: {len(mine)}, {len(its)}")
    device = torch.device(options.device)
    backbone.to(device)
    peers = [
        make_peer(name, network.to(device), *settings)
        for name, network in zip((PEER, DENSE_PEER), networks, strict=True)
    ]
    contestants = [make_ours(backbone, *settings), *peers]
    for contestant in contestants:
        contestant.model.to(device).train()
    return contestants


def make_batches(options: argparse.Namespace) -> list[Batch]:
    """Draw images of noise with boxes; what is in a picture does not change what a step costs.

    Args:
        options: of the command line.

    Returns:
        A few batches on the device.
    """
    generator = torch.Generator().manual_seed(options.seed)
    height, width = options.image_size
    extent = torch.tensor([width, height], dtype=torch.float32)
    low, high = OBJECT_SIDES
    batches = []
    for _ in range(BATCHES):
        images, targets = [], []
        for _ in range(options.batch):
            count = int(torch.randint(OBJECTS[0], OBJECTS[1] + 1, (1,), generator=generator))
            side = (low + (high - low) * torch.rand(count, 2, generator=generator)).minimum(extent / 2)
            corner = torch.rand(count, 2, generator=generator) * (extent - side)
            boxes = torch.cat((corner, corner + side), dim=1).to(options.device)
            labels = torch.randint(1, NUM_CLASSES + 1, (count,), generator=generator).to(options.device)
            images.append(torch.rand(3, height, width, generator=generator).to(options.device))
            targets.append(Target(boxes=boxes, labels=labels))
        batches.append((images, targets))
    return batches


def compare(contestants: list[Contestant], batches: list[Batch], options: argparse.Namespace) -> None:
    """Let the contestants take turns, in another order each round.

    Args:
        contestants: whose lists are filled.
        batches: taken in turn; in a round all contestants get the same one.
        options: of the command line.
    """
    device = torch.device(options.device)
    for index in range(options.warmup):
        for contestant in contestants:
            contestant.count(batches[index % len(batches)])
    for index in range(options.steps):
        first = index % len(contestants)
        for contestant in contestants[first:] + contestants[:first]:
            measure(contestant, batches[index % len(batches)], device)
    for contestant in contestants:
        if not all(bool(torch.isfinite(parameter).all()) for parameter in contestant.model.parameters()):
            raise RuntimeError(f"{contestant.name}: weights are not finite after training, so the times mean nothing")


def report(contestants: list[Contestant], options: argparse.Namespace) -> str:
    """Write down what was measured.

    Args:
        contestants: after :func:`compare`, detpipe first.
        options: of the command line.

    Returns:
        Lines of text.
    """
    width = max(len(contestant.name) for contestant in contestants)
    columns = ("median s", "minimum s", "quartiles s", "images/s", "proposals", "RoIs", "parameters", "peak MiB")
    lines = [f"{'':{width}}  {'  '.join(f'{column:>13}' for column in columns)}"]
    for contestant in contestants:
        low, median, high = quartiles(contestant.seconds)
        cells = (
            f"{median:.4f}",
            f"{min(contestant.seconds):.4f}",
            f"{low:.4f}-{high:.4f}",
            f"{options.batch / median:.2f}",
            f"{statistics.mean(contestant.proposals):.0f}",
            f"{statistics.mean(contestant.rois) / options.batch:.1f}",
            f"{sum(parameter.numel() for parameter in contestant.model.parameters()):,}",
            f"{max(contestant.peaks) / 2**20:.0f}" if contestant.peaks else "CUDA only",
        )
        lines.append(f"{contestant.name:{width}}  {'  '.join(f'{cell:>13}' for cell in cells)}")
    lines.append("(proposals and RoIs: mean of an image, counted during warm-up)")
    for peer in contestants[1:]:
        ratios = [mine / its for mine, its in zip(contestants[0].seconds, peer.seconds, strict=True)]
        low, median, high = quartiles(ratios)
        best = min(contestants[0].seconds) / min(peer.seconds)
        lines.append(
            f"ratio {OURS} / {peer.name}: median {median:.3f}, quartiles {low:.3f}-{high:.3f}, of the minima {best:.3f}"
        )
    return "\n".join(lines)


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Compute the first quartile, the median and the third quartile.

    Args:
        values: one at least.

    Returns:
        Three numbers, rising.
    """
    if len(values) == 1:
        return values[0], values[0], values[0]
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, median, high


def describe(options: argparse.Namespace) -> str:
    """Name the setting and the machine.

    Args:
        options: of the command line.

    Returns:
        Lines of text.
    """
    height, width = options.image_size
    load = f", load {os.getloadavg()[0]:.1f} at the start" if hasattr(os, "getloadavg") else ""
    gpu = f", {torch.cuda.get_device_name(options.device)}" if options.device.startswith("cuda") else ""
    return "\n".join(
        (
            f"one training step: {options.backbone}, {options.batch} images of {height} x {width}, {options.rois} RoIs an "
            f"image, hidden layers {'-'.join(map(str, options.widths))}, {NUM_CLASSES} classes, "
            f"{OBJECTS[0]} to {OBJECTS[1]} objects an image, seed {options.seed}",
            f"{options.steps} steps each after {options.warmup} of warm-up, in turns",
            f"{cpu_name()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads{gpu}{load}; torch {torch.__version__}, "
            f"torchvision {torchvision.__version__}, Python {platform.python_version()}, on {options.device}",
        )
    )


def cpu_name() -> str:
    """Name the processor, as far as the system tells.

    Returns:
        The model's name, or the architecture where the system keeps it to itself.
    """
    listing = Path("/proc/cpuinfo")
    lines = listing.read_text(encoding="utf-8").splitlines() if listing.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return next(iter(names), platform.machine())


def profile(contestants: list[Contestant], batches: list[Batch], options: argparse.Namespace) -> None:
    """Print the operations that cost each contestant most, over one step for each batch.

    Args:
        contestants: warmed up.
        batches: a step is taken on each.
        options: of the command line.
    """
    cuda = options.device.startswith("cuda")
    activities = [torch.profiler.ProfilerActivity.CPU, *([torch.profiler.ProfilerActivity.CUDA] if cuda else [])]
    for contestant in contestants:
        with torch.profiler.profile(activities=activities) as record:
            for batch in batches:
                contestant.step(batch)
        key = "self_cuda_time_total" if cuda else "self_cpu_time_total"
        print(f"\n{contestant.name}, {len(batches)} steps")
        print(record.key_averages().table(sort_by=key, row_limit=25, max_name_column_width=60))


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line.

    Args:
        arguments: those of the process if None.

    Returns:
        The options.
    """
    parser = argparse.ArgumentParser(description="One training step of detpipe against torchvision's FasterRCNN.")
    parser.add_argument("--steps", type=int, default=30, help="measured steps of each")
    parser.add_argument("--warmup", type=int, default=3, help="steps before these")
    parser.add_argument("--backbone", choices=["squeezenet", "se_resnet18"], default="squeezenet")
    parser.add_argument("--weights", metavar="FILE", help="of SqueezeNet 1.1; random ones by default")
    parser.add_argument("--image-size", type=int, nargs=2, default=[480, 640], metavar=("HEIGHT", "WIDTH"))
    parser.add_argument("--batch", type=int, default=4, help="images a step")
    parser.add_argument("--rois", type=int, default=128, help="RoIs an image that the head is trained on")
    parser.add_argument("--widths", type=int, nargs="+", default=[1024, 1024], help="of the head's hidden layers")
    parser.add_argument("--threads", type=int, help="of torch on the CPU; its own choice by default")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--profile", action="store_true", help="print the costliest operations of each as well")
    options = parser.parse_args(arguments)
    counts = (options.steps, options.warmup, options.batch, options.rois, *options.widths, *options.image_size)
    if min(counts) < 1 or (options.threads is not None and options.threads < 1):
        parser.error("all numbers but the seed must be positive")
    if options.weights is not None and options.backbone != "squeezenet":
        parser.error("--weights is for --backbone squeezenet")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, and print the table.

    Args:
        arguments: those of the process if None.

    Returns:
        The exit status.
    """
    options = parse(arguments)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    print(describe(options), flush=True)
    contestants, batches = make_contestants(options), make_batches(options)
    compare(contestants, batches, options)
    print(f"\n{report(contestants, options)}", flush=True)
    if options.profile:
        profile(contestants, batches, options)
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Is one training step of detpipe as fast as torchvision's on the same network, images and number of RoIs?

A step is everything between two batches: normalize, resize and pad the images, forward, losses, backward, optimizer
step, gradients freed. All contestants run in one process and take turns step by step, each round in another order and
on the same batch, so that what else the machine does hits all of them. Warm-up steps are not counted. The result is the
median over the rounds of (seconds of detpipe / seconds of the peer).

The same for all: backbone and its first weights, normalization, float images in 0..1, objects, RoIs an image that the
head is trained on, 7 x 7 RoIAlign with 2 x 2 samples a bin, hidden layers, SGD with momentum, nothing frozen.

What differs, because the designs do:
1. ``torchvision FasterRCNN`` also runs and trains its region proposal network: a 3 x 3 convolution over the features,
   15 anchors a cell, non-maximum suppression. detpipe takes a dense grid of boxes of the same scales and shapes, which
   is laid once for each image size. That choice of design is most of what this ratio shows.
2. ``torchvision, dense boxes`` is torchvision's detector with detpipe's grid in the place of its proposal network. What
   is left is two programs for equal work: read this ratio for what detpipe's own code costs.
3. Torchvision's box layer has outputs for the background too (4 (K + 1), detpipe 4 K), it interpolates images even
   where the size stays, its smooth L1 loss has beta 1/9 (detpipe 1), and its RoIAlign is not shifted by half a pixel.
4. With ``--backbone resnet50_fpn`` both have a proposal network and a pyramid, of the same sizes, and normalization with stored
   statistics; their weights are random and not the same. The third contestant is left out.
5. Torchvision's head computes the RoIs that it could sample, detpipe's always the full number, padded where an image
   has fewer, and detpipe also compares proposals with crowd regions. The table shows the numbers of boxes.

Memory is reported on CUDA only: the highest allocation during a step above what was held before it. On a CPU the
largest resident size belongs to the process, which holds all contestants, and would say nothing about one of them.
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
from itertools import pairwise
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

from detpipe.backbones import FPN, Extractor, Level, Regime, SEResNet
from detpipe.detector import TwoStageDetector, total_loss
from detpipe.heads import FastRCNNHead, RoISampler
from detpipe.proposals import RPN, Anchors, DenseGrid
from detpipe.roi_pooling import RoIAlign
from detpipe.stages import Backbone
from detpipe.types import Target

Batch = tuple[list[Tensor], list[Target]]

SCALES, RATIOS = (32, 64, 128, 256, 512), (0.5, 1.0, 2.0)  # torchvision's default anchors, in one level
NUM_CLASSES = 3
OBJECTS = (8, 16)  # the least and the most objects of an image: 12 on average
OBJECT_SIDES = (30, 160)  # pixels
POOLED = 7  # cells along each side of a pooled map
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
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=1e-3, momentum=0.9, weight_decay=5e-4)

    def step(self, batch: Batch) -> None:
        """Train on one batch of images and targets."""
        loss = total_loss(self.losses(*batch))
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def count(self, batch: Batch) -> None:
        """Train on one batch, and note how many boxes were proposed and how many RoIs the head computed."""

        def proposed(module: nn.Module, inputs: Any, outputs: Any) -> None:
            self.proposals += [len(boxes) for boxes in outputs[0]]

        def pooled(module: nn.Module, inputs: tuple[Tensor]) -> None:
            self.rois.append(len(inputs[0]))

        hooks = self.proposer.register_forward_hook(proposed), self.hidden.register_forward_pre_hook(pooled)
        self.step(batch)
        for hook in hooks:
            hook.remove()

    def measure(self, batch: Batch, device: torch.device) -> None:
        """Train on one batch, and note the time and, on CUDA, the memory."""
        cuda = device.type == "cuda"
        if cuda:
            torch.cuda.synchronize(device)
            torch.cuda.reset_peak_memory_stats(device)
        held = torch.cuda.memory_allocated(device) if cuda else 0
        start = time.perf_counter()
        self.step(batch)
        if cuda:
            torch.cuda.synchronize(device)
        self.seconds.append(time.perf_counter() - start)
        if cuda:
            self.peaks.append(torch.cuda.max_memory_allocated(device) - held)


class PeerBackbone(nn.Module):
    """One of detpipe's networks as torchvision wants it: images to one map."""

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, images: Tensor) -> Tensor:
        """``[N, 3, H, W]`` -> ``[N, C, H / 16, W / 16]``."""
        return self.backbone(images)["c4"]


def _backbone(name: str, weights: str | None) -> Backbone:
    if name == "squeezenet":
        return Extractor("squeezenet1_1", {"c4": Level("features.12", 16)}, weights=weights)
    return SEResNet(18, levels=["c4"])


def _peer_network(name: str, backbone: Backbone) -> nn.Module:
    """Build the same network again, as torchvision's users would, starting from the same weights."""
    if name == "squeezenet":
        full = torchvision.models.squeezenet1_1()
        full.load_state_dict(backbone.get_submodule("body").state_dict(), strict=False)  # the classifier is not in it
        network: nn.Module = full.features
    else:
        copy = _backbone(name, None)
        copy.load_state_dict(backbone.state_dict())
        network = PeerBackbone(copy)
    mine, its = (list(module.parameters()) for module in (backbone, network))
    if len(mine) != len(its) or not all(map(torch.equal, mine, its)):
        raise RuntimeError(f"{name}: the contestants' backbones differ ({len(mine)} and {len(its)} parameters)")
    return network


def _ours(backbone: Backbone, options: argparse.Namespace) -> Contestant:
    head = FastRCNNHead(
        backbone.out_channels,
        NUM_CLASSES,
        backbone.strides,
        pooler=RoIAlign(POOLED, sampling_ratio=2),
        fc=options.widths,
        sampler=RoISampler(rois_per_image=options.rois),
    )
    sizes = {"min_size": min(options.image_size), "max_size": max(options.image_size)}
    detector = TwoStageDetector(backbone, DenseGrid(SCALES, RATIOS), head, **sizes)
    return Contestant(OURS, detector, detector.losses, detector.proposals, head.shared)


def _peer(name: str, network: nn.Module, channels: int, options: argparse.Namespace) -> Contestant:
    network.out_channels = channels  # pyright: ignore[reportArgumentType] (where torchvision looks for it)
    layers: list[nn.Module] = [nn.Flatten()]  # its TwoMLPHead, but of any widths
    for before, after in pairwise((channels * POOLED**2, *options.widths)):
        layers += [nn.Linear(before, after), nn.ReLU(inplace=True)]
    head = nn.Sequential(*layers)
    model = FasterRCNN(
        network,
        min_size=min(options.image_size),
        max_size=max(options.image_size),
        rpn_anchor_generator=AnchorGenerator((SCALES,), (RATIOS,)),
        box_roi_pool=MultiScaleRoIAlign(["0"], POOLED, sampling_ratio=2),
        box_head=head,
        box_predictor=FastRCNNPredictor(options.widths[-1], NUM_CLASSES + 1),
        box_batch_size_per_image=options.rois,
    )
    if name == DENSE_PEER:
        model.rpn = DenseGrid(SCALES, RATIOS)
    return Contestant(name, model, model, model.rpn, head)


def _pyramids(options: argparse.Namespace) -> list[Contestant]:
    """Faster R-CNN with a ResNet-50 pyramid, detpipe's and torchvision's."""
    sizes = {"min_size": min(options.image_size), "max_size": max(options.image_size)}
    body = SEResNet(50, attention=None, levels=["c2", "c3", "c4", "c5"], out_channels="own", regime=Regime("frozen"))
    backbone = FPN(body, 256, "max_pool")
    rpn = RPN(256, backbone.strides, Anchors([[scale] for scale in SCALES], RATIOS))
    pooler, sampler = RoIAlign(POOLED, sampling_ratio=2), RoISampler(rois_per_image=options.rois)
    head = FastRCNNHead(256, NUM_CLASSES, backbone.roi_strides, pooler, options.widths, sampler=sampler)
    ours = TwoStageDetector(backbone, rpn, head, **sizes)
    model = torchvision.models.detection.fasterrcnn_resnet50_fpn(
        weights=None,
        weights_backbone=None,
        num_classes=NUM_CLASSES + 1,
        trainable_backbone_layers=5,
        box_batch_size_per_image=options.rois,
        **sizes,
    )
    assert isinstance(model.roi_heads.box_head, nn.Module)
    found = [Contestant(OURS, ours, ours.losses, ours.proposals, head.shared)]
    return [*found, Contestant(PEER, model, model, model.rpn, model.roi_heads.box_head)]


def make_contestants(options: argparse.Namespace) -> list[Contestant]:
    """Build detpipe, torchvision, and torchvision on dense boxes, with the same first weights in the backbone."""
    torch.manual_seed(options.seed)
    if options.backbone == "resnet50_fpn":
        contestants = _pyramids(options)
        for contestant in contestants:
            contestant.model.to(options.device).train()
        return contestants
    backbone = _backbone(options.backbone, options.weights)
    networks = {name: _peer_network(options.backbone, backbone) for name in (PEER, DENSE_PEER)}
    contestants = [_ours(backbone, options)]
    contestants += [_peer(name, network, backbone.out_channels, options) for name, network in networks.items()]
    for contestant in contestants:
        contestant.model.to(options.device).train()
    return contestants


def make_batches(options: argparse.Namespace) -> list[Batch]:
    """Draw a few batches of noise with boxes; what is in a picture does not change what a step costs."""
    generator = torch.Generator().manual_seed(options.seed)
    height, width = options.image_size
    extent = torch.tensor([width, height], dtype=torch.float32)
    batches = []
    for _ in range(BATCHES):
        images, targets = [], []
        for _ in range(options.batch):
            count = int(torch.randint(OBJECTS[0], OBJECTS[1] + 1, (1,), generator=generator))
            side = torch.empty(count, 2).uniform_(*OBJECT_SIDES, generator=generator).minimum(extent / 2)
            corner = torch.rand(count, 2, generator=generator) * (extent - side)
            boxes = torch.cat((corner, corner + side), dim=1).to(options.device)
            labels = torch.randint(1, NUM_CLASSES + 1, (count,), generator=generator).to(options.device)
            images.append(torch.rand(3, height, width, generator=generator).to(options.device))
            targets.append(Target(boxes=boxes, labels=labels))
        batches.append((images, targets))
    return batches


def compare(contestants: list[Contestant], batches: list[Batch], options: argparse.Namespace) -> None:
    """Let the contestants take turns on one batch after another, in another order each round."""
    for index in range(options.warmup):
        for contestant in contestants:
            contestant.count(batches[index % len(batches)])
    for index in range(options.steps):
        first = index % len(contestants)
        for contestant in contestants[first:] + contestants[:first]:
            contestant.measure(batches[index % len(batches)], torch.device(options.device))
    for contestant in contestants:
        if not all(bool(torch.isfinite(parameter).all()) for parameter in contestant.model.parameters()):
            raise RuntimeError(f"{contestant.name}: weights are not finite after training, the times mean nothing")


def report(contestants: list[Contestant], options: argparse.Namespace) -> str:
    """Write down what was measured: a table, and a line for each ratio of the first contestant to another."""
    columns = ("median s", "minimum s", "quartiles s", "images/s", "proposals", "RoIs", "parameters", "peak MiB")
    rows: list[tuple[str, ...]] = [("", *columns)]
    for contestant in contestants:
        low, median, high = statistics.quantiles(contestant.seconds, method="inclusive")
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
        rows.append((contestant.name, *cells))
    lines = ["  ".join(f"{cell:>13}" if column else f"{cell:24}" for column, cell in enumerate(row)) for row in rows]
    lines.append("proposals and RoIs: mean of an image, counted in warm-up\n")
    ours = contestants[0]
    for peer in contestants[1:]:
        ratios = [mine / its for mine, its in zip(ours.seconds, peer.seconds, strict=True)]
        low, median, high = statistics.quantiles(ratios, method="inclusive")
        best = min(ours.seconds) / min(peer.seconds)
        name = f"{ours.name} / {peer.name}"
        lines.append(f"{name:35}  median ratio {median:.3f}, quartiles {low:.3f}-{high:.3f}, of the minima {best:.3f}")
    return "\n".join(lines)


def _describe(options: argparse.Namespace) -> str:
    """Name the setting and the machine."""
    listing = Path("/proc/cpuinfo")
    entries = listing.read_text(encoding="utf-8").splitlines() if listing.exists() else []
    cpu = next((entry.partition(":")[2].strip() for entry in entries if entry.startswith("model name")), "unknown CPU")
    gpu = f", {torch.cuda.get_device_name(options.device)}" if options.device.startswith("cuda") else ""
    load = f", load {os.getloadavg()[0]:.1f} at the start" if hasattr(os, "getloadavg") else ""
    height, width = options.image_size
    return "\n".join(
        (
            f"one training step: {options.backbone}, {options.batch} images of {height} x {width}, {options.rois} RoIs "
            f"an image, hidden layers {'-'.join(map(str, options.widths))}, {NUM_CLASSES} classes, "
            f"{OBJECTS[0]} to {OBJECTS[1]} objects an image, seed {options.seed}",
            f"{options.steps} steps each after {options.warmup} of warm-up, in turns, on {options.device}",
            f"{cpu} ({platform.machine()}), {os.cpu_count()} cores, {torch.get_num_threads()} threads{gpu}{load}",
            f"torch {torch.__version__}, torchvision {torchvision.__version__}, Python {platform.python_version()}",
        )
    )


def _profile(contestants: list[Contestant], batches: list[Batch], options: argparse.Namespace) -> None:
    """Print the operations that cost each contestant most, over one step on each batch."""
    cuda = options.device.startswith("cuda")
    activities = [torch.profiler.ProfilerActivity.CPU, *([torch.profiler.ProfilerActivity.CUDA] if cuda else [])]
    for contestant in contestants:
        with torch.profiler.profile(activities=activities) as record:
            for batch in batches:
                contestant.step(batch)
        key = "self_device_time_total" if cuda else "self_cpu_time_total"
        print(f"\n{contestant.name}, {len(batches)} steps")
        print(record.key_averages().table(sort_by=key, row_limit=25, max_name_column_width=60))


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line, by default that of the process."""
    parser = argparse.ArgumentParser(description="One training step of detpipe against torchvision's FasterRCNN.")
    parser.add_argument("--steps", type=int, default=30, help="measured steps of each (30)")
    parser.add_argument("--warmup", type=int, default=3, help="steps before these (3)")
    parser.add_argument("--backbone", choices=["squeezenet", "se_resnet18", "resnet50_fpn"], default="squeezenet")
    parser.add_argument("--weights", metavar="FILE", help="of SqueezeNet 1.1; random ones by default")
    parser.add_argument("--image-size", type=int, nargs=2, default=[480, 640], metavar=("HEIGHT", "WIDTH"))
    parser.add_argument("--batch", type=int, default=4, help="images a step (4)")
    parser.add_argument("--rois", type=int, default=128, help="RoIs an image that the head is trained on (128)")
    parser.add_argument("--widths", type=int, nargs="+", default=[1024, 1024], help="hidden layers (1024 1024)")
    parser.add_argument("--threads", type=int, help="of torch on the CPU; its own choice by default")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N (cpu)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--profile", action="store_true", help="print the costliest operations of each as well")
    options = parser.parse_args(arguments)
    if options.steps < 2:
        parser.error("--steps must be at least 2, for the quartiles")
    counts = (options.warmup, options.batch, options.rois, *options.widths, *options.image_size)
    if min(counts) < 1 or (options.threads is not None and options.threads < 1):
        parser.error("all numbers but the seed must be positive")
    if options.weights is not None and options.backbone != "squeezenet":
        parser.error("--weights is for --backbone squeezenet")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print the table, and return the exit status."""
    options = parse(arguments)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    print(_describe(options), flush=True)
    contestants, batches = make_contestants(options), make_batches(options)
    compare(contestants, batches, options)
    print(f"\n{report(contestants, options)}", flush=True)
    if options.profile:
        _profile(contestants, batches, options)
    return 0


if __name__ == "__main__":
    sys.exit(main())

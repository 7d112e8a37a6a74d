"""Draws what one bin of each RoI operator reads: docs/roi_operators.png.

    python docs/draw_roi_operators.py

The weight of a cell is the gradient of the bin's value to it. A maximum reads the largest cell alone; drawn is how often each
cell was the largest in 4096 random maps.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import torch
from torch import Tensor

from detpipe.roi_pooling import (
    feature_superpixels,
    precise_roi_pool,
    roi_align,
    roi_max_pool,
    rotated_roi_align,
    superpixel_smooth,
)

HEIGHT, WIDTH, BINS = 12, 16, 3
BOX, ANGLE = (3.3, 1.8, 13.1, 10.4), 30.0
DRAWS = 4096


def disc() -> Tensor:
    """A bright disc on a dark ground: the picture whose superpixels are used."""
    y, x = torch.meshgrid(torch.arange(HEIGHT) + 0.5, torch.arange(WIDTH) + 0.5, indexing="ij")
    return ((y - 6.4).square() + (x - 7.6).square() < 9.5).float()[None, None]


def weights(operator: Callable[[Tensor, Tensor], Tensor], box: Tensor, draws: int = 1) -> Tensor:
    """``[H, W]``: what the middle bin of the box reads."""
    features = torch.rand(draws, 1, HEIGHT, WIDTH, generator=torch.Generator().manual_seed(0)).requires_grad_()
    pooled = operator(features, box.expand(draws, 1, -1))
    pooled[..., BINS // 2, BINS // 2].sum().backward()
    assert features.grad is not None
    return features.grad.mean(dim=(0, 1))


def corners(box: Tensor) -> tuple[Tensor, Tensor]:
    """The x and y of the lines between bins, ``[2 * (BINS + 1), 2]`` ends each, of an xyxy or a rotated box."""
    if len(box) == 4:
        center, size, angle = (box[:2] + box[2:]) / 2, box[2:] - box[:2], torch.tensor(0.0)
    else:
        center, size, angle = box[:2], box[2:4], box[4].deg2rad()
    steps = torch.linspace(-0.5, 0.5, BINS + 1)
    ends = torch.tensor([-0.5, 0.5])
    across = torch.stack((ends.expand(BINS + 1, 2), steps[:, None].expand(BINS + 1, 2)))
    lines = torch.cat((across, across.flip(0)), dim=1) * size[:, None, None]
    cos, sin = angle.cos(), angle.sin()
    return lines[0] * cos + lines[1] * sin + center[0], lines[1] * cos - lines[0] * sin + center[1]


def draw(path: Path) -> None:
    """Write the picture."""
    box = torch.tensor(BOX)
    rotated = torch.cat(((box[:2] + box[2:]) / 2, box[2:] - box[:2], torch.tensor([ANGLE])))
    labels = feature_superpixels(disc(), spacing=4, compactness=0.3)
    panels: list[tuple[str, Tensor, Tensor]] = [
        ("roi_max_pool, fast_rcnn", weights(lambda f, b: roi_max_pool(f, b, BINS), box, DRAWS), box),
        (
            "roi_max_pool, equal_step",
            weights(lambda f, b: roi_max_pool(f, b, BINS, bins="equal_step"), box, DRAWS),
            box,
        ),
        ("roi_align, 2 x 2 samples", weights(lambda f, b: roi_align(f, b, BINS, sampling_ratio=2), box), box),
        ("roi_align, adaptive", weights(lambda f, b: roi_align(f, b, BINS), box), box),
        ("roi_align, 2 x 2, not aligned", weights(lambda f, b: roi_align(f, b, BINS, 1.0, 2, aligned=False), box), box),
        ("precise_roi_pool, aligned", weights(lambda f, b: precise_roi_pool(f, b, BINS, aligned=True), box), box),
        (
            f"rotated_roi_align, {ANGLE:g} degrees",
            weights(lambda f, b: rotated_roi_align(f, b, BINS), rotated),
            rotated,
        ),
        (
            "superpixel_smooth + roi_align",
            weights(lambda f, b: roi_align(superpixel_smooth(f, labels), b, BINS, sampling_ratio=2), box),
            box,
        ),
    ]
    figure, axes = plt.subplots(2, 4, figsize=(13, 5.6), layout="constrained")
    for axis, (title, read, own) in zip(axes.flat, panels, strict=True):
        image = axis.imshow(read, cmap="Blues", vmin=0, extent=(0, WIDTH, HEIGHT, 0))
        if "superpixel" in title:
            down, right = (labels[0].diff(dim=dim) != 0 for dim in (0, 1))
            y, x = down.nonzero().T
            axis.hlines(y + 1, x, x + 1, color="tab:green", linewidth=1)
            y, x = right.nonzero().T
            axis.vlines(x + 1, y, y + 1, color="tab:green", linewidth=1)
        for x, y in zip(*corners(own), strict=True):
            axis.plot(x, y, color="tab:orange", linewidth=1.2)
        axis.set_xticks(range(WIDTH + 1), minor=True)
        axis.set_yticks(range(HEIGHT + 1), minor=True)
        axis.grid(which="minor", color="0.85", linewidth=0.5)
        axis.set_xlim(-0.5, WIDTH + 0.5)
        axis.set_ylim(HEIGHT + 0.9, -0.9)
        axis.set_xticks([])
        axis.set_yticks([])
        axis.tick_params(which="minor", length=0)
        axis.set_title(title, fontsize=10)
        figure.colorbar(image, ax=axis, shrink=0.8, format="%.2g")
    figure.suptitle("What the middle one of 3 x 3 bins (orange) reads of the cells (gray)")
    figure.savefig(path, dpi=100)
    plt.close(figure)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Draw what one bin of each RoI operator reads.")
    parser.add_argument("-o", "--output", type=Path, default=Path(__file__).with_name("roi_operators.png"))
    draw(parser.parse_args().output)

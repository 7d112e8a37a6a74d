"""Pictures of a data set: boxes by class, sizes and shapes of boxes and images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from detpipe.datasets.resize import Resize
from detpipe.datasets.statistics import box_sizes
from detpipe.pictures.figures import new_figure, plain_axes, save_figure, writable
from detpipe.pictures.visualize import plot_color
from detpipe.types import Annotations

_MOST_CLASSES = 40  # bars that fit


def plot_classes(splits: Mapping[str, Annotations], out: Path) -> None:
    """Draw how many boxes each class has, a bar a split; the classes with most boxes first."""
    counts: dict[str, dict[str, int]] = {}
    for split, a in splits.items():
        for label, word in enumerate(a.class_names, start=1):
            counts.setdefault(word, {})[split] = int((a.labels == label).sum())
    words = sorted(counts, key=lambda word: -sum(counts[word].values()))
    shown = words[:_MOST_CLASSES]
    figure = new_figure(7.5, max(2.2, 0.22 * len(shown) * max(1, len(splits)) ** 0.5 + 1.2), "data sets")
    axes = figure.subplots()
    height = 0.8 / len(splits)
    for k, split in enumerate(splits):
        values = [counts[word].get(split, 0) for word in shown]
        places = np.arange(len(shown)) + (k - (len(splits) - 1) / 2) * height
        bars = axes.barh(places, values, height, label=f"{split} ({len(splits[split].boxes)})", color=plot_color(3 + k))
        axes.bar_label(bars, padding=2, fontsize=7)
    axes.set_yticks(range(len(shown)), list(map(writable, shown)), fontsize=8)
    axes.set_ylim(len(shown) - 0.4, -0.6)
    axes.margins(x=0.12)
    rest = f"; {len(words) - len(shown)} more classes are not shown" if len(words) > len(shown) else ""
    axes.set_title(f"boxes by class{rest}", loc="left", fontsize=11)
    axes.legend(fontsize=8, frameon=False, loc="lower right")
    _finish(figure, out, [axes])


def plot_boxes(annotations: Annotations, name: str, anchors: Sequence[int], resize: Resize, out: Path) -> None:
    """Draw sizes, shapes and numbers of the boxes of a split, at least one, with anchors suggested for the resized image."""
    a, sides = annotations, box_sizes(annotations)
    resized = np.sqrt(box_sizes(a, resize).prod(axis=1))
    image = a.box_image
    shares = np.sqrt(sides.prod(axis=1) / a.sizes[image].prod(axis=1, dtype=np.float64))
    figure = new_figure(10, 6.2, "data sets")
    panels = figure.subplots(2, 3).flatten()
    panels[0].hexbin(sides[:, 0], sides[:, 1], gridsize=35, mincnt=1, bins="log", cmap="viridis")
    panels[0].set_xlabel("width, pixels")
    panels[0].set_ylabel("height, pixels")
    _histogram(panels[1], resized, f"side of equal area, resized to {resize.min_size}, pixels", logarithmic=True)
    for size in anchors:
        panels[1].axvline(size, color="#d43d2a", linewidth=1.2)
    panels[1].set_title("lines: suggested anchors", loc="left", fontsize=9)
    _histogram(panels[2], shares, "side as part of the image's")
    _histogram(panels[3], sides[:, 1] / sides[:, 0], "height / width", logarithmic=True)
    per_image, most = np.diff(a.offsets), int(np.diff(a.offsets).max())
    panels[4].hist(per_image, bins=np.linspace(-0.5, most + 0.5, min(most + 2, 62)), color=plot_color(3))
    panels[4].set_xlabel("boxes in an image")
    panels[4].set_ylabel("images")
    for axes in panels[1:5]:
        axes.locator_params(axis="y", integer=True)
    _centers(panels[5], a, image)
    figure.suptitle(f"{name}: {len(a.boxes)} boxes in {len(a)} images", x=0.02, ha="left", fontsize=11)
    _finish(figure, out, list(panels[:5]))


def plot_images(splits: Mapping[str, Annotations], out: Path) -> None:
    """Draw the sizes of the images: a dot a size, the larger the more images have it."""
    figure = new_figure(5.2, 4.6, "data sets")
    axes = figure.subplots()
    for k, (name, a) in enumerate(splits.items()):
        sizes, count = np.unique(a.sizes, axis=0, return_counts=True)
        axes.scatter(
            sizes[:, 1], sizes[:, 0], s=12 + 300 * count / count.sum(), alpha=0.5, color=plot_color(3 + k), linewidths=0,
            label=f"{name}: {len(a)} images, {len(sizes)} sizes",
        )  # fmt: skip
    limit = 1.08 * max(int(a.sizes.max(initial=1)) for a in splits.values())
    axes.plot([0, limit], [0, limit], color="#999999", linewidth=0.8, linestyle="--")
    axes.set_xlim(0, limit)
    axes.set_ylim(0, limit)
    axes.set_aspect("equal")
    axes.set_xlabel("width, pixels")
    axes.set_ylabel("height, pixels")
    axes.set_title("sizes of the images", loc="left", fontsize=11)
    legend = axes.legend(fontsize=8, frameon=False, loc="upper left")
    for handle in legend.legend_handles:
        handle.set_sizes([40])  # pyright: ignore[reportOptionalMemberAccess, reportAttributeAccessIssue]
    _finish(figure, out, [axes])


def _centers(axes: Any, a: Annotations, image: Any) -> None:
    size = a.sizes[image][:, ::-1]
    centers = (a.boxes[:, :2] + a.boxes[:, 2:]) / 2 / size
    counts, _, _ = np.histogram2d(centers[:, 1], centers[:, 0], bins=24, range=[[0, 1], [0, 1]])
    axes.imshow(counts, extent=(0, 1, 1, 0), cmap="viridis", aspect="auto")
    axes.set_xlabel("centers, in parts of the image")


def _histogram(axes: Any, values: Any, label: str, logarithmic: bool = False) -> None:
    low, high = float(values.min()), float(values.max())
    if logarithmic:
        bins = np.geomspace(low / 1.05, high * 1.05, 40)
        axes.set_xscale("log")
        ticks = _ticks(low, high)
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.set_xticks([], minor=True)
    else:
        bins = np.linspace(0, max(high, 1e-9), 40)
    axes.hist(values, bins=bins, color=plot_color(3))
    axes.set_xlabel(label)
    axes.set_ylabel("boxes")


def _ticks(low: float, high: float) -> list[float]:
    """Round numbers between two others, for a logarithmic axis: 1, 2, 5, 10, ..., or powers of ten only."""
    decades = range(int(np.floor(np.log10(low))), int(np.ceil(np.log10(high))) + 1)
    steps = (1, 2, 5) if len(decades) <= 3 else (1,)
    found = [step * 10.0**decade for decade in decades for step in steps]
    return [tick for tick in found if low / 1.05 <= tick <= high * 1.05] or [float(f"{(low * high) ** 0.5:.2g}")]


def _finish(figure: Any, out: Path, panels: list[Any]) -> None:
    for axes in panels:
        plain_axes(axes)
    save_figure(figure, out)

"""What is worth knowing about the images and boxes of a split, and the sizes of anchors that follow from it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from detpipe.datasets.resize import Resize
from detpipe.types import Annotations

Floats = npt.NDArray[np.float64]

_AREAS = (32.0**2, 96.0**2)  # COCO's borders between small, medium and large
_QUANTILES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)
_NAMES = ("min", "5%", "25%", "median", "75%", "95%", "max")
_STEPS = 100  # of k-means, which has long settled by then
_ROUNDS = 10  # of moving anchors
_ENOUGH = 4000  # boxes that decide about anchors, spread over all


def box_sizes(annotations: Annotations, resize: Resize | None = None) -> Floats:
    """``[B, 2]`` width and height of the boxes, in pixels of the files, or of the resized images."""
    sides = annotations.boxes[:, 2:] - annotations.boxes[:, :2]
    if resize is None:
        return sides
    resized = [
        resize.content_size((height, width), resize.evaluation_size) for height, width in annotations.sizes.tolist()
    ]
    scales = np.array(resized, dtype=np.float64).reshape(-1, 2) / annotations.sizes
    return sides * scales[annotations.box_image, ::-1]


def statistics(annotations: Annotations) -> dict[str, Any]:
    """Count and measure a split: what ``detpipe data info`` prints, fit for JSON; lengths in pixels of the image files."""
    a = annotations
    sides, per_image, image = box_sizes(a), np.diff(a.offsets), a.box_image
    area = sides.prod(axis=1)
    small, medium = int((a.area < _AREAS[0]).sum()), int(((a.area >= _AREAS[0]) & (a.area < _AREAS[1])).sum())
    return {
        "images": len(a),
        "boxes": len(a.boxes),
        "images without boxes": int((per_image == 0).sum()),
        "crowd": int(a.iscrowd.sum()),
        "difficult": int(a.difficult.sum()),
        "small, medium, large": [small, medium, len(a.boxes) - small - medium],
        "classes": {
            name: {
                "boxes": int((a.labels == label).sum()),
                "images": len(np.unique(image[a.labels == label])),
            }
            for label, name in enumerate(a.class_names, start=1)
        },
        "boxes per image": quantiles(per_image),
        "image width": quantiles(a.sizes[:, 1]),
        "image height": quantiles(a.sizes[:, 0]),
        "box width": quantiles(sides[:, 0]),
        "box height": quantiles(sides[:, 1]),
        "box height / width": quantiles(sides[:, 1] / sides[:, 0]),
        "box area / image area": quantiles(area / a.sizes[image].prod(axis=1, dtype=np.float64)),
        "counts": a.counts,
    }


def quantiles(values: npt.NDArray[Any]) -> dict[str, float]:
    """Least, greatest and some in between; nothing of nothing."""
    if not len(values):
        return {}
    return dict(zip(_NAMES, np.quantile(values.astype(np.float64), _QUANTILES).tolist(), strict=True))


@dataclass(frozen=True)
class SuggestedAnchors:
    """Shapes of anchors."""

    sizes: tuple[int, ...]  # square roots of areas, in pixels of the resized image
    ratios: tuple[float, ...]  # height divided by width
    iou: float  # mean, over all boxes, of the IoU with the anchor that fits best if it is centered on the box
    # the part of the boxes whose IoU of that kind is at least 0.7, from where on region proposal networks take an anchor for
    # positive
    recall: float


def suggest_anchors(sides: Floats, sizes: int = 4, ratios: int = 3) -> SuggestedAnchors:
    """Find shapes of anchors for boxes ``[B, 2]``, width and height in pixels of the resized image.

    Clusters of the logarithms of their sizes and ratios are moved to fit together. Sizes and ratios are ascending.
    """
    few = sides[:: max(1, len(sides) // _ENOUGH)]
    aspect = np.log(few[:, 1] / few[:, 0])
    means = cluster(np.log(few.prod(axis=1)) / 2, sizes), cluster(aspect, ratios)
    means = refine(few, *means)
    found_sizes = sorted({max(1, round(float(np.exp(mean)))) for mean in means[0]})
    found_ratios = sorted({float(f"{np.exp(mean):.2g}") for mean in means[1]})
    best = fit(sides, found_sizes, found_ratios)
    return SuggestedAnchors(tuple(found_sizes), tuple(found_ratios), float(best.mean()), float((best >= 0.7).mean()))


def refine(sides: Floats, sizes: Floats, ratios: Floats) -> tuple[Floats, Floats]:
    """Move the logarithms of sizes and ratios, one at a time, while the mean of the best IoUs with boxes ``[B, 2]`` grows.

    Every size has every ratio, so that the means of clusters of either alone are not yet the best of both.
    """
    values, count = np.concatenate([sizes, ratios]), len(sizes)

    def quality(tried: Floats) -> float:
        return float(fit(sides, np.exp(tried[:count]).tolist(), np.exp(tried[count:]).tolist()).mean())

    best = quality(values)
    for step in (0.2, 0.1, 0.05):  # of the logarithms
        for _ in range(_ROUNDS):
            before = best
            for k in range(len(values)):
                for move in (-step, step):
                    tried = values.copy()
                    tried[k] += move
                    if (found := quality(tried)) > best + 1e-6:
                        values, best = tried, found
            if best == before:
                break
    return values[:count], values[count:]


def fit(sides: Floats, sizes: Sequence[float], ratios: Sequence[float]) -> Floats:
    """How well anchors fit boxes ``[B, 2]`` that they are centered on: ``[B]`` the IoU with the best of all sizes and ratios.

    Example:
        >>> fit(np.array([[10.0, 10.0], [20.0, 10.0]]), [10], [1.0]).tolist()
        [1.0, 0.5]
    """
    best = np.zeros(len(sides))
    for size in sizes:
        for ratio in ratios:
            anchor = np.array([size / ratio**0.5, size * ratio**0.5])
            inter = np.minimum(sides, anchor).prod(axis=1)
            best = np.maximum(best, inter / (sides.prod(axis=1) + anchor.prod() - inter))
    return best


def cluster(values: Floats, count: int) -> Floats:
    """The means of at most ``count`` clusters of numbers, ascending, by k-means, started at their quantiles: always the same."""
    count = min(count, len(np.unique(values)))
    means = np.quantile(values, (np.arange(count) + 0.5) / count)
    for _ in range(_STEPS):
        distance = np.abs(values[:, None] - means)
        nearest = distance.argmin(axis=1)
        moved = means.copy()
        for k in range(count):
            # a cluster that nothing is near to begins anew at the number that is farthest from all
            moved[k] = values[nearest == k].mean() if (nearest == k).any() else values[distance.min(axis=1).argmax()]
        if np.allclose(moved, means):
            break
        means = moved
    return np.sort(means)

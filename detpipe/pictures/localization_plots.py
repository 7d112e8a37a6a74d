"""Pictures of weakly supervised localization: superpixels, truth, what was found, and the map of each class."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from detpipe.pictures.figures import image_panels, save_figure
from detpipe.pictures.visualize import plot_color
from detpipe.regions.superpixel_pooling import segment

Pixels = npt.NDArray[np.float64]  # [H, W, 3] in 0..1
PANELS = 8  # in one picture
_SHADE = 0.6  # of a class over the image
_IGNORED = (0.5, 0.5, 0.5)


def localization_picture(
    image: Tensor,
    superpixels: Tensor,
    truth: npt.NDArray[np.integer],
    maps: Tensor,
    class_names: Sequence[str],
    out: str | Path,
    threshold: float = 0.3,
) -> None:
    """Draw an image with its superpixels, its truth, what was found, and the map of each class that it truly has, at most 8 panels.

    Args:
        image: ``[3, H, W]`` uint8 RGB.
        superpixels: ``[H, W]``.
        truth: ``[H, W]`` 0 background, 1..K classes, -1 ignored.
        maps: ``[K, H, W]`` in 0..1.
        class_names: [K].
        out: the PNG.
        threshold: lowest score of a class.

    Raises:
        ValueError: shapes that do not fit.
    """
    size = tuple(image.shape[1:])
    if tuple(superpixels.shape) != size or truth.shape != size or tuple(maps.shape) != (len(class_names), *size):
        raise ValueError(
            f"expected superpixels and truth {list(size)} and maps {[len(class_names), *size]}, as image and classes are; got "
            f"{list(superpixels.shape)}, {list(truth.shape)}, {list(maps.shape)}"
        )
    maps, pixels = maps.detach().float().cpu(), image.permute(1, 2, 0).cpu().numpy() / 255
    found = segment(maps, threshold).numpy()
    classes = [label for label in np.unique(truth).tolist() if label > 0][: PANELS - 3]
    edges = boundaries(superpixels.cpu())
    panels = [
        ("superpixels", np.where(edges[..., None], np.array([1.0, 0.9, 0.1]), pixels)),
        ("truth: " + _names(truth, class_names), _shaded(pixels, truth)),
        ("found: " + _names(found, class_names), _shaded(pixels, found)),
    ]
    figure, axes, aspect = image_panels(3 + len(classes), size, 2.6, 0.3, "localization")
    for place, (title, picture) in zip(axes, panels, strict=False):
        place.imshow(picture, interpolation="nearest", aspect=aspect)
        place.set_title(title, loc="left", fontsize=8)
    for place, label in zip(axes[3:], classes, strict=False):
        drawn = place.imshow(
            maps[label - 1].numpy(), cmap="inferno", vmin=0, vmax=1, interpolation="nearest", aspect=aspect
        )
        place.set_title(f"map of {class_names[label - 1]}", loc="left", fontsize=8)
        figure.colorbar(drawn, ax=place, shrink=0.7)
    save_figure(figure, out)


def boundaries(superpixels: Tensor) -> npt.NDArray[np.bool_]:
    """Tell which pixels of ``[H, W]`` touch another superpixel at their right or lower side.

    Example:
        >>> boundaries(torch.tensor([[0, 0, 1]])).tolist()
        [[False, True, False]]
    """
    edges = torch.zeros(superpixels.shape, dtype=torch.bool)
    edges[:, :-1] |= superpixels[:, :-1] != superpixels[:, 1:]
    edges[:-1] |= superpixels[:-1] != superpixels[1:]
    return edges.numpy()


def _shaded(pixels: Pixels, labels: npt.NDArray[np.integer]) -> Pixels:
    """The image in gray, with each class in its color over it."""
    gray = np.repeat(pixels.mean(2, keepdims=True), 3, axis=2)
    for label in np.unique(labels).tolist():
        if label:
            color = np.array(_IGNORED if label < 0 else plot_color(label))
            there = (labels == label)[..., None]
            gray = np.where(there, (1 - _SHADE) * gray + _SHADE * color, gray)
    return gray


def _names(labels: npt.NDArray[np.integer], class_names: Sequence[str]) -> str:
    known: list[str] = [str(class_names[label - 1]) for label in np.unique(labels).tolist() if label > 0]
    return ", ".join(known[:6]) + (", ..." if len(known) > 6 else "") or "nothing"

"""Images of a data set with their boxes, one a file or many on one sheet."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from PIL import Image
from torch import Tensor

from detpipe.pictures.visualize import INK, captioned, draw_target, fit, sheet, to_pil
from detpipe.types import Target

_GAP, _CAPTION, _HEADER = 10, 20, 34


def contact_sheet(
    images: Sequence[Tensor], targets: Sequence[Target], class_names: Sequence[str], title: str = "", side: int = 360
) -> Tensor:
    """Put images ``[3, H, W]`` uint8 RGB with their boxes on one sheet, the longer side of each picture ``side`` pixels.

    Raises:
        ValueError: there are no images, or not one target for each.
    """
    if not images or len(images) != len(targets):
        raise ValueError(f"expected one target for each of at least one image, got {len(images)} and {len(targets)}")
    panels = [_panel(image, target, class_names, side) for image, target in zip(images, targets, strict=True)]
    return sheet(panels, max(1, round(len(panels) ** 0.5)), title, font_size=15, header=_HEADER, gap=_GAP)


def _panel(image: Tensor, target: Target, class_names: Sequence[str], side: int) -> Image.Image:
    small, factors = fit(image, side)
    resized: Target = {**target, "boxes": target.get("boxes", torch.zeros(0, 4)) * factors}
    drawn = draw_target(small, resized, class_names, min_side=0)
    name, count = target.get("file_name", "").rpartition("/")[2], len(resized.get("boxes", ()))
    text = f"{name}: {count} box{'' if count == 1 else 'es'}"
    return captioned([to_pil(drawn)], [text], height=_CAPTION, font_size=12, ink=INK)

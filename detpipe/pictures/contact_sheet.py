"""Images of a data set with their boxes, one a file or many on one sheet."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from detpipe.images import to_picture
from detpipe.pictures.visualize import IGNORED_COLOR, NARROWEST, class_color, draw, fit, font
from detpipe.types import Target

_INK, _PAPER = (30, 34, 40), (255, 255, 255)
_GAP, _CAPTION, _HEADER = 10, 20, 34


def draw_target(image: Tensor, target: Target, class_names: Sequence[str], min_side: int = 480) -> Tensor:
    """Draw what is annotated in an image ``[C, H, W]``, uint8 or 0..1: crowd regions and difficult objects gray, and named so."""
    boxes, labels = target.get("boxes", torch.zeros(0, 4)), target.get("labels", torch.zeros(0, dtype=torch.int64))
    none = torch.zeros(len(boxes), dtype=torch.bool)
    crowd, difficult = target.get("iscrowd", none), target.get("difficult", none)
    names = [
        *class_names,
        *(f"{name} (crowd)" for name in class_names),
        *(f"{name} (difficult)" for name in class_names),
    ]
    shifted = labels + len(class_names) * torch.where(crowd, 1, torch.where(difficult, 2, 0))
    colors = [
        IGNORED_COLOR if flagged else class_color(label)
        for flagged, label in zip((crowd | difficult).tolist(), labels.tolist(), strict=True)
    ]
    return draw(to_picture(image), boxes, shifted, names, colors=colors, min_side=min_side)


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
    columns = min(len(panels), max(1, round(len(panels) ** 0.5)))
    rows = [panels[k : k + columns] for k in range(0, len(panels), columns)]
    width = max(panel.width for panel in panels)
    heights = [max(panel.height for panel in row) for row in rows]
    canvas = Image.new("RGB", (columns * (width + _GAP) + _GAP, _HEADER + sum(heights) + _GAP * len(rows)), _PAPER)
    ImageDraw.Draw(canvas).text((_GAP, _HEADER / 2), title, fill=_INK, font=font(15), anchor="lm")
    top = _HEADER
    for row, height in zip(rows, heights, strict=True):
        for column, panel in enumerate(row):
            canvas.paste(panel, (_GAP + column * (width + _GAP), top))
        top += height + _GAP
    return torch.from_numpy(np.array(canvas)).permute(2, 0, 1).contiguous()


def _panel(image: Tensor, target: Target, class_names: Sequence[str], side: int) -> Image.Image:
    small, factors = fit(image, side)
    resized: Target = {**target, "boxes": target.get("boxes", torch.zeros(0, 4)) * factors}
    drawn = draw_target(small, resized, class_names, min_side=0)
    canvas = Image.new("RGB", (max(drawn.shape[2], NARROWEST), drawn.shape[1] + _CAPTION), _PAPER)
    canvas.paste(Image.fromarray(drawn.permute(1, 2, 0).numpy()), (0, _CAPTION))
    name, count = target.get("file_name", "").rpartition("/")[2], len(resized.get("boxes", ()))
    text = f"{name}: {count} box{'' if count == 1 else 'es'}"
    pen, face = ImageDraw.Draw(canvas), font(12)
    while pen.textlength(text, font=face) > canvas.width and len(text) > 4:
        text = f"...{text[4:]}"
    pen.text((0, _CAPTION / 2), text, fill=_INK, font=face, anchor="lm")
    return canvas

"""Images of a data set with their boxes, one a file or many on one sheet."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from PIL import Image, ImageDraw
from torch import Tensor

from detpipe.pictures.visualize import NARROWEST, draw_target, fit, font, sheet
from detpipe.types import Target

_INK, _PAPER = (30, 34, 40), (255, 255, 255)
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
    canvas = Image.new("RGB", (max(drawn.shape[2], NARROWEST), drawn.shape[1] + _CAPTION), _PAPER)
    canvas.paste(Image.fromarray(drawn.permute(1, 2, 0).numpy()), (0, _CAPTION))
    name, count = target.get("file_name", "").rpartition("/")[2], len(resized.get("boxes", ()))
    text = f"{name}: {count} box{'' if count == 1 else 'es'}"
    pen, face = ImageDraw.Draw(canvas), font(12)
    while pen.textlength(text, font=face) > canvas.width and len(text) > 4:
        text = f"...{text[4:]}"
    pen.text((0, _CAPTION / 2), text, fill=_INK, font=face, anchor="lm")
    return canvas

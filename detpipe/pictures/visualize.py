"""Boxes on images, truth beside detections, and sheets of such pictures.

Boxes are drawn by supervision where it is installed (extra ``viz``) and by torchvision otherwise, in the same colors.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torch.nn import functional
from torchvision.utils import draw_bounding_boxes

from detpipe.images import to_picture
from detpipe.pictures.figures import SLIMMEST, writable
from detpipe.support.errors import UsageError
from detpipe.support.files import atomic_write
from detpipe.types import Detection, Target

Color = tuple[int, int, int]  # red, green, blue, 0..255
Renderer = Literal["auto", "supervision", "torchvision"]

PALETTE: tuple[Color, ...] = (
    (255, 75, 60), (50, 205, 90), (65, 135, 255), (255, 205, 0), (215, 80, 225), (0, 215, 215), (255, 140, 20),
    (150, 95, 255), (170, 220, 40), (255, 110, 170), (0, 160, 130), (190, 120, 60), (150, 190, 255), (255, 175, 150),
    (120, 140, 0), (0, 95, 190), (190, 30, 90), (130, 230, 170), (225, 190, 255), (140, 70, 0),
)  # fmt: skip
IGNORED_COLOR: Color = (170, 170, 170)  # crowd regions and difficult objects

NARROWEST = 100  # of the place of a picture on a sheet, pixels: its caption needs some

INK, FAINT, PAPER = (30, 34, 40), (110, 118, 128), (255, 255, 255)
MOST_PLACED = 200  # tags of an image that leave each other room, which takes time that grows with the square
_BETWEEN = 4  # pixels between pictures that are compared


@dataclass(frozen=True)
class _Tags:
    """What is drawn beside each box, and how large."""

    texts: list[str]
    colors: list[Color]
    line_width: int
    text_size: int

    @property
    def text_colors(self) -> list[Color]:
        """Black or white, whichever is easier to read on the color of the box."""
        return [(0, 0, 0) if 0.3 * r + 0.59 * g + 0.11 * b > 125 else (255, 255, 255) for r, g, b in self.colors]


def class_color(label: int) -> Color:
    """The color of a class, the same in every picture. Labels count from 1."""
    return PALETTE[(label - 1) % len(PALETTE)]


def plot_color(label: int) -> tuple[float, float, float]:
    """The color of a class as matplotlib takes it, 0..1."""
    red, green, blue = class_color(label)
    return red / 255, green / 255, blue / 255


def draw(
    image: Tensor,
    boxes: Tensor,
    labels: Tensor,
    class_names: Sequence[str],
    scores: Tensor | None = None,
    *,
    colors: Sequence[Color] | None = None,
    min_side: int = 480,
    renderer: Renderer = "auto",
) -> Tensor:
    """Draw boxes with tags that name class and score.

    Args:
        image: [3, H, W] uint8 RGB.
        boxes: [D, 4] xyxy in pixels of ``image``. Those of higher scores are drawn over the others.
        labels: [D] int64 in 1..K.
        class_names: [K], the name of label 1 first.
        scores: [D] in 0..1, written on the tags.
        colors: one for each box, instead of the color of its class.
        min_side: an image whose shorter side is well below this is enlarged by a whole factor, so that tags stay
            readable, its longer side at most 6 times this; one that is still slimmer than a sixth of this is
            stretched across, by a whole factor; 0 keeps the size.
        renderer: ``"auto"`` takes supervision where it is installed.

    Returns:
        [3, s H, t W] uint8, s = t unless the image was stretched, 1 unless it was enlarged; ``image`` is left as it was.

    Raises:
        ValueError: a shape or dtype does not fit, or a label has no name.
        UsageError: ``renderer="supervision"`` and it is not installed.

    Example:
        >>> image = torch.zeros(3, 160, 200, dtype=torch.uint8)
        >>> draw(image, torch.tensor([[10.0, 40.0, 60.0, 90.0]]), torch.tensor([1]), ["cat"], torch.tensor([0.9])).shape
        torch.Size([3, 480, 600])
    """
    _check(image, boxes, labels, class_names, scores, colors)
    order = torch.arange(len(boxes)) if scores is None else torch.argsort(scores.cpu(), stable=True)
    image, boxes, labels = image.cpu(), boxes.cpu()[order], labels.cpu()[order]
    height, width = image.shape[1:]
    factor = max(1, min(round(min_side / min(height, width)), SLIMMEST * min_side // max(height, width)))
    high, wide = (factor * max(1, round(min_side / SLIMMEST / (factor * side))) for side in (height, width))
    image, boxes = _resize(image, height * high, width * wide), boxes * torch.tensor([wide, high, wide, high])
    texts = [_one_line(class_names[label - 1]) for label in labels.tolist()]
    if scores is not None:
        texts = [f"{text}  {score:.2f}" for text, score in zip(texts, scores.cpu()[order].tolist(), strict=True)]
    chosen = [class_color(label) for label in labels.tolist()]
    if colors is not None:
        chosen = [colors[k] for k in order.tolist()]
    side = min(image.shape[1:])
    text_size = max(12, min(round(side / 32), 22), round(side / 90))
    tags = _Tags(texts, chosen, line_width=max(2, round(side / 240)), text_size=text_size)
    if not texts:
        return image
    if _uses_supervision(renderer):
        return _draw_supervision(image, boxes, tags)
    return _draw_torchvision(image, boxes, tags)


def draw_target(
    image: Tensor, target: Target, class_names: Sequence[str], min_side: int = 480, renderer: Renderer = "auto"
) -> Tensor:
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
    return draw(to_picture(image), boxes, shifted, names, colors=colors, min_side=min_side, renderer=renderer)


def fit(image: Tensor, side: int) -> tuple[Tensor, Tensor]:
    """Resize an image [3, H, W] uint8 RGB so that its longer side has so many pixels; the shorter has at least a sixth of that.

    Returns:
        [3, H', W'] uint8, stretched where it was slimmer, and the factors of x1, y1, x2, y2 of boxes, [4].
    """
    height, width = image.shape[1:]
    scale = side / max(height, width)
    high, wide = (max(scale, side / SLIMMEST / length) for length in (height, width))
    resized = _resize(image, max(1, round(height * high)), max(1, round(width * wide)))
    return resized, torch.tensor([wide, high, wide, high])


def comparison_grid(
    images: Sequence[Tensor],
    targets: Sequence[Target],
    detections: Sequence[Detection],
    class_names: Sequence[str],
    score_threshold: float = 0.5,
    *,
    pairs_per_row: int = 2,
    panel_side: int = 360,
    renderer: Renderer = "auto",
) -> Tensor:
    """Show N images, each of its own size, twice: with its ground truth on the left, with what was detected on the right.

    Targets and detections are in the frames of the images; crowd regions and difficult objects are gray. The longer side of each
    panel is ``panel_side`` pixels.

    Raises:
        ValueError: there are no images, or not one target and one detection for each.
    """
    if not images or not len(images) == len(targets) == len(detections):
        raise ValueError(
            "expected one target and one detection for each of at least one image, "
            f"got {len(images)} images, {len(targets)} targets, {len(detections)} detections"
        )
    pairs = [
        _pair(image, target, detection, class_names, score_threshold, panel_side, renderer)
        for image, target, detection in zip(images, targets, detections, strict=True)
    ]
    title = f"left: ground truth      right: detections with a score of at least {score_threshold:g}"
    return sheet(pairs, pairs_per_row, title, font_size=17, header=44, gap=16)


def contact_sheet(
    images: Sequence[Tensor], targets: Sequence[Target], class_names: Sequence[str], title: str = "", side: int = 360
) -> Tensor:
    """Put images ``[C, H, W]``, uint8 or 0..1, with their boxes on one sheet, the longer side of each picture ``side`` pixels.

    Raises:
        ValueError: there are no images, or not one target for each.
    """
    if not images or len(images) != len(targets):
        raise ValueError(f"expected one target for each of at least one image, got {len(images)} and {len(targets)}")
    panels = [_panel(image, target, class_names, side) for image, target in zip(images, targets, strict=True)]
    return sheet(panels, max(1, round(len(panels) ** 0.5)), title, font_size=15, header=34, gap=10)


def sheet(panels: Sequence[Image.Image], columns: int, title: str, *, font_size: int, header: int, gap: int) -> Tensor:
    """Put pictures side by side in at most so many columns under a title, ``[3, H, W]`` uint8; lengths in pixels."""
    columns = min(columns, len(panels))
    rows = [panels[k : k + columns] for k in range(0, len(panels), columns)]
    width = max(panel.width for panel in panels)
    heights = [max(panel.height for panel in row) for row in rows]
    face = font(font_size)
    across = max(columns * (width + gap) + gap, round(face.getlength(title)) + 2 * gap)
    canvas = Image.new("RGB", (across, header + sum(heights) + gap * len(rows)), PAPER)
    ImageDraw.Draw(canvas).text((gap, header / 2), _one_line(title), fill=INK, font=face, anchor="lm")
    top = header
    for row, height in zip(rows, heights, strict=True):
        for column, panel in enumerate(row):
            canvas.paste(panel, (gap + column * (width + gap), top))
        top += height + gap
    return to_tensor(canvas)


def save_png(path: str | os.PathLike[str], image: Tensor) -> None:
    """Write an image, [3, H, W] uint8 RGB, so that the file is complete when it is visible; a ValueError if it is no such image."""
    _save(path, image, format="PNG", compress_level=1)  # a fourth of the time of 6, a quarter larger


def save_jpeg(path: str | os.PathLike[str], image: Tensor) -> None:
    """Write an image as `save_png` does, in a tenth of its time and bytes where it is a photograph."""
    _save(path, image, format="JPEG", quality=90)


def _save(path: str | os.PathLike[str], image: Tensor, **settings: Any) -> None:
    _check_image(image)
    with atomic_write(path) as temporary:
        to_pil(image).save(temporary, **settings)


def _check(
    image: Tensor,
    boxes: Tensor,
    labels: Tensor,
    class_names: Sequence[str],
    scores: Tensor | None,
    colors: Sequence[Color] | None,
) -> None:
    _check_image(image)
    if boxes.ndim != 2 or boxes.shape[1] != 4 or not torch.isfinite(boxes).all():
        raise ValueError(f"boxes must be finite, of shape [D, 4], got shape {list(boxes.shape)}: {boxes}")
    for name, value in (("labels", labels), ("scores", scores), ("colors", colors)):
        if value is not None and len(value) != len(boxes):
            raise ValueError(f"expected one of {name} for each of {len(boxes)} boxes, got {len(value)}")
    if len(labels) and not 1 <= int(labels.min()) <= int(labels.max()) <= len(class_names):
        raise ValueError(f"labels must be 1..{len(class_names)}, one for each class name, got {labels.tolist()}")


def _check_image(image: Tensor) -> None:
    if image.dtype != torch.uint8 or image.ndim != 3 or image.shape[0] != 3 or 0 in image.shape:
        raise ValueError(f"image must be uint8 of shape [3, H, W], got {image.dtype} of shape {list(image.shape)}")


def _uses_supervision(renderer: Renderer) -> bool:
    if renderer not in ("auto", "supervision", "torchvision"):
        raise ValueError(f"renderer must be 'auto', 'supervision' or 'torchvision', got {renderer!r}")
    installed = importlib.util.find_spec("supervision") is not None
    if renderer == "supervision" and not installed:
        raise UsageError("supervision is not installed: pip install 'detpipe[viz]', or take renderer='torchvision'")
    return installed and renderer != "torchvision"


def _draw_supervision(image: Tensor, boxes: Tensor, tags: _Tags) -> Tensor:
    import cv2
    import supervision as sv

    def palette(colors: list[Color]) -> sv.ColorPalette:
        # supervision's colors are meant for BGR: exchanged, they are right on RGB, and no pixel has to move
        return sv.ColorPalette([sv.Color(*color[::-1]) for color in colors])

    by_index, text_scale, padding = sv.ColorLookup.INDEX, tags.text_size / 28, 3
    corners = boxes.double().numpy()
    scene = np.ascontiguousarray(image.permute(1, 2, 0).numpy())
    boxed = sv.BoxAnnotator(palette(tags.colors), tags.line_width, by_index)
    scene = boxed.annotate(scene, sv.Detections(xyxy=corners))
    # supervision ties a tag to the upper left corner of a box, and draws it above
    thickness = max(1, round(tags.text_size / 22))
    extents = [cv2.getTextSize(text, cv2.FONT_HERSHEY_SIMPLEX, text_scale, thickness)[0] for text in tags.texts]
    sizes = np.array(extents) + 2 * padding
    lower_left = _place_tags(corners, sizes, image.shape[2], image.shape[1]) + sizes * [0, 1]
    anchors = np.concatenate([lower_left, lower_left + 1], axis=1)
    tagged = sv.LabelAnnotator(
        palette(tags.colors),
        by_index,
        palette(tags.text_colors),
        text_scale=text_scale,
        text_thickness=thickness,
        text_padding=padding,
    )
    scene = tagged.annotate(scene, sv.Detections(xyxy=anchors), labels=tags.texts)
    return torch.from_numpy(scene).permute(2, 0, 1)


def _draw_torchvision(image: Tensor, boxes: Tensor, tags: _Tags) -> Tensor:
    height, width = image.shape[1:]
    limits = torch.tensor([width, height, width, height]) - 1
    inside = torch.minimum(boxes.clamp(min=0), limits.to(boxes))
    boxed = draw_bounding_boxes(image, inside, colors=list(tags.colors), width=tags.line_width + 1)
    canvas = to_pil(boxed)
    pen, face = ImageDraw.Draw(canvas), font(tags.text_size)
    high = tags.text_size + 4
    sizes = np.array([(pen.textlength(text, font=face) + 6, high) for text in tags.texts])
    places = _place_tags(inside.double().numpy(), sizes, width, height)
    for (left, top), (wide, _), text, color, text_color in zip(
        places.tolist(), sizes.tolist(), tags.texts, tags.colors, tags.text_colors, strict=True
    ):
        pen.rectangle((left, top, left + wide, top + high), fill=color)
        pen.text((left + 3, top + high / 2), text, fill=text_color, font=face, anchor="lm")
    return to_tensor(canvas)


def _place_tags(
    boxes: npt.NDArray[np.float64], sizes: npt.NDArray[np.float64], width: int, height: int
) -> npt.NDArray[np.float64]:
    """The upper left corners [D, 2] of tags of some sizes [D, 2] in an image: each at its box, on others as little as may be.

    Those of the last boxes, which lie on top, have the first choice; of very many the first ones are placed as they come.
    """
    placed = np.zeros((len(boxes), 4))
    for k in reversed(range(len(boxes))):
        (x1, y1, x2, y2), (wide, high) = boxes[k], sizes[k]
        tops = [top for top in (y1 - high, y1, y2, y2 - high) if 0 <= top <= height - high] or [0]
        lefts = [min(max(left, 0), max(width - wide, 0)) for left in (x1, x2 - wide)]
        if k < len(boxes) - MOST_PLACED:
            placed[k] = (lefts[0], tops[0], lefts[0] + wide, tops[0] + high)
            continue
        options = np.array([(left, top, left + wide, top + high) for top in tops for left in lefts])
        shared = np.minimum(options[:, None, 2:], placed[k + 1 :, 2:]) - np.maximum(
            options[:, None, :2], placed[k + 1 :, :2]
        )
        placed[k] = options[shared.clip(min=0).prod(-1).sum(1).argmin()]
    return placed[:, :2]


def _pair(
    image: Tensor,
    target: Target,
    detection: Detection,
    class_names: Sequence[str],
    score_threshold: float,
    panel_side: int,
    renderer: Renderer,
) -> Image.Image:
    """One image with its truth and its detections, and a line above that says what is seen."""
    truth, panel, scale = _truth(image, target, class_names, panel_side, renderer)
    keep = detection["scores"] >= score_threshold
    found = [detection[key][keep].cpu() for key in ("boxes", "labels", "scores")]
    drawn = draw(panel, found[0] * scale, found[1], class_names, found[2], min_side=0, renderer=renderer)
    name = Path(target.get("file_name", "")).name
    captions = (f"{name}  truth: {len(target.get('boxes', ()))}".strip(), f"detected: {len(found[0])}")
    return captioned([to_pil(truth), to_pil(drawn)], captions, height=22, font_size=13, ink=FAINT)


def _panel(image: Tensor, target: Target, class_names: Sequence[str], side: int) -> Image.Image:
    drawn, _, _ = _truth(image, target, class_names, side)
    name, count = Path(target.get("file_name", "")).name, len(target.get("boxes", ()))
    text = f"{name}: {count} box{'' if count == 1 else 'es'}"
    return captioned([to_pil(drawn)], [text], height=20, font_size=12, ink=INK)


def _truth(
    image: Tensor, target: Target, class_names: Sequence[str], side: int, renderer: Renderer = "auto"
) -> tuple[Tensor, Tensor, Tensor]:
    """An image ``[C, H, W]`` resized by `fit`, with its truth and without; and the factors of boxes."""
    panel, factors = fit(to_picture(image), side)
    truth: dict[str, Any] = {key: value.cpu() for key, value in target.items() if isinstance(value, Tensor)}
    truth["boxes"] = truth.get("boxes", torch.zeros(0, 4)) * factors
    return draw_target(panel, cast(Target, truth), class_names, 0, renderer), panel, factors


def captioned(
    panels: Sequence[Image.Image], captions: Sequence[str], *, height: int, font_size: int, ink: Color
) -> Image.Image:
    """Put pictures of one size side by side, each under a line of text of a height; too long a text loses its beginning."""
    width, face = max(panels[0].width, NARROWEST), font(font_size)
    canvas = Image.new("RGB", (len(panels) * (width + _BETWEEN) - _BETWEEN, panels[0].height + height), PAPER)
    pen = ImageDraw.Draw(canvas)
    for k, (panel, text) in enumerate(zip(panels, map(_one_line, captions), strict=True)):
        while pen.textlength(text, font=face) > width and len(text) > 4:
            text = f"...{text[4:]}"
        left = k * (width + _BETWEEN)
        canvas.paste(panel, (left, height))
        pen.text((left, height / 2), text, fill=ink, font=face, anchor="lm")
    return canvas


def _one_line(text: object) -> str:
    return " ".join(writable(text).splitlines())


def font(size: int) -> Any:
    """The typeface of all pictures, at a size in pixels."""
    return ImageFont.load_default(size)


def _resize(image: Tensor, height: int, width: int) -> Tensor:
    if image.shape[1:] == (height, width):
        return image.clone()
    resized = functional.interpolate(image[None].float(), size=(height, width), mode="bicubic", antialias=True)
    return resized[0].round().clamp(0, 255).to(torch.uint8)


def to_pil(image: Tensor) -> Image.Image:
    """An image ``[3, H, W]`` uint8 RGB as one of Pillow's."""
    return Image.fromarray(image.cpu().permute(1, 2, 0).contiguous().numpy())


def to_tensor(canvas: Image.Image) -> Tensor:
    """The way back: ``[3, H, W]`` uint8."""
    return torch.from_numpy(np.array(canvas)).permute(2, 0, 1).contiguous()

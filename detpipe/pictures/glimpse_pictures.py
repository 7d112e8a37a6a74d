"""Where a head looked: for each detection its proposal, the glimpses in order, and the box found, as pictures and one page.

A picture shows the image with all its detections, and below it a panel for each of the best ones: the proposal as a dashed line,
glimpse 1, 2, ... from yellow to violet with a dot at the upper left corner of its frame, which tells how it is turned, and the
box as a thick line in the color of its class. ``glimpses.html`` beside the pictures shows those of all images.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

import torch
from PIL import Image, ImageDraw
from torch import Tensor

from detpipe.heads.base import outlines
from detpipe.pictures import visualize
from detpipe.pictures.report_html import table, text
from detpipe.support.files import write_text
from detpipe.types import GlimpsedDetection

PAGE = "glimpses.html"
PANEL, CAPTION, GAP, COLUMNS = 232, 20, 8, 4
SHOWN = 8  # detections of an image that have a panel
AROUND = 0.25  # of what a panel shows, on each side
FIRST, LAST = (255, 214, 0), (190, 40, 255)  # colors of the first and the last glimpse
_STYLE = (
    "body{font:15px system-ui,sans-serif;margin:2em auto;padding:0 1em;max-width:1000px;color:#1e2228}"
    "h2{overflow-wrap:anywhere}img{max-width:100%;border:1px solid #ccc}"
    "details{overflow-x:auto;margin:1em 0}summary{cursor:pointer}"
    "table{border-collapse:collapse;margin-top:.6em}caption{display:none}"
    "td,th{padding:.2em .8em;border-bottom:1px solid #ddd;text-align:left}"
)
_OUTSIDE = (110, 110, 110)


def draw_glimpses(image: Tensor, found: GlimpsedDetection, class_names: Sequence[str], shown: int = SHOWN) -> Tensor:
    """Draw all detections on an image ``[3, H, W]`` uint8 RGB, and below it panels of where a head looked for the best."""
    whole = visualize.draw(image, found["boxes"], found["labels"], class_names, found["scores"])
    count = min(shown, len(found["scores"]))
    if not count:
        return whole
    panels = []
    for index in range(count):
        text = f"{index + 1}: {class_names[int(found['labels'][index]) - 1]}  {float(found['scores'][index]):.2f}"
        panel = _panel(image, found, index, class_names)
        panels.append(visualize.captioned([panel], [text], height=CAPTION, font_size=13, ink=visualize.INK))
    below = visualize.sheet(panels, COLUMNS, _legend(found), font_size=13, header=GAP + CAPTION, gap=GAP)
    width = max(whole.shape[2], below.shape[2])
    canvas = Image.new("RGB", (width, whole.shape[1] + below.shape[1]), visualize.PAPER)
    canvas.paste(visualize.to_pil(whole), ((width - whole.shape[2]) // 2, 0))
    canvas.paste(visualize.to_pil(below), (0, whole.shape[1]))
    return visualize.to_tensor(canvas)


def write_page(folder: Path, records: Sequence[dict[str, Any]]) -> Path:
    """Write the page that shows all pictures of a folder, of the records that ``detpipe predict`` writes."""
    page = (
        "<!doctype html><html lang='en'><meta charset='utf-8'><meta name='viewport' content='width=device-width'>"
        f"<title>Glimpses</title><style>{_STYLE}</style><h1>Glimpses</h1>"
        "<p>Dashed: the proposal. Yellow to violet: the glimpses in order, with a dot at the upper left corner of the frame. "
        f"Thick: the box found, in the color of its class.</p>{''.join(map(_section, records))}</html>\n"
    )
    write_text(folder / PAGE, page)
    return folder / PAGE


def _section(record: dict[str, Any]) -> str:
    """The picture of an image, and where each of its detections looked."""
    name, found = text(record["file"]), record["detections"]
    drawing = quote(
        os.fsencode(record["drawing"])
    )  # a name may hold what means something in an address, such as #, ? and %
    heads = ("", "class", "score", "glimpses: shift in sides of the proposal (right, down) &times; size over it")
    rows = [[f"{k}", text(one["label"]), f"{one['score']:.2f}", _places(one)] for k, one in enumerate(found, start=1)]
    summary = f"{len(found)} detections" + (f", the {SHOWN} best in panels" if len(found) > SHOWN else "")
    opened = "" if len(found) > SHOWN else " open"
    shown = table("detections", heads, rows)
    listed = f"<details{opened}><summary>{summary}</summary>{shown}</details>" if found else "<p>Nothing was found.</p>"
    return f"<section><h2>{name}</h2><a href='{drawing}'><img src='{drawing}' alt='detections in {name}'></a>{listed}</section>"


def describe(found: GlimpsedDetection, index: int) -> dict[str, Any]:
    """Write as plain numbers ``proposal``, xyxy, and ``glimpses``, outlines of (x, y), of a detection in pixels of the image."""
    return {"proposal": found["proposals"][index].tolist(), "glimpses": found["glimpses"][index].tolist()}


def _places(one: dict[str, Any]) -> str:
    x1, y1, x2, y2 = one["proposal"]
    texts = []
    for outline in one["glimpses"]:
        points = torch.tensor(outline)
        center = (points.mean(0) - torch.tensor([(x1 + x2) / 2, (y1 + y2) / 2])) / torch.tensor([x2 - x1, y2 - y1])
        x, y = points.unbind(1)
        area = 0.5 * (x * y.roll(-1) - x.roll(-1) * y).sum().abs()  # of the outline, a polygon
        size = (area / ((x2 - x1) * (y2 - y1))).sqrt()
        texts.append(f"({center[0]:+.2f}, {center[1]:+.2f}) &times; {size:.2f}")
    return ", ".join(texts) or "none"


def _panel(image: Tensor, found: GlimpsedDetection, index: int, class_names: Sequence[str]) -> Image.Image:
    """What is around a detection, enlarged, with the outlines."""
    box, proposal, glimpses = (found[key][index] for key in ("boxes", "proposals", "glimpses"))
    drawn = [outlines(proposal), *glimpses.unbind(0), outlines(box)]
    low, high = torch.cat(drawn).aminmax(dim=0)
    side = float((high - low).max()) * (1 + 2 * AROUND)
    corner = (low + high) / 2 - side / 2
    scale = PANEL / max(side, 1e-6)
    left, upper = corner.tolist()
    area = (left, upper, left + side, upper + side)
    crop = visualize.to_pil(image).transform(
        (PANEL, PANEL), Image.Transform.EXTENT, area, Image.Resampling.BICUBIC, fillcolor=_OUTSIDE
    )
    pen = ImageDraw.Draw(crop)
    moved = [[tuple(point) for point in ((outline - corner) * scale).tolist()] for outline in drawn]
    color = visualize.class_color(int(found["labels"][index]))
    pen.line([*moved[-1], moved[-1][0]], fill=color, width=4, joint="curve")
    _dashed(pen, moved[0], (255, 255, 255))
    count = len(moved) - 2
    for step, outline in enumerate(moved[1:-1]):
        shade: Any = tuple(round(a + (b - a) * step / max(count - 1, 1)) for a, b in zip(FIRST, LAST, strict=True))
        pen.line([*outline, outline[0]], fill=shade, width=2, joint="curve")
        x, y = outline[0]
        pen.ellipse((x - 4, y - 4, x + 4, y + 4), fill=shade, outline=(0, 0, 0))
        x, y = outline[step % 4 * len(outline) // 4]  # each number at another corner
        pen.text(
            (x + 5, y + 5), str(step + 1), fill=shade, font=visualize.font(13), stroke_width=2, stroke_fill=(0, 0, 0)
        )
    return crop


def _legend(found: GlimpsedDetection) -> str:
    count = found["glimpses"].shape[1]
    seen = "no glimpses" if not count else "yellow: glimpse 1" + (f", to violet: {count}" if count > 1 else "")
    return f"dashed: proposal    {seen} (dot: upper left of its frame)    thick: box found"


def _dashed(pen: ImageDraw.ImageDraw, outline: Sequence[tuple[float, ...]], color: tuple[int, int, int]) -> None:
    """Dashes of six pixels with a dark rim, which show on any ground."""
    for (x1, y1), (x2, y2) in zip(outline, [*outline[1:], outline[0]], strict=True):
        length = max(((x2 - x1) ** 2 + (y2 - y1) ** 2) ** 0.5, 1e-6)
        for start in range(0, int(length) + 1, 12):
            ends = [min(start + more, length) / length for more in (0, 6)]
            dash = [(x1 + (x2 - x1) * end, y1 + (y2 - y1) * end) for end in ends]
            pen.line(dash, fill=(0, 0, 0), width=4)
            pen.line(dash, fill=color, width=2)

"""The worst images of a report: what is there beside what was detected, each box with what came of it."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass
from typing import Any

import torch
from PIL import ImageColor
from torch import Tensor

from detpipe.evaluation.worst_images import ImageOutcome
from detpipe.pictures import visualize
from detpipe.pictures.report_html import number, plural, section, table, text
from detpipe.pictures.report_scores import ERROR_COLORS

SIDE = 640  # pixels of the longer side of a drawing
_RIGHT, _IGNORED = "#1b7f3b", "#8a8f98"
_COLORS = {"found": _RIGHT, "right": _RIGHT, "ignored": _IGNORED, **ERROR_COLORS}


@dataclass(frozen=True)
class Drawing:
    """One image, ``[3, H, W]`` uint8 RGB, drawn twice: with its objects, and with its detections."""

    truth: Tensor
    found: Tensor


def draw_outcome(image: Tensor, outcome: ImageOutcome, class_names: list[str]) -> Drawing:
    """Draw an image ``[3, H, W]`` uint8 RGB with its objects, and with its detections, the longer side ``SIDE`` pixels."""
    panel, factors = visualize.fit(image, SIDE)
    scale = factors.numpy()
    truth = _draw(panel, outcome.boxes * scale, outcome.labels.tolist(), outcome.states, class_names, None)
    scores = torch.from_numpy(outcome.scores.copy())
    labels = outcome.found_labels.tolist()
    return Drawing(truth, _draw(panel, outcome.found_boxes * scale, labels, outcome.found_states, class_names, scores))


def _draw(
    panel: Tensor, boxes: Any, labels: list[int], states: tuple[str, ...], names: list[str], scores: Tensor | None
) -> Tensor:
    """Each box is a class of its own, so that its tag can say what came of it."""
    plain = ("found", "right")
    texts = [
        names[label - 1] if state in plain else f"{names[label - 1]}: {state}"
        for label, state in zip(labels, states, strict=True)
    ]
    colors: Any = [ImageColor.getrgb(_COLORS[state]) for state in states]
    numbers = torch.arange(1, len(texts) + 1)
    return visualize.draw(panel, torch.from_numpy(boxes.copy()), numbers, texts, scores, colors=colors, min_side=0)


def as_data(image: Tensor) -> str:
    """Write an image into an address, as JPEG: ``data:image/jpeg;base64,...``."""
    stream = io.BytesIO()
    visualize.to_pil(image).save(stream, format="JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(stream.getvalue()).decode("ascii")


def worst(numbers: dict[str, Any], drawings: list[Drawing]) -> str:
    """The section: drawings where there are images, else a table and how to get drawings."""
    records = numbers["worst_images"]
    title = "Worst images"
    if not records:
        why = "No image was asked for." if not numbers["worst_wanted"] else "No image costs any AP50."
        return section("images", title, f"<p>{why}</p>")
    score = number(numbers["operating_point"]["score"])
    intro = (
        "<p>The images that cost most: by how much AP50 would rise if everything in this one image were detected right. "
        f"Objects count as found, and detections are shown, at scores of at least {score} and IoU 0.50.</p>"
    )
    if not drawings:
        rows = [
            [text(one["file_name"]), number(one["cost"], 4), _found(one), text(_wrong(one) or "none")]
            for one in records
        ]
        how = "<p>Drawings need the images: give their folder by <code>--images FOLDER</code>.</p>"
        heads = ["image", "AP50", "objects", "false positives"]
        return section("images", title, intro + how + table("Images that cost most AP50", heads, rows, "words"))
    legend = "".join(
        f"<li><span class='dot' style='background:{color}' aria-hidden='true'></span>{name}</li>"
        for name, color in {"found, right": _RIGHT, **ERROR_COLORS, "ignored": _IGNORED}.items()
    )
    articles = "".join(_article(one, drawing) for one, drawing in zip(records, drawings, strict=True))
    return section("images", title, f"{intro}<ul class='legend'>{legend}</ul>{articles}")


def _article(record: dict[str, Any], drawing: Drawing) -> str:
    name, wrong = text(record["file_name"]), _wrong(record)
    missed = ", ".join(f"{text(key)} ({count})" for key, count in record["missed_classes"].items())
    detected = sum(record["detections"].values())
    said = f"Costs {number(record['cost'], 4)} AP50. {_found(record)}"
    said += f"; missed: {missed}. " if missed else ". "
    said += f"False positives: {text(wrong)}." if wrong else "No false positives."
    return (
        f"<article><h3>{name}</h3><p>{said}</p><div class='pair'>"
        f"<figure><img src='{as_data(drawing.truth)}' alt='{name} with its objects: {_found(record)}'>"
        "<figcaption>truth</figcaption></figure>"
        f"<figure><img src='{as_data(drawing.found)}' alt='{name} with {plural(detected, 'detection')}: "
        f"{text(wrong or 'no false positives')}'><figcaption>detections</figcaption></figure></div></article>"
    )


def _found(record: dict[str, Any]) -> str:
    found, missed = (record["objects"].get(key, 0) for key in ("found", "missed"))
    return f"{found} of {plural(found + missed, 'object')} found"


def _wrong(record: dict[str, Any]) -> str:
    wrong = {name: n for name, n in record["detections"].items() if name not in ("right", "ignored")}
    return ", ".join(f"{count} {name}" for name, count in wrong.items())

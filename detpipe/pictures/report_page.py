"""One page that explains a result: self-contained, no network, usable by keyboard and on a narrow screen.

Class names, run names and file names come from others' files: they are escaped wherever they are text, and JSON inside the
script cannot end it. The page's own policy forbids it to load anything.
"""

from __future__ import annotations

from importlib.resources import files
from typing import Any

from detpipe.pictures.report_comparison import comparison
from detpipe.pictures.report_confusion import confusion
from detpipe.pictures.report_html import script_json, scrolled, section, text
from detpipe.pictures.report_images import Drawing, worst
from detpipe.pictures.report_scores import classes, error_types, headline, sizes

_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:"
_PARTS = {
    "headline": "Headline",
    "comparison": "Comparison",
    "errors": "Where AP is lost",
    "curves": "Precision and recall",
    "sizes": "Sizes",
    "classes": "Classes",
    "confusion": "Confusions",
    "calibration": "Calibration",
    "images": "Worst images",
}


def report_page(numbers: dict[str, Any], drawings: list[Drawing]) -> str:
    """Write the page of the numbers of an analysis, as HTML, with drawings of each of the worst images or none at all."""
    style, script = (files("detpipe.pictures").joinpath(f"report.{end}").read_text("utf-8") for end in ("css", "js"))
    title = f"Evaluation report: {text(numbers['run'])}"
    links = "".join(f"<li><a href='#{key}'>{name}</a></li>" for key, name in _PARTS.items())
    parts = [
        headline(numbers),
        comparison(numbers),
        error_types(numbers),
        _curves(numbers),
        sizes(numbers),
        classes(numbers),
        confusion(numbers),
        _calibration(numbers),
        worst(numbers, drawings),
    ]
    return (
        "<!doctype html>\n<html lang='en'><head><meta charset='utf-8'>"
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        "<meta name='viewport' content='width=device-width, initial-scale=1'>"
        f"<title>{title}</title><style>\n{style}</style></head><body>"
        f"<a class='skip' href='#main'>Skip to the numbers</a><header><h1>{title}</h1>"
        f"<nav aria-label='Parts of the report'><ul>{links}</ul></nav></header>"
        "<noscript><p>The curves and the sorting need JavaScript; the same figures lie beside this page as PNG.</p></noscript>"
        f"<main id='main'>{''.join(parts)}</main>"
        "<footer>Scores are in 0..1. All numbers stand in report.json, the figures as PNG beside this page.</footer>"
        f"<script type='application/json' id='report-data'>{script_json(page_data(numbers))}</script>"
        f"<script>\n{script}</script></body></html>\n"
    )


def page_data(numbers: dict[str, Any]) -> dict[str, Any]:
    """What the script needs: curves in thousandths, which three digits can show, and the reliability diagrams."""
    calibration = numbers["calibration"]
    return {
        "names": ["all classes (mean)", *numbers["class_names"]],
        "iou": numbers["iou_thresholds"],
        "runs": [
            {"name": name, "curves": [_thousandths(curves) for curves in run["precision"]]}
            for name, run in numbers["curves"].items()
        ],
        "calibration": calibration
        and [{**one, "name": one["name"] or "all classes"} for one in calibration["diagrams"]],
    }


def _thousandths(curves: list[list[float | None]]) -> list[list[int]] | None:
    """[T][R] in whole thousandths; None for a class without objects."""
    if curves[0][0] is None:
        return None
    return [[max(round(1000 * value), value > 0) for value in curve if value is not None] for curve in curves]


def _curves(numbers: dict[str, Any]) -> str:
    several = " With several runs, each is a line." if len(numbers["curves"]) > 1 else ""
    return section(
        "curves",
        "Precision and recall",
        "<p>The best precision that can be had at each recall or beyond it, as COCO interpolates it; the area under the line is "
        f"AP.{several}</p><div class='controls'>"
        "<label for='pr-class'>Class<select id='pr-class'></select></label>"
        "<label for='pr-iou'>Overlap<select id='pr-iou'></select></label>"
        "<label for='pr-recall'>Recall to read off<input id='pr-recall' type='range' min='0' max='100' value='50'></label></div>"
        "<div class='chart' id='pr-chart'></div><ul class='legend' id='pr-legend'></ul>"
        "<p id='pr-read' role='status'></p>",
    )


def _calibration(numbers: dict[str, Any]) -> str:
    title = "Do scores mean what they say"
    if numbers["calibration"] is None:
        return section(
            "calibration",
            title,
            "<p>Some scores lie outside of 0..1: they are no probabilities to be compared with.</p>",
        )
    heads = "".join(f"<th scope='col'>{name}</th>" for name in ("score", "detections", "mean score", "precision"))
    return section(
        "calibration",
        title,
        "<p>Detections in ten bins by score; a dot is the mean score of a bin and the part of it that is right at IoU 0.50. On the "
        "dashed line a score is a probability; below it, the detector is too sure. Gray bars: how many detections a bin holds.</p>"
        "<div class='controls'><label for='calibration-class'>Class<select id='calibration-class'></select></label></div>"
        "<div class='chart' id='calibration-chart'></div><p id='calibration-read' role='status'></p>"
        "<details><summary>The bins as numbers</summary>"
        + scrolled("Bins of the reliability diagram", heads, "<tbody id='calibration-rows'></tbody>")
        + "</details>",
    )

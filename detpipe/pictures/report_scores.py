"""The parts of a report that are tables of scores: headline, error types, sizes, classes."""

from __future__ import annotations

from typing import Any

from detpipe.pictures.report_html import bar, number, plural, section, table, text

ERROR_COLORS = {
    "classification": "#c2185b",
    "localization": "#c25700",
    "both": "#7b2d9b",
    "duplicate": "#1565c0",
    "background": "#6d4c2f",
    "missed": "#c62828",
}
_ERROR_MEANINGS = {
    "classification": "an object is found in place, under another class",
    "localization": "an object of the class is there, the box fits badly (IoU 0.1 to 0.5)",
    "both": "another class, and the box fits badly",
    "duplicate": "an object that a better score has found already",
    "background": "nothing is there (IoU below 0.1)",
    "missed": "an object that nothing stands for",
}
_MEANINGS = {
    "AP": "mean over IoU 0.50 to 0.95",
    "AP50": "at IoU 0.50",
    "AP75": "at IoU 0.75",
    "APs": "small objects, up to 32 x 32 pixels",
    "APm": "medium objects, to 96 x 96 pixels",
    "APl": "large objects",
    "ARs": "recall of small objects",
    "ARm": "recall of medium objects",
    "ARl": "recall of large objects",
    "mAP": "mean average precision at IoU 0.50",
}
_CLASS_COLUMNS = {
    "name": "class",
    "objects": "objects",
    "AP": "AP",
    "AP50": "AP50",
    "AP75": "AP75",
    "detections": "detections",
    "precision": "precision",
    "recall": "recall",
    "calibration_error": "calibration error",
}


def _meaning(name: str) -> str:
    if name.startswith("AR") and name[2:].isdigit():
        return f"recall, {plural(int(name[2:]), 'detection')} of a class and image"
    return _MEANINGS.get(name, "")


def headline(numbers: dict[str, Any]) -> str:
    """The numbers of the protocol, and what they are of."""
    metrics, data, point = numbers["metrics"], numbers["data"], numbers["operating_point"]
    cards = "".join(
        f"<div class='card{' main' if index < 3 else ''}'><dt>{name}</dt><dd>{number(value)}"
        f"<small>{_meaning(name)}</small></dd></div>"
        for index, (name, value) in enumerate(metrics.items())
        if name != "per_class"
    )
    chosen = "was given" if point["given"] else "is where F1, all classes together, is best"
    ignored = (
        f" ({data['ignored_objects']:,} more are ignored: crowd regions, difficult)" if data["ignored_objects"] else ""
    )
    rules = (
        ""
        if numbers["protocol"] == "coco"
        else f"<p>These follow the protocol {text(numbers['protocol'])}; everything "
        "below except the comparison follows COCO's rules.</p>"
    )
    return section(
        "headline",
        "Headline numbers",
        f"<p>{plural(data['images'], 'image')}, {plural(data['objects'], 'object')}{ignored}, "
        f"{plural(data['classes'], 'class')}, {plural(data['detections'], 'detection')}.</p><dl class='cards'>{cards}</dl>{rules}"
        f"<p>A threshold for use: keeping detections with a score of at least <strong>{number(point['score'])}</strong> gives "
        f"precision {number(point['precision'])}, recall {number(point['recall'])}, F1 {number(point['f1'])} at IoU 0.50. "
        f"This score {chosen}.</p>",
    )


def error_types(numbers: dict[str, Any]) -> str:
    """What each type of error costs."""
    errors = numbers["errors"]
    largest = max([one["gain"] or 0 for one in errors["types"]] + [1e-9])
    rows = [
        [
            f"<span class='dot' style='background:{ERROR_COLORS[one['name']]}' aria-hidden='true'></span>{one['name']}"
            f"<small>{_ERROR_MEANINGS[one['name']]}</small>",
            f"{one['count']:,}",
            number(one["gain"], sign=True),
            bar((one["gain"] or 0) / largest, ERROR_COLORS[one["name"]]),
        ]
        for one in errors["types"]
    ]
    for key, name, meaning in (
        ("false_positives", "all false positives", "if none were reported"),
        ("false_negatives", "all false negatives", "if only what was found had been asked for"),
    ):
        one = errors[key]
        rows.append([f"{name}<small>{meaning}</small>", f"{one['count']:,}", number(one["gain"], sign=True), ""])
    return section(
        "errors",
        "Where AP is lost",
        f"<p>AP50 is {number(errors['AP50'])}. Each line says how much it would rise if all errors of that type, and no "
        "others, were mended. The gains do not add up: errors stand in each other's way. A low score makes an error cheap, "
        "so a type may have many errors and cost little.</p>"
        + table("Error types and the AP50 each would give back", ["type", "errors", "AP50", ""], rows),
    )


def sizes(numbers: dict[str, Any]) -> str:
    """AP by the size of objects."""
    rows = [
        [
            f"{one['name']}<small>{one['meaning']}</small>",
            f"{one['objects']:,}",
            number(one["AP"]),
            bar(one["AP"]),
            number(one["AP50"]),
            number(one["AP75"]),
            number(one["recall"]),
        ]
        for one in numbers["sizes"]
    ]
    heads = ["size", "objects", "AP", "", "AP50", "AP75", "recall"]
    return section(
        "sizes",
        "Average precision by size",
        "<p>Sizes are areas of the objects in square pixels of the original images. Recall is the mean over IoU 0.50 to 0.95, "
        f"of at most {numbers['max_detections']:,} detections of each class and image.</p>"
        + table("Average precision by size of objects", heads, rows),
    )


def classes(numbers: dict[str, Any]) -> str:
    """A line for each class, to be sorted by any column."""
    heads = [
        f"<button type='button' class='sort' data-column='{index}'>{name}</button>"
        for index, name in enumerate(_CLASS_COLUMNS.values())
    ]
    rows = []
    for one in numbers["per_class"]:
        cells = [f"<span data-value='{text(one['name'])}'>{text(one['name'])}</span>"]
        for key in list(_CLASS_COLUMNS)[1:]:
            value = one[key]
            shown = number(value) if key not in ("objects", "detections") else f"{value:,}"
            cells.append(f"<span data-value='{'' if value is None else value}'>{shown}</span>")
        rows.append(cells)
    score = number(numbers["operating_point"]["score"])
    return section(
        "classes",
        "Classes",
        f"<p>Detections, precision and recall count scores of at least {score} at IoU 0.50. The calibration error is the mean "
        "distance between a detection's score and how often such detections are right. A heading sorts the table; again, the "
        "other way round.</p>" + table("Scores of each class", heads, rows, "sortable"),
    )

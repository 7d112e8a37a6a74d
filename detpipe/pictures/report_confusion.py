"""The confusion matrix of a report, and the most frequent confusions in words."""

from __future__ import annotations

from typing import Any

import numpy as np

from detpipe.pictures.report_html import number, scrolled, section, table, text

SHOWN, LISTED = 25, 10  # classes in the matrix, confusions in words


def shown_classes(counts: np.ndarray, limit: int = SHOWN) -> list[int]:
    """Choose at most so many classes of a matrix ``[K + 1, K + 1]``, background last: those confused most, in order."""
    classes = len(counts) - 1
    if classes <= limit:
        return list(range(classes))
    between = counts[:-1, :-1] - np.diag(np.diag(counts)[:-1])
    wrong = between.sum(0) + between.sum(1)
    lost = counts[:-1, -1] + counts[-1, :-1]
    return sorted(np.lexsort((-lost, -wrong))[:limit].tolist())


def confusion(numbers: dict[str, Any]) -> str:
    """The section."""
    counts, names = np.array(numbers["confusion"]), numbers["class_names"]
    chosen = shown_classes(counts)
    note = "" if len(chosen) == len(names) else (
        f" The {len(chosen)} classes of {len(names)} that are confused most are shown; report.json holds all."
    )  # fmt: skip
    return section(
        "confusion",
        "What is taken for what",
        f"<p>Detections with a score of at least {number(numbers['operating_point']['score'])}, matched with objects of any class "
        "at IoU 0.50. A row is what an object is, a column what it was taken for. The last column: objects not found. The last "
        f"row: background taken for an object. Darker is a larger part of the row.{note}</p>"
        + _list(counts, names)
        + _matrix(counts, names, chosen),
    )


def _list(counts: np.ndarray, names: list[str]) -> str:
    between = counts[:-1, :-1] - np.diag(np.diag(counts)[:-1])
    order = np.argsort(-between, axis=None, kind="stable")[:LISTED]
    pairs = [divmod(int(cell), len(names)) for cell in order]
    rows = [
        [f"{text(names[truth])} taken for {text(names[found])}", f"{between[truth, found]:,}",
         f"{100 * between[truth, found] / max(int(counts[truth].sum()), 1):.1f}%"]
        for truth, found in pairs
        if between[truth, found]
    ]  # fmt: skip
    if not rows:
        return "<p>No object was taken for one of another class.</p>"
    return table("Most frequent confusions", ["confusion", "objects", "of the class"], rows)


def _matrix(counts: np.ndarray, names: list[str], chosen: list[int]) -> str:
    places = [*chosen, len(names)]
    labels = [*(text(names[place]) for place in chosen)]
    heads = "".join(f"<th scope='col'><span>{label}</span></th>" for label in [*labels, "not found"])
    rows = []
    for place, label in zip(places, [*labels, "background"], strict=True):
        total = max(int(counts[place].sum()), 1)
        cells = "".join(_cell(int(counts[place, column]), total, place == column) for column in places)
        rows.append(f"<tr><th scope='row'>{label}</th>{cells}</tr>")
    caption = "Confusion matrix: rows are the truth, columns what was detected"
    return scrolled(caption, f"<th scope='col'>truth</th>{heads}", f"<tbody>{''.join(rows)}</tbody>", "matrix")


def _cell(count: int, total: int, right: bool) -> str:
    if not count:
        return "<td class='none'>0</td>"
    part = count / total
    color = "24,110,60" if right else "178,34,34"
    ink = "#fff" if part > 0.45 else "#15181c"
    return f"<td style='background:rgba({color},{0.08 + 0.92 * part:.2f});color:{ink}'>{count:,}</td>"

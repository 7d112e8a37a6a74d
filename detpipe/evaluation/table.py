"""Numbers for a terminal, a log or a page: metrics and other tables as text, and what JSON can hold."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from detpipe.evaluation.protocols import PROTOCOLS
from detpipe.support.terminal import printable

_WIDTH = 100  # characters a line

_COCO_ROWS = {  # with COCO's numbers of detections, in whose place others may stand
    "AP": "average precision  IoU .50:.95  all areas      100 detections",
    "AP50": "average precision  IoU .50      all areas      100 detections",
    "AP75": "average precision  IoU .75      all areas      100 detections",
    "APs": "average precision  IoU .50:.95  small, < 32^2  100 detections",
    "APm": "average precision  IoU .50:.95  medium         100 detections",
    "APl": "average precision  IoU .50:.95  large, > 96^2  100 detections",
    "AR1": "average recall     IoU .50:.95  all areas        1 detection",
    "AR10": "average recall     IoU .50:.95  all areas       10 detections",
    "AR100": "average recall     IoU .50:.95  all areas      100 detections",
    "ARs": "average recall     IoU .50:.95  small, < 32^2  100 detections",
    "ARm": "average recall     IoU .50:.95  medium         100 detections",
    "ARl": "average recall     IoU .50:.95  large, > 96^2  100 detections",
}
_LVIS_ROWS = {
    **{name: row.replace("100 detections", "300 detections an image") for name, row in list(_COCO_ROWS.items())[:6]},
    "APr": "average precision  IoU .50:.95  rare classes",
    "APc": "average precision  IoU .50:.95  common classes",
    "APf": "average precision  IoU .50:.95  frequent classes",
    "AR": "average recall     IoU .50:.95  all areas      300 detections an image",
    "ARs": "average recall     IoU .50:.95  small, < 32^2  300 detections an image",
    "ARm": "average recall     IoU .50:.95  medium         300 detections an image",
    "ARl": "average recall     IoU .50:.95  large, > 96^2  300 detections an image",
}
_ROWS = {
    "coco": _COCO_ROWS,
    "lvis": _LVIS_ROWS,
    "voc07": {"mAP": "mean average precision  11 points (VOC 2007 to 2009)"},
    "voc10": {"mAP": "mean average precision  area under the curve (VOC 2010 and later)"},
}


def format_table(metrics: Mapping[str, Any], protocol: str = "coco") -> str:
    """Lay out what :func:`~detpipe.evaluation.protocols.evaluate` returned.

    Args:
        metrics: the numbers, with ``per_class``.
        protocol: the protocol that they were computed by: one of ``PROTOCOLS``.

    Returns:
        Lines of at most about 100 characters without a line break at the end: a line for each number, then the AP of
        each class in columns. Where there was no ground truth, ``-`` stands instead of -1.

    Raises:
        ValueError: no such protocol.

    Example:
        >>> print(format_table({"mAP": 0.5, "per_class": {"cat": 0.5, "dog": -1.0}}, "voc07"))
        mAP    0.500  mean average precision  11 points (VOC 2007 to 2009)
        <BLANKLINE>
        AP of each class
        cat  0.500   dog      -
    """
    if protocol not in PROTOCOLS:
        raise ValueError(f"protocol must be one of {', '.join(PROTOCOLS)}; got {protocol!r}")
    rows = _coco_rows(metrics) if protocol == "coco" else _ROWS[protocol]
    width = max(5, *map(len, rows))
    lines = [f"{name:<{width}}  {_number(metrics[name])}  {meaning}" for name, meaning in rows.items()]
    return "\n".join([*lines, "", "AP of each class", *_columns(metrics["per_class"])])


def _coco_rows(metrics: Mapping[str, Any]) -> dict[str, str]:
    """The rows for the numbers of detections that were counted: names as in ``AR100``."""
    limits = [int(name[2:]) for name in metrics if name.startswith("AR") and name[2:].isdigit()]
    rows: dict[str, str] = {}
    for name, meaning in _COCO_ROWS.items():
        if name == "AR1":
            for limit in limits:
                noun = "detection" if limit == 1 else "detections"
                rows[f"AR{limit}"] = meaning.replace("  1 detection", f"{limit:>3} {noun}")
        elif name not in ("AR10", "AR100"):
            rows[name] = meaning.replace("100 detections", f"{limits[-1]:>3} detections")
    return rows


def _number(value: float) -> str:
    return "    -" if value < 0 else f"{value:.3f}"


def _columns(per_class: Mapping[str, float]) -> list[str]:
    """Fill columns from top to bottom, as many as fit into a line."""
    shown = [(printable(name), _number(ap)) for name, ap in per_class.items()]
    longest = max((len(name) for name, _ in shown), default=0)
    cells = [f"{name:<{longest}}  {ap}" for name, ap in shown]
    columns = max(1, min(len(cells), (_WIDTH + 3) // (longest + 10)))
    height = -(-len(cells) // columns)
    return ["   ".join(cells[row::height]) for row in range(height)]


def aligned(rows: Sequence[Sequence[str]], markdown: bool = False) -> str:
    """Lay out rows of cells, the first the head: the first column left-aligned, the others right-aligned; or as Markdown."""
    if markdown:
        lines = [f"| {' | '.join(row)} |" for row in rows]
        return "\n".join([lines[0], f"| --- |{' ---: |' * (len(rows[0]) - 1)}", *lines[1:]])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        for row in rows
    ]
    return "\n".join("  ".join(cells).rstrip() for cells in lines)


def plain(value: Any) -> Any:
    """Turn what numpy holds into what JSON can hold; NaN and infinities become None."""
    if isinstance(value, dict):
        return {key: plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [plain(one) for one in value]
    if isinstance(value, np.ndarray | np.generic):
        return plain(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value

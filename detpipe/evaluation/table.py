"""Numbers for a terminal, a log or a page: metrics and other tables as text, and what JSON can hold."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from detpipe.evaluation.protocols import PROTOCOLS
from detpipe.support.terminal import printable

_WIDTH = 100  # characters a line

_PRECISIONS = {
    "AP": "IoU .50:.95  all areas    ",
    "AP50": "IoU .50      all areas    ",
    "AP75": "IoU .75      all areas    ",
    "APs": "IoU .50:.95  small, < 32^2",
    "APm": "IoU .50:.95  medium       ",
    "APl": "IoU .50:.95  large, > 96^2",
}
_FREQUENCIES = {"APr": "rare", "APc": "common", "APf": "frequent"}


def _rows(metrics: Mapping[str, Any], protocol: str) -> dict[str, str]:
    """What each number means, in the order of the lines."""
    if protocol.startswith("voc"):
        how = "11 points (VOC 2007 to 2009)" if protocol == "voc07" else "area under the curve (VOC 2010 and later)"
        return {"mAP": f"mean average precision  {how}"}
    limits = [int(name[2:]) for name in metrics if name.startswith("AR") and name[2:].isdigit()]
    most = f"{limits[-1]:>3} detections" if protocol == "coco" else "300 detections an image"
    rows = {name: f"average precision  {meaning}  {most}" for name, meaning in _PRECISIONS.items()}
    if protocol == "lvis":
        rows |= {name: f"average precision  IoU .50:.95  {word} classes" for name, word in _FREQUENCIES.items()}
        rows["AR"] = f"average recall     {_PRECISIONS['AP']}  {most}"
    for limit in limits:
        rows[f"AR{limit}"] = f"average recall     {_PRECISIONS['AP']}  {limit:>3} detection{'' if limit == 1 else 's'}"
    return rows | {f"AR{size}": f"average recall     {_PRECISIONS[f'AP{size}']}  {most}" for size in "sml"}


def format_table(metrics: Mapping[str, Any], protocol: str = "coco") -> str:
    """Lay out what :func:`~detpipe.evaluation.protocols.evaluate` returned for a protocol.

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
    rows = _rows(metrics, protocol)
    width = max(5, *map(len, rows))
    lines = [f"{name:<{width}}  {_number(metrics[name])}  {meaning}" for name, meaning in rows.items()]
    return "\n".join([*lines, "", "AP of each class", *_columns(metrics["per_class"])])


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

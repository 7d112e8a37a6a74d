"""Pieces of a page: escaped text, numbers, bars, tables, and JSON inside of a script."""

from __future__ import annotations

import html
import json
from collections.abc import Sequence
from typing import Any

from detpipe.pictures.figures import writable


def text(value: object) -> str:
    """Escape what was written by others for text and for attributes in quotes."""
    return html.escape(writable(value), quote=True)


def number(value: float | None, digits: int = 3, sign: bool = False) -> str:
    """Write a number of a report; a dash for what could not be computed, which is None or -1."""
    if value is None or (value == -1 and not sign):
        return "<span title='nothing to compute it from'>&ndash;</span>"
    shown = f"{value:+.{digits}f}" if sign else f"{value:.{digits}f}"
    return shown.replace("-", "&minus;")


def bar(part: float | None, color: str = "#2456b8") -> str:
    """Draw a part of 1 as a bar; what it says must stand beside it as a number."""
    width = 100 * min(max(part or 0.0, 0.0), 1.0)
    return f"<span class='track' aria-hidden='true'><span class='bar' style='width:{width:.1f}%;background:{color}'></span></span>"


def table(caption: str, heads: Sequence[str], rows: Sequence[Sequence[str]], kind: str = "") -> str:
    """Lay out escaped cells in a box that can be scrolled, by keyboard too; the first of each row is its heading."""
    head = "".join(f"<th scope='col'>{one}</th>" for one in heads)
    body = "".join(
        f"<tr><th scope='row'>{row[0]}</th>{''.join(f'<td>{cell}</td>' for cell in row[1:])}</tr>" for row in rows
    )
    return scrolled(caption, head, f"<tbody>{body}</tbody>", kind)


def scrolled(caption: str, head: str, body: str, kind: str = "") -> str:
    """Put a table in a box that can be scrolled, by keyboard too: the cells of its head, and its body."""
    return (
        f"<div class='scroll' tabindex='0' role='region' aria-label='{text(caption)}'><table class='{kind}'>"
        f"<caption>{text(caption)}</caption><thead><tr>{head}</tr></thead>{body}</table></div>"
    )


def interval(one: dict[str, Any], sign: bool = False) -> str:
    """Write an interval of a report: ``low to high``."""
    return f"{number(one['low'], sign=sign)} to {number(one['high'], sign=sign)}"


def section(key: str, title: str, content: str) -> str:
    """A part of the page that can be jumped to."""
    return (
        f"<section id='{key}' aria-labelledby='{key}-title'><h2 id='{key}-title'>{text(title)}</h2>{content}</section>"
    )


def script_json(value: Any) -> str:
    """Write JSON that ends no script and starts no comment, whatever names it holds."""
    dumped = json.dumps(value, allow_nan=False, separators=(",", ":"), ensure_ascii=True)
    return dumped.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def plural(count: int, noun: str) -> str:
    """``1 image``, ``2 images``, ``3 classes``."""
    ending = "" if count == 1 else "es" if noun.endswith("s") else "s"
    return f"{count:,} {noun}{ending}"

"""The comparison of runs in a report: numbers with intervals, differences with intervals, and what they allow to say."""

from __future__ import annotations

from typing import Any

from detpipe.pictures.report_html import interval, number, section, table, text

LISTED = 20  # classes with a difference that is listed


def verdict(difference: dict[str, Any]) -> str:
    """Say in a word what an interval of a difference allows to say."""
    if difference["low"] is None:
        return "unknown"
    if difference["low"] > 0:
        return "better"
    return "worse" if difference["high"] < 0 else "undecided"


def comparison(numbers: dict[str, Any]) -> str:
    """The section; how to get one where there is nothing to compare."""
    found = numbers["comparison"]
    if found is None:
        how = "<p>Only one run was given. Compare it with others by <code>--compare NAME=DETECTIONS.json ...</code></p>"
        return section("comparison", "Comparison of runs", how)
    others = found["runs"][1:]
    part = f"{100 * found['confidence']:g}%"
    metrics = list(found["runs"][0]["metrics"])
    scores = [
        [text(run["name"]), *(_with_interval(run["metrics"][metric]) for metric in metrics)] for run in found["runs"]
    ]
    reach = max(
        [abs(run["difference"][m][end] or 0) for run in others for m in metrics for end in ("low", "high")] + [1e-6]
    )
    rows = [
        [
            f"{text(run['name'])}, {metric}",
            number(one["value"], sign=True),
            f"<strong class='{verdict(one)}'>{verdict(one)}</strong>",
            interval(one, sign=True),
            _interval_picture(one, reach),
            "&ndash;" if one["better"] is None else f"{100 * one['better']:.0f}% of draws",
        ]
        for run in others
        for metric, one in run["difference"].items()
    ]
    base = text(found["baseline"])
    return section(
        "comparison",
        "Comparison of runs",
        f"<p>Differences are against <strong>{base}</strong>. {found['resamples']:,} times as many images as there are were drawn "
        f"with replacement, the same for all runs; an interval holds the middle {part} of what came out. It tells how much the "
        "choice of test images matters, not how much another training run would: for that, train with several seeds.</p>"
        + table(f"Scores with {part} intervals", ["run", *metrics], scores)
        + table(
            f"Differences to {found['baseline']} with {part} intervals",
            ["run", "difference", "verdict", "interval", "", "better in"],
            rows,
        )
        + "".join(_classes(run, part) for run in others),
    )


def _classes(run: dict[str, Any], part: str) -> str:
    """The classes that differ, the largest difference first."""
    clear = [(name, one) for name, one in run["per_class"].items() if verdict(one) in ("better", "worse")]
    clear.sort(key=lambda pair: -abs(pair[1]["value"]))
    count = len(run["per_class"])
    if not clear:
        return f"<p>{text(run['name'])}: no class has a difference in AP whose interval leaves out 0.</p>"
    rows = [[text(name), number(one["value"], sign=True), interval(one, sign=True)] for name, one in clear[:LISTED]]
    chance = f"By chance alone one in {round(1 / (1 - float(part[:-1]) / 100))} of {count} classes would be listed."
    more = f" The {LISTED} largest are shown." if len(clear) > LISTED else ""
    title = f"{text(run['name'])}: {len(clear)} of {count} classes differ"
    return f"<details><summary>{title}</summary><p>{chance}{more}</p>" + table(
        f"Classes that differ, {run['name']}", ["class", "difference in AP", f"{part} interval"], rows
    ) + "</details>"  # fmt: skip


def _with_interval(one: dict[str, Any]) -> str:
    return f"{number(one['value'])}<small>{interval(one)}</small>"


def _interval_picture(one: dict[str, Any], reach: float) -> str:
    """A line from low to high with a dot at the value, and a mark at 0; the numbers stand beside it."""
    if one["low"] is None or one["value"] is None:
        return ""
    low, high, value = (80 + 72 * one[key] / reach for key in ("low", "high", "value"))
    return (
        "<svg class='interval' viewBox='0 0 160 20' aria-hidden='true'><line x1='80' x2='80' y1='1' y2='19' stroke='#888' "
        f"stroke-dasharray='2 2'/><line x1='{low:.1f}' x2='{high:.1f}' y1='10' y2='10' stroke='#2456b8' stroke-width='3'/>"
        f"<circle cx='{value:.1f}' cy='10' r='4.5' fill='#15181c'/></svg>"
    )

"""What the variants of a study are worth: a table and a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from detpipe.pictures.figures import COLORS, new_figure, plain_axes, save_figure


@dataclass(frozen=True)
class Result:
    """One run: AP over IoU .50 to .95, AP50, parameters of the detector, most memory of training (None where it is not known)."""

    seed: int
    AP: float
    AP50: float
    parameters: int
    peak_memory_mib: float | None = None


def results_table(
    results: Mapping[str, Sequence[Result]], seeds: Sequence[int], split: str, milliseconds: Mapping[str, float]
) -> str:
    """Write a table in Markdown, of each variant's results in the order of the seeds and its milliseconds an image.

    Mean and range of AP and AP50, and the mean difference in AP between runs of the same seed. A difference is called one only
    where it is larger than the range of either variant over the seeds.
    """
    first = next(iter(results))
    lines = [
        f"| variant | parameters | ms an image | peak memory, MiB | AP, {split} | range | AP50 | range | AP against {first} |",
        "| --- | ---: | ---: | ---: | ---: | --- | ---: | --- | --- |",
    ]
    for name, found in results.items():
        aps, ap50s = (np.array([getattr(result, key) for result in found]) for key in ("AP", "AP50"))
        base = np.array([result.AP for result in results[first]])
        verdict = "" if name == first else _verdict(aps - base, max(np.ptp(aps), np.ptp(base)), len(seeds))
        cells = [name, f"{found[0].parameters / 1e6:.2f} M", f"{milliseconds[name]:.0f}", _memory(found)]
        cells += [_short(aps.mean()), _range(aps), _short(ap50s.mean()), _range(ap50s), verdict]
        lines.append(f"| {' | '.join(cells)} |")
    seen = "mean, and lowest to highest. Detection of single images, in turns; memory of training."
    lines += ["", f"Seeds {', '.join(map(str, seeds))}; {seen}"]
    return "\n".join(lines)


def plot_results(results: Mapping[str, Sequence[Result]], split: str, out: Path) -> None:
    """Draw each run as a dot and each variant's mean as a line, AP beside AP50."""
    figure = new_figure(2.2 + 1.5 * len(results), 3.8, "results")
    for axes, key in zip(figure.subplots(1, 2), ("AP", "AP50"), strict=True):
        for index, found in enumerate(results.values()):
            values, color = np.array([getattr(result, key) for result in found]), COLORS[index % len(COLORS)]
            offsets = np.linspace(-0.12, 0.12, len(values)) if len(values) > 1 else np.zeros(1)
            axes.plot(index + offsets, values, "o", color=color, markersize=6, alpha=0.8)
            axes.plot([index - 0.28, index + 0.28], [values.mean()] * 2, color=color, linewidth=2)
        crowded = max(map(len, results)) > 9  # letters that fit between two ticks
        axes.set_xticks(range(len(results)), list(results), **({"rotation": 30, "ha": "right"} if crowded else {}))
        axes.set_title(f"{key}, {split} split", loc="left")
        plain_axes(axes, "y")
    save_figure(figure, out)


def _verdict(differences: np.ndarray, spread: float, seeds: int) -> str:
    mean = float(differences.mean())
    if seeds < 2:
        return f"{mean:+.3f}, one seed: says nothing"
    if abs(mean) <= spread:
        return f"{mean:+.3f}, inside the spread"
    return f"{mean:+.3f}"


def _memory(found: Sequence[Result]) -> str:
    known = [result.peak_memory_mib for result in found if result.peak_memory_mib is not None]
    return f"{sum(known) / len(known):.0f}" if known else ""


def _short(value: float) -> str:
    return f"{value:.3f}"


def _range(values: np.ndarray) -> str:
    return f"{values.min():.3f} to {values.max():.3f}"

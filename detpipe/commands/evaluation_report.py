"""The report of an evaluation: what is asked for on the command line, checked early; and the folder that is written."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import TYPE_CHECKING

from detpipe import evaluation
from detpipe.evaluation.analysis import Analysis, AnalysisSettings, analyze
from detpipe.evaluation.comparison import COMPARED
from detpipe.pictures.report_figures import OPTIONAL_FIGURES, require_matplotlib, write_figures
from detpipe.support.errors import DataError, UsageError
from detpipe.support.files import write_text
from detpipe.types import Annotations, DetectionArrays

if TYPE_CHECKING:
    from torch import Tensor

    from detpipe.pictures.report_images import Drawing

PAGE, NUMBERS = "report.html", "report.json"


@dataclass(frozen=True)
class ReportOptions:
    """What users may ask for: a folder, other runs as ``NAME=DETECTIONS.json``, the folder of images, a name, and settings."""

    out: str | None = None
    compare: Sequence[str] = ()
    images: str | None = None
    run_name: str | None = None
    settings: AnalysisSettings = field(default_factory=AnalysisSettings)


def check_options(options: ReportOptions, default_name: str) -> None:
    """Refuse what cannot work before hours are spent on a model: such as a number out of range, or a name twice."""
    settings = options.settings
    if options.out is None:
        given = {"--compare": options.compare, "--images": options.images, "--run_name": options.run_name}
        given["--score_threshold"] = settings.score_threshold is not None
        extra = [name for name, value in given.items() if value]
        if extra:
            raise UsageError(f"{extra[0]} belongs to a report: give its folder by --report FOLDER")
        return
    if settings.protocol not in COMPARED:
        raise UsageError(
            f"--report follows the protocols {', '.join(COMPARED)}, not {settings.protocol}: choose one of them"
        )
    if Path(options.out).exists() and not Path(options.out).is_dir():
        raise UsageError(f"--report {options.out} is a file; give the name of a folder")
    if settings.resamples < 1 or settings.worst < 0:
        raise UsageError(
            f"--resamples must be 1 or more and --worst 0 or more, got {settings.resamples} and {settings.worst}"
        )
    if settings.score_threshold is not None and not math.isfinite(settings.score_threshold):
        raise UsageError(f"--score_threshold must be a finite number, got {settings.score_threshold}")
    if options.images is not None and not Path(options.images).is_dir():
        raise UsageError(f"--images {options.images} is not a folder: give the one that file names are relative to")
    name, others = options.run_name or default_name, parse_runs(options.compare)
    if name in others:
        raise UsageError(f"--compare: {name!r} is the name of the run itself: choose another, or give --run_name")
    for other, path in others.items():
        if not path.is_file():
            raise UsageError(f"--compare {other}={path}: there is no such file")
    require_matplotlib()


def parse_runs(given: Sequence[str]) -> dict[str, Path]:
    """Split ``NAME=FILE``; a UsageError where one is missing, or a name occurs twice."""
    runs: dict[str, Path] = {}
    for one in given:
        name, separator, path = one.partition("=")
        if not (separator and name.strip() and path):
            raise UsageError(f"--compare {one!r}: expected NAME=DETECTIONS.json")
        if name.strip() in runs:
            raise UsageError(f"--compare: the name {name.strip()!r} occurs twice: give each run its own")
        runs[name.strip()] = Path(path)
    return runs


def read_runs(options: ReportOptions, annotations: Annotations) -> dict[str, DetectionArrays]:
    """Read the runs to compare with, also before hours are spent."""
    return {name: evaluation.read_detections(path, annotations) for name, path in parse_runs(options.compare).items()}


def write_report(
    options: ReportOptions,
    annotations: Annotations,
    runs: Mapping[str, DetectionArrays],
    images: str | Callable[[int], Tensor] | None,
) -> Path:
    """Write figures, drawings, numbers, and last the page, whose path is returned; an earlier report in the folder is replaced.

    The first of the runs, name -> detections, is explained; images lie in a folder, or are read by their row in the annotations.
    """
    from detpipe.pictures.report_page import report_page  # with what draws boxes, which takes seconds to import
    from detpipe.pictures.visualize import save_png

    assert options.out is not None
    out = Path(options.out)
    analysis = analyze(annotations, runs, options.settings)
    drawings = _draw(analysis, annotations, images, own_folder=options.images is not None)
    out.mkdir(parents=True, exist_ok=True)
    for old in [*out.glob("worst_*_truth.png"), *out.glob("worst_*_found.png")]:  # there may have been more
        old.unlink()
    for name in OPTIONAL_FIGURES:  # which this report may not have
        (out / f"{name}.png").unlink(missing_ok=True)
    for index, drawing in enumerate(drawings, start=1):
        save_png(out / f"worst_{index:02}_truth.png", drawing.truth)
        save_png(out / f"worst_{index:02}_found.png", drawing.found)
    write_figures(analysis.numbers, out)
    write_text(out / NUMBERS, json.dumps(analysis.numbers, allow_nan=False) + "\n")
    write_text(out / PAGE, report_page(analysis.numbers, drawings))
    return out / PAGE


def _draw(
    analysis: Analysis, annotations: Annotations, images: str | Callable[[int], Tensor] | None, own_folder: bool
) -> list[Drawing]:
    if images is None:
        return []
    from detpipe.datasets import read_image
    from detpipe.pictures.report_images import draw_outcome

    names, drawings = list(annotations.class_names), []
    for outcome in analysis.worst:
        if not isinstance(images, str):
            drawings.append(draw_outcome(images(outcome.row), outcome, names))
            continue
        if own_folder:
            _check_inside(images, outcome.file_name)
        drawings.append(draw_outcome(read_image(Path(images, outcome.file_name)), outcome, names))
    return drawings


def _check_inside(folder: str, name: str) -> None:
    """Refuse names that lead out of the folder: the page would show the file to whoever is sent the report."""
    path = PurePath(name)
    if path.is_absolute() or ".." in path.parts:
        raise DataError(f"{name}: this file name leads out of the folder of images {folder}: correct the annotations")

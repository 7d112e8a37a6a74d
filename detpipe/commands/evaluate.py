"""The ``evaluate`` command: mean average precision of a model on a data set, or of a file of detections; and a report."""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any

import numpy as np

from detpipe import evaluation
from detpipe.commands.parser import OVERLAP, Parser, check_tiles
from detpipe.evaluation.analysis import Analysis, AnalysisSettings, analyze
from detpipe.evaluation.coco import MAX_DETECTIONS
from detpipe.evaluation.comparison import COMPARED
from detpipe.images import to_picture
from detpipe.pictures.report_figures import OPTIONAL_FIGURES, require_matplotlib, write_figures
from detpipe.support.errors import DataError, UsageError
from detpipe.support.files import write_text
from detpipe.types import Annotations, DetectionArrays

if TYPE_CHECKING:
    from lightning import LightningModule
    from torch import Tensor

    from detpipe.detector import TwoStageDetector
    from detpipe.heads import Postprocess
    from detpipe.pictures.report_images import Drawing

PAGE, NUMBERS = "report.html", "report.json"
# what both modes take: name -> type, how many values, help
_OPTIONS: dict[str, tuple[Any, str | None, str]] = {
    "max_detections": (int, "+", "of a class and image, so many detections count by COCO's rules; 1 10 100 by default"),
    "json": (str, None, "write the numbers to this file; those of a model lie beside its checkpoint by default"),
    "report": (str, None, "folder for a report: report.html, report.json and figures"),
    "compare": (str, "+", "other runs for the report, each NAME=DETECTIONS.json"),
    "run_name": (str, None, "what the report calls this run"),
    "score_threshold": (float, None, "of confusions and drawings in the report; where F1 is best by default"),
    "worst": (int, None, "so many of the worst images in the report; 12 by default"),
    "resamples": (int, None, "draws of images for the intervals of a comparison; 1000 by default"),
}


def evaluate(arguments: Sequence[str]) -> int:
    """Print a table and write what is asked for: of a file with ``--detections``, else of a model."""
    own = any(argument.split("=")[0] in ("--detections", "--annotations") for argument in arguments)
    if own or list(arguments) in ([], ["-h"]):
        return _evaluate_file(arguments)
    return _evaluate_model(arguments)


def _evaluate_file(arguments: Sequence[str]) -> int:
    parser = Parser(
        prog="detpipe evaluate",
        description="Evaluate a file of detections; for a model: detpipe evaluate CONFIG.yaml --ckpt_path CHECKPOINT.",
    )
    parser.add_argument("--detections", required=True, help="JSON in COCO's result format, or what predict wrote")
    parser.add_argument("--annotations", required=True, help="JSON in COCO's annotation format")
    parser.add_argument("--protocol", choices=evaluation.PROTOCOLS, default="coco")
    for name, (kind, count, text) in _OPTIONS.items():
        parser.add_argument(f"--{name}", type=kind, nargs=count, help=text)
    parser.add_argument("--images", help="folder of the images, for the drawings of a report")
    options = parser.parse_args(list(arguments))
    name = Path(options.detections).stem
    report = _report_options(options, options.images, name)
    if options.json is not None:
        _check_files(Path(options.json))
    annotations = evaluation.read_coco_annotations(options.annotations)
    detections = evaluation.read_detections(options.detections, annotations)
    others = _read_runs(report, annotations)
    metrics = evaluation.evaluate(annotations, detections, options.protocol, max_detections=options.max_detections)
    _print(metrics, options.protocol, options.json)
    _say_limits(detections, options.protocol, report.settings.max_detections)
    if report.out is not None:
        runs = {report.run_name or name: detections, **others}
        print(f"\nreport {_write_report(report, annotations, runs, report.images)}")
    return 0


def _evaluate_model(arguments: Sequence[str]) -> int:
    from detpipe.evaluation.metrics import CocoEvaluator
    from detpipe.training import checkpoint
    from detpipe.training.configuration import CLI, quiet
    from detpipe.training.trainer import build_trainer, told_as_usage

    quiet()
    cli = CLI(arguments, _add_arguments)
    config, data = cli.config, cli.datamodule
    if config.ckpt_path is None:
        raise UsageError("--ckpt_path is missing: give the checkpoint to evaluate, such as RUN/best.ckpt")
    run = Path(config.ckpt_path).parent
    report = _report_options(config, None, run.resolve().name)
    stored, description = checkpoint.read(config.ckpt_path)
    split = config.split or ("test" if {**getattr(data, "splits", {}), **data.shares}.get("test") else "val")
    annotations = data.annotations(split)
    checkpoint.check_class_names(description, annotations.class_names, config.ckpt_path)
    checkpoint.check_pixels(description, data.pixels, config.ckpt_path)
    checkpoint.load_weights(cli.model, stored, config.ckpt_path)
    others = _read_runs(report, annotations)
    model = _prediction(config, cli.model, data)
    results = Path(config.detections_out or run / f"{split}_detections.json")
    numbers = Path(config.json or run / f"{split}_{config.protocol}.json")
    _check_files(results, numbers)
    print(data.describe(split))
    for setting in checkpoint.differing_settings(description, checkpoint.describe_model(config.model)):
        print(f"note: not as in training: {setting}; RUN/config.yaml has all settings of a run")
    loader = data.eval_dataloader(split)
    trainer = build_trainer({**cli.trainer_settings, "limit_predict_batches": _limit(cli.trainer_settings, split)}, run)
    collector = CocoEvaluator(annotations).to(trainer.strategy.root_device)  # which the processes can gather from
    with told_as_usage():
        found = trainer.predict(model, loader) or []  # of this process' batches, of which it may have none
    for batch, keys in zip(found, loader.batch_sampler, strict=False):
        collector.update(batch, annotations.image_ids[[row for _, row in keys]].tolist())
    with collector.sync_context():
        seen, detections = collector.collected()
    if not trainer.is_global_zero:
        return 0
    evaluation.write_detections(results, detections, annotations)
    if len(seen) < len(annotations):
        print(f"the numbers are of {len(seen)} of {len(annotations)} images, since trainer limits the batches")
        annotations = seen
    metrics = evaluation.evaluate(annotations, detections, config.protocol, max_detections=config.max_detections)
    for logger in trainer.loggers:
        logger.log_metrics(
            {f"{split}/{name}": value for name, value in metrics.items() if isinstance(value, float)},
            stored["global_step"],
        )
        logger.finalize("success")
    _print(metrics, config.protocol, numbers)
    postprocess = None if config.tiles else getattr(cli.model.head, "postprocess", None)  # of tiles it limits each
    _say_limits(detections, config.protocol, report.settings.max_detections, postprocess)
    print(f"\nnumbers {numbers}\ndetections {results}")
    if report.out is not None:
        runs = {report.run_name or run.resolve().name: detections, **others}
        dataset = data.dataset(split)  # which knows where images are: not all data are files of their own
        print(f"report {_write_report(report, annotations, runs, lambda row: to_picture(dataset.read(row)[0]))}")
    return 0


def _add_arguments(parser: Any) -> None:
    from typing import Literal

    parts = Literal["train", "val", "test"] | None
    results = "for the detections in COCO's result format; beside the checkpoint by default"
    parser.add_argument("--ckpt_path", type=str | None, default=None, help="checkpoint to evaluate")
    parser.add_argument("--split", type=parts, default=None, help="test where the configuration names one, else val")
    parser.add_argument("--protocol", type=Literal["coco", "voc07", "voc10"], default="coco")
    parser.add_argument("--tiles", type=int | None, default=None, help="look at images tile by tile, of so many pixels")
    parser.add_argument("--overlap", type=float, default=OVERLAP, help="share of a tile that the next one has too")
    parser.add_argument("--tta", type=bool, default=False, help="true: look at each image six times; see predict")
    parser.add_argument("--detections_out", type=str | None, default=None, help=results)
    for name, (kind, count, text) in _OPTIONS.items():
        more = {"type": kind, "nargs": count} if count else {"type": kind | None}
        parser.add_argument(f"--{name}", default=None, help=text, **more)


def _prediction(config: Any, model: TwoStageDetector, data: Any) -> LightningModule:
    """The model, or what looks at tiles of the images, or at each image several times."""
    from detpipe.prediction.module import PredictionModule

    check_tiles(config)
    if config.tiles is not None and data.resize is not None:
        raise UsageError("--tiles: the data have resized images before they are cut; set data.resize to null")
    if config.tiles is None and not config.tta:
        return model
    return PredictionModule(model, config.tta, config.tiles, config.overlap)


def _limit(trainer: Mapping[str, Any], split: str) -> Any:
    """How many batches are evaluated: as of prediction, or of the split where that is not limited."""
    limit = trainer["limit_predict_batches"]
    limit = trainer[f"limit_{split}_batches"] if limit is None else limit
    if limit == 0:
        raise UsageError("trainer limits the batches to 0; give --trainer.limit_predict_batches 1.0 to evaluate all")
    return limit


def _check_files(*paths: Path) -> None:
    """Refuse what cannot be written before hours are spent on a model."""
    for path in paths:
        if path.is_dir():
            raise UsageError(f"{path} is a folder; give the name of a file for --json and --detections_out")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=path.parent).close()
        except OSError as error:
            raise UsageError(
                f"{path} cannot be written ({error.strerror}); name files elsewhere by --json and --detections_out"
            ) from error


def _say_limits(
    detections: DetectionArrays, protocol: str, limits: Sequence[int], postprocess: Postprocess | None = None
) -> None:
    """Say where a limit leaves out detections that might count."""
    columns = np.stack([detections.image_ids, detections.labels], axis=1)
    images, counts = np.unique(detections.image_ids, return_counts=True)
    if protocol == "coco":
        pairs, of_class = np.unique(columns, axis=0, return_counts=True)
        crowded = len(np.unique(pairs[of_class > limits[-1], 0]))
        if crowded:
            more = " ".join(map(str, (*limits[:-1], 10 * limits[-1])))
            print(
                f"{crowded} images have more than {limits[-1]} detections of a class, of which the best {limits[-1]} count; "
                f"--max_detections {more} counts more"
            )
    full = 0 if postprocess is None else int((counts >= postprocess.detections_per_image).sum())
    if postprocess is not None and full:
        print(
            f"{full} of {len(images)} images have {postprocess.detections_per_image} detections, the most that the model gives; "
            "--model.head.postprocess.detections_per_image gives more"
        )


def _report_options(given: Any, images: str | None, default_name: str) -> ReportOptions:
    """Take the options of the report from either parser, and check them."""
    limits = given.max_detections
    if limits is not None and given.protocol != "coco":
        raise UsageError(f"--max_detections belongs to the protocol coco, not {given.protocol}: leave it out")
    if limits is not None and (limits[0] < 1 or any(b <= a for a, b in pairwise(limits))):
        raise UsageError(f"--max_detections must be one or more rising numbers from 1 on, got {limits}")
    counts = {name: getattr(given, name) for name in ("worst", "resamples") if getattr(given, name) is not None}
    settings = AnalysisSettings(
        given.protocol, given.score_threshold, max_detections=tuple(limits or MAX_DETECTIONS), **counts
    )
    out = None if given.report is None else Path(given.report)
    options = ReportOptions(out, _parse_runs(given.compare or ()), images, given.run_name, settings)
    if out is not None:
        _check_report(options, out, default_name)
        return options
    extra = [name for name in ("compare", "run_name", "score_threshold", *counts) if getattr(given, name) is not None]
    if extra or images is not None:
        name = extra[0] if extra else "images"
        raise UsageError(f"--{name} belongs to a report: give its folder by --report FOLDER")
    return options


def _print(metrics: dict[str, Any], protocol: str, path: str | Path | None) -> None:
    if path is not None:  # before the table, which a closed pipe may end
        write_text(path, json.dumps(metrics, indent=2) + "\n")
    print(evaluation.format_table(metrics, protocol))


@dataclass(frozen=True)
class ReportOptions:
    """What users may ask for: a folder, files of other runs by name, the folder of images, a name, and settings."""

    out: Path | None
    compare: Mapping[str, Path]
    images: str | None
    run_name: str | None
    settings: AnalysisSettings


def _check_report(options: ReportOptions, out: Path, default_name: str) -> None:
    """Refuse what cannot work before hours are spent on a model: such as a number out of range, or a name twice."""
    settings = options.settings
    if settings.protocol not in COMPARED:
        raise UsageError(
            f"--report follows the protocols {', '.join(COMPARED)}, not {settings.protocol}: choose one of them"
        )
    if out.exists() and not out.is_dir():
        raise UsageError(f"--report {out} is a file; give the name of a folder")
    if settings.resamples < 1 or settings.worst < 0:
        raise UsageError(
            f"--resamples must be 1 or more and --worst 0 or more, got {settings.resamples} and {settings.worst}"
        )
    if settings.resamples != AnalysisSettings.resamples and not options.compare:
        raise UsageError("--resamples belongs to a comparison: name other runs by --compare, or leave it out")
    if settings.score_threshold is not None and not math.isfinite(settings.score_threshold):
        raise UsageError(f"--score_threshold must be a finite number, got {settings.score_threshold}")
    if options.images is not None and not Path(options.images).is_dir():
        raise UsageError(f"--images {options.images} is not a folder: give the one that file names are relative to")
    name = options.run_name or default_name
    if name in options.compare:
        raise UsageError(f"--compare: {name!r} is the name of the run itself: choose another, or give --run_name")
    for other, path in options.compare.items():
        if not path.is_file():
            raise UsageError(f"--compare {other}={path}: there is no such file")
    require_matplotlib()


def _parse_runs(given: Sequence[str]) -> dict[str, Path]:
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


def _read_runs(options: ReportOptions, annotations: Annotations) -> dict[str, DetectionArrays]:
    """Read the runs to compare with, also before hours are spent."""
    return {name: evaluation.read_detections(path, annotations) for name, path in options.compare.items()}


def _write_report(
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
    out = options.out
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

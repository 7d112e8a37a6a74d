"""What ``tools/train_classifier.py`` runs: digits distorted in several ways, classified with and without spatial transformers.

Jaderberg et al., "Spatial Transformer Networks", 2015, arXiv 1506.02025, table 1 and figure 1.

The folder of a study gets ``table.md`` and ``results.json`` (error of each model on each distortion, mean and range over the
seeds), ``MODEL.png`` for each transformer (input, sampled region, output and prediction), an animation of one training,
``DISTORTION_MODEL_SEED.gif``, and of each run the weights, ``DISTORTION_MODEL_SEED.safetensors``. A study that is started again
in the same folder goes on with the runs that are not finished.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

from detpipe.support import resumable
from detpipe.support.errors import UsageError
from detpipe.support.files import atomic_write, remove_orphans
from detpipe.support.resumable import Work
from detpipe.training import run_folder
from detpipe.training.allowed import only_allowed
from detpipe.training.config_errors import explain
from detpipe.training.configuration import Parser, positional_configs, quiet
from stn_digits.classifier import Model
from stn_digits.digits import Distortion
from stn_digits.pictures import draw_looks, look, save_png
from stn_digits.run import Recipe, Result, Run, train

DESCRIPTION = "Classify distorted digits with and without spatial transformers, and tabulate the errors."
Results = dict[tuple[Distortion, Model, int], Result]  # of each model, distortion and seed
DRAWN = 3  # digits of each distortion in a picture


@dataclass(frozen=True)
class Animation:
    """Which training is animated, with the first of the seeds.

    Args:
        distortion: of the digits.
        model: one with a transformer.

    Raises:
        ValueError: a model without a transformer.
    """

    distortion: Distortion = "RTS"
    model: Model = "affine"

    def __post_init__(self) -> None:
        if self.model == "cnn":
            raise ValueError("animation.model must have a transformer, got 'cnn'")


@dataclass(frozen=True)
class Study:
    """What is compared.

    Args:
        distortions: the columns of the table.
        models: its rows.
        seeds: of each model on each distortion.
        animation: of a training, made if it is one of the study; null for none.
        workers: runs at a time, each in a process of its own with one thread.

    Raises:
        ValueError: nothing to compare, something twice, or a number below its least.
    """

    distortions: list[Distortion]
    models: list[Model]
    seeds: list[int]
    animation: Animation | None = Animation()
    workers: int = 2

    def __post_init__(self) -> None:
        for name in ("distortions", "models", "seeds"):
            given = getattr(self, name)
            if not given or len(set(given)) < len(given):
                raise ValueError(f"{name} must be at least one, each once, got {given}")
        if min(self.seeds) < 0 or self.workers < 1:
            raise ValueError(
                f"expected seeds of at least 0 and workers of at least 1, got {self.seeds} and {self.workers}"
            )


def train_classifier(arguments: Sequence[str]) -> int:
    """Train what is not trained yet, then write the table and the pictures; the last line printed is the table's path.

    Args:
        arguments: ``CONFIG.yaml [MORE.yaml ...] [--key value ...]``; ``--output FOLDER`` names the folder.

    Raises:
        DetpipeError: what users can mend.
    """
    quiet()
    study, recipe, output = read_arguments(arguments)
    folder = run_folder.choose_folder(output, Path(arguments[0]).stem)
    runs = _runs(study, recipe, folder)
    _check(runs)
    folder.mkdir(parents=True, exist_ok=True)
    remove_orphans(folder)
    waiting = [run for run in runs if not run.done]
    print(f"{len(runs)} runs, {len(runs) - len(waiting)} of them done; folder {folder}", flush=True)
    _train(waiting, study.workers)
    results: Results = {(run.distortion, run.model, run.seed): run.result() for run in runs}
    _write_results(study, recipe, results, folder)
    for path in _draw(study, runs, folder):
        print(f"picture {path}")
    print(f"table {folder / 'table.md'}")
    return 0


def read_arguments(arguments: Sequence[str]) -> tuple[Study, Recipe, str | None]:
    """Read what is compared, how it is trained, and the folder that was asked for; a UsageError for a wrong key or value."""
    parser = Parser(prog="tools/train_classifier.py", description=DESCRIPTION)
    parser.add_argument("-c", "--config", action="config", help="configurations; later ones win")
    parser.add_argument(
        "-o", "--output", type=str | None, default=None, help="folder; runs/CONFIG/DATE-TIME by default"
    )
    parser.add_class_arguments(Study)
    parser.add_class_arguments(Recipe)
    with only_allowed(["stn_digits"]):
        given = parser.parse_args(positional_configs(arguments))
        try:
            built = parser.instantiate(given)
            study = Study(**{field.name: built[field.name] for field in fields(Study)})
            recipe = Recipe(**{field.name: built[field.name] for field in fields(Recipe)})
        except (ValueError, TypeError) as error:
            raise UsageError(explain(str(error))) from error
    return study, recipe, built["output"]


def results_table(study: Study, results: Results) -> str:
    """Write the errors as a table in Markdown.

    A row for each model: parameters, mean error on each distortion with the range over the seeds, mean processor time of a run.
    """
    lines = [
        f"| model | parameters | {' | '.join(study.distortions)} | CPU seconds a run |",
        f"| --- | ---: |{' --- |' * len(study.distortions)} ---: |",
    ]
    for model in study.models:
        cells = []
        for distortion in study.distortions:
            errors = [results[distortion, model, seed].error for seed in study.seeds]
            cells.append(f"{sum(errors) / len(errors):.2f} ({min(errors):.2f} to {max(errors):.2f})")
        own = [result for (_, name, _), result in results.items() if name == model]
        seconds = sum(result.seconds for result in own) / len(own)
        lines.append(f"| {model} | {own[0].parameters:,} | {' | '.join(cells)} | {seconds:.1f} |")
    seeds = ", ".join(map(str, study.seeds))
    return "\n".join([*lines, "", f"Test error in percent; seeds {seeds}: mean, and lowest to highest."])


def _runs(study: Study, recipe: Recipe, folder: Path) -> list[Run]:
    """All runs, seed by seed, so that what is done so far can be compared."""
    runs = []
    for seed in study.seeds:
        for distortion in study.distortions:
            for model in study.models:
                wanted = study.animation
                filmed = wanted is not None and (wanted.distortion, wanted.model) == (distortion, model)
                filmed = filmed and seed == study.seeds[0]
                runs.append(Run(distortion, model, seed, recipe, folder, filmed))
    return runs


def _check(runs: Sequence[Run]) -> None:
    """Refuse what would fail later: networks that cannot be built, and finished runs of other settings."""
    for run in {run.model: run for run in runs}.values():
        try:
            run.network()
        except ValueError as error:
            raise UsageError(str(error)) from error
    for run in runs:
        if run.file.exists():
            run.result()


def _train(runs: Sequence[Run], workers: int) -> None:
    start = time.perf_counter()
    results = resumable.run(partial(_prepare, train), runs, workers, "stn_digits.run")
    for number, (run, result) in enumerate(results, start=1):
        left = (time.perf_counter() - start) / number * (len(runs) - number)
        print(
            f"{number} of {len(runs)}: {run.distortion} {run.model} seed {run.seed}: error {result.error:.2f} %; "
            f"about {left / 60:.1f} minutes left",
            flush=True,
        )


def _prepare(work: Callable[[Run], Result]) -> Work[Run, Result]:
    """What trains in a process of its own, without advice of Lightning."""
    quiet()
    return lambda run, step: work(run)


def _write_results(study: Study, recipe: Recipe, results: Results, folder: Path) -> None:
    table = results_table(study, results)
    with atomic_write(folder / "table.md") as temporary:
        temporary.write_text(table + "\n", encoding="utf-8")
    rows = [
        {"distortion": distortion, "model": model, "seed": seed, **asdict(result)}
        for (distortion, model, seed), result in results.items()
    ]
    content: dict[str, Any] = {"study": asdict(study), "recipe": asdict(recipe), "runs": rows}
    with atomic_write(folder / "results.json") as temporary:
        temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    print(table)


def _draw(study: Study, runs: Sequence[Run], folder: Path) -> Iterator[Path]:
    """Draw what each transformer does on each distortion, with the first of the seeds: digits that no one has chosen."""
    for model in (model for model in study.models if model != "cnn"):
        rows = {}
        for run in (run for run in runs if (run.model, run.seed) == (model, study.seeds[0])):
            images, labels = run.data().test_set()
            first = DRAWN * len(rows)
            rows[run.distortion] = look(run.trained(), images[first : first + DRAWN], labels[first : first + DRAWN])
        path = folder / f"{model}.png"
        save_png(draw_looks(rows, f"{model} transformer, test digits, seed {study.seeds[0]}"), path)
        yield path
    yield from (run.film for run in runs if run.filmed)

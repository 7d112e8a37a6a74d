"""The ``ablate`` command: train variants of one configuration with the same seeds, and tabulate what each is worth.

A study is a YAML file::

    base: [../fast_rcnn_se.yaml]     # configurations, relative to the study; later ones win
    split: val                       # val, or test: the best epoch by val is then evaluated on test
    seeds: [0, 1, 2]
    variants:                        # name -> what changes; the first is what the others are compared with
      none: {model: {backbone: {init_args: {attention: null}}}}
      se: {model: {backbone: {init_args: {attention: se}}}}

Every run is a process of its own with its own log. A study that is started again goes on with the runs that are not finished.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from tqdm import tqdm

from detpipe.commands.parser import Parser, check_least, output_folder
from detpipe.commands.training import add_arguments
from detpipe.datasets.workers import usable_cores
from detpipe.pictures.figures import COLORS, new_figure, plain_axes, save_figure
from detpipe.support.errors import TrainingError, UsageError
from detpipe.support.files import write_text
from detpipe.support.strict_json import shorten
from detpipe.support.strict_yaml import load_yaml
from detpipe.support.suggest import did_you_mean
from detpipe.support.terminal import say
from detpipe.training import allowed
from detpipe.training.configuration import CLI, quiet
from detpipe.training.models import load_detector
from detpipe.types import Target

KEYS = ("base", "split", "seeds", "variants")
SPLITS = ("val", "test")


@dataclass(frozen=True)
class Study:
    """What is compared: configurations in order, name -> what changes of them (the first is what the others are compared with)."""

    base: tuple[Path, ...]
    variants: dict[str, dict[str, Any]]
    seeds: tuple[int, ...]
    split: str


@dataclass(frozen=True)
class Run:
    """One training: the variant, the seed, its folder, and what stands for it on the command line."""

    variant: str
    seed: int
    folder: Path
    arguments: tuple[str, ...]

    @property
    def asked(self) -> str:
        """What was asked for, to be compared with what a finished run was asked for."""
        parts = [load_yaml(Path(part), UsageError) if part.endswith(".yaml") else part for part in self.arguments]
        return json.dumps(parts)

    @property
    def marker(self) -> Path:
        """Holds what was asked for, from before the training starts."""
        return self.folder.with_name(f"{self.folder.name}.asked.json")

    @property
    def done(self) -> bool:
        """Whether a result is there."""
        return (self.folder / "result.json").is_file()

    def result(self) -> Result:
        """The result that is there."""
        return Result(seed=self.seed, **json.loads((self.folder / "result.json").read_text(encoding="utf-8")))


def run_ablate(arguments: Sequence[str]) -> int:
    """Train what is not trained yet, then write table, numbers and picture; other options go to every training."""
    options, rest = _parse(arguments)
    study = read_study(Path(options.study))
    seeds = study.seeds if options.seeds is None else tuple(options.seeds)
    if min(seeds) < 0 or len(set(seeds)) < len(seeds):
        raise UsageError(f"seeds: expected whole numbers from 0 on, each once, got {', '.join(map(str, seeds))}")
    folder = output_folder(options.output)
    folder.mkdir(parents=True, exist_ok=True)
    runs = [run for seed in seeds for run in _runs(study, seed, folder, rest)]
    _check_folders(runs)
    waiting = [run for run in runs if not run.done]
    say(f"{len(runs)} runs, {len(runs) - len(waiting)} of them done; logs in {folder}/VARIANT_SEED.log", flush=True)
    _train(waiting, study.split, options.workers)
    results = {name: [run.result() for run in runs if run.variant == name] for name in study.variants}
    first = {name: folder / f"{name}_{seeds[0]}" for name in study.variants}
    table = results_table(results, seeds, study.split, milliseconds_an_image(first))
    write_text(folder / "table.md", table + "\n")
    content = {name: [vars(result) for result in found] for name, found in results.items()}
    numbers = {"split": study.split, "seeds": seeds, "results": content}
    write_text(folder / "results.json", json.dumps(numbers, indent=2) + "\n")
    plot_results(results, study.split, folder / "results.png")
    say(f"{table}\n\ntable {folder / 'table.md'}\npicture {folder / 'results.png'}")
    return 0


def read_study(path: Path) -> Study:
    """Read a study, whose configurations exist; a UsageError names the key that is missing or wrong."""
    try:
        content = load_yaml(path, UsageError)
    except FileNotFoundError as error:
        raise UsageError(
            f"study {path} does not exist; give a YAML file such as configs/ablation/attention_demo.yaml"
        ) from error
    if not isinstance(content, dict):
        raise UsageError(f"{path}: expected the keys {', '.join(KEYS)}, got {shorten(content)}")
    for key in content:
        if key not in KEYS:
            raise UsageError(f"{path}: unknown key {key!r}, expected {', '.join(KEYS)}{did_you_mean(str(key), KEYS)}")
    given: dict[str, Any] = {**dict.fromkeys(("base", "variants", "seeds")), "split": "val", **content}
    base, variants, seeds, split = given["base"], given["variants"], given["seeds"], given["split"]
    files = "a list of configurations, relative to this file"
    for key, value, sound, expected in (
        ("base", base, _is_list(base, lambda name: isinstance(name, str)), files),
        ("variants", variants, _are_variants(variants), "name: {what changes}, names of letters, digits, _ and -"),
        ("seeds", seeds, _is_list(seeds, lambda seed: type(seed) is int and seed >= 0), "a list of whole numbers"),
        ("split", split, split in SPLITS, f"one of {', '.join(SPLITS)}"),
    ):
        if not sound:
            raise UsageError(f"{path}: {key}: expected {expected}, got {shorten(value)}")
    configs = tuple((path.parent / name).resolve() for name in base)
    for file in configs:
        if not file.is_file():
            raise UsageError(f"{path}: base: {file} does not exist")
    return Study(configs, {name: change or {} for name, change in variants.items()}, tuple(seeds), split)


def _is_list(value: Any, fits: Callable[[Any], bool]) -> bool:
    return isinstance(value, list) and bool(value) and all(map(fits, value))


def _are_variants(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and bool(value)
        and all(
            isinstance(name, str) and re.fullmatch(r"[\w-]+", name) and (change is None or isinstance(change, dict))
            for name, change in value.items()
        )
    )


def _runs(study: Study, seed: int, folder: Path, rest: Sequence[str]) -> list[Run]:
    runs = []
    for name, change in study.variants.items():
        overlay = folder / f"{name}.yaml"
        text = yaml.safe_dump(change)
        if not overlay.is_file() or overlay.read_text("utf-8") != text:
            write_text(overlay, text)
        arguments = (*map(str, study.base), str(overlay), "--seed_everything", str(seed), *rest)
        runs.append(Run(name, seed, folder / f"{name}_{seed}", arguments))
    return runs


def _check_folders(runs: Sequence[Run]) -> None:
    """Refuse folders whose content would be lost: finished runs of other settings, and what no study has made."""
    for run in runs:
        if not run.folder.exists():
            continue
        if not run.marker.is_file():
            raise UsageError(f"{run.folder} was not made by this study; give another folder with -o")
        if run.done and run.marker.read_text("utf-8") != run.asked:
            raise UsageError(
                f"{run.folder} holds a finished run of other settings; give another folder with -o, or remove it"
            )


def _train(runs: Sequence[Run], split: str, workers: int) -> None:
    threads = max(1, usable_cores() // workers)
    pool = ThreadPoolExecutor(workers)
    try:
        futures = [pool.submit(_train_one, run, split, threads) for run in runs]
        for future in tqdm(as_completed(futures), total=len(futures), unit="run", disable=not sys.stderr.isatty()):
            future.result()
    finally:
        pool.shutdown(cancel_futures=True)


def _train_one(run: Run, split: str, threads: int) -> None:
    if run.folder.exists():
        shutil.rmtree(run.folder)  # what an interrupted start has left
    write_text(run.marker, run.asked)
    log = run.folder.with_name(f"{run.folder.name}.log")
    with log.open("w", encoding="utf-8") as output:
        _call(["train", *run.arguments, "--output", str(run.folder)], threads, output, log)
        numbers = run.folder / "summary.json"
        if split == "test":
            checkpoint = str(run.folder / "best.ckpt")
            numbers = run.folder / "test.json"
            config = str(run.folder / "config.yaml")  # without what only trainings take, such as --init_from
            _call(["evaluate", config, "--ckpt_path", checkpoint, "--json", str(numbers)], threads, output, log)
    found = json.loads(numbers.read_text(encoding="utf-8"))
    if "AP" not in found:
        raise TrainingError(f"{run.folder} was not validated, so there is nothing to compare: let epochs be validated")
    parameters = _parameters(run.folder / "best.ckpt")
    result = {key: found[key] for key in ("AP", "AP50")} | {"parameters": parameters}
    summary = json.loads((run.folder / "summary.json").read_text("utf-8"))
    result["peak_memory_mib"] = summary.get("peak_gpu_memory_mib", summary.get("peak_memory_mib"))
    write_text(run.folder / "result.json", json.dumps(result) + "\n")


def _call(arguments: Sequence[str], threads: int, output: Any, log: Path) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    trust = [f"--trust={module}" for module in allowed.GIVEN]
    # as a module, which Lightning can start once more for each further device
    command = [sys.executable, "-m", "detpipe", *arguments, *trust]
    if subprocess.run(command, stdout=output, stderr=subprocess.STDOUT, env=environment, check=False).returncode:
        last = [line for line in log.read_text("utf-8", errors="replace").splitlines() if line.strip()][-1:]
        raise TrainingError(f"a run failed: {' '.join(last)[-500:]}; its log is {log}")


def _parameters(checkpoint: Path) -> int:
    detector, _ = load_detector(checkpoint)
    return sum(parameter.numel() for parameter in detector.parameters())


def _parse(arguments: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    parser = Parser(
        "detpipe ablate",
        description="Train variants of one configuration with the same seeds, and tabulate what each is worth.",
        epilog="Other options (--trainer.max_epochs 3) go to every training.",
        allow_abbrev=False,
    )
    parser.add_argument("study", help="YAML file with base, variants, seeds and split; see configs/ablation")
    parser.add_argument("-o", "--output", required=True, help="folder of the runs, the table and the picture")
    parser.add_argument(
        "--workers", type=int, default=1, help="runs at a time; the processor's cores are shared among them"
    )
    parser.add_argument("--seeds", type=int, nargs="+", help="instead of those of the study")
    options, rest = parser.parse_known_args(list(arguments))
    check_least(options, 1, "workers")
    if any(argument.partition("=")[0] == "--seed_everything" for argument in rest):
        raise UsageError("--seed_everything: each run has its own seed; give them by --seeds")
    return options, rest


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
        cells += [f"{aps.mean():.3f}", _range(aps), f"{ap50s.mean():.3f}", _range(ap50s), verdict]
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


def _range(values: np.ndarray) -> str:
    return f"{values.min():.3f} to {values.max():.3f}"


TURNS, IMAGES = 5, 4


def milliseconds_an_image(folders: Mapping[str, Path]) -> dict[str, float]:
    """Measure detection, from pixels to boxes, of the checkpoint in a run folder of each variant.

    The median over turns; images are the first of the validation split, one at a time, on a GPU if there is one.
    """
    quiet()
    data = CLI([str(next(iter(folders.values())) / "config.yaml")], add_arguments).datamodule
    pairs = [
        ([image], [target])
        for images, targets in islice(data.val_dataloader(), IMAGES)
        for image, target in zip(images, targets, strict=True)
    ][:IMAGES]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    wait = torch.cuda.synchronize if device.type == "cuda" else (lambda: None)
    pairs = [([image.to(device) for image in images], targets) for images, targets in pairs]
    detectors = {name: load_detector(folder / "best.ckpt")[0].eval().to(device) for name, folder in folders.items()}
    seconds: dict[str, list[float]] = {name: [] for name in detectors}
    with torch.inference_mode():
        for turn in range(TURNS + 1):
            for name, detector in detectors.items():
                start = time.perf_counter()
                for images, targets in pairs:
                    detector(
                        images,
                        [
                            Target(proposals=one["proposals"].to(device)) if "proposals" in one else Target()
                            for one in targets
                        ],
                    )
                wait()
                if turn:  # the first one warms up
                    seconds[name].append((time.perf_counter() - start) / len(pairs))
    return {name: 1000 * statistics.median(values) for name, values in seconds.items()}

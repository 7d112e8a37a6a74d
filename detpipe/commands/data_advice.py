"""What to type next: the commands that train a detector on a data set and report on it, with the data set's own values."""

from __future__ import annotations

import argparse
import json
import math
import shlex
from collections.abc import Sequence
from pathlib import Path

from detpipe.commands.data_source import find_data
from detpipe.datasets.formats.folders import ALL
from detpipe.datasets.resize import Resize
from detpipe.datasets.statistics import SuggestedAnchors

_MODEL = "configs/recommended.yaml"
_LEVELS = 2  # of its pyramid, to which the sizes of anchors are dealt in equal parts
_WIDTH = 128


def training_split(names: Sequence[str]) -> str:
    """The split to train on: ``train``, else the first that begins so, else the first; empty if there is none."""
    return _first(names, "train") or next(iter(names), "")


def validation_split(names: Sequence[str], train: str) -> str:
    """The split to validate on: ``val``, else ``dev``, ``eval`` or ``test``, of the same year where VOC has several; or empty."""
    year, _, own = train.rpartition(":")
    others = [name for name in names if name != train]
    if own.lower().endswith("trainval"):  # which holds the images of val
        others = [name for name in others if name != (f"{year}:val" if year else "val")]
    same = [name for name in others if name.rpartition(":")[0] == year]
    words = ("val", "dev", "eval", "test")
    return next(filter(None, (_first(pool, word) for pool in (same, others) for word in words)), "")


def _first(names: Sequence[str], word: str) -> str:
    begins = [name for name in names if name.rpartition(":")[2].lower().startswith(word)]
    return next((name for name in begins if name.rpartition(":")[2].lower() == word), next(iter(begins), ""))


def anchor_options(anchors: SuggestedAnchors, resize: Resize) -> list[str]:
    """Options that set anchors, and the size of images that they are for."""
    sizes = list(anchors.sizes)
    while len(sizes) % _LEVELS:
        sizes.append(round(sizes[-1] * math.sqrt(2)))
    return [
        *("--model.min_size", str(resize.min_size), "--model.max_size", str(resize.max_size)),
        *("--model.proposals.anchors.sizes", str(sizes)),
        *("--model.proposals.anchors.ratios", str(list(anchors.ratios))),
    ]


def next_commands(options: argparse.Namespace, names: Sequence[str], model: Sequence[str]) -> str:
    """Say in lines that may be pasted how to train on the splits of a data set, or what it lacks for that."""
    train = training_split(names)
    val = validation_split(names, train)
    layout = find_data(options).layout
    divide = f"  detpipe data split {shlex.join(_again(options))} -o FOLDER"
    if layout == "coco file":
        val = ""
    if not val and layout == "shards":
        return f"there is no split to validate on; to divide the images into parts for training, validation and test:\n{divide}"
    command = ["detpipe", "train", _MODEL, *_data_options(options, train, val), *model, "--output", "RUN"]
    report = ["detpipe", "evaluate", "RUN/config.yaml", "--ckpt_path", "RUN/best.ckpt", "--report", "report"]
    on = (
        [f"to train on {train}, validate on {val}, and write a report (report/report.html):"]
        if val
        else [
            "there is no split to validate on; to divide the images into parts for training, validation and test:",
            divide,
            f"or to train on {train} but for a fifth of its images, validate on that, and write a report (report/report.html):",
        ]
    )
    return "\n".join(
        [
            *on,
            _folded(command),
            _folded(report),
            "with --model.backbone.backbone.weights DEFAULT training begins with weights of ImageNet, which are downloaded once",
        ]
    )


def _data_options(options: argparse.Namespace, train: str, val: str) -> list[str]:
    layout, path = find_data(options).layout, Path(options.data)
    overlay = {"shards": "shards", "coco file": "coco_custom"}.get(layout, f"{layout}_custom")
    root, more = options.data, []
    if layout == "csv" and path.is_file():
        root, more = str(path.parent), ["--data.format.file", path.name]
    if layout == "csv" and not find_data(options).splits:
        train = ALL
    if layout == "csv" and options.images is not None:
        more += ["--data.format.images", str(Path(options.images).resolve())]
    if layout == "coco file" and options.images is not None:
        root = str(path.parent)
        train = json.dumps({"annotations": path.name, "images": str(Path(options.images).resolve())})
    if options.zero_based and layout == "voc":
        more += ["--data.format.one_based", "false"]
    if options.skip_bad and layout != "shards":  # their bad images were left out when they were written
        more += ["--data.on_bad", "skip"]
    if options.allow_links:
        more += ["--data.allow_links", "true"]
    if not val:
        more += ["--data.split", "{val: 0.2}"]
    given = [
        part
        for key, name in (("train", train), ("val", val))
        if name and name != key
        for part in (f"--data.{key}", name)
    ]
    return [f"configs/data/{overlay}.yaml", "--data.root", root, *given, *more]


def _again(options: argparse.Namespace) -> list[str]:
    """The data set as it was named."""
    words = [options.data, *(part for name in options.split or () for part in ("--split", name))]
    words += ["--images", options.images] if options.images else []
    words += ["--layout", options.layout] if getattr(options, "layout", None) else []
    flags = ("zero_based", "skip_bad", "allow_links")
    return [*words, *(f"--{flag.replace('_', '-')}" for flag in flags if getattr(options, flag))]


def _folded(words: Sequence[str]) -> str:
    """A command, on several lines where it is long; an option stays beside its value."""
    pieces: list[str] = []
    for word in map(shlex.quote, words):
        if pieces and pieces[-1].startswith("--") and " " not in pieces[-1]:
            pieces[-1] += f" {word}"
        else:
            pieces.append(word)
    lines = [" "]
    for piece in pieces:
        if len(lines[-1]) + len(piece) + 3 > _WIDTH:
            lines.append("     ")
        lines[-1] += f" {piece}"
    return " \\\n".join(lines)

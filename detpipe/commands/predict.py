"""The ``predict`` command: detect objects in images of the user's own, draw them, and write them as one JSON file.

The JSON holds ``checkpoint``, ``class_names``, ``images`` (``file``, ``drawing``, ``width``, ``height``, ``detections``
with ``label``, ``score`` and ``box`` in pixels of the image) and ``failed`` (``file``, ``reason``). With ``--show-glimpses``
detections also have ``proposal`` and ``glimpses`` (outlines in order), and there is a page of pictures.

Boxes for a detector that needs some: see :mod:`detpipe.commands.given_proposals`.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from tqdm import tqdm

from detpipe.commands.given_proposals import Boxes, advice, open_boxes
from detpipe.commands.parser import Parser
from detpipe.datasets import read_image
from detpipe.datasets.decode import IMAGE_SUFFIXES, image_names
from detpipe.detector import TwoStageDetector
from detpipe.heads import ProposalHead
from detpipe.images import to_picture
from detpipe.pictures import glimpse_pictures, visualize
from detpipe.proposals import PrecomputedProposals
from detpipe.support.errors import DataError, UsageError
from detpipe.support.files import atomic_write, refuse_special
from detpipe.support.terminal import printable, say
from detpipe.training.checkpoint import Description
from detpipe.training.models import load_detector
from detpipe.types import Detection, GlimpsedDetection, Target


@dataclass
class Report:
    """What became of the images."""

    checkpoint: str
    class_names: list[str]
    images: list[dict[str, Any]] = field(default_factory=list)
    failed: list[dict[str, str]] = field(default_factory=list)


def predict(arguments: Sequence[str]) -> int:
    """Detect, draw, and write.

    Args:
        arguments: ``CHECKPOINT IMAGE_OR_FOLDER ... -o FOLDER`` and options.

    Returns:
        0, or 1 when no image at all could be read.

    Raises:
        DetpipeError: what users can mend.
    """
    options = _parse(arguments)
    images = find_images(options.images)
    detector, description = load_detector(options.checkpoint)
    boxes = choose_proposals(detector, options, images, description)
    if options.show_glimpses:
        _ask_for_glimpses(detector, options.checkpoint)
    detector.to(choose_device(options.device))
    out = Path(options.output)
    names = drawing_names(images, out)
    report = Report(str(options.checkpoint), list(description.class_names))
    rows = list(zip(images, names, strict=True))
    for path, name in tqdm(rows, unit="image", disable=not sys.stderr.isatty()):
        try:
            image = read_image(path, pixels=description.pixels)
            proposals = None if boxes is None else boxes(path, image)
        except (DataError, OSError) as error:
            tqdm.write(printable(f"skipped: {error}"), file=sys.stderr)
            report.failed.append({"file": str(path), "reason": str(error)})
            continue
        found = detect(detector, image, proposals, options.score_threshold)
        visualize.save_png(out / name, _draw(image, found, description.class_names))
        report.images.append(_record(path, name, image, found, description.class_names))
    with atomic_write(out / "detections.json") as temporary:
        temporary.write_text(json.dumps(vars(report), indent=1) + "\n", encoding="utf-8")
    if options.show_glimpses:
        say(f"glimpses: {glimpse_pictures.write_page(out, report.images)}")
    count = sum(len(record["detections"]) for record in report.images)
    say(
        f"{len(report.images)} images, {count} detections, {len(report.failed)} unreadable; see {out / 'detections.json'}"
    )
    return 0 if report.images else 1


@torch.inference_mode()
def detect(detector: TwoStageDetector, image: Tensor, proposals: Tensor | None, score_threshold: float) -> Detection:
    """Detect objects in one image.

    Args:
        detector: in evaluation mode.
        image: ``[C, H, W]`` as :func:`detpipe.datasets.read_image` reads it.
        proposals: ``[P, 4]`` xyxy in pixels of the image, for a detector that takes precomputed ones; else None.
        score_threshold: detections below it are left out.

    Returns:
        The detections, on the CPU; with proposals and glimpses where the head returns them.
    """
    targets: list[Target] | None = None if proposals is None else [{"proposals": proposals.to(detector.device)}]
    [found] = detector([image.to(detector.device)], targets)
    keep = found["scores"] >= score_threshold
    return cast(Detection, {name: values[keep].cpu() for name, values in cast(dict[str, Tensor], found).items()})


def find_images(names: Sequence[str]) -> list[Path]:
    """List the images that are named, or lie in folders that are.

    Args:
        names: files, and folders that are searched to any depth.

    Returns:
        Paths, those of a folder sorted, each once.

    Raises:
        UsageError: a name does not exist, or a folder holds no image.
    """
    paths: dict[Path, None] = {}
    for name in map(Path, names):
        refuse_special(name, UsageError)
        if name.is_dir():
            by_folder: dict[Path, list[str]] = {}
            for path in name.rglob("*"):
                if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file():
                    by_folder.setdefault(path.parent, []).append(path.name)
            inside = sorted(folder / file for folder, files in by_folder.items() for file in image_names(files))
            if not inside:
                raise UsageError(f"folder {name} holds no image ({', '.join(IMAGE_SUFFIXES)})")
            paths.update(dict.fromkeys(inside))
        elif name.is_file():
            paths[name] = None
        else:
            raise UsageError(f"{name} does not exist; expected an image or a folder of images")
    return list(paths)


def choose_proposals(
    detector: TwoStageDetector, options: argparse.Namespace, images: Sequence[Path], description: Description
) -> Boxes | None:
    """Open the boxes that take the place of the detector's own source, if it needs some or some are given.

    Args:
        detector: its source is replaced where boxes are given.
        options: with ``checkpoint`` and ``proposals``.
        images: what boxes are needed for.
        description: of the checkpoint.

    Returns:
        What gives the boxes of an image; None for a detector that finds them itself.

    Raises:
        DetpipeError: boxes are needed and not given, or cannot be opened.
    """
    precomputed = isinstance(detector.proposals, PrecomputedProposals)
    if options.proposals is None:
        if precomputed:
            raise UsageError(advice(options.checkpoint, description.proposals))
        return None
    boxes = open_boxes(options.proposals, images, description.proposals)
    if not precomputed:
        detector.proposals = PrecomputedProposals(max_boxes=None)
    return boxes


def _ask_for_glimpses(detector: TwoStageDetector, checkpoint: str) -> None:
    head = detector.head
    if not isinstance(head, ProposalHead):
        raise UsageError(
            f"--show-glimpses: the head {type(head).__name__} of {checkpoint} does not tell where it looks"
        )
    head.return_glimpses = True


def _draw(image: Tensor, found: Detection, class_names: Sequence[str]) -> Tensor:
    image = to_picture(image)
    if "glimpses" in found:
        return glimpse_pictures.draw_glimpses(image, cast(GlimpsedDetection, found), class_names)
    return visualize.draw(image, found["boxes"], found["labels"], class_names, found["scores"])


def drawing_names(images: Sequence[Path], out: Path) -> list[str]:
    """Name the drawings after the images, with a number where two would be the same or an image would be lost.

    Args:
        images: what is drawn on.
        out: the folder of the drawings.

    Returns:
        One file name an image.
    """
    names, used = [], {path.name for path in images if path.parent.resolve() == out.resolve()}
    for path in images:
        name, number = f"{path.stem}.png", 2
        while name in used:
            name, number = f"{path.stem}-{number}.png", number + 1
        used.add(name)
        names.append(name)
    return names


def _record(path: Path, drawing: str, image: Tensor, found: Detection, class_names: Sequence[str]) -> dict[str, Any]:
    columns = zip(found["labels"].tolist(), found["scores"].tolist(), found["boxes"].tolist(), strict=True)
    rows: list[dict[str, Any]] = [
        {"label": class_names[label - 1], "score": score, "box": box} for label, score, box in columns
    ]
    if "glimpses" in found:
        rows = [row | glimpse_pictures.describe(cast(GlimpsedDetection, found), k) for k, row in enumerate(rows)]
    return {
        "file": str(path),
        "drawing": drawing,
        "width": image.shape[2],
        "height": image.shape[1],
        "detections": rows,
    }


def choose_device(name: str) -> torch.device:
    """Find a device: CUDA if there is one for ``auto``, else by its name.

    Raises:
        UsageError: it cannot be used.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"device {name!r} cannot be used: {str(error).splitlines()[0]}") from error


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = Parser(prog="detpipe predict", description="Detect objects in images, draw them, and write them as JSON.")
    parser.add_argument("checkpoint", help="such as RUN/best.ckpt; its model and class names are used")
    parser.add_argument("images", nargs="+", help="images, or folders of images")
    parser.add_argument("-o", "--output", required=True, help="folder for the drawings and detections.json")
    parser.add_argument("--score_threshold", type=float, default=0.5, help="leave out detections below it (default .5)")
    parser.add_argument(
        "--proposals",
        help="boxes to look at: a source (selective_search), a store, or JSON: image name -> [[x1, y1, x2, y2], ...]",
    )
    parser.add_argument(
        "--show-glimpses",
        action="store_true",
        help="draw the proposal of each detection and where the head looked beside it; glimpses.html shows all images",
    )
    parser.add_argument("--device", default="auto", help="auto (default), cpu, cuda, cuda:1, mps")
    options = parser.parse_args(list(arguments))
    if not 0 <= options.score_threshold <= 1:
        raise UsageError(f"--score_threshold must be in 0..1, got {options.score_threshold}")
    return options

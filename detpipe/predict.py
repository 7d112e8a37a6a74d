"""The ``predict`` command: detect objects in images of the user's own, draw them, and write them as one JSON file.

The JSON holds ``checkpoint``, ``class_names``, ``images`` (``file``, ``drawing``, ``width``, ``height``, ``detections``
with ``label``, ``score`` and ``box`` in pixels of the image) and ``failed`` (``file``, ``reason``).

A proposals file is JSON too: image name or path -> list of ``[x1, y1, x2, y2]`` in pixels of the image, best first.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor
from tqdm import tqdm

from detpipe import visualize
from detpipe.checkpoint import load_detector
from detpipe.datasets import read_image
from detpipe.detector import TwoStageDetector
from detpipe.errors import DataError, UsageError
from detpipe.files import atomic_write
from detpipe.proposals import PrecomputedProposals
from detpipe.strict_json import load_json
from detpipe.types import Detection, Target

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".gif", ".ppm")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}; see 'detpipe predict --help'")


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
    boxes = _choose_proposals(detector, options)
    detector.to(_device(options.device))
    out = Path(options.output)
    names = _drawing_names(images, out)
    given = [_proposals_of(path, boxes) for path in images]
    report = Report(str(options.checkpoint), list(description.class_names))
    rows = list(zip(images, names, given, strict=True))
    for path, name, proposals in tqdm(rows, unit="image", disable=not sys.stderr.isatty()):
        try:
            image = read_image(path)
        except (DataError, OSError) as error:
            tqdm.write(f"skipped: {error}", file=sys.stderr)
            report.failed.append({"file": str(path), "reason": str(error)})
            continue
        found = detect(detector, image, proposals, options.score_threshold)
        drawing = visualize.draw(image, found["boxes"], found["labels"], description.class_names, found["scores"])
        visualize.save_png(out / name, drawing)
        report.images.append(_record(path, name, image, found, description.class_names))
    with atomic_write(out / "detections.json") as temporary:
        temporary.write_text(json.dumps(vars(report), indent=1) + "\n", encoding="utf-8")
    count = sum(len(record["detections"]) for record in report.images)
    print(
        f"{len(report.images)} images, {count} detections, {len(report.failed)} unreadable; see {out / 'detections.json'}"
    )
    return 0 if report.images else 1


@torch.inference_mode()
def detect(detector: TwoStageDetector, image: Tensor, proposals: Tensor | None, score_threshold: float) -> Detection:
    """Detect objects in one image.

    Args:
        detector: in evaluation mode.
        image: ``[3, H, W]`` uint8 RGB.
        proposals: ``[P, 4]`` xyxy in pixels of the image, for a detector that takes precomputed ones; else None.
        score_threshold: detections below it are left out.

    Returns:
        The detections, on the CPU.
    """
    targets: list[Target] | None = None if proposals is None else [{"proposals": proposals.to(detector.device)}]
    [found] = detector([image.to(detector.device)], targets)
    keep = found["scores"] >= score_threshold
    return Detection(
        boxes=found["boxes"][keep].cpu(), scores=found["scores"][keep].cpu(), labels=found["labels"][keep].cpu()
    )


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
        if name.is_dir():
            inside = sorted(p for p in name.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())
            if not inside:
                raise UsageError(f"folder {name} holds no image ({', '.join(SUFFIXES)})")
            paths.update(dict.fromkeys(inside))
        elif name.is_file():
            paths[name] = None
        else:
            raise UsageError(f"{name} does not exist; expected an image or a folder of images")
    return list(paths)


def read_proposals(path: Path) -> dict[str, Tensor]:
    """Read a file of proposals.

    Args:
        path: JSON, image name or path -> list of ``[x1, y1, x2, y2]``.

    Returns:
        image name or path -> ``[P, 4]`` float32.

    Raises:
        DataError: the file is missing or holds something else; the image and the box are named.
    """
    content = load_json(path)
    if not isinstance(content, dict):
        raise DataError(f"{path} must map image names to lists of [x1, y1, x2, y2], got {type(content).__name__}")
    proposals = {}
    for name, boxes in content.items():
        if not isinstance(boxes, list):
            raise DataError(f"{path}, image {name!r}: expected a list of [x1, y1, x2, y2], got {type(boxes).__name__}")
        for index, box in enumerate(boxes):
            numbers = isinstance(box, list) and len(box) == 4 and all(_is_number(value) for value in box)
            if not numbers or box[2] <= box[0] or box[3] <= box[1]:
                raise DataError(
                    f"{path}, image {name!r}, box {index}: expected [x1, y1, x2, y2] with x2 > x1, y2 > y1, got {box}"
                )
        proposals[name] = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
    return proposals


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _choose_proposals(detector: TwoStageDetector, options: argparse.Namespace) -> dict[str, Tensor] | None:
    """Read the proposals file, which takes the place of the detector's own source."""
    if options.proposals is not None:
        detector.proposals = PrecomputedProposals(max_boxes=None)
        return read_proposals(Path(options.proposals))
    if isinstance(detector.proposals, PrecomputedProposals):
        raise UsageError(
            f"{options.checkpoint} was trained on precomputed proposals: give boxes for the images with --proposals FILE.json"
        )
    return None


def _proposals_of(path: Path, proposals: dict[str, Tensor] | None) -> Tensor | None:
    if proposals is None:
        return None
    for key in (str(path), path.as_posix(), path.name, path.stem):
        if key in proposals:
            return proposals[key]
    raise DataError(f"the proposals file has no boxes for {path}: add the key {path.name!r}")


def _drawing_names(images: Sequence[Path], out: Path) -> list[str]:
    """Name the drawings after the images, with a number where two would be the same or an image would be lost."""
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
    return {
        "file": str(path),
        "drawing": drawing,
        "width": image.shape[2],
        "height": image.shape[1],
        "detections": [{"label": class_names[label - 1], "score": score, "box": box} for label, score, box in columns],
    }


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"device {name!r} cannot be used: {str(error).splitlines()[0]}") from error


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = _Parser(prog="detpipe predict", description="Detect objects in images, draw them, and write them as JSON.")
    parser.add_argument("checkpoint", help="such as RUN/best.ckpt; its model and class names are used")
    parser.add_argument("images", nargs="+", help="images, or folders of images")
    parser.add_argument("-o", "--output", required=True, help="folder for the drawings and detections.json")
    parser.add_argument("--score_threshold", type=float, default=0.5, help="leave out detections below it (default .5)")
    parser.add_argument("--proposals", help="JSON file: image name -> list of [x1, y1, x2, y2] in pixels, best first")
    parser.add_argument("--device", default="auto", help="auto (default), cpu, cuda, cuda:1, mps")
    options = parser.parse_args(list(arguments))
    if not 0 <= options.score_threshold <= 1:
        raise UsageError(f"--score_threshold must be in 0..1, got {options.score_threshold}")
    return options

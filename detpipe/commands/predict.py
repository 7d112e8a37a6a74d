"""The ``predict`` and ``classify`` commands: find objects in images of the user's own, or name what is in given boxes.

Both draw, and write one JSON file. It holds ``checkpoint``, ``class_names``, ``images`` (``file``, ``drawing``, ``width``,
``height``, ``detections`` or ``regions`` with ``label``, ``score`` and ``box`` in pixels of the image, regions in the order of the
boxes) and ``failed`` (``file``, ``reason``). With ``--show-glimpses`` detections also have ``proposal`` and ``glimpses`` (outlines
in order), and there is a page of pictures.

Boxes for a detector that needs some, and for a classifier: see :mod:`detpipe.commands.given_proposals`.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from tqdm import tqdm

from detpipe import zoo
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
from detpipe.support.files import refuse_special, write_text
from detpipe.support.terminal import printable, say
from detpipe.training.checkpoint import Description
from detpipe.training.models import load_region_classifier
from detpipe.types import Detection, GlimpsedDetection, Target

Look = Callable[[Path, Tensor], Detection]  # path and image as `read_image` gives it -> what is found there, on the CPU


def predict(arguments: Sequence[str]) -> int:
    """Detect, draw, and write; status 1 when no image at all could be read."""
    options = _parse_predict(arguments)
    images = find_images(options.images)
    detector, description = zoo.load(options.checkpoint, options.weights)
    boxes = choose_proposals(detector, options, images, description)
    if options.show_glimpses:
        _ask_for_glimpses(detector, options.checkpoint)
    detector.to(choose_device(options.device))

    def look(path: Path, image: Tensor) -> Detection:
        proposals = None if boxes is None else boxes(path, image)
        return detect(detector, image, proposals, options.score_threshold)

    out = Path(options.output)
    report = _look_at(images, look, description, out, "detections", options.checkpoint)
    if options.show_glimpses:
        say(f"glimpses: {glimpse_pictures.write_page(out, report['images'])}")
    return _ended(report, "detections", "unreadable", out)


def classify(arguments: Sequence[str]) -> int:
    """Classify, draw, and write; status 1 when no image at all could be classified."""
    options = _parse_classify(arguments)
    images = find_images(options.images)
    model, description = load_region_classifier(options.checkpoint)
    boxes_of = open_boxes(options.boxes, images, None)
    model.to(choose_device(options.device))

    def look(path: Path, image: Tensor) -> Detection:
        boxes = boxes_of(path, image)
        try:
            [found] = model.predict([image], [boxes])
        except ValueError as error:  # a box outside of the image, or an image too small for the network
            raise DataError(f"{path}: {error}") from error
        return {"boxes": boxes, "labels": found["labels"].cpu(), "scores": found["scores"].cpu()}

    out = Path(options.output)
    report = _look_at(images, look, description, out, "regions", options.checkpoint)
    return _ended(report, "regions", "failed", out)


def _look_at(
    images: Sequence[Path], look: Look, description: Description, out: Path, kind: str, checkpoint: str
) -> dict[str, Any]:
    """Look at images one by one, draw what is found, and write ``KIND.json``; what cannot be read is named and left out."""
    class_names = list(description.class_names)
    report: dict[str, Any] = {"checkpoint": checkpoint, "class_names": class_names, "images": [], "failed": []}
    rows = list(zip(images, drawing_names(images, out), strict=True))
    for path, name in tqdm(rows, unit="image", disable=not sys.stderr.isatty()):
        try:
            image = read_image(path, pixels=description.pixels)
            found = look(path, image)
        except (DataError, OSError) as error:
            tqdm.write(printable(f"skipped: {error}"), file=sys.stderr)
            report["failed"].append({"file": str(path), "reason": str(error)})
            continue
        visualize.save_png(out / name, _draw(image, found, class_names))
        size = {"width": image.shape[2], "height": image.shape[1]}
        records = _records(found, class_names)
        report["images"].append({"file": str(path), "drawing": name, **size, kind: records})
    write_text(out / f"{kind}.json", json.dumps(report, indent=1) + "\n")
    return report


def _ended(report: dict[str, Any], kind: str, failed: str, out: Path) -> int:
    count = sum(len(image[kind]) for image in report["images"])
    say(f"{len(report['images'])} images, {count} {kind}, {len(report['failed'])} {failed}; see {out / f'{kind}.json'}")
    return 0 if report["images"] else 1


@torch.inference_mode()
def detect(detector: TwoStageDetector, image: Tensor, proposals: Tensor | None, score_threshold: float) -> Detection:
    """Detect objects in one image ``[C, H, W]``, as `read_image` reads it, with proposals ``[P, 4]`` xyxy or none.

    Detections below the threshold are left out; they are on the CPU, with proposals and glimpses where the head returns them.
    """
    targets: list[Target] | None = None if proposals is None else [{"proposals": proposals.to(detector.device)}]
    [found] = detector([image.to(detector.device)], targets)
    keep = found["scores"] >= score_threshold
    return cast(Detection, {name: values[keep].cpu() for name, values in cast(dict[str, Tensor], found).items()})


def find_images(names: Sequence[str]) -> list[Path]:
    """List the images that are named, or lie in folders at any depth, those of a folder sorted, each once; none is a UsageError."""
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
    """Open the boxes that take the place of the detector's own source; None if it finds them itself and none are given."""
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
    """Name the drawings after the images, with a number where two would be the same or an image in that folder would be lost."""
    names, used = [], {path.name for path in images if path.parent.resolve() == out.resolve()}
    for path in images:
        name, number = f"{path.stem}.png", 2
        while name in used:
            name, number = f"{path.stem}-{number}.png", number + 1
        used.add(name)
        names.append(name)
    return names


def _records(found: Detection, class_names: Sequence[str]) -> list[dict[str, Any]]:
    columns = zip(found["labels"].tolist(), found["scores"].tolist(), found["boxes"].tolist(), strict=True)
    rows: list[dict[str, Any]] = [
        {"label": class_names[label - 1], "score": score, "box": box} for label, score, box in columns
    ]
    if "glimpses" in found:
        rows = [row | glimpse_pictures.describe(cast(GlimpsedDetection, found), k) for k, row in enumerate(rows)]
    return rows


def choose_device(name: str) -> torch.device:
    """Find a device: CUDA if there is one for ``auto``, else by its name; a UsageError if it cannot be used."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"device {name!r} cannot be used: {str(error).splitlines()[0]}") from error


def _parser(command: str, description: str, checkpoint: str, kind: str) -> Parser:
    parser = Parser(prog=f"detpipe {command}", description=description)
    parser.add_argument("checkpoint", help=checkpoint)
    parser.add_argument("images", nargs="+", help="images, or folders of images")
    parser.add_argument("-o", "--output", required=True, help=f"folder for the drawings and {kind}.json")
    parser.add_argument("--device", default="auto", help="auto (default), cpu, cuda, cuda:1, mps")
    return parser


def _parse_predict(arguments: Sequence[str]) -> argparse.Namespace:
    text = "Detect objects in images, draw them, and write them as JSON."
    known = "such as RUN/best.ckpt; its model and class names are used; or a name of 'detpipe zoo'"
    parser = _parser("predict", text, known, "detections")
    parser.add_argument(
        "--weights", metavar="FILE", help="the published file of a name, where it lies in no usual place"
    )
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
    options = parser.parse_args(list(arguments))
    if not 0 <= options.score_threshold <= 1:
        raise UsageError(f"--score_threshold must be in 0..1, got {options.score_threshold}")
    return options


def _parse_classify(arguments: Sequence[str]) -> argparse.Namespace:
    text = "Name what is in given boxes, draw it, and write it as JSON."
    parser = _parser("classify", text, "of a RegionClassifier, such as RUN/best.ckpt", "regions")
    parser.add_argument(
        "--boxes",
        required=True,
        help="JSON: image name -> [[x1, y1, x2, y2], ...]; or a store, or a source such as selective_search",
    )
    return parser.parse_args(list(arguments))

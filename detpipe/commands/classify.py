"""The ``classify`` command: name what is in given boxes of images, draw it, and write it as one JSON file.

The JSON holds ``checkpoint``, ``class_names``, ``images`` (``file``, ``drawing``, ``width``, ``height``, ``regions`` with
``label``, ``score`` and ``box`` in pixels of the image, in the order of the boxes) and ``failed`` (``file``, ``reason``).
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor
from tqdm import tqdm

from detpipe.commands.given_proposals import open_boxes
from detpipe.commands.parser import Parser
from detpipe.commands.predict import choose_device, drawing_names, find_images
from detpipe.datasets import read_image
from detpipe.pictures import visualize
from detpipe.regions.region_classifier import RegionClassifier
from detpipe.support.errors import DataError
from detpipe.support.files import atomic_write
from detpipe.support.terminal import printable, say
from detpipe.training.models import load_region_classifier


def classify(arguments: Sequence[str]) -> int:
    """Classify, draw, and write.

    Args:
        arguments: ``CHECKPOINT IMAGE_OR_FOLDER ... --boxes BOXES -o FOLDER`` and options.

    Returns:
        0, or 1 when no image at all could be classified.

    Raises:
        DetpipeError: what users can mend.
    """
    options = _parse(arguments)
    paths = find_images(options.images)
    model, description = load_region_classifier(options.checkpoint)
    boxes_of = open_boxes(options.boxes, paths, None)
    model.to(choose_device(options.device))
    out, names = Path(options.output), description.class_names
    done: list[dict[str, Any]] = []
    failed: list[dict[str, str]] = []
    rows = list(zip(paths, drawing_names(paths, out), strict=True))
    for path, name in tqdm(rows, unit="image", disable=not sys.stderr.isatty()):
        try:
            image = read_image(path)
            boxes = boxes_of(path, image)
            regions = _regions(model, path, image, boxes, names)
        except (DataError, OSError) as error:
            tqdm.write(printable(f"skipped: {error}"), file=sys.stderr)
            failed.append({"file": str(path), "reason": str(error)})
            continue
        _draw(out / name, image, boxes, regions, names)
        size = {"width": image.shape[2], "height": image.shape[1]}
        done.append({"file": str(path), "drawing": name, **size, "regions": regions})
    content = {"checkpoint": str(options.checkpoint), "class_names": list(names), "images": done, "failed": failed}
    with atomic_write(out / "regions.json") as temporary:
        temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    count = sum(len(record["regions"]) for record in done)
    say(f"{len(done)} images, {count} regions, {len(failed)} failed; see {out / 'regions.json'}")
    return 0 if done else 1


def _regions(
    model: RegionClassifier, path: Path, image: Tensor, boxes: Tensor, names: Sequence[str]
) -> list[dict[str, Any]]:
    try:
        [found] = model.predict([image], [boxes])
    except ValueError as error:  # a box outside of the image, or an image too small for the network
        raise DataError(f"{path}: {error}") from error
    columns = zip(found["labels"].tolist(), found["scores"].tolist(), boxes.tolist(), strict=True)
    return [{"label": names[label - 1], "score": score, "box": box} for label, score, box in columns]


def _draw(path: Path, image: Tensor, boxes: Tensor, regions: list[dict[str, Any]], names: Sequence[str]) -> None:
    labels = boxes.new_tensor([names.index(region["label"]) + 1 for region in regions]).long()
    scores = boxes.new_tensor([region["score"] for region in regions])
    visualize.save_png(path, visualize.draw(image, boxes, labels, names, scores))


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = Parser(prog="detpipe classify", description="Name what is in given boxes, draw it, and write it as JSON.")
    parser.add_argument("checkpoint", help="of a RegionClassifier, such as RUN/best.ckpt")
    parser.add_argument("images", nargs="+", help="images, or folders of images")
    parser.add_argument("-o", "--output", required=True, help="folder for the drawings and regions.json")
    parser.add_argument(
        "--boxes",
        required=True,
        help="JSON: image name -> [[x1, y1, x2, y2], ...]; or a store, or a source such as selective_search",
    )
    parser.add_argument("--device", default="auto", help="auto (default), cpu, cuda, cuda:1, mps")
    return parser.parse_args(list(arguments))

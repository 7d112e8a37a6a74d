"""The ``data info`` command: count and measure a data set, draw it, suggest sizes of anchors."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from detpipe.commands.data_advice import anchor_options, next_commands, training_split
from detpipe.commands.data_source import open_splits, read_split, source_parser
from detpipe.commands.parser import check_least, left_out, output_folder
from detpipe.datasets.formats.export import file_name_of
from detpipe.datasets.resize import Resize
from detpipe.datasets.statistics import SuggestedAnchors, box_sizes, fit, statistics, suggest_anchors
from detpipe.support.errors import UsageError
from detpipe.support.files import write_text
from detpipe.support.terminal import say
from detpipe.types import Annotations

_QUANTILES = (
    "boxes per image", "image width", "image height", "box width", "box height", "box height / width",
    "box area / image area",
)  # fmt: skip
_SHOWN_CLASSES = 20


def run_info(arguments: Sequence[str]) -> int:
    """Print what is in a data set, and draw it."""
    parser = source_parser("info", "Count and measure the images and boxes of a data set.")
    parser.add_argument("-o", "--output", metavar="FOLDER", help="write info.json and pictures there")
    parser.add_argument("--min-size", type=int, help="shorter side of the images in the detector (480)")
    parser.add_argument("--max-size", type=int, help="which the longer side never exceeds (800)")
    parser.add_argument("--sizes", type=int, default=4, help="how many sizes of anchors to suggest (4)")
    parser.add_argument("--ratios", type=int, default=3, help="how many ratios of anchors to suggest (3)")
    options = parser.parse_args(list(arguments))
    check_least(options, 1, "min-size", "max-size", "sizes", "ratios")
    resize = _resize(options.min_size, options.max_size)
    folder = output_folder(options.output) if options.output else None
    opened = open_splits(options)
    splits = {name: read_split(name, opened) for name in opened}
    facts = {name: statistics(a) for name, a in splits.items()}
    anchors = {
        name: suggest_anchors(box_sizes(a, resize), options.sizes, options.ratios)
        for name, a in splits.items()
        if len(a.boxes)
    }
    advised = training_split(list(anchors))
    for name, values in facts.items():
        say(describe(name, values))
        if name == advised:
            say(advise(anchors[name], splits[name], resize))
        print()
    if folder:
        write(folder, splits, facts, anchors, resize)
        say(f"wrote info.json and pictures to {options.output}\n")
    if advised:
        say(next_commands(options, list(splits), anchor_options(anchors[advised], resize)))
    return 0


def _resize(min_size: int | None, max_size: int | None) -> Resize:
    """The size of the images in the detector; one that is not given makes room for the other."""
    low, high = min_size or min(480, max_size or 480), max_size or max(800, min_size or 800)
    if low > high:
        raise UsageError(
            f"--min-size {low} is above --max-size {high}: the shorter side is at most as long as the longer"
        )
    return Resize(min_size=low, max_size=high)


def describe(name: str, facts: Mapping[str, Any]) -> str:
    """Put the statistics of a split into lines."""
    small, medium, large = facts["small, medium, large"]
    lines = [
        f"{name}: {facts['images']} images, {facts['boxes']} boxes, {len(facts['classes'])} classes",
        f"  {facts['images without boxes']} images without boxes, {facts['crowd']} crowd regions, "
        f"{facts['difficult']} difficult objects",
        f"  {small} small, {medium} medium, {large} large boxes (areas up to 32 x 32, up to 96 x 96, and above)",
    ]
    lines += [f"  {text}" for text in left_out(facts["counts"])]
    classes = sorted(facts["classes"].items(), key=lambda item: -item[1]["boxes"])
    width = max(len("class"), *(len(word) for word, _ in classes[:_SHOWN_CLASSES]))
    lines += ["", f"  {'class':<{width}}  boxes  images"]
    lines += [f"  {word:<{width}}  {n['boxes']:>5}  {n['images']:>6}" for word, n in classes[:_SHOWN_CLASSES]]
    if len(classes) > _SHOWN_CLASSES:
        rest = sum(n["boxes"] for _, n in classes[_SHOWN_CLASSES:])
        lines.append(f"  {len(classes) - _SHOWN_CLASSES} more classes with {rest} boxes")
    lines += ["", f"  {'':<22}" + "".join(f"{key:>11}" for key in facts["image width"])]
    lines += [
        f"  {key:<22}" + "".join(f"{value:>11.4g}" for value in facts[key].values()) for key in _QUANTILES if facts[key]
    ]
    return "\n".join(lines)


def advise(anchors: SuggestedAnchors, annotations: Annotations, resize: Resize) -> str:
    """Say which anchors fit a split, and how they are set."""
    usual = fit(box_sizes(annotations, resize), (32, 64, 128, 256), (0.5, 1.0, 2.0))
    sizes, ratios = list(anchors.sizes), list(anchors.ratios)
    return "\n".join(
        [
            "",
            f"  anchors for images resized to {resize.min_size} (at most {resize.max_size}): sizes {sizes}, ratios {ratios}",
            f"    best IoU {anchors.iou:.3f} in the mean, at least 0.7 for {anchors.recall:.1%} of the boxes "
            f"(32, 64, 128, 256 with 0.5, 1, 2: {usual.mean():.3f}, {(usual >= 0.7).mean():.1%})",
        ]
    )


def write(
    folder: Path,
    splits: Mapping[str, Annotations],
    facts: Mapping[str, Any],
    anchors: Mapping[str, SuggestedAnchors],
    resize: Resize,
) -> None:
    """Write the statistics of splits as JSON and pictures, with the anchors suggested for images of that size."""
    from detpipe.pictures.data_plots import plot_boxes, plot_classes, plot_images

    folder.mkdir(parents=True, exist_ok=True)
    suggested = {
        name: {"sizes": a.sizes, "ratios": a.ratios, "mean best IoU": a.iou, "part of at least 0.7": a.recall}
        for name, a in anchors.items()
    }
    content = {
        "splits": facts,
        "anchors": {"min_size": resize.min_size, "max_size": resize.max_size, "splits": suggested},
    }
    write_text(folder / "info.json", json.dumps(content, indent=1))
    plot_classes(splits, folder / "classes.png")
    plot_images(splits, folder / "images.png")
    for name, a in splits.items():
        if len(a.boxes):
            plot_boxes(a, name, anchors[name].sizes, resize, folder / f"boxes_{file_name_of(name)}.png")

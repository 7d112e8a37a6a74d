"""The ``data convert`` command: a data set in another layout."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

from detpipe.commands.data_source import new_output, open_splits, read_split, source_parser
from detpipe.commands.parser import Parser, left_out
from detpipe.datasets.datamodule import DetectionData, image_files
from detpipe.datasets.formats.coco import COCO, is_coco, write_coco
from detpipe.datasets.formats.csv import write_csv
from detpipe.datasets.formats.export import Written, file_name_of
from detpipe.datasets.formats.outline_files import read_outlines
from detpipe.datasets.formats.voc import write_voc
from detpipe.datasets.formats.yolo import Flags, write_yolo
from detpipe.datasets.image_files import ImageFiles
from detpipe.datasets.shards.dataset import Shards
from detpipe.support.errors import UsageError
from detpipe.support.strict_json import load_json
from detpipe.support.terminal import say
from detpipe.types import Annotations

LAYOUTS = ("coco", "voc", "yolo", "csv")
_ELSEWHERE = ("keypoints", "caption", "attributes")  # of COCO's annotations: read by nobody


def run_convert(arguments: Sequence[str]) -> int:
    """Write a data set in another layout; after an error nothing is written."""
    parser = source_parser("convert", "Write a data set in another layout.")
    parser.add_argument("--to", required=True, choices=LAYOUTS, help="the layout to write")
    add_writing(parser)
    options = parser.parse_args(list(arguments))
    folder = new_output(options.output)
    opened = open_splits(options)
    splits = {name: read_outlined(name, opened) for name in opened}
    source = image_files(opened.values())
    written = write_layout(options.to, splits, folder, options, source)
    say(describe(written, splits, fields_left_out(opened)))
    return 0


def add_writing(parser: Parser) -> None:
    """Add the options of what is written."""
    parser.add_argument("-o", "--output", required=True, metavar="FOLDER", help="a new folder")
    parser.add_argument(
        "--image-files",
        choices=("copy", "link", "none"),
        default="copy",
        help="copy the images (default), give the same files a second name (link), or write annotations only",
    )
    flags = parser.add_mutually_exclusive_group()
    flags.add_argument(
        "--drop-flags", action="store_true", help="YOLO: crowd regions and difficult objects become ordinary objects"
    )
    flags.add_argument(
        "--drop-flagged", action="store_true", help="YOLO: crowd regions and difficult objects are left out"
    )


def write_layout(
    layout: Literal["coco", "voc", "yolo", "csv"],
    splits: Mapping[str, Annotations],
    folder: Path,
    options: argparse.Namespace,
    source: ImageFiles,
) -> Written:
    """Write splits to a new folder in a layout, with the options of `add_writing` and images from ``source``."""
    if layout != "yolo" and (options.drop_flags or options.drop_flagged):
        option = "--drop-flags" if options.drop_flags else "--drop-flagged"
        raise UsageError(f"{option}: is for YOLO layout, {layout} keeps the flags; leave it out")
    if layout == "yolo":
        flags: Flags = "drop" if options.drop_flags else "leave out" if options.drop_flagged else "refuse"
        return write_yolo(splits, folder, options.image_files, flags, source)
    write = {"coco": write_coco, "voc": write_voc, "csv": write_csv}[layout]
    return write(splits, folder, options.image_files, source)


def read_outlined(name: str, opened: Mapping[str, DetectionData]) -> Annotations:
    """Read a split with the outlines of its objects, wherever its layout has them; a DataError names what does not fit."""
    data = opened[name]
    data.outlines = True
    a = read_split(name, opened)
    if a.segmentations is not None or isinstance(data, COCO | Shards):  # shards keep none
        return a
    root = Path(getattr(data, "root", "."))
    return replace(a, segmentations=read_outlines(root if root.is_dir() else root.parent, file_name_of(name), a))


def fields_left_out(opened: Mapping[str, DetectionData]) -> list[str]:
    """What COCO's annotation files hold beyond boxes, none of which is read."""
    lines = []
    for name, data in opened.items():
        path = data.files("val")[0] if isinstance(data, COCO) else None
        if path is None or not is_coco(path):
            continue
        records = load_json(path)["annotations"]
        found = [(field, sum(bool(record.get(field)) for record in records)) for field in _ELSEWHERE]
        lines += [f"{name}: field {field} of {count} annotations is not kept" for field, count in found if count]
    return lines


def describe(written: Written, splits: Mapping[str, Annotations], more: Sequence[str] = ()) -> str:
    """Say what was written, in a few lines."""
    lines = [
        f"wrote {written.images} images with {written.boxes} boxes to {written.folder} ({', '.join(written.splits)})"
    ]
    lines += [f"  {name}: {text}" for name, a in splits.items() for text in left_out(a.counts)]
    return "\n".join([*lines, *(f"  {remark}" for remark in (*written.remarks, *more))])

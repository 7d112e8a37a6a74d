"""What the ``data`` commands share: how a data set is named on the command line, and how its splits are opened."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from detpipe.commands.parser import Parser
from detpipe.datasets.datamodule import DetectionData
from detpipe.datasets.faults import OnBad
from detpipe.datasets.fetch import is_remote
from detpipe.datasets.formats.folders import find_split
from detpipe.datasets.formats.recognize import EXPECTED, FOLDERS, Found, open_split, recognize
from detpipe.support.errors import DataError, UsageError
from detpipe.support.suggest import did_you_mean
from detpipe.support.terminal import say
from detpipe.types import RGB, Annotations, PixelType


def source_parser(command: str, description: str, skip_bad: bool = True) -> Parser:
    """Make a parser of ``detpipe data COMMAND`` that knows how a data set is named, and whether faulty records may be left out."""
    parser = Parser(prog=f"detpipe data {command}", description=description)
    also = "" if skip_bad else "; or a .zip or .tar, of which is said whether it may be unpacked"
    parser.add_argument("data", metavar="PATH", help=EXPECTED.removeprefix("expected ") + also)
    parser.add_argument(
        "--split",
        action="append",
        metavar="NAME",
        help="such as train, 2007:trainval or val2017; may be repeated; default: all",
    )
    parser.add_argument("--images", metavar="FOLDER", help="where the images of an annotation file or a table are")
    parser.add_argument("--layout", choices=FOLDERS, help="which layout is meant, for a folder that is in several")
    parser.add_argument(
        "--zero-based",
        action="store_true",
        help="VOC layout: boxes are corners counted from 0, not pixels counted from 1",
    )
    parser.add_argument(
        "--allow-links",
        action="store_true",
        help="take images that links, or names in lists, have outside of the folder",
    )
    if skip_bad:
        parser.add_argument(
            "--skip-bad", action="store_true", help="leave out boxes and images with faults and count them"
        )
    return parser


def add_data_options(parser: Any, more: str = "") -> None:
    """Add how a data set is named to a parser of argparse or jsonargparse."""
    parser.add_argument("--data", type=str, required=True, help=f"{EXPECTED.removeprefix('expected ')}{more}")
    parser.add_argument("--split", type=str, default=None, help="of the data set, such as trainval, test or val2017")
    parser.add_argument("--images", type=str, default=None, help="folder of the images, for an annotation file")
    parser.add_argument("--skip_bad", action="store_true", help="leave out faulty records and images, and count them")


def open_splits(options: argparse.Namespace) -> dict[str, DetectionData]:
    """Open the splits that were asked for, all of them if none was named: name -> data, whose validation split it is.

    Raises:
        DetpipeError: there is no such data set or split.
    """
    found = find_data(options)
    known, remote = found.splits, is_remote(options.data)
    names: list[str | None] = []
    for name in options.split or ():
        if not known and not remote:
            raise UsageError(f"--split {name}: {options.data} has no splits")
        there = find_split(name, known)
        if there is None and found.layout != "voc" and not remote:  # VOC: lists may lie elsewhere
            raise UsageError(
                f"--split {name}: {options.data} has no such split; there are {', '.join(known)}{did_you_mean(name, known)}"
            )
        names.append(there or name)
    chosen = list(dict.fromkeys(names or known)) or [None]
    on_bad: OnBad = "skip" if getattr(options, "skip_bad", False) else "error"
    if options.zero_based and found.layout != "voc":
        raise UsageError(f"--zero-based: is for VOC layout, but {options.data} is {found.says}; leave it out")
    if options.allow_links and found.layout == "shards":
        raise UsageError("--allow-links: is for image files, which shards hold themselves; leave it out")
    one_based = False if options.zero_based else None
    pixels: PixelType = getattr(options, "pixels", RGB)
    together = [name for name in chosen if name is not None]
    say(found.says)
    return {
        name or unsplit_name(options.data): open_split(
            *(options.data, name, options.images, on_bad, one_based, together),
            option="",
            found=found,
            pixels=pixels,
            allow_links=options.allow_links,
        )
        for name in chosen
    }


def find_data(options: argparse.Namespace) -> Found:
    """Recognize the data set that was named on the command line, once for each command."""
    if getattr(options, "found", None) is None:
        options.found = recognize(options.data, option="", layout=getattr(options, "layout", None))
    return options.found


def read_split(name: str, opened: Mapping[str, DetectionData]) -> Annotations:
    """Read one of what `open_splits` opened; of a fault is said what to do in the words of these commands."""
    try:
        return opened[name].annotations("val")
    except DataError as error:
        message = str(error).replace("set on_bad to 'skip' to leave", "add --skip-bad to leave")
        message = message.replace("allow_links: true permits", "--allow-links permits")
        message = message.replace("set one_based to false if", "add --zero-based if")
        others = " ".join(f"--split {shlex.quote(other)}" for other in opened if other != name)
        raise DataError(f"{message}; {others} leaves the split {name} out" if others else message) from error


def unsplit_name(data: str) -> str:
    """What the only split of a file is called: by the file, ``train`` if that says nothing."""
    name = Path(data).stem.removeprefix("instances_")
    return name if name and Path(data).is_file() and name != "annotations" else "train"


def new_output(path: str) -> Path:
    """A folder to be made; a UsageError if there is something under that name."""
    folder = Path(path)
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise UsageError(f"--output {path} is there already: name a new folder, or remove it first")
    return folder

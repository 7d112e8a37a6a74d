"""The ``data check`` command: every fault of a data set, by kind, with what to look at."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from detpipe.commands.data_source import find_data, open_splits, source_parser
from detpipe.commands.parser import check_least, left_out, listed
from detpipe.datasets.checking import Report, check_data
from detpipe.datasets.unpack import archive_faults
from detpipe.support.errors import UsageError
from detpipe.support.files import write_text
from detpipe.support.terminal import say
from detpipe.types import PixelType


def run_check(arguments: Sequence[str]) -> int:
    """Print the faults of a data set; status 1 if there are any, 0 if there is nothing but remarks."""
    parser = source_parser("check", "Name every fault of a data set; exit status 1 if there is one.", skip_bad=False)
    parser.add_argument("--no-decode", action="store_true", help="do not decode the images, only look for their files")
    parser.add_argument("--show", type=int, default=5, metavar="N", help="faults of a kind that are printed (5)")
    parser.add_argument("--json", metavar="FILE", help="write all of them here")
    parser.add_argument("--channels", type=int, default=3, metavar="C", help="data.channels of the training (3)")
    parser.add_argument("--range", metavar="R", help="data.range of the training: dtype, or black and white as 0,65535")
    options = parser.parse_args(list(arguments))
    check_least(options, 0, "show")
    options.pixels = _pixels(options.channels, options.range)
    if options.json and Path(options.json).is_dir():
        raise UsageError(f"--json {options.json}: is a folder: name a file")
    if Path(options.data).suffix.lower() in (".zip", ".tar"):
        return _check_archive(Path(options.data))
    report = check_data(open_splits(options), decode=not options.no_decode)
    if options.json:
        write_text(options.json, json.dumps({"data": options.data, **report.as_json()}, indent=1))
    say(describe(report, options.show, decoded=not options.no_decode))
    if report.total(serious=True):
        say(advise(report, in_shards=find_data(options).layout == "shards"))
    return 1 if report.total(serious=True) else 0


def _pixels(channels: int, text: str | None) -> PixelType:
    """What images are read as."""
    try:
        limits: Any = text if text in (None, "dtype") else tuple(map(float, text.split(",")))
    except ValueError as error:
        raise UsageError(f"--range {text}: expected dtype, or black and white as 0,65535") from error
    try:
        return PixelType(channels, limits)
    except ValueError as error:
        raise UsageError(f"--channels {channels}, --range {text}: {error}") from error


def _check_archive(path: Path) -> int:
    """Print why an archive must not be unpacked."""
    if not path.is_file():
        raise UsageError(f"{path} does not exist; expected a data set, or an archive of one")
    faults = archive_faults(path)
    for fault in faults:
        say(fault.message)
    say(f"{len(faults)} errors; its images and annotations are checked when it is unpacked")
    return 1 if faults else 0


def describe(report: Report, shown: int, decoded: bool) -> str:
    """Put a report into lines, with so many faults of a kind written out."""
    lines = []
    for split, counts in report.counts.items():
        boxes = f"{counts['boxes used']} of {counts['boxes read']} boxes"
        skipped = "".join(f"; {text}" for text in left_out(counts))
        lines.append(
            f"{split}: {counts['images used']} of {counts['images read']} images and {boxes} can be used{skipped}"
        )
    for serious, title in ((True, "errors"), (False, "warnings")):
        groups = report.grouped(serious)
        if groups:
            lines += ["", f"{report.total(serious)} {title}"]
        for kind, messages in groups.items():
            lines.append(f"  {kind} ({len(messages)})")
            lines += listed(messages, shown)
    errors, warnings = report.total(True), report.total(False)
    images = "all images decoded" if decoded else "images not decoded"
    lines += ["", f"{errors} errors, {warnings} warnings; {images}"]
    return "\n".join(lines)


def advise(report: Report, in_shards: bool) -> str:
    """Say what errors mean for a training; the images of shards are only looked at when they are read."""
    whole = [kind for kind in report.grouped(True) if kind.startswith("data set")]
    if in_shards:
        when = "refuses these data" if whole else "stops where it reads such an image"
        return f"training {when}: copy the shards again, or write them again"
    skip = "with on_bad 'skip' it leaves out faulty boxes and images and counts them"
    return f"training refuses these data; {'even with on_bad skip' if whole else skip}"

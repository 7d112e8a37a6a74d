"""The ``zoo`` command: lists the detectors with published weights, or turns one into a checkpoint of detpipe."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from detpipe.commands.parser import Parser
from detpipe.support.errors import UsageError
from detpipe.training.checkpoint import AtomicCheckpointIO
from detpipe.zoo.published import entries, find, read


def run_zoo(arguments: Sequence[str]) -> int:
    """List, or write, of ``NAME -o FILE.ckpt`` and options."""
    options = _parser().parse_args(list(arguments))
    if options.name is None:
        if options.output or options.weights:
            raise UsageError(
                "--output and --weights need the name of a detector before them; 'detpipe zoo' lists the names"
            )
        print(table())
        return 0
    find(options.name)
    if options.output is None or Path(options.output).suffix != ".ckpt":
        raise UsageError(
            f"detpipe zoo {options.name}: give -o FILE.ckpt, the checkpoint to write; got {options.output}"
        )
    stored, description = read(options.name, options.weights)
    AtomicCheckpointIO().save_checkpoint(stored, options.output)
    print(f"wrote {options.output}: {options.name}, {len(description.class_names)} classes")
    return 0


def table() -> str:
    """The detectors, a line each: name, AP, license, size, and where the file is or is to be put."""
    rows = [("name", "AP", "data", "library, license", "MB", "file")]
    for name, entry in entries().items():
        size = "?" if entry.size is None else f"{entry.size:.0f}"
        where = f"{'here' if entry.path.is_file() else 'not here'}: {entry.path}"
        rows.append((name, f"{entry.ap:.1f}", entry.data, f"{entry.library}, {entry.license}", size, where))
    widths = [max(len(row[column]) for row in rows) for column in range(5)]
    lines = ["  ".join((*map(str.ljust, row, widths), row[5])) for row in rows]
    return "\n".join(
        [
            *lines,
            "AP is that of boxes as published, on val2017 of COCO, or test of VOC 2007 by COCO's rule; not measured here.",
            "torchvision's files are fetched when they are first used; those of detectron2 are to be put there:",
            *(entry.address for entry in entries().values() if entry.settings is not None),
        ]
    )


def _parser() -> Parser:
    parser = Parser(
        prog="detpipe zoo",
        description="List the detectors with published weights; or write one as a checkpoint, for evaluation and fine-tuning.",
    )
    parser.add_argument("name", nargs="?", help="of a detector")
    parser.add_argument("-o", "--output", metavar="FILE.ckpt", help="the checkpoint to write")
    parser.add_argument(
        "--weights", metavar="FILE", help="the published file, where it does not lie in the usual place"
    )
    return parser

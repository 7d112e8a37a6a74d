"""The ``data split`` command: parts of a data set with equal shares of the objects of every class."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Literal

from detpipe.commands.data_convert import LAYOUTS, add_writing, describe, fields_left_out, read_outlined, write_layout
from detpipe.commands.data_source import find_data, new_output, open_splits, source_parser
from detpipe.commands.parser import check_least
from detpipe.datasets.datamodule import image_files
from detpipe.datasets.stratify import divide_by_content, join
from detpipe.support.errors import UsageError
from detpipe.support.terminal import say
from detpipe.types import Annotations

_SHOWN_CLASSES = 40


def run_split(arguments: Sequence[str]) -> int:
    """Divide a data set and write the parts; after an error nothing is written."""
    parser = source_parser("split", "Divide a data set into parts with equal shares of the objects of every class.")
    parser.add_argument(
        "--parts", default="train=.8,val=.1,test=.1", metavar="NAME=SHARE,...", help="(train=.8,val=.1,test=.1)"
    )
    parser.add_argument("--seed", type=int, default=0, help="decides between what is equally good (0)")
    parser.add_argument(
        "--group-by",
        metavar="PATTERN",
        help="a regular expression: images whose names agree in what it finds (in its first group, if it has one) stay together",
    )
    parser.add_argument("--to", choices=LAYOUTS, help="the layout to write; that of PATH by default, coco for shards")
    add_writing(parser)
    options = parser.parse_args(list(arguments))
    parts = read_parts(options.parts)
    check_least(options, 0, "seed")
    folder = new_output(options.output)
    opened = open_splits(options)
    if len(opened) > 1 and not options.split:
        raise UsageError(
            f"{options.data} has several splits: name those that are to be divided anew with --split, again for each; there are "
            f"{', '.join(opened)}"
        )
    splits = {name: read_outlined(name, opened) for name in opened}
    pool, repeated = join(splits)
    if len(pool) < len(parts):
        raise UsageError(f"{options.data} has {len(pool)} images: too few for {len(parts)} parts")
    source = image_files(opened.values())
    together = named_alike(pool, options.group_by) if options.group_by is not None else []
    rows = divide_by_content(pool, parts, source, options.seed, together)
    divided = {name: pool.subset(part) for name, part in rows.items()}
    own = find_data(options).layout
    layout: Literal["coco", "voc", "yolo", "csv"] = options.to or ("coco" if own in ("coco file", "shards") else own)
    written = write_layout(layout, divided, folder, options, source)
    more = [f"{repeated} images that several splits name are taken once"] if repeated else []
    say(describe(written, splits, [*more, *fields_left_out(opened)]))
    say(table(divided))
    return 0


def read_parts(text: str) -> dict[str, float]:
    """Read names with positive shares, such as ``train=.8,val=.2``; they are divided by their sum if that is not 1."""
    parts: dict[str, float] = {}
    for item in text.split(","):
        name, equals, share = (piece.strip() for piece in item.partition("="))
        try:
            value = float(share)
        except ValueError:
            value = 0.0
        if not equals or not re.fullmatch(r"\w[\w.-]*", name) or not 0 < value < float("inf"):
            raise UsageError(
                f"--parts {text}: expected NAME=SHARE with shares above 0, such as train=.8,val=.2, got {item!r}"
            )
        if name in parts:
            raise UsageError(f"--parts {text}: the part {name!r} is there twice")
        parts[name] = value
    total = sum(parts.values())
    return {name: share / total for name, share in parts.items()}


def named_alike(pool: Annotations, pattern: str) -> list[list[int]]:
    """The rows of images whose names agree in what a regular expression finds, in its first group if it has one."""
    try:
        expression = re.compile(pattern)
    except re.error as error:
        raise UsageError(f"--group-by {pattern!r} is no regular expression: {error}") from error
    found: dict[str, list[int]] = {}
    for row, name in enumerate(pool.file_names.tolist()):
        match = expression.search(name)
        if match is None or match[expression.groups and 1] is None:
            raise UsageError(f"--group-by {pattern!r} finds nothing in the name {name!r}")
        found.setdefault(match[expression.groups and 1], []).append(row)
    return list(found.values())


def table(parts: Mapping[str, Annotations]) -> str:
    """Which share of the images and of the objects of each class went where; classes with fewest objects last."""
    first = next(iter(parts.values()))
    counts = {
        word: [int((a.labels == label).sum()) for a in parts.values()]
        for label, word in enumerate(first.class_names, 1)
    }
    boxes = {word: sum(own) for word, own in counts.items()}
    images = sum(map(len, parts.values()))
    words = sorted(boxes, key=lambda word: -boxes[word])
    width = max(len("images"), *map(len, words[:_SHOWN_CLASSES]))
    lines = [f"{'':<{width}}  {'total':>7}" + "".join(f"  {name:>14}" for name in parts)]
    own = "".join(f"  {len(a):>6} {len(a) / images:>6.1%}".rjust(16) for a in parts.values())
    lines.append(f"{'images':<{width}}  {images:>7}{own}")
    for word in words[:_SHOWN_CLASSES]:
        cells = "".join(f"  {count:>6} {count / max(1, boxes[word]):>6.1%}".rjust(16) for count in counts[word])
        lines.append(f"{word:<{width}}  {boxes[word]:>7}{cells}")
    if len(words) > _SHOWN_CLASSES:
        lines.append(f"and {len(words) - _SHOWN_CLASSES} more classes")
    return "\n".join(lines)

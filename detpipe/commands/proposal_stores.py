"""The ``proposals convert`` and ``proposals info`` commands: other programs' files into stores, and what is in a store."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from detpipe.commands.parser import Parser
from detpipe.proposal_files.box_orders import CONVENTIONS
from detpipe.proposal_files.converters import FORMATS, convert
from detpipe.proposal_files.store import ProposalStore
from detpipe.proposal_files.store_format import SUFFIX
from detpipe.support.errors import UsageError
from detpipe.support.terminal import say


def run_convert(arguments: Sequence[str]) -> int:
    """Turn a file of proposals into a store, and print what was read and left out; after an error nothing is written."""
    parser = Parser(prog="detpipe proposals convert", description="Turn a file of proposals into a store.")
    parser.add_argument("input", metavar="FILE", help=".mat (or a folder of them), .json, .pkl, .csv or .npz")
    parser.add_argument("-o", "--output", required=True, help=f"the store to write, *{SUFFIX}")
    parser.add_argument("--format", choices=list(FORMATS), help="told from the suffix by default")
    parser.add_argument(
        "--images", metavar="FILE", help="COCO annotations, or one id a line: order and names of the images"
    )
    parser.add_argument("--source", metavar="NAME", help="what made the boxes; the name of the file by default")
    parser.add_argument(
        "--boxes",
        choices=list(CONVENTIONS),
        help="how the file writes boxes, where it is not as usual for its format: order of the numbers, and 0 or 1 if they "
        "are whole pixels counted from there with the last one included",
    )
    parser.add_argument("--skip-bad", action="store_true", help="leave out boxes and images with faults and count them")
    parser.add_argument(
        "--fill-missing", action="store_true", help="images of --images that the file lacks get no boxes"
    )
    options = parser.parse_args(list(arguments))
    if Path(options.output).suffix != SUFFIX:
        raise UsageError(f"--output {options.output}: the name of a store must end in {SUFFIX}")
    done = convert(
        options.input,
        options.output,
        format=options.format,
        images=options.images,
        source=options.source,
        boxes=options.boxes,
        on_bad="skip" if options.skip_bad else "error",
        fill_missing=options.fill_missing,
        progress=sys.stderr.isatty(),
    )
    say(f"boxes read as {done.convention}: {CONVENTIONS[done.convention]}")
    for name, count in done.counts.items():
        say(f"{name}: {count}")
    say(f"wrote {done.store.path}")
    return 0


def run_info(arguments: Sequence[str]) -> int:
    """Print what is in a store."""
    parser = Parser(prog="detpipe proposals info", description="Say what is in a store of proposals.")
    parser.add_argument("store", metavar="STORE", help=f"*{SUFFIX}")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--verify", action="store_true", help="read all boxes and compare them with the hash")
    options = parser.parse_args(list(arguments))
    store = ProposalStore(options.store)
    if options.verify:
        store.verify()
    facts = describe(store)
    if options.json:
        say(json.dumps(facts, indent=1))
        return 0
    per_image = facts["boxes_per_image"]
    for name in ("path", "format_version", "source"):
        say(f"{name.replace('_', ' ')}: {facts[name]}")
    say(f"settings: {json.dumps(facts['settings'], sort_keys=True)}")
    say(f"images: {facts['images']}, the size known of {facts['images_with_size']}")
    say(
        f"boxes: {facts['boxes']}; an image has {per_image['min']} to {per_image['max']}, median {per_image['median']:g}, "
        f"and {facts['images_without_boxes']} images have none"
    )
    say(f"content hash: {facts['content_hash']}{' (verified)' if options.verify else ''}")
    return 0


def describe(store: ProposalStore) -> dict[str, Any]:
    """Collect what ``detpipe proposals info --json`` prints."""
    counts = store.box_counts()
    return {
        "path": str(store.path),
        "format_version": store.version,
        "source": store.source,
        "settings": store.settings,
        "images": len(store),
        "images_with_size": store.num_sizes(),
        "images_without_boxes": int((counts == 0).sum()),
        "boxes": store.num_boxes,
        "boxes_per_image": {
            "min": int(counts.min()) if len(counts) else 0,
            "median": float(np.median(counts)) if len(counts) else 0.0,
            "max": int(counts.max(initial=0)),
        },
        "content_hash": store.content_hash,
    }

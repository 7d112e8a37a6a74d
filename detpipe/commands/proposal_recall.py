"""The ``proposals recall`` command: how many objects of a data set the boxes of stores find."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from detpipe.commands.data_source import add_data_options
from detpipe.commands.parser import Parser, output_folder, progress
from detpipe.datasets import DetectionData
from detpipe.datasets.formats.recognize import open_split
from detpipe.datasets.stored_proposals import StoredProposals
from detpipe.evaluation.proposal_faults import ENOUGH, likely_faults
from detpipe.evaluation.proposal_recall import (
    MAX_BOXES,
    ProposalRecall,
    class_table,
    evaluate_recall,
    recall_table,
)
from detpipe.pictures.recall_plot import plot_recall
from detpipe.proposal_files.store import ProposalStore
from detpipe.support.errors import DataError, UsageError
from detpipe.support.files import write_text
from detpipe.support.terminal import say
from detpipe.types import Annotations


def run_recall(arguments: Sequence[str]) -> int:
    """Measure recall; print tables, and on request write ``recall.json`` and ``recall.png``."""
    options = _parse(arguments)
    folder = None if options.output is None else output_folder(options.output)
    data = open_split(options.data, options.split, options.images, "skip" if options.skip_bad else "error")
    annotations = data.annotations("val")
    stores = [ProposalStore(path) for path in options.stores]
    names = name_stores(stores)
    if options.skip_missing:
        annotations = _keep_stored(annotations, data, stores)
    left_out = int((annotations.iscrowd | annotations.difficult).sum())
    say(
        f"{len(annotations)} images, {len(annotations.boxes) - left_out} objects"
        + (f"; {left_out} crowds and difficult ones are not counted" if left_out else "")
    )
    reports: dict[str, ProposalRecall] = {}
    proposals = {}
    for name, path in zip(names, options.stores, strict=True):
        proposals[name] = StoredProposals(path, annotations, data.image_key)
        with progress(len(annotations), name, logged=False) as move:
            reports[name] = evaluate_recall(annotations, proposals[name], MAX_BOXES, move)
    say(f"\n{recall_table(reports, options.markdown)}")
    for name, report in reports.items():
        say(f"\n{name}, with {MAX_BOXES[-1]} boxes, least found classes first\n{class_table(report)}")
    for name, report in reports.items():
        recall = report.at(0.5, MAX_BOXES[-1])
        if recall < ENOUGH:
            say(
                f"\nwarning: {name} finds {recall:.1%} of the objects at IoU .5, less than {ENOUGH:.0%}",
                file=sys.stderr,
            )
            for cause in likely_faults(annotations, proposals[name]):
                say(f"  likely cause: {cause}", file=sys.stderr)
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        content = {name: report.to_dict() for name, report in reports.items()}
        write_text(folder / "recall.json", json.dumps(content, indent=1, allow_nan=False) + "\n")
        plot_recall(reports, folder / "recall.png", f"{Path(options.data).name} {options.split or ''}".strip())
        say(f"\nsee {folder / 'recall.json'} and {folder / 'recall.png'}")
    return 0


def name_stores(stores: Sequence[ProposalStore]) -> list[str]:
    """Call each store by its source, or by its file where several have one source; a store that is given twice is a UsageError."""
    sources = [store.source for store in stores]
    names = [
        store.source if sources.count(store.source) == 1 else f"{store.source} ({store.path.stem})" for store in stores
    ]
    if len(set(names)) < len(names):
        names = [str(store.path) for store in stores]
    for name in names:
        if names.count(name) > 1:
            raise UsageError(f"store {name} is given twice; give each once")
    return names


def _keep_stored(annotations: Annotations, data: DetectionData, stores: Sequence[ProposalStore]) -> Annotations:
    """Leave out images that one of the stores lacks, and say how many."""
    keys = [data.image_key(annotations, row) for row in range(len(annotations))]
    kept = np.array([all(key in store for store in stores) for key in keys], bool)
    if not kept.any():
        raise DataError(
            f"no image of --data {annotations.root} is in every store; it calls its images {', '.join(keys[:5])}, and "
            f"{stores[0].path} has {', '.join(list(stores[0])[:5])}"
        )
    if not kept.all():
        say(f"{int((~kept).sum())} of {len(annotations)} images are not in every store, they are left out")
    return annotations.subset(np.flatnonzero(kept))


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = Parser(prog="detpipe proposals recall", description="Measure how many objects the boxes of stores find.")
    parser.add_argument("stores", nargs="+", metavar="STORE", help="one store or several, to be compared")
    add_data_options(parser)
    parser.add_argument("-o", "--output", metavar="FOLDER", help="write recall.json and recall.png there")
    parser.add_argument("--skip_missing", action="store_true", help="leave out images that a store lacks")
    parser.add_argument("--markdown", action="store_true", help="print the table as Markdown")
    return parser.parse_args(list(arguments))

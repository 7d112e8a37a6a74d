"""Seconds an image and recall of every proposal source, and detpipe's selective search against OpenCV's.

For each data set and source the boxes of all images are made by one process (seconds an image, reading the file included), and
those of the first images again by two processes (seconds an image of the clock, start of the processes left out, by the
difference between two numbers of images). The stores of both must be the same bytes. Recall is COCO's: one box for one object,
without classes.

The comparison with OpenCV goes image by image, in turns, in one process with one thread: the median over the images of (seconds
of detpipe / seconds of OpenCV's fast mode), and recall at 2000 boxes of both.

    python benchmarks/proposals.py --coco ../shared/data/coco_mini --bccd ../shared/data/bccd --markdown
"""

from __future__ import annotations

import argparse
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import cv2
import numpy as np
import torch

from detpipe.commands.proposal_making import CheckpointProposals, find_items, read_pixels
from detpipe.datasets import DetectionData
from detpipe.datasets.formats.recognize import open_split
from detpipe.datasets.image_files import PLAIN_FILES
from detpipe.datasets.stored_proposals import StoredProposals
from detpipe.evaluation.proposal_recall import ProposalRecall, evaluate_recall, recall_table
from detpipe.pictures.recall_plot import plot_recall
from detpipe.proposal_files.offline import Item, make_store
from detpipe.proposals import OpenCVSelectiveSearch, SelectiveSearch, make_source

SOURCES = (
    "selective_search",
    "opencv_selective_search",
    "superpixels",
    "edge_boxes",
    "dense_grid",
    "selective_search+superpixels",
)
read = partial(read_pixels, PLAIN_FILES)
MORE = 12  # images of the runs with two processes, at most; and a third of them


def main() -> int:
    """Run the benchmark and print its tables."""
    options = parse()
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    print(
        f"{platform.machine()}, Python {platform.python_version()}, OpenCV {cv2.__version__}, torch {torch.__version__}"
    )
    for title, folder, split, checkpoint in (
        ("coco_mini val2017", options.coco, "val2017", options.coco_rpn),
        ("BCCD test", options.bccd, "test", options.bccd_rpn),
    ):
        if folder is None:
            continue
        data = open_split(folder, split, on_bad="skip")
        items = find_items(folder, split, skip_bad=True)[0][: options.images]
        reports, seconds = {}, {}
        for name in [*(options.sources or SOURCES), *(["rpn"] if checkpoint else [])]:
            build = partial(CheckpointProposals, checkpoint) if name == "rpn" else partial(make_source, name)
            reports[name], seconds[name] = measure(data, items, build)
            print(f"{title} {name}: {seconds[name][0]:.2f} s an image", file=sys.stderr)
        print(f"\n## {title}, {len(items)} images\n\n{recall_table(reports, options.markdown)}\n")
        print("| source | s/image, 1 process | s/image, 2 processes |\n| --- | ---: | ---: |")
        for name, (one, two) in seconds.items():
            print(f"| {name} | {one:.2f} | {two:.2f} |")
        if options.output:
            plot_recall(reports, Path(options.output) / f"recall_{title.split()[0].lower()}.png", title)
        if not options.sources:
            compare(title, data, items)
    return 0


def measure(data: DetectionData, items: Sequence[Item], build: partial) -> tuple[ProposalRecall, tuple[float, float]]:
    """Make all boxes; return their recall, and seconds an image with one and with two processes."""
    annotations = data.annotations("val").subset(np.arange(len(items)))
    with tempfile.TemporaryDirectory() as folder:
        store = Path(folder) / "all.safetensors"
        one = make_store(build, items, store, read).seconds_an_image
        report = evaluate_recall(annotations, StoredProposals(store, annotations, data.image_key))
        more = min(MORE, len(items))
        few = max(2, more // 3)
        times, stores = [], []
        for workers, count in ((2, few), (2, more), (1, more)):
            path = Path(folder) / f"{workers}-{count}.safetensors"
            start = time.perf_counter()
            make_store(build, items[:count], path, read, workers=workers)
            times.append(time.perf_counter() - start)
            stores.append(path.read_bytes())
        if stores[1] != stores[2]:
            raise AssertionError("two processes made another store than one")
    return report, (one, (times[1] - times[0]) / (more - few))


def compare(title: str, data: DetectionData, items: Sequence[Item]) -> None:
    """Print detpipe's selective search against OpenCV's fast mode."""
    sources = {"detpipe": SelectiveSearch(), "OpenCV": OpenCVSelectiveSearch()}
    annotations = data.annotations("val").subset(np.arange(len(items)))
    boxes: dict[str, dict[int, np.ndarray]] = {name: {} for name in sources}
    seconds: dict[str, list[float]] = {name: [] for name in sources}
    for row, item in enumerate(items):
        image = read(item.path)
        for name, source in sorted(sources.items(), reverse=bool(row % 2)):
            start = time.perf_counter()
            boxes[name][int(annotations.image_ids[row])] = source.propose(image)[0]
            seconds[name].append(time.perf_counter() - start)
    ratios = [ours / theirs for ours, theirs in zip(seconds["detpipe"], seconds["OpenCV"], strict=True)]
    first, middle, last = statistics.quantiles(ratios)
    recall = {name: evaluate_recall(annotations, found).at(0.5, 2000) for name, found in boxes.items()}
    print(
        f"\n{title}, selective search: time of detpipe / OpenCV fast {middle:.2f} (quartiles {first:.2f} to {last:.2f}); "
        f"recall at 2000 boxes, IoU .5: detpipe {recall['detpipe']:.3f}, OpenCV {recall['OpenCV']:.3f}\n"
    )


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--coco", metavar="FOLDER", help="in COCO layout, with the split val2017")
    parser.add_argument("--bccd", metavar="FOLDER", help="in VOC layout, with the split test")
    parser.add_argument("--coco_rpn", metavar="CHECKPOINT", help="a detector with an RPN, for the COCO images")
    parser.add_argument("--bccd_rpn", metavar="CHECKPOINT", help="a detector with an RPN, for the BCCD images")
    parser.add_argument("--sources", nargs="+", help="only these; leaves the comparison with OpenCV out")
    parser.add_argument("--images", type=int, help="only the first images")
    parser.add_argument("--markdown", action="store_true", help="print the recall tables as Markdown")
    parser.add_argument("-o", "--output", metavar="FOLDER", help="write a picture of each recall table there")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())

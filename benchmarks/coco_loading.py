"""Does a data set of COCO train2017's size load as fast as its JSON is parsed, and cost data workers next to nothing?

Three tables on a synthetic annotation file (`coco_files.py`), each measurement in a process of its own.

1. Time: ``json.loads`` of the text (reading the file not counted) and our load (everything counted: reading, all checks, listing
   the image folder) take turns. Wall-clock time and the time of the processor, which other programs on the machine disturb less;
   medians, and ratios to ``json.loads``.
2. The most memory during each.
3. Private memory (USS) of each of 2 workers that read the annotations of all images, after each of three epochs; what a
   worker costs without annotations stands beside it. The peer keeps the parsed records, as torchvision's ``CocoDetection`` does
   by pycocotools. No pixels are read.

Expected: at most the time of json.loads, less than 20 MiB a worker that do not grow.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import psutil
from coco_files import write_files
from torch.utils.data import DataLoader, Dataset

from detpipe.datasets import load_coco
from detpipe.datasets.dataset import DetectionDataset, start_worker

MIB = 2**20
WAYS = ("json.loads", "load_coco")
KEEPERS = ("no annotations", "detpipe", "records (CocoDetection)")


class Reader(Dataset):
    """Reads the annotations of an image and tells what its process keeps to itself."""

    def __init__(self, keeper: str, path: Path, root: Path, images: int) -> None:
        self.keeper, self.images, self.source = keeper, images, None
        if keeper == "detpipe":
            self.source = DetectionDataset(load_coco(path, root))
        elif keeper != "no annotations":
            from torchvision.datasets import CocoDetection

            self.source = CocoDetection(root, str(path))

    def __len__(self) -> int:
        return self.images

    def __getitem__(self, index: int) -> tuple[int, float, int]:
        boxes = 0
        if isinstance(self.source, DetectionDataset):
            boxes = len(self.source.target(index).get("boxes", ()))
        elif self.source is not None:
            boxes = len([record["bbox"] for record in self.source._load_target(self.source.ids[index])])
        private = psutil.Process().memory_full_info().uss / MIB if index % 1000 == 0 else 0.0
        return os.getpid(), private, boxes


def measure_time(way: str, path: Path, root: Path) -> dict[str, float]:
    """Seconds and the most memory of one way."""
    text = path.read_text() if way == "json.loads" else ""
    before = psutil.Process().memory_info().rss
    wall, processor = time.perf_counter(), time.process_time()
    if way == "json.loads":
        content = json.loads(text)
        assert content["annotations"]
    else:
        load_coco(path, root)
    wall, processor = time.perf_counter() - wall, time.process_time() - processor
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
    return {"wall": wall, "processor": processor, "peak": peak / MIB}


def measure_memory(keeper: str, path: Path, root: Path, images: int, start: str) -> dict[str, list[float]]:
    """MiB of private memory of the worker that has most, at the end of each epoch."""
    loader: Any = DataLoader(
        Reader(keeper, path, root, images),
        batch_size=100,
        num_workers=2,
        collate_fn=list,
        worker_init_fn=start_worker,
        persistent_workers=True,
        multiprocessing_context=start,
    )
    epochs = []
    for _ in range(3):
        latest: dict[int, float] = {}
        for batch in loader:
            latest |= {process: private for process, private, _ in batch if private}
        epochs.append(max(latest.values()))
    return {"epochs": epochs}


def in_new_process(arguments: list[str]) -> dict[str, Any]:
    """Run this script for one measurement."""
    done = subprocess.run([sys.executable, __file__, *arguments], check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def report(options: argparse.Namespace, path: Path, root: Path) -> None:
    """Print the tables for one file."""
    print(f"\n{path.name}: {path.stat().st_size / 1e6:.0f} MB")
    results: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
    for _ in range(options.rounds):
        for way in WAYS:
            results[way].append(in_new_process(["--one", way, str(path), str(root), "", options.start]))
    columns = {
        way: [statistics.median(one[key] for one in results[way]) for key in ("wall", "processor", "peak")]
        for way in WAYS
    }
    print(f"{'':26}{'wall s':>8}{'ratio':>7}{'cpu s':>8}{'ratio':>7}{'peak MiB':>10}")
    for way, (wall, processor, peak) in columns.items():
        first = columns[WAYS[0]]
        print(f"{way:26}{wall:8.2f}{wall / first[0]:7.2f}{processor:8.2f}{processor / first[1]:7.2f}{peak:10.0f}")
    if options.memory:
        print(f"{'private MiB a worker':26}{'epoch 1':>8}{'2':>8}{'3':>8}")
        for keeper in KEEPERS:
            epochs = in_new_process(["--one", keeper, str(path), str(root), str(options.images), options.start])[
                "epochs"
            ]
            print(f"{keeper:26}{''.join(f'{value:8.1f}' for value in epochs)}", flush=True)


def main() -> None:
    """Read the command line and measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=117_266)
    parser.add_argument("--boxes", type=int, default=860_001)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--polygons", choices=("with", "without", "both"), default="both")
    parser.add_argument("--memory", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--folder", default=str(Path(tempfile.gettempdir()) / "coco_loading"))
    parser.add_argument(
        "--start", choices=("fork", "forkserver", "spawn"), default="fork", help="how workers are started"
    )
    parser.add_argument("--one", nargs=5, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        what, path, root, last, start = options.one
        if what in WAYS:
            print(json.dumps(measure_time(what, Path(path), Path(root))))
        else:
            print(json.dumps(measure_memory(what, Path(path), Path(root), int(last), start)))
        return
    print(
        f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, ", end=""
    )
    print(f"Python {platform.python_version()}, numpy {np.__version__}; medians of {options.rounds}")
    for polygons in (False, True):
        if options.polygons in ("both", "with" if polygons else "without"):
            folder = Path(options.folder)
            report(options, *write_files(folder, options.images, options.boxes, polygons))


if __name__ == "__main__":
    main()

"""Does reading from shards cost more than reading the same images as files from a local disk?

The same data module code loads the same synthetic JPEGs (smooth pictures with noise, as long as photographs of their size) once
as files in COCO layout and once from shards, in turns within one run: an epoch of training batches (decoded, flipped, collated,
not resized), for 0, 1 and 2 workers. All shards are in one window, so both load the same batches. What is compared is the median
over the rounds of the ratio of two epochs that follow each other, since the machine may be busy with other things as well;
quartiles stand beside it. The target is a ratio of at least 0.9. The CPU time of all processes for an image depends less on what
else the machine does.

Then the same for the bytes alone, without decoding; the private memory of a data worker at the end; and how long it takes to write
the shards, beside copying the files.

The files are in the system's memory after the first pass: this measures the work of reading, not the disk. On a disk with slow
seeks, or on a network, shards gain by what they save there; this benchmark does not show it.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from PIL import Image

from detpipe.datasets import COCO, Augment, DetectionData, Loader, Shards
from detpipe.datasets.shards.write import Sharding, make_shards

SIZE = (480, 640)
KINDS = ("files", "shards")


def write_images(root: Path, count: int) -> None:
    """Write a data set in COCO layout, with five boxes an image."""
    random = np.random.default_rng(0)
    (root / "train").mkdir(parents=True)
    (root / "annotations").mkdir()
    height, width = SIZE
    images, boxes = [], []
    for number in range(count):
        coarse = Image.fromarray(random.integers(0, 256, (12, 16, 3), dtype=np.uint8))
        pixels = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC)).astype(np.int16)
        noisy = (pixels + random.integers(-20, 21, pixels.shape)).clip(0, 255).astype(np.uint8)
        Image.fromarray(noisy).save(root / "train" / f"{number:06d}.jpg", quality=85)
        images.append({"id": number + 1, "file_name": f"{number:06d}.jpg", "height": height, "width": width})
        for x, y in random.integers(0, 300, (5, 2)).tolist():
            record = {"id": len(boxes) + 1, "image_id": number + 1, "category_id": 1, "bbox": [x, y, 99, 99]}
            boxes.append({**record, "area": 9801, "iscrowd": 0})
    content = {"images": images, "annotations": boxes, "categories": [{"id": 1, "name": "thing"}]}
    (root / "annotations" / "instances_train.json").write_text(json.dumps(content))


def seconds(work: Callable[[], object]) -> float:
    """How long something takes."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def private_memory(process: int) -> float:
    """MiB that a process shares with no other."""
    lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("Private_")) / 1024


class Epochs:
    """Epochs of training batches of a data module.

    Args:
        data: the module.
    """

    def __init__(self, data: DetectionData) -> None:
        self.loader, self.images = data.train_dataloader(), len(data.annotations("train"))
        self.epoch, self.memory = 0, 0.0

    def run(self) -> tuple[float, float]:
        """One epoch; images a second, and milliseconds of CPU an image in all processes. The first starts the workers."""
        self.loader.batch_sampler.set_epoch(self.epoch)  # type: ignore[union-attr]
        self.epoch += 1

        def work() -> None:
            seen = sum(len(images) for images, _ in self.loader)
            assert seen == self.images

        before = self._cpu_seconds()
        rate = self.images / seconds(work)
        spent = self._cpu_seconds() - before
        self.memory = max((private_memory(process) for process in self._workers()), default=0.0)
        return rate, 1000 * spent / self.images

    def _workers(self) -> list[int]:
        return [worker.pid for worker in getattr(self.loader._iterator, "_workers", [])]

    def _cpu_seconds(self) -> float:
        fields = [Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split() for process in self._workers()]
        ticks = sum(int(field[11]) + int(field[12]) for field in fields)  # utime, stime
        return time.process_time() + ticks / os.sysconf("SC_CLK_TCK")


def show(name: str, first: list[float], second: list[float], unit: str, digits: int = 0) -> None:
    """Print a line: medians and quartiles of both, and of the ratios of neighbors."""
    ratios = [b / a for a, b in zip(first, second, strict=True)]
    cells = [f"{quartiles(values, digits)} {unit}" for values in (first, second)]
    print(f"{name:24} {cells[0]:>28} {cells[1]:>28}   {quartiles(ratios, 3)}")


def quartiles(values: list[float], digits: int) -> str:
    """``median (lower..upper)``."""
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return f"{middle:.{digits}f} ({low:.{digits}f}..{high:.{digits}f})"


def compare_loading(root: Path, rounds: int, batch_size: int) -> None:
    """Load epochs in turns."""
    print(f"{'':24} {'files':>28} {'shards':>28}   shards / files")
    for workers in (0, 1, 2):
        common = {"loader": Loader(batch_size, num_workers=workers), "augment": Augment(flip=0.5)}
        files = Epochs(COCO(str(root / "files"), "train", "train", **common))
        shards = Epochs(Shards(str(root / "shards"), "train", "train", window=10_000, **common))
        for epochs in (files, shards):
            epochs.run()  # workers start, files come into the system's memory
        found: dict[str, list[tuple[float, float]]] = {kind: [] for kind in KINDS}
        for turn in range(rounds):
            order = list(zip(KINDS, (files, shards), strict=True))
            for kind, epochs in order if turn % 2 == 0 else order[::-1]:
                found[kind].append(epochs.run())
        for place, (name, unit) in enumerate(((f"{workers} workers", "img/s"), ("  CPU an image", "ms"))):
            first, second = ([one[place] for one in found[kind]] for kind in KINDS)
            show(name, first, second, unit, digits=place)
        if workers == 1:
            print(f"{'  private memory':24} {files.memory:>24.0f} MiB {shards.memory:>24.0f} MiB")


def compare_bytes(root: Path, rounds: int) -> None:
    """Read the bytes of every image in a random order, in turns."""
    data = Shards(str(root / "shards"), "train", "train")
    a, contents = data.annotations("train"), data.contents("train")
    paths = [root / "files" / "train" / str(name) for name in a.file_names]
    rates: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for turn in range(rounds + 1):
        order = np.random.default_rng(turn).permutation(len(a)).tolist()
        for kind, read in zip(KINDS, (lambda row: paths[row].read_bytes(), contents.read), strict=True):
            rate = len(a) / seconds(lambda read=read, order=order: [read(row) for row in order])
            if turn:
                rates[kind].append(rate)
    show("bytes alone, checked", rates["files"], rates["shards"], "img/s")


def compare_making(root: Path, rounds: int, shard_bytes: int) -> None:
    """Write shards with one process and with two, beside copying the files."""
    a = COCO(str(root / "files"), "train", "train").annotations("train")
    times: dict[str, list[float]] = {}
    for turn in range(rounds):
        for name, settings in {
            "copy the files": None,
            "shards, 1 process": Sharding(shard_bytes),
            "shards, 2 processes": Sharding(shard_bytes, workers=2),
            "shards, not decoded": Sharding(shard_bytes, decode=False),
        }.items():
            target = root / f"made{turn}"
            if settings is None:
                taken = seconds(lambda target=target: shutil.copytree(root / "files", target))
            else:
                taken = seconds(lambda s=settings, t=target: make_shards(a, t, "train", "coco", s))
            shutil.rmtree(target)
            times.setdefault(name, []).append(taken)
    for name, taken in times.items():
        print(f"{name:24} {quartiles(taken, 2)} s, {len(a) / statistics.median(taken):.0f} img/s")


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=500)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--shard-size", type=int, default=16_000_000, help="bytes")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        write_images(root / "files", options.images)
        a = COCO(str(root / "files"), "train", "train").annotations("train")
        made = make_shards(a, root / "shards" / "train", "train", "coco", Sharding(options.shard_size)).shards
        total = sum(shard.bytes for shard in made.shards) / 1e6
        load = os.getloadavg()[0]
        print(
            f"{options.images} JPEGs of {SIZE[1]} x {SIZE[0]}, {total:.0f} MB in {len(made.shards)} shards; {os.cpu_count()} CPUs "
            f"(load {load:.1f}), torch {torch.__version__}, Python {platform.python_version()}; medians (quartiles) of "
            f"{options.rounds} rounds"
        )
        compare_loading(root, options.rounds, options.batch_size)
        compare_bytes(root, options.rounds)
        compare_making(root, max(2, options.rounds // 3), options.shard_size)


if __name__ == "__main__":
    main()

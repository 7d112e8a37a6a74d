"""What does a data set of COCO train2017's size cost in shards: to write, before the first batch, and in each data worker?

117,266 images with 860,001 boxes in 74 shards. The image files are a few small pictures under many names, so that the set fits on
any disk; annotations, index and shards are as many as with photographs.

1. Writing, without decoding, by two processes: seconds, images a second, and bytes.
2. Reading the index, everything checked, and the time to the first training batch with two workers. ``json.loads`` of the same
   annotations in COCO's format, what any reader of COCO pays at least, takes turns with it; each in a process of its own.
3. Private memory (USS) of the worker that has most after each of three epochs of as many batches.

Expected: less time than ``json.loads``, less than 20 MiB a worker for annotations, flat.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
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
from PIL import Image

from detpipe.datasets import Loader, Shards
from detpipe.datasets.formats.coco import coco_content
from detpipe.datasets.shards.write import Sharding, make_shards
from detpipe.types import Annotations

MIB = 2**20
SHAPES = ((48, 64), (64, 48), (40, 64), (64, 64))
PICTURES, IMAGES_A_SHARD = 32, 1600


def make_set(folder: Path, images: int, boxes: int) -> Annotations:
    """Pictures under many names, and annotations for them."""
    random = np.random.default_rng(0)
    (folder / "images").mkdir(parents=True)
    sizes = np.array([SHAPES[n % len(SHAPES)] for n in range(PICTURES)], np.int32)
    for n, (height, width) in enumerate(sizes.tolist()):
        coarse = Image.fromarray(random.integers(0, 256, (6, 8, 3), dtype=np.uint8))
        coarse.resize((width, height), Image.Resampling.BICUBIC).save(folder / f"{n}.jpg", quality=90)
    names = [f"{row:012}.jpg" for row in range(images)]
    for row, name in enumerate(names):
        os.link(folder / f"{row % PICTURES}.jpg", folder / "images" / name)
    sizes = sizes[np.arange(images) % PICTURES]
    owner = np.sort(random.integers(0, images, boxes))
    corner = random.random((boxes, 2)) * 0.5 * sizes[owner][:, ::-1]
    box = np.concatenate((corner, corner + 1 + random.random((boxes, 2)) * 0.4 * sizes[owner][:, ::-1]), axis=1)
    return Annotations(
        root=folder / "images",
        file_names=np.array(names),
        image_ids=np.sort(random.choice(580_000 + images, images, replace=False)),
        sizes=sizes,
        offsets=np.searchsorted(owner, np.arange(images + 1)),
        boxes=box,
        labels=random.integers(1, 81, boxes),
        iscrowd=random.random(boxes) < 0.01,
        difficult=np.zeros(boxes, bool),
        area=(box[:, 2:] - box[:, :2]).prod(1),
        class_names=tuple(f"class {k}" for k in range(1, 81)),
        category_ids=tuple(range(1, 81)),
        counts={"images read": images, "images used": images, "boxes read": boxes, "boxes used": boxes},
    )


def measure(what: str, root: Path, batches: int) -> dict[str, Any]:
    """One measurement, in this process."""
    before = psutil.Process().memory_info().rss
    if what == "json.loads":
        text = (root / "instances.json").read_text()
        start = time.perf_counter()
        content = json.loads(text)
        return {"seconds": time.perf_counter() - start, "images": len(content["images"])}
    data = Shards(str(root), train="train", val="train", loader=Loader(batch_size=8, num_workers=2))
    start = time.perf_counter()
    images = len(data.annotations("train"))
    seconds, grown = time.perf_counter() - start, (psutil.Process().memory_info().rss - before) / MIB
    if what == "index":
        return {"seconds": seconds, "images": images, "grown": grown}
    loader = data.train_dataloader()
    private, first = [], 0.0
    for epoch in range(3):
        loader.batch_sampler.set_epoch(epoch)  # type: ignore[union-attr]
        iterator = iter(loader)
        for step in range(batches):
            next(iterator)
            first = first or (time.perf_counter() - start if step == 0 else 0.0)
        workers = [child for child in psutil.Process().children() if child.memory_full_info().uss > MIB]
        private.append(max(child.memory_full_info().uss for child in workers) / MIB)
    return {"first": first, "private": private}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=117_266)
    parser.add_argument("--boxes", type=int, default=860_001)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batches", type=int, default=300, help="of an epoch, when memory is measured")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(options.one[0], Path(options.one[1]), options.batches)))
        return
    print(
        f"{platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, Python {platform.python_version()}"
    )
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "shards"
        annotations = make_set(Path(folder) / "files", options.images, options.boxes)
        start = time.perf_counter()
        sharding = Sharding(images_per_shard=IMAGES_A_SHARD, decode=False, workers=2)
        made = make_shards(annotations, root / "train", "train", sharding=sharding).shards
        seconds, size = time.perf_counter() - start, sum(shard.bytes for shard in made.shards)
        index = sum((root / "train" / name).stat().st_size for name in ("index.json", "arrays.safetensors"))
        print(
            f"written: {len(made.shards)} shards, {size / 1e6:.0f} MB, index {index / 1e6:.0f} MB, {seconds:.0f} s, ",
            end="",
        )
        print(f"{options.images / seconds:.0f} images/s")
        (root / "instances.json").write_text(json.dumps(coco_content(annotations, annotations.file_names.tolist())))
        found: dict[str, list[dict[str, Any]]] = {"json.loads": [], "index": [], "epochs": []}
        for _, what in itertools.product(range(options.rounds), found):
            command = [sys.executable, __file__, "--one", what, str(root), "--batches", str(options.batches)]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            found[what].append(json.loads(done.stdout.splitlines()[-1]))
    parsing, reading = (statistics.median(one["seconds"] for one in found[what]) for what in ("json.loads", "index"))
    print(f"json.loads {parsing:.2f} s; index {reading:.2f} s, ratio {reading / parsing:.2f}, ", end="")
    print(f"{statistics.median(one['grown'] for one in found['index']):.0f} MiB more")
    print(f"first batch after {statistics.median(one['first'] for one in found['epochs']):.2f} s, two workers")
    epochs = [statistics.median(values) for values in zip(*(one["private"] for one in found["epochs"]), strict=True)]
    print(f"private memory of a worker after epochs 1, 2, 3: {', '.join(f'{value:.1f}' for value in epochs)} MiB")


if __name__ == "__main__":
    main()

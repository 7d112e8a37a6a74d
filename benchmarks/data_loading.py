"""How many images a second come out of the loader, ready for the network, next to two published recipes?

Three ways make the same batches, ``[N, 3, H, W]`` floating point, normalized, flipped with probability one half, the shorter side
at ``--min-size`` unless the longer one exceeds ``--max-size``, padded to multiples of 32, with the boxes moved along:

* detpipe: decoding at a part of the scale, flip and resize of bytes in the worker; normalized and padded in the main process.
* torchvision: its references/detection recipe ("hflip"): Pillow decodes, ``PILToTensor``, flip and ``ToDtype`` in the worker;
  ``GeneralizedRCNNTransform``, which is inside its models, normalizes, resizes and pads in the main process.
* detectron2: its recipe (mapper), rebuilt on PyTorch's parts: Pillow decodes and resizes, a flip, the copy to channels first in the
  worker; normalized and padded in the main process. Images are of one shape, so that grouping by aspect ratio changes nothing.

What differs in the pixels: torchvision does not smooth where it shrinks, the others do, and it rounds the longer side down, the
others to the nearest; detpipe decodes large files at a part of their scale. The benchmark prints the mean difference
to detpipe in gray levels, without flips.

The ways take turns; a turn is an epoch with workers that are up already. Medians and quartiles over the turns.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision import tv_tensors
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.transforms import v2

from detpipe.datasets import COCO, Augment, Loader, Resize, read_image
from detpipe.datasets.dataset import start_worker
from detpipe.datasets.decode import read_reduced
from detpipe.datasets.workers import collate, pack
from detpipe.images import contents_of, resized_size, to_batch
from detpipe.types import PixelFormat

FORMAT = PixelFormat()
Ways = dict[str, tuple[Any, Callable[[Any], Tensor]]]  # a loader, and what the main process does with a batch


def make_files(folder: Path, size: tuple[int, int], count: int, source: Path | None) -> None:
    """Write JPEGs of one size with eight boxes each in the layout of COCO: real photographs enlarged, or smooth noise."""
    height, width = size
    photographs = sorted(source.glob("*.jpg"))[:count] if source is not None and source.is_dir() else []
    random = np.random.default_rng(0)
    (folder / "val").mkdir(parents=True)
    (folder / "annotations").mkdir()
    images, boxes = [], []
    for i in range(count):
        if photographs:
            picture = Image.open(photographs[i % len(photographs)]).convert("RGB")
            picture = picture.transpose(Image.Transpose.ROTATE_90) if picture.height > picture.width else picture
        else:
            picture = Image.fromarray(random.integers(0, 256, (height // 8, width // 8, 3), dtype=np.uint8))
        picture.resize((width, height), Image.Resampling.BICUBIC).save(folder / "val" / f"{i}.jpg", quality=90)
        images.append({"id": i, "file_name": f"{i}.jpg", "height": height, "width": width})
        for _ in range(8):
            x, y = random.integers(0, width // 2), random.integers(0, height // 2)
            box = [int(x), int(y), width // 3, height // 3]
            record = {"id": len(boxes) + 1, "image_id": i, "category_id": 1, "bbox": box, "iscrowd": 0}
            boxes.append({**record, "area": box[2] * box[3]})
    content = {"images": images, "annotations": boxes, "categories": [{"id": 1, "name": "thing"}]}
    for name in ("train", "val"):
        (folder / "annotations" / f"instances_{name}.json").write_text(json.dumps(content))


class Recipe(Dataset[tuple[Tensor, dict[str, Any]]]):
    """Images and targets as a published recipe makes them; ``flip`` is the probability of a flip."""

    def __init__(self, data: COCO, flip: float) -> None:
        self.own, self.flip = data.dataset("val"), flip
        self.own.resize = None

    def __len__(self) -> int:
        return len(self.own)

    def opened(self, index: int) -> Image.Image:
        """An image decoded by Pillow."""
        a = self.own.annotations
        return Image.open(a.root / str(a.file_names[index])).convert("RGB")


class Torchvision(Recipe):
    """Decoding by Pillow, then the transforms of references/detection/presets.py with its tensor backend."""

    def __getitem__(self, index: int) -> tuple[Tensor, dict[str, Any]]:
        image = self.opened(index)
        target: dict[str, Any] = {**self.own.target(index)}
        frame = (image.height, image.width)
        target["boxes"] = tv_tensors.BoundingBoxes(  # type: ignore[call-overload]
            target["boxes"], format="XYXY", canvas_size=frame
        )
        steps = v2.Compose(
            [
                v2.ToImage(),
                v2.RandomHorizontalFlip(self.flip),
                v2.ToDtype(torch.float32, scale=True),
                v2.ToPureTensor(),
            ]
        )
        return steps(image, target)


class Detectron(Recipe):
    """Decoding and resizing by Pillow, flips of arrays, channels first."""

    def __init__(self, data: COCO, flip: float, sizes: tuple[int, int]) -> None:
        super().__init__(data, flip)
        self.sizes = sizes

    def __getitem__(self, index: int) -> tuple[Tensor, dict[str, Any]]:
        image = self.opened(index)
        target: dict[str, Any] = {**self.own.target(index)}
        new = resized_size((image.height, image.width), *self.sizes)
        x, y = new[1] / image.width, new[0] / image.height
        pixels = np.asarray(image.resize((new[1], new[0]), Image.Resampling.BILINEAR))
        boxes = target["boxes"].numpy() * np.array([x, y, x, y], dtype=np.float32)
        if np.random.rand() < self.flip:
            pixels = np.flip(pixels, 1)
            boxes[:, [0, 2]] = new[1] - boxes[:, [2, 0]]
        target["boxes"] = torch.from_numpy(boxes)
        return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1))), target


def columns(samples: list[Any]) -> tuple[Any, ...]:
    """The collate function of both recipes: no copies in the worker."""
    return tuple(zip(*samples, strict=True))


def ways_of(root: Path, options: argparse.Namespace, workers: int, flip: float) -> Ways:
    """The three loaders."""
    sizes = (options.min_size, options.max_size)
    loader = Loader(options.batch, num_workers=workers, pin_memory=False)
    resize = Resize("shortest_side", *sizes)
    data = COCO(str(root), val="val", loader=loader, augment=Augment(flip) if flip else None, resize=resize)
    dataset = data.dataset("val", augmented=True)
    ours = data._load(dataset, dataset.annotations.sizes, False, collate)
    common = {"batch_size": options.batch, "num_workers": workers, "collate_fn": columns}
    common |= {"worker_init_fn": start_worker, "persistent_workers": workers > 0}
    inside = GeneralizedRCNNTransform(*sizes, list(FORMAT.mean), list(FORMAT.std))
    mean, std = (torch.tensor(v)[:, None, None] * 255 for v in (FORMAT.mean, FORMAT.std))

    def own(batch: Any) -> Tensor:
        return to_batch(batch[0], FORMAT, *sizes, 32, contents_of(batch[1])).tensors

    def reference(batch: Any) -> Tensor:
        return inside(list(batch[0]), [dict(t) for t in batch[1]])[0].tensors

    def mapper(batch: Any) -> Tensor:
        images = [(image - mean) / std for image in batch[0]]
        height, width = (-(-max(i.shape[k] for i in images) // 32) * 32 for k in (1, 2))
        out = images[0].new_zeros((len(images), 3, height, width))
        for row, image in zip(out, images, strict=True):
            row[:, : image.shape[1], : image.shape[2]] = image
        return out

    return {
        "detpipe": (ours, own),
        "torchvision": (DataLoader(Torchvision(data, flip), **common), reference),
        "detectron2 recipe": (DataLoader(Detectron(data, flip, sizes), **common), mapper),
    }


def epoch(way: tuple[Any, Callable[[Any], Tensor]]) -> float:
    """Images a second over an epoch."""
    start, images = time.perf_counter(), 0
    for batch in way[0]:
        images += len(way[1](batch))
    return images / (time.perf_counter() - start)


def quartiles(values: list[float]) -> str:
    """The median, and the quartiles around it."""
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return f"{middle:.1f} ({low:.1f} to {high:.1f})"


def measure(root: Path, size: tuple[int, int], options: argparse.Namespace) -> Iterator[str]:
    """Rows of the table of whole loaders."""
    plain = {name: torch.cat([way[1](b) for b in way[0]]) for name, way in ways_of(root, options, 0, 0.0).items()}
    spread = torch.tensor(FORMAT.std)[:, None, None] * 255
    for name in list(plain)[1:]:
        difference = ((plain[name] - plain["detpipe"]) * spread).abs().mean()
        yield f"    batches {list(plain[name].shape[1:])}; {name}: {difference:.2f} gray levels from detpipe on average"
    del plain
    for workers in options.workers:
        ways = ways_of(root, options, workers, 0.5)
        for way in ways.values():
            epoch(way)  # workers start, files come into memory
        rates: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(options.turns):
            for name, way in ways.items():
                rates[name].append(epoch(way))
        for name, found in rates.items():
            ratios = [a / b for a, b in zip(rates["detpipe"], found, strict=True)]
            yield f"| {size[0]} x {size[1]} | {workers} | {name} | {quartiles(found)} | {statistics.median(ratios):.2f} |"


def stages(root: Path, size: tuple[int, int], options: argparse.Namespace) -> Iterator[str]:
    """Milliseconds an image of single steps, in this process: decoding, the rest of the transforms, collating."""
    data = ways_of(root, options, 0, 0.5)
    dataset, reference, mapper = (data[name][0].dataset for name in data)
    goal = dataset.resize.size_to_read(size, options.min_size)
    paths = [dataset.annotations.root / str(name) for name in dataset.annotations.file_names]
    indices = range(len(paths))
    samples = [dataset[0, i] for i in indices]
    steps: dict[str, Callable[[int], Any]] = {
        "decode: Pillow, whole": reference.opened,
        "decode: detpipe, whole": lambda i: read_image(paths[i]),
        "decode: detpipe, as much as is wanted": lambda i: read_reduced(paths[i], goal),
        "decode and transform: detpipe": lambda i: dataset[0, i],
        "decode and transform: torchvision (no resize)": lambda i: reference[i],
        "decode and transform: detectron2 recipe": lambda i: mapper[i],
        "collate: detpipe, into shared memory": lambda i: pack([samples[i][0]], [samples[i][1]]),
    }
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(options.turns):
        for name, step in steps.items():
            start = time.perf_counter()
            for i in indices:
                step(i)
            times[name].append((time.perf_counter() - start) / len(indices) * 1e3)
    for name, found in times.items():
        yield f"| {size[0]} x {size[1]} | {name} | {quartiles(found)} | {1e3 / statistics.median(found):.0f} |"


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, default=None, help="folder of JPEGs to enlarge; smooth noise by default")
    parser.add_argument(
        "--sizes", nargs="+", default=["480x640", "1200x1600", "2400x3200"], help="HEIGHTxWIDTH of files"
    )
    parser.add_argument("--count", type=int, default=16, help="files, each read once a turn")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--min-size", type=int, default=800)
    parser.add_argument("--max-size", type=int, default=1333)
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}, {platform.processor() or platform.machine()}, shorter side {options.min_size}")
    print(
        "| file | workers | way | images/s, median (quartiles) | detpipe is faster by |\n| --- | --- | --- | --- | --- |"
    )
    with tempfile.TemporaryDirectory() as folder:
        for text in options.sizes:
            height, width = (int(side) for side in text.split("x"))
            root = Path(folder) / text
            make_files(root, (height, width), options.count, options.images)
            for part in (measure, stages):
                for row in part(root, (height, width), options):
                    print(row, flush=True)


if __name__ == "__main__":
    main()

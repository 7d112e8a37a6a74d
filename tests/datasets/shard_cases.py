"""Small data sets and their shards."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from detpipe.datasets import COCO, Augment, DetectionData, Loader, Shards
from detpipe.datasets.shards.index import KEYS
from detpipe.datasets.shards.write import Made, Sharding, make_shards
from detpipe.types import Annotations

from .builders import annotations, coco_content, write_coco

SEVEN = ((40, 60), (60, 40), (40, 60), (30, 50), (40, 60), (60, 40), (40, 60))
SIZES = (*SEVEN, (30, 50), (40, 60), (60, 40), (40, 60))
AUGMENT = Augment(0.5, (0.5, 2.0), 0.5, 0.5)


def files_in(root: Path, workers: int = 0, batch_size: int = 3, sizes: Any = SIZES, **changes: Any) -> COCO:
    """Eleven images in COCO layout, ids from 10 on, all but two without boxes; category ids 1, 7, 90."""
    if not (root / "train").exists():
        write_coco(root, coco_content(sizes), "train")
        write_coco(root, coco_content(sizes), "val")
    loader = Loader(batch_size=batch_size, num_workers=workers)
    return COCO(str(root), "train", "val", **{"augment": AUGMENT, "loader": loader, **changes})


def digest(batch: tuple[list, list]) -> str:
    total = hashlib.sha256()
    for image, target in zip(*batch, strict=True):
        total.update(image.numpy().tobytes())
        for name in sorted(target):
            value = target[name]
            total.update(name.encode() + (value.numpy().tobytes() if torch.is_tensor(value) else str(value).encode()))
    return total.hexdigest()


def hashes(data: DetectionData, epochs: int = 2) -> list[list[str]]:
    """Of the training batches of some epochs."""
    loader = data.train_dataloader()
    result = []
    for epoch in range(epochs):
        loader.batch_sampler.set_epoch(epoch)  # type: ignore[union-attr]
        result.append([digest(batch) for batch in loader])
    return result


def pack(data: COCO, root: Path, images_per_shard: int | None = 2, **changes: Any) -> Path:
    """Shards of both splits."""
    for split in ("train", "val"):
        key = next(name for name, function in KEYS.items() if function is data.image_key)
        make_shards(
            data.annotations(split), root / split, split, key, Sharding(images_per_shard=images_per_shard), **changes
        )
    return root


def shards_in(root: Path, workers: int = 0, batch_size: int = 3, **changes: Any) -> Shards:
    """The shards of :func:`pack`."""
    loader = Loader(batch_size=batch_size, num_workers=workers)
    return Shards(str(root), loader=loader, **{"augment": AUGMENT, **changes})


def tiny_annotations(root: Path, count: int, seed: int = 0) -> Annotations:
    """Images of a few pixels, of four sizes, with zero to three boxes."""
    random = np.random.default_rng(seed)
    root.mkdir(parents=True, exist_ok=True)
    sizes = np.array([(8, 12), (12, 8), (9, 9), (8, 10)], dtype=np.int32)[random.integers(4, size=count)]
    names = [f"{row:03d}.png" for row in range(count)]
    for row, (name, (height, width)) in enumerate(zip(names, sizes.tolist(), strict=True)):
        Image.fromarray(np.full((height, width, 3), row % 256, np.uint8)).save(root / name)
    boxes_of = random.integers(4, size=count)
    B = int(boxes_of.sum())
    corner = random.uniform(0, 3, (B, 2))
    boxes = np.concatenate([corner, corner + random.uniform(1, 4, (B, 2))], axis=1)
    return annotations(
        *(root, boxes, np.concatenate([[0], np.cumsum(boxes_of)]), sizes, ("cat", "dog", "owl")),
        file_names=np.array(names, dtype=np.str_),
        image_ids=random.permutation(10 * count)[:count].astype(np.int64),
        labels=random.integers(1, 4, B),
        iscrowd=random.random(B) < 0.2,
        difficult=random.random(B) < 0.2,
        area=random.uniform(0.5, 9, B),
        category_ids=(1, 7, 90),
        counts={"images read": count, "images used": count, "boxes read": B, "boxes used": B},
    )


def tiny_coco(root: Path, count: int) -> Path:
    """The same in COCO layout, which says the sizes of images without looking at them."""
    a = tiny_annotations(root / "train", count)
    content = coco_content()
    content["images"] = [
        {"id": int(key), "file_name": str(name), "height": int(height), "width": int(width)}
        for key, name, (height, width) in zip(a.image_ids, a.file_names, a.sizes, strict=True)
    ]
    image_of = np.repeat(a.image_ids, np.diff(a.offsets)).tolist()
    content["annotations"] = [
        {"id": b, "image_id": image_of[b], "category_id": 7, "bbox": [1, 1, 3, 4], "iscrowd": 0, "area": 12}
        for b in range(len(a.boxes))
    ]
    (root / "annotations").mkdir()
    (root / "annotations" / "instances_train.json").write_text(json.dumps(content))
    return root


def tiny_shards(root: Path, count: int, images_per_shard: int, **changes: Any) -> Made:
    """Shards of :func:`tiny_annotations`, in ``root/train`` and, the same, ``root/val``."""
    a = tiny_annotations(root / "images", count)
    made = [
        make_shards(a, root / "shards" / split, split, sharding=Sharding(images_per_shard=images_per_shard, **changes))
        for split in ("train", "val")
    ]
    return made[0]

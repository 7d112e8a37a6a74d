"""Draws what each augmentation does to drawn scenes and their boxes: docs/augmentation.png.

    python docs/draw_augmentation.py

The scenes hold disks, stars and triangles whose outlines are known, so that copy-paste has masks.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw

from detpipe.datasets import (
    COCO,
    Augment,
    Combine,
    CopyPaste,
    Degrade,
    DetectionDataset,
    MixUp,
    Mosaic,
    Photometric,
    SafeCrop,
    Transform,
)
from detpipe.pictures.visualize import contact_sheet, save_png

NAMES = ("disk", "star", "triangle")
SIZES = ((180, 240), (240, 180), (180, 260), (200, 200), (170, 240), (220, 200))  # height, width
PANELS: tuple[tuple[str, Augment, int], ...] = (  # caption, augmentation, seed
    ("as in its file", Augment(flip=0), 0),
    ("flip", Augment(flip=1.0), 0),
    ("vertical_flip", Augment(flip=0, vertical_flip=1.0), 0),
    ("scale_jitter 1.5", Augment(flip=0, scale_jitter=(1.5, 1.5)), 4),
    ("scale_jitter 0.6", Augment(flip=0, scale_jitter=(0.6, 0.6)), 1),
    ("crop", Augment(flip=0, crop=1.0), 5),
    ("safe_crop", Augment(flip=0, safe_crop=SafeCrop(p=1.0, scale=(0.5, 0.8))), 2),
    ("photometric", Augment(flip=0, photometric=Photometric(p=1.0, hue=0.1)), 1),
    ("degrade", Augment(flip=0, degrade=Degrade(1.0, 1.0, 1.0)), 1),
    ("transforms: Rotate", Augment(flip=0, transforms=(Transform("Rotate", {"limit": [20, 20], "p": 1.0}),)), 0),
    ("transforms: Perspective", Augment(flip=0, transforms=(Transform("Perspective", {"scale": [0.1, 0.15], "p": 1.0}),)), 0),
    ("combine.mosaic", Augment(flip=0, combine=Combine(mosaic=Mosaic(p=1.0))), 3),
    ("combine.mixup", Augment(flip=0, combine=Combine(mixup=MixUp(p=1.0))), 3),
    ("combine.copy_paste", Augment(flip=0, combine=Combine(copy_paste=CopyPaste(p=1.0, objects=1.0, scale=(0.7, 0.9)))), 2),
    (
        "mosaic, zoom, crop and colors",
        Augment(0.5, (0.8, 1.3), safe_crop=SafeCrop(p=1.0, scale=(0.6, 0.9)), photometric=Photometric(p=1.0),
                combine=Combine(mosaic=Mosaic(p=1.0))),
        6,
    ),
)  # fmt: skip


def outline(kind: int, x: float, y: float, radius: float, turn: float) -> list[tuple[float, float]]:
    """The corners of a shape: a disk of 40, a star of 10, a triangle of 3."""
    corners = (40, 10, 3)[kind]
    angles = turn + np.arange(corners) * 2 * np.pi / corners
    radii = radius * (np.where(np.arange(corners) % 2, 0.5, 1.0) if kind == 1 else np.ones(corners))
    return list(zip((x + radii * np.cos(angles)).tolist(), (y + radii * np.sin(angles)).tolist(), strict=True))


def write_scenes(root: Path) -> None:
    """Write the scenes in COCO layout."""
    random, images, annotations = np.random.default_rng(5), [], []
    (root / "train").mkdir()
    (root / "annotations").mkdir()
    for row, (height, width) in enumerate(SIZES):
        low, high = random.integers(150, 235, (2, 3))
        slope = np.linspace(0, 1, height)[:, None, None]
        picture = Image.fromarray(
            np.broadcast_to(low * (1 - slope) + high * slope, (height, width, 3)).astype(np.uint8)
        )
        pen = ImageDraw.Draw(picture)
        for k in range(3):
            x, y = width * (0.2 + 0.3 * k), height * random.uniform(0.3, 0.7)
            points = outline((row + k) % 3, x, y, min(height, width) * random.uniform(0.1, 0.2), random.uniform(0, 6))
            pen.polygon(points, fill=tuple(random.integers(10, 150, 3).tolist()))
            (x1, y1), (x2, y2) = np.min(points, axis=0).tolist(), np.max(points, axis=0).tolist()
            annotations.append(
                {"id": len(annotations) + 1, "image_id": row, "category_id": (row + k) % 3 + 1, "iscrowd": 0,
                 "bbox": [x1, y1, x2 - x1, y2 - y1], "segmentation": [np.ravel(points).tolist()]}
            )  # fmt: skip
        picture.save(root / "train" / f"{row}.png")
        images.append({"id": row, "file_name": f"{row}.png", "height": height, "width": width})
    categories = [{"id": key, "name": name} for key, name in enumerate(NAMES, start=1)]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (root / "annotations" / "instances_train.json").write_text(json.dumps(content))


def main() -> None:
    """Draw the page's picture."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", default=str(Path(__file__).with_name("augmentation.png")))
    output = parser.parse_args().output
    torch.set_num_threads(1)
    images, targets = [], []
    with tempfile.TemporaryDirectory() as folder:
        write_scenes(Path(folder))
        masked = COCO(folder, "train", "train", augment=PANELS[-2][1]).dataset("train", augmented=True).annotations
        for caption, augment, seed in PANELS:
            image, target = DetectionDataset(masked, augment, seed)[0, 0]
            images.append(image)
            targets.append({**target, "file_name": caption})
    save_png(output, contact_sheet(images, targets, NAMES, "What each key of augment does to one image", side=300))


if __name__ == "__main__":
    main()

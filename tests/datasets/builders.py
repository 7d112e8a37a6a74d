"""Small data sets on disk, sound unless a test spoils them."""

from __future__ import annotations

import json
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from detpipe.types import Annotations

SIZES = ((40, 60), (40, 60), (30, 50))  # height, width


def picture(height: int, width: int, seed: int = 0) -> Image.Image:
    """Smooth colors, so that JPEG keeps them."""
    rows, columns = np.mgrid[0:height, 0:width]
    channels = [
        columns * 255 // max(width - 1, 1),
        rows * 255 // max(height - 1, 1),
        np.full_like(rows, seed * 37 % 256),
    ]
    return Image.fromarray(np.stack(channels, axis=2).astype(np.uint8))


def png(size: tuple[int, int], bits: int, color: int, rows: bytes, more: bytes = b"") -> bytes:
    """A PNG by hand: height and width, bits a sample, color type, rows that begin with their filter, and one chunk more."""
    header = struct.pack(">IIBBBBB", *size[::-1], bits, color, 0, 0, 0)
    chunks = (b"IHDR" + header, more, b"IDAT" + zlib.compress(rows), b"IEND")
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk)) for chunk in chunks if chunk
    )


def coco_content(sizes: tuple[tuple[int, int], ...] = SIZES) -> dict[str, Any]:
    """Three images, the last without boxes; four boxes; category ids with gaps and not in order."""
    images = [
        {"id": 10 + i, "file_name": f"{i}.jpg", "height": height, "width": width}
        for i, (height, width) in enumerate(sizes)
    ]
    boxes = [(10, 7, [1, 2, 10, 20]), (11, 1, [5, 5, 20, 10]), (10, 90, [30.5, 10.25, 8, 9]), (11, 1, [0, 0, 60, 40])]
    annotations = [
        {"id": 100 + b, "image_id": image, "category_id": category, "bbox": box, "area": 50 + b, "iscrowd": 0}
        for b, (image, category, box) in enumerate(boxes)
    ]
    categories = [{"id": 7, "name": "dog"}, {"id": 90, "name": "owl"}, {"id": 1, "name": "cat"}]
    return {"images": images, "annotations": annotations, "categories": categories}


def write_coco(root: Path, content: dict[str, Any] | None = None, split: str = "train") -> tuple[Path, Path]:
    """Write annotations and the images that `coco_content` names; returns the file and the image folder."""
    content = coco_content() if content is None else content
    folder, path = root / split, root / "annotations" / f"instances_{split}.json"
    folder.mkdir(parents=True, exist_ok=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    for i, image in enumerate(coco_content()["images"] if content is None else content["images"]):
        name, height, width = image.get("file_name"), image.get("height"), image.get("width")
        if isinstance(name, str) and name.endswith(".jpg") and "/" not in name and height and width:
            picture(height, width, i).save(folder / name, quality=95)
    path.write_text(json.dumps(content))
    return path, folder


def voc_object(name: str = "cat", box: tuple[Any, ...] = (1, 1, 20, 10), difficult: Any = 0) -> str:
    corners = "".join(
        f"<{key}>{value}</{key}>" for key, value in zip(("xmin", "ymin", "xmax", "ymax"), box, strict=True)
    )
    flag = "" if difficult is None else f"<difficult>{difficult}</difficult>"
    return f"<object><name>{name}</name>{flag}<bndbox>{corners}</bndbox></object>"


def write_voc(
    root: Path,
    images: dict[str, list[str]] | None = None,
    split: str = "train",
    size: tuple[int, int] | None = (40, 60),
) -> Path:
    """Write a folder in VOC layout; ``images`` maps names to the XML of their objects."""
    images = {"a": [voc_object()], "b": [voc_object("dog", (3, 5, 60, 40)), voc_object()]} if images is None else images
    for folder in ("JPEGImages", "Annotations", "ImageSets/Main"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    for i, (stem, objects) in enumerate(images.items()):
        height, width = size or (40, 60)
        picture(height, width, i).save(root / "JPEGImages" / f"{stem}.jpg", quality=95)
        tag = f"<size><width>{width}</width><height>{height}</height><depth>3</depth></size>" if size else ""
        xml = f"<annotation><filename>wrong-name</filename>{tag}{''.join(objects)}</annotation>"
        (root / "Annotations" / f"{stem}.xml").write_text(xml)
    (root / "ImageSets" / "Main" / f"{split}.txt").write_text("".join(f"{stem}\n" for stem in images))
    return root


def write_yolo(root: Path, labels: dict[str, str | None] | None = None, split: str = "train", **changes: Any) -> Path:
    """Write a folder in YOLO layout; ``labels`` maps names to the text of their label files, None for no file."""
    labels = (
        {"a": "0 0.5 0.5 0.5 0.25\n", "b": "1 0.25 0.5 0.5 1\n0 0.5 0.5 1 1\n", "c": ""} if labels is None else labels
    )
    for folder in ("images", "labels"):
        (root / folder / split).mkdir(parents=True, exist_ok=True)
    for i, (stem, text) in enumerate(labels.items()):
        picture(40, 60, i).save(root / "images" / split / f"{stem}.jpg", quality=95)
        if text is not None:
            (root / "labels" / split / f"{stem}.txt").write_text(text)
    path = root / "data.yaml"
    known = json.loads(path.read_text()) if path.is_file() else {"names": ["cat", "dog"]}  # JSON is YAML
    path.write_text(json.dumps({**known, split: f"images/{split}", **changes}))
    return root


def annotations(
    root: Path, boxes: Any, offsets: Any, sizes: Any = None, class_names: tuple[str, ...] = ("cat",), **changes: Any
) -> Annotations:
    """Annotations that come from no file: ``boxes`` xyxy of labels that follow each other, of images ``0.jpg``, ``1.jpg`` ..."""
    xyxy = np.array(boxes, dtype=np.float64).reshape(-1, 4)
    B, count, K = len(xyxy), len(offsets) - 1, len(class_names)
    values = {
        "root": root,
        "file_names": np.array([f"{i}.jpg" for i in range(count)], dtype=np.str_),
        "image_ids": np.arange(1, count + 1),
        "sizes": np.array([(9, 9)] * count if sizes is None else sizes, dtype=np.int32).reshape(-1, 2),
        "offsets": np.array(offsets, dtype=np.int64),
        "boxes": xyxy,
        "labels": np.arange(B) % K + 1,
        "iscrowd": np.zeros(B, dtype=bool),
        "difficult": np.zeros(B, dtype=bool),
        "area": (xyxy[:, 2:] - xyxy[:, :2]).prod(1),
        "class_names": class_names,
        "category_ids": tuple(range(1, K + 1)),
    }
    return Annotations(**{**values, **changes})


HEADER = "file_name,x1,y1,x2,y2,label"


def write_csv(root: Path, rows: list[str] | None = None, header: str = HEADER, name: str = "annotations.csv") -> Path:
    """Write a table of boxes, and two images that its rows may name."""
    rows = ["a.jpg,1,2,11,22,dog", "a.jpg,30.5,10.25,38.5,19.25,cat", "b.jpg,,,,,"] if rows is None else rows
    root.mkdir(parents=True, exist_ok=True)
    for i, stem in enumerate("ab"):
        picture(40, 60, i).save(root / f"{stem}.jpg", quality=95)
    path = root / name
    path.write_text("\n".join([header, *rows]) + "\n")
    return path

"""Small data sets in COCO's format, in the folders and with the habits of labeling tools and hubs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .builders import picture

SIZE = (40, 60)  # height, width
SCENES = {  # image -> class and corners
    "a": [("ball", 10, 12, 40, 30)],
    "b 1": [("box", 5, 5, 30, 25), ("ball", 32, 4, 58, 38)],
    "c": [],
    "d": [("box", 20, 10, 55, 36)],
}
CLASSES = ("ball", "box")
HUB = {"train": ["a", "b 1"], "valid": ["c"], "test": ["d"]}
ALL = list(SCENES)


def content(stems: list[str], name: str = "{}.jpg", first: int = 1, root: str = "") -> dict[str, Any]:
    """An annotation file of some images; ``root`` is a category above all others."""
    categories = [{"id": first + k, "name": one, "supercategory": root or "none"} for k, one in enumerate(CLASSES)]
    if root:
        categories.insert(0, {"id": 0, "name": root, "supercategory": "none"})
    images = [{"id": k, "file_name": name.format(s), "width": SIZE[1], "height": SIZE[0]} for k, s in enumerate(stems)]
    boxes = [(k, *box) for k, stem in enumerate(stems) for box in SCENES[stem]]
    annotations = [
        {
            "id": n,
            "image_id": image,
            "category_id": first + CLASSES.index(label),
            "bbox": [x1, y1, x2 - x1, y2 - y1],
            "iscrowd": 0,
            "segmentation": [],
        }
        for n, (image, label, x1, y1, x2, y2) in enumerate(boxes)
    ]
    return {"info": {}, "licenses": [], "categories": categories, "images": images, "annotations": annotations}


def write(path: Path, what: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(what))


def pictures(folder: Path, stems: list[str]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for k, stem in enumerate(stems):
        picture(*SIZE, k).save(folder / f"{stem}.jpg")


def hub(root: Path) -> None:
    for split, stems in HUB.items():
        pictures(root / split, stems)
        write(root / split / "_annotations.coco.json", content(stems, root="things"))


def hub_in_a_folder(root: Path) -> None:
    hub(root / "export")


def official(root: Path, images: str = "{}") -> None:
    for split, stems in HUB.items():
        pictures(root / images.format(split), stems)
        write(root / "annotations" / f"instances_{split}.json", content(stems))
    write(root / "annotations" / "person_keypoints_train.json", content(["a"]))  # is not looked at


def tool(annotations: str, images: str, **habits: Any) -> Callable[[Path], None]:
    """One file of annotations and one folder of images."""

    def build(root: Path) -> None:
        pictures(root / images, ALL)
        write(root / annotations, content(ALL, **habits))

    return build


def shared_images(root: Path) -> None:
    pictures(root / "images", ALL)
    for split, stems in HUB.items():
        write(root / "annotations" / f"{split}.json", content(stems))


def folders_of_splits(root: Path) -> None:
    for split, stems in HUB.items():
        pictures(root / split / "data", stems)
        write(root / split / "labels.json", content(stems))


# name -> how it is written, and the images of its splits
LAYOUTS: dict[str, tuple[Callable[[Path], None], dict[str, list[str]]]] = {
    "official": (official, HUB),
    "official, in images": (lambda root: official(root, "images/{}"), HUB),
    "hub": (hub, HUB),
    "hub, in a folder": (hub_in_a_folder, HUB),
    "default": (tool("annotations/instances_default.json", "images/default"), {"default": ALL}),
    "result": (tool("result.json", "images", name="images\\{}.jpg", first=0), {"result": ALL}),
    "data": (tool("labels.json", "data"), {"data": ALL}),
    "beside": (tool("train/coco.json", "train"), {"train": ALL}),
    "at the top": (tool("train.json", "."), {"train": ALL}),
    "names with folders": (
        tool("train.json", "images/train", name="/".join(["images", "train", "{}.jpg"])),
        {"train": ALL},
    ),
    "folders that are not there": (tool("val.json", "images", name="job 7\\images\\{}.jpg"), {"val": ALL}),
    "images of all splits": (shared_images, HUB),
    "folders of splits": (folders_of_splits, HUB),
}

"""A synthetic annotation file of the size and the look of COCO's train2017, and an image folder of empty files for it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np

SHAPES = 5000  # different polygons, used again and again: making new ones would take longer than all measurements
CROWDS = 0.0118  # of the boxes: 10,114 of train2017's 860,001
EMPTY = 0.0087  # of the images: 1,021 of train2017's 118,287 have no box


def write_files(folder: Path, images: int, boxes: int, polygons: bool, seed: int = 0) -> tuple[Path, Path]:
    """Write an annotation file and its image folder.

    Ids have gaps, 80 categories have ids in 1..90, the fields are those of COCO in COCO's order. A polygon has the number of
    points that makes the file as large for each box as train2017's (some 510 bytes); a crowd has a run-length encoding.

    Args:
        folder: where to write; what is there is used again.
        images: how many.
        boxes: how many.
        polygons: whether boxes have a ``segmentation``.
        seed: of all draws.

    Returns:
        The annotation file and the image folder, whose files are empty: a loader only lists them.
    """
    path = folder / f"instances_{images}_{boxes}{'_polygons' if polygons else ''}.json"
    root = folder / f"images_{images}"
    generator = np.random.default_rng(seed)
    ids = np.sort(generator.choice(580_000 * max(1, images // 110_000 + 1), images, replace=False)) + 9
    names = [f"{key:012}.jpg" for key in ids.tolist()]
    if not root.is_dir():
        partial = folder / f"{root.name}.partial"
        partial.mkdir(parents=True, exist_ok=True)
        for name in names:
            (partial / name).touch()
        partial.rename(root)
    if not path.is_file():
        partial = path.with_suffix(".partial")
        _write_json(partial, ids, names, boxes, polygons, generator)
        partial.rename(path)
    return path, root


def _write_json(
    path: Path, ids: np.ndarray, names: list[str], boxes: int, polygons: bool, generator: np.random.Generator
) -> None:
    sizes = generator.integers(300, 641, (len(ids), 2))
    categories = np.sort(generator.choice(np.arange(1, 91), 80, replace=False)).tolist()
    with path.open("w") as file:
        licenses = [{"url": "http://creativecommons.org/licenses/by/2.0/", "id": i, "name": "Some"} for i in range(8)]
        file.write('{"info": {"description": "synthetic", "year": 2017}, "licenses": ' + json.dumps(licenses))
        file.write(', "images": [')
        for i, (key, name, (height, width)) in enumerate(zip(ids.tolist(), names, sizes.tolist(), strict=True)):
            file.write(
                f'{"," if i else ""}{{"license": 3,"file_name": "{name}",'
                f'"coco_url": "http://images.cocodataset.org/train2017/{name}","height": {height},"width": {width},'
                f'"date_captured": "2013-11-14 11:18:45","flickr_url": "http://farm9.staticflickr.com/8186/{key}_z.jpg",'
                f'"id": {key}}}'
            )
        file.write('],"annotations": [')
        for line in _annotations(ids, sizes, categories, boxes, polygons, generator):
            file.write(line)
        named = [{"supercategory": "thing", "id": key, "name": f"class {key}"} for key in categories]
        file.write('],"categories": ' + json.dumps(named) + "}")


def _annotations(
    ids: np.ndarray,
    sizes: np.ndarray,
    categories: list[int],
    boxes: int,
    polygons: bool,
    generator: np.random.Generator,
) -> Iterator[str]:
    """The text of each annotation."""
    usable = generator.random(len(ids)) >= EMPTY
    owner = generator.choice(np.flatnonzero(usable), boxes)
    corner = generator.random((boxes, 2)) * 0.7
    extent = 0.02 + generator.random((boxes, 2)) * 0.27
    scale = sizes[owner][:, ::-1]
    xywh = np.round(np.concatenate([corner * scale, extent * scale], axis=1), 2)
    category = generator.choice(categories, boxes).tolist()
    crowd = (generator.random(boxes) < CROWDS).tolist()
    shapes, runs = _shapes(generator)
    shape = generator.integers(0, SHAPES, boxes).tolist()
    keys = (np.cumsum(generator.integers(1, 4, boxes)) + 100).tolist()
    for b, (x, y, w, h) in enumerate(xywh.tolist()):
        i = int(owner[b])
        text = ""
        if polygons:
            height, width = sizes[i].tolist()
            rle = f'{{"counts": [{runs[shape[b]]}],"size": [{height},{width}]}}'
            text = f'"segmentation": {rle if crowd[b] else shapes[shape[b]]},'
        yield (
            f'{"," if b else ""}{{{text}"area": {w * h * 0.61},"iscrowd": {int(crowd[b])},"image_id": {ids[i]},'
            f'"bbox": [{x},{y},{w},{h}],"category_id": {category[b]},"id": {keys[b]}}}'
        )


def _shapes(generator: np.random.Generator) -> tuple[list[str], list[str]]:
    """Polygons and run lengths as text."""
    points = np.clip(generator.lognormal(2.9, 0.75, SHAPES), 4, 300).astype(int)
    polygons = []
    for count in points.tolist():
        parts = np.round(generator.random(2 * count) * 600, 2).tolist()
        half = 2 * (count // 3)
        both = count > 20 and generator.random() < 0.2  # some objects are seen in parts
        polygons.append(json.dumps([parts[:half], parts[half:]] if both else [parts], separators=(",", ":")))
    runs = [",".join(map(str, generator.integers(0, 500, 200).tolist())) for _ in range(SHAPES)]
    return polygons, runs

"""Writes COCO layout: ``annotations/instances_SPLIT.json`` and ``SPLIT/``.

VOC's ``difficult`` goes along as a field of that name, which COCO's own tools pass over.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from detpipe.datasets.formats.writers.placement import (
    Images,
    Names,
    Splits,
    Written,
    file_name_of,
    new_folder,
    number,
    rows_of,
    totals,
    transfer,
)
from detpipe.datasets.image_files import PLAIN_FILES, ImageFiles, image_paths
from detpipe.datasets.outlines import NO_OUTLINES, Outlines, outlines_of
from detpipe.types import Annotations


def write_coco(
    splits: Splits,
    folder: str | Path,
    images: Images = "copy",
    outlines: Outlines = NO_OUTLINES,
    source: ImageFiles = PLAIN_FILES,
) -> Written:
    """Write a data set in COCO layout.

    Args:
        splits: name -> annotations.
        folder: a new folder.
        images: ``"copy"``, ``"link"`` or ``"none"``: then the file names stay relative to the folder of the source.
        outlines: segmentations of the boxes.
        source: where the images are.

    Returns:
        What was written.

    Raises:
        DataError: the folder is there already, or images cannot be linked.
    """
    remarks: list[str] = []
    with new_folder(folder, splits) as out:
        (out / "annotations").mkdir()
        for split, a in splits.items():
            name = file_name_of(split)
            if images == "none":
                names = a.file_names.tolist()
                remarks.append(f"file names of {name} are relative to {a.root}")
            else:
                names = Names(flat=False).of(split, a)
                (out / name).mkdir()
            transfer(image_paths(a), [out / name / file_name for file_name in names], images, source)
            if list(a.category_ids) != sorted(a.category_ids):
                remarks.append(f"the classes of {name} are numbered by ascending category id, no longer in their order")
            path = out / "annotations" / f"instances_{name}.json"
            path.write_text(json.dumps(coco_content(a, names, outlines)), encoding="utf-8")
    return Written(Path(folder), tuple(map(file_name_of, splits)), *totals(splits), tuple(remarks))


def coco_content(annotations: Annotations, names: list[str], outlines: Outlines = NO_OUTLINES) -> dict[str, Any]:
    """What an annotation file holds.

    Args:
        annotations: of a split.
        names: [I] the file names to write.
        outlines: segmentations of the boxes.

    Returns:
        Its images, annotations, numbered from 1, and categories.
    """
    a = annotations
    images = [
        {"id": int(a.image_ids[i]), "file_name": name, "height": int(a.sizes[i, 0]), "width": int(a.sizes[i, 1])}
        for i, name in enumerate(names)
    ]
    boxes = []
    for i in range(len(a)):
        for b, outline in zip(rows_of(a, i), outlines_of(outlines, a, i), strict=True):
            x1, y1, x2, y2 = a.boxes[b].tolist()
            record = {
                "id": b + 1,
                "image_id": int(a.image_ids[i]),
                "category_id": a.category_ids[int(a.labels[b]) - 1],
                "bbox": [number(x1), number(y1), number(x2 - x1), number(y2 - y1)],
                "area": number(a.area[b]),
                "iscrowd": int(a.iscrowd[b]),
            }
            more: dict[str, Any] = {"difficult": 1} if a.difficult[b] else {}
            if outline is not None:
                more["segmentation"] = outline
            boxes.append(record | more)
    categories = [{"id": key, "name": name} for key, name in zip(a.category_ids, a.class_names, strict=True)]
    return {"images": images, "annotations": boxes, "categories": categories}

"""Outlines of objects for copy-paste: read from a COCO annotation file a second time, packed, and drawn as masks.

They are read only where they are asked for, and after the boxes: whatever reads, checks or caches boxes knows nothing of them. Each
record is matched with the box that it became; records that were left out match none.
"""

from __future__ import annotations

from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from detpipe.datasets.coco_segmentations import cover, from_polygons, whole_polygons, whole_runs
from detpipe.datasets.faults import SHOWN
from detpipe.errors import DataError
from detpipe.strict_json import load_json, shorten
from detpipe.types import Annotations, Segmentations

_SAME = 1e-3  # pixels between a box and its record: they are equal but for rounding

_Outline = tuple[list[npt.NDArray[np.float64]], npt.NDArray[np.int32]]  # polygons, counts


def read_segmentations(path: str | Path, annotations: Annotations) -> Segmentations:
    """Read the outlines of all boxes of a split.

    Args:
        path: the COCO annotation file that the split was read from.
        annotations: of the split.

    Returns:
        The outlines, in the order of the boxes.

    Raises:
        DataError: an object has no segmentation, or one that cannot be read; file, annotation and image are named.
    """
    records = matched_records(path, annotations)
    sizes: list[list[int]] = annotations.sizes.tolist()
    image = np.repeat(np.arange(len(annotations)), np.diff(annotations.offsets)).tolist()
    outlines: list[_Outline] = []
    faults: list[str] = []
    for b, record in enumerate(records):
        height, width = sizes[image[b]]
        try:
            outlines.append(_outline(record.get("segmentation"), (height, width)))
        except (ValueError, TypeError, KeyError, OverflowError) as error:
            faults.append(f"annotation id {record.get('id')} (image {annotations.file_names[image[b]]}): {error}")
    if faults:
        raise DataError(
            f"{path}: copy_paste needs the segmentation of every object, but {len(faults)} of {len(records)} have none that can be "
            f"read: {'; '.join(faults[:SHOWN])}; mend them, or set copy_paste to null"
        )
    return _packed(outlines)


def draw_masks(annotations: Annotations, index: int) -> npt.NDArray[np.bool_]:
    """Draw the objects of an image.

    Args:
        annotations: with segmentations.
        index: of the image.

    Returns:
        ``[G, H, W]``, a mask a box.

    Raises:
        ValueError: the annotations have no segmentations.
    """
    s = annotations.segmentations
    if s is None:
        raise ValueError("the annotations have no segmentations; read them with read_segmentations")
    height, width = annotations.sizes[index].tolist()
    first, last = annotations.offsets[index : index + 2].tolist()
    masks = np.zeros((last - first, height, width), dtype=bool)
    for b in range(first, last):
        if s.runs[b + 1] > s.runs[b]:
            masks[b - first] = cover(s.counts[s.runs[b] : s.runs[b + 1]], (height, width))
        else:
            parts = range(s.polygons[b], s.polygons[b + 1])
            polygons = [s.points[s.corners[p] : s.corners[p + 1]].ravel() for p in parts]
            masks[b - first] = from_polygons(polygons, (height, width))
    return masks


def matched_records(path: str | Path, annotations: Annotations) -> list[dict[str, Any]]:
    """Read the records that the boxes of a split were made of: of an image, both come in the order of the file.

    Args:
        path: the COCO annotation file that the split was read from, perhaps without faulty records.
        annotations: of the split.

    Returns:
        ``[B]``.

    Raises:
        DataError: the file is another one by now.
    """
    a = annotations
    rows = {key: row for row, key in enumerate(a.image_ids.tolist())}
    labels = {key: label for label, key in enumerate(a.category_ids, start=1)}
    sizes, ends = a.sizes.tolist(), a.offsets[1:].tolist()
    boxes, of_box = a.boxes.tolist(), a.labels.tolist()
    following: list[int] = a.offsets[:-1].tolist()  # the next box of each image that has no record yet
    found: list[dict[str, Any]] = [{}] * len(boxes)
    for record in load_json(Path(path))["annotations"]:
        key, category, bbox = (record.get(name) for name in ("image_id", "category_id", "bbox"))
        if type(key) is not int or type(category) is not int or key not in rows or not _is_box(bbox):
            continue
        row = rows[key]
        b = following[row]
        if b < ends[row] and labels.get(category) == of_box[b] and _is_same(bbox, sizes[row], boxes[b]):
            found[b] = record
            following[row] += 1
    if following != ends:
        raise DataError(f"{path}: its boxes are not those that were read before; it was changed meanwhile: start again")
    return found


def _is_box(bbox: Any) -> bool:
    return type(bbox) is list and len(bbox) == 4 and all(type(value) in (int, float) for value in bbox)


def _is_same(bbox: list[float], size: list[int], box: list[float]) -> bool:
    height, width = size
    x, y, w, h = bbox
    corners = (min(max(x, 0), width), min(max(y, 0), height), min(max(x + w, 0), width), min(max(y + h, 0), height))
    return all(abs(one - other) <= _SAME for one, other in zip(corners, box, strict=True))


def _outline(segmentation: Any, size: tuple[int, int]) -> _Outline:
    if not segmentation or not isinstance(segmentation, list | dict):
        raise ValueError(f"segmentation must be polygons, or counts and size, got {shorten(segmentation)}")
    if isinstance(segmentation, list):
        return whole_polygons(segmentation), np.zeros(0, dtype=np.int32)
    if list(segmentation["size"]) != list(size):
        raise ValueError(f"segmentation.size is {shorten(segmentation['size'])}, that of the image {list(size)}")
    return [], whole_runs(segmentation["counts"], size)


def _packed(outlines: list[_Outline]) -> Segmentations:
    polygons = list(chain.from_iterable(polygons for polygons, _ in outlines))
    runs = [counts for _, counts in outlines]
    return Segmentations(
        points=np.concatenate([np.zeros(0), *polygons]).astype(np.float32).reshape(-1, 2),
        corners=_offsets([len(polygon) // 2 for polygon in polygons]),
        polygons=_offsets([len(polygons) for polygons, _ in outlines]),
        counts=np.concatenate([np.zeros(0, dtype=np.int32), *runs]),
        runs=_offsets([len(counts) for counts in runs]),
    )


def _offsets(lengths: list[int]) -> npt.NDArray[np.int64]:
    return np.cumsum([0, *lengths], dtype=np.int64)

"""Outlines of objects as COCO has them, polygons and run lengths: read, checked, packed for copy-paste, drawn as masks.

Lin et al., "Microsoft COCO: Common Objects in Context", 2014, arXiv 1405.0312. Polygons are drawn by pycocotools. Run
lengths are decoded here, because a damaged one makes C code write beyond its memory.

A run-length encoding counts the pixels of an image column by column: background, object, background, and so on. Compressed, each
count is written in characters of 5 bits and a flag that more follow, from the third on as the difference to the last but one.

For copy-paste outlines are read only where they are asked for, from the annotation file a second time, and after the boxes:
whatever reads, checks or caches boxes knows nothing of them. Each record is matched with the box that it became; records that
were left out match none.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from detpipe.datasets.faults import SHOWN
from detpipe.support.errors import DataError
from detpipe.support.strict_json import load_json, shorten
from detpipe.types import Annotations, Segmentations

Mask = npt.NDArray[np.int32]  # [H, W] 0 background, 1..K classes

IGNORED = -1  # the value of pixels that do not count
_FARTHEST = 100_000  # pixels: a coordinate beyond is no coordinate
_SAME = 1e-3  # pixels between a box and its record: they are equal but for rounding


class Outline(NamedTuple):
    """Where an object is: polygons x, y, x, y, .., or else pixels of background, of the object, of background, and so on."""

    polygons: list[npt.NDArray[np.floating]]
    runs: npt.NDArray[np.int32]  # column by column

    def draw(self, size: tuple[int, int]) -> npt.NDArray[np.bool_]:
        """Draw what the run lengths or any of the polygons cover, in an image of this height and width: ``[H, W]``."""
        runs = self.runs if len(self.runs) else _covered(self.polygons, size)
        return np.repeat(np.arange(len(runs)) % 2 == 1, runs).reshape(size[::-1]).T


def read_outline(record: dict[str, Any], size: tuple[int, int], where: str = "") -> Outline:
    """Read and check the segmentation of an annotation.

    Args:
        record: as in the file.
        size: height and width of the image.
        where: what a message says behind the id of the annotation.

    Returns:
        The outline.

    Raises:
        DataError: it is neither polygons of at least 3 points nor run lengths of this image.
    """
    segmentation = record.get("segmentation")
    try:
        if not segmentation or not isinstance(segmentation, list | dict):
            raise ValueError("expected polygons, or counts and size")
        if isinstance(segmentation, list):
            return Outline([_polygon(points) for points in segmentation], np.zeros(0, dtype=np.int32))
        if list(segmentation["size"]) != list(size):
            found = shorten(segmentation["size"])
            raise ValueError(f"its size [height, width] is {found}, that of the image {list(size)}")
        return Outline([], _runs(segmentation["counts"], size[0] * size[1]))
    except (ValueError, TypeError, KeyError, OverflowError) as error:
        message = (
            f"annotation id {record.get('id')}{where}: segmentation {shorten(segmentation)} cannot be read ({error})"
        )
        raise DataError(message) from error


def _polygon(points: Any) -> npt.NDArray[np.float64]:
    polygon = np.array(points, dtype=np.float64)
    if polygon.ndim != 1 or len(polygon) < 6 or len(polygon) % 2 or not (np.abs(polygon) <= _FARTHEST).all():
        raise ValueError(f"a polygon is at least 3 points x, y, each within {_FARTHEST} pixels")
    return polygon


def _runs(counts: str | list[int], pixels: int) -> npt.NDArray[np.int32]:
    runs = np.array(run_lengths(counts) if isinstance(counts, str) else counts)
    if runs.ndim != 1 or runs.dtype.kind != "i" or (runs < 0).any() or runs.sum() != pixels:
        raise ValueError(f"counts must be whole numbers that sum up to the {pixels} pixels of the image")
    return runs.astype(np.int32)


def _covered(polygons: list[npt.NDArray[np.floating]], size: tuple[int, int]) -> npt.NDArray[np.int64]:
    """The run lengths of what polygons enclose."""
    from pycocotools import mask as drawing

    drawn: Any = drawing.merge(drawing.frPyObjects([one.tolist() for one in polygons], *size))
    return np.array(run_lengths(drawn["counts"].decode()))  # its own decoder warns under numpy 2


def run_lengths(text: str) -> list[int]:
    """Decode a compressed run-length encoding.

    Args:
        text: ``counts`` of a segmentation.

    Returns:
        Pixels of background, of the object, of background, and so on.

    Raises:
        ValueError: characters that are none of it, or an end in the middle of a count.

    Example:
        >>> run_lengths("52203")
        [5, 2, 2, 2, 5]
    """
    counts: list[int] = []
    value = bits = 0
    for character in text:
        code = ord(character) - 48
        if not 0 <= code < 64 or bits > 40:
            raise ValueError(f"{character!r} is no character of a run length")
        value |= (code & 31) << bits
        bits += 5
        if code & 32:  # more follow
            continue
        if code & 16:
            value -= 1 << bits
        counts.append(value + (counts[-2] if len(counts) > 2 else 0))
        value = bits = 0
    if bits:
        raise ValueError("it ends in the middle of a run length")
    return counts


def coco_mask(records: Sequence[dict[str, Any]], size: tuple[int, int], labels: dict[int, int]) -> Mask:
    """Draw the segmentations of an image, smaller objects over larger ones; what only a crowd region covers is ignored.

    Args:
        records: its annotations as in the file, with ``id``, ``category_id``, ``segmentation`` and ``iscrowd``.
        size: height and width of the image.
        labels: category id -> 1..K.

    Returns:
        ``[H, W]``.

    Raises:
        DataError: a segmentation or category that cannot be read; the annotation is named.
    """
    drawn = []
    for record in records:
        if record.get("category_id") not in labels:
            raise DataError(f"annotation id {record.get('id')}: category_id {record.get('category_id')} is not known")
        crowd = bool(record.get("iscrowd", 0))
        pixels = read_outline(record, size).draw(size)
        drawn.append((not crowd, -int(pixels.sum()), pixels, IGNORED if crowd else labels[record["category_id"]]))
    mask = np.zeros(size, np.int32)
    for _, _, pixels, label in sorted(drawn, key=lambda one: one[:2]):
        mask[pixels] = label
    return mask


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
    outlines: list[Outline] = []
    faults: list[str] = []
    for i, record in zip(image, records, strict=True):
        height, width = sizes[i]
        try:
            outlines.append(read_outline(record, (height, width), f" (image {annotations.file_names[i]})"))
        except DataError as error:
            faults.append(str(error))
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
        parts = range(s.polygons[b], s.polygons[b + 1])
        polygons = [s.points[s.corners[p] : s.corners[p + 1]].ravel() for p in parts]
        masks[b - first] = Outline(polygons, s.counts[s.runs[b] : s.runs[b + 1]]).draw((height, width))
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


def _packed(outlines: list[Outline]) -> Segmentations:
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

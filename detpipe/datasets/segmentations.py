"""Outlines of objects as COCO has them, polygons and run lengths: checked and drawn as masks.

Lin et al., "Microsoft COCO: Common Objects in Context", 2014, arXiv 1405.0312. Polygons are drawn by pycocotools. Run
lengths are decoded here, because a damaged one makes C code write beyond its memory.

A run-length encoding counts the pixels of an image column by column: background, object, background, and so on. Compressed, each
count is written in characters of 5 bits and a flag that more follow, from the third on as the difference to the last but one.
"""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from detpipe.datasets.faults import SHOWN
from detpipe.support.errors import DataError
from detpipe.support.strict_json import shorten
from detpipe.types import Annotations

Mask = npt.NDArray[np.int32]  # [H, W] 0 background, 1..K classes

IGNORED = -1  # the value of pixels that do not count
_FARTHEST = 100_000  # pixels: a coordinate beyond is no coordinate


def draw_masks(annotations: Annotations, index: int) -> npt.NDArray[np.bool_]:
    """Draw the objects of an image: ``[G, H, W]``, a mask a box.

    A ValueError if the annotations have no segmentations; a DataError names file, annotation and image of one that cannot be
    read.
    """
    if annotations.segmentations is None:
        raise ValueError("the annotations have no segmentations")
    height, width = annotations.sizes[index].tolist()
    rows = annotations.rows_of(index)
    masks = np.zeros((len(rows), height, width), dtype=bool)
    for mask, b in zip(masks, rows, strict=True):
        try:
            runs = _read(annotations, index, b, draw=True)
        except DataError as error:
            raise DataError(f"{annotations.segmentations.source}: {error}") from error
        mask[:] = np.repeat(np.arange(len(runs)) % 2 == 1, runs).reshape(width, height).T
    return masks


def draw_classes(annotations: Annotations, index: int) -> Mask:
    """Draw the objects of an image as ``[H, W]``, smaller ones over larger ones; what only a crowd region covers is ignored.

    Errors are those of `draw_masks`.
    """
    a, masks = annotations, draw_masks(annotations, index)
    rows = slice(*a.offsets[index : index + 2].tolist())
    crowd = a.iscrowd[rows]
    classes = np.zeros(masks.shape[1:], np.int32)
    for g in np.lexsort((-masks.sum((1, 2)), ~crowd)).tolist():  # crowds first
        classes[masks[g]] = IGNORED if crowd[g] else a.labels[rows][g]
    return classes


def check_segmentations(annotations: Annotations) -> None:
    """Check that every object has an outline that can be drawn, as copy-paste needs it.

    A DataError names file, annotation and image of those that have none, or one that cannot be read.
    """
    if annotations.segmentations is None:
        raise DataError(
            f"{annotations.root}: augment.combine.copy_paste needs instance masks, and the annotations have none; use data in "
            "COCO layout with segmentations, or YOLO's with polygons, or set it to null"
        )
    faults: list[str] = []
    for b, i in enumerate(annotations.box_image.tolist()):
        try:
            _read(annotations, i, b, draw=False)
        except DataError as error:
            faults.append(str(error))
    if faults:
        raise DataError(
            f"{annotations.segmentations.source}: copy_paste needs the segmentation of every object; {len(faults)} of "
            f"{len(annotations.boxes)} have none that can be read: {'; '.join(faults[:SHOWN])}; mend them, or set it to null"
        )


def _read(annotations: Annotations, image: int, box: int, draw: bool) -> list[int]:
    """The run lengths of what an outline covers; of polygons only if they are to be drawn."""
    outlines = annotations.segmentations
    assert outlines is not None
    segmentation = msgspec.json.decode(outlines[box] or b"null")
    height, width = annotations.sizes[image].tolist()
    try:
        return _run_lengths(segmentation, (height, width), draw)
    except (ValueError, TypeError, KeyError, OverflowError) as error:
        raise DataError(
            f"annotation id {outlines.ids[box]} (image {annotations.file_names[image]}): segmentation {shorten(segmentation)} "
            f"cannot be read ({error})"
        ) from error


def _run_lengths(segmentation: Any, size: tuple[int, int], draw: bool) -> list[int]:
    if not segmentation or not isinstance(segmentation, list | dict):
        raise ValueError("expected polygons, or counts and size")
    if isinstance(segmentation, list):
        for points in segmentation:
            polygon = np.array(points, dtype=np.float64)
            if polygon.ndim != 1 or len(polygon) < 6 or len(polygon) % 2 or not (np.abs(polygon) <= _FARTHEST).all():
                raise ValueError(f"a polygon is at least 3 points x, y, each within {_FARTHEST} pixels")
        return _covered(segmentation, size) if draw else []
    if list(segmentation["size"]) != list(size):
        found = shorten(segmentation["size"])
        raise ValueError(f"its size [height, width] is {found}, that of the image {list(size)}")
    counts = segmentation["counts"]
    runs = np.array(run_lengths(counts) if isinstance(counts, str) else counts)
    if runs.ndim != 1 or runs.dtype.kind != "i" or (runs < 0).any() or runs.sum() != size[0] * size[1]:
        raise ValueError(f"counts must be whole numbers that sum up to the {size[0] * size[1]} pixels of the image")
    return runs.tolist()


def _covered(polygons: list[list[float]], size: tuple[int, int]) -> list[int]:
    from pycocotools import mask as drawing

    points: Any = [list(map(float, one)) for one in polygons]
    drawn: Any = drawing.merge(drawing.frPyObjects(points, *size))
    return run_lengths(drawn["counts"].decode())  # its own decoder warns under numpy 2


def run_lengths(text: str) -> list[int]:
    """Decode a compressed run-length encoding: pixels of background, of the object, of background, and so on.

    A ValueError for characters that are none of it, or an end in the middle of a count.

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

"""Segmentations of COCO, polygons and run lengths, drawn into one mask an image.

Lin et al., "Microsoft COCO: Common Objects in Context", 2014, arXiv 1405.0312. Polygons are drawn by
pycocotools. Run lengths are decoded here, because a damaged one makes C code write beyond its memory.

A run-length encoding counts the pixels of an image column by column: background, object, background, and so on. Compressed, each
count is written in characters of 5 bits and a flag that more follow, from the third on as the difference to the last but one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from detpipe.errors import DataError
from detpipe.strict_json import shorten

Mask = npt.NDArray[np.int32]  # [H, W] 0 background, 1..K classes

IGNORED = -1  # the value of pixels that do not count
_FARTHEST = 100_000  # pixels: a coordinate beyond is no coordinate


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
        pixels = _decode(record, size)
        drawn.append((not crowd, -int(pixels.sum()), pixels, IGNORED if crowd else labels[record["category_id"]]))
    mask = np.zeros(size, np.int32)
    for _, _, pixels, label in sorted(drawn, key=lambda one: one[:2]):
        mask[pixels] = label
    return mask


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


def _decode(record: dict[str, Any], size: tuple[int, int]) -> npt.NDArray[np.bool_]:
    """``[H, W]`` of one annotation."""
    segmentation: Any = record.get("segmentation")
    try:
        if isinstance(segmentation, dict):
            return from_runs(segmentation, size)
        if isinstance(segmentation, list) and segmentation:
            return from_polygons(segmentation, size)
        raise ValueError("expected polygons, or counts and size")
    except (ValueError, TypeError, KeyError, OverflowError) as error:
        name = f"annotation id {record.get('id')}"
        raise DataError(f"{name}: segmentation {shorten(segmentation)} cannot be read ({error})") from error


def from_runs(segmentation: dict[str, Any], size: tuple[int, int]) -> npt.NDArray[np.bool_]:
    """Decode a run-length encoding.

    Args:
        segmentation: ``counts``, text or whole numbers, and ``size``.
        size: height and width of the image.

    Returns:
        ``[H, W]``.

    Raises:
        ValueError: it is not of this size, or damaged.
    """
    if list(segmentation["size"]) != list(size):
        raise ValueError(f"its size [height, width] is {shorten(segmentation['size'])}, that of the image {list(size)}")
    return cover(whole_runs(segmentation["counts"], size), size)


def whole_runs(counts: str | list[int], size: tuple[int, int]) -> npt.NDArray[np.int32]:
    """The counts ``[W]`` of a run-length encoding.

    Args:
        counts: as in the file.
        size: height and width of the image.

    Returns:
        Pixels of background, of the object, of background, and so on, column by column.

    Raises:
        ValueError: they are no whole numbers of at least 0 that sum up to the pixels of the image.
    """
    runs = np.array(run_lengths(counts) if isinstance(counts, str) else counts)
    if runs.ndim != 1 or runs.dtype.kind != "i" or (runs < 0).any() or runs.sum() != size[0] * size[1]:
        raise ValueError(f"counts must be whole numbers that sum up to the {size[0] * size[1]} pixels of the image")
    return runs.astype(np.int32)


def cover(runs: npt.NDArray[np.integer], size: tuple[int, int]) -> npt.NDArray[np.bool_]:
    """Draw checked run lengths ``[W]`` as a mask ``[H, W]``."""
    return np.repeat(np.arange(len(runs)) % 2 == 1, runs).reshape(size[::-1]).T


def whole_polygons(polygons: list[Any]) -> list[npt.NDArray[np.float64]]:
    """Check polygons.

    Args:
        polygons: lists of numbers x, y, x, y, ...

    Returns:
        They as arrays.

    Raises:
        ValueError: one has fewer than 3 points, or a coordinate that is none.
    """
    points = [np.array(polygon, dtype=np.float64) for polygon in polygons]
    for one in points:
        if one.ndim != 1 or len(one) < 6 or len(one) % 2 or not (np.abs(one) <= _FARTHEST).all():
            raise ValueError(f"a polygon is at least 3 points x, y, each within {_FARTHEST} pixels")
    return points


def from_polygons(polygons: list[Any], size: tuple[int, int]) -> npt.NDArray[np.bool_]:
    """Draw polygons as pycocotools does.

    Args:
        polygons: as for :func:`whole_polygons`; what any of them encloses is covered.
        size: height and width of the image.

    Returns:
        ``[H, W]``.

    Raises:
        ValueError: one of them is none.
    """
    from pycocotools import mask as drawing

    points = whole_polygons(polygons)
    drawn: Any = drawing.merge(drawing.frPyObjects([one.tolist() for one in points], *size))
    return cover(np.array(run_lengths(drawn["counts"].decode())), size)  # its own decoder warns under numpy 2

"""What is wrong with the boxes and scores of one image, found for all boxes at once."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from detpipe.support.errors import DataError
from detpipe.support.strict_json import shorten

TOLERANCE = 1.0  # pixels that a box may reach beyond its image before it counts as one of another image or frame
Array = npt.NDArray[np.float64]


def read_boxes(boxes: Any, where: str) -> Array:
    """Take ``[P, 4]`` of any real type, or an empty list, as float64; a DataError that starts with ``where`` refuses the rest."""
    array = _numbers(boxes, f"{where}: boxes")
    if array.shape in ((0,), (0, 0)):
        return np.zeros((0, 4))
    if array.ndim != 2 or array.shape[1] != 4:
        raise DataError(f"{where}: boxes must be [P, 4], got shape {list(array.shape)}")
    return array


def read_scores(scores: Any, count: int, where: str) -> Array:
    """Take ``[P]`` of any real type as float64; a DataError that starts with ``where`` refuses the rest."""
    array = _numbers(scores, f"{where}: scores")
    if array.ndim != 1 or len(array) != count:
        raise DataError(f"{where}: {count} boxes need scores of shape [{count}], got shape {list(array.shape)}")
    return array


def read_entry(boxes: Any, scores: Any, where: str, size: tuple[int, int] | None = None) -> tuple[Array, Array]:
    """Take boxes and scores of one image that a store can hold; a DataError that starts with ``where`` names what is wrong."""
    numbers = read_boxes(boxes, where)
    values = read_scores(scores, len(numbers), where)
    for reason, rows in find_faults(numbers, values, size).items():
        row = int(np.flatnonzero(rows)[0])
        raise DataError(f"{where}: box {row} {explain(reason, numbers[row], float(values[row]), size)}")
    return numbers, values


def find_faults(boxes: Array, scores: Array, size: tuple[int, int] | None = None) -> dict[str, npt.NDArray[np.bool_]]:
    """Find the boxes ``[P, 4]`` xyxy that a store cannot hold, with a size (height, width) also those beyond the image.

    Reason -> ``[P]`` which boxes have it; each box counts for the first of its reasons.
    """
    limit = np.finfo(np.float32).max
    found = {
        "not finite": ~(np.abs(boxes) <= limit).all(axis=1),
        "negative size": (boxes[:, 2] < boxes[:, 0]) | (boxes[:, 3] < boxes[:, 1]),
        "score not finite": ~(np.abs(scores) <= limit),
    }
    if size is not None:
        found["outside the image"] = reaches_beyond(boxes, np.array(size, dtype=np.float64))
    seen = np.zeros(len(boxes), dtype=bool)
    for reason, rows in found.items():
        found[reason] = rows & ~seen
        seen |= rows
    return {reason: rows for reason, rows in found.items() if rows.any()}


def reaches_beyond(boxes: npt.NDArray[Any], sizes: npt.NDArray[Any]) -> npt.NDArray[np.bool_]:
    """Say which boxes ``[..., 4]`` reach more than `TOLERANCE` beyond images of sizes ``[..., 2]`` (height, width): ``[...]``."""
    beyond = (boxes[..., 2] > sizes[..., 1] + TOLERANCE) | (boxes[..., 3] > sizes[..., 0] + TOLERANCE)
    return beyond | (boxes[..., :2] < -TOLERANCE).any(axis=-1)


def explain(reason: str, box: Array, score: float, size: tuple[int, int] | None = None) -> str:
    """Say what is wrong with a box ``[4]`` for a reason of `find_faults`, with its values; follows the name of the box."""
    if reason == "score not finite":
        return f"has the score {score}: expected a finite number"
    text = f"is {box.tolist()} (x1, y1, x2, y2)"
    if reason == "not finite":
        return f"{text}: expected finite numbers"
    if reason == "negative size":
        side = "x2 is less than x1" if box[2] < box[0] else "y2 is less than y1"
        return f"{text}: {side}; are these another order of coordinates, or x, y, width, height?"
    height, width = size or (0, 0)
    return (
        f"{text}: it reaches beyond its image of height {height}, width {width}; "
        "are these boxes of another image, of a resized one, or with x and y swapped?"
    )


def as_array(values: Any) -> npt.NDArray[Any]:
    """Take a sequence, or an array of objects, such as rows, as one array; a ValueError where rows differ in length."""
    return np.asarray(values.tolist() if isinstance(values, np.ndarray) and values.dtype.hasobject else values)


def _numbers(values: Any, what: str) -> Array:
    try:
        array = as_array(values)
    except (ValueError, TypeError, RuntimeError) as error:
        raise DataError(f"{what} are no regular array of numbers ({str(error).splitlines()[0]})") from error
    if array.dtype.kind not in "fiu":
        raise DataError(f"{what} must be numbers, got {shorten(values)} of type {array.dtype}")
    with np.errstate(over="ignore", invalid="ignore"):
        return array.astype(np.float64)

"""The orders and origins in which programs write boxes, and the way from each to the one that this package uses.

The name of a convention says the order of the four numbers, then what they are:

- no digit: continuous pixel edges, the left edge of the image is 0 (this package, COCO, detectron2, mmdetection);
- ``0``: whole pixels counted from 0, the last one included (Fast R-CNN in Python);
- ``1``: whole pixels counted from 1, the last one included (MATLAB: selective search, Edge Boxes, PASCAL VOC).
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

CONVENTIONS = {
    "xyxy": "x1, y1, x2, y2; pixel edges",
    "xyxy0": "x1, y1, x2, y2; pixels counted from 0, the last one included",
    "xyxy1": "x1, y1, x2, y2; pixels counted from 1, the last one included",
    "yxyx": "y1, x1, y2, x2; pixel edges",
    "yxyx0": "y1, x1, y2, x2; pixels counted from 0, the last one included",
    "yxyx1": "y1, x1, y2, x2; pixels counted from 1, the last one included",
    "xywh": "x, y, width, height; x and y counted from 0",
    "xywh1": "x, y, width, height; x and y counted from 1",
}


def to_edges(boxes: npt.NDArray[np.float64], convention: str) -> npt.NDArray[np.float64]:
    """Turn boxes ``[P, 4]`` of a convention, a key of `CONVENTIONS`, into continuous pixel edges x1, y1, x2, y2.

    A ValueError if there is no such convention.

    Example:
        >>> to_edges(np.array([[1.0, 1.0, 10.0, 20.0]]), "yxyx1").tolist()
        [[0.0, 0.0, 20.0, 10.0]]
    """
    if convention not in CONVENTIONS:
        raise ValueError(f"boxes must be one of {', '.join(CONVENTIONS)}, got {convention!r}")
    edges = boxes[:, [1, 0, 3, 2]] if convention.startswith("yxyx") else boxes.copy()
    if convention.startswith("xywh"):
        with np.errstate(invalid="ignore", over="ignore"):
            edges[:, 2:] += edges[:, :2]
    if convention == "xywh1":
        edges -= 1
    elif convention.endswith("1"):
        edges[:, :2] -= 1
    elif convention.endswith("0"):
        edges[:, 2:] += 1
    return edges


def starts_before_first(boxes: npt.NDArray[np.float64], convention: str) -> npt.NDArray[np.bool_]:
    """Find boxes ``[P, 4]`` that start at 0 or less although pixels count from 1, so that the convention is another: ``[P]``."""
    if not convention.endswith("1"):
        return np.zeros(len(boxes), dtype=bool)
    return (boxes[:, 0] < 1) | (boxes[:, 1] < 1)

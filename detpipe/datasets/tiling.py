"""Large images cut into tiles, each an image of its own: where tiles lie, and what of the objects is in them.

Akyon, Altinuc and Temizel, "Slicing Aided Hyper Inference and fine-tuning", 2022, arXiv 2202.06934, section 3.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import product

import numpy as np
import numpy.typing as npt

from detpipe.support.errors import DataError
from detpipe.types import Annotations

View = tuple[int, int, int, int]  # x1, y1, x2, y2 in pixels of the whole image
_LEAST = 1.0  # pixel that is to be seen of each side of a box


@dataclass(frozen=True)
class Tiling:
    """How the images of a data set are cut into tiles.

    Args:
        size: of a tile, height and width in pixels; smaller images stay whole.
        overlap: share of a tile that the next one has too.
        visible: an object of which a tile holds at least this share is one of the tile, its box cut at the border; of others what
            is seen is ``difficult``, neither object nor background.
        empty: whether tiles without objects stay.

    Raises:
        ValueError: a size below 1, an overlap outside 0 to .9, or a share outside (0, 1].
    """

    size: int = 640
    overlap: float = 0.2
    visible: float = 0.4
    empty: bool = True

    def __post_init__(self) -> None:
        if self.size < 1 or not 0 <= self.overlap <= 0.9 or not 0 < self.visible <= 1:
            raise ValueError(f"tiles: expected size >= 1, overlap in 0 to .9 and visible in (0, 1], got {self}")

    def cut(self, annotations: Annotations) -> Annotations:
        """Cut all images of a split: the tiles are its images, numbered anew, and ``windows`` says where they lie in the files.

        A DataError where the annotations say for which classes each image was searched (LVIS).
        """
        if annotations.federation is not None:
            raise DataError(
                f"{annotations.root}: tiles of images that were searched for some classes only are not supported"
            )
        places = [self._of_image(annotations, row) for row in range(len(annotations))]
        rows = np.repeat(np.arange(len(places)), [len(windows) for windows, _ in places])
        views = np.array([view for windows, _ in places for view in windows], dtype=np.int32).reshape(-1, 4)
        parts = [part for _, parts in places for part in parts]
        boxes = np.concatenate([np.zeros(0, np.int64), *(part.rows for part in parts)])
        cut = np.concatenate([np.zeros((0, 4)), *(part.boxes for part in parts)])
        share = np.concatenate([np.zeros(0), *(part.share for part in parts)])
        return replace(
            annotations,
            file_names=annotations.file_names[rows],
            image_ids=np.arange(1, len(rows) + 1, dtype=np.int64),
            sizes=np.stack([views[:, 3] - views[:, 1], views[:, 2] - views[:, 0]], axis=1).astype(np.int32),
            offsets=np.cumsum([0, *(len(part.rows) for part in parts)], dtype=np.int64),
            boxes=cut,
            labels=annotations.labels[boxes],
            iscrowd=annotations.iscrowd[boxes],
            difficult=annotations.difficult[boxes] | (share < self.visible),
            area=annotations.area[boxes] * share,
            segmentations=None,
            windows=views,
        )

    def _of_image(self, annotations: Annotations, row: int) -> tuple[list[View], list[_Part]]:
        height, width = annotations.sizes[row].tolist()
        span = np.arange(annotations.offsets[row], annotations.offsets[row + 1])
        windows, parts = [], []
        for view in tile_views(height, width, self.size, self.overlap):
            part = _part(annotations.boxes, span, view)
            if self.empty or (part.share >= self.visible).any():
                windows.append(view)
                parts.append(part)
        return windows, parts


@dataclass(frozen=True)
class _Part:
    """The objects of a tile."""

    rows: npt.NDArray[np.int64]  # [G] of the boxes of the split
    boxes: npt.NDArray[np.float64]  # [G, 4] in pixels of the tile
    share: npt.NDArray[np.float64]  # [G] of each box that is seen


def _part(boxes: npt.NDArray[np.float64], span: npt.NDArray[np.int64], view: View) -> _Part:
    corner, limit = np.tile(view[:2], 2), np.tile(np.subtract(view[2:], view[:2]), 2)
    cut = (boxes[span] - corner).clip(0, limit)
    seen = ((cut[:, 2:] - cut[:, :2]) >= np.minimum(_LEAST, boxes[span, 2:] - boxes[span, :2])).all(1)
    span, cut = span[seen], cut[seen]
    share = (cut[:, 2:] - cut[:, :2]).prod(1) / (boxes[span, 2:] - boxes[span, :2]).prod(1)
    return _Part(span, cut, share)


def tile_views(height: int, width: int, size: int, overlap: float) -> list[View]:
    """Cut an image into tiles, row by row.

    Args:
        height: of the image.
        width: of the image.
        size: height and width of a tile; the image's where that is less.
        overlap: share of a tile that the next one has too, at least: the last one ends with the image.

    Returns:
        x1, y1, x2, y2 of each tile.

    Example:
        >>> tile_views(100, 150, 100, 0.2)
        [(0, 0, 100, 100), (50, 0, 150, 100)]
    """
    rows, columns = (_starts(side, size, overlap) for side in (height, width))
    return [(x, y, min(x + size, width), min(y + size, height)) for y, x in product(rows, columns)]


def _starts(side: int, size: int, overlap: float) -> list[int]:
    step = max(1, size - round(size * overlap))
    last = max(0, side - size)
    return [*range(0, last, step), last]

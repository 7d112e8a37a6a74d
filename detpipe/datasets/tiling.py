"""Large images cut into tiles, each an image of its own: where tiles lie, and what of the objects is in them.

Akyon, Altinuc and Temizel, "Slicing Aided Hyper Inference and fine-tuning", 2022, arXiv 2202.06934, section 3.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product

import numpy as np
import numpy.typing as npt

from detpipe.support.errors import DataError
from detpipe.types import Annotations

View = tuple[int, int, int, int]  # x1, y1, x2, y2 in pixels of the whole image
# its image and view, and of the objects in it [G] rows of the boxes, [G, 4] boxes in pixels of the tile, [G] shares that are seen
_Tile = tuple[int, View, npt.NDArray[np.int64], npt.NDArray[np.float64], npt.NDArray[np.float64]]
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
        tiles = [tile for row in range(len(annotations)) for tile in self._of_image(annotations, row)]
        rows = np.array([row for row, *_ in tiles], dtype=np.int64)
        views = np.array([view for _, view, *_ in tiles], dtype=np.int32).reshape(-1, 4)
        boxes = np.concatenate([np.zeros(0, np.int64), *(boxes for *_, boxes, _, _ in tiles)])
        share = np.concatenate([np.zeros(0), *(share for *_, share in tiles)])
        return replace(
            annotations,
            file_names=annotations.file_names[rows],
            image_ids=np.arange(1, len(rows) + 1, dtype=np.int64),
            sizes=(views[:, [3, 2]] - views[:, [1, 0]]).astype(np.int32),
            offsets=np.cumsum([0, *(len(boxes) for *_, boxes, _, _ in tiles)], dtype=np.int64),
            boxes=np.concatenate([np.zeros((0, 4)), *(cut for *_, cut, _ in tiles)]),
            labels=annotations.labels[boxes],
            iscrowd=annotations.iscrowd[boxes],
            difficult=annotations.difficult[boxes] | (share < self.visible),
            area=annotations.area[boxes] * share,
            segmentations=None,
            windows=views,
        )

    def _of_image(self, annotations: Annotations, row: int) -> Iterator[_Tile]:
        height, width = annotations.sizes[row].tolist()
        rows = np.array(annotations.rows_of(row), dtype=np.int64)
        whole = annotations.boxes[rows]
        sides = whole[:, 2:] - whole[:, :2]
        for view in tile_views(height, width, self.size, self.overlap):
            cut = (whole - np.tile(view[:2], 2)).clip(0, np.tile(np.subtract(view[2:], view[:2]), 2))
            left = cut[:, 2:] - cut[:, :2]
            seen = (left >= np.minimum(_LEAST, sides)).all(1)
            share = left[seen].prod(1) / sides[seen].prod(1)
            if self.empty or (share >= self.visible).any():
                yield row, view, rows[seen], cut[seen], share


def tile_views(height: int, width: int, size: int, overlap: float) -> list[View]:
    """Cut an image of a height and width into tiles of a size, or of its own where that is less: x1, y1, x2, y2, row by row.

    ``overlap`` is the share of a tile that the next one has too, at least: the last one ends with the image.

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

"""The fields of a COCO annotation file without any fault, one array for each, as they are read quickly and kept in a cache."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from detpipe.datasets.records import Records

Arrays = dict[str, np.ndarray]

_COLUMNS = ("image_ids", "sizes", "ids", "box_image", "xywh", "labels", "iscrowd", "difficult", "area")


@dataclass(frozen=True)
class CocoColumns:
    """What an annotation file says, every reference resolved; nothing of image files or geometry is checked yet.

    Images I, boxes B, classes K.
    """

    file_names: list[str]  # [I], none with a NUL
    image_ids: npt.NDArray[np.int64]  # [I] unique
    sizes: npt.NDArray[np.int64]  # [I, 2] height, width
    ids: npt.NDArray[np.int64]  # [B] unique
    box_image: npt.NDArray[np.int64]  # [B] the row of the image
    xywh: npt.NDArray[np.float64]  # [B, 4] x, y, width, height as in the file
    labels: npt.NDArray[np.int64]  # [B] in 1..K
    iscrowd: npt.NDArray[np.bool_]  # [B]
    difficult: npt.NDArray[np.bool_]  # [B]
    area: npt.NDArray[np.float64]  # [B]; NaN where the file has none
    class_names: tuple[str, ...]  # [K]
    category_ids: tuple[int, ...]  # [K] ascending

    def records(self, image_root: Path) -> Records:
        """What is left to check.

        Args:
            image_root: the folder that file names are relative to.

        Returns:
            The records, for :func:`~detpipe.datasets.records.build_annotations`.
        """
        return Records(
            root=image_root,
            folders=[image_root],
            file_names=self.file_names,
            image_ids=self.image_ids,
            sizes=self.sizes,
            box_image=self.box_image,
            boxes=np.concatenate([self.xywh[:, :2], self.xywh[:, :2] + self.xywh[:, 2:]], axis=1),
            labels=self.labels,
            iscrowd=self.iscrowd,
            difficult=self.difficult,
            area=self.area,
            class_names=self.class_names,
            category_ids=self.category_ids,
            name_box=self._name_box,
            images_read=len(self.file_names),
            boxes_read=len(self.ids),
        )

    def pack(self) -> Arrays:
        """Everything as arrays, for :meth:`unpack`."""
        arrays = {name: getattr(self, name) for name in _COLUMNS}
        classes = json.dumps([self.class_names, self.category_ids])
        return {**arrays, "file_names": _to_bytes("\0".join(self.file_names)), "classes": _to_bytes(classes)}

    @staticmethod
    def unpack(arrays: Arrays) -> CocoColumns:
        """The columns that were packed.

        Args:
            arrays: what :meth:`pack` returned.

        Returns:
            The columns.
        """
        class_names, category_ids = json.loads(_to_text(arrays["classes"]))
        return CocoColumns(
            **{name: arrays[name] for name in _COLUMNS},
            file_names=_to_text(arrays["file_names"]).split("\0"),
            class_names=tuple(class_names),
            category_ids=tuple(category_ids),
        )

    def _name_box(self, b: int) -> str:
        return f"annotation id {self.ids[b]} (image {self.file_names[self.box_image[b]]}): bbox {self.xywh[b].tolist()}"


def _to_bytes(text: str) -> npt.NDArray[np.uint8]:
    return np.frombuffer(text.encode(), dtype=np.uint8)


def _to_text(array: npt.NDArray[np.uint8]) -> str:
    return array.tobytes().decode()

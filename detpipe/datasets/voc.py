"""Data in VOC layout: the official VOCdevkit, several years together, or any folder laid out in the same way.

::

    root/                           or root/VOC2007/, for splits written "2007:trainval"
      JPEGImages/000005.jpg
      Annotations/000005.xml
      ImageSets/Main/trainval.txt   one image name a line, without suffix
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from detpipe.datasets.datamodule import DetectionData, Split
from detpipe.datasets.stored_proposals import voc_key
from detpipe.datasets.voc_xml import VOC_CLASSES, find_class_names, load_voc
from detpipe.errors import DataError
from detpipe.types import Annotations


@dataclass(frozen=True)
class VOCFormat:
    """How the XML files are to be understood.

    Args:
        class_names: the classes, in the order of their labels; null for the 20 of VOC; ``auto`` for those that occur in
            the training split, sorted, or those of ``detpipe.json`` in the root.
        one_based: true where pixels are counted from 1 and both ends are included, as in the official files: the box is
            ``[xmin - 1, ymin - 1, xmax, ymax]``; false where the file holds corner coordinates from 0, as many labeling
            tools write them: the box is ``[xmin, ymin, xmax, ymax]``.
        keep_difficult: whether difficult objects are kept, flagged, as neither positive nor negative; false drops them.
    """

    class_names: list[str] | Literal["auto"] | None = None
    one_based: bool = True
    keep_difficult: bool = True


_OFFICIAL = VOCFormat()


class VOC(DetectionData):
    """Detection data in VOC layout.

    Args:
        root: the folder with ``JPEGImages``, ``Annotations`` and ``ImageSets/Main``, or one that holds such folders, as
            VOCdevkit holds VOC2007 and VOC2012.
        train: the training split: a list in ``ImageSets/Main``, such as ``train``; ``2007:trainval`` is that of the
            folder VOC2007; a path that ends in ``.txt`` (relative to the root) is a list elsewhere; or several.
        val: the validation split, in the same way.
        test: the split for the final test, in the same way; none by default.
        format: how the XML files are to be understood: class names, counting from 0 or 1, difficult objects.
        common: what all data sets have: ``loader``, ``augment``, ``seed``, ``on_bad``, ``proposals`` and ``resize`` of
            :class:`~detpipe.datasets.datamodule.DetectionData`.
    """

    image_key = staticmethod(voc_key)

    def __init__(
        self,
        root: str,
        train: str | list[str] = "train",
        val: str | list[str] = "val",
        test: str | list[str] | None = None,
        format: VOCFormat = _OFFICIAL,
        **common: Any,
    ) -> None:
        super().__init__(**common)
        self.root = str(root)
        self.splits = {"train": train, "val": val, "test": test}
        self.format = format
        self._class_names: tuple[str, ...] | None = None

    def load(self, split: Split) -> Annotations:
        """Read the lists and XML files of a split."""
        lists = self.splits[split]
        if not lists:
            raise DataError(f"no {split} split: set the argument {split} to a list in ImageSets/Main, such as {split}")
        options = self.format
        return load_voc(self.root, lists, self._names(), options.one_based, options.keep_difficult, self.on_bad)

    def _names(self) -> tuple[str, ...]:
        """The class names of all splits, those of the training split for ``auto``."""
        if self._class_names is None:
            names = self.format.class_names
            if names == "auto":
                self._class_names = find_class_names(self.root, self.splits["train"] or [])
            else:
                self._class_names = VOC_CLASSES if names is None else tuple(names)
        return self._class_names

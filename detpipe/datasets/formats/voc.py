"""Data in VOC layout: the official VOCdevkit, several years together, or any folder with an XML file an image.

::

    root/                           or root/VOC2007/, for splits written "2007:trainval"
      JPEGImages/000005.jpg
      Annotations/000005.xml
      ImageSets/Main/trainval.txt   one image name a line

A split is a list of image names in ``ImageSets/Main``, of one folder or of several years. Where there are no lists, it is a folder
(``train``, ``valid``), or all images (``all``); XML files then lie beside their images, or in a sister folder of any name.

Coordinates. The official files count pixels from 1 and include both ends: ``one_based=True`` makes the continuous box
``[xmin - 1, ymin - 1, xmax, ymax]`` of them. Labeling tools that count from 0 write corner coordinates:
``one_based=False`` takes ``[xmin, ymin, xmax, ymax]`` as it is. Under both, xmax must be above xmin in the file.

What VOC has no place for stands in ``<detpipe>``: ``<image_id>`` below the annotation, ``<iscrowd>`` and ``<area>`` below an
object. Other readers pass over it.

Writing. Corners are written as the official files have them, counted from 1 with both ends included: ``xmin = x1 + 1``,
``xmax = x2``, with decimals where the box has some, as VOC 2011 and 2012 do. Where a box is not wider and higher than one pixel,
its corners would meet; then all are written as they are, counted from 0, and ``detpipe.json`` says so.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from xml.etree.ElementTree import Element, ElementTree, SubElement, indent

import numpy as np

from detpipe.datasets.datamodule import FolderData, Split
from detpipe.datasets.decode import IMAGE_SUFFIXES
from detpipe.datasets.faults import Faults, OnBad
from detpipe.datasets.formats import export
from detpipe.datasets.formats.class_list import ClassList, write_class_list
from detpipe.datasets.formats.export import Images, Splits, Written
from detpipe.datasets.formats.outline_files import write_outlines
from detpipe.datasets.formats.voc_folders import find_splits
from detpipe.datasets.formats.voc_xml import VOCSource
from detpipe.datasets.image_files import PLAIN_FILES, ImageFiles
from detpipe.datasets.stored_proposals import voc_key
from detpipe.support.errors import DataError
from detpipe.types import Annotations

ClassNames = Sequence[str] | Literal["auto"] | None
VOC_CLASSES = (
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow",
    "diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)  # fmt: skip


def load_voc(
    root: str | Path,
    split: str | Sequence[str],
    class_names: ClassNames = None,
    one_based: bool = True,
    keep_difficult: bool = True,
    on_bad: OnBad = "error",
    faults: Faults | None = None,
) -> Annotations:
    """Read one split of a data set in VOC layout and check it against its images.

    Images are numbered 1, 2, ... in the order of the split, skipped ones included; that number is the ``image_id``. The
    image of ``NAME.xml`` is ``NAME`` with any suffix of images, whatever the XML says, which only decides between several.

    Args:
        root: as of `VOC`.
        split: as the training split of `VOC`; several are read in turn.
        class_names: the classes of labels 1..K in order; None for the 20 of VOC; ``"auto"`` for those that ``detpipe.json``
            in the root lists, or else occur.
        one_based: as of `VOCFormat`.
        keep_difficult: whether difficult objects are kept, flagged; dropped ones are counted.
        on_bad: ``"error"`` refuses a split with any faulty record; ``"skip"`` leaves these records out and counts them.
        faults: takes all faults, in place of ``on_bad``.

    Returns:
        The images of the split. A DataError for anything wrong names file, object, field and value.
    """
    names = VOC_CLASSES if class_names is None else class_names
    return VOCSource(Path(root), split, faults or Faults(on_bad)).load(names, one_based, keep_difficult)


@dataclass(frozen=True)
class VOCFormat:
    """How the XML files are to be understood.

    Args:
        class_names: the classes, in the order of their labels; ``auto`` for those that occur in the training split, sorted, or
            those of ``detpipe.json`` in the root; null for the 20 of VOC, unless others occur: then as ``auto``.
        one_based: true where pixels are counted from 1 and both ends are included, as in the official files: the box is
            ``[xmin - 1, ymin - 1, xmax, ymax]``; false where the file holds corner coordinates from 0, as many labeling
            tools write them: the box is ``[xmin, ymin, xmax, ymax]``.
        keep_difficult: whether difficult objects are kept, flagged, as neither positive nor negative; false drops them.
    """

    class_names: list[str] | Literal["auto"] | None = None
    one_based: bool = True
    keep_difficult: bool = True


class VOC(FolderData):
    """Detection data in VOC layout.

    Args:
        root: the folder with ``JPEGImages``, ``Annotations`` and ``ImageSets/Main``, one that holds such folders, as
            VOCdevkit holds VOC2007 and VOC2012, or any folder with XML files that are called as its images.
        train: the training split: a list in ``ImageSets/Main``, such as ``train``; ``2007:trainval`` is that of the
            folder VOC2007; a path that ends in ``.txt`` (relative to the root) is a list elsewhere; without lists a folder such
            as ``train``, or ``all``; or several.
        val: the validation split, in the same way; ``val``, ``valid`` and ``validation`` are the same.
        format: how the XML files are to be understood: class names, counting from 0 or 1, difficult objects.
    """

    image_key = staticmethod(voc_key)

    def __init__(
        self,
        root: str,
        train: str | list[str] = "train",
        val: str | list[str] = "val",
        test: str | list[str] | None = None,
        format: VOCFormat = VOCFormat(),
        **common: Any,
    ) -> None:
        super().__init__(root, train, val, test, **common)
        self.format = format
        self._class_names: tuple[str, ...] | None = None
        self._sources: dict[Split, VOCSource] = {}

    def load(self, split: Split, faults: Faults | None = None) -> Annotations:
        """Read the lists and XML files of a split."""
        names, options = self._names(split), self.format
        opened = self._sources.pop("train" if self.splits[split] == self.splits["train"] else split, None)
        source = opened if opened is not None and faults is None else self._open(split, faults)
        return source.load(names, options.one_based, options.keep_difficult)

    def split_names(self) -> tuple[str, ...]:
        """The splits that the root holds."""
        return tuple(find_splits(Path(self.root))) if Path(self.root).is_dir() else ()

    def occurring(self) -> tuple[str, ...]:
        """The names of the objects of the training split, sorted; its XML files are parsed once, for these and for the boxes."""
        return self._training_source("train").occurring()

    def _open(self, split: Split, faults: Faults | None = None) -> VOCSource:
        return VOCSource(Path(self.root), self.source_of(split, "a list in ImageSets/Main"), faults or self.faults())

    def _names(self, split: Split) -> tuple[str, ...]:
        """The class names of all splits: those of the training split where they are not given."""
        names = self.format.class_names
        if names is not None and names != "auto":
            return tuple(names)
        if self._class_names is None:
            source = self._training_source(split)
            found = source.class_names()
            self._class_names = VOC_CLASSES if names is None and set(found) <= set(VOC_CLASSES) else found
        return self._class_names

    def _training_source(self, split: Split) -> VOCSource:
        """The training split, which names the classes; who evaluates another alone may lack it, where VOC's 20 are expected."""
        try:
            if "train" not in self._sources:
                self._sources["train"] = self._open("train")
        except DataError:
            if split == "train" or self.format.class_names == "auto":
                raise
            self._sources[split] = self._open(split)
            return self._sources[split]
        return self._sources["train"]


def write_voc(splits: Splits, folder: str | Path, images: Images = "copy", source: ImageFiles = PLAIN_FILES) -> Written:
    """Write a data set in VOC layout.

    The splits, name -> annotations, go into a new folder; ``images`` and ``source`` are those of
    :class:`~detpipe.datasets.formats.export.Export`. Corners count from 1, both ends included, if every box is larger than a
    pixel. A DataError if the folder is there already, the classes of splits differ, images have a suffix that is not looked for, or
    an image of two splits has other boxes in each.
    """
    names, ids = export.one_class_list(splits)
    export.check_suffixes(splits, IMAGE_SUFFIXES, "VOC")
    from_one = all((np.diff(a.boxes.reshape(-1, 2, 2), axis=1) > 1 + 1e-9).all() for a in splits.values())
    keep_ids, remarks = export.ids_are_kept(splits)
    if not from_one:
        remarks.append("corners count from 0 (boxes of a pixel or less): read them with one_based: false")
    with export.new_folder(folder, splits, images, source, flat=True) as made:
        made.remarks += remarks
        for part in ("JPEGImages", "Annotations", "ImageSets/Main"):
            (made.out / part).mkdir(parents=True)
        write_class_list(made.out, ClassList(names, ids, from_one))
        for split, a in splits.items():
            named = made.place(split, "JPEGImages")
            areas = export.own_area(a)
            for i, path in enumerate(map(Path, named)):
                tree = _annotation(a, i, path.name, from_one, keep_ids, areas)
                tree.write(made.out / "Annotations" / f"{path.stem}.xml", encoding="utf-8")
            made.remarks += write_outlines(made.out, export.file_name_of(split), a, named)
            lines = "".join(f"{Path(name).stem}\n" for name in named)
            (made.out / f"ImageSets/Main/{export.file_name_of(split)}.txt").write_text(lines, encoding="utf-8")
    return made.written(map(export.file_name_of, splits))


def _annotation(
    a: Annotations, image: int, name: str, one_based: bool, keep_id: bool, areas: np.ndarray
) -> ElementTree:
    root = Element("annotation")
    _add(root, "folder", "JPEGImages")
    _add(root, "filename", name)
    size = SubElement(root, "size")
    for key, value in zip(("width", "height", "depth"), (*a.sizes[image].tolist()[::-1], 3), strict=True):
        _add(size, key, value)
    _add(root, "segmented", 0)
    if keep_id:
        _add(SubElement(root, "detpipe"), "image_id", int(a.image_ids[image]))
    for b in a.rows_of(image):
        element = SubElement(root, "object")
        _add(element, "name", a.class_names[int(a.labels[b]) - 1])
        _add(element, "pose", "Unspecified")
        _add(element, "truncated", 0)
        _add(element, "difficult", int(a.difficult[b]))
        box = SubElement(element, "bndbox")
        x1, y1, x2, y2 = a.boxes[b].tolist()
        for key, value in zip(("xmin", "ymin", "xmax", "ymax"), (x1 + one_based, y1 + one_based, x2, y2), strict=True):
            _add(box, key, export.number(value))
        if a.iscrowd[b] or areas[b]:
            extra = SubElement(element, "detpipe")
            _add(extra, "iscrowd", int(a.iscrowd[b]))
            if areas[b]:
                _add(extra, "area", export.number(a.area[b]))
    tree = ElementTree(root)
    indent(tree)
    return tree


def _add(parent: Element, tag: str, value: object) -> None:
    SubElement(parent, tag).text = str(value)

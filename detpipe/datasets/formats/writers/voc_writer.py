"""Writes VOC layout: ``JPEGImages``, ``Annotations``, ``ImageSets/Main`` and ``detpipe.json``, the list of classes.

Corners are written as the official files have them, counted from 1 with both ends included: ``xmin = x1 + 1``, ``xmax = x2``,
with decimals where the box has some, as VOC 2011 and 2012 do. Where a box is not wider and higher than one pixel, its corners
would meet; then all are written as they are, counted from 0, and ``detpipe.json`` says so.
"""

from __future__ import annotations

from pathlib import Path
from xml.etree.ElementTree import Element, ElementTree, SubElement, indent

import numpy as np

from detpipe.datasets.formats.class_list import ClassList, write_class_list
from detpipe.datasets.formats.export import (
    Images,
    Names,
    Splits,
    Written,
    check_suffixes,
    file_name_of,
    ids_are_kept,
    new_folder,
    number,
    one_class_list,
    own_area,
    rows_of,
    totals,
    transfer,
)
from detpipe.datasets.formats.outline_files import write_outlines
from detpipe.datasets.image_files import PLAIN_FILES, ImageFiles, image_paths
from detpipe.types import Annotations

_SUFFIXES = (".jpg", ".jpeg", ".png")


def write_voc(
    splits: Splits,
    folder: str | Path,
    images: Images = "copy",
    one_based: bool | None = None,
    source: ImageFiles = PLAIN_FILES,
) -> Written:
    """Write a data set in VOC layout.

    Args:
        splits: name -> annotations, whose classes are the same.
        folder: a new folder.
        images: ``"copy"``, ``"link"`` or ``"none"``.
        one_based: whether corners count from 1, both ends included; None for that if every box is larger than a pixel.
        source: where the images are.

    Returns:
        What was written.

    Raises:
        DataError: the folder is there already, classes differ, images are neither JPEG nor PNG, or an image of two splits has
            other boxes in each.
    """
    names, ids = one_class_list(splits)
    check_suffixes(splits, _SUFFIXES, "VOC")
    wide = all((np.diff(a.boxes.reshape(-1, 2, 2), axis=1) > 1 + 1e-9).all() for a in splits.values())
    from_one = wide if one_based is None else one_based
    keep_ids, remarks = ids_are_kept(splits)
    if not from_one:
        remarks.append("corners count from 0 (boxes of a pixel or less): read them with one_based: false")
    naming = Names(flat=True)
    with new_folder(folder, splits) as out:
        for part in ("JPEGImages", "Annotations", "ImageSets/Main"):
            (out / part).mkdir(parents=True)
        write_class_list(out, ClassList(names, ids, from_one))
        for split, a in splits.items():
            files = naming.of(split, a)
            transfer(image_paths(a), [out / "JPEGImages" / name for name in files], images, source)
            areas = own_area(a)
            for i, name in enumerate(files):
                tree = _annotation(a, i, name, from_one, keep_ids, areas)
                tree.write(out / "Annotations" / f"{Path(name).stem}.xml", encoding="utf-8")
            named = [f"JPEGImages/{name}" for name in files]
            remarks += write_outlines(out, file_name_of(split), a, named)
            lines = "".join(f"{Path(name).stem}\n" for name in files)
            (out / "ImageSets" / "Main" / f"{file_name_of(split)}.txt").write_text(lines, encoding="utf-8")
    if naming.renamed:
        remarks.append(f"{naming.renamed} images are renamed: all lie in one folder, and others had their names")
    return Written(Path(folder), tuple(map(file_name_of, splits)), *totals(splits), tuple(remarks))


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
    for b in rows_of(a, image):
        element = SubElement(root, "object")
        _add(element, "name", a.class_names[int(a.labels[b]) - 1])
        _add(element, "pose", "Unspecified")
        _add(element, "truncated", 0)
        _add(element, "difficult", int(a.difficult[b]))
        box = SubElement(element, "bndbox")
        x1, y1, x2, y2 = a.boxes[b].tolist()
        for key, value in zip(("xmin", "ymin", "xmax", "ymax"), (x1 + one_based, y1 + one_based, x2, y2), strict=True):
            _add(box, key, number(value))
        if a.iscrowd[b] or areas[b]:
            extra = SubElement(element, "detpipe")
            _add(extra, "iscrowd", int(a.iscrowd[b]))
            if areas[b]:
                _add(extra, "area", number(a.area[b]))
    tree = ElementTree(root)
    indent(tree)
    return tree


def _add(parent: Element, tag: str, value: object) -> None:
    SubElement(parent, tag).text = str(value)

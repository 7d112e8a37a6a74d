"""Data in VOC layout: the official VOCdevkit, several years together, or any folder laid out in the same way.

::

    root/                           or root/VOC2007/, for splits written "2007:trainval"
      JPEGImages/000005.jpg
      Annotations/000005.xml
      ImageSets/Main/trainval.txt   one image name a line, without suffix

A split is a list of image names in ``ImageSets/Main``, of one folder or of several years; annotations are one XML file an image.

Coordinates. The official files count pixels from 1 and include both ends: ``one_based=True`` makes the continuous box
``[xmin - 1, ymin - 1, xmax, ymax]`` of them. Labeling tools that count from 0 write corner coordinates:
``one_based=False`` takes ``[xmin, ymin, xmax, ymax]`` as it is. Under both, xmax must be above xmin in the file.

What VOC has no place for stands in ``<detpipe>``: ``<image_id>`` below the annotation, ``<iscrowd>`` and ``<area>`` below an
object. Other readers pass over it.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from xml.etree.ElementTree import Element, ParseError

from defusedxml import DefusedXmlException
from defusedxml.ElementTree import parse

from detpipe.datasets.datamodule import DetectionData, Split
from detpipe.datasets.decode import image_size
from detpipe.datasets.faults import Faults, Policy
from detpipe.datasets.formats.class_list import ids_of, read_class_list
from detpipe.datasets.records import RecordBuilder, build_annotations, read_number, read_whole
from detpipe.datasets.stored_proposals import voc_key
from detpipe.support.errors import DataError
from detpipe.support.files import refuse_special
from detpipe.support.strict_json import shorten
from detpipe.support.suggest import did_you_mean
from detpipe.types import Annotations

_SUFFIXES = (".png", ".jpeg", ".jpg")  # the later wins where one name has several
_LAYOUT = "VOC layout is JPEGImages/NAME.jpg, Annotations/NAME.xml and lists of names in ImageSets/Main/SPLIT.txt"


@dataclass(frozen=True)
class Listed:
    """An image that a list names; neither file need exist.

    Args:
        image_id: its number in the split, from 1.
        file_name: of the image, relative to the root, with forward slashes.
        image: path of the image.
        xml: path of the annotation.
    """

    image_id: int
    file_name: str
    image: Path
    xml: Path


def list_images(root: Path, split: str | Sequence[str], faults: Faults) -> tuple[list[Listed], int]:
    """Read the lists of a split.

    Args:
        root: a folder in VOC layout, or one that holds such folders.
        split: names of lists, ``"2007:trainval"`` for the one of the folder VOC2007, or a path to a ``.txt`` file.
        faults: where names that occur twice, or lead elsewhere, are noted.

    Returns:
        The images in the order of the lists, each once; and how many lines name an image.

    Raises:
        DataError: if a folder or list is missing, or the lists are empty.
    """
    found: dict[str, Listed] = {}
    number = 0
    for entry in [split] if isinstance(split, str) else split:
        folder, list_file = _find_list(root, entry)
        images, annotations = _stems(folder / "JPEGImages"), set(os.listdir(folder / "Annotations"))
        prefix = folder.relative_to(root).as_posix().removeprefix(".")
        for line_number, line in enumerate(_read_lines(list_file), start=1):
            stem = _stem(line, annotations)
            if not stem:
                continue
            number += 1
            where = f"{list_file}: line {line_number}: {stem!r}"
            if "/" in stem or "\\" in stem or "\0" in stem:
                faults.fatal(
                    "leads out of the folder",
                    f"{where} leads out of the folder; lists hold plain names without folder and suffix",
                )
                continue
            base = images.get(stem, stem + ".jpg")
            file_name = f"{prefix}/JPEGImages/{base}".lstrip("/")
            if file_name in found:
                faults.image("listed twice", f"{where} is listed twice")
                continue
            xml = folder / "Annotations" / f"{stem}.xml"
            found[file_name] = Listed(number, file_name, folder / "JPEGImages" / base, xml)
    if not number:
        raise DataError(f"{root}: the lists of the split {split!r} name no image")
    return list(found.values()), number


def _find_list(root: Path, entry: str) -> tuple[Path, Path]:
    """The folder in VOC layout, and the list."""
    if not root.is_dir():
        raise DataError(f"{root}: no such folder; the argument root must name the folder of the VOC data")
    year, colon, name = entry.rpartition(":")
    folder = root / (f"VOC{year}" if year.isdigit() else year) if colon else root
    for part in ("JPEGImages", "Annotations"):
        if not (folder / part).is_dir():
            years = sorted(path.name.removeprefix("VOC") for path in root.glob("VOC*") if path.is_dir())
            hint = f"; with the folders of years in root, name one: '{years[0]}:{name}'" if years and not colon else ""
            raise DataError(f"{folder / part}: no such folder, wanted for the split {entry!r}{hint}; {_LAYOUT}")
    if name.endswith(".txt"):
        list_file = root / name
        if not list_file.is_file():
            raise DataError(f"{list_file}: no such list of images, wanted for the split {entry!r}")
        return folder, list_file
    lists = folder / "ImageSets" / "Main"
    if not lists.is_dir():
        raise DataError(
            f"{lists}: no such folder, wanted for the split {entry!r}; make it with a file {name}.txt of one image "
            f"name a line, or give the path of such a file as the split; {_LAYOUT}"
        )
    if not (lists / f"{name}.txt").is_file():
        known = sorted(path.stem for path in lists.glob("*.txt"))
        raise DataError(
            f"{lists / name}.txt: no such list of images; lists found: {', '.join(known[:20]) or 'none'}"
            f"{did_you_mean(name, known)}"
        )
    return folder, lists / f"{name}.txt"


def _stems(folder: Path) -> dict[str, str]:
    """Image names without and with suffix."""
    names = [os.path.splitext(name) for name in os.listdir(folder)]
    images = [(stem, suffix) for stem, suffix in names if suffix.lower() in _SUFFIXES]
    images.sort(key=lambda name: (_SUFFIXES.index(name[1].lower()), name[1]))
    return {stem: stem + suffix for stem, suffix in images}


def _read_lines(list_file: Path) -> list[str]:
    refuse_special(list_file)
    try:
        return list_file.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{list_file}: cannot be read as a list of image names ({error})") from error


def _stem(line: str, annotations: set[str]) -> str:
    """The name in a line; lists of one class carry a flag behind it (-1, 0 or 1), which is not looked at."""
    line = line.strip()
    name, _, flag = line.rpartition(" ")
    if f"{line}.xml" not in annotations and flag in ("-1", "0", "1") and name:
        return name.strip()
    return line


ClassNames = Sequence[str] | Literal["auto"] | None
VOC_CLASSES = (
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow",
    "diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)  # fmt: skip
_CORNERS = ("xmin", "ymin", "xmax", "ymax")


def load_voc(
    root: str | Path,
    split: str | Sequence[str],
    class_names: ClassNames = None,
    one_based: bool = True,
    keep_difficult: bool = True,
    on_bad: Policy = "error",
) -> Annotations:
    """Read one split of a data set in VOC layout and check it against its images.

    Images are numbered 1, 2, ... in the order of the split, skipped ones included; that number is the ``image_id``. The
    image of ``Annotations/NAME.xml`` is ``JPEGImages/NAME.jpg``, ``.jpeg`` or ``.png``, whatever the XML says.

    Args:
        root: a folder with ``JPEGImages``, ``Annotations`` and ``ImageSets/Main``, or one that holds such folders, as
            VOCdevkit holds VOC2007.
        split: a list in ``ImageSets/Main``, such as ``"train"``; ``"2007:trainval"`` is that of the folder VOC2007 in
            the root; a path that ends in ``.txt`` (relative to the root) is a list elsewhere. Several are read in turn.
        class_names: the classes of labels 1..K in order; None for the 20 of VOC; ``"auto"`` for those that ``detpipe.json``
            in the root lists, or else occur.
        one_based: whether pixels are counted from 1 (see the module).
        keep_difficult: whether difficult objects are kept, flagged; dropped ones are counted.
        on_bad: ``"error"`` refuses a split with any faulty record; ``"skip"`` leaves these records out and counts them.

    Returns:
        The annotations of the images of the split.

    Raises:
        DataError: for anything wrong, naming the file, the object, the field and its value.
    """
    root = Path(root)
    faults = Faults(f"{root} ({split if isinstance(split, str) else ', '.join(split)})", on_bad)
    listed, images_read = list_images(root, split, faults)
    if class_names == "auto":
        class_names = find_class_names(root, split)
    names = VOC_CLASSES if class_names is None else tuple(class_names)
    if not names or len(set(names)) != len(names):
        raise DataError(f"class_names must be distinct and at least one, got {list(names)}")
    known = read_class_list(root)
    if known and known.one_based != one_based:
        raise DataError(f"{root}: its detpipe.json says that one_based is {str(known.one_based).lower()}: set it so")
    built = RecordBuilder(names, ids_of(names, known))
    reader = _Reader(built, one_based, keep_difficult, faults)
    for item in listed:
        reader.read(item)
    folders = sorted({item.image.parent for item in listed})
    return build_annotations(built.records(root, folders, images_read, reader.boxes_read), faults)


def find_class_names(root: str | Path, split: str | Sequence[str]) -> tuple[str, ...]:
    """Collect the class names that occur in a split, unless the root has a list of them.

    Args:
        root: as for `load_voc`.
        split: as for `load_voc`.

    Returns:
        The names, sorted; those of ``detpipe.json`` in its order.

    Raises:
        DataError: if the split has no named object.
    """
    known = read_class_list(Path(root))
    if known:
        return known.class_names
    listed, _ = list_images(Path(root), split, Faults(root, "skip"))
    names: set[str] = set()
    for item in listed:
        try:
            names |= {(obj.findtext("name") or "").strip() for obj in _parse(item.xml).iterfind("object")}
        except (OSError, ParseError, DefusedXmlException):
            continue  # the same file is read again for its boxes, and its fault is reported there
    if not names - {""}:
        raise DataError(f"{root}: no object with a class name in {split}; class_names 'auto' has nothing to read")
    return tuple(sorted(names - {""}))


def _parse(xml: Path) -> Element:
    refuse_special(xml)
    root = parse(xml).getroot()
    if root is None:
        raise ParseError("no root element")
    return root


class _Reader:
    """Collects the records of one XML file after the other."""

    def __init__(self, built: RecordBuilder, one_based: bool, keep_difficult: bool, faults: Faults) -> None:
        self.built = built
        self.label_of = {name: label for label, name in enumerate(built.class_names, start=1)}
        self.one_based = one_based
        self.keep_difficult = keep_difficult
        self.faults = faults
        self.ids: dict[int, str] = {}  # image id -> XML file
        self.boxes_read = 0

    def read(self, item: Listed) -> None:
        """Read the annotation of one image."""
        try:
            root = _parse(item.xml)
        except FileNotFoundError:
            return self.faults.image("annotation missing", f"{item.xml}: no such annotation file, but a list names it")
        except DefusedXmlException as error:
            return self.faults.fatal(
                "XML entity", f"{item.xml}: refused, it declares an XML entity ({type(error).__name__})"
            )
        except (ParseError, OSError, UnicodeError, ValueError) as error:
            return self.faults.image("annotation unreadable", f"{item.xml}: cannot be read as XML ({error})")
        objects = root.findall("object")
        self.boxes_read += len(objects)
        size = self._size(root, item)
        if size is None:
            self.faults.skipped["boxes skipped: image skipped"] += len(objects)
            return None
        image_id = self._image_id(root, item)
        if image_id is None:
            self.faults.skipped["boxes skipped: image skipped"] += len(objects)
            return None
        for number, element in enumerate(objects, start=1):
            self._object(element, f"{item.xml}: object {number}")
        self.built.add_image(item.file_name, image_id, size)
        return None

    def _image_id(self, root: Element, item: Listed) -> int | None:
        """The number of the image in the lists, unless its file gives one."""
        text = root.findtext("detpipe/image_id")
        image_id = item.image_id if text is None else read_whole(text.strip())
        if image_id is None:
            self.faults.image(
                "bad image_id", f"{item.xml}: detpipe/image_id must be a whole number, got {shorten(text)}"
            )
        elif image_id in self.ids:
            self.faults.fatal(
                "duplicate image id", f"{item.xml}: image id {image_id} is there twice, in {self.ids[image_id]} too"
            )
        else:
            self.ids[image_id] = str(item.xml)
        return image_id

    def _size(self, root: Element, item: Listed) -> tuple[int, int] | None:
        """Height and width; from the header of the image where the XML has none."""
        texts = [(root.findtext(f"size/{key}") or "0").strip() for key in ("height", "width")]
        if "0" in texts:
            try:
                return image_size(item.image)
            except DataError as error:
                reason = "unreadable" if item.image.exists() else "file missing"
                self.faults.image(reason, f"{item.xml}: has no size, and its image: {error}")
                return None
        if not all(text.isascii() and text.isdigit() and len(text) < 10 for text in texts):
            self.faults.image(
                "bad size", f"{item.xml}: size: height and width must be whole pixels above 0, got {shorten(texts)}"
            )
            return None
        return int(texts[0]), int(texts[1])

    def _object(self, element: Element, where: str) -> None:
        name = (element.findtext("name") or "").strip()
        where = f"{where} ({name})"
        if name not in self.label_of:
            known = shorten(", ".join(self.label_of), 300).strip("'")
            return self.faults.box(
                "unknown class name",
                f"{where}: name {name!r} is not among class_names ({known}){did_you_mean(name, self.label_of)}; "
                "class_names lists the classes of this data, or is 'auto'",
                alike=f"class {name}",
            )
        difficult = (element.findtext("difficult") or "0").strip()
        if difficult not in ("0", "1"):
            return self.faults.box("bad difficult", f"{where}: difficult must be 0 or 1, got {shorten(difficult)}")
        if difficult == "1" and not self.keep_difficult:
            self.faults.skipped["boxes skipped: difficult"] += 1
            return None
        crowd = (element.findtext("detpipe/iscrowd") or "0").strip()
        if crowd not in ("0", "1"):
            return self.faults.box("bad iscrowd", f"{where}: detpipe/iscrowd must be 0 or 1, got {shorten(crowd)}")
        area = read_number(element.findtext("detpipe/area") or "nan")
        if area is None or area < 0 or math.isinf(area):
            got = shorten(element.findtext("detpipe/area"))
            return self.faults.box("bad area", f"{where}: detpipe/area must be a number of at least 0, got {got}")
        corners = self._corners(element, where)
        if corners is not None:
            x1, y1, x2, y2 = corners
            box = (x1 - 1, y1 - 1, x2, y2) if self.one_based else corners
            flags = difficult == "1", crowd == "1"
            where = f"{where}: bndbox {shorten(list(corners))}"
            self.built.add_box(len(self.built.images), box, self.label_of[name], where, *flags, area)
        return None

    def _corners(self, element: Element, where: str) -> tuple[float, ...] | None:
        """The numbers of the bounding box as they are in the file."""
        values: list[float] = []
        for key in _CORNERS:
            text = element.findtext(f"bndbox/{key}")
            value = read_number(text or "")
            if value is None:
                got = "is missing" if text is None else f"must be a number, got {shorten(text)}"
                self.faults.box("bad bndbox", f"{where}: bndbox/{key} {got}")
                return None
            values.append(value)
        x1, y1, x2, y2 = values
        if all(map(math.isfinite, values)) and (x2 <= x1 or y2 <= y1):
            self.faults.box("zero or negative size", f"{where}: bndbox {values} has zero or negative size")
            return None
        if self.one_based and min(x1, y1) < 1:
            key, value = ("xmin", x1) if x1 < 1 else ("ymin", y1)
            self.faults.box(
                "below 1 with one_based",
                f"{where}: bndbox/{key} is {value:g}, but one_based is on, so pixels are counted from 1; "
                "set one_based to false if this data counts from 0",
            )
            return None
        return tuple(values)


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

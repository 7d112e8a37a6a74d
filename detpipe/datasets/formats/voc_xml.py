"""Reads one XML annotation after the other into plain values, whatever encoding it declares; each file is parsed once."""

from __future__ import annotations

import codecs
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PureWindowsPath
from typing import NamedTuple
from xml.etree.ElementTree import Element, ParseError

from defusedxml import DefusedXmlException
from defusedxml.ElementTree import fromstring

from detpipe.datasets.decode import image_size
from detpipe.datasets.faults import Faults
from detpipe.datasets.formats.voc_folders import Listed
from detpipe.datasets.records import RecordBuilder, read_number, read_whole
from detpipe.support.errors import DataError
from detpipe.support.files import refuse_special
from detpipe.support.strict_json import shorten
from detpipe.support.suggest import did_you_mean

_CORNERS = ("xmin", "ymin", "xmax", "ymax")
_DECLARED = re.compile(rb"""^\s*<\?xml\b[^>]*?\bencoding\s*=\s*["']([\w.:-]+)["'][^>]*?\?>""")
_OF_EXPAT = ("utf-8", "us-ascii", "iso-8859-1")  # and utf-16, which has a byte order mark
_WIDER = {"gb2312": "gb18030", "gbk": "gb18030", "shift_jis": "cp932"}  # what writers mean by a narrower name


class ObjectText(NamedTuple):
    """The texts of an ``<object>``; None where there is none."""

    name: str
    difficult: str
    crowd: str
    area: str | None
    corners: tuple[str | None, ...]


@dataclass(frozen=True)
class ImageText:
    """What an XML file says of its image.

    Args:
        size: texts of height and width, "0" where there is none.
        image_id: of ``<detpipe>``; None where there is none.
        file_name: of ``<filename>``, without folders.
        objects: in their order.
    """

    size: tuple[str, str]
    image_id: str | None
    file_name: str
    objects: tuple[ObjectText, ...]


class UnreadableXML(Exception):
    """An annotation file that says nothing: why, and whether the data set is to be refused for it."""

    def __init__(self, reason: str, message: str, fatal: bool = False) -> None:
        super().__init__(message)
        self.reason, self.fatal = reason, fatal


def read_xml(path: Path) -> ImageText:
    """Read an annotation file.

    Raises:
        UnreadableXML: it is missing, is no XML, declares an entity, or annotates nothing.
    """
    try:
        refuse_special(path)
        root: Element | None = fromstring(_as_utf8(path.read_bytes()))
    except FileNotFoundError as error:
        message = f"{path}: no such annotation file, but a list names it or an image has this name"
        raise UnreadableXML("annotation missing", message) from error
    except DefusedXmlException as error:
        message = f"{path}: refused, it declares an XML entity ({type(error).__name__})"
        raise UnreadableXML("XML entity", message, fatal=True) from error
    except (ParseError, OSError, ValueError, LookupError) as error:
        raise UnreadableXML("annotation unreadable", f"{path}: cannot be read as XML ({error})") from error
    if root is None or root.tag.lower() != "annotation":
        tag = None if root is None else root.tag
        message = f"{path}: is no annotation of an image: its root is {shorten(tag)}, expected 'annotation'"
        raise UnreadableXML("no annotation", message)
    size = [(root.findtext(f"size/{key}") or "").strip() or "0" for key in ("height", "width")]
    return ImageText(
        size=(size[0], size[1]),
        image_id=root.findtext("detpipe/image_id"),
        file_name=PureWindowsPath((root.findtext("filename") or "").strip()).name,
        objects=tuple(map(_object, root.iterfind("object"))),
    )


def _object(element: Element) -> ObjectText:
    return ObjectText(
        name=(element.findtext("name") or "").strip(),
        difficult=(element.findtext("difficult") or "0").strip(),
        crowd=(element.findtext("detpipe/iscrowd") or "0").strip(),
        area=element.findtext("detpipe/area"),
        corners=tuple(element.findtext(f"bndbox/{key}") for key in _CORNERS),
    )


def _as_utf8(content: bytes) -> bytes:
    """The bytes of a file in an encoding that the parser knows: Python knows more of them.

    Raises:
        LookupError: the declared encoding is not known.
        UnicodeError: the file is not in the encoding that it declares.
    """
    if content.startswith((codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)):
        return content.decode("utf-32").partition("?>")[2].encode()
    declared = _DECLARED.match(content.removeprefix(codecs.BOM_UTF8))
    if declared is None:
        return content
    name = declared[1].decode("ascii")
    encoding = codecs.lookup(name).name
    if encoding in _OF_EXPAT or encoding == "iso8859-1":
        return content
    if encoding.startswith(("utf-16", "utf-32")):
        encoding = "utf-8"  # the declaration itself is in single bytes, so the file is not what it says
    try:
        text = content[declared.end() :].decode(_WIDER.get(encoding, encoding))
    except UnicodeDecodeError as error:
        raise UnicodeError(
            f"is not in {name}, the encoding that it declares: {error.reason} at byte {error.start}"
        ) from error
    return text.encode("utf-8", errors="strict")


class XMLReader:
    """Collects the records of one annotation after the other.

    Args:
        built: takes the images and boxes.
        one_based: whether pixels are counted from 1, both ends included.
        keep_difficult: whether difficult objects are kept, flagged.
        faults: where what cannot be used is noted.
    """

    def __init__(self, built: RecordBuilder, one_based: bool, keep_difficult: bool, faults: Faults) -> None:
        self.built = built
        self.label_of = {name: label for label, name in enumerate(built.class_names, start=1)}
        self.one_based = one_based
        self.keep_difficult = keep_difficult
        self.faults = faults
        self.ids: dict[int, str] = {}  # image id -> XML file
        self.boxes_read = 0

    def add(self, item: Listed, text: ImageText | UnreadableXML) -> None:
        """Add what `read_xml` made of the annotation of an image."""
        if isinstance(text, UnreadableXML):
            return (self.faults.fatal if text.fatal else self.faults.image)(text.reason, str(text))
        self.boxes_read += len(text.objects)
        file_name = self._file_name(text, item)
        size = None if file_name is None else self._size(text, item)
        image_id = None if size is None else self._image_id(text, item)
        if file_name is None or size is None or image_id is None:
            self.faults.skipped["boxes skipped: image skipped"] += len(text.objects)
            return None
        for number, element in enumerate(text.objects, start=1):
            self._add_object(element, f"{item.xml}: object {number}")
        self.built.add_image(file_name, image_id, size)
        return None

    def _file_name(self, text: ImageText, item: Listed) -> str | None:
        """The name of the image; of several that only differ by suffix, the one that the XML names."""
        if not item.named_alike:
            return item.file_name
        if text.file_name in item.named_alike:
            return item.file_name[: len(item.file_name) - len(item.image.name)] + text.file_name
        names = " and ".join(item.named_alike)
        self.faults.image(
            "several images of one name",
            f"{item.xml}: is the annotation of {names}, and its filename {shorten(text.file_name)} is neither; rename one",
        )
        return None

    def _image_id(self, text: ImageText, item: Listed) -> int | None:
        """The number of the image in the lists, unless its file gives one."""
        image_id = item.image_id if text.image_id is None else read_whole(text.image_id.strip())
        if image_id is None:
            got = shorten(text.image_id)
            self.faults.image("bad image_id", f"{item.xml}: detpipe/image_id must be a whole number, got {got}")
        elif image_id in self.ids:
            self.faults.fatal(
                "duplicate image id", f"{item.xml}: image id {image_id} is there twice, in {self.ids[image_id]} too"
            )
        else:
            self.ids[image_id] = str(item.xml)
        return image_id

    def _size(self, text: ImageText, item: Listed) -> tuple[int, int] | None:
        """Height and width; from the header of the image where the XML has none."""
        values = [read_number(value) if len(value) < 10 else None for value in text.size]
        if 0 in values:
            try:
                return image_size(item.image)
            except DataError as error:
                reason = "unreadable" if item.image.exists() else "file missing"
                self.faults.image(reason, f"{item.xml}: has no size, and its image: {error}")
                return None
        height, width = (int(value) if value and value > 0 and value.is_integer() else 0 for value in values)
        if not height or not width:
            self.faults.image(
                "bad size",
                f"{item.xml}: size: height and width must be whole pixels above 0, got {shorten(list(text.size))}",
            )
            return None
        return height, width

    def _add_object(self, element: ObjectText, where: str) -> None:
        name, where = element.name, f"{where} ({element.name})"
        if name not in self.label_of:
            known = shorten(", ".join(self.label_of), 300).strip("'")
            return self.faults.box(
                "unknown class name",
                f"{where}: name {name!r} is not among class_names ({known}){did_you_mean(name, self.label_of)}; "
                "class_names lists the classes of this data, or is 'auto'",
                alike=f"class {name}",
            )
        if element.difficult not in ("0", "1"):
            return self.faults.box(
                "bad difficult", f"{where}: difficult must be 0 or 1, got {shorten(element.difficult)}"
            )
        if element.difficult == "1" and not self.keep_difficult:
            self.faults.skipped["boxes skipped: difficult"] += 1
            return None
        if element.crowd not in ("0", "1"):
            return self.faults.box(
                "bad iscrowd", f"{where}: detpipe/iscrowd must be 0 or 1, got {shorten(element.crowd)}"
            )
        area = read_number(element.area or "nan")
        if area is None or area < 0 or math.isinf(area):
            got = shorten(element.area)
            return self.faults.box("bad area", f"{where}: detpipe/area must be a number of at least 0, got {got}")
        corners = self._corners(element.corners, where)
        if corners is not None:
            x1, y1, x2, y2 = corners
            box = (x1 - 1, y1 - 1, x2, y2) if self.one_based else corners
            where = f"{where}: bndbox {shorten(list(corners))}"
            flags = element.difficult == "1", element.crowd == "1"
            self.built.add_box(len(self.built.images), box, self.label_of[name], where, *flags, area)
        return None

    def _corners(self, texts: Sequence[str | None], where: str) -> tuple[float, ...] | None:
        """The numbers of the bounding box as they are in the file."""
        values: list[float] = []
        for key, text in zip(_CORNERS, texts, strict=True):
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

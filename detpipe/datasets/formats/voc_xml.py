"""Reads the XML annotations of a split, whatever encoding they declare; each file is parsed once."""

from __future__ import annotations

import codecs
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PureWindowsPath
from typing import Literal, NamedTuple
from xml.etree.ElementTree import Element, ParseError

from defusedxml import DefusedXmlException
from defusedxml.ElementTree import fromstring

from detpipe.datasets import annotations as fields
from detpipe.datasets.faults import Faults
from detpipe.datasets.formats.class_list import ids_of, read_class_list
from detpipe.datasets.formats.folders import ListedImage
from detpipe.datasets.formats.voc_folders import list_images
from detpipe.support.errors import DataError
from detpipe.support.files import refuse_special
from detpipe.support.strict_json import shorten
from detpipe.types import Annotations

_CORNERS = ("xmin", "ymin", "xmax", "ymax")
_DECLARED = re.compile(rb"""^\s*<\?xml\b[^>]*?\bencoding\s*=\s*["']([\w.:-]+)["'][^>]*?\?>""")
_OF_EXPAT = ("utf-8", "us-ascii", "iso-8859-1")  # and utf-16, which has a byte order mark
_WIDER = {"gb2312": "gb18030", "gbk": "gb18030", "shift_jis": "cp932"}  # what writers mean by a narrower name


class ObjectText(NamedTuple):
    """The texts of an ``<object>``; those of corners are None where there are none."""

    name: str
    difficult: str
    crowd: str
    area: str
    corners: tuple[str | None, ...]


@dataclass(frozen=True)
class ImageText:
    """What an XML file says of its image."""

    size: tuple[str, str]  # texts of height and width, "0" where there is none
    image_id: str | None  # of ``<detpipe>``; None where there is none
    file_name: str  # of ``<filename>``, without folders
    objects: tuple[ObjectText, ...]  # in their order


class UnreadableXML(NamedTuple):
    """An annotation file that says nothing: why, and whether the data set is to be refused for it."""

    reason: str
    message: str
    fatal: bool = False


def read_xml(path: Path) -> ImageText | UnreadableXML:
    """Read an annotation file, unless it is missing, is no XML, declares an entity, or annotates nothing."""
    try:
        refuse_special(path)
        root: Element | None = fromstring(_as_utf8(path.read_bytes()))
    except FileNotFoundError:
        message = f"{path}: no such annotation file, but a list names it or an image has this name"
        return UnreadableXML("annotation missing", message)
    except DefusedXmlException as error:
        message = f"{path}: refused, it declares an XML entity ({type(error).__name__})"
        return UnreadableXML("XML entity", message, fatal=True)
    except (ParseError, OSError, ValueError, LookupError) as error:
        return UnreadableXML("annotation unreadable", f"{path}: cannot be read as XML ({error})")
    if root is None or root.tag.lower() != "annotation":
        tag = None if root is None else root.tag
        message = f"{path}: is no annotation of an image: its root is {shorten(tag)}, expected 'annotation'"
        return UnreadableXML("no annotation", message)
    if root.tag != "annotation":  # whoever writes it in capitals writes all others so
        for element in root.iter():
            element.tag = element.tag.lower()
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
        area=(element.findtext("detpipe/area") or "").strip(),
        corners=tuple(element.findtext(f"bndbox/{key}") for key in _CORNERS),
    )


def _as_utf8(content: bytes) -> bytes:
    """The bytes of a file in an encoding that the parser knows: Python knows more of them.

    LookupError: the declared encoding is not known. UnicodeError: the file is not in the encoding that it declares.
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


class VOCSource:
    """A split whose XML files are parsed once, for the classes that occur and for the boxes; arguments as for `load_voc`."""

    def __init__(self, root: Path, split: str | Sequence[str], faults: Faults) -> None:
        self.root, self.split, self.faults = root, split, faults
        faults.source = f"{root} ({split if isinstance(split, str) else ', '.join(split)})"
        self.class_list = read_class_list(root)
        self.listed, self.images_read = list_images(root, split, faults)

    @cached_property
    def texts(self) -> list[ImageText | UnreadableXML]:
        """What the XML files say, in the order of the images."""
        return [read_xml(item.labels) for item in self.listed]

    def occurring(self) -> tuple[str, ...]:
        """The names of objects, sorted; those of ``detpipe.json`` in its order."""
        if self.class_list:
            return self.class_list.class_names
        names = {element.name for text in self.texts if isinstance(text, ImageText) for element in text.objects}
        return tuple(sorted(names - {""}))

    def class_names(self) -> tuple[str, ...]:
        """As `occurring`; a DataError if there are none."""
        names = self.occurring()
        if not names:
            self.faults.check()
            where = self.split if isinstance(self.split, str) else list(self.split)
            unread = [text.message for text in self.texts if isinstance(text, UnreadableXML)]
            more = f" ({len(unread)} files cannot be read: {unread[0]})" if unread else ""
            raise DataError(
                f"{self.root}: no object with a class name in {where}; class_names 'auto' has nothing to read{more}"
            )
        return names

    def load(self, class_names: Sequence[str] | Literal["auto"], one_based: bool, keep_difficult: bool) -> Annotations:
        """As `load_voc`."""
        names = self.class_names() if class_names == "auto" else tuple(class_names)
        known = self.class_list
        if known and known.one_based != one_based:
            raise DataError(
                f"{self.root}: its detpipe.json says that one_based is {str(known.one_based).lower()}: set it so"
            )
        built = fields.AnnotationBuilder(self.faults, names, ids_of(names, known), images_read=self.images_read)
        self.built, self.one_based, self.keep_difficult = built, one_based, keep_difficult
        self.ids: dict[int, str] = {}  # image id -> XML file
        for item, text in zip(self.listed, self.texts, strict=True):
            self._add(item, text)
        return built.build(self.root, sorted({item.image.parent for item in self.listed}))

    def _add(self, item: ListedImage, text: ImageText | UnreadableXML) -> None:
        if isinstance(text, UnreadableXML):
            return (self.faults.fatal if text.fatal else self.faults.image)(text.reason, text.message)
        self.built.boxes_read += len(text.objects)
        file_name = self._file_name(text, item)
        size = None if file_name is None else self._size(text, file_name, str(item.labels))
        image_id = None if size is None else self._image_id(text, item)
        if file_name is None or size is None or image_id is None:
            return self.faults.boxes_of_skipped_image(len(text.objects))
        image = self.built.add_image(file_name, image_id, size)
        for number, element in enumerate(text.objects, start=1):
            try:
                self._add_object(image, element, f"{item.labels}: object {number} ({element.name})")
            except fields.BadBoxError as bad:
                self.faults.box(*bad.args)
        return None

    def _file_name(self, text: ImageText, item: ListedImage) -> str | None:
        """The name of the image; of several that only differ by suffix, the one that the XML names."""
        if not item.named_alike:
            return item.file_name
        if text.file_name in item.named_alike:
            return item.file_name[: len(item.file_name) - len(item.image.name)] + text.file_name
        names = " and ".join(item.named_alike)
        return self.faults.image(
            "several images of one name",
            f"{item.labels}: is the annotation of {names}, and its filename {shorten(text.file_name)} is neither; rename one",
        )

    def _image_id(self, text: ImageText, item: ListedImage) -> int | None:
        """The number of the image in the lists, unless its file gives one."""
        image_id = item.image_id if text.image_id is None else fields.read_whole(text.image_id.strip())
        if image_id is None:
            got = shorten(text.image_id)
            self.faults.image("bad image_id", f"{item.labels}: detpipe/image_id must be a whole number, got {got}")
        elif image_id in self.ids:
            also = f"is there twice, in {self.ids[image_id]} too"
            self.faults.fatal("duplicate image id", f"{item.labels}: image id {image_id} {also}")
        else:
            self.ids[image_id] = str(item.labels)
        return image_id

    def _size(self, text: ImageText, file_name: str, where: str) -> tuple[int, int] | None:
        """Height and width; from the header of the image where the XML has none."""
        values = [fields.read_number(value) if len(value) < 10 else None for value in text.size]
        if 0 in values:
            return self.built.size_in_file(self.root, file_name, f"{where}: has no size, and its image")
        height, width = (int(value) if value and value > 0 and value.is_integer() else 0 for value in values)
        if height and width:
            return height, width
        wanted = "size: height and width must be whole pixels above 0"
        return self.faults.image("bad size", f"{where}: {wanted}, got {shorten(list(text.size))}")

    def _add_object(self, image: int, element: ObjectText, where: str) -> None:
        label = self.built.label(element.name, where, "name")
        difficult = fields.read_flag(element.difficult, where, "difficult", "difficult")
        if difficult and not self.keep_difficult:
            self.faults.skipped["boxes skipped: difficult"] += 1
            return
        crowd = fields.read_flag(element.crowd, where, "iscrowd", "detpipe/iscrowd")
        area = fields.read_area(element.area, where, "detpipe/area")
        x1, y1, x2, y2 = corners = self._corners(element.corners, where)
        box = (x1 - self.one_based, y1 - self.one_based, x2, y2)
        self.built.add_box(image, box, label, f"{where}: bndbox {corners}", difficult, crowd, area)

    def _corners(self, texts: Sequence[str | None], where: str) -> list[float]:
        values: list[float] = []
        for key, text in zip(_CORNERS, texts, strict=True):
            value = fields.read_number(text or "")
            if value is None:
                got = "is missing" if text is None else f"must be a number, got {shorten(text)}"
                raise fields.BadBoxError("bad bndbox", f"{where}: bndbox/{key} {got}")
            values.append(value)
        x1, y1, x2, y2 = values
        if all(map(math.isfinite, values)) and (x2 <= x1 or y2 <= y1):
            raise fields.BadBoxError("zero or negative size", f"{where}: bndbox {values} has zero or negative size")
        if self.one_based and min(x1, y1) < 1:
            key, value = ("xmin", x1) if x1 < 1 else ("ymin", y1)
            raise fields.BadBoxError(
                "below 1 with one_based",
                f"{where}: bndbox/{key} is {value:g}, but one_based is on, so pixels are counted from 1; "
                "set one_based to false if this data counts from 0",
            )
        return values

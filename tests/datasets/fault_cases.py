"""The faults of data sets by their row of the fault matrix, in each layout that can have them.

A case spoils one thing in a data set that is sound.
"""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from .builders import coco_content, picture, voc_object, write_coco, write_csv, write_voc, write_yolo

Spoil = Callable[[Path], Any]


@dataclass(frozen=True)
class Case:
    """A fault, and what is made of it."""

    row: int  # of the matrix
    layout: str
    name: str
    spoil: Spoil  # what is done to the root of the sound data set
    kind: str  # how the report counts it; "" where there is nothing to report
    says: tuple[str, ...]  # what its message contains
    follows: str = ""  # kinds of what it makes wrong besides

    def __str__(self) -> str:
        return f"row_{self.row:02}-{self.layout}-{self.name}"

    @property
    def serious(self) -> bool:
        """Whether it makes training refuse the data."""
        return self.kind not in ("", "boxes: clipped")

    @property
    def skip(self) -> str:
        """What ``on_bad: skip`` makes of it: a count by this reason, "refused", or "accepted" where it is no fault."""
        what, _, reason = self.kind.partition(": ")
        return reason if what in ("boxes", "images") and self.serious else "refused" if self.serious else "accepted"


def case(row: int, layout: str, name: str, spoil: Spoil, kind: str, *says: str, follows: str = "") -> Case:
    return Case(row, layout, name, spoil, kind, says, follows)


def sound(layout: str, root: Path) -> None:
    """Two images with boxes and one without, and a list of classes."""
    if layout == "coco":
        write_coco(root)
    elif layout == "voc":
        write_voc(root, {"a": [voc_object()], "b": [voc_object("dog", (3, 5, 60, 40)), voc_object()], "c": []})
        (root / "detpipe.json").write_text('{"class_names": ["cat", "dog"], "category_ids": [1, 2]}')
    elif layout == "yolo":
        write_yolo(root)
    else:
        write_csv(root, ["a.jpg,1,2,11,22,dog", "b.jpg,3,4,30,30,cat", "c.jpg,,,,,"])
        picture(40, 60, 2).save(root / "c.jpg")
        (root / "detpipe.json").write_text('{"class_names": ["cat", "dog"], "category_ids": [1, 2]}')


FIRST = {"coco": "train/0.jpg", "voc": "JPEGImages/a.jpg", "yolo": "images/train/a.jpg", "csv": "a.jpg"}  # image
TEXT = {
    "coco": "annotations/instances_train.json", "voc": "Annotations/a.xml", "yolo": "labels/train/a.txt", "csv": "annotations.csv",
}  # fmt: skip


def swap(path: str, old: str, new: str) -> Spoil:
    """Put one text in the place of another that is there."""

    def spoil(root: Path) -> None:
        text = (root / path).read_text()
        assert old in text, (path, old)
        (root / path).write_text(text.replace(old, new, 1))

    return spoil


def put(path: str, content: str | bytes) -> Spoil:
    """Put a file there."""
    return lambda root: (root / path).write_bytes(content.encode() if isinstance(content, str) else content)


def cut(path: str, part: float = 0.5) -> Spoil:
    """Keep the beginning of a file."""
    return lambda root: (root / path).write_bytes(
        (root / path).read_bytes()[: int(part * (root / path).stat().st_size)]
    )


def change(edit: Callable[[dict[str, Any]], Any]) -> Spoil:
    """Change what a COCO file holds; ``coco_content`` is what it held."""

    def spoil(root: Path) -> None:
        content = coco_content()
        edit(content)
        (root / TEXT["coco"]).write_text(json.dumps(content))

    return spoil


def box(**fields: Any) -> Spoil:
    return change(lambda c: c["annotations"][1].update(fields))


def image(**fields: Any) -> Spoil:
    return change(lambda c: c["images"][0].update(fields))


def voc(*objects: str) -> Spoil:
    """Objects beside the sound one in a.xml."""
    return swap(TEXT["voc"], "</annotation>", "".join(objects) + "</annotation>")


def line(text: str) -> Spoil:
    """A line more in a.txt or in the table."""
    return lambda root: (root / TEXT["yolo"]).write_text((root / TEXT["yolo"]).read_text() + text + "\n")


def row(text: str) -> Spoil:
    return lambda root: (root / TEXT["csv"]).write_text((root / TEXT["csv"]).read_text() + text + "\n")


def link_out(path: str) -> Spoil:
    """The image becomes a link to a file beside the data set."""

    def spoil(root: Path) -> None:
        outside = root.parent / "secret.jpg"
        (root / path).rename(outside)
        (root / path).symlink_to(outside)

    return spoil


def huge(path: Path) -> None:
    """A PNG of 400 million pixels in a thousand bytes."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 20_000, 20_000, 8, 0, 0, 0, 0)
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(100))) + chunk(b"IEND", b"")
    )


def rotated(path: Path) -> None:
    """A picture of 60 x 40 whose camera lay on its side."""
    exif = Image.Exif()
    exif[0x0112] = 6
    picture(40, 60).save(path, exif=exif)


def floats(path: Path) -> None:
    """Pixels without a fixed white point."""
    Image.fromarray(np.zeros((40, 60), np.float32)).save(path, format="TIFF")


def modes(path: Path) -> None:
    """A gray picture; what else there is stands in test_decode.py."""
    picture(40, 60).convert("L").save(path)


def listed(images: str) -> Spoil:
    """A list takes the place of the folder of images in YOLO layout."""

    def spoil(root: Path) -> None:
        put("few.txt", images)(root)
        swap("data.yaml", '"images/train"', '"few.txt"')(root)

    return spoil


def for_images(row: int, name: str, make: Callable[[Path], Any], kind: str, says: str, layouts: str) -> list[Case]:
    """The same fault of an image in several layouts."""
    return [
        case(row, layout, name, lambda root, layout=layout: make(root / FIRST[layout]), kind, says)
        for layout in layouts.split()
    ]


ALL = "coco voc yolo csv"
HEADERS = "yolo csv"  # layouts whose sizes are read from the images, so that a bad header is met at once
BOMB = '<!DOCTYPE x [<!ENTITY a "lol"><!ENTITY b "&a;&a;&a;&a;&a;&a;&a;&a;">]><annotation>&b;</annotation>'
EXTERNAL = '<!DOCTYPE x [<!ENTITY a SYSTEM "file:///etc/hostname">]><annotation><filename>&a;</filename></annotation>'
UNREAD = "data set: cannot be read"
SEVEN = "<detpipe><image_id>7</image_id></detpipe>"

# fmt: off
CASES = [
    case(1, "coco", "half", cut(TEXT["coco"]), UNREAD, "instances_train.json: line 1 column"),
    case(1, "voc", "half", cut(TEXT["voc"]), "images: annotation unreadable", "a.xml: cannot be read as XML", "line 1, column"),
    case(1, "yolo", "half a line", put(TEXT["yolo"], "0 0.5 0.5 0.5"), "boxes: wrong number of values", "a.txt: line 1",
        "has 4 values"),
    case(1, "yolo", "half the yaml", cut("data.yaml", 0.8), UNREAD, "data.yaml: not valid YAML", "line 1, column"),
    case(1, "csv", "half a line", row("b.jpg,1,2,3"), "boxes: wrong number of values", "annotations.csv: line 5",
        "has 4 values, but the header 6"),
    case(1, "csv", "open quote", row('"b.jpg,1,2,3,4,cat'), UNREAD, "annotations.csv: line 5: not a valid table"),
    case(2, "coco", "images", change(lambda c: c.pop("images")), UNREAD, "the top-level key 'images' is missing"),
    case(2, "yolo", "names", put("data.yaml", "train: images/train\n"), UNREAD, "data.yaml: names must list the classes"),
    case(2, "csv", "label", swap(TEXT["csv"], ",label", ",colour"), UNREAD, "line 1: the header lacks a column label"),
    case(3, "coco", "bbox", change(lambda c: c["annotations"][1].pop("bbox")), "boxes: bad bbox",
        "annotation id 101: field bbox is missing"),
    case(3, "coco", "width", change(lambda c: c["images"][0].pop("width")), "images: bad width",
        "image id 10 (0.jpg): field width is missing"),
    case(3, "voc", "bndbox", voc("<object><name>cat</name></object>"), "boxes: bad bndbox",
        "a.xml: object 2 (cat): bndbox/xmin is missing"),
    case(3, "yolo", "width", line("0 .5 .5 .1"), "boxes: wrong number of values", "a.txt: line 2"),
    case(3, "csv", "y2", row("b.jpg,1,2,11,,cat"), "boxes: not a number",
        "line 5: column 'y2' must be a finite number, got nothing"),
    case(4, "coco", "NaN", swap(TEXT["coco"], "[1, 2, 10, 20]", "[1, NaN, 10, 20]"), UNREAD, "NaN is not a number in JSON"),
    case(4, "coco", "1e999", swap(TEXT["coco"], "[1, 2, 10, 20]", "[1, 1e999, 10, 20]"), "boxes: not a finite number",
        "annotation id 100", "inf"),
    case(4, "voc", "nan", voc(voc_object(box=(1, 1, "nan", 4))), "boxes: not a finite number", "a.xml: object 2 (cat)", "nan"),
    case(4, "yolo", "nan", line("0 .5 nan .1 .1"), "boxes: not a number",
        "a.txt: line 2: y must be a finite number, got 'nan'"),
    case(4, "csv", "inf", row("b.jpg,1,inf,3,4,cat"), "boxes: not a number",
        "line 5: column 'y1' must be a finite number, got 'inf'"),
    case(5, "coco", "key", swap(TEXT["coco"], '"category_id": 7,', '"category_id": 7, "category_id": 1,'), UNREAD,
        "'category_id'", "is written twice"),
    case(5, "yolo", "key", put("data.yaml", "train: images/train\nnames: [cat, dog]\nnames: [dog, cat]\n"), UNREAD,
        "line 3: key 'names' is given twice"),
    case(5, "csv", "column", swap(TEXT["csv"], "x1,y1,x2", "x1,xmin,x2"), UNREAD, "the columns 'x1' and 'xmin' mean the same"),
    case(6, "coco", "id", change(lambda c: c["images"].append({**c["images"][1], "file_name": "0.jpg"})),
        "data set: duplicate image id", "image id 11 is there twice", "'1.jpg' and '0.jpg'"),
    case(6, "voc", "listed twice", put("ImageSets/Main/train.txt", "a\nb\nc\nb\n"), "images: listed twice",
        "train.txt: line 4: 'b' is listed twice"),
    case(6, "voc", "id",
        lambda root: [swap(f"Annotations/{stem}.xml", "<size>", f"{SEVEN}<size>")(root) for stem in "ab"],
        "data set: duplicate image id", "b.xml: image id 7 is there twice", "a.xml"),
    case(6, "yolo", "listed twice",
        listed("images/train/a.jpg\nimages/train/b.jpg\nimages/train/a.jpg\n"),
        "images: listed twice", "few.txt: line 3", "is listed twice"),
    case(6, "csv", "id", put(TEXT["csv"], "image_id,file_name,x1,y1,x2,y2,label\n7,a.jpg,1,2,3,4,cat\n7,b.jpg,1,2,3,4,cat\n"),
        "data set: duplicate image id", "line 3", "image_id of 'b.jpg' is 7", "'a.jpg' has it"),
    case(7, "coco", "id", box(id=100), "boxes: duplicate id", "annotation id 100 is there twice"),
    case(8, "coco", "id 0", box(id=0), ""),
    case(9, "coco", "gaps", lambda root: None, ""),
    case(9, "coco", "id twice", change(lambda c: c["categories"].append({"id": 7, "name": "fox"})),
        "data set: duplicate category", "category id 7", "there twice"),
    case(9, "yolo", "id twice", put("data.yaml", "train: images/train\nnames: [cat, dog]\ncategory_ids: [7, 7]\n"), UNREAD,
        "category_ids must be distinct"),
    case(9, "voc", "id twice", put("detpipe.json", '{"class_names": ["cat", "dog"], "category_ids": [7, 7]}'), UNREAD,
        "category_ids must be 2 distinct"),
    case(10, "coco", "category", box(category_id=999), "boxes: bad category_id", "annotation id 101", "999"),
    case(10, "coco", "image", box(image_id=999), "boxes: bad image_id", "annotation id 101", "999"),
    case(10, "voc", "class", voc(voc_object("dgo")), "boxes: unknown class name", "a.xml: object 2 (dgo)",
        "did you mean 'dog'"),
    case(10, "yolo", "image", put("labels/train/z.txt", "0 .5 .5 .1 .1"), "images: file missing",
        "z.txt: there is no image of this name"),
    case(10, "csv", "class", row("b.jpg,1,2,3,4,dgo"), "boxes: unknown class name", "line 5: column 'label' is 'dgo'",
        "did you mean 'dog'"),
    case(11, "coco", "2**24+1",
        change(lambda c: (c["categories"][0].update(id=2**24 + 1), c["annotations"][0].update(category_id=2**24 + 1))), ""),
    case(13, "coco", "zero", box(bbox=[5, 5, 0, 9]), "boxes: zero or negative size",
        "annotation id 101 (image 1.jpg): bbox [5.0, 5.0, 0.0, 9.0]"),
    case(13, "coco", "negative", box(bbox=[5, 5, 7, -3]), "boxes: zero or negative size", "annotation id 101", "7.0, -3.0]"),
    case(13, "voc", "zero", voc(voc_object(box=(5, 5, 5, 9))), "boxes: zero or negative size",
        "a.xml: object 2 (cat): bndbox [5.0, 5.0, 5.0, 9.0]"),
    case(13, "yolo", "zero", line("0 .5 .5 0 .1"), "boxes: zero or negative size", "a.txt: line 2: box '0 .5 .5 0 .1'"),
    case(13, "csv", "negative", row("b.jpg,9,9,3,4,cat"), "boxes: zero or negative size", "line 5 (b.jpg): box 9, 9, 3, 4"),
    case(14, "coco", "over", box(bbox=[50, 5, 11, 9]), "boxes: clipped", "annotation id 101",
        "sticks out of 60 x 40 pixels and is clipped"),
    case(14, "voc", "over", voc(voc_object(box=(50, 1, 61, 9))), "boxes: clipped", "a.xml: object 2", "is clipped"),
    case(14, "yolo", "over", line("0 0 .5 .5 .5"), "boxes: clipped", "a.txt: line 2", "is clipped"),
    case(14, "csv", "over", row("b.jpg,50,4,61,9,cat"), "boxes: clipped", "line 5", "is clipped"),
    case(15, "coco", "outside", box(bbox=[120, 5, 7, 9]), "boxes: wholly outside the image", "annotation id 101", "60 x 40"),
    case(15, "voc", "outside", voc(voc_object(box=(120, 1, 130, 9))), "boxes: wholly outside the image", "a.xml: object 2",
        "60 x 40"),
    case(15, "yolo", "pixels", line("0 320 .5 .1 .1"), "boxes: outside 0..1", "a.txt: line 2: x is 320: expected 0 to 1"),
    case(15, "csv", "outside", row("b.jpg,120,4,130,9,cat"), "boxes: wholly outside the image", "line 5", "60 x 40"),
    case(16, "coco", "2", box(iscrowd=2), "boxes: bad iscrowd", "annotation id 101: field iscrowd must be 0 or 1, got 2"),
    case(16, "coco", "missing", change(lambda c: c["annotations"][1].pop("iscrowd")), ""),
    case(16, "coco", "true", box(iscrowd=True), ""),
    case(16, "voc", "2", voc(voc_object().replace("</object>", "<detpipe><iscrowd>2</iscrowd></detpipe></object>")),
        "boxes: bad iscrowd", "a.xml: object 2 (cat): detpipe/iscrowd must be 0 or 1"),
    case(16, "csv", "2", put(TEXT["csv"], "file_name,x1,y1,x2,y2,label,iscrowd\na.jpg,1,2,3,4,cat,2\nb.jpg,1,2,3,4,cat,0\n"),
        "boxes: bad iscrowd", "line 2: column 'iscrowd' must be 0 or 1, got '2'"),
    *[case(17, layout, "no objects", lambda root: None, "") for layout in ALL.split()],
    case(18, "coco", "no images", change(lambda c: (c["images"].clear(), c["annotations"].clear())), UNREAD,
        "no images left of 0 read"),
    case(18, "coco", "all bad", change(lambda c: [a.update(bbox=[1, 1, 0, 0]) for a in c["annotations"]]), UNREAD,
        "no boxes left of 4 read"),
    case(18, "voc", "no images", put("ImageSets/Main/train.txt", "\n"), UNREAD, "the lists of the split 'train' name no image"),
    case(18, "yolo", "no images", lambda root: [path.unlink() for path in (root / "images/train").iterdir()], UNREAD,
        "the split train has no images"),
    case(18, "csv", "no rows", put(TEXT["csv"], "file_name,x1,y1,x2,y2,label\n"), UNREAD, "no images left of 0 read"),
    case(19, "voc", "xmin 0", voc(voc_object(box=(0, 3, 20, 10))), "boxes: below 1 with one_based",
        "a.xml: object 2 (cat): bndbox/xmin is 0, but one_based is on"),
    case(20, "voc", "difficult", voc(voc_object(difficult="yes")), "boxes: bad difficult",
        "a.xml: object 2 (cat): difficult must be 0 or 1, got 'yes'"),
    case(20, "csv", "difficult",
        put(TEXT["csv"], "file_name,x1,y1,x2,y2,label,difficult\na.jpg,1,2,3,4,cat,yes\nb.jpg,1,2,3,4,cat,0\n"),
        "boxes: bad difficult", "line 2: column 'difficult' must be 0 or 1, got 'yes'"),
    case(21, "voc", "bomb", put(TEXT["voc"], BOMB), "data set: XML entity", "a.xml: refused, it declares an XML entity"),
    case(21, "voc", "external", put(TEXT["voc"], EXTERNAL), "data set: XML entity",
        "a.xml: refused, it declares an XML entity"),
    *for_images(22, "missing", Path.unlink, "images: file missing", ".jpg", "coco voc csv"),
    case(22, "yolo", "missing", lambda root: (root / FIRST["yolo"]).unlink(), "images: file missing",
        "a.txt: there is no image of this name"),
    *for_images(23, "half", lambda path: cut(path.name)(path.parent), "images: unreadable", ".jpg: cannot be", ALL),
    *for_images(23, "empty", lambda path: path.write_bytes(b""), "images: unreadable", "not a known image format, or empty",
        ALL),
    *for_images(24, "text", lambda path: path.write_text("text"), "images: unreadable", "not a known image format", ALL),
    case(25, "coco", "swapped", image(width=40, height=60), "images: size differs from the annotation",
        "0.jpg: the image is 60 x 40 pixels, but", "swapped"),
    case(25, "voc", "other", swap(TEXT["voc"], "<width>60", "<width>61"), "images: size differs from the annotation",
        "a.jpg: the image is 60 x 40 pixels, but its annotation says width 61"),
    *for_images(26, "orientation", rotated, "images: size differs from the annotation", "EXIF", "coco voc"),
    *for_images(27, "floats", floats, "images: unreadable", "no fixed white point", ALL),
    *[case(27, layout, "gray", lambda root, layout=layout: modes(root / FIRST[layout]), "") for layout in ALL.split()],
    *for_images(28, "400 megapixels", huge, "images: unreadable", "400000000 pixels", ALL),
    case(29, "coco", "parent", image(file_name="../../x.jpg"), "data set: leads out of the folder",
        "image id 10: file_name '../../x.jpg' leads out"),
    case(29, "coco", "absolute", image(file_name="/etc/passwd"), "data set: leads out of the folder",
        "'/etc/passwd' leads out"),
    case(29, "voc", "parent", put("ImageSets/Main/train.txt", "a\n../../x\n"), "data set: leads out of the folder",
        "train.txt: line 2: '../../x' leads out"),
    case(29, "yolo", "parent",
        listed("images/train/a.jpg\n../secret.jpg\n"),
        "data set: leads out of the folder", "few.txt: line 2: '../secret.jpg' leads out"),
    case(29, "csv", "parent", row("../../x.jpg,1,2,3,4,cat"), "data set: leads out of the folder",
        "line 5: '../../x.jpg' leads out"),
    case(29, "csv", "absolute", row("/etc/passwd,1,2,3,4,cat"), "data set: leads out of the folder",
        "line 5: '/etc/passwd' leads out"),
    *[
        case(29, layout, "link", link_out(FIRST[layout]), "data set: leads out of the folder", "is a link that leads out")
        for layout in ALL.split()
    ],
    case(39, "yolo", "class 7", line("7 .5 .5 .1 .1"), "boxes: class out of range",
        "a.txt: line 2: class is '7': expected 0 to 1 (cat, dog)"),
    case(39, "voc", "fewer classes", put("detpipe.json", '{"class_names": ["cat"], "category_ids": [1]}'),
        "boxes: unknown class name", "b.xml: object 1 (dog)", "not among class_names (cat)"),
    case(39, "csv", "fewer classes", put("detpipe.json", '{"class_names": ["cat"], "category_ids": [1]}'),
        "boxes: unknown class name", "line 2: column 'label' is 'dog'"),
    case(39, "coco", "fewer classes", change(lambda c: c["categories"].pop(1)), "boxes: bad category_id", "annotation id 102",
        "90"),
    # what else can be wrong with a record, by layout
    case(2, "coco", "annotations", change(lambda c: c.pop("annotations")), UNREAD, "top-level key 'annotations' is missing"),
    case(2, "coco", "categories", change(lambda c: c.pop("categories")), UNREAD, "top-level key 'categories' is missing"),
    case(2, "coco", "no list", change(lambda c: c.update(images={})), UNREAD, "images must be a list", "{}"),
    case(2, "coco", "no objects", change(lambda c: c["annotations"].append(5)), UNREAD, "annotations[4] must be an object", "5"),
    *[
        case(3, "coco", f"no {field}", change(lambda c, field=field: c["annotations"][1].pop(field)), f"boxes: bad {field}",
            "annotations[1]" if field == "id" else "id 101", f"{field} is missing")
        for field in ("image_id", "category_id", "id")
    ],
    case(3, "coco", "null", box(bbox=None), "boxes: bad bbox", "id 101", "bbox must be 4 numbers", "None"),
    case(3, "coco", "three numbers", box(bbox=[1, 2, 3]), "boxes: bad bbox", "id 101", "[1, 2, 3]"),
    case(3, "coco", "text", box(bbox=[1, 2, "3", 4]), "boxes: bad bbox", "id 101", "'3'"),
    case(3, "coco", "id in a list", box(id=[1]), "boxes: bad id", "annotations[1]", "whole number or text", "[1]"),
    case(3, "coco", "area", box(area=-1), "boxes: bad area", "id 101", "area must be", "-1"),
    case(3, "coco", "zero height", image(height=0), "images: bad height", "image id 10", "height must be", "0"),
    case(3, "coco", "half a pixel", image(width=60.5), "images: bad width", "image id 10", "width must be", "60.5"),
    case(3, "coco", "no name", change(lambda c: c["images"][0].pop("file_name")), "images: bad file_name", "image id 10",
        "file_name is missing"),
    case(3, "coco", "image id", image(id=True), "images: bad id", "images[0]", "id must be", "True", follows="boxes: bad image_id"),
    case(4, "coco", "infinite", swap(TEXT["coco"], "[1, 2, 10, 20]", "[1, -Infinity, 10, 20]"), UNREAD, "not a number in JSON"),
    case(4, "coco", "huge", box(bbox=[1, 2, 10**400, 4]), "boxes: bad bbox", "id 101", "4 numbers"),
    case(9, "coco", "name twice", change(lambda c: c["categories"].append({"id": 8, "name": "dog"})),
        "data set: duplicate category", "category id 8", "'dog'", "there twice"),
    case(9, "coco", "no class name", change(lambda c: c["categories"][0].pop("name")), "data set: bad category",
        "category id 7", "name must be text", follows="boxes: bad category_id"),
    case(9, "coco", "id with decimals", change(lambda c: c["categories"][0].update(id=7.5)), "data set: bad category",
        "categories[0]", "id must be a whole number or text", "7.5", follows="boxes: bad category_id"),
    case(9, "coco", "none", change(lambda c: c["categories"].clear()), "data set: bad category", "categories is empty",
        follows="boxes: bad category_id data set: cannot be read"),
    case(10, "coco", "text", box(image_id="x"), "boxes: bad image_id", "id 101", "field image_id is x"),
    case(10, "coco", "beyond 64 bits", box(image_id=2**70), "boxes: bad image_id", "id 101", str(2**70)),
    case(13, "coco", "float32", box(bbox=[55, 5, 1e-8, 9]), "boxes: zero or negative size", "id 101", "next to no size"),
    case(15, "coco", "touching", box(bbox=[-7, 5, 7, 9]), "boxes: wholly outside the image", "id 101"),
    case(22, "coco", "no size", change(lambda c: c["images"].__setitem__(0, {"id": 10, "file_name": "gone.jpg"})),
        "images: file missing", "image id 10", "gone.jpg: no such image file"),
    case(22, "coco", "folder", image(file_name="sub/gone.jpg"), "images: file missing", "image id 10", "sub/gone.jpg"),
    case(29, "coco", "backslash", image(file_name="a\\..\\..\\x"), "data set: leads out of the folder", "image id 10", "leads out"),
    case(29, "coco", "drive", image(file_name="C:\\x.jpg"), "data set: leads out of the folder", "image id 10", "leads out"),
    case(1, "voc", "no file", lambda root: (root / TEXT["voc"]).unlink(), "images: annotation missing",
        "a.xml: no such annotation file"),
    case(3, "voc", "text", voc(voc_object(box=(1, "x", 3, 4))), "boxes: bad bndbox", "bndbox/ymin must be a number", "'x'"),
    case(3, "voc", "size", swap(TEXT["voc"], "<width>60", "<width>wide"), "images: bad size",
        "a.xml: size: height and width must be whole pixels"),
    case(10, "voc", "no name", voc("<object><bndbox/></object>"), "boxes: unknown class name", "object 2 ()"),
    case(13, "voc", "negative", voc(voc_object(box=(5, 9, 8, 2))), "boxes: zero or negative size", "[5.0, 9.0, 8.0, 2.0]"),
    case(19, "voc", "ymin 0", voc(voc_object(box=(3, 0, 5, 9))), "boxes: below 1 with one_based", "bndbox/ymin is 0"),
    case(1, "yolo", "binary", put(TEXT["yolo"], b"\xff\xfe0\x00"), "images: labels unreadable", "a.txt: cannot be read as text"),
    case(6, "yolo", "two images", lambda root: picture(40, 60, 9).save(root / "images/train/a.png"),
        "images: labels of two images", "a.png and"),
    *[
        case(39, "yolo", f"class {text}", line(f"{text} .5 .5 .1 .1"), f"boxes: {kind}", says)
        for text, kind, says in (
            ("-1", "class out of range", "class is '-1'"), ("cat", "bad class", "class must be a whole number, got 'cat'"),
            ("0.5", "bad class", "got '0.5'"), ("nan", "bad class", "got 'nan'"), ("inf", "bad class", "got 'inf'"),
        )
    ],
    *[
        case(3, "yolo", f"{text.count(' ') + 1} values", line(text), "boxes: wrong number of values", says)
        for text, says in (
            ("0", "has 1 values"), ("0 .5 .5 .1 .1 .9", "a confidence or an angle behind the box is not read"),
            ("0 .1 .1 .2 .2 .3 .3 .4", "has 8 values"),
        )
    ],
    case(3, "yolo", "text", line("0 .5 .5 .1 x"), "boxes: not a number", "height must be a finite number, got 'x'"),
    case(3, "yolo", "underscore", line("0 .5 .5 .1 .2_5"), "boxes: not a number", "height must be a finite number, got '.2_5'"),
    case(3, "yolo", "comma", line("0 0,5 .5 .1 .1"), "boxes: not a number", "x must be a finite number, got '0,5'"),
    case(4, "yolo", "infinite", line("0 .5 .5 inf .1"), "boxes: not a number", "width must be a finite number, got 'inf'"),
    case(15, "yolo", "negative", line("0 .5 .5 -.1 .1"), "boxes: outside 0..1", "width is -.1"),
    case(15, "yolo", "point", line("0 .1 .1 .2 .2 .3 1.5"), "boxes: outside 0..1", "y of point 3 is 1.5"),
    case(13, "yolo", "a line", line("0 .1 .1 .2 .1 .3 .1"), "boxes: zero or negative size", "has zero or negative size"),
    case(1, "csv", "too many", row("b.jpg,1,2,3,4,cat,x"), "boxes: wrong number of values", "has 7 values"),
    case(3, "csv", "text", row("b.jpg,1,2,x,4,cat"), "boxes: not a number", "column 'x2' must be a finite number, got 'x'"),
    case(3, "csv", "no image", row(",1,2,3,4,dog"), "boxes: no image", "column 'file_name' is empty"),
    case(3, "csv", "underscore", row("b.jpg,1_0,2,33,4,cat"), "boxes: not a number", "column 'x1'", "got '1_0'"),
    case(4, "csv", "nan", row("b.jpg,nan,2,3,4,dog"), "boxes: not a number", "column 'x1'", "'nan'"),
    case(10, "csv", "no class", row("b.jpg,1,2,3,4,"), "boxes: unknown class name", "column 'label' is ''"),
    case(13, "csv", "zero", row("b.jpg,5,5,5,9,dog"), "boxes: zero or negative size", "(b.jpg): box 5, 5, 5, 9 has zero"),
    *[
        case(16, "csv", f"area {value}", put(TEXT["csv"], f"file_name,x1,y1,x2,y2,label,area\na.jpg,1,2,3,4,cat,{value}\n"
            "b.jpg,1,2,3,4,cat,\n"), "boxes: bad area", f"line 2: column 'area' must be a number of at least 0, got '{value}'")
        for value in ("-1", "nan")
    ],
    *[
        case(6, "csv", name, put(TEXT["csv"], f"image_id,file_name,x1,y1,x2,y2,label\n{rows}\n"), f"data set: {kind}", says)
        for name, rows, kind, says in (
            ("id of text", "x,a.jpg,1,2,3,4,cat", "bad image_id", "line 2: column 'image_id' must be a whole number, got 'x'"),
            ("another id", "3,a.jpg,1,2,3,4,cat\n4,a.jpg,1,2,3,4,cat", "duplicate image id",
                "line 3: image_id of 'a.jpg' is 4, but 'a.jpg' has 3 in"),
            ("box beside none", ",a.jpg,1,2,3,4,cat\n,a.jpg,,,,,", "box beside none", "line 3: 'a.jpg' has no objects here"),
        )
    ],
    case(29, "csv", "backslash", row("a\\..\\..\\x.jpg,1,2,3,4,dog"), "data set: leads out of the folder", "'../x.jpg' leads out"),
]
# fmt: on

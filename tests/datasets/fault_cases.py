"""The faults of data sets by their row of the fault matrix, in each layout that can have them.

A case spoils one thing in a data set that is sound. ``skip`` says what ``on_bad: skip`` makes of it: a count by this reason,
``"refused"``, or ``"accepted"`` where it is no fault.
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
    """A fault.

    Args:
        row: of the matrix.
        layout: of the data set.
        name: of the case.
        spoil: what is done to the root of the sound data set.
        kind: how the report counts it; "" where there is nothing to report.
        says: what its message contains.
        skip: see the module.
        serious: whether it makes training refuse the data.
    """

    row: int
    layout: str
    name: str
    spoil: Spoil
    kind: str
    says: tuple[str, ...]
    skip: str
    serious: bool = True

    def __str__(self) -> str:
        return f"row_{self.row:02}-{self.layout}-{self.name}"


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


def for_images(
    number: int, name: str, make: Callable[[Path], Any], kind: str, says: str, layouts: str, skip: str
) -> list[Case]:
    """The same fault of an image in several layouts."""
    return [
        Case(number, layout, name, lambda root, layout=layout: make(root / FIRST[layout]), kind, (says,), skip)
        for layout in layouts.split()
    ]


ALL = "coco voc yolo csv"
HEADERS = "yolo csv"  # layouts whose sizes are read from the images, so that a bad header is met at once
BOMB = '<!DOCTYPE x [<!ENTITY a "lol"><!ENTITY b "&a;&a;&a;&a;&a;&a;&a;&a;">]><annotation>&b;</annotation>'
EXTERNAL = '<!DOCTYPE x [<!ENTITY a SYSTEM "file:///etc/hostname">]><annotation><filename>&a;</filename></annotation>'
UNREAD = "data set: cannot be read"

CASES = [
    Case(1, "coco", "half", cut(TEXT["coco"]), UNREAD, ("instances_train.json: line 1 column",), "refused"),
    Case(
        1,
        "voc",
        "half",
        cut(TEXT["voc"]),
        "images: annotation unreadable",
        ("a.xml: cannot be read as XML", "line 1, column"),
        "annotation unreadable",
    ),
    Case(
        1,
        "yolo",
        "half a line",
        put(TEXT["yolo"], "0 0.5 0.5 0.5"),
        "boxes: wrong number of values",
        ("a.txt: line 1", "has 4 values"),
        "wrong number of values",
    ),
    Case(
        1,
        "yolo",
        "half the yaml",
        cut("data.yaml", 0.8),
        UNREAD,
        ("data.yaml: not valid YAML", "line 1, column"),
        "refused",
    ),
    Case(
        1,
        "csv",
        "half a line",
        row("b.jpg,1,2,3"),
        "boxes: wrong number of values",
        ("annotations.csv: line 5", "has 4 values, but the header 6"),
        "wrong number of values",
    ),
    Case(
        1,
        "csv",
        "open quote",
        row('"b.jpg,1,2,3,4,cat'),
        UNREAD,
        ("annotations.csv: line 5: not a valid table",),
        "refused",
    ),
    Case(
        2,
        "coco",
        "images",
        change(lambda c: c.pop("images")),
        UNREAD,
        ("the top-level key 'images' is missing",),
        "refused",
    ),
    Case(
        2,
        "yolo",
        "names",
        put("data.yaml", "train: images/train\n"),
        UNREAD,
        ("data.yaml: names must list the classes",),
        "refused",
    ),
    Case(
        2,
        "csv",
        "label",
        swap(TEXT["csv"], ",label", ",colour"),
        UNREAD,
        ("line 1: the header lacks a column label",),
        "refused",
    ),
    Case(
        3,
        "coco",
        "bbox",
        change(lambda c: c["annotations"][1].pop("bbox")),
        "boxes: bad bbox",
        ("annotation id 101: field bbox is missing",),
        "bad bbox",
    ),
    Case(
        3,
        "coco",
        "width",
        change(lambda c: c["images"][0].pop("width")),
        "images: bad width",
        ("image id 10 (0.jpg): field width is missing",),
        "bad width",
    ),
    Case(
        3,
        "voc",
        "bndbox",
        voc("<object><name>cat</name></object>"),
        "boxes: bad bndbox",
        ("a.xml: object 2 (cat): bndbox/xmin is missing",),
        "bad bndbox",
    ),
    Case(
        3,
        "yolo",
        "width",
        line("0 .5 .5 .1"),
        "boxes: wrong number of values",
        ("a.txt: line 2",),
        "wrong number of values",
    ),
    Case(
        3,
        "csv",
        "y2",
        row("b.jpg,1,2,11,,cat"),
        "boxes: not a number",
        ("line 5: column 'y2' must be a finite number, got nothing",),
        "not a number",
    ),
    Case(
        4,
        "coco",
        "NaN",
        swap(TEXT["coco"], "[1, 2, 10, 20]", "[1, NaN, 10, 20]"),
        UNREAD,
        ("NaN is not a number in JSON",),
        "refused",
    ),
    Case(
        4,
        "coco",
        "1e999",
        swap(TEXT["coco"], "[1, 2, 10, 20]", "[1, 1e999, 10, 20]"),
        "boxes: not a finite number",
        ("annotation id 100", "inf"),
        "not a finite number",
    ),
    Case(
        4,
        "voc",
        "nan",
        voc(voc_object(box=(1, 1, "nan", 4))),
        "boxes: not a finite number",
        ("a.xml: object 2 (cat)", "nan"),
        "not a finite number",
    ),
    Case(
        4,
        "yolo",
        "nan",
        line("0 .5 nan .1 .1"),
        "boxes: not a number",
        ("a.txt: line 2: y must be a finite number, got 'nan'",),
        "not a number",
    ),
    Case(
        4,
        "csv",
        "inf",
        row("b.jpg,1,inf,3,4,cat"),
        "boxes: not a number",
        ("line 5: column 'y1' must be a finite number, got 'inf'",),
        "not a number",
    ),
    Case(
        5,
        "coco",
        "key",
        swap(TEXT["coco"], '"category_id": 7,', '"category_id": 7, "category_id": 1,'),
        UNREAD,
        ("'category_id'", "is written twice"),
        "refused",
    ),
    Case(
        5,
        "yolo",
        "key",
        put("data.yaml", "train: images/train\nnames: [cat, dog]\nnames: [dog, cat]\n"),
        UNREAD,
        ("line 3: key 'names' is given twice",),
        "refused",
    ),
    Case(
        5,
        "csv",
        "column",
        swap(TEXT["csv"], "x1,y1,x2", "x1,xmin,x2"),
        UNREAD,
        ("the columns 'x1' and 'xmin' mean the same",),
        "refused",
    ),
    Case(
        6,
        "coco",
        "id",
        change(lambda c: c["images"].append({**c["images"][1], "file_name": "0.jpg"})),
        "data set: duplicate image id",
        ("image id 11 is there twice", "'1.jpg' and '0.jpg'"),
        "refused",
    ),
    Case(
        6,
        "voc",
        "listed twice",
        put("ImageSets/Main/train.txt", "a\nb\nc\nb\n"),
        "images: listed twice",
        ("train.txt: line 4: 'b' is listed twice",),
        "listed twice",
    ),
    Case(
        6,
        "voc",
        "id",
        lambda root: [
            swap(f"Annotations/{stem}.xml", "<size>", "<detpipe><image_id>7</image_id></detpipe><size>")(root)
            for stem in "ab"
        ],
        "data set: duplicate image id",
        ("b.xml: image id 7 is there twice", "a.xml"),
        "refused",
    ),
    Case(
        6,
        "yolo",
        "listed twice",
        lambda root: (
            put("few.txt", "images/train/a.jpg\nimages/train/b.jpg\nimages/train/a.jpg\n")(root),
            swap("data.yaml", '"images/train"', '"few.txt"')(root),
        ),
        "images: listed twice",
        ("few.txt: line 3", "is listed twice"),
        "listed twice",
    ),
    Case(
        6,
        "csv",
        "id",
        put(TEXT["csv"], "image_id,file_name,x1,y1,x2,y2,label\n7,a.jpg,1,2,3,4,cat\n7,b.jpg,1,2,3,4,cat\n"),
        "data set: duplicate image id",
        ("line 3", "image_id of 'b.jpg' is 7", "'a.jpg' has it"),
        "refused",
    ),
    Case(7, "coco", "id", box(id=100), "boxes: duplicate id", ("annotation id 100 is there twice",), "duplicate id"),
    Case(8, "coco", "id 0", box(id=0), "", (), "accepted"),
    Case(9, "coco", "gaps", lambda root: None, "", (), "accepted"),
    Case(
        9,
        "coco",
        "id twice",
        change(lambda c: c["categories"].append({"id": 7, "name": "fox"})),
        "data set: duplicate category",
        ("category id 7", "there twice"),
        "refused",
    ),
    Case(
        9,
        "yolo",
        "id twice",
        put("data.yaml", "train: images/train\nnames: [cat, dog]\ncategory_ids: [7, 7]\n"),
        UNREAD,
        ("category_ids must be distinct",),
        "refused",
    ),
    Case(
        9,
        "voc",
        "id twice",
        put("detpipe.json", '{"class_names": ["cat", "dog"], "category_ids": [7, 7]}'),
        UNREAD,
        ("category_ids must be 2 distinct",),
        "refused",
    ),
    Case(
        10,
        "coco",
        "category",
        box(category_id=999),
        "boxes: bad category_id",
        ("annotation id 101", "999"),
        "bad category_id",
    ),
    Case(10, "coco", "image", box(image_id=999), "boxes: bad image_id", ("annotation id 101", "999"), "bad image_id"),
    Case(
        10,
        "voc",
        "class",
        voc(voc_object("dgo")),
        "boxes: unknown class name",
        ("a.xml: object 2 (dgo)", "did you mean 'dog'"),
        "unknown class name",
    ),
    Case(
        10,
        "yolo",
        "image",
        put("labels/train/z.txt", "0 .5 .5 .1 .1"),
        "images: file missing",
        ("z.txt: there is no image of this name",),
        "file missing",
    ),
    Case(
        10,
        "csv",
        "class",
        row("b.jpg,1,2,3,4,dgo"),
        "boxes: unknown class name",
        ("line 5: column 'label' is 'dgo'", "did you mean 'dog'"),
        "unknown class name",
    ),
    Case(
        11,
        "coco",
        "2**24+1",
        change(lambda c: (c["categories"][0].update(id=2**24 + 1), c["annotations"][0].update(category_id=2**24 + 1))),
        "",
        (),
        "accepted",
    ),
    Case(
        13,
        "coco",
        "zero",
        box(bbox=[5, 5, 0, 9]),
        "boxes: zero or negative size",
        ("annotation id 101 (image 1.jpg): bbox [5.0, 5.0, 0.0, 9.0]",),
        "zero or negative size",
    ),
    Case(
        13,
        "coco",
        "negative",
        box(bbox=[5, 5, 7, -3]),
        "boxes: zero or negative size",
        ("annotation id 101", "7.0, -3.0]"),
        "zero or negative size",
    ),
    Case(
        13,
        "voc",
        "zero",
        voc(voc_object(box=(5, 5, 5, 9))),
        "boxes: zero or negative size",
        ("a.xml: object 2 (cat): bndbox [5.0, 5.0, 5.0, 9.0]",),
        "zero or negative size",
    ),
    Case(
        13,
        "yolo",
        "zero",
        line("0 .5 .5 0 .1"),
        "boxes: zero or negative size",
        ("a.txt: line 2: box '0 .5 .5 0 .1'",),
        "zero or negative size",
    ),
    Case(
        13,
        "csv",
        "negative",
        row("b.jpg,9,9,3,4,cat"),
        "boxes: zero or negative size",
        ("line 5 (b.jpg): box 9, 9, 3, 4",),
        "zero or negative size",
    ),
    Case(
        14,
        "coco",
        "over",
        box(bbox=[50, 5, 11, 9]),
        "boxes: clipped",
        ("annotation id 101", "sticks out of 60 x 40 pixels and is clipped"),
        "accepted",
        False,
    ),
    Case(
        14,
        "voc",
        "over",
        voc(voc_object(box=(50, 1, 61, 9))),
        "boxes: clipped",
        ("a.xml: object 2", "is clipped"),
        "accepted",
        False,
    ),
    Case(
        14, "yolo", "over", line("0 0 .5 .5 .5"), "boxes: clipped", ("a.txt: line 2", "is clipped"), "accepted", False
    ),
    Case(14, "csv", "over", row("b.jpg,50,4,61,9,cat"), "boxes: clipped", ("line 5", "is clipped"), "accepted", False),
    Case(
        15,
        "coco",
        "outside",
        box(bbox=[120, 5, 7, 9]),
        "boxes: wholly outside the image",
        ("annotation id 101", "60 x 40"),
        "wholly outside the image",
    ),
    Case(
        15,
        "voc",
        "outside",
        voc(voc_object(box=(120, 1, 130, 9))),
        "boxes: wholly outside the image",
        ("a.xml: object 2", "60 x 40"),
        "wholly outside the image",
    ),
    Case(
        15,
        "yolo",
        "pixels",
        line("0 320 .5 .1 .1"),
        "boxes: outside 0..1",
        ("a.txt: line 2: x is 320: expected 0 to 1",),
        "outside 0..1",
    ),
    Case(
        15,
        "csv",
        "outside",
        row("b.jpg,120,4,130,9,cat"),
        "boxes: wholly outside the image",
        ("line 5", "60 x 40"),
        "wholly outside the image",
    ),
    Case(
        16,
        "coco",
        "2",
        box(iscrowd=2),
        "boxes: bad iscrowd",
        ("annotation id 101: field iscrowd must be 0 or 1, got 2",),
        "bad iscrowd",
    ),
    Case(16, "coco", "missing", change(lambda c: c["annotations"][1].pop("iscrowd")), "", (), "accepted"),
    Case(16, "coco", "true", box(iscrowd=True), "", (), "accepted"),
    Case(
        16,
        "voc",
        "2",
        voc(voc_object().replace("</object>", "<detpipe><iscrowd>2</iscrowd></detpipe></object>")),
        "boxes: bad iscrowd",
        ("a.xml: object 2 (cat): detpipe/iscrowd must be 0 or 1",),
        "bad iscrowd",
    ),
    Case(
        16,
        "csv",
        "2",
        put(TEXT["csv"], "file_name,x1,y1,x2,y2,label,iscrowd\na.jpg,1,2,3,4,cat,2\nb.jpg,1,2,3,4,cat,0\n"),
        "boxes: bad iscrowd",
        ("line 2: column 'iscrowd' must be 0 or 1, got '2'",),
        "bad iscrowd",
    ),
    *[Case(17, layout, "no objects", lambda root: None, "", (), "accepted") for layout in ALL.split()],
    Case(
        18,
        "coco",
        "no images",
        change(lambda c: (c["images"].clear(), c["annotations"].clear())),
        UNREAD,
        ("no images left of 0 read",),
        "refused",
    ),
    Case(
        18,
        "coco",
        "all bad",
        change(lambda c: [a.update(bbox=[1, 1, 0, 0]) for a in c["annotations"]]),
        UNREAD,
        ("no boxes left of 4 read",),
        "refused",
    ),
    Case(
        18,
        "voc",
        "no images",
        put("ImageSets/Main/train.txt", "\n"),
        UNREAD,
        ("the lists of the split 'train' name no image",),
        "refused",
    ),
    Case(
        18,
        "yolo",
        "no images",
        lambda root: [path.unlink() for path in (root / "images/train").iterdir()],
        UNREAD,
        ("the split train has no images",),
        "refused",
    ),
    Case(
        18,
        "csv",
        "no rows",
        put(TEXT["csv"], "file_name,x1,y1,x2,y2,label\n"),
        UNREAD,
        ("no images left of 0 read",),
        "refused",
    ),
    Case(
        19,
        "voc",
        "xmin 0",
        voc(voc_object(box=(0, 3, 20, 10))),
        "boxes: below 1 with one_based",
        ("a.xml: object 2 (cat): bndbox/xmin is 0, but one_based is on",),
        "below 1 with one_based",
    ),
    Case(
        20,
        "voc",
        "difficult",
        voc(voc_object(difficult="yes")),
        "boxes: bad difficult",
        ("a.xml: object 2 (cat): difficult must be 0 or 1, got 'yes'",),
        "bad difficult",
    ),
    Case(
        20,
        "csv",
        "difficult",
        put(TEXT["csv"], "file_name,x1,y1,x2,y2,label,difficult\na.jpg,1,2,3,4,cat,yes\nb.jpg,1,2,3,4,cat,0\n"),
        "boxes: bad difficult",
        ("line 2: column 'difficult' must be 0 or 1, got 'yes'",),
        "bad difficult",
    ),
    Case(
        21,
        "voc",
        "bomb",
        put(TEXT["voc"], BOMB),
        "data set: XML entity",
        ("a.xml: refused, it declares an XML entity",),
        "refused",
    ),
    Case(
        21,
        "voc",
        "external",
        put(TEXT["voc"], EXTERNAL),
        "data set: XML entity",
        ("a.xml: refused, it declares an XML entity",),
        "refused",
    ),
    *for_images(22, "missing", Path.unlink, "images: file missing", ".jpg", "coco voc csv", "file missing"),
    Case(
        22,
        "yolo",
        "missing",
        lambda root: (root / FIRST["yolo"]).unlink(),
        "images: file missing",
        ("a.txt: there is no image of this name",),
        "file missing",
    ),
    *for_images(
        23, "half", lambda path: cut(path.name)(path.parent), "images: unreadable", ".jpg: cannot be", ALL, "unreadable"
    ),
    *for_images(
        23,
        "empty",
        lambda path: path.write_bytes(b""),
        "images: unreadable",
        "not a known image format, or empty",
        ALL,
        "unreadable",
    ),
    *for_images(
        24,
        "text",
        lambda path: path.write_text("text"),
        "images: unreadable",
        "not a known image format",
        ALL,
        "unreadable",
    ),
    Case(
        25,
        "coco",
        "swapped",
        image(width=40, height=60),
        "images: size differs from the annotation",
        ("0.jpg: the image is 60 x 40 pixels, but", "swapped"),
        "size differs from the annotation",
    ),
    Case(
        25,
        "voc",
        "other",
        swap(TEXT["voc"], "<width>60", "<width>61"),
        "images: size differs from the annotation",
        ("a.jpg: the image is 60 x 40 pixels, but its annotation says width 61",),
        "size differs from the annotation",
    ),
    *for_images(
        26,
        "orientation",
        rotated,
        "images: size differs from the annotation",
        "EXIF",
        "coco voc",
        "size differs from the annotation",
    ),
    *for_images(27, "floats", floats, "images: unreadable", "no fixed white point", ALL, "unreadable"),
    *[
        Case(27, layout, "gray", lambda root, layout=layout: modes(root / FIRST[layout]), "", (), "accepted")
        for layout in ALL.split()
    ],
    *for_images(28, "400 megapixels", huge, "images: unreadable", "400000000 pixels", ALL, "unreadable"),
    Case(
        29,
        "coco",
        "parent",
        image(file_name="../../x.jpg"),
        "data set: leads out of the folder",
        ("image id 10: file_name '../../x.jpg' leads out",),
        "refused",
    ),
    Case(
        29,
        "coco",
        "absolute",
        image(file_name="/etc/passwd"),
        "data set: leads out of the folder",
        ("'/etc/passwd' leads out",),
        "refused",
    ),
    Case(
        29,
        "voc",
        "parent",
        put("ImageSets/Main/train.txt", "a\n../../x\n"),
        "data set: leads out of the folder",
        ("train.txt: line 2: '../../x' leads out",),
        "refused",
    ),
    Case(
        29,
        "yolo",
        "parent",
        lambda root: (
            put("few.txt", "images/train/a.jpg\n../secret.jpg\n")(root),
            swap("data.yaml", '"images/train"', '"few.txt"')(root),
        ),
        "data set: leads out of the folder",
        ("few.txt: line 2: '../secret.jpg' leads out",),
        "refused",
    ),
    Case(
        29,
        "csv",
        "parent",
        row("../../x.jpg,1,2,3,4,cat"),
        "data set: leads out of the folder",
        ("line 5: '../../x.jpg' leads out",),
        "refused",
    ),
    Case(
        29,
        "csv",
        "absolute",
        row("/etc/passwd,1,2,3,4,cat"),
        "data set: leads out of the folder",
        ("line 5: '/etc/passwd' leads out",),
        "refused",
    ),
    *[
        Case(
            29,
            layout,
            "link",
            link_out(FIRST[layout]),
            "data set: leads out of the folder",
            ("is a link that leads out",),
            "refused",
        )
        for layout in ALL.split()
    ],
    Case(
        39,
        "yolo",
        "class 7",
        line("7 .5 .5 .1 .1"),
        "boxes: class out of range",
        ("a.txt: line 2: class is '7': expected 0 to 1 (cat, dog)",),
        "class out of range",
    ),
    Case(
        39,
        "voc",
        "fewer classes",
        put("detpipe.json", '{"class_names": ["cat"], "category_ids": [1]}'),
        "boxes: unknown class name",
        ("b.xml: object 1 (dog)", "not among class_names (cat)"),
        "unknown class name",
    ),
    Case(
        39,
        "csv",
        "fewer classes",
        put("detpipe.json", '{"class_names": ["cat"], "category_ids": [1]}'),
        "boxes: unknown class name",
        ("line 2: column 'label' is 'dog'",),
        "unknown class name",
    ),
    Case(
        39,
        "coco",
        "fewer classes",
        change(lambda c: c["categories"].pop(1)),
        "boxes: bad category_id",
        ("annotation id 102", "90"),
        "bad category_id",
    ),
]

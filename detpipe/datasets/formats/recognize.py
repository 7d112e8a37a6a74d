"""Recognize the layout of a data set by what lies in its folder, for commands that only need its images and boxes.

Each format finds its own splits (`find_splits` of its file); here they are only asked in turn.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from detpipe.datasets.datamodule import DetectionData
from detpipe.datasets.faults import Faults, OnBad
from detpipe.datasets.fetch import is_remote
from detpipe.datasets.formats import coco, csv, voc, voc_folders, yolo
from detpipe.datasets.formats.class_list import read_class_list
from detpipe.datasets.formats.folders import ALL, find_split, in_order, is_image, walk_folders
from detpipe.datasets.formats.tool_exports import may_be_export
from detpipe.datasets.formats.voc_xml import VOCSource
from detpipe.datasets.formats.yolo_yaml import NAME as YOLO_NAME
from detpipe.datasets.formats.yolo_yaml import read_yolo
from detpipe.datasets.shards.dataset import Shards
from detpipe.datasets.shards.index import INDEX
from detpipe.datasets.shards.index import find_splits as find_shards
from detpipe.support.errors import DataError, UsageError
from detpipe.types import RGB, PixelType

Layout = Literal["voc", "coco", "coco file", "yolo", "csv", "shards"]
FOLDERS = tuple(layout for layout in get_args(Layout) if layout != "coco file")  # what a folder can be read as
EXPECTED = (
    "expected a folder in VOC layout (XML beside the images or in a sister folder, with or without ImageSets/Main/SPLIT.txt), "
    "COCO layout (annotations/instances_SPLIT.json, or a file of annotations in each split) or YOLO layout "
    f"({YOLO_NAME}, obj.data or classes.txt), an export of CreateML, CVAT, Hugging Face, KITTI, Label Studio, LabelMe, "
    "Supervisely or VIA, a COCO annotation file (*.json), a table of boxes (*.csv, or a folder with "
    f"{csv.NAME}), or shards (a folder with SPLIT/{INDEX}, or its web address)"
)


@dataclass(frozen=True)
class Format:
    """A layout of folders: how messages call it, its splits, and where the annotations are, in half a line."""

    title: str
    find: Callable[[Path], Mapping[str, Any]]
    says: Callable[[Path, Any], str]


@dataclass(frozen=True)
class Found:
    """What lies at a path."""

    layout: Layout  # of the data
    # their names; none for a COCO annotation file, a table without a column ``split``, or shards on a server
    splits: tuple[str, ...]
    says: str  # how it is read, in one line


FORMATS: dict[Layout, Format] = {
    "coco": Format("COCO", coco.find_splits, coco.says_layout),
    "voc": Format("VOC", voc.find_splits, voc_folders.says_layout),
    "yolo": Format("YOLO", yolo.find_splits, lambda root, _: read_yolo(root).says()),
    "csv": Format("a table of boxes", csv.find_splits, csv.says_layout),
    "shards": Format("shards", find_shards, lambda root, splits: f"{len(splits)} folders of shards"),
}
_OF_OTHERS = {".json", ".jsonl", ".ndjson", ".xml", ".csv", ".parquet", ".arrow", ".tfrecord", ".record"}
_FILES: dict[str, Layout] = {
    ".json": "coco file",
    ".csv": "csv",
    ".yaml": "yolo",
    ".yml": "yolo",
    ".data": "yolo",
}


def recognize(data: str, option: str = "--data ", layout: Layout | None = None) -> Found:
    """Say in which layout a data set is, and which splits it has.

    ``option`` is what a message calls ``data``; ``layout``, which of several is meant. A DetpipeError if there is nothing, it is
    in no layout that is known or in two that disagree, or a file that names the splits cannot be read.
    """
    path = Path(data)
    if is_remote(data):
        return Found("shards", (), f"read as shards: {data}")
    if not path.exists():
        raise UsageError(f"{option}{data} does not exist; {EXPECTED}")
    if path.is_file():
        read = _recognize_file(path, f"{option}{data}")
        if layout not in (None, read.layout.split()[0]):
            raise UsageError(f"--layout {layout}: {option}{data} is a file, which is {read.says}; leave --layout out")
        return read
    found, faults = _ask_all(path, layout)
    if not found and faults:
        raise next(iter(faults.values()))
    if not found:
        other = f" in {FORMATS[layout].title} layout" if layout else ""
        raise UsageError(f"{option}{data}{_says_files(path)} has no known layout{other}; {EXPECTED}")
    return _choose(path, found, f"{option}{data}")


def _says_files(root: Path) -> str:
    """What a message says of the files of a folder of no known layout."""
    files = [Path(entry.path) for _, entries in walk_folders(root) for entry in entries]
    others = sorted(path.relative_to(root).as_posix() for path in files if path.suffix.lower() in _OF_OTHERS)
    if not any(is_image(path.name) for path in files):
        return " holds no images (let the tool export them with the annotations), and"
    if not others:
        return " holds images without any annotation, and"
    more = " and others" if len(others) > 3 else ""
    return f" holds {', '.join(others[:3])}{more}, which detpipe does not read (let the tool export COCO, VOC or YOLO), and"


def _ask_all(path: Path, layout: Layout | None) -> tuple[dict[Layout, Mapping[str, Any]], dict[Layout, DataError]]:
    """The splits of a folder in each layout that it is in; and why one cannot be read."""
    found: dict[Layout, Mapping[str, Any]] = {}
    faults: dict[Layout, DataError] = {}
    for name, format in FORMATS.items():
        if layout is not None and layout != name:
            continue
        try:
            splits = format.find(path)
        except DataError as error:
            faults[name] = error
        else:
            found |= {name: {split: splits[split] for split in in_order(splits)}} if splits else {}
    return found, faults


def _choose(path: Path, found: dict[Layout, Mapping[str, Any]], named: str) -> Found:
    """One of several layouts: the first, if the others have the same splits."""
    first, *others = found
    for other in others:
        if len(found[first]) + len(found[other]) > 2 and _usual(found[first]) != _usual(found[other]):
            both = [
                f"{_describe(path, layout, found[layout])} ({', '.join(found[layout])})" for layout in (first, other)
            ]
            raise UsageError(
                f"{named} is in two layouts with different splits: {both[0]}, and {both[1]}; choose with --layout {first} or "
                f"--layout {other}, or keep one of them"
            )
    not_as = "".join(f"; not as {_describe(path, other, found[other])}" for other in others)
    splits = tuple(found[first])
    names = () if first == "csv" and splits == (ALL,) else splits
    return Found(first, names, f"read as {_describe(path, first, found[first])}{not_as}")


def _usual(splits: Mapping[str, Any]) -> set[str]:
    """The names of splits, those of one meaning alike."""
    return {(find_split("val", [name]) and "val") or name.lower() for name in splits}


def _describe(path: Path, layout: Layout, splits: Mapping[str, Any]) -> str:
    format = FORMATS[layout]
    return f"{format.title}: {format.says(path, splits)}"


def _recognize_file(path: Path, named: str) -> Found:
    layout = layout_of(path)
    if layout is None:
        raise UsageError(f"{named} has no known layout; {EXPECTED}")
    if layout == "coco file":
        return Found(layout, (), f"read as COCO: {path.name}")
    if layout == "csv":
        splits = tuple(csv.find_splits(path))
        return Found(layout, () if splits == (ALL,) else splits, f"read as a table of boxes: {path.name}")
    return Found(layout, tuple(yolo.find_splits(path)), f"read as YOLO: {read_yolo(path).says()}")


def open_split(
    data: str,
    split: str | None,
    images: str | None = None,
    on_bad: OnBad = "error",
    one_based: bool | None = None,
    together: Sequence[str] = (),
    option: str = "--data ",
    found: Found | None = None,
    pixels: PixelType = RGB,
    allow_links: bool = False,
) -> DetectionData:
    """Open one split of a data set, of any layout; it is the training and the validation split of what is returned.

    ``annotations("val")`` reads it, ``image_key`` names its images as proposal stores do. ``images`` is the folder of the images
    of an annotation file or a table; ``one_based``, whether VOC's boxes count pixels from 1, None for what the folder says of
    itself, or else true; ``together``, further splits whose classes are to be numbered with those of this one, where none are
    listed (VOC); ``option``, what a message calls ``data``; ``found``, what `recognize` made of it; ``allow_links``, whether images
    may lie outside of the folder. A UsageError if the layout is not known, or the split or folder that it needs is not given.
    """
    found = recognize(data, option) if found is None else found
    path, layout, splits = Path(data), found.layout, found.splits
    if images is not None and layout not in ("coco file", "csv"):
        raise UsageError(
            f"--images {images}: is for an annotation file or a table, but {option}{data} is {found.says}; leave it out"
        )
    read_as: dict[str, Any] = {"channels": pixels.channels, "range": pixels.range}
    common = {"on_bad": on_bad, "allow_links": allow_links, **read_as}
    if layout == "coco file":
        if images is None:
            raise UsageError(f"{path} is an annotation file: say with --images where its images are")
        files = coco.COCOFiles(str(path.resolve()), str(Path(images).resolve()))
        return coco.COCO(str(path.parent), train=files, val=files, **common)
    if split is None and splits == (ALL,):
        split = ALL
    if split is None and splits:
        names = f"{', '.join(splits[:8])}{', ...' if len(splits) > 8 else ''}"
        raise UsageError(f"{option}{data} has several splits: name one with --split; there are {names}")
    if layout == "csv":
        return _open_table(path, split or ALL, images, common)
    if split is None and is_remote(data):
        raise UsageError(f"{option}{data}: a server is not asked which splits it has: name one with --split")
    if split is None:
        raise UsageError(f"{option}{data} has no splits; {EXPECTED}")
    if layout == "coco":
        return coco.COCO(data, train=split, val=split, **common)
    if layout == "yolo":
        return yolo.YOLO(data, train=split, val=split, **common)
    if layout == "shards":
        root = data if is_remote(data) or not (path / INDEX).is_file() else str(path.parent)
        return Shards(root, train=split, val=split, **read_as)
    return _open_voc(data, split, common, one_based, together, splits)


def _open_table(path: Path, split: str, images: str | None, common: dict[str, Any]) -> csv.CSVBoxes:
    root, file = (path.parent, path.name) if path.is_file() else (path, csv.NAME)
    folder = "." if images is None else str(Path(images).resolve())
    tables = list(dict.fromkeys(table for table, _ in csv.find_splits(path).values()))
    names = list(csv.find_classes(tables)) if len(tables) > 1 else "auto"
    format = csv.CSVFormat(class_names=names, file=file, images=folder)
    return csv.CSVBoxes(str(root), train=split, val=split, format=format, **common)


def _open_voc(
    data: str,
    split: str,
    common: dict[str, Any],
    one_based: bool | None,
    together: Sequence[str],
    splits: Sequence[str],
) -> voc.VOC:
    names: list[str] | Literal["auto"] = "auto"
    if together:
        faults = Faults("skip", allow_links=common["allow_links"])
        names = list(VOCSource(Path(data), list(dict.fromkeys([split, *together])), faults).class_names())
    if one_based is None:
        known = read_class_list(Path(data))
        one_based = known is None or known.one_based
    format = voc.VOCFormat(class_names=names, one_based=one_based)
    opened = voc.VOC(data, train=split, val=split, format=format, **common)
    if not together and split in splits and len(splits) > 1 and not opened.occurring():  # no image of it has objects
        return _open_voc(data, split, common, one_based, splits, ())
    return opened


def layout_of(path: Path) -> Layout | None:
    """The layout of a folder or file; None if it is in none that is known."""
    if path.is_file():
        known = _FILES.get(path.suffix.lower())
        return known or ("coco file" if may_be_export(path.name) else None)
    found, faults = _ask_all(path, None)
    layouts: list[Layout] = [*found, *faults]
    return layouts[0] if layouts else None

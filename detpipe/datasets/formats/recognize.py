"""Recognize the layout of a data set by what lies in its folder, for commands that only need its images and boxes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from detpipe.datasets.datamodule import DetectionData
from detpipe.datasets.faults import OnBad
from detpipe.datasets.fetch import is_remote
from detpipe.datasets.formats.class_list import read_class_list
from detpipe.datasets.formats.coco import COCO, COCOFiles
from detpipe.datasets.formats.csv import NAME as CSV_NAME
from detpipe.datasets.formats.csv import CSVBoxes, CSVFormat, splits_of
from detpipe.datasets.formats.csv_table import Table
from detpipe.datasets.formats.voc import VOC, VOCFormat, find_class_names
from detpipe.datasets.formats.yolo import YOLO
from detpipe.datasets.formats.yolo_yaml import NAME as YOLO_NAME
from detpipe.datasets.formats.yolo_yaml import read_yolo_yaml
from detpipe.datasets.shards.dataset import Shards
from detpipe.datasets.shards.index import ARRAYS, INDEX
from detpipe.support.errors import UsageError

Layout = Literal["voc", "coco", "coco file", "yolo", "csv", "shards"]
EXPECTED = (
    "expected a folder in VOC layout (ImageSets/Main/SPLIT.txt), COCO layout (annotations/instances_SPLIT.json) or YOLO layout "
    f"({YOLO_NAME}), a COCO annotation file (*.json), a table of boxes (*.csv, or a folder with {CSV_NAME}), or shards (a folder "
    f"with SPLIT/{INDEX}, or its web address)"
)


def open_split(
    data: str,
    split: str | None,
    images: str | None = None,
    on_bad: OnBad = "error",
    one_based: bool | None = None,
    together: Sequence[str] = (),
    option: str = "--data ",
) -> DetectionData:
    """Open one split of a data set; it is the training and the validation split of what is returned.

    Args:
        data: a folder in VOC, COCO or YOLO layout, a COCO annotation file, a table of boxes, or shards.
        split: its name, such as "trainval", "2007:trainval" or "val2017"; not used for a file without splits.
        images: the folder of the images, for an annotation file or a table.
        on_bad: "error" refuses data with any fault; "skip" leaves faulty records out and counts them.
        one_based: whether VOC's boxes count pixels from 1; None for what the folder says of itself, or else true.
        together: further splits whose classes are to be numbered with those of this one, where none are listed (VOC).
        option: what a message calls ``data``.

    Returns:
        The data; ``annotations("val")`` reads the split, ``image_key`` names its images as proposal stores do.

    Raises:
        UsageError: the layout is not known, or the split or folder that it needs is not given.
    """
    path, layout = Path(data), known_layout(data, option)
    if layout == "coco file":
        if images is None:
            raise UsageError(f"{path} is an annotation file: say with --images where its images are")
        files = COCOFiles(str(path.resolve()), str(Path(images).resolve()))
        return COCO(str(path.parent), train=files, val=files, on_bad=on_bad)
    splits = split_names(data, option)
    if split is None and splits:
        names = f"{', '.join(splits[:8])}{', ...' if len(splits) > 8 else ''}"
        raise UsageError(f"{option}{data} has several splits: name one with --split; there are {names}")
    if layout == "csv":
        table = _table(path)
        folder = "." if images is None else str(Path(images).resolve())
        chosen = split if splits and split is not None else table.name
        format = CSVFormat(file=table.name, images=folder)
        return CSVBoxes(str(table.parent), train=chosen, val=chosen, format=format, on_bad=on_bad)
    if split is None and is_remote(data):
        raise UsageError(f"{option}{data}: a server is not asked which splits it has: name one with --split")
    if split is None:
        raise UsageError(f"{option}{data} has no splits; {EXPECTED}")
    if layout == "coco":
        return COCO(data, train=split, val=split, on_bad=on_bad)
    if layout == "yolo":
        return YOLO(data, train=split, val=split, on_bad=on_bad)
    if layout == "shards":
        root = data if is_remote(data) or not _is_split(path) else str(path.parent)
        return Shards(root, train=split, val=split)
    return _open_voc(data, split, on_bad, one_based, together)


def _open_voc(data: str, split: str, on_bad: OnBad, one_based: bool | None, together: Sequence[str]) -> VOC:
    names: list[str] | Literal["auto"] = "auto"
    if together:
        names = list(find_class_names(data, list(dict.fromkeys([split, *together]))))
    if one_based is None:
        known = read_class_list(Path(data))
        one_based = known is None or known.one_based
    format = VOCFormat(class_names=names, one_based=one_based)
    return VOC(data, train=split, val=split, format=format, on_bad=on_bad)


def known_layout(data: str, option: str = "--data ") -> Layout:
    """The layout of a data set.

    Args:
        data: as for `open_split`.
        option: what a message calls it.

    Returns:
        The layout.

    Raises:
        UsageError: there is nothing, or it is in no layout that is known.
    """
    if is_remote(data):
        return "shards"
    if not Path(data).exists():
        raise UsageError(f"{option}{data} does not exist; {EXPECTED}")
    layout = layout_of(Path(data))
    if layout is None:
        raise UsageError(f"{option}{data} has no known layout; {EXPECTED}")
    return layout


def layout_of(path: Path) -> Layout | None:
    """The layout of a folder or file; None if it is in none that is known."""
    if path.is_file():
        kinds: dict[str, Layout] = {".json": "coco file", ".csv": "csv", ".yaml": "yolo", ".yml": "yolo"}
        return kinds.get(path.suffix.lower())
    if is_coco(path):
        return "coco"
    if is_voc(path):
        return "voc"
    if (path / YOLO_NAME).is_file():
        return "yolo"
    if (path / CSV_NAME).is_file():
        return "csv"
    return "shards" if _is_split(path) or _shard_folders(path) else None


def is_voc(path: Path) -> bool:
    """Whether a folder is in VOC layout, or holds folders that are."""
    return any(path.glob("ImageSets/Main")) or any(path.glob("*/ImageSets/Main"))


def is_coco(path: Path) -> bool:
    """Whether a folder is in COCO layout."""
    return any(path.glob("annotations/instances_*.json"))


def split_names(data: str, option: str = "--data ") -> tuple[str, ...]:
    """The splits of a data set.

    Args:
        data: as for `open_split`.
        option: what a message calls it.

    Returns:
        Their names; none for a COCO annotation file, a table without a column ``split``, or shards on a server.

    Raises:
        DetpipeError: the layout is not known, or the file that names the splits cannot be read.
    """
    path, layout = Path(data), known_layout(data, option)
    if layout == "coco file":
        return ()
    if layout == "coco":
        return tuple(file.stem.removeprefix("instances_") for file in sorted(path.glob("annotations/instances_*.json")))
    if layout == "yolo":
        return tuple(read_yolo_yaml(path).splits)
    if layout == "shards":
        return (path.name,) if _is_split(path) else tuple(folder.name for folder in _shard_folders(path))
    if layout == "csv":
        return splits_of(Table(_table(path)))
    names = _voc_lists(path)
    for folder in sorted(path.glob("*/ImageSets/Main")):
        year = folder.parents[1].name.removeprefix("VOC")
        names += [f"{year}:{name}" for name in _voc_lists(folder.parents[1])]
    return tuple(names)


def _is_split(path: Path) -> bool:
    """Whether a folder holds the shards of a split."""
    return (path / INDEX).is_file() and (path / ARRAYS).is_file()


def _shard_folders(path: Path) -> list[Path]:
    """The folders of splits in a folder of shards; those that are only begun are none."""
    return [file.parent for file in sorted(path.glob(f"*/{INDEX}")) if _is_split(file.parent)]


def _voc_lists(folder: Path) -> list[str]:
    """The lists of a folder in VOC layout, without those of one class (``cat_train`` beside ``train``)."""
    names = [file.stem for file in sorted(folder.glob("ImageSets/Main/*.txt"))]
    return [name for name in names if not ("_" in name and name.rpartition("_")[2] in names)]


def _table(path: Path) -> Path:
    return path / CSV_NAME if path.is_dir() else path

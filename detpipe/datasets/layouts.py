"""Recognize the layout of a data set by what lies in its folder, for commands that only need its images and boxes."""

from __future__ import annotations

from pathlib import Path

from detpipe.datasets.coco import COCO, COCOFiles
from detpipe.datasets.datamodule import DetectionData
from detpipe.datasets.faults import OnBad
from detpipe.datasets.voc import VOC, VOCFormat
from detpipe.errors import UsageError

EXPECTED = (
    "expected a folder in VOC layout (ImageSets/Main/SPLIT.txt) or COCO layout (annotations/instances_SPLIT.json), or a COCO "
    "annotation file (*.json)"
)


def open_split(data: str, split: str | None, images: str | None = None, on_bad: OnBad = "error") -> DetectionData:
    """Open one split of a data set; it is the training and the validation split of what is returned.

    Args:
        data: a folder in VOC or COCO layout, or a COCO annotation file.
        split: its name, such as "trainval", "2007:trainval" or "val2017"; not used for a file.
        images: the folder of the images, for an annotation file.
        on_bad: "error" refuses data with any fault; "skip" leaves faulty records out and counts them.

    Returns:
        The data; ``annotations("val")`` reads the split, ``image_key`` names its images as proposal stores do.

    Raises:
        UsageError: the layout is not known, or the split or folder that it needs is not given.
    """
    path = Path(data)
    if path.suffix == ".json" and path.is_file():
        if images is None:
            raise UsageError(f"{path} is an annotation file: say with --images where its images are")
        files = COCOFiles(str(path.resolve()), str(Path(images).resolve()))
        return COCO(str(path.parent), train=files, val=files, on_bad=on_bad)
    if not path.exists():
        raise UsageError(f"--data {data} does not exist; {EXPECTED}")
    voc, coco = is_voc(path), is_coco(path)
    if not voc and not coco:
        raise UsageError(f"--data {data} has no known layout; {EXPECTED}")
    if split is None:
        raise UsageError(f"--data {data} has several splits: name one with --split; there are {_splits(path)}")
    if coco:
        return COCO(data, train=split, val=split, on_bad=on_bad)
    return VOC(data, train=split, val=split, format=VOCFormat(class_names="auto"), on_bad=on_bad)


def is_voc(path: Path) -> bool:
    """Whether a folder is in VOC layout, or holds folders that are."""
    return any(path.glob("ImageSets/Main")) or any(path.glob("*/ImageSets/Main"))


def is_coco(path: Path) -> bool:
    """Whether a folder is in COCO layout."""
    return any(path.glob("annotations/instances_*.json"))


def _splits(path: Path) -> str:
    names = [file.stem.removeprefix("instances_") for file in sorted(path.glob("annotations/instances_*.json"))]
    names += [file.stem for file in sorted(path.glob("ImageSets/Main/*.txt"))]
    for file in sorted(path.glob("*/ImageSets/Main/*.txt")):
        names.append(f"{file.parents[2].name.removeprefix('VOC')}:{file.stem}")
    names = [name for name in names if "_" not in name]  # VOC's lists of one class
    return f"{', '.join(names[:8])}{', ...' if len(names) > 8 else ''}"

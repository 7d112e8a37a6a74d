"""Data in YOLO's text layout: ``data.yaml``, folders or lists of images, and a text file of boxes an image.

::

    root/
      data.yaml                   see yolo_yaml.py
      images/train/a.jpg
      labels/train/a.txt          see yolo_labels.py; a missing or empty one is an image without objects
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from detpipe.datasets.datamodule import DetectionData, Split
from detpipe.datasets.decode import image_size
from detpipe.datasets.faults import Faults, Policy
from detpipe.datasets.records import RecordBuilder, build_annotations
from detpipe.datasets.stored_proposals import file_key
from detpipe.datasets.yolo_images import ImageFinder, ListedImage
from detpipe.datasets.yolo_labels import LabelReader
from detpipe.datasets.yolo_yaml import read_yolo_yaml
from detpipe.errors import DataError
from detpipe.types import Annotations


class YOLO(DetectionData):
    """Detection data in YOLO's text layout.

    Args:
        root: the folder with ``data.yaml``, or such a file under any name.
        train: the training split: a key of ``data.yaml``, or several.
        val: the validation split, in the same way.
        test: the split for the final test, in the same way; none by default.
        common: what all data sets have: ``loader``, ``augment``, ``seed``, ``on_bad``, ``proposals`` and ``resize`` of
            :class:`~detpipe.datasets.datamodule.DetectionData`.
            In a proposal store an image is called by its file, relative to the root.
    """

    image_key = staticmethod(file_key)

    def __init__(
        self,
        root: str,
        train: str | list[str] = "train",
        val: str | list[str] = "val",
        test: str | list[str] | None = None,
        **common: Any,
    ) -> None:
        super().__init__(**common)
        self.root = str(root)
        self.splits = {"train": train, "val": val, "test": test}

    def load(self, split: Split) -> Annotations:
        """Read the images and labels of a split."""
        keys = self.splits[split]
        if not keys:
            raise DataError(f"no {split} split: set the argument {split} to a key of data.yaml, such as {split}")
        return load_yolo(self.root, keys, self.on_bad)


def load_yolo(root: str | Path, split: str | Sequence[str], on_bad: Policy = "error") -> Annotations:
    """Read one split of a data set in YOLO layout and check it against its images.

    Images are numbered 1, 2, ... in the order of the split (folders by name), skipped ones included; that number is the
    ``image_id``. Their sizes are read from their headers. Polygons become their bounding boxes and are counted.

    Args:
        root: the folder with ``data.yaml``, or such a file under any name.
        split: a key of ``data.yaml``, or several, which are read in turn.
        on_bad: ``"error"`` refuses a split with any faulty record; ``"skip"`` leaves these records out and counts them.

    Returns:
        The annotations of the images of the split.

    Raises:
        DataError: for anything wrong, naming the file, the line, the field and its value.
    """
    file = read_yolo_yaml(root)
    splits = (split,) if isinstance(split, str) else tuple(split)
    faults = Faults(f"{file.path} ({', '.join(splits)})", on_bad)
    finder = ImageFinder(file, splits, faults)
    built = RecordBuilder(file.class_names, file.category_ids)
    reader = LabelReader(built, faults)
    for item in tqdm(finder.found, desc="reading labels", unit="image", disable=None, leave=False):
        size = _size(item, faults)
        if size is None:
            _skip(item.labels, reader)
        elif reader.read(item.labels, size):
            built.add_image(item.file_name, item.image_id, size)
    for labels in finder.orphans:
        faults.image("file missing", f"{labels}: there is no image of this name for these labels")
        _skip(labels, reader)
    records = built.records(finder.root, finder.folders, finder.lines + len(finder.orphans), reader.boxes_read)
    longer = records.sizes[records.box_image].max(axis=1, initial=1)[:, None]
    records.clip_tolerance = 1e-6 * longer  # six digits, as most tools write
    records.counts = {"boxes from polygons": reader.polygons} if reader.polygons else {}
    return build_annotations(records, faults)


def _size(item: ListedImage, faults: Faults) -> tuple[int, int] | None:
    """Height and width; None, and a fault, where the file has none."""
    try:
        return image_size(item.image)
    except DataError as error:
        faults.image("unreadable" if item.image.exists() else "file missing", f"image {item.image_id}: {error}")
        return None


def _skip(labels: Path, reader: LabelReader) -> None:
    """Count the boxes of an image that is left out."""
    count = len(reader.lines(labels) or ())
    reader.boxes_read += count
    reader.faults.skipped["boxes skipped: image skipped"] += count

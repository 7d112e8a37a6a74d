"""From parsed records to packed `Annotations`: every check of files and geometry, in one place for all layouts.

A parser (COCO, VOC) fills `Records` and reports what it could not even parse to `Faults`; `build_annotations` does the
rest. Images I, boxes B.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from detpipe.datasets.decode import decoded_size
from detpipe.datasets.faults import Faults
from detpipe.datasets.workers import look_at_images
from detpipe.support.errors import DataError
from detpipe.types import Annotations, Segmentations

_CLIP_TOLERANCE = 1e-6  # pixels: less than this over the border is rounding of x + w, not a fault to count
_Numbers = npt.NDArray[np.float64]


@dataclass
class Records:
    """What a parser read, before any check of geometry or files.

    Args:
        root: the folder that ``file_names`` are relative to.
        folders: the image folders that files may lie in, links followed; ``root`` itself for COCO.
        file_names: [I] with forward slashes.
        image_ids: [I] unique.
        sizes: [I, 2] height, width.
        box_image: [B] the row of the image that each box belongs to.
        boxes: [B, 4] xyxy in continuous pixel coordinates.
        labels: [B] in 1..K.
        iscrowd: [B].
        difficult: [B].
        area: [B] square pixels; NaN stands for the area of the box.
        class_names: [K].
        category_ids: [K].
        name_box: what a message calls box ``b``: its record and the field with its value.
        boxes_read: the boxes that the source holds, those that the parser had to drop included.
        images_read: the images that the source lists, those that the parser had to drop included.
        clip_tolerance: pixels, for all or [B, 1]: what is less over the border is rounding, and not counted as clipped.
    """

    root: Path
    folders: list[Path]
    file_names: list[str]
    image_ids: npt.NDArray[np.int64]
    sizes: npt.NDArray[np.int64]
    box_image: npt.NDArray[np.int64]
    boxes: npt.NDArray[np.float64]
    labels: npt.NDArray[np.int64]
    iscrowd: npt.NDArray[np.bool_]
    difficult: npt.NDArray[np.bool_]
    area: npt.NDArray[np.float64]
    class_names: tuple[str, ...]
    category_ids: tuple[int, ...]
    name_box: Callable[[int], str]
    images_read: int
    boxes_read: int
    clip_tolerance: float | _Numbers = _CLIP_TOLERANCE
    counts: dict[str, int] = field(default_factory=dict)  # the parser's own, copied into the result
    segmentations: Segmentations | None = None  # of the boxes


class RecordBuilder:
    """Makes `Records` of images and boxes that a parser reads one by one.

    Args:
        class_names: [K].
        category_ids: [K].
    """

    def __init__(self, class_names: tuple[str, ...], category_ids: tuple[int, ...]) -> None:
        self.class_names, self.category_ids = class_names, category_ids
        self.images: list[tuple[str, int, int, int]] = []  # file name, id, height, width
        self._boxes: list[tuple[float, ...]] = []  # x1, y1, x2, y2
        self._box_of: list[tuple[int, int, bool, bool]] = []  # row of the image, label, difficult, crowd
        self._areas: list[float] = []
        self._where: list[str] = []

    def add_image(self, file_name: str, image_id: int, size: tuple[int, int]) -> None:
        """Add an image, of height and width; its row is their number so far."""
        self.images.append((file_name, image_id, *size))

    def add_box(
        self,
        image: int,
        box: tuple[float, ...],
        label: int,
        where: str,
        difficult: bool = False,
        iscrowd: bool = False,
        area: float = math.nan,
    ) -> None:
        """Add a box.

        Args:
            image: the row of its image, which may be added later.
            box: xyxy in continuous pixel coordinates.
            label: in 1..K.
            where: what a message calls the box: its record and the field with its value.
            difficult: the flag.
            iscrowd: the flag.
            area: square pixels; NaN stands for the area of the box.
        """
        self._boxes.append(box)
        self._box_of.append((image, label, difficult, iscrowd))
        self._areas.append(area)
        self._where.append(where)

    def records(self, root: Path, folders: list[Path], images_read: int, boxes_read: int) -> Records:
        """Turn what was added into arrays; the arguments are those of `Records`."""
        box_of = np.array(self._box_of, dtype=np.int64).reshape(-1, 4)
        return Records(
            root=root,
            folders=folders,
            file_names=[image[0] for image in self.images],
            image_ids=np.array([image[1] for image in self.images], dtype=np.int64),
            sizes=np.array([image[2:] for image in self.images], dtype=np.int64).reshape(-1, 2),
            box_image=box_of[:, 0],
            boxes=np.array(self._boxes, dtype=np.float64).reshape(-1, 4),
            labels=box_of[:, 1],
            iscrowd=box_of[:, 3].astype(bool),
            difficult=box_of[:, 2].astype(bool),
            area=np.array(self._areas, dtype=np.float64),
            class_names=self.class_names,
            category_ids=self.category_ids,
            name_box=self._where.__getitem__,
            images_read=images_read,
            boxes_read=boxes_read,
        )


def read_number(text: str) -> float | None:
    """Read a number as other programs write it; None where it is none."""
    try:
        return float(text)
    except ValueError:
        return None


def read_whole(text: str) -> int | None:
    """Read a whole number that fits into 64 bits; None where it is none."""
    digits = text.removeprefix("-")
    return int(text) if digits.isascii() and digits.isdigit() and len(digits) <= 18 else None


def build_annotations(records: Records, faults: Faults) -> Annotations:
    """Check files and boxes, leave out or refuse what is faulty, and pack the rest.

    Boxes that stick out of their image are clipped and counted; boxes without size or wholly outside are faults. With
    ``on_bad="skip"`` every image is decoded once, so that a damaged one is a counted skip now and not an error later.
    Where faults are collected, nothing is raised for them.

    Args:
        records: what the parser read.
        faults: the faults that the parser met; more are added.

    Returns:
        The packed annotations; ``counts`` holds images and boxes read, used, clipped and skipped by reason, with
        read = used + skipped for both.

    Raises:
        DataError: for faults that may not be skipped, labels outside 1..K, or if nothing is left.
    """
    _check_labels(records, faults)
    keep_image = _check_files(records, faults)
    boxes, keep_box, clipped = _check_boxes(records, faults)
    faults.check()
    if faults.decodes:
        rows = np.flatnonzero(keep_image).tolist()
        keep_image &= check_pixels(rows, lambda i: (records.root / records.file_names[i], None), records.sizes, faults)
        faults.check()
    orphans = keep_box & ~keep_image[records.box_image]
    keep_box &= ~orphans
    faults.skipped["boxes skipped: image skipped"] += int(orphans.sum())
    annotations = _pack(records, boxes, keep_image, keep_box)
    annotations.counts.update(_count(records, faults, keep_image, keep_box, clipped))
    _check_not_empty(annotations, faults)
    return annotations


def _check_labels(records: Records, faults: Faults) -> None:
    K = len(records.class_names)
    for b in np.flatnonzero((records.labels < 1) | (records.labels > K)).tolist():
        faults.fatal(
            "label out of range",
            f"{records.name_box(b)}: label {records.labels[b]} is outside 1..{K}, the classes that are known",
        )
    faults.check()


def _check_files(records: Records, faults: Faults) -> npt.NDArray[np.bool_]:
    """Find missing image files, and refuse names that lead out of the image folders; one listing a folder, no stats."""
    keep = np.ones(len(records.file_names), dtype=bool)
    allowed = [folder.resolve() for folder in records.folders]
    listings: dict[str, tuple[set[str], set[str]]] = {}
    for i, name in enumerate(records.file_names):
        if "\0" in name or not name or (_leaves_root(name) and not faults.allow_links):
            keep[i] = False
            faults.fatal(
                "leads out of the folder",
                f"image id {records.image_ids[i]}: file_name {name!r} leads out of the image folder; allow_links: true permits it",
            )
            continue
        folder, _, base = name.rpartition("/")
        if folder not in listings:
            listings[folder] = _list_folder(records.root / folder, allowed)
        files, strangers = listings[folder]
        if base in strangers and not faults.allow_links:
            keep[i] = False
            faults.fatal(
                "leads out of the folder",
                f"image id {records.image_ids[i]}: file_name {name!r} is a link that leads out of the folder; allow_links: true "
                "permits it",
            )
        elif base not in files:
            keep[i] = False
            path = records.root / name
            faults.image("file missing", f"image id {records.image_ids[i]}: file_name {name!r} is missing ({path})")
    return keep


def _leaves_root(name: str) -> bool:
    absolute = not name or name[0] in "/\\" or name[1:2] == ":"
    return absolute or "\0" in name or (".." in name and ".." in name.replace("\\", "/").split("/"))


def _list_folder(folder: Path, allowed: list[Path]) -> tuple[set[str], set[str]]:
    """The names in a folder, and those among them that lie, links followed, outside the allowed folders."""
    if not folder.is_dir():
        return set(), set()
    outside = not _within(folder.resolve(), allowed)
    files: set[str] = set()
    strangers: set[str] = set()
    with os.scandir(folder) as entries:
        for entry in entries:
            files.add(entry.name)
            if outside or (entry.is_symlink() and not _within(Path(entry.path).resolve(), allowed)):
                strangers.add(entry.name)
    return files, strangers


def _within(path: Path, folders: list[Path]) -> bool:
    return any(path.is_relative_to(folder) for folder in folders)


def _check_boxes(
    records: Records, faults: Faults
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.bool_], npt.NDArray[np.bool_]]:
    """The clipped boxes [B, 4], which to keep [B], and which were clipped [B]."""
    size = records.sizes[records.box_image][:, ::-1].astype(np.float64)  # [B, 2] width, height
    low, high = records.boxes[:, :2], records.boxes[:, 2:]
    finite = np.isfinite(records.boxes).all(1)
    sized = (high > low).all(1)
    inside = ((low < size) & (high > 0)).all(1)
    boxes = np.concatenate([low.clip(0, size), high.clip(0, size)], axis=1)
    clipped = np.any(np.abs(boxes - records.boxes) > records.clip_tolerance, axis=1)
    in_float32 = boxes.astype(np.float32)  # what the detector sees must have a size as well
    visible = (in_float32[:, 2:] > in_float32[:, :2]).all(1)
    reasons = (
        ("not a finite number", ~finite, "holds a number that is not finite"),
        ("zero or negative size", finite & ~sized, "has zero or negative size"),
        ("wholly outside the image", finite & sized & ~inside, "lies wholly outside the image"),
        ("zero or negative size", finite & sized & inside & ~visible, "has next to no size inside the image"),
    )
    keep = np.ones(len(boxes), dtype=bool)
    for reason, bad, text in reasons:
        for b in np.flatnonzero(bad).tolist():
            height, width = records.sizes[records.box_image[b]]
            faults.box(reason, f"{records.name_box(b)} {text} of {width} x {height} pixels")
        keep &= ~bad
    if faults.collects:
        for b in np.flatnonzero(clipped & keep).tolist():
            height, width = records.sizes[records.box_image[b]]
            faults.remark(
                "boxes: clipped", f"{records.name_box(b)} sticks out of {width} x {height} pixels and is clipped"
            )
    return boxes, keep, clipped


def check_pixels(
    images: Iterable[int],
    open_image: Callable[[int], tuple[str | Path, bytes | None]],
    sizes: npt.NDArray[np.integer[Any]],
    faults: Faults,
) -> npt.NDArray[np.bool_]:
    """Decode images once and note those that a run would stumble over.

    Args:
        images: the rows of those that are decoded.
        open_image: row -> what a message calls the image, and its bytes if it is no file of its own; called by several threads.
        sizes: [I, 2] height and width in the annotations.
        faults: more are added.

    Returns:
        [I] whether an image can be used, as far as it was looked at.
    """

    def look(row: int) -> DataError | None:
        try:
            name, content = open_image(row)
            height, width = decoded_size(name, content, faults.pixels)
            check_size(name, (height, width), tuple(sizes[row].tolist()))
        except DataError as error:
            return error
        return None

    readable, rows = np.ones(len(sizes), dtype=bool), list(images)
    for row, error in zip(rows, look_at_images(look, rows), strict=True):
        if error is not None:
            readable[row] = False
            faults.image(
                "size differs from the annotation" if isinstance(error, SizeError) else "unreadable", str(error)
            )
    return readable


class SizeError(DataError):
    """An image whose size is not the annotated one."""


def check_size(path: str | Path, found: tuple[int, int], annotated: tuple[int, ...]) -> None:
    """Compare the size of a decoded image with its annotation.

    Args:
        path: the image file.
        found: height and width of the decoded, upright image.
        annotated: height and width in the annotation.

    Raises:
        SizeError: if they differ; with a hint if they are swapped.
    """
    if tuple(found) == tuple(annotated):
        return
    hint = ""
    if tuple(found) == tuple(annotated)[::-1]:
        hint = (
            " (swapped: the annotation may be from before the EXIF orientation was applied, or height and width mixed)"
        )
    raise SizeError(
        f"{path}: the image is {found[1]} x {found[0]} pixels, but its annotation says width {annotated[1]}, height "
        f"{annotated[0]}{hint}; correct the annotation, or set on_bad to 'skip' to leave the image out and count it"
    )


def _pack(
    records: Records,
    boxes: npt.NDArray[np.float64],
    keep_image: npt.NDArray[np.bool_],
    keep_box: npt.NDArray[np.bool_],
) -> Annotations:
    """Sort the kept boxes by image and cut everything to what is kept."""
    rows = np.flatnonzero(keep_box)
    rows = rows[np.argsort(records.box_image[rows], kind="stable")]
    a_image = np.bincount(records.box_image[rows], minlength=len(keep_image))[keep_image]
    kept = boxes[rows]
    area = records.area[rows]
    return Annotations(
        root=records.root,
        file_names=np.array(records.file_names, dtype=np.str_)[keep_image],
        image_ids=records.image_ids[keep_image],
        sizes=records.sizes[keep_image].astype(np.int32),
        offsets=np.concatenate([[0], np.cumsum(a_image)]).astype(np.int64),
        boxes=kept,
        labels=records.labels[rows],
        iscrowd=records.iscrowd[rows],
        difficult=records.difficult[rows],
        area=np.where(np.isnan(area), (kept[:, 2] - kept[:, 0]) * (kept[:, 3] - kept[:, 1]), area),
        class_names=records.class_names,
        category_ids=records.category_ids,
        segmentations=None if records.segmentations is None else records.segmentations.take(rows),
    )


def _count(
    records: Records,
    faults: Faults,
    keep_image: npt.NDArray[np.bool_],
    keep_box: npt.NDArray[np.bool_],
    clipped: npt.NDArray[np.bool_],
) -> dict[str, int]:
    return {
        "images read": records.images_read,
        "images used": int(keep_image.sum()),
        "boxes read": records.boxes_read,
        "boxes used": int(keep_box.sum()),
        "boxes clipped": int((clipped & keep_box).sum()),
        **records.counts,
        **{reason: n for reason, n in sorted(faults.skipped.items()) if n},
    }


def _check_not_empty(annotations: Annotations, faults: Faults) -> None:
    counts = annotations.counts
    for what in ("images", "boxes"):
        if counts[f"{what} used"] == 0 and (what == "images" or counts["boxes read"] > 0):
            skipped = "; ".join(f"{key}: {n}" for key, n in sorted(faults.skipped.items()) if n)
            raise DataError(
                f"{faults.source}: no {what} left of {counts[f'{what} read']} read ({skipped or 'nothing there'}); "
                f"check the annotations, the image folder {annotations.root} and the class names"
            )

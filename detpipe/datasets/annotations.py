"""From what a format locates in its files to packed `Annotations`: every check of fields, files and geometry, for all formats.

A format gives an `AnnotationBuilder` the texts or numbers of each image and box, and where they stand. Images I, boxes B.
"""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from detpipe.datasets.decode import image_size, read_reduced
from detpipe.datasets.faults import Faults
from detpipe.datasets.workers import look_at_images
from detpipe.support.errors import DataError
from detpipe.support.strict_json import shorten
from detpipe.support.suggest import did_you_mean
from detpipe.types import Annotations, PixelType, Segmentations

_CLIP_TOLERANCE = 1e-6  # pixels: less than this over the border is rounding of x + w, not a fault to count
_FLAGS = {"": False, "0": False, "1": True, "false": False, "true": True}
_Chosen, _Floats = npt.NDArray[np.bool_], npt.NDArray[np.float64]


class BadBoxError(Exception):
    """A box that cannot be used; its arguments are those of :meth:`~detpipe.datasets.faults.Faults.box`."""


@dataclass(eq=False)
class AnnotationBuilder:
    """Takes the images and boxes of a split, checks each of their fields once, and packs what is sound.

    A format that has whole columns of numbers sets the attributes in place of adding images and boxes one by one.
    """

    faults: Faults  # takes what cannot be used
    class_names: Sequence[str]  # [K]
    category_ids: Sequence[int]  # [K]
    file_names: list[str] = field(default_factory=list)  # [I] with forward slashes, relative to the root
    image_ids: Any = field(default_factory=list)  # [I] unique
    sizes: Any = field(default_factory=list)  # [I, 2] height, width
    box_image: Any = field(default_factory=list)  # [B] the row of the image that each box belongs to
    boxes: Any = field(default_factory=list)  # [B, 4] xyxy in continuous pixel coordinates
    labels: Any = field(default_factory=list)  # [B] in 1..K
    iscrowd: Any = field(default_factory=list)  # [B]
    difficult: Any = field(default_factory=list)  # [B]
    area: Any = field(default_factory=list)  # [B] square pixels; NaN stands for the area of the box
    segmentations: Segmentations | None = None  # of the boxes
    images_read: int = 0  # the images that the source lists, those that had to be dropped included
    boxes_read: int = 0  # in the same way
    counts: dict[str, int] = field(default_factory=dict)  # the format's own

    def __post_init__(self) -> None:
        self.label_of = {name: label for label, name in enumerate(self.class_names, start=1)}
        self._where: list[str] = []
        # what a message calls box ``b``: its record and the field with its value
        self.name_box: Callable[[int], str] = self._where.__getitem__

    def add_image(self, file_name: str, image_id: int, size: tuple[int, int]) -> int:
        """Add an image, of height and width; its row."""
        self.file_names.append(file_name)
        self.image_ids.append(image_id)
        self.sizes.append(size)
        return len(self.file_names) - 1

    def add_box(
        self,
        image: int,
        box: Sequence[float],
        label: int,
        where: str,
        difficult: bool = False,
        iscrowd: bool = False,
        area: float = math.nan,
    ) -> None:
        """Add a box of the image of a row, which may be added later; ``where`` is what a message calls it."""
        self.box_image.append(image)
        self.boxes.append(box)
        self.labels.append(label)
        self.difficult.append(difficult)
        self.iscrowd.append(iscrowd)
        self.area.append(area)
        self._where.append(where)

    def size_in_file(self, root: Path, name: str, where: str) -> tuple[int, int] | None:
        """Read height and width from the header of an image; None, and a fault, where it has none or its name leads out."""
        if "\0" in name or (leaves_folder(name) and not self.faults.allow_links):
            text = f"{where}: {name!r} leads out of {root}; allow_links: true permits it"
            return self.faults.fatal("leads out of the folder", text)
        try:
            return image_size(root / name)
        except DataError as error:
            reason = "unreadable" if (root / name).exists() else "file missing"
            return self.faults.image(reason, f"{where}: {error}")

    def label(self, name: str, where: str, field: str) -> int:
        """The label 1..K of a class; `BadBoxError` if there is no such class."""
        if name in self.label_of:
            return self.label_of[name]
        known = shorten(", ".join(self.class_names), 300).strip("'")
        raise BadBoxError(
            "unknown class name",
            f"{where}: {field} is {name!r}, which is not among class_names ({known}){did_you_mean(name, self.class_names)}; "
            "class_names lists the classes of this data, or is 'auto'",
            f"class {name}",
        )

    def build(
        self, root: Path, folders: Sequence[Path], clip_tolerance: float | _Floats = _CLIP_TOLERANCE
    ) -> Annotations:
        """Check files and boxes, leave out or refuse what is faulty, and pack the rest.

        Boxes that stick out of their image are clipped, and counted if by more than ``clip_tolerance`` pixels, for all or [B, 1];
        boxes without size or wholly outside are faults. Where faulty records are skipped, every image is decoded once, so that a
        damaged one is a counted skip now and not an error later. File names are relative to the root; files must lie, links
        followed, in one of the folders.

        ``counts`` of the annotations holds images and boxes read, used, clipped and skipped by reason, with read = used + skipped
        for both. A DataError for faults that may not be skipped, labels outside 1..K, or if nothing is left.
        """
        faults = self.faults
        self._make_arrays()
        keep_image = self._check_files(root, [folder.resolve() for folder in folders])
        boxes, keep_box, clipped = self._check_boxes(clip_tolerance)
        faults.check()
        if faults.decodes:
            rows = np.flatnonzero(keep_image).tolist()
            keep_image[check_pixels(rows, lambda i: (root / self.file_names[i], None), faults, self.sizes)] = False
            faults.check()
        orphans = keep_box & ~keep_image[self.box_image]
        keep_box &= ~orphans
        faults.boxes_of_skipped_image(int(orphans.sum()))
        counts = {
            "images read": self.images_read,
            "images used": int(keep_image.sum()),
            "boxes read": self.boxes_read,
            "boxes used": int(keep_box.sum()),
            "boxes clipped": int((clipped & keep_box).sum()),
            **self.counts,
            **{reason: n for reason, n in sorted(faults.skipped.items()) if n},
        }
        _check_not_empty(counts, root, faults)
        return self._pack(root, boxes, keep_image, keep_box, counts)

    def _make_arrays(self) -> None:
        self.image_ids = np.asarray(self.image_ids, dtype=np.int64)
        self.sizes = np.asarray(self.sizes, dtype=np.int64).reshape(-1, 2)
        self.boxes = np.asarray(self.boxes, dtype=np.float64).reshape(-1, 4)
        for name, kind in (("box_image", np.int64), ("labels", np.int64), ("area", np.float64)):
            setattr(self, name, np.asarray(getattr(self, name), dtype=kind))
        self.iscrowd, self.difficult = (np.asarray(flags, dtype=bool) for flags in (self.iscrowd, self.difficult))
        K = len(self.class_names)
        for b in np.flatnonzero((self.labels < 1) | (self.labels > K)).tolist():
            text = f"{self.name_box(b)}: label {self.labels[b]} is outside 1..{K}, the classes that are known"
            self.faults.fatal("label out of range", text)
        self.faults.check()

    def _check_files(self, root: Path, allowed: list[Path]) -> _Chosen:
        """Find missing image files, and refuse names that lead out of the image folders; one listing a folder, no stats."""
        faults = self.faults
        keep = np.ones(len(self.file_names), dtype=bool)
        listings: dict[str, tuple[set[str], set[str]]] = {}
        for i, name in enumerate(self.file_names):
            folder, _, base = name.rpartition("/")
            leads_out = "\0" in name or not name or (leaves_folder(name) and not faults.allow_links)
            if not leads_out and folder not in listings:
                listings[folder] = _list_folder(root / folder, allowed)
            files, strangers = ((), ()) if leads_out else listings[folder]
            keep[i] = base in files and (base not in strangers or faults.allow_links)
            if keep[i]:
                continue
            where = f"image id {self.image_ids[i]}: file_name {name!r}"
            if leads_out or base in strangers:
                what = "leads out of the image folder" if leads_out else "is a link that leads out of the folder"
                faults.fatal("leads out of the folder", f"{where} {what}; allow_links: true permits it")
            else:
                faults.image("file missing", f"{where} is missing ({root / name})")
        return keep

    def _check_boxes(self, clip_tolerance: float | _Floats) -> tuple[_Floats, _Chosen, _Chosen]:
        """The clipped boxes [B, 4], which to keep [B], and which were clipped [B]."""
        size = self.sizes[self.box_image][:, ::-1].astype(np.float64)  # [B, 2] width, height
        low, high = self.boxes[:, :2], self.boxes[:, 2:]
        finite = np.isfinite(self.boxes).all(1)
        sized = (high > low).all(1)
        inside = ((low < size) & (high > 0)).all(1)
        boxes = np.concatenate([low.clip(0, size), high.clip(0, size)], axis=1)
        clipped = np.any(np.abs(boxes - self.boxes) > clip_tolerance, axis=1)
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
                self.faults.box(reason, f"{self.name_box(b)} {text} of {self._pixels(b)}")
            keep &= ~bad
        for b in np.flatnonzero(clipped & keep).tolist() if self.faults.collects else ():
            self.faults.remark("boxes: clipped", f"{self.name_box(b)} sticks out of {self._pixels(b)} and is clipped")
        return boxes, keep, clipped

    def _pixels(self, box: int) -> str:
        height, width = self.sizes[self.box_image[box]]
        return f"{width} x {height} pixels"

    def _pack(
        self, root: Path, boxes: _Floats, keep_image: _Chosen, keep_box: _Chosen, counts: dict[str, int]
    ) -> Annotations:
        rows = np.flatnonzero(keep_box)
        rows = rows[np.argsort(self.box_image[rows], kind="stable")]
        per_image = np.bincount(self.box_image[rows], minlength=len(keep_image))[keep_image]
        kept, area = boxes[rows], self.area[rows]
        return Annotations(
            root=root,
            file_names=np.array(self.file_names, dtype=np.str_)[keep_image],
            image_ids=self.image_ids[keep_image],
            sizes=self.sizes[keep_image].astype(np.int32),
            offsets=np.concatenate([[0], np.cumsum(per_image)]).astype(np.int64),
            boxes=kept,
            labels=self.labels[rows],
            iscrowd=self.iscrowd[rows],
            difficult=self.difficult[rows],
            area=np.where(np.isnan(area), (kept[:, 2] - kept[:, 0]) * (kept[:, 3] - kept[:, 1]), area),
            class_names=tuple(self.class_names),
            category_ids=tuple(self.category_ids),
            counts=counts,
            segmentations=None if self.segmentations is None else self.segmentations.take(rows),
        )


def read_number(text: str) -> float | None:
    """Read a number as other programs write it; None where it is none."""
    try:
        return None if "_" in text else float(text)  # Python's own way of writing 1000
    except ValueError:
        return None


def read_finite(text: str, where: str, field: str) -> float:
    """Read a finite number of a box, or raise `BadBoxError`."""
    value = read_number(text)
    if value is None or not math.isfinite(value):
        got = shorten(text) if text else "nothing, but other columns of the box are filled"
        raise BadBoxError("not a number", f"{where}: {field} must be a finite number, got {got}")
    return value


def read_flag(text: str, where: str, name: str, field: str) -> bool:
    """Read the flag ``name`` of a box, which messages call ``field``, or raise `BadBoxError`."""
    if text.lower() not in _FLAGS:
        raise BadBoxError(f"bad {name}", f"{where}: {field} must be 0 or 1, got {shorten(text)}")
    return _FLAGS[text.lower()]


def read_area(text: str, where: str, field: str) -> float:
    """Read the area of a box, NaN where there is none, or raise `BadBoxError`."""
    value = read_number(text) if text else math.nan
    if value is None or (text and not 0 <= value < math.inf):
        raise BadBoxError("bad area", f"{where}: {field} must be a number of at least 0, got {shorten(text)}")
    return value


def read_whole(text: str) -> int | None:
    """Read a whole number that fits into 64 bits; None where it is none."""
    digits = text.removeprefix("-")
    return int(text) if digits.isascii() and digits.isdigit() and len(digits) <= 18 else None


def leaves_folder(name: str) -> bool:
    """Whether a file name is absolute, has a drive, or goes up."""
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


def _check_not_empty(counts: dict[str, int], root: Path, faults: Faults) -> None:
    for what in ("images", "boxes"):
        if counts[f"{what} used"] == 0 and (what == "images" or counts["boxes read"] > 0):
            skipped = "; ".join(f"{key}: {n}" for key, n in sorted(faults.skipped.items()) if n)
            raise DataError(
                f"{faults.source}: no {what} left of {counts[f'{what} read']} read ({skipped or 'nothing there'}); "
                f"check the annotations, the image folder {root} and the class names"
            )


def check_pixels(
    rows: Sequence[int],
    open_image: Callable[[int], tuple[str | Path, bytes | None]],
    faults: Faults,
    sizes: npt.NDArray[np.integer[Any]] | None = None,
) -> list[int]:
    """Decode images once and note those that a run would stumble over: their rows.

    ``open_image`` gives what a message calls the image of a row, and its bytes if it is no file of its own; several threads call
    it. ``sizes`` are [I, 2] height and width in the annotations; None where nothing is known of them.
    """

    def look(row: int) -> tuple[str, str] | None:
        try:
            name, content = open_image(row)
        except DataError as error:
            return "unreadable", str(error)
        return image_fault(name, content, None if sizes is None else sizes[row].tolist(), faults.pixels)

    found = zip(rows, look_at_images(look, rows), strict=True)
    damaged = [(row, fault) for row, fault in found if fault is not None]
    for _, fault in damaged:
        faults.image(*fault)
    return [row for row, _ in damaged]


def image_fault(
    path: str | Path,
    content: bytes | None,
    size: Sequence[int] | None,
    pixels: PixelType | None = None,
    decode: bool = True,
) -> tuple[str, str] | None:
    """Why an image cannot be used, by what it is counted and the message; None if it can be read and is of the annotated size."""
    try:
        found = read_reduced(path, None, content, pixels).size if decode else image_size(path, content)
        check_size(path, found, found if size is None else size)
    except SizeError as error:
        return "size differs from the annotation", str(error)
    except DataError as error:
        return "unreadable", str(error)
    return None


def count_skipped(annotations: Annotations, skipped: Mapping[str, int]) -> Annotations:
    """Let the counts say what is used now, and what was left out since they were made, by reason."""
    counts = Counter(annotations.counts)
    counts.update({reason: n for reason, n in skipped.items() if n})
    counts["images used"], counts["boxes used"] = len(annotations), len(annotations.boxes)
    return replace(annotations, counts=dict(counts))


class SizeError(DataError):
    """An image whose size is not the annotated one."""


def check_size(path: str | Path, found: tuple[int, int], annotated: Sequence[int]) -> None:
    """Compare height and width of a decoded, upright image with its annotation; `SizeError`, with a hint if they are swapped."""
    if tuple(found) == tuple(annotated):
        return
    swapped = (
        " (swapped: the annotation may be from before the EXIF orientation was applied, or height and width mixed)"
    )
    hint = swapped if tuple(found) == tuple(annotated)[::-1] else ""
    raise SizeError(
        f"{path}: the image is {found[1]} x {found[0]} pixels, but its annotation says width {annotated[1]}, height "
        f"{annotated[0]}{hint}; correct the annotation, or set on_bad to 'skip' to leave the image out and count it"
    )

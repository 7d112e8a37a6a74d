"""Where the images of a written data set go, under which names, and what all writers share.

Each writer takes splits, ``name -> Annotations``, and makes a new folder that is complete when it is visible. What a layout
cannot hold is said in the result, and refused where it would change what a box means:

============  =====  =======================  ===================  ===============
              COCO   VOC                      YOLO                 CSV
============  =====  =======================  ===================  ===============
image ids     yes    in ``<detpipe>``         no                   yes
class order   by id  in ``detpipe.json``      yes                  detpipe.json
category ids  yes    in ``detpipe.json``      in ``data.yaml``     detpipe.json
crowd         yes    in ``<detpipe>``         refused or dropped   yes
difficult     yes    yes                      refused or dropped   yes
area          yes    in ``<detpipe>``         no, that of the box  yes
segmentation  yes    in a file beside it      in a file beside it  beside it
============  =====  =======================  ===================  ===============
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Literal

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from detpipe.datasets.formats.class_list import compare_classes
from detpipe.datasets.image_files import ImageFiles, image_paths
from detpipe.support.errors import DataError
from detpipe.support.files import atomic_folder
from detpipe.types import Annotations

Images = Literal["copy", "link", "none"]
Splits = Mapping[str, Annotations]


@dataclass(frozen=True)
class Written:
    """What a writer did."""

    folder: Path  # the data set
    splits: tuple[str, ...]  # their names in it
    images: int  # how many there are, all splits together
    boxes: int  # how many there are
    remarks: tuple[str, ...] = ()  # what could not be kept as it was


@dataclass(eq=False)
class Export:
    """A data set that is being written."""

    splits: Splits
    images: Images  # how files get there: ``"copy"``, ``"link"`` (another name for the same file, on the same disk), or ``"none"``
    source: ImageFiles  # where they are
    flat: bool  # whether folders become part of names
    folder: Path  # what becomes the data set
    out: Path  # that is written to
    renamed: int = 0  # images that have another name, since no two share one without its suffix
    remarks: list[str] = field(default_factory=list)  # what is to be said of it
    _owner: dict[str, Path] = field(default_factory=dict)  # name without suffix -> image

    def place(self, split: str, base: str, own: bool = False) -> list[str]:
        """Put the images of a split into a folder ``base`` of the data set; their names, relative to the latter.

        ``own``: where no images are to be put there, the names that they have.
        """
        annotations, part = self.splits[split], file_name_of(split)
        if own and self.images == "none":
            return annotations.file_names.tolist()
        sources = image_paths(annotations)
        plain = zip(plain_names(annotations), sources, strict=True)
        names = [f"{base}/{self._name(base, part, name, source)}" for name, source in plain]
        pairs = list(zip(sources, names, strict=True)) if self.images != "none" else []
        for path, name in tqdm(pairs, desc="images", unit="image", disable=None, leave=False):
            target = self.out / name
            target.parent.mkdir(parents=True, exist_ok=True)
            if not target.exists():  # as the same image of another split
                (self.source.copy if self.images == "copy" else self.source.link)(path, target)
        return names

    def _name(self, base: str, split: str, name: str, source: Path) -> str:
        wanted = PurePosixPath(name.replace("/", "__") if self.flat else name)
        source = Path(os.path.normpath(source))
        candidates = [wanted, wanted.with_name(f"{split}__{wanted.name}")]
        number = 2
        while True:
            for candidate in candidates:
                if self._owner.setdefault(f"{base}/{candidate.with_suffix('')}", source) == source:
                    self.renamed += candidate != wanted
                    return str(candidate)
            candidates = [wanted.with_name(f"{split}__{wanted.stem}_{number}{wanted.suffix}")]
            number += 1

    def written(self, names: Iterable[str]) -> Written:
        """What was done, of splits that are called so in the data set."""
        if self.renamed:
            self.remarks.append(
                f"{self.renamed} images are renamed: others have their names, but for folders or suffixes"
            )
        images, boxes = map(len, self.splits.values()), (len(a.boxes) for a in self.splits.values())
        return Written(self.folder, tuple(names), sum(images), sum(boxes), tuple(self.remarks))


@contextmanager
def new_folder(
    folder: str | Path, splits: Splits, images: Images, source: ImageFiles, flat: bool = False
) -> Iterator[Export]:
    """Yield a folder to write to, which becomes ``folder`` when all is written; other arguments are those of `Export`.

    A DataError if there is something under that name, there is nothing to write, or files cannot be linked.
    """
    path = Path(folder)
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise DataError(f"{path} is there already: name a new folder, or remove it first")
    if not splits or not all(splits):
        raise DataError(f"{path}: expected at least one split, each with a name, got {list(splits)}")
    if images not in ("copy", "link", "none"):
        raise ValueError(f"images must be 'copy', 'link' or 'none', got {images!r}")
    with atomic_folder(path) as out:
        yield Export(splits, images, source, flat, path, out)


def file_name_of(split: str) -> str:
    """A split's name as part of a file name: ``2007:trainval`` -> ``2007_trainval``, and ``..`` -> ``_..``."""
    name = "".join(letter if letter.isalnum() or letter in "._-" else "_" for letter in split)
    return f"_{name}" if name.startswith(".") else name


def one_class_list(splits: Splits) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """Class names and category ids; a DataError if splits do not agree on them, or a name cannot be written."""
    compare_classes(splits)
    first = next(iter(splits.values()))
    for name in first.class_names:
        if name != name.strip() or not name.isprintable():
            raise DataError(
                f"the class name {name!r} begins or ends with a space or has a line break: rename the class"
            )
    return first.class_names, first.category_ids


def plain_names(annotations: Annotations) -> list[str]:
    """The file names of a split without the folders that all of them share, fit for every layout."""
    paths = [PurePosixPath(str(name)).parts for name in annotations.file_names]
    folders = list(zip(*{parts[:-1] for parts in paths}, strict=False))  # of all images, level by level
    shared = next((level for level, names in enumerate(folders) if len(set(names)) > 1), len(folders))
    return ["/".join(map(_fit, parts[shared:])) for parts in paths]


def _fit(part: str) -> str:
    """A file or folder name that survives lists, tables and folders that are searched."""
    name = "".join(letter if letter.isprintable() and letter not in '\\:"' else "_" for letter in part).strip()
    return f"_{name}" if name.startswith(".") or not name else name


def check_suffixes(splits: Splits, allowed: Sequence[str], layout: str) -> None:
    """Refuse by a DataError images that a layout cannot name."""
    wrong = [p for a in splits.values() for p in image_paths(a) if p.suffix.lower() not in allowed]
    if wrong:
        raise DataError(
            f"{wrong[0]}: {layout} layout has images that end in {', '.join(allowed)}, but {len(wrong)} do not: convert them first"
        )


def own_area(annotations: Annotations) -> npt.NDArray[np.bool_]:
    """[B] whether the area is another than that of the box, as that of a segmentation is."""
    boxes = annotations.boxes
    plain = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    return ~np.isclose(annotations.area, plain, rtol=1e-12, atol=0)


def ids_are_kept(splits: Splits) -> tuple[bool, list[str]]:
    """Whether image ids are worth writing, and what is to be said: not where they count from 1, not where splits share some."""
    counted = [np.array_equal(a.image_ids, np.arange(1, len(a) + 1)) for a in splits.values()]
    if all(counted):
        return False, []
    ids = np.concatenate([a.image_ids for a in splits.values()])
    if len(np.unique(ids)) < len(ids):
        return False, ["image ids are not kept: several splits use the same"]
    return True, []


def number(value: float) -> int | float:
    """A whole number as such, which is easier to read; what is nearer to one than 1e-9 is rounding."""
    whole = round(value)
    return whole if abs(value - whole) < 1e-9 and (whole or not value) else float(value)

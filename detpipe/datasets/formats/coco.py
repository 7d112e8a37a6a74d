"""Data in COCO layout: the official folders, those of labeling tools and hubs, or any annotation file with its image folder.

::

    annotations/instances_SPLIT.json   images in SPLIT/ or images/SPLIT/
    SPLIT/_annotations.coco.json       images beside it; any other name of the file does as well
    annotations/SPLIT.json, SPLIT.json images in the first of SPLIT, images/SPLIT, images, data or the folder itself that has some
    labels.json                        a name that says nothing of the split: it is called by the folder of its images

What a tool has exported in a format of its own (see tool_exports.py) is read in the place of an annotation file.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
from msgspec import UNSET, UnsetType

from detpipe.datasets.annotations import AnnotationBuilder
from detpipe.datasets.datamodule import FolderData, Split
from detpipe.datasets.faults import Faults, OnBad
from detpipe.datasets.formats import export
from detpipe.datasets.formats.export import Images, Splits, Written
from detpipe.datasets.formats.folders import Entries, find_image_folder, is_image, split_of, take_split, visible
from detpipe.datasets.formats.tool_exports import glance, may_be_export, read_export, tool_of_folder
from detpipe.datasets.image_files import PLAIN_FILES, ImageFiles
from detpipe.support.coco_file import BYTE_ORDER_MARK, COCOFile, name_in_address, read_coco_file
from detpipe.support.errors import DataError
from detpipe.support.strict_json import load_json
from detpipe.types import Annotations, Segmentations

_DEPTH = 3  # folders below the root in which annotation files are looked for
_LOOKED_AT = 20  # images that are looked for to find their folder
_SPLITS = 50  # a folder with more files of annotations has one an image
_PLAIN = (
    "labels",
    "annotations",
    "_annotations",
    "_annotations.coco",
    "_annotations.createml",
    "instances",
    "coco",
    "metadata",
)


@dataclass(frozen=True)
class COCOFiles:
    """A split whose files do not follow the official names.

    Args:
        annotations: the annotation file, or what a tool has exported, relative to the root (or absolute).
        images: the folder that its file names are relative to, relative to the root (or absolute).
    """

    annotations: str
    images: str


class COCO(FolderData):
    """Detection data in COCO layout.

    Args:
        root: the folder that holds ``annotations`` and the image folders.
        train: the training split: a name such as ``train2017``, or ``annotations`` and ``images`` for other files.
    """

    def __init__(
        self,
        root: str,
        train: str | COCOFiles = "train2017",
        val: str | COCOFiles = "val2017",
        test: str | COCOFiles | None = None,
        **common: Any,
    ) -> None:
        super().__init__(root, train, val, test, **common)  # type: ignore[arg-type]
        self._class_names: tuple[str, ...] | None = None

    def load(self, split: Split, faults: Faults | None = None) -> Annotations:
        """Read the annotation file of a split."""
        annotations, images = self.files(split)
        outlines, faults = self.reads_outlines(split), faults or self.faults()
        return load_coco(annotations, images, segmentations=outlines, faults=faults, class_names=self._exported_classes)

    def _exported_classes(self) -> tuple[str, ...]:
        """The classes of all splits that a tool has exported: what occurs in one of them may be missing in another."""
        if self._class_names is not None:
            return self._class_names
        root = Path(self.root)
        given = (files for files in self.splits.values() if isinstance(files, COCOFiles))
        paths = [root / files.annotations for files in (*given, *find_splits(root).values())]
        exports = [export for path in dict.fromkeys(paths) if (export := read_export(path)) is not None]
        listed = dict.fromkeys(name for export in exports for name in export.listed)
        others = {name for export in exports for name in export.class_names} - listed.keys()
        self._class_names = (*listed, *sorted(others))
        return self._class_names

    def split_names(self) -> tuple[str, ...]:
        """The splits that are found in the folder."""
        return tuple(find_splits(Path(self.root)))

    def files(self, split: Split) -> tuple[Path, Path]:
        """The annotation file and the image folder of a split; a DataError if there is no such split."""
        root = Path(self.root)
        if not root.is_dir():
            raise DataError(f"{root}: no such folder; the argument root must name the folder of the COCO data")
        files = self.source_of(split, "the name of one")
        if isinstance(files, COCOFiles):
            return root / files.annotations, root / files.images
        found = find_splits(root)
        name = take_split(root, files, found)
        if name is None:
            wanted = root / "annotations" / f"instances_{files}.json"
            raise DataError(
                f"{wanted}: no such file, wanted for {split}={files!r}; splits found in {root}: "
                f"{', '.join(sorted(found)) or 'none'}; name one of them, or give the annotations and images of {split} apart"
            )
        return root / found[name].annotations, root / found[name].images


class _ImageName(msgspec.Struct):
    file_name: str | UnsetType = UNSET
    coco_url: Any = UNSET


class _Content(msgspec.Struct):
    """What tells a COCO annotation file from other JSON."""

    images: list[_ImageName]
    annotations: msgspec.Raw
    categories: msgspec.Raw


def find_splits(root: Path) -> dict[str, COCOFiles]:
    """Find the splits of a folder in COCO layout: name -> files, relative to the root; empty if there are none.

    Where there are official files, others are not looked at, and what tools have exported in formats of their own only where there
    are no COCO files. A DataError if a file of annotations is no valid JSON.
    """
    official = sorted(root.glob("annotations/instances_*.json"))
    if official:
        found: dict[str, COCOFiles] = {}
        for path in official:
            name = path.stem.removeprefix("instances_")
            usual = [place for place in (root / name, root / "images" / name) if place.is_dir()]
            filled = (place for place in usual if any(is_image(entry.name) for entry in visible(place)))
            images = next(filled, None) or _find_images(root, path, _first_images(path) or [])
            images = images or next(iter(usual), root / name)
            found[name] = COCOFiles(f"annotations/{path.name}", images.relative_to(root).as_posix())
        return found
    paths = _annotation_files(root, _DEPTH)
    contents = {path: first for path in paths if (first := _first_images(path)) is not None}
    if not contents:
        exports = {path: export for path in paths if (export := glance(path)) is not None}
        contents = {path: [one.name for one in export.pictures[:_LOOKED_AT]] for path, export in exports.items()}
    count = Counter(path.parent for path in contents)
    found = {}
    for path, first in contents.items():
        images = _find_images(root, path, first) or _folder_of(path)
        name = _name_split(root, path, images, count[path.parent] == 1)
        place = path.relative_to(root)
        name = str(place.with_suffix("")) if name in found else name
        found[name] = COCOFiles(place.as_posix(), images.relative_to(root).as_posix())
    return found


def says_layout(root: Path, splits: Mapping[str, COCOFiles]) -> str:
    """Say in which layout a folder is, in half a line: "annotations.xml (CVAT) of the images in train"."""
    first = next(iter(splits.values()))
    path, more = root / first.annotations, f" (and of {len(splits) - 1} more splits)" if len(splits) > 1 else ""
    export = None if is_coco(path) else glance(path)
    tool = f" ({export.tool})" if export else ""
    places = ("the folder" if name == "." else name for name in (f"{first.annotations}", first.images))
    return f"{tool} of the images in ".join(places) + more


def _annotation_files(folder: Path, depth: int) -> list[Path]:
    """What may be annotations in a folder and those below it: files, and folders in which a tool has written one an image."""
    if not folder.is_dir():
        return []
    entries = visible(folder)
    if tool_of_folder(folder, [entry.name for entry in entries]) is not None:
        files = [folder]
    else:
        files = [Path(entry.path) for entry in entries if may_be_export(entry.name) and entry.is_file()]
        files = [path for path in files if path.name.startswith("instances_")] or files
        files = files if len(files) <= _SPLITS else []
    below = [Path(entry.path) for entry in entries if depth and entry.is_dir()]
    return files + [file for inner in below for file in _annotation_files(inner, depth - 1)]


def _folder_of(path: Path) -> Path:
    """The folder that annotations lie in, which may be that folder itself."""
    return path if path.is_dir() else path.parent


def is_coco(path: Path) -> bool:
    """Whether a file is a COCO annotation file, and not what a tool has exported in a format of its own."""
    return _first_images(path) is not None


def _first_images(path: Path) -> list[str] | None:
    """The first file names of an annotation file; None if it is no COCO file, a DataError if it is one that is cut off."""
    try:
        data = path.read_bytes().removeprefix(BYTE_ORDER_MARK)
        images = msgspec.json.decode(data, type=_Content).images[:_LOOKED_AT]
        names = [name_in_address(one.coco_url) if one.file_name is UNSET else one.file_name for one in images]
        return [name for name in names if name is not UNSET] or (None if names else [])
    except (msgspec.ValidationError, OSError, RecursionError):
        return None
    except msgspec.MsgspecError:
        if path.suffix.lower() == ".json" and re.search(rb'"(annotations|images|regions)"', data):
            load_json(path)  # says where it ends
        return None


def _find_images(root: Path, path: Path, names: list[str]) -> Path | None:
    """The folder of the images of an annotation file: one near it that has some of them, or else any below the root.

    The nearest where none has; None if there is none.
    """
    beside, stem = _folder_of(path), path.stem.removeprefix("instances_")
    words = dict.fromkeys((stem, split_of((stem,)) or stem))
    bases = [beside] if beside == root else [beside, beside.parent]
    parts = (*words, *(f"images/{word}" for word in words), "images", "data", ".")
    near = [base / part for base in bases for part in parts if (base / part).is_dir()]
    own = split_of((*path.relative_to(root).parts[:-1], stem))
    return find_image_folder(root, near, names, own) or (near[0] if near[0] != beside else None)


def _name_split(root: Path, path: Path, images: Path, alone: bool) -> str:
    """The name of the split of an annotation file, which may be the only one of its folder."""
    if path.is_dir():
        return split_of(path.relative_to(root).parts) or path.resolve().name
    beside, stem = path.parent, path.stem.removeprefix("instances_")
    if alone and images == beside and (beside != root or stem in _PLAIN):
        return beside.resolve().name
    if stem not in _PLAIN:
        return split_of((stem,)) or stem
    folder = images if beside == root or beside.name == "annotations" else beside
    return split_of(path.relative_to(root).parts[:-1]) or folder.name


def load_coco(
    json_path: str | Path,
    image_root: str | Path,
    on_bad: OnBad = "error",
    segmentations: bool = False,
    faults: Faults | None = None,
    class_names: Callable[[], Iterable[str]] = tuple,
) -> Annotations:
    """Read one COCO annotation file, or what a tool has exported, and check it against its images.

    Category ids become the labels 1..K in ascending order of the ids; images without annotations stay in. A missing ``iscrowd``
    is 0, a missing ``area`` is the area of the box, a missing size is read from the image; null is missing. VOC's
    ``difficult``, where a file has it, is kept. File names may have backslashes, other capitals or suffixes, or folders before
    them that are not there, also those of another machine. Ids and the root category of hubs: see
    :func:`~detpipe.support.coco_file.read_coco_file`.

    Args:
        json_path: the annotation file, or the file or folder that a tool has exported.
        image_root: the folder that each ``file_name`` is relative to.
        on_bad: ``"error"`` refuses a file with any faulty record; ``"skip"`` leaves these records out and counts them.
        segmentations: whether the outlines of the objects are read as well.
        faults: takes all faults, in place of ``on_bad``.
        class_names: says which classes an export has, further ones come behind them; not asked where a COCO file lists them.

    Returns:
        All images, in the order of the file. A DataError for anything wrong names file, record, field and value.
    """
    json_path, image_root = Path(json_path), Path(image_root)
    faults = faults or Faults(on_bad)
    faults.source = json_path
    file = _read(json_path, segmentations, faults, class_names)
    if not image_root.is_dir():
        raise DataError(f"{image_root}: no such image folder; it should hold the images of {json_path}")
    for fault in file.faults:
        getattr(faults, fault.level)(fault.reason, fault.message)
    built = AnnotationBuilder(faults, file.categories["name"], file.category_ids)
    names = _file_names(file.images["file_name"], image_root, faults.allow_links)
    keep = _check_images(file, names, image_root, built)
    rows = np.flatnonzero(keep[file.box_image])
    faults.boxes_of_skipped_image(file.orphans + len(file.labels) - len(rows))
    xywh, ids, box_image = file.xywh[rows], file.boxes["id"], file.box_image[rows]
    built.file_names = [names[i] for i in np.flatnonzero(keep).tolist()]
    built.image_ids, built.sizes = file.image_ids[keep], file.sizes[keep]
    built.box_image = (np.cumsum(keep) - 1)[box_image]
    built.boxes = np.concatenate([xywh[:, :2], xywh[:, :2] + xywh[:, 2:]], axis=1)
    built.labels, built.area = file.labels[rows], file.area[rows]
    built.iscrowd, built.difficult = file.iscrowd[rows], file.difficult[rows]
    built.name_box = lambda b: f"annotation id {ids[rows[b]]} (image {names[box_image[b]]}): bbox {xywh[b].tolist()}"
    built.segmentations = _segmentations(file, json_path).take(rows) if segmentations else None
    built.images_read, built.boxes_read, built.counts = file.images_read, file.boxes_read, file.counts
    return built.build(image_root, [image_root])


def _read(path: Path, segmentations: bool, faults: Faults, class_names: Callable[[], Iterable[str]]) -> COCOFile:
    try:
        return read_coco_file(path, segmentations, strict=faults.collects)
    except DataError:
        export = read_export(path)
        if export is None:
            raise
    content = export.content(dict.fromkeys((*class_names(), *export.class_names)))
    file = read_coco_file(path, segmentations, content=content)
    if export.left_out:
        file.counts[f"objects of {export.tool} left out: points, lines and others without a box"] = export.left_out
    return file


def _file_names(names: list[Any], folder: Path, allow_links: bool) -> list[str]:
    """File names as the images are called in the folder; what is not there, or is there for several, stays as it is."""
    entries = Entries()
    names = ["" if name is UNSET else name for name in names]
    found = [entries.find_image(folder, name, allow_links) for name in names]
    count = Counter(found)
    return [new if count[new] == 1 else name for name, new in zip(names, found, strict=True)]


def _check_images(file: COCOFile, names: list[str], folder: Path, built: AnnotationBuilder) -> npt.NDArray[np.bool_]:
    """[I] which images to keep: not those that lack a name, or a size that their file does not tell either."""
    keep = np.ones(len(names), dtype=bool)
    known = file.sizes > 0
    for i in np.flatnonzero(~known.all(1) | np.array([not name for name in names], dtype=bool)).tolist():
        absent = [field for field, there in zip(("height", "width"), known[i].tolist(), strict=True) if not there]
        missing = "file_name" if not names[i] else absent[0] if len(absent) == 1 else None
        where = f"image id {file.images['id'][i]}"
        if missing is not None:
            built.faults.image(f"bad {missing}", f"{where} ({names[i] or None}): field {missing} is missing")
        size = built.size_in_file(folder, names[i], where) if missing is None else None
        keep[i] = size is not None
        file.sizes[i] = size or 0
    return keep


def _segmentations(file: COCOFile, path: Path) -> Segmentations:
    texts = [b"" if raw is UNSET else bytes(raw) for raw in file.boxes["segmentation"]]
    texts = [b"" if len(text) < 9 and b"".join(text.split()) in (b"[]", b"{}", b"null") else text for text in texts]
    numbered = any(isinstance(one, str) for one in file.boxes["id"])
    return Segmentations.pack(texts, None if numbered else np.array(file.boxes["id"], dtype=np.int64), str(path))


def write_coco(
    splits: Splits, folder: str | Path, images: Images = "copy", source: ImageFiles = PLAIN_FILES
) -> Written:
    """Write a data set in COCO layout: ``annotations/instances_SPLIT.json`` and ``SPLIT/``.

    The splits, name -> annotations, go into a new folder; ``images`` and ``source`` are those of
    :class:`~detpipe.datasets.formats.export.Export`; without images, file names stay relative to the folder of the source. VOC's
    ``difficult`` goes along as a field of that name, which COCO's own tools pass over. A DataError if the folder is there
    already, or images cannot be linked.
    """
    with export.new_folder(folder, splits, images, source) as made:
        (made.out / "annotations").mkdir()
        for split, a in splits.items():
            name = export.file_name_of(split)
            names = [path.removeprefix(f"{name}/") for path in made.place(split, name, own=True)]
            if images == "none":
                made.remarks.append(f"file names of {name} are relative to {a.root}")
            else:
                (made.out / name).mkdir(exist_ok=True)
            if list(a.category_ids) != sorted(a.category_ids):
                made.remarks.append(
                    f"the classes of {name} are numbered by ascending category id, no longer in their order"
                )
            path = made.out / "annotations" / f"instances_{name}.json"
            path.write_bytes(msgspec.json.encode(coco_content(a, names)))
    return made.written(map(export.file_name_of, splits))


def coco_content(annotations: Annotations, names: list[str]) -> dict[str, Any]:
    """What an annotation file holds: images of these file names, annotations, numbered from 1, and categories.

    Segmentations are text, for msgspec to write.
    """
    a = annotations
    images = [
        {"id": int(a.image_ids[i]), "file_name": name, "height": int(a.sizes[i, 0]), "width": int(a.sizes[i, 1])}
        for i, name in enumerate(names)
    ]
    boxes = []
    for i in range(len(a)):
        for b in a.rows_of(i):
            x1, y1, x2, y2 = a.boxes[b].tolist()
            record = {
                "id": b + 1,
                "image_id": int(a.image_ids[i]),
                "category_id": a.category_ids[int(a.labels[b]) - 1],
                "bbox": [export.number(x1), export.number(y1), export.number(x2 - x1), export.number(y2 - y1)],
                "area": export.number(a.area[b]),
                "iscrowd": int(a.iscrowd[b]),
            }
            more: dict[str, Any] = {"difficult": 1} if a.difficult[b] else {}
            if a.segmentations is not None and a.segmentations[b]:
                more["segmentation"] = msgspec.Raw(a.segmentations[b])
            boxes.append(record | more)
    categories = [{"id": key, "name": name} for key, name in zip(a.category_ids, a.class_names, strict=True)]
    return {"images": images, "annotations": boxes, "categories": categories}

"""Reads the file of the YOLO layout that says where the images of each split are, and what the classes are called.

``data.yaml``, or the only YAML file of the folder that has ``names``::

    path: .                    # the root, relative to this file; this file's folder by default, and where there is no such folder
    train: images/train        # a folder of images, a .txt list of images, or a list of such
    val: images/val
    names: [cat, dog]          # or {0: cat, 1: dog}
    nc: 2                      # optional
    kpt_shape: [17, 3]         # optional: lines have these points behind the box

Other keys are not looked at, but for ``category_ids``, which gives the ids that the classes have elsewhere (COCO's gaps).

Without such a file: darknet's ``obj.data`` with ``obj.names``, or ``classes.txt`` with a name a line, or ``notes.json``; the splits
are then the folders that hold images and labels.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from detpipe.datasets.formats import folders
from detpipe.support.errors import DataError
from detpipe.support.strict_json import load_json, read_text, shorten
from detpipe.support.strict_yaml import MOST_BYTES, load_yaml
from detpipe.support.suggest import did_you_mean

NAME = "data.yaml"
LABELS = ".txt"
NOT_SPLITS = ("path", "names", "nc", "category_ids", "download", "kpt_shape", "flip_idx")
_SPLITS = ("train", "val", "test")
_HAS_NAMES = re.compile(r"""(^|[{,\s])["']?names["']?\s*:""")
_CLASS_FILES = ("classes.txt", "class_names.txt", "names.txt", "predefined_classes.txt")


@dataclass(frozen=True)
class YOLOFile:
    """What ``data.yaml`` says."""

    path: Path  # of the file
    root: Path  # what the entries of splits are relative to
    class_names: tuple[str, ...]  # [K] of the numbers 0..K-1
    category_ids: tuple[int, ...]  # [K], those numbers unless the file gives others
    splits: dict[str, tuple[str, ...]]  # name -> folders and lists of images
    # n and d of the n points, with d numbers each, behind each box; None where there are none
    points: tuple[int, int] | None = None
    places: tuple[folders.Place, ...] = ()  # where images and labels were found, if no file says so

    def entries(self, split: str) -> tuple[str, ...]:
        """Folders and lists of a split; a DataError if there is no such split."""
        found = folders.take_split(self.path, split, self.splits)
        if found is None:
            known = ", ".join(self.splits) or "none"
            raise DataError(f"{self.path}: has no split {split!r}; there are {known}{did_you_mean(split, self.splits)}")
        return self.splits[found]

    def absent_splits(self) -> list[str]:
        """The splits that the file names, though nothing of them is there."""
        find = folders.Entries().find
        return [name for name, entries in self.splits.items() if not any(find(self.root, entry) for entry in entries)]

    def says(self) -> str:
        """Say where classes and labels are, in half a line, and which splits are not there."""
        more = f", {folders.says_folders(self.root, self.places, 'labels')}" if self.places else ""
        absent = "".join(f", without {name}: {self.splits[name][0]} is not there" for name in self.absent_splits())
        return f"{self.path.name}{more}{absent}"


def find_file(root: Path) -> Path | None:
    """Find the file that describes a folder in YOLO layout; None if there is none, a DataError if there are several.

    ``data.yaml``, the only other YAML file with ``names``, darknet's ``.data`` file, or the list of classes.
    """
    inside = [Path(entry.path) for entry in folders.visible(root)]
    below = (_describing(path) for path in inside if path.is_dir())  # unpacked into a folder of its own
    files = filter(Path.is_file, inside)
    return _describing(root) or _class_file(files) or _only([path for path in below if path is not None])


def _describing(folder: Path) -> Path | None:
    if (folder / NAME).is_file():
        return folder / NAME
    files = [Path(entry.path) for entry in folders.visible(folder) if entry.is_file()]
    yamls = [path for path in files if path.suffix.lower() in (".yaml", ".yml") and _HAS_NAMES.search(_peek(path))]
    return _only(yamls) or _only([path for path in files if path.suffix.lower() == ".data"])


def _only(paths: list[Path]) -> Path | None:
    if len(paths) > 1:
        names = ", ".join(path.name for path in paths)
        raise DataError(f"{paths[0].parent}: {names} may each describe the data set: name the one that is meant")
    return paths[0] if paths else None


def _peek(path: Path) -> str:
    with path.open("rb") as stream:
        return stream.read(MOST_BYTES).decode("utf-8-sig", errors="replace")


def _class_file(files: Iterable[Path]) -> Path | None:
    """The list of classes among some files; ``notes.json`` where there is none."""
    files = list(files)
    lists = [
        path for path in files if path.name.lower() in _CLASS_FILES or path.suffix.lower() in (".names", ".labels")
    ]
    if len({path.read_bytes() for path in lists}) > 1:
        return _only(lists)
    notes = [path for path in files if path.name.lower() == "notes.json"]
    return next(iter([*lists, *notes]), None)


def read_yolo(root: str | Path) -> YOLOFile:
    """Read what a folder in YOLO layout, or the file that describes it, says; the splits are folders where no file names them.

    A DataError if nothing says what the classes are, or the file says what cannot be.
    """
    path = Path(root)
    found = find_file(path) if path.is_dir() else path
    if found is not None and found.suffix.lower() in (".yaml", ".yml"):
        file = read_yolo_yaml(found)
        return file if file.splits else _with_folders(file)
    if found is not None and found.suffix.lower() == ".data":
        return _read_darknet(found)
    places = tuple(folders.find_places(path if path.is_dir() else path.parent, LABELS))
    if found is None and places:
        near = dict.fromkeys(folder for place in places for folder in (place.labels, place.images, place.labels.parent))
        inside = [folder for folder in near if folder.is_relative_to(path)]
        found = _class_file(file for folder in inside for file in sorted(folder.iterdir()) if file.is_file())
        if found is None:
            labels = folders.says_folders(path, places, "labels")
            raise DataError(
                f"{path}: has labels in YOLO layout ({labels}), but nothing says what the classes are called: write "
                f"{path / 'classes.txt'} with a name a line, in the order of the numbers"
            )
    if found is None:
        raise DataError(f"{path / NAME}: no such file; YOLO layout has a {NAME} with path, train, val and names")
    names = _from_notes(found) if found.suffix.lower() == ".json" else _listed_names(found)
    base = path if path.is_dir() else path.parent
    return _with_folders(YOLOFile(found, base, names, tuple(range(len(names))), {}), places)


def _with_folders(file: YOLOFile, places: tuple[folders.Place, ...] | None = None) -> YOLOFile:
    """The same with the splits of lists beside it, or else of folders."""
    places = tuple(folders.find_places(file.root, LABELS)) if places is None else places
    lists = folders.find_lists(
        file.root, (stem for place in places for stem in folders.list_folder(place.images).images)
    )
    if lists:
        return replace(file, splits={name: (path.name,) for name, path in lists.items()})
    splits: dict[str, tuple[str, ...]] = {}
    for place in places:
        splits[place.split] = (*splits.get(place.split, ()), place.images.relative_to(file.root).as_posix())
    return replace(file, splits=splits, places=places)


def has_labels(root: Path) -> bool:
    """Whether a folder has label files of images, by the numbers in one of them."""
    for place in folders.find_places(root, LABELS):
        labels, images = folders.list_folder(place.labels, LABELS).labels, folders.list_folder(place.images).images
        for stem in sorted(labels.keys() & images):
            words = _peek(place.labels / labels[stem]).strip().split("\n")[0].split()
            if words:
                return len(words) >= 5 and all(re.fullmatch(r"[-+.\deE]+", word) for word in words)
    return False


def _read_darknet(path: Path) -> YOLOFile:
    """Read darknet's ``obj.data``, whose paths are as if it lay in a folder ``data``."""
    pairs = [line.partition("=") for line in _lines(path) if "=" in line and not line.startswith("#")]
    values = {key.strip(): value.strip() for key, _, value in pairs}
    entry = values.get("names")
    names_file = folders.Entries().find(path.parent, entry) if entry else _class_file(sorted(path.parent.iterdir()))
    if names_file is None or not names_file.is_file():
        raise DataError(f"{path}: names is {shorten(entry)}, but there is no such list of classes, one a line")
    names = _listed_names(names_file)
    if values.get("classes", str(len(names))) != str(len(names)):
        raise DataError(
            f"{path}: classes is {shorten(values['classes'])}, but {names_file} has {len(names)}; correct one of them"
        )
    splits = {key: (values[key],) for key in ("train", "valid", "val", "test") if values.get(key)}
    file = YOLOFile(path, path.parent, names, tuple(range(len(names))), splits)
    return file if splits else _with_folders(file)


def _lines(path: Path) -> list[str]:
    return [line.strip() for line in read_text(path, "text file").rstrip().splitlines()]


def _listed_names(path: Path) -> tuple[str, ...]:
    return _class_names([name for name in _lines(path) if name], path)


def _from_notes(path: Path) -> tuple[str, ...]:
    """The classes of ``notes.json``, as a labeling tool writes it beside ``classes.txt``."""
    content = load_json(path)
    categories = content.get("categories") if type(content) is dict else None
    if type(categories) is not list or not all(type(one) is dict and {"id", "name"} <= set(one) for one in categories):
        raise DataError(f"{path}: categories must list the classes, each with id and name, got {shorten(categories)}")
    return _class_names({one["id"]: one["name"] for one in categories}, path)


def read_yolo_yaml(root: str | Path) -> YOLOFile:
    """Read ``data.yaml``, of a folder or under any name, strictly: no tags, no key twice, class numbers without gaps.

    A DataError names line or key if it is missing, is no YAML, or says what cannot be.
    """
    path = Path(root)
    path = path / NAME if path.is_dir() else path
    content = _load(path)
    names = _class_names(content.get("names"), path)
    if "nc" in content and content["nc"] != len(names):
        raise DataError(
            f"{path}: nc is {shorten(content['nc'])}, but names has {len(names)} classes; correct one of them"
        )
    ids = content.get("category_ids", list(range(len(names))))
    if type(ids) is not list or len(ids) != len(names) or not all(type(key) is int for key in ids):
        raise DataError(f"{path}: category_ids must be {len(names)} whole numbers, one a class, got {shorten(ids)}")
    if len(set(ids)) != len(ids):
        raise DataError(f"{path}: category_ids must be distinct, got {shorten(ids)}")
    base = content.get("path") or "."
    if type(base) is not str:
        raise DataError(f"{path}: path must be the root folder, relative to this file, got {shorten(base)}")
    folder = path.parent if base == "." else folders.Entries().find(path.parent, base)
    moved = folder is None or not folder.is_dir()
    folder = path.parent if moved or folder is None else folder
    splits = {key: _entries(value, key, path) for key, value in content.items() if _is_split(key, value, folder)}
    if moved and not any(folders.Entries().find(folder, entry) for entries in splits.values() for entry in entries):
        raise DataError(
            f"{path}: path is {base!r}, but {path.parent / base} is no folder; paths are relative to {path.name}"
        )
    return YOLOFile(path, folder, names, tuple(ids), splits, _points(content.get("kpt_shape"), path))


def _points(shape: Any, path: Path) -> tuple[int, int] | None:
    if shape is None:
        return None
    pair = type(shape) is list and len(shape) == 2
    if not pair or type(shape[0]) is not int or shape[0] < 1 or shape[1] not in (2, 3):
        raise DataError(
            f"{path}: kpt_shape must be the number of points and 2 or 3 numbers a point, such as [17, 3], got {shorten(shape)}"
        )
    return shape[0], int(shape[1])


def _is_split(key: Any, value: Any, folder: Path) -> bool:
    """Whether a key is one of the usual splits, or another whose entries are there."""
    if key in _SPLITS or not value:
        return bool(value)
    entries = [value] if type(value) is str else value
    if type(key) is not str or key in NOT_SPLITS or type(entries) is not list:
        return False
    there = folders.Entries().find if key in ("valid", "validation") else _exact
    return all(type(entry) is str and there(folder, entry) is not None for entry in entries)


def _exact(folder: Path, entry: str) -> Path | None:
    return folder / entry if entry and (folder / entry).exists() else None


def _entries(value: Any, key: str, path: Path) -> tuple[str, ...]:
    entries = [value] if type(value) is str else value
    if type(entries) is not list or not entries or not all(type(entry) is str and entry for entry in entries):
        raise DataError(
            f"{path}: {key} must name a folder of images, a .txt list of images, or several, got {shorten(value)}"
        )
    return tuple(entries)


def _class_names(names: Any, path: Path) -> tuple[str, ...]:
    if type(names) is dict:
        numbers = {int(key) if str(key).isdecimal() else key: name for key, name in names.items()}
        if set(numbers) != set(range(len(names))):
            raise DataError(
                f"{path}: the keys of names must be 0 to {len(names) - 1} in order, got {shorten(list(names))}"
            )
        names = [numbers[number] for number in range(len(names))]
    if type(names) is not list or not names:
        raise DataError(
            f"{path}: names must list the classes, such as [cat, dog] or {{0: cat, 1: dog}}, got {shorten(names)}"
        )
    wrong = [name for name in names if type(name) not in (str, int, float) or name == ""]  # digits are names too
    if wrong or len({str(name) for name in names}) != len(names):
        raise DataError(f"{path}: names must be distinct and of text, got {shorten(wrong or names)}")
    return tuple(str(name) for name in names)


def _load(path: Path) -> dict[str, Any]:
    try:
        content = load_yaml(path, DataError)
    except FileNotFoundError as error:
        raise DataError(f"{path}: no such file; YOLO layout has a {NAME} with path, train, val and names") from error
    if not isinstance(content, dict):
        raise DataError(f"{path}: expected keys such as path, train, val and names, got {shorten(content)}")
    return content

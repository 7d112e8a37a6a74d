"""Finds the images of a split in YOLO layout: folders, searched to their end, and lists; and the label file of each.

The labels of ``.../images/train/a.jpg`` are in ``.../labels/train/a.txt``: the last folder called ``images`` is exchanged.
Where there is none, ``a.txt`` is beside ``a.jpg``.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from detpipe.datasets.decode import IMAGE_SUFFIXES
from detpipe.datasets.faults import Faults
from detpipe.datasets.yolo_yaml import YOLOFile
from detpipe.errors import DataError
from detpipe.files import refuse_special


@dataclass(frozen=True)
class ListedImage:
    """An image of a split; it need not exist.

    Args:
        image_id: its number in the split, from 1.
        file_name: relative to the root, with forward slashes.
        image: path of the image.
        labels: path of its label file.
    """

    image_id: int
    file_name: str
    image: Path
    labels: Path


def label_path(image: Path) -> Path:
    """The label file of an image, whether or not it exists."""
    folders = list(image.parts[:-1])
    if "images" in folders:
        folders[len(folders) - 1 - folders[::-1].index("images")] = "labels"
    return Path(*folders, f"{image.stem}.txt")


class ImageFinder:
    """Collects the images of a split.

    Args:
        file: what ``data.yaml`` says.
        split: the splits that are read in turn.
        faults: where images that cannot be used are noted.

    Attributes:
        root: the folder that file names are relative to: that of the layout, unless images lie beside it.
        folders: where images may lie.
        found: the images.
        orphans: label files without an image.
        lines: how many images were listed, those that cannot be used included.
    """

    def __init__(self, file: YOLOFile, split: tuple[str, ...], faults: Faults) -> None:
        self.faults = faults
        self.found: list[ListedImage] = []
        self.orphans: list[Path] = []
        self.lines = 0
        self._by_labels: dict[Path, ListedImage] = {}
        entries = [_locate(file, name, entry) for name in split for entry in file.entries(name)]
        self.root = _root(file.root, [path for path in entries if path.is_dir()])
        self.folders = [path if path.is_dir() else self.root for path in entries]
        for path in entries:
            if path.is_dir():
                self._folder(path)
            else:
                self._list(path)
        if not self.lines:
            raise DataError(f"{file.path}: the split {', '.join(split)} has no images ({' '.join(IMAGE_SUFFIXES)})")
        if self.found and not any(item.labels.is_file() for item in self.found):
            raise DataError(
                f"{file.path}: none of the {len(self.found)} images of {', '.join(split)} has a label file; looked for "
                f"{self.found[0].labels} and the like; an image without objects may have an empty one"
            )

    def _folder(self, folder: Path) -> None:
        first = len(self.found)
        for path in _walk(folder, set()):
            self._add(path, str(path))
        expected = {item.labels for item in self.found}
        for labels in sorted({item.labels.parent for item in self.found[first:]} - {folder}):
            if any(item.image.parent == labels for item in self.found[first:]):
                continue  # labels beside images: other texts may be there
            files = (path for path in sorted(labels.glob("*.txt")) if path.name != "classes.txt")
            self.orphans += [path for path in files if path not in expected]

    def _list(self, path: Path) -> None:
        refuse_special(path)
        try:
            lines = path.read_text(encoding="utf-8-sig").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"{path}: cannot be read as a list of images ({error})") from error
        for number, line in enumerate(lines, start=1):
            name = line.strip()
            if name:
                self._add(Path(os.path.normpath(path.parent / name)), f"{path}: line {number}: {name!r}")

    def _add(self, path: Path, where: str) -> None:
        self.lines += 1
        name = os.path.relpath(path, self.root).replace(os.sep, "/")
        if name.startswith("../") or "\0" in name:
            return self.faults.fatal("leads out of the folder", f"{where} leads out of {self.root}")
        item = ListedImage(self.lines, name, path, label_path(path))
        other = self._by_labels.setdefault(item.labels, item)
        if other is not item and other.image == path:
            return self.faults.image("listed twice", f"{where} is listed twice")
        if other is not item:
            return self.faults.image(
                "labels of two images", f"{where} and {other.image} have the same label file {item.labels}; rename one"
            )
        self.found.append(item)
        return None


def _locate(file: YOLOFile, split: str, entry: str) -> Path:
    """The folder or list that an entry names."""
    path = file.root / entry
    if not path.exists() and entry.startswith("../") and (file.root / entry[3:]).exists():
        path = file.root / entry[3:]  # as written by Roboflow, whose root is a folder further down
    if path.is_dir() or (path.is_file() and path.suffix == ".txt"):
        return Path(os.path.normpath(path))
    problem = "is neither a folder nor a .txt list" if path.exists() else "does not exist"
    raise DataError(f"{file.path}: {split} is {entry!r}, but {path} {problem}; entries are relative to {file.root}")


def _root(root: Path, folders: list[Path]) -> Path:
    """The root, or the innermost folder that holds it and all images."""
    if all(not os.path.relpath(folder, root).startswith("..") for folder in folders):
        return root
    return Path(os.path.commonpath([os.path.abspath(path) for path in (root, *folders)]))


def _walk(folder: Path, seen: set[tuple[int, int]]) -> Iterator[Path]:
    """All images in a folder and those below it, by name; hidden files are none, no folder is entered twice."""
    status = folder.stat()
    if (status.st_dev, status.st_ino) in seen:
        return
    seen.add((status.st_dev, status.st_ino))
    with os.scandir(folder) as entries:
        visible = sorted((entry for entry in entries if not entry.name.startswith(".")), key=lambda entry: entry.name)
    for entry in visible:
        if entry.is_dir():
            yield from _walk(folder / entry.name, seen)
        elif entry.name.lower().endswith(IMAGE_SUFFIXES):
            yield folder / entry.name

"""Finds the images of a split in YOLO layout, and the label file of each.

The images of a split lie in folders, which are searched to their end, or are listed. The labels of ``.../images/train/a.jpg`` are
in ``.../labels/train/a.txt``: the last folder called ``images`` is exchanged; or beside the image; or in a sister folder.
"""

from __future__ import annotations

import os
from pathlib import Path, PureWindowsPath

from detpipe.datasets.decode import IMAGE_SUFFIXES, image_names
from detpipe.datasets.faults import Faults
from detpipe.datasets.formats import folders
from detpipe.datasets.formats.yolo_yaml import LABELS, YOLOFile
from detpipe.support.errors import DataError
from detpipe.support.strict_json import read_text


def label_path(image: Path) -> Path:
    """The label file of an image, whether or not it exists."""
    parts = list(image.parts[:-1])
    if "images" in parts:
        parts[len(parts) - 1 - parts[::-1].index("images")] = "labels"
    return Path(*parts, f"{image.stem}.txt")


class LabelFolders:
    """Finds the label files of images below a root; the folder of labels is looked for once a folder of images."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._found: dict[Path, Path] = {}
        self._files: dict[Path, dict[str, str]] = {}  # folder of labels -> name without suffix -> file name
        self._apart: dict[Path, Path] | None = None  # folder of images -> folder of labels, of any name

    def path(self, image: Path) -> Path:
        """The label file of an image, whether or not it exists."""
        folder = image.parent
        if folder not in self._found:
            self._found[folder] = self._look_for(folder, label_path(image).parent)
        labels = self._found[folder]
        if labels not in self._files:
            self._files[labels] = folders.list_folder(labels, LABELS).labels if labels.is_dir() else {}
        return labels / self._files[labels].get(image.stem, f"{image.stem}{LABELS}")

    def _look_for(self, folder: Path, usual: Path) -> Path:
        if usual != folder and usual.is_dir():
            return usual
        for k in reversed(range(len(folder.parts))):
            if folder.parts[k].lower() in folders.IMAGE_FOLDERS and (sister := _sister(folder, k)):
                return sister
        here = folders.list_folder(folder, LABELS) if folder.is_dir() else None
        if here is not None and not here.images.keys() & here.labels.keys():
            if self._apart is None:
                self._apart = {place.images: place.labels for place in folders.find_places(self.root, LABELS)}
            return self._apart.get(folder, usual)
        return folder if here is not None else usual


def _sister(folder: Path, k: int) -> Path | None:
    """The folder of labels beside the k-th part of the path of a folder of images, with the rest of the path."""
    base = Path(*folder.parts[:k])
    named = (
        {path.name: path for path in base.iterdir() if path.name.lower() in folders.LABEL_FOLDERS}
        if base.is_dir()
        else {}
    )
    for name in sorted(named, key=lambda name: (folders.LABEL_FOLDERS.index(name.lower()), name)):
        path = named[name].joinpath(*folder.parts[k + 1 :])
        if path.is_dir():
            return path
    return None


class ImageFinder:
    """Collects the images of splits, which are read in turn.

    Attributes:
        root: the folder that file names are relative to: that of the layout, unless images lie beside it.
        folders: where images may lie.
        orphans: label files without an image.
        lines: how many images were listed, those that cannot be used included.
    """

    def __init__(self, file: YOLOFile, split: tuple[str, ...], faults: Faults) -> None:
        self.faults = faults
        self.found: list[folders.ListedImage] = []
        self.orphans: list[Path] = []
        self.lines = 0
        self._paths: set[Path] = set()
        self._by_labels: dict[Path, folders.ListedImage] = {}
        entries = [_locate(file, name, entry) for name in split for entry in file.entries(name)]
        self.root = _root(file.root, [path for path in entries if path.is_dir()])
        self.folders = [path if path.is_dir() else self.root for path in entries]
        self._labels = LabelFolders(self.root)
        self._entries = folders.Entries()
        self._others = {place.images for place in file.places} - set(entries)  # of other splits
        for path in entries:
            if path.is_dir():
                self._folder(path)
            else:
                self._list(path)
        if not self.lines:
            raise DataError(f"{file.path}: the split {', '.join(split)} has no images ({' '.join(IMAGE_SUFFIXES)})")
        if self.found and not any(item.image.is_file() for item in self.found):
            raise DataError(
                f"{file.path}: none of the {len(self.found)} images of {', '.join(split)} is there; looked for "
                f"{self.found[0].image} and the like; export the images too, or put them there"
            )
        if self.found and not any(item.labels.is_file() for item in self.found):
            raise DataError(
                f"{file.path}: none of the {len(self.found)} images of {', '.join(split)} has a label file; looked for "
                f"{self.found[0].labels} and the like; an image without objects may have an empty one"
            )

    def _folder(self, folder: Path) -> None:
        first = len(self.found)
        found = folders.walk_folders(folder, {folders.folder_key(other) for other in self._others if other != folder})
        files = sorted((Path(file.path) for _, files in found for file in files), key=lambda path: path.parts)
        for path in map(Path, image_names(map(str, files))):
            if path not in self._paths:  # of a folder that holds this one
                self._add(path, str(path))
        expected = {item.labels for item in self.found}
        for labels in sorted({item.labels.parent for item in self.found[first:]} - {folder}):
            if any(item.image.parent == labels for item in self.found[first:]):
                continue  # labels beside images: other texts may be there
            files = folders.list_folder(labels, LABELS).labels.values() if labels.is_dir() else ()
            self.orphans += [
                labels / name for name in files if name.lower() != "classes.txt" and labels / name not in expected
            ]

    def _list(self, path: Path) -> None:
        for number, line in enumerate(read_text(path, "list of images").splitlines(), start=1):
            name = line.strip()
            if name:
                self._add(self._listed(path.parent, name), f"{path}: line {number}: {name!r}")

    def _listed(self, folder: Path, name: str) -> Path:
        """The image that a line means: from the list's folder, or by the end of its path that is there."""
        path = Path(os.path.normpath(folder / name)) if "\0" not in name else folder / name
        if _is_inside(path, self.root) and path.is_file():
            return path
        drive = PureWindowsPath(name).drive
        for base in dict.fromkeys((folder, self.root)):
            found = self._entries.find(base, name.removeprefix(drive))
            if found is not None and found.is_file() and _is_inside(Path(os.path.normpath(found)), self.root):
                return Path(os.path.normpath(found))
        return path

    def _add(self, path: Path, where: str) -> None:
        self.lines += 1
        name = os.path.relpath(path, self.root).replace(os.sep, "/") if "\0" not in str(path) else str(path)
        if "\0" in name or (name.startswith("../") and not self.faults.allow_links):
            more = "; allow_links: true permits it" if "\0" not in name else ""
            return self.faults.fatal("leads out of the folder", f"{where} leads out of {self.root}{more}")
        name = path.as_posix() if name.startswith("../") else name
        self._paths.add(path)
        item = folders.ListedImage(self.lines, name, path, self._labels.path(path))
        other = self._by_labels.setdefault(item.labels, item)
        if other is not item and other.image == path:
            return self.faults.image("listed twice", f"{where} is listed twice")
        if other is not item:
            return self.faults.image(
                "labels of two images", f"{where} and {other.image} have the same label file {item.labels}; rename one"
            )
        self.found.append(item)
        return None


def _is_inside(path: Path, root: Path) -> bool:
    return not os.path.relpath(path, root).startswith("..")


def _locate(file: YOLOFile, split: str, entry: str) -> Path:
    """The folder or list that an entry names; where its first folders are not there, by the end of its path."""
    path = folders.Entries().find(file.root, entry)
    if path is not None and (path.is_dir() or (path.is_file() and path.suffix == ".txt")):
        return Path(os.path.normpath(path))
    problem = "does not exist" if path is None else "is neither a folder nor a .txt list"
    raise DataError(
        f"{file.path}: {split} is {entry!r}, but {file.root / entry} {problem}; entries are relative to {file.root}"
    )


def _root(root: Path, places: list[Path]) -> Path:
    """The root, or the innermost folder that holds it and all images."""
    if all(not os.path.relpath(folder, root).startswith("..") for folder in places):
        return root
    return Path(os.path.commonpath([os.path.abspath(path) for path in (root, *places)]))

"""Finds the splits of a data set with an XML file an image, and their images.

Lists of image names in ``ImageSets/Main`` are splits, of one folder or of several years. Where there is none, the folders are.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PureWindowsPath

from detpipe.datasets.faults import Faults
from detpipe.datasets.formats import folders
from detpipe.support.errors import DataError
from detpipe.support.strict_json import read_text
from detpipe.support.suggest import did_you_mean

LAYOUT = "VOC layout is JPEGImages/NAME.jpg, Annotations/NAME.xml and lists of names in ImageSets/Main/SPLIT.txt"
_SUFFIX = ".xml"


@dataclass(frozen=True)
class VOCSplit:
    """Where the images and annotations of a split are, and the list of the names of its images; without one, all of the places."""

    places: tuple[folders.Place, ...]
    list_file: Path | None = None


def find_splits(root: Path) -> dict[str, VOCSplit]:
    """Find the splits of a folder with XML files, or of one with folders of years, as VOCdevkit holds VOC2007.

    They are the lists in ``ImageSets/Main``, without those of one class (``cat_train`` beside ``train``; where there are only such,
    as VoTT writes them, and each names the same images, one of them is ``train``), ``2007:trainval`` for
    the list of a folder VOC2007, ``trainval`` for that of the only folder of another name; or the folders that hold XML files;
    nothing if there is neither.
    """
    if found := _listed_splits(root):
        return found
    places = tuple(folders.find_places(root, _SUFFIX))
    lists = folders.find_lists(root, (stem for place in places for stem in folders.list_folder(place.images).images))
    if lists:
        return {name: VOCSplit(places, path) for name, path in lists.items()}
    parts: dict[str, list[folders.Place]] = {}
    for place in places:
        parts.setdefault(place.split, []).append(place)
    return {name: VOCSplit(tuple(found)) for name, found in parts.items()}


def _listed_splits(root: Path) -> dict[str, VOCSplit]:
    found = {name: VOCSplit(places, path) for name, (path, places) in _lists(root).items()}
    inside = sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))
    below = {folder: _lists(folder) for folder in inside if not _is_imagesets(folder)}
    below = {folder: lists for folder, lists in below.items() if lists}
    plain = not found and len(below) == 1 and not any(folder.name.startswith("VOC") for folder in below)
    for folder, lists in below.items():
        year = "" if plain else f"{folder.name.removeprefix('VOC')}:"
        found |= {f"{year}{name}": VOCSplit(places, path) for name, (path, places) in lists.items()}
    if not found and len(inside) == 1:  # as the archive of VOCdevkit unpacks
        return _listed_splits(inside[0])
    return found


def says_layout(root: Path, splits: dict[str, VOCSplit]) -> str:
    """Say in which layout a folder is, in half a line: "XML beside the images in train, valid, test"."""
    places = list(dict.fromkeys(place for split in splits.values() for place in split.places))
    lists = [split.list_file for split in splits.values() if split.list_file]
    folder = lists[0].parent.relative_to(root).as_posix() if lists else ""
    more = f", lists in {'the folder' if folder == '.' else folder}" if lists else ""
    return folders.says_folders(root, places, "XML") + more


def _is_imagesets(folder: Path) -> bool:
    return folder.name.lower() == "imagesets"


def _lists(folder: Path) -> dict[str, tuple[Path, tuple[folders.Place, ...]]]:
    """The lists of a folder in VOC layout, without those of one class, and the places of their images."""
    main = _list_folder(folder)
    names = sorted(main.glob("*.txt")) if main else []
    known = [path.stem for path in names]
    lists = [path for path in names if not ("_" in path.stem and path.stem.rpartition("_")[2] in known)]
    places = _places(folder) if lists else ()
    return {
        name: (path, places) for name, path in (_of_all_classes(lists) or {path.stem: path for path in lists}).items()
    }


def _of_all_classes(lists: Sequence[Path]) -> dict[str, Path]:
    """The splits of lists that are each of one class, ``cat_train``, and name all images of the split; nothing if some are not."""
    found: dict[str, tuple[Path, list[str]]] = {}
    for path in lists:
        split = folders.split_of((path.stem.rpartition("_")[2],))
        if not split or split == path.stem:
            return {}
        lines = [line.split() for line in read_text(path, "list of images").splitlines() if line.strip()]
        names, marks = [" ".join(line[:-1]) for line in lines], {line[-1] for line in lines}
        first = found.setdefault(split, (path, names))
        if not marks <= {"-1", "0", "1"} or first[1] != names:
            return {}
    return {split: path for split, (path, _) in found.items()}


def _list_folder(folder: Path) -> Path | None:
    """``ImageSets/Main``, or ``ImageSets`` where lists lie there; capitals do not matter."""
    sets = next((path for path in sorted(folder.iterdir()) if _is_imagesets(path) and path.is_dir()), None)
    if sets is None:
        return None
    main = next((path for path in sorted(sets.iterdir()) if path.name.lower() == "main" and path.is_dir()), None)
    return main or (sets if any(sets.glob("*.txt")) else None)


def _places(folder: Path) -> tuple[folders.Place, ...]:
    """Where the images and annotations of lists are: the official folders, or any that fit."""
    images, annotations = folder / "JPEGImages", folder / "Annotations"
    if images.is_dir() and annotations.is_dir():
        return (folders.Place(images, annotations, folders.ALL),)
    return tuple(folders.find_places(folder, _SUFFIX))


def list_images(root: Path, split: str | Sequence[str], faults: Faults) -> tuple[list[folders.ListedImage], int]:
    """Find the images of a split: in the order of the lists, by name where there is none, each once; and how many were named.

    ``split`` are names of splits, ``"2007:trainval"`` for the list of the folder VOC2007, or a path to a ``.txt`` file. A
    DataError if a folder or list is missing, or there is no image.
    """
    finder = _Finder(root, faults)
    for entry in [split] if isinstance(split, str) else split:
        part = _open(root, entry)
        if part.list_file is None:
            finder.add_folders(part.places)
        else:
            finder.add_list(part)
    if not finder.number:
        raise DataError(f"{root}: the lists of the split {split!r} name no image")
    return list(finder.found.values()), finder.number


def _open(root: Path, entry: str) -> VOCSplit:
    if not root.is_dir():
        raise DataError(f"{root}: no such folder; the argument root must name the folder of the VOC data")
    listed = _listed_splits(root).get(entry)
    if listed is not None and listed.places:
        return listed
    year, colon, name = entry.rpartition(":")
    folder = root / (f"VOC{year}" if year.isdigit() else year) if colon else root
    main = _list_folder(folder) if folder.is_dir() else None
    if name.endswith(".txt"):
        list_file, places = root / name, _places(folder) if folder.is_dir() else ()
        if places and not list_file.is_file():
            raise DataError(f"{list_file}: no such list of images, wanted for the split {entry!r}")
        if places:
            return VOCSplit(places, list_file)
    elif main is not None and any(main.glob("*.txt")):
        known = sorted(path.stem for path in main.glob("*.txt"))
        found = folders.take_split(folder, name, known)
        if found is None:
            raise DataError(
                f"{main / name}.txt: no such list of images; lists found: {', '.join(known[:20]) or 'none'}"
                f"{did_you_mean(name, known)}"
            )
        if places := _places(folder):
            return VOCSplit(places, main / f"{found}.txt")
    elif folder.is_dir():
        splits = find_splits(folder)
        found = folders.take_split(folder, name, splits)
        if found is not None:
            return splits[found]
        if splits:
            raise DataError(_no_such_split(folder, entry, name, splits))
    raise DataError(_no_layout(root, folder, entry, name))


def _no_such_split(folder: Path, entry: str, name: str, splits: dict[str, VOCSplit]) -> str:
    if all(":" in other for other in splits):
        return f"{_no_layout(folder, folder, entry, name)}; there are {', '.join(splits)}"
    known = ", ".join(map(repr, splits))
    return (
        f"{folder / 'ImageSets' / 'Main'}: no such folder, wanted for the split {entry!r}; make it with a file {name}.txt of one "
        "image name a line, or give the path of such a file as the split, or name what is there "
        f"({known}{did_you_mean(name, splits)}), which 'split: {{val: 0.2}}' divides; {LAYOUT}"
    )


def _no_layout(root: Path, folder: Path, entry: str, name: str) -> str:
    for part in ("JPEGImages", "Annotations"):
        if not (folder / part).is_dir():
            years = sorted(path.name.removeprefix("VOC") for path in root.glob("VOC*") if path.is_dir())
            hint = f"; with the folders of years in root, name one: '{years[0]}:{name}'" if years else ""
            return f"{folder / part}: no such folder, wanted for the split {entry!r}{hint}; {LAYOUT}"
    return f"{folder / 'Annotations'}: no XML file is called as an image of {folder / 'JPEGImages'}; {LAYOUT}"


class _Finder:
    def __init__(self, root: Path, faults: Faults) -> None:
        self.root, self.faults = root, faults
        self.found: dict[str, folders.ListedImage] = {}
        self.number = 0
        self._folders: dict[Path, folders.Folder] = {}

    def add_folders(self, places: Sequence[folders.Place]) -> None:
        """Add all images of some folders, and the annotation files that have no image."""
        stems: dict[Path, set[str]] = {}  # folder of annotations -> names of images
        for place in places:
            images = self._list(place.images).images
            labels = self._list(place.labels).labels
            stems.setdefault(place.labels, set()).update(images)
            for stem, names in images.items():
                if stem in labels or not place.only_labeled:
                    xml = place.labels / labels.get(stem, f"{stem}{_SUFFIX}")
                    self._add(place.images / names[0], xml, names, str(place.images / names[0]))
        for place in places:
            alone = set(self._list(place.labels).labels) - stems[place.labels]
            if not place.only_labeled and place.labels in stems:
                del stems[place.labels]  # once for each folder of annotations
                for stem in sorted(alone - self._stems_elsewhere(place) if alone else ()):
                    xml = place.labels / self._list(place.labels).labels[stem]
                    self._add(place.images / f"{stem}.jpg", xml, [], str(xml))

    def _stems_elsewhere(self, place: folders.Place) -> set[str]:
        """Names of images of other splits that share the folder of annotations."""
        others = [other for other in folders.find_places(self.root, _SUFFIX) if other.labels == place.labels]
        return {stem for other in others for stem in self._list(other.images).images}

    def add_list(self, part: VOCSplit) -> None:
        """Add the images that a list names."""
        assert part.list_file is not None
        for line_number, line in enumerate(read_text(part.list_file, "list of image names").splitlines(), start=1):
            text = self._without_flag(folders.name_in_line(line).replace("\\", "/"), part.places)
            if text:
                self._add_line(text, part, f"{part.list_file}: line {line_number}: {text!r}")

    def _add_line(self, text: str, part: VOCSplit, where: str) -> None:
        place, name = self._locate(text, part)
        outside = ".." in name.split("/") or name.startswith("/") or "\0" in name or bool(PureWindowsPath(name).drive)
        if outside and not (self.faults.allow_links and "\0" not in name):
            self.number += 1
            return self.faults.fatal(
                "leads out of the folder",
                f"{where} leads out of the folder; lists hold plain names without folder and suffix; allow_links: true permits it",
            )
        folder, _, base = name.rpartition("/")
        stem, suffix = os.path.splitext(base) if folders.is_image(base) else (base, "")
        images = self._list(place.images / folder) if (place.images / folder).is_dir() else folders.Folder()
        names = images.images.get(stem, [])
        if suffix and base in names:
            names = [base]
        image = place.images / folder / (names[0] if names else base if suffix else f"{base}.jpg")
        labels = place.labels if outside else place.labels / folder
        known = self._list(labels).labels if labels.is_dir() else {}
        return self._add(image, labels / known.get(stem, f"{stem}{_SUFFIX}"), names, where)

    def _locate(self, text: str, part: VOCSplit) -> tuple[folders.Place, str]:
        """The place of a name in a list, and the name relative to it, without folders that are not there."""
        assert part.list_file is not None
        parts = text.split("/")
        for k in range(len(parts) if "" not in parts[1:] and ".." not in parts else 0):
            for place in part.places:
                folder = place.images.joinpath(*parts[k:-1])
                if parts[k] and folder.is_dir() and self._holds(folder, parts[-1]):
                    return place, "/".join(parts[k:])
        return part.places[0], text

    def _holds(self, folder: Path, name: str) -> bool:
        images = self._list(folder).images
        return name in images or (folders.is_image(name) and os.path.splitext(name)[0] in images)

    def _without_flag(self, line: str, places: Sequence[folders.Place]) -> str:
        """The name in a line; lists of one class carry a flag behind it (-1, 0 or 1), which is not looked at."""
        parts = line.rsplit(maxsplit=1)
        flagged = len(parts) == 2 and parts[1] in ("-1", "0", "1")
        if flagged and not any((p.labels / f"{line}{_SUFFIX}").is_file() for p in places):
            return parts[0]
        return line

    def _add(self, image: Path, xml: Path, names: Sequence[str], where: str) -> None:
        self.number += 1
        relative = os.path.relpath(image, self.root).replace(os.sep, "/")
        file_name = image.as_posix() if relative.startswith("../") else relative
        if file_name in self.found:
            return self.faults.image("listed twice", f"{where} is listed twice")
        alike = tuple(names) if len(names) > 1 else ()
        self.found[file_name] = folders.ListedImage(self.number, file_name, image, xml, alike)
        return None

    def _list(self, folder: Path) -> folders.Folder:
        if folder not in self._folders:
            self._folders[folder] = folders.list_folder(folder, _SUFFIX)
        return self._folders[folder]

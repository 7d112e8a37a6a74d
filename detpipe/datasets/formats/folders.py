"""Finds which folders hold the images and annotations of a data set that has one annotation file an image, and its splits.

::

    train/a.jpg  train/a.xml                beside each other
    images/train/a.jpg  labels/train/a.txt  in sister folders, at any depth
    images/a.jpg  annotations/xmls/a.xml    folders of other names too: what belongs together has the same names in it

A split is called by the folder that says so (``train``, ``valid``, ``test2007``, ``default``, ``data``); where none does, all
images are one split, ``all``.
"""

from __future__ import annotations

import logging
import math
import os
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path, PureWindowsPath

from detpipe.datasets.annotations import leaves_folder
from detpipe.datasets.decode import IMAGE_SUFFIXES, image_names
from detpipe.support.errors import DataError

_log = logging.getLogger(__name__)

ALL = "all"  # what the only split of a data set without splits is called
IMAGE_FOLDERS = ("images", "image", "imgs", "img", "jpegimages", "pictures", "photos", "frames")
LABEL_FOLDERS = ("labels", "label", "annotations", "annotation", "anns", "ann", "xmls", "xml", "txt")
_SAME_SPLIT = (("val", "valid", "validation"), ("train", "training"), ("test", "testing"))
_SPLIT = re.compile(r"(train|training|trainval|val|valid|validation|test|testing|dev|eval)([^a-z].*)?")
SPLIT_WORDS = ("default", "data")  # of tools that have no splits, but a folder in their place
_WORD = f"({'|'.join((*IMAGE_FOLDERS, *LABEL_FOLDERS))})"
_WORDS = re.compile(rf"^{_WORD}$|^{_WORD}[ _-]+|[ _-]+{_WORD}$", re.IGNORECASE)
_XML_BEHIND = re.compile(rf"({'|'.join(map(re.escape, IMAGE_SUFFIXES))})\s.*\.xml$", re.IGNORECASE)
_LONGEST_NAME = 4096  # bytes of a path in a list
_DEEPEST = 8  # levels of folders below the root


@dataclass
class Folder:
    """What lies in a folder."""

    # name without suffix -> file names of images, more than one where only suffixes differ
    images: dict[str, list[str]] = field(default_factory=dict)
    labels: dict[str, str] = field(default_factory=dict)  # name without suffix -> file name of an annotation file


@dataclass(frozen=True)
class Place:
    """A folder of images and the folder of their annotations, which may be the same."""

    images: Path  # path of the folder
    labels: Path  # path of the folder
    split: str  # what it is a part of
    only_labeled: bool = False  # whether images without an annotation file belong to another split


@dataclass(frozen=True)
class ListedImage:
    """An image of a split, with the file of its annotations; neither need exist."""

    image_id: int  # its number in the split, from 1
    file_name: str  # relative to the root, with forward slashes
    image: Path  # path of the image
    labels: Path  # path of the annotation file
    # all images of the folder that have this name, where only suffixes differ and nothing chose one
    named_alike: tuple[str, ...] = ()


def is_image(name: str) -> bool:
    """Whether a file is an image by its suffix; hidden files are none."""
    return name.lower().endswith(IMAGE_SUFFIXES) and not name.startswith(".")


def list_folder(folder: Path, suffix: str = "") -> Folder:
    """List the images of a folder, and its files that end in a suffix; a DataError if it cannot be listed."""
    return _sorted_out((entry.name for entry in visible(folder)), suffix)


def _sorted_out(names: Iterable[str], suffix: str) -> Folder:
    found = Folder()
    ordered = sorted(names)
    images = set(image_names(ordered))
    for name in ordered:
        stem, _, own = name.rpartition(".")  # a third of the time of splitext; none is hidden
        if name in images:
            found.images.setdefault(stem, []).append(name)
        elif suffix and stem and f".{own.lower()}" == suffix:
            found.labels[stem] = name
    return found


def list_folders(root: Path, suffix: str) -> dict[tuple[str, ...], Folder]:
    """List the folders of `walk_folders`, by their parts relative to it; nothing where no file ends in the suffix."""
    found = walk_folders(root, deepest=_DEEPEST)
    names = {folder.relative_to(root).parts: [file.name for file in files] for folder, files in found}
    if not any(name.lower().endswith(suffix) for files in names.values() for name in files):
        return {}
    return {parts: _sorted_out(files, suffix) for parts, files in names.items()}


def walk_folders(
    folder: Path, seen: set[tuple[int, int]] | None = None, deepest: float = math.inf
) -> Iterator[tuple[Path, list[os.DirEntry[str]]]]:
    """A folder and those below it, by name, with the files in each; hidden ones are left out.

    Links are followed, and no folder is entered twice, or that is in ``seen``, by :func:`folder_key`; ``deepest`` is how many
    levels below the first are. A DataError if a folder cannot be listed.
    """
    seen = set() if seen is None else seen
    if folder_key(folder) not in seen:
        seen.add(folder_key(folder))
        entries = visible(folder)
        yield folder, [entry for entry in entries if not entry.is_dir()]
        for entry in (entry for entry in entries if deepest and entry.is_dir()):
            yield from walk_folders(folder / entry.name, seen, deepest - 1)


def visible(folder: str | Path) -> list[os.DirEntry[str]]:
    """What is not hidden in a folder, by name: of two ways to a folder below it is always the same one that is taken.

    A DataError if it cannot be listed.
    """
    try:
        with os.scandir(folder) as entries:
            return sorted((entry for entry in entries if not entry.name.startswith(".")), key=lambda entry: entry.name)
    except OSError as error:
        raise DataError(f"{folder}: cannot be listed ({error.strerror or error})") from error


def folder_key(folder: str | Path) -> tuple[int, int]:
    """What tells a folder from others, whatever links lead to it."""
    status = os.stat(folder)
    return status.st_dev, status.st_ino


class Entries:
    """Finds what names in annotations, lists and descriptions mean on this machine; folders are listed once."""

    def __init__(self) -> None:
        self._names: dict[Path, set[str]] = {}
        self._loose: dict[Path, dict[str, str]] = {}

    def holds(self, folder: Path, name: str) -> bool:
        """Whether a file of a folder, or below it, is called exactly so."""
        inner, _, base = name.rpartition("/")
        return base in self._list(folder / inner if inner else folder)

    def find(self, folder: Path, entry: str) -> Path | None:
        """Find a file or folder: where its first folders are not there, the longest end of the path that is; None if nothing is.

        The entry of a list or description may have backslashes, other capitals, or another suffix of images or none.
        """
        if "\0" in entry or not entry:
            return None
        if self.holds(folder, entry) or (folder / entry).exists():
            return folder / entry
        parts = [part for part in entry.replace("\\", "/").split("/") if part not in ("", ".", "..")]
        ends = [parts[k:] for k in range(len(parts))]
        exact = (folder.joinpath(*end) for end in ends if self.holds(folder, "/".join(end)))
        return next(exact, None) or next(filter(None, (self._loosely(folder, end) for end in ends)), None)

    def find_image(self, folder: Path, name: str, allow_links: bool = False) -> str:
        """The name of an image in a folder as its file is called; what is not there, or goes up, stays as it is.

        A path of another machine means the longest end of it that is there; ``allow_links`` takes one of this machine as it is.
        """
        outside = leaves_folder(name)
        if ("\0" in name or ".." in name.replace("\\", "/").split("/")) if outside else self.holds(folder, name):
            return name
        if outside and allow_links and Path(name).is_file():
            return name
        found = self.find(folder, name.removeprefix(PureWindowsPath(name).drive).lstrip("/\\"))
        return name if found is None else found.relative_to(folder).as_posix()

    def _loosely(self, folder: Path, parts: Sequence[str]) -> Path | None:
        path = folder
        for part in parts:
            if path not in self._loose:
                names = sorted(self._list(path))
                images = {_stem(name): name for name in image_names(names) if is_image(name)}
                self._loose[path] = images | {_fold(name): name for name in names}
            known = self._loose[path]
            name = known.get(_fold(part)) or known.get(_stem(part) if is_image(part) else f"{_fold(part)}/")
            if name is None:
                return None
            path = path / name
        return path

    def _list(self, folder: Path) -> set[str]:
        if folder not in self._names:
            self._names[folder] = set(os.listdir(folder)) if folder.is_dir() else set()
        return self._names[folder]


def _stem(name: str) -> str:
    """What an image is looked for by if its suffix is another."""
    return f"{_fold(os.path.splitext(name)[0])}/"


def _fold(name: str) -> str:
    """The same for what differs by capitals, or by how accents are encoded, which a Mac changes."""
    return unicodedata.normalize("NFC", name).lower()


def find_image_folder(root: Path, near: Sequence[Path], names: Sequence[str], split: str) -> Path | None:
    """The folder that names of images are relative to: the first near one that has some of them, or else any below the root.

    None if no folder has, or only one that says that it is of another split, whose images may be called alike.
    """
    entries = Entries()
    exact = (place for place in near for name in names if not leaves_folder(name) and (place / name).is_file())
    loose = (place for place in near for name in names if entries.holds(place, entries.find_image(place, name)))
    return next(exact, None) or next(loose, None) or _search(root, names, split)


def _search(root: Path, names: Sequence[str], split: str) -> Path | None:
    wanted = {parts[-1]: parts[:-1] for parts in (name.replace("\\", "/").split("/") for name in names)}
    for folder, entries in walk_folders(root, deepest=_DEEPEST):
        files = [entry.name for entry in entries]
        ranks = {_rank(name) for name in (split, split_of(folder.relative_to(root).parts))}
        stems = (os.path.splitext(name)[0] for name in files if is_image(name))  # names may lack the suffix
        name = next((name for name in chain(files, stems) if name in wanted), None)
        if name is not None and len(ranks - {_rank("")}) < 2:
            for part in reversed(wanted[name]):
                if folder == root or folder.name != part:
                    break
                folder = folder.parent
            return folder
    return None


def find_places(root: Path, suffix: str) -> list[Place]:
    """Find the folders of images whose annotation files, called as the images, lie beside them or in another folder.

    Those of training, of validation and of test splits come first, then others, by the path of their images.
    """
    folders = list_folders(root, suffix)
    pairs = _pairs(folders)
    shared = Counter(images for images, _ in pairs)
    named = [split_of(images) or split_of(labels) for images, labels in pairs]
    places = [
        Place(root.joinpath(*images), root.joinpath(*labels), name or ALL, shared[images] > 1)
        for (images, labels), name in zip(pairs, named, strict=True)
    ]
    return sorted(places, key=lambda place: (_rank(place.split), place.images, place.labels))


def _rank(split: str) -> int:
    """Training, validation and test splits come in this order, others behind them."""
    beginnings = ("train", "val", "test")
    return next((k for k, word in enumerate(beginnings) if split.lower().startswith(word)), len(beginnings))


def _pairs(folders: dict[tuple[str, ...], Folder]) -> list[tuple[tuple[str, ...], tuple[str, ...]]]:
    """The folders of images and annotations that belong together."""
    by_name: dict[tuple[str, ...], list[tuple[str, ...]]] = defaultdict(list)  # names without image and label words
    holders: dict[str, list[tuple[str, ...]]] = defaultdict(list)  # name of an annotation file -> folders
    for parts, folder in folders.items():
        if folder.labels:
            by_name[_plain(parts)].append(parts)
            for stem in folder.labels:
                holders[stem].append(parts)
    found: list[tuple[tuple[str, ...], tuple[str, ...]]] = []
    for parts, folder in folders.items():
        count = Counter({other: len(folder.images.keys() & folders[other].labels) for other in by_name[_plain(parts)]})
        if not any(count.values()):
            count = Counter(other for stem in folder.images for other in holders.get(stem, ()))
            if count and len(parts) < max(len(other) for other in count) and not _plain(parts):
                by_split = [other for other in count if split_of(other)]
                found += [(parts, other) for other in by_split]  # images together, annotations by splits
                if by_split:
                    continue
        best = max(count, key=lambda other: (count[other], _common(parts, other), [*other]), default=None)
        if best is not None and count[best]:
            found.append((parts, best))
    return found


def _plain(parts: Iterable[str]) -> tuple[str, ...]:
    return tuple(part for part in map(_without_words, map(str.lower, parts)) if part)


def _without_words(part: str) -> str:
    """``images`` -> nothing, ``train_images`` and ``labels-train`` -> ``train``."""
    return _WORDS.sub("", part)


def _common(one: Sequence[str], other: Sequence[str]) -> int:
    """How many parts two paths share at their begin."""
    differ = (k for k, (a, b) in enumerate(zip(one, other, strict=False)) if a != b)
    return next(differ, min(len(one), len(other)))


def find_lists(folder: Path, images: Iterable[str]) -> dict[str, Path]:
    """Find lists of images in a folder: text files that are called as splits and begin with the name of an image."""
    known = set(images)
    found: dict[str, Path] = {}
    for path in sorted(folder.glob("*.txt")):
        if split_of((path.stem,)) and path.is_file():
            with path.open("rb") as stream:
                first = stream.readline(_LONGEST_NAME).decode("utf-8-sig", errors="replace")
            name = name_in_line(first).replace("\\", "/").rpartition("/")[2]
            if name in known or (is_image(name) and os.path.splitext(name)[0] in known):
                found[path.stem] = path
    return dict(sorted(found.items(), key=lambda item: _rank(item[0])))


def name_in_line(line: str) -> str:
    """The image that a line of a list names, with what may stand behind it, but not the annotation file; it may be in quotes."""
    line = line.strip()
    return line[1:].replace('"', "", 1) if line.startswith('"') else _XML_BEHIND.sub(r"\1", line)


def split_of(parts: Sequence[str]) -> str:
    """What the parts of a path say of the split; empty if nothing."""
    for part in parts:
        name = _without_words(part)
        if _SPLIT.fullmatch(name.lower()):
            return name
    return parts[-1] if parts and parts[-1].lower() in SPLIT_WORDS else ""


def find_split(name: str, known: Iterable[str]) -> str | None:
    """Find a split by its name or another usual one: ``val`` is ``valid`` and ``my_val``, and the only split is ``all``.

    What the data set calls it; None if it has none, or several that may be meant.
    """
    names = list(known)
    if name in names:
        return name
    lower = name.lower()
    same = next((group for group in _SAME_SPLIT if lower in group), (lower,))
    found = [other for other in names if other.lower() in same]
    found = found or [other for other in names if other.rpartition(":")[2].lower() in same]  # of one folder of several
    found = found or [other for other in names if re.split("[ _-]", other.lower())[-1] in same]  # lvis_v1_train
    if not found and lower == ALL:
        found = names
    return found[0] if len(found) == 1 else None


def take_split(root: Path, name: str, known: Iterable[str]) -> str | None:
    """As `find_split`; that another name is taken is said in a line of the log."""
    found = find_split(name, known)
    if found not in (None, name):
        _log.warning("%s: there is no split %r; its split %r is read", root, name, found)
    return found


def in_order(names: Iterable[str]) -> list[str]:
    """Sort the names of splits: those of training, of validation and of test splits, then others in their order."""
    return sorted(names, key=_rank)


def says_folders(root: Path, places: Sequence[Place], what: str) -> str:
    """Say where annotations are: "XML beside the images in train, valid"."""
    beside = [place for place in places if place.images == place.labels]
    apart = [place for place in places if place.images != place.labels]
    parts = []
    if beside:
        names = list(dict.fromkeys(_name(root, place.images) for place in beside))
        more = f" and {len(names) - 8} more" if len(names) > 8 else ""
        parts.append(f"{what} beside the images in {', '.join(names[:8])}{more}")
    if apart:
        place = apart[0]
        more = f" (and {len(apart) - 1} more folders)" if len(apart) > 1 else ""
        parts.append(f"{what} in {_name(root, place.labels)} of the images in {_name(root, place.images)}{more}")
    return " and ".join(parts)


def _name(root: Path, folder: Path) -> str:
    return "the folder" if folder == root else folder.relative_to(root).as_posix()

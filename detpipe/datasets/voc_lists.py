"""Finds the images of a VOC split: lists in ``ImageSets/Main``, of one folder or of several years."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from detpipe.datasets.faults import Faults
from detpipe.errors import DataError
from detpipe.files import refuse_special
from detpipe.suggest import did_you_mean

_SUFFIXES = (".png", ".jpeg", ".jpg")  # the later wins where one name has several
_LAYOUT = "VOC layout is JPEGImages/NAME.jpg, Annotations/NAME.xml and lists of names in ImageSets/Main/SPLIT.txt"


@dataclass(frozen=True)
class Listed:
    """An image that a list names; neither file need exist.

    Args:
        image_id: its number in the split, from 1.
        file_name: of the image, relative to the root, with forward slashes.
        image: path of the image.
        xml: path of the annotation.
    """

    image_id: int
    file_name: str
    image: Path
    xml: Path


def list_images(root: Path, split: str | Sequence[str], faults: Faults) -> tuple[list[Listed], int]:
    """Read the lists of a split.

    Args:
        root: a folder in VOC layout, or one that holds such folders.
        split: names of lists, ``"2007:trainval"`` for the one of the folder VOC2007, or a path to a ``.txt`` file.
        faults: where names that occur twice, or lead elsewhere, are noted.

    Returns:
        The images in the order of the lists, each once; and how many lines name an image.

    Raises:
        DataError: if a folder or list is missing, or the lists are empty.
    """
    found: dict[str, Listed] = {}
    number = 0
    for entry in [split] if isinstance(split, str) else split:
        folder, list_file = _find_list(root, entry)
        images, annotations = _stems(folder / "JPEGImages"), set(os.listdir(folder / "Annotations"))
        prefix = folder.relative_to(root).as_posix().removeprefix(".")
        for line_number, line in enumerate(_read_lines(list_file), start=1):
            stem = _stem(line, annotations)
            if not stem:
                continue
            number += 1
            where = f"{list_file}: line {line_number}: {stem!r}"
            if "/" in stem or "\\" in stem or "\0" in stem:
                faults.fatal(
                    "leads out of the folder",
                    f"{where} leads out of the folder; lists hold plain names without folder and suffix",
                )
                continue
            base = images.get(stem, stem + ".jpg")
            file_name = f"{prefix}/JPEGImages/{base}".lstrip("/")
            if file_name in found:
                faults.image("listed twice", f"{where} is listed twice")
                continue
            xml = folder / "Annotations" / f"{stem}.xml"
            found[file_name] = Listed(number, file_name, folder / "JPEGImages" / base, xml)
    if not number:
        raise DataError(f"{root}: the lists of the split {split!r} name no image")
    return list(found.values()), number


def _find_list(root: Path, entry: str) -> tuple[Path, Path]:
    """The folder in VOC layout, and the list."""
    if not root.is_dir():
        raise DataError(f"{root}: no such folder; the argument root must name the folder of the VOC data")
    year, colon, name = entry.rpartition(":")
    folder = root / (f"VOC{year}" if year.isdigit() else year) if colon else root
    for part in ("JPEGImages", "Annotations"):
        if not (folder / part).is_dir():
            years = sorted(path.name.removeprefix("VOC") for path in root.glob("VOC*") if path.is_dir())
            hint = f"; with the folders of years in root, name one: '{years[0]}:{name}'" if years and not colon else ""
            raise DataError(f"{folder / part}: no such folder, wanted for the split {entry!r}{hint}; {_LAYOUT}")
    if name.endswith(".txt"):
        list_file = root / name
        if not list_file.is_file():
            raise DataError(f"{list_file}: no such list of images, wanted for the split {entry!r}")
        return folder, list_file
    lists = folder / "ImageSets" / "Main"
    if not lists.is_dir():
        raise DataError(
            f"{lists}: no such folder, wanted for the split {entry!r}; make it with a file {name}.txt of one image "
            f"name a line, or give the path of such a file as the split; {_LAYOUT}"
        )
    if not (lists / f"{name}.txt").is_file():
        known = sorted(path.stem for path in lists.glob("*.txt"))
        raise DataError(
            f"{lists / name}.txt: no such list of images; lists found: {', '.join(known[:20]) or 'none'}"
            f"{did_you_mean(name, known)}"
        )
    return folder, lists / f"{name}.txt"


def _stems(folder: Path) -> dict[str, str]:
    """Image names without and with suffix."""
    names = [os.path.splitext(name) for name in os.listdir(folder)]
    images = [(stem, suffix) for stem, suffix in names if suffix.lower() in _SUFFIXES]
    images.sort(key=lambda name: (_SUFFIXES.index(name[1].lower()), name[1]))
    return {stem: stem + suffix for stem, suffix in images}


def _read_lines(list_file: Path) -> list[str]:
    refuse_special(list_file)
    try:
        return list_file.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{list_file}: cannot be read as a list of image names ({error})") from error


def _stem(line: str, annotations: set[str]) -> str:
    """The name in a line; lists of one class carry a flag behind it (-1, 0 or 1), which is not looked at."""
    line = line.strip()
    name, _, flag = line.rpartition(" ")
    if f"{line}.xml" not in annotations and flag in ("-1", "0", "1") and name:
        return name.strip()
    return line

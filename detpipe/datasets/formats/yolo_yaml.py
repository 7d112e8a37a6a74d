"""Reads ``data.yaml`` of the YOLO layout: where the images of each split are, and what the classes are called.

::

    path: .                    # the root, relative to this file; this file's folder by default
    train: images/train        # a folder of images, a .txt list of images, or a list of such
    val: images/val
    names: [cat, dog]          # or {0: cat, 1: dog}
    nc: 2                      # optional

Other keys are not looked at, but for ``category_ids``, which gives the ids that the classes have elsewhere (COCO's gaps).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from detpipe.support.errors import DataError
from detpipe.support.strict_json import shorten
from detpipe.support.strict_yaml import load_yaml
from detpipe.support.suggest import did_you_mean

NAME = "data.yaml"
NOT_SPLITS = ("path", "names", "nc", "category_ids", "download")


@dataclass(frozen=True)
class YOLOFile:
    """What ``data.yaml`` says.

    Args:
        path: of the file.
        root: what the entries of splits are relative to.
        class_names: [K] of the numbers 0..K-1.
        category_ids: [K], those numbers unless the file gives others.
        splits: name -> folders and lists of images.
    """

    path: Path
    root: Path
    class_names: tuple[str, ...]
    category_ids: tuple[int, ...]
    splits: dict[str, tuple[str, ...]]

    def entries(self, split: str) -> tuple[str, ...]:
        """Folders and lists of a split.

        Raises:
            DataError: there is no such split.
        """
        if split not in self.splits:
            known = ", ".join(self.splits) or "none"
            raise DataError(f"{self.path}: has no split {split!r}; there are {known}{did_you_mean(split, self.splits)}")
        return self.splits[split]


def read_yolo_yaml(root: str | Path) -> YOLOFile:
    """Read ``data.yaml`` strictly: no tags, no key twice, class numbers without gaps.

    Args:
        root: the folder that holds it, or the file itself under any name.

    Returns:
        What it says.

    Raises:
        DataError: it is missing, is no YAML, or says what cannot be; line or key are named.
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
    folder = path.parent if base == "." else path.parent / base
    if not folder.is_dir():
        raise DataError(f"{path}: path is {base!r}, but {folder} is no folder; paths are relative to {NAME}")
    splits = {key: _entries(value, key, path) for key, value in content.items() if _is_split(key, value, folder)}
    return YOLOFile(path, folder, names, tuple(ids), splits)


def _is_split(key: Any, value: Any, folder: Path) -> bool:
    """Whether a key is one of the usual splits, or another whose entries are there."""
    if key in ("train", "val", "test") or not value:
        return bool(value)
    entries = [value] if type(value) is str else value
    if type(key) is not str or key in NOT_SPLITS or type(entries) is not list:
        return False
    return all(type(entry) is str and (folder / entry).exists() for entry in entries)


def _entries(value: Any, key: str, path: Path) -> tuple[str, ...]:
    entries = [value] if type(value) is str else value
    if type(entries) is not list or not entries or not all(type(entry) is str and entry for entry in entries):
        raise DataError(
            f"{path}: {key} must name a folder of images, a .txt list of images, or several, got {shorten(value)}"
        )
    return tuple(entries)


def _class_names(names: Any, path: Path) -> tuple[str, ...]:
    if type(names) is dict:
        if list(names) != list(range(len(names))):
            raise DataError(
                f"{path}: the keys of names must be 0 to {len(names) - 1} in order, got {shorten(list(names))}"
            )
        names = list(names.values())
    if type(names) is not list or not names:
        raise DataError(
            f"{path}: names must list the classes, such as [cat, dog] or {{0: cat, 1: dog}}, got {shorten(names)}"
        )
    wrong = [
        name for name in names if type(name) not in (str, int, float) or name == ""
    ]  # [1, 2]: digits are names too
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

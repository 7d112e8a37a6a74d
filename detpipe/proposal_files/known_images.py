"""The images of a data set, to find the id and the size of what a proposal file names in its own way."""

from __future__ import annotations

from collections import Counter
from pathlib import Path, PurePosixPath
from typing import Literal

from msgspec import UNSET

from detpipe.support.coco_file import read_coco_images
from detpipe.support.errors import DataError
from detpipe.support.strict_json import read_text

Naming = Literal["id", "file", "either"]
_SUFFIXES = frozenset((".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".gif", ".ppm"))


class KnownImages:
    """Ids, file names and sizes of images.

    Args:
        ids: in the order of the annotation file.
        file_names: of the same images; None where unknown.
        sizes: id -> (height, width) in pixels.
        written: what the file has for an id -> the id, where text is numbered; None: they are the same.
    """

    def __init__(
        self,
        ids: list[str],
        file_names: list[str | None],
        sizes: dict[str, tuple[int, int]],
        written: dict[str, str] | None = None,
    ) -> None:
        self.ids, self.sizes = ids, sizes
        self._ids = {image_id: image_id for image_id in ids} if written is None else written
        self._by_file: dict[str, str | None] = {}  # path, name and stem of a file -> id; None where several have it
        for name, image_id in zip(file_names, ids, strict=True):
            for form in _forms(name) if name is not None else (image_id,):
                self._by_file[form] = image_id if self._by_file.get(form, image_id) == image_id else None

    def find(self, name: str, naming: Naming) -> str | None:
        """The id of an image; None if there is no such image, or several files of that name.

        ``name`` is what a proposal file calls it: by ``naming`` ``"id"``; ``"file"``, a path, file name or stem, or else an id;
        ``"either"``, an id, or else one of the others.
        """
        if naming != "file" and name in self._ids:
            return self._ids[name]
        if naming == "id":
            return None
        found = (self._by_file.get(form) for form in _forms(name))
        return next((image_id for image_id in found if image_id is not None), self._ids.get(name))


def plain_id(name: str, naming: Naming) -> str:
    """Turn a name into an id where no list of images is given: of a path or file name the stem, as VOC has it.

    Example:
        >>> plain_id("VOC2007/JPEGImages/000005.jpg", "file")
        '000005'
    """
    if naming == "id" or PurePosixPath(name).suffix.lower() not in _SUFFIXES:
        return name
    return PurePosixPath(name.replace("\\", "/")).stem


def read_known_images(path: str | Path) -> KnownImages:
    """Read the images of a data set, in the order of the file.

    It is an annotation file of COCO's kind (``*.json``), or a list with one id a line, such as VOC's ``ImageSets/Main/*.txt``. A
    DataError if it is missing or something else, or has an id twice.
    """
    path = Path(path)
    if path.suffix.lower() != ".json":
        return _read_list(path)
    images, numbers = read_coco_images(path)
    ids = list(map(str, numbers.tolist()))
    names = [None if name is UNSET else name for name in images["file_name"]]
    sizes = {
        key: (int(height), int(width))
        for key, height, width in zip(ids, images["height"], images["width"], strict=True)
        if height not in (None, UNSET) and width not in (None, UNSET)
    }
    return KnownImages(ids, names, sizes, dict(zip(map(str, images["id"]), ids, strict=True)))


def _read_list(path: Path) -> KnownImages:
    ids = [line.split()[0] for line in read_text(path, "list of ids or .json file").splitlines() if line.strip()]
    for image_id, count in Counter(ids).items():
        if count > 1:
            raise DataError(f"{path}: image id {image_id} is there twice; each image must have an id of its own")
    return KnownImages(ids, [None] * len(ids), {})


def _forms(name: str) -> tuple[str, ...]:
    """A path as it is, its file name, and its stem; the most exact first."""
    path = PurePosixPath(name.replace("\\", "/"))
    stem = path.stem if path.suffix.lower() in _SUFFIXES else path.name
    return tuple(dict.fromkeys((str(path), path.name, stem)))

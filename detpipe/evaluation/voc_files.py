"""Detections in the VOC devkit's text files, one a class, with lines of ``image score xmin ymin xmax ymax``."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

import numpy as np

from detpipe.support.errors import DataError
from detpipe.support.files import refuse_special
from detpipe.types import Annotations, DetectionArrays


def read_voc_detections(
    source: str | os.PathLike[str] | Sequence[str | os.PathLike[str]], annotations: Annotations, one_based: bool = True
) -> DetectionArrays:
    """Read detections from files named ``comp3_det_test_CLASS.txt`` or ``CLASS.txt``, file after file by class.

    Args:
        source: a folder, of which every ``.txt`` file is read, or a list of files; a class may have none.
        annotations: the ground truth, whose class names and image file names (without folder and suffix) the files use.
        one_based: the files hold the devkit's 1-based inclusive pixels, so that ``x1 = xmin - 1``, ``y1 = ymin - 1``.
            False takes the numbers as they are.

    Raises:
        DataError: no such folder or file, a file whose name holds no class, an image that the ground truth does not
            have, or a line that is not five finite numbers behind a name. Names file and line.
    """
    stems = [PurePosixPath(str(name)).stem for name in annotations.file_names]
    image_ids = dict(zip(stems, annotations.image_ids.tolist(), strict=True))
    if len(image_ids) != len(annotations):
        raise DataError(f"{annotations.root}: two images differ only in folder or suffix: VOC files cannot tell them")
    rows: list[tuple[int, int, float, list[float]]] = []
    for label, path in sorted(_files_by_label(source, annotations)):
        for number, line in enumerate(_read_lines(path), start=1):
            if line.strip():
                image_id, score, box = _parse(line, image_ids, f"{path}: line {number}")
                rows.append((image_id, label, score, box))
    boxes = np.array([row[3] for row in rows], np.float64).reshape(-1, 4)
    if one_based:
        boxes[:, :2] -= 1
    return DetectionArrays(
        image_ids=np.array([row[0] for row in rows], np.int64),
        boxes=boxes,
        scores=np.array([row[2] for row in rows], np.float64),
        labels=np.array([row[1] for row in rows], np.int64),
    )


def _files_by_label(
    source: str | os.PathLike[str] | Sequence[str | os.PathLike[str]], annotations: Annotations
) -> list[tuple[int, Path]]:
    if isinstance(source, str | os.PathLike):
        paths = sorted(Path(source).glob("*.txt"))
        if not paths:
            raise DataError(f"{source}: expected a folder with a file CLASS.txt for each class, found no such file")
    else:
        paths = [Path(path) for path in source]
    found: dict[int, Path] = {}
    for path in paths:
        label = _label_of(path, annotations)
        if label in found:
            raise DataError(f"{path}: {found[label].name} holds the same class: pass one file for each")
        found[label] = path
    return list(found.items())


def _label_of(path: Path, annotations: Annotations) -> int:
    """Find the class of a file: its whole name, or the longest class name behind an underscore at its end."""
    names = {name: label for label, name in enumerate(annotations.class_names, start=1)}
    if path.stem in names:
        return names[path.stem]
    endings = [name for name in names if path.stem.endswith("_" + name)]
    if not endings:
        shown = ", ".join(annotations.class_names[:5])
        raise DataError(f"{path}: the name ends in no class of the ground truth ({shown}, ...): rename or remove it")
    return names[max(endings, key=len)]


def _read_lines(path: Path) -> list[str]:
    refuse_special(path)
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read as text ({error})") from error


def _parse(line: str, image_ids: dict[str, int], where: str) -> tuple[int, float, list[float]]:
    """Split ``image score xmin ymin xmax ymax``; the image's name may hold spaces."""
    fields = line.rsplit(maxsplit=5)
    try:
        numbers = [float(field) for field in fields[1:]]
    except ValueError:
        numbers = []
    if len(numbers) != 5 or not all(map(math.isfinite, numbers)):
        raise DataError(f"{where}: {line.strip()[:80]!r}: expected a name, score, xmin, ymin, xmax, ymax")
    name = fields[0].strip()
    if name not in image_ids:
        raise DataError(f"{where}: the image {name!r} is not an image of the ground truth: check that both match")
    return image_ids[name], numbers[0], numbers[1:]

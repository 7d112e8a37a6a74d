"""Read proposals from files of arrays: MATLAB, detectron2's and mmdetection's pickles, numpy.

Arguments and errors are those of `raw_proposals.Reader`.
"""

from __future__ import annotations

import math
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from detpipe.proposal_files.box_checks import Array, read_boxes, read_scores
from detpipe.proposal_files.known_images import KnownImages
from detpipe.proposal_files.raw_proposals import RawFile, RawImage, Tally, by_order, split_columns
from detpipe.proposal_files.restricted_pickle import load_plain_pickle
from detpipe.support.errors import DataError
from detpipe.support.files import refuse_special
from detpipe.support.strict_json import shorten
from detpipe.support.untrusted import check_zip

_LARGEST = 2**26  # bytes of the boxes of one image
_DETECTRON2_MODES = {0: "xyxy", 1: "xywh"}  # detectron2.structures.BoxMode: XYXY_ABS and XYWH_ABS


def read_mat(path: Path, known: KnownImages | None, tally: Tally) -> RawFile:
    """Read MATLAB files of boxes, of two kinds.

    Fast R-CNN's ``selective_search_data/*.mat``: a cell array ``boxes`` (or ``all_boxes``) of ``[P, 4]`` y1, x1, y2, x2
    counted from 1, and a cell array ``images`` of names; without it the order is that of ``--images``. Or one file an
    image, or a folder of them, with the matrix ``boxes`` of x1, y1, x2, y2 counted from 1 (``selective_search_IJCV``);
    the file's name, without ``_boxes`` at its end, is the image's.
    """
    if path.is_dir():
        files = sorted(path.glob("*.mat"))
        if not files:
            raise DataError(f"{path}: a folder without .mat files")
        return RawFile("xyxy1", "file", _mat_files(files, tally), len(files))
    content = _load_mat(path)
    boxes = _mat_boxes(content, path)
    if boxes.dtype != object:
        return RawFile("xyxy1", "file", _mat_files([path], tally), 1)
    cells = list(boxes.ravel())
    if "images" in content:
        names = [_cell_text(cell, row, path) for row, cell in enumerate(content["images"].ravel())]
        if len(names) != len(cells):
            raise DataError(f"{path}: holds {len(cells)} boxes cells, but {len(names)} names of images")
        return RawFile("yxyx1", "file", _listed(names, cells, path, tally), len(cells))
    return RawFile("yxyx1", "id", _listed(by_order(len(cells), known, path), cells, path, tally), len(cells))


def read_pickle(path: Path, known: KnownImages | None, tally: Tally, kind: str | None = None) -> RawFile:
    """Read a pickle of ``"detectron2"`` or ``"mmdetection"``; without a kind, of whichever it is.

    detectron2's has ``ids``, ``boxes``, ``objectness_logits``, kept as they are, and maybe ``bbox_mode`` (0 corners, 1 sides);
    Detectron's older names ``indexes`` and ``scores`` are read as well. mmdetection's is a list of ``[P, 4]`` or ``[P, 5]`` in the
    order of an annotation file, or path -> such an array, or as of version 3 a dict with ``bboxes`` and ``scores``.
    """
    content = load_plain_pickle(path)
    ours = isinstance(content, dict) and "boxes" in content and {"ids", "indexes"} & content.keys()
    if kind == "detectron2" or (kind is None and ours):
        return _detectron2(content, path, tally)
    return _mmdetection(content, path, known, tally)


def read_numpy(path: Path, known: KnownImages | None, tally: Tally) -> RawFile:
    """Read a ``.npz`` file with one array an image: image id -> ``[P, 4]`` x1, y1, x2, y2, or ``[P, 5]`` with scores."""
    with _open_npz(path) as archive:
        names = list(archive.files)
    return RawFile("xyxy", "either", _npz_images(names, path, tally), len(names))


@contextmanager
def _open_npz(path: Path) -> Iterator[Any]:
    refuse_special(path)
    with path.open("rb") as file:
        if file.read(6) == b"\x93NUMPY":
            raise DataError(f"{path}: holds a single array; expected a .npz file with one array for each image id")
        try:
            with zipfile.ZipFile(file) as archive:
                check_zip(archive, path.stat().st_size)
            opened: Any = np.load(file, allow_pickle=False)
        except (OSError, ValueError, EOFError, zipfile.BadZipFile, NotImplementedError) as error:
            raise DataError(f"{path}: not a readable .npz file ({_one_line(error)})") from error
        with opened:
            yield opened


def _npz_images(names: Sequence[str], path: Path, tally: Tally) -> Iterator[RawImage]:
    with _open_npz(path) as archive:
        for name in names:
            try:
                _check_array(archive, name)
                values = archive[name]
            except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error, NotImplementedError) as error:
                raise DataError(f"{path}: the array {name!r} cannot be read ({_one_line(error)})") from error
            yield from _image(name, values, path, tally)


def _check_array(archive: Any, name: str) -> None:
    """Compare what the header of an array announces with what is there, before memory is taken for it."""
    part = archive.zip.getinfo(f"{name}.npy" if f"{name}.npy" in archive.zip.NameToInfo else name)
    with archive.zip.open(part) as stream:
        version = np.lib.format.read_magic(stream)
        header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, kind = header(stream)
        if kind.hasobject:
            return  # NumPy refuses it
        announced = math.prod(shape) * kind.itemsize
        if announced > _LARGEST or announced != part.file_size - stream.tell():
            raise ValueError(f"its header announces {announced} bytes, and {part.file_size - stream.tell()} are there")


def _mat_files(files: Sequence[Path], tally: Tally) -> Iterator[RawImage]:
    for file in files:
        boxes = _mat_boxes(_load_mat(file), file)
        if boxes.dtype == object:
            raise DataError(
                f"{file}: holds a cell array of many images; convert this file alone, not as one of a folder"
            )
        yield from _image(file.stem.removesuffix("_boxes"), boxes, file, tally)


def _load_mat(path: Path) -> dict[str, Any]:
    try:
        from scipy.io import loadmat
    except ImportError as error:
        raise DataError(f"{path}: reading .mat files needs scipy: pip install scipy") from error
    refuse_special(path)
    try:
        return loadmat(str(path), appendmat=False)
    except NotImplementedError as error:
        raise DataError(
            f"{path}: a MATLAB 7.3 file (HDF5), which is not read: save it again in MATLAB with -v7"
        ) from error
    except Exception as error:  # damaged bytes may fail in any of the reader's steps
        raise DataError(f"{path}: not a readable .mat file ({_one_line(error)}); cut off or damaged?") from error


def _mat_boxes(content: dict[str, Any], path: Path) -> np.ndarray[Any, Any]:
    for name in ("boxes", "all_boxes"):
        if isinstance(content.get(name), np.ndarray):
            return content[name]
    found = ", ".join(sorted(name for name in content if not name.startswith("__"))) or "nothing"
    raise DataError(f"{path}: expected the variable 'boxes' or 'all_boxes', found {found}")


def _cell_text(cell: Any, row: int, path: Path) -> str:
    values = np.ravel(cell)
    if values.size != 1 or values.dtype.kind != "U" or not str(values[0]).strip():
        raise DataError(f"{path}: images {{{row + 1}}} must be the name of an image, got {shorten(cell)}")
    return str(values[0]).strip()


def _detectron2(content: Any, path: Path, tally: Tally) -> RawFile:
    if not isinstance(content, dict):
        raise DataError(f"{path}: expected a dict with ids, boxes and objectness_logits, got {shorten(content)}")
    old = {"ids": "indexes", "objectness_logits": "scores"}
    columns = {}
    for key in ("ids", "boxes", "objectness_logits"):
        values = content.get(key, content.get(old.get(key, key)))
        if not isinstance(values, list | tuple | np.ndarray):
            raise DataError(f"{path}: {key!r} must be a list with an entry for each image, got {shorten(values)}")
        columns[key] = values
    lengths = {key: len(values) for key, values in columns.items()}
    if len(set(lengths.values())) > 1:
        raise DataError(f"{path}: expected as many ids as boxes and objectness_logits, got {lengths}")
    mode = content.get("bbox_mode", 0)
    if not isinstance(mode, int | np.integer) or int(mode) not in _DETECTRON2_MODES:
        raise DataError(f"{path}: bbox_mode is {shorten(mode)}: expected 0 (XYXY_ABS) or 1 (XYWH_ABS)")
    names = [str(name) for name in columns["ids"]]
    entries = list(zip(columns["boxes"], columns["objectness_logits"], strict=True))
    return RawFile(_DETECTRON2_MODES[int(mode)], "id", _listed(names, entries, path, tally), len(names))


def _mmdetection(content: Any, path: Path, known: KnownImages | None, tally: Tally) -> RawFile:
    if isinstance(content, dict):
        names = [str(name) for name in content]
        return RawFile("xyxy", "file", _listed(names, list(content.values()), path, tally), len(names))
    content = content.tolist() if isinstance(content, np.ndarray) and content.dtype.hasobject else content
    if not isinstance(content, list):
        raise DataError(
            f"{path}: expected a list of arrays [P, 5], a dict of them, or detectron2's dict with ids and boxes, "
            f"got {shorten(content)}"
        )
    return RawFile("xyxy", "id", _listed(by_order(len(content), known, path), content, path, tally), len(content))


def _listed(names: Sequence[str], entries: Sequence[Any], path: Path, tally: Tally) -> Iterator[RawImage]:
    for name, entry in zip(names, entries, strict=True):
        yield from _image(name, entry, path, tally)


def _image(name: str, entry: Any, path: Path, tally: Tally) -> Iterator[RawImage]:
    """One image, or none if its entry is no boxes and that may be skipped."""
    where = f"{path}: image {name!r}"
    try:
        boxes, scores = _entry(entry, where)
    except DataError as error:
        tally.counts["images read"] += 1
        tally.bad("images skipped: not boxes", str(error))
        return
    yield RawImage(name, boxes, scores)


def _entry(entry: Any, where: str) -> tuple[Array, Array | None]:
    if isinstance(entry, tuple) and len(entry) == 2:  # boxes and scores apart
        boxes = read_boxes(entry[0], where)
        return boxes, read_scores(entry[1], len(boxes), where)
    if isinstance(entry, dict):
        if "bboxes" not in entry:
            raise DataError(
                f"{where}: expected a dict with 'bboxes' and 'scores', got {shorten(sorted(map(str, entry)))}"
            )
        boxes = read_boxes(entry["bboxes"], where)
        return boxes, read_scores(entry["scores"], len(boxes), where) if "scores" in entry else None
    return split_columns(entry, where)


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__

"""Read proposals from text: COCO's result files and CSV tables; arguments and errors are those of `raw_proposals.Reader`."""

from __future__ import annotations

from pathlib import Path

from detpipe.proposal_files.known_images import KnownImages
from detpipe.proposal_files.raw_proposals import Groups, RawFile, Tally
from detpipe.support.coco_file import as_key
from detpipe.support.errors import DataError
from detpipe.support.strict_json import load_json, require, require_numbers, shorten
from detpipe.support.tables import read_table

_CORNERS, _SIDES = ("x1", "y1", "x2", "y2"), ("x", "y", "width", "height")


def read_coco(path: Path, known: KnownImages | None, tally: Tally) -> RawFile:
    """Read a result file: a list of ``{"image_id", "bbox": [x, y, width, height], "score"}``; categories are ignored."""
    records = load_json(path)
    if isinstance(records, dict) and "annotations" in records:
        raise DataError(
            f"{path}: this is an annotation file; expected a result file, a list of objects with bbox and score"
        )
    if not isinstance(records, list):
        raise DataError(f"{path}: expected a list of objects with image_id, bbox and score, got {shorten(records)}")
    groups = Groups("record", has_scores=True)
    for row, record in enumerate(records):
        where = f"{path}: record {row}"
        try:
            box, score = require_numbers(record, "bbox", 4, where), require(record, "score", float, where)
            image_id = as_key(record.get("image_id"))
            if type(image_id) not in (int, str) or image_id == "":
                raise DataError(
                    f"{where}: the field 'image_id' is {shorten(image_id)}: expected a whole number or text"
                )
        except DataError as error:
            tally.counts["boxes read"] += 1
            tally.bad("boxes skipped: malformed record", str(error))
            continue
        groups.add(str(image_id), row, [*box, score])
    return groups.file("xywh", "id")


def read_csv(path: Path, known: KnownImages | None, tally: Tally) -> RawFile:
    """Read a table with the columns image_id, x1, y1, x2, y2 (or x, y, width, height) and, if it has them, scores.

    The file is UTF-8, comma separated. The first line may name the columns, which then may stand in any order and among others;
    without it they are image_id, x1, y1, x2, y2[, score].
    """
    lines = [(number, values) for number, values in read_table(path) if values]
    if not lines:
        raise DataError(f"{path}: holds no lines; expected the columns image_id, x1, y1, x2, y2 and maybe score")
    columns, convention, headed = _columns(lines[0][1], path)
    groups = Groups("line", has_scores=len(columns) == 6)
    for number, values in lines[headed:]:
        _add_line(groups, values, number, columns, path, tally)
    return groups.file(convention, "either")


def _add_line(groups: Groups, line: list[str], number: int, columns: list[int], path: Path, tally: Tally) -> None:
    try:
        name, *texts = [line[column].strip() for column in columns]
        values = [float(text) for text in texts]
    except (IndexError, ValueError):
        name, values = "", []
    if not name:
        expected = f"an image id and {len(columns) - 1} numbers"
        tally.counts["boxes read"] += 1
        tally.bad("boxes skipped: malformed line", f"{path}: line {number}: expected {expected}, got {shorten(line)}")
        return
    groups.add(name, number, values)


def _columns(first: list[str], path: Path) -> tuple[list[int], str, bool]:
    """Where image id, four coordinates and maybe the score stand, their convention, and whether the line named them."""
    names = [name.strip().lower() for name in first]
    if "image_id" not in names:
        if len(names) not in (5, 6) or not all(map(_is_number, names[1:])):
            raise DataError(
                f"{path}: line 1: expected the names image_id, x1, y1, x2, y2 and maybe score, separated by commas, or an "
                f"image id followed by 4 or 5 numbers; got {shorten(first)}"
            )
        return list(range(len(names))), "xyxy", False
    convention, wanted = ("xywh", _SIDES) if set(_SIDES) <= set(names) else ("xyxy", _CORNERS)
    missing = [name for name in wanted if name not in names]
    if missing:
        raise DataError(
            f"{path}: line 1: the column {missing[0]!r} is missing; expected image_id, {', '.join(_CORNERS)} (or "
            f"{', '.join(_SIDES)}) and maybe score, got {shorten(first)}"
        )
    wanted = ("image_id", *wanted, *(["score"] if "score" in names else []))
    return [names.index(name) for name in wanted], convention, True


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True

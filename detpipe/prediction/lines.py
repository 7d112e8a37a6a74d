"""Predictions as JSON lines: written image by image so that a kill loses none, gone on with, and parts of several joined.

The first line says what was asked for (``part``, of how many ``images``, ``checkpoint``, ``class_names``, ``settings``); each other
line is an image: its place in the list of all images as ``index``, its ``file``, and what was found, or the ``reason`` why not.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass
from glob import escape
from pathlib import Path
from typing import Any, cast

from detpipe.pictures import glimpse_pictures
from detpipe.prediction.batches import WHOLE, Part
from detpipe.support.errors import DataError, UsageError
from detpipe.support.files import atomic_write, sole_writer
from detpipe.types import Detection, GlimpsedDetection

FORMAT = "detpipe predictions 1"
_BEGINNING = json.dumps({"format": FORMAT})[:-1].encode()  # of a file
KINDS = ("detections", "regions")  # of what is found in an image
_NAMED = 5  # images or parts that a message names


@dataclass(frozen=True)
class Plan:
    """What is asked for.

    Args:
        checkpoint: as the user named it.
        class_names: the name of label 1 first.
        images: how many there are in all parts.
        settings: by name, all that decides about the predictions, with a check sum of the names of the images.
    """

    checkpoint: str
    class_names: tuple[str, ...]
    images: int
    settings: dict[str, Any]

    def difference(self, other: Plan) -> str:
        """Say in what another plan differs; empty if in nothing."""
        if self.settings.get("list") != other.settings.get("list") or self.images != other.images:
            return f"the images are others ({other.images} then, {self.images} now)"
        mine, theirs = ({**one.settings, "class_names": list(one.class_names)} for one in (self, other))
        names = [name for name in {**mine, **theirs} if mine.get(name) != theirs.get(name)]
        return "; ".join(f"{name} was {theirs.get(name)!r}, is {mine.get(name)!r}" for name in names)


@dataclass(frozen=True)
class Tally:
    """What was written."""

    images: int
    found: int  # detections or regions
    failed: int
    limited: int  # images that have as many as a model gives at most


class LinesFile:
    """An open file of JSON lines, which no other process can open to write at the same time.

    Args:
        path: of the file.
        plan: what is asked for.
        part: which share of the images it has.
        rows: the places of these images.
        resume: whether to go on with a file that is there.

    Raises:
        UsageError: a file of a run that was stopped is there, and is not to be gone on with, or it is of another plan.
        DataError: another process writes it, or it is no such file.
    """

    def __init__(self, path: Path, plan: Plan, part: Part, rows: Sequence[int], resume: bool) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self.done: set[int] = set()
        busy = DataError(f"{path}: another process is writing it; wait for it, or give another -o")
        with ExitStack() as stack:
            stack.enter_context(sole_writer(path, busy))
            self._end = self._check(plan, part, len(rows), resume) if _is_begun(path) else 0
            # not buffered: what did not fit on a full disk would be written once more when the file is closed
            self._file = stack.enter_context(path.open("r+b" if self._end else "wb", buffering=0))
            self._file.seek(self._end)
            self._file.truncate()
            if not self._end:
                self._write({"format": FORMAT, "part": list(part), "part_images": len(rows), **asdict(plan)})
            self._stack = stack.pop_all()

    def _check(self, plan: Plan, part: Part, images: int, resume: bool) -> int:
        """Look at what is there, and say up to where it is kept."""
        try:
            found = read_lines(self.path)
        except DataError as error:
            raise DataError(f"{error}; or give another -o") from error
        if not resume:
            if len(found.places) == found.part_images:
                return 0
            raise UsageError(
                f"{self.path} has {len(found.places)} of {found.part_images} images of a run that was stopped: add --resume to "
                "go on, or delete it"
            )
        difference = plan.difference(found.plan)
        if difference or (found.part, found.part_images) != (part, images):
            difference = difference or f"part {found.part.number}/{found.part.of} is in it, not {part.number}/{part.of}"
            raise UsageError(
                f"{self.path}: --resume is for the same command, but {difference}; delete it to begin anew"
            )
        self.done = set(found.places)
        return found.end

    def __enter__(self) -> LinesFile:
        return self

    def __exit__(self, *_: Any) -> None:
        self._stack.close()

    def add(self, record: dict[str, Any]) -> None:
        """Append an image; it is on its way to the disk when this returns, and survives a kill.

        A record that does not fit on the disk is taken back, so that the file stays sound, and the OSError names it.
        """
        self._write(record)
        self.done.add(record["index"])

    def _write(self, record: dict[str, Any]) -> None:
        line = json.dumps(record, allow_nan=False).encode() + b"\n"
        left = memoryview(line)
        try:
            while left:
                left = left[self._file.write(left) :]
        except OSError as error:
            self._file.truncate(self._end)
            error.filename = str(self.path)
            raise
        self._end += len(line)


def _is_begun(path: Path) -> bool:
    """Whether a file is there, and has more in it than a first line that a kill cut short."""
    if not path.exists():
        return False
    with path.open("rb") as stream:
        line = stream.readline(1 << 24)
    return line.endswith(b"\n") or not (_BEGINNING.startswith(line) or line.startswith(_BEGINNING))


@dataclass(frozen=True)
class Lines:
    """What a file of JSON lines holds; the images are left on the disk."""

    path: Path
    plan: Plan
    part: Part
    part_images: int  # so many images are to be in it
    places: dict[int, tuple[int, int]]  # index -> first byte and length of its line
    end: int  # bytes of whole lines

    def record(self, index: int) -> dict[str, Any]:
        """Read an image; the file is open for that alone, since there may be more parts than files that can be open."""
        start, length = self.places[index]
        with self.path.open("rb") as stream:
            stream.seek(start)
            return json.loads(stream.read(length))


def read_lines(path: Path) -> Lines:
    """Read a file of JSON lines, of which a last one that a kill cut short is left out; a DataError if it is no such file."""
    with path.open("rb") as stream:
        try:
            head = json.loads(stream.readline(1 << 24))
            if head["format"] != FORMAT:
                raise ValueError(head["format"])
            plan = Plan(head["checkpoint"], tuple(head["class_names"]), head["images"], head["settings"])
            part, part_images = Part(*head["part"]), int(head["part_images"])
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(
                f"{path}: is no file of predictions: its first line does not say {FORMAT!r}; move it away"
            ) from error
        places: dict[int, tuple[int, int]] = {}
        end = stream.tell()
        for line in stream:
            if not line.endswith(b"\n"):
                break
            where = f"{path}: line {len(places) + 2}"
            try:
                index = int(json.loads(line)["index"])
            except (ValueError, KeyError, TypeError) as error:
                raise DataError(f"{where} is damaged; delete the file and predict anew") from error
            if index in places:
                raise DataError(f"{where} is image {index} once more; delete the file and predict anew")
            places[index] = (end, len(line))
            end += len(line)
    return Lines(path, plan, part, part_images, places, end)


def recorded(folder: Path, kind: str, field: str) -> set[Any]:
    """What lines in a folder's files of predictions, ``KIND*.jsonl``, have in a field; those that cannot be read have nothing."""
    found: set[Any] = set()
    for path in folder.glob(f"{escape(kind)}*.jsonl"):
        with path.open("rb") as stream:
            for line in stream:
                with suppress(ValueError, TypeError, KeyError):
                    found.add(json.loads(line)[field])
    return found


def describe(found: Detection, class_names: Sequence[str]) -> list[dict[str, Any]]:
    """What is found in an image as its record says it: ``label``, ``score`` and ``box`` of each, and where a head looked."""
    columns = zip(*(found[key].tolist() for key in ("labels", "scores", "boxes")), strict=True)
    rows: list[dict[str, Any]] = [
        {"label": class_names[label - 1], "score": score, "box": box} for label, score, box in columns
    ]
    if "glimpses" in found:
        rows = [row | glimpse_pictures.describe(cast(GlimpsedDetection, found), k) for k, row in enumerate(rows)]
    return rows


def part_name(kind: str, part: Part) -> str:
    """The name of the file of a part.

    Example:
        >>> part_name("detections", Part(3, 16))
        'detections.part-3-of-16.jsonl'
    """
    return f"{kind}.jsonl" if part == WHOLE else f"{kind}.part-{part.number}-of-{part.of}.jsonl"


def join(paths: Sequence[Path], output: Path, limit: int | None = None) -> Tally:
    """Write all images of one or more files of JSON lines as one JSON file, in their order.

    Args:
        paths: of the files, parts of one whole.
        output: the file to write.
        limit: how many detections a model gives at most.

    Returns:
        What was written.

    Raises:
        DataError: parts of different plans, a part that is missing, there twice, or not complete; each is named.
    """
    parts = sorted((read_lines(path) for path in paths), key=lambda one: one.part)
    owners = _owners(parts)
    plan, tally = parts[0].plan, Counter[str]()
    head = {"checkpoint": plan.checkpoint, "class_names": list(plan.class_names)}
    with atomic_write(output) as temporary, temporary.open("w", encoding="utf-8", newline="\n") as stream:
        stream.write(json.dumps(head)[:-1] + ', "images": [')
        failed: list[str] = []
        separator = "\n"
        for index in sorted(owners):
            record = owners[index].record(index)
            del record["index"]
            if "reason" in record:
                failed.append(json.dumps(record))
                continue
            stream.write(separator + json.dumps(record))
            separator = ",\n"
            [found] = (len(record[kind]) for kind in KINDS if kind in record)
            tally.update(images=1, found=found, limited=found == limit)
        stream.write('\n], "failed": [' + ",\n".join(["", *failed])[1:] + "\n]}\n")
    return Tally(tally["images"], tally["found"], len(failed), tally["limited"])


def _owners(parts: Sequence[Lines]) -> dict[int, Lines]:
    """Find which part has each image; what is not one whole is refused by name."""
    if not parts:
        raise DataError("there are no parts to merge; expected files such as detections.part-1-of-16.jsonl")
    first = parts[0]
    by_number: dict[int, Lines] = {}
    owners: dict[int, Lines] = {}
    for one in parts:
        difference = first.plan.difference(one.plan)
        if one.part.of != first.part.of:
            difference = f"it is one of {one.part.of} parts, not of {first.part.of}"
        if difference:
            raise DataError(f"{one.path} does not belong to {first.path}: {difference}")
        twin = by_number.setdefault(one.part.number, one)
        if twin is not one:
            raise DataError(f"part {one.part.number} of {one.part.of} is there twice: {twin.path} and {one.path}")
        if len(one.places) < one.part_images:
            raise DataError(
                f"{one.path} has {len(one.places)} of its {one.part_images} images; go on with the command that wrote it, and "
                "--resume"
            )
        for index in one.places:
            if owners.setdefault(index, one) is not one:
                raise DataError(
                    f"image {index} is in {owners[index].path} and in {one.path}; predict one of these parts anew"
                )
    missing = [str(number) for number in range(1, first.part.of + 1) if number not in by_number]
    if missing:
        more = f" and {len(missing) - _NAMED} more" if len(missing) > _NAMED else ""
        raise DataError(
            f"of {first.part.of} parts, {', '.join(missing[:_NAMED])}{more} {'is' if len(missing) == 1 else 'are'} missing in "
            f"{first.path.parent}; predict them with --part NUMBER/{first.part.of}"
        )
    return owners

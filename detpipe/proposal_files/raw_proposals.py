"""Proposals as other programs' files hold them, before they are checked and brought into the frame of a store."""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from detpipe.proposal_files.box_checks import Array, as_array, read_boxes, read_scores
from detpipe.proposal_files.known_images import KnownImages, Naming
from detpipe.support.errors import DataError

OnBad = Literal["error", "skip"]


class Tally:
    """Counts what was read and left out; ``on_bad`` "error" ends at the first fault, "skip" leaves boxes and images out."""

    def __init__(self, on_bad: OnBad) -> None:
        if on_bad not in ("error", "skip"):
            raise ValueError(f"on_bad must be 'error' or 'skip', got {on_bad!r}")
        self.on_bad = on_bad
        self.counts: Counter[str] = Counter()

    def bad(self, what: str, message: str, count: int = 1) -> None:
        """Count under ``what`` what cannot be used; under the policy "error" raise a DataError with the message about its first."""
        if self.on_bad == "error":
            raise DataError(f"{message} (--skip-bad leaves such boxes and images out and counts them)")
        self.counts[what] += count


@dataclass(frozen=True)
class RawImage:
    """The proposals of one image as a file gave them."""

    name: str  # what the file calls the image
    boxes: Array  # [P, 4] in the file's convention
    scores: Array | None  # [P]; None where the file has none: the order says which are best
    name_box: Callable[[int], str] = "box {}".format  # row of the boxes -> what messages call it


@dataclass(frozen=True)
class RawFile:
    """A file of proposals, open."""

    convention: str  # how it writes boxes, a key of `box_orders.CONVENTIONS`
    naming: Naming  # what its names of images are
    images: Iterable[RawImage]  # read while iterating
    total: int | None = None  # how many images there are, if that is known before


# Opens a file of one format. The images of the data set are needed where the file does not name them; the tally decides about
# entries that are no boxes. A DataError where the file cannot be read, or holds something else.
Reader = Callable[[Path, KnownImages | None, Tally], RawFile]


class Groups:
    """Collects boxes that come one by one, those of an image not necessarily together."""

    def __init__(self, row_name: str, has_scores: bool) -> None:
        self._row_name, self._has_scores = row_name, has_scores
        self._values: dict[str, array[float]] = {}
        self._rows: dict[str, array[int]] = {}

    def add(self, name: str, row: int, values: Sequence[float]) -> None:
        """Add one box of an image, with its score if there are scores, from a row of the file."""
        if name not in self._values:
            self._values[name], self._rows[name] = array("d"), array("q")
        self._values[name].extend(values)
        self._rows[name].append(row)

    def file(self, convention: str, naming: Naming) -> RawFile:
        """Hand out what was collected."""
        return RawFile(convention, naming, self._images(), len(self._values))

    def _images(self) -> Iterator[RawImage]:
        for name, values in self._values.items():
            table = np.array(values, dtype=np.float64).reshape(-1, 5 if self._has_scores else 4)
            rows = self._rows[name]
            yield RawImage(
                name,
                table[:, :4],
                table[:, 4] if self._has_scores else None,
                lambda box, rows=rows: f"{self._row_name} {rows[box]}",
            )


def split_columns(values: Any, where: str) -> tuple[Array, Array | None]:
    """Take ``[P, 4]`` boxes, or ``[P, 5]`` with scores, as ``[P, 4]`` and ``[P]`` or None; no elements are no boxes.

    A DataError, which starts with ``where``, for another shape, or no numbers.
    """
    try:
        table = as_array(values)
    except ValueError as error:
        raise DataError(f"{where}: expected boxes [P, 4] or [P, 5], got rows of unequal length") from error
    if table.size == 0:
        return np.zeros((0, 4)), None
    if table.ndim != 2 or table.shape[1] not in (4, 5):
        raise DataError(f"{where}: expected boxes [P, 4], or [P, 5] with scores, got shape {list(table.shape)}")
    boxes = read_boxes(table[:, :4], where)
    return boxes, read_scores(table[:, 4], len(boxes), where) if table.shape[1] == 5 else None


def by_order(count: int, known: KnownImages | None, path: Path) -> list[str]:
    """Name the entries of a file that has no names, by a list of as many images; a DataError where there is none."""
    if known is None:
        raise DataError(
            f"{path}: holds {count} lists of boxes in the order of some list of images and does not name them: "
            "give that list with --images ANNOTATIONS.json (or a text file with one id a line)"
        )
    if len(known.ids) != count:
        raise DataError(
            f"{path}: holds boxes of {count} images, but --images lists {len(known.ids)}: these files do not belong together"
        )
    return known.ids

"""Takes what is wrong with a data set: one message names all of it, or every skipped record is counted, or all is written down."""

from __future__ import annotations

import logging
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from detpipe.support.errors import DataError
from detpipe.types import PixelType

OnBad = Literal["error", "skip"]
SHOWN = 20  # faults that a message lists before it only gives the total
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Fault:
    """Something wrong with a data set."""

    kind: str  # what faults are counted by, such as "boxes: zero or negative size"
    message: str  # names the record, the field and the value
    serious: bool = True  # whether the data cannot be used like this; else it is only worth a look


@dataclass(eq=False)
class Faults:
    """The faults of one split.

    ``"error"`` raises at `check` if there was any fault; ``"skip"`` counts a faulty record by its reason, and raises only for what
    must never be skipped (`fatal`); ``"collect"`` raises nothing: all faults are in :attr:`found`.
    """

    policy: Literal["error", "skip", "collect"] = "error"
    pixels: PixelType | None = None  # what images are read as; None if any channels will do, at 8 bits
    allow_links: bool = False  # whether images may lie outside of the data set's folder, by links or by names in lists
    decode: bool = True  # whether every image is decoded while it is read, unless the first fault ends that anyway

    def __post_init__(self) -> None:
        if self.policy not in ("error", "skip", "collect"):
            raise ValueError(f"on_bad must be 'error' or 'skip', got {self.policy!r}")
        self.decodes = self.decode and self.policy != "error"
        self.source: str | Path = ""  # the annotation file or folder that messages name
        self.skipped: Counter[str] = Counter()  # "boxes skipped: zero or negative size" -> how many
        self.found: list[Fault] = []  # the faults that were collected
        self.messages: list[str] = []  # of the first faults since the last `check`, where none are collected
        self._fatal: list[str] = []
        self._alike: set[str] = set()
        self._total = 0

    @property
    def collects(self) -> bool:
        """Whether every fault is written down, and none is raised."""
        return self.policy == "collect"

    def box(self, reason: str, message: str, alike: str = "") -> None:
        """Note a box that cannot be used; of several with the same ``alike`` only the first is written out."""
        self._note("boxes", reason, message, alike)

    def image(self, reason: str, message: str) -> None:
        """Note an image that cannot be used."""
        self._note("images", reason, message, "")

    def boxes_of_skipped_image(self, count: int) -> None:
        """Count the boxes of an image that is left out."""
        self.skipped["boxes skipped: image skipped"] += count

    def fatal(self, reason: str, message: str) -> None:
        """Note a fault that ends loading under either policy."""
        if self.collects:
            self.found.append(Fault(f"data set: {reason}", message))
        else:
            self._fatal.append(message)

    def remark(self, kind: str, message: str) -> None:
        """Note what is no fault, but worth a look; it is only written down where faults are collected."""
        if self.collects:
            self.found.append(Fault(kind, message, serious=False))

    def check(self) -> None:
        """Raise a DataError of the first faults and their total, each with record, field and value, unless they may be skipped."""
        if self._fatal:
            raise DataError(summary(str(self.source), self._fatal, len(self._fatal), "correct the annotations"))
        if self.messages and self.policy == "error":
            advice = "correct them, or set on_bad to 'skip' to leave these records out and count them"
            raise DataError(summary(str(self.source), self.messages, self._total, advice))
        if self.messages:
            _log.info(summary(str(self.source), self.messages, self._total, "skipped and counted"))
            self.messages, self._total = [], 0

    def _note(self, what: str, reason: str, message: str, alike: str) -> None:
        self.skipped[f"{what} skipped: {reason}"] += 1
        if self.collects:
            self.found.append(Fault(f"{what}: {reason}", message))
            return
        self._total += 1
        if len(self.messages) < SHOWN and alike not in self._alike:
            self.messages.append(message)
        if alike:
            self._alike.add(alike)


def summary(source: str, messages: list[str], total: int, advice: str) -> str:
    """Put faults into one message: a single line for one kind, else the first of them and the total."""
    if len(messages) == 1:
        more = f" (and {total - 1} more like it)" if total > 1 else ""
        return f"{source}: {messages[0]}{more}; {advice}"
    head = f"{source}: {total} faults" + (", the first are" if total > len(messages[:SHOWN]) else "")
    return "\n".join([f"{head}:", *(f"  {line}" for line in messages[:SHOWN]), f"({total} in total) {advice}"])

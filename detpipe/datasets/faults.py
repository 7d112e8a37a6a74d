"""Collects what is wrong with a data set, so that one message names all of it, or every skipped record is counted."""

from __future__ import annotations

import logging
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from detpipe.support.errors import DataError
from detpipe.types import PixelType

OnBad = Literal["error", "skip"]
SHOWN = 20  # faults that a message lists before it only gives the total
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Fault:
    """Something wrong with a data set.

    Args:
        kind: what faults are counted by, such as "boxes: zero or negative size".
        message: names the record, the field and the value.
        serious: whether the data cannot be used like this; else it is only worth a look.
    """

    kind: str
    message: str
    serious: bool = True


@dataclass
class Collected:
    """The policy that raises nothing: every fault is written down, and reading goes on with what is left.

    Args:
        decode: whether every image is decoded, to find damaged ones and those of another size than annotated.
        faults: what was found.
    """

    decode: bool = True
    faults: list[Fault] = field(default_factory=list)


@dataclass(frozen=True)
class Skip:
    """The policy ``"skip"`` where it is known what images are read as: those that cannot be are left out too.

    Args:
        pixels: the channels and values of the images.
    """

    pixels: PixelType


Policy = OnBad | Skip | Collected


class Faults:
    """The faults of one annotation source.

    Args:
        source: the annotation file or folder that messages name.
        on_bad: ``"error"`` raises at `check` if there was any fault; ``"skip"`` counts a faulty record by its reason,
            and raises only for what must never be skipped (`fatal`), and so does a `Skip`; a `Collected` takes all faults, and
            nothing raises.
        allow_links: whether images may lie outside of the folder of the data set, by links or by names in lists.
    """

    def __init__(self, source: str | Path, on_bad: Policy, allow_links: bool = False) -> None:
        if not isinstance(on_bad, Skip | Collected) and on_bad not in ("error", "skip"):
            raise ValueError(f"on_bad must be 'error' or 'skip', got {on_bad!r}")
        self.source = source
        self.pixels = (
            on_bad.pixels if isinstance(on_bad, Skip) else None
        )  # what images are read as; None if any will do
        self.on_bad: OnBad | Collected = "skip" if isinstance(on_bad, Skip) else on_bad
        self.allow_links = allow_links
        self.skipped: Counter[str] = Counter()  # "boxes skipped: zero or negative size" -> how many
        self._messages: list[str] = []
        self._fatal: list[str] = []
        self._alike: set[str] = set()
        self._total = 0

    @property
    def collects(self) -> bool:
        """Whether every fault is written down, and none is raised."""
        return isinstance(self.on_bad, Collected)

    @property
    def decodes(self) -> bool:
        """Whether every image is to be decoded while the data set is read."""
        return self.on_bad.decode if isinstance(self.on_bad, Collected) else self.on_bad == "skip"

    def box(self, reason: str, message: str, alike: str = "") -> None:
        """Note a box that cannot be used; of several with the same ``alike`` only the first is written out."""
        self._note("boxes", reason, message, alike)

    def image(self, reason: str, message: str) -> None:
        """Note an image that cannot be used."""
        self._note("images", reason, message, "")

    def fatal(self, reason: str, message: str) -> None:
        """Note a fault that ends loading under either policy."""
        if isinstance(self.on_bad, Collected):
            self.on_bad.faults.append(Fault(f"data set: {reason}", message))
        else:
            self._fatal.append(message)

    def remark(self, kind: str, message: str) -> None:
        """Note what is no fault, but worth a look; it is only written down where faults are collected."""
        if isinstance(self.on_bad, Collected):
            self.on_bad.faults.append(Fault(kind, message, serious=False))

    def check(self) -> None:
        """Raise what was noted, unless it may be skipped.

        Raises:
            DataError: the first faults and their total, each with its record, field and value.
        """
        if self._fatal:
            raise DataError(summary(str(self.source), self._fatal, len(self._fatal), "correct the annotations"))
        if self._messages and self.on_bad == "error":
            advice = "correct them, or set on_bad to 'skip' to leave these records out and count them"
            raise DataError(summary(str(self.source), self._messages, self._total, advice))
        if self._messages:
            _log.info(summary(str(self.source), self._messages, self._total, "skipped and counted"))
            self._messages, self._total = [], 0

    def _note(self, what: str, reason: str, message: str, alike: str) -> None:
        self.skipped[f"{what} skipped: {reason}"] += 1
        if isinstance(self.on_bad, Collected):
            self.on_bad.faults.append(Fault(f"{what}: {reason}", message))
            return
        self._total += 1
        if len(self._messages) < SHOWN and alike not in self._alike:
            self._messages.append(message)
        if alike:
            self._alike.add(alike)


def summary(source: str, messages: list[str], total: int, advice: str) -> str:
    """Put faults into one message: a single line for one kind, else the first of them and the total."""
    if len(messages) == 1:
        more = f" (and {total - 1} more like it)" if total > 1 else ""
        return f"{source}: {messages[0]}{more}; {advice}"
    head = f"{source}: {total} faults" + (", the first are" if total > len(messages[:SHOWN]) else "")
    return "\n".join([f"{head}:", *(f"  {line}" for line in messages[:SHOWN]), f"({total} in total) {advice}"])

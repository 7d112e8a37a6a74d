"""Collects what is wrong with a data set, so that one message names all of it, or every skipped record is counted."""

from __future__ import annotations

import logging
from collections import Counter
from pathlib import Path
from typing import Literal

from detpipe.errors import DataError

OnBad = Literal["error", "skip"]
SHOWN = 20  # faults that a message lists before it only gives the total
_log = logging.getLogger(__name__)


class Faults:
    """The faults of one annotation source.

    Args:
        source: the annotation file or folder that messages name.
        on_bad: ``"error"`` raises at `check` if there was any fault; ``"skip"`` counts a faulty record by its reason,
            and raises only for what must never be skipped (`fatal`).
    """

    def __init__(self, source: str | Path, on_bad: OnBad) -> None:
        if on_bad not in ("error", "skip"):
            raise ValueError(f"on_bad must be 'error' or 'skip', got {on_bad!r}")
        self.source = source
        self.on_bad = on_bad
        self.skipped: Counter[str] = Counter()  # "boxes skipped: zero or negative size" -> how many
        self._messages: list[str] = []
        self._fatal: list[str] = []
        self._alike: set[str] = set()
        self._total = 0

    def box(self, reason: str, message: str, alike: str = "") -> None:
        """Note a box that cannot be used; of several with the same ``alike`` only the first is written out."""
        self._note("boxes skipped: " + reason, message, alike)

    def image(self, reason: str, message: str) -> None:
        """Note an image that cannot be used."""
        self._note("images skipped: " + reason, message, "")

    def fatal(self, message: str) -> None:
        """Note a fault that ends loading under either policy."""
        self._fatal.append(message)

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

    def _note(self, key: str, message: str, alike: str) -> None:
        self.skipped[key] += 1
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

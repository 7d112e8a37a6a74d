"""Numbers in settings: one that is no number, not finite, or outside its range is refused by the name of its argument."""

from __future__ import annotations

import math
from collections.abc import Callable
from numbers import Integral, Real
from typing import Any

RULES: dict[str, Callable[[Any], bool]] = {
    "must be finite": lambda _: True,
    "must be positive and finite": lambda value: value > 0,
    "must not be negative or infinite": lambda value: value >= 0,
    "must be in 0..1": lambda value: 0 <= value <= 1,
    "must be in 0..1, below 1": lambda value: 0 <= value < 1,
    "must be in 0..1, above 0": lambda value: 0 < value <= 1,
}


def check_numbers(rule: str, where: str = "", **numbers: object) -> None:
    """Refuse numbers that are not finite, or break one of `RULES`.

    Args:
        rule: what they must be.
        where: what stands before the name of an argument in a message, such as ``"optimizer."``.
        numbers: by the name of the argument; of a list or tuple all entries, None passes.

    Raises:
        ValueError: there is one, or something else than a number.

    Example:
        >>> check_numbers("must be in 0..1", dropout=1.5)
        Traceback (most recent call last):
        ValueError: dropout must be in 0..1, got 1.5
    """
    keeps = RULES[rule]
    _check(rule, where, numbers, lambda value: isinstance(value, Real) and math.isfinite(value) and keeps(value))


def check_whole(least: int = 1, where: str = "", **numbers: object) -> None:
    """Refuse what is not a whole number of at least ``least``; other arguments and errors as of `check_numbers`."""
    _check("must be a whole number", where, numbers, lambda value: isinstance(value, Integral))
    _check(f"must be at least {least}", where, numbers, lambda value: value >= least)


def _check(rule: str, where: str, numbers: dict[str, object], is_good: Callable[[Any], bool]) -> None:
    for name, given in numbers.items():
        values = given if isinstance(given, list | tuple) else [] if given is None else [given]
        if any(isinstance(value, bool) or not is_good(value) for value in values):
            raise ValueError(f"{where}{name} {rule}, got {given!r}")

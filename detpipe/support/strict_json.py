"""Read JSON that other programs wrote, and name the file, the record and the field of whatever is wrong with it.

Python's reader accepts ``NaN`` and ``Infinity``, keeps the last of two equal keys, and leaves it to the caller to find
out that a field is missing or of another type. Here each of these is a :class:`~detpipe.support.errors.DataError` of one line.
The module imports nothing heavy, so that dataset loaders, proposal files and evaluation can all stand on it.
"""

from __future__ import annotations

import gc
import json
import math
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn, TypeVar

from detpipe.support.errors import DataError
from detpipe.support.files import refuse_special

T = TypeVar("T")

_STRING_OR_CONSTANT = re.compile(r'"(?:[^"\\]|\\.)*"|(-?Infinity|NaN)')
_KIND_NAMES = {int: "a whole number", float: "a finite number", str: "text", list: "a list", dict: "an object"}


class _RefusedConstantError(Exception):
    """The file holds NaN or an infinity."""


class _DuplicateKeyError(Exception):
    """An object of the file has the same key twice; the message says which."""


def load_json(path: str | os.PathLike[str]) -> Any:
    """Parse a UTF-8 JSON file strictly: no NaN or infinity, no key twice in one object.

    Raises:
        DataError: the file cannot be read, is not UTF-8, is cut off or malformed (with line and column), holds a number
            that is not finite, or has a key twice in one object.
    """
    return parse_json(read_text(path, "JSON file"), path)


def parse_json(text: str, path: str | os.PathLike[str]) -> Any:
    """Parse JSON that has been read already from ``path``, as strictly as :func:`load_json`."""
    try:
        with paused_collection():
            return json.loads(text, object_pairs_hook=_unique_keys, parse_constant=_refuse_constant)
    except json.JSONDecodeError as error:
        raise DataError(
            f"{path}: line {error.lineno} column {error.colno}: not valid JSON ({error.msg}); "
            "the file is damaged or cut off: copy or write it again"
        ) from error
    except _RefusedConstantError as error:
        line, column = _locate_constant(text)
        raise DataError(
            f"{path}: line {line} column {column}: {error} is not a number in JSON: write a finite number"
        ) from error
    except _DuplicateKeyError as error:
        raise DataError(f"{path}: {error}: keep one of the two") from error
    except RecursionError as error:
        raise DataError(f"{path}: nested too deeply to be a data file") from error
    except ValueError as error:  # a whole number of thousands of digits
        raise DataError(f"{path}: {error}") from error


@contextmanager
def paused_collection() -> Iterator[None]:
    """Keep Python's collector of cycles from walking, again and again, through objects that are being made by the million.

    What a parser makes has no cycles. Half of the time that Python's JSON reader takes for a large file is this collector's.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def require(record: Any, field: str, kind: type[T], where: str) -> T:
    """Return ``record[field]`` if it is there and of the kind asked for; ``where`` starts the message.

    A kind is ``int`` (of 64 bits; a bool is none), ``float`` (any finite number, returned as float), ``str``, ``list`` or ``dict``.

    Raises:
        DataError: the record is not an object, or the field is missing, of another kind, or not finite.

    Example:
        >>> require({"id": 7, "score": 1}, "score", float, "dets.json: record 0")
        1.0
    """
    if not isinstance(record, dict):
        raise DataError(f"{where}: expected an object with the field {field!r}, got {shorten(record)}")
    if field not in record:
        raise DataError(f"{where}: the field {field!r} is missing: expected {_KIND_NAMES.get(kind, kind.__name__)}")
    value = record[field]
    if kind is float and is_number(value):
        return float(value)  # type: ignore[return-value]
    too_long = type(value) is int and not -(2**63) <= value < 2**63
    if kind is float or type(value) is not kind or too_long:
        _refuse(field, value, _KIND_NAMES.get(kind, kind.__name__), where)
    return value


def require_numbers(record: Any, field: str, count: int, where: str) -> list[float]:
    """Return ``record[field]`` if it is a list of exactly ``count`` finite numbers; ``where`` starts the message of a DataError."""
    values = require(record, field, list, where)
    if len(values) != count or not all(map(is_number, values)):
        _refuse(field, values, f"{count} finite numbers", where)
    return [float(v) for v in values]


def shorten(value: Any, limit: int = 60) -> str:
    """Return ``repr(value)``, cut to ``limit`` characters, for a message of one line."""
    text = repr(value)
    return text if len(text) <= limit else text[: limit - 3] + "..."


def read_text(path: str | os.PathLike[str], what: str, newline: str | None = None) -> str:
    """Read a UTF-8 file, with or without a byte order mark; a DataError says that it is no ``what``, such as "JSON file"."""
    refuse_special(path)
    try:
        with open(path, encoding="utf-8-sig", newline=newline) as stream:
            return stream.read()
    except FileNotFoundError as error:
        raise DataError(f"{path}: no such file: check the path") from error
    except IsADirectoryError as error:
        raise DataError(f"{path}: is a folder: name the {what} in it") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: byte {error.start} is not UTF-8 text: this is not a {what}") from error


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    record = dict(pairs)
    if len(record) == len(pairs):
        return record
    seen: set[str] = set()
    for key, value in pairs:
        if key in seen:
            owner = f" of the object with id {shorten(record['id'])}" if "id" in record and key != "id" else ""
            raise _DuplicateKeyError(f"the key {key!r}{owner} is written twice, the second time as {shorten(value)}")
        seen.add(key)
    raise AssertionError("fewer keys than pairs, yet none twice")


def _refuse_constant(name: str) -> NoReturn:
    raise _RefusedConstantError(name)


def _locate_constant(text: str) -> tuple[int, int]:
    """Return line and column, from 1, of the first NaN or infinity that is not inside a string."""
    start = next(match.start() for match in _STRING_OR_CONSTANT.finditer(text) if match.group(1))
    return text.count("\n", 0, start) + 1, start - text.rfind("\n", 0, start)


def is_number(value: Any) -> bool:
    """Whether a value is a finite number that a float can hold; a bool is none."""
    try:
        return type(value) in (int, float) and math.isfinite(value)
    except OverflowError:  # a whole number beyond the range of floats
        return False


def _refuse(field: str, value: Any, expected: str, where: str) -> NoReturn:
    raise DataError(f"{where}: the field {field!r} is {shorten(value)}: expected {expected}")

"""Read pickles of strangers: numpy arrays, numbers, text and plain containers, and nothing else.

A pickle is a program: it names functions, and reading it calls them. Here no name that it holds is ever looked up. The
few that numpy and the containers need stand for functions of this module, and any other name ends the reading before
anything was called. Not even numpy's own functions are called by the pickle, since they trust what they are given:
arrays are built from type, shape and bytes, each checked.
"""

from __future__ import annotations

import mmap
import pickle
from collections.abc import Callable
from math import prod
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from detpipe.support.errors import DataError
from detpipe.support.files import refuse_special
from detpipe.support.untrusted import check_pickle, check_tree, plain_parts

_CALLS = 2**20  # bytes, and twice those of the file, that calls in it may make: each may copy what is there once
_EACH = 200_000  # objects in any pickle, counted as often as they are reached, and one more for each byte of it
_LATIN1 = ("latin1", "latin-1", "iso-8859-1")

_HINTS = {
    "torch": "save tensors as numpy arrays (tensor.numpy()) and write the file again",
    "mmengine": "save {path: dict(bboxes=p.bboxes, scores=p.scores)} in place of InstanceData and write the file again",
    "mmdet": "save plain dicts of numpy arrays and write the file again",
    "detectron2": "save boxes as numpy arrays and bbox_mode as a number, and write the file again",
}


class _RefusedError(Exception):
    """The pickle names something that is not admitted."""


class _Built:
    """What a pickle builds in two steps, a call and a state, and what is made of both once all is read."""

    __slots__ = ("given", "made", "make", "state")

    def __init__(self, make: Callable[[_Built], Any], *given: Any, state: Any = None) -> None:
        self.make, self.given, self.state, self.made = make, given, state, None

    def __setstate__(self, state: Any) -> None:
        self.state = state


def _type(built: _Built) -> np.dtype[Any]:
    """Of an array: a kind and a number of bytes, such as ``f4``, and the order of the bytes."""
    code = built.given[0] if built.given else ""
    if not isinstance(code, str) or code[:1] not in ("f", "i", "u", "b", "U", "S", "O") or len(code) > 8:
        raise _RefusedError(f"an array of the type {code!r}")
    _, order, subtype, fields, *_ = built.state or (3, "=", None, None)
    if subtype is not None or fields is not None or order not in ("<", ">", "|", "="):
        raise _RefusedError("an array of a structured type")
    return np.dtype(code).newbyteorder(order)


def _array(built: _Built) -> Any:
    """An array of numbers or text; a list for one of objects."""
    if built.state is None:
        raise ValueError("an array without content")
    _, shape, kind, fortran, content = built.state
    sides = (shape,) if isinstance(shape, int) else shape
    if not (isinstance(kind, _Built) and kind.make is _type and isinstance(sides, tuple | list)):
        raise ValueError("an array without type or shape")
    if not all(type(side) is int and side >= 0 for side in sides) or len(sides) > 8:
        raise ValueError(f"an array of shape {sides!r}")
    dtype = _type(kind)
    if dtype.hasobject:
        if not isinstance(content, list) or len(sides) != 1 or len(content) != sides[0]:
            raise ValueError(f"an array of objects of shape {tuple(sides)}, expected a list of them")
        return _resolve(content)
    content = content.encode("latin1") if isinstance(content, str) else content
    size = dtype.itemsize * prod(sides)
    if not isinstance(content, bytes | bytearray) or not dtype.itemsize or len(content) != size:
        raise ValueError(f"an array of shape {tuple(sides)} without its {size} bytes")
    return np.frombuffer(content, dtype).reshape(sides, order="F" if fortran else "C").copy()


def _scalar(built: _Built) -> Any:
    """One number of numpy's."""
    return _array(built)[()]


def _encode(text: Any, encoding: Any = "latin1", *_: Any) -> bytes:
    """How old pickles hold bytes."""
    if not isinstance(text, str) or encoding not in _LATIN1:
        raise _RefusedError(f"text in the encoding {encoding!r}")
    return text.encode("latin1")


def _bytearray(content: Any = b"", *encoding: Any) -> bytearray:
    if isinstance(content, int):
        raise _RefusedError(f"a call of bytearray({content})")
    return bytearray(content, *encoding)


def _ndarray(*_: Any) -> NoReturn:
    raise _RefusedError("a call of numpy.ndarray")


_ADMITTED: dict[tuple[str, str], Callable[..., Any]] = {
    ("numpy", "ndarray"): _ndarray,
    ("numpy", "dtype"): lambda *given: _Built(_type, *given),
    ("_codecs", "encode"): _encode,
    ("collections", "OrderedDict"): dict,
}
for _core in ("numpy.core", "numpy._core"):
    _ADMITTED |= {
        (f"{_core}.multiarray", "_reconstruct"): lambda *_: _Built(_array),
        (f"{_core}.multiarray", "scalar"): lambda kind, content: _Built(_scalar, state=(1, (), kind, False, content)),
        (f"{_core}.numeric", "_frombuffer"): lambda content, kind, shape, order="C", *_: _Built(
            _array, state=(1, shape, kind, order == "F", content)
        ),
    }
for _module in ("builtins", "__builtin__"):
    _ADMITTED |= {(_module, kind.__name__): kind for kind in (set, frozenset, list, tuple, dict, complex)}
    _ADMITTED |= {(_module, "bytearray"): _bytearray, (_module, "bytes"): lambda: b""}  # old pickles of no bytes


class _Reader(pickle.Unpickler):
    _left: int  # bytes that calls may still make

    def find_class(self, module: str, name: str) -> Any:
        build = _ADMITTED.get((module, name))
        if build is None:
            raise _RefusedError(f"{module}.{name}")

        def limited(*arguments: Any) -> Any:  # a new one each time: what the pickle changes of it is seen by no other
            made = build(*arguments)
            size = len(made) if hasattr(made, "__len__") else 0
            self._left -= size if isinstance(made, bytes | bytearray) else 8 * size
            if self._left < 0:
                raise ValueError("it makes copies of copies")
            return made

        return limited

    def read(self, size: int) -> Any:
        """Load, with limits for a file of this size."""
        self._left = _CALLS + 2 * size
        content = self.load()
        check_tree(content, _EACH + size, lambda item: [item.state] if isinstance(item, _Built) else plain_parts(item))
        return _resolve(content)

    def persistent_load(self, pid: Any) -> NoReturn:
        raise _RefusedError(f"a reference to something outside, {pid!r}")


def load_plain_pickle(path: str | Path) -> Any:
    """Read a pickle of numpy arrays and plain containers.

    Args:
        path: the file, of any pickle protocol, of Python 2 as well.

    Returns:
        What it holds: dicts, lists, tuples, sets, text, bytes, numbers, None and arrays of numbers or text; an array of
        objects becomes a list.

    Raises:
        DataError: the file is missing, cut off or damaged, or holds anything else: that is named, and nothing of it
            was run; or it would take far more memory than its size.
    """
    refuse_special(path)
    try:
        with Path(path).open("rb") as file:
            size = Path(path).stat().st_size
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
                check_pickle(content, size)
            return _Reader(file, encoding="latin1").read(size)
    except FileNotFoundError as error:
        raise DataError(f"{path}: no such file: check the path") from error
    except _RefusedError as error:
        package = str(error).partition(".")[0]
        raise DataError(
            f"{path}: refused, since this pickle holds {error}; only numpy arrays, numbers, text and plain containers are "
            f"read from pickles, because anything else could run code: {_HINTS.get(package, 'do not trust this file')}"
        ) from error
    except Exception as error:  # damaged bytes may fail in any of the reader's steps
        reason = " ".join(str(error).split()) or "no reason given"
        raise DataError(
            f"{path}: not a readable pickle ({type(error).__name__}: {reason}); cut off or damaged?"
        ) from error


def _resolve(value: Any) -> Any:
    """Make what was built; what is there several times is made once."""
    if isinstance(value, _Built) and value.make is not _type:
        if value.made is None:
            value.made = value.make(value)
        return value.made
    if isinstance(value, dict):
        return {_resolve(key): _resolve(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return type(value)(_resolve(item) for item in value)
    if callable(value) or isinstance(value, _Built):
        raise _RefusedError("a type or function in the place of a value")
    return value

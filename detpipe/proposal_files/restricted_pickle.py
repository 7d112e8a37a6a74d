"""Read pickles of strangers: numpy arrays, numbers, text and plain containers, and nothing else.

A pickle is a program: it names functions, and reading it calls them. Here no name that it holds is ever looked up. The
few that numpy and the containers need stand for functions of this module, and any other name ends the reading before
anything was called. Since numpy's own functions trust what they are given, they get types, shapes and bytes that were checked.
"""

from __future__ import annotations

import mmap
import pickle
from collections.abc import Callable, Iterable
from math import prod
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

import numpy as np

from detpipe.support.errors import DataError
from detpipe.support.files import refuse_special
from detpipe.support.untrusted import check_pickle, check_tree, plain_parts

_CALLS = 2**20  # bytes, and twice those of the file, that calls in it may make: each may copy what is there once
_EACH = 200_000  # objects in any pickle, counted as often as they are reached, and one more for each byte of it
_CONTENT, _CONTENT_RATIO = (
    2**24,
    16,
)  # bytes of text and arrays, counted likewise, in any pickle and for each byte of it

_HINTS = {
    "torch": "save tensors as numpy arrays (tensor.numpy()) and write the file again",
    "mmengine": "save {path: dict(bboxes=p.bboxes, scores=p.scores)} in place of InstanceData and write the file again",
    "mmdet": "save plain dicts of numpy arrays and write the file again",
    "detectron2": "save boxes as numpy arrays and bbox_mode as a number, and write the file again",
}


class _RefusedError(Exception):
    """The pickle names something that is not admitted."""


class _Type:
    """The type of an array: a kind and a number of bytes, such as ``f4``; the order of the bytes follows as its state."""

    def __init__(self, code: Any = "", *_: Any) -> None:
        if not isinstance(code, str) or code[:1] not in ("f", "i", "u", "b", "U", "S", "O") or len(code) > 8:
            raise _RefusedError(f"an array of the type {code!r}")
        self.dtype = np.dtype(code)

    def __setstate__(self, state: Any) -> None:
        _, order, subtype, fields, *_ = state
        if subtype is not None or fields is not None or order not in ("<", ">", "|", "="):
            raise _RefusedError("an array of a structured type")
        self.dtype = self.dtype.newbyteorder(order)


class _Array(np.ndarray[Any, Any]):
    """An array without elements until its state arrives, which its reader pays for."""

    pay: Callable[[Any], None]

    def __setstate__(self, state: Any) -> None:
        _, shape, kind, fortran, content = state
        sides, dtype, content = _checked(shape, kind, content)
        self.__dict__.pop("pay")(content)  # so that there is no second one
        super().__setstate__((1, sides, dtype, bool(fortran), content))  # pyright: ignore[reportArgumentType]


def _checked(shape: Any, kind: Any, content: Any) -> tuple[tuple[int, ...], np.dtype[Any], Any]:
    """Shape, type, and bytes or list of an array, as numpy may be given them."""
    sides = (shape,) if isinstance(shape, int) else shape
    if not isinstance(kind, _Type) or not isinstance(sides, tuple | list):
        raise ValueError("an array without type or shape")
    if not all(type(side) is int and side >= 0 for side in sides) or len(sides) > 8:
        raise ValueError(f"an array of shape {sides!r}")
    if kind.dtype.hasobject:
        if not isinstance(content, list) or len(sides) != 1 or len(content) != sides[0]:
            raise ValueError(f"an array of objects of shape {tuple(sides)}, expected a list of them")
        return tuple(sides), kind.dtype, content
    content = content.encode("latin1") if isinstance(content, str) else content
    size = kind.dtype.itemsize * prod(sides)
    if not isinstance(content, bytes | bytearray) or not kind.dtype.itemsize or len(content) != size:
        raise ValueError(f"an array of shape {tuple(sides)} without its {size} bytes")
    return tuple(sides), kind.dtype, bytes(content)


def _from_buffer(content: Any, kind: Any, shape: Any, order: Any = "C", *_: Any) -> Any:
    sides, dtype, content = _checked(shape, kind, content)
    if dtype.hasobject:
        raise ValueError("an array of objects in the place of bytes")
    return np.frombuffer(content, dtype).reshape(sides, order="F" if order == "F" else "C").copy()


def _encode(text: Any, encoding: Any = "latin1", *_: Any) -> bytes:
    """How old pickles hold bytes."""
    if not isinstance(text, str) or encoding not in ("latin1", "latin-1", "iso-8859-1"):
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
    ("numpy", "dtype"): _Type,
    ("_codecs", "encode"): _encode,
    ("collections", "OrderedDict"): dict,
}
for _core in ("numpy.core", "numpy._core"):
    _ADMITTED |= {
        (f"{_core}.multiarray", "_reconstruct"): lambda *_: _Array(0, np.uint8),
        (f"{_core}.multiarray", "scalar"): lambda kind, content: _from_buffer(content, kind, ())[()],
        (f"{_core}.numeric", "_frombuffer"): _from_buffer,
    }
for _module in ("builtins", "__builtin__"):
    _ADMITTED |= {(_module, kind.__name__): kind for kind in (set, frozenset, list, tuple, dict, complex)}
    _ADMITTED |= {(_module, "bytearray"): _bytearray, (_module, "bytes"): lambda: b""}  # old pickles of no bytes


class _Reader(pickle.Unpickler):
    """Reads a file of some size, with limits for that size."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        super().__init__(file, encoding="latin1")
        self._left = _CALLS + 2 * size  # bytes that calls may still make

    def find_class(self, module: str, name: str) -> Any:
        build = _ADMITTED.get((module, name))
        if build is None:
            raise _RefusedError(f"{module}.{name}")

        def limited(*arguments: Any) -> Any:  # a new one each time: what the pickle changes of it is seen by no other
            made = build(*arguments)
            if isinstance(made, _Array):
                made.pay = self._pay
            else:
                self._pay(made)
            return made

        return limited

    def _pay(self, made: Any) -> None:
        size = len(made) if hasattr(made, "__len__") else 0
        self._left -= size if isinstance(made, bytes | bytearray) else getattr(made, "nbytes", 8 * size)
        if self._left < 0:
            raise ValueError("it makes copies of copies")

    def persistent_load(self, pid: Any) -> NoReturn:
        raise _RefusedError(f"a reference to something outside, {pid!r}")


def load_plain_pickle(path: str | Path) -> Any:
    """Read a pickle of any protocol, of Python 2 as well: numpy arrays and plain containers of numbers, text and bytes.

    A DataError if it is missing, cut off or damaged, or holds anything else: that is named, and nothing of it was run; or if it
    would take far more memory than its size.
    """
    refuse_special(path)
    try:
        with Path(path).open("rb") as file:
            size = Path(path).stat().st_size
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
                check_pickle(content, size)
            read = _Reader(file, size).load()
            check_tree(read, _EACH + size, _limited_parts(_CONTENT + _CONTENT_RATIO * size))
            return read
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


def _limited_parts(most: int) -> Callable[[Any], Iterable[Any]]:
    """Make what tells the parts of values, until their text and arrays have more than so many bytes."""
    left = most

    def parts(value: Any) -> Iterable[Any]:
        nonlocal left
        if callable(value) or isinstance(value, _Type):
            raise _RefusedError("a type or function in the place of a value")
        left -= len(value) if isinstance(value, str | bytes | bytearray) else getattr(value, "nbytes", 0)
        if left < 0:
            raise ValueError(f"its text and arrays, shared ones counted each time, have more than {most} bytes")
        return value.tolist() if isinstance(value, np.ndarray) and value.dtype.hasobject else plain_parts(value)

    return parts

"""Read pickles of strangers: numpy arrays, numbers, text and plain containers, and nothing else.

A pickle is a program: it names functions, and reading it calls them. Here no name that it holds is ever looked up. The
few that numpy and the containers need stand for objects of this module, and any other name ends the reading before
anything was called. Not even numpy's own functions are called by the pickle, since they trust what they are given:
arrays are built from type, shape and bytes, each checked.
"""

from __future__ import annotations

import mmap
import pickle
from collections.abc import Callable, Iterable
from math import prod
from pathlib import Path
from typing import Any, Literal, NoReturn

import numpy as np

from detpipe.support.errors import DataError
from detpipe.support.files import refuse_special
from detpipe.support.untrusted import check_pickle, check_tree, plain_parts

_CALLS = 2**20  # bytes, and twice those of the file, that calls in it may make: each may copy what is there once
_EACH = 200_000  # objects in any pickle, counted as often as they are reached, and one more for each byte of it

_HINTS = {
    "torch": "save tensors as numpy arrays (tensor.numpy()) and write the file again",
    "mmengine": "save {path: dict(bboxes=p.bboxes, scores=p.scores)} in place of InstanceData and write the file again",
    "mmdet": "save plain dicts of numpy arrays and write the file again",
    "detectron2": "save boxes as numpy arrays and bbox_mode as a number, and write the file again",
}


class _RefusedError(Exception):
    """The pickle names something that is not admitted."""


class _Name:
    """What an admitted name stands for; the pickle can call it, and change nothing about it."""

    __slots__ = ("_build",)

    def __init__(self, build: Callable[..., Any]) -> None:
        object.__setattr__(self, "_build", build)

    def __call__(self, *arguments: Any) -> Any:
        return self._build(*arguments)

    def __setattr__(self, name: str, value: Any) -> NoReturn:
        raise _RefusedError("a change of a function")

    def __setstate__(self, state: Any) -> NoReturn:
        raise _RefusedError("a change of a function")


class _Type:
    """The type of an array, as the pickle builds it: a kind and a number of bytes, then the order of the bytes."""

    __slots__ = ("code", "order")

    def __init__(self, code: Any = "", *_: Any) -> None:
        if not isinstance(code, str) or code[:1] not in ("f", "i", "u", "b", "U", "S", "O") or len(code) > 8:
            raise _RefusedError(f"an array of the type {code!r}")
        self.code: str = code
        self.order: Literal["<", ">", "|", "="] = "="

    def __setstate__(self, state: Any) -> None:
        _, order, subtype, fields, *_ = state
        if subtype is not None or fields is not None or order not in ("<", ">", "|", "="):
            raise _RefusedError("an array of a structured type")
        self.order = order

    def resolve(self) -> np.dtype[Any]:
        return np.dtype(self.code).newbyteorder(self.order)


class _Array:
    """An array, as the pickle builds it: first empty, then with its state."""

    __slots__ = ("_content", "_fortran", "_made", "_shape", "_type")

    def __init__(self) -> None:
        self._content: Any = b""
        self._made: Any = None
        self._type: Any = None
        self._shape: tuple[int, ...] = ()
        self._fortran = False

    def __setstate__(self, state: Any) -> None:
        _, shape, kind, fortran, content = state
        self.set(shape, kind, bool(fortran), content)

    def set(self, shape: Any, kind: Any, fortran: bool, content: Any) -> _Array:
        sides = (shape,) if isinstance(shape, int) else shape
        if not isinstance(kind, _Type) or not isinstance(sides, tuple | list):
            raise ValueError("an array without type or shape")
        if not all(type(side) is int and side >= 0 for side in sides) or len(sides) > 8:
            raise ValueError(f"an array of shape {sides!r}")
        self._type, self._shape, self._fortran, self._content = kind, tuple(sides), fortran, content
        return self

    def parts(self) -> Iterable[Any]:
        """What an array of objects holds."""
        return self._content if isinstance(self._content, list) else ()

    def resolve(self, nested: Callable[[Any], Any]) -> Any:
        """The array, the same each time."""
        if self._made is None:
            self._made = self._make(nested)
        return self._made

    def _make(self, nested: Callable[[Any], Any]) -> Any:
        if self._type is None:
            raise ValueError("an array without content")
        if self._type.code.startswith("O"):
            if not isinstance(self._content, list) or len(self._shape) != 1 or len(self._content) != self._shape[0]:
                raise ValueError(f"an array of objects of shape {self._shape}, expected a list of them")
            return nested(self._content)
        content = self._content.encode("latin1") if isinstance(self._content, str) else self._content
        kind = self._type.resolve()
        if (
            not isinstance(content, bytes | bytearray)
            or not kind.itemsize
            or len(content) != kind.itemsize * prod(self._shape)
        ):
            raise ValueError(f"an array of shape {self._shape} without its {kind.itemsize * prod(self._shape)} bytes")
        flat = np.frombuffer(content, dtype=kind)
        return flat.reshape(self._shape, order="F" if self._fortran else "C").copy()


class _Scalar(_Array):
    """One number of numpy's."""

    __slots__ = ()

    def _make(self, nested: Callable[[Any], Any]) -> Any:
        return super()._make(nested)[()]


def _encode(text: Any, encoding: Any = "latin1", *_: Any) -> bytes:
    """How old pickles hold bytes."""
    if not isinstance(text, str) or encoding not in ("latin1", "latin-1", "iso-8859-1"):
        raise _RefusedError(f"text in the encoding {encoding!r}")
    return text.encode("latin1")


def _from_buffer(content: Any, kind: Any, shape: Any, order: Any = "C", *_: Any) -> _Array:
    return _Array().set(shape, kind, order == "F", content)


def _bytearray(content: Any = b"", *encoding: Any) -> bytearray:
    if isinstance(content, int):
        raise _RefusedError(f"a call of bytearray({content})")
    return bytearray(content, *encoding)


def _no_call(*_: Any) -> NoReturn:
    raise _RefusedError("a call of numpy.ndarray")


_NUMPY = {
    "_reconstruct": _Name(lambda *_: _Array()),
    "scalar": _Name(lambda kind, content: _Scalar().set((), kind, False, content)),
}
_ADMITTED = {
    ("numpy", "ndarray"): _Name(_no_call),
    ("numpy", "dtype"): _Name(_Type),
    ("_codecs", "encode"): _Name(_encode),
    ("collections", "OrderedDict"): _Name(lambda *pairs: dict(*pairs)),
    **{(f"numpy.{core}.multiarray", name): value for core in ("core", "_core") for name, value in _NUMPY.items()},
    **{(f"numpy.{core}.numeric", "_frombuffer"): _Name(_from_buffer) for core in ("core", "_core")},
    **{
        (module, kind.__name__): _Name(kind)
        for module in ("builtins", "__builtin__")
        for kind in (set, frozenset, list, tuple, dict, complex)
    },
    **{(module, "bytearray"): _Name(_bytearray) for module in ("builtins", "__builtin__")},
    **{
        (module, "bytes"): _Name(lambda: b"") for module in ("builtins", "__builtin__")
    },  # how old pickles hold no bytes
}


class _Reader(pickle.Unpickler):
    _left: int  # bytes that calls may still make

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ADMITTED:
            raise _RefusedError(f"{module}.{name}")
        build = _ADMITTED[module, name]

        def limited(*arguments: Any) -> Any:
            made = build(*arguments)
            self._left -= (1 if isinstance(made, bytes | bytearray) else 8) * (
                len(made) if hasattr(made, "__len__") else 0
            )
            if self._left < 0:
                raise ValueError("it makes copies of copies")
            return made

        return _Name(limited)

    def read(self, size: int) -> Any:
        """Load, with limits for a file of this size."""
        self._left = _CALLS + 2 * size
        content = self.load()
        check_tree(content, _EACH + size, lambda item: item.parts() if isinstance(item, _Array) else plain_parts(item))
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
    """Replace what stands for arrays and types by the arrays."""
    if isinstance(value, _Array):
        return value.resolve(_resolve)
    if isinstance(value, dict):
        return {_resolve(key): _resolve(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_resolve(item) for item in value)
    if isinstance(value, set | frozenset):
        return type(value)(_resolve(item) for item in value)
    if isinstance(value, _Type | _Name):
        raise _RefusedError("a type or function in the place of a value")
    return value

"""Data workers map the packed arrays of a data set instead of copying them, however they are started.

A forked worker shares the memory of its parent. One that is spawned (macOS, Windows) or comes from a fork server (Linux from Python
3.14 on) is sent its data set: large arrays are put into shared memory once, and each worker is told where they are.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import fields
from multiprocessing.reduction import ForkingPickler
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

_LEAST = 2**16  # bytes: smaller arrays are sent as they are

_shared: dict[int, tuple[weakref.ref[Any], Tensor]] = {}  # by the id of an array that is alive


class _Mapped(NamedTuple):
    """A large array on its way."""

    content: Tensor  # [bytes] uint8 in shared memory
    dtype: np.dtype[Any]
    shape: tuple[int, ...]


def share_with_workers(*kinds: type) -> None:
    """Let processes that are started share the arrays of dataclasses; other ways to pickle them stay as they are.

    Args:
        kinds: the dataclasses.
    """
    for kind in kinds:
        ForkingPickler.register(kind, _reduce)


def _reduce(value: Any) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    return _rebuild, (type(value), {one.name: _sent(getattr(value, one.name)) for one in fields(value)})


def _rebuild(kind: type, parts: dict[str, Any]) -> Any:
    return kind(**{name: _received(part) for name, part in parts.items()})


def _sent(part: Any) -> Any:
    if not isinstance(part, np.ndarray) or part.nbytes < _LEAST or part.dtype.hasobject:
        return part
    return _Mapped(_in_shared_memory(part), part.dtype, part.shape)


def _received(part: Any) -> Any:
    return part.content.numpy().view(part.dtype).reshape(part.shape) if isinstance(part, _Mapped) else part


def _in_shared_memory(array: npt.NDArray[Any]) -> Tensor:
    """The bytes of an array, put there once for all workers, and kept as long as the array."""
    key = id(array)
    if key not in _shared:
        content = torch.empty(array.nbytes, dtype=torch.uint8).share_memory_()
        content.numpy()[:] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        _shared[key] = weakref.ref(array, lambda _: _shared.pop(key, None)), content
    return _shared[key][1]

"""Processes and threads that load data: how a batch gets from a data worker to the main process, and a data set to the workers.

Of a batch, the pixels go in one piece of shared memory, all else by value. A tensor that leaves a worker costs a file in shared
memory and a message over a socket, each; a batch of eight images has some fifty of them (boxes, labels, flags, ...). Small arrays
travel faster inside the message about the batch itself.

Data workers map the packed arrays of a data set instead of copying them, however they are started.

A forked worker shares the memory of its parent. One that is spawned (macOS, Windows) or comes from a fork server (Linux from Python
3.14 on) is sent its data set: large arrays are put into shared memory once, and each worker is told where they are.
"""

from __future__ import annotations

import os
import warnings
import weakref
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields, replace
from multiprocessing.reduction import ForkingPickler
from typing import Any, NamedTuple, TypeVar, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import get_worker_info
from tqdm import tqdm

from detpipe.types import Target

Batch = tuple[list[Tensor], list[Target]]
T = TypeVar("T")
_LEAST = 2**16  # bytes: smaller arrays are sent as they are
_AT_ONCE = 512  # images that are asked for before the first of them is there


@dataclass(frozen=True)
class PackedBatch:
    """A batch on its way."""

    # ``[B]`` of the type of the images, one after the other, row by row, the channels of a pixel side by side
    pixels: Tensor
    sizes: list[tuple[int, int]]  # N times height and width
    targets: list[dict[str, Any]]  # N targets, with arrays in place of tensors
    channels: int = 3  # C of each image

    def unpack(self) -> Batch:
        """N images ``[C, H_i, W_i]``, channels last in memory, and N targets; no pixels are copied."""
        parts = self.pixels.split([self.channels * height * width for height, width in self.sizes])
        images = [p.view(h, w, self.channels).permute(2, 0, 1) for p, (h, w) in zip(parts, self.sizes, strict=True)]
        targets = [
            {k: torch.from_numpy(v) if isinstance(v, np.ndarray) else v for k, v in target.items()}
            for target in self.targets
        ]
        return images, [cast(Target, target) for target in targets]

    def pin_memory(self) -> Batch:
        """The batch in page-locked memory, all pixels by one copy; the data loader calls this where it is to pin."""
        images, targets = replace(self, pixels=self.pixels.pin_memory()).unpack()
        pinned = [{k: v.pin_memory() if isinstance(v, Tensor) else v for k, v in target.items()} for target in targets]
        return images, [cast(Target, target) for target in pinned]


def collate(samples: list[tuple[Tensor, Target]]) -> Batch | PackedBatch:
    """Keep the images ``[C, H, W]`` of a batch apart: they are padded, and resized where the data have not, together on the device.

    In the main process the images and their targets, in the same order; in a data worker both packed.
    """
    images, targets = (list(column) for column in zip(*samples, strict=True))
    if get_worker_info() is None:
        return images, targets
    return pack(images, targets)


def pack(images: list[Tensor], targets: list[Target]) -> PackedBatch:
    """Copy N images ``[C, H_i, W_i]`` of one type into shared memory, once, with their targets."""
    total, channels, dtype = sum(image.numel() for image in images), images[0].shape[0], images[0].dtype
    # as torch's default_collate does: written where the main process will read it
    pixels = torch.empty(0, dtype=dtype).set_(torch.UntypedStorage._new_shared(total * dtype.itemsize))
    sizes = [(image.shape[1], image.shape[2]) for image in images]
    parts = pixels.split([image.numel() for image in images])
    for part, image in zip(parts, images, strict=True):
        part.view(image.shape[1], image.shape[2], channels).copy_(image.permute(1, 2, 0))
    arrays = [{k: v.numpy() if isinstance(v, Tensor) else v for k, v in target.items()} for target in targets]
    return PackedBatch(pixels, sizes, arrays, channels)


_shared: dict[int, tuple[weakref.ref[Any], Tensor]] = {}  # by the id of an array that is alive


class _Mapped(NamedTuple):
    content: Tensor  # [bytes] uint8 in shared memory
    dtype: np.dtype[Any]
    shape: tuple[int, ...]


def share_with_workers(*kinds: type) -> None:
    """Let processes that are started share the arrays of dataclasses; other ways to pickle them stay as they are."""
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


def look_at_images(look: Callable[[int], T], rows: Sequence[int]) -> Iterator[T]:
    """Call a function for each image in as many threads as there are cores, since decoders release the interpreter's lock.

    Its results come in the order of the rows.
    """
    with (
        warnings.catch_warnings(
            action="ignore"
        ),  # the decoder's own, which it sets and takes back in each thread, would stay or be lost
        ThreadPoolExecutor(usable_cores()) as pool,
        tqdm(desc="checking images", total=len(rows), unit="image", disable=None, leave=False) as bar,
    ):
        for start in range(0, len(rows), _AT_ONCE):
            for found in pool.map(look, rows[start : start + _AT_ONCE]):
                yield found
                bar.update()


def usable_cores() -> int:
    """How many of the processors' cores this process may use, at least 1."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1

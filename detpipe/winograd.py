"""3 x 3 convolutions of detection on a CPU with a quarter of the multiplications, by Winograd's minimal filtering F(4 x 4, 3 x 3).

Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks", 2015, arXiv 1509.09308, section 4, with its matrices.

Deviations:
1. Rows and columns of a tile are transformed by one product, with the Kronecker product of the matrix with itself.
2. As many rows of tiles at a time as stay in the processor's caches.

N images, C and K channels, T tiles of 4 x 4 cells.
"""

from __future__ import annotations

import weakref
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from detpipe.conv_gradients import QuickGradients

LEAST_CHANNELS = 128  # below, transforms cost what the products save
LEAST_CELLS = 1024  # of an image; below, weights are most of what is read
TILES_AT_ONCE = 192
_WEIGHTS = (  # [6, 3]
    *((1 / 4, 0, 0), (-1 / 6, -1 / 6, -1 / 6), (-1 / 6, 1 / 6, -1 / 6)),
    *((1 / 24, 1 / 12, 1 / 6), (1 / 24, -1 / 12, 1 / 6), (0, 0, 1)),
)
_INPUT = (  # [6, 6]
    *((4, 0, -5, 0, 1, 0), (0, -4, -4, 1, 1, 0), (0, 4, -4, -1, 1, 0)),
    *((0, -2, -1, 2, 1, 0), (0, 2, -1, -2, 1, 0), (0, 4, 0, -5, 0, 1)),
)
_OUTPUT = ((1, 1, 1, 1, 1, 0), (0, 1, -1, 2, -2, 0), (0, 1, 1, 4, 4, 0), (0, 1, -1, 8, -8, 1))  # [4, 6]


class _Kept(NamedTuple):
    weight: weakref.ref[Tensor]
    state: tuple[int, int, float]
    transformed: Tensor


class QuickConvolutions:
    """Computes what suits it of the convolutions in a block of code, and keeps transformed weights until the weights change.

    Results differ from the exact ones by rounding, by some 1e-5 of the largest value, ten times as much as PyTorch's.

    Example:
        >>> quick, conv = QuickConvolutions(), torch.nn.Conv2d(128, 128, 3, padding=1)
        >>> with torch.no_grad(), quick.on(images := torch.rand(1, 128, 40, 40)):
        ...     found = conv(images)
        >>> torch.allclose(found, conv(images), atol=1e-4), len(quick)
        (True, 1)
    """

    def __init__(self) -> None:
        self._kept: dict[int, _Kept] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), ()  # a copy has its own weights

    def __len__(self) -> int:
        return len(self._kept)

    def on(self, images: Tensor) -> AbstractContextManager[Any]:
        """Take over convolutions in the block.

        Only without gradients, in float32 on a CPU, and not while a graph is recorded or precision is lowered. Where gradients are
        computed training goes on, and what was kept is dropped; :mod:`detpipe.conv_gradients` is for that.

        Args:
            images: what goes in.
        """
        if torch.is_grad_enabled():
            self._kept.clear()
            if images.is_cpu and QuickGradients.are_quicker() and not torch.compiler.is_compiling():
                return QuickGradients()
        elif (
            images.is_cpu
            and images.dtype == torch.float32
            and not (
                torch.compiler.is_compiling()
                or torch._C._get_tracing_state() is not None
                or torch.is_autocast_enabled("cpu")
            )
        ):
            return _TakingOver(self)
        return nullcontext()

    def weights(self, weight: Tensor) -> Tensor:
        """Transform ``[K, C, 3, 3]`` to ``[36, C, K]``, or take what is kept, if the weights still have the same sum."""
        kept, state = self._kept.get(id(weight)), (weight.data_ptr(), weight._version, float(weight.sum()))
        if kept is None or kept.weight() is not weight or kept.state != state:
            matrix = torch.tensor(_WEIGHTS, dtype=torch.float64)
            both = torch.kron(matrix, matrix).to(weight.dtype)  # [36, 9]
            transformed = (both @ weight.permute(2, 3, 1, 0).reshape(9, -1)).unflatten(1, weight.shape[:2][::-1])
            kept = self._kept[id(weight)] = _Kept(weakref.ref(weight), state, transformed)
        return kept.transformed


class _TakingOver(TorchFunctionMode):
    def __init__(self, quick: QuickConvolutions) -> None:
        super().__init__()
        self._quick = quick

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.conv2d and not kwargs and _suits(*args):
            images, weight, bias = args[:3]
            return _convolve(images, self._quick.weights(weight), bias)
        return func(*args, **(kwargs or {}))


def _suits(
    images: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> bool:
    return (
        weight.shape[2:] == (3, 3)
        and min(weight.shape[:2]) >= LEAST_CHANNELS
        and images.ndim == 4
        and images.shape[2] * images.shape[3] >= LEAST_CELLS  # of one image: a batch gives what its images give alone
        and groups == 1
        and images.is_cpu
        and images.dtype == weight.dtype == torch.float32
        and isinstance(weight, torch.nn.Parameter)  # what lasts
        and all(tuple(value) == (1, 1) for value in (stride, padding, dilation) if not isinstance(value, int))
        and all(value == 1 for value in (stride, padding, dilation) if isinstance(value, int))
    )


def _convolve(images: Tensor, weights: Tensor, bias: Tensor | None) -> Tensor:
    """``[N, C, H, W]`` and ``[36, C, K]`` -> ``[N, K, H, W]``, channels last in memory."""
    count, channels, height, width = images.shape
    cells, widths = images.permute(0, 2, 3, 1), weights.shape[2]
    down, across = -(-height // 4), -(-width // 4)
    rows = min(down, max(1, TILES_AT_ONCE // across))
    into, back = (torch.kron(matrix, matrix) for matrix in map(images.new_tensor, (_INPUT, _OUTPUT)))
    found = images.new_empty(count, height, width, widths)
    bias = images.new_zeros(()) if bias is None else bias
    padded = images.new_zeros(4 * rows + 2, 4 * across + 2, channels)
    tiles = images.new_empty(6, 6, rows, across, channels)
    moved, products = torch.empty_like(tiles).view(36, -1), images.new_empty(36, rows * across, widths)
    outputs = images.new_empty(16, rows * across * widths)
    for image, result in zip(cells, found, strict=True):
        for top in range(0, height, 4 * rows):
            first, last = max(0, top - 1), min(height, top + 4 * rows + 1)
            padded[: first - top + 1], padded[last - top + 1 :] = 0, 0
            padded[first - top + 1 : last - top + 1, 1 : width + 1] = image[first:last]
            tiles.copy_(padded.unfold(0, 6, 4).unfold(1, 6, 4).permute(3, 4, 0, 1, 2))
            torch.mm(into, tiles.view(36, -1), out=moved)
            torch.bmm(moved.view(36, -1, channels), weights, out=products)
            torch.mm(back, products.view(36, -1), out=outputs)
            block = outputs.view(4, 4, rows, across, widths).permute(2, 0, 3, 1, 4)
            part = result[top : top + 4 * rows]
            if part.shape[:2] == (4 * rows, 4 * across):  # written where it belongs
                torch.add(block, bias, out=part.view(rows, 4, across, 4, widths))
            else:
                part.copy_((block + bias).reshape(4 * rows, 4 * across, widths)[: part.shape[0], :width])
    return found.permute(0, 3, 1, 2)

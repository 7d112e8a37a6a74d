"""Resizing in the data workers: images reach the detector at their final size, and a JPEG is decoded no larger than needed.

Shortest side: Girshick, "Fast R-CNN", 2015, arXiv 1504.08083, section 5. Several scales: He et al., "Spatial Pyramid Pooling in
Deep Convolutional Networks", 2014, arXiv 1406.4729, section 4.1.

Deviations:
1. The picture lies in the top left corner of the canvas, not in its middle: boxes are only scaled, and the detector, which is told
   how large the picture is, looks for nothing in the padding.
2. The scale of a training image is drawn from (seed, epoch, index), not once a batch: it then depends neither on the batch size
   nor on the number of processes, as every other draw. Batches hold more padding so: see docs/data_throughput.md.

Convention: a picture is mapped whole onto its new size, so a box is multiplied by (new width / width, new height / height).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from detpipe.images import ResizeRule, Size, resized_size, targets_to_batch
from detpipe.types import Target

PADDING = (124, 116, 104)  # RGB, the mean color of ImageNet: what a network calls zero
_ROUNDING = 1e-12  # of a factor, so that the product is not just below a whole number
_STREAM = 1  # after (seed, epoch, index): the size of an image is independent of its flips


@dataclass(frozen=True)
class Resize:
    """To which size the data bring images, in training and in evaluation.

    Args:
        policy: ``shortest_side``: the shorter side becomes ``min_size``, unless the longer one would exceed ``max_size``.
            ``letterbox``: the picture becomes as large as fits into a square of ``min_size``, the rest of which is padding.
        min_size: in pixels; a list trains at several sizes, drawn for each image and epoch.
        max_size: in pixels, the longer side never exceeds it; for ``shortest_side`` only.
        sampling: ``choice`` draws one of the sizes listed, ``range`` any whole number from the first to the last of two.
        eval_size: the ``min_size`` of evaluation; null means the last of the list.

    Raises:
        ValueError: a size is not positive or above ``max_size``, or an argument does not belong to the policy.
    """

    policy: Literal["shortest_side", "letterbox"] = "shortest_side"
    min_size: int | list[int] = 600
    max_size: int | None = None
    sampling: Literal["choice", "range"] = "choice"
    eval_size: int | None = None

    def __post_init__(self) -> None:
        if self.policy not in ("shortest_side", "letterbox"):
            raise ValueError(f"resize.policy must be 'shortest_side' or 'letterbox', got {self.policy!r}")
        if self.sampling not in ("choice", "range"):
            raise ValueError(f"resize.sampling must be 'choice' or 'range', got {self.sampling!r}")
        if self.policy == "letterbox" and self.max_size is not None:
            raise ValueError(
                f"resize.max_size must be left out for letterbox, whose canvas is a square of min_size; got {self.max_size}"
            )
        if self.policy == "shortest_side" and self.max_size is None:
            raise ValueError("resize.max_size is missing: shortest_side needs it, such as 1000 for a min_size of 600")
        sizes = [*self.sizes, self.evaluation_size] if self.sizes else []
        if not sizes or not all(0 < size <= (self.max_size or size) for size in sizes):
            raise ValueError(
                f"resize needs 0 < min_size <= max_size, got min_size {self.min_size}, eval_size {self.eval_size} and "
                f"max_size {self.max_size}"
            )
        if self.sampling == "range" and (len(self.sizes) != 2 or self.sizes[0] > self.sizes[1]):
            raise ValueError(f"resize.min_size must be [smallest, largest] for sampling 'range', got {self.min_size}")

    @property
    def sizes(self) -> tuple[int, ...]:
        """What is drawn from in training."""
        return (self.min_size,) if isinstance(self.min_size, int) else tuple(self.min_size)

    @property
    def evaluation_size(self) -> int:
        """The ``min_size`` of evaluation."""
        return self.sizes[-1] if self.eval_size is None else self.eval_size

    @property
    def detector_sizes(self) -> tuple[int, int]:
        """The ``min_size`` and ``max_size`` of a detector that brings images to the sizes of evaluation."""
        return self.evaluation_size, self.max_size or self.evaluation_size

    def for_evaluation(self) -> Resize:
        """The same policy with the one size of evaluation."""
        return Resize(self.policy, self.evaluation_size, self.max_size)

    def check_detector(self, min_size: int, max_size: int, rule: ResizeRule = "detpipe") -> None:
        """Refuse, by a ValueError, a detector that would bring an image from elsewhere to another size than it is evaluated at."""
        if rule != "detpipe":
            raise ValueError(
                f"data.init_args.resize brings images to their size in detpipe's way, but model.resize is {rule!r}; give resize: "
                "null, or model.resize detpipe"
            )
        wanted = self.detector_sizes
        if (min_size, max_size) != wanted:
            raise ValueError(
                f"data.init_args.resize brings images to min_size {wanted[0]} and max_size {wanted[1]} in evaluation, but "
                f"model.min_size is {min_size} and model.max_size is {max_size}; give both the same, or resize: null"
            )

    def draw(self, seed: Sequence[int]) -> int:
        """Choose the ``min_size`` of a training image, in pixels, decided by (seed, epoch, index)."""
        if len(self.sizes) == 1:
            return self.sizes[0]
        random = np.random.default_rng((*seed, _STREAM))
        if self.sampling == "range":
            return int(random.integers(self.sizes[0], self.sizes[1], endpoint=True))
        return self.sizes[int(random.integers(len(self.sizes)))]

    def content_size(self, size: Size, min_size: int) -> Size:
        """Height and width of a picture after resizing, without padding; those of one that has been resized are what they are."""
        return resized_size(size, min_size, self.max_size or min_size)

    def size_to_read(self, size: Size, min_size: int, magnification: float = 1.0) -> Size:
        """How large an image must be read, so that nothing is lost that the detector could see; never above the size of the file.

        ``magnification`` is by how much the augmentation may enlarge a part of the picture.
        """
        goal = self.content_size(size, min_size)
        scale = magnification * max(goal[0] / size[0], goal[1] / size[1])
        if scale >= 1:
            return size
        return goal if magnification == 1 else (max(1, round(size[0] * scale)), max(1, round(size[1] * scale)))

    def __call__(self, image: Tensor, target: Target, min_size: int) -> tuple[Tensor, Target]:
        """Resize an image with its boxes, proposals and areas to a ``min_size``, and pad it if the policy says so.

        ``[C, H, W]`` uint8, or floating point in 0..1, becomes ``[C, H', W']`` of the same type, channels last in memory; its
        target, not changed, becomes one with ``content_size``.
        """
        old = (image.shape[1], image.shape[2])
        new = self.content_size(old, min_size)
        image = resample(image, new)
        [moved] = targets_to_batch([target], [old], [new])
        moved["content_size"] = new
        return (pad(image, min_size) if self.policy == "letterbox" else image), moved


def ground(channels: int, floats: bool) -> np.ndarray:
    """What an image is filled up with, ``[C]`` uint8 or float32 in 0..1: the mean color, its three values repeated."""
    color = np.resize(np.array(PADDING, np.uint8), channels)
    return color.astype(np.float32) / 255 if floats else color


def pad(image: Tensor, side: int) -> Tensor:
    """Put a picture ``[C, H, W]``, uint8 or floating point in 0..1, into the top left corner of a square of the mean color.

    ``[C, side, side]`` of the same type, channels last in memory.
    """
    canvas = torch.from_numpy(ground(image.shape[0], image.is_floating_point())).repeat(side, side, 1)
    canvas[: image.shape[1], : image.shape[2]] = image.permute(1, 2, 0)
    return canvas.permute(2, 0, 1)


def resample(image: Tensor, size: Size, extent: tuple[float, float] | None = None) -> Tensor:
    """Resize pixels bilinearly, smoothed where they shrink; 8-bit ones to within one gray level of the same in floating point.

    ``[C, H, W]``, uint8 or floating point, becomes ``[C, h, w]`` of the same type, channels last in memory if they were, which is
    fastest. ``extent`` is height and width of the part of the image that becomes the whole new one, from its top left corner;
    above H - 1 and W - 1, and above the new size: the last row and column of a picture decoded at a smaller scale may lie outside
    the file in part.
    """
    shape = (image.shape[1], image.shape[2])
    if size == shape and extent in (None, shape):
        return image
    scales = None
    if extent not in (None, shape):  # torch has no name for a part of an image, but takes scales as given
        scales = (size[0] / extent[0] * (1 + _ROUNDING), size[1] / extent[1] * (1 + _ROUNDING))
    if 1 in (*size, *shape):
        return _by_axis(image, size, scales)
    # not image[None]: torch would not see that the channels come last, and take three times as long
    batch = image.permute(1, 2, 0)[None].permute(0, 3, 1, 2)
    return _interpolate(batch, size, scales)[0]


def _interpolate(batch: Tensor, size: Size, scales: tuple[float, float] | None) -> Tensor:
    if scales is None:
        return F.interpolate(batch, size, mode="bilinear", antialias=True)
    # torch computes the size from scales, rounded down
    return F.interpolate(batch, scale_factor=scales, mode="bilinear", antialias=True)[..., : size[0], : size[1]]


def _by_axis(image: Tensor, size: Size, scales: tuple[float, float] | None) -> Tensor:
    """Resize along x, then along y, each as the last axis of rows of their own.

    With one row or column torch (2.14) fails an assertion of its own for bytes, and mixes up rows in floating point.
    """
    last = image.stride(0) == 1
    out = image.float()
    for axis in (1, 0):
        moved = out.movedim(1 + axis, 2)
        rows = moved.reshape(1, -1, 1, moved.shape[2])
        rows = _interpolate(rows, (1, size[axis]), None if scales is None else (1.0, scales[axis]))
        out = rows.reshape(*moved.shape[:2], size[axis]).movedim(2, 1 + axis)
    out = out.round().to(torch.uint8) if image.dtype == torch.uint8 else out
    return out.permute(1, 2, 0).contiguous().permute(2, 0, 1) if last else out.contiguous()

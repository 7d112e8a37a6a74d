"""How boxes may be given to an RoI operator, and what is wrong with them if they cannot be pooled.

Convention: boxes are xyxy with continuous edges, in pixels or relative to the image (0..1); a cell of the feature map
covers ``1 / spatial_scale`` pixels, and its value sits at its center.

N images, P boxes an image, R boxes of the batch.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from itertools import accumulate, pairwise
from numbers import Real
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import Parameter

from detpipe.roi_pooling.operators import is_batched, operator

Boxes = Tensor | Sequence[Tensor]
SIDES = "x1, y1, x2, y2"
ROTATED_SIDES = "cx, cy, w, h, angle"
MOST_LISTED = 64  # images whose ends of boxes are arguments of a kernel
_UNCHECKED = ContextVar("unchecked", default=False)


class LayoutError(ValueError, AssertionError):
    """Boxes in a layout that no operator reads: a ValueError, and for code written against torchvision an AssertionError."""


class RoIs(NamedTuple):
    """Boxes of a batch, one row each."""

    image: Tensor  # [R] int64, which image of the batch
    boxes: Tensor  # [R, 4], or [R, 5] if rotated; float32 or float64
    lead: tuple[int, ...]  # (R,) or (N, P): the leading dimensions of the result


class GivenBoxes(NamedTuple):
    """Boxes in a layout that has been checked, and that kernels can read."""

    boxes: Tensor  # [R, 1 + B] with the image's index first, [N, P, B], or [R, B] with the ends of each image's boxes
    ends: tuple[int, ...]  # for each image the number of boxes up to its last one, where they were given as a list
    lead: tuple[int, ...]  # (R,) or (N, P): the leading dimensions of the result


def read_boxes(boxes: Boxes, features: Tensor, sides: str = SIDES) -> RoIs:
    """Read boxes in any of the three layouts, and check them.

    The values are checked on the CPU, where that costs nothing; on another device, where it would wait for it, only
    inside ``torch.autograd.detect_anomaly()``.

    Args:
        boxes: ``[R, 1 + B]`` with the image's index first, a list of N tensors ``[P_i, B]``, or ``[N, P, B]``.
        features: ``[N, C, H, W]``; the boxes must be on its device and are computed in its precision, float32 at least.
        sides: names of the B numbers of a box.

    Returns:
        The boxes, differentiable.

    Raises:
        LayoutError: another shape (a ValueError and an AssertionError).
        ValueError: not floating-point, on another device, a list of another length than N, an index of an image that
            is not there, or a box that is not finite or has no area.
    """
    return read_values(read_layout(boxes, features, sides), features, sides)


def read_layout(boxes: Boxes, features: Tensor, sides: str = SIDES) -> GivenBoxes:
    """Read what :func:`read_boxes` does, without a look at values; a list costs one copy, and nothing else does."""
    count = sides.count(",") + 1
    images = features.shape[0]
    width = {2: count + 1, 3: count}.get(boxes.ndim) if isinstance(boxes, Tensor) else None
    if not isinstance(boxes, Iterable) or (isinstance(boxes, Tensor) and boxes.shape[-1:] != (width,)):
        raise LayoutError(
            f"boxes must be [R, {count + 1}] (image, {sides}), a list of [P_i, {count}], or [N, P, {count}]; "
            f"got {describe(boxes)}"
        )
    if isinstance(boxes, Tensor):
        _check_tensor("boxes", boxes, features)
        if boxes.ndim == 3 and boxes.shape[0] != images:
            raise ValueError(f"boxes {list(boxes.shape)} are of {boxes.shape[0]} images, features of {images}")
        return GivenBoxes(boxes, (), tuple(boxes.shape[:-1]))
    boxes = list(boxes)
    for index, box in enumerate(boxes):
        if not isinstance(box, Tensor) or box.ndim != 2 or box.shape[1] != count:
            raise LayoutError(f"boxes[{index}] must be [P, {count}] ({sides}), got {describe(box)}")
        _check_tensor(f"boxes[{index}]", box, features)
    if len(boxes) != images:
        raise ValueError(f"boxes must be a list of one tensor an image: {len(boxes)} for {images} images")
    ends = tuple(accumulate(box.shape[0] for box in boxes))
    listed = torch.cat(boxes) if boxes else features.new_zeros((0, count))
    return GivenBoxes(listed, ends, tuple(ends[-1:]) or (0,))


def read_values(given: GivenBoxes, features: Tensor, sides: str = SIDES) -> RoIs:
    """Write boxes of any layout row by row, in the precision of the features, and check their values."""
    boxes, ends, lead = given
    has_image = boxes.ndim == 2 and len(ends) == 0 and boxes.shape[1] > sides.count(",") + 1
    rows = boxes.flatten(0, -2).to(torch.promote_types(features.dtype, torch.float32))
    if is_plain(rows):
        _check_boxes(rows.detach(), features.shape[0], sides)
    else:
        rows = torch.ops.detpipe.checked_boxes(rows, features.shape[0], sides)
    if has_image:
        return RoIs(rows[:, 0].detach().long(), rows[:, 1:], lead)
    counts = [boxes.shape[1]] * boxes.shape[0] if boxes.ndim == 3 else [b - a for a, b in pairwise((0, *ends))]
    return RoIs(_image_index(counts, boxes.device), rows, lead)


def as_given(pooled: Tensor, given: GivenBoxes) -> Tensor:
    """Give the result of boxes ``[N, P, B]`` their leading dimensions."""
    return pooled.unflatten(0, given.lead) if len(given.lead) == 2 else pooled


def with_images(given: GivenBoxes) -> GivenBoxes:
    """Write boxes of a list with the image's index first, for lists too long to be an argument of a kernel."""
    image = _image_index([end - begin for begin, end in pairwise((0, *given.ends))], given.boxes.device)
    exact = given.boxes.to(torch.promote_types(given.boxes.dtype, torch.float32))
    return GivenBoxes(torch.cat((image[:, None].to(exact.dtype), exact), dim=1), (), given.lead)


def to_rois(boxes: Boxes) -> Tensor:
    """Write boxes in the ``[R, 5]`` layout of RoI operators, without a look at their values.

    Args:
        boxes: ``[R, 5]`` (image index, x1, y1, x2, y2), a list of N tensors ``[P_i, 4]``, or ``[N, P, 4]``.

    Returns:
        ``[R, 5]``.

    Raises:
        LayoutError: none of the three layouts.
    """
    if isinstance(boxes, Tensor):
        if boxes.ndim == 2 and boxes.shape[1] == 5:
            return boxes
        if boxes.ndim != 3 or boxes.shape[2] != 4:
            raise LayoutError(f"boxes must be [R, 5], a list of [P_i, 4], or [N, P, 4]; got {list(boxes.shape)}")
        index = torch.arange(boxes.shape[0], dtype=boxes.dtype, device=boxes.device)
        return torch.cat((index[:, None, None].expand(*boxes.shape[:2], 1), boxes), dim=2).flatten(0, 1)
    if not boxes or any(box.ndim != 2 or box.shape[1] != 4 for box in boxes):
        raise LayoutError(f"a list of boxes must hold [P_i, 4] tensors; got {[list(box.shape) for box in boxes]}")
    return torch.cat([torch.nn.functional.pad(box, (1, 0), value=float(i)) for i, box in enumerate(boxes)])


def describe(given: object) -> list[int] | str:
    """The shape of a tensor, or what there is in the place of one."""
    return list(given.shape) if isinstance(given, Tensor) else type(given).__name__


def check_features(features: Tensor, name: str = "features") -> None:
    """Refuse what is not a batch of feature maps.

    Raises:
        ValueError: not a floating-point ``[N, C, H, W]`` with at least one channel and one cell.
    """
    if not isinstance(features, Tensor):
        raise ValueError(f"{name} must be a tensor [N, C, H, W], got {type(features).__name__}")
    if features.ndim != 4 or 0 in features.shape[1:]:
        raise ValueError(f"{name} must be [N, C, H, W] with at least one channel and cell, got {list(features.shape)}")
    if not features.is_floating_point():
        raise ValueError(f"{name} must be floating-point, got {features.dtype}: convert them with .float()")
    refuse_tangent(name, features)


def refuse_tangent(name: str, values: Tensor) -> None:
    """Refuse a tensor with a tangent, which PyTorch would lose in an operator that has no forward-mode derivative.

    Raises:
        NotImplementedError: it has one.
    """
    if forward_ad._current_level >= 0 and forward_ad.unpack_dual(values).tangent is not None:
        raise NotImplementedError(f"{name}: no forward-mode derivatives (torch.func.jvp); use torch.autograd.grad")


def read_output_size(output_size: int | Sequence[int]) -> tuple[int, int]:
    """Read one number or (height, width).

    Raises:
        ValueError: not one or two positive whole numbers.
    """
    size = tuple(output_size) if isinstance(output_size, Sequence) else (output_size, output_size)
    whole = all(isinstance(side, int) and not isinstance(side, bool) and side > 0 for side in size)
    if len(size) != 2 or not whole:
        raise ValueError(f"output_size must be one or two positive whole numbers, got {output_size}")
    return size[0], size[1]


def read_scale(spatial_scale: float) -> float:
    """Check the number of cells a pixel.

    Raises:
        ValueError: not positive and finite.
    """
    if not isinstance(spatial_scale, Real | Tensor) or not 0 < spatial_scale < math.inf:
        raise ValueError(f"spatial_scale must be positive, the cells a pixel (1 / stride), got {spatial_scale!r}")
    return float(spatial_scale)


def read_samples(sampling_ratio: int, least: float = 0) -> int:
    """Check the samples along each axis of a bin, and say 0 for adaptive ones.

    Raises:
        ValueError: not a whole number, or less than is allowed.
    """
    if not isinstance(sampling_ratio, int) or isinstance(sampling_ratio, bool) or sampling_ratio < least:
        raise ValueError(f"sampling_ratio must be 0 (adaptive) or a positive whole number, got {sampling_ratio!r}")
    return max(sampling_ratio, 0)


def _image_index(sizes: Sequence[int], device: torch.device) -> Tensor:
    """``[R]`` int64 from the number of boxes of each image, without a copy to the device."""
    parts = [torch.full((size,), index, dtype=torch.int64, device=device) for index, size in enumerate(sizes)]
    return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.int64, device=device)


def _check_tensor(name: str, boxes: Tensor, features: Tensor) -> None:
    if not boxes.is_floating_point():
        raise ValueError(f"{name} must be floating-point, got {boxes.dtype}: convert them with .float()")
    if boxes.device != features.device:
        raise ValueError(f"{name} are on {boxes.device} and the features on {features.device}: move one of them")
    refuse_tangent(name, boxes)


@contextmanager
def unchecked_values() -> Iterator[None]:
    """Pool boxes as they come, as torchvision does: one without area is pooled as if it were a point, or a cell."""
    token = _UNCHECKED.set(True)
    try:
        yield
    finally:
        _UNCHECKED.reset(token)


def looks_at_values(tensor: Tensor) -> bool:
    """Say whether values of boxes are checked: where they are not, a box may end before it begins."""
    unchecked = not torch.compiler.is_compiling() and _UNCHECKED.get()  # torch 2.11 does not compile context variables
    return (tensor.device.type == "cpu" or torch.is_anomaly_enabled()) and not unchecked


def is_plain(tensor: Tensor) -> bool:
    """Say whether nobody traces: then values are looked at without an operator, which takes longer than the look."""
    if torch.compiler.is_compiling() or is_batched(tensor):
        return False
    return type(tensor) in (Tensor, Parameter) and not torch._C._len_torch_dispatch_stack()


@operator("checked_boxes")
def _checked_boxes(rows: Tensor, images: int, sides: str) -> Tensor:
    _check_boxes(rows, images, sides)
    return rows.clone()


def _check_boxes(rows: Tensor, images: int, sides: str) -> None:
    """Check ``[R, B]``, or ``[R, 1 + B]`` with the image's index first."""
    if not looks_at_values(rows):
        return
    boxes = rows[:, -sides.count(",") - 1 :]
    if boxes.shape[1] < rows.shape[1]:
        image = rows[:, 0]
        good = (image == image.floor()) & (image >= 0) & (image < images)
        if not good.all():
            row = int((~good).nonzero()[0])
            raise ValueError(
                f"boxes: box {row} has image index {image[row].item():g}, expected a whole number in 0..{images - 1}"
            )
    rotated = sides.endswith("angle")
    size = boxes[:, 2:4] if rotated else boxes[:, 2:] - boxes[:, :2]
    good = (size > 0) & (size < math.inf)  # false for NaN; an infinite edge makes an infinite size or NaN
    if rotated:
        good = good & boxes[:, :2].isfinite() & boxes[:, 4:].isfinite()
    if not good.all():
        row = int((~good.all(dim=1)).nonzero()[0])
        values = [round(value, 4) for value in boxes[row].tolist()]
        finite = all(math.isfinite(value) for value in values)
        wrong = "has no area: width and height must be positive" if finite else "is not finite"
        raise ValueError(f"boxes: box {row}, ({sides}) = {values}, {wrong}")


@_checked_boxes.register_fake
def _(rows: Tensor, images: int, sides: str) -> Tensor:
    return torch.empty_like(rows)


_checked_boxes.register_autograd(lambda _, gradient: (gradient, None, None))


@_checked_boxes.register_vmap
def _(info, in_dims, rows: Tensor, images: int, sides: str) -> tuple[Tensor, int]:
    rows = rows.movedim(in_dims[0], 0)
    return torch.ops.detpipe.checked_boxes(rows.flatten(0, 1), images, sides).unflatten(0, rows.shape[:2]), 0

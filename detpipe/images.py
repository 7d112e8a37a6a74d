"""The one place where coordinates change frame: image files <-> images as passed <-> the resized, normalized, padded batch.

Ren et al., "Faster R-CNN", 2015, arXiv 1506.01497, section 3.3: the shorter side becomes ``min_size`` unless the longer
one would exceed ``max_size``.

Convention: resizing maps the continuous frame, so a box is multiplied by (new width / width, new height / height).
Padding is added at the right and the bottom, with the value that normalization gives to the mean color: zero.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.models.detection.image_list import ImageList

from detpipe import boxes as box_ops
from detpipe.support.numbers import check_whole
from detpipe.types import Detection, GlimpsedDetection, PixelFormat, Target

Size = tuple[int, int]  # height, width
# how an image is resized: sizes rounded and smoothed where it shrinks; rounded down and never smoothed; .5 rounded up, smoothed,
# and 8-bit images to whole gray levels, as Pillow does
ResizeRule = Literal["detpipe", "torchvision", "detectron2"]


def check_sizes(min_size: int, max_size: int) -> None:
    """Refuse what is no pair of sides for :func:`resized_size`, by a ValueError."""
    if not 0 < min_size <= max_size:
        raise ValueError(f"expected 0 < min_size <= max_size, got {min_size=}, {max_size=}")
    check_whole(min_size=min_size, max_size=max_size)


def resized_size(size: Size, min_size: int, max_size: int, rule: ResizeRule = "detpipe") -> Size:
    """Compute the size of an image whose shorter side becomes ``min_size``, but the longer at most ``max_size``; at least 1 each.

    ``rule`` says how sizes become whole numbers; detectron2's also gives the shorter side in full.

    Example:
        >>> resized_size((480, 640), 600, 1000)
        (600, 800)
    """
    height, width = cast(Any, size)  # in an exported graph symbols: no branch depends on them
    # torch 2.11 compiles the functions of numbers alone
    least, most = (torch.sym_min, torch.sym_max) if isinstance(height + width, torch.SymInt) else (min, max)
    shorter, longer = least(height, width), most(height, width)
    if rule == "detectron2":  # two steps, each rounded in floating point
        long_side = min_size / shorter * longer
        shrink = least(1.0, max_size / most(min_size, long_side))
        short_side, long_side = (math.trunc(side * shrink + 0.5) for side in (min_size, long_side))
        wide = height < width
        sides = torch.sym_ite(wide, short_side, long_side), torch.sym_ite(wide, long_side, short_side)
    else:
        scale = least(min_size / shorter, max_size / longer)
        whole = math.trunc if rule == "torchvision" else _nearest
        sides = whole(height * scale), whole(width * scale)
    return cast(Size, (most(1, sides[0]), most(1, sides[1])))


def _nearest(side: float) -> int:
    """Round as ``round`` does, halves to even, in operations that an exported graph can hold."""
    up = math.trunc(side + 0.5)
    return up - math.trunc(2 * (up - side)) * (up % 2)


def scale_boxes(boxes: Tensor, old: Size, new: Size) -> Tensor:
    """Move boxes ``[..., 4]`` xyxy from an image of one size to the same image at another size."""
    if old == new:
        return boxes
    y, x = new[0] / old[0], new[1] / old[1]
    return boxes * box_ops.constants((x, y, x, y), boxes)


def normalize(image: Tensor, pixel_format: PixelFormat) -> Tensor:
    """Turn an image, or a batch of equal size, into what a network expects.

    Args:
        image: ``[..., C, H, W]``, of three channels RGB, uint8 in 0..255 or floating point in 0..1.
        pixel_format: of the backbone.

    Returns:
        ``[..., C, H, W]`` float32 at least, in which PyTorch can resize, in the backbone's channel order.

    Raises:
        TypeError: the image is neither uint8 nor floating point.
    """
    given = torch.get_default_dtype() if image.dtype == torch.uint8 else image.dtype
    dtype = torch.promote_types(given, torch.float32)
    if image.dtype == torch.uint8:
        image = image.to(dtype).mul_(pixel_format.value_range / 255.0)
    elif image.is_floating_point():
        image = image.to(dtype) * pixel_format.value_range
    else:
        raise TypeError(f"images must be uint8 in 0..255 or floating point in 0..1, got {image.dtype}")
    if pixel_format.channel_order == "bgr":
        image = image.flip(-3)
    mean, std = (box_ops.constants(values, image) for values in (pixel_format.mean, pixel_format.std))
    pixels = image.movedim(-3, -1)
    if pixels.is_contiguous():  # as decoders give them: a row at a time, since vector code wants more than three values
        pixels.flatten(-2).sub_(mean.repeat(image.shape[-1])).div_(std.repeat(image.shape[-1]))
    else:
        image.sub_(mean[:, None, None]).div_(std[:, None, None])
    return image


def to_pixels(image: Tensor, pixel_format: PixelFormat) -> Tensor:
    """Turn what a network expects back into an RGB image: the inverse of :func:`normalize`.

    Args:
        image: ``[C, H, W]`` floating point, normalized; C is 3, or 1 of grey.
        pixel_format: of the backbone.

    Returns:
        ``[3, H, W]`` uint8 RGB, rounded to whole values and clipped to 0..255.

    Raises:
        ValueError: other channels, which have no colors.
    """
    if image.shape[0] not in (1, 3):
        raise ValueError(
            f"boxes and superpixels are made of the colors of an image, which one of {image.shape[0]} channels does not have; "
            "give 1 or 3 channels, or another source of proposals"
        )
    mean, std = (box_ops.constants(values, image) for values in (pixel_format.mean, pixel_format.std))
    image = (image * std[:, None, None] + mean[:, None, None]) * (255.0 / pixel_format.value_range)
    image = image.round().clamp(0, 255).to(torch.uint8)
    return image.flip(0) if pixel_format.channel_order == "bgr" else to_picture(image)


def to_picture(image: Tensor) -> Tensor:
    """Make an image of any channels one that can be shown.

    Args:
        image: ``[C, H, W]`` uint8, or floating point in 0..1.

    Returns:
        ``[3, H, W]`` uint8: the first three channels, or the first as grey where there are fewer.
    """
    if image.is_floating_point():
        image = (image * 255).round().clamp(0, 255).to(torch.uint8)
    return image[:3] if image.shape[0] >= 3 else image[:1].expand(3, -1, -1)


def to_batch(
    images: Sequence[Tensor],
    pixel_format: PixelFormat,
    min_size: int,
    max_size: int,
    divisor: int,
    contents: Sequence[Size | None] | None = None,
    dtype: torch.dtype | None = None,
    rule: ResizeRule = "detpipe",
) -> ImageList:
    """Normalize, resize and pad images into one batch.

    Args:
        images: N tensors ``[C, H_i, W_i]``, of three channels RGB, uint8 in 0..255 or floating point in 0..1.
        pixel_format: of the backbone, which says C.
        min_size: see :func:`resized_size`.
        max_size: see :func:`resized_size`.
        divisor: height and width of the batch are multiples of it; the coarsest stride.
        contents: for each image None, or height and width of the picture in it, if it has its final size already and the rest of
            it is padding; see :func:`contents_of`.
        dtype: of the batch, that of the backbone; None keeps that of the first image, the default one of uint8, float32 at least.
        rule: how images are resized.

    Returns:
        ``tensors`` ``[N, C, H, W]`` and ``image_sizes``, height and width of each picture inside it. In memory the channels of
        ``tensors`` come last, if they do in every image.

    Raises:
        ValueError: no images, or one of a wrong shape.
    """
    if not len(images):
        raise ValueError("expected at least one image, got an empty list")
    resized, canvases, channels = [], [], pixel_format.channels
    for index, image in enumerate(images):
        if image.ndim != 3 or image.shape[0] != channels or 0 in image.shape:
            raise ValueError(f"images[{index}] must be [{channels}, H, W] with H, W > 0, got {list(image.shape)}")
    for index, image in enumerate(_stacked(images, contents)):  # [C, H, W], or all of one size as [N, C, H, W]
        canvas: Size = (image.shape[-2], image.shape[-1])
        content = contents[index] if contents is not None else None
        if content is None:
            canvas = resized_size(canvas, min_size, max_size, rule)
            if rule == "detectron2":
                image = normalize(_resize(image, canvas), pixel_format)
            else:
                image = _resize(normalize(image, pixel_format), canvas, smooth=rule == "detpipe")
        elif not (0 < content[0] <= canvas[0] and 0 < content[1] <= canvas[1]):
            raise ValueError(f"content_size of images[{index}] must lie within its {canvas}, got {tuple(content)}")
        else:
            image = normalize(image, pixel_format)[..., : content[0], : content[1]]
        resized.append(image)
        canvases.append(canvas)
    height, width = (-(-max(canvas[axis] for canvas in canvases) // divisor) * divisor for axis in (0, 1))
    layout = torch.channels_last if all(image.stride(-3) == 1 for image in resized) else torch.contiguous_format
    kind = {"dtype": dtype or resized[0].dtype, "device": resized[0].device}
    batch = torch.empty((len(images), channels, height, width), memory_format=layout, **kind).zero_()
    for index, image in enumerate(resized):  # not row by row of an iterator, which could not pass gradients to images
        row = batch if image.ndim == 4 else batch[index]
        row[..., : image.shape[-2], : image.shape[-1]] = image
    sizes = [(image.shape[-2], image.shape[-1]) for image in resized]
    return ImageList(batch, sizes if len(sizes) == len(images) else sizes * len(images))


def to_canvas(
    images: Tensor,
    pixel_format: PixelFormat,
    min_size: int,
    max_size: int,
    divisor: int,
    dtype: torch.dtype | None = None,
    rule: ResizeRule = "detpipe",
) -> tuple[Tensor, Size]:
    """Do what :func:`to_batch` does for images of one size, by operations that are the same for any size.

    Args:
        images: ``[N, C, H, W]``; N, H and W may be symbols.
        pixel_format: as of :func:`to_batch`, as all others.
        min_size: as there.
        max_size: as there.
        divisor: as there.
        dtype: as there.
        rule: as there.

    Returns:
        The batch ``[N, C, H', W']``, and height and width of the pictures inside of it.
    """
    height, width = resized_size((images.shape[2], images.shape[3]), min_size, max_size, rule)
    if rule == "detectron2":
        images = normalize(_resize_levels(images, (height, width)), pixel_format)
    else:
        images = normalize(images, pixel_format)
        smooth = rule == "detpipe"
        images = F.interpolate(images, (height, width), mode="bilinear", align_corners=False, antialias=smooth)
    rows, columns = (
        torch.arange((side + divisor - 1) // divisor * divisor, device=images.device) for side in (height, width)
    )
    images = images.index_select(2, rows.clamp(max=height - 1)).index_select(3, columns.clamp(max=width - 1))
    images = torch.where((rows < height)[:, None] & (columns < width), images, 0.0)
    return images.to(dtype or images.dtype), (height, width)


def _stacked(images: Sequence[Tensor], contents: Sequence[Size | None] | None) -> Sequence[Tensor]:
    """Put images of one kind, size and content into one tensor, so that as many operations serve any number of them."""
    own = contents or [None] * len(images)
    alike = {
        (image.shape, image.dtype, image.stride(0) == 1, content and tuple(content))
        for image, content in zip(images, own, strict=True)
    }
    if len(images) == 1 or len(alike) > 1:
        return images
    if images[0].stride(0) == 1:  # the channels of a pixel lie side by side, and stay so
        return [torch.stack([image.movedim(0, -1) for image in images]).movedim(-1, 1)]
    return [torch.stack(list(images))]


def _resize(image: Tensor, size: Size, smooth: bool = True) -> Tensor:
    """Resize ``[..., C, H, W]`` bilinearly, on request smoothed where it shrinks; uint8 to the nearest gray level."""
    if size == tuple(image.shape[-2:]):
        return image
    shrinks = smooth and (size[0] < image.shape[-2] or size[1] < image.shape[-1])
    if image.dtype == torch.uint8:
        shrinks = smooth  # PyTorch rounds fractions as Pillow does in this case alone
    batch = image if image.ndim == 4 else image[None]
    if shrinks and size[1] == 1:  # torch (2.14) mixes up the rows of a single column, and fails for one pixel of bytes
        column = batch.mT.float() if image.dtype == torch.uint8 else batch.mT
        resized = F.interpolate(column, size[::-1], mode="bilinear", align_corners=False, antialias=True).mT
        resized = resized.round().to(torch.uint8) if image.dtype == torch.uint8 else resized
    else:
        resized = F.interpolate(batch, size, mode="bilinear", align_corners=False, antialias=shrinks)
    return resized if image.ndim == 4 else resized[0]


def _resize_levels(images: Tensor, size: Size) -> Tensor:
    """Resize ``[N, C, H, W]`` uint8 as PyTorch does, and Pillow, in whole numbers, but by operations that exported graphs have."""
    levels = images.double()
    for axis, length in ((3, size[1]), (2, size[0])):
        weights, unit = _whole_weights(images.shape[axis], length, images.device)
        levels = (levels if axis == 3 else levels.mT) @ weights.T
        levels = ((levels + unit / 2) / unit).floor().clamp(0, 255)
        levels = levels if axis == 3 else levels.mT
    return levels.to(torch.uint8)


def _whole_weights(old: int, new: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """How much each of the old pixels of an axis counts in each new one, ``[new, old]`` whole numbers, and what they add up to."""
    ratio = torch.arange(1, device=device, dtype=torch.float64) + old / new
    support = ratio.clamp(min=1)
    center = (torch.arange(new, device=device, dtype=torch.float64)[:, None] + 0.5) * ratio
    pixel = torch.arange(old, device=device, dtype=torch.float64)
    inside = (pixel >= (center - support + 0.5).floor()) & (pixel < (center + support + 0.5).floor())
    weights = (1 - ((pixel - center + 0.5) / support).abs()).clamp(min=0) * inside
    weights = weights / weights.sum(1, keepdim=True)
    powers = 2.0 ** torch.arange(1, 23, device=device, dtype=torch.float64)
    bits = ((weights.amax() * powers + 0.5).floor() < 2**15).sum()
    unit = 2.0 ** bits.double()
    return (weights * unit + 0.5).floor(), unit


def picture_sizes(images: Sequence[Tensor], contents: Sequence[Size | None] | None = None) -> list[Size]:
    """The height and width of the pictures in N images as passed, without the padding that the data may have added."""
    return [
        content or (image.shape[-2], image.shape[-1])
        for image, content in zip(images, contents or [None] * len(images), strict=True)
    ]


def contents_of(targets: Sequence[Target] | None) -> list[Size | None] | None:
    """Where the data have resized images: height and width of the pictures in them, None for one that is still to be resized."""
    if targets is None:
        return None
    contents = [target.get("content_size") for target in targets]
    return contents if any(content is not None for content in contents) else None


def targets_to_batch(targets: Sequence[Target], old: Sequence[Size], new: Sequence[Size]) -> list[Target]:
    """Make new targets with boxes, areas and proposals in the frame of the batch, of sizes ``new`` instead of ``old``.

    What came in half precision becomes float32, in which later stages compute with boxes.
    """
    moved = [cast(dict[str, Any], {**target}) for target in targets]
    factors = [(after[1] / before[1], after[0] / before[0]) for before, after in zip(old, new, strict=True)]
    areas = [(b[0] * b[1] / (a[0] * a[1]),) for a, b in zip(old, new, strict=True)]
    for key, own in (("boxes", factors), ("proposals", factors), ("area", areas)):
        having = [index for index, target in enumerate(moved) if key in target]
        values = [moved[index][key] for index in having]
        exact = [rows.to(torch.promote_types(rows.dtype, torch.float32)) for rows in values]
        scaled = _scaled(exact, [own[index] for index in having])
        for index, values in zip(having, scaled, strict=True):
            moved[index][key] = values
    return cast(list[Target], moved)


def _scaled(values: Sequence[Tensor], factors: Sequence[tuple[float, ...]]) -> Sequence[Tensor]:
    """Multiply the numbers of each tensor by its factors in turn (x, y, x, y), all tensors at once."""
    if all(factor == 1 for own in factors for factor in own):
        return values
    joined, each = torch.cat(list(values)), _of_rows(factors, values)
    numbers = joined.unflatten(-1, (-1, each.shape[1]))
    each = each.reshape(len(each), *(1,) * (numbers.ndim - 2), each.shape[1])
    return (numbers * each).flatten(-2).split([len(rows) for rows in values])


def _of_rows(numbers: Sequence[tuple[float, ...]], values: Sequence[Tensor]) -> Tensor:
    """Repeat the numbers of each tensor for its rows, without waiting for their device: ``[rows of all, ...]``."""
    counts = [len(rows) for rows in values]
    each = torch.tensor(numbers, dtype=values[0].dtype)
    repeated = each.repeat_interleave(torch.tensor(counts), dim=0, output_size=sum(counts))
    return repeated.to(values[0].device, non_blocking=True)


def detections_to_images(
    detections: Sequence[Detection], batch: Sequence[Size], images: Sequence[Size]
) -> list[Detection]:
    """Move detections from the frame of the batch, of sizes there, back to the images as passed, inside of which they are clipped.

    Their ``proposals`` and ``glimpses``, if any, are moved too, and may reach beyond the images.
    """
    if not detections:
        return []
    factors = [(new[1] / old[1], new[0] / old[0]) for old, new in zip(batch, images, strict=True)]
    boxes = _scaled([found["boxes"] for found in detections], factors)
    height, width = _of_rows(images, boxes).unbind(1)
    clipped = box_ops.clip(torch.cat(list(boxes)), height, width).split([len(rows) for rows in boxes])
    moved = [
        Detection(boxes=own, scores=found["scores"], labels=found["labels"])
        for own, found in zip(clipped, detections, strict=True)
    ]
    if "glimpses" not in detections[0]:
        return moved
    seen = cast(Sequence[GlimpsedDetection], detections)
    proposals = _scaled([found["proposals"] for found in seen], factors)
    glimpses = _scaled([found["glimpses"] for found in seen], factors)
    both = zip(moved, proposals, glimpses, strict=True)
    return [GlimpsedDetection(**one, proposals=rows, glimpses=outlines) for one, rows, outlines in both]


def detections_to_files(
    detections: Sequence[Detection], targets: Sequence[Target], back: bool = False
) -> list[Detection]:
    """Move detections from images that the data have resized, by their targets, to the image files, where ground truth is kept.

    Those of images that the data have not resized, or of which they have cut parts, stay as they are; ``back`` is the other way,
    such as to draw them into the images as passed.
    """
    moved = []
    for found, target in zip(detections, targets, strict=True):
        content, file = target.get("content_size"), target.get("file_size")
        if content is not None and file is not None:
            old, new = (file, content) if back else (content, file)
            [found] = detections_to_images([found], [old], [new])
        moved.append(found)
    return moved

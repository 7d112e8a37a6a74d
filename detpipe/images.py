"""The one place where coordinates change frame: image files <-> images as passed <-> the resized, normalized, padded batch.

Ren et al., "Faster R-CNN", 2015, arXiv 1506.01497, section 3.3: the shorter side becomes ``min_size`` unless the longer
one would exceed ``max_size``.

Convention: resizing maps the continuous frame, so a box is multiplied by (new width / width, new height / height).
Padding is added at the right and the bottom, with the value that normalization gives to the mean color: zero.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.models.detection.image_list import ImageList

from detpipe import boxes as box_ops
from detpipe.types import Detection, GlimpsedDetection, PixelFormat, Target

Size = tuple[int, int]  # height, width
# how an image is resized: sizes rounded and smoothed where it shrinks; rounded down and never smoothed; .5 rounded up, smoothed,
# and 8-bit images to whole gray levels, as Pillow does
ResizeRule = Literal["detpipe", "torchvision", "detectron2"]


def resized_size(size: Size, min_size: int, max_size: int, rule: ResizeRule = "detpipe") -> Size:
    """Compute the size of an image after resizing.

    Args:
        size: height and width in pixels.
        min_size: wanted length of the shorter side.
        max_size: the longer side never exceeds it.
        rule: how sizes become whole numbers; detectron2's also gives the shorter side in full.

    Returns:
        height and width, at least 1 each.

    Example:
        >>> resized_size((480, 640), 600, 1000)
        (600, 800)
    """
    height, width = size
    scale = min(min_size / min(height, width), max_size / max(height, width))
    if rule == "torchvision":
        return max(1, math.floor(height * scale)), max(1, math.floor(width * scale))
    if rule == "detectron2":  # two steps, each rounded in floating point
        scale = min_size / min(height, width)
        sides = (min_size, scale * width) if height < width else (scale * height, min_size)
        shrink = max_size / max(sides) if max(sides) > max_size else 1.0
        return max(1, int(sides[0] * shrink + 0.5)), max(1, int(sides[1] * shrink + 0.5))
    return max(1, round(height * scale)), max(1, round(width * scale))


def scale_boxes(boxes: Tensor, old: Size, new: Size) -> Tensor:
    """Move boxes from an image of one size to the same image at another size.

    Args:
        boxes: ``[..., 4]`` xyxy in pixels of the old image.
        old: its height and width.
        new: height and width after resizing.

    Returns:
        ``[..., 4]`` xyxy in pixels of the new image.
    """
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
        ``[..., C, H, W]`` floating point in the backbone's channel order.

    Raises:
        TypeError: the image is neither uint8 nor floating point.
    """
    if image.dtype == torch.uint8:
        image = image.to(torch.get_default_dtype()).mul_(pixel_format.value_range / 255.0)
    elif image.is_floating_point():
        image = image * pixel_format.value_range
    else:
        raise TypeError(f"images must be uint8 in 0..255 or floating point in 0..1, got {image.dtype}")
    if pixel_format.channel_order == "bgr":
        image = image.flip(-3)
    mean, std = (box_ops.constants(values, image) for values in (pixel_format.mean, pixel_format.std))
    rows = image.movedim(-3, -1).flatten(-2) if _channels_last(image) else None
    if rows is None:
        image.sub_(mean[:, None, None]).div_(std[:, None, None])
    else:  # [..., H, W * C]: a row at a time, since vector code wants more than three values
        rows.sub_(mean.repeat(image.shape[-1])).div_(std.repeat(image.shape[-1]))
    return image


def _channels_last(image: Tensor) -> bool:
    """Whether the channels of a pixel lie side by side in memory, and pixels row by row, as decoders give them."""
    return image.movedim(-3, -1).is_contiguous()


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
        dtype: of the batch, that of the backbone; None keeps that of the first image, the default one of uint8.
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
        canvas: Size = (image.shape[1], image.shape[2])
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
            image = normalize(image, pixel_format)[:, : content[0], : content[1]]
        resized.append(image)
        canvases.append(canvas)
    height, width = (-(-max(canvas[axis] for canvas in canvases) // divisor) * divisor for axis in (0, 1))
    layout = torch.channels_last if all(image.stride(0) == 1 for image in resized) else torch.contiguous_format
    kind = {"dtype": dtype or resized[0].dtype, "device": resized[0].device}
    batch = torch.empty((len(resized), channels, height, width), memory_format=layout, **kind).zero_()
    for row, image in zip(batch, resized, strict=True):
        row[:, : image.shape[1], : image.shape[2]] = image
    return ImageList(batch, [(image.shape[1], image.shape[2]) for image in resized])


def _resize(image: Tensor, size: Size, smooth: bool = True) -> Tensor:
    """Resize ``[C, H, W]`` bilinearly, on request smoothed where it shrinks; uint8 to the nearest gray level."""
    if size == tuple(image.shape[1:]):
        return image
    shrinks = smooth and size[0] < image.shape[1]
    if image.dtype == torch.uint8:
        shrinks = smooth  # PyTorch rounds fractions as Pillow does in this case alone
    return F.interpolate(image[None], size, mode="bilinear", align_corners=False, antialias=shrinks)[0]


def picture_sizes(images: Sequence[Tensor], contents: Sequence[Size | None] | None = None) -> list[Size]:
    """The height and width of the pictures in images as passed.

    Args:
        images: N tensors ``[C, H_i, W_i]``.
        contents: see :func:`contents_of`.

    Returns:
        N sizes, without the padding that the data may have added.
    """
    return [
        content or (image.shape[-2], image.shape[-1])
        for image, content in zip(images, contents or [None] * len(images), strict=True)
    ]


def contents_of(targets: Sequence[Target] | None) -> list[Size | None] | None:
    """Where the data have resized images: height and width of the pictures in them.

    Args:
        targets: N targets, or None where nothing is known of the images.

    Returns:
        N sizes, None for each image that is still to be resized; or None where all are.
    """
    if targets is None:
        return None
    contents = [target.get("content_size") for target in targets]
    return contents if any(content is not None for content in contents) else None


def targets_to_batch(targets: Sequence[Target], old: Sequence[Size], new: Sequence[Size]) -> list[Target]:
    """Move the boxes, areas and proposals of targets into the frame of the batch.

    Args:
        targets: N targets in pixels of the images as passed.
        old: height and width of the images as passed.
        new: their height and width in the batch.

    Returns:
        N new targets; the ones given are left as they are.
    """
    moved = []
    for target, before, after in zip(targets, old, new, strict=True):
        changed = Target()
        if "boxes" in target:
            changed["boxes"] = scale_boxes(target["boxes"], before, after)
        if "proposals" in target:
            changed["proposals"] = scale_boxes(target["proposals"], before, after)
        if "area" in target:
            changed["area"] = target["area"] * (after[0] * after[1] / (before[0] * before[1]))
        moved.append(cast(Target, {**target, **changed}))
    return moved


def detections_to_images(
    detections: Sequence[Detection], batch: Sequence[Size], images: Sequence[Size]
) -> list[Detection]:
    """Move detections from the frame of the batch back to the images as passed.

    Args:
        detections: N detections in pixels of the batch.
        batch: height and width of each image in the batch.
        images: height and width of the images as passed.

    Returns:
        N new detections, inside the images: rounding of the scale is clipped off. Their ``proposals`` and ``glimpses``, if
        any, are moved too, and may reach beyond the images.
    """
    moved = []
    for found, old, new in zip(detections, batch, images, strict=True):
        boxes = box_ops.clip(scale_boxes(found["boxes"], old, new), *new)
        one = Detection(boxes=boxes, scores=found["scores"], labels=found["labels"])
        if "glimpses" in found:
            seen = cast(GlimpsedDetection, found)
            factors = box_ops.constants((new[1] / old[1], new[0] / old[0]), seen["glimpses"])
            proposals = scale_boxes(seen["proposals"], old, new)
            one = GlimpsedDetection(**one, proposals=proposals, glimpses=seen["glimpses"] * factors)
        moved.append(one)
    return moved


def detections_to_files(
    detections: Sequence[Detection], targets: Sequence[Target], back: bool = False
) -> list[Detection]:
    """Move detections from images that the data have resized to the image files, where ground truth is kept.

    Args:
        detections: N detections in pixels of the images as passed.
        targets: of these images.
        back: move them the other way, such as to draw them into the images as passed.

    Returns:
        N detections in pixels of the image files; those of images that the data have not resized, or of which they have cut parts,
        as they are.
    """
    moved = []
    for found, target in zip(detections, targets, strict=True):
        content, file = target.get("content_size"), target.get("file_size")
        if content is not None and file is not None:
            old, new = (file, content) if back else (content, file)
            [found] = detections_to_images([found], [old], [new])
        moved.append(found)
    return moved

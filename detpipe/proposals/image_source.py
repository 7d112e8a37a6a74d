"""Boxes made from the pixels of one image: the base of all sources that need neither training nor features.

The same object makes boxes ahead of training, image by image (:meth:`ImageProposals.propose`), and takes a place in the
detector (:meth:`ImageProposals.forward`). Ahead, it sees the image file; in the detector, the resized image.
"""

from __future__ import annotations

import inspect
from abc import abstractmethod
from typing import Any, ClassVar, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from detpipe import images as frames
from detpipe.stages import ImageList, Losses, ProposalSource
from detpipe.support.errors import DataError
from detpipe.support.numbers import check_numbers, check_whole
from detpipe.types import Features, PixelFormat, Target

Image = npt.NDArray[np.uint8]  # [H, W, 3] RGB
Floats = npt.NDArray[np.float32]


class Candidates(NamedTuple):
    """Boxes as an algorithm finds them, in any order, with duplicates."""

    boxes: Floats  # [P, 4] xyxy in pixels of the image
    scores: Floats  # [P] higher is better


class ImageProposals(ProposalSource):
    """Propose boxes for an image from its pixels.

    A subclass says how to `find` boxes. Each argument of its constructor is kept in an attribute of the same name: together they
    are the `settings` that a proposal store remembers.

    Args:
        max_boxes: keep at most this many of an image, the best ones; None keeps all.
        min_size: leave out boxes that are less wide or less high, in pixels of the image.
        pixel_format: how the images of a batch were normalized: that of the backbone; None for the default one.

    Raises:
        ValueError: ``max_boxes`` is not positive, or ``min_size`` is negative.
    """

    name: str  # what stores and commands call the source
    smallest_image: ClassVar[int] = 1  # a side below this cannot be worked on, in pixels

    def __init__(self, max_boxes: int | None, min_size: float, pixel_format: PixelFormat | None = None) -> None:
        super().__init__()
        check_whole(max_boxes=max_boxes)
        check_numbers("must not be negative or infinite", min_size=min_size)
        self.max_boxes, self.min_size, self.pixel_format = max_boxes, min_size, pixel_format or PixelFormat()

    def set_pixel_format(self, pixel_format: PixelFormat) -> None:
        """Tell how the images of a batch are normalized."""
        self.pixel_format = pixel_format

    @abstractmethod
    def find(self, image: Image) -> Candidates:
        """Find boxes in ``[H, W, 3]`` contiguous uint8 RGB, the same ones for the same image."""

    @property
    def settings(self) -> dict[str, Any]:
        """What decides about the boxes, as JSON can hold it."""
        return {
            name: _plain(getattr(self, name))
            for name in inspect.signature(type(self)).parameters
            if name != "pixel_format"
        }

    def propose(self, image: Image) -> tuple[Floats, Floats]:
        """Propose boxes for one image.

        Args:
            image: ``[H, W, 3]`` uint8 RGB.

        Returns:
            Boxes ``[P, 4]`` xyxy in pixels of the image, best first, each once, and scores ``[P]``, not ascending.

        Raises:
            ValueError: the image has another shape or type.
            DataError: the image is too small to be worked on.
        """
        if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
            raise ValueError(f"an image must be uint8 [H, W, 3], got {image.dtype} {list(image.shape)}")
        height, width = image.shape[:2]
        if min(height, width) < self.smallest_image:
            raise DataError(
                f"an image of {width} x {height} pixels is too small for {self.name}, which needs at least "
                f"{self.smallest_image} pixels a side; leave it out, or enlarge it"
            )
        found = self.find(np.ascontiguousarray(image))
        return select(found, (height, width), self.min_size, self.max_boxes)

    @torch.compiler.disable
    @torch.no_grad()
    def forward(
        self, images: ImageList, features: Features, targets: list[Target] | None = None
    ) -> tuple[list[Tensor], Losses]:
        """Propose boxes for each image of a batch, from its resized pixels.

        Returns:
            N tensors ``[P_i, 4]`` xyxy in pixels of the batch, of its type, float32 at least, best first, and no losses.

        Raises:
            DataError: an image is too small to be worked on; it is named where the targets say its name.
        """
        boxes = []
        for index, (tensor, (height, width)) in enumerate(zip(images.tensors, images.image_sizes, strict=True)):
            pixels = frames.to_pixels(tensor[:, :height, :width], self.pixel_format).permute(1, 2, 0)
            try:
                found, _ = self.propose(pixels.cpu().numpy())
            except DataError as error:
                target = Target() if targets is None else targets[index]
                name = target.get("file_name", target.get("image_id", f"{index} of the batch"))
                raise DataError(f"image {name}: {error}") from error
            dtype = torch.promote_types(tensor.dtype, torch.float32)  # in bfloat16, 301.3 pixels would be 302
            boxes.append(torch.from_numpy(found).to(tensor.device, dtype))
        return boxes, {}


def select(
    found: Candidates, size: tuple[int, int], min_size: float = 0.0, max_boxes: int | None = None
) -> tuple[Floats, Floats]:
    """Sort boxes, and leave out what is outside an image of a size (height, width), too small, there twice, or too many.

    Returns:
        Boxes ``[P, 4]`` float32, best first, and scores ``[P]`` float32. Of equal scores the first one given comes first.

    Example:
        >>> found = Candidates(np.float32([[0, 0, 4, 4], [0, 0, 9, 4], [0, 0, 4, 4]]), np.float32([1, 3, 2]))
        >>> select(found, (4, 8))[0].tolist()
        [[0.0, 0.0, 8.0, 4.0], [0.0, 0.0, 4.0, 4.0]]
    """
    height, width = size
    boxes = np.clip(found.boxes.reshape(-1, 4).astype(np.float32), 0, np.array([width, height] * 2, np.float32))
    sides = boxes[:, 2:] - boxes[:, :2]
    usable = ((sides >= min_size) & (sides > 0)).all(axis=1)
    boxes, scores = boxes[usable], found.scores[usable].astype(np.float32)
    order = np.argsort(-scores, kind="stable")
    boxes, scores = boxes[order], scores[order]
    kept = np.sort(np.unique(boxes, axis=0, return_index=True)[1])[:max_boxes]
    return boxes[kept], scores[kept]


def _plain(value: Any) -> Any:
    """Turn an argument into what JSON can hold."""
    if isinstance(value, ImageProposals):
        return {"source": value.name, "settings": value.settings}
    if isinstance(value, torch.nn.ModuleList | list | tuple):
        return [_plain(item) for item in value]
    return value

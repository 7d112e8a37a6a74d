"""Superpixels of images: small regions of even color that follow the borders of objects.

SLIC: Achanta et al., "SLIC Superpixels Compared to State-of-the-art Superpixel Methods", 2012, as implemented by scikit-image.

N images, H x W pixels.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torchvision.models.detection.image_list import ImageList

from detpipe import images as frames
from detpipe.support.errors import UsageError
from detpipe.support.numbers import check_numbers, check_whole
from detpipe.types import PixelFormat

Image = npt.NDArray[np.uint8]  # [H, W, 3] RGB
Ints = npt.NDArray[np.int32]

OUTSIDE = -1  # the label of what is padding


def slic(image: Image, segments: int = 200, compactness: float = 10.0) -> Ints:
    """Divide an image ``[H, W, 3]`` uint8 RGB into about ``segments`` superpixels; compactness makes them more like squares.

    Returns:
        ``[H, W]`` the superpixel of each pixel, numbered from 0 without gaps; the same ones for the same image.

    Raises:
        UsageError: scikit-image is not installed.
    """
    check_scikit_image("superpixels by SLIC")
    from skimage.segmentation import slic as divide

    return renumber(divide(image, n_segments=segments, compactness=compactness, start_label=0))


def renumber(labels: npt.NDArray[np.integer]) -> Ints:
    """Number regions from 0 without gaps, in the same order.

    Example:
        >>> renumber(np.array([[7, 7, 2]])).tolist()
        [[1, 1, 0]]
    """
    return np.unique(labels, return_inverse=True)[1].reshape(labels.shape).astype(np.int32)


def check_scikit_image(source: str) -> None:
    """Raise UsageError if scikit-image is missing, and say what for and how to install it."""
    try:
        import skimage.segmentation  # noqa: F401
    except ImportError as error:
        raise UsageError(
            f"{source} needs scikit-image, which is not installed: pip install 'detpipe[proposals]'"
        ) from error


@dataclass(frozen=True)
class Segmentation:
    """How images are divided into superpixels, by SLIC.

    Args:
        segments: superpixels an image, about; at least 2.
        compactness: larger values make them more like squares.
        cache_megabytes: label maps that are kept in memory for when the same pixels come again, as in the next epoch; where
            images are flipped, cropped or colored at random they hardly ever do.

    Raises:
        ValueError: a number outside its range.
    """

    segments: int = 200
    compactness: float = 10.0
    cache_megabytes: int = 256

    def __post_init__(self) -> None:
        check_whole(2, segments=self.segments)
        check_numbers("must be positive and finite", compactness=self.compactness)
        check_whole(0, cache_megabytes=self.cache_megabytes)


class Segmenter:
    """Divides images into superpixels, and remembers those it has seen by their pixels."""

    def __init__(self, settings: Segmentation = Segmentation()) -> None:
        self.settings = settings
        self.computed = 0  # images that were not remembered
        self._kept: OrderedDict[bytes, npt.NDArray[np.integer]] = OrderedDict()  # least recently used first
        self._bytes = 0

    def __call__(self, image: Tensor) -> Ints:
        """Divide one image ``[3, H, W]`` uint8 RGB: ``[H, W]``, from 0 without gaps.

        Raises:
            ValueError: an image of another shape or type.
            UsageError: scikit-image is not installed.
        """
        if image.dtype != torch.uint8 or image.ndim != 3 or image.shape[0] != 3 or 0 in image.shape:
            raise ValueError(f"an image must be uint8 [3, H, W], got {image.dtype} {list(image.shape)}")
        pixels = np.ascontiguousarray(image.permute(1, 2, 0).cpu().numpy())
        key = hashlib.blake2b(repr(pixels.shape).encode() + pixels.tobytes(), digest_size=16).digest()
        if key in self._kept:
            self._kept.move_to_end(key)
            return self._kept[key].astype(np.int32)
        self.computed += 1
        labels = slic(pixels, self.settings.segments, self.settings.compactness)
        self._keep(key, labels.astype(np.int16) if labels.max() < 2**15 else labels)
        return labels

    def batch(self, images: ImageList, pixel_format: PixelFormat) -> tuple[Tensor, int]:
        """Divide the images of a batch that were normalized in a pixel format.

        Returns:
            ``[N, H, W]`` int32 on the device of the images, -1 in the padding; and the largest number of superpixels.
        """
        tensors = images.tensors
        labels = torch.full((tensors.shape[0], *tensors.shape[-2:]), OUTSIDE, dtype=torch.int32)
        for row, image, (height, width) in zip(labels, tensors, images.image_sizes, strict=True):
            pixels = frames.to_pixels(image[:, :height, :width], pixel_format)
            row[:height, :width] = torch.from_numpy(self(pixels))
        return labels.to(tensors.device), int(labels.max()) + 1 if labels.numel() else 0

    def _keep(self, key: bytes, labels: npt.NDArray[np.integer]) -> None:
        self._kept[key] = labels
        self._bytes += labels.nbytes
        while self._bytes > self.settings.cache_megabytes * 2**20:
            self._bytes -= self._kept.popitem(last=False)[1].nbytes

"""Parts of an image: what large images are read by, whether they lie in memory or in a file that never does as a whole."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from detpipe.images import Size


class Windows(ABC):
    """An image that is read part by part."""

    size: Size  # height and width of the whole image

    @abstractmethod
    def read(self, top: int, left: int, height: int, width: int) -> Tensor:
        """Read the part from row ``top`` and column ``left`` on, which lies inside: ``[C, height, width]``."""

    def whole(self) -> Tensor:
        """Read the whole image, ``[C, H, W]``."""
        return self.read(0, 0, *self.size)

    def reduced(self, side: int) -> tuple[Tensor, int]:
        """The whole image, each pixel the mean of a square, with a longer side of at least ``side`` pixels where it has so many.

        ``[C, ceil(H / f), ceil(W / f)]`` of the type of the image, and f; no more than a few rows of squares are read at a time.
        """
        height, width = self.size
        factor = max(1, max(height, width) // side)
        if factor == 1:
            return self.whole(), 1
        step = factor * max(1, side // 4)
        rows = [
            torch.cat([_mean(self._part(top, left, step), factor) for left in range(0, width, step)], dim=2)
            for top in range(0, height, step)
        ]
        return torch.cat(rows, dim=1), factor

    def _part(self, top: int, left: int, step: int) -> Tensor:
        return self.read(top, left, min(step, self.size[0] - top), min(step, self.size[1] - left))


@dataclass(frozen=True)
class ImageWindows(Windows):
    """Parts of an image ``[C, H, W]`` in memory, which are not copied."""

    image: Tensor

    @property
    def size(self) -> Size:  # type: ignore[override]
        """Height and width."""
        return self.image.shape[1], self.image.shape[2]

    def read(self, top: int, left: int, height: int, width: int) -> Tensor:
        """A view of the part."""
        return self.image[:, top : top + height, left : left + width]

    def reduced(self, side: int) -> tuple[Tensor, int]:
        """The image as it is, which a detector resizes by its own rule."""
        return self.image, 1


def _mean(image: Tensor, factor: int) -> Tensor:
    """``[C, H, W]`` -> ``[C, ceil(H / factor), ceil(W / factor)]``; squares at the border are means of what they have."""
    pool = torch.nn.functional.avg_pool2d
    mean = pool(image[None].float(), factor, ceil_mode=True, count_include_pad=False)[0]
    return mean.to(image.dtype) if image.is_floating_point() else mean.round().to(image.dtype)

"""What the pixels say about a box: where an object is seen after a transform, found by painting it alone.

Everything is transformed twice with the same draws: once all black, once with one object white. What differs is the object,
whatever ground, other objects or other images it was put together with.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from hypothesis import strategies as st
from torch import Tensor

from detpipe.datasets import Augment
from detpipe.datasets.augment.settings import Neighbors
from detpipe.types import Target

FIRST_LABEL = 2**24 + 1  # the next whole number that float32 has is two further


@dataclass(frozen=True)
class Drawn:
    """An image that is only described: its size and boxes [x1, y1, x2, y2] in whole pixels."""

    height: int
    width: int
    boxes: tuple[tuple[int, int, int, int], ...]
    crowd: tuple[bool, ...] = ()
    difficult: tuple[bool, ...] = ()
    proposals: bool = True  # one at each box

    def target(self, number: int, label: int) -> Target:
        G = len(self.boxes)
        boxes = torch.tensor(self.boxes, dtype=torch.float32).reshape(-1, 4)
        target = Target(
            boxes=boxes,
            labels=torch.arange(G) + label,
            image_id=number,
            iscrowd=torch.tensor(self.crowd or [False] * G, dtype=torch.bool),
            difficult=torch.tensor(self.difficult or [False] * G, dtype=torch.bool),
            area=(boxes[:, 2:] - boxes[:, :2]).prod(1) / 2,
            file_name=f"{number}.png",
        )
        if self.proposals:
            target["proposals"] = boxes.clone()
        return target

    def in_channels(self) -> Tensor:
        """Up to three objects, each white in a channel of its own on black, so that they may overlap."""
        image = torch.zeros(3, self.height, self.width, dtype=torch.uint8)
        for channel, (x1, y1, x2, y2) in enumerate(self.boxes):
            image[channel, y1:y2, x1:x2] = 255
        return image

    def masks(self) -> npt.NDArray[np.bool_]:
        masks = np.zeros((len(self.boxes), self.height, self.width), dtype=bool)
        for mask, (x1, y1, x2, y2) in zip(masks, self.boxes, strict=True):
            mask[y1:y2, x1:x2] = True
        return masks


def transformed(
    augment: Augment, images: Sequence[Drawn], seed: int | Sequence[int], painted: int | None = None
) -> tuple[Tensor, Target]:
    """Transform the first image; objects are counted over all images, and one of them is painted."""
    firsts = np.cumsum([0, *(len(image.boxes) for image in images)]).tolist()

    def read(index: int) -> tuple[Tensor, Target]:
        image = images[index]
        pixels = torch.zeros(3, image.height, image.width, dtype=torch.uint8)
        if painted is not None and firsts[index] <= painted < firsts[index + 1]:
            x1, y1, x2, y2 = image.boxes[painted - firsts[index]]
            pixels[:, y1:y2, x1:x2] = 255
        return pixels, image.target(index, FIRST_LABEL + firsts[index])

    image, target = read(0)
    return augment(image, target, seed, Neighbors(len(images), 0, read, lambda index: images[index].masks()))


def seen(
    augment: Augment, images: Sequence[Drawn], seed: int | Sequence[int], painted: int, part: float = 0.5
) -> npt.NDArray[np.bool_]:
    """[H, W] where an object is seen: more than ``part`` of its strongest trace."""
    black = transformed(augment, images, seed)[0].numpy().astype(int)
    white = transformed(augment, images, seed, painted)[0].numpy().astype(int)
    assert black.shape == white.shape
    trace = np.abs(white - black).max(0)
    return trace > max(part * trace.max(), 12)  # less is no more than an edge between pixels


def extents(mask: npt.NDArray[np.bool_]) -> list[int] | None:
    rows, columns = np.nonzero(mask)
    if len(rows) == 0:
        return None
    return [int(columns.min()), int(rows.min()), int(columns.max()) + 1, int(rows.max()) + 1]


def left(target: Target) -> dict[int, list[list[float]]]:
    """Object -> its boxes, of those that are left; there are several where an image was drawn twice."""
    boxes: dict[int, list[list[float]]] = {}
    for label, box in zip(target["labels"].tolist(), target["boxes"].tolist(), strict=True):
        boxes.setdefault(label - FIRST_LABEL, []).append(box)
    return boxes


def check_against_pixels(
    augment: Augment,
    images: Sequence[Drawn],
    seed: int | Sequence[int],
    tolerance: float,
    tight: Callable[[list[int], tuple[int, int]], bool] = lambda seen, size: True,
    complete: bool = True,
    part: float = 0.5,
) -> int:
    """Compare each box with where its object is seen.

    Args:
        augment: removes boxes that are not seen only (min_visibility 0).
        images: the first is transformed.
        seed: of the draws.
        tolerance: pixels at each side.
        tight: whether a box seen at these extents in an image of this size must reach no further than the pixels.
        complete: whether all that is seen must have a box.
        part: as for :func:`seen`.

    Returns:
        How many boxes were compared.
    """
    image, target = transformed(augment, images, seed)
    height, width = image.shape[1:]
    boxes, compared = left(target), 0
    for k in range(sum(len(one.boxes) for one in images)):
        where, found = extents(seen(augment, images, seed, k, part)), boxes.get(k, [])
        if where is None:
            assert all(min(np.subtract(box[2:], box[:2])) <= 2 for box in found), f"{found} show nothing"
        elif not found:
            assert not complete or min(where[2] - where[0], where[3] - where[1]) <= 2, f"{where} is seen, without a box"
        elif len(found) == 1:
            beyond = np.subtract(found[0], where) * [-1, -1, 1, 1]  # how far the box reaches further than the pixels
            assert beyond.min() >= -tolerance, f"pixels at {where}, box {found[0]}"
            if tight(where, (height, width)):
                assert beyond.max() <= tolerance, f"pixels at {where}, box {found[0]}"
            compared += 1
    return compared


@st.composite
def drawn_images(draw: st.DrawFn, count: int = 1, least: int = 0, most: int = 3) -> list[Drawn]:
    """Images of 60 to 140 pixels with up to three objects of 12 pixels and more, some of them at the border."""
    images = []
    for _ in range(count):
        height, width = draw(st.integers(60, 140)), draw(st.integers(60, 140))
        boxes = []
        for _ in range(draw(st.integers(least, most))):
            x, y = draw(st.integers(0, width - 12)), draw(st.integers(0, height - 12))
            boxes.append((x, y, draw(st.integers(x + 12, width)), draw(st.integers(y + 12, height))))
        flags = st.lists(st.booleans(), min_size=len(boxes), max_size=len(boxes)).map(tuple)
        images.append(Drawn(height, width, tuple(boxes), draw(flags), draw(flags)))
    return images

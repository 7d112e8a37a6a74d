"""An image on its way through the augmentation, with everything that must stay in step with it.

What is said of an object (label, flags) never goes through a transform: boxes carry the row where it stands. So labels keep all
their digits, and boxes that several images brought together keep what is theirs.

Images and boxes move by the same maps of one rectangle of whole pixels, ``x1, y1, x2, y2`` with right and lower edge excluded, onto
another. Importing this module imports OpenCV.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from detpipe.boxes import area as box_area
from detpipe.types import Target

Rectangle = tuple[int, int, int, int]
Pixels = npt.NDArray[Any]  # uint8, or float32 in 0..1
Boxes = npt.NDArray[np.float64]

cv2.setNumThreads(0)  # data workers are what runs in parallel; threads of OpenCV do not survive a fork

_LEAST = 0.01  # pixels: a box with a smaller side has left the image
_ROUNDING = 1e-6
_TENSORS = ("boxes", "labels", "iscrowd", "difficult", "area", "proposals")


@dataclass(frozen=True)
class Scene:
    """An image, and the boxes that are in it now: objects and proposals in one stack of M, so that both move alike."""

    image: Pixels  # ``[H, W, C]`` uint8, or float32 in 0..1
    # what is known of the objects and proposals, with boxes as they were in their image file; not changed
    target: Target
    # ``[M, 4]`` xyxy where they are now; they may reach beyond the image, so that what is lost can be measured
    boxes: npt.NDArray[np.float64]
    rows: npt.NDArray[np.int64]  # ``[M]`` which object of the target each box is, 0..G-1; G and more for proposals
    share: npt.NDArray[np.float64]  # ``[M]`` the part of each box that earlier steps have left of it, 0 to 1

    @property
    def size(self) -> tuple[int, int]:
        """Height and width."""
        return self.image.shape[0], self.image.shape[1]

    @property
    def objects(self) -> int:
        """G, the number of objects of the target."""
        return len(boxes_of(self.target))

    def flagged(self, name: str) -> npt.NDArray[np.bool_]:
        """``[M]`` which boxes are of objects with a flag, ``"iscrowd"`` or ``"difficult"``."""
        flags = np.zeros(int(self.rows.max(initial=-1)) + 1, dtype=bool)
        if (known := self.target.get(name)) is not None:
            flags[: len(known)] = known.numpy()[: len(flags)]
        return flags[self.rows]

    def take(self, places: npt.NDArray[Any]) -> Scene:
        """Keep some of the boxes; ``places`` are indices or ``[M]`` bool."""
        return replace(self, boxes=self.boxes[places], rows=self.rows[places], share=self.share[places])


def boxes_of(target: Target) -> Tensor:
    """The boxes of a target, ``[0, 4]`` where it has none."""
    return target.get("boxes", torch.empty(0, 4))


def scene_of(image: Tensor, target: Target) -> Scene:
    """Begin with one image ``[C, H, W]``, uint8 or float32 in 0..1, whose memory is not shared.

    Boxes are in pixels of the image: they are clipped to it, and those outside are left out.
    """
    height, width = image.shape[1:]
    both = torch.cat([boxes_of(target), target.get("proposals", torch.empty(0, 4))]).double().numpy()
    boxes = both.clip(0, [width, height, width, height])
    rows = np.flatnonzero((boxes[:, 2:] > boxes[:, :2]).all(1))
    pixels = np.array(image.permute(1, 2, 0).numpy(), order="C")
    return Scene(pixels, target, boxes[rows], rows, np.ones(len(rows)))


def pool(scenes: Sequence[Scene], image: Pixels) -> Scene:
    """Bring the objects and proposals of several scenes together, in their order, into the frame of an image ``[H, W, C]``.

    ``image_id`` and ``file_name`` are those of the first. A ValueError if some targets say things that others do not, such as
    flags.
    """
    first = scenes[0].target
    target = first.copy()
    for name in _TENSORS:
        values: list[Tensor] = [scene.target[name] for scene in scenes if name in scene.target]  # type: ignore[literal-required]
        if values and len(values) != len(scenes):
            have = [str(scene.target.get("file_name", "?")) for scene in scenes if name in scene.target]
            raise ValueError(
                f"images to be combined must say the same of their objects: only {', '.join(have)} have {name}"
            )
        if values:
            target[name] = torch.cat(values)  # type: ignore[literal-required]
    objects = [scene.objects for scene in scenes]
    proposals = [len(scene.target.get("proposals", ())) for scene in scenes]
    rows = []
    for k, scene in enumerate(scenes):
        of_object = sum(objects[:k])
        of_proposal = sum(objects) + sum(proposals[:k]) - objects[k]
        rows.append(scene.rows + np.where(scene.rows < objects[k], of_object, of_proposal))
    return Scene(
        image,
        target,
        np.concatenate([scene.boxes for scene in scenes]),
        np.concatenate(rows),
        np.concatenate([scene.share for scene in scenes]),
    )


def finish(scene: Scene, min_visibility: float) -> tuple[Tensor, Target]:
    """Clip the boxes, remove those of which less than ``min_visibility`` (0 to 1) is left, and look up what is said of the rest.

    The image ``[C, H, W]``, and its target; the area shrinks and grows with the box.
    """
    height, width = scene.size
    inside = scene.boxes.clip(0, [width, height, width, height])
    sides, before = inside[:, 2:] - inside[:, :2], scene.boxes[:, 2:] - scene.boxes[:, :2]
    visible = scene.share * sides.prod(1) / before.prod(1).clip(min=1e-12)
    keep = (sides > _LEAST).all(1) & (visible >= min_visibility - _ROUNDING)
    boxes, rows = torch.from_numpy(inside[keep]).float(), torch.from_numpy(scene.rows[keep])
    sized = (boxes[:, 2:] > boxes[:, :2]).all(1)  # in float32 as well
    boxes, rows = boxes[sized], rows[sized]
    is_object = rows < scene.objects
    target, kept = scene.target.copy(), rows[is_object]
    target["boxes"] = boxes[is_object]
    for name in ("labels", "iscrowd", "difficult"):
        if (values := scene.target.get(name)) is not None:
            target[name] = values[kept]
    if (area := scene.target.get("area")) is not None:
        target["area"] = area[kept] * box_area(target["boxes"]) / box_area(boxes_of(scene.target)[kept])
    if "proposals" in scene.target:
        target["proposals"] = boxes[~is_object]
    return torch.from_numpy(np.ascontiguousarray(scene.image)).permute(2, 0, 1), target


def resize(image: Pixels, source: Rectangle, goal: Rectangle) -> Pixels:
    """Cut a rectangle out of ``[H, W(, C)]``, uint8 or float32, and resize it to the size of another: averaged where it shrinks."""
    x1, y1, x2, y2 = source
    u1, v1, u2, v2 = goal
    shrinks = (u2 - u1) * (v2 - v1) < (x2 - x1) * (y2 - y1)
    interpolation = cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR
    cut, size = image[y1:y2, x1:x2], (u2 - u1, v2 - v1)
    # OpenCV averages no more than four channels, and drops the axis of a single one
    parts = [cut] if cut.ndim == 2 else [cut[:, :, k : k + 4] for k in range(0, cut.shape[2], 4)]
    out = [np.asarray(cv2.resize(part, size, interpolation=interpolation), dtype=image.dtype) for part in parts]
    if cut.ndim == 2:
        return out[0]
    return out[0].reshape(*size[::-1], -1) if len(out) == 1 else np.dstack(out)


def move(boxes: Boxes, source: Rectangle, goal: Rectangle) -> Boxes:
    """Move boxes ``[M, 4]`` xyxy, which may reach beyond the source, into the frame of the goal, as :func:`resize` moves pixels."""
    start, length = np.array(source[:2]), np.subtract(source[2:], source[:2])
    to, reach = np.array(goal[:2]), np.subtract(goal[2:], goal[:2])
    return (boxes - np.tile(start, 2)) * np.tile(reach / length, 2) + np.tile(to, 2)


def cut(scene: Scene, source: Rectangle, goal: Rectangle) -> Scene:
    """Move the boxes of a scene into a rectangle of another frame, and cut them off at its edge; those outside are left out."""
    whole = move(scene.boxes, source, goal)
    boxes = clip(whole, goal)
    left = areas(boxes)
    share = scene.share * np.minimum(1, left / areas(whole).clip(min=1e-12))
    return replace(scene, boxes=boxes, share=share).take(left > 0)


def crop(scene: Scene, window: Rectangle) -> Scene:
    """Keep what is in a window."""
    x1, y1, x2, y2 = window
    return replace(cut(scene, window, (0, 0, x2 - x1, y2 - y1)), image=scene.image[y1:y2, x1:x2])


def flip(scene: Scene, axis: int) -> Scene:
    """Mirror left to right (axis 1) or top to bottom (0)."""
    low, boxes = 1 - axis, scene.boxes.copy()
    boxes[:, [low, low + 2]] = scene.size[axis] - boxes[:, [low + 2, low]]
    return replace(scene, image=np.ascontiguousarray(np.flip(scene.image, axis)), boxes=boxes)


def random_place(random: np.random.Generator, size: tuple[int, int], width: int, height: int) -> Rectangle:
    """A rectangle of some width and height at a random place of an image of a size."""
    x, y = int(random.integers(0, size[1] - width + 1)), int(random.integers(0, size[0] - height + 1))
    return x, y, x + width, y + height


def areas(boxes: Boxes) -> npt.NDArray[np.float64]:
    """Areas ``[M]`` of boxes ``[M, 4]``; 0 where a box has no size."""
    return (boxes[:, 2:] - boxes[:, :2]).clip(min=0).prod(1)


def clip(boxes: Boxes, frame: Rectangle | Boxes) -> Boxes:
    """Cut boxes ``[M, 4]`` off at a rectangle, or each at one of its own; those outside are left without a size."""
    corners = np.asarray(frame)
    return boxes.clip(np.tile(corners[..., :2], 2), np.tile(corners[..., 2:], 2))

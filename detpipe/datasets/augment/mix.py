"""Copy-paste, mosaic and mix-up, and the order of everything that takes several images; importing this module imports OpenCV.

Every step draws from a stream of its own, so that turning one on does not change what another draws. Only what is drawn is read.

Copy-paste: objects of another image, cut out along their masks, put into this one.

Ghiasi et al., "Simple Copy-Paste is a Strong Data Augmentation Method for Instance Segmentation", 2021, arXiv 2012.07177.
Differences: edges are not smoothed, which the paper found to make no difference; only the image that is pasted from is resized,
this one is left to the steps that follow.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import torch

from detpipe.boxes import iou
from detpipe.datasets.augment.sample import (
    Rectangle,
    Scene,
    areas,
    clip,
    cut,
    flip,
    move,
    pool,
    random_place,
    resize,
    scene_of,
)
from detpipe.datasets.augment.settings import Combine, CopyPaste, Mosaic, Neighbors

Masks = npt.NDArray[np.bool_]  # [A, H, W]

_OF_OBJECT = 0.5  # IoU from which a proposal is taken to be of a pasted object, and moves with it
_FEWEST = 4  # pixels: an object that shows fewer is not pasted
_WEIGHTS = (0.2, 0.8)  # of a blend; beyond, an image is hardly seen, but its boxes are trained


def paste(
    settings: CopyPaste,
    scene: Scene,
    neighbors: Neighbors,
    index: int,
    random: np.random.Generator,
    min_visibility: float = 0.0,
) -> Scene:
    """Paste objects of the image of an index into a scene that is as in its file.

    Boxes of objects below shrink to what is seen of them, those that are hidden are removed, pasted ones are added, with the
    proposals of the other image that lie on them, and what is seen of objects that overlap them. Objects of which less than
    ``min_visibility`` would be seen are not pasted. Unchanged where the other image has nothing to be pasted; a ValueError where
    there are no masks.
    """
    if neighbors.masks is None:
        raise ValueError("copy_paste needs instance masks; use data with segmentations, or set copy_paste to null")
    other, masks = scene_of(*neighbors.read(index)), neighbors.masks(index)
    if random.random() < settings.flip:
        other, masks = flip(other, 1), masks[:, :, ::-1]
    objects = other.take(other.rows < other.objects)
    chosen = _choose(objects, settings.objects, random)
    factor = random.uniform(*settings.scale)
    source, goal = _place(other.size, scene.size, factor, random)
    covers, share = _move(masks[objects.rows], source, goal, scene.size)
    pixels = np.sum(covers, axis=(1, 2))
    chosen &= (share >= max(min_visibility, 1e-9)) & (pixels >= _FEWEST)
    if not chosen.any():
        return scene
    union = np.any(covers[chosen], axis=0)
    covers &= union  # others are seen where they overlap the chosen ones
    shown = np.sum(covers, axis=(1, 2))
    objects = replace(objects, share=objects.share * share * shown / pixels.clip(min=1))
    kept = chosen | (shown >= _FEWEST)
    above = _above(objects.take(kept), covers[kept], other.take(np.asarray(other.rows >= other.objects)), source, goal)
    image = scene.image.copy()
    u1, v1, u2, v2 = goal
    cover = union[v1:v2, u1:u2]
    image[v1:v2, u1:u2][cover] = resize(other.image, source, goal)[cover]
    return pool([_below(scene, neighbors.masks(neighbors.index), union), above], image)


def _choose(objects: Scene, part: float, random: np.random.Generator) -> npt.NDArray[np.bool_]:
    """Which objects [A] are pasted, at least one if there are any; crowd regions and difficult objects never."""
    able = ~objects.flagged("iscrowd") & ~objects.flagged("difficult")
    drawn = able & (random.random(len(able)) < part)
    if able.any() and not drawn.any():
        drawn[random.choice(np.flatnonzero(able))] = True
    return drawn


def _place(
    size: tuple[int, int], frame: tuple[int, int], factor: float, random: np.random.Generator
) -> tuple[Rectangle, Rectangle]:
    """The window of an image of some size, and where in the frame it comes to, when it is resized and put at a random place."""
    ends = []
    for length, room in zip(size[::-1], frame[::-1], strict=True):  # x, then y
        new = max(1, round(length * factor))
        if new <= room:
            start = int(random.integers(0, room - new + 1))
            ends.append(((0, length), (start, start + new)))
        else:
            window = min(length, max(1, round(room / factor)))
            start = int(random.integers(0, length - window + 1))
            ends.append(((start, start + window), (0, room)))
    ((x, u), (y, v)) = ends
    return (x[0], y[0], x[1], y[1]), (u[0], v[0], u[1], v[1])


def _move(
    masks: Masks, source: Rectangle, goal: Rectangle, size: tuple[int, int]
) -> tuple[Masks, npt.NDArray[np.float64]]:
    """Masks [A, H, W] in the frame of the goal, and the part [A] of each that the window has."""
    covers = np.zeros((len(masks), *size), dtype=bool)
    u1, v1, u2, v2 = goal
    for cover, mask in zip(covers, masks, strict=True):
        bytes_ = np.ascontiguousarray(mask).view(np.uint8) * np.uint8(255)
        cover[v1:v2, u1:u2] = resize(bytes_, source, goal) > 127
    x1, y1, x2, y2 = source
    inside, whole = np.sum(masks[:, y1:y2, x1:x2], axis=(1, 2)), np.sum(masks, axis=(1, 2))
    return covers, inside / whole.clip(min=1)


def _above(objects: Scene, covers: Masks, proposals: Scene, source: Rectangle, goal: Rectangle) -> Scene:
    """The pasted objects, and the proposals that move with them, in the frame of the goal."""
    boxes = clip(move(objects.boxes, source, goal), goal)
    lessened = np.asarray(objects.share < 1)  # what is left of an object need not reach to the sides of its box
    if lessened.any():
        boxes[lessened] = clip(boxes[lessened], _extents(covers[lessened]))
    overlap = iou(torch.from_numpy(proposals.boxes), torch.from_numpy(objects.boxes)).numpy()
    along = cut(proposals.take(np.any(overlap >= _OF_OBJECT, axis=1)), source, goal)
    return Scene(
        objects.image,
        objects.target,
        np.concatenate([boxes, along.boxes]),
        np.concatenate([objects.rows, along.rows]),
        np.concatenate([objects.share, along.share]),
    ).take(np.concatenate([areas(boxes), areas(along.boxes)]) > 0)


def _below(scene: Scene, masks: Masks, union: npt.NDArray[np.bool_]) -> Scene:
    """What is left of the objects of a scene under what was pasted; proposals stay."""
    boxes, share = scene.boxes.copy(), scene.share.copy()
    for place in np.flatnonzero(scene.rows < scene.objects).tolist():
        mask = _or_center(masks[scene.rows[place]], boxes[place])
        left = mask & ~union
        pixels, rest = int(mask.sum()), int(left.sum())
        if rest == pixels:
            continue
        share[place] *= rest / pixels
        if rest:
            before, after = _extents(mask[None])[0], _extents(left[None])[0]
            shrunk = np.where(after == before, boxes[place], after)  # sides that are still reached stay as annotated
            boxes[place] = clip(shrunk, boxes[place])
    return replace(scene, boxes=boxes, share=share).take((share > 0) & (areas(boxes) > 0))


def _or_center(mask: npt.NDArray[np.bool_], box: npt.NDArray[np.float64]) -> npt.NDArray[np.bool_]:
    """A mask too thin to hold the center of any pixel is taken to be the pixel at the center of its box."""
    if mask.any():
        return mask
    x, y = ((box[:2] + box[2:]) / 2).astype(int).tolist()
    one = np.zeros_like(mask)
    one[min(y, mask.shape[0] - 1), min(x, mask.shape[1] - 1)] = True
    return one


def _extents(masks: Masks) -> npt.NDArray[np.float64]:
    """The tight boxes [A, 4] of masks that are not empty."""
    columns, rows = np.any(masks, axis=1), np.any(masks, axis=2)  # [A, W], [A, H]
    ends = [columns.argmax(1), rows.argmax(1)]
    ends += [columns.shape[1] - columns[:, ::-1].argmax(1), rows.shape[1] - rows[:, ::-1].argmax(1)]
    return np.stack(ends, axis=1).astype(np.float64)


def combine(
    settings: Combine,
    scene: Scene,
    neighbors: Neighbors,
    seed: np.random.SeedSequence,
    min_visibility: float = 0.0,
) -> Scene:
    """Do copy-paste, mosaic and mix-up, as far as they are drawn, with a scene that is as in its file; its size stays.

    Objects of which less than ``min_visibility`` would be seen are not pasted. A ValueError if the set has too few images, or no
    masks where they are needed.
    """
    if neighbors.count < settings.images:
        raise ValueError(settings.too_few(neighbors.count))
    streams = [np.random.default_rng(one) for one in seed.spawn(3)]
    random = streams[0]
    if settings.copy_paste is not None and random.random() < settings.copy_paste.p:
        [index] = draw_others(random, neighbors, 1)
        scene = paste(settings.copy_paste, scene, neighbors, index, random, min_visibility)
    random = streams[1]
    if settings.mosaic is not None and random.random() < settings.mosaic.p and min(scene.size) > 1:
        others = [scene_of(*neighbors.read(index)) for index in draw_others(random, neighbors, 3)]
        scene = mosaic(settings.mosaic, [scene, *others], random)
    random = streams[2]
    if settings.mixup is not None and random.random() < settings.mixup.p:
        weight = float(np.clip(random.beta(settings.mixup.alpha, settings.mixup.alpha), *_WEIGHTS))
        [index] = draw_others(random, neighbors, 1)
        scene = mix_up(scene, scene_of(*neighbors.read(index)), weight, random)
    return scene


def draw_others(random: np.random.Generator, neighbors: Neighbors, count: int) -> list[int]:
    """Indices of other images, none twice."""
    drawn = random.choice(neighbors.count - 1, size=count, replace=False)
    return (drawn + (drawn >= neighbors.index)).tolist()


def mosaic(settings: Mosaic, scenes: Sequence[Scene], random: np.random.Generator) -> Scene:
    """Put four images together, the first into a random quadrant; the size is that of the first, boxes end at their quadrant."""
    height, width = scenes[0].size
    parts = random.uniform(*settings.center, size=2)
    x = min(width - 1, max(1, round(width * parts[0])))
    y = min(height - 1, max(1, round(height * parts[1])))
    quadrants: list[Rectangle] = [(0, 0, x, y), (x, 0, width, y), (0, y, x, height), (x, y, width, height)]
    image = np.empty_like(scenes[0].image)
    pieces = []
    for scene, place in zip(scenes, random.permutation(4).tolist(), strict=True):
        goal = quadrants[place]
        source = _window(scene.size, goal, random.uniform(*settings.zoom), random)
        image[goal[1] : goal[3], goal[0] : goal[2]] = resize(scene.image, source, goal)
        pieces.append(cut(scene, source, goal))
    return pool(pieces, image)


def mix_up(scene: Scene, other: Scene, weight: float, random: np.random.Generator) -> Scene:
    """Blend another image, resized to fit in whole at a random place, into a scene whose size stays; the boxes of both are kept."""
    height, width = scene.size
    h, w = other.size
    factor = min(height / h, width / w)
    w, h = min(width, max(1, round(w * factor))), min(height, max(1, round(h * factor)))
    source, goal = (0, 0, other.size[1], other.size[0]), random_place(random, scene.size, w, h)
    image, part = scene.image.copy(), (slice(goal[1], goal[3]), slice(goal[0], goal[2]))
    below = image[part].astype(np.float32)
    blend = below * weight + resize(other.image, source, goal).astype(np.float32) * (1 - weight)
    image[part] = np.rint(blend).astype(np.uint8) if image.dtype == np.uint8 else blend
    return pool([scene, cut(other, source, goal)], image)


def _window(size: tuple[int, int], goal: Rectangle, zoom: float, random: np.random.Generator) -> Rectangle:
    """A random window with about the shape of the goal: the largest that fits into the image, made smaller by the zoom."""
    height, width = size
    w, h = goal[2] - goal[0], goal[3] - goal[1]
    factor = max(w / width, h / height) * zoom
    w, h = min(width, max(1, round(w / factor))), min(height, max(1, round(h / factor)))
    return random_place(random, size, w, h)

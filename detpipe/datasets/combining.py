"""Mosaic and mix-up, and the order of everything that takes several images; importing this module imports OpenCV.

Every step draws from a stream of its own, so that turning one on does not change what another draws. Only what is drawn is read.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from detpipe.datasets.augment_settings import Combine, Mosaic
from detpipe.datasets.copy_paste import pasted
from detpipe.datasets.rectangles import Rectangle, areas, clipped, moved, resized
from detpipe.datasets.scene import Scene, pool, scene_of
from detpipe.datasets.transforms import Neighbors

_WEIGHTS = (0.2, 0.8)  # beyond, an image is hardly seen, but its boxes are trained


def combined(
    settings: Combine,
    scene: Scene,
    neighbors: Neighbors,
    seed: np.random.SeedSequence,
    min_visibility: float = 0.0,
) -> Scene:
    """Do copy-paste, mosaic and mix-up, as far as they are drawn.

    Args:
        settings: which of them, and how likely.
        scene: of the image as in its file.
        neighbors: where the others come from.
        seed: decides every draw.
        min_visibility: objects of which less than this part would be seen are not pasted, 0 to 1.

    Returns:
        The scene; of the same size.

    Raises:
        ValueError: the set has too few images, or no masks where they are needed.
    """
    if neighbors.count < settings.images:
        raise ValueError(settings.too_few(neighbors.count))
    streams = [np.random.default_rng(one) for one in seed.spawn(3)]
    random = streams[0]
    if settings.copy_paste is not None and random.random() < settings.copy_paste.p:
        [index] = draw_others(random, neighbors, 1)
        scene = pasted(settings.copy_paste, scene, neighbors, index, random, min_visibility)
    random = streams[1]
    if settings.mosaic is not None and random.random() < settings.mosaic.p and min(scene.size) > 1:
        others = [scene_of(*neighbors.read(index)) for index in draw_others(random, neighbors, 3)]
        scene = mosaic(settings.mosaic, [scene, *others], random)
    random = streams[2]
    if settings.mixup is not None and random.random() < settings.mixup.p:
        weight = float(np.clip(random.beta(settings.mixup.alpha, settings.mixup.alpha), *_WEIGHTS))
        [index] = draw_others(random, neighbors, 1)
        scene = mixed(scene, scene_of(*neighbors.read(index)), weight, random)
    return scene


def draw_others(random: np.random.Generator, neighbors: Neighbors, count: int) -> list[int]:
    """Indices of other images, none twice."""
    drawn = random.choice(neighbors.count - 1, size=count, replace=False)
    return (drawn + (drawn >= neighbors.index)).tolist()


def mosaic(settings: Mosaic, scenes: Sequence[Scene], random: np.random.Generator) -> Scene:
    """Put four images together; the first comes to a random quadrant.

    Args:
        settings: where the quadrants meet, and how far images are enlarged.
        scenes: four.
        random: decides every draw.

    Returns:
        The scene, of the size of the first; boxes are cut off at the edge of their quadrant.
    """
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
        image[goal[1] : goal[3], goal[0] : goal[2]] = resized(scene.image, source, goal)
        pieces.append(_cut(scene, source, goal))
    return pool(pieces, image)


def mixed(scene: Scene, other: Scene, weight: float, random: np.random.Generator) -> Scene:
    """Blend another image into a scene.

    Args:
        scene: whose size stays.
        other: is resized to fit into it, whole and at a random place.
        weight: of the first image where both are, 0 to 1.
        random: decides the place.

    Returns:
        The scene, with the boxes of both.
    """
    height, width = scene.size
    h, w = other.size
    factor = min(height / h, width / w)
    w, h = min(width, max(1, round(w * factor))), min(height, max(1, round(h * factor)))
    x, y = int(random.integers(0, width - w + 1)), int(random.integers(0, height - h + 1))
    source, goal = (0, 0, other.size[1], other.size[0]), (x, y, x + w, y + h)
    image = scene.image.copy()
    below = image[y : y + h, x : x + w].astype(np.float32)
    blend = below * weight + resized(other.image, source, goal).astype(np.float32) * (1 - weight)
    image[y : y + h, x : x + w] = np.rint(blend).astype(np.uint8)
    return pool([scene, _cut(other, source, goal)], image)


def _window(size: tuple[int, int], goal: Rectangle, zoom: float, random: np.random.Generator) -> Rectangle:
    """A random window with about the shape of the goal: the largest that fits into the image, made smaller by the zoom."""
    height, width = size
    w, h = goal[2] - goal[0], goal[3] - goal[1]
    factor = max(w / width, h / height) * zoom
    w, h = min(width, max(1, round(w / factor))), min(height, max(1, round(h / factor)))
    x, y = int(random.integers(0, width - w + 1)), int(random.integers(0, height - h + 1))
    return x, y, x + w, y + h


def _cut(scene: Scene, source: Rectangle, goal: Rectangle) -> Scene:
    """Move the boxes of a scene into a rectangle of another frame, and cut them off at its edge."""
    whole = moved(scene.boxes, source, goal)
    boxes = clipped(whole, goal)
    left = areas(boxes)
    share = scene.share * np.minimum(1, left / areas(whole).clip(min=1e-12))
    return Scene(scene.image, scene.target, boxes, scene.rows, share).take(left > 0)

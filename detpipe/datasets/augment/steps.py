"""Steps of an augmentation that take one image, and how they are run; importing this module imports albumentations and OpenCV.

A step takes a `Scene` and a seed of its own. Flips, zooms and crops map a rectangle of whole pixels onto another, so that boxes
move exactly as the pixels do. Colors, and the transforms that a configuration names, are albumentations'. Three things are kept
from it. It returns labels as floats, so that 16777217 becomes 16777216: only places in a list pass through it. It raises for boxes
that stick out of the image: they are clipped, and how much of them was lost is noted, so that the end knows what is left of what
was annotated. It warns of arguments that it does not know, and drops them: they are errors here.
"""

from __future__ import annotations

import os

os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # or the import asks the network for a newer version

from detpipe.datasets.augment.sample import Scene, areas, clip, crop, cut, flip, random_place, resize  # isort: skip

import inspect
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import albumentations
import numpy as np
import numpy.typing as npt

from detpipe.datasets.augment.settings import LARGEST_CROP, SafeCrop, Transform
from detpipe.datasets.resize import ground
from detpipe.support.suggest import did_you_mean
from detpipe.types import RGB, PixelType

Step = Callable[[Scene, int], Scene]  # a scene and what decides the draws

_ATTEMPTS = 50  # as SSD
_ROUNDING = 1e-9


def try_transforms(transforms: Sequence[Transform], pixels: PixelType) -> None:
    """Try the transforms of a configuration where images are not what albumentations has in mind.

    A ValueError if one does not take such images.
    """
    if pixels == RGB:
        return
    image = np.random.default_rng(0).random((96, 128, pixels.channels), dtype=np.float32)
    if pixels.range is None:
        image = (image * 255).astype(np.uint8)
    for transform in transforms:
        step = named_step(Transform(transform.name, {**transform.arguments, "p": 1.0}))
        try:
            out = step(image=image, bboxes=np.zeros((0, 5)))["image"]
            reason = "" if out.dtype == image.dtype and out.shape[2:] == image.shape[2:] else "it makes other ones"
        except Exception as error:  # albumentations' and OpenCV's
            reason = str(error).strip().partition("\n")[0] or type(error).__name__
        if reason:
            raise ValueError(
                f"transforms: {transform.name} does not take images of {pixels.channels} channels and {image.dtype}: {reason}; "
                "leave it out"
            )


def own_seeds(seed: int | Sequence[int], count: int) -> list[int]:
    """A seed for each of some steps, so that one does not depend on another; costs tens of microseconds."""
    return np.random.SeedSequence(seed).generate_state(count).tolist()


def flip_by_chance(p: float, axis: int, scene: Scene, seed: int) -> Scene:
    """Flip along an axis of the image."""
    return flip(scene, axis) if np.random.default_rng(seed).random() < p else scene


def zoom(scale: tuple[float, float], scene: Scene, seed: int) -> Scene:
    """Zoom by a factor whose logarithm is uniform: in, to a random window; out, to a random place on the ground."""
    random, (height, width) = np.random.default_rng(seed), scene.size
    factor = float(np.exp(random.uniform(*np.log(scale))))
    part = factor if factor < 1 else 1 / factor  # the smaller rectangle, as a part of the image
    window = random_place(random, scene.size, max(1, round(width * part)), max(1, round(height * part)))
    source, goal = ((0, 0, width, height), window) if factor < 1 else (window, (0, 0, width, height))
    image = np.empty_like(scene.image)
    image[:] = ground(image.shape[2], image.dtype != np.uint8)
    image[goal[1] : goal[3], goal[0] : goal[2]] = resize(scene.image, source, goal)
    return replace(cut(scene, source, goal), image=image)


def crop_by_chance(p: float, scene: Scene, seed: int) -> Scene:
    """Cut a part, up to `LARGEST_CROP`, from each side."""
    random = np.random.default_rng(seed)
    if random.random() >= p:
        return scene
    ends = []
    for length in scene.size[::-1]:  # x, then y
        start = int(random.integers(0, int(LARGEST_CROP * length) + 1))
        ends.append((start, int(random.integers(max(start + 1, int((1 - LARGEST_CROP) * length)), length + 1))))
    (x1, x2), (y1, y2) = ends
    return crop(scene, (x1, y1, x2, y2))


def safe_crop(settings: SafeCrop, min_visibility: float, scene: Scene, seed: int) -> Scene:
    """Cut a random window that keeps an object; the larger of both visibilities is promised."""
    least = max(settings.min_visibility, min_visibility) - _ROUNDING
    random, (height, width) = np.random.default_rng(seed), scene.size
    if random.random() >= settings.p:
        return scene
    lenient = (scene.rows >= scene.objects) | scene.flagged("iscrowd")  # judged at the end alone
    wanted = ~lenient & ~scene.flagged("difficult")
    for _ in range(_ATTEMPTS):
        scale = random.uniform(*settings.scale)
        shape = float(np.exp(random.uniform(*np.log(settings.ratio)) / 2))
        w = min(width, max(1, round(width * scale * shape)))
        h = min(height, max(1, round(height * scale / shape)))
        window = random_place(random, scene.size, w, h)
        visible = scene.share * areas(clip(scene.boxes, window)) / areas(scene.boxes).clip(min=1e-12)
        if not wanted.any() or (visible[wanted] >= least).any():
            return crop(scene.take((visible >= least) | lenient), window)
    return scene


def transformed(transform: albumentations.BasicTransform, scene: Scene, seed: int) -> Scene:
    """A transform of albumentations; boxes are measured in image sizes there."""
    transform.set_random_seed(seed)
    image, places = scene.image, np.arange(len(scene.rows))
    out = transform(image=image, bboxes=np.column_stack([scene.boxes / _sides(image), places]))
    made = out["image"]
    if made.dtype != image.dtype or made.ndim != 3 or made.shape[2] != image.shape[2] or 0 in made.shape:
        raise ValueError(
            f"transforms: {type(transform).__name__} made an image of {made.dtype} {list(made.shape)}, expected "
            f"{image.dtype} [H, W, {image.shape[2]}]; change its arguments"
        )
    rows = np.asarray(out["bboxes"], dtype=np.float64).reshape(-1, 5)
    kept = scene.take(rows[:, 4].astype(np.int64))
    frame = (0, 0, made.shape[1], made.shape[0])
    return cut(replace(kept, image=made, boxes=rows[:, :4] * _sides(made)), frame, frame)


def _sides(image: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    return np.array([image.shape[1], image.shape[0]] * 2, dtype=np.float64)


def named_step(transform: Transform) -> albumentations.BasicTransform:
    """Build a transform, whose name was checked before; a ValueError for what it does not take."""
    name, kind = transform.name, getattr(albumentations, transform.name)
    known = [*inspect.signature(kind.__init__).parameters][1:]
    for argument in transform.arguments:
        if argument not in known:
            raise ValueError(f"transforms: {name} has no argument {argument!r}{did_you_mean(argument, known)}")
    arguments = {key: tuple(value) if isinstance(value, list) else value for key, value in transform.arguments.items()}
    try:
        step = kind(**arguments)
    except Exception as error:  # pydantic's and others
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise ValueError(f"transforms: {name} refuses its arguments: {'; '.join(lines[:4])}") from error
    if getattr(step, "border_mode", 0) != 0:
        raise ValueError(
            f"transforms: {name}.border_mode must be 0 (a plain ground), got {transform.arguments.get('border_mode')}: others "
            "repeat objects at the border, without boxes"
        )
    return step

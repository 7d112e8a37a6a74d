"""The steps of albumentations behind `Augment`, and how they are run; importing this module imports albumentations and OpenCV.

Four things are kept from albumentations. It returns labels as floats, so that 16777217 becomes 16777216: only places in a list
pass through it. It raises for boxes that stick out of the image: they are clipped here, after each step, and how much of them was
lost is noted, so that the end knows what is left of what was annotated. It gives each transform of a pipeline the same seed, which
would tie a crop to a flip: each gets its own. It warns of arguments that it does not know, and drops them: they are errors here.
"""

from __future__ import annotations

import os

os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # or the import asks the network for a newer version

from detpipe.datasets.augment.sample import Pixels, Rectangle, Scene, areas, clip, move, resize  # isort: skip

import inspect
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import albumentations
import numpy as np
import numpy.typing as npt
from albumentations.core.type_definitions import Targets

from detpipe.datasets.augment.augmentation import LARGEST_CROP, Augment
from detpipe.datasets.augment.settings import Degrade, Photometric, SafeCrop, Transform
from detpipe.datasets.resize import ground
from detpipe.support.suggest import did_you_mean
from detpipe.types import RGB, PixelType

Step = albumentations.BasicTransform

_ATTEMPTS = 50  # as SSD
_ROUNDING = 1e-9
CROWD_OR_PROPOSAL, DIFFICULT, OBJECT = 0, 1, 2  # the kinds of boxes
HUE = 0.1  # of the strength of the other color changes
_BLUR, _NOISE, _JPEG = (0.4, 2.0), (0.02, 0.1), (30, 90)


@lru_cache(maxsize=8)
def build_steps(augment: Augment) -> tuple[Step, ...]:
    """Build what is done to an image, in its order, once a process; a ValueError for arguments that a transform does not take."""
    steps: list[Step] = [albumentations.HorizontalFlip(p=augment.flip)]
    if augment.vertical_flip:
        steps.append(albumentations.VerticalFlip(p=augment.vertical_flip))
    if augment.scale_jitter is not None:
        steps.append(Zoom(augment.scale_jitter))
    if augment.crop:
        steps.append(albumentations.RandomCropFromBorders(*[LARGEST_CROP] * 4, p=augment.crop))
    if augment.safe_crop is not None:
        steps.append(SafeCropStep(augment.safe_crop, augment.min_visibility))
    steps += [named_step(transform) for transform in augment.transforms]
    if augment.color:
        steps.append(color_jitter(augment.color, augment.color, augment.color, HUE * augment.color))
    if augment.photometric is not None:
        steps += _photometric_steps(augment.photometric)
    if augment.degrade is not None:
        steps += _degrading_steps(augment.degrade)
    return tuple(steps)


def try_steps(augment: Augment, pixels: PixelType) -> None:
    """Build the steps, and try those of the configuration where images are not what albumentations has in mind.

    A ValueError if a transform has arguments that it does not take, or does not take such images.
    """
    build_steps(augment)
    if pixels == RGB:
        return
    image = np.random.default_rng(0).random((96, 128, pixels.channels), dtype=np.float32)
    if pixels.range is None:
        image = (image * 255).astype(np.uint8)
    for transform in augment.transforms:
        step = named_step(Transform(transform.name, {**transform.arguments, "p": 1.0}))
        try:
            out = step(image=image, bboxes=np.zeros((0, 7)))["image"]
            reason = "" if out.dtype == image.dtype and out.shape[2:] == image.shape[2:] else "it makes other ones"
        except Exception as error:  # albumentations' and OpenCV's
            reason = str(error).strip().partition("\n")[0] or type(error).__name__
        if reason:
            raise ValueError(
                f"transforms: {transform.name} does not take images of {pixels.channels} channels and {image.dtype}: {reason}; "
                "leave it out"
            )


def run(steps: Sequence[Step], scene: Scene, seed: int | Sequence[int]) -> Scene:
    """Do one step after another, every draw decided by non-negative numbers; the boxes of the result lie inside the image.

    A ValueError if a step did not return an image of the same channels and type.
    """
    reseed(steps, seed)
    image, rows = scene.image, _stack(scene)
    channels, dtype = image.shape[2], image.dtype
    for step in steps:
        out = step(image=image, bboxes=rows)
        image = out["image"]
        if image.dtype != dtype or image.ndim != 3 or image.shape[2] != channels or 0 in image.shape:
            raise ValueError(
                f"transforms: {type(step).__name__} made an image of {image.dtype} {list(image.shape)}, expected {dtype} "
                f"[H, W, {channels}]; change its arguments"
            )
        rows = _inside(np.asarray(out["bboxes"], dtype=np.float64).reshape(-1, rows.shape[1]))
    height, width = image.shape[:2]
    places = rows[:, 4].astype(np.int64)
    boxes = rows[:, :4] * np.array([width, height] * 2)
    return Scene(image, scene.target, boxes, scene.rows[places], rows[:, 6].copy())


def reseed(steps: Sequence[Step], seed: int | Sequence[int]) -> None:
    """Draw an own seed for every transform from non-negative numbers; costs tens of microseconds."""
    seeds = np.random.SeedSequence(seed).generate_state(len(steps))
    for step, own in zip(steps, seeds.tolist(), strict=True):
        step.set_random_seed(own)


def _stack(scene: Scene) -> npt.NDArray[np.float64]:
    """[M, 7]: x1, y1, x2, y2 in image sizes, place, kind, share."""
    height, width = scene.size
    kinds = np.full(scene.objects, OBJECT)
    for name, kind in (("difficult", DIFFICULT), ("iscrowd", CROWD_OR_PROPOSAL)):
        if name in scene.target:
            kinds[scene.target[name].numpy()] = kind
    proposals = scene.rows >= scene.objects
    kind = np.full(len(scene.rows), CROWD_OR_PROPOSAL)
    kind[~proposals] = kinds[scene.rows[~proposals]]
    boxes = scene.boxes / np.array([width, height] * 2, dtype=np.float64)
    return _inside(np.column_stack([boxes, np.arange(len(boxes)), kind, scene.share]).astype(np.float64))


def _inside(rows: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Clip boxes to the image, note the share that is left of them, and drop those that are outside."""
    cut = rows.copy()
    cut[:, :4] = cut[:, :4].clip(0, 1)
    left = areas(cut)
    cut[:, 6] *= np.minimum(1, left / areas(rows).clip(min=1e-30))
    return cut[left > 0]


def named_step(transform: Transform) -> Step:
    """Build a transform of a configuration, whose name was checked before; a ValueError for what it does not take."""
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


def color_jitter(brightness: float, contrast: float, saturation: float, hue: float, p: float = 1.0) -> Step:
    """Change brightness, contrast and saturation, each by a factor of 0.6 to 1.4 for a strength of 0.4, and turn the hue."""
    light, contrasts, colors = ((1 - strength, 1 + strength) for strength in (brightness, contrast, saturation))
    return albumentations.ColorJitter(light, contrasts, colors, (-hue, hue), p=p)


def _photometric_steps(s: Photometric) -> list[Step]:
    jitter = color_jitter(s.brightness, s.contrast, s.saturation, s.hue, s.p)
    return [jitter, *([albumentations.ToGray(p=s.gray)] if s.gray else [])]


def _degrading_steps(settings: Degrade) -> list[Step]:
    steps: list[Step] = []
    if settings.blur:
        steps.append(albumentations.GaussianBlur(blur_limit=0, sigma_limit=_BLUR, p=settings.blur))
    if settings.noise:
        steps.append(albumentations.GaussNoise(std_range=_NOISE, p=settings.noise))
    if settings.jpeg:
        steps.append(albumentations.ImageCompression(quality_range=_JPEG, p=settings.jpeg))
    return steps


class Zoom(albumentations.DualTransform):
    """Zoom the content of an image without changing its size, by a factor whose logarithm is uniform.

    Zooming in cuts a random window and enlarges it; zooming out shrinks the image and puts it at a random place. Both map one
    rectangle of whole pixels onto another, so the boxes move exactly as the pixels do.
    """

    _targets = (Targets.IMAGE, Targets.BBOXES)

    def __init__(self, scale: tuple[float, float]) -> None:
        super().__init__(p=1.0)
        self.scale = scale

    def get_params_dependent_on_data(self, params: dict[str, Any], data: dict[str, Any]) -> dict[str, Any]:
        """Draw the zoom factor and the place; rectangles are ``x1, y1, x2, y2``."""
        height, width = params["shape"][:2]
        factor = float(np.exp(self.py_random.uniform(*np.log(self.scale))))
        part = factor if factor < 1 else 1 / factor  # the smaller rectangle, as a part of the image
        w, h = max(1, round(width * part)), max(1, round(height * part))
        x, y = self.py_random.randint(0, width - w), self.py_random.randint(0, height - h)
        whole, window = (0, 0, width, height), (x, y, x + w, y + h)
        return {"source": whole, "goal": window} if factor < 1 else {"source": window, "goal": whole}

    def apply(self, img: Pixels, source: Rectangle, goal: Rectangle, **params: Any) -> Pixels:
        """Resize the source rectangle of ``[H, W, C]`` into the goal rectangle of a grey image."""
        u1, v1, u2, v2 = goal
        out = np.empty_like(img)
        out[:] = ground(img.shape[2], img.dtype != np.uint8)
        out[v1:v2, u1:u2] = resize(img, source, goal)
        return out

    def apply_to_bboxes(
        self, bboxes: npt.NDArray[np.float64], source: Rectangle, goal: Rectangle, **params: Any
    ) -> npt.NDArray[np.float64]:
        """Move boxes ``[M, 4+]``, which albumentations measures in image sizes."""
        height, width = params["shape"][:2]
        size = np.array([width, height, width, height], dtype=np.float64)
        out = bboxes.astype(np.float64)
        out[:, :4] = move(out[:, :4] * size, source, goal) / size
        return out


class SafeCropStep(albumentations.DualTransform):
    """Cut a random window of whole pixels that keeps an object.

    What is promised is the larger visibility of its settings and of the whole augmentation. Boxes come as ``[M, 7]``: x1, y1, x2,
    y2 in image sizes, place, kind, and the share that is left of them.
    """

    _targets = (Targets.IMAGE, Targets.BBOXES)

    def __init__(self, settings: SafeCrop, min_visibility: float) -> None:
        super().__init__(p=settings.p)
        self.settings = settings
        self.least = max(settings.min_visibility, min_visibility) - _ROUNDING

    def get_params_dependent_on_data(self, params: dict[str, Any], data: dict[str, Any]) -> dict[str, Any]:
        """Draw the window ``x1, y1, x2, y2``, the whole image if none was found that keeps an object."""
        height, width = params["shape"][:2]
        rows = np.asarray(data["bboxes"], dtype=np.float64)
        wanted = rows[rows[:, 5] == OBJECT]
        for _ in range(_ATTEMPTS):
            window = self._draw(width, height)
            if len(wanted) == 0 or (_visible(wanted, window, width, height) >= self.least).any():
                return {"window": window}
        return {"window": None}

    def _draw(self, width: int, height: int) -> tuple[int, int, int, int]:
        scale = self.py_random.uniform(*self.settings.scale)
        shape = float(np.exp(self.py_random.uniform(*np.log(self.settings.ratio)) / 2))
        w = min(width, max(1, round(width * scale * shape)))
        h = min(height, max(1, round(height * scale / shape)))
        x, y = self.py_random.randint(0, width - w), self.py_random.randint(0, height - h)
        return x, y, x + w, y + h

    def apply(self, img: Pixels, window: Any, **params: Any) -> Pixels:
        """Cut the window out of ``[H, W, C]``."""
        if window is None:
            return img
        x1, y1, x2, y2 = window
        return img[y1:y2, x1:x2]

    def apply_to_bboxes(self, bboxes: npt.NDArray[np.float64], window: Any, **params: Any) -> npt.NDArray[np.float64]:
        """Move boxes into the window, and remove objects of which it shows too little."""
        if window is None:
            return bboxes
        height, width = params["shape"][:2]
        x1, y1, x2, y2 = window
        kept = bboxes[(_visible(bboxes, window, width, height) >= self.least) | (bboxes[:, 5] == CROWD_OR_PROPOSAL)]
        size, inner = np.array([width, height] * 2), np.array([x2 - x1, y2 - y1] * 2)
        kept[:, :4] = (kept[:, :4] * size - np.array([x1, y1] * 2)) / inner
        return kept


def _visible(rows: npt.NDArray[np.float64], window: Any, width: int, height: int) -> npt.NDArray[np.float64]:
    """The part [M] of what was annotated that is left inside the window."""
    boxes = rows[:, :4] * np.array([width, height] * 2)
    return rows[:, 6] * areas(clip(boxes, window)) / areas(boxes).clip(min=1e-12)

"""Composing scenes of handwritten digits over photographs, with clutter, as the demo set needs them.

The digits are scikit-learn's bundled set (1797 images of 8 x 8 pixels, a copy of the test part of UCI's optical
recognition of handwritten digits), the backgrounds are crops of its two bundled photographs. The clutter follows the
cluttered MNIST of Jaderberg, Simonyan, Zisserman, Kavukcuoglu, "Spatial Transformer Networks" (2015, arXiv 1506.02025):
fragments of other digits, which are not labeled.

A scene is a pure function of its random generator: equal generators give equal pixels.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image

from detpipe.support.errors import UsageError

Pixels = npt.NDArray[np.uint8]  # [H, W, 3]
Box = tuple[int, int, int, int]  # xyxy
Ink = npt.NDArray[np.float32]  # [h, w] in 0..1: how much of a pixel the pen covers

CLASS_NAMES = tuple("0123456789")
DIGITS_PER_SCENE = (2, 7)  # both inclusive
EMPTY_SHARE = 0.03  # of the scenes have no digit
SIDE = (20.0, 64.0)  # the longer side of a digit, pixels
FRAGMENTS_PER_SCENE = (3, 9)
FRAGMENT_SIDE = (6.0, 15.0)
MAX_IOU = 0.2  # between the boxes of two digits
MIN_VISIBLE = 0.8  # of a digit's ink, where a later one lies over it
CONTRAST = 90.0  # gray levels between a digit and each pixel under it, as far as there is such a color
VISIBLE_INK = 0.5  # a pixel with at least this much ink belongs to the digit
VALIDATION_SHARE = 0.2  # of the digits, and of the width of the photographs

_UPSAMPLE = 8  # source pixels a cell of the 8 x 8 images
_CELL_MARGIN = 2  # empty cells around them
_SOFT = 2  # pixels around a warped digit's box that hold the soft edge of its ink
_PLACING_ATTEMPTS = 30


@dataclass(frozen=True)
class Stock:
    """What the scenes of one split are made of."""

    ink: list[Ink]  # smooth digits, 96 x 96
    labels: npt.NDArray[np.int64]  # [S] the digit, 0..9
    samples: npt.NDArray[np.int64]  # [S] row in scikit-learn's set
    photographs: list[Pixels]


@dataclass(frozen=True)
class Scene:
    """One image and its objects."""

    image: Pixels
    boxes: npt.NDArray[np.int64]  # [G, 4] xyxy, whole pixels, in the continuous frame
    labels: npt.NDArray[np.int64]  # [G] in 1..10: label 1 is the digit 0
    samples: npt.NDArray[np.int64]  # [G] row in scikit-learn's set


def load_stock(seed: int) -> dict[str, Stock]:
    """Load digits and photographs, and part both between ``"train"`` and ``"val"``.

    The seed decides about digits; photographs are cut at the same column always. A UsageError if scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits, load_sample_images
    except ImportError as error:
        raise UsageError(
            "the demo set is made of scikit-learn's digits, which is not installed: pip install 'detpipe[train]'"
        ) from error
    cells, digits = load_digits(return_X_y=True)
    cells = cells.reshape(-1, 8, 8)
    photographs = [np.asarray(image, dtype=np.uint8) for image in load_sample_images().images]
    order = np.random.default_rng(np.random.SeedSequence(seed)).permutation(len(cells))
    cut = round(VALIDATION_SHARE * len(order))
    stocks = {}
    for split, samples in (("train", np.sort(order[cut:])), ("val", np.sort(order[:cut]))):
        columns = [round((1 - VALIDATION_SHARE) * photograph.shape[1]) for photograph in photographs]
        stocks[split] = Stock(
            ink=[_smooth(cells[sample]) for sample in samples],
            labels=np.asarray(digits[samples], dtype=np.int64),
            samples=samples.astype(np.int64),
            photographs=[
                photograph[:, :column] if split == "train" else photograph[:, column:]
                for photograph, column in zip(photographs, columns, strict=True)
            ],
        )
    return stocks


def compose_scene(rng: np.random.Generator, stock: Stock, size: int) -> Scene:
    """Compose a square scene of ``size`` pixels: a photograph, fragments of digits on it, whole digits on top."""
    canvas = np.pad(_background(rng, stock.photographs, size), ((_SOFT, _SOFT), (_SOFT, _SOFT), (0, 0)), mode="edge")
    for _ in range(rng.integers(FRAGMENTS_PER_SCENE[0], FRAGMENTS_PER_SCENE[1] + 1)):
        ink = _fragment(rng, stock.ink[rng.integers(len(stock.ink))])
        y, x = (int(rng.integers(0, size + 2 * _SOFT - side + 1)) for side in ink.shape)
        _paint(rng, canvas, ink, y, x)
    owner = np.full((size, size), -1, dtype=np.int64)  # which digit each pixel shows
    boxes: list[Box] = []
    chosen: list[int] = []
    wanted = 0 if rng.random() < EMPTY_SHARE else int(rng.integers(DIGITS_PER_SCENE[0], DIGITS_PER_SCENE[1] + 1))
    for _ in range(wanted):
        index = int(rng.integers(len(stock.ink)))
        ink = _warp(rng, stock.ink[index], _log_uniform(rng, SIDE[0], min(SIDE[1], 0.4 * size)))
        visible = ink[_SOFT:-_SOFT, _SOFT:-_SOFT] >= VISIBLE_INK
        box = _place(rng, visible, owner, boxes)
        if box is None:
            continue
        _paint(rng, canvas, ink, box[1], box[0])  # the margins of the canvas and of the ink cancel out
        owner[box[1] : box[3], box[0] : box[2]][visible] = len(boxes)
        boxes.append(box)
        chosen.append(index)
    return Scene(
        image=np.clip(np.rint(canvas[_SOFT:-_SOFT, _SOFT:-_SOFT]), 0, 255).astype(np.uint8),
        boxes=np.array([_extent(owner == k) for k in range(len(boxes))], dtype=np.int64).reshape(-1, 4),
        labels=stock.labels[chosen] + 1,
        samples=stock.samples[chosen],
    )


def _smooth(cells: npt.NDArray[np.float64]) -> Ink:
    """An 8 x 8 image of 0..16 as a smooth pen stroke of 0..1 on a larger canvas with an empty margin."""
    image = Image.fromarray(np.pad(cells, _CELL_MARGIN).astype(np.float32) / 16)
    side = image.width * _UPSAMPLE
    gray = np.asarray(image.resize((side, side), Image.Resampling.BICUBIC))
    return np.clip((gray - 0.3) / 0.4, 0, 1).astype(np.float32)  # a stroke of even darkness with soft edges


def _fragment(rng: np.random.Generator, ink: Ink) -> Ink:
    """A piece of a digit that has some ink in it, warped as the digits are."""
    side = 4 * _UPSAMPLE
    while True:
        y, x = (
            int(v)
            for v in rng.integers(_CELL_MARGIN * _UPSAMPLE, ink.shape[0] - _CELL_MARGIN * _UPSAMPLE - side, size=2)
        )
        piece = ink[y : y + side, x : x + side]
        if piece.mean() > 0.2:
            return _warp(rng, np.pad(piece, 2 * _UPSAMPLE), _log_uniform(rng, *FRAGMENT_SIDE))


def _warp(rng: np.random.Generator, ink: Ink, longer_side: float) -> Ink:
    """Rotate, shear, stretch and scale, then crop to the visible ink and a margin of ``_SOFT`` pixels.

    The longer side of the visible ink is in pixels, to within the rounding of one pixel on either side.
    """
    angle = np.deg2rad(rng.uniform(-20, 20))
    rotation = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    shear = np.array([[1, rng.uniform(-0.2, 0.2)], [0, 1]])
    stretch = np.diag([np.exp(rng.uniform(-0.2, 0.2)), 1.0])
    forward = rotation @ shear @ stretch  # acts on (x, y) about the center
    y, x = np.nonzero(ink >= VISIBLE_INK)
    center = (np.array([x.min() + x.max(), y.min() + y.max()]) + 1) / 2
    points = forward @ (np.stack([x, y]) + 0.5 - center[:, None])
    scale = longer_side / np.ptp(points, axis=1).max()
    lower, upper = points.min(axis=1) * scale - 2 * _SOFT, points.max(axis=1) * scale + 2 * _SOFT
    width, height = (int(v) for v in np.ceil(upper - lower))
    inverse = np.linalg.inv(forward * scale)
    offset = inverse @ lower + center  # output corner (0, 0) in the source
    coefficients = (*inverse[0], offset[0], *inverse[1], offset[1])
    warped = Image.fromarray(ink).transform(
        (width, height), Image.Transform.AFFINE, coefficients, Image.Resampling.BILINEAR
    )
    result = np.asarray(warped)
    x1, y1, x2, y2 = _extent(result >= VISIBLE_INK)
    return result[y1 - _SOFT : y2 + _SOFT, x1 - _SOFT : x2 + _SOFT]


def _place(
    rng: np.random.Generator, visible: npt.NDArray[np.bool_], owner: npt.NDArray[np.int64], boxes: list[Box]
) -> Box | None:
    """A box for a digit, or None where no random place leaves the others recognizable."""
    size = owner.shape[0]
    height, width = visible.shape
    for _ in range(_PLACING_ATTEMPTS):
        y, x = int(rng.integers(0, size - height + 1)), int(rng.integers(0, size - width + 1))
        box = (x, y, x + width, y + height)
        if any(_iou(box, other) > MAX_IOU for other in boxes):
            continue
        covered = owner[y : y + height, x : x + width][visible]
        if all(
            np.count_nonzero(covered == k) <= (1 - MIN_VISIBLE) * np.count_nonzero(owner == k)
            for k in np.unique(covered[covered >= 0])
        ):
            return box
    return None


def _background(rng: np.random.Generator, photographs: list[Pixels], size: int) -> npt.NDArray[np.float32]:
    """A crop of a photograph, paler or darker than it was, [size, size, 3] in 0..255."""
    photograph = photographs[rng.integers(len(photographs))]
    side = int(rng.integers(80, min(photograph.shape[:2]) + 1))
    y, x = (int(rng.integers(0, extent - side + 1)) for extent in photograph.shape[:2])
    crop = Image.fromarray(photograph).resize(
        (size, size), Image.Resampling.BICUBIC, box=(x, y, x + side, y + side), reducing_gap=None
    )
    pixels = np.asarray(crop, dtype=np.float32)
    if rng.random() < 0.5:
        pixels = pixels[:, ::-1]
    tone = rng.uniform(50, 205)  # the mean gray level of the scene
    strength = rng.uniform(0.3, 0.6)
    return np.clip(tone + strength * (pixels - pixels.mean()), 0, 255).astype(np.float32)


def _paint(rng: np.random.Generator, canvas: npt.NDArray[np.float32], ink: Ink, y: int, x: int) -> None:
    """Blend ink over the canvas in a color that stands out from what is under it."""
    patch = canvas[y : y + ink.shape[0], x : x + ink.shape[1]]
    level = _contrasting_level(rng, patch.mean(axis=2)[ink >= VISIBLE_INK])
    tint = rng.uniform(-45, 45, size=3)
    color = np.clip(level + tint - tint.mean(), 0, 255)
    alpha = (ink * rng.uniform(0.85, 1.0))[..., None]
    patch += alpha * (color.astype(np.float32) - patch)


def _contrasting_level(rng: np.random.Generator, under: npt.NDArray[np.float32]) -> float:
    """A gray level whose mean lack of contrast to the pixels under the ink is the least possible, or nearly."""
    levels = np.arange(0, 256, 5)
    lack = np.maximum(CONTRAST - np.abs(levels[:, None] - under), 0).mean(axis=1)
    return float(rng.choice(levels[lack <= lack.min() + 4]))


def _log_uniform(rng: np.random.Generator, low: float, high: float) -> float:
    return float(np.exp(rng.uniform(np.log(low), np.log(high))))


def _extent(mask: npt.NDArray[np.bool_]) -> Box:
    """The tight box of the true pixels, xyxy."""
    rows, columns = np.nonzero(mask.any(axis=1))[0], np.nonzero(mask.any(axis=0))[0]
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def _iou(a: Box, b: Box) -> float:
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    inter = max(width, 0) * max(height, 0)
    areas = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1])
    return inter / (areas - inter)

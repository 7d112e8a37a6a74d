"""Why proposals may miss what they should find: mistakes of other programs' boxes, each one tried out.

Every mistake is a hypothesis: undo it, and see whether the boxes find more objects then, or fit the borders of the images.
Correct boxes, good or weak, must fail all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from detpipe.evaluation.matches import Floats, ignored_objects, overlapping_pairs
from detpipe.evaluation.proposal_recall import boxes_of, evaluate_recall
from detpipe.types import Annotations

Proposals = Mapping[int, npt.NDArray[np.floating]]
ENOUGH = 0.8  # recall at IoU .5 below which training warns
LOOKED_AT = 200  # images
MOST_BOXES = 2000
GAIN, GREAT_GAIN = 0.1, 0.3  # of recall, that undoing a mistake must bring; and where nothing else speaks for it
SHORTER_SIDES = (224, 256, 300, 320, 400, 416, 480, 500, 512, 600, 640, 800, 1024)  # that images are often resized to


class _Sample(NamedTuple):
    """Images with objects, and their proposals."""

    boxes: list[Floats]  # [P, 4] each
    objects: list[Floats]  # [G, 4] each
    sizes: list[tuple[float, float]]  # width and height


def recall_note(annotations: Annotations, proposals: Proposals, split: str, images: int = 500) -> tuple[str, list[str]]:
    """Say in a line what the boxes of a split can find at best, and in lines of warning what may be wrong where that is little.

    ``proposals`` are ``[P, 4]`` xyxy in pixels of the image by image id, best first; at most so many images are looked at.
    """
    looked_at = annotations
    if len(annotations) > images:
        looked_at = annotations.subset(np.linspace(0, len(annotations) - 1, images).astype(np.int64))
    found = evaluate_recall(looked_at, proposals, (MOST_BOXES,))
    if not found.num_objects:
        return f"proposals of {split}: no objects to find in {len(looked_at)} images", []
    recall = found.at(0.5, MOST_BOXES)
    part = "" if looked_at is annotations else f" (in {len(looked_at)} of {len(annotations)} images)"
    line = f"proposals of {split}: {found.boxes_per_image:.0f} an image, recall at IoU .5 is {recall:.3f}{part}"
    if recall >= ENOUGH:
        return line, []
    causes = likely_faults(looked_at, proposals) or [
        "no usual mistake of coordinates was found: more boxes, or boxes of sizes that fit the objects, may help"
    ]
    warning = (
        f"warning: the proposals of {split} miss {1 - recall:.0%} of the objects at IoU .5; what has no box cannot be learned or "
        "found. Likely causes:"
    )
    return line, [warning, *(f"  - {cause}" for cause in causes)]


def likely_faults(annotations: Annotations, proposals: Proposals, images: int = LOOKED_AT) -> list[str]:
    """Try usual mistakes of coordinates; arguments are those of :func:`recall_note`.

    Returns:
        One sentence for each mistake that the boxes look like, with the recall as it is and without the mistake, the likeliest
        first; empty where they look right.
    """
    wanted = ~ignored_objects(annotations)[0]
    places = [np.flatnonzero(wanted[start:end]) + start for start, end in pairwise(annotations.offsets.tolist())]
    rows = [row for row, place in enumerate(places) if len(place)]
    if len(rows) > images:
        rows = [rows[index] for index in np.linspace(0, len(rows) - 1, images).astype(int)]
    sample = _Sample(
        [boxes_of(annotations, row, proposals)[:MOST_BOXES] for row in rows],
        [annotations.boxes[places[row]] for row in rows],
        [(float(annotations.sizes[row, 1]), float(annotations.sizes[row, 0])) for row in rows],
    )
    if not sum(map(len, sample.boxes)):
        return []
    before = _recall(sample, sample.boxes)
    found = []
    objects = sum(map(len, sample.objects))
    for mistake, undo, gain in _mistakes(sample):
        undone = [undo(boxes, size) for boxes, size in zip(sample.boxes, sample.sizes, strict=True)]
        after = _recall(sample, undone)
        if after - before > max(gain, 1.5 / np.sqrt(objects)) and _inside(sample, undone):
            found.append((after, f"{mistake}: recall at IoU .5 is {before:.3f}, and would be {after:.3f} without it"))
    found.sort(key=lambda pair: -pair[0])
    return (
        [sentence for _, sentence in found[:1]]
        + _counting_from_one(sample)
        + _other_images(sample, before, bool(found))
    )


Undo = Callable[[Floats, tuple[float, float]], Floats]  # [P, 4], (width, height) -> [P, 4]


_MISTAKES: dict[str, Undo] = {
    "x and y are swapped": lambda boxes, size: boxes[:, [1, 0, 3, 2]],
    "x, y, width, height were taken for x1, y1, x2, y2": lambda boxes, size: np.c_[
        boxes[:, :2], boxes[:, :2] + boxes[:, 2:]
    ],
    "x1, y1, x2, y2 were taken for x, y, width, height": lambda boxes, size: np.c_[
        boxes[:, :2], boxes[:, 2:] - boxes[:, :2]
    ],
    "center x, center y, width, height were taken for x1, y1, x2, y2": lambda boxes, size: np.c_[
        boxes[:, :2] - boxes[:, 2:] / 2, boxes[:, :2] + boxes[:, 2:] / 2
    ],
    "the boxes are mirrored left to right": lambda boxes, size: np.c_[
        size[0] - boxes[:, 2], boxes[:, 1], size[0] - boxes[:, 0], boxes[:, 3]
    ],
}


def _mistakes(sample: _Sample) -> Iterator[tuple[str, Undo, float]]:
    """List the mistakes that the boxes could hold, what undoes each, and the recall that undoing it must bring."""
    for mistake, undo in _MISTAKES.items():
        yield mistake, undo, GAIN
    if max(float(boxes.max(initial=0)) for boxes in sample.boxes) <= 1.5:
        yield "the boxes are normalized to 0..1", lambda boxes, size: boxes * np.array([*size, *size]), GAIN
    if _covers(sample, lambda boxes, size: boxes):
        return  # they reach the borders of the images: no other frame
    for side in SHORTER_SIDES:
        frames: dict[str, Undo] = {
            f"the boxes are of images resized to a shorter side of {side} pixels": _undo_shorter_side(side),
            f"the boxes are of images resized to {side} x {side} pixels": _undo_square(side),
        }
        for mistake, undo in frames.items():
            yield mistake, undo, GAIN if _covers(sample, undo) else GREAT_GAIN
    reach = _reach(sample)
    if reach < 0.9 or reach > 1.1:
        yield f"the boxes are of images {reach:.2f} times as large", lambda boxes, size: boxes / reach, GAIN


def _undo_shorter_side(side: float) -> Undo:
    return lambda boxes, size: boxes * (min(size) / side)


def _undo_square(side: float) -> Undo:
    return lambda boxes, size: boxes * (np.array([*size, *size]) / side)


def _covers(sample: _Sample, undo: Undo) -> bool:
    """Whether the boxes reach about the right and the lower border of most images, and not far beyond."""
    ends = []
    for boxes, size in zip(sample.boxes, sample.sizes, strict=True):
        if len(boxes):
            end = undo(boxes, size)[:, 2:].max(axis=0) / size
            ends.append(bool((end > 0.9).all() and (end < 1.02).all()))
    return float(np.mean(ends)) > 0.7


def _inside(sample: _Sample, boxes: list[Floats]) -> bool:
    """Whether nearly all boxes lie in their images, and right side out."""
    fits = [
        (some >= -0.02 * max(size)).all(axis=1)
        & (some[:, 2:] <= 1.02 * np.array(size)).all(axis=1)
        & (some[:, 2:] > some[:, :2]).all(axis=1)
        for some, size in zip(boxes, sample.sizes, strict=True)
    ]
    return float(np.concatenate(fits).mean()) > 0.95


def _reach(sample: _Sample) -> float:
    """The usual ratio of the outermost corner to the size of the image."""
    ends = [
        (boxes[:, 2:].max(axis=0) / size).max()
        for boxes, size in zip(sample.boxes, sample.sizes, strict=True)
        if len(boxes)
    ]
    return max(float(np.median(ends)), 1e-9)


def _counting_from_one(sample: _Sample) -> list[str]:
    """Look whether whole-number boxes begin at 1 where they touch the border, or end one short of it."""
    boxes = [part for part in sample.boxes if len(part)]
    if not all((part == part.round()).all() for part in boxes):
        return []
    first = np.array([part[:, :2].min(axis=0) for part in boxes])
    short = np.array(
        [
            np.array(size) - part[:, 2:].max(axis=0)
            for part, size in zip(sample.boxes, sample.sizes, strict=True)
            if len(part)
        ]
    )
    if first.min() == 1 and (first == 1).mean() > 0.2 and short.min() == 0:
        return [
            "pixels are counted from 1: no box starts at 0, many start at 1 and end at the border; convert the file again with "
            "boxes as pixels counted from 1"
        ]
    if first.min() == 0 and short.min() == 1 and (short == 1).mean() > 0.2:
        return [
            "the last pixel of a box is left out: boxes start at 0 and all end one pixel before the border; convert the file "
            "again with boxes as whole pixels, the last one included"
        ]
    return []


def _other_images(sample: _Sample, before: float, explained: bool) -> list[str]:
    """Compare each image's boxes with those of the next image."""
    count = len(sample.boxes)
    if explained or count < 10:
        return []
    shifted = sample.boxes[1:] + sample.boxes[:1]
    shapes = [len(np.unique((boxes[:, 2:] - boxes[:, :2]).round(), axis=0)) for boxes in sample.boxes]
    grid = sum(shapes) < 0.3 * sum(map(len, sample.boxes))  # few shapes, in many places
    scaled = [
        boxes * (np.array([*size, *size]) / np.array([*other, *other]))
        for boxes, size, other in zip(shifted, sample.sizes, sample.sizes[1:] + sample.sizes[:1], strict=True)
    ]
    after = _recall(sample, scaled)
    if grid or after < before or not before:
        return []
    return [
        f"the boxes of the next image would find as many objects ({after:.3f}, their own {before:.3f}): boxes of other images, "
        "or boxes that do not depend on the image"
    ]


def _recall(sample: _Sample, boxes: list[Floats]) -> float:
    """Part of the objects that some box overlaps by half."""
    groups, owners = (np.repeat(np.arange(len(some)), list(map(len, some))) for some in (boxes, sample.objects))
    objects, crowd = np.concatenate(sample.objects), np.zeros(len(owners), np.bool_)
    pairs = overlapping_pairs(np.concatenate(boxes), groups, objects, owners, crowd, minimum=0.5)
    return len(np.unique(pairs.objects)) / len(objects)

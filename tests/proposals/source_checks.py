"""What every source that works on pixels must do, for the tests of each."""

from __future__ import annotations

import json
from collections.abc import Callable

import numpy as np
import torch

from detpipe.boxes import iou
from detpipe.proposals.image_source import ImageProposals

from .needs import PLACES, Image, odd_images, planted


def best_overlap(boxes: np.ndarray, box: tuple[int, int, int, int]) -> float:
    """The IoU of a box with the one of ``boxes`` that fits best."""
    return iou(torch.tensor([box], dtype=torch.float32), torch.from_numpy(boxes)).max().item()


def finds_planted_objects(source: ImageProposals, least: float = 0.8) -> None:
    """Rectangles and ellipses in several places, on several grounds, are found."""
    for seed, box in enumerate(PLACES):
        for shape in ("rectangle", "ellipse"):
            boxes, _ = source.propose(planted(box, shape, seed))
            assert best_overlap(boxes, box) > least, (shape, box)


def boxes_are_sound(boxes: np.ndarray, scores: np.ndarray, image: Image, source: ImageProposals) -> None:
    """Inside the image, each once, best first, no smaller or more than asked for."""
    height, width = image.shape[:2]
    assert boxes.dtype == scores.dtype == np.float32
    assert boxes.shape == (len(scores), 4)
    assert np.isfinite(boxes).all()
    assert np.isfinite(scores).all()
    assert (boxes >= 0).all()
    assert (boxes[:, 2:] <= [width, height]).all()
    assert (boxes[:, 2:] - boxes[:, :2] >= max(source.min_size, 1e-6)).all()
    assert (np.diff(scores) <= 0).all()
    assert len(np.unique(boxes, axis=0)) == len(boxes) <= (source.max_boxes or 10**9)


def takes_any_image(source: ImageProposals) -> None:
    """Odd images do no harm, and those that are large enough give boxes or none."""
    for name, image in odd_images().items():
        if min(image.shape[:2]) < source.smallest_image:
            continue
        before = image.copy()
        boxes, scores = source.propose(image)
        boxes_are_sound(boxes, scores, image, source)
        assert np.array_equal(image, before), name


def is_the_same_every_time(make: Callable[[], ImageProposals]) -> None:
    """Twice in one instance, and in a new one that has seen other images before."""
    image, source, other = planted(PLACES[0]), make(), make()
    boxes, scores = source.propose(image)
    other.propose(planted(PLACES[1], seed=5))
    for again in (source, other):
        assert np.array_equal(again.propose(image)[0], boxes)
        assert np.array_equal(again.propose(image)[1], scores)
    assert len(boxes) > 0
    flipped = np.ascontiguousarray(image[:, ::-1])[:, ::-1]  # the same pixels behind negative strides
    assert np.array_equal(source.propose(flipped)[0], boxes)


def settings_make_the_source_again(source: ImageProposals) -> None:
    """JSON holds all that is needed to make the same boxes."""
    stored = json.loads(json.dumps(source.settings))
    assert type(source)(**stored).settings == stored
    image = planted(PLACES[2])
    assert np.array_equal(type(source)(**stored).propose(image)[0], source.propose(image)[0])

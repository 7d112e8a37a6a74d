from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from detpipe.evaluation import canonical_order, evaluate_coco
from detpipe.evaluation.records import box_sizes, canonical_rows, check_detections, image_ranks
from detpipe.types import DetectionArrays

from .builders import found, shuffled, truth


def test_widths_of_a_file_come_back_exactly():
    rng = np.random.default_rng(0)
    xywh = rng.uniform(0, 1000, (20_000, 4)).round(2)
    corners = np.concatenate((xywh[:, :2], xywh[:, :2] + xywh[:, 2:]), axis=1)
    assert (corners[:, 2:] - corners[:, :2] != xywh[:, 2:]).any()  # the plain difference does not give them back
    np.testing.assert_array_equal(box_sizes(corners), xywh[:, 2:])


def test_a_box_of_32_by_32_stays_small():
    x = 32.02
    assert x + 32.0 - x > 32.0
    box = (x, x, x + 32.0, x + 32.0)
    objects, detections = [(1, 1, (500, 500, 520, 520))], [(1, 1, 0.9, box), (1, 1, 0.5, (500, 500, 520, 520))]
    # a false positive of at most 32 x 32 pixels counts against APs; one that is larger does not
    assert evaluate_coco(truth(objects, [1]), found(detections))["APs"] == pytest.approx(0.5)


def test_the_order_is_total():
    rng = np.random.default_rng(1)
    detections = DetectionArrays(
        rng.integers(0, 3, 400),
        rng.integers(0, 3, (400, 4)) + np.array([0.0, 0, 3, 3]),
        rng.integers(0, 3, 400) / 2,
        rng.integers(1, 3, 400),
    )
    first, second = canonical_order(detections), canonical_order(shuffled(detections, 5))
    for field in ("image_ids", "boxes", "scores", "labels"):
        np.testing.assert_array_equal(getattr(first, field), getattr(second, field))
    keys = list(zip(first.image_ids, first.labels, -first.scores, strict=True))
    assert keys == sorted(keys)


def test_of_equal_scores_the_larger_box_comes_first():
    small, large = (1, 1, 0.5, (0, 0, 5, 5)), (1, 1, 0.5, (3, 3, 9, 9))
    assert canonical_order(found([small, large])).boxes[0].tolist() == [3, 3, 9, 9]


def test_images_are_numbered_by_rising_id():
    annotations = truth([], [70, 5, 2**40])
    assert image_ranks(annotations, np.array([5, 2**40, 70, 5])).tolist() == [0, 2, 1, 0]


def test_arrays_of_different_lengths_are_refused():
    detections = DetectionArrays(np.zeros(2, np.int64), np.zeros((2, 4)), np.zeros(3), np.ones(2, np.int64))
    with pytest.raises(ValueError, match="got shapes"):
        check_detections(truth([], [0]), detections)


@settings(deadline=None)
@given(st.integers(0, 60), st.integers(1, 4), st.integers(1, 5), st.randoms(use_true_random=False))
def test_the_quick_sort_is_that_by_all_keys(size, images, values, random):
    """Row for row, equal ones included: with few values for each key, ties of every length come up."""
    rng = np.random.default_rng(random.getrandbits(64))
    corner = rng.integers(0, values, (size, 2)).astype(float) * rng.choice([-1.0, 1.0])
    detections = DetectionArrays(
        image_ids=rng.choice([2**60 + 1, 5, 0, 2**60][:images], size),
        boxes=np.concatenate((corner, corner + rng.integers(1, values + 1, (size, 2))), axis=1),
        scores=rng.choice([0.0, -0.0, 0.5, 0.25, np.nextafter(0.5, 1)], size) if values > 1 else np.zeros(size),
        labels=rng.integers(1, values + 1, size),
    )
    boxes = detections.boxes
    area = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    keys = (*boxes.T[::-1], -area, -detections.scores, detections.labels, detections.image_ids)
    assert canonical_rows(detections).tolist() == np.lexsort(keys).tolist()

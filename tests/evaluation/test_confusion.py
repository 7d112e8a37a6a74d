from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from samples import overlap as overlap_of

from detpipe.evaluation.confusion import detection_confusion
from detpipe.evaluation.matches import match
from detpipe.types import Annotations, DetectionArrays

from .builders import found, truth
from .test_coco import scenes
from .test_error_types import slow_records

BOX, FAR, ELSEWHERE = (0, 0, 100, 100), (500, 500, 600, 600), (800, 0, 850, 50)


def test_a_case_worked_by_hand():
    annotations = truth([(1, 1, BOX), (1, 2, FAR), (2, 1, BOX)], [1, 2], ["cat", "dog"])
    rows = [
        (1, 1, 0.9, BOX),  # cat found
        (1, 1, 0.8, FAR),  # dog taken for a cat
        (1, 2, 0.7, FAR),  # dog found, but its object is taken: background taken for a dog
        (1, 2, 0.6, ELSEWHERE),  # background taken for a dog
        (2, 1, 0.2, BOX),  # below the score: the cat of image 2 is missed
    ]
    assert detection_confusion(annotations, found(rows), 0.5).tolist() == [[1, 0, 1], [1, 0, 0], [0, 2, 0]]
    assert detection_confusion(annotations, found(rows), 0.2).tolist() == [[2, 0, 0], [1, 0, 0], [0, 2, 0]]
    assert detection_confusion(annotations, found(rows), 0.95).tolist() == [[0, 0, 2], [0, 0, 1], [0, 0, 0]]


def test_a_score_equal_to_the_threshold_counts():
    annotations = truth([(1, 1, BOX)], [1])
    assert detection_confusion(annotations, found([(1, 1, 0.5, BOX)]), 0.5).tolist() == [[1, 0], [0, 0]]


def test_ignored_objects_are_not_counted_found_or_not():
    annotations = truth([(1, 1, BOX), (1, 2, FAR)], [1], "ab", crowd=[0], difficult=[1])
    assert not detection_confusion(annotations, found([]), 0).any()
    rows = [(1, 2, 0.9, (10, 10, 20, 20)), (1, 1, 0.8, (30, 30, 40, 40)), (1, 1, 0.7, FAR)]
    assert not detection_confusion(annotations, found(rows), 0).any()


def test_more_than_a_hundred_detections_of_an_image_count():
    rows = [(1, 1, 0.9, (i, 0, i + 1, 1)) for i in range(150)]
    assert detection_confusion(truth([(1, 1, FAR)], [1]), found(rows), 0.5).tolist() == [[0, 1], [150, 0]]


def test_what_is_refused():
    with pytest.raises(ValueError, match="above 0 and at most 1, got 0"):
        detection_confusion(truth([], [1]), found([]), 0.5, 0)


def slow(annotations: Annotations, detections: DetectionArrays, score: float) -> np.ndarray:
    order = np.lexsort((-detections.scores, detections.image_ids))
    sorted_ = DetectionArrays(*(getattr(detections, k)[order] for k in ("image_ids", "boxes", "scores", "labels")))
    objects, rows = slow_records(annotations, sorted_)
    background = annotations.num_classes
    matrix = np.zeros((background + 1, background + 1), np.int64)
    for row in rows:
        if row["score"] < score:
            continue
        best = None
        for ignored in (False, True):
            for one in objects:
                free = one["by"] is None or one["crowd"]
                if one["image"] != row["image"] or one["ignore"] != ignored or not free:
                    continue
                overlap = overlap_of(row["box"], one["box"], one["crowd"])
                if overlap >= 0.5 and (best is None or overlap >= best[0]):
                    best = overlap, one
            if best is not None:
                break
        if best is None:
            matrix[background, row["label"] - 1] += 1
            continue
        best[1]["by"] = row
        if not best[1]["ignore"]:
            matrix[best[1]["label"] - 1, row["label"] - 1] += 1
    for one in objects:
        if one["by"] is None and not one["ignore"]:
            matrix[one["label"] - 1, background] += 1
    return matrix


@settings(deadline=None, max_examples=100)
@given(scenes())
def test_it_is_what_the_definition_says(scene):
    annotations, detections = scene
    ordered = match(annotations, detections, [0.5]).detections  # ties between scores as everywhere
    for score in (0.0, 0.5):
        matrix = detection_confusion(annotations, ordered, score)
        total = np.count_nonzero(~(annotations.iscrowd | annotations.difficult))
        assert matrix[:-1].sum() == total  # each object that counts has one place in its row
    distinct = DetectionArrays(
        ordered.image_ids, ordered.boxes, ordered.scores - np.arange(len(ordered.scores)) * 1e-6, ordered.labels
    )
    for score in (0.0, 0.49):
        np.testing.assert_array_equal(
            detection_confusion(annotations, distinct, score), slow(annotations, distinct, score)
        )

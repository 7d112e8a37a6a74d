from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings

from detpipe.evaluation import read_coco_annotations
from detpipe.evaluation.calibration import calibrate, calibration_by_class, operating_point
from detpipe.evaluation.coco import RECALL_LEVELS, precision_by_recall
from detpipe.evaluation.matches import AREAS, IOU_THRESHOLDS, describe_area, match
from detpipe.support.errors import DataError
from detpipe.types import Annotations, DetectionArrays

from . import builders
from .builders import found, truth
from .pycocotools_reference import reference_evaluator
from .test_coco import scenes


def assert_same_matches(annotations: Annotations, detections: DetectionArrays) -> int:
    """Every detection has taken the same object and is ignored alike; returns how many were compared."""
    ours, compared = match(annotations, detections), 0
    areas = [list(limits) for limits in AREAS.values()]
    evaluator = reference_evaluator(annotations, detections)
    assert evaluator.params.areaRng == areas
    np.testing.assert_array_equal(evaluator.params.iouThrs, IOU_THRESHOLDS)
    for one in filter(None, evaluator.evalImgs):
        area, label, image = areas.index(list(one["aRng"])), one["category_id"], one["image_id"] - 1
        rows = np.flatnonzero((ours.images == image) & (ours.detections.labels == label))
        np.testing.assert_array_equal(ours.detections.scores[rows], one["dtScores"])
        # pycocotools numbers objects from 1 and writes 0 for none; ours counts from 0
        np.testing.assert_array_equal(ours.objects[area][:, rows] + 1, np.reshape(one["dtMatches"], (10, -1)))
        np.testing.assert_array_equal(ours.ignored[area][:, rows], np.reshape(one["dtIgnore"], (10, -1)))
        ids = np.array(one["gtIds"], int) - 1
        np.testing.assert_array_equal(ours.object_ignored[area, ids], np.array(one["gtIgnore"], bool))
        compared += len(rows)
    return compared


@settings(deadline=None, max_examples=80)
@given(scenes())
def test_each_match_is_that_of_pycocotools(scene):
    assert_same_matches(*scene)


def test_matches_of_real_crowds_are_those_of_pycocotools(shared_data):
    annotations = read_coco_annotations(shared_data / "coco_mini" / "annotations" / "instances_val2017.json")
    assert annotations.iscrowd.sum() == 7
    assert assert_same_matches(annotations, builders.jittered(annotations, seed=3)) > 2000


def test_curves_are_those_of_pycocotools(shared_data):
    annotations = read_coco_annotations(shared_data / "coco_mini" / "annotations" / "instances_val2017.json")
    detections = builders.jittered(annotations, seed=1)
    evaluator = reference_evaluator(annotations, detections)
    np.testing.assert_array_equal(evaluator.params.recThrs, RECALL_LEVELS)
    ours = match(annotations, detections)
    for area in range(4):
        expected = np.moveaxis(evaluator.eval["precision"][:, :, :, area, 2], 1, 2)
        curves = np.nan_to_num(precision_by_recall(ours, area), nan=-1.0)
        np.testing.assert_allclose(curves, expected, rtol=0, atol=1e-12)


def test_a_case_worked_by_hand():
    """Two cats; the best detection is wrong, the next two are right: precision 1/2 at recall 1/2, 2/3 at recall 1."""
    annotations = truth([(1, 1, (0, 0, 10, 10)), (1, 1, (20, 0, 30, 10))], [1])
    detections = found(
        [(1, 1, 0.9, (50, 50, 60, 60)), (1, 1, 0.8, (0, 0, 10, 10)), (1, 1, 0.7, (20, 0, 30, 10)), (1, 1, 0.6, (0, 0, 10, 9))]
    )  # fmt: skip
    matches = match(annotations, detections)
    assert matches.objects[0, 0].tolist() == [-1, 0, 1, -1]  # the last finds the first cat taken
    assert matches.true().tolist() == [False, True, True, False]
    assert matches.false().tolist() == [True, False, False, True]
    assert not matches.missed().any()
    np.testing.assert_allclose(precision_by_recall(matches)[:, 0], np.full((10, 101), 2 / 3))


def test_of_equal_overlaps_the_later_object_and_of_all_the_one_that_counts():
    box = (0, 0, 10, 10)
    annotations = truth([(1, 1, box), (1, 1, box), (1, 1, box)], [1], difficult=[2])
    matches = match(annotations, found([(1, 1, 0.9 - i / 10, box) for i in range(4)]))
    assert matches.objects[0, 0].tolist() == [1, 0, 2, -1]
    assert matches.ignored[0, 0].tolist() == [False, False, True, False]


def test_a_crowd_is_never_used_up():
    annotations = truth([(1, 1, (0, 0, 100, 100))], [1], crowd=[0])
    matches = match(annotations, found([(1, 1, 0.5, (10, 10, 20, 20))] * 3))
    assert matches.objects[0, 0].tolist() == [0, 0, 0]
    assert matches.ignored[0, 0].all()
    assert not matches.missed().any()
    assert np.isnan(precision_by_recall(matches)).all()


def test_only_the_best_hundred_of_an_image_and_class_count():
    rows = [(1, 1, i / 200, (0, 0, 10, 10)) for i in range(150)] + [
        (2, 1, 0.01, (0, 0, 9, 9)),
        (1, 2, 0.01, (0, 0, 9, 9)),
    ]
    matches = match(truth([(1, 1, (0, 0, 10, 10))], [1, 2], "ab"), found(rows))
    assert len(matches) == 102
    assert matches.detections.scores[:100].min() == 0.25


def test_blocks_of_pairs_change_nothing(monkeypatch, shared_data):
    annotations = read_coco_annotations(shared_data / "coco_mini" / "annotations" / "instances_val2017.json")
    detections = builders.jittered(annotations, seed=4)
    whole = match(annotations, detections).objects
    monkeypatch.setattr("detpipe.evaluation.matches._BLOCK", 7)
    np.testing.assert_array_equal(match(annotations, detections).objects, whole)


def test_no_detections_and_no_objects():
    matches = match(truth([(1, 1, (0, 0, 9, 9))], [1]), found([]))
    assert len(matches) == 0
    assert matches.missed().tolist() == [True]
    assert (precision_by_recall(matches) == 0).all()
    assert np.isnan(precision_by_recall(match(truth([], [1]), found([])))).all()


def test_what_is_refused():
    annotations = truth([(1, 1, (0, 0, 9, 9))], [1])
    with pytest.raises(ValueError, match=r"above 0 and at most 1, got \[0\.0, 0\.5\]"):
        match(annotations, found([]), [0.0, 0.5])
    with pytest.raises(DataError, match="the score is nan"):
        match(annotations, found([(1, 1, float("nan"), (0, 0, 9, 9))]))


def test_names_of_areas():
    assert [describe_area(name) for name in AREAS] == [
        "all sizes",
        "up to 32 x 32 pixels",
        "32 x 32 to 96 x 96 pixels",
        "from 96 x 96 pixels",
    ]


def test_calibration_worked_by_hand():
    scores = np.array([0.05, 0.15, 0.15, 0.95, 1.0, 0.95, 0.95])
    right = np.array([0, 1, 0, 1, 1, 1, 0], bool)
    diagram = calibrate(scores, right)
    assert diagram.counts.tolist() == [1, 2, 0, 0, 0, 0, 0, 0, 0, 4]  # a score of 1 belongs to the last bin
    assert diagram.precision[[0, 1, 9]].tolist() == [0.0, 0.5, 0.75]
    assert np.isnan(diagram.precision[2:9]).all()
    assert diagram.error == pytest.approx((0.05 + 2 * 0.35 + 4 * (0.9625 - 0.75)) / 7)
    assert np.isnan(calibrate(np.zeros(0), np.zeros(0, bool)).error)
    with pytest.raises(ValueError, match=r"scores in 0..1, got 0.5..1.5"):
        calibrate(np.array([0.5, 1.5]), np.array([True, True]))


def test_calibration_leaves_out_what_is_ignored_and_knows_the_classes():
    box, crowd = (0, 0, 50, 50), (100, 100, 300, 300)
    annotations = truth([(1, 1, box), (1, 1, crowd)], [1], "ab", crowd=[1])
    rows = [(1, 1, 0.8, box), (1, 1, 0.3, (120, 120, 140, 140)), (1, 2, 0.6, box)]
    everything, first, second = calibration_by_class(match(annotations, found(rows))) or []
    assert everything.counts.sum() == 2
    assert (first.error, second.error) == (pytest.approx(0.2), pytest.approx(0.6))
    assert calibration_by_class(match(annotations, found([(1, 1, 7.0, box)]))) is None


def test_operating_point():
    boxes = [(0, 0, 9, 9), (20, 0, 29, 9), (40, 0, 49, 9), (60, 0, 69, 9)]
    annotations = truth([(1, 1, box) for box in boxes], [1])
    wrong = (500, 500, 510, 510)
    rows = [(1, 1, 0.9, boxes[0]), (1, 1, 0.8, boxes[1]), (1, 1, 0.8, wrong), (1, 1, 0.1, wrong), (1, 1, 0.1, boxes[2])]
    matches = match(annotations, found(rows))
    best = operating_point(matches)  # F1 is 2/5 at .9, 4/7 at .8, 6/9 at .1
    assert (best.score, best.precision, best.recall) == (0.1, 3 / 5, 3 / 4)
    assert best.f1 == pytest.approx(2 / 3)
    given_score = operating_point(matches, 0.85)
    assert (given_score.precision, given_score.recall) == (1.0, 0.25)
    nothing = operating_point(match(annotations, found([])))
    assert (nothing.score, nothing.precision, nothing.recall, nothing.f1) == (0.5, 0, 0, 0)

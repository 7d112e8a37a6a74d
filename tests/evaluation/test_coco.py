from __future__ import annotations

import contextlib
import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from detpipe.evaluation import evaluate_coco, read_coco_annotations, read_detections, write_detections
from detpipe.support.errors import DataError

from .builders import found, jittered, perfect, shuffled, truth

BACKENDS = ("detpipe", "pycocotools")
TWELVE = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")


def flat(metrics: dict[str, Any]) -> np.ndarray:
    assert set(metrics) == {*TWELVE, "per_class"}
    return np.array([*(metrics[name] for name in TWELVE), *metrics["per_class"].values()])


def reference(annotations: Path, rows: list[dict]) -> np.ndarray:
    """What pycocotools makes of the files, called the way its documentation calls it."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO(str(annotations))
        evaluator = COCOeval(coco, coco.loadRes(rows), "bbox")
        evaluator.evaluate()
        evaluator.accumulate()
        evaluator.summarize()
    precision = evaluator.eval["precision"][:, :, :, 0, 2]
    classes = [p[p > -1].mean() if (p > -1).any() else -1.0 for p in np.moveaxis(precision, 2, 0)]
    return np.concatenate((evaluator.stats, classes))


@pytest.mark.parametrize("backend", BACKENDS)
def test_golden_numbers(shared_data, backend):
    folder = shared_data / "golden_eval" / "coco"
    annotations = read_coco_annotations(folder / "instances_val2014_100.json")
    detections = read_detections(folder / "instances_val2014_fakebbox100_results.json", annotations)
    expected = json.loads((folder / "expected_pycocotools.json").read_text())
    metrics = evaluate_coco(annotations, detections, backend)
    for name, value in zip(expected["stat_names"], expected["stats"], strict=True):
        assert metrics[name] == pytest.approx(value, abs=1e-9)
    assert set(metrics["per_class"]) == set(expected["per_class_AP"])
    for name, value in expected["per_class_AP"].items():
        assert metrics["per_class"][name] == pytest.approx(value, abs=1e-9), name


@pytest.mark.parametrize("backend", BACKENDS)
def test_crowds_count_as_in_pycocotools_on_the_raw_file(shared_data, tmp_path, backend):
    file = shared_data / "coco_mini" / "annotations" / "instances_val2017.json"
    annotations = read_coco_annotations(file)
    assert annotations.iscrowd.sum() == 7
    detections = jittered(annotations, seed=0)
    write_detections(tmp_path / "dets.json", detections, annotations)
    expected = reference(file, json.loads((tmp_path / "dets.json").read_text()))
    np.testing.assert_allclose(flat(evaluate_coco(annotations, detections, backend)), expected, rtol=0, atol=1e-12)
    without = replace(annotations, iscrowd=np.zeros_like(annotations.iscrowd))
    assert abs(evaluate_coco(without, detections, backend)["AP"] - expected[0]) > 1e-4  # so the flag is what decides


@st.composite
def scenes(draw: st.DrawFn) -> tuple:
    """A few images with id gaps; boxes on a coarse grid, so that overlaps and scores are often exactly equal."""
    image_ids = draw(st.lists(st.integers(0, 2**40), min_size=1, max_size=4, unique=True))
    classes = [f"class {k}" for k in range(draw(st.integers(1, 3)))]
    grid, size = st.sampled_from([0.0, 16.0, 32.0, 64.0]), st.sampled_from([0.0, 8.0, 32.0, 64.0, 96.0, 128.0])
    box = st.tuples(grid, grid, size, size).map(lambda b: (b[0], b[1], b[0] + b[2], b[1] + b[3]))
    where = st.tuples(st.sampled_from(image_ids), st.integers(1, len(classes)))
    objects = draw(st.lists(st.tuples(where, box).map(lambda o: (*o[0], o[1])), max_size=12))
    crowd = [i for i in range(len(objects)) if draw(st.integers(0, 4)) == 0]
    difficult = [i for i in range(len(objects)) if draw(st.integers(0, 4)) == 0]
    score = st.sampled_from([0.1, 0.5, 0.5, 0.9])
    any_row = st.tuples(where, score, box).map(lambda r: (*r[0], r[1], r[2]))
    copies = st.sampled_from(objects) if objects else st.nothing()
    hit = st.tuples(copies, score).map(lambda r: (r[0][0], r[0][1], r[1], r[0][2]))
    rows = draw(st.lists(st.one_of(any_row, hit), max_size=25))
    return truth(objects, image_ids, classes, crowd, difficult), found(rows)


@settings(deadline=None, max_examples=80)
@given(scenes(), st.integers(0, 1000))
def test_both_backends_agree_and_order_does_not_matter(scene, seed):
    annotations, detections = scene
    ours = flat(evaluate_coco(annotations, detections))
    np.testing.assert_allclose(ours, flat(evaluate_coco(annotations, detections, "pycocotools")), rtol=0, atol=1e-12)
    np.testing.assert_array_equal(ours, flat(evaluate_coco(annotations, shuffled(detections, seed))))


@pytest.mark.parametrize("backend", BACKENDS)
def test_perfect_detections_score_one_and_empty_classes_minus_one(backend):
    annotations = truth([(5, 1, (0, 0, 50, 50)), (9, 1, (3, 4, 90, 80)), (9, 2, (1, 1, 20, 20))], [9, 5, 7], "abc")
    metrics = evaluate_coco(annotations, perfect(annotations), backend)
    for name in ("AP", "AP50", "AP75", "APs", "APm", "AR100", "ARs", "ARm"):
        assert metrics[name] == pytest.approx(1.0, abs=1e-12), name
    assert metrics["APl"] == metrics["ARl"] == -1.0
    assert metrics["per_class"] == {"a": pytest.approx(1.0), "b": pytest.approx(1.0), "c": -1.0}


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_detections_score_zero(backend):
    boxes = ((0, 0, 20, 20), (0, 0, 50, 50), (0, 0, 200, 200))
    metrics = evaluate_coco(truth([(0, 1, box) for box in boxes], [0, 1], "ab"), found([]), backend)
    assert [metrics[name] for name in TWELVE] == [0.0] * 12
    assert metrics["per_class"] == {"a": 0.0, "b": -1.0}


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_objects_at_all_is_not_zero_but_unknown(backend):
    metrics = evaluate_coco(truth([], [3, 4]), found([(3, 1, 0.5, (0, 0, 9, 9))]), backend)
    assert set(flat(metrics)) == {-1.0}


@pytest.mark.parametrize("backend", BACKENDS)
def test_annotation_id_zero_is_found(tmp_path, backend):
    file = tmp_path / "gt.json"
    box = {"image_id": 0, "category_id": 7, "bbox": [1, 2, 40, 40], "area": 1600, "iscrowd": 0}
    data = {"images": [{"id": 0}], "categories": [{"id": 7, "name": "cat"}], "annotations": [{"id": 0, **box}]}
    file.write_text(json.dumps(data))
    annotations = read_coco_annotations(file)
    assert evaluate_coco(annotations, perfect(annotations), backend)["AP"] == pytest.approx(1.0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_difficult_object_is_neither_missed_nor_a_false_positive(backend):
    plain, hard = (0, 0, 40, 40), (100, 100, 200, 200)
    annotations = truth([(1, 1, plain), (1, 1, hard)], [1], difficult=[1])
    hit, on_hard, inside_hard = (1, 1, 0.5, plain), (1, 1, 0.9, hard), (1, 1, 0.9, (110, 110, 130, 130))

    def ap(*rows: tuple) -> float:
        return evaluate_coco(annotations, found(rows), backend)["AP"]

    assert ap(hit) == pytest.approx(1.0)  # not a miss
    assert ap(hit, on_hard) == pytest.approx(1.0)  # not a false positive
    assert ap(hit, on_hard, on_hard) == pytest.approx(0.5)  # one match is forgiven, as for COCO's ignored objects
    assert ap(hit, inside_hard) == pytest.approx(0.5)  # unlike a crowd, it does not cover what lies inside


def test_nothing_is_printed(capsys):
    annotations = truth([(1, 1, (0, 0, 40, 40))], [1])
    for backend in BACKENDS:
        evaluate_coco(annotations, perfect(annotations), backend)
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("score", [float("nan"), float("inf"), -float("inf")])
def test_a_score_that_is_not_finite_names_the_record(score):
    box = (0.0, 0.0, 4.0, 4.0)
    detections = found([(8, 1, 0.5, box), (8, 1, score, box), (8, 1, score, box)])
    with pytest.raises(DataError, match=r"detection 1 \(image id 8, label 1\): the score is -?(nan|inf).*2 of 3"):
        evaluate_coco(truth([(8, 1, box)], [8]), detections)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ((8, 1, 0.5, (0, float("nan"), 4, 4)), "the box is .0.0, nan, 4.0, 4.0.: expected four finite numbers"),
        ((8, 1, 0.5, (9, 0, 4, 4)), "x2 >= x1"),
        ((999, 1, 0.5, (0, 0, 4, 4)), "the image id is 999"),
        ((8, 2, 0.5, (0, 0, 4, 4)), "the label is 2: expected 1..1"),
        ((8, 0, 0.5, (0, 0, 4, 4)), "the label is 0"),
    ],
)
def test_an_unsound_detection_names_the_record(row, message):
    good = (8, 1, 0.5, (0, 0, 4, 4))
    with pytest.raises(DataError, match=rf"detection 2 .*{message}"):
        evaluate_coco(truth([(8, 1, (0, 0, 4, 4))], [8]), found([good, good, row, row]))


def test_unsound_ground_truth_is_refused():
    good = truth([(8, 1, (0, 0, 4, 4)), (9, 1, (0, 0, 4, 4)), (9, 2, (0, 0, 4, 4))], [8, 9], "ab")
    for fault, message in [
        ({"boxes": good.boxes * [1, 1, 1, np.nan]}, "box 0 of image id 8 .8.jpg.: the box is"),
        ({"area": np.array([16.0, 16.0, -1.0])}, "box 1 of image id 9 .9.jpg.: the area is -1.0"),
        ({"labels": np.array([1, 3, 1])}, "box 0 of image id 9 .9.jpg.: the label is 3: expected 1..2"),
        ({"image_ids": np.array([8, 8])}, "image id 8 occurs more than once"),
        ({"class_names": ("a", "a")}, "the class name 'a' occurs more than once"),
    ]:
        with pytest.raises(DataError, match=message):
            evaluate_coco(replace(good, **fault), found([]))
    with pytest.raises(DataError, match="has no classes"):
        evaluate_coco(truth([], [1], ()), found([]))
    with pytest.raises(DataError, match="holds no images"):
        evaluate_coco(truth([], []), found([]))


def test_an_unknown_backend_is_refused():
    with pytest.raises(ValueError, match="'detpipe' or 'pycocotools', got 'torchmetrics'"):
        evaluate_coco(truth([], [1]), found([]), "torchmetrics")  # type: ignore[arg-type]

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from defusedxml.ElementTree import parse
from hypothesis import given, settings
from samples import overlap

from detpipe.evaluation import canonical_order, evaluate_voc, read_voc_detections
from detpipe.support.errors import DataError
from detpipe.types import Annotations, DetectionArrays

from .builders import found, perfect, truth
from .test_coco import scenes

A, B, C, HARD = (0, 0, 10, 10), (20, 0, 30, 10), (40, 0, 50, 10), (60, 0, 70, 10)


@pytest.fixture(scope="module")
def golden(shared_data: Path) -> tuple[Annotations, DetectionArrays, dict]:
    folder = shared_data / "golden_eval" / "voc"
    classes = sorted(file.stem for file in (folder / "dets").glob("*.txt"))
    stems = (folder / "test.txt").read_text().split()
    objects, difficult = [], []
    for stem in stems:
        for item in parse(folder / "Annotations" / f"{stem}.xml").findall("object"):
            xmin, ymin, xmax, ymax = (float(item.findtext(f"bndbox/{k}")) for k in ("xmin", "ymin", "xmax", "ymax"))
            if item.findtext("difficult") == "1":
                difficult.append(len(objects))
            objects.append((int(stem), classes.index(item.findtext("name")) + 1, (xmin - 1, ymin - 1, xmax, ymax)))
    annotations = truth(objects, [int(stem) for stem in stems], classes, difficult=difficult)
    named = replace(annotations, file_names=np.array([f"{stem}.jpg" for stem in stems]))
    return named, read_voc_detections(folder / "dets", named), json.loads((folder / "expected.json").read_text())


@pytest.mark.parametrize("threshold", [0.5, 0.75])
@pytest.mark.parametrize(("protocol", "key"), [("voc07", "11pt"), ("voc10", "area")])
def test_golden_numbers(golden, protocol, key, threshold):
    annotations, detections, expected = golden
    wanted = expected[f"plus1_iou{threshold}_{key}"]
    metrics = evaluate_voc(annotations, detections, protocol, threshold, strict=True)
    assert metrics["mAP"] == pytest.approx(wanted["mAP"], abs=1e-9)
    measured = {name: ap for name, ap in metrics["per_class"].items() if ap >= 0}
    assert len(metrics["per_class"]) == 80
    assert set(measured) == set(wanted["ap"])
    for name, ap in wanted["ap"].items():
        assert measured[name] == pytest.approx(ap, abs=1e-9), name


def test_average_precision_worked_by_hand():
    annotations = truth([(1, 1, A), (1, 1, B), (2, 1, C), (2, 1, HARD)], [1, 2], difficult=[3])
    detections = found(
        [
            (1, 1, 0.9, A),  # true: recall 1/3, precision 1
            (1, 1, 0.8, C),  # false, C is in the other image: precision 1/2
            (2, 1, 0.7, HARD),  # not counted
            (2, 1, 0.65, HARD),  # not counted either
            (2, 1, 0.6, C),  # true: recall 2/3, precision 2/3
            (1, 1, 0.5, A),  # false, A is taken
        ]
    )
    # at recall 0, .1, .2, .3 the best precision is 1; at .4, .5, .6 it is 2/3; above nothing
    assert evaluate_voc(annotations, detections, "voc07")["mAP"] == pytest.approx((4 * 1 + 3 * 2 / 3) / 11, abs=1e-12)
    assert evaluate_voc(annotations, detections, "voc10")["mAP"] == pytest.approx(1 / 3 + 1 / 3 * 2 / 3, abs=1e-12)
    easy = truth([(1, 1, A), (1, 1, B), (2, 1, C), (2, 1, HARD)], [1, 2])
    assert evaluate_voc(easy, detections, "voc10")["mAP"] != pytest.approx(5 / 9, abs=1e-3)


def test_a_second_detection_is_false_even_if_another_object_is_near():
    # both detections overlap the first object most; the devkit gives the second one no second choice
    annotations = truth([(1, 1, (0, 0, 10, 10)), (1, 1, (0, 0, 10, 8))], [1])
    detections = found([(1, 1, 0.9, (0, 0, 10, 10)), (1, 1, 0.8, (0, 0, 10, 9.5))])
    assert evaluate_voc(annotations, detections, "voc10")["mAP"] == pytest.approx(0.5)


def test_an_overlap_equal_to_the_threshold_matches_unless_strict():
    annotations, detections = truth([(1, 1, (0, 0, 10, 10))], [1]), found([(1, 1, 0.9, (0, 0, 10, 5))])
    assert evaluate_voc(annotations, detections, "voc07")["mAP"] == pytest.approx(1.0)
    assert evaluate_voc(annotations, detections, "voc07", strict=True)["mAP"] == 0.0


def test_classes_without_countable_objects_are_not_part_of_the_mean():
    objects = [(1, 1, A), (1, 2, HARD), (1, 4, B)]
    annotations = truth(objects, [1], "abcd", difficult=[1])
    detections = found([(1, 1, 0.9, A), (1, 2, 0.9, HARD), (1, 3, 0.9, A)])
    for protocol in ("voc07", "voc10"):
        metrics = evaluate_voc(annotations, detections, protocol)
        assert metrics == {"mAP": 0.5, "per_class": {"a": pytest.approx(1.0), "b": -1.0, "c": -1.0, "d": 0.0}}
        assert evaluate_voc(truth([], [1]), found([]), protocol) == {"mAP": -1.0, "per_class": {"cat": -1.0}}
        assert evaluate_voc(annotations, found([]), protocol)["mAP"] == 0.0
        assert evaluate_voc(annotations, perfect(annotations), protocol)["mAP"] == pytest.approx(1.0)


def devkit(annotations: Annotations, detections: DetectionArrays, label: int, threshold: float) -> list[str]:
    """``VOCevaldet.m`` line by line: the fate of each detection of a class, best score first."""
    images = np.repeat(annotations.image_ids, np.diff(annotations.offsets))
    ordered = canonical_order(detections)
    rows = sorted(np.flatnonzero(ordered.labels == label), key=lambda i: -ordered.scores[i])
    taken: set[int] = set()
    fates = []
    for i in rows:
        best, chosen = -np.inf, -1
        for j in np.flatnonzero((annotations.labels == label) & (images == ordered.image_ids[i])):
            shared = overlap(ordered.boxes[i], annotations.boxes[j])
            if shared > max(best, 0):
                best, chosen = shared, int(j)
        if best < threshold:
            fates.append("false")
        elif annotations.difficult[chosen] or annotations.iscrowd[chosen]:
            fates.append("ignored")
        else:
            fates.append("false" if chosen in taken else "true")
            taken.add(chosen)
    return fates


@settings(deadline=None, max_examples=150)
@given(scenes())
def test_equals_the_devkit_written_as_loops(scene):
    annotations, detections = scene
    for strict in (False, True):
        threshold = np.nextafter(0.5, 1) if strict else 0.5
        metrics = evaluate_voc(annotations, detections, "voc10", strict=strict)
        for label, name in enumerate(annotations.class_names, start=1):
            countable = ~annotations.difficult & ~annotations.iscrowd & (annotations.labels == label)
            if not countable.any():
                assert metrics["per_class"][name] == -1.0
                continue
            fates = devkit(annotations, detections, label, threshold)
            hits = np.cumsum([fate == "true" for fate in fates])
            errors = np.cumsum([fate == "false" for fate in fates])
            area, last = 0.0, 0
            for i, hit in enumerate(hits):
                if hit > last:
                    ahead = [hits[k] / (hits[k] + errors[k]) for k in range(i, len(hits))]
                    area, last = area + max(ahead) / countable.sum(), hit
            assert metrics["per_class"][name] == pytest.approx(area, abs=1e-12)


def test_wrong_arguments_are_refused():
    annotations = truth([(1, 1, A)], [1])
    with pytest.raises(ValueError, match="'voc07' or 'voc10', got 'voc12'"):
        evaluate_voc(annotations, found([]), "voc12")  # type: ignore[arg-type]
    for threshold in (0.0, 1.1, float("nan")):
        with pytest.raises(ValueError, match="iou_threshold must be above 0 and at most 1"):
            evaluate_voc(annotations, found([]), "voc07", threshold)
    with pytest.raises(DataError, match=r"detection 0 .*the score is nan"):
        evaluate_voc(annotations, found([(1, 1, float("nan"), A)]), "voc07")

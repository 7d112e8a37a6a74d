"""Federated evaluation against a slow reference, written from the rules, class by class and image by image."""

from __future__ import annotations

import json
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from samples import overlap

from detpipe.evaluation import canonical_order, evaluate, evaluate_lvis, format_table, read_coco_annotations
from detpipe.support.errors import DataError
from detpipe.types import Annotations, DetectionArrays, Federation

from .builders import found, shuffled, truth

AREAS = {"": (0, 1e10), "s": (0, 32**2), "m": (32**2, 96**2), "l": (96**2, 1e10)}
THRESHOLDS = np.linspace(0.5, 0.95, 10)
LEVELS = np.linspace(0, 1, 101)
Box = tuple[float, float, float, float]


def federated(annotations: Annotations, negative: list, not_exhaustive: list, frequencies: str) -> Annotations:
    pairs = [np.array(rows, np.int64).reshape(-1, 2) for rows in (negative, not_exhaustive)]
    return replace(annotations, federation=Federation(pairs[0], pairs[1], tuple(frequencies)))


def match(dets: list, objects: list, threshold: float, area: tuple, forgiving: bool) -> list[tuple[float, bool, bool]]:
    """(score, true, ignored) of the detections of one class in one image, best first."""
    out_of_range = [not area[0] <= size <= area[1] for _, size in objects]
    order = sorted(range(len(objects)), key=lambda g: out_of_range[g])
    taken: set[int] = set()
    rows = []
    for score, box in dets:
        best, reached = None, min(threshold, 1 - 1e-10)
        for g in order:
            if g in taken:
                continue
            if best is not None and not out_of_range[best] and out_of_range[g]:
                break
            shared = overlap(box, objects[g][0])
            if shared >= reached:
                best, reached = g, shared
        if best is None:
            size = (box[2] - box[0]) * (box[3] - box[1])
            rows.append((score, False, forgiving or not area[0] <= size <= area[1]))
        else:
            taken.add(best)
            rows.append((score, True, out_of_range[best]))
    return rows


def curve(rows: list, objects: int) -> tuple[list[float], float]:
    """Precision at the 101 levels of recall, and the last recall."""
    rows = [row for row in rows if not row[2]]
    scores = np.array([row[0] for row in rows])
    hits = np.array([row[1] for row in rows], float)[np.argsort(-scores, kind="stable")]
    true, false = np.cumsum(hits), np.cumsum(1 - hits)
    recall, precision = true / objects, true / (true + false + np.spacing(1))
    envelope = np.maximum.accumulate(precision[::-1])[::-1]
    places = np.searchsorted(recall, LEVELS, side="left")
    return [envelope[p] if p < len(envelope) else 0.0 for p in places], recall[-1] if len(recall) else 0.0


def slow(annotations: Annotations, detections: DetectionArrays, limit: int = 300) -> dict[str, float]:
    federation = annotations.federation
    assert federation is not None
    absent, partial = (set(map(tuple, p.tolist())) for p in (federation.negative, federation.not_exhaustive))
    objects, dets, by_image = defaultdict(list), defaultdict(list), defaultdict(list)
    for i, image in enumerate(annotations.image_ids.tolist()):
        for b in range(annotations.offsets[i], annotations.offsets[i + 1]):
            objects[image, int(annotations.labels[b])].append((annotations.boxes[b], annotations.area[b]))
    order = canonical_order(detections)
    for row in range(len(order.scores)):
        by_image[int(order.image_ids[row])].append((float(order.scores[row]), int(order.labels[row]), order.boxes[row]))
    for image, rows in by_image.items():
        for score, label, box in sorted(rows, key=lambda r: (-r[0], r[1]))[:limit]:
            if (image, label) in absent or (image, label) in objects:
                dets[image, label].append((score, box))
    precision: dict[tuple, list] = {}
    recall: dict[tuple, float] = {}
    images = sorted(annotations.image_ids.tolist())
    for k in range(1, annotations.num_classes + 1):
        for name, area in AREAS.items():
            count = sum(area[0] <= size <= area[1] for image in images for _, size in objects.get((image, k), []))
            for t in THRESHOLDS if count else ():
                rows: list = []
                for image in images:
                    rows += match(dets[image, k], objects.get((image, k), []), t, area, (image, k) in partial)
                precision[k, name, t], recall[k, name, t] = curve(rows, count)

    def average(values: Any) -> float:
        found_values = [v for value in values for v in np.atleast_1d(value)]
        return float(np.mean(found_values)) if found_values else -1.0

    def ap(name: str = "", only: float | None = None, frequency: str | None = None) -> float:
        return average(
            value
            for (k, area, t), value in precision.items()
            if area == name and only in (None, t) and frequency in (None, federation.frequencies[k - 1])
        )

    return {
        "AP": ap(),
        "AP50": ap(only=THRESHOLDS[0]),
        "AP75": ap(only=THRESHOLDS[5]),
        **{f"AP{name}": ap(name) for name in "sml"},
        **{f"AP{letter}": ap(frequency=letter) for letter in "rcf"},
        **{f"AR{name}": average(v for (_, area, _), v in recall.items() if area == name) for name in AREAS},
    }


@st.composite
def scenes(draw: st.DrawFn) -> tuple[Annotations, DetectionArrays]:
    image_ids = draw(st.lists(st.integers(0, 2**40), min_size=1, max_size=4, unique=True))
    classes = draw(st.integers(1, 4))
    grid, size = st.sampled_from([0.0, 16.0, 32.0, 64.0]), st.sampled_from([8.0, 32.0, 64.0, 96.0, 128.0])
    box = st.tuples(grid, grid, size, size).map(lambda b: (b[0], b[1], b[0] + b[2], b[1] + b[3]))
    where = st.tuples(st.sampled_from(image_ids), st.integers(1, classes))
    objects = [(*place, b) for place, b in draw(st.lists(st.tuples(where, box), max_size=12))]
    score = st.sampled_from([0.1, 0.5, 0.9])
    anywhere = st.tuples(where, score, box).map(lambda r: (*r[0], r[1], r[2]))
    hits = st.tuples(st.sampled_from(objects) if objects else st.nothing(), score).map(
        lambda r: (r[0][0], r[0][1], r[1], r[0][2])
    )
    rows = draw(st.lists(st.one_of(anywhere, hits), max_size=30))
    pairs = st.lists(where, max_size=6, unique=True)
    annotations = truth(objects, image_ids, [f"class {k}" for k in range(classes)])
    letters = "".join(draw(st.lists(st.sampled_from("rcf"), min_size=classes, max_size=classes)))
    return federated(annotations, draw(pairs), draw(pairs), letters), found(rows)


@settings(deadline=None, max_examples=60)
@given(scenes(), st.sampled_from([1, 3, 300]), st.integers(0, 1000))
def test_it_agrees_with_the_rules_taken_one_by_one(scene, limit, seed):
    annotations, detections = scene
    got = evaluate_lvis(annotations, detections, limit)
    want = slow(annotations, detections, limit)
    assert set(got) == {*want, "per_class"}
    for name, value in want.items():
        assert got[name] == pytest.approx(value, abs=1e-12), name
    assert evaluate_lvis(annotations, shuffled(detections, seed), limit) == got


def test_what_was_not_searched_for_does_not_count():
    """By hand: a perfect cat; a dog where none was looked for, and one where it is known to be absent."""
    box: Box = (0, 0, 40, 40)
    plain = truth([(1, 1, box), (2, 2, box)], [1, 2, 3], ["cat", "dog"])
    cat, dog = (1, 1, 0.9, box), (2, 2, 0.5, box)
    stray = [cat, dog, (1, 2, 0.9, box)]
    assert evaluate_lvis(federated(plain, [], [], "rf"), found(stray))["AP"] == pytest.approx(1)
    absent = evaluate_lvis(federated(plain, [(1, 2)], [], "rf"), found(stray))
    assert absent["APr"] == pytest.approx(1)
    assert absent["APf"] == pytest.approx(0.5)
    assert absent["APc"] == -1
    forgiven = evaluate_lvis(federated(plain, [(1, 2)], [(1, 2)], "rf"), found(stray))
    assert forgiven["APf"] == pytest.approx(1)
    assert evaluate(plain, found(stray), "coco")["AP"] == pytest.approx(0.75)


def test_the_limit_is_of_the_image_not_of_the_class():
    box: Box = (0, 0, 40, 40)
    annotations = federated(truth([(1, 1, box), (1, 2, box)], [1], "ab"), [], [], "ff")
    rows = found([(1, 1, 0.9, box), (1, 1, 0.8, (50, 50, 60, 60)), (1, 2, 0.7, box)])
    assert evaluate_lvis(annotations, rows, 3)["AR"] == pytest.approx(1)
    assert evaluate_lvis(annotations, rows, 2)["AR"] == pytest.approx(0.5)
    with pytest.raises(ValueError, match="max_detections must be at least 1, got 0"):
        evaluate_lvis(annotations, rows, 0)


def lvis_file(path: Path, **changes: Any) -> Path:
    image = {"id": 4, "neg_category_ids": [9], "not_exhaustive_category_ids": [3], **changes.pop("image", {})}
    category = {"id": 9, "name": "ox", "frequency": "r", **changes.pop("category", {})}
    box = {"id": 1, "image_id": 4, "category_id": 3, "bbox": [0, 0, 8, 8], "area": 64}
    data = {
        "images": [{key: value for key, value in image.items() if value is not None}],
        "categories": [{"id": 3, "name": "yak", "frequency": "f"}, category],
        "annotations": [box],
    }
    path.write_text(json.dumps(data))
    return path


def test_reading_a_file(tmp_path):
    annotations = read_coco_annotations(lvis_file(tmp_path / "lvis.json"))
    assert annotations.federation is not None
    assert annotations.federation.negative.tolist() == [[4, 2]]
    assert annotations.federation.not_exhaustive.tolist() == [[4, 1]]
    assert annotations.federation.frequencies == ("f", "r")
    metrics = evaluate(annotations, found([(4, 1, 0.5, (0, 0, 8, 8)), (4, 1, 0.9, (2, 2, 8, 9))]), "lvis")
    assert metrics["AP"] == pytest.approx(1)
    table = format_table(metrics, "lvis")
    assert "APf    1.000" in table
    assert "300 detections an image" in table


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image": {"neg_category_ids": [7]}}, "image id 4: the field 'neg_category_ids' lists 7"),
        ({"image": {"not_exhaustive_category_ids": None}}, "image id 4.*'not_exhaustive_category_ids'"),
        (
            {"category": {"frequency": "often"}},
            "category id 9: the field 'frequency' is 'often': expected one of r, c, f",
        ),
    ],
)
def test_faults_of_a_file_are_named(tmp_path, changes, message):
    with pytest.raises(DataError, match=message):
        read_coco_annotations(lvis_file(tmp_path / "lvis.json", **changes))


def test_without_a_federation_it_is_refused():
    with pytest.raises(DataError, match="does not say for which classes each image was searched"):
        evaluate(truth([(1, 1, (0, 0, 4, 4))], [1]), found([]), "lvis")

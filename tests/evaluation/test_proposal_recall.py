"""Recall of proposals against pycocotools, a slow loop, and numbers worked out by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from samples import overlap

from detpipe.evaluation.proposal_recall import IOUS, MAX_BOXES, SIZES, evaluate_recall
from detpipe.support.errors import DataError
from detpipe.types import Annotations, DetectionArrays

from .pycocotools_reference import reference_evaluator

Boxes = dict[int, np.ndarray]


def annotations_of(images: list[dict[str, Any]], classes: int = 2) -> Annotations:
    """Each image: boxes [G, 4] and optionally labels, iscrowd, difficult, area; ids have gaps."""
    boxes = [np.asarray(image["boxes"], np.float64).reshape(-1, 4) for image in images]
    counts = [len(part) for part in boxes]

    def column(name: str, default: Any, kind: Any) -> np.ndarray:
        parts = [np.asarray(image.get(name, [default] * n), kind) for image, n in zip(images, counts, strict=True)]
        return np.concatenate([np.zeros(0, kind), *parts])

    packed = np.concatenate([np.zeros((0, 4)), *boxes])
    area = (packed[:, 2:] - packed[:, :2]).prod(axis=1)
    return Annotations(
        root=Path("images"),
        file_names=np.array([f"{index}.png" for index in range(len(images))], np.str_),
        image_ids=np.array([3 * index + 1 for index in range(len(images))], np.int64),
        sizes=np.full((len(images), 2), 400, np.int32),
        offsets=np.cumsum([0, *counts]),
        boxes=packed,
        labels=column("labels", 1, np.int64),
        iscrowd=column("iscrowd", False, np.bool_),
        difficult=column("difficult", False, np.bool_),
        area=column("area", 0, np.float64) if any("area" in image for image in images) else area,
        class_names=tuple("abcdefgh"[:classes]),
        category_ids=tuple(range(1, classes + 1)),
    )


@st.composite
def data_sets(draw: st.DrawFn) -> tuple[Annotations, Boxes]:
    """Objects of all sizes, and proposals near them and elsewhere; whole numbers, so that overlaps tie."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    images, proposals = [], {}
    for index in range(draw(st.integers(1, 4))):
        count = draw(st.integers(0, 6))
        start = rng.integers(0, 250, (count, 2))
        objects = np.concatenate((start, start + rng.choice([16, 31, 32, 33, 64, 96, 130], (count, 2))), axis=1)
        near = objects[rng.integers(0, count, 30)] + rng.integers(-8, 9, (30, 4)) if count else np.zeros((0, 4))
        corner = rng.integers(0, 300, (10, 2))
        far = np.concatenate((corner, corner + rng.integers(5, 99, (10, 2))), axis=1)
        boxes = rng.permutation(np.concatenate((near, far, objects[: draw(st.integers(0, 2))])))
        boxes = boxes[(boxes[:, 2:] > boxes[:, :2]).all(axis=1)]
        images.append({"boxes": objects, "labels": rng.integers(1, 3, count), "iscrowd": rng.random(count) < 0.2})
        proposals[3 * index + 1] = boxes[: draw(st.integers(0, 40))].astype(np.float32)
    return annotations_of(images), proposals


def coco_average_recall(annotations: Annotations, proposals: Boxes, max_boxes: list[int]) -> np.ndarray:
    """AR by pycocotools without classes: [all, small, medium, large] x V."""
    counts = [len(proposals[image]) for image in annotations.image_ids.tolist()]
    packed = np.concatenate([np.zeros((0, 4)), *(proposals[image] for image in annotations.image_ids.tolist())])
    order = np.concatenate([np.arange(0), *(np.arange(count) for count in counts)])
    boxes = DetectionArrays(
        np.repeat(annotations.image_ids, counts), packed, 1 - order / 10_000, np.ones(len(packed), int)
    )
    run = reference_evaluator(annotations, boxes, useCats=0, maxDets=max_boxes)
    recall = np.where(run.eval["recall"] < 0, np.nan, run.eval["recall"])  # [T, 1, A, V]
    return recall[:, 0].mean(axis=0)


@settings(deadline=None, max_examples=60)
@given(data_sets())
def test_average_recall_is_that_of_pycocotools(data):
    annotations, proposals = data
    max_boxes = [1, 3, 10, 30]
    expected = coco_average_recall(annotations, proposals, max_boxes)
    report = evaluate_recall(annotations, proposals, max_boxes)
    ours = [report.average_recall, *(rows.mean(axis=0) for rows in report.recall_by_size.values())]
    np.testing.assert_allclose(np.stack(ours), expected, atol=1e-12, rtol=0)


def slow_recall(annotations: Annotations, proposals: Boxes, iou: float, count: int, label: int | None = None) -> float:
    """One box after the other, one object after the other."""
    hits, total = 0, 0
    for row, image_id in enumerate(annotations.image_ids.tolist()):
        rows = range(annotations.offsets[row], annotations.offsets[row + 1])
        free = [r for r in rows if not annotations.iscrowd[r] and not annotations.difficult[r]]
        total += sum(label in (None, annotations.labels[r]) for r in free)
        for box in proposals[image_id][:count].astype(float).tolist():
            best, taken = min(iou, 1 - 1e-10), None
            for r in free:
                shared = overlap(box, annotations.boxes[r].tolist())
                if shared >= best:
                    best, taken = shared, r
            if taken is not None:
                free.remove(taken)
                hits += label in (None, annotations.labels[taken])
    return hits / total if total else float("nan")


@settings(deadline=None, max_examples=30)
@given(data_sets())
def test_recall_is_that_of_a_slow_loop_for_each_class_too(data):
    annotations, proposals = data
    report = evaluate_recall(annotations, proposals, [5, 40])
    for t in (0, 4, 9):
        for v, count in enumerate((5, 40)):
            expected = slow_recall(annotations, proposals, IOUS[t], count)
            np.testing.assert_allclose(report.recall[t, v], expected, atol=1e-12)
            for label, name in ((1, "a"), (2, "b")):
                expected = slow_recall(annotations, proposals, IOUS[t], count, label)
                np.testing.assert_allclose(report.recall_by_class[name][t, v], expected, atol=1e-12)


def test_numbers_by_hand():
    # two objects of class a, one of class b; the second proposal fits the first object to 80 of 100 columns
    images = [
        {"boxes": [[0, 0, 100, 100], [200, 200, 300, 300]], "labels": [1, 2]},
        {"boxes": [[0, 0, 20, 20]], "labels": [1]},
    ]
    proposals = {
        1: np.array([[300, 0, 310, 10], [0, 0, 80, 100], [200, 200, 300, 300]], np.float32),
        4: np.zeros((0, 4), np.float32),
    }
    report = evaluate_recall(annotations_of(images), proposals, [1, 2, 3])
    assert report.recall[0].tolist() == [0, 1 / 3, 2 / 3]
    assert report.at(0.8, 2) == 1 / 3
    assert report.at(0.85, 2) == 0
    np.testing.assert_allclose(report.average_recall, [0, 7 / 30, 17 / 30])  # .5 to .8 are seven of ten
    np.testing.assert_allclose(report.best_overlap, [0, 0.8 / 3, 1.8 / 3])
    np.testing.assert_allclose(report.best_overlap_by_class["a"], [0, 0.4, 0.4])
    np.testing.assert_allclose(report.mean_best_overlap, [0, 0.2, 0.7])
    assert report.recall_by_size["small"][0, -1] == 0
    assert np.isnan(report.recall_by_size["medium"]).all()
    assert report.recall_by_size["large"][0].tolist() == [0, 0.5, 1]
    assert (report.num_images, report.num_objects, report.boxes_per_image) == (2, 3, 1.5)


def test_crowds_and_difficult_objects_do_not_count():
    boxes = [[0, 0, 50, 50], [60, 0, 110, 50], [0, 60, 50, 110]]
    images = [{"boxes": boxes, "iscrowd": [True, False, False], "difficult": [False, True, False]}]
    report = evaluate_recall(annotations_of(images), {1: np.array(boxes[2:], np.float32)}, [10])
    assert (report.num_objects, report.recall[0, 0]) == (1, 1.0)


def test_sizes_hold_both_their_ends_as_in_coco():
    images = [{"boxes": [[0, 0, 32, 32], [0, 100, 96, 196]]}]
    report = evaluate_recall(annotations_of(images), {1: np.array([[0, 0, 32, 32]], np.float32)}, [10])
    assert {name: rows[0, 0] for name, rows in report.recall_by_size.items()} == {"small": 1, "medium": 0.5, "large": 0}
    assert set(SIZES) == {"small", "medium", "large"}


def test_no_objects_and_no_images():
    for images in ([], [{"boxes": []}]):
        report = evaluate_recall(annotations_of(images), {1: np.zeros((0, 4), np.float32)})
        assert np.isnan(report.recall).all()
        content = json.dumps(report.to_dict(), allow_nan=False)
        assert json.loads(content)["average_recall"] == [None] * len(MAX_BOXES)


def test_progress_tells_each_image():
    told: list[tuple[int, int]] = []
    annotations = annotations_of([{"boxes": []}, {"boxes": []}])
    empty = np.zeros((0, 4), np.float32)
    evaluate_recall(annotations, {1: empty, 4: empty}, progress=lambda done, total: told.append((done, total)))
    assert told == [(1, 2), (2, 2)]


@pytest.mark.parametrize(
    ("boxes", "message"),
    [
        ({}, r"image 0\.png \(id 1\) has no proposals"),
        ({1: np.zeros((2, 5))}, r"image 0\.png \(id 1\): proposals must be finite \[P, 4\], got shape \[2, 5\]"),
        ({1: np.full((1, 4), np.nan)}, r"image 0\.png \(id 1\): proposals must be finite"),
    ],
)
def test_bad_proposals_name_their_image(boxes, message):
    with pytest.raises(DataError, match=message):
        evaluate_recall(annotations_of([{"boxes": [[0, 0, 9, 9]]}]), boxes)


@pytest.mark.parametrize("max_boxes", [[], [0, 5], [5, 3], [3, 3]])
def test_numbers_of_boxes_must_ascend(max_boxes):
    with pytest.raises(ValueError, match="max_boxes must be positive and ascending"):
        evaluate_recall(annotations_of([]), {}, max_boxes)

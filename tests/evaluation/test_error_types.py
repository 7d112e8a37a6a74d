from __future__ import annotations

import math
from itertools import count

import numpy as np
import pytest
from hypothesis import given, settings
from samples import overlap as overlap_of

from detpipe.evaluation import evaluate_coco
from detpipe.evaluation.error_types import ERROR_TYPES, error_gains, find_errors
from detpipe.evaluation.matches import match
from detpipe.evaluation.worst_images import image_costs
from detpipe.types import Annotations, DetectionArrays

from .builders import found, jittered, truth
from .test_coco import scenes

BOX = (0, 0, 100, 100)
HALF = (0, 0, 100, 40)  # IoU 0.4 with BOX
FAR = (500, 500, 600, 600)


def outcome(annotations: Annotations, rows: list[tuple]) -> tuple[dict[str, int], dict[str, float]]:
    matches = match(annotations, found(rows), [0.5], ["all"])
    errors = find_errors(matches)
    return {name: n for name, n in errors.counts().items() if n}, error_gains(matches, errors)


PET = ("cat", "dog")
DUPLICATE = (51 * 1 + 50 * 2 / 3) / 101  # precision 1 up to recall 1/2, 2/3 up to 1
NAN = math.nan  # nothing was found, so nothing would be asked for


@pytest.mark.parametrize(
    ("annotations", "rows", "counts", "ap", "gains"),
    [
        (  # the cat is called a dog; as a cat it is a perfect detection. The real dog is found with a lower score
            truth([(1, 1, BOX), (1, 2, FAR)], [1], PET),
            [(1, 2, 0.9, BOX), (1, 2, 0.8, FAR)],
            {"classification": 1},
            0.25,  # cat 0, dog 1/2
            {"classification": 0.75, "false_positives": 0.25, "false_negatives": 0.25},
        ),
        (
            truth([(1, 1, BOX)], [1]),
            [(1, 1, 0.9, HALF)],
            {"localization": 1},
            0,
            {"localization": 1, "false_negatives": NAN},
        ),
        (
            truth([(1, 1, BOX), (1, 2, FAR)], [1], PET),
            [(1, 2, 0.9, HALF), (1, 2, 0.8, FAR), (1, 1, 0.7, BOX)],
            {"both": 1},
            0.75,
            {"both": 0.25, "false_positives": 0.25},
        ),
        (
            truth([(1, 1, BOX), (2, 1, BOX)], [1, 2]),
            [(1, 1, 0.9, BOX), (1, 1, 0.8, (0, 0, 100, 90)), (2, 1, 0.7, BOX)],
            {"duplicate": 1},
            DUPLICATE,
            {"duplicate": 1 - DUPLICATE, "false_positives": 1 - DUPLICATE},
        ),
        (  # the second lies in an image without objects
            truth([(1, 1, BOX)], [1, 2]),
            [(1, 1, 0.9, FAR), (2, 1, 0.8, BOX), (1, 1, 0.5, BOX)],
            {"background": 2},
            1 / 3,
            {"background": 2 / 3, "false_positives": 2 / 3},
        ),
        (
            truth([(1, 1, BOX), (1, 1, FAR)], [1]),
            [(1, 1, 0.9, BOX)],
            {"missed": 1},
            51 / 101,
            {"missed": 50 / 101, "false_negatives": 50 / 101},
        ),
        (  # an object that an error stands for is not missed; the dog that remains is not found either way
            truth([(1, 1, BOX), (1, 2, FAR), (1, 2, (300, 0, 400, 100))], [1], PET),
            [(1, 1, 0.9, HALF), (1, 1, 0.8, FAR)],
            {"localization": 1, "classification": 1, "missed": 1},
            0,
            {"localization": 0.5, "classification": 51 / 202, "false_negatives": NAN},
        ),
        (  # ignored objects are neither missed nor a reason; the last: the crowd of another class is none
            truth([(1, 1, BOX), (1, 1, FAR), (1, 2, BOX)], [1], "ab", crowd=[1], difficult=[2]),
            [(1, 1, 0.9, (510, 510, 520, 520)), (1, 2, 0.8, BOX), (1, 1, 0.7, BOX), (1, 2, 0.6, FAR)],
            {"background": 1},
            1,
            {},
        ),
    ],
    ids=["classification", "localization", "both", "duplicate", "background", "missed", "stood for", "ignored"],
)
def test_kinds_of_errors_and_what_they_cost(annotations, rows, counts, ap, gains):
    found_counts, numbers = outcome(annotations, rows)
    assert found_counts == counts
    assert numbers.pop("AP50") == pytest.approx(ap)
    assert numbers == pytest.approx({**dict.fromkeys(numbers, 0), **gains}, abs=1e-9, nan_ok=True)


def test_of_two_that_are_mended_to_one_object_the_better_score_stays():
    """Without the rule, the second would remain a false positive between the two true ones."""
    annotations = truth([(1, 1, BOX), (2, 1, BOX)], [1, 2])
    counts, numbers = outcome(annotations, [(1, 1, 0.9, HALF), (1, 1, 0.8, HALF), (2, 1, 0.7, BOX)])
    assert counts == {"localization": 2}
    assert numbers["localization"] + numbers["AP50"] == pytest.approx(1.0)


def test_what_was_found_already_gives_way_to_a_better_score_that_is_mended():
    """0.9 is mended, so that 0.5 becomes a duplicate and is left out: precision 1, then 1 (with 0.7 wrong: 2/3)."""
    annotations = truth([(1, 1, BOX), (2, 1, BOX)], [1, 2])
    rows = [(1, 1, 0.9, HALF), (1, 1, 0.5, BOX), (2, 1, 0.7, FAR), (2, 1, 0.6, BOX)]
    _, numbers = outcome(annotations, rows)
    assert numbers["localization"] + numbers["AP50"] == pytest.approx((51 * 1 + 50 * 2 / 3) / 101)


def test_localization_comes_before_classification_and_that_before_duplicate():
    annotations = truth([(1, 1, BOX), (1, 2, (0, 0, 100, 50))], [1], ["cat", "dog"])
    assert outcome(annotations, [(1, 1, 0.9, HALF)])[0] == {"localization": 1, "missed": 1}  # IoU .4 cat, .8 dog
    rows = [(1, 1, 0.9, BOX), (1, 1, 0.8, (0, 0, 100, 70))]  # the second: IoU .7 cat, taken; .71 dog
    assert outcome(annotations, rows)[0] == {"classification": 1}


def test_another_threshold_is_refused():
    annotations = truth([(1, 1, BOX)], [1])
    with pytest.raises(ValueError, match=r"at an IoU of 0\.5, got 0\.75"):
        find_errors(match(annotations, found([]), [0.75, 0.9]))


# The same, object by object in plain Python, from the paper's definitions; greedy matches as COCO's evaluator has them.


def slow_records(annotations: Annotations, detections: DetectionArrays) -> tuple[list[dict], list[dict]]:
    images = np.repeat(annotations.image_ids, np.diff(annotations.offsets)).tolist()
    flags = zip(annotations.iscrowd.tolist(), annotations.difficult.tolist(), strict=True)
    objects = [
        {"image": image, "label": label, "box": box, "crowd": crowd, "ignore": crowd or hard, "by": None}
        for image, label, box, (crowd, hard) in zip(
            images, annotations.labels.tolist(), annotations.boxes.tolist(), flags, strict=True
        )
    ]
    columns = (detections.image_ids, detections.labels, detections.scores, detections.boxes)
    rows = [
        {"image": image, "label": label, "score": score, "box": box, "to": None, "id": i}
        for image, label, score, box, i in zip(*(column.tolist() for column in columns), count(), strict=False)
    ]
    return objects, rows


def slow_match(objects: list[dict], rows: list[dict]) -> None:
    for row in rows:  # best first within image and class
        best = None
        for ignored in (False, True):
            for one in objects:
                if one["image"] != row["image"] or one["label"] != row["label"] or one["ignore"] != ignored:
                    continue
                overlap = overlap_of(row["box"], one["box"], one["crowd"])
                if overlap < 0.5 or (one["by"] is not None and not one["crowd"]):
                    continue
                if best is None or overlap >= best[0]:
                    best = overlap, one
            if best is not None:
                break
        if best is not None:
            row["to"], best[1]["by"] = best[1], row


def slow_kind(row: dict, objects: list[dict]) -> tuple[str, dict | None]:
    around = [(overlap_of(row["box"], one["box"]), one) for one in objects if one["image"] == row["image"]]
    around = [(overlap, one) for overlap, one in around if not one["ignore"]]
    own = max((pair for pair in around if pair[1]["label"] == row["label"]), key=lambda p: p[0], default=(0.0, None))
    other = max((pair for pair in around if pair[1]["label"] != row["label"]), key=lambda p: p[0], default=(0.0, None))
    if 0.1 <= own[0] <= 0.5:
        return "localization", own[1]
    if other[0] >= 0.5:
        return "classification", other[1]
    if own[0] >= 0.5:
        return "duplicate", None
    return ("background" if max(own[0], other[0]) <= 0.1 else "both"), None


def slow_ap(entries: list[tuple[int, float, int, bool]], objects: dict[int, int]) -> float:
    """Entries are (label, score, order among equals, right)."""
    values = []
    for label, total in objects.items():
        if not total:
            continue
        curve, right = [], 0
        for k, entry in enumerate(sorted((e for e in entries if e[0] == label), key=lambda e: (-e[1], e[2])), start=1):
            right += entry[3]
            curve.append((right / total, right / k))
        levels = np.linspace(0, 1, 101).tolist()
        values.append(np.mean([max((p for r, p in curve if r >= level), default=0.0) for level in levels]))
    return float(np.mean(values)) if values else float("nan")


def slow_gains(annotations: Annotations, detections: DetectionArrays) -> tuple[dict[str, int], dict[str, float]]:
    objects, rows = slow_records(annotations, detections)
    slow_match(objects, rows)
    false = {row["id"]: slow_kind(row, objects) for row in rows if row["to"] is None}
    right = [row for row in rows if row["to"] is not None and not row["to"]["ignore"]]
    asked = [one for one in objects if not one["ignore"]]
    stood_for = [id(target) for _, target in false.values() if target is not None]
    missed = [one for one in asked if one["by"] is None and id(one) not in stood_for]
    totals = {k: sum(one["label"] == k for one in asked) for k in range(1, annotations.num_classes + 1)}
    hits = {row["id"] for row in right}
    entry = {row["id"]: (row["label"], row["score"], row["id"], row["id"] in hits) for row in rows}
    entries = [entry[row["id"]] for row in rows if row["to"] is None or row["id"] in hits]
    base = slow_ap(entries, totals)
    gains = {"AP50": base}
    for name in ("classification", "localization", "both", "duplicate", "background"):
        left = [e for e in entries if e[2] not in false or false[e[2]][0] != name]
        if name in ("classification", "localization"):
            for one in asked:
                wrong = [row for row in rows if row["id"] in false and false[row["id"]][0] == name]
                rivals = [row for row in wrong if false[row["id"]][1] is one]
                if not rivals:
                    continue
                best = max(rivals, key=lambda row: (row["score"], -row["id"]))
                if one["by"] is not None and one["by"]["score"] >= best["score"]:
                    continue
                left = [e for e in left if one["by"] is None or e[2] != one["by"]["id"]]
                left.append((one["label"], best["score"], best["id"], True))
        gains[name] = slow_ap(left, totals) - base
    less = {k: totals[k] - sum(one["label"] == k for one in missed) for k in totals}
    gains["missed"] = slow_ap(entries, less) - base
    gains["false_positives"] = slow_ap([e for e in entries if e[3]], totals) - base
    only = {k: sum(row["label"] == k for row in right) for k in totals}
    gains["false_negatives"] = slow_ap(entries, only) - base
    counts = {name: sum(kind == name for kind, _ in false.values()) for name in ERROR_TYPES}
    return counts | {"missed": len(missed)}, gains


def assert_as_slow(annotations: Annotations, detections: DetectionArrays) -> None:
    matches = match(annotations, detections, [0.5], ["all"])
    errors = find_errors(matches)
    counts, gains = slow_gains(annotations, matches.detections)
    assert errors.counts() == counts
    ours = error_gains(matches, errors)
    assert ours.keys() == gains.keys()
    for name, value in gains.items():
        assert ours[name] == pytest.approx(value, abs=1e-12, nan_ok=True), name
    expected = evaluate_coco(annotations, detections)["AP50"]
    assert np.nan_to_num(ours["AP50"], nan=-1.0) == pytest.approx(expected, abs=1e-12)


@settings(deadline=None, max_examples=150)
@given(scenes())
def test_counts_and_gains_are_those_of_the_definitions(scene):
    assert_as_slow(*scene)


@pytest.mark.parametrize("seed", range(3))
def test_counts_and_gains_of_a_mediocre_detector(seed):
    rng = np.random.default_rng(seed)
    corners = rng.uniform(0, 300, (40, 2)).round(1)
    objects = [
        (int(rng.integers(1, 6)), int(rng.integers(1, 4)), (x, y, x + rng.uniform(20, 90), y + rng.uniform(20, 90)))
        for x, y in corners.tolist()
    ]
    annotations = truth(objects, [5, 4, 3, 2, 1, 9], "abc", crowd=[3], difficult=[7])
    assert_as_slow(annotations, jittered(annotations, seed, extra=60))


def slow_costs(annotations: Annotations, detections: DetectionArrays) -> list[float]:
    objects, rows = slow_records(annotations, detections)
    slow_match(objects, rows)
    asked = [one for one in objects if not one["ignore"]]
    totals = {k: sum(one["label"] == k for one in asked) for k in range(1, annotations.num_classes + 1)}
    counted = [row for row in rows if row["to"] is None or not row["to"]["ignore"]]
    entries = [(row["label"], row["score"], row["id"], row["to"] is not None) for row in counted]
    costs = []
    for image in sorted(annotations.image_ids.tolist()):
        left = [e for e, row in zip(entries, counted, strict=True) if row["image"] != image or row["to"] is not None]
        found_now = [one for one in asked if one["image"] == image and one["by"] is None]
        left += [(one["label"], 2.0, 0, True) for one in found_now]
        costs.append(slow_ap(left, totals) - slow_ap(entries, totals))
    return costs


@settings(deadline=None, max_examples=80)
@given(scenes())
def test_costs_of_images_are_those_of_the_definition(scene):
    annotations, detections = scene
    matches = match(annotations, detections, [0.5], ["all"])
    expected = np.nan_to_num(slow_costs(annotations, matches.detections))
    np.testing.assert_allclose(image_costs(matches), expected, rtol=0, atol=1e-12)


def test_costs_do_not_depend_on_blocks(monkeypatch):
    annotations = truth([(i % 7, 1 + i % 2, (9 * i, 0, 9 * i + 60, 60)) for i in range(30)], range(7), "ab")
    matches = match(annotations, jittered(annotations, 0), [0.5])
    whole = image_costs(matches)
    assert (whole > 0).all()
    monkeypatch.setattr("detpipe.evaluation.worst_images._BLOCK", 1)
    np.testing.assert_array_equal(image_costs(matches), whole)

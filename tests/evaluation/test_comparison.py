from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from detpipe.evaluation import evaluate_coco, evaluate_voc
from detpipe.evaluation.coco import mean_known
from detpipe.evaluation.comparison import compare, draw_images, weighted_precision
from detpipe.evaluation.matches import match, match_voc
from detpipe.types import Annotations, DetectionArrays

from .builders import found, jittered, perfect, truth
from .test_coco import scenes


def some_truth(images: int = 12, seed: int = 0) -> Annotations:
    rng = np.random.default_rng(seed)
    objects = []
    for image in range(images):
        for _ in range(int(rng.integers(0, 6))):
            x, y, w, h = rng.uniform(10, 200, 4).round(1).tolist()
            objects.append((image, int(rng.integers(1, 4)), (x, y, x + w, y + h)))
    return truth(objects, range(images), "abc", crowd=[2], difficult=[5])


def replicated(annotations: Annotations, detections: DetectionArrays, weights: list[int]) -> tuple[Any, Any]:
    """The data set that a draw stands for: a copy of an image, under an id of its own, for each time it was drawn."""
    by_rank = np.argsort(annotations.image_ids)
    rows = np.repeat(by_rank, weights)
    copies = replace(annotations.subset(rows), image_ids=np.arange(len(rows), dtype=np.int64))
    parts = [np.flatnonzero(detections.image_ids == annotations.image_ids[row]) for row in rows]
    order = np.concatenate([np.zeros(0, np.int64), *parts])
    ids = np.repeat(np.arange(len(rows)), [len(part) for part in parts])
    return copies, DetectionArrays(
        ids.astype(np.int64), detections.boxes[order], detections.scores[order], detections.labels[order]
    )


def distinct(detections: DetectionArrays, seed: int = 0) -> DetectionArrays:
    """No two equal scores: copies of equal ones could be interleaved in more than one way."""
    scores = np.random.default_rng(seed).permutation(len(detections.scores)) / len(detections.scores)
    return replace(detections, scores=scores)


def coco_numbers(values: np.ndarray) -> list[float]:
    """AP, AP50, AP75 of [K, T], -1 for unknown as in COCO."""
    numbers = [mean_known(values), mean_known(values[:, 0]), mean_known(values[:, 5])]
    return [float(np.nan_to_num(number, nan=-1.0)) for number in numbers]


@settings(deadline=None, max_examples=60)
@given(scenes(), st.data())
def test_weights_are_copies_of_images(scene, data):
    annotations, detections = scene[0], distinct(scene[1])
    weights = data.draw(st.lists(st.integers(0, 3), min_size=len(annotations), max_size=len(annotations)))
    if not sum(weights):
        weights[0] = 1
    values = weighted_precision(match(annotations, detections, areas=["all"]), np.array([weights], np.int32))[0]
    expected = evaluate_coco(*replicated(annotations, detections, weights))
    assert coco_numbers(values) == pytest.approx([expected[key] for key in ("AP", "AP50", "AP75")], abs=1e-12)
    classes = np.nan_to_num(mean_known(values, axis=1), nan=-1.0)
    np.testing.assert_allclose(classes, list(expected["per_class"].values()), rtol=0, atol=1e-12)


@settings(deadline=None, max_examples=60)
@given(scenes())
def test_without_resampling_it_is_the_number_of_voc(scene):
    annotations, detections = scene
    once = np.ones((1, len(annotations)), np.int32)
    for protocol, levels in (("voc07", np.arange(0.0, 1.1, 0.1)), ("voc10", None)):
        values = weighted_precision(match_voc(annotations, detections), once, levels)[0]
        expected = evaluate_voc(annotations, detections, protocol)  # type: ignore[arg-type]
        assert float(np.nan_to_num(mean_known(values), nan=-1.0)) == pytest.approx(expected["mAP"], abs=1e-12)


def test_blocks_change_nothing(monkeypatch):
    annotations = some_truth()
    matches, draws = match(annotations, jittered(annotations, 1), areas=["all"]), draw_images(12, 7, seed=3)
    whole = weighted_precision(matches, draws)
    monkeypatch.setattr("detpipe.evaluation.comparison._BLOCK", 1)
    np.testing.assert_array_equal(weighted_precision(matches, draws), whole)


def test_draws_are_of_as_many_images_and_follow_the_seed():
    draws = draw_images(50, 200, seed=1)
    assert (draws.sum(axis=1) == 50).all()
    np.testing.assert_array_equal(draws, draw_images(50, 200, seed=1))
    assert (draws != draw_images(50, 200, seed=2)).any()
    assert abs((draws == 0).mean() - (1 - 1 / 50) ** 50) < 0.02


def test_a_run_against_itself_differs_by_nothing():
    annotations = some_truth()
    run = jittered(annotations, 1)
    result = compare(annotations, {"one": run, "again": run}, resamples=50)
    assert result["baseline"] == "one"
    assert result["runs"][0]["difference"] is None
    nothing = {"value": 0, "low": 0, "high": 0, "better": 0}
    assert result["runs"][1]["difference"] == {"AP": nothing, "AP50": nothing, "AP75": nothing}
    assert result["runs"][0]["metrics"] == result["runs"][1]["metrics"]


def test_a_better_run_is_better_in_every_draw_and_equal_seeds_agree():
    annotations = some_truth(40)
    runs = {"poor": jittered(annotations, 1), "perfect": perfect(annotations), "other": jittered(annotations, 2)}
    result = compare(annotations, runs, resamples=100, seed=4)
    better = result["runs"][1]["difference"]["AP"]
    assert better["low"] > 0.3
    assert better["better"] == 1.0
    assert result["runs"][1]["metrics"]["AP"]["value"] == pytest.approx(1.0)
    for name, run in zip(runs, result["runs"], strict=True):
        expected = evaluate_coco(annotations, runs[name])
        for key in ("AP", "AP50", "AP75"):
            assert run["metrics"][key]["value"] == pytest.approx(expected[key], abs=1e-12)
            assert run["metrics"][key]["low"] <= run["metrics"][key]["high"]
    undecided = result["runs"][2]["difference"]["AP"]
    assert undecided["low"] < 0 < undecided["high"]
    assert set(result["runs"][2]["per_class"]) == {"a", "b", "c"}
    assert compare(annotations, runs, resamples=100, seed=4) == result
    matched = {name: match(annotations, detections) for name, detections in runs.items()}  # of all sizes
    assert compare(annotations, runs, resamples=100, seed=4, matched=matched) == result
    assert compare(annotations, runs, resamples=100, seed=5) != result


def test_voc_protocols_compare_their_map():
    annotations = some_truth()
    runs = {"one": jittered(annotations, 1), "two": jittered(annotations, 2)}
    for protocol in ("voc07", "voc10"):
        result = compare(annotations, runs, protocol, resamples=10)
        for name, run in zip(runs, result["runs"], strict=True):
            expected = evaluate_voc(annotations, runs[name], protocol)["mAP"]  # type: ignore[arg-type]
            assert run["metrics"]["mAP"]["value"] == pytest.approx(expected, abs=1e-12)


def test_intervals_hold_the_truth_about_as_often_as_they_say():
    """Of 40 samples of a large population, some 90% of the 90% intervals hold the population's difference."""
    population = some_truth(400, seed=1)
    runs = {"one": distinct(jittered(population, 1), 1), "two": distinct(jittered(population, 2), 2)}
    apart = [evaluate_coco(population, run)["AP50"] for run in runs.values()]
    inside = 0
    for seed in range(40):
        chosen = np.sort(np.random.default_rng(seed).choice(400, 60, replace=False))
        sample = population.subset(chosen)
        parts = {}
        for name, run in runs.items():
            keep = np.isin(run.image_ids, sample.image_ids)
            parts[name] = DetectionArrays(run.image_ids[keep], run.boxes[keep], run.scores[keep], run.labels[keep])
        interval = compare(sample, parts, resamples=60, seed=seed, confidence=0.9)["runs"][1]["difference"]["AP50"]
        inside += interval["low"] <= apart[1] - apart[0] <= interval["high"]
    assert 30 <= inside <= 40


def test_classes_without_objects_are_unknown():
    annotations = truth([(1, 1, (0, 0, 9, 9))], [1, 2], "ab")
    run = found([(1, 1, 0.5, (0, 0, 9, 9)), (2, 2, 0.5, (0, 0, 9, 9))])
    result = compare(annotations, {"a": run, "b": run}, resamples=20)
    assert np.isnan(result["runs"][1]["per_class"]["b"]["value"])
    assert result["runs"][0]["metrics"]["AP"] == {
        "value": pytest.approx(1),
        "low": pytest.approx(1),
        "high": pytest.approx(1),
    }


def test_what_is_refused():
    annotations, run = truth([], [1]), found([])
    for arguments, message in [
        (({"a": run},), "two or more runs, got 1"),
        (({"a": run, "b": run}, "coc"), "one of coco, voc07, voc10; got 'coc'"),
        (({"a": run, "b": run}, "coco", 0), "resamples must be positive"),
        (({"a": run, "b": run}, "coco", 5, 0, 1.0), "confidence between 0 and 1"),
    ]:
        with pytest.raises(ValueError, match=message):
            compare(annotations, *arguments)

"""Evaluators fed batch by batch, in one process and several, against one evaluation of everything."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from together import succeed
from torch import Tensor

from detpipe.evaluation import evaluate_coco, evaluate_lvis, evaluate_voc
from detpipe.evaluation.metrics import CocoEvaluator, DetectionMetric, LvisEvaluator, VocEvaluator
from detpipe.support.errors import DataError
from detpipe.types import Annotations, Detection, DetectionArrays

from .builders import jittered, truth
from .test_lvis import federated

IMAGES, CLASSES = 13, 4


def dataset(seed: int = 0, images: int = IMAGES) -> tuple[Annotations, DetectionArrays]:
    """Large and odd ids, an image without objects, a class without any, equal scores."""
    rng = np.random.default_rng(seed)
    ids = [2**60 + 1, 0, *(rng.permutation(1000)[: images - 2] + 1).tolist()]
    objects = []
    for image in ids[1:]:
        corners = rng.integers(0, 200, (rng.integers(1, 6), 2))
        boxes = np.concatenate((corners, corners + rng.integers(8, 150, corners.shape)), axis=1)
        objects += [(image, int(rng.integers(1, CLASSES)), tuple(map(float, box))) for box in boxes]
    annotations = truth(objects, ids, [f"class {k}" for k in range(CLASSES)], crowd=[3], difficult=[5])
    return annotations, jittered(annotations, seed, extra=60)


def by_image(
    annotations: Annotations, found: DetectionArrays, dtype: Any = torch.float64
) -> list[tuple[int, Detection]]:
    def one(image: int) -> Detection:
        rows = found.image_ids == image
        boxes, scores = (torch.tensor(column[rows], dtype=dtype) for column in (found.boxes, found.scores))
        return {"boxes": boxes, "scores": scores, "labels": torch.tensor(found.labels[rows])}

    return [(image, one(image)) for image in annotations.image_ids.tolist()]


def fed(metric: DetectionMetric, parts: list[tuple[int, Detection]], batch: int = 3) -> DetectionMetric:
    for start in range(0, len(parts), batch):
        ids, detections = zip(*parts[start : start + batch], strict=True)
        metric.update(detections, ids)
    return metric


def make(kind: str, annotations: Annotations) -> DetectionMetric:
    return {"coco": CocoEvaluator, "voc": VocEvaluator, "lvis": LvisEvaluator}[kind](annotations)


def whole(kind: str, annotations: Annotations, found: DetectionArrays) -> dict[str, Any]:
    if kind == "voc":
        return evaluate_voc(annotations, found, "voc10")
    return {"coco": evaluate_coco, "lvis": evaluate_lvis}[kind](annotations, found)


def searched(annotations: Annotations) -> Annotations:
    ids = annotations.image_ids.tolist()
    return federated(annotations, [(i, 2) for i in ids[::2]], [(i, 1) for i in ids[::3]], "rcff")


@pytest.mark.parametrize("kind", ["coco", "voc", "lvis"])
@settings(deadline=None, max_examples=10)
@given(st.randoms(use_true_random=False), st.integers(1, 5), st.integers(0, 3))
def test_batches_in_any_order_give_the_bits_of_one_evaluation(kind, random, batch, seed):
    annotations, found = dataset(seed)
    annotations = searched(annotations)
    parts = by_image(annotations, found)
    random.shuffle(parts)
    assert fed(make(kind, annotations), parts, batch).compute() == whole(kind, annotations, found)


def test_float32_is_kept_exactly():
    annotations, found = dataset()
    parts = by_image(annotations, found, torch.float32)
    _, got = fed(CocoEvaluator(annotations), parts).collected()
    for name, want in (("boxes", found.boxes), ("scores", found.scores)):
        order = np.argsort([annotations.image_ids.tolist().index(i) for i in found.image_ids], kind="stable")
        assert np.array_equal(getattr(got, name), want[order].astype(np.float32).astype(np.float64))
    assert got.image_ids.dtype == np.int64
    assert 2**60 + 1 in got.image_ids


def test_images_that_were_not_seen_are_left_out_and_empty_ones_count():
    annotations, found = dataset()
    parts = by_image(annotations, found)[:5]
    ids = [part[0] for part in parts]
    subset = annotations.subset(np.arange(5))
    want = evaluate_coco(subset, found.take(np.isin(found.image_ids, ids)))
    assert fed(CocoEvaluator(annotations), parts).compute() == want
    nothing: Detection = {
        "boxes": torch.zeros(0, 4),
        "scores": torch.zeros(0),
        "labels": torch.zeros(0, dtype=torch.int64),
    }
    missed = fed(CocoEvaluator(annotations), [(image, nothing) for image in annotations.image_ids.tolist()]).compute()
    assert missed["AP"] == 0


@pytest.mark.slow
@pytest.mark.parametrize("as_function", [False, True])
def test_many_small_batches_are_put_together_as_they_come(as_function):
    """One image a batch, more batches than are kept apart, looked at in between; what is kept stays a few pieces."""
    annotations, found = dataset(images=150)
    metric = CocoEvaluator(annotations)
    parts = by_image(annotations, found)
    for step, (image, detection) in enumerate(parts):
        (metric if as_function else metric.update)([detection], [image])
        if step in (30, 100):
            part = annotations.subset(np.arange(step + 1))
            assert metric.compute() == evaluate_coco(part, found.take(np.isin(found.image_ids, part.image_ids)))
    assert metric.compute() == evaluate_coco(annotations, found)
    metric.reset()
    assert len(fed(metric, parts, 1).rows) < 70
    assert metric.compute() == evaluate_coco(annotations, found)


def test_it_starts_anew_after_a_reset_and_says_so_when_it_was_forgotten():
    annotations, found = dataset()
    metric = fed(CocoEvaluator(annotations), by_image(annotations, found))
    first = metric.compute()
    fed(metric, by_image(annotations, found)[:4])  # the same again, as padding samplers give it
    assert metric.compute() == first
    other = jittered(annotations, 9)
    fed(metric, by_image(annotations, other))
    with pytest.raises(DataError, match=rf"image id {annotations.image_ids[0]} came twice.*call reset\(\)"):
        metric.compute()
    metric.reset()
    assert fed(metric, by_image(annotations, other)).compute() == evaluate_coco(annotations, other)
    metric.reset()
    with (
        pytest.raises(DataError, match="nothing to evaluate"),
        pytest.warns(UserWarning, match="before the ``update``"),
    ):
        metric.compute()


def test_as_a_function_it_gives_the_batch_and_keeps_all():
    annotations, found = dataset()
    metric, parts = CocoEvaluator(annotations), by_image(annotations, found)
    for image, one in parts:
        alone = annotations.subset(np.flatnonzero(annotations.image_ids == image))
        assert metric([one], [image]) == evaluate_coco(alone, found.take(found.image_ids == image))
    assert metric.compute() == evaluate_coco(annotations, found)


def test_settings_reach_the_protocol():
    annotations, found = dataset()
    parts = by_image(annotations, found)
    want = evaluate_coco(annotations, found, "pycocotools", (2, 5))
    assert fed(CocoEvaluator(annotations, "pycocotools", (2, 5)), parts).compute() == want
    assert {"AR2", "AR5"} < set(want)
    strict = fed(VocEvaluator(annotations, "voc07", 0.7, True), parts).compute()
    assert strict == evaluate_voc(annotations, found, "voc07", 0.7, True)
    limited = fed(LvisEvaluator(searched(annotations), 4), parts).compute()
    assert limited == evaluate_lvis(searched(annotations), found, 4)


def one(count: int = 1, **changes: Tensor) -> Detection:
    boxes = torch.tensor([[0.0, 0.0, 9.0, 9.0]]).repeat(count, 1)
    return {
        "boxes": boxes,
        "scores": torch.full((count,), 0.5),
        "labels": torch.ones(count, dtype=torch.int64),
        **changes,
    }  # type: ignore[return-value]


def test_faulty_batches_are_refused_and_leave_nothing_behind():
    annotations = truth([(1, 1, (0, 0, 9, 9))], [1, 2])
    metric = CocoEvaluator(annotations)
    with pytest.raises(ValueError, match="got 1 images and 2 ids"):
        metric.update([one()], [1, 2])
    with pytest.raises(DataError, match="image id 3 is not one of the 2 images of the ground truth"):
        metric.update([one(), one()], [1, 3])
    with pytest.raises(ValueError, match="image id 2: boxes, scores and labels must be equally many"):
        metric.update([one(), one(scores=torch.rand(3))], [1, 2])
    with pytest.raises(DataError, match="nothing to evaluate"):
        metric.compute()
    metric.reset()
    metric.update([one(scores=torch.tensor([float("nan")]))], [1])
    with pytest.raises(DataError, match="score is nan"):
        metric.compute()
    metric.reset()
    metric.update([one(labels=torch.tensor([0]))], [1])
    with pytest.raises(DataError, match="label is 0"):
        metric.compute()


PROGRAM = """
import json, sys
from datetime import timedelta
import torch
from evaluation.test_metrics import by_image, dataset, fed, make, searched
kind = sys.argv[1]
torch.distributed.init_process_group("gloo", timeout=timedelta(seconds=60))
rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
annotations, found = dataset()
annotations = searched(annotations)
parts = by_image(annotations, found)
if kind == "mixed" and rank % 2:
    parts = by_image(annotations, found, torch.float32)
images = 3 if kind == "few" else len(parts)  # fewer than processes: one of them sees nothing
padded = [*range(images)] + ([*range(-images % size)] if kind != "few" else [])
if kind == "bad" and rank == size - 1:
    parts[padded[rank]][1]["scores"][0] = float("nan")
metric = make(kind if kind in ("coco", "voc", "lvis") else "coco", annotations)
fed(metric, [parts[i] for i in padded[rank::size]][:: -1 if rank % 2 else 1], batch=2 + rank)
try:
    answer = metric.compute()
except Exception as error:
    answer = {"error": f"{type(error).__name__}: {error}"}
print(json.dumps(answer))
torch.distributed.destroy_process_group()
"""


def run(kind: str, size: int) -> list[dict[str, Any]]:
    """What each of several processes computes; they start from images dealt out in turns, the last round padded."""
    return [json.loads(text.splitlines()[-1]) for text in succeed(PROGRAM, [kind], size, 120)]


@pytest.mark.parametrize(("kind", "size"), [("coco", 2), ("coco", 4), ("voc", 4)])
def test_any_number_of_processes_gives_the_same_bits(kind, size):
    """Thirteen images: the last round is padded with images that others have seen; each counts once."""
    annotations, found = dataset()
    want = json.loads(json.dumps(whole(kind, annotations, found)))
    assert run(kind, size) == [want] * size


def rounded(found: DetectionArrays, which: np.ndarray) -> DetectionArrays:
    """Some detections as float32 holds them."""
    boxes, scores = (part.astype(np.float32).astype(np.float64) for part in (found.boxes, found.scores))
    return replace(
        found,
        boxes=np.where(which[:, None], boxes, found.boxes),
        scores=np.where(which, scores, found.scores),
    )


def test_processes_with_other_precisions_keep_every_bit():
    """The second one's images, every other one, come as float32; image 0 is there twice, and the first process' counts."""
    annotations, found = dataset()
    want = evaluate_coco(annotations, rounded(found, np.isin(found.image_ids, annotations.image_ids[1::2])))
    assert want != evaluate_coco(annotations, rounded(found, np.ones(len(found.scores), bool)))
    assert run("mixed", 2) == [json.loads(json.dumps(want))] * 2


def test_batches_of_other_precisions_keep_every_bit():
    annotations, found = dataset()
    wide, narrow = by_image(annotations, found), by_image(annotations, found, torch.float32)
    want = evaluate_coco(annotations, rounded(found, np.isin(found.image_ids, annotations.image_ids[::2])))
    metric = fed(CocoEvaluator(annotations), [(narrow, wide)[k % 2][k] for k in range(len(wide))], 1)
    assert metric.compute() == want
    assert {part.dtype for part in metric.rows} == {torch.float64}
    metric.reset()
    assert fed(metric, narrow).compute() == evaluate_coco(annotations, rounded(found, np.ones(len(found.scores), bool)))
    assert {part.dtype for part in metric.rows} == {torch.float32}  # half the memory, and nothing is lost
    half = [(image, {**one, "scores": one["scores"].half()}) for image, one in narrow]
    exact = replace(found, scores=found.scores.astype(np.float16).astype(np.float64))
    metric.reset()
    exact = rounded(exact, np.ones(len(found.scores), bool))
    assert fed(metric, half).compute() == evaluate_coco(annotations, exact)


def test_a_process_without_an_image_and_one_with_a_fault():
    annotations, found = dataset()
    subset = annotations.subset(np.arange(3))
    want = evaluate_coco(subset, found.take(np.isin(found.image_ids, annotations.image_ids[:3])))
    assert run("few", 4) == [json.loads(json.dumps(want))] * 4
    answers = run("bad", 2)
    assert answers[0] == answers[1]
    assert "DataError" in answers[0]["error"]
    assert "score is nan" in answers[0]["error"]

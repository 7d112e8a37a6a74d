from __future__ import annotations

import numpy as np
import pytest
from sklearn import metrics

from detpipe.evaluation.segmentation import all_background, confusion_matrix, segmentation_scores


def pair(seed: int = 0, classes: int = 5, size: tuple[int, ...] = (30, 40)) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    truth = random.integers(-1, classes, size)
    predicted = np.where(random.random(size) < 0.6, truth.clip(min=0), random.integers(0, classes, size))
    return truth, predicted


@pytest.mark.parametrize("seed", range(5))
def test_it_is_what_scikit_learn_computes(seed):
    truth, predicted = pair(seed)
    counted = truth >= 0
    found = confusion_matrix(truth, predicted, 5)
    assert found.dtype == np.int64
    assert (found == metrics.confusion_matrix(truth[counted], predicted[counted], labels=range(5))).all()
    scores = segmentation_scores(found, ["a", "b", "c", "d"])
    jaccard = metrics.jaccard_score(truth[counted], predicted[counted], labels=range(5), average=None)
    assert list(scores["per_class"].values()) == pytest.approx(jaccard.tolist())
    assert scores["mIoU"] == pytest.approx(jaccard.mean())
    assert scores["pixel_accuracy"] == pytest.approx(metrics.accuracy_score(truth[counted], predicted[counted]))


def test_matrices_of_images_add_up_to_that_of_the_split():
    truth, predicted = pair(size=(6, 10, 10))
    parts = [confusion_matrix(t, p, 5) for t, p in zip(truth, predicted, strict=True)]
    assert (sum(parts) == confusion_matrix(truth, predicted, 5)).all()


def test_classes_without_pixels_are_not_part_of_the_mean():
    found = confusion_matrix(np.array([0, 0, 1, 1]), np.array([0, 1, 1, 1]), 4)
    scores = segmentation_scores(found, ["cat", "dog", "owl"])
    assert scores["per_class"] == {"background": 0.5, "cat": pytest.approx(2 / 3), "dog": -1.0, "owl": -1.0}
    assert scores["mIoU"] == pytest.approx((1 / 2 + 2 / 3) / 2)
    # but one that is predicted where it is not has an IoU of 0
    found = confusion_matrix(np.array([0, 0, 1, 1]), np.array([0, 2, 1, 1]), 4)
    assert segmentation_scores(found, ["cat", "dog", "owl"])["mIoU"] == pytest.approx((1 / 2 + 1 + 0) / 3)


def test_nothing_to_count():
    found = confusion_matrix(np.full((2, 2), -1), np.zeros((2, 2), int), 2)
    assert segmentation_scores(found, ["a"])["mIoU"] == -1.0
    assert segmentation_scores(found, ["a"])["pixel_accuracy"] == -1.0


def test_all_background_is_the_matrix_of_a_prediction_of_zeros():
    truth, predicted = pair()
    blind = all_background(confusion_matrix(truth, predicted, 5))
    assert (blind == confusion_matrix(truth, np.zeros_like(truth), 5)).all()
    assert segmentation_scores(blind, ["a", "b", "c", "d"])["mIoU"] == pytest.approx(
        (truth[truth >= 0] == 0).mean() / 5
    )


def test_bad_input():
    with pytest.raises(ValueError, match=r"must have one shape, got \(2, 3\) and \(3, 2\)"):
        confusion_matrix(np.zeros((2, 3), int), np.zeros((3, 2), int), 2)
    with pytest.raises(ValueError, match=r"truth must be in 0\.\.1, got 0\.\.255"):
        confusion_matrix(np.array([0, 255]), np.array([0, 0]), 2)
    with pytest.raises(ValueError, match=r"predicted must be in 0\.\.1, got -1\.\.0"):
        confusion_matrix(np.array([0, 1]), np.array([0, -1]), 2)
    with pytest.raises(ValueError, match=r"expected a \[2, 2\] matrix for 1 classes and background, got \(3, 3\)"):
        segmentation_scores(np.zeros((3, 3), int), ["a"])

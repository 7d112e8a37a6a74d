import math

import pytest
import torch
from samples import overlap, random_boxes

from detpipe.heads import Postprocess
from detpipe.heads.suppression import box_fusion, soft_nms


def candidates(images: int = 3, count: int = 30):
    """Clusters of boxes of two classes, best first; some are no candidates, the last image has none."""
    centers = random_boxes(4)[torch.randint(0, 4, (images, count))]
    boxes = centers + 3 * torch.rand(images, count, 4)
    scores = torch.rand(images, count).sort(dim=1, descending=True).values
    keep = torch.rand(images, count) < 0.8
    keep[-1] = False
    return boxes, scores, torch.randint(1, 3, (images, count)), keep


def slow_soft_nms(boxes, scores, labels, keep, sigma):
    """Bodla et al.'s algorithm, class by class, over one image's lists."""
    done = []
    for label in set(labels):
        left = [
            [s, b, i]
            for i, (s, b, k, c) in enumerate(zip(scores, boxes, keep, labels, strict=True))
            if k and c == label
        ]
        while left:
            best = max(left, key=lambda entry: entry[0])
            left.remove(best)
            done.append((*best, label))
            for entry in left:
                entry[0] *= math.exp(-(overlap(entry[1], best[1]) ** 2) / sigma)
    return sorted(done, key=lambda entry: -entry[0])


def slow_fusion(boxes, scores, labels, keep, threshold):
    """Solovyev et al.'s steps 1 to 4, over one image's lists: fused box, members' scores, label, first member."""
    clusters = []
    for i, (box, score, label, kept) in enumerate(zip(boxes, scores, labels, keep, strict=True)):
        if not kept:
            continue
        mine = [cluster for cluster in clusters if cluster["label"] == label]
        best = max(mine, key=lambda cluster: overlap(cluster["box"], box), default=None)
        if best is None or overlap(best["box"], box) <= threshold:
            best = {"label": label, "members": [], "first": i}
            clusters.append(best)
        best["members"].append((score, box))
        total = sum(score for score, _ in best["members"])
        best["box"] = [sum(s * b[axis] for s, b in best["members"]) / total for axis in range(4)]
    return clusters


def lists(values):
    return [value.tolist() for value in values]


@pytest.mark.parametrize("sigma", [0.1, 0.5])
def test_soft_nms_equals_the_algorithm_class_by_class(sigma):
    values = candidates()
    kept = soft_nms(*values, sigma, 12)
    for image in range(3):
        expected = slow_soft_nms(*lists(value[image] for value in values), sigma)[:12]
        found = int((kept.scores[image] > 0).sum())
        assert found == len(expected)
        assert kept.index[image, :found].tolist() == [entry[2] for entry in expected]
        assert kept.labels[image, :found].tolist() == [entry[3] for entry in expected]
        assert kept.scores[image, :found].tolist() == pytest.approx([entry[0] for entry in expected], rel=1e-4)
        assert torch.equal(kept.boxes[image], values[0][image][kept.index[image]])


@pytest.mark.parametrize("detectors", [None, 3])
def test_box_fusion_equals_the_algorithm_box_by_box(detectors):
    values = candidates()
    kept = box_fusion(*values, 0.55, detectors)
    for image in range(3):
        clusters = slow_fusion(*lists(value[image] for value in values), 0.55)
        for cluster in clusters:
            scores = [score for score, _ in cluster["members"]]
            mean = sum(scores) / len(scores) * min(len(scores), 3) / 3
            cluster["score"] = scores[0] if detectors is None else mean
        clusters.sort(key=lambda cluster: -cluster["score"])
        found = int((kept.scores[image] > 0).sum())
        assert found == len(clusters)
        assert kept.scores[image, :found].tolist() == pytest.approx(
            [cluster["score"] for cluster in clusters], rel=1e-5
        )
        assert kept.index[image, :found].tolist() == [cluster["first"] for cluster in clusters]
        assert kept.labels[image, :found].tolist() == [cluster["label"] for cluster in clusters]
        expected = torch.tensor([cluster["box"] for cluster in clusters]).reshape(-1, 4)
        torch.testing.assert_close(kept.boxes[image, :found], expected, rtol=1e-4, atol=1e-4)


def test_boxes_whose_scores_are_zero_stay_where_they_are():
    boxes, one = (
        torch.tensor([[[20.0, 20, 30, 30], [20, 20, 30, 32], [5, 5, 9, 9]]]),
        torch.ones(1, 3, dtype=torch.int64),
    )
    fused = box_fusion(boxes, torch.tensor([[0.0, 0.0, 0.0]]), one, one > 0, 0.5)
    assert fused.boxes.tolist() == [[[20, 20, 30, 31], [5, 5, 9, 9]]]
    assert fused.scores.tolist() == [[0, 0]]


@pytest.mark.parametrize("count", [0, 1, 30])
def test_no_candidates_are_legal(count):
    boxes, scores, labels, keep = candidates(2, count)
    for kept in (
        soft_nms(boxes, scores, labels, keep & False, 0.5, 5),
        box_fusion(boxes, scores, labels, keep & False, 0.5),
    ):
        assert (kept.scores < 0).all() or kept.scores.numel() == 0
        assert kept.boxes.shape == (*kept.scores.shape, 4)


@pytest.mark.parametrize("suppression", ["soft_nms", "box_fusion"])
def test_postprocess_uses_it_and_an_image_does_not_depend_on_its_neighbors(suppression):
    process = Postprocess(0.05, 0.5, detections_per_image=15, suppression=suppression)
    scores, boxes = (
        torch.rand(3, 20, 2),
        random_boxes(4)[torch.randint(0, 4, (3, 20))][:, :, None] + 4 * torch.rand(3, 20, 1, 4),
    )
    valid = torch.ones(3, 20, dtype=torch.bool)
    found, rows = process.select(scores, boxes, valid, [(60, 80)] * 3)
    for image in range(3):
        [alone], [row] = process.select(scores[image : image + 1], boxes[image : image + 1], valid[:1], [(60, 80)])
        assert torch.equal(row, rows[image])
        for key in ("boxes", "scores", "labels"):
            torch.testing.assert_close(found[image][key], alone[key])
        assert len(alone["scores"]) <= 15
        assert (alone["scores"] > 0.05).all()
        assert (alone["scores"].diff() <= 0).all()
    plain, _ = Postprocess(0.05, 0.5, detections_per_image=15).select(scores, boxes, valid, [(60, 80)] * 3)
    assert [one["scores"].tolist() for one in found] != [one["scores"].tolist() for one in plain]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"suppression": "hard"}, "suppression must be one of nms, soft_nms, box_fusion"),
        ({"suppression": "soft_nms", "sigma": 0.0}, "sigma must be positive"),
        ({"sigma": 0.3}, "sigma is for the suppression soft_nms, got it with nms; leave it out"),
    ],
)
def test_settings_outside_their_range_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        Postprocess(**arguments)

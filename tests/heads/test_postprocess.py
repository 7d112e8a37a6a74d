import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from samples import random_boxes
from torchvision.ops import batched_nms, clip_boxes_to_image

from detpipe.heads import Postprocess

SIZES = [(60, 80), (45, 64), (100, 100)]


def outputs(proposals: int, classes: int, boxes_each: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Scores, boxes (a few clusters, some degenerate, some over the border) and padding of three images."""
    scores = (3 * torch.randn(3, proposals, classes + 1)).softmax(-1)[..., 1:]
    centers = random_boxes(4)[torch.randint(0, 4, (3, proposals, boxes_each))]
    boxes = centers + 6 * torch.randn_like(centers)
    valid = torch.arange(proposals) < torch.tensor([proposals, proposals // 2, 0])[:, None]
    return scores, boxes, valid


def reference(settings_: Postprocess, scores, boxes, size):
    """One image by torchvision's operators: ``[P, K]`` and ``[P, B, 4]``."""
    labels = torch.arange(1, scores.shape[1] + 1).expand_as(scores).flatten()
    boxes = clip_boxes_to_image(boxes.expand(-1, scores.shape[1], -1).reshape(-1, 4), size)
    scores = scores.flatten()
    keep = (scores > settings_.score_threshold) & (boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1])
    boxes, scores, labels = boxes[keep], scores[keep], labels[keep]
    kept = batched_nms(boxes.double(), scores.double(), labels, settings_.nms_iou)[: settings_.detections_per_image]
    return boxes[kept], scores[kept], labels[kept]


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 10_000), st.sampled_from([1, 3]), st.booleans(), st.sampled_from([0.0, 0.05, 0.4]))
def test_equals_torchvisions_operators(seed, classes, agnostic, threshold):
    torch.manual_seed(seed)
    scores, boxes, valid = outputs(40, classes, 1 if agnostic else classes)
    process = Postprocess(threshold, nms_iou=0.4, detections_per_image=15)
    for image, found in enumerate(process(scores, boxes, valid, SIZES)):
        expected = reference(process, scores[image][valid[image]], boxes[image][valid[image]], SIZES[image])
        for got, want in zip((found["boxes"], found["scores"], found["labels"]), expected, strict=True):
            assert torch.equal(got, want)


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 10_000))
def test_an_image_does_not_depend_on_its_neighbors(seed):
    torch.manual_seed(seed)
    scores, boxes, valid = outputs(30, 3, 3)
    boxes[1] *= 50
    process = Postprocess(0.01)
    together = process(scores, boxes, valid, [(60, 80), (5000, 9000), (10, 10)])
    alone = process(scores[:1], boxes[:1], valid[:1], [(60, 80)])
    for key in ("boxes", "scores", "labels"):
        assert torch.equal(together[0][key], alone[0][key])
    order = [2, 0, 1]
    permuted = process(scores[order], boxes[order], valid[order], [(10, 10), (60, 80), (5000, 9000)])
    for found, image in zip(permuted, order, strict=True):
        for key in ("boxes", "scores", "labels"):
            assert torch.equal(found[key], together[image][key])


def test_far_away_neighbors_do_not_blur_the_overlap():
    near = torch.tensor(
        [[0.0, 0, 10, 10], [0, 0, 10, 5.001], [0, 0, 10, 4.999]]
    )  # IoU with the first: just above, below .5
    far = near + 99_000
    scores, valid = torch.tensor([0.9, 0.8, 0.7]).expand(2, 3)[..., None], torch.ones(2, 3) > 0
    for order in ([0, 1], [1, 0]):
        boxes = torch.stack([near, far])[order][:, :, None]
        found = Postprocess()(scores, boxes, valid, [(100_000, 100_000)] * 2)[order.index(0)]
        assert found["scores"].tolist() == pytest.approx([0.9, 0.7])


def by_hand(process: Postprocess, boxes: list[list[float]], scores: list[float], size=(100, 100)):
    found = process(
        torch.tensor(scores)[None, :, None], torch.tensor(boxes)[None, :, None], torch.ones(1, len(boxes)) > 0, [size]
    )
    return found[0]


def test_suppression_by_hand():
    boxes = [[0.0, 0, 10, 10], [0, 0, 10, 6], [0, 0, 10, 5], [50, 50, 60, 60]]  # IoU with the first: .6, .5, 0
    found = by_hand(Postprocess(), boxes, [0.9, 0.8, 0.7, 0.95])
    assert found["scores"].tolist() == pytest.approx([0.95, 0.9, 0.7])
    assert found["labels"].tolist() == [1, 1, 1]
    assert found["labels"].dtype == torch.int64


def test_classes_do_not_suppress_each_other():
    scores, boxes = torch.tensor([[[0.9, 0.0], [0.0, 0.8]]]), torch.tensor([0.0, 0, 10, 10]).expand(1, 2, 1, 4)
    [found] = Postprocess()(scores, boxes, torch.ones(1, 2) > 0, [(20, 20)])
    assert found["labels"].tolist() == [1, 2]


def test_the_threshold_is_exceeded():
    boxes = [[0.0, 0, 5, 5], [10, 0, 15, 5], [20, 0, 25, 5]]
    assert by_hand(Postprocess(0.5), boxes, [0.5, 0.50001, 0.4])["scores"].tolist() == pytest.approx([0.50001])


def test_only_the_best_are_kept():
    boxes = [[10.0 * i, 0, 10 * i + 5, 5] for i in range(6)]
    scores = [0.1, 0.6, 0.3, 0.5, 0.2, 0.4]
    assert by_hand(Postprocess(detections_per_image=2), boxes, scores)["scores"].tolist() == pytest.approx([0.6, 0.5])
    assert by_hand(Postprocess(candidates_per_image=3), boxes, scores)["scores"].tolist() == pytest.approx(
        [0.6, 0.5, 0.4]
    )


def test_boxes_are_clipped_and_degenerate_ones_dropped():
    boxes = [
        [-5.0, -5, 5, 5],
        [30, 30, 30, 40],
        [9, 9, 3, 3],
        [200, 0, 220, 9],
        [float("nan"), 0, 3, 3],
        [2, 0, 9, 1e9],
    ]
    found = by_hand(Postprocess(), boxes, [0.9, 0.8, 0.7, 0.6, 0.5, 0.4], size=(20, 50))
    assert found["boxes"].tolist() == [[0, 0, 5, 5], [2, 0, 9, 20]]


@pytest.mark.parametrize("boxes_each", [1, 3])
def test_no_proposals(boxes_each):
    found = Postprocess()(torch.zeros(2, 0, 3), torch.zeros(2, 0, boxes_each, 4), torch.zeros(2, 0) > 0, SIZES[:2])
    assert [one["boxes"].shape for one in found] == [(0, 4), (0, 4)]
    assert [one["scores"].shape for one in found] == [one["labels"].shape for one in found] == [(0,), (0,)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"score_threshold": 1.0}, "score_threshold"),
        ({"score_threshold": -0.1}, "score_threshold"),
        ({"nms_iou": 0.0}, "nms_iou"),
        ({"detections_per_image": 0}, "detections_per_image"),
        ({"candidates_per_image": 0}, "candidates_per_image"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        Postprocess(**arguments)


def test_small_detections_are_dropped_before_suppression():
    boxes = torch.tensor([[[[5.0, 5.0, 5.005, 9.0]], [[5.0, 5.0, 9.0, 9.0]]]])
    scores, valid = torch.tensor([[[0.9], [0.8]]]), torch.ones(1, 2, dtype=torch.bool)
    assert len(Postprocess()(scores, boxes, valid, [(20, 20)])[0]["scores"]) == 2
    assert Postprocess(min_size=0.01)(scores, boxes, valid, [(20, 20)])[0]["scores"].tolist() == pytest.approx([0.8])
    with pytest.raises(ValueError, match="min_size must not be negative"):
        Postprocess(min_size=-1.0)


@pytest.mark.parametrize("suppression", ["nms", "soft_nms", "box_fusion"])
def test_scores_that_are_no_numbers_take_no_place_of_others(suppression):
    scores, boxes = torch.full((1, 4, 2), torch.nan), random_boxes(4)[None, :, None]
    scores[0, 3] = torch.tensor([0.9, 0.01])
    [found] = Postprocess(suppression=suppression)(scores, boxes, torch.ones(1, 4) > 0, [(100, 100)])
    torch.testing.assert_close(found["boxes"], boxes[0, 3])
    assert found["scores"].tolist() == pytest.approx([0.9])


def test_boxes_of_tiny_scores_are_fused_where_they_are():
    settings = Postprocess(score_threshold=0.0, suppression="box_fusion")
    boxes = torch.tensor([[[[10.0, 20.0, 30.0, 40.0]], [[50.0, 50.0, 90.0, 80.0]]]])
    [found] = settings(torch.tensor([[[1e-15], [1e-30]]]), boxes, torch.ones(1, 2) > 0, [(100, 100)])
    torch.testing.assert_close(found["boxes"], boxes[0, :, 0])

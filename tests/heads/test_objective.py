import itertools
import math

import pytest
import torch
from samples import pyramid, random_boxes, random_target
from torch import nn
from torchvision.ops import complete_box_iou_loss, distance_box_iou_loss, generalized_box_iou_loss

from detpipe.boxes import decode, encode, iou
from detpipe.heads import AttentionalHead, CascadeHead, FastRCNNHead, RoISampler
from detpipe.heads.objective import BoxLoss, ClassLoss, Objective, box_losses
from detpipe.heads.sampling import RoITargets
from detpipe.roi_pooling import RoIAlign

STRIDES = {"c3": 8, "c4": 16}
SIZES = [(60, 80), (64, 80)]


def sample(classes: int = 3, each: int = 9) -> RoITargets:
    """RoIs of two images: the first few of each are objects, the last one is padding."""
    rois, boxes = (torch.stack([random_boxes(each), random_boxes(each)]) for _ in range(2))
    boxes[:, :4] = rois[:, :4] + 3 * torch.rand(2, 4, 4)
    foreground = (torch.arange(each) < 4).expand(2, -1)
    labels = torch.randint(1, classes + 1, (2, each)) * foreground
    boxes = torch.where(foreground[..., None], boxes, rois)
    return RoITargets(rois, labels, boxes, (torch.arange(each) < each - 1).expand(2, -1), foreground)


def seesaw(logits: list[float], label: int, seen: list[int], p: float, q: float) -> float:
    """The loss of one RoI from the paper's equations; ``logits[0]`` is the background's."""
    background = -math.log(1 / (1 + math.exp(-logits[0])) if label == 0 else 1 / (1 + math.exp(logits[0])))
    if label == 0:
        return background
    z, i = logits[1:], label - 1
    total = sum(math.exp(value) for value in z)
    score = [math.exp(value) / total for value in z]
    denominator = math.exp(z[i])
    for j in set(range(len(z))) - {i}:
        mitigation = (max(1, seen[j]) / max(1, seen[i])) ** p if seen[i] > seen[j] else 1.0
        compensation = (score[j] / score[i]) ** q if score[j] > score[i] else 1.0
        denominator += mitigation * compensation * math.exp(z[j])
    return background - math.log(math.exp(z[i]) / denominator)


@pytest.mark.parametrize(
    ("loss", "formula"),
    [
        (ClassLoss(weight=2.0), lambda p, label, n: -2 * math.log(p[label])),
        (
            ClassLoss(label_smoothing=0.2),
            lambda p, label, n: -0.8 * math.log(p[label]) - 0.2 * sum(map(math.log, p)) / n,
        ),
        (ClassLoss("focal", gamma=1.5), lambda p, label, n: -((1 - p[label]) ** 1.5) * math.log(p[label])),
        (ClassLoss("focal", gamma=0.0), lambda p, label, n: -math.log(p[label])),
    ],
    ids=["cross_entropy", "smoothed", "focal", "focal_of_gamma_0"],
)
def test_class_losses_equal_their_formulas(loss, formula):
    logits, labels = torch.randn(20, 4), torch.randint(0, 4, (20,))
    for value, row, label in zip(
        loss.of_each(logits, labels), logits.softmax(-1).tolist(), labels.tolist(), strict=True
    ):
        assert value.item() == pytest.approx(formula(row, label, 4), rel=1e-4)


def test_seesaw_equals_its_formula_and_its_scores_are_probabilities():
    loss, seen = ClassLoss("seesaw", mitigation=0.7, compensation=1.5), torch.tensor([500, 3, 0])
    logits, labels = torch.randn(30, 4), torch.arange(30) % 4
    for value, row, label in zip(loss.of_each(logits, labels, seen), logits.tolist(), labels.tolist(), strict=True):
        assert value.item() == pytest.approx(seesaw(row, label, seen.tolist(), 0.7, 1.5), rel=1e-4)
    probabilities = loss.probabilities(logits)
    torch.testing.assert_close(probabilities.sum(-1), torch.ones(30))
    torch.testing.assert_close(probabilities[:, 0], logits[:, 0].sigmoid())


def test_seesaw_pushes_a_rare_class_down_less_for_objects_of_a_frequent_one():
    pushes = []
    for seen in (torch.tensor([1000, 1]), torch.tensor([1, 1])):
        logits = torch.zeros(1, 3, requires_grad=True)
        ClassLoss("seesaw").of_each(logits, torch.tensor([1]), seen).sum().backward()
        pushes.append(logits.grad[0, 2].item())
    assert 0 < pushes[0] < 0.01 * pushes[1]


@pytest.mark.parametrize(
    ("kind", "function"),
    [("giou", generalized_box_iou_loss), ("diou", distance_box_iou_loss), ("ciou", complete_box_iou_loss)],
)
@pytest.mark.parametrize("class_agnostic", [False, True])
def test_losses_of_overlap_equal_torchvisions_on_decoded_boxes(kind, function, class_agnostic):
    targets, deltas = sample(), 0.3 * torch.randn(2, 9, 1 if class_agnostic else 3, 4)
    losses = box_losses(targets, torch.randn(2, 9, 4), deltas, objective=Objective(boxes=BoxLoss(kind, weight=3.0)))
    total = 0.0
    for image, roi in itertools.product(range(2), range(4)):
        column = 0 if class_agnostic else int(targets.labels[image, roi]) - 1
        predicted = decode(deltas[image, roi, column], targets.rois[image, roi])
        total += 3 * function(predicted, targets.boxes[image, roi]).item()
    assert losses["loss_box_reg"].item() == pytest.approx(total / 16, rel=1e-5)


@pytest.mark.parametrize("beta", [0.0, 0.25, 1.0])
def test_smooth_l1_is_linear_from_beta_on(beta):
    targets, deltas = sample(), torch.randn(2, 9, 1, 4)
    losses = box_losses(targets, torch.randn(2, 9, 4), deltas, objective=Objective(boxes=BoxLoss(beta=beta)))
    wanted, total = encode(targets.boxes, targets.rois), 0.0
    for image, roi in itertools.product(range(2), range(4)):
        for x in (deltas[image, roi, 0] - wanted[image, roi]).abs().tolist():
            total += 0.5 * x * x / beta if x < beta else x - beta / 2
    assert losses["loss_box_reg"].item() == pytest.approx(total / 16, rel=1e-4)


@pytest.mark.parametrize("kind", ["smooth_l1", "giou", "diou", "ciou"])
def test_boxes_that_collapse_or_explode_give_finite_losses_and_gradients(kind):
    targets = sample()
    for value in (-1e4, -200.0, 0.0, 1e4):
        deltas = torch.full((2, 9, 3, 4), value, requires_grad=True)
        losses = box_losses(targets, torch.zeros(2, 9, 4), deltas, objective=Objective(boxes=BoxLoss(kind)))
        losses["loss_box_reg"].backward()
        assert torch.isfinite(losses["loss_box_reg"])
        assert torch.isfinite(deltas.grad).all()
        assert (deltas.grad[:, 4:] == 0).all()


def test_only_the_hardest_rois_of_each_image_count():
    targets, logits, deltas = sample(), torch.randn(2, 9, 4), torch.randn(2, 9, 3, 4)
    logits[:, 8] = torch.tensor([-50.0, 50, 50, 50])  # padding would be the hardest
    everything = []
    for image, roi in itertools.product(range(2), range(9)):
        one = RoITargets(*(getattr(targets, name)[image : image + 1, roi : roi + 1] for name in vars(targets)))
        losses = box_losses(one, logits[image : image + 1, roi : roi + 1], deltas[image : image + 1, roi : roi + 1])
        everything.append((losses["loss_classifier"].item(), losses["loss_box_reg"].item()))
    expected = [0.0, 0.0]
    for image in range(2):
        for value in sorted(everything[9 * image : 9 * image + 8], key=sum)[-3:]:
            expected = [total + part / 6 for total, part in zip(expected, value, strict=True)]
    losses = box_losses(targets, logits, deltas, objective=Objective(hardest=3))
    assert losses["loss_classifier"].item() == pytest.approx(expected[0], rel=1e-5)
    assert losses["loss_box_reg"].item() == pytest.approx(expected[1], rel=1e-5)
    plain = box_losses(targets, logits, deltas)
    assert box_losses(targets, logits, deltas, objective=Objective(hardest=100)) == plain


def test_the_quality_is_trained_on_the_iou_of_the_refined_box():
    targets, deltas, quality = sample(), 0.3 * torch.randn(2, 9, 3, 4), torch.randn(2, 9, 3)
    losses = box_losses(targets, torch.randn(2, 9, 4), deltas, objective=Objective(quality=0.5), quality=quality)
    total = 0.0
    for image, roi in itertools.product(range(2), range(4)):
        column = int(targets.labels[image, roi]) - 1
        refined = decode(deltas[image, roi, column], targets.rois[image, roi])
        overlap = iou(refined[None], targets.boxes[image, roi][None]).item()
        predicted = quality[image, roi, column].sigmoid().item()
        total -= overlap * math.log(predicted) + (1 - overlap) * math.log(1 - predicted)
    assert losses["loss_quality"].item() == pytest.approx(0.5 * total / 8, rel=1e-4)


def test_losses_are_float32_under_mixed_precision_and_empty_batches_are_legal():
    objective = Objective(ClassLoss("focal"), BoxLoss("giou"), hardest=4, quality=1.0)
    outputs = [torch.randn(2, 9, width, dtype=torch.bfloat16) for width in (4, 4, 1)]
    losses = box_losses(sample(), outputs[0], outputs[1][:, :, None], objective=objective, quality=outputs[2])
    assert {value.dtype for value in losses.values()} == {torch.float32}
    empty = sample()
    empty = RoITargets(empty.rois, 0 * empty.labels, empty.rois, empty.valid & False, empty.foreground & False)
    logits = torch.randn(2, 9, 4, requires_grad=True)
    losses = box_losses(empty, logits, outputs[1][:, :, None], objective=objective, quality=outputs[2])
    assert {value.item() for value in losses.values()} == {0.0}
    losses["loss_classifier"].backward()
    assert (logits.grad == 0).all()


EVERYTHING = Objective(ClassLoss("seesaw"), BoxLoss("ciou", weight=2.0), hardest=10, quality=1.0)


def heads() -> list:
    common = {
        "in_channels": 4,
        "num_classes": 3,
        "strides": STRIDES,
        "pooler": RoIAlign(2),
        "fc": [16],
        "sampler": RoISampler(rois_per_image=12),
        "objective": EVERYTHING,
    }
    return [
        FastRCNNHead(**common, class_agnostic=True),
        FastRCNNHead(**common, glimpse="affine"),
        CascadeHead(**common),
        AttentionalHead(**common),
    ]


@pytest.mark.parametrize("index", range(4), ids=["agnostic", "glimpse", "cascade", "attentional"])
def test_every_head_learns_by_the_objective_and_ranks_by_the_quality(index):
    head = heads()[index]
    features, targets = pyramid(2, STRIDES), [random_target(3), random_target(2)]
    proposals = [torch.cat((random_boxes(9), target["boxes"])) for target in targets]
    _, losses = head(features, proposals, SIZES, targets)
    assert "loss_quality" in {name.rsplit("_3")[0] for name in losses}
    assert head.classes_seen.sum() >= 5
    sum(value for name, value in losses.items() if name.startswith("loss_")).backward()
    assert head.quality.weight.grad.abs().sum() > 0
    assert "classes_seen" in head.state_dict()
    head.eval()
    nn.init.zeros_(head.quality.weight)
    scores, boxes = [], torch.stack([random_boxes(5)] * 2)
    for bias in (0.0, -1.0):
        nn.init.constant_(head.quality.bias, bias)
        scores.append(head.detect(features, boxes, SIZES, torch.ones(2, 5, dtype=torch.bool)).scores)
    torch.testing.assert_close(scores[1] / scores[0], torch.full((2, 5, 3), 2 / (1 + math.e)))


def test_without_seesaw_and_quality_a_head_keeps_no_more_than_before():
    names = set(FastRCNNHead(4, 3, STRIDES, pooler=RoIAlign(2), fc=[16]).state_dict())
    assert names == {
        f"{layer}.{kind}" for layer in ("shared.1", "classifier", "regressor") for kind in ("weight", "bias")
    }


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: ClassLoss("hinge"), "classes.kind must be one of cross_entropy, focal, seesaw, got 'hinge'"),
        (lambda: ClassLoss(weight=0.0), "classes.weight must be positive"),
        (lambda: ClassLoss(label_smoothing=1.0), "label_smoothing must be in"),
        (lambda: ClassLoss("focal", gamma=-1.0), "gamma"),
        (lambda: ClassLoss("focal", label_smoothing=0.1), "is for the kind cross_entropy"),
        (lambda: ClassLoss(gamma=1.0), "classes.gamma is for the kind focal, got it with cross_entropy; leave it out"),
        (lambda: ClassLoss("focal", mitigation=1.0), "classes.mitigation is for the kind seesaw, got it with focal"),
        (lambda: BoxLoss("l2"), "boxes.kind must be one of smooth_l1, giou, diou, ciou, got 'l2'"),
        (lambda: BoxLoss(weight=-1.0), "boxes.weight must be positive"),
        (lambda: BoxLoss(beta=-1.0), "boxes.beta must not be negative"),
        (lambda: Objective(hardest=0), "objective.hardest must be at least 1"),
        (lambda: Objective(quality=-0.1), "objective.quality must not be negative"),
    ],
)
def test_settings_outside_their_range_are_refused_by_name(make, words):
    with pytest.raises(ValueError, match=words):
        make()


def test_validation_does_not_count_classes():
    [head, *_], targets = heads(), [random_target(3)]
    features, proposals = pyramid(1, STRIDES), [targets[0]["boxes"]]
    for context, counts in ((torch.no_grad, False), (torch.inference_mode, False), (torch.enable_grad, True)):
        with context():
            head(features, proposals, SIZES[:1], targets)
        assert (head.classes_seen.sum() > 0) == counts

import math

import pytest
import torch
from samples import pyramid, random_boxes, random_target
from torch import nn

from detpipe.boxes import encode
from detpipe.heads import ClassLoss, FastRCNNHead, Objective, Postprocess, RoISampler
from detpipe.heads import base as module
from detpipe.heads.layers import Convolutions, ResidualStage
from detpipe.roi_pooling import RoIAlign, RoIMaxPool

STRIDES = {"c3": 8, "c4": 16}
SIZES = [(60, 80), (64, 96), (40, 50)]


def make(class_agnostic: bool = False, **arguments) -> FastRCNNHead:
    """A small head whose outputs are not close to zero, as those of a new one are."""
    settings = {"pooler": RoIAlign(2), "fc": [16], "sampler": RoISampler(rois_per_image=12), **arguments}
    head = FastRCNNHead(4, 3, STRIDES, class_agnostic=class_agnostic, **settings)
    for layer in (head.classifier, head.regressor):
        nn.init.normal_(layer.weight)
    return head


def inputs(counts: tuple[int, ...] = (20, 9, 0), objects: tuple[int, ...] = (3, 0, 2)):
    features = pyramid(len(counts), STRIDES)
    targets = [random_target(count, height=40, width=50) for count in objects]
    proposals = [
        torch.cat((random_boxes(n, 40, 50), t["boxes"][: n // 2])) for n, t in zip(counts, targets, strict=True)
    ]
    return features, proposals, targets


def smooth_l1(x: float) -> float:
    return 0.5 * x * x if abs(x) < 1 else abs(x) - 0.5


@pytest.mark.parametrize("class_agnostic", [False, True])
def test_losses_equal_a_slow_loop(class_agnostic):
    head = make(class_agnostic)
    features, proposals, targets = inputs()
    torch.manual_seed(7)
    detections, losses = head(features, proposals, SIZES, targets)
    assert detections == []
    assert sorted(losses) == ["loss_box_reg", "loss_classifier"]
    torch.manual_seed(7)
    rois = head.sampler(proposals, targets)
    logits, deltas = head.predict(features, rois.rois)
    entropy, distance, count, positives = 0.0, 0.0, 0, 0
    for image in range(3):
        for i in range(12):
            if not rois.valid[image, i]:
                continue
            label = int(rois.labels[image, i])
            scores = [math.exp(value) for value in logits[image, i].tolist()]
            entropy -= math.log(scores[label] / sum(scores))
            count += 1
            if label:
                got = deltas[image, i, 0 if class_agnostic else label - 1]
                want = encode(rois.boxes[image, i], rois.rois[image, i])
                distance += sum(smooth_l1(difference) for difference in (got - want).tolist())
                positives += 1
    assert 0 < positives < count < 36
    assert losses["loss_classifier"].item() == pytest.approx(entropy / count, rel=1e-5)
    assert losses["loss_box_reg"].item() == pytest.approx(distance / count, rel=1e-5)


@pytest.mark.parametrize(
    ("dtype", "tolerance", "pooler"), [(torch.float32, 1e-6, RoIMaxPool(3)), (torch.float64, 1e-12, RoIAlign(3))]
)
def test_a_batch_equals_a_loop_over_its_images(dtype, tolerance, pooler):
    head = make(pooler=pooler).to(dtype)
    nn.init.normal_(head.classifier.weight, std=0.1)
    features = {name: level.to(dtype) for name, level in pyramid(3, STRIDES).items()}
    rois = torch.stack([random_boxes(10) for _ in range(3)]).to(dtype)
    batched = head.predict(features, rois)
    order = [2, 0, 1]
    permuted = head.predict({name: level[order] for name, level in features.items()}, rois[order])
    shuffle = torch.randperm(10)
    shuffled = head.predict(features, rois[:, shuffle])
    for image in range(3):
        alone = head.predict(
            {name: level[image : image + 1] for name, level in features.items()}, rois[image : image + 1]
        )
        for got, want in zip(batched, alone, strict=True):
            torch.testing.assert_close(got[image : image + 1], want, rtol=tolerance, atol=tolerance)
    for got, moved, mixed in zip(batched, permuted, shuffled, strict=True):
        torch.testing.assert_close(moved, got[order], rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(mixed, got[:, shuffle], rtol=tolerance, atol=tolerance)


def test_passes_of_bounded_size_change_nothing(monkeypatch):
    head = make().eval()
    features, proposals, _ = inputs()
    whole, _ = head(features, proposals, SIZES)
    sizes = []
    predict = FastRCNNHead._predict
    monkeypatch.setattr(module, "ROIS_PER_PASS", 12)
    monkeypatch.setattr(
        FastRCNNHead, "_predict", lambda s, f, rois: (sizes.append(rois[..., 0].numel()), predict(s, f, rois))[1]
    )
    parts, _ = head(features, proposals, SIZES)
    assert len(sizes) > 1
    assert max(sizes) <= 12
    for one, other in zip(whole, parts, strict=True):
        torch.testing.assert_close(one["boxes"], other["boxes"])


@pytest.mark.parametrize(
    ("counts", "objects", "class_agnostic"),
    [
        ((20, 9), (0, 0), False),
        ((0, 0), (2, 3), True),
        ((0, 0), (0, 0), False),
        ((0, 9), (2, 0), True),
        ((9, 0), (2, 0), False),
    ],
)
def test_emptiness_gives_finite_losses_with_gradients(counts, objects, class_agnostic):
    head = make(class_agnostic)
    features, proposals, targets = inputs(counts, objects)
    for level in features.values():
        level.requires_grad_()
    _, losses = head(features, proposals, SIZES[:2], targets)
    assert all(torch.isfinite(loss) and loss.ndim == 0 for loss in losses.values())
    sum(losses.values()).backward()
    for name, parameter in head.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name
    assert all(level.grad is not None for level in features.values())
    head.eval()
    found, _ = head(features, proposals, SIZES[:2])
    assert [len(one["boxes"]) > 0 for one in found] == [count > 0 for count in counts]


def test_crowd_and_difficult_objects_are_not_learned():
    head = make()
    features, _, targets = inputs((0,), (3,))
    for key in ("iscrowd", "difficult"):
        marked = {**targets[0], key: torch.ones(3, dtype=torch.bool)}
        _, losses = head(features, [targets[0]["boxes"]], SIZES[:1], [marked])
        assert [loss.item() for loss in losses.values()] == [0, 0]  # neither positive nor negative
        _, losses = head(features, [targets[0]["boxes"]], SIZES[:1], targets)
        assert losses["loss_box_reg"] > 0


def test_nan_features_are_not_hidden():
    head = make()
    features, proposals, targets = inputs()
    features = {name: level * math.nan for name, level in features.items()}
    _, losses = head(features, proposals, SIZES, targets)
    assert all(torch.isnan(loss) for loss in losses.values())


def test_losses_are_float32_under_mixed_precision():
    head = make()
    features, proposals, targets = inputs()
    with torch.autocast("cpu", torch.bfloat16):
        _, losses = head(features, proposals, SIZES, targets)
        assert head.predict(features, torch.stack([random_boxes(3)] * 3))[0].dtype == torch.bfloat16
    assert all(loss.dtype == torch.float32 and torch.isfinite(loss) for loss in losses.values())


def test_training_without_targets():
    features, proposals, _ = inputs()
    with pytest.raises(ValueError, match="training mode and needs targets"):
        make()(features, proposals, SIZES)


@pytest.mark.parametrize(
    ("arguments", "kinds"),
    [
        ({"conv": Convolutions([12, 6], "batch"), "fc": [16]}, "Conv2d BatchNorm2d ReLU " * 2 + "Flatten Linear ReLU"),
        ({"conv": Convolutions([6]), "fc": [16]}, "Conv2d ReLU Flatten Linear ReLU"),
        ({"conv": ResidualStage(32, 2), "fc": []}, "Bottleneck Bottleneck AdaptiveAvgPool2d Flatten"),
        ({"conv": ResidualStage(32, 1, True), "fc": [16]}, "Bottleneck AdaptiveAvgPool2d Flatten Linear ReLU"),
    ],
)
def test_layers_before_the_fully_connected_ones(arguments, kinds):
    head = make(**arguments).train()
    assert [type(module).__name__ for module in head.shared] == kinds.split()
    features, proposals, targets = inputs()
    _, losses = head(features, proposals, SIZES, targets)
    sum(losses.values()).backward()
    assert all(parameter.grad is not None for parameter in head.parameters())
    detections, _ = head.eval()(features, proposals, SIZES)
    assert len(detections) == 3


def test_the_stride_is_where_it_is_said():
    for in_1x1 in (False, True):
        first = make(conv=ResidualStage(32, 2, in_1x1), fc=[]).shared[0]
        assert (first.conv1.stride, first.conv2.stride) == (((2, 2), (1, 1)) if in_1x1 else ((1, 1), (2, 2)))


def test_extra_outputs_take_part_in_the_softmax_and_are_dropped():
    head = make(extra_outputs=2, postprocess=Postprocess(score_threshold=0.0)).eval()
    features, proposals, _ = inputs((5, 5, 5))
    with torch.no_grad():
        head.classifier.weight.zero_()
        head.classifier.bias.zero_()
    classes = head.num_classes
    assert head.classifier.out_features == classes + 3
    assert head.regressor.out_features == 4 * classes
    boxes = torch.stack([part[:5] for part in proposals])
    found = head.detect(features, boxes, SIZES, torch.ones(3, 5, dtype=torch.bool))
    assert found.scores.shape == (3, 5, classes)
    assert torch.allclose(found.scores, torch.tensor(1 / (classes + 3)))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"extra_outputs": -1}, "extra_outputs must be at least 0"),
        (
            {"extra_outputs": 2, "objective": Objective(ClassLoss("seesaw"))},
            "seesaw counts classes, and extra_outputs=2",
        ),
        ({"conv": Convolutions([4]), "glimpse": "affine"}, "no glimpse with conv"),
        ({"fc": []}, r"expected at least one layer in fc, of width 1 or more; got fc=\[\]"),
        ({"fc": [0]}, r"fc must be at least 1, got \[0\]"),
        ({"conv": Convolutions([4]), "fc": []}, "expected at least one layer in fc"),
    ],
)
def test_bad_layers(arguments, message):
    with pytest.raises(ValueError, match=message):
        make(**arguments)
    for outputs, told in (((0, STRIDES), "num_classes must be at least 1"), ((2, {}), "at least one level in strides")):
        with pytest.raises(ValueError, match=told):
            FastRCNNHead(4, *outputs)
    for wrong in (lambda: Convolutions([]), lambda: Convolutions([4], "layer"), lambda: ResidualStage(6)):
        with pytest.raises(ValueError, match="conv: expected"):
            wrong()


def test_batch_norm_sees_no_boxes_that_stand_in():
    features, target = {"c3": torch.randn(2, 4, 8, 8)}, random_target(1)
    proposals, seen = [random_boxes(3)] * 2, []
    for size in (4, 24):
        torch.manual_seed(0)
        sampler = RoISampler(size, positive_fraction=1.0, positive_iou=1.0, negative_iou=(0.0, 1.0))
        head = FastRCNNHead(4, 2, {"c3": 8}, RoIAlign(3), [8], conv=Convolutions([4], "batch"), sampler=sampler)
        _, losses = head(features, proposals, SIZES[:2], [target, target])
        seen.append({**losses, "mean": head.shared[1].running_mean})
    torch.testing.assert_close(*seen)

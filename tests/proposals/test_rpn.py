import math

import pytest
import torch
from samples import pyramid, random_target
from torch import nn
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.rpn import RegionProposalNetwork
from torchvision.models.detection.rpn import RPNHead as TheirHead
from torchvision.ops import MultiScaleRoIAlign

from detpipe.backbones import SEResNet
from detpipe.boxes import iou
from detpipe.detector import TwoStageDetector
from detpipe.heads import FastRCNNHead
from detpipe.proposals.anchors import Anchors
from detpipe.proposals.rpn import CACHED_GRIDS, RPN
from detpipe.proposals.rpn_objective import RPNObjective
from detpipe.proposals.rpn_selection import ProposalSelection
from detpipe.roi_pooling import RoIAlign
from detpipe.stages import ImageList
from detpipe.support.errors import DataError, TrainingError
from detpipe.types import Target

from .needs import Emptied

ONE, THREE = {"c4": 16}, {"p3": 8, "p4": 16, "p5": 32}
SIZES = [(64, 96), (50, 70), (64, 40)]
THEIR_NAMES = {
    "head.convs.0": "head.conv.0.0",
    "head.objectness": "head.cls_logits",
    "head.regressor": "head.bbox_pred",
}


def batch(sizes=SIZES) -> ImageList:
    return ImageList(torch.zeros(len(sizes), 3, 64, 96), list(sizes))


def targets(counts=(3, 0, 1)) -> list[Target]:
    return [random_target(count, height=40, width=40) for count in counts]


def spread(rpn: nn.Module) -> None:
    """Weights far from zero, so that scores and boxes differ."""
    for parameter in rpn.parameters():
        nn.init.normal_(parameter, std=0.15)


def make(strides=ONE, channels: int = 4, anchors_per_image: int = 16, **arguments) -> RPN:
    sizes = [[16, 32]] if strides == ONE else [[2 * stride] for stride in strides.values()]
    defaults = {"anchors": Anchors(sizes), "objective": RPNObjective(anchors_per_image), "conv_dims": [16]}
    settings = {**defaults, **arguments}
    rpn = RPN(channels, strides, **settings)
    spread(rpn)
    return rpn


@pytest.mark.parametrize("strides", [ONE, THREE], ids=["one level", "three levels"])
@pytest.mark.parametrize("sparse", [True, False])
def test_losses_equal_a_slow_loop(strides, sparse, monkeypatch):
    rpn, features, truth = make(strides), pyramid(3, strides), targets()
    monkeypatch.setattr(rpn.head, "computes_less_at", lambda maps, anchors: sparse)
    torch.manual_seed(7)
    _, losses = rpn(batch(), features, truth)
    assert sorted(losses) == ["loss_objectness", "loss_rpn_box_reg"]
    grids = rpn.anchors.grids([tuple(level.shape[2:]) for level in features.values()], list(strides.values()))
    torch.manual_seed(7)
    sampled = rpn.objective(grids, torch.cat([grid.boxes() for grid in grids]), truth)
    logits, deltas = rpn.head(list(features.values()))
    entropy, distance, count, positives = 0.0, 0.0, 0, 0
    for image in range(3):
        for i in range(sampled.index.shape[1]):
            if not sampled.valid[image, i]:
                continue
            row, positive = sampled.index[image, i], bool(sampled.positive[image, i])
            logit = logits[image, row].item()
            entropy += math.log(1 + math.exp(-logit if positive else logit))
            count += 1
            if positive:
                positives += 1
                for x in (deltas[image, row] - sampled.deltas[image, i]).abs().tolist():
                    distance += 0.5 * x * x * 9 if x < 1 / 9 else x - 0.5 / 9
    assert 0 < positives < count <= 48
    assert losses["loss_objectness"].item() == pytest.approx(entropy / count, rel=1e-5)
    assert losses["loss_rpn_box_reg"].item() == pytest.approx(distance / count, rel=1e-5)


def both(strides: dict[str, int], channels: int = 6) -> tuple[RPN, RegionProposalNetwork]:
    """Ours and torchvision's with equal weights and settings; all anchors are sampled, so that nothing is random."""
    sizes = [[16, 32]] if len(strides) == 1 else [[2 * stride] for stride in strides.values()]
    generator = AnchorGenerator(tuple(map(tuple, sizes)), ((0.5, 1.0, 2.0),) * len(sizes))
    head = TheirHead(channels, generator.num_anchors_per_location()[0])
    top = {"training": 40, "testing": 25}
    theirs = RegionProposalNetwork(generator, head, 0.7, 0.3, 10**6, 0.5, top, top, 0.7)
    spread(theirs)
    ours = make(
        strides,
        channels,
        anchors=Anchors(sizes, offset=0, rounded=True),
        objective=RPNObjective(10**6),
        selection=ProposalSelection((40, 25), (40, 25)),
        conv_dims=None,
    )
    weights = theirs.state_dict()
    keys = {key: key.rpartition(".") for key in ours.state_dict()}
    ours.load_state_dict({key: weights[f"{THEIR_NAMES[layer]}.{kind}"] for key, (layer, _, kind) in keys.items()})
    return ours, theirs


@pytest.mark.parametrize("strides", [ONE, THREE], ids=["one level", "three levels"])
@pytest.mark.parametrize("training", [True, False])
def test_equal_to_torchvision(strides, training):
    for _ in range(2):
        ours, theirs = both(strides)
        features, truth = pyramid(3, strides, channels=6), targets((3, 1, 2))
        truth.append(targets((0,))[0])
        images = batch([*SIZES, (30, 96)])
        features = {name: torch.cat((level, level[:1] + 1)).requires_grad_() for name, level in features.items()}
        results = []
        for rpn in (ours, theirs):
            boxes, losses = rpn.train(training)(images, features, truth if training else None)
            gradients = ()
            if training:
                gradients = torch.autograd.grad(sum(losses.values()), list(features.values()))
            results.append((boxes, losses, gradients))
        (boxes, losses, gradients), (their_boxes, their_losses, their_gradients) = results
        for got, want in zip(boxes, their_boxes, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
        assert set(losses) == set(their_losses) == ({"loss_objectness", "loss_rpn_box_reg"} if training else set())
        for name, loss in losses.items():
            torch.testing.assert_close(loss, their_losses[name], rtol=1e-4, atol=1e-4)
            assert loss > 0
        for got, want in zip(gradients, their_gradients, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("strides", [ONE, THREE], ids=["one level", "three levels"])
@pytest.mark.parametrize("counts", [(3, 0, 1), (0, 0, 0)])
def test_training(strides, counts):
    rpn = make(strides)
    features = {name: level.requires_grad_() for name, level in pyramid(3, strides).items()}
    boxes, losses = rpn(batch(), features, targets(counts))
    assert all(torch.isfinite(loss) and loss.requires_grad and loss.dtype == torch.float32 for loss in losses.values())
    assert (losses["loss_rpn_box_reg"] > 0) == any(counts)
    assert not any(found.requires_grad for found in boxes)
    sum(losses.values()).backward()
    for name, parameter in rpn.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.any() or (not any(counts) and "regressor" in name), name
    assert all(level.grad is not None for level in features.values())
    assert any(level.grad.any() for level in features.values())


@pytest.mark.parametrize(("frozen_as", "count"), [("inference", 7), ("training", 30)])
def test_frozen(frozen_as, count):
    rpn = make(THREE, frozen=True, selection=ProposalSelection((40, 20), (30, 7), frozen_as=frozen_as))
    features = {name: level.requires_grad_() for name, level in pyramid(3, THREE).items()}
    boxes, losses = rpn.train()(batch(), features)  # needs no targets
    assert losses == {}
    assert [len(found) for found in boxes] == [count] * 3
    assert not any(found.requires_grad for found in boxes)
    assert not any(parameter.requires_grad for parameter in rpn.parameters())
    boxes, losses = rpn.eval()(batch(), features)
    assert losses == {}
    assert [len(found) for found in boxes] == [7] * 3


def test_extra_levels_see_every_second_cell():
    rpn = make(ONE, anchors=Anchors([[32], [64], [128]]), extra_levels=2)
    features = pyramid(3, ONE)
    coarse = {"c4": features["c4"], "c5": features["c4"][:, :, ::2, ::2], "c6": features["c4"][:, :, ::4, ::4]}
    plain = make({"c4": 16, "c5": 32, "c6": 64}, anchors=rpn.anchors)
    plain.load_state_dict(rpn.state_dict())
    for got, want in zip(rpn.eval()(batch(), features)[0], plain.eval()(batch(), coarse)[0], strict=True):
        assert torch.equal(got, want)


def test_convolutions_of_other_widths():
    rpn = make(THREE, conv_dims=[8, 6])
    assert [tuple(conv.weight.shape[:2]) for conv in rpn.head.convs] == [(8, 4), (6, 8)]
    _, losses = rpn(batch(), pyramid(3, THREE), targets())
    sum(losses.values()).backward()
    assert all(parameter.grad.any() for parameter in rpn.parameters())


def test_anchors_are_laid_once_for_each_shape():
    rpn = make().eval()
    with torch.inference_mode():
        rpn(batch(), pyramid(3, ONE))
    [(grids, anchors)] = rpn._grids.values()
    _, losses = rpn.train()(batch(), pyramid(3, ONE), targets())  # laid in inference mode, fit for training
    sum(losses.values()).backward()
    assert next(iter(rpn._grids.values())) == (grids, anchors)
    for width in range(16, 16 * (CACHED_GRIDS + 10), 16):
        images = ImageList(torch.zeros(1, 3, 16, width), [(16, width)])
        rpn.eval()(images, pyramid(1, ONE, height=16, width=width))
    assert 0 < len(rpn._grids) <= CACHED_GRIDS
    rpn._grids = Emptied()
    boxes, _ = rpn(batch(), pyramid(3, ONE))
    assert len(boxes[0])


@pytest.mark.parametrize("sparse", [True, False])
def test_autocast(sparse, monkeypatch):
    rpn = make(THREE)
    monkeypatch.setattr(rpn.head, "computes_less_at", lambda maps, anchors: sparse)
    features, truth = pyramid(3, THREE), targets()
    torch.manual_seed(3)
    _, plain = rpn(batch(), features, truth)
    torch.manual_seed(3)
    with torch.autocast("cpu", torch.bfloat16):
        boxes, losses = rpn(batch(), features, truth)
    assert all(found.dtype == torch.float32 for found in boxes)
    for name, loss in losses.items():
        assert loss.dtype == torch.float32
        torch.testing.assert_close(loss, plain[name], rtol=0.05, atol=0.02)
    sum(losses.values()).backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in rpn.parameters())


def test_crowds_and_difficult_objects_are_neither():
    rpn = make(ONE, anchors_per_image=1000)
    boxes = torch.tensor([[0.0, 0.0, 96.0, 64.0]])
    labels, yes = torch.ones(1, dtype=torch.int64), torch.ones(1, dtype=torch.bool)
    _, crowd = rpn(batch(SIZES[:1]), pyramid(1, ONE), [Target(boxes=boxes, labels=labels, iscrowd=yes)])
    assert crowd["loss_rpn_box_reg"] == 0
    grids = rpn.anchors.grids([(4, 6)], [16])
    for flag in ("iscrowd", "difficult"):
        target = Target(boxes=grids[0].boxes()[30:31], labels=labels)
        target[flag] = yes
        sampled = rpn.objective(grids, grids[0].boxes(), [target])
        assert not sampled.positive.any()
        assert 30 not in sampled.index[sampled.valid].tolist()
        assert sampled.valid.any()


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_is_refused_by_name(value):
    rpn, features, truth = make(), pyramid(3, ONE), targets()
    features["c4"][1, 0, 0, 0] = value
    truth[1]["file_name"] = "cells/0017.png"
    with pytest.raises(
        TrainingError, match=r"proposals of the RPN: image cells/0017\.png: a score is .*; expected finite"
    ):
        rpn(batch(), features, truth)
    with pytest.raises(DataError, match="proposals of the RPN: image 1 of the batch: a score is"):
        rpn.eval()(batch(), features)


@pytest.mark.parametrize("value", [0.0, math.nan, math.inf])
def test_as_on_a_gpu_nothing_is_looked_at(value, monkeypatch):
    rpn, features = make(selection=ProposalSelection((40, 40), (35, 35))), pyramid(3, ONE)
    rpn.fills_up = True
    features["c4"][1, 0, 0, 0] += value
    monkeypatch.setattr(torch.Tensor, "is_cpu", False)
    boxes, losses = rpn(batch(), features, targets())
    assert [found.shape for found in boxes] == [(35, 4)] * 3
    assert all(bool(loss.isfinite()) == (value == 0) for loss in losses.values())


def test_wrong_inputs():
    rpn = make(THREE)
    with pytest.raises(ValueError, match="needs targets"):
        rpn(batch(), pyramid(3, THREE))
    with pytest.raises(ValueError, match=r"looks at level 'p3', but the features have \['c4'\]"):
        rpn(batch(), pyramid(3, ONE), targets())
    with pytest.raises(ValueError, match="level 'p3': stride 8 is declared"):
        rpn(batch(), {**pyramid(3, THREE), "p3": torch.zeros(3, 4, 4, 6)}, targets())
    with pytest.raises(ValueError, match=r"targets\[0\] needs 'boxes' and 'labels'"):
        rpn(batch(), pyramid(3, THREE), [Target()] * 3)


def test_extra_levels_follow_the_last_one_whatever_the_order():
    rpn = RPN(4, {"p3": 8, "p2": 4}, extra_levels=1).eval()
    features = {"p3": torch.zeros(1, 4, 4, 6), "p2": torch.zeros(1, 4, 8, 12)}
    rpn(ImageList(torch.zeros(1, 3, 32, 48), [(32, 48)]), features)
    [(grids, _)] = rpn._grids.values()
    coarse, _, extra = ((grid.x[0, 1] - grid.x[0, 0]).tolist() for grid in grids)
    assert coarse == extra == [8.0, 8.0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"strides": {}}, "strides need at least one level"),
        ({"strides": {"c4": 0}}, "strides must be at least 1"),
        ({"strides": {"c4": float("nan")}}, "strides must be a whole number"),
        ({"strides": ONE, "extra_levels": -1}, "extra_levels must be at least 0"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        RPN(4, **arguments)


def test_a_few_steps_raise_recall():
    images, strides = ImageList(torch.zeros(4, 3, 128, 128), [(128, 128)] * 4), {"c3": 8}
    corner = torch.tensor([[[8, 8], [72, 24]], [[40, 64], [80, 80]], [[16, 80], [88, 8]], [[56, 40], [8, 104]]])
    side = torch.tensor([[[32, 32], [24, 24]], [[16, 24], [32, 24]], [[24, 16], [32, 32]], [[24, 24], [16, 16]]])
    boxes = torch.cat((corner, corner + side), dim=-1).float()
    truth = [Target(boxes=row, labels=torch.ones(2, dtype=torch.int64)) for row in boxes]
    features = {"c3": torch.randn(4, 16, 16, 16)}  # every cell looks different: enough to learn these images by heart
    selection = ProposalSelection((200, 200), (10, 10))
    rpn = RPN(16, strides, Anchors([[16, 32]]), RPNObjective(64), selection, conv_dims=[64])

    def recall() -> float:
        found, _ = rpn.propose(images, features)
        best = [iou(row, candidates).amax(dim=1) for row, candidates in zip(boxes, found, strict=True)]
        return (torch.cat(best) >= 0.6).float().mean().item()

    before = recall()
    optimizer = torch.optim.Adam(rpn.parameters(), lr=0.02)
    for _ in range(40):
        _, losses = rpn(images, features, truth)
        optimizer.zero_grad()
        sum(losses.values()).backward()
        optimizer.step()
    assert before < 0.5
    assert recall() == 1


def small_images() -> tuple[list[torch.Tensor], list[Target]]:
    boxes = [[[5.0, 6.0, 40.0, 38.0], [50.0, 20.0, 90.0, 60.0]], [[10.0, 10.0, 50.0, 70.0]]]
    truth = [Target(boxes=torch.tensor(rows), labels=torch.ones(len(rows), dtype=torch.int64)) for rows in boxes]
    return [torch.rand(3, 64, 96), torch.rand(3, 80, 64)], truth


@pytest.mark.parametrize("levels", [["c4"], ["c3", "c4"]])
@pytest.mark.parametrize("frozen", [False, True])
def test_in_our_detector_and_in_torchvisions(levels, frozen):
    images, truth = small_images()
    backbone = SEResNet(18, levels=levels, out_channels=16)
    rpn = RPN(16, backbone.strides, objective=RPNObjective(32), frozen=frozen)
    head = FastRCNNHead(16, 3, backbone.strides, pooler=RoIAlign(3), fc=[16])
    ours = TwoStageDetector(backbone, rpn, head, min_size=64, max_size=96)
    pool = MultiScaleRoIAlign(levels, output_size=3, sampling_ratio=2)
    anchors = AnchorGenerator(((32,),) * len(levels), ((1.0,),) * len(levels))
    theirs = FasterRCNN(
        backbone, 4, min_size=64, max_size=96, rpn_anchor_generator=anchors, box_roi_pool=pool, box_head=None
    )
    theirs.rpn = rpn
    for model in (ours, theirs):
        model.train().zero_grad()
        losses = ours.losses(images, truth) if model is ours else model(images, truth)
        assert ("loss_objectness" in losses) != frozen
        assert all(torch.isfinite(loss) for loss in losses.values())
        sum(losses.values()).backward()
        grown = [parameter.grad is not None and bool(parameter.grad.any()) for parameter in rpn.parameters()]
        assert not any(grown) if frozen else all(grown)
        with torch.no_grad():
            assert len(model.eval()(images)) == 2

"""Our stages inside torchvision's detector, and torchvision's inside ours: each trains and infers."""

from collections.abc import Callable
from pathlib import Path

import pytest
import runs
import torch
from torch import nn
from torchvision.models.detection import FasterRCNN, fasterrcnn_mobilenet_v3_large_320_fpn
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead
from torchvision.ops import MultiScaleRoIAlign

from detpipe import (
    AttentionalHead,
    CascadeHead,
    DenseGrid,
    Extractor,
    FastRCNNHead,
    GlimpseSequence,
    Level,
    Pathwise,
    Reinforce,
    RoIAlign,
    RoISampler,
    SEResNet,
    TwoStageDetector,
    cli,
    load_detector,
)
from detpipe.detector import total_loss
from detpipe.heads import ProposalHead
from detpipe.stages import Backbone, ProposalSource, RoIHead

CLASSES = 3
IMAGES = [torch.rand(3, 64, 96), torch.rand(3, 80, 64)]
TARGETS = [
    {"boxes": torch.tensor([[5.0, 6.0, 40.0, 38.0], [50.0, 20.0, 90.0, 60.0]]), "labels": torch.tensor([1, 3])},
    {"boxes": torch.tensor([[10.0, 10.0, 50.0, 70.0]]), "labels": torch.tensor([2])},
]
BACKBONES: dict[str, Callable[[], Backbone]] = {
    "SEResNet": lambda: SEResNet(18, levels=["c4"]),
    "SEResNet of two levels": lambda: SEResNet(18, levels=["c3", "c4"], out_channels=32),
    "Extractor": lambda: Extractor("mobilenet_v3_small", {"c4": Level("features.8", 16)}),
}


def our_head(backbone: Backbone) -> FastRCNNHead:
    sampler = RoISampler(rois_per_image=16)
    return FastRCNNHead(backbone.out_channels, CLASSES, backbone.strides, pooler=RoIAlign(3), fc=[32], sampler=sampler)


def heads_that_look_again(backbone: Backbone) -> dict[str, ProposalHead]:
    """The heads that look more than once, each in the place of ours above."""
    common = {"fc": [32], "sampler": RoISampler(rois_per_image=16), "pooler": RoIAlign(3)}
    shape = (backbone.out_channels, CLASSES, backbone.strides)
    return {
        "glimpse": FastRCNNHead(*shape, **common, glimpse="affine"),
        "reinforce": AttentionalHead(*shape, **common, estimator=Reinforce(3)),
        "pathwise": AttentionalHead(*shape, **common, estimator=Pathwise(), glimpses=GlimpseSequence(3)),
        "cascade": CascadeHead(*shape, **common),
    }


def their_rpn(backbone: Backbone) -> RegionProposalNetwork:
    levels = len(backbone.strides)
    anchors = AnchorGenerator(((16, 32),) * levels, ((0.5, 1.0, 2.0),) * levels)
    head = RPNHead(backbone.out_channels, anchors.num_anchors_per_location()[0])
    top = {"training": 50, "testing": 50}
    return RegionProposalNetwork(anchors, head, 0.7, 0.3, 64, 0.5, top, top, 0.7)


def their_roi_heads(backbone: Backbone) -> RoIHeads:
    pool = MultiScaleRoIAlign(list(backbone.strides), output_size=3, sampling_ratio=2)
    box_head, predictor = TwoMLPHead(backbone.out_channels * 9, 32), FastRCNNPredictor(32, CLASSES + 1)
    return RoIHeads(pool, box_head, predictor, 0.5, 0.5, 16, 0.25, None, 0.05, 0.5, 100)


def their_detector(backbone: Backbone) -> FasterRCNN:
    levels = len(backbone.strides)
    return FasterRCNN(
        backbone,
        num_classes=CLASSES + 1,
        min_size=64,
        max_size=96,
        rpn_anchor_generator=AnchorGenerator(((16, 32),) * levels, ((0.5, 1.0, 2.0),) * levels),
        box_roi_pool=MultiScaleRoIAlign(list(backbone.strides), output_size=3, sampling_ratio=2),
    )


def check_training(model: nn.Module, losses: dict[str, torch.Tensor]) -> None:
    assert all(torch.isfinite(loss) for loss in losses.values())
    before = {name: value.clone() for name, value in model.named_parameters()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.01)
    total_loss(losses).backward()
    missing = [
        name for name, parameter in model.named_parameters() if parameter.requires_grad and parameter.grad is None
    ]
    assert not missing
    optimizer.step()
    for part, module in model.named_children():
        names = [f"{part}.{name}" for name, _ in module.named_parameters()]
        assert not names or any(not torch.equal(model.get_parameter(name), before[name]) for name in names), part


def check_detections(detections: list[dict[str, torch.Tensor]]) -> None:
    assert len(detections) == len(IMAGES)
    for found, image in zip(detections, IMAGES, strict=True):
        count = len(found["boxes"])
        assert count > 0
        assert found["boxes"].shape == (count, 4)
        assert found["scores"].shape == found["labels"].shape == (count,)
        assert set(found["labels"].tolist()) <= set(range(1, CLASSES + 1))
        assert (found["boxes"][:, 2:] <= torch.tensor([image.shape[2], image.shape[1]]) + 1e-3).all()


@pytest.mark.parametrize("backbone", list(BACKBONES))
@pytest.mark.parametrize("parts", ["backbone", "source", "head", "all"])
def test_our_stages_in_torchvisions_detector(backbone, parts):
    model = their_detector(BACKBONES[backbone]())
    if parts in ("source", "all"):
        model.rpn = DenseGrid(scales=[16, 32], stride=16, max_boxes=200)
    if parts in ("head", "all"):
        model.roi_heads = our_head(model.backbone)
    losses = model.train()(IMAGES, TARGETS)
    assert {"loss_classifier", "loss_box_reg"} <= set(losses)
    assert ("loss_objectness" in losses) == (parts in ("backbone", "head"))
    check_training(model, losses)
    with torch.no_grad():
        check_detections(model.eval()(IMAGES))


@pytest.mark.parametrize("backbone", ["SEResNet", "SEResNet of two levels"])
@pytest.mark.parametrize("name", ["glimpse", "reinforce", "pathwise", "cascade"])
def test_heads_that_look_again_in_torchvisions_detector(backbone, name):
    model = their_detector(BACKBONES[backbone]())
    model.roi_heads = heads_that_look_again(model.backbone)[name]
    losses = model.train()(IMAGES, TARGETS)
    others = {key for key, value in losses.items() if not key.startswith("loss_")}
    assert all(key.startswith("glimpse_") and not losses[key].requires_grad for key in others)
    check_training(model, losses)
    model.eval().roi_heads.return_glimpses = True
    with torch.no_grad():
        found = model(IMAGES)
    check_detections(found)


@pytest.mark.parametrize("backbone", list(BACKBONES))
@pytest.mark.parametrize("parts", ["source", "head", "both"])
@pytest.mark.parametrize("training", [True, False])
def test_torchvisions_stages_in_our_detector(backbone, parts, training):
    ours = BACKBONES[backbone]()
    source = their_rpn(ours) if parts != "head" else DenseGrid(scales=[16, 32], stride=16, max_boxes=200)
    head = their_roi_heads(ours) if parts != "source" else our_head(ours)
    model = TwoStageDetector(ours, source, head, min_size=64, max_size=96).train(training)
    losses = model.losses(IMAGES, TARGETS)
    assert {"loss_classifier", "loss_box_reg"} <= set(losses)
    assert ("loss_objectness" in losses) == (parts != "head")
    check_training(model, losses)
    with torch.no_grad():
        check_detections(model(IMAGES))


def test_one_of_our_heads_in_torchvisions_faster_rcnn():
    """The example of the README."""
    model = fasterrcnn_mobilenet_v3_large_320_fpn(weights=None, weights_backbone=None)
    model.roi_heads = FastRCNNHead(256, num_classes=3, strides={"0": 32, "1": 32, "pool": 64}, pooler=RoIAlign(7))
    images = [torch.rand(3, 240, 320), torch.rand(3, 300, 200)]
    targets = [
        {"boxes": torch.tensor([[20.0, 30.0, 120.0, 200.0]]), "labels": torch.tensor([1])},
        {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)},  # nothing in this image
    ]
    losses = model.train()(images, targets)  # loss_objectness, loss_rpn_box_reg, loss_classifier, loss_box_reg
    sum(losses.values()).backward()
    detections = model.eval()(images)  # [{"boxes": ..., "scores": ..., "labels": ...}, ...]

    assert len(losses) == 4
    assert all(torch.isfinite(loss) for loss in losses.values())
    assert all(parameter.grad is not None for parameter in model.roi_heads.parameters())
    assert [sorted(found) for found in detections] == [["boxes", "labels", "scores"]] * 2
    features = model.backbone(torch.zeros(1, 3, 320, 320))
    assert {name: 320 // level.shape[-1] for name, level in features.items()} == model.roi_heads.strides


class Anything(nn.Module):
    def forward(self, *given): ...


class AsFour(nn.Module):
    def forward(self, features, proposals, image_shapes, targets=None): ...


class AsThree(nn.Module):
    def forward(self, images, features, targets): ...


class NoForward(nn.Module): ...


class NeedsMore(nn.Module):
    def forward(self, images, features, targets, *, more): ...


@pytest.mark.parametrize(
    ("module", "source", "head"),
    [
        (RegionProposalNetwork, True, False),
        (RoIHeads, False, True),
        (AsThree, True, False),
        (AsFour, False, True),
        (Anything, True, True),
        (NoForward, False, False),
        (NeedsMore, False, False),
        (nn.Linear, False, False),
        (FastRCNNHead, False, True),  # a stage of detpipe's is of the one kind that it inherits from
        (DenseGrid, True, False),
        (SEResNet, False, False),
        (int, False, False),
    ],
)
def test_a_module_takes_the_place_of_a_stage_by_its_signature(module, source, head):
    assert issubclass(module, ProposalSource) == source
    assert issubclass(module, RoIHead) == head


@pytest.mark.slow
def test_torchvisions_stages_from_yaml_alone(demo_root, tmp_path):
    """The overlay of docs/own_stage.md trains, and its detections are in pixels of the images."""
    overlay = Path(__file__).parents[1] / "examples" / "own_stage" / "torchvision_stages.yaml"
    options = ["--model.min_size", "64", "--model.max_size", "64", "--data.loader.batch_size", "4"]
    trainer = ["--trainer.max_epochs", "1", "--trainer.limit_train_batches", "1", "--trainer.accelerator", "cpu"]
    run = tmp_path / "run"
    train = ["train", runs.CONFIG, str(overlay), *runs.demo(demo_root), *options, *trainer, "--output", str(run)]
    assert cli.main(train) == 0
    detector, _ = load_detector(run / "best.ckpt")
    assert (type(detector.proposals), type(detector.head)) == (RegionProposalNetwork, RoIHeads)
    detector.head.score_thresh = 0.0
    seen: list[dict[str, torch.Tensor]] = []
    detector.head.register_forward_hook(lambda _, given, answer: seen.append((given[2], answer[0])))
    images = [torch.rand(3, 128, 128), torch.rand(3, 96, 192)]
    with torch.no_grad():
        detections = detector(images)
    [(sizes, inside)] = seen
    assert sizes == [(64, 64), (32, 64)]
    for found, batch, scale in zip(detections, inside, (2, 3), strict=True):
        assert len(found["boxes"]) > 0
        torch.testing.assert_close(found["boxes"], scale * batch["boxes"], rtol=1e-5, atol=1e-3)
        assert torch.equal(found["scores"], batch["scores"])

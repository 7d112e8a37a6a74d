"""Random models of torchvision, and the same of our stages: equal stage by stage, and in what they detect."""

from __future__ import annotations

from functools import partial
from operator import attrgetter
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision import models
from torchvision.models import detection
from torchvision.models.detection import FasterRCNN, MaskRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead, TwoMLPHead
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.ops import FeaturePyramidNetwork, MultiScaleRoIAlign
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

from detpipe import SEResNet, TwoStageDetector
from detpipe.backbones import FPN, Extractor
from detpipe.zoo import from_torchvision
from detpipe.zoo.torchvision_models import WrappedBackbone
from zoo import random_models
from zoo.random_models import MODELS, scene, spread

# three sizes, a batch of mixed ones; one that max_size limits, and tiny ones
BATCHES = {
    "two": [(75, 100), (96, 128)],
    "mixed": [(128, 85), (60, 200), (70, 70)],
    "long": [(40, 300)],
    "tiny": [(9, 14), (20, 11)],
}


@pytest.fixture(
    scope="module",
    params=[pytest.param(make, marks=pytest.mark.slow) if make is random_models.dilated else make for make in MODELS],
    ids=lambda make: make.__name__,
)
def pair(request: pytest.FixtureRequest) -> tuple[FasterRCNN, TwoStageDetector]:
    torch.manual_seed(1)
    model = spread(request.param())
    vars(model)["backbone_is_kept"] = request.param in (
        random_models.own_backbone,
        random_models.dilated,
        random_models.one_level,
    )
    return model, from_torchvision(model)


def batch(name: str, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [scene(*size, seed).to(dtype) for seed, size in enumerate(BATCHES[name])]


@torch.no_grad()
def theirs(model: FasterRCNN, images: list[Tensor]) -> dict[str, Any]:
    seen: dict[str, Any] = {}
    handles = [
        model.transform.register_forward_hook(lambda m, i, o: seen.update(batch=o[0].tensors)),
        model.backbone.register_forward_hook(lambda m, i, o: seen.update(features=o)),
        model.rpn.head.register_forward_hook(lambda m, i, o: seen.update(rpn=flat(o))),
        model.rpn.anchor_generator.register_forward_hook(lambda m, i, o: seen.update(anchors=o[0])),
        model.rpn.register_forward_hook(lambda m, i, o: seen.update(proposals=o[0])),
        model.roi_heads.box_predictor.register_forward_hook(lambda m, i, o: seen.update(outputs=o)),
    ]
    seen["found"] = model([image.float() for image in images] if images[0].dtype == torch.uint8 else images)
    for handle in handles:
        handle.remove()
    maps = seen["features"]
    seen["features"] = [maps] if isinstance(maps, Tensor) else list(maps.values())
    return seen


@torch.no_grad()
def ours(detector: TwoStageDetector, images: list[Tensor]) -> dict[str, Any]:
    seen: dict[str, Any] = {}
    handles = [
        detector.backbone.register_forward_hook(lambda m, i, o: seen.update(batch=i[0], maps=o)),
        detector.proposals.head.register_forward_hook(lambda m, i, o: seen.update(rpn=o)),
        detector.proposals.register_forward_hook(lambda m, i, o: seen.update(images=i[0], proposals=o[0])),
    ]
    seen["found"] = detector(images)
    for handle in handles:
        handle.remove()
    rpn = detector.proposals
    seen["features"] = list(seen["maps"].values())
    seen["anchors"] = rpn._anchors(seen["images"], rpn._maps(seen["images"], seen["maps"]))[1]
    return seen


def flat(outputs: tuple[list[Tensor], list[Tensor]]) -> tuple[Tensor, Tensor]:
    logits = torch.cat([level.permute(0, 2, 3, 1).flatten(1) for level in outputs[0]], dim=1)
    deltas = [level.unflatten(1, (-1, 4)).permute(0, 3, 4, 1, 2).flatten(1, 3) for level in outputs[1]]
    return logits, torch.cat(deltas, dim=1)


def assert_near(given: Tensor, wanted: Tensor, relative: float) -> None:
    assert given.shape == wanted.shape
    assert (given - wanted).abs().max() <= relative * wanted.abs().max()


@pytest.mark.parametrize("name", BATCHES)
def test_the_same_batch_and_anchors(pair: tuple[FasterRCNN, TwoStageDetector], name: str) -> None:
    model, detector = pair
    a, b = theirs(model, batch(name)), ours(detector, batch(name))
    assert torch.equal(a["batch"], b["batch"])
    assert torch.equal(a["anchors"], b["anchors"])


@pytest.mark.parametrize("name", BATCHES)
def test_the_same_detections(pair: tuple[FasterRCNN, TwoStageDetector], name: str) -> None:
    model, detector = pair
    for wanted, given in zip(theirs(model, batch(name))["found"], ours(detector, batch(name))["found"], strict=True):
        assert len(wanted["scores"]) >= 3
        assert_same_detections(given, wanted)


def assert_same_detections(given: Any, wanted: dict[str, Tensor], pixels: float = 0.01, strays: int = 0) -> None:
    """Labels, and the order up to scores that are equal but for rounding; all but some ``strays`` are found."""
    assert len(given["labels"]) == len(wanted["labels"])
    if not strays:
        assert (given["scores"] - wanted["scores"]).abs().max() < 1e-3
    free, alone = set(range(len(wanted["labels"]))), 0
    for box, score, label in zip(given["boxes"], given["scores"], given["labels"], strict=True):
        near = [k for k in free if label == wanted["labels"][k] and (box - wanted["boxes"][k]).abs().max() < pixels]
        best = min(near, key=lambda k: abs(float(score - wanted["scores"][k])), default=None)
        if best is None or abs(float(score - wanted["scores"][best])) >= 1e-3:
            alone += 1
        else:
            free.remove(best)
    assert alone <= strays


@pytest.mark.parametrize(("dtype", "relative"), [(torch.float32, 1e-4), (torch.float64, 1e-10)], ids=["32", "64"])
def test_the_same_numbers(pair: tuple[FasterRCNN, TwoStageDetector], dtype: torch.dtype, relative: float) -> None:
    model, detector = (part.to(dtype) for part in pair)
    try:
        images = batch("mixed", dtype)
        a, b = theirs(model, images), ours(detector, images)
        for given, wanted in zip((*b["features"], *b["rpn"]), (*a["features"], *a["rpn"]), strict=True):
            assert_near(given, wanted, relative)
        assert_same_head(detector, a, relative)
    finally:
        model.float()
        detector.float()


@torch.no_grad()
def assert_same_head(detector: TwoStageDetector, a: dict[str, Any], relative: float) -> None:
    """The outputs of the head for the same maps and proposals."""
    maps = dict(zip(detector.backbone.strides, a["features"], strict=True))
    parts = [
        detector.head.predict({level: values[index : index + 1] for level, values in maps.items()}, boxes[None])
        for index, boxes in enumerate(a["proposals"])
    ]
    logits, deltas = (torch.cat([part[k][0] for part in parts]) for k in (0, 1))
    assert_near(logits, a["outputs"][0], relative)
    assert_near(deltas, a["outputs"][1].unflatten(-1, (-1, 4))[:, 1:], relative)


def test_what_the_backbone_becomes(pair: tuple[FasterRCNN, TwoStageDetector]) -> None:
    backbone = pair[1].backbone
    if isinstance(backbone, WrappedBackbone):
        assert pair[0].backbone_is_kept  # pyright: ignore
    else:
        assert not pair[0].backbone_is_kept  # pyright: ignore
        assert isinstance(backbone, FPN)
        assert isinstance(backbone.backbone, SEResNet | Extractor)


def test_the_model_is_left_alone_and_shares_nothing(pair: tuple[FasterRCNN, TwoStageDetector]) -> None:
    model, detector = pair
    theirs = {value.data_ptr() for value in model.state_dict().values() if value.numel()}
    assert not theirs & {value.data_ptr() for value in detector.state_dict().values() if value.numel()}
    assert not detector.training
    assert not model.training


def test_frozen_parameters_stay_frozen() -> None:
    model = random_models.shaped_v1()
    for name, parameter in model.backbone.body.named_parameters():
        parameter.requires_grad_(not name.startswith(("conv1", "layer1")))
    detector = from_torchvision(model)
    still = {name for name, parameter in detector.named_parameters() if not parameter.requires_grad}
    assert still
    assert all(name.startswith(("backbone.backbone.stem", "backbone.backbone.stages.c2")) for name in still)
    assert sum(p.numel() for p in model.parameters() if not p.requires_grad) == sum(
        dict(detector.named_parameters())[name].numel() for name in still
    )


def test_it_trains(pair: tuple[FasterRCNN, TwoStageDetector]) -> None:
    target = {"boxes": torch.tensor([[10.0, 12.0, 60.0, 50.0]]), "labels": torch.tensor([CLASSES_LAST])}
    losses = pair[1].losses(batch("two")[:1], [target])
    assert {"loss_classifier", "loss_box_reg", "loss_objectness", "loss_rpn_box_reg"} <= losses.keys()
    assert all(torch.isfinite(value) for value in losses.values())


CLASSES_LAST = random_models.CLASSES - 1


class OtherHead(TwoMLPHead):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class OtherPostprocess(RoIHeads):
    pass


class OtherPyramid(FeaturePyramidNetwork):
    def forward(self, x: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: 2 * level for name, level in super().forward(x).items()}


class OtherBackbone(BackboneWithFPN):
    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {name: 2 * level for name, level in super().forward(x).items()}


class Maps(nn.Module):
    """Maps of any strides."""

    def __init__(self, *strides: int) -> None:
        super().__init__()
        self.out_channels = random_models.WIDTH
        self.layers = nn.ModuleList(nn.Conv2d(3, self.out_channels, stride, stride) for stride in strides)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {str(index): layer(x) for index, layer in enumerate(self.layers)}


def _with(parts: dict[str, Any]) -> FasterRCNN:
    model = random_models.own_backbone()
    for path, part in parts.items():
        parent, _, name = path.rpartition(".")
        setattr(attrgetter(parent)(model) if parent else model, name, part)
    return model


def _of_maps(*strides: int) -> dict[str, Any]:
    return {"backbone": Maps(*strides), "roi_heads.box_roi_pool": MultiScaleRoIAlign(["0", "1", "2"], 7, 2)}


def _norms(kind: Any) -> FastRCNNConvFCHead:
    return FastRCNNConvFCHead((random_models.WIDTH, 5, 4), [8], [24], kind)


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        (
            {"roi_heads.box_head": nn.Flatten()},
            r"roi_heads\.box_head: Flatten has no counterpart; expected TwoMLPHead",
        ),
        ({"roi_heads.box_predictor": nn.Linear(24, 6)}, r"roi_heads\.box_predictor: Linear has no counterpart"),
        ({"roi_heads.box_head": OtherHead(16, 8)}, "OtherHead has no counterpart; expected TwoMLPHead or"),
        ({"roi_heads.box_head": _norms(partial(nn.BatchNorm2d, eps=0.1))}, "box_head: its layers have no counterpart"),
        ({"roi_heads.box_head": _norms(partial(nn.GroupNorm, 4))}, "box_head: its layers have no counterpart"),
        ({"roi_heads.box_head": FastRCNNConvFCHead((16, 5, 4), [8], [])}, "box_head: its layers have no counterpart"),
        ({"rpn.head": nn.Conv2d(16, 4, 1)}, r"rpn\.head: Conv2d has no counterpart; expected RPNHead"),
        ({"rpn.box_coder.weights": (2.0, 1.0, 1.0, 1.0)}, r"rpn\.box_coder: the weights are \(1\.0, .* got \(2\.0, "),
        (
            {"roi_heads.box_coder.weights": [1.0] * 4},
            r"roi_heads\.box_coder: the weights are \(10\.0, .* got \(1\.0, ",
        ),
        (
            {"roi_heads.__class__": OtherPostprocess},
            "roi_heads: OtherPostprocess has no counterpart; expected RoIHeads",
        ),
        ({"transform.fixed_size": (64, 64)}, "fixed_size and _skip_resize have no counterpart"),
        (
            {"rpn.anchor_generator": AnchorGenerator(((8,), (16,)), [[0.5], [1.0]])},
            r"every level needs the same aspect_ratios, got \[\[0\.5\], \[1\.0\]\]",
        ),
        (_of_maps(4, 16), r"strides of its maps, \{'0': 4, '1': 16\}, have no counterpart; expected each twice"),
        (_of_maps(4, 4, 8), "strides of its maps, .* have no counterpart"),
        (_of_maps(16, 8), "strides of its maps, .* have no counterpart"),
        (_of_maps(3), "backbone: the map '0' has 85 cells of 256 pixels; expected a stride that is a power of two"),
    ],
)
def test_a_part_without_counterpart_is_named(parts: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        from_torchvision(_with(parts))


def test_only_detectors_of_boxes_are_taken() -> None:
    with pytest.raises(TypeError, match="expected a torchvision FasterRCNN, got Linear"):
        from_torchvision(nn.Linear(2, 2))  # pyright: ignore
    masks = MaskRCNN(random_models.OwnBackbone(), 3, rpn_anchor_generator=AnchorGenerator(((16,),), ((1.0,),)))
    with pytest.raises(ValueError, match="MaskRCNN: masks and keypoints have no counterpart"):
        from_torchvision(masks)


def _four_channels(model: FasterRCNN) -> None:
    conv = nn.Conv2d(4, 64, 7, 2, 3, bias=False)
    model.backbone.body.conv1 = conv
    model.transform.image_mean, model.transform.image_std = [0.4] * 4, [0.2] * 4


def _leaky(model: FasterRCNN) -> None:
    for block in model.backbone.body.layer3:
        block.relu = nn.LeakyReLU(0.3)


def _other_stride(model: FasterRCNN) -> None:
    block = model.backbone.body.layer3[0]
    block.conv1.stride, block.conv2.stride = (1, 1), (2, 2)


def _early_node(model: FasterRCNN) -> None:
    """A level that is no stage of the network."""
    body, nodes = models.resnet18(weights=None), {"maxpool": "0", "layer2": "1"}
    model.backbone = BackboneWithFPN(body, nodes, [64, 128], random_models.WIDTH, LastLevelMaxPool())
    model.rpn.anchor_generator = random_models.levels(3)


KEPT = {
    "four channels": _four_channels,
    "another activation": _leaky,
    "another stride in a block": _other_stride,
    "another pyramid": lambda model: setattr(model.backbone.fpn, "__class__", OtherPyramid),
    "another backbone": lambda model: setattr(model.backbone, "__class__", OtherBackbone),
}
MAPPED = {
    "an early node": _early_node,
    "lists of ratios": lambda model: setattr(
        model.rpn.anchor_generator, "aspect_ratios", [list(random_models.RATIOS)] * 5
    ),
    "a tensor of means": lambda model: setattr(model.transform, "image_mean", torch.tensor([0.1, 0.2, 0.3])),
    "max_size below min_size": lambda model: setattr(model.transform, "min_size", (200,)),
}


@pytest.mark.parametrize("change", [*KEPT, *MAPPED])
def test_what_has_the_same_tensors_but_computes_something_else(change: str) -> None:
    torch.manual_seed(1)
    model = random_models.shaped_v1()
    (KEPT | MAPPED)[change](model)
    if change != "four channels":
        spread(model)
    detector, images = from_torchvision(model.eval()), batch("two")
    assert isinstance(detector.backbone, WrappedBackbone) == (change in KEPT)
    if change == "four channels":
        images = [torch.cat((image, image[:1])) for image in images]
    for wanted, given in zip(theirs(model, images)["found"], ours(detector, images)["found"], strict=True):
        assert len(wanted["scores"]) >= 3
        assert_same_detections(given, wanted)


def test_a_model_of_another_type_becomes_float32() -> None:
    detector = from_torchvision(random_models.own_backbone().double())
    assert {parameter.dtype for parameter in detector.parameters()} == {torch.float32}


def test_norms_keep_their_momentum() -> None:
    model = random_models.own_pyramid()
    for module in model.backbone.body.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 0.01
    norms = [module for module in from_torchvision(model).modules() if isinstance(module, nn.BatchNorm2d)]
    assert norms
    assert {norm.momentum for norm in norms} == {0.01}


TOP_FULL = {"rpn_post_nms_top_n_test": 200}  # else the convolutions of the head take minutes


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        "fasterrcnn_resnet50_fpn",
        "fasterrcnn_resnet50_fpn_v2",
        "fasterrcnn_mobilenet_v3_large_fpn",
        "fasterrcnn_mobilenet_v3_large_320_fpn",
    ],
)
def test_the_four_shapes_in_full(name: str) -> None:
    torch.manual_seed(0)
    model = getattr(detection, name)(weights=None, weights_backbone=None, min_size=256, max_size=320, **TOP_FULL)
    spread(model, (240, 320))
    detector = from_torchvision(model)
    assert isinstance(detector.backbone, FPN)
    images = [scene(240, 320, 5), scene(300, 200, 6)]
    a, b = theirs(model, images), ours(detector, images)
    assert torch.equal(a["batch"], b["batch"])
    assert torch.equal(a["anchors"], b["anchors"])
    for given, wanted in zip((*b["features"], *b["rpn"]), (*a["features"], *a["rpn"]), strict=True):
        assert_near(given, wanted, 1e-4)
    assert_same_head(detector, a, 1e-4)
    for wanted, given in zip(a["found"], b["found"], strict=True):
        assert len(wanted["scores"]) > 20
        # among hundreds of boxes with random scores one may lie so near a threshold that rounding decides
        assert_same_detections(given, wanted, pixels=0.05, strays=2)


@pytest.mark.slow
def test_the_losses_of_fine_tuning_are_torchvisions() -> None:
    """Over 20 steps with the same batches, where all anchors and boxes are trained on, so that nothing is drawn."""
    torch.manual_seed(2)
    model = spread(random_models.shaped_v1())
    model.rpn.fg_bg_sampler.batch_size_per_image, model.rpn.fg_bg_sampler.positive_fraction = 10_000, 1.0
    model.rpn.nms_thresh, model.rpn._pre_nms_top_n["training"] = 1.0, 40  # rounding decides about none of them
    model.roi_heads.fg_bg_sampler.batch_size_per_image, model.roi_heads.fg_bg_sampler.positive_fraction = 300, 1.0
    for parameter in model.backbone.body.conv1.parameters():
        parameter.requires_grad_(False)
    detector = from_torchvision(model)
    model, detector = model.double(), detector.double()  # in 32 bits a box crosses a threshold of matching now and then
    ours, theirs = (torch.optim.SGD([p for p in m.parameters() if p.requires_grad], 1e-4) for m in (detector, model))
    given, wanted = [], []
    for step in range(20):
        images = [scene(96, 128, 50 + step).double(), scene(128, 96, 80 + step).double()]
        corners = torch.rand(2, 3, 4, generator=torch.Generator().manual_seed(step)) * 40
        boxes = torch.cat((corners[..., :2], corners[..., :2] + 12 + corners[..., 2:]), dim=-1)
        targets: Any = [{"boxes": part.double(), "labels": torch.tensor([1, 2, 1 + step % 5])} for part in boxes]
        for optimizer, losses, curve in (
            (ours, detector.train().losses(images, targets), given),
            (theirs, model.train()(images, targets), wanted),
        ):
            total = sum(value for name, value in losses.items() if name.startswith("loss_"))
            optimizer.zero_grad()
            total.backward()
            optimizer.step()
            curve.append(float(total.detach()))
    assert len(set(wanted)) == 20
    assert given == pytest.approx(wanted, rel=1e-3)

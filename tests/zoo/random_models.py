"""torchvision's detectors with few channels and random weights that are spread as those of trained ones."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision import models
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead, FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.rpn import RPNHead
from torchvision.ops import FrozenBatchNorm2d, MultiScaleRoIAlign
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool, LastLevelP6P7

from detpipe.backbones.regime import convert_norm

CLASSES = 6  # with the background
WIDTH = 16
RATIOS = (0.5, 1.0, 2.0)
SIZES = {"min_size": 96, "max_size": 160}
TOP = {"rpn_pre_nms_top_n_test": 60, "rpn_post_nms_top_n_test": 40}


def scene(height: int, width: int, seed: int) -> Tensor:
    """An image of smooth colors and rectangles, ``[3, H, W]`` in 0..1, of 8 bits."""
    generator = torch.Generator().manual_seed(seed)

    def whole(low: int, high: int) -> int:
        return int(torch.randint(low, max(low + 1, high), (1,), generator=generator))

    image = F.interpolate(torch.rand(1, 3, 7, 9, generator=generator), (height, width), mode="bicubic")[0]
    for _ in range(10):
        h, w = whole(height // 10, height // 2), whole(width // 10, width // 2)
        y, x = whole(0, height - h), whole(0, width - w)
        image[:, y : y + h, x : x + w] = torch.rand(3, 1, 1, generator=generator)
    return (image.clamp(0, 1) * 255).round() / 255


def resnet(norm: Callable[..., nn.Module] = nn.BatchNorm2d, layers: tuple[int, ...] = (1, 2, 3, 4)) -> BackboneWithFPN:
    body = models.resnet18(weights=None)
    widths = [64 * 2 ** (layer - 1) for layer in layers]
    names = {f"layer{layer}": str(index) for index, layer in enumerate(layers)}
    pyramid_norm = nn.BatchNorm2d if norm is nn.BatchNorm2d else None
    backbone = BackboneWithFPN(body, names, widths, WIDTH, LastLevelMaxPool(), pyramid_norm)
    if norm is FrozenBatchNorm2d:
        convert_norm(backbone.body, "frozen", 0.0)
    return backbone


def levels(count: int, *sizes: tuple[int, ...]) -> AnchorGenerator:
    return AnchorGenerator(sizes or tuple((8 * 2**k,) for k in range(count)), (RATIOS,) * (len(sizes) or count))


def shaped_v1() -> FasterRCNN:
    """As fasterrcnn_resnet50_fpn: frozen norms without eps."""
    return FasterRCNN(
        resnet(FrozenBatchNorm2d), rpn_anchor_generator=levels(5), **TOP, **SIZES,
        box_head=TwoMLPHead(WIDTH * 49, 32), box_predictor=FastRCNNPredictor(32, CLASSES),
    )  # fmt: skip


def shaped_v2() -> FasterRCNN:
    """As fasterrcnn_resnet50_fpn_v2: norms in the pyramid and the head, two convolutions of the RPN."""
    head = FastRCNNConvFCHead((WIDTH, 7, 7), [WIDTH] * 4, [32], norm_layer=nn.BatchNorm2d)
    return FasterRCNN(
        resnet(), rpn_anchor_generator=levels(5), rpn_head=RPNHead(WIDTH, 3, conv_depth=2), **TOP, **SIZES,
        box_head=head, box_predictor=FastRCNNPredictor(32, CLASSES),
    )  # fmt: skip


def shaped_mobilenet(classes: int = CLASSES) -> FasterRCNN:
    """As fasterrcnn_mobilenet_v3_large_fpn: two levels of stride 32, a threshold of proposals."""
    body = models.mobilenet_v3_small(weights=None, norm_layer=FrozenBatchNorm2d).features
    widths = [body[9].out_channels, body[12].out_channels]
    backbone = BackboneWithFPN(body, {"9": "0", "12": "1"}, widths, WIDTH, LastLevelMaxPool())
    anchors = levels(3, *((16, 32, 64),) * 3)
    return FasterRCNN(
        backbone, rpn_anchor_generator=anchors, rpn_score_thresh=0.2, **TOP, **SIZES,
        box_head=TwoMLPHead(WIDTH * 49, 32), box_predictor=FastRCNNPredictor(32, classes),
    )  # fmt: skip


class OwnBackbone(nn.Module):
    """One map of a network that torchvision does not have."""

    def __init__(self) -> None:
        super().__init__()
        self.out_channels = WIDTH
        self.body = nn.Sequential(
            nn.Conv2d(3, 8, 5, 4, 2), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, WIDTH, 3, 2, 1), nn.ReLU()
        )

    def forward(self, images: Tensor) -> Tensor:
        return self.body(images)


def own_backbone() -> FasterRCNN:
    """A backbone, sizes, anchors, means and thresholds of the user's own."""
    return FasterRCNN(
        OwnBackbone(), rpn_anchor_generator=AnchorGenerator(((16, 40),), ((0.4, 1.5),)), **TOP, min_size=72, max_size=100,
        box_roi_pool=MultiScaleRoIAlign(["0"], (5, 4), 0), box_head=TwoMLPHead(WIDTH * 20, 24),
        box_predictor=FastRCNNPredictor(24, CLASSES), image_mean=[0.5, 0.4, 0.3], image_std=[0.2, 0.3, 0.4],
        box_nms_thresh=0.4, box_detections_per_img=20, rpn_nms_thresh=0.6, size_divisible=16,
    )  # fmt: skip


def own_pyramid() -> FasterRCNN:
    """A pyramid with levels by convolutions, pooled from two levels, a head of convolutions without norms."""
    body = models.resnet18(weights=None)
    names = {"layer2": "0", "layer3": "1"}
    backbone = BackboneWithFPN(body, names, [128, 256], WIDTH, LastLevelP6P7(WIDTH, WIDTH))
    head = FastRCNNConvFCHead((WIDTH, 7, 7), [WIDTH], [32, 24])
    return FasterRCNN(
        backbone, rpn_anchor_generator=levels(4), box_head=head, box_predictor=FastRCNNPredictor(24, CLASSES),
        box_roi_pool=MultiScaleRoIAlign(["0", "1"], 7, 2, canonical_scale=64, canonical_level=3), **TOP, **SIZES,
    )  # fmt: skip


def dilated() -> FasterRCNN:
    """A network whose strides are not those of its name."""
    body = models.resnet50(weights=None, replace_stride_with_dilation=[False, False, True])
    names = {"layer3": "0", "layer4": "1"}
    backbone = BackboneWithFPN(body, names, [1024, 2048], WIDTH)
    return FasterRCNN(
        backbone, rpn_anchor_generator=levels(3), box_head=TwoMLPHead(WIDTH * 49, 32),
        box_predictor=FastRCNNPredictor(32, CLASSES), **TOP, **SIZES,
    )  # fmt: skip


def one_level() -> FasterRCNN:
    """A pyramid of a single level of its network."""
    backbone = BackboneWithFPN(models.resnet18(weights=None), {"layer3": "0"}, [256], WIDTH)
    return FasterRCNN(
        backbone, rpn_anchor_generator=levels(2), box_head=TwoMLPHead(WIDTH * 49, 32),
        box_predictor=FastRCNNPredictor(32, CLASSES), **TOP, **SIZES,
    )  # fmt: skip


MODELS = (shaped_v1, shaped_v2, shaped_mobilenet, own_backbone, own_pyramid, dilated, one_level)


@torch.no_grad()
def spread(model: FasterRCNN, size: tuple[int, int] = (96, 128)) -> FasterRCNN:
    """Give weights and statistics such values that logits and boxes differ from place to place and from class to class."""
    for module in model.modules():
        if hasattr(module, "running_var"):
            module.weight.copy_(torch.empty_like(module.weight).uniform_(0.6, 1.4))
            module.bias.copy_(torch.randn_like(module.bias) * 0.2)
    batch, _ = model.transform.eval()([scene(*size, 100 + index) for index in range(2)])
    images, sizes = batch.tensors, batch.image_sizes
    calibrate(model, images, sizes)
    model.eval()
    features = _maps(model, images)
    head = model.rpn.head
    logits, deltas = (torch.cat([x.flatten() for x in outputs]) for outputs in head(list(features.values())))
    head.cls_logits.weight *= 2 / logits.std()
    head.bbox_pred.weight *= 0.35 / deltas.std()
    logits = torch.cat([x.flatten() for x in head(list(features.values()))[0]])
    head.cls_logits.bias -= logits.mean()
    boxes, _ = model.rpn(ImageList(images, sizes), features)
    hidden = model.roi_heads.box_head(model.roi_heads.box_roi_pool(features, boxes, sizes))
    predictor = model.roi_heads.box_predictor
    logits, deltas = predictor(hidden)
    predictor.cls_score.weight *= 2 / (logits - logits.mean(0)).std()
    predictor.bbox_pred.weight *= 0.4 / (deltas - deltas.mean(0)).std()
    logits, deltas = predictor(hidden)
    predictor.cls_score.bias -= logits.mean(0)
    predictor.bbox_pred.bias -= deltas.mean(0)
    return model


def _maps(model: FasterRCNN, images: Tensor) -> dict[str, Tensor]:
    features = model.backbone(images)
    return OrderedDict([("0", features)]) if isinstance(features, Tensor) else features


def calibrate(model: FasterRCNN, images: Tensor, sizes: list[tuple[int, int]]) -> None:
    """Set statistics to those of images, and a little beside them."""

    def measure(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        values = inputs[0].transpose(0, 1).flatten(1)
        module.running_mean.copy_(values.mean(1) + 0.2 * values.std(1) * torch.randn(len(values)))
        module.running_var.copy_((values.var(1) + 1e-3) * torch.empty(len(values)).uniform_(0.7, 1.4))

    norms = [module for module in model.modules() if hasattr(module, "running_var")]
    handles = [module.register_forward_pre_hook(measure) for module in norms]
    model.eval()
    features = _maps(model, images)
    side = min(sizes[0])
    boxes = [torch.rand(50, 4) * 0.4 * side + torch.tensor([0.0, 0.0, 0.5 * side, 0.5 * side])] * 2
    model.roi_heads.box_head(model.roi_heads.box_roi_pool(features, boxes, sizes))
    for handle in handles:
        handle.remove()
    model.roi_heads.box_roi_pool.scales = None  # it keeps those of its first batch

"""torchvision's Faster R-CNN as a detector of detpipe's stages: the settings are read off the model, the tensors are renamed.

Ren et al., "Faster R-CNN", 2015, arXiv 1506.01497, as ``torchvision.models.detection.faster_rcnn`` has it. A backbone that is a
``BackboneWithFPN`` on one of torchvision's networks becomes `SEResNet` or `Extractor` in `FPN`; any other is kept as it is, in
:class:`WrappedBackbone`.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torchvision import models
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead, FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.rpn import RPNHead
from torchvision.ops import FrozenBatchNorm2d, MultiScaleRoIAlign
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool, LastLevelP6P7

from detpipe.backbones.fpn import GROUPS, level_names
from detpipe.backbones.residual import BLOCKS
from detpipe.backbones.residual_names import to_own_names
from detpipe.boxes import DELTA_WEIGHTS
from detpipe.detector import TwoStageDetector
from detpipe.stages import Backbone
from detpipe.training.checkpoint import Description
from detpipe.training.models import rebuild
from detpipe.types import Features, PixelFormat

ALL = 1_000_000  # candidates of an image: torchvision suppresses among all of them
PROBE = 256  # side in pixels of the image that strides are measured on
_NETWORKS = (
    *(f"resnet{depth}" for depth in BLOCKS if depth != 26),
    *("resnext50_32x4d", "resnext101_32x8d", "resnext101_64x4d", "wide_resnet50_2", "wide_resnet101_2"),
    *("mobilenet_v3_large", "mobilenet_v3_small", "mobilenet_v2"),
)
_NAMES = (
    (r"^backbone\.fpn\.", "backbone.pyramid."),
    (r"^rpn\.head\.conv\.(\d+)\.0\.", r"proposals.head.convs.\1."),
    (r"^rpn\.head\.cls_logits\.", "proposals.head.objectness."),
    (r"^rpn\.head\.bbox_pred\.", "proposals.head.regressor."),
    (r"^roi_heads\.box_head\.fc6\.", "head.shared.1."),
    (r"^roi_heads\.box_head\.fc7\.", "head.shared.3."),
    (r"^roi_heads\.box_predictor\.cls_score\.", "head.classifier."),
    (r"^roi_heads\.box_predictor\.bbox_pred\.", "head.regressor."),
)


class WrappedBackbone(Backbone):
    """A backbone of torchvision's kind, as it is: a module from images to a map or to maps by name.

    Args:
        network: with an attribute ``out_channels``.
        pixel_format: what it expects.
        roi_levels: names of the maps that RoIs are pooled from; a single map is called "0".

    Raises:
        ValueError: none of these maps is there.
    """

    def __init__(self, network: nn.Module, pixel_format: PixelFormat, roi_levels: Sequence[str]) -> None:
        super().__init__()
        self.network, self.pixel_format = network, pixel_format
        self.out_channels = int(network.out_channels)  # pyright: ignore
        self.strides = {name: _stride(level) for name, level in _probe(self).items()}
        first = {stride: name for name, stride in reversed(self.strides.items()) if name in roi_levels}
        self._roi_strides = {name: stride for name, stride in self.strides.items() if first.get(stride) == name}
        if not self._roi_strides:
            raise ValueError(
                f"box_roi_pool looks at the maps {list(roi_levels)}, but the backbone has {list(self.strides)}"
            )

    @property
    def roi_strides(self) -> dict[str, int]:
        """Image pixels a cell of the levels to pool from."""
        return dict(self._roi_strides)

    def forward(self, images: Tensor) -> Features:
        """Compute the maps: ``[N, C, H, W]`` -> level name -> ``[N, C, H_l, W_l]``."""
        features = self.network(images)
        return {"0": features} if isinstance(features, Tensor) else dict(features)


def from_torchvision(model: FasterRCNN) -> TwoStageDetector:
    """Build the same detector of detpipe's stages, with the same weights.

    Args:
        model: a ``FasterRCNN`` of any of torchvision's four constructors, or with any backbone, and a pyramid, anchors and heads
            of any sizes in torchvision's classes. It is not changed, and shares no tensor with the result.

    Returns:
        The detector in evaluation mode; what needed no gradient needs none. Its labels are those of the model.

    Raises:
        TypeError: it is no ``FasterRCNN``.
        ValueError: a part has no counterpart here; it is named.

    Example:
        >>> from torchvision.models.detection import fasterrcnn_mobilenet_v3_large_320_fpn
        >>> model = fasterrcnn_mobilenet_v3_large_320_fpn(weights=None, weights_backbone=None, num_classes=3)
        >>> detector = from_torchvision(model)
        >>> detector.min_size, detector.head.num_classes
        (320, 2)
    """
    settings = settings_of(model)
    state = state_of(model, settings)
    names = tuple(str(label + 1) for label in range(_count(model)))
    description = Description(settings, names, tuple(range(1, len(names) + 1)))
    detector: TwoStageDetector = rebuild("torchvision's FasterRCNN", {"state_dict": state}, description)
    own = dict(detector.named_parameters())
    for name, value in _renamed(dict(model.named_parameters()), settings).items():
        if name in own:
            own[name].requires_grad_(value.requires_grad)
    return detector


def settings_of(model: FasterRCNN) -> dict[str, Any]:
    """Read the settings of a model: those under ``model`` of a configuration.

    Args:
        model: as of :func:`from_torchvision`.

    Returns:
        Class paths and arguments; a backbone that has no counterpart is an object, a copy.

    Raises:
        TypeError: it is no ``FasterRCNN``.
        ValueError: a part has no counterpart here; it is named.
    """
    if not isinstance(model, FasterRCNN):
        raise TypeError(f"expected a torchvision FasterRCNN, got {type(model).__name__}")
    parts: Any = model  # of classes that modules do not declare
    transform, roi_heads = parts.transform, parts.roi_heads
    if roi_heads.has_mask() or roi_heads.has_keypoint():
        raise ValueError(f"{type(model).__name__}: masks and keypoints have no counterpart; give a FasterRCNN of boxes")
    if transform.fixed_size is not None or transform._skip_resize:
        raise ValueError("transform: fixed_size and _skip_resize have no counterpart; leave them out")
    pixels = PixelFormat(tuple(transform.image_mean), tuple(transform.image_std))
    return {
        "backbone": _backbone(model, pixels),
        "proposals": {"class_path": "RPN", "init_args": _proposals(model.rpn)},
        "head": {"class_path": "FastRCNNHead", "init_args": _head(roi_heads)},
        "min_size": int(transform.min_size[-1]),
        "max_size": int(transform.max_size),
        "divisor": int(transform.size_divisible),
        "resize": "torchvision",
    }


def state_of(model: FasterRCNN, settings: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors of a model by the names of a detector with these settings.

    Args:
        model: as of :func:`from_torchvision`.
        settings: what :func:`settings_of` says of it.

    Returns:
        Name -> a copy of the tensor; the four rows of the box regressor for the background are left out.
    """
    state = {name: value.detach().clone() for name, value in _renamed(model.state_dict(), settings).items()}
    for name in ("head.regressor.weight", "head.regressor.bias"):
        state[name] = state[name][4:].clone()
    return state


def _renamed(state: Mapping[str, Tensor], settings: Mapping[str, Any]) -> dict[str, Tensor]:
    renamed: dict[str, Tensor] = {}
    body = {
        name.removeprefix("backbone.body."): value for name, value in state.items() if name.startswith("backbone.body.")
    }
    backbone = settings["backbone"]
    if isinstance(backbone, Backbone):
        inside = {name for name in state if name.startswith("backbone.")}
        renamed |= {name.replace("backbone.", "backbone.network.", 1): state[name] for name in inside}
    elif backbone["init_args"]["backbone"]["class_path"] == "SEResNet":
        own = to_own_names(body)
        renamed |= {f"backbone.backbone.{name}": value for name, value in (own.tensors if own else {}).items()}
    else:
        network = backbone["init_args"]["backbone"]["init_args"]["network"]
        renamed |= {f"backbone.backbone.body.{_inside(network)}{name}": value for name, value in body.items()}
    for name, value in state.items():
        convolution = re.match(r"^roi_heads\.box_head\.(\d+)\.(.*)", name)
        if convolution is not None:
            renamed[_in_conv_head(settings["head"]["init_args"].get("conv"), int(convolution[1]), convolution[2])] = (
                value
            )
            continue
        for pattern, replacement in _NAMES:
            new, found = re.subn(pattern, replacement, name)
            if found and not (new.startswith("backbone.") and isinstance(backbone, Backbone)):
                renamed[new] = value
    return renamed


def _in_conv_head(conv: Mapping[str, Any] | None, index: int, rest: str) -> str:
    """``roi_heads.box_head.INDEX.REST`` by our name: blocks of convolution, norm and rectifier are one list of layers here."""
    count, each = (0, 0) if conv is None else (len(conv["widths"]), 2 if conv["norm"] is None else 3)
    if index < count:
        inner, _, tensor = rest.partition(".")
        return f"head.shared.{each * index + int(inner)}.{tensor}"
    return f"head.shared.{each * count + index - count}.{rest}"


def _backbone(model: Any, pixels: PixelFormat) -> Any:
    """The settings of the backbone, or the backbone itself."""
    backbone, levels = model.backbone, list(model.roi_heads.box_roi_pool.featmap_names)
    found = _pyramid(backbone, pixels, levels) if isinstance(backbone, BackboneWithFPN) else None
    if found is not None:
        return found
    network = copy.deepcopy(backbone).eval()
    return WrappedBackbone(network, pixels, levels).eval()


def _pyramid(backbone: Any, pixels: PixelFormat, roi_levels: Sequence[str]) -> dict[str, Any] | None:
    """The settings of `FPN` on a network that is known; None for what it cannot say."""
    body, fpn, norm = backbone.body, backbone.fpn, _norm(backbone.fpn)
    regime = _regime(body) if isinstance(body, IntermediateLayerGetter) else None
    extra = _EXTRA.get(type(fpn.extra_blocks), "") if _is_plain(fpn.extra_blocks) else ""
    if regime is None or norm == "" or extra == "":
        return None
    strides = [_stride(level) for level in _probe(body).values()]
    network = _network(body, strides)
    pooled = {name for name in _probe(backbone) if name in roi_levels}
    if network is None or len(strides) < 2 or {*body.return_layers.values()} != pooled or not _are_octaves(strides):
        return None
    nodes = [f"{_inside(network)}{node}" for node in body.return_layers]
    own = re.fullmatch(r"resnet\d+", network) is not None
    init: dict[str, Any] = {"out_channels": "own", "regime": regime}
    if pixels != PixelFormat():
        init["pixel_format"] = {"mean": list(pixels.mean), "std": list(pixels.std)}
    if own:
        init |= {"depth": int(network.removeprefix("resnet")), "attention": None}
        init["levels"] = [f"c{int(node[-1]) + 1}" for node in nodes]
    else:
        names = level_names(strides, "c")
        init |= {"network": network}
        init["levels"] = {
            name: {"node": node, "stride": stride} for name, node, stride in zip(names, nodes, strides, strict=True)
        }
    inner = {"class_path": "SEResNet" if own else "Extractor", "init_args": init}
    outer = {"backbone": inner, "out_channels": backbone.out_channels, "extra_levels": extra, "norm": norm}
    if len(set(strides)) < len(strides):
        outer["equal_strides"] = True
    return {"class_path": "FPN", "init_args": outer}


_EXTRA = {type(None): None, LastLevelMaxPool: "max_pool", LastLevelP6P7: "convolutions"}


def _is_plain(extra: nn.Module | None) -> bool:
    return not isinstance(extra, LastLevelP6P7) or bool(extra.use_P5)


def _are_octaves(strides: Sequence[int]) -> bool:
    """Whether each is twice the one before, but for the last, which may be repeated: then levels of boxes are chosen alike."""
    rising = sorted(set(strides))
    return list(strides[: len(rising)]) == rising and all(b == 2 * a for a, b in pairwise(rising))


def _inside(network: str) -> str:
    """The part of a network that a body is of."""
    return "features." if network.startswith("mobilenet") else ""


def _norm(fpn: nn.Module) -> str | None:
    """Which norm a pyramid has; an empty text for one that `FPN` does not."""
    kinds = {type(module) for module in fpn.modules() if hasattr(module, "eps")}
    groups = {module.num_groups for module in fpn.modules() if isinstance(module, nn.GroupNorm)}
    if any(getattr(module, "eps", 1e-5) != 1e-5 for module in fpn.modules()) or groups - {GROUPS}:
        return ""
    names = {(): None, (nn.BatchNorm2d,): "batch", (nn.GroupNorm,): "group"}
    return names.get(tuple(kinds), "")


def _regime(body: nn.Module) -> dict[str, Any] | None:
    """Which norm a network has; None for one that is not the same everywhere."""
    norms = {(type(module), module.eps) for module in body.modules() if hasattr(module, "running_var")}
    if len(norms) != 1:
        return None
    [(kind, eps)] = norms
    name = {nn.BatchNorm2d: "batch", FrozenBatchNorm2d: "frozen"}.get(kind)
    return None if name is None else {"norm": name, "eps": eps}


def _network(body: IntermediateLayerGetter, strides: Sequence[int]) -> str | None:
    """The name of the network that a body is of, by the names and shapes of its tensors, and its strides."""
    shapes = {name: value.shape for name, value in body.state_dict().items() if "num_batches" not in name}
    for name in _NETWORKS:
        if name.startswith("mobilenet") == hasattr(body, "layer1"):
            continue
        with torch.device("meta"):
            network = models.get_model(name, weights=None)
        inner = network.get_submodule(_inside(name).rstrip("."))
        state = inner.state_dict()
        if all(key in state and state[key].shape == shape for key, shape in shapes.items()):
            maps = _probe(IntermediateLayerGetter(inner, dict(body.return_layers)))
            if [_stride(level) for level in maps.values()] == list(strides):  # those of a dilated network differ
                return name
    return None


@torch.no_grad()
def _probe(module: nn.Module) -> dict[str, Tensor]:
    """The maps of a gray image, in the evaluation mode of the module."""
    modes = {part: part.training for part in module.modules()}
    parameter = next(module.parameters())
    try:
        maps = module.eval()(torch.zeros(1, 3, PROBE, PROBE, dtype=parameter.dtype, device=parameter.device))
    finally:
        for part, mode in modes.items():
            part.training = mode
    return {"0": maps} if isinstance(maps, Tensor) else maps


def _stride(level: Tensor) -> int:
    return 2 ** round(torch.tensor(PROBE / level.shape[-1]).log2().item())


def _proposals(rpn: Any) -> dict[str, Any]:
    anchors, head, sampler, matcher = (
        rpn.anchor_generator, rpn.head, rpn.fg_bg_sampler, rpn.proposal_matcher
    )  # fmt: skip
    if type(anchors) is not AnchorGenerator or type(head) is not RPNHead:
        raise ValueError(
            f"rpn: {type(anchors).__name__} and {type(head).__name__} have no counterpart; expected torchvision's "
            "AnchorGenerator and RPNHead"
        )
    if len(set(anchors.aspect_ratios)) > 1:
        raise ValueError(f"rpn.anchor_generator: every level needs the same aspect_ratios, got {anchors.aspect_ratios}")
    ratios = [float(ratio) for ratio in anchors.aspect_ratios[0]]
    sizes = [[float(size) for size in level] for level in anchors.sizes]
    tops = [[top[phase] for phase in ("training", "testing")] for top in (rpn._pre_nms_top_n, rpn._post_nms_top_n)]
    return {
        "anchors": {"sizes": sizes, "ratios": ratios, "offset": 0.0, "rounded": True, "measured": True},
        "objective": {
            "anchors_per_image": sampler.batch_size_per_image,
            "positive_fraction": sampler.positive_fraction,
            "positive_iou": matcher.high_threshold,
            "negative_iou": matcher.low_threshold,
            "allow_low_quality": matcher.allow_low_quality_matches,
        },
        "selection": {
            "pre_nms_top_n": tops[0],
            "post_nms_top_n": tops[1],
            "nms_iou": rpn.nms_thresh,
            "min_size": rpn.min_size,
            "score_threshold": rpn.score_thresh,
            "rank_by": "probability",
        },
        "conv_dims": [block[0].out_channels for block in rpn.head.conv],
    }


def _head(heads: Any) -> dict[str, Any]:
    pool, sampler, matcher = heads.box_roi_pool, heads.fg_bg_sampler, heads.proposal_matcher
    for name, part, kind in (
        ("box_roi_pool", pool, MultiScaleRoIAlign),
        ("box_predictor", heads.box_predictor, FastRCNNPredictor),
    ):
        if type(part) is not kind:
            raise ValueError(f"roi_heads.{name}: {type(part).__name__} has no counterpart; expected {kind.__name__}")
    if tuple(heads.box_coder.weights) != DELTA_WEIGHTS:
        raise ValueError(f"roi_heads.box_coder: the weights are {DELTA_WEIGHTS} here, got {heads.box_coder.weights}")
    levels = {"canonical_size": float(pool.canonical_scale), "canonical_stride": 2**pool.canonical_level}
    size = [int(side) for side in pool.output_size]
    pooler = {"output_size": size, "sampling_ratio": max(0, pool.sampling_ratio), "aligned": False, "levels": levels}
    return {
        "pooler": {"class_path": "RoIAlign", "init_args": pooler},
        **_layers(heads.box_head),
        "sampler": {
            "rois_per_image": sampler.batch_size_per_image,
            "positive_fraction": sampler.positive_fraction,
            "positive_iou": matcher.high_threshold,
            "negative_iou": [0.0, matcher.low_threshold],
        },
        "objective": {"boxes": {"beta": 1 / 9}},
        "postprocess": {
            "score_threshold": heads.score_thresh,
            "nms_iou": heads.nms_thresh,
            "detections_per_image": heads.detections_per_img,
            "candidates_per_image": ALL,
            "min_size": 0.01,
        },
    }


def _layers(box_head: Any) -> dict[str, Any]:
    """The convolutions and the widths of fully connected layers."""
    if isinstance(box_head, TwoMLPHead):
        return {"fc": [box_head.fc6.out_features, box_head.fc7.out_features]}
    convolutions = [module for module in box_head.modules() if isinstance(module, nn.Conv2d)]
    norms = {type(module) for module in box_head.modules() if hasattr(module, "running_var")}
    fc = [module.out_features for module in box_head.children() if isinstance(module, nn.Linear)]
    if type(box_head) is not FastRCNNConvFCHead or not fc or norms - {nn.BatchNorm2d}:
        raise ValueError(
            f"roi_heads.box_head: {type(box_head).__name__} has no counterpart; expected TwoMLPHead or FastRCNNConvFCHead"
        )
    if not convolutions:
        return {"fc": fc}
    return {"fc": fc, "conv": {"widths": [c.out_channels for c in convolutions], "norm": "batch" if norms else None}}


def _count(model: Any) -> int:
    return model.roi_heads.box_predictor.cls_score.out_features - 1

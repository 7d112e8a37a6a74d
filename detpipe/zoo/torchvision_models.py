"""torchvision's Faster R-CNN as a detector of detpipe's stages: the settings are read off the model, the tensors are renamed.

Ren et al., "Faster R-CNN", 2015, arXiv 1506.01497, as ``torchvision.models.detection.faster_rcnn`` has it. A backbone that is a
``BackboneWithFPN`` on one of torchvision's networks becomes `SEResNet` or `Extractor` in `FPN`; any other is kept as it is, in
:class:`WrappedBackbone`.
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn
from torchvision import models
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead, FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.ops import FeaturePyramidNetwork, FrozenBatchNorm2d, MultiScaleRoIAlign
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool, LastLevelP6P7

from detpipe.backbones.fpn import GROUPS, level_names
from detpipe.backbones.residual import BLOCKS
from detpipe.backbones.residual_names import to_own_names
from detpipe.boxes import DELTA_WEIGHTS
from detpipe.detector import TwoStageDetector
from detpipe.proposals.rpn_selection import WEIGHTS
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
_REGIMES = {nn.BatchNorm2d: "batch", FrozenBatchNorm2d: "frozen"}  # whose norms may have any eps
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
_PARTS = {  # a subclass may compute something else
    "transform": (GeneralizedRCNNTransform,),
    "rpn": (RegionProposalNetwork,),
    "rpn.anchor_generator": (AnchorGenerator,),
    "rpn.head": (RPNHead,),
    "roi_heads": (RoIHeads,),
    "roi_heads.box_roi_pool": (MultiScaleRoIAlign,),
    "roi_heads.box_head": (TwoMLPHead, FastRCNNConvFCHead),
    "roi_heads.box_predictor": (FastRCNNPredictor,),
}


class WrappedBackbone(Backbone):
    """A backbone of torchvision's kind, as it is: a module from images to a map or to maps by name.

    Args:
        network: with an attribute ``out_channels``.
        pixel_format: what it expects.
        roi_levels: names of the maps that RoIs are pooled from; a single map is called "0".

    Raises:
        ValueError: none of these maps is there, a stride is no power of two, or those to pool from do not rise by octaves.
    """

    def __init__(self, network: nn.Module, pixel_format: PixelFormat, roi_levels: Sequence[str]) -> None:
        super().__init__()
        self.network, self.pixel_format = network, pixel_format
        self.out_channels = int(network.out_channels)  # pyright: ignore
        self.strides = _strides(self, pixel_format.channels)
        pooled = {name: stride for name, stride in self.strides.items() if name in roi_levels}
        if not pooled:
            raise ValueError(
                f"box_roi_pool looks at the maps {list(roi_levels)}, but the backbone has {list(self.strides)}"
            )
        if not _are_octaves(list(pooled.values())):
            raise ValueError(
                f"box_roi_pool: the strides of its maps, {pooled}, have no counterpart; expected each twice the one before"
            )
        first = {stride: name for name, stride in reversed(pooled.items())}
        self._roi_strides = {name: stride for name, stride in pooled.items() if first[stride] == name}

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
        The detector in evaluation mode, float32 on the CPU; what needed no gradient needs none. Its labels are those of the model.

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
    own, given = dict(detector.named_parameters()), dict[str, Any](model.named_parameters())
    given |= {f"{name}.momentum": part.momentum for name, part in model.named_modules() if hasattr(part, "momentum")}
    for name, value in _renamed(given, settings).items():
        if name in own:
            own[name].requires_grad_(value.requires_grad)
        elif name.endswith(".momentum"):
            vars(detector.get_submodule(name.removesuffix(".momentum")))["momentum"] = value
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
    for path, kinds in _PARTS.items():
        part = model.get_submodule(path)
        if type(part) not in kinds:
            wanted = " or ".join(kind.__name__ for kind in kinds)
            raise ValueError(f"{path}: {type(part).__name__} has no counterpart; expected {wanted}")
    for path, weights in (("rpn", WEIGHTS), ("roi_heads", DELTA_WEIGHTS)):
        found = tuple(getattr(parts, path).box_coder.weights)
        if found != weights:
            raise ValueError(f"{path}.box_coder: the weights are {weights} here, got {found}")
    if transform.fixed_size is not None or transform._skip_resize:
        raise ValueError("transform: fixed_size and _skip_resize have no counterpart; leave them out")
    pixels = PixelFormat(tuple(map(float, transform.image_mean)), tuple(map(float, transform.image_std)))
    return {
        "backbone": _backbone(model, pixels),
        "proposals": {"class_path": "RPN", "init_args": _proposals(model.rpn)},
        "head": {"class_path": "FastRCNNHead", "init_args": _head(roi_heads, model.backbone)},
        "min_size": int(min(transform.min_size[-1], transform.max_size)),  # the smaller one decides
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


def _renamed(state: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    renamed: dict[str, Any] = {}
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
    found = _pyramid(backbone, pixels, levels) if type(backbone) is BackboneWithFPN else None
    if found is not None:
        return found
    network = copy.deepcopy(backbone).cpu().float().eval()
    return WrappedBackbone(network, pixels, levels).eval()


def _pyramid(backbone: Any, pixels: PixelFormat, roi_levels: Sequence[str]) -> dict[str, Any] | None:
    """The settings of `FPN` on a network that is known; None for what it cannot say."""
    body, fpn = backbone.body, backbone.fpn
    if type(body) is not IntermediateLayerGetter or type(fpn) is not FeaturePyramidNetwork:
        return None
    network, levels = _network(body), _levels(fpn)
    if network is None or levels is None:
        return None
    strides = [*_strides(body, 3).values()]
    pooled = {name for name in _strides(backbone, 3) if name in roi_levels}
    if len(strides) < 2 or {*body.return_layers.values()} != pooled or not _are_octaves(strides):
        return None
    nodes = [f"{_inside(network)}{node}" for node in body.return_layers]
    own = bool(re.fullmatch(r"resnet\d+", network)) and all(node.startswith("layer") for node in nodes)
    norm: Any = next(part for part in body.modules() if type(part) in _REGIMES)
    init: dict[str, Any] = {"out_channels": "own", "regime": {"norm": _REGIMES[type(norm)], "eps": norm.eps}}
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
    outer = {"backbone": inner, "out_channels": backbone.out_channels, **levels}
    if len(set(strides)) < len(strides):
        outer["equal_strides"] = True
    return {"class_path": "FPN", "init_args": outer}


def _levels(fpn: FeaturePyramidNetwork) -> dict[str, Any] | None:
    """The settings of `FPN` that make a pyramid; None for one that it does not make."""
    convolutions: Any = [block.get_submodule("0") for block in fpn.inner_blocks]
    widths, out = [one.in_channels for one in convolutions], convolutions[0].out_channels
    norms = {None: None, "batch": nn.BatchNorm2d, "group": partial(nn.GroupNorm, GROUPS)}
    extra = {None: None, "max_pool": LastLevelMaxPool, "convolutions": partial(LastLevelP6P7, out, out)}
    for level, norm in product(extra, norms):
        if norm == "group" and out % GROUPS:
            continue
        with torch.device("meta"):
            block = extra[level]
            known = FeaturePyramidNetwork(widths, out, None if block is None else block(), norms[norm])
        if _are_alike(fpn, known):
            return {"extra_levels": level, "norm": norm}
    return None


def _are_alike(own: nn.Module, known: nn.Module) -> bool:
    """Whether modules have the same parts of the same classes with the same settings; their tensors may differ."""
    return repr(own) == repr(known) and [*map(type, own.modules())] == [*map(type, known.modules())]


def _are_octaves(strides: Sequence[int]) -> bool:
    """Whether each is twice the one before, but for the last, which may be repeated: then levels of boxes are chosen alike."""
    rising = [strides[0] * 2**octave for octave in range(len(set(strides)))]
    return [*strides] == rising + rising[-1:] * (len(strides) - len(rising))


def _inside(network: str) -> str:
    """The part of a network that a body is of."""
    return "features." if network.startswith("mobilenet") else ""


def _network(body: IntermediateLayerGetter) -> str | None:
    """The name of the network that a body is of; None where there is none, or its norms are not the same everywhere."""
    norm = next((part for part in body.modules() if type(part) in _REGIMES), None)
    options = {key: getattr(norm, key) for key in ("eps", "momentum") if hasattr(norm, key)}
    for name in _NETWORKS if norm is not None else ():
        with torch.device("meta"):
            network = models.get_model(name, weights=None, norm_layer=partial(type(norm), **options))
        inner = network.get_submodule(_inside(name).rstrip("."))
        has_nodes = body.return_layers.keys() <= dict(inner.named_children()).keys()
        if has_nodes and _are_alike(body, IntermediateLayerGetter(inner, dict(body.return_layers))):
            return name
    return None


@torch.no_grad()
def _strides(module: nn.Module, channels: int) -> dict[str, int]:
    """The strides of the maps of a module, measured on a gray image in its evaluation mode; a single map is called "0"."""
    modes = {part: part.training for part in module.modules()}
    parameter = next(module.parameters())
    try:
        maps = module.eval()(torch.zeros(1, channels, PROBE, PROBE, dtype=parameter.dtype, device=parameter.device))
    finally:
        for part, mode in modes.items():
            part.training = mode
    cells = {name: level.shape[-1] for name, level in ({"0": maps} if isinstance(maps, Tensor) else maps).items()}
    strides = {name: 2 ** round(math.log2(PROBE / count)) for name, count in cells.items()}
    for name, count in cells.items():
        if abs(PROBE / strides[name] - count) >= 2:
            raise ValueError(
                f"backbone: the map {name!r} has {count} cells of {PROBE} pixels; expected a stride that is a power of two"
            )
    return strides


def _proposals(rpn: Any) -> dict[str, Any]:
    anchors, sampler, matcher = rpn.anchor_generator, rpn.fg_bg_sampler, rpn.proposal_matcher
    if len(set(map(tuple, anchors.aspect_ratios))) > 1:
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


def _head(heads: Any, backbone: Any) -> dict[str, Any]:
    pool, sampler, matcher = heads.box_roi_pool, heads.fg_bg_sampler, heads.proposal_matcher
    levels = {"canonical_size": float(pool.canonical_scale), "canonical_stride": 2**pool.canonical_level}
    size = [int(side) for side in pool.output_size]
    pooler = {"output_size": size, "sampling_ratio": max(0, pool.sampling_ratio), "aligned": False, "levels": levels}
    return {
        "pooler": {"class_path": "RoIAlign", "init_args": pooler},
        **_layers(heads.box_head, (backbone.out_channels, size[0], size[1])),
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


def _layers(box_head: Any, pooled: tuple[int, int, int]) -> dict[str, Any]:
    """The convolutions and the widths of fully connected layers, of maps ``[C, h, w]``."""
    if isinstance(box_head, TwoMLPHead):
        return {"fc": [box_head.fc6.out_features, box_head.fc7.out_features]}
    widths = [module.out_channels for module in box_head.modules() if isinstance(module, nn.Conv2d)]
    fc = [module.out_features for module in box_head.children() if isinstance(module, nn.Linear)]
    has_norms = any(isinstance(module, nn.BatchNorm2d) for module in box_head.modules())
    with torch.device("meta"):
        known = FastRCNNConvFCHead(pooled, widths, fc, nn.BatchNorm2d if has_norms else None)
    if not fc or not _are_alike(box_head, known):
        raise ValueError(
            "roi_heads.box_head: its layers have no counterpart; expected those of FastRCNNConvFCHead with norm_layer None or "
            "BatchNorm2d, and fc_layers"
        )
    return {"fc": fc, "conv": {"widths": widths, "norm": "batch" if has_norms else None}} if widths else {"fc": fc}


def _count(model: Any) -> int:
    return model.roi_heads.box_predictor.cls_score.out_features - 1

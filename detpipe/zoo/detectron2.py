"""detectron2's detectors as settings of ours, and the names of their tensors.

Wu et al., "Detectron2", 2019, https://github.com/facebookresearch/detectron2: its ``MODEL_ZOO.md`` and the configurations that it
names; written from its documentation and the layout of its files. Its conventions differ from torchvision's: pixels are BGR in
0..255, resized as Pillow does in 8 bits; a bottleneck has its stride in the 1 x 1 convolution; anchors are not rounded, those of a
cell are numbered size by size; RoIAlign is aligned and takes as many samples as a bin has cells; the background is the last class.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

ALL = 1_000_000  # candidates of an image: detectron2 suppresses among all of them
_PIXELS = {"mean": [103.53, 116.28, 123.675], "std": [1.0, 1.0, 1.0], "channel_order": "bgr", "value_range": 255.0}
_SIZES = {"min_size": 800, "max_size": 1333, "resize": "detectron2"}
_TRUNK = r"^backbone\.(?:bottom_up\.)?"
_NAMES = (  # what is not named, such as conv1.weight of a block, keeps its last part
    (rf"{_TRUNK}stem\.conv1\.norm\.", "TRUNK.stem.norm1."),
    (rf"{_TRUNK}stem\.", "TRUNK.stem."),
    (rf"{_TRUNK}res(\d)\.(\d+)\.shortcut\.norm\.", r"TRUNK.stages.c\1.\2.shortcut.norm."),
    (rf"{_TRUNK}res(\d)\.(\d+)\.shortcut\.", r"TRUNK.stages.c\1.\2.shortcut.conv."),
    (rf"{_TRUNK}res(\d)\.(\d+)\.conv(\d)\.norm\.", r"TRUNK.stages.c\1.\2.residual.norm\3."),
    (rf"{_TRUNK}res(\d)\.(\d+)\.", r"TRUNK.stages.c\1.\2.residual."),
    (r"^proposal_generator\.rpn_head\.conv\.", "proposals.head.convs.0."),
    (r"^proposal_generator\.rpn_head\.objectness_logits\.", "proposals.head.objectness."),
    (r"^proposal_generator\.rpn_head\.anchor_deltas\.", "proposals.head.regressor."),
    (r"^roi_heads\.res5\.(\d+)\.shortcut\.norm\.", r"head.shared.\1.downsample.1."),
    (r"^roi_heads\.res5\.(\d+)\.shortcut\.", r"head.shared.\1.downsample.0."),
    (r"^roi_heads\.res5\.(\d+)\.conv(\d)\.norm\.", r"head.shared.\1.bn\2."),
    (r"^roi_heads\.res5\.(\d+)\.", r"head.shared.\1."),
    (r"^roi_heads\.box_head\.(\d+)\.", r"roi_heads.STAGE\1.box_head."),
    (r"^roi_heads\.box_predictor\.(\d+)\.", r"roi_heads.STAGE\1.box_predictor."),
)
_LAYERS = {
    "box_head.fc1.": "shared.1.",
    "box_head.fc2.": "shared.3.",
    "box_predictor.cls_score.": "classifier.",
    "box_predictor.bbox_pred.": "regressor.",
}
# anchors and means, which are settings here, and masks
_UNUSED = re.compile(r"cell_anchors|^pixel_(mean|std)$|^roi_heads\.mask_")


def faster_rcnn_fpn() -> dict[str, Any]:
    """Settings of ``COCO-Detection/faster_rcnn_R_50_FPN``: ``model`` of a configuration."""
    return {"backbone": _fpn(), "proposals": _rpn((2000, 1000), (1000, 1000)), "head": _head(), "divisor": 32, **_SIZES}


def fast_rcnn_fpn() -> dict[str, Any]:
    """Settings of ``COCO-Detection/fast_rcnn_R_50_FPN``, which is given its boxes."""
    source = {"max_boxes": 1000, "min_size": 0.0, "remove_duplicates": False}
    source = {"class_path": "PrecomputedProposals", "init_args": source}
    return {**faster_rcnn_fpn(), "proposals": source}


def cascade_rcnn_fpn() -> dict[str, Any]:
    """Settings of the boxes of ``Misc/cascade_mask_rcnn_R_50_FPN``."""
    later = {"ious": [0.6, 0.7], "delta_factors": [2.0, 3.0]}
    head = {"class_path": "CascadeHead", "init_args": {**_head()["init_args"], "later": later}}
    return {**faster_rcnn_fpn(), "proposals": _rpn((2000, 1000), (2000, 1000)), "head": head}


def faster_rcnn_c4() -> dict[str, Any]:
    """Settings of ``PascalVOC-Detection/faster_rcnn_R_50_C4``: the last stage of the network is the head."""
    rpn = _rpn((12000, 6000), (2000, 1000))
    rpn["init_args"]["anchors"]["sizes"] = [[32.0, 64.0, 128.0, 256.0, 512.0]]
    head = _head()
    head["init_args"] |= {"fc": [], "conv": {"width": 2048, "blocks": 3, "stride_in_1x1": True}}
    head["init_args"]["pooler"]["init_args"]["output_size"] = 14
    return {"backbone": _resnet(["c4"], None), "proposals": rpn, "head": head, "divisor": 1, **_SIZES}


def _resnet(levels: list[str], width: str | None) -> dict[str, Any]:
    regime = {"norm": "frozen", "eps": 1e-5, "frozen": ["stem", "c2"]}
    settings = {"depth": 50, "attention": None, "levels": levels, "out_channels": width, "regime": regime}
    settings |= {"variant": {"stride_in_1x1": True}, "pixel_format": _PIXELS}
    return {"class_path": "SEResNet", "init_args": settings}


def _fpn() -> dict[str, Any]:
    inner = _resnet(["c2", "c3", "c4", "c5"], "own")
    return {"class_path": "FPN", "init_args": {"backbone": inner, "out_channels": 256, "extra_levels": "max_pool"}}


def _rpn(before: tuple[int, int], after: tuple[int, int]) -> dict[str, Any]:
    sizes = [[32.0], [64.0], [128.0], [256.0], [512.0]]
    anchors = {"sizes": sizes, "ratios": [0.5, 1.0, 2.0], "offset": 0.0, "rounded": False}
    selection = {"pre_nms_top_n": list(before), "post_nms_top_n": list(after), "nms_iou": 0.7, "min_size": 0.0}
    return {"class_path": "RPN", "init_args": {"anchors": anchors, "selection": selection}}


def _head() -> dict[str, Any]:
    pooler = {"class_path": "RoIAlign", "init_args": {"output_size": 7, "sampling_ratio": 0, "aligned": True}}
    postprocess = {"score_threshold": 0.05, "nms_iou": 0.5, "detections_per_image": 100, "candidates_per_image": ALL}
    settings = {"pooler": pooler, "fc": [1024, 1024], "sampler": {"rois_per_image": 512}, "postprocess": postprocess}
    settings["objective"] = {"boxes": {"beta": 0.0}}
    return {"class_path": "FastRCNNHead", "init_args": settings}


def to_own_names(content: Any, settings: Mapping[str, Any]) -> dict[str, Tensor]:
    """Rename what a file of detectron2's zoo holds.

    Args:
        content: of the pickle: ``{"model": name -> array}``.
        settings: of the detector.

    Returns:
        Name -> tensor: rows of the background first, anchors of a cell ratio by ratio.

    Raises:
        ValueError: the content is something else, or a tensor has no place; it is named.
    """
    model = content.get("model") if isinstance(content, dict) else None
    if not isinstance(model, dict) or not model:
        raise ValueError("expected a dict with 'model', name -> array, as detectron2 writes it")
    trunk = "backbone.backbone" if settings["backbone"]["class_path"] == "FPN" else "backbone"
    state: dict[str, Tensor] = {}
    for name, value in model.items():
        if not isinstance(name, str) or not isinstance(value, np.ndarray) or value.dtype.kind not in "fiu":
            raise ValueError(f"expected name -> array of numbers, got {name!r} -> {type(value).__name__}")
        if not _UNUSED.search(name):
            state[_own_name(name).replace("TRUNK", trunk)] = torch.from_numpy(value.astype(np.float32))
    if settings["proposals"]["class_path"] != "RPN":
        state = {name: value for name, value in state.items() if not name.startswith("proposals.")}
    else:
        _number_by_ratio(state, settings["proposals"]["init_args"]["anchors"])
    for name in state:
        if ".classifier." in name:
            state[name] = state[name].roll(1, 0)
    return state


def _own_name(name: str) -> str:
    lateral = re.match(r"^backbone\.fpn_(lateral|output)(\d)\.(.+)", name)
    if lateral is not None:
        blocks = "inner_blocks" if lateral[1] == "lateral" else "layer_blocks"
        return f"backbone.pyramid.{blocks}.{int(lateral[2]) - 2}.0.{lateral[3]}"
    own = next((new for pattern, text in _NAMES for new, found in [re.subn(pattern, text, name)] if found), name)
    stage = re.match(r"^roi_heads\.(?:STAGE(\d+)\.)?(.+)", own)
    if stage is None:
        return own
    where = "head" if stage[1] is None else f"head.stages.{stage[1]}"
    return next((f"{where}.{new}{stage[2].removeprefix(old)}" for old, new in _LAYERS.items() if old in stage[2]), name)


def _number_by_ratio(state: dict[str, Tensor], anchors: Mapping[str, Any]) -> None:
    """Put the anchors of a cell, theirs size by size, into our order, ratio by ratio."""
    sizes, ratios = len(anchors["sizes"][0]), len(anchors["ratios"])
    order = torch.arange(sizes * ratios).view(sizes, ratios).T.flatten()
    for name, each in (("objectness", 1), ("regressor", 4)):
        for kind in ("weight", "bias"):
            key = f"proposals.head.{name}.{kind}"
            if key in state and len(state[key]) == each * len(order):
                state[key] = state[key].unflatten(0, (-1, each))[order].flatten(0, 1)

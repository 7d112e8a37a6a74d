"""Tiny detectors whose random weights find something."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from detpipe.detector import TwoStageDetector
from detpipe.heads import AttentionalHead, CascadeHead, FastRCNNHead, Postprocess
from detpipe.proposals import RPN, Anchors, PrecomputedProposals, ProposalSelection
from detpipe.roi_pooling import RoIAlign
from detpipe.roi_pooling.levels import FPNLevels
from detpipe.stages import Backbone
from detpipe.types import PixelFormat

STRIDES = {"c3": 8, "c4": 16}


class TwoConvolutions(Backbone):
    """Levels of 16 channels."""

    def __init__(self, levels: Sequence[str], channels: int = 3) -> None:
        super().__init__()
        self.strides = {level: STRIDES[level] for level in levels}
        self.out_channels = 16
        self.pixel_format = PixelFormat() if channels == 3 else PixelFormat((0.4,) * channels, (0.2,) * channels)
        self.first, self.second = nn.Conv2d(channels, 16, 8, 8), nn.Conv2d(16, 16, 3, 2, 1)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        fine = torch.relu(self.first(images))
        maps = {"c3": fine, "c4": torch.relu(self.second(fine))}
        return {level: maps[level] for level in self.strides}


def detector(kind: str = "plain", backbone: Backbone | None = None, **others: Any) -> TwoStageDetector:
    """Build one; ``kind`` names what is in it: fpn, boxes, cascade, glimpse, aod, agnostic, four channels, and a rule of
    resizing."""
    torch.manual_seed(0)
    backbone = backbone or TwoConvolutions(["c3", "c4"] if "fpn" in kind else ["c4"], 4 if "four" in kind else 3)
    selection = ProposalSelection(pre_nms_top_n=(60, 60), post_nms_top_n=(40, 40))
    sizes = [[24.0 * 2**level] for level in range(len(backbone.strides))]
    source = RPN(backbone.out_channels, backbone.strides, Anchors(sizes=sizes), selection=selection)
    arguments: dict[str, Any] = {
        "in_channels": backbone.out_channels,
        "num_classes": 3,
        "strides": backbone.strides,
        "pooler": RoIAlign(4, levels=FPNLevels(56)),
        "fc": [16],
        "postprocess": Postprocess(score_threshold=0.2),
        **others,
    }
    if "cascade" in kind:
        head = CascadeHead(**arguments)
    elif "aod" in kind:
        head = AttentionalHead(**arguments)
    else:
        glimpse = "affine" if "glimpse" in kind else None
        head = FastRCNNHead(**arguments, class_agnostic="agnostic" in kind, glimpse=glimpse)
    rule: Any = next((rule for rule in ("torchvision", "detectron2") if rule in kind), "detpipe")
    built = TwoStageDetector(
        backbone, PrecomputedProposals() if "boxes" in kind else source, head, min_size=64, max_size=96, resize=rule
    )
    with torch.no_grad():
        for name, parameter in built.named_parameters():
            if "objectness" in name or "classifier" in name:
                parameter *= 30
            elif "regressor" in name:
                parameter *= 5
            elif any(part in name for part in ("policy", "recurrent", "theta", "gain")):
                parameter.normal_(std=0.1)
    return built.eval().requires_grad_(False)

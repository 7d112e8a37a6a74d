"""How far a file may be from its detector, and exports of networks from other rooms."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from zoo import random_models

from detpipe.backbones import FPN, SEResNet, SKNet
from detpipe.exporting.files import export
from detpipe.exporting.parity import BOX_ERROR, SCORE_ERROR, Parity, _limits
from detpipe.types import Detection
from detpipe.zoo import from_torchvision
from export.detectors import detector

BACKBONES = {
    "se pyramid": lambda: FPN(SEResNet(18, levels=["c3", "c4", "c5"], out_channels="own"), 16),
    "sk": lambda: SKNet(26, levels=["c4"], out_channels=16),
    **{
        kind: lambda kind=kind: SEResNet(18, levels=["c4"], out_channels=16, attention=kind) for kind in ("eca", "cbam")
    },
}


def found(boxes: list[list[float]], scores: list[float], labels: list[int]) -> Detection:
    return {
        "boxes": torch.tensor(boxes).view(-1, 4), "scores": torch.tensor(scores), "labels": torch.tensor(labels)
    }  # fmt: skip


@pytest.mark.parametrize(
    ("box", "score", "label", "expected"),
    [
        (1e-4, 1e-6, 1, (BOX_ERROR, SCORE_ERROR)),  # as exact as a file has to be
        (1e-2, 1e-4, 1, (4e-2, 4e-4)),
        (0.5, 1e-4, 1, (BOX_ERROR, SCORE_ERROR)),  # another detection
        (1e-2, 1e-4, 2, (BOX_ERROR, SCORE_ERROR)),
    ],
)
def test_limits_follow_what_the_detector_loses_by_rounding(box, score, label, expected):
    own = found([[10.0, 20.0, 30.0, 40.0], [50.0, 50.0, 60.0, 60.0]], [0.5, 0.25], [1, 3])
    exact = found([[10.0, 20.0, 30.0 + box, 40.0]], [0.5 + score], [label])
    none = found([], [], [])
    assert _limits([own, none, own], [exact, own, none]) == pytest.approx(expected, rel=1e-2)


def exported(model, folder: Path) -> Parity:
    parity = export(model, folder / "model.onnx")
    assert parity is not None
    return parity


@pytest.mark.slow
@pytest.mark.parametrize("kind", BACKBONES)
def test_backbones_with_attention(kind, tmp_path):
    torch.manual_seed(0)
    parity = exported(detector("plain", BACKBONES[kind]()), tmp_path)
    assert parity.detections > 100
    assert parity.score_error < 1e-5


@pytest.mark.slow
def test_a_published_network_whose_scores_round_badly(tmp_path):
    torch.manual_seed(0)
    model = random_models.spread(random_models.shaped_mobilenet()).eval()
    parity = exported(from_torchvision(model), tmp_path)
    assert parity.detections > 100
    assert parity.score_error < 5e-4

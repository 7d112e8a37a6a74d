"""The backbone in a checkpoint of ours as weights of another one: `--model.backbone.weights RUN/best.ckpt`."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from detpipe.backbones import FPN, Extractor, Level, SEInceptionV3, SEResNet, SKNet, ViTPyramid
from detpipe.detector import TwoStageDetector
from detpipe.heads import FastRCNNHead
from detpipe.proposals import DenseGrid
from detpipe.regions.image_classifier import ImageClassifier
from detpipe.regions.region_classifier import RegionClassifier
from detpipe.support.errors import CheckpointError

SQUEEZENET, MOBILENET = {"c4": Level("features.12", 16)}, {"c3": Level("features.3", 8), "c4": Level("features.8", 16)}
# how a backbone is made for one level or more, with weights
MAKE = {
    "SEResNet": lambda w=None, **k: SEResNet(18, levels=["c3"], weights=w, **k),
    "SKNet": lambda w=None, **k: SKNet(26, levels=["c3"], weights=w, **k),
    "SEInceptionV3": lambda w=None, **k: SEInceptionV3(levels=["c3"], weights=w, **k),
    "torchvision": lambda w=None, **k: Extractor("squeezenet1_1", SQUEEZENET, weights=w, **k),
    "timm": lambda w=None, **k: Extractor("timm/convnext_atto", ["c3"], weights=w, **k),
    "ViTPyramid": lambda w=None, **_: ViTPyramid(Extractor("timm/vit_tiny_patch16_224", ["c4"], weights=w), 16),
    "FPN of ours": lambda w=None, **_: FPN(SEResNet(18, levels=["c2", "c3"], out_channels="own", weights=w), 16),
    "FPN of torchvision": lambda w=None, **_: FPN(
        Extractor("mobilenet_v3_small", MOBILENET, out_channels="own", weights=w), 16
    ),
}


def inner(backbone):
    return backbone.backbone if hasattr(backbone, "backbone") else backbone


def network(backbone) -> dict[str, torch.Tensor]:
    """The tensors of the network, which weights are for."""
    return {name: value for name, value in inner(backbone).state_dict().items() if not name.startswith("laterals.")}


def detector(backbone) -> TwoStageDetector:
    head = FastRCNNHead(backbone.out_channels, 2, backbone.strides, fc=[8])
    return TwoStageDetector(backbone, DenseGrid(scales=[32]), head)


def saved(model: nn.Module, path: Path) -> str:
    torch.save({"state_dict": model.state_dict(), "detpipe": {"format": 1}, "epoch": 3}, path)
    return str(path)


@pytest.mark.parametrize("name", MAKE)
def test_a_detectors_backbone_is_taken_out(name, tmp_path):
    trained = MAKE[name]()
    for tensor in network(trained).values():
        tensor.copy_(torch.rand_like(tensor) if tensor.is_floating_point() else tensor + 5)
    path = saved(detector(trained), tmp_path / "best.ckpt")
    fresh = MAKE[name](path)
    got, want = network(fresh), network(trained)
    assert got.keys() == want.keys()
    assert [key for key in want if not torch.equal(got[key], want[key]) and "num_batches_tracked" not in key] == []


@pytest.mark.parametrize("name", ["SEResNet", "timm"])
def test_other_models_and_other_projections(name, tmp_path):
    """From a classifier or a region model, and into a pyramid or another width, whose projections start anew."""
    trained = MAKE[name](out_channels=12)
    for number, model in enumerate((ImageClassifier(trained, 5), RegionClassifier(trained, 2))):
        path = saved(model, tmp_path / f"{number}.ckpt")
        for fresh in (MAKE[name](path), MAKE[name](path, out_channels=8)):
            assert all(torch.equal(value, network(trained)[key]) for key, value in network(fresh).items())


def test_a_checkpoint_of_another_architecture_is_one_line(tmp_path):
    path = saved(detector(MAKE["SEResNet"]()), tmp_path / "best.ckpt")
    for name in ("SKNet", "SEInceptionV3", "torchvision", "timm", "ViTPyramid", "FPN of torchvision"):
        with pytest.raises(
            CheckpointError, match=r"best.ckpt does not fit .*: it .* tensors, .*; give weights of"
        ) as error:
            MAKE[name](path)
        assert "\n" not in str(error.value)
    with pytest.raises(CheckpointError, match=r"does not fit SEResNet: it (lacks|has).* tensors"):
        SEResNet(34, levels=["c3"], weights=path)


class Run:
    """Code that a file must not run."""

    def __reduce__(self):
        return Path.touch, (Path("/tmp/never-written-by-weights"),)


@pytest.mark.parametrize("kind", ["cut", "flipped", "code", "foreign", "no backbone", "missing", "address"])
def test_files_that_are_not_taken(kind, tmp_path):
    path = tmp_path / "best.ckpt"
    saved(detector(MAKE["SEResNet"]()), path)
    data = bytearray(path.read_bytes())
    if kind == "cut":
        path.write_bytes(data[: len(data) // 2])
    elif kind == "flipped":
        data[len(data) // 2] ^= 64
        path.write_bytes(data)
    elif kind == "code":
        torch.save({"state_dict": {"backbone.x": Run()}, "detpipe": {}}, path)
    elif kind == "foreign":
        torch.save({"state_dict": {"backbone.x": torch.zeros(1)}}, path)
    elif kind == "no backbone":
        saved(nn.Linear(2, 2), path)
    elif kind == "missing":
        path.unlink()
    name = f"https://example.org/{path.name}" if kind == "address" else str(path)
    says = {
        "cut": "cannot be read", "flipped": "does not match its check sum", "code": "cannot be read",
        "foreign": "no checkpoint of detpipe", "no backbone": "has no backbone", "missing": "no such file",
        "address": "https://example.org/best.ckpt: addresses are not loaded",
    }  # fmt: skip
    for make in (MAKE["SEResNet"], MAKE["torchvision"], MAKE["timm"]):
        with pytest.raises(CheckpointError, match=says[kind]) as error:
            make(name)
        assert "\n" not in str(error.value)
    assert not Path("/tmp/never-written-by-weights").exists()

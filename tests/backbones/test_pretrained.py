"""Weights of others: randomly initialized peers are mapped onto ours and give the same features."""

from __future__ import annotations

from pathlib import Path

import pytest
import runs
import torch
from safetensors.torch import save_file
from torch import nn
from torchvision import models

from backbones.residual_cases import largest_difference, random_norms, saved
from detpipe.attention import SqueezeExcitation
from detpipe.backbones import Pretrained, Regime, SEResNet, SEResNeXt, SKNet, Variant
from detpipe.support.errors import CheckpointError, UsageError

DEEP = Variant(stem="deep", average_shortcut=True)
TIERED = Variant(stem="tiered", average_shortcut=True)
SMALL_KERNELS = Variant(reduction=8, kernel_min_width=16, split_input=True)
TORCHVISION = {
    "resnet18": lambda w, **k: SEResNet(18, None, weights=w, **k),
    "resnet50": lambda w, **k: SEResNet(50, None, weights=w, **k),
    "resnext50_32x4d": lambda w, **k: SEResNeXt("50_32x4d", None, weights=w, **k),
}
TIMM = {
    "seresnet18": lambda w, **k: SEResNet(18, weights=w, **k),
    "seresnet50": lambda w, **k: SEResNet(50, weights=w, **k),
    "seresnet50t": lambda w, **k: SEResNet(50, variant=TIERED, weights=w, **k),
    "seresnext26d_32x4d": lambda w, **k: SEResNeXt("26_32x4d", variant=DEEP, weights=w, **k),
    "seresnext50_32x4d": lambda w, **k: SEResNeXt("50_32x4d", weights=w, **k),
    "skresnet18": lambda w, **k: SEResNet(18, "sk", SMALL_KERNELS, weights=w, **k),
    "skresnet50": lambda w, **k: SEResNet(50, "sk", Variant(kernel_min_width=8, split_input=True), weights=w, **k),
    "skresnext50_32x4d": lambda w, **k: SKNet(50, weights=w, **k),
    "ecaresnet50d": lambda w, **k: SEResNet(50, "eca", DEEP, weights=w, **k),
}


@pytest.mark.parametrize("name", runs.mostly_slow(TORCHVISION, "resnet18"))
def test_weights_of_torchvision(name, tmp_path):
    theirs, images = random_norms(models.get_model(name, weights=None)), torch.randn(2, 3, 70, 90)
    ours = TORCHVISION[name](saved(theirs, tmp_path), levels=["c5"])
    for training in (True, False):  # the first pass also moves the running statistics of both
        ours.train(training), theirs.train(training)
        with torch.no_grad():
            x = theirs.maxpool(theirs.relu(theirs.bn1(theirs.conv1(images))))
            expected = theirs.layer4(theirs.layer3(theirs.layer2(theirs.layer1(x))))
            assert largest_difference(ours(images)["c5"], expected) <= 1e-5


@pytest.mark.parametrize("name", runs.mostly_slow(TIMM, "seresnet18", "skresnet18"))
def test_weights_of_timm(name, tmp_path):
    timm = pytest.importorskip("timm")
    theirs, images = random_norms(timm.create_model(name, num_classes=7)), torch.randn(2, 3, 70, 90)
    ours = TIMM[name](saved(theirs, tmp_path), levels=["c5"])
    with torch.no_grad():
        assert largest_difference(ours.eval()(images)["c5"], theirs.eval().forward_features(images)) <= 1e-5
        ours, theirs, images = ours.double().train(), theirs.double().train(), images.double()
        # in training a batch of two makes the squeezed vector of a selective kernel too sensitive for float32
        assert largest_difference(ours(images)["c5"], theirs.forward_features(images)) <= 1e-10


def test_dilation_computes_what_torchvisions_does(tmp_path):
    theirs = random_norms(models.resnet50(replace_stride_with_dilation=[False, True, True])).eval()
    ours = SEResNet(50, None, levels=["c5"], output_stride=8, weights=saved(theirs, tmp_path)).eval()
    images = torch.randn(1, 3, 70, 90)
    with torch.no_grad():
        x = theirs.maxpool(theirs.relu(theirs.bn1(theirs.conv1(images))))
        expected = theirs.layer4(theirs.layer3(theirs.layer2(theirs.layer1(x))))
        assert largest_difference(ours(images)["c5"], expected) <= 1e-5


def own(tmp_path: Path, **arguments) -> tuple[SEResNet, str]:
    torch.manual_seed(1)
    network = random_norms(SEResNet(18, **arguments)).eval()
    path = tmp_path / "own.safetensors"
    save_file({name: value.contiguous() for name, value in network.state_dict().items()}, path)
    return network, str(path)


@pytest.mark.parametrize("norm", ["frozen", "group", "sync"])
def test_weights_fit_every_normalization(norm, tmp_path):
    network, path = own(tmp_path, levels=["c5"])
    other = SEResNet(18, levels=["c5"], weights=path, regime=Regime(norm=norm)).eval()
    for name, value in other.state_dict().items():
        assert torch.equal(value, network.state_dict()[name]), name
    if norm != "group":
        images = torch.randn(1, 3, 64, 64)
        torch.testing.assert_close(other(images)["c5"], network(images)["c5"])


def test_new_gates_start_open(tmp_path):
    theirs = random_norms(models.resnet18())
    backbone = SEResNet(18, levels=["c5"], weights=Pretrained(saved(theirs, tmp_path), new_gates=True))
    assert torch.equal(backbone.stages["c5"][1].residual.conv2.weight, theirs.layer4[1].conv2.weight)
    gates = [module for module in backbone.modules() if isinstance(module, SqueezeExcitation)]
    assert len(gates) == 8
    for gate in gates:
        assert gate.weights(torch.rand(1, gate.squeeze.in_channels, 3, 3)).mean() > 0.9


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (
            lambda p: SEResNet(18, weights=p),
            r"lacks 24 tensors, stages\.c2\.0\.attention\.excite\.bias.*attention null.*new_gates",
        ),
        (lambda p: SEResNet(34, None, weights=p), r"lacks \d+ tensors, stages\.c2\.2\.residual"),
        (lambda p: SEResNet(50, None, weights=p), "does not fit SEResNet: it lacks"),
        (lambda p: SEResNet(18, None, Variant(stem="deep"), weights=p), r"lacks 10 tensors, stem\.conv2\.weight"),
        (lambda p: SEResNeXt("50_32x4d", None, weights=p), "does not fit SEResNeXt: it lacks"),
    ],
)
def test_other_networks_are_named_by_key(build, message, tmp_path):
    path = saved(models.resnet18(), tmp_path)
    with pytest.raises(CheckpointError, match=message):
        build(path)


def test_more_than_the_network_has_is_an_error(tmp_path):
    network, path = own(tmp_path, levels=["c5"])
    with pytest.raises(CheckpointError, match=r"has unknown 32 tensors, stages\.c2\.0\.attention\.excite\.bias"):
        SEResNet(18, None, levels=["c5"], weights=path)
    with pytest.raises(CheckpointError, match=r"has weights of gates; leave new_gates out"):
        SEResNet(18, levels=["c5"], weights=Pretrained(path, new_gates=True))
    state = {**network.state_dict(), "stages.c9.0.weight": torch.zeros(1)}
    torch.save(state, tmp_path / "more.pth")
    with pytest.raises(CheckpointError, match=r"has unknown 1 tensors, stages\.c9\.0\.weight"):
        SEResNet(18, levels=["c5"], weights=str(tmp_path / "more.pth"))


def test_other_widths_of_gates_are_an_error(tmp_path):
    _, path = own(tmp_path, levels=["c5"])
    with pytest.raises(CheckpointError, match=r"has other shapes for \d+ tensors, stages\.c\d\.0\.attention"):
        SEResNet(18, variant=Variant(reduction=4), levels=["c5"], weights=path)


def test_names_of_weights(monkeypatch):
    asked = []
    state = random_norms(models.resnet18()).state_dict()

    def given(self, **options):
        asked.append((self.name, options))
        return state

    monkeypatch.setattr(models.ResNet18_Weights, "get_state_dict", given)
    backbone = SEResNet(18, None, levels=["c2"], weights="DEFAULT")
    assert asked == [("IMAGENET1K_V1", {"progress": True, "check_hash": True})]
    assert torch.equal(backbone.stem.conv1.weight, state["conv1.weight"])
    with pytest.raises(UsageError, match=r"unknown weights 'DEFAUT': .*resnet18's.*did you mean 'DEFAULT'"):
        SEResNet(18, None, weights="DEFAUT")
    with pytest.raises(UsageError, match=r"unknown weights 'DEFAULT': .*no name of torchvision's"):
        SKNet(50, weights="DEFAULT")


def test_names_of_timm_networks(monkeypatch):
    timm = pytest.importorskip("timm")
    asked = []

    def create(name: str, pretrained: bool) -> nn.Module:
        asked.append((name, pretrained))
        return random_norms(timm.models.seresnet50())

    monkeypatch.setattr(timm, "create_model", create)
    SEResNet(50, levels=["c2"], weights="timm/seresnet50.ra2_in1k")
    assert asked == [("seresnet50.ra2_in1k", True)]
    with pytest.raises(
        UsageError, match=r"timm has no weights 'seresnet50\.ra_in1k', of seresnet50 it has .*mean 'ra2_in1k'"
    ):
        SEResNet(50, weights="timm/seresnet50.ra_in1k")
    with pytest.raises(UsageError, match=r"timm has no weights 'seresnet18', of seresnet18 it has \[\]"):
        SEResNet(18, weights="timm/seresnet18")
    with pytest.raises(UsageError, match=r"timm has no network 'seresnet51'; did you mean 'seresnet50'"):
        SEResNet(18, weights="timm/seresnet51")


def test_without_a_network(monkeypatch):
    def fail(*_, **__):
        raise OSError("Name or service not known\nand more")

    monkeypatch.setattr(models.ResNet18_Weights, "get_state_dict", fail)
    with pytest.raises(
        CheckpointError, match=r"^weights DEFAULT cannot be downloaded \(Name or service not known\); .*local file$"
    ):
        SEResNet(18, None, weights="DEFAULT")

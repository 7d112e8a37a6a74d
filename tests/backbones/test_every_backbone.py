"""What holds for every backbone, whichever library its network comes from: how it is trained, sizes, weights that do not fit."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import runs
import torch
from torch import nn

from detpipe.backbones import Extractor, Level, Regime, SEInceptionV3, SEResNet, SEResNeXt, SKNet
from detpipe.stages import Backbone
from detpipe.support.errors import CheckpointError, UsageError

BATCH = Regime()
NODES = {
    "resnet18": Level("layer3", 16),
    "mobilenet_v3_small": Level("features.8", 16),
    "squeezenet1_1": Level("features.12", 16),
    "efficientnet_b0": Level("features.5", 16),
}
DROPPING = {"efficientnet_b0", "timm/convnext_atto"}


def extractor(name: str) -> Callable[..., Backbone]:
    if not name.startswith("timm/"):
        return lambda regime=BATCH, weights=None: Extractor(name, {"c4": NODES[name]}, weights, regime=regime)

    def build(regime: Regime = BATCH, weights: str | None = None) -> Backbone:
        pytest.importorskip("timm")
        return Extractor(name, ["c4"], weights, regime=regime)

    return build


BUILD: dict[str, Callable[..., Backbone]] = {
    name: extractor(name)
    for name in (
        *NODES,
        *("timm/resnet10t", "timm/mobilenetv3_small_050", "timm/convnext_atto", "timm/vit_tiny_patch16_224"),
        "timm/hrnet_w18_small",
    )
}
BUILD["SEResNet"] = lambda regime=BATCH, weights=None: SEResNet(18, levels=["c3"], weights=weights, regime=regime)
BUILD["SEInceptionV3"] = lambda regime=BATCH, weights=None: SEInceptionV3(levels=["c3"], weights=weights, regime=regime)


def step(backbone: Backbone, images: torch.Tensor):
    """Maps, gradients and state of one step, and how many numbers it stored."""
    sizes = {}
    torch.manual_seed(1)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.update({t.data_ptr(): t.numel()}) or t, lambda t: t):
        maps = backbone(images)
    sum(level.square().mean() for level in maps.values()).backward()
    gradients = {name: parameter.grad for name, parameter in backbone.named_parameters()}
    return (maps, gradients, backbone.state_dict()), sum(sizes.values())


@pytest.mark.parametrize("name", runs.mostly_slow(BUILD, "squeezenet1_1", "timm/convnext_atto", "SEResNet"))
def test_checkpointing_changes_nothing_but_memory(name):
    drop_path = 0.3 if name in DROPPING else 0.0
    plain, other = (BUILD[name](Regime(drop_path=drop_path, checkpointing=given)).train() for given in (False, True))
    other.load_state_dict(plain.state_dict())  # names stay
    images = torch.randn(2, 3, 96, 64)
    (expected, stored), (got, stored_less) = step(plain, images), step(copy.deepcopy(other), images)
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)
    assert stored_less < 0.75 * stored
    other.load_state_dict(plain.state_dict())
    torch.testing.assert_close(other.eval()(images), plain.eval()(images))


FROZEN = {
    "resnet18": (("body.conv1", "body.bn1", "body.layer1"), "body.layer2"),
    "timm/resnet10t": (("body.conv1", "body.bn1", "body.layer1"), "body.layer2"),
    "SEResNet": (("stem", "c2"), "stages.c3"),
    "SEInceptionV3": (("stem", "c2"), "stages.c3"),
}


@pytest.mark.parametrize("name", FROZEN)
def test_frozen_parts_keep_weights_and_statistics(name):
    frozen, next_part = FROZEN[name]
    backbone = BUILD[name](Regime(frozen=tuple(part.removeprefix("body.") for part in frozen)))
    stay = tuple(part if "." in part or part == "stem" else f"stages.{part}" for part in frozen)
    for fresh in (True, False):
        if not fresh:
            backbone.eval().train()
        before = copy.deepcopy(backbone.state_dict())
        sum(level.square().sum() for level in backbone(torch.randn(2, 3, 64, 64)).values()).backward()
        torch.optim.SGD([p for p in backbone.parameters() if p.grad is not None], lr=0.1).step()
        moved = {key for key, value in backbone.state_dict().items() if not torch.equal(value, before[key])}
        assert any("running_mean" in key for key in moved)
        assert any(key.startswith(next_part) and key.endswith("weight") for key in moved)
        assert not any(key.startswith(stay) for key in moved), fresh
    with pytest.raises(UsageError, match=r"frozen: no (parameters under|stage) '(layr1|stam)'; did you mean"):
        BUILD[name](Regime(frozen=("layr1" if name in ("resnet18", "timm/resnet10t") else "stam",)))


@pytest.mark.parametrize("norm", ["frozen", "group", "sync"])
@pytest.mark.parametrize("name", ["resnet18", "timm/mobilenetv3_small_050", "SEResNet", "SEInceptionV3"])
def test_other_norms(name, norm):
    plain, other = BUILD[name](), BUILD[name](Regime(norm=norm))
    assert not any(type(module) is nn.BatchNorm2d for module in other.modules())
    features = other.train()(torch.randn(2, 3, 64, 64))
    assert all(level.isfinite().all() for level in features.values())
    sum(level.square().sum() for level in features.values()).backward()
    assert all(parameter.grad is not None for parameter in other.parameters())
    if norm == "group":
        assert not any(key.endswith(("running_mean", "running_var")) for key in other.state_dict())
    else:
        state = {key: value for key, value in plain.state_dict().items() if not key.endswith("tracked")}
        other.load_state_dict(state, strict=False)
        images = torch.randn(2, 3, 64, 64)
        torch.testing.assert_close(other.eval()(images), plain.eval()(images), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["resnet18", "timm/resnet10t", "timm/convnext_atto", "timm/vit_tiny_patch16_224"])
@torch.no_grad()
def test_images_of_any_size(name):
    backbone = BUILD[name]().eval()
    for size in ((64, 64), (65, 333), (101, 67), (1333, 70)):
        for cells, side in zip(backbone(torch.zeros(1, 3, *size))["c4"].shape[2:], size, strict=True):
            assert side // 16 <= cells <= -(-side // 16)  # ConvNeXt's convolutions leave the last, incomplete cell out


@pytest.mark.parametrize("make", [SEResNet, SEResNeXt, SKNet, lambda **k: SEInceptionV3(None, **k)])
def test_our_own_round_up(make):
    with torch.device("meta"):
        backbone = make(levels=("c2", "c3", "c4", "c5"), out_channels="own").eval()
    for size in ((64, 64), (65, 333), (224, 225), (600, 1000), (1333, 1333)):
        features = backbone(torch.zeros(1, 3, *size, device="meta"))
        for level, stride in backbone.strides.items():
            assert features[level].shape == (1, backbone.level_channels[level], *(-(-side // stride) for side in size))


@pytest.mark.parametrize(
    ("name", "first", "other"),
    [
        ("squeezenet1_1", "features.0.weight", "features.12.expand1x1.bias"),
        ("timm/resnet10t", "bn1.bias", "layer3.0.conv1.weight"),
        ("SEInceptionV3", "stages.c2.Conv2d_3b_1x1.block.bn.bias", "stages.c3.Mixed_5c.gate.excite.bias"),
        ("SEResNet", "stages.c2.0.attention.excite.bias", "stages.c3.0.residual.conv1.weight"),
    ],
)
def test_weights_that_do_not_fit(name, first, other, tmp_path):
    network, path = BUILD[name](), tmp_path / "weights.pth"
    state = {key.removeprefix("body."): value for key, value in network.state_dict().items()}

    def refused(content: dict[str, torch.Tensor], message: str) -> None:
        torch.save(content, path)
        with pytest.raises(CheckpointError, match=rf"weights\.pth does not fit \S+: it {message}"):
            BUILD[name](weights=str(path))

    refused({"unlike.weight": torch.zeros(1)}, rf"lacks \d+ tensors, .*{first[:9]}")
    refused({key: value for key, value in state.items() if key != other}, f"lacks 1 tensors, {other}")
    refused({**state, "extra.weight": torch.zeros(1)}, r"has unknown 1 tensors, extra\.weight")
    refused({**state, other: torch.zeros(3)}, f"has other shapes for 1 tensors, {other}")
    with pytest.raises(CheckpointError, match=r"weights file \S+nowhere\.pth: no such file"):
        BUILD[name](weights=str(tmp_path / "nowhere.pth"))
    torch.save(state, path)
    again = BUILD[name](weights=str(path))
    assert all(torch.equal(value, network.state_dict()[key]) for key, value in again.state_dict().items())


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # PyTorch's own look
@pytest.mark.parametrize("name", runs.mostly_slow(["SEResNet", "resnet18", "timm/resnet10t"], "resnet18"))
def test_checkpointing_in_a_compiled_network(name):
    plain, images = BUILD[name](Regime(checkpointing=True)).train(), torch.rand(2, 3, 64, 64)
    other = copy.deepcopy(plain)
    step(plain, images)
    compiled = torch.compile(other, backend="eager")
    sum(level.square().mean() for level in compiled(images).values()).backward()
    torch.testing.assert_close(other.state_dict(), plain.state_dict())
    for mine, its in zip(other.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, its.grad)

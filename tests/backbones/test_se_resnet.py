import pytest
import torch
from torch import nn
from torchvision import models

from detpipe.attention import SqueezeExcitation
from detpipe.backbones import SEResNet

LEVELS = ("c2", "c3", "c4", "c5")


def random_norms(network: nn.Module) -> None:
    """Give batch norms something to do; a fresh one is nearly the identity, or zero."""
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.0)
            nn.init.normal_(module.bias, std=0.1)


def translated(state: dict[str, torch.Tensor], depth: int) -> dict[str, torch.Tensor]:
    """A state dict of torchvision's ResNet with the names of ours."""
    convolutions = 2 if depth < 50 else 3
    names = {"conv1": "stem.0", "bn1": "stem.1"}
    for level, layer in zip(LEVELS, ("layer1", "layer2", "layer3", "layer4"), strict=True):
        for block in range(40):
            ours, theirs = f"stages.{level}.{block}", f"{layer}.{block}"
            for index in range(convolutions):
                names[f"{theirs}.conv{index + 1}"] = f"{ours}.residual.{3 * index}"
                names[f"{theirs}.bn{index + 1}"] = f"{ours}.residual.{3 * index + 1}"
            for index in range(2):
                names[f"{theirs}.downsample.{index}"] = f"{ours}.shortcut.{index}"
    renamed = {}
    for key, value in state.items():
        module, _, tensor = key.rpartition(".")
        if module != "fc":
            renamed[f"{names[module]}.{tensor}"] = value
    return renamed


@pytest.mark.parametrize("depth", [18, 50])
def test_without_attention_it_is_torchvisions_resnet(depth):
    theirs = models.get_model(f"resnet{depth}", weights=None)
    random_norms(theirs)
    ours = SEResNet(depth, attention=False, levels=["c5"])
    ours.load_state_dict(translated(theirs.state_dict(), depth))  # strict: every tensor has a place
    images = torch.randn(2, 3, 70, 90)
    for training in (True, False):  # the first pass also moves the running statistics of both
        ours.train(training), theirs.train(training)
        expected = theirs.relu(theirs.bn1(theirs.conv1(images)))
        for layer in (theirs.maxpool, theirs.layer1, theirs.layer2, theirs.layer3, theirs.layer4):
            expected = layer(expected)
        got = ours(images)["c5"]
        assert (got - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("depth", [18, 34, 50, 101, 152])
def test_every_depth_has_the_layers_in_its_name(depth):
    with torch.device("meta"):
        plain, gated = (SEResNet(depth, attention=a, levels=["c5"]) for a in (False, True))
        reference = models.get_model(f"resnet{depth}", weights=None)
    wanted = sum(p.numel() for name, p in reference.named_parameters() if not name.startswith("fc."))
    assert sum(p.numel() for p in plain.parameters()) == wanted
    blocks = [block for stage in gated.stages.values() for block in stage]
    assert 2 + sum(sum(isinstance(m, nn.Conv2d) for m in block.residual) for block in blocks) == depth
    assert all(isinstance(block.gate, SqueezeExcitation) for block in blocks)
    assert gated.out_channels == (512 if depth < 50 else 2048)


@pytest.mark.parametrize("depth", [18, 50])
def test_attention_changes_the_output_before_the_sum(depth):
    backbone, images = SEResNet(depth, levels=["c2"]).eval(), torch.randn(1, 3, 40, 56)
    random_norms(backbone)
    before = backbone(images)["c2"]
    for module in backbone.modules():
        if isinstance(module, SqueezeExcitation):
            nn.init.zeros_(module.excite.weight)
            nn.init.constant_(module.excite.bias, -1e4)  # gates of zero leave the shortcuts alone
    after = backbone(images)["c2"]
    assert not torch.allclose(before, after, rtol=0.01)
    shortcut = backbone.stages["c2"][0].shortcut(backbone.stem(images)).relu()
    torch.testing.assert_close(after, shortcut)


@pytest.mark.parametrize("output_stride", [4, 8, 16, 32])
@pytest.mark.parametrize("size", [(64, 96), (65, 33), (101, 47)])
def test_declared_strides_are_the_real_ones(output_stride, size):
    backbone = SEResNet(18, levels=LEVELS, output_stride=output_stride, out_channels=8).eval()
    assert backbone.strides == {level: min(4 * 2**i, output_stride) for i, level in enumerate(LEVELS)}
    features = backbone(torch.zeros(2, 3, *size))
    assert list(features) == list(LEVELS)
    for level, stride in backbone.strides.items():
        assert features[level].shape == (2, 8, -(-size[0] // stride), -(-size[1] // stride))


def test_dilation_keeps_the_weights_of_the_strided_network():
    plain, dilated = (SEResNet(50, levels=["c5"], output_stride=stride) for stride in (32, 8))
    dilated.load_state_dict(plain.state_dict())
    assert dilated.strides == {"c5": 8}


def test_levels_come_finest_first_and_no_stage_is_built_in_vain():
    backbone = SEResNet(18, levels=["c4", "c2"], out_channels=16)
    assert list(backbone.strides) == list(backbone(torch.zeros(1, 3, 32, 32))) == ["c2", "c4"]
    assert list(backbone.stages) == ["c2", "c3", "c4"]


@pytest.mark.parametrize("count", range(6))
def test_frozen_stages_keep_weights_and_statistics(count):
    backbone = SEResNet(18, levels=["c5"], frozen_stages=count)
    stages = {"stem": backbone.stem, **backbone.stages}
    for fresh in (True, False):
        if not fresh:
            backbone.eval().train()
        before = {name: {k: v.clone() for k, v in stage.state_dict().items()} for name, stage in stages.items()}
        optimizer = torch.optim.SGD(backbone.parameters(), lr=0.1)
        output = backbone(torch.rand(2, 3, 64, 64))["c5"]
        if count < 5:
            optimizer.zero_grad()
            output.square().sum().backward()
            optimizer.step()
        for index, (name, stage) in enumerate(stages.items()):
            same = [torch.equal(value, before[name][key]) for key, value in stage.state_dict().items()]
            assert all(same) == (index < count), (name, fresh)


def test_frozen_batch_norm_keeps_its_statistics_and_live_does_not():
    for kind in ("frozen", "live"):
        backbone = SEResNet(18, levels=["c2"], batch_norm=kind).train()
        before = backbone.stem[1].running_mean.clone()
        backbone(torch.rand(2, 3, 32, 32))
        assert torch.equal(backbone.stem[1].running_mean, before) == (kind == "frozen")
        assert any(name.endswith("stem.1.weight") for name, _ in backbone.named_parameters()) == (kind == "live")


def test_output_channels():
    assert SEResNet(18, levels=["c4"]).out_channels == 256
    backbone = SEResNet(50, levels=["c2", "c3"], out_channels=24)
    assert backbone.out_channels == 24
    assert {f.shape[1] for f in backbone(torch.zeros(1, 3, 32, 32)).values()} == {24}
    with pytest.raises(ValueError, match=r"unequal width \{'c2': 256, 'c3': 512\} need out_channels"):
        SEResNet(50, levels=["c2", "c3"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"depth": 20}, r"depth must be one of \[18, 34, 50, 101, 152\], got 20"),
        ({"levels": []}, "levels must be distinct names"),
        ({"levels": "c4"}, "levels must be distinct names"),
        ({"levels": ["c4", "c4"]}, "levels must be distinct names"),
        ({"levels": ["c6"]}, "levels must be distinct names.*c6"),
        ({"output_stride": 12}, "output_stride must be 4, 8, 16 or 32, got 12"),
        ({"frozen_stages": 6}, "frozen_stages must be in 0..5"),
        ({"batch_norm": "sync"}, "batch_norm must be 'live' or 'frozen', got 'sync'"),
        ({"reduction": 0}, "reduction must be in"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        SEResNet(**{"depth": 18, **arguments})

import math

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from torchvision import models

from backbones.residual_cases import random_norms
from detpipe.attention import CBAM, ECA, Attention, SelectiveKernel, SqueezeExcitation
from detpipe.backbones import Regime, SEResNet, SEResNeXt, SKNet, Variant

LEVELS = ("c2", "c3", "c4", "c5")


def billions(backbone: nn.Module) -> float:
    """Multiplications and additions at 224 x 224 pixels in pairs, with a classifier of 1000 classes."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        backbone.eval()(torch.zeros(1, 3, 224, 224))
    return (counter.get_total_flops() / 2 + backbone.out_channels * 1000) / 1e9


@pytest.mark.parametrize("depth", [18, 34, 50, 101, 152])
def test_every_depth_has_the_layers_in_its_name(depth):
    with torch.device("meta"):
        plain, gated = (SEResNet(depth, attention=a, levels=["c5"]) for a in (None, "se"))
        reference = models.get_model(f"resnet{depth}", weights=None)
    wanted = sum(p.numel() for name, p in reference.named_parameters() if not name.startswith("fc."))
    assert sum(p.numel() for p in plain.parameters()) == wanted
    blocks = [block for stage in gated.stages.values() for block in stage]
    assert 2 + sum(sum(isinstance(m, nn.Conv2d) for m in block.residual) for block in blocks) == depth
    assert all(isinstance(block.attention, SqueezeExcitation) for block in blocks)
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


@pytest.mark.parametrize(("output_stride", "size"), [(4, (65, 33)), (8, (101, 47)), (16, (64, 96)), (32, (101, 47))])
def test_declared_strides_are_the_real_ones(output_stride, size):
    backbone = SEResNet(18, levels=LEVELS, output_stride=output_stride, out_channels=8).eval()
    assert backbone.strides == {level: min(4 * 2**i, output_stride) for i, level in enumerate(LEVELS)}
    features = backbone(torch.zeros(2, 3, *size))
    assert list(features) == list(LEVELS)
    for level, stride in backbone.strides.items():
        assert features[level].shape == (2, 8, -(-size[0] // stride), -(-size[1] // stride))


def test_a_frozen_norm_does_not_leave_branches_at_zero():
    frozen, live = (SEResNet(18, levels=["c2"], regime=Regime(norm=norm)) for norm in ("frozen", "batch"))
    assert frozen.stages["c2"][0].residual.norm2.weight.eq(1).all()
    assert live.stages["c2"][0].residual.norm2.weight.eq(0).all()


def test_group_norm_has_no_statistics():
    backbone = SEResNet(18, levels=["c2"], attention={"c2": "sk"}, regime=Regime(norm="group"))
    assert not any(isinstance(module, nn.BatchNorm2d) for module in backbone.modules())
    one = torch.rand(1, 3, 32, 32)
    torch.testing.assert_close(backbone.train()(one)["c2"], backbone.eval()(one)["c2"])


def test_drop_path_leaves_out_branches_in_training_only():
    backbone = random_norms(SEResNet(18, levels=["c5"], regime=Regime(drop_path=0.9)))
    rates = [block.drop.p for stage in backbone.stages.values() for block in stage]
    assert rates == pytest.approx([0.9 * (index + 1) / 8 for index in range(8)])
    images = torch.rand(2, 3, 64, 64)
    assert not torch.equal(backbone.train()(images)["c5"], backbone(images)["c5"])
    assert torch.equal(backbone.eval()(images)["c5"], backbone(images)["c5"])


@pytest.mark.parametrize(
    ("kind", "module"), [("se", SqueezeExcitation), ("eca", ECA), ("cbam", CBAM), ("sk", SelectiveKernel)]
)
@pytest.mark.parametrize("depth", [18, 26])
def test_attention_by_stage(depth, kind, module):
    backbone = SEResNet(depth, attention={"c3": kind, "c4": None}, levels=["c5"])
    found = {name.split(".")[1] for name, part in backbone.named_modules() if isinstance(part, Attention)}
    assert found == {"c3"}
    assert sum(isinstance(part, module) for part in backbone.modules()) == 2
    assert backbone(torch.rand(2, 3, 64, 64))["c5"].shape[2:] == (2, 2)


@pytest.mark.parametrize("kind", ["se", "sse", "scse", "eca", "cbam", "sk"])
def test_every_kind_of_attention_learns(kind):
    backbone = random_norms(SEResNet(18, kind, levels=["c3"])).double()
    backbone(torch.rand(2, 3, 40, 56).double())["c3"].square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in backbone.parameters())


@pytest.mark.parametrize("size", [(64, 64), (333, 65), (75, 101)])
def test_cells_are_centered_on_their_pixels(size):
    """A mark in the middle of a map's cell is seen by that cell most."""
    backbone = SEResNet(18, None, levels=["c3"], regime=Regime(norm="frozen"))
    for module in backbone.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.constant_(module.weight, 1 / module.weight[0].numel())
    images = torch.ones(1, 3, *size, requires_grad=True)
    row, column = (length // 16 for length in size)
    backbone(images)["c3"][0, :, row, column].sum().backward()
    seen = images.grad.sum(dim=(0, 1))
    y = (seen.sum(1) * (torch.arange(size[0]) + 0.5)).sum() / seen.sum()
    x = (seen.sum(0) * (torch.arange(size[1]) + 0.5)).sum() / seen.sum()
    assert math.hypot(y - (row + 0.5) * 8, x - (column + 0.5) * 8) < 8  # within a cell: padded convolutions of stride 2


def test_costs_of_the_papers():
    plain, gated = (SEResNet(50, a, Variant(stride_in_1x1=True), levels=["c5"]) for a in (None, "se"))
    assert billions(plain) == pytest.approx(3.86, rel=0.01)
    assert billions(gated) == pytest.approx(3.87, rel=0.01)
    kernels = SKNet(50, levels=["c5"])
    assert billions(kernels) == pytest.approx(4.47, rel=0.01)
    assert sum(p.numel() for p in kernels.parameters()) + 2_049_000 == pytest.approx(27.5e6, rel=0.01)


def test_images_without_a_whole_cell():
    backbone = SEResNet(18, levels=["c3", "c4"], out_channels=8)
    assert backbone(torch.zeros(1, 3, 16, 17))["c4"].shape[2:] == (1, 2)
    with pytest.raises(
        ValueError, match="images of 15 x 64 pixels are smaller than the stride 16 of level c4: expected at least"
    ):
        backbone(torch.zeros(1, 3, 15, 64))


def test_levels_come_finest_first_and_no_stage_is_built_in_vain():
    backbone = SEResNet(18, levels=["c4", "c2"], out_channels=16)
    assert list(backbone.strides) == list(backbone(torch.zeros(1, 3, 32, 32))) == ["c2", "c4"]
    assert list(backbone.stages) == ["c2", "c3", "c4"]


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
        ({"depth": 20}, r"depth must be one of \[18, 26, 34, 50, 101, 152\], got 20"),
        ({"levels": []}, "levels must be distinct names"),
        ({"levels": "c4"}, "levels must be distinct names"),
        ({"levels": ["c4", "c4"]}, "levels must be distinct names"),
        ({"levels": ["c6"]}, "levels must be distinct names.*c6"),
        ({"output_stride": 12}, "output_stride must be 4, 8, 16 or 32, got 12"),
        ({"regime": Regime(frozen=("c1",))}, r"frozen: no stage 'c1'.*expected some of "),
        ({"attention": "SE"}, "attention: unknown kind 'SE', expected null or one of .*'cbam', 'sk'"),
        ({"attention": {"c6": "se"}}, "attention: unknown stage 'c6'"),
        ({"attention": True}, "attention: unknown kind True"),
        ({"variant": Variant(reduction=65)}, r"reduction must be in 1..channels \(64\), got 65"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        SEResNet(**{"depth": 18, **arguments})


def test_bad_sizes_and_variants():
    for size in ("50", "18_32x4d", "50_0x4d", "50_32x4"):
        with pytest.raises(ValueError, match=rf"size must be DEPTH_GROUPSxWIDTHd .*got '{size}'"):
            SEResNeXt(size)
    with pytest.raises(ValueError, match=r"depth must be one of \[26, 50, 101\], got 18"):
        SKNet(18)
    with pytest.raises(ValueError, match=r"stem must be one of .* got 'wide'"):
        Variant(stem="wide")


def center_of_field(backbone: SEResNet, level: str, cell: int, side: int = 128) -> float:
    """Where the pixels lie on average that a cell depends on, weighed by its squared gradients on noise."""
    total = torch.zeros(side)
    for _ in range(6):
        images = torch.randn(1, 3, side, side, requires_grad=True)
        value = backbone(images)[level][0, :, cell, cell].square().sum()
        [gradient] = torch.autograd.grad(value, images)
        total += gradient.square().sum((0, 1, 2))
    return float((total * (torch.arange(side) + 0.5)).sum() / total.sum())


@pytest.mark.parametrize(("padding", "center"), [(0, 8 * 8 + 0.5), (4, 8 * 8 + 4.5)])
def test_padding_centers_cells(padding: int, center: float) -> None:
    torch.manual_seed(0)
    backbone = SEResNet(18, attention=None, levels=["c3"], output_stride=8, padding=padding).eval()
    assert center_of_field(backbone, "c3", 8) == pytest.approx(center, abs=1)
    for side in (64, 72, 100):  # as many cells with padding as without
        assert backbone(torch.zeros(1, 3, side, side + 8))["c3"].shape[2:] == (-(-side // 8), -(-(side + 8) // 8))


def test_padding_is_half_of_every_stride() -> None:
    SEResNet(18, levels=["c3", "c4"], output_stride=8, out_channels=8, padding=4)
    with pytest.raises(ValueError, match="padding must be half of the stride of every level"):
        SEResNet(18, levels=["c2", "c3"], out_channels=8, padding=4)

import math

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from detpipe.attention import SqueezeExcitation, add_attention
from detpipe.backbones import FPN, Extractor, Level, Pretrained, SEInceptionV3, SEResNet, ViTPyramid
from detpipe.optimization import LRSchedule, Optimizer


def net() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))


def test_step_schedule_by_hand():
    factor = LRSchedule("step", warmup=0.04, milestones=(0.5, 0.75), gamma=0.1).factor(100)
    assert [factor(step) for step in range(5)] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert [factor(step) for step in (49, 50, 74, 75, 99)] == pytest.approx([1, 0.1, 0.1, 0.01, 0.01])


def test_cosine_schedule_by_hand():
    factor = LRSchedule("cosine", warmup=0.2, final=0.1).factor(100)
    assert factor(0) == pytest.approx(1 / 21)
    assert factor(19) == pytest.approx(20 / 21)
    assert [factor(step) for step in (20, 60, 100, 1000)] == pytest.approx([1, 0.55, 0.1, 0.1])
    assert factor(40) == pytest.approx(0.1 + 0.9 * (1 + math.cos(math.pi / 4)) / 2)


@pytest.mark.parametrize("name", ["step", "cosine"])
def test_no_warmup_and_tiny_runs(name):
    assert LRSchedule(name, warmup=0).factor(100)(0) == 1
    assert LRSchedule(name, milestones=()).factor(1)(0) == 1


def test_the_optimizer_follows_the_schedule():
    optimizer = Optimizer("sgd", lr=0.5, backbone_scale=0.1).build(net(), nn.Linear(2, 2))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, LRSchedule("step", 0, (0.5,)).factor(4))
    rates = []
    for _ in range(4):
        rates.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        schedule.step()
    assert rates[0] == pytest.approx([0.05, 0.05, 0.5, 0.5])
    assert rates[1] == pytest.approx(rates[0])
    assert rates[2] == rates[3] == pytest.approx([0.005, 0.005, 0.05, 0.05])


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_groups(name):
    backbone, head, source = net(), nn.Linear(4, 2), nn.Module()
    optimizer = Optimizer(name, lr=0.1, momentum=0.8, weight_decay=0.01, backbone_scale=0.5).build(
        backbone, source, head
    )
    got = [(group["params"], group["lr"], group["weight_decay"]) for group in optimizer.param_groups]
    assert got == [
        ([backbone[0].weight], 0.05, 0.01),
        ([backbone[0].bias, backbone[1].weight, backbone[1].bias], 0.05, 0.0),  # vectors are not decayed
        ([head.weight], 0.1, 0.01),
        ([head.bias], 0.1, 0.0),
    ]
    group = optimizer.param_groups[0]
    assert (group["momentum"] if name == "sgd" else group["betas"][0]) == 0.8
    assert type(optimizer).__name__.lower() == name


def test_frozen_parameters_are_in_no_group():
    backbone = net()
    backbone[0].weight.requires_grad_(False)
    optimizer = Optimizer().build(backbone, nn.Linear(2, 2))
    assert all(p.requires_grad for group in optimizer.param_groups for p in group["params"])
    assert len(optimizer.param_groups) == 3


def settings_of(optimizer: torch.optim.Optimizer, module: nn.Module) -> dict[str, tuple[float, float]]:
    """Name of a parameter -> learning rate and decay."""
    found = {
        parameter: (group["lr"], group["weight_decay"])
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
    return {name: found[parameter] for name, parameter in module.named_parameters() if parameter in found}


def test_the_default_groups_are_those_of_old_checkpoints():
    """Two groups for the backbone with all that it holds, two for the rest, in the order of the modules."""
    fpn, source, head = (
        FPN(SEResNet(18, levels=["c3", "c4"], out_channels="own"), 16),
        nn.Conv2d(2, 2, 1),
        nn.Linear(2, 2),
    )
    optimizer = Optimizer(weight_decay=0.1).build(fpn, source, head)
    want = []
    for modules in ((fpn,), (source, head)):
        parameters = [parameter for module in modules for parameter in module.parameters()]
        want += [[p for p in parameters if p.ndim > 1], [p for p in parameters if p.ndim <= 1]]
    assert [[id(p) for p in group["params"]] for group in optimizer.param_groups] == [[*map(id, ps)] for ps in want]
    assert [(group["lr"], group["weight_decay"]) for group in optimizer.param_groups] == [(0.001, 0.1), (0.001, 0)] * 2


@pytest.mark.parametrize(
    "make",
    [
        lambda: FPN(SEResNet(18, levels=["c3", "c4"], out_channels="own"), 16),
        lambda: SEResNet(18, levels=["c3"], out_channels=16),
        lambda: SEInceptionV3(levels=["c4"], auxiliary_classes=5),
        lambda: Extractor("squeezenet1_1", {"c4": Level("features.12", 16)}, out_channels=16),
        lambda: ViTPyramid(Extractor("timm/vit_tiny_patch16_224", ["c4"]), 16),
    ],
    ids=["FPN", "SEResNet", "SEInceptionV3", "Extractor", "ViTPyramid"],
)
def test_only_the_network_is_slowed_and_what_is_added_to_it_is_not(make):
    backbone = make()
    rates = settings_of(Optimizer(lr=1.0, backbone_scale=0.25).build(backbone), backbone)
    added = {name for name, (rate, _) in rates.items() if rate == 1}
    assert {rate for rate, _ in rates.values()} <= {0.25, 1}
    places = ("laterals.", "pyramid.", "levels.", "auxiliary.")
    assert added == {name for name in rates if name.startswith(places)}
    assert 0 < len(added) < len(rates)


def test_gates_that_start_anew_have_the_full_rate(tmp_path):
    plain = SEResNet(18, attention=None, levels=["c2"])
    save_file(plain.state_dict(), tmp_path / "plain.safetensors")
    gated = SEResNet(18, levels=["c2"], weights=Pretrained(str(tmp_path / "plain.safetensors"), new_gates=True))
    for backbone, anew in ((gated, True), (SEResNet(18, levels=["c2"]), False)):
        rates = settings_of(Optimizer(lr=1.0, backbone_scale=0.25).build(backbone), backbone)
        assert any(".attention." in name for name in rates)
        assert all((rate == 1) == (anew and ".attention." in name) for name, (rate, _) in rates.items())


@pytest.mark.parametrize("network", ["timm/resnet18", "timm/convnext_atto"])
def test_attention_added_to_a_foreign_network_has_the_full_rate(network):
    backbone = Extractor(network, ["c4"])
    before = settings_of(Optimizer(lr=1.0, backbone_scale=0.25, layer_decay=0.5).build(backbone), backbone)
    add_attention(backbone.body, SqueezeExcitation)
    after = settings_of(Optimizer(lr=1.0, backbone_scale=0.25, layer_decay=0.5).build(backbone), backbone)
    gates = {name for name in after if ".attention." in name or ".se." in name}
    assert gates
    assert all(after[name][0] == 1 for name in gates)
    assert {name.replace(".module.", "."): one for name, one in after.items() if name not in gates} == before


@pytest.mark.parametrize(
    ("make", "depths"),
    [
        (
            lambda: SEResNet(18, levels=["c4"], out_channels=8),
            {"stem.conv1.weight": 0, "stages.c2.0.residual.conv1.weight": 1, "stages.c4.1.residual.norm2.bias": 3},
        ),
        (
            lambda: FPN(SEResNet(18, levels=["c3", "c4"], out_channels="own"), 8),
            {"backbone.stem.conv1.weight": 0, "backbone.stages.c4.0.residual.conv1.weight": 3},
        ),
        (
            lambda: Extractor("squeezenet1_1", {"c4": Level("features.5", 8)}),
            {"body.features.0.weight": 0, "body.features.3.squeeze.bias": 1, "body.features.4.expand1x1.weight": 2},
        ),
        (
            lambda: Extractor("timm/convnext_atto", ["c3"]),
            {"body.stem_0.weight": 0, "body.stages_0.blocks.1.gamma": 2, "body.stages_1.blocks.1.mlp.fc1.weight": 4},
        ),
        (
            lambda: ViTPyramid(Extractor("timm/vit_tiny_patch16_224", ["c4"]), 8),
            {
                "backbone.body.model.pos_embed": 0,
                "backbone.body.model.blocks.0.mlp.fc1.bias": 1,
                "backbone.body.model.blocks.11.mlp.fc1.weight": 12,
            },
        ),
        (net, {"0.weight": 0, "1.bias": 0}),
    ],
    ids=["SEResNet", "FPN", "torchvision", "timm", "ViTPyramid", "plain module"],
)
def test_layer_decay(make, depths):
    """lr * backbone_scale * layer_decay ** (D - d)."""
    backbone, head, last = make(), nn.Linear(2, 2), max(depths.values())
    optimizer = Optimizer(lr=0.8, backbone_scale=0.5, layer_decay=0.7).build(backbone, head)
    rates = settings_of(optimizer, nn.ModuleList([backbone, head]))
    for name, depth in depths.items():
        assert rates[f"0.{name}"][0] == pytest.approx(0.8 * 0.5 * 0.7 ** (last + 1 - depth)), name
    assert rates["1.weight"][0] == 0.8
    assert all(rate == 0.8 for name, (rate, _) in rates.items() if "laterals" in name or "pyramid" in name)
    numbered = sum(1 for rate, _ in rates.values() if rate < 0.8)
    assert len(rates) == sum(1 for p in (*backbone.parameters(), *head.parameters()) if p.requires_grad) >= numbered > 0


def test_embeddings_of_positions_and_tokens_are_not_decayed():
    for network, kept in (
        ("timm/vit_tiny_patch16_224", {"model.cls_token", "model.pos_embed"}),
        (
            "timm/swin_tiny_patch4_window7_224",
            {f"layers_0.blocks.{k}.attn.relative_position_bias_table" for k in (0, 1)},
        ),
    ):
        backbone = Extractor(network, ["c4" if "vit" in network else "c2"])
        decays = settings_of(Optimizer(weight_decay=0.1).build(backbone), backbone)
        bare = {name.removeprefix("body.") for name, (_, decay) in decays.items() if decay == 0}
        matrices = {name.removeprefix("body.") for name, p in backbone.named_parameters() if p.ndim > 1}
        assert bare & matrices == kept
    own = nn.Module()
    for name in ("pos_embedding", "class_token", "rel_pos_h", "weight", "token_mixer"):
        own.register_parameter(name, nn.Parameter(torch.zeros(2, 2)))
    decays = settings_of(Optimizer(weight_decay=0.1).build(own), own)
    assert {name for name, (_, decay) in decays.items() if decay} == {"weight", "token_mixer"}


@pytest.mark.parametrize(
    "arguments",
    [
        {"name": "adam"},
        {"lr": 0.0},
        {"lr": float("nan")},
        {"momentum": 1.0},
        {"momentum": -0.1},
        {"weight_decay": -1.0},
        {"backbone_scale": -1.0},
        {"layer_decay": 0.0},
        {"layer_decay": 1.1},
        {"layer_decay": float("nan")},
    ],
)
def test_bad_optimizer(arguments):
    with pytest.raises(ValueError, match="optimizer"):
        Optimizer(**arguments)


@pytest.mark.parametrize(
    "arguments",
    [
        *({"name": "linear"}, {"warmup": 1.0}, {"warmup": -0.1}, {"milestones": (0.9, 0.5)}, {"milestones": (8.0,)}),
        *({"gamma": -0.1}, {"gamma": float("nan")}, {"final": -0.1}),
    ],
)
def test_bad_schedule(arguments):
    with pytest.raises(ValueError, match="lr_scheduler"):
        LRSchedule(**arguments)


def test_a_milestone_inside_the_warmup_is_refused():
    with pytest.raises(
        ValueError, match=r"lr_scheduler: the milestone 0\.05 lies inside the warm-up, which ends at 0\.1"
    ):
        LRSchedule("step", warmup=0.1, milestones=(0.05, 0.5))
    LRSchedule("step", warmup=0.1, milestones=(0.1, 0.5))
    LRSchedule("cosine", warmup=0.8)  # has no milestones to pass

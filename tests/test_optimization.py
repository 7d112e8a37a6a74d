import math

import pytest
import torch
from torch import nn

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
    ],
)
def test_bad_optimizer(arguments):
    with pytest.raises(ValueError, match="optimizer"):
        Optimizer(**arguments)


@pytest.mark.parametrize(
    "arguments",
    [{"name": "linear"}, {"warmup": 1.0}, {"warmup": -0.1}, {"milestones": (0.9, 0.5)}, {"milestones": (8.0,)}],
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

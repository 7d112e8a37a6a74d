"""Optimizers and learning-rate schedules, as plain settings.

Warm-up: Goyal et al., "Accurate, Large Minibatch SGD", 2017, arXiv 1706.02677; cosine: Loshchilov and Hutter, "SGDR",
2017, arXiv 1608.03983; AdamW: Loshchilov and Hutter, 2019, arXiv 1711.05101. Learning rates that fall from layer to layer:
Bao et al., "BEiT", 2022, arXiv 2106.08254; Liu et al., "A ConvNet for the 2020s" (ConvNeXt), 2022, arXiv 2201.03545.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from detpipe.stages import Backbone, depths_of
from detpipe.support.errors import UsageError
from detpipe.support.numbers import check_numbers

# tensors of two dimensions or more that say where or what something is: last part of their names in torchvision and timm
POSITIONS = re.compile(
    r"pos_emb|rel_pos|relative_position_bias|(cls|class|dist|reg|register|mask)_token|attention_biases"
)


@dataclass(frozen=True)
class Optimizer:
    """How weights are updated.

    Args:
        name: "sgd" (with momentum) or "adamw".
        lr: the highest learning rate.
        momentum: of SGD; the first beta of AdamW.
        weight_decay: of weights with two dimensions or more; biases, norms, embeddings of positions and tokens are not decayed.
        backbone_scale: the learning rate of the backbone's network is ``lr`` times this, with weights or without; what a
            detector adds to it (pyramid, projections of levels, gates that start anew) has the full rate.
        layer_decay: of D depths of the backbone's network, from the stem (0) on, depth d also has its learning rate multiplied
            by ``layer_decay ** (D - d)``; 1 for equal rates.

    Raises:
        ValueError: a number outside its range.
    """

    name: Literal["sgd", "adamw"] = "sgd"
    lr: float = 0.001
    momentum: float = 0.9
    weight_decay: float = 0.0005
    backbone_scale: float = 1.0
    layer_decay: float = 1.0

    def __post_init__(self) -> None:
        if self.name not in ("sgd", "adamw"):
            raise ValueError(f"optimizer.name must be 'sgd' or 'adamw', got {self.name!r}")
        where, scales = "optimizer.", {"weight_decay": self.weight_decay, "backbone_scale": self.backbone_scale}
        check_numbers("must be positive and finite", where, lr=self.lr)
        check_numbers("must be in 0..1, below 1", where, momentum=self.momentum)
        check_numbers("must not be negative or infinite", where, **scales)
        check_numbers("must be in 0..1, above 0", where, layer_decay=self.layer_decay)

    def build(self, backbone: nn.Module, *others: nn.Module) -> torch.optim.Optimizer:
        """Make the optimizer.

        Args:
            backbone: its network is updated at lower rates; of a module that is no `Backbone` all is the network.
            others: updated at ``lr``.

        Returns:
            With the backbone's groups of parameters before those of the others, lower rates first, decayed ones before the
            others of their rate: four with the default rates. Parameters that need no gradient are in none.

        Raises:
            UsageError: "adamw" and weights in float16.
        """
        depths = backbone.depths() if isinstance(backbone, Backbone) else depths_of(backbone)
        count = max(depths.values(), default=0) + 1
        rates = {name: self.backbone_scale * self.layer_decay ** (count - depth) for name, depth in depths.items()}
        groups = []
        for modules, factors in (((backbone,), rates), (others, {})):
            found: dict[tuple[float, bool], list[nn.Parameter]] = {}  # factor, whether it is not decayed
            for name, parameter in (pair for module in modules for pair in module.named_parameters()):
                if parameter.requires_grad:
                    bare = parameter.ndim <= 1 or POSITIONS.search(name.rpartition(".")[2]) is not None
                    found.setdefault((factors.get(name, 1.0), bare), []).append(parameter)
            for factor, bare in sorted(found):
                decay = 0.0 if bare else self.weight_decay
                groups.append({"params": found[factor, bare], "lr": self.lr * factor, "weight_decay": decay})
        if self.name == "adamw" and any(p.dtype == torch.float16 for group in groups for p in group["params"]):
            raise UsageError(
                "optimizer.name 'adamw' cannot train weights in float16, where its smallest divisor, 1e-8, is 0; "
                "give trainer.precision 16-mixed or bf16-true, or optimizer.name sgd"
            )
        if self.name == "sgd":
            return torch.optim.SGD(groups, lr=self.lr, momentum=self.momentum)
        return torch.optim.AdamW(groups, lr=self.lr, betas=(self.momentum, 0.999))


@dataclass(frozen=True)
class LRSchedule:
    """How the learning rate changes from step to step.

    Args:
        name: "step" multiplies by ``gamma`` at each of ``milestones``; "cosine" falls to ``final`` at the last step.
        warmup: the rate rises linearly over this part of training.
        milestones: parts of training, rising, in 0..1.
        gamma: factor at each milestone.
        final: factor at the end of "cosine".

    Raises:
        ValueError: a number outside its range, or a milestone of "step" inside the warm-up.
    """

    name: Literal["step", "cosine"] = "step"
    warmup: float = 0.01
    milestones: tuple[float, ...] = (0.75,)
    gamma: float = 0.1
    final: float = 0.0

    def __post_init__(self) -> None:
        if self.name not in ("step", "cosine"):
            raise ValueError(f"lr_scheduler.name must be 'step' or 'cosine', got {self.name!r}")
        check_numbers("must be in 0..1, below 1", "lr_scheduler.", warmup=self.warmup)
        check_numbers("must be in 0..1", "lr_scheduler.", milestones=self.milestones)
        check_numbers("must not be negative or infinite", "lr_scheduler.", gamma=self.gamma, final=self.final)
        if list(self.milestones) != sorted(self.milestones):
            raise ValueError(f"lr_scheduler: expected rising milestones, got {self.milestones}")
        if self.name == "step" and any(part < self.warmup for part in self.milestones):
            raise ValueError(
                f"lr_scheduler: the milestone {self.milestones[0]:g} lies inside the warm-up, which ends at {self.warmup:g}; "
                "give a later milestone or a shorter warmup"
            )

    def factor(self, total: int) -> Callable[[int], float]:
        """Make the function of the step, from 0, that multiplies the learning rate in a training of so many steps."""
        warmup = round(self.warmup * total)

        def factor(step: int) -> float:
            if step < warmup:
                return (step + 1) / (warmup + 1)
            if self.name == "step":
                return self.gamma ** sum(step >= part * total for part in self.milestones)
            progress = (step - warmup) / max(1, total - warmup)
            return self.final + (1 - self.final) * (1 + math.cos(math.pi * min(1.0, progress))) / 2

        return factor


def configure(
    optimizer: Optimizer, schedule: LRSchedule, steps: float, backbone: nn.Module, *others: nn.Module
) -> dict[str, Any]:
    """Build optimizer and schedule as ``configure_optimizers`` returns them; the schedule is stepped after every batch.

    Raises:
        UsageError: the number of steps, ``trainer.estimated_stepping_batches``, is not finite.
    """
    if not math.isfinite(steps):
        raise UsageError("training never ends: set trainer.max_epochs or trainer.max_steps, the schedule needs the end")
    built = optimizer.build(backbone, *others)
    scheduler = torch.optim.lr_scheduler.LambdaLR(built, schedule.factor(int(steps)))
    return {"optimizer": built, "lr_scheduler": {"scheduler": scheduler, "interval": "step", "name": "lr"}}

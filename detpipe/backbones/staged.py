"""Networks of a stem and of stages, some of which are levels: what the residual networks and Inception share."""

from __future__ import annotations

from abc import ABC
from collections.abc import Iterable, Sequence
from typing import Any, Self

from torch import Tensor, nn

from detpipe.backbones.laterals import ProjectedBackbone
from detpipe.backbones.regime import Regime, checkpointed, freeze

LEVELS = ("c2", "c3", "c4", "c5")


class StagedBackbone(ProjectedBackbone, ABC):
    """A stem, then stages of blocks; stages after the last level that is asked for are not built.

    Attributes:
        stem: before the first stage.
        stages: name -> blocks.
        regime: how it is trained.
        frozen: names of stages that are not trained, or ``stem``.
    """

    stem: nn.Sequential
    stages: nn.ModuleDict
    regime: Regime
    frozen: tuple[str, ...]

    def train(self, mode: bool = True) -> Self:
        """Switch to training, except for frozen stages, which keep weights and statistics."""
        super().train(mode)
        freeze(self.stem if name == "stem" else self.stages[name] for name in self.frozen)
        return self

    def _through(self, stages: Iterable[tuple[str, Any]], x: Tensor, wanted: Sequence[str]) -> dict[str, Tensor]:
        """Run stages one after the other; the outputs of those that are wanted."""
        maps = {}
        for name, stage in stages:
            for block in stage:
                x = checkpointed(block, x) if self.regime.checkpointing else block(x)
            if name in wanted:
                maps[name] = x
        return maps


def choose_levels(levels: Sequence[str]) -> tuple[str, ...]:
    """Put the levels that are asked for in order, finest first; a ValueError where they are not distinct names of levels."""
    if isinstance(levels, str) or not levels or not set(levels) <= set(LEVELS) or len(set(levels)) < len(levels):
        raise ValueError(f"levels must be distinct names out of {list(LEVELS)}, got {levels!r}")
    return tuple(level for level in LEVELS if level in levels)

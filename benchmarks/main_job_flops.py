"""How many floating-point operations does the training of a configuration take, and where?

One training batch, forward and backward, and one batch of validation, which computes losses and detections from the same
features, are counted by ``torch.utils.flop_counter``: convolutions and matrix products, two operations a multiply-add; RoI
operators, norms and activations are not counted. Both are multiplied by the images and the epochs of the configuration. Shapes
decide, so that random weights serve; all images are taken to be like those of the first batch.

The graph is cut at the features, so that the backward passes of backbone, proposals and head are counted one by one.
"""

from __future__ import annotations

import re
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from detpipe.commands.training import add_arguments
from detpipe.detector import TwoStageDetector, total_loss
from detpipe.training.configuration import CLI

STAGE = re.compile(r"\.(stem|stages\.\w+)(?:\.\d+)?$")  # of a backbone: blocks add up to their stage
NECK = "laterals"  # or a pyramid, and what else is in a backbone


def count(detector: TwoStageDetector, batch: Any, training: bool) -> dict[str, float]:
    """Count a step: part of the detector -> GFLOP an image; the parts of the backbone first."""
    maps: dict[str, Tensor] = {}
    leaves: dict[str, Tensor] = {}
    source_losses: dict[str, Tensor] = {}

    def cut(_module: Any, _inputs: Any, features: dict[str, Tensor]) -> dict[str, Tensor]:
        maps.update(features)
        leaves.update({name: level.detach().requires_grad_(training) for name, level in features.items()})
        return dict(leaves)

    def keep(_module: Any, _inputs: Any, output: tuple[list[Tensor], dict[str, Tensor]]) -> None:
        source_losses.update(output[1])

    detector.train(training)
    hooks = [detector.backbone.register_forward_hook(cut), detector.proposals.register_forward_hook(keep)]
    with torch.set_grad_enabled(training), FlopCounterMode(display=False) as counter:
        counted = partial(_count, counter, len(batch[0]))
        losses, forward = counted(lambda: detector.losses(*batch) if training else detector.validation_step(batch, 0))
        backbone, source = (forward.get(type(part).__name__, 0.0) for part in (detector.backbone, detector.proposals))
        parts = Counter(_stages(forward, backbone))
        parts.update({"proposals": source, "head": forward["Global"] - backbone - source})
        if training:
            if any(loss.requires_grad for loss in source_losses.values()):
                parts["proposals"] += counted(total_loss(source_losses).backward)[1]["Global"]
            head_losses = {name: loss for name, loss in losses.items() if name not in source_losses}
            parts["head"] += counted(total_loss(head_losses).backward)[1]["Global"]
            used = [name for name, leaf in leaves.items() if leaf.grad is not None]
            grads = [leaves[name].grad for name in used]
            _, through = counted(lambda: torch.autograd.backward([maps[name] for name in used], grads))
            parts.update(_stages(through, through["Global"]))
    for hook in hooks:
        hook.remove()
    return dict(parts)


def _count(counter: FlopCounterMode, images: int, step: Callable[[], Any]) -> tuple[Any, dict[str, float]]:
    """Run a step: what it returns, and module -> GFLOP an image."""
    before, result = counter.get_flop_counts(), step()
    after = counter.get_flop_counts()
    return result, {
        name: (sum(found.values()) - sum(before.get(name, {}).values())) / images / 1e9 for name, found in after.items()
    }


def _stages(found: dict[str, float], backbone: float) -> dict[str, float]:
    """Stages of the backbone, by the names of its modules, and what is left of it."""
    stages: Counter[str] = Counter()
    for name, value in found.items():
        if match := STAGE.search(name):
            stages[match[1]] += value
    return {**stages, NECK: backbone - sum(stages.values())}


def main(arguments: Sequence[str]) -> None:
    """Print the table of a configuration."""
    cli = CLI(arguments, add_arguments)
    data, settings = cli.datamodule, cli.config.trainer
    data.prepare_data()
    data.setup("fit")
    cli.model.on_validation_epoch_start()
    epochs, every = settings.max_epochs, settings.check_val_every_n_epoch or 1
    images = [epochs * len(data.annotations("train")), epochs // every * len(data.annotations("val"))]
    columns = [
        count(cli.model, next(iter(data.train_dataloader())), training=True),
        count(cli.model, next(iter(data.val_dataloader())), training=False),
    ]
    sums = [sum(column.values()) for column in columns]
    print(f"{'GFLOP/image':20}{'training':>12}{'validation':>12}")
    for part in columns[0]:
        print(f"{part:20}" + "".join(f"{column.get(part, 0.0):12.3f}" for column in columns))
    print(f"{'sum':20}" + "".join(f"{value:12.3f}" for value in sums))
    print(f"{'images':20}" + "".join(f"{number:12}" for number in images))
    total = sum(value * number for value, number in zip(sums, images, strict=True)) / 1000
    print(f"{'TFLOP':20}{total:12.1f}")


if __name__ == "__main__":
    main(sys.argv[1:])

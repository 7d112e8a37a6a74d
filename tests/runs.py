"""Tiny training runs that the tests of the commands share: 12 scenes of 64 pixels, a network of two blocks."""

from __future__ import annotations

import csv
import json
import signal
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch

from detpipe import cli
from detpipe.training import callbacks
from detpipe.training.configuration import CLI

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
CONFIG = str(CONFIGS / "fast_rcnn_se.yaml")
SCENES = {"train": 12, "val": 6, "size": 64}
MODEL = [
    *("--model.min_size", "64"),
    *("--model.max_size", "64"),
    *("--model.backbone.levels", "[c2]"),
    *("--model.backbone.out_channels", "8"),
    *("--model.proposals.anchors.sizes", "[20, 28]"),
    *("--model.head.fc", "[16]"),
    *("--model.head.sampler.rois_per_image", "16"),
    *("--model.head.postprocess.score_threshold", "0.01"),
]


class NotBuilt:
    """A configuration that is parsed, but not built: the data may be missing."""

    def instantiate_classes(self) -> None:
        """Leave it at the configuration."""


class Parsed(NotBuilt, CLI):
    """That of a detector."""


def mostly_slow(cases: Iterable[Any], *quick: Any) -> list[Any]:
    """Cases, of which a few, of files by their stem, stand for all where time is short."""
    names = [(case, case.stem if isinstance(case, Path) else case) for case in cases]
    return [case if name in quick else pytest.param(case, marks=pytest.mark.slow) for case, name in names]


def demo(root: Path) -> list[str]:
    """Options that put the tiny demo set, generated on first use, in place of the demo set."""
    return ["--data.root", str(root), "--data.scenes", str(SCENES)]


def options(root: Path, epochs: int = 2) -> list[str]:
    """Options that make the first configuration tiny."""
    trainer = ["--trainer.accelerator", "cpu", "--trainer.max_epochs", str(epochs), "--trainer.log_every_n_steps", "1"]
    return [*demo(root), *MODEL, "--data.loader.batch_size", "4", *trainer]


def weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    """The weights in a checkpoint."""
    return torch.load(checkpoint, weights_only=True)["state_dict"]


def assert_equal_weights(one: Path, other: Path) -> None:
    """Two checkpoints hold the same weights, to the bit."""
    first, second = weights(one), weights(other)
    assert first.keys() == second.keys()
    assert [name for name in first if not torch.equal(first[name], second[name])] == []


def summary(folder: Path) -> dict[str, Any]:
    """What a finished run says of itself."""
    return json.loads((folder / "summary.json").read_text())


def rows(folder: Path) -> list[dict[str, str]]:
    """The metrics of a run."""
    with (folder / "metrics.csv").open(newline="") as stream:
        return list(csv.DictReader(stream))


class StopAfter(callbacks.StepSeed):
    """Interrupt training, as with the keyboard, before a step."""

    step = 4  # in the second epoch, after the checkpoint of the first, whose trace in the metrics must go

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Stop, or go on."""
        if trainer.global_step == self.step:
            raise KeyboardInterrupt
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)


def interrupt(arguments: list[str], step: int = 4) -> None:
    """Run a command that an interrupt ends before a step; Lightning ignores interrupts once it has seen one."""
    before = signal.getsignal(signal.SIGINT)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(callbacks, "StepSeed", StopAfter)
        patched.setattr(StopAfter, "step", step)
        assert cli.main(arguments) == 130
    signal.signal(signal.SIGINT, before)

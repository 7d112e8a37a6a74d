"""Tiny training runs that the tests of the commands share: 12 scenes of 64 pixels, a network of two blocks."""

from __future__ import annotations

from pathlib import Path

import torch

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

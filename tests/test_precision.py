"""Training, validation and detection in every precision that Lightning has on a CPU, through the command."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import runs
import torch

from detpipe import cli, load_detector

TINY = [*runs.MODEL, "--data.loader.batch_size", "4"]
PYRAMID = [
    *(
        "--model.min_size",
        "64",
        "--model.max_size",
        "64",
        "--model.backbone.out_channels",
        "8",
        "--model.head.fc",
        "[16]",
    ),
    *("--model.backbone.backbone.levels", "[c2, c3]", "--model.proposals.anchors.sizes", "[[20], [28]]"),
]
ANCHORS = TINY.index("--model.proposals.anchors.sizes")
WITHOUT_RPN = [*TINY[:ANCHORS], *TINY[ANCHORS + 2 :]]
MODELS: dict[str, list[str]] = {
    "fast_rcnn_se": ["fast_rcnn_se.yaml", *TINY],
    "max pooling": ["fast_rcnn_se.yaml", *TINY, "--model.head.pooler", "RoIMaxPool"],
    "grid": ["fast_rcnn_se.yaml", "proposals/dense_grid.yaml", *WITHOUT_RPN],
    "glimpse": ["fast_rcnn_se_stn.yaml", *TINY],
    "cascade": ["cascade.yaml", *TINY],
    "reinforce": ["aod.yaml", *TINY],
    "pathwise": ["aod.yaml", *TINY, "--model.head.estimator", "Pathwise", "--model.head.pooler", "RoIAlign"],
    "pyramid": ["faster_rcnn_se_fpn.yaml", *PYRAMID],
}


def train(name: str, precision: str, root: Path, output: Path) -> int:
    configs, options = [], []
    for option in MODELS[name]:
        (configs if option.endswith(".yaml") else options).append(option)
    trainer = ["--trainer.accelerator", "cpu", "--trainer.max_epochs", "1", "--trainer.log_every_n_steps", "1"]
    more = ["--output", str(output), "--trainer.precision", precision]
    return cli.main(["train", *(str(runs.CONFIGS / c) for c in configs), *runs.demo(root), *options, *trainer, *more])


@pytest.mark.parametrize("name", MODELS)
def test_float64(name: str, demo_root: Path, tmp_path: Path) -> None:
    assert train(name, "64-true", demo_root, tmp_path / "run") == 0
    assert {value.dtype for value in runs.weights(tmp_path / "run" / "best.ckpt").values()} <= {
        torch.float64,
        torch.int64,
    }
    assert 0 <= json.loads((tmp_path / "run" / "summary.json").read_text())["AP"] <= 1
    detector, _ = load_detector(tmp_path / "run" / "best.ckpt")
    image = torch.randint(0, 256, (3, 64, 64), dtype=torch.uint8)
    for model in (detector, detector.double()):  # read again in float32, then as it was
        [found] = model([image])
        assert {value.dtype for value in found.values()} == {torch.float32, torch.int64}

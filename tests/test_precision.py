"""Training, validation and detection in every precision that Lightning has on a CPU, through the command."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import runs
import torch

from detpipe import cli, load_detector
from detpipe.proposals import Anchors, DenseGrid
from detpipe.training.trainer import build_trainer

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


def train(name: str, precision: str, root: Path, output: Path, *others: str) -> int:
    configs, options = [], []
    for option in MODELS[name]:
        (configs if option.endswith(".yaml") else options).append(option)
    trainer = ["--trainer.accelerator", "cpu", "--trainer.max_epochs", "1", "--trainer.log_every_n_steps", "1"]
    more = ["--output", str(output), "--trainer.precision", precision, *others]
    return cli.main(["train", *(str(runs.CONFIGS / c) for c in configs), *runs.demo(root), *options, *trainer, *more])


@pytest.mark.parametrize(
    ("name", "precision"),
    [
        pytest.param("cascade", "bf16-mixed", marks=pytest.mark.slow),
        *(pytest.param(name, "bf16-true", marks=pytest.mark.slow) for name in ("fast_rcnn_se", "cascade", "pyramid")),
    ],
)
def test_bfloat16(name, precision, demo_root, tmp_path):
    assert train(name, precision, demo_root, tmp_path / "run") == 0


@pytest.mark.slow
def test_float16_weights_need_sgd(demo_root, tmp_path, capsys):
    assert train("fast_rcnn_se", "16-true", demo_root, tmp_path / "run") == 2
    [line] = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert "optimizer.name 'adamw' cannot train weights in float16" in line
    sgd = ["--model.optimizer.name", "sgd", "--model.optimizer.lr", "1e-4"]
    assert train("fast_rcnn_se", "16-true", demo_root, tmp_path / "sgd", *sgd) == 0


def test_anchors_and_grids_are_float32_in_every_precision():
    """In bfloat16 a coordinate of 300 pixels would be off by one."""
    before = torch.get_default_dtype()
    want = [*Anchors(sizes=[32]).grids([(40, 50)], [16]), DenseGrid(scales=[32])._lay(300, 310)]
    try:
        for dtype in (torch.bfloat16, torch.float64):
            torch.set_default_dtype(dtype)
            [grid], boxes = Anchors(sizes=[32]).grids([(40, 50)], [16]), DenseGrid(scales=[32])._lay(300, 310)
            assert all(torch.equal(*pair) for pair in ((grid.x, want[0].x), (grid.y, want[0].y), (boxes, want[1])))
    finally:
        torch.set_default_dtype(before)


@pytest.mark.parametrize("precision", ["bf16-true", "16-true"])
def test_targets_stay_in_float32(precision):
    """In bfloat16 301.3 pixels would be 302."""
    trainer = build_trainer({"accelerator": "cpu", "precision": precision, "use_distributed_sampler": False})
    boxes = torch.tensor([[301.3, 0.1, 402.7, 50.9]])
    images, [target] = trainer.precision_plugin.convert_input((torch.ones(1, 3, 4, 4), [{"boxes": boxes}]))
    assert trainer.precision == precision
    assert images.dtype == (torch.bfloat16 if precision == "bf16-true" else torch.float16)
    assert torch.equal(target["boxes"], boxes)


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_float64(name, demo_root, tmp_path):
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

"""Trainings that begin with the weights of another detector."""

from __future__ import annotations

from pathlib import Path

import pytest
import runs
import torch

from detpipe import cli
from detpipe.support.errors import CheckpointError
from detpipe.training.checkpoint import Description
from detpipe.training.fine_tuning import _rows, load_fitting
from detpipe.training.models import load_classifier, load_detector


def rows_of(weight: torch.Tensor, names: tuple[str, ...], name: str, background: int, each: int) -> torch.Tensor:
    start = background + each * names.index(name)
    return weight[start : start + each]


@pytest.fixture
def with_a_box_for_each_class(demo_root: Path, tmp_path: Path) -> Path:
    options = ["--model.head.class_agnostic", "false", "--trainer.limit_train_batches", "1"]
    assert train(demo_root, tmp_path / "own", *options) == 0
    return tmp_path / "own" / "best.ckpt"


@pytest.fixture
def saved(with_a_box_for_each_class: Path, tmp_path: Path) -> tuple[Path, Description]:
    """A checkpoint of ten digits, whose class names are made to be others: the first two change places, the last is new."""
    content = torch.load(with_a_box_for_each_class, weights_only=True)
    content["detpipe"]["class_names"] = ["1", "0", *"2345678", "ten"]
    torch.save(content, tmp_path / "other.ckpt")
    return tmp_path / "other.ckpt", load_detector(tmp_path / "other.ckpt")[1]


def test_outputs_of_classes_are_taken_over_by_name(saved, with_a_box_for_each_class):
    path, description = saved
    given = runs.weights(path)
    detector, own = load_detector(with_a_box_for_each_class)
    with torch.no_grad():
        for parameter in detector.parameters():
            parameter.fill_(7.0)
    line = load_fitting(detector, path, own.class_names)
    assert f"from {path}: " in line
    assert "outputs of 9 of 10 classes (0, 1, 2, 3, 4 and 4 more)" in line
    state = detector.state_dict()
    for name, background, each in (("head.classifier", 1, 1), ("head.regressor", 0, 4)):
        for tensor in ("weight", "bias"):
            now, before = state[f"{name}.{tensor}"], given[f"{name}.{tensor}"]
            for digit in "012345678":
                want = rows_of(before, description.class_names, digit, background, each)
                assert torch.equal(rows_of(now, own.class_names, digit, background, each), want)
            assert (rows_of(now, own.class_names, "9", background, each) == 7).all()
            assert torch.equal(now[:background], before[:background])
    others = [name for name in given if not name.startswith(("head.classifier", "head.regressor"))]
    assert all(torch.equal(state[name], given[name]) for name in others)


def train(root: Path, folder: Path, *options: str) -> int:
    return cli.main(["train", runs.CONFIG, *runs.options(root, 1), "--output", str(folder), *options])


def test_another_head_and_other_levels_take_what_fits(trained, demo_root, tmp_path, capsys):
    changed = ["--model.head.fc", "[24]", "--model.backbone.levels", "[c2, c3]", "--trainer.limit_train_batches", "1"]
    assert train(demo_root, tmp_path / "run", "--init_from", str(trained / "best.ckpt"), *changed) == 0
    [line] = [one for one in capsys.readouterr().out.splitlines() if one.startswith("from ")]
    assert "new: backbone.stages (" in line
    assert "backbone.laterals (" in line
    assert "of another shape: " in line
    assert "head.shared (2)" in line
    assert "head.classifier (1)" in line  # its bias fits, class by class
    assert "outputs of 10 of 10 classes" in line
    assert "--init_from" not in (tmp_path / "run" / "config.yaml").read_text()


def test_training_begins_with_the_weights(trained, demo_root, tmp_path):
    frozen = [
        "--model.optimizer.lr",
        "1e-30",
        "--model.optimizer.weight_decay",
        "0",
        "--trainer.limit_train_batches",
        "1",
    ]
    assert train(demo_root, tmp_path / "run", "--init_from", str(trained / "best.ckpt"), *frozen) == 0
    before, after = runs.weights(trained / "best.ckpt"), runs.weights(tmp_path / "run" / "last.ckpt")
    assert all(
        torch.equal(after[name], value)
        for name, value in before.items()
        if "running" not in name and "num_b" not in name
    )
    stored = torch.load(tmp_path / "run" / "last.ckpt", weights_only=True)
    assert stored["global_step"] == 1  # a training of its own, not the rest of the other


@pytest.mark.slow
def test_what_cannot_begin_a_training(trained, demo_root, tmp_path, capsys):
    best = str(trained / "best.ckpt")
    for options, told, status in (
        (["--init_from", best, "--ckpt_path", best], "--init_from begins a training, --ckpt_path goes on with one", 2),
        (["--init_from", str(trained)], f"{trained} is a folder; give a file in it, such as {best}", 1),
        (["--accept_changes", "lr"], "--accept_changes is for a training that goes on: add --ckpt_path", 2),
        (["--output", best], f"--output {best}: is a file: name a folder", 2),
        (["--init_from", str(tmp_path / "none.ckpt")], f"checkpoint {tmp_path / 'none.ckpt'} does not exist", 1),
    ):
        assert train(demo_root, tmp_path / "run", *options) == status
        assert told in capsys.readouterr().err
        assert not (tmp_path / "run").exists()
    _, description = load_detector(best)
    with pytest.raises(CheckpointError, match=r"none of its .* tensors fits this model"):
        load_fitting(torch.nn.Linear(2, 2), best, description.class_names)
    with pytest.raises(CheckpointError, match="is of a detector"):
        load_classifier(best)


@pytest.mark.slow
def test_a_requeued_fine_tuning_goes_on_instead_of_beginning(trained, demo_root, tmp_path, capsys):
    options = ["--init_from", str(trained / "best.ckpt"), "--ckpt_path", "last"]
    assert train(demo_root, tmp_path / "run", *options) == 0
    shown = capsys.readouterr().out
    assert "training starts anew" in shown
    assert "outputs of 10 of 10 classes" in shown
    (tmp_path / "run" / "summary.json").unlink()
    assert train(demo_root, tmp_path / "run", *options) == 0
    shown = capsys.readouterr().out
    assert f"going on from {tmp_path / 'run' / 'last.ckpt'}, step 3" in shown
    assert "outputs of" not in shown


def test_rows_behind_those_of_classes_belong_to_none():
    own, given = torch.zeros(1 + 2 + 3, 4), torch.arange(1.0, 7.0)[:, None].expand(6, 4)
    taken = _rows(own, given, (1, 1), ("dog", "new"), ("cat", "dog"))
    assert taken is not None
    assert taken[:, 0].tolist() == [1, 3, 0, 4, 5, 6]  # background, dog, new, as many others as there are
    taken = _rows(own, given[:4], (1, 1), ("dog", "new"), ("cat", "dog", "owl"))
    assert taken is not None
    assert taken[:, 0].tolist() == [1, 3, 0, 0, 0, 0]
    assert _rows(own, given[:3], (1, 1), ("dog", "new"), ("cat", "dog", "owl")) is None

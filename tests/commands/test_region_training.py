"""Training a classifier of regions through the command, on tiny scenes, and what its checkpoint is good for."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import runs
import torch
from lightning import LightningModule
from PIL import Image

from detpipe import cli
from detpipe.commands.training import RegionCLI, add_arguments
from detpipe.demo import Demo, DemoScenes
from detpipe.regions.region_classifier import RegionClassifier
from detpipe.support.errors import CheckpointError
from detpipe.training import checkpoint
from detpipe.training.models import load_classifier, load_detector, load_region_classifier, load_region_model

CONFIG = str(runs.CONFIGS / "region_classifier.yaml")
OVERLAY = runs.CONFIGS / "regions" / "bccd.yaml"
RESULT = re.compile(r"mean_class_accuracy (\d\.\d{3}) accuracy (\d\.\d{3}) checkpoint (\S+)")


class Parsed(runs.NotBuilt, RegionCLI):
    """A configuration that is parsed, but not built."""


def options(root: Path, *more: str) -> list[str]:
    trainer = ["--trainer.accelerator", "cpu", "--trainer.max_epochs", "2", "--trainer.log_every_n_steps", "1"]
    sizes = ["--model.min_size", "64", "--model.max_size", "64", "--data.loader.batch_size", "4"]
    network = [
        "--model.backbone.levels",
        "[c2]",
        "--model.backbone.out_channels",
        "8",
        "--model.classification.fc",
        "[16]",
    ]
    return [*runs.demo(root), *trainer, *sizes, *network, *more]


@pytest.fixture(scope="session")
def trained_regions(demo_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of a tiny training; read it, do not write to it."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("regions") / "run"
    dropout = ["--model.classification.dropout", "0.1"]
    assert cli.main(["train_regions", CONFIG, "--output", str(folder), *options(demo_root, *dropout)]) == 0
    return folder


def test_a_run_leaves_everything_in_its_folder(trained_regions):
    assert {path.name for path in trained_regions.iterdir()} == {
        *("config.yaml", "metrics.csv", "tensorboard", "summary.json", "curves.png", "training.png"),
        *("best.ckpt", "best.ckpt.sha256", "last.ckpt", "last.ckpt.sha256"),
    }
    for name in ("curves.png", "training.png"):
        with Image.open(trained_regions / name) as image:
            assert min(image.size) > 100
    summary = runs.summary(trained_regions)
    scores = [
        float(row["val/mean_class_accuracy"]) for row in runs.rows(trained_regions) if row["val/mean_class_accuracy"]
    ]
    assert len(scores) == 2
    assert summary["mean_class_accuracy"] == pytest.approx(max(scores), abs=1e-6)
    assert summary["epoch"] == scores.index(max(scores))
    assert 0 <= summary["accuracy"] <= 1
    assert (summary["epochs"], summary["checkpoint"]) == (2, str(trained_regions / "best.ckpt"))


@pytest.mark.slow
def test_the_stored_configuration_trains_again_to_the_bit(trained_regions, tmp_path, capsys):
    again = tmp_path / "again"
    assert cli.main(["train_regions", str(trained_regions / "config.yaml"), "--output", str(again)]) == 0
    found = RESULT.fullmatch(capsys.readouterr().out.splitlines()[-1])
    assert found is not None
    assert found[3] == str(again / "best.ckpt")
    summary = runs.summary(again)
    assert [float(found[1]), float(found[2])] == pytest.approx(
        [summary["mean_class_accuracy"], summary["accuracy"]], abs=6e-4
    )
    runs.assert_equal_weights(trained_regions / "last.ckpt", again / "last.ckpt")


@pytest.mark.slow
def test_a_resumed_run_ends_with_the_weights_of_an_undisturbed_one(trained_regions, tmp_path, capsys):
    folder, config = tmp_path / "run", str(trained_regions / "config.yaml")
    runs.interrupt(["train_regions", config, "--output", str(folder)])
    assert "interrupted" in capsys.readouterr().err
    assert cli.main(["train_regions", config, "--output", str(folder), "--ckpt_path", str(folder / "last.ckpt")]) == 0
    runs.assert_equal_weights(folder / "last.ckpt", trained_regions / "last.ckpt")
    keys = ("step", "train/loss", "val/accuracy", "val/loss")
    assert [[row[k] for k in keys] for row in runs.rows(folder)] == [
        [row[k] for k in keys] for row in runs.rows(trained_regions)
    ]


def test_a_checkpoint_is_rebuilt_alone_and_scores_as_it_says(trained_regions, demo_root):
    model, description = load_region_classifier(trained_regions / "best.ckpt")
    assert isinstance(model, RegionClassifier)
    assert not model.training
    assert description.class_names == tuple("0123456789")
    assert model.num_classes == 10
    data = Demo(str(demo_root), scenes=DemoScenes(**runs.SCENES)).dataset("val")
    hits = []
    for index in range(len(data)):
        image, target = data[0, index]
        [found] = model.predict([image], [target["boxes"]])
        hits += (found["labels"] == target["labels"]).tolist()
    summary = runs.summary(trained_regions)
    assert sum(hits) / len(hits) == pytest.approx(summary["accuracy"], abs=1e-6)


def test_kinds_of_checkpoints_are_told_apart(trained_regions, tmp_path):
    path = trained_regions / "best.ckpt"
    for load, expected in (
        (load_detector, "a detector that 'detpipe train' wrote"),
        (load_classifier, "one that 'detpipe pretrain' wrote"),
    ):
        with pytest.raises(CheckpointError, match=f"is of a RegionClassifier; expected {expected}"):
            load(path)
    content = torch.load(path, weights_only=True)
    described = content[checkpoint.KEY]["model"]
    assert described["class_path"].startswith("detpipe.")
    for model, message in (
        ({"head": {}}, "is of a detector; expected one that 'detpipe train_regions' wrote"),
        ({"label_smoothing": 0}, "is of a classifier of whole images; expected"),
        ({"class_path": "os.system", "init_args": {}}, "class 'os.system' is not allowed, since"),
        (described["init_args"]["backbone"], "SEResNet|belongs to another model"),
    ):
        content[checkpoint.KEY]["model"] = model
        torch.save(content, tmp_path / "other.ckpt")
        with pytest.raises(CheckpointError, match=message):
            load_region_classifier(tmp_path / "other.ckpt")


@pytest.mark.slow
def test_any_model_that_says_what_is_best_can_be_trained(demo_root, tmp_path, capsys):
    arguments = ["train_regions", "--model", f"{__name__}.Constant", "--data", "Demo", *runs.demo(demo_root)]
    arguments += ["--trainer.max_epochs", "2", "--trainer.accelerator", "cpu"]
    assert cli.main(arguments) == 2
    assert f"'{__name__}.Constant' is not one of detpipe's; if you trust its code" in capsys.readouterr().err
    arguments += ["--trust", __name__]
    assert cli.main([*arguments, "--output", str(tmp_path / "a")]) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == f"level 1.000 other 0.500 checkpoint {tmp_path / 'a' / 'best.ckpt'}"
    assert torch.load(tmp_path / "a" / "best.ckpt", weights_only=True)["epoch"] == 1
    assert cli.main([*arguments, "--model.logs", "false", "--output", str(tmp_path / "b")]) == 1
    assert "Constant is to be watched by 'val/level', but logged ['val/other']" in capsys.readouterr().err
    with pytest.raises(CheckpointError, match=r"class '.*Constant' is not one of detpipe's"):
        load_region_model(tmp_path / "a" / "best.ckpt")
    assert isinstance(load_region_model(tmp_path / "a" / "best.ckpt", trust=(__name__,))[0], Constant)


class Constant(LightningModule):
    """A model of other people: it has no classes, and gets better by the epoch."""

    watched = "val/level"

    def __init__(self, logs: bool = True) -> None:
        super().__init__()
        self.weight, self.logs = torch.nn.Parameter(torch.zeros(())), logs

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return self.weight.square()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val/other", 0.5, batch_size=1)
        if self.logs:
            self.log("val/level", float(self.current_epoch), batch_size=1)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.1)


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["--model.contxt.factors", "[1.0]"], 2, "model.contxt: unknown key; did you mean 'context'?"),
        (["--model.context.factor", "[1.0]"], 2, "did you mean 'factors'?"),
        (["--model.context.factors", "[]"], 2, "context.factors: expected at least one positive number, got []"),
        (["--model.classification.class_weights", "[1.0, 2.0]"], 2, "class_weights: expected 10, one a class"),
        (["--model", "RegionClasifier"], 2, "model: unknown class 'RegionClasifier'; did you mean 'RegionClassifier'"),
        (["--model", "SEResNet"], 2, "SEResNet cannot be trained by this command, it has no class attribute 'watched'"),
        (["--model.num_classes", "3"], 2, "model.num_classes follows the classes of the data; remove it"),
        (["--model.backbone.dept", "3"], 2, "did you mean 'depth'?"),
        (
            ["--data", "DemoDigits"],
            2,
            "data: unknown class 'DemoDigits'; expected COCO, CSVBoxes, Demo, Shards, VOC, YOLO,",
        ),
        (["--data", "VOC", "--data.root", "nowhere", "--data.train", "train", "--data.val", "val"], 1, "nowhere"),
        (["--ckpt_path", "nowhere.ckpt"], 1, "checkpoint nowhere.ckpt does not exist"),
    ],
)
def test_mistakes_are_one_line(arguments, status, message, demo_root, capsys):
    given = options(demo_root) if "--data" not in arguments and "SEResNet" not in arguments else []
    assert cli.main(["train_regions", CONFIG, *given, *arguments]) == status
    [line] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("detpipe: error:")]
    assert message in line


def test_an_overlay_of_a_detector_is_refused(capsys):
    assert cli.main(["train_regions", CONFIG, str(runs.CONFIGS / "data" / "bccd_small.yaml")]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("detpipe: error: model.proposals: unknown key; expected backbone, classification, context,")


@pytest.mark.parametrize("path", [Path(CONFIG), OVERLAY], ids=lambda path: path.stem)
def test_the_header_shows_the_command(path):
    header = "".join(line for line in path.read_text().splitlines(keepends=True) if line.startswith("#"))
    commands = re.findall(r"^#   python tools/train_regions\.py (.*)$", header, re.MULTILINE)
    assert commands
    for command in commands:
        arguments = [str(runs.CONFIGS.parent / a) if a.endswith(".yaml") else a for a in command.split()]
        config = Parsed(arguments, add_arguments).config
        assert config.model.class_path.endswith(".RegionClassifier")
        assert config.seed_everything == 0
        expected = ("detpipe.VOC", 240) if str(OVERLAY) in arguments else ("detpipe.Demo", 160)
        assert (config.data.class_path, config.model.init_args.min_size) == expected


def test_the_examples_of_the_page_run_as_they_are_written(trained_regions, demo_root):
    page = (runs.CONFIGS.parent / "docs" / "region_classifier.md").read_text(encoding="utf-8")
    train, predict = re.findall(r"^```python\n(.*?)^```", page, flags=re.MULTILINE | re.DOTALL)
    names: dict[str, Any] = {}
    exec(compile(train, "region_classifier.md", "exec"), names)
    assert names["loss"].item() > 0
    assert all(p.grad is not None for p in names["model"].parameters())
    assert [one["labels"].shape for one in names["found"]] == [(2,), (0,)]
    assert len([line for line in train.splitlines() if line.strip() and not line.startswith(("import", "from"))]) <= 10
    for written, own in (
        ("RUN/best.ckpt", trained_regions / "best.ckpt"),
        ("scene.jpg", next((demo_root / "coco" / "val").iterdir())),
    ):
        assert predict.count(written) == 1
        predict = predict.replace(written, str(own))
    exec(compile(predict, "region_classifier.md", "exec"), names)
    assert len(names["labels"]) == 2


@pytest.mark.slow
def test_the_blood_cells_train_as_shown(shared_data, tmp_path):
    limits = ["--trainer.limit_train_batches", "2", "--trainer.limit_val_batches", "1", "--trainer.max_epochs", "1"]
    sizes = ["--model.min_size", "64", "--model.max_size", "96", "--trainer.accelerator", "cpu"]
    arguments = [CONFIG, str(OVERLAY), "--data.root", str(shared_data / "bccd"), *limits, *sizes]
    assert cli.main(["train_regions", *arguments, "--output", str(tmp_path / "run")]) == 0
    model, description = load_region_classifier(tmp_path / "run" / "best.ckpt")
    assert (model.num_classes, description.class_names) == (3, ("RBC", "WBC", "Platelets"))

"""Pretraining through the command, on tiny crops of digits, and what a detector makes of the weights."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import runs
import torch
from datasets.builders import picture
from PIL import Image
from safetensors import safe_open

from detpipe import cli
from detpipe.backbones import FPN, Extractor, Level, SEInceptionV3, SEResNet, SEResNeXt, SKNet
from detpipe.commands.training import WEIGHTS, PretrainingCLI, add_arguments, export_backbone
from detpipe.regions.image_classifier import ImageClassifier
from detpipe.support.errors import CheckpointError
from detpipe.training import callbacks, checkpoint
from detpipe.training.configuration import CLI
from detpipe.training.models import load_classifier, load_detector

FOLDER = runs.CONFIGS / "pretrain"
CONFIG = str(FOLDER / "se_resnet18.yaml")
MODELS = sorted(FOLDER.glob("se_*.yaml"))
RESULT = re.compile(r"top-1 (\d\.\d{3}) top-5 (\d\.\d{3}) weights (\S+)")


class Parsed(runs.NotBuilt, PretrainingCLI):
    """A configuration that is parsed, but not built."""


def digits(root: Path) -> list[str]:
    scenes = str({"train": 12, "val": 6, "size": 64})
    return ["--data.root", str(root / "digits"), "--data.demo", str(root / "demo"), "--data.scenes", scenes]


def options(root: Path, *more: str) -> list[str]:
    trainer = ["--trainer.accelerator", "cpu", "--trainer.max_epochs", "2", "--trainer.log_every_n_steps", "1"]
    tiny = ["--data.views.size", "32", "--data.loader.batch_size", "16", "--model.backbone.levels", "[c3]"]
    return [*digits(root), *trainer, *tiny, *more]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("pretraining")


@pytest.fixture(scope="module")
def pretrained(base: Path) -> Path:
    """The run folder of a tiny pretraining; read it, do not write to it."""
    torch.set_num_threads(1)
    folder = base / "run"
    assert cli.main(["pretrain", CONFIG, "--output", str(folder), *options(base, "--model.dropout", "0.1")]) == 0
    return folder


def test_a_run_leaves_everything_in_its_folder(pretrained):
    assert {path.name for path in pretrained.iterdir()} == {
        *("config.yaml", "metrics.csv", "tensorboard", "summary.json"),
        *("best.ckpt", "best.ckpt.sha256", "last.ckpt", "last.ckpt.sha256", "curves.png", WEIGHTS),
    }
    with Image.open(pretrained / "curves.png") as image:
        assert min(image.size) > 100
    result = runs.summary(pretrained)
    assert {"loss", "seconds", "images_per_second", "checkpoint", "weights", "seed", "epoch"} <= result.keys()
    assert 0 <= result["top1"] <= result["top5"] <= 1
    assert (result["epochs"], result["weights"]) == (2, str(pretrained / WEIGHTS))


def test_the_metrics_hold_training_and_validation(pretrained):
    table = runs.rows(pretrained)
    train, val = [[row for row in table if row[key]] for key in ("train/loss", "val/top1")]
    assert [int(row["step"]) for row in train] == list(range(len(train)))
    assert len(val) == 2
    assert all(float(row["train/top5"]) >= float(row["train/top1"]) for row in train)
    scores = [float(row["val/top1"]) for row in val]
    assert runs.summary(pretrained)["top1"] == pytest.approx(max(scores), abs=1e-6)
    assert runs.summary(pretrained)["epoch"] == scores.index(max(scores))
    assert float(val[0]["val/loss"]) > 0


def test_validation_counts_every_image_once(pretrained, base):
    classifier, description = load_classifier(pretrained / "best.ckpt")
    assert description.class_names == tuple("0123456789")
    data = PretrainingCLI([CONFIG, *options(base)], add_arguments).datamodule
    hits = total = 0
    with torch.inference_mode():
        for index in range(len(data.images("val"))):
            image, label, _ = data.dataset("val")[0, index]
            hits, total = hits + int(classifier(image[None]).argmax() == label), total + 1
    assert runs.summary(pretrained)["top1"] == pytest.approx(hits / total, abs=1e-6)


def test_the_last_line_is_the_result_and_training_twice_gives_identical_weights(pretrained, tmp_path, capsys):
    again = tmp_path / "again"
    assert cli.main(["pretrain", str(pretrained / "config.yaml"), "--output", str(again)]) == 0
    out = capsys.readouterr().out.rstrip("\n").splitlines()
    match = RESULT.fullmatch(out[-1])
    assert match is not None, out[-1]
    assert match[3] == str(again / WEIGHTS)
    assert (float(match[1]), float(match[2])) == pytest.approx(
        (runs.summary(again)["top1"], runs.summary(again)["top5"]), abs=6e-4
    )
    assert re.match(r"train: \d+ images of \d+ classes", out[0])
    runs.assert_equal_weights(pretrained / "last.ckpt", again / "last.ckpt")
    assert (again / WEIGHTS).read_bytes() == (pretrained / WEIGHTS).read_bytes()


@pytest.mark.slow
def test_a_resumed_run_ends_with_the_weights_of_an_undisturbed_one(pretrained, tmp_path, capsys):
    folder, steps = tmp_path / "run", len(runs.rows(pretrained)) // 2
    runs.interrupt(["pretrain", str(pretrained / "config.yaml"), "--output", str(folder)], steps)
    assert "interrupted" in capsys.readouterr().err
    assert not (folder / WEIGHTS).exists()
    resume = ["--output", str(folder), "--ckpt_path", str(folder / "last.ckpt"), "--data.loader.num_workers", "2"]
    assert cli.main(["pretrain", str(pretrained / "config.yaml"), *resume]) == 0
    runs.assert_equal_weights(folder / "last.ckpt", pretrained / "last.ckpt")
    keys = ("step", "train/loss", "val/top1", "val/loss")
    assert [[row[k] for k in keys] for row in runs.rows(folder)] == [
        [row[k] for k in keys] for row in runs.rows(pretrained)
    ]
    assert (folder / WEIGHTS).read_bytes() == (pretrained / WEIGHTS).read_bytes()


def test_the_exported_weights_say_what_they_are(pretrained):
    with safe_open(pretrained / WEIGHTS, "pt") as file:
        metadata, names = json.loads(file.metadata()[checkpoint.KEY]), list(file.keys())
    assert metadata["class_path"] == "detpipe.SEResNet"
    assert metadata["init_args"]["depth"] == 18
    assert metadata["num_classes"] == 10
    assert metadata["top1"] == pytest.approx(runs.summary(pretrained)["top1"], abs=1e-6)
    assert metadata["version"]
    stored = runs.weights(pretrained / "best.ckpt")
    assert set(names) == {name.removeprefix("backbone.") for name in stored if name.startswith("backbone.")}


def test_a_backbone_with_the_exported_weights_gives_equal_features(pretrained):
    classifier, _ = load_classifier(pretrained / "best.ckpt")
    backbone = SEResNet(18, levels=["c3"], weights=str(pretrained / WEIGHTS)).eval()
    backbone.to(memory_format=torch.channels_last)  # as classifiers and detectors have it
    images = torch.randn(2, 3, 64, 96).contiguous(memory_format=torch.channels_last)
    with torch.inference_mode():
        assert torch.equal(backbone(images)["c3"], classifier.backbone(images)["c3"])


@pytest.mark.parametrize("file", [WEIGHTS, "best.ckpt"])
def test_a_detector_takes_the_weights_of_the_stages_that_it_builds(file, pretrained, demo_root):
    arguments = [runs.CONFIG, *runs.options(demo_root), "--model.backbone.weights", str(pretrained / file)]
    detector = CLI(arguments, add_arguments).model  # up to c2, projected to another width
    given = runs.weights(pretrained / "best.ckpt")
    own = {name: value for name, value in detector.backbone.state_dict().items() if not name.startswith("laterals.")}
    assert len(own) > 10
    assert all(torch.equal(value, given[f"backbone.{name}"]) for name, value in own.items())


def test_a_pyramid_exports_the_network_below_it(tmp_path):
    body = SEResNet(18, levels=["c2", "c3"], out_channels="own")
    config = {"class_path": "detpipe.SEResNet", "init_args": {"depth": 18}}
    pyramid = {"class_path": "detpipe.FPN", "init_args": {"backbone": config, "out_channels": 16}}
    path = export_backbone(FPN(body, out_channels=16), tmp_path / "own.safetensors", pyramid)
    with safe_open(path, "pt") as file:
        assert json.loads(file.metadata()[checkpoint.KEY])["class_path"] == "detpipe.SEResNet"
    other = SEResNet(18, levels=["c2", "c3"], out_channels="own", weights=str(path))
    assert all(torch.equal(value, body.state_dict()[name]) for name, value in other.state_dict().items())


OTHER_NETWORKS = {
    "SEResNeXt": lambda weights: SEResNeXt("50_32x4d", levels=["c2"], weights=weights),
    "SKNet": lambda weights: SKNet(50, levels=["c2"], weights=weights),
    "SEInceptionV3": lambda weights: SEInceptionV3(levels=["c2"], weights=weights),
    "torchvision": lambda weights: Extractor("resnet18", {"c2": Level("layer1", 4)}, weights=weights),
    "timm": lambda weights: Extractor("timm/resnet18", ["c2"], weights=weights),
}


@pytest.mark.parametrize("kind", OTHER_NETWORKS)
def test_every_kind_of_backbone_takes_what_it_exports(kind, tmp_path):
    if kind == "timm":
        pytest.importorskip("timm")
    one = OTHER_NETWORKS[kind](None).to(memory_format=torch.channels_last)
    with torch.no_grad():
        for tensor in (*one.parameters(), *(buffer for buffer in one.buffers() if buffer.is_floating_point())):
            tensor.add_(torch.rand_like(tensor))
    path = export_backbone(one, tmp_path / "own.safetensors", {"class_path": kind})
    other = OTHER_NETWORKS[kind](str(path))
    assert len(one.state_dict()) > 10
    assert all(torch.equal(value, one.state_dict()[name]) for name, value in other.state_dict().items())


def test_a_checkpoint_is_rebuilt_alone_and_kinds_are_told_apart(pretrained, tmp_path):
    classifier, _ = load_classifier(pretrained / "best.ckpt")
    assert isinstance(classifier, ImageClassifier)
    assert not classifier.training
    with pytest.raises(
        CheckpointError,
        match=r"is of a classifier of whole images; a detector takes the backbone.safetensors beside it",
    ):
        load_detector(pretrained / "best.ckpt")
    content = torch.load(pretrained / "best.ckpt", weights_only=True)
    content[checkpoint.KEY]["model"]["head"] = {}
    torch.save(content, tmp_path / "detector.ckpt")
    with pytest.raises(CheckpointError, match=r"is of a detector; expected one that 'detpipe pretrain' wrote"):
        load_classifier(tmp_path / "detector.ckpt")


def test_a_nan_stops_the_run_and_names_the_images(base, pretrained, monkeypatch, capsys):
    monkeypatch.setattr("torch.nn.functional.cross_entropy", lambda logits, *_, **__: logits.sum() * torch.nan)
    folder = base / "nan"
    assert cli.main(["pretrain", CONFIG, "--output", str(folder), *options(base)]) == 1
    shown = capsys.readouterr().err
    assert re.search(
        r"detpipe: error: step 0: the loss is nan; .* Images of the batch: train/\d/\d{6}_\d\.jpg, ", shown
    )
    batch = torch.load(folder / callbacks.NONFINITE_BATCH, weights_only=True)
    assert batch["images"].shape == (16, 3, 32, 32)
    assert batch["targets"].shape == (16,)
    assert len(batch["file_names"]) == 16
    options_of_many = options(base, "--data.loader.batch_size", "27")
    assert cli.main(["pretrain", CONFIG, "--output", str(base / "nan_of_many"), *options_of_many]) == 1
    assert re.search(r"\.jpg and 7 more \(saved in ", capsys.readouterr().err)


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["--data.viewss.size", "9"], 2, "data.viewss: unknown key; did you mean 'views'?"),
        (["--model.backbone", "SEResNett"], 2, "model.backbone: unknown class 'SEResNett'; did you mean 'SEResNet'"),
        (["--data", "Demo"], 2, "data: unknown class 'Demo'; expected DemoDigits, ImageFolder, or the full path"),
        (["--model.num_classes", "3"], 2, "model.num_classes follows the classes of the data; remove it"),
        (["--model.head.fc", "3"], 2, "model.head: unknown key; expected backbone,"),
        (["--model.dropout", "2"], 2, "dropout must be in 0..1, below 1, got 2.0"),
        (["--data.views.flip", "2"], 2, "views.flip must be in 0..1, got 2.0"),
        (
            ["--data", "ImageFolder", "--data.root", "nowhere"],
            1,
            "nowhere: no such folder; expected ROOT/train/CLASS/IMAGE",
        ),
        (["--ckpt_path", "nowhere.ckpt"], 1, "checkpoint nowhere.ckpt does not exist"),
    ],
)
def test_mistakes_are_one_line(arguments, status, message, base, capsys):
    assert cli.main(["pretrain", CONFIG, *options(base, *arguments)]) == status
    [line] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("detpipe: error:")]
    assert message in line


def test_a_checkpoint_of_other_classes_is_refused(pretrained, tmp_path, capsys):
    for split in ("train", "val"):
        for name in ("ant", "bee"):
            (tmp_path / split / name).mkdir(parents=True)
            picture(20, 20).save(tmp_path / split / name / "1.png")
    data = ["--data", "ImageFolder", "--data.root", str(tmp_path), "--ckpt_path", str(pretrained / "last.ckpt")]
    assert cli.main(["pretrain", str(pretrained / "config.yaml"), "--output", str(tmp_path / "run"), *data]) == 1
    assert "last.ckpt knows 10 classes, the data have 2" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (("train/ant/1.png", "val/ant/1.png"), "the training split has 1 images; expected at least 2"),
        (
            ("train/ant/1.png", "train/ant/2.png", "val/ant/1.png"),
            "the data have one class, 'ant', and nothing to tell it",
        ),
    ],
)
def test_too_little_to_learn_from(files, message, tmp_path, capsys):
    for name in files:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        picture(20, 20).save(tmp_path / name)
    assert cli.main(["pretrain", CONFIG, "--data", "ImageFolder", "--data.root", str(tmp_path)]) == 1
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("path", [*MODELS, FOLDER / "imagenet.yaml"], ids=lambda path: path.stem)
def test_a_configuration_says_and_does_what_its_header_shows(path, base):
    header = "".join(line for line in path.read_text().splitlines(keepends=True) if line.startswith("#"))
    commands = re.findall(r"^#   python tools/pretrain\.py (.*)$", header, re.MULTILINE)
    assert any(str(path.relative_to(runs.CONFIGS.parent)) in command for command in commands)
    for command in commands:
        arguments = [str(runs.CONFIGS.parent / a) if a.endswith(".yaml") else a for a in command.split()]
        parsed = Parsed(arguments, add_arguments)
        assert parsed.config.model.backbone.class_path == "detpipe.SEResNet"
        if "imagenet" in command:
            data = parsed.config.data.init_args
            assert (parsed.config.data.class_path, data.root, data.views.size) == (
                "detpipe.ImageFolder",
                "IMAGENET",
                224,
            )
            rate = parsed.config.model.optimizer.lr
            assert rate == pytest.approx(0.1 * data.loader.batch_size / 256)
    for command in re.findall(r"^#   python tools/train\.py (.*)$", header, re.MULTILINE):
        arguments = command.replace("configs/", f"{runs.CONFIGS}/").split()
        weights = runs.Parsed(arguments, add_arguments).config.model.backbone.init_args.weights
        assert weights == f"RUN/{WEIGHTS}"


@pytest.mark.slow
@pytest.mark.parametrize("path", MODELS, ids=lambda path: path.stem)
def test_a_model_runs_two_steps_as_it_is(path, base, tmp_path):
    limits = ["--trainer.limit_train_batches", "2", "--trainer.limit_val_batches", "1", "--trainer.max_epochs", "1"]
    arguments = [str(path), *digits(base), *limits, "--data.views.size", "32", "--data.loader.batch_size", "2"]
    output = ["--output", str(tmp_path / "run"), "--trainer.accelerator", "cpu"]
    assert cli.main(["pretrain", *arguments, *output]) == 0
    assert (tmp_path / "run" / WEIGHTS).is_file()

"""The files in configs/zoo: their settings are those of the published detectors, and they fine-tune with any overlay of data."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import runs
import torch
import yaml
from datasets.builders import coco_content, voc_object, write_coco, write_voc
from torchvision.models import detection

from detpipe import cli, load_detector
from detpipe.backbones.regime import convert_norm
from detpipe.commands import training
from detpipe.support.errors import UsageError
from detpipe.zoo import entries, published, settings_by_name

CONFIGS = sorted((runs.CONFIGS / "zoo").glob("*.yaml"))
DATA = runs.CONFIGS / "data"
ROOT = ("--data.root", "somewhere")
SMALL = runs.CONFIGS / "zoo" / "fasterrcnn_mobilenet_v3_large_320_fpn.yaml"


def parse(*arguments: Path | str) -> Any:
    return runs.Parsed([str(argument) for argument in arguments], training.add_arguments).config


def test_there_is_one_for_each() -> None:
    assert [path.stem for path in CONFIGS] == sorted(entries())


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_the_settings_are_the_published_ones(path: Path) -> None:
    content = yaml.safe_load(path.read_text())
    model = {key: value for key, value in content["model"].items() if key not in ("optimizer", "lr_scheduler")}
    settings = settings_by_name(path.stem)
    settings["head"]["init_args"].pop("extra_outputs", None)  # those of COCO's gaps, for evaluation alone
    assert model == settings
    assert content["published"] == path.stem


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_the_header_says_whose_weights_they_are(path: Path) -> None:
    header = "".join(line for line in path.read_text().splitlines(keepends=True) if line.startswith("#"))
    entry = entries()[path.stem]
    assert entry.address in header
    assert entry.license in header
    assert f"{entry.ap:.1f} as published" in header or f"AP {entry.ap:.1f}, AP50" in header
    assert re.search(
        rf"^#   python tools/train\.py configs/zoo/{path.stem}\.yaml configs/data/voc_custom\.yaml", header, re.M
    )
    assert re.search(rf"^#   python tools/evaluate\.py configs/zoo/{path.stem}\.yaml", header, re.M)


@pytest.mark.parametrize(
    ("path", "overlay"),
    [*((path, "voc_custom") for path in CONFIGS), (SMALL, "coco"), (SMALL, "voc07"), (CONFIGS[0], "coco")],
    ids=lambda value: getattr(value, "stem", value),
)
def test_overlays_of_data_leave_what_the_weights_need(
    path: Path, overlay: str, capsys: pytest.CaptureFixture[str]
) -> None:
    config = parse(path, DATA / f"{overlay}.yaml", *ROOT)
    wanted = yaml.safe_load(path.read_text())["model"]
    assert (config.model.min_size, config.model.max_size) == (wanted["min_size"], wanted["max_size"])
    source = config.model.proposals
    assert source.class_path.endswith(wanted["proposals"]["class_path"])
    if "anchors" in wanted["proposals"]["init_args"]:
        assert source.init_args.anchors.sizes == wanted["proposals"]["init_args"]["anchors"]["sizes"]
    assert config.data.class_path == ("detpipe.COCO" if overlay == "coco" else "detpipe.VOC")
    note = f"note: proposals, min_size, max_size stay as {path.stem} has them"
    assert capsys.readouterr().err.startswith(note)


def test_options_and_other_sources_are_heard(capsys: pytest.CaptureFixture[str]) -> None:
    config = parse(SMALL, DATA / "voc_custom.yaml", *ROOT, "--model.min_size", "200", "--model.max_size", "400")
    assert (config.model.min_size, config.model.max_size) == (200, 400)
    config = parse(SMALL, DATA / "voc_custom.yaml", runs.CONFIGS / "proposals" / "store.yaml", *ROOT)
    assert config.model.proposals.class_path == "detpipe.PrecomputedProposals"
    assert parse(runs.CONFIG, DATA / "voc_custom.yaml", *ROOT).model.min_size == 480  # where nothing is published
    assert parse(runs.CONFIG).published is None


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of PyTorch's weights with random ones by the published name."""
    home = tmp_path_factory.mktemp("torch")
    model = detection.fasterrcnn_mobilenet_v3_large_320_fpn(weights=None, weights_backbone=None)
    convert_norm(model.backbone, "frozen")
    (home / "hub" / "checkpoints").mkdir(parents=True)
    torch.save(model.state_dict(), home / "hub" / "checkpoints" / entries()[SMALL.stem].path.name)
    return home


@pytest.mark.slow
def test_fine_tuning_keeps_rows_of_the_same_name(
    weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(weights))
    objects = [
        voc_object("dog", (5, 5, 40, 38)),
        voc_object("wombat", (20, 10, 60, 39)),
        voc_object("cat", (2, 2, 30, 30)),
    ]
    for split in ("train", "val"):
        write_voc(tmp_path / "data", {f"{split}1": objects}, split)
    options = ["--data.root", str(tmp_path / "data"), "--output", str(tmp_path / "run"), "--trainer.accelerator", "cpu"]
    options += ["--model.optimizer.lr", "1e-9", "--trainer.max_epochs", "1", "--data.loader.num_workers", "0"]
    options += ["--model.min_size", "64", "--model.max_size", "96", "--trainer.limit_val_batches", "0"]
    assert cli.main(["train", str(SMALL), str(DATA / "voc_custom.yaml"), *options]) == 0
    told = capsys.readouterr().out
    assert "outputs of 2 of 3 classes (cat, dog)" in told
    assert f"from {SMALL.stem}: " in told
    assert "of another shape" not in told
    assert "new: " not in told
    detector, description = load_detector(tmp_path / "run" / "last.ckpt")
    assert description.class_names == ("cat", "dog", "wombat")
    given, _ = published.load(SMALL.stem)
    names = published.classes_of(entries()[SMALL.stem])[0]
    for row, name in ((1, "cat"), (2, "dog")):
        there = 1 + names.index(name)
        assert torch.allclose(detector.head.classifier.weight[row], given.head.classifier.weight[there], atol=1e-6)
        rows = slice(4 * (row - 1), 4 * row), slice(4 * (there - 1), 4 * there)
        assert torch.allclose(detector.head.regressor.bias[rows[0]], given.head.regressor.bias[rows[1]], atol=1e-6)
    for name, value in detector.state_dict().items():
        if not name.startswith(("head.classifier", "head.regressor")):
            assert torch.allclose(value, given.state_dict()[name], atol=1e-6)
    frozen = [name for name, parameter in detector.named_parameters() if not parameter.requires_grad]
    assert {name.split(".")[4] for name in frozen} == set("0123456")


def test_a_name_that_is_unknown_is_told_before_training(tmp_path: Path) -> None:
    write_voc(tmp_path / "data", {"a": [voc_object("dog", (5, 5, 40, 38))]}, "train")
    write_voc(tmp_path / "data", {"b": [voc_object("dog", (5, 5, 40, 38))]}, "val")
    options = ["--data.root", str(tmp_path / "data"), "--output", str(tmp_path / "run"), "--trainer.accelerator", "cpu"]
    arguments = [runs.CONFIG, str(DATA / "voc_custom.yaml"), *options, "--init_from", "fasterrcnn_resnet50"]
    with pytest.raises(UsageError, match="did you mean 'fasterrcnn_resnet50_fpn'"):
        training.train(arguments)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_the_published_model_is_evaluated_on_coco_as_the_header_says(
    weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(weights))
    names, ids = published.classes_of(entries()[SMALL.stem])
    content = coco_content()
    content["categories"] = [{"id": number, "name": name} for number, name in zip(ids, names, strict=True)]
    for split in ("train2017", "val2017"):
        write_coco(tmp_path / "coco", content, split)
    assert cli.main(["zoo", SMALL.stem, "-o", str(tmp_path / "ZOO.ckpt")]) == 0
    header = SMALL.read_text()
    assert "configs/data/coco.yaml --ckpt_path ZOO.ckpt \\\n#       --model.head.extra_outputs 10\n" in header
    options = [
        "--model.head.extra_outputs",
        "10",
        "--data.root",
        str(tmp_path / "coco"),
        "--trainer.accelerator",
        "cpu",
    ]
    options += ["--data.loader.num_workers", "0", "--json", str(tmp_path / "numbers.json")]
    arguments = [str(SMALL), str(DATA / "coco.yaml"), "--ckpt_path", str(tmp_path / "ZOO.ckpt"), *options]
    assert cli.main(["evaluate", *arguments]) == 0
    told = capsys.readouterr().out
    assert "AP50" in told
    # what decides about detections is as published; the rest is how one trains
    notes = [line for line in told.splitlines() if line.startswith("note: not as in training")]
    assert all("sampler" in line or "regime.frozen" in line for line in notes)

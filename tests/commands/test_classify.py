"""Naming what is in given boxes, through the command."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning import LightningModule
from PIL import Image

from detpipe import cli
from detpipe.backbones import SEResNet
from detpipe.datasets import read_image
from detpipe.regions.region_classifier import RegionClassifier
from detpipe.training import checkpoint
from detpipe.training.checkpoint import Description
from detpipe.training.models import load_region_classifier

BOXES = [[4.0, 6.0, 30.0, 40.0], [40.0, 10.0, 62.5, 50.0]]


@pytest.fixture(scope="module")
def model_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint of a classifier with random weights."""
    torch.manual_seed(0)
    settings = {"depth": 18, "levels": ["c2"], "out_channels": 8}
    model = RegionClassifier(SEResNet(**settings), 2, min_size=64, max_size=96)  # type: ignore[arg-type]
    torch.nn.init.normal_(model.layers[-1].weight)  # type: ignore[arg-type]
    backbone = {"class_path": "detpipe.SEResNet", "init_args": settings}
    init_args = {"backbone": backbone, "min_size": 64, "max_size": 96}
    described = {"class_path": "detpipe.regions.region_classifier.RegionClassifier", "init_args": init_args}
    content = {
        "state_dict": model.state_dict(),
        checkpoint.KEY: Description(described, ("ant", "bee"), (1, 2)).to_dict(),
    }
    path = tmp_path_factory.mktemp("classify") / "model.ckpt"
    torch.save(content, path)
    return path


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Three images of two sizes, two of them of one name, and boxes for them."""
    folder = tmp_path / "pictures"
    (folder / "more").mkdir(parents=True)
    pixels = np.random.default_rng(0).integers(0, 256, (64, 80, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / "a.png")
    Image.fromarray(pixels[:, ::-1]).save(folder / "b.png")
    Image.fromarray(pixels[:60, :70]).save(folder / "more" / "a.jpg")
    boxes = {str(folder / "a.png"): BOXES, "b.png": [], "a.jpg": BOXES[:1]}
    (tmp_path / "boxes.json").write_text(json.dumps(boxes))
    return folder


def classify(model_file: Path, pictures: Path, *more: str, status: int = 0) -> dict[str, Any]:
    out, boxes = pictures.parent / "out", pictures.parent / "boxes.json"
    arguments = [str(model_file), str(pictures), "--boxes", str(boxes), "-o", str(out), "--device", "cpu"]
    assert cli.main(["classify", *arguments, *more]) == status
    return json.loads((out / "regions.json").read_text())


def test_each_box_gets_a_name_in_its_place(model_file, pictures, capsys):
    report, out = classify(model_file, pictures), pictures.parent / "out"
    assert capsys.readouterr().out == f"3 images, 3 regions, 0 failed; see {out / 'regions.json'}\n"
    assert (report["checkpoint"], report["class_names"], report["failed"]) == (str(model_file), ["ant", "bee"], [])
    assert [(one["drawing"], one["width"], one["height"]) for one in report["images"]] == [
        *(("a.jpg", 80, 64), ("b.jpg", 80, 64), ("a-2.jpg", 70, 60)),
    ]
    model, _ = load_region_classifier(model_file)
    [found] = model.predict([read_image(pictures / "a.png")], [torch.tensor(BOXES)])
    names = [("ant", "bee")[label - 1] for label in found["labels"].tolist()]
    assert [one["box"] for one in report["images"][0]["regions"]] == BOXES
    assert [one["label"] for one in report["images"][0]["regions"]] == names
    assert [one["score"] for one in report["images"][0]["regions"]] == found["scores"].tolist()
    assert report["images"][1]["regions"] == []
    for one in report["images"]:
        with Image.open(out / one["drawing"]) as drawing:
            assert drawing.width * one["height"] == drawing.height * one["width"]


def test_parts_are_merged(model_file, pictures, capsys):
    whole, out = classify(model_file, pictures), pictures.parent / "out"
    (out / "regions.json").unlink()
    for number in (2, 1):
        arguments = [str(model_file), str(pictures), "--boxes", str(pictures.parent / "boxes.json"), "-o", str(out)]
        assert cli.main(["classify", *arguments, "--device", "cpu", "--part", f"{number}/2"]) == 0
    assert cli.main(["merge", str(out)]) == 0
    assert json.loads((out / "regions.json").read_text()) == whole
    assert "3 images, 3 regions, 0 failed" in capsys.readouterr().out


def test_what_cannot_be_classified_is_named_and_the_rest_goes_on(model_file, pictures, capsys):
    boxes = {"a.png": [*BOXES, [81, 5, 99, 20]], "b.png": BOXES, "a.jpg": BOXES}
    (pictures.parent / "boxes.json").write_text(json.dumps(boxes))
    (pictures / "more" / "a.jpg").write_text("no picture")
    report = classify(model_file, pictures, status=3)
    assert [Path(one["file"]).name for one in report["images"]] == ["b.png"]
    assert [Path(one["file"]).name for one in report["failed"]] == ["a.png", "a.jpg"]
    assert "box 2: expected finite" in report["failed"][0]["reason"]
    shown = capsys.readouterr()
    assert shown.err.count("skipped: ") == 2
    assert "a.png: boxes[0], box 2" in shown.err
    (pictures / "b.png").unlink()
    assert classify(model_file, pictures, status=1)["images"] == []


def test_mistakes_are_one_line(model_file, pictures, capsys):
    boxes, out = str(pictures.parent / "boxes.json"), ["-o", str(pictures.parent / "out")]
    shutil.copy(pictures / "a.png", pictures / "c.png")
    for arguments, status, message in (
        (
            [str(model_file), str(pictures), *out],
            2,
            "the following arguments are required: --boxes; see 'detpipe classify",
        ),
        ([str(model_file), str(pictures), "--boxes", boxes, *out], 1, "has no boxes for"),
        ([str(model_file), "nowhere", "--boxes", boxes, *out], 2, "nowhere does not exist; expected an image"),
        (["nowhere.ckpt", str(pictures), "--boxes", boxes, *out], 1, "checkpoint nowhere.ckpt does not exist"),
        ([str(model_file), str(pictures), "--boxes", "n.json", *out], 1, "n.json"),
    ):
        assert cli.main(["classify", *arguments]) == status
        [line] = capsys.readouterr().err.splitlines()
        assert line.startswith("detpipe: error: ")
        assert message in line


def test_a_checkpoint_of_something_else_is_refused(model_file, pictures, tmp_path, capsys):
    content = torch.load(model_file, weights_only=True)
    content[checkpoint.KEY]["model"] = content[checkpoint.KEY]["model"]["init_args"]["backbone"]
    network = SEResNet(18, levels=["c2"], out_channels=8)
    assert isinstance(network, LightningModule)
    content["state_dict"] = network.state_dict()
    torch.save(content, tmp_path / "network.ckpt")
    arguments = f"{tmp_path / 'network.ckpt'} {pictures} --boxes selective_search -o {tmp_path / 'out'}".split()
    assert cli.main(["classify", *arguments]) == 1
    assert "network.ckpt is of a SEResNet; expected one of a RegionClassifier" in capsys.readouterr().err

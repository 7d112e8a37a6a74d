"""Published detectors by name, with small models in the place of real ones, from files and from a server on localhost."""

from __future__ import annotations

import hashlib
import json
import socket
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets.file_server import Behavior, serving
from PIL import Image
from torchvision.models.detection import FasterRCNN

from detpipe import cli, load_detector
from detpipe.support.errors import CheckpointError, UsageError
from detpipe.zoo import published
from zoo.random_models import scene, shaped_mobilenet, spread

NAME = "fasterrcnn_mobilenet_v3_large_320_fpn"
COCO_IDS = 91


@pytest.fixture(scope="module")
def model() -> FasterRCNN:
    torch.manual_seed(3)
    return spread(shaped_mobilenet(COCO_IDS))


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Small models by torchvision's names, and an empty folder of weights."""
    monkeypatch.setattr(published, "torchvision_model", lambda name, entry: shaped_mobilenet(COCO_IDS).eval())
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def weights(model: FasterRCNN, tmp_path: Path) -> Path:
    path = tmp_path / "weights.pth"
    torch.save(model.state_dict(), path)
    return path


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, weights: Path) -> Iterator[Behavior]:
    """Serves the file by the name that its check sum gives it."""
    content = weights.read_bytes()
    name = f"small-{hashlib.sha256(content).hexdigest()[:8]}.pth"
    with serving(files={f"/{name}": content}) as behavior:
        at(monkeypatch, f"{behavior.url}/{name}")
        yield behavior


def at(monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    known = {**published.entries(), NAME: replace(published.entries()[NAME], address=address)}
    monkeypatch.setattr(published, "entries", lambda: known)


@torch.no_grad()
def assert_same_but_for_gaps(model: FasterRCNN, detector: Any, names: tuple[str, ...]) -> None:
    """torchvision's detections, without those of ids that COCO gave to no class."""
    categories = published._categories()
    image = scene(96, 128, 0)
    [wanted], [given] = model([image]), detector([image])
    found = [(categories[label], score) for label, score in zip(wanted["labels"], wanted["scores"], strict=True)]
    found = [(name, score) for name, score in found if name != "N/A"]
    assert found
    assert {name for name, _ in found} <= set(names)
    ours = [(names[label - 1], score) for label, score in zip(given["labels"], given["scores"], strict=True)]
    for (name, score), (own, own_score) in zip(found, ours, strict=False):
        assert abs(score - own_score) < 1e-3
        assert name == own


def test_there_are_eight_with_their_scores() -> None:
    scores = {name: entry.ap for name, entry in published.entries().items()}
    assert scores == {
        "fasterrcnn_resnet50_fpn": 37.0,
        "fasterrcnn_resnet50_fpn_v2": 46.7,
        "fasterrcnn_mobilenet_v3_large_fpn": 32.8,
        "fasterrcnn_mobilenet_v3_large_320_fpn": 22.8,
        "faster_rcnn_R_50_FPN_3x": 40.2,
        "fast_rcnn_R_50_FPN_1x": 37.8,
        "cascade_mask_rcnn_R_50_FPN_3x": 44.3,
        "faster_rcnn_R_50_C4_voc": 51.9,
    }
    names, ids = published.classes_of(published.find(NAME))
    assert (len(names), names[0], ids[0], names[-1], ids[-1]) == (80, "person", 1, "toothbrush", 90)
    assert len(published.classes_of(published.find("faster_rcnn_R_50_C4_voc"))[0]) == 20


def test_a_file_is_read(model: FasterRCNN, weights: Path) -> None:
    detector, description = published.load(NAME, str(weights))
    assert len(description.class_names) == 80
    assert_same_but_for_gaps(model, detector, description.class_names)


def test_names_of_earlier_versions_are_read(model: FasterRCNN, weights: Path) -> None:
    """torchvision before 0.13; frozen norms may have counters of batches."""
    old = OrderedDict()
    for name, value in model.state_dict().items():
        name = name.replace("rpn.head.conv.0.0.", "rpn.head.conv.")
        for blocks in ("inner_blocks", "layer_blocks"):
            for index in range(2):
                name = name.replace(f"{blocks}.{index}.0.", f"{blocks}.{index}.")
        old[name] = value
        if name.endswith("running_var"):
            old[name.replace("running_var", "num_batches_tracked")] = torch.tensor(7)
    assert "rpn.head.conv.weight" in old
    assert "backbone.fpn.inner_blocks.0.weight" in old
    torch.save(old, weights)
    detector, description = published.load(NAME, str(weights))
    assert_same_but_for_gaps(model, detector, description.class_names)


@pytest.mark.slow
def test_weights_are_fetched_once(model: FasterRCNN, server: Behavior) -> None:
    assert not published.find(NAME).path.exists()
    detector, description = published.load(NAME)
    assert_same_but_for_gaps(model, detector, description.class_names)
    assert published.find(NAME).path.is_file()
    published.load(NAME, "COCO_V1")
    assert len(server.requests) == 1


def test_another_check_sum_is_refused(server: Behavior) -> None:
    [path] = server.files
    server.files[path] = server.files[path][:-1] + b"x"
    with pytest.raises(CheckpointError, match=r"cannot be downloaded \(invalid hash value.*or give the path") as raised:
        published.load(NAME)
    assert "\n" not in str(raised.value)
    assert not published.find(NAME).path.exists()


def test_no_network_names_the_path(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{listener.getsockname()[1]}/small-12345678.pth"
    at(monkeypatch, address)
    path = published.find(NAME).path
    with pytest.raises(CheckpointError, match=f"cannot be downloaded .*put {address} at {path}, or .*--weights FILE"):
        published.load(NAME)


def test_files_of_detectron2_are_put_there_by_the_user(tmp_path: Path) -> None:
    path = published.find("faster_rcnn_R_50_FPN_3x").path
    with pytest.raises(CheckpointError, match=rf"{path}: no such file; put https://\S+ at {path}, or .*--weights FILE"):
        published.load("faster_rcnn_R_50_FPN_3x")
    with pytest.raises(CheckpointError, match=r"no\.pth: no such file; put https"):
        published.load(NAME, str(tmp_path / "no.pth"))


def test_unknown_names_get_near_ones(weights: Path) -> None:
    with pytest.raises(
        UsageError, match=r"unknown detector 'fasterrcnn_resnet50'.*did you mean 'fasterrcnn_resnet50_fpn'"
    ):
        published.load("fasterrcnn_resnet50")
    with pytest.raises(UsageError, match=r"belongs to a name of 'detpipe zoo', but \S+ has weights of its own"):
        published.load(str(weights), str(weights))


def test_other_files_are_refused_in_one_line(model: FasterRCNN, weights: Path) -> None:
    state = model.state_dict()
    changes: dict[str, Any] = {
        r"has 5 outputs, \S+ has 91 .*other classes.*from_torchvision": {
            **state,
            "roi_heads.box_predictor.cls_score.weight": torch.zeros(5, 32),
            "roi_heads.box_predictor.cls_score.bias": torch.zeros(5),
        },
        r"it lacks 1 tensors, rpn\.head\.cls_logits\.bias": {
            k: v for k, v in state.items() if k != "rpn.head.cls_logits.bias"
        },
        r"it has unknown 1 tensors, mask\.weight": {**state, "mask.weight": torch.zeros(2)},
        r"it has other shapes for 1 tensors, roi_heads\.box_head\.fc6\.bias": {
            **state,
            "roi_heads.box_head.fc6.bias": torch.zeros(7),
        },
        "must hold a state dict": {"model": 3},
    }
    for message, content in changes.items():
        torch.save(content, weights)
        with pytest.raises(CheckpointError, match=message) as raised:
            published.load(NAME, str(weights))
        assert str(weights) in str(raised.value)
        assert "\n" not in str(raised.value)


def test_a_truncated_file_and_one_that_would_run_code(weights: Path) -> None:
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match=r"weights\.pth cannot be read as a state dict"):
        published.load(NAME, str(weights))
    torch.save({"a": socket.socket}, weights)
    with pytest.raises(CheckpointError, match=r"weights\.pth cannot be read as a state dict"):
        published.load(NAME, str(weights))


@pytest.mark.slow
def test_predict_takes_a_name(weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    image = tmp_path / "photo.png"
    Image.fromarray((scene(96, 128, 0) * 255).byte().permute(1, 2, 0).numpy()).save(image)
    arguments = [NAME, str(image), "-o", str(tmp_path / "out"), "--weights", str(weights), "--device", "cpu"]
    assert cli.main(["predict", *arguments, "--score_threshold", "0.05"]) == 0
    report = json.loads((tmp_path / "out" / "detections.json").read_text())
    assert report["checkpoint"] == NAME
    assert len(report["images"][0]["detections"]) > 2
    assert cli.main(["predict", "fasterrcnn_resnet50", str(image), "-o", str(tmp_path / "out")]) == 2
    assert "did you mean 'fasterrcnn_resnet50_fpn'" in capsys.readouterr().err


def test_the_zoo_is_listed(weights: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = published.find(NAME).path
    assert cli.main(["zoo"]) == 0
    assert f"not here: {path}" in capsys.readouterr().out
    path.parent.mkdir(parents=True)
    weights.rename(path)
    assert cli.main(["zoo"]) == 0
    rows = [row.split() for row in capsys.readouterr().out.splitlines()]
    assert [NAME, "22.8", "COCO", "torchvision,", "BSD-3-Clause", "74", "here:", str(path)] in rows
    assert any(row[:6] == ["faster_rcnn_R_50_FPN_3x", "40.2", "COCO", "detectron2,", "CC", "BY-SA"] for row in rows)


@pytest.mark.slow
def test_a_checkpoint_is_written(weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "zoo.ckpt"
    assert cli.main(["zoo", NAME, "--weights", str(weights), "-o", str(path)]) == 0
    detector, description = load_detector(path)
    again, _ = published.load(NAME, str(weights))
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in detector.state_dict().items())
    assert description.category_ids[-1] == 90
    assert cli.main(["zoo", NAME, "-o", "x.pth"]) == 2
    assert "give -o FILE.ckpt" in capsys.readouterr().err
    assert cli.main(["zoo", "--weights", "x.pth"]) == 2
    assert cli.main(["zoo", "fasterrcnn"]) == 2

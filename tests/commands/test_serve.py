"""What ``detpipe serve`` opens; how it answers is tested in tests/serving."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

pytest.importorskip("fastapi", reason="FastAPI is not installed: pip install 'detpipe[serve]'")

from fastapi.testclient import TestClient
from serving.onnx_files import write_detector

from detpipe import cli
from detpipe.commands.predict import detect
from detpipe.commands.serve import _parse, open_served
from detpipe.datasets import read_image
from detpipe.serving.server import create_app
from detpipe.support.errors import UsageError
from detpipe.training.models import load_detector


def test_a_checkpoint_answers_as_predict_does(trained, demo_root):
    path = sorted((demo_root / "coco" / "val").iterdir())[0]
    served = open_served(_parse([str(trained / "best.ckpt"), "--device", "cpu"]))
    detector, description = load_detector(trained / "best.ckpt")
    image, boxes = read_image(path), [[3.0, 4.0, 40.0, 50.0], [10.0, 10.0, 60.0, 30.0]]
    with TestClient(create_app(served)) as client:
        for given in (None, boxes, None):
            data = {} if given is None else {"boxes": str(given)}
            answer = client.post("/detect?score_threshold=0.02", files={"image": path.read_bytes()}, data=data).json()
            if given is None:
                expected = detect(detector, image, None, 0.02)
                assert answer["boxes"] == expected["boxes"].tolist()
                assert answer["scores"] == expected["scores"].tolist()
                assert answer["names"] == [description.class_names[label - 1] for label in expected["labels"].tolist()]
                assert answer["model"] == "best.ckpt"
            else:
                assert 0 < len(answer["boxes"]) <= 2 * len(description.class_names)
                centers = (torch.tensor(answer["boxes"])[:, :2] + torch.tensor(answer["boxes"])[:, 2:]) / 2
                assert (centers < torch.tensor([64.0, 64.0])).all()


def test_an_onnx_file_is_served(tmp_path):
    pytest.importorskip("onnxruntime")
    served = open_served(_parse([str(write_detector(tmp_path / "d.onnx")), "--device", "cpu"]))
    assert (served.name, served.class_names, served.takes_boxes) == ("d.onnx", ("cat", "dog"), False)
    [found] = served.detect([torch.full((3, 6, 8), 4, dtype=torch.uint8)], None)
    assert found["boxes"].tolist() == [[0, 0, 4, 4]]
    with pytest.raises(UsageError, match=r"d\.onnx has its weights in it, and finds its own: leave out --proposals"):
        open_served(_parse([str(tmp_path / "d.onnx"), "--proposals", "dense_grid"]))


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["nowhere.ckpt"], 1, "checkpoint nowhere.ckpt does not exist"),
        (["nowhere.ckpt", "--body", "1e-7"], 1, "checkpoint nowhere.ckpt does not exist"),
        (["nowhere.onnx"], 1, "ONNX file nowhere.onnx does not exist"),
        (["CHECKPOINT", "--proposals", "boxes.json"], 2, "expected a source"),
        (["x", "--score_threshold", "2"], 2, "--score_threshold must be in 0..1"),
        (["x", "--batch", "0"], 2, "--batch must be 1 or more"),
        (["x", "--body", "0"], 2, "--body must be positive"),
        (["x", "--seconds", "nan"], 2, "--seconds must be positive"),
        (["x", "--host", "nowhere.invalid"], 2, "cannot listen on nowhere.invalid"),
    ],
)
def test_mistakes_on_the_command_line(arguments, status, message, trained: Path, capsys):
    given = [str(trained / "best.ckpt") if one == "CHECKPOINT" else one for one in arguments]
    assert cli.main(["serve", *given, "--port", "0"]) == status
    shown = capsys.readouterr().err
    assert shown.startswith("detpipe: error: ")
    assert len(shown.splitlines()) == 1
    assert message in shown

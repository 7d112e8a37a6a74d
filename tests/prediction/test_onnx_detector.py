from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

pytest.importorskip("onnxruntime", reason="ONNX Runtime is not installed: pip install 'detpipe[export]'")
pytest.importorskip("onnx", reason="files are made by onnx: pip install 'detpipe[export]'")

from serving.onnx_files import NAMES, write_detector

from detpipe.commands.predict import _parse_predict, choose_proposals, predict
from detpipe.prediction.onnx_detector import OnnxDetector
from detpipe.support.errors import CheckpointError, UsageError
from detpipe.training.checkpoint import Description


def image(first: int, height: int = 6, width: int = 8) -> torch.Tensor:
    return torch.full((3, height, width), first, dtype=torch.uint8)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_detector(tmp_path_factory.mktemp("onnx") / "d.onnx")


def test_detections_of_each_image_without_padding(path):
    detector = OnnxDetector(path)
    assert (detector.class_names, detector.metadata["category_ids"]) == (NAMES, [7, 3])
    assert detector.metadata["detpipe"] == "1.0"  # text, though it is a number too
    for images in (
        [image(5), image(0), image(4)],
        [image(5), image(0, 9, 5), image(4, 3, 3)],
    ):  # of one size, and of three
        found = detector(images)
        assert [one["boxes"].tolist() for one in found] == [[[0, 0, 5, 5]], [], [[0, 0, 4, 4]]]
        assert [one["labels"].tolist() for one in found] == [[2], [], [2]]
        assert [one["scores"].tolist() for one in found] == [[0.75], [], [0.75]]


def no_file(path: Path) -> None: ...


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (no_file, r"d\.onnx does not exist"),
        (os.mkfifo, "is a pipe"),
        (lambda path: path.write_bytes(b"no model"), r"d\.onnx cannot be run: "),
        (lambda path: path.write_bytes(b""), r"d\.onnx (cannot be run|is not a detector)"),
        (
            lambda path: write_detector(path, form="other"),
            r"d\.onnx is not a detector of detpipe export \(format 'other'\)",
        ),
        (
            lambda path: write_detector(path, names="["),
            r"d\.onnx says of itself what cannot be read .*; export it again",
        ),
    ],
)
def test_other_files_are_refused_in_one_line(write, message, tmp_path):
    write(tmp_path / "d.onnx")
    with pytest.raises(CheckpointError, match=message):
        OnnxDetector(tmp_path / "d.onnx")


def test_images_of_other_channels_are_refused(path):
    with pytest.raises(UsageError, match=r"takes images \[N, 3, H, W\]; got \[1, 4, 6, 8\]"):
        OnnxDetector(path)([torch.zeros(4, 6, 8, dtype=torch.uint8)])


def test_a_device_that_the_runtime_lacks(path):
    with pytest.raises(UsageError, match="'tpu' cannot be used"):
        OnnxDetector(path, "tpu")


@pytest.mark.parametrize("option", [["--tta"], ["--max_detections", "5"], ["--show-glimpses"], ["--weights", "a.pth"]])
def test_settings_that_a_file_does_not_have_are_refused(option, path, tmp_path):
    with pytest.raises(UsageError, match=r"d\.onnx: an ONNX file is as it was exported; leave out"):
        predict([str(path), "images", "-o", str(tmp_path / "out"), *option])


def test_proposals_are_asked_for_where_a_file_takes_some(path, tmp_path):
    detector, description = OnnxDetector(path), Description({}, NAMES, (7, 3))
    given = _parse_predict([str(path), "images", "-o", "out", "--proposals", "dense_grid"])
    with pytest.raises(UsageError, match=r"finds its own; export it with --boxes"):
        choose_proposals(detector, given, [], description)
    detector.takes_boxes = True
    with pytest.raises(UsageError, match="--proposals"):
        choose_proposals(detector, _parse_predict([str(path), "images", "-o", "out"]), [], description)
    assert choose_proposals(detector, given, [], description) is not None

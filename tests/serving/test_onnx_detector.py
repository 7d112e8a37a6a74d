from __future__ import annotations

from pathlib import Path

import pytest
import torch

pytest.importorskip("onnxruntime", reason="ONNX Runtime is not installed: pip install 'detpipe[onnx]'")

from detpipe.serving.onnx_detector import OnnxDetector
from detpipe.support.errors import CheckpointError, DataError, DetpipeError, UsageError
from serving.onnx_files import NAMES, write_detector


def images(*first: int, height: int = 6, width: int = 8) -> list[torch.Tensor]:
    return [torch.full((3, height, width), value, dtype=torch.uint8) for value in first]


@pytest.mark.parametrize("batch", ["batch", 1, 2])
def test_detections_of_each_image_without_padding(batch, tmp_path):
    detector = OnnxDetector(write_detector(tmp_path / "d.onnx", (batch, "height", "width")), "cpu")
    assert detector.class_names == NAMES
    found = detector(images(5, 0, 4))
    assert [one["boxes"].tolist() for one in found] == [[[0, 0, 5, 5]], [], [[0, 0, 4, 4]]]
    assert [one["labels"].tolist() for one in found] == [[2], [], [2]]
    assert [one["scores"].tolist() for one in found] == [[0.75], [], [0.75]]


def test_a_file_for_one_size_says_which(tmp_path):
    detector = OnnxDetector(write_detector(tmp_path / "d.onnx", ("batch", 6, 8)))
    assert detector.size == (6, 8)
    assert len(detector(images(3))) == 1
    with pytest.raises(DataError, match="image: 9 x 6 pixels, but the model takes 8 x 6: resize it"):
        detector(images(3, width=9))


@pytest.mark.parametrize(
    ("write", "error", "message"),
    [
        (lambda path: None, CheckpointError, r"d\.onnx does not exist"),
        (lambda path: path.write_bytes(b"no model"), CheckpointError, r"d\.onnx cannot be run: "),
        (
            lambda path: write_detector(path, names=None),
            CheckpointError,
            r"d\.onnx is not of a detector: .*no class_names",
        ),
        (lambda path: write_detector(path, output="number_of"), CheckpointError, r"is not of a detector: .*number_of"),
    ],
)
def test_other_files_are_refused_in_one_line(write, error, message, tmp_path):
    write(tmp_path / "d.onnx")
    with pytest.raises(error, match=message) as caught:
        OnnxDetector(tmp_path / "d.onnx")
    assert isinstance(caught.value, DetpipeError)


def test_a_device_that_the_runtime_lacks(tmp_path):
    with pytest.raises(UsageError, match="'tpu' cannot be used"):
        OnnxDetector(write_detector(tmp_path / "d.onnx"), "tpu")


def test_a_pipe_is_not_waited_for(tmp_path: Path):
    import os

    os.mkfifo(tmp_path / "d.onnx")
    with pytest.raises(CheckpointError, match="is a pipe"):
        OnnxDetector(tmp_path / "d.onnx")

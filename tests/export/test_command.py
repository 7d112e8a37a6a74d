"""The command: from a checkpoint to a file, compared, and measured by ``evaluate``; and one line for what is wrong."""

from __future__ import annotations

import json
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from detpipe import cli

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "onnx_predict.py"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["best.ckpt"], "give -o model.onnx or -o model.pt2"),
        (["best.ckpt", "more.ckpt", "-o", "a.onnx"], "expected one checkpoint or name, got 2"),
        (["best.ckpt", "-o", "a.txt"], "ends in .onnx or .pt2"),
        (["missing.ckpt", "-o", "a.onnx"], "missing.ckpt does not exist"),
        (["no_such_name", "-o", "a.onnx"], "unknown detector 'no_such_name'"),
        (["best.ckpt", "-o", "a.onnx", "--int8", "missing"], "missing does not exist"),
        (["images", "--check", "a.onnx"], "a.onnx does not exist"),
        (["images", "--check", "a.pt2"], "--check is for .onnx files"),
        (["images", "--check", "a.onnx", "--half"], "--half is for writing a file; leave it out of --check"),
        (["best.ckpt", "-o", "a.onnx", "--checkpoint", "b.ckpt"], "--checkpoint is for --check FILE"),
    ],
)
def test_what_is_wrong_is_one_line(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["export", *arguments]) in (1, 2)
    [line] = capsys.readouterr().err.splitlines()
    assert message in line
    assert [*tmp_path.iterdir()] == []


def test_the_example_refuses_what_pillow_cuts_off(tmp_path):
    pytest.importorskip("onnxruntime")
    from serving.onnx_files import write_detector

    Image.fromarray(np.full((20, 30), 4000, np.uint16)).save(tmp_path / "deep.png")
    with pytest.raises(SystemExit, match=r"deep\.png has more than 8 bits a pixel"):
        runpy.run_path(str(EXAMPLE))["main"](str(write_detector(tmp_path / "model.onnx")), str(tmp_path / "deep.png"))


@pytest.mark.slow
def test_a_checkpoint_becomes_a_file_that_runs_without_detpipe(trained, demo_root, tmp_path, capsys):
    path, images = tmp_path / "model.onnx", sorted(demo_root.rglob("*.png"))[:6] or sorted(demo_root.rglob("*.jpg"))[:6]
    assert images
    assert cli.main(["export", str(trained / "best.ckpt"), "-o", str(path)]) == 0
    assert "boxes within" in capsys.readouterr().out
    assert cli.main(["export", "--check", str(path), *map(str, images)]) == 0
    assert f"against {trained / 'best.ckpt'}: 6 images" in capsys.readouterr().out
    code = f"import sys; sys.argv[1:] = {[str(path), *map(str, images)]}; exec(open({str(EXAMPLE)!r}).read()); "
    code += "assert not {'torch', 'detpipe'} & {*sys.modules}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    split = demo_root / "coco"
    found = ["predict", "--no-drawings", "--score_threshold", "0.05", *map(str, [split / "val"])]
    scores = []
    for model, out in ((path, tmp_path / "file"), (trained / "best.ckpt", tmp_path / "whole")):
        assert cli.main([*found[:1], str(model), *found[1:], "-o", str(out), "--device", "cpu"]) == 0
        numbers = tmp_path / "numbers.json"
        truth = str(split / "annotations" / "instances_val.json")
        files = ["--detections", str(out / "detections.json"), "--annotations", truth, "--json", str(numbers)]
        assert cli.main(["evaluate", *files, "--protocol", "coco"]) == 0
        scores.append(json.loads(numbers.read_text())["AP"])
    assert scores[0] == pytest.approx(scores[1], abs=1e-3)
    assert scores[0] > 0

"""Prediction through the commands, with the tiny detector of all tests."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import runs
import tifffile
import torch
from PIL import Image
from together import fork, free_port, wait

from detpipe import cli
from detpipe.commands.predict import detect
from detpipe.datasets import read_image
from detpipe.evaluation import evaluate, read_coco_annotations, read_detections
from detpipe.prediction import TiledDetector
from detpipe.prediction.inputs import ImageInput
from detpipe.support.errors import DataError
from detpipe.training.models import load_detector
from detpipe.types import PixelType


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Seven images of two sizes, and what is none."""
    folder = tmp_path_factory.mktemp("pictures")
    draw = np.random.default_rng(0)
    for index in range(7):
        pixels = draw.integers(0, 256, (6, 8 if index % 3 else 9, 3), dtype=np.uint8)
        image = Image.fromarray(pixels)
        image.resize((16 * pixels.shape[1], 96)).save(folder / f"{index}.png")
    (folder / "none.png").write_text("no image")
    return folder


def predict(trained: Path, pictures: Path, out: Path, *more: str) -> int:
    command = ["predict", str(trained / "best.ckpt"), str(pictures), "-o", str(out), "--device", "cpu"]
    return cli.main([*command, "--score_threshold", "0.01", "--batch_size", "3", *more])


@pytest.fixture(scope="module")
def whole(trained: Path, pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """What one process writes."""
    out = tmp_path_factory.mktemp("whole")
    assert predict(trained, pictures, out, "--no-drawings") == 3
    return (out / "detections.json").read_bytes()


def report(content: bytes) -> dict[str, Any]:
    return json.loads(content)


def test_batches_find_what_single_images_have(whole, trained, pictures):
    detector, description = load_detector(trained / "best.ckpt")
    found = report(whole)
    assert [Path(one["file"]).name for one in found["images"]] == [f"{k}.png" for k in range(7)]
    assert [Path(one["file"]).name for one in found["failed"]] == ["none.png"]
    assert "on_bad" not in found["failed"][0]["reason"]  # an option of data sets
    for record in found["images"][:2]:
        own = detect(detector, read_image(record["file"]), None, 0.01)
        boxes = torch.tensor([one["box"] for one in record["detections"]])
        torch.testing.assert_close(boxes, own["boxes"], rtol=1e-3, atol=1e-2)
        assert [one["label"] for one in record["detections"]] == [description.class_names[k - 1] for k in own["labels"]]


def test_parts_make_the_whole_to_the_bit(whole, trained, pictures, tmp_path, capsys):
    folder = tmp_path / "a folder"
    for number in (2, 1, 3):
        assert predict(trained, pictures, folder, "--no-drawings", "--part", f"{number}/3") == 0
    assert f"part 3 of 3 is done; when all are there, join them: detpipe merge '{folder}'" in capsys.readouterr().out
    assert cli.main(["merge", str(folder)]) == 3
    assert (folder / "detections.json").read_bytes() == whole


def test_a_run_goes_on_where_it_was_stopped(whole, trained, pictures, tmp_path, capsys):
    assert predict(trained, pictures, tmp_path, "--no-drawings") == 3
    lines = tmp_path / "detections.jsonl"
    kept = lines.read_bytes().splitlines(keepends=True)
    lines.write_bytes(b"".join(kept[:4]) + kept[4][:20])  # killed within the fourth image, in the middle of a batch
    (tmp_path / "detections.json").unlink()
    assert predict(trained, pictures, tmp_path, "--no-drawings") == 2
    assert "add --resume to go on" in capsys.readouterr().err
    assert predict(trained, pictures, tmp_path, "--no-drawings", "--resume") == 3
    assert (tmp_path / "detections.json").read_bytes() == whole
    assert lines.read_bytes().startswith(b"".join(kept[:4]))
    lines.write_bytes(b"".join(kept[:4]))
    assert predict(trained, pictures, tmp_path, "--no-drawings", "--resume", "--tta") == 2
    assert "tta was False, is True" in capsys.readouterr().err


def test_a_kill_loses_nothing(whole, trained, pictures, tmp_path):
    """A process that dies while it reads the fifth image, after three were written."""
    lines, out = tmp_path / "out" / "detections.jsonl", tmp_path / "out"

    def dies() -> int:
        read = ImageInput.read

        def killed(self: ImageInput, pixels: PixelType) -> torch.Tensor:
            while self.path.name == "5.png":
                if lines.exists() and lines.read_bytes().count(b"\n") > 3:
                    os.kill(os.getpid(), signal.SIGKILL)
                time.sleep(0.01)
            return read(self, pixels)

        ImageInput.read = killed  # type: ignore[method-assign]
        return predict(trained, pictures, out, "--no-drawings", "--workers", "2")

    child = fork(dies, tmp_path / "said", tmp_path / "errors")
    assert wait(child, 120) == -signal.SIGKILL
    assert 4 <= lines.read_bytes().count(b"\n") < 9
    assert predict(trained, pictures, out, "--no-drawings", "--resume") == 3
    assert (out / "detections.json").read_bytes() == whole


def test_a_disk_that_fills_is_one_line(trained, pictures, tmp_path, capsys, monkeypatch):
    """The drawing that does not fit is named; the images before it are kept."""
    from detpipe.pictures import visualize

    def save(path: Path, image: torch.Tensor) -> None:
        if path.name == "3.jpg":
            raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(visualize, "save_jpeg", save)
    assert predict(trained, pictures, tmp_path, "--workers", "1") == 1
    [line] = capsys.readouterr().err.splitlines()
    assert f"No space left on device: '{tmp_path / '3.jpg'}'" in line
    assert "MiB are free there; files that were complete before are intact" in line
    monkeypatch.undo()
    assert predict(trained, pictures, tmp_path, "--resume") == 3
    assert len(report((tmp_path / "detections.json").read_bytes())["images"]) == 7


def test_names_that_are_not_utf8(trained, pictures, tmp_path):
    odd = tmp_path / "images" / os.fsdecode(b"odd\xff.png")
    odd.parent.mkdir()
    odd.write_bytes((pictures / "0.png").read_bytes())
    assert predict(trained, odd.parent, tmp_path / "out") == 0
    [one] = report((tmp_path / "out" / "detections.json").read_bytes())["images"]
    assert one["file"] == str(odd)
    assert (tmp_path / "out" / one["drawing"]).is_file()


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A TIFF of three pages, each in another layout, with a smaller copy that is none."""
    path = tmp_path_factory.mktemp("tiff") / "stack.tif"
    pixels = np.asarray(
        Image.fromarray(np.random.default_rng(1).integers(0, 256, (9, 12, 3), dtype=np.uint8)).resize((150, 110))
    )
    with tifffile.TiffWriter(path) as file:
        file.write(pixels, tile=(32, 48), compression="zlib", photometric="rgb")
        file.write(pixels[::2, ::2], subfiletype=1, photometric="rgb")
        file.write(pixels, rowsperstrip=7, compression="zlib", photometric="rgb")
        file.write(np.moveaxis(pixels, 2, 0), planarconfig="separate", photometric="rgb")
    return path


def test_pages_of_a_tiff_are_looked_at_by_window(stack, trained, tmp_path):
    assert predict(trained, stack, tmp_path, "--tiles", "64", "--no-drawings") == 0
    found = report((tmp_path / "detections.json").read_bytes())
    assert [(one["file"], one["page"]) for one in found["images"]] == [(str(stack), page) for page in (1, 2, 3)]
    first, *others = (one["detections"] for one in found["images"])
    assert first
    assert all(other == first for other in others)  # the same pixels, however they lie in the file
    detector, _ = load_detector(trained / "best.ckpt")
    with torch.inference_mode():
        [own] = TiledDetector(detector, 64)([read_image(stack)])
    assert len(own["scores"]) == len(first)


def test_pages_of_a_tiff_are_frames(stack, trained, tmp_path):
    pages = tmp_path / "pages.tif"
    with tifffile.TiffWriter(pages) as file:
        for pixels in (np.zeros((110, 150, 3), np.uint8), tifffile.imread(stack, key=0)):
            file.write(pixels, photometric="rgb")
    options = ["--tiles", "64", "--no-drawings"]
    assert predict(trained, pages, tmp_path, *options) == 0
    assert predict(trained, pages, tmp_path, *options, "--rate", "5") == 0
    images = report((tmp_path / "detections.json").read_bytes())["images"]
    _, *frames = [json.loads(line) for line in (tmp_path / "frames.jsonl").read_text().splitlines()]
    assert [one["detections"] for one in frames] == [one["detections"] for one in images]


def test_a_damaged_tiff_is_named(stack, trained, tmp_path, capsys):
    broken = tmp_path / "broken.tif"
    broken.write_bytes(stack.read_bytes()[:9000])
    assert predict(trained, broken, tmp_path / "out", "--tiles", "64") == 1
    assert f"skipped: {broken}" in capsys.readouterr().err


def test_predictions_are_evaluated(trained, demo_root, tmp_path):
    """From both files that predict writes; what does not fit the ground truth is named."""
    truth = read_coco_annotations(demo_root / "coco" / "annotations" / "instances_val.json")
    images = demo_root / "coco" / "val"
    assert predict(trained, images, tmp_path, "--no-drawings", "--score_threshold", "0.0") == 0
    found = [read_detections(tmp_path / name, truth) for name in ("detections.json", "detections.jsonl")]
    assert found[0].scores.tolist() == found[1].scores.tolist() != []
    numbers = evaluate(truth, found[0], "coco")
    assert numbers["AP"] >= 0
    content = json.loads((tmp_path / "detections.json").read_text())
    first = content["images"][0]
    for spoil, message in (
        ({"images": content["images"][1:]}, r"has no record of 1 of 6 images, such as"),
        ({"images": [*content["images"], first]}, r"is there twice"),
        ({"images": [{**first, "file": "x.jpg"}]}, r"image x\.jpg: is not an image of the ground truth"),
        ({"images": [{**first, "detections": [{"label": "cow"}]}]}, r"class 'cow' is not one of the ground truth"),
        ({"images": [{**first, "detections": [{"label": "1", "score": "x"}]}]}, r"'score'"),
    ):
        (tmp_path / "spoiled.json").write_text(json.dumps({**content, **spoil}))
        with pytest.raises(DataError, match=message):
            read_detections(tmp_path / "spoiled.json", truth)


@pytest.mark.slow
def test_evaluation_looks_at_tiles_and_several_times(trained, demo_root, tmp_path, capsys):
    options = ["evaluate", runs.CONFIG, *runs.options(demo_root), "--ckpt_path", str(trained / "best.ckpt")]
    counts = []
    for name, more in (("plain", []), ("tta", ["--tta", "true"]), ("tiles", ["--tiles", "48"])):
        out = tmp_path / f"{name}.json"
        assert cli.main([*options, *more, "--detections_out", str(out), "--json", str(tmp_path / "n.json")]) == 0
        counts.append(len(json.loads(out.read_text())))
    assert min(counts) > 0
    assert len(set(counts)) > 1
    shown = capsys.readouterr().out
    assert "images have 100 detections, the most that the model gives" in shown
    assert cli.main([*options, "--tiles", "48", "--data.resize", '{"min_size": 64, "max_size": 64}']) == 2
    assert "set data.resize to null" in capsys.readouterr().err
    assert cli.main([*options, "--overlap", "0.5"]) == 2
    assert "--overlap is about tiles: add --tiles SIDE, or leave it out" in capsys.readouterr().err


@pytest.mark.slow
def test_two_launchers_of_two_processes_find_what_one_does(whole, trained, pictures, demo_root, tmp_path):
    """Prediction, evaluation and proposals, to the bit."""
    checkpoint = str(trained / "best.ckpt")
    options = [*runs.options(demo_root), "--ckpt_path", checkpoint, "--data.loader.eval_batch_size", "1"]
    evaluation = ["evaluate", runs.CONFIG, *options]
    one, four = tmp_path / "one", tmp_path / "four"
    made = ["proposals", "make", checkpoint, "--data", str(demo_root / "coco" / "val"), "--device", "cpu"]
    found = ["predict", checkpoint, str(pictures), "--device", "cpu", "--score_threshold", "0.01", "--batch_size", "3"]
    commands = {
        "detections.json": [*found, "--no-drawings", "-o", "{}"],
        "found.json": [*evaluation, "--detections_out", "{}/found.json", "--json", "{}/numbers.json"],
        "boxes.safetensors": [*made, "-o", "{}/boxes.safetensors"],
    }
    for name, command in commands.items():
        alone = [part.replace("{}", str(one)) for part in command]
        if name != "detections.json":
            assert cli.main(alone) == 0
        by_two_launchers([part.replace("{}", str(four)) for part in command])
        expected = whole if name == "detections.json" else (one / name).read_bytes()
        assert (four / name).read_bytes() == expected, name
    assert (one / "numbers.json").read_bytes() == (four / "numbers.json").read_bytes()
    assert not list(four.glob("*.partial*"))


def by_two_launchers(command: list[str]) -> None:
    """Run a command by two launchers of two processes each, as two machines would."""
    options = f"--nnodes 2 --nproc_per_node 2 --master_addr 127.0.0.1 --master_port {free_port()}".split()
    run = [sys.executable, "-m", "torch.distributed.run", *options, "--node_rank"]
    streams: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    launchers = [
        subprocess.Popen([*run, node, "-m", "detpipe", *command], env=environment, **streams) for node in ("0", "1")
    ]
    said = [launcher.communicate(timeout=500)[0] for launcher in launchers]
    assert all(launcher.returncode in (0, 1) for launcher in launchers), said
    # launchers complain of one another at the end; the processes that they started do not
    assert not re.search(r'File ".*/detpipe/(commands|prediction|support|cli)', "".join(said)), said

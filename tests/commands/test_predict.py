from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from detpipe import cli
from detpipe.commands.given_proposals import read_proposals
from detpipe.commands.predict import _job, _parse_predict, detect
from detpipe.datasets import read_image
from detpipe.support.errors import DataError
from detpipe.training import checkpoint
from detpipe.training.checkpoint import Description
from detpipe.training.models import load_detector


@pytest.fixture
def pictures(demo_root: Path, trained: Path, tmp_path: Path) -> Path:
    """A folder with two scenes in it and one, of the same name, in a folder below."""
    folder = tmp_path / "pictures"
    (folder / "more").mkdir(parents=True)
    scenes = sorted((demo_root / "coco" / "val").iterdir())
    shutil.copy(scenes[0], folder / "a.jpg")
    shutil.copy(scenes[1], folder / "b.jpg")
    Image.open(scenes[2]).resize((96, 80)).save(folder / "more" / "a.png")
    return folder


@pytest.fixture
def with_precomputed(trained: Path, tmp_path: Path) -> Path:
    """A checkpoint of a detector that was trained on precomputed proposals."""
    content = torch.load(trained / "best.ckpt", weights_only=True)
    source = {"class_path": "detpipe.PrecomputedProposals", "init_args": {"max_boxes": 10}}
    content[checkpoint.KEY]["model"]["proposals"] = source
    content["state_dict"] = {k: v for k, v in content["state_dict"].items() if not k.startswith("proposals.")}
    torch.save(content, tmp_path / "precomputed.ckpt")
    return tmp_path / "precomputed.ckpt"


def predict(trained: Path, out: Path, *arguments: str, status: int = 0) -> dict[str, Any]:
    command = ["predict", str(trained / "best.ckpt"), "-o", str(out), "--device", "cpu", "--score_threshold", "0.01"]
    assert cli.main([*command, *arguments]) == status
    return json.loads((out / "detections.json").read_text())


def failure(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    status = cli.main(["predict", *arguments])
    shown = capsys.readouterr().err
    assert shown.startswith("detpipe: error: ")
    assert len(shown.splitlines()) == 1
    return status, shown


def test_a_folder_is_searched_and_nothing_overwrites_anything(trained, pictures, tmp_path, capsys):
    out = tmp_path / "out"
    report = predict(trained, out, str(pictures))
    assert [Path(record["file"]).relative_to(pictures).as_posix() for record in report["images"]] == [
        *("a.jpg", "b.jpg", "more/a.png"),
    ]
    assert [record["drawing"] for record in report["images"]] == ["a.jpg", "b.jpg", "a-2.jpg"]
    assert sorted(path.name for path in out.iterdir()) == [
        *("a-2.jpg", "a.jpg", "b.jpg", "detections.json", "detections.jsonl"),
    ]
    assert report["failed"] == []
    count = sum(len(record["detections"]) for record in report["images"])
    said = capsys.readouterr().out.splitlines()
    assert said[0] == f"3 images, {count} detections, 0 unreadable; see {out / 'detections.json'}"
    assert said[1:] == ["3 images have 100 detections, the most that the model gives: --max_detections takes more"]
    assert count > 0


def test_pictures_of_others_are_not_drawn_over(trained, pictures, tmp_path, capsys):
    out, source = tmp_path / "out", str(pictures / "more" / "a.png")
    out.mkdir()
    (out / "a.jpg").write_bytes(b"mine")
    status, shown = failure([str(trained / "best.ckpt"), source, "-o", str(out)], capsys)
    assert status == 2
    assert f"{out / 'a.jpg'}: is there, and no predictions in {out} say that they drew it: give another -o" in shown
    assert [(path.name, path.read_bytes()) for path in out.iterdir()] == [("a.jpg", b"mine")]
    for _ in range(2):  # its own are drawn again
        assert predict(trained, tmp_path / "other", source)["images"][0]["drawing"] == "a.jpg"


@pytest.mark.parametrize(
    ("size", "shown"),  # a JPEG has at most 65,500 pixels a side
    [((3000, 1), (3000, 80)), ((16, 8000), (80, 8000)), ((1, 1), (480, 480)), ((70_000, 1), (4118, 80))],
)
def test_slim_images_are_drawn(size, shown, trained, tmp_path):
    Image.effect_noise(size, 50).convert("RGB").save(tmp_path / "slim.png")
    [record] = predict(trained, tmp_path / "out", str(tmp_path / "slim.png"))["images"]
    assert (record["width"], record["height"]) == size
    with Image.open(tmp_path / "out" / "slim.jpg") as drawn:
        assert drawn.size == shown


def test_boxes_are_in_pixels_of_the_image_and_names_are_those_of_the_checkpoint(trained, pictures, tmp_path):
    report = predict(trained, tmp_path / "out", str(pictures / "more" / "a.png"))
    [record] = report["images"]
    assert (record["width"], record["height"]) == (96, 80)
    detector, description = load_detector(trained / "best.ckpt")
    found = detect(detector, read_image(pictures / "more" / "a.png"), None, 0.01)
    assert len(record["detections"]) == len(found["scores"]) > 0
    for one, box, score, label in zip(
        record["detections"], *(found[k] for k in ("boxes", "scores", "labels")), strict=True
    ):
        assert one["box"] == box.tolist()
        assert one["score"] == score.item() >= 0.01
        assert one["label"] == description.class_names[label - 1]
    boxes = np.array([one["box"] for one in record["detections"]])
    assert boxes.min() >= 0
    assert (boxes.max(0) <= [96, 80, 96, 80]).all()
    assert boxes[:, 2].max() > 64  # wider than what the network saw
    assert report["class_names"] == list("0123456789")
    assert report["checkpoint"] == str(trained / "best.ckpt")
    with Image.open(tmp_path / "out" / "a.jpg") as drawing:
        assert drawing.width * 80 == drawing.height * 96  # small images are drawn enlarged


def test_unreadable_images_are_counted_and_the_rest_goes_on(trained, pictures, tmp_path, capsys):
    (pictures / "a.jpg").write_bytes((pictures / "a.jpg").read_bytes()[:300])
    (pictures / "text.jpg").write_text("no picture")
    report = predict(trained, tmp_path / "out", str(pictures), status=3)
    assert [Path(record["file"]).name for record in report["failed"]] == ["a.jpg", "text.jpg"]
    assert all(record["file"] in record["reason"] for record in report["failed"])
    assert [Path(record["file"]).name for record in report["images"]] == ["b.jpg", "a.png"]
    captured = capsys.readouterr()
    assert "2 images" in captured.out
    assert "2 unreadable" in captured.out
    assert captured.err.count("skipped: ") == 2
    assert "Traceback" not in captured.err


def test_no_readable_image_at_all_is_a_failure(trained, tmp_path):
    (tmp_path / "x.jpg").write_text("no picture")
    command = ["predict", str(trained / "best.ckpt"), str(tmp_path / "x.jpg"), "-o", str(tmp_path / "out")]
    assert cli.main(command) == 1
    assert json.loads((tmp_path / "out" / "detections.json").read_text())["images"] == []


def test_drawings_beside_the_images_do_not_overwrite_them(trained, pictures):
    before = (pictures / "more" / "a.png").read_bytes()
    report = predict(trained, pictures / "more", str(pictures), "--drawings", "png")
    assert (pictures / "more" / "a.png").read_bytes() == before
    assert [record["drawing"] for record in report["images"]] == ["a-2.png", "b.png", "a-3.png"]


def test_the_score_threshold(trained, pictures, tmp_path):
    few = predict(trained, tmp_path / "few", str(pictures), "--score_threshold", "0.2")
    many = predict(trained, tmp_path / "many", str(pictures), "--score_threshold", "0.01")
    counts = [sum(len(record["detections"]) for record in report["images"]) for report in (few, many)]
    assert counts[0] < counts[1]
    assert all(one["score"] >= 0.2 for record in few["images"] for one in record["detections"])


def test_proposals_of_a_file_are_where_the_detector_looks(with_precomputed, pictures, tmp_path):
    boxes = {"b.jpg": [[4, 4, 30, 30], [20, 20, 60, 60]], str(pictures / "a.jpg"): [[1, 1, 20.5, 30]], "a": []}
    file = tmp_path / "proposals.json"
    file.write_text(json.dumps(boxes))
    out = tmp_path / "out"
    command = ["predict", str(with_precomputed), str(pictures), "-o", str(out), "--proposals", str(file)]
    assert cli.main([*command, "--score_threshold", "0"]) == 0
    images = {
        Path(r["file"]).relative_to(pictures).as_posix(): r
        for r in json.loads((out / "detections.json").read_text())["images"]
    }
    assert images["more/a.png"]["detections"] == []
    detector, _ = load_detector(with_precomputed)
    for name, given in (("b.jpg", boxes["b.jpg"]), ("a.jpg", boxes[str(pictures / "a.jpg")])):
        proposals = torch.tensor(given, dtype=torch.float32)
        expected = detect(detector, read_image(pictures / name), proposals, 0)
        assert [one["box"] for one in images[name]["detections"]] == expected["boxes"].tolist()
        assert len(expected["boxes"]) > 0


def test_proposals_take_the_place_of_a_detectors_own(trained, pictures, tmp_path):
    file = tmp_path / "proposals.json"
    file.write_text(json.dumps({"b": []}))
    [record] = predict(trained, tmp_path / "out", str(pictures / "b.jpg"), "--proposals", str(file))["images"]
    assert record["detections"] == []


def test_a_detector_of_precomputed_proposals_asks_for_them(with_precomputed, pictures, tmp_path, capsys):
    status, shown = failure([str(with_precomputed), str(pictures), "-o", str(tmp_path / "out")], capsys)
    assert status == 2
    assert (
        "was trained on precomputed proposals and needs boxes for the images: add --proposals selective_search, another"
        in shown
    )


def test_missing_proposals_are_found_before_anything_is_written(trained, pictures, tmp_path, capsys):
    file = tmp_path / "proposals.json"
    file.write_text(json.dumps({"a": [[0, 0, 9, 9]]}))
    arguments = [str(trained / "best.ckpt"), str(pictures), "-o", str(tmp_path / "out"), "--proposals", str(file)]
    status, shown = failure(arguments, capsys)
    assert status == 1
    assert f"the proposals file has no boxes for {pictures / 'b.jpg'}: add the key 'b.jpg'" in shown
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1], "must map image names to lists of"),
        ({"a": 3}, "image 'a': expected a list of"),
        ({"a": [[1, 2, 3]]}, "image 'a', box 0: expected"),
        ({"a": [[0, 0, 9, 9], [1, 2, 1, 9]]}, "image 'a', box 1: expected .* x2 > x1"),
        ({"a": [[0, 0, True, 9]]}, "image 'a', box 0"),
        ({"a": [["0", 0, 9, 9]]}, "image 'a', box 0"),
        ({"a": [[0, 0, 9, 10**400]]}, "image 'a', box 0: expected"),
        ({"a": [[0, 0, 9, 10**39]]}, "image 'a', box 0: expected"),
        ({"a": [[2**25, 0, 2**25 + 1, 9]]}, "image 'a', box 0: expected"),
    ],
)
def test_a_wrong_proposals_file_names_image_and_box(content, message, tmp_path):
    path = tmp_path / "proposals.json"
    path.write_text(json.dumps(content))
    with pytest.raises(DataError, match=rf"proposals\.json.*{message}"):
        read_proposals(path)


def test_a_proposals_file_that_is_no_json(tmp_path):
    (tmp_path / "p.json").write_text('{"a": [[0, 0, NaN, 9]]}')
    with pytest.raises(DataError, match=r"p\.json: line 1"):
        read_proposals(tmp_path / "p.json")
    with pytest.raises(DataError, match=r"q\.json: no such file"):
        read_proposals(tmp_path / "q.json")


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["CHECKPOINT", "nowhere"], 2, "nowhere does not exist; expected an image or a folder of images"),
        (["nowhere.ckpt", "IMAGES"], 1, "checkpoint nowhere.ckpt does not exist"),
        (["CHECKPOINT", "IMAGES", "--score_threshold", "1.5"], 2, "--score_threshold must be in 0..1, got 1.5"),
        (
            ["CHECKPOINT", "IMAGES", "--score_threshold", "x"],
            2,
            "invalid float value: 'x'; see 'detpipe predict --help'",
        ),
        (["CHECKPOINT", "IMAGES", "--device", "tpu9"], 2, "device 'tpu9' cannot be used"),
        (["CHECKPOINT", "IMAGES", "--nothing"], 2, "unrecognized arguments: --nothing"),
        (["CHECKPOINT", "IMAGES", "--part", "4/3"], 2, "expected NUMBER/PARTS such as 3/16, got '4/3'"),
        (["CHECKPOINT", "IMAGES", "--tiles", "0"], 2, "--tiles must be 1 or more"),
        (["CHECKPOINT", "IMAGES", "--tiles", "9", "--overlap", "1"], 2, "--overlap must be in 0"),
        (["CHECKPOINT", "IMAGES", "--merge", "box_fusion"], 2, "--merge is about tiles: add --tiles SIDE, or leave it"),
        (["CHECKPOINT", "IMAGES", "--drawings", "png", "--no-drawings"], 2, "not allowed with argument --drawings"),
        (["CHECKPOINT", "IMAGES", "--show-glimpses", "--tta"], 2, "--show-glimpses is for whole images"),
        (["CHECKPOINT", "IMAGES", "--max_detections", "0"], 2, "--max_detections must be 1 or more, got 0"),
        (["CHECKPOINT", "IMAGES", "--score-threshold", "0"], 2, "did you mean '--score_threshold'?"),
        (["CHECKPOINT", ""], 2, "an argument is empty; is a variable of the shell not set?"),
        (["CHECKPOINT", "IMAGES", "--device", "meta"], 2, "device 'meta' cannot be used"),
        (["RUN", "IMAGES"], 1, "is a folder; give a file in it, such as"),
        (["CHECKPOINT", "IMAGES", "--workers", "0"], 2, "--workers must be 1 or more"),
        (["CHECKPOINT", "IMAGES", "-o", "CHECKPOINT"], 2, "best.ckpt: is a file: name a folder"),
    ],
)
def test_mistakes_on_the_command_line(arguments, status, message, trained, pictures, tmp_path, capsys):
    names = {"CHECKPOINT": str(trained / "best.ckpt"), "IMAGES": str(pictures), "RUN": str(trained)}
    given = ["-o", str(tmp_path / "out"), *(names.get(one, one) for one in arguments)]
    got, shown = failure(given, capsys)
    assert got == status
    assert message in shown
    assert not (tmp_path / "out").exists()


def test_the_output_folder_is_required(trained, pictures, capsys):
    status, shown = failure([str(trained / "best.ckpt"), str(pictures)], capsys)
    assert status == 2
    assert "-o/--output" in shown


def test_other_boxes_or_weights_are_another_run(trained, pictures, tmp_path, capsys):
    file, out = tmp_path / "proposals.json", tmp_path / "out"
    file.write_text(json.dumps({"a": [], "b": []}))
    predict(trained, out, str(pictures), "--proposals", str(file))
    lines = (out / "detections.jsonl").read_bytes().splitlines(keepends=True)
    (out / "detections.jsonl").write_bytes(b"".join(lines[:-1]))
    file.write_text(json.dumps({"a": [[1, 1, 20, 30]], "b": []}))
    predict(trained, out, str(pictures), "--proposals", str(file), "--resume", status=2)
    assert "--resume is for the same command, but proposals was" in capsys.readouterr().err
    models = set()
    for content in ("one", "other"):
        (tmp_path / "weights.pth").write_text(content)
        options = _parse_predict(["name", "x", "-o", "out", "--weights", str(tmp_path / "weights.pth")])
        models.add(_job([], options, Description({}, ("a",), (1,)), "detections", {}, 1).settings["model"])
    assert len(models) == 2

from __future__ import annotations

import json

import pytest

pytest.importorskip("av", reason="PyAV is not installed: pip install 'detpipe[video]'")

from detpipe import cli
from tests.prediction.test_video import write_video


def test_a_video_and_a_folder_of_frames(trained, demo_root, tmp_path, capsys):
    command = ["predict", str(trained / "best.ckpt"), "-o", str(tmp_path / "out"), "--device", "cpu", "--every", "2"]
    command += ["--score_threshold", "0.01"]
    video = write_video(tmp_path / "in.mp4")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "in.mp4").write_bytes(b"mine")
    assert cli.main([*command, str(video)]) == 2
    assert "in.mp4: is there, and no in.jsonl beside it says that it was made here" in capsys.readouterr().err
    assert (tmp_path / "out" / "in.mp4").read_bytes() == b"mine"
    (tmp_path / "out" / "in.mp4").unlink()
    assert cli.main([*command, str(video)]) == 0
    assert f"3 frames of {video}; see {tmp_path / 'out' / 'in.mp4'}" in capsys.readouterr().out
    head, *lines = [json.loads(line) for line in (tmp_path / "out" / "in.jsonl").read_text().splitlines()]
    assert head["class_names"] == list("0123456789")
    assert [line["frame"] for line in lines] == [0, 2, 4]
    assert all(one["label"] in head["class_names"] for line in lines for one in line["detections"])
    assert cli.main([*command, str(demo_root / "coco" / "val"), "--rate", "4", "--no-drawings"]) == 0
    lines = (tmp_path / "out" / "frames.jsonl").read_text().splitlines()[1:]
    assert [json.loads(line)["seconds"] for line in lines] == [0, 0.5, 1]
    assert not (tmp_path / "out" / "frames.mp4").exists()


def test_of_several_videos_one_that_is_none_is_skipped(trained, tmp_path, capsys):
    (tmp_path / "empty.mp4").write_bytes(b"")
    videos = [str(tmp_path / "empty.mp4"), str(write_video(tmp_path / "in.mp4"))]
    command = ["predict", str(trained / "best.ckpt"), *videos, "-o", str(tmp_path / "out"), "--device", "cpu"]
    assert cli.main(command) == 3
    shown = capsys.readouterr()
    assert f"skipped: {videos[0]}: cannot be read as a video" in shown.err
    assert f"frames of {videos[1]}" in shown.out


def test_each_frame_has_its_own_proposals(trained, demo_root, tmp_path):
    frames = [str(path) for path in sorted((demo_root / "coco" / "val").iterdir())[:2]]
    (tmp_path / "boxes.json").write_text(json.dumps({frames[0]: [], frames[1]: [[4, 4, 30, 30]]}))
    command = ["predict", str(trained / "best.ckpt"), *frames, "-o", str(tmp_path), "--device", "cpu", "--no-drawings"]
    command += ["--rate", "4", "--score_threshold", "0", "--proposals", str(tmp_path / "boxes.json")]
    assert cli.main(command) == 0
    _, *lines = [json.loads(line) for line in (tmp_path / "frames.jsonl").read_text().splitlines()]
    assert [bool(line["detections"]) for line in lines] == [False, True]


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["VIDEO", "IMAGE"], 2, "is no video; give videos alone, or with --rate images as the frames of one"),
        (["VIDEO", "--rate", "9"], 2, "--rate is for images as the frames of a video"),
        (["VIDEO", "--resume"], 2, "a video goes through one process"),
        (["VIDEO", "--drawings", "png"], 2, "is drawn as a video; leave out --drawings"),
        (["https://localhost/a.mp4", "--allow_network"], 2, "a.mp4: videos are read from files alone; download it"),
        (["IMAGE", "--track"], 2, "--track and --every are about videos"),
        (["IMAGE", "--every", "2"], 2, "--track and --every are about videos"),
        (["VIDEO", "--every", "0"], 2, "--every must be 1 or more"),
        (["IMAGE", "--rate", "nan"], 2, "--rate must be above 0"),
        (["EMPTY"], 1, "empty.mp4: cannot be read as a video"),
        (
            ["NO IMAGE", "--rate", "9"],
            1,
            "none.png: cannot be decoded as an image (not a known image format, or empty)",
        ),
    ],
)
def test_mistakes_are_one_line(arguments, status, message, trained, demo_root, tmp_path, capsys):
    names = {"IMAGE": sorted((demo_root / "coco" / "val").iterdir())[0]}
    names |= {"EMPTY": tmp_path / "empty.mp4", "NO IMAGE": tmp_path / "none.png"}
    for name in ("EMPTY", "NO IMAGE"):
        names[name].touch()
    names["VIDEO"] = write_video(tmp_path / "in.mp4")
    given = [str(names.get(one, one)) for one in arguments]
    assert cli.main(["predict", str(trained / "best.ckpt"), "-o", str(tmp_path / "out"), *given]) == status
    shown = capsys.readouterr().err
    assert shown.startswith("detpipe: error: ")
    assert len(shown.splitlines()) == 1
    assert message in shown

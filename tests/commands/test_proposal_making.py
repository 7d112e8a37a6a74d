from __future__ import annotations

import json
import random
import shutil
import signal
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets.builders import coco_content, voc_object, write_coco, write_voc
from PIL import Image
from proposals.needs import PLACES, planted, scikit_image
from together import fork

from detpipe import cli
from detpipe import images as frames
from detpipe.boxes import iou
from detpipe.commands.proposal_making import find_items, report, run_make
from detpipe.datasets import read_image
from detpipe.proposal_files.offline import Summary
from detpipe.proposal_files.store import ProposalStore
from detpipe.proposals import RPN, Anchors, DenseGrid, SelectiveSearch, make_source
from detpipe.support.errors import CheckpointError, DataError, UsageError
from detpipe.training import checkpoint
from detpipe.training.models import load_detector


@pytest.fixture
def voc(tmp_path: Path) -> Path:
    """Five images in VOC layout."""
    return write_voc(tmp_path / "voc", {name: [voc_object()] for name in "abcde"})


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """A plain folder of images with a bright rectangle each, lossless."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number in range(12):
        image = planted(PLACES[number % 3], seed=number)
        Image.fromarray(image[:: 1 + number % 2]).save(folder / f"{number:02}.png")
    return folder


def pixels(path: Path) -> np.ndarray:
    return read_image(path).permute(1, 2, 0).numpy()


def make(source: str, data: Path, out: Path, *options: str) -> ProposalStore:
    assert run_make([source, "--data", str(data), "-o", str(out), *options]) == 0
    assert not list(out.parent.glob("*.partial"))
    return ProposalStore(out)


def test_a_voc_folder(voc, tmp_path, capsys):
    options = ("--split", "train", "--scales", "[8, 16]", "--stride", "4", "--max_boxes", "300")
    store = make("dense_grid", voc, tmp_path / "s.safetensors", *options)
    assert sorted(store) == list("abcde")
    grid = DenseGrid([8, 16], stride=4, max_boxes=300)
    assert (store.source, store.settings) == ("dense_grid", grid.settings)
    boxes, scores = grid.propose(pixels(voc / "JPEGImages" / "c.jpg"))
    assert np.array_equal(store["c"].boxes, boxes)
    assert np.array_equal(store["c"].scores, scores)
    assert store.size("c") == (40, 60)
    captured = capsys.readouterr()
    assert f"5 images, {5 * len(boxes)} boxes ({len(boxes)} an image); " in captured.out
    assert f"wrote {tmp_path / 's.safetensors'}" in captured.out
    assert "5/5" in captured.err


@scikit_image
def test_a_folder_of_images_by_selective_search(pictures, tmp_path):
    options = ("--scales", "[50, 120]", "--color_spaces", "[lab]", "--strategies", "[[size, fill], [color]]")
    store = make("selective_search", pictures, tmp_path / "one.safetensors", *options)
    source = SelectiveSearch(["lab"], [50, 120], [["size", "fill"], ["color"]])
    assert store.settings == json.loads(json.dumps(source.settings))
    assert sorted(store) == [f"{number:02}" for number in range(12)]
    for name in ("00", "01"):
        boxes, scores = source.propose(pixels(pictures / f"{name}.png"))
        assert np.array_equal(store[name].boxes, boxes)
        assert np.array_equal(store[name].scores, scores)
    found = iou(torch.tensor([PLACES[0]]).float(), torch.from_numpy(store["00"].boxes.copy())).max()
    assert found > 0.8


@pytest.mark.slow
@scikit_image
@pytest.mark.parametrize("data", ["voc", "pictures"])
def test_any_number_of_workers_makes_the_same_file(data, request, tmp_path, capsys):
    source, options = {
        "voc": ("dense_grid", ("--split", "train", "--scales", "[8, 16]")),
        "pictures": ("selective_search", ("--scales", "[50]")),
    }[data]
    folder = request.getfixturevalue(data)
    alone = make(source, folder, tmp_path / "one.safetensors", *options)
    pool = make(source, folder, tmp_path / "two.safetensors", *options, "--workers", "2")
    assert pool.path.read_bytes() == alone.path.read_bytes()
    assert "s an image in one process" in capsys.readouterr().out


@scikit_image
def test_a_union(pictures, tmp_path):
    store = make("dense_grid+selective_search", pictures, tmp_path / "s.safetensors")
    union = make_source("dense_grid+selective_search")
    assert (store.source, store.settings) == ("union", json.loads(json.dumps(union.settings)))
    assert np.array_equal(store["05"].boxes, union.propose(pixels(pictures / "05.png"))[0])


def test_a_coco_file_and_folder(tmp_path):
    path, folder = write_coco(tmp_path / "coco", split="val")
    one = make("dense_grid", path, tmp_path / "one.safetensors", "--images", str(folder))
    two = make("dense_grid", tmp_path / "coco", tmp_path / "two.safetensors", "--split", "val")
    assert sorted(one) == ["10", "11", "12"]
    assert one.path.read_bytes() == two.path.read_bytes()


def test_items_are_called_as_the_data_module_calls_them(voc, pictures, tmp_path):
    assert find_items(str(voc), "train")[0] == [(name, voc / "JPEGImages" / f"{name}.jpg") for name in "abcde"]
    assert [item.image_id for item in find_items(str(pictures), None)[0]] == [f"{number:02}" for number in range(12)]
    content = coco_content()
    content["annotations"][0]["bbox"] = [1, 2, -5, 20]
    path, folder = write_coco(tmp_path / "coco", content)
    with pytest.raises(DataError, match="bbox"):
        find_items(str(path), None, str(folder))
    assert len(find_items(str(path), None, str(folder), skip_bad=True)[0]) == 3


def test_a_broken_image_stops_the_run_or_is_skipped(pictures, tmp_path, capsys):
    (pictures / "03.png").write_bytes((pictures / "03.png").read_bytes()[:200])
    out = tmp_path / "s.safetensors"
    command = ["dense_grid", "--data", str(pictures), "-o", str(out)]
    with pytest.raises(
        DataError, match=r"03\.png.*; 3 images are kept in .*s\.safetensors\.partial, and the same command"
    ):
        run_make(command)
    assert not out.exists()
    capsys.readouterr()
    assert run_make([*command, "--skip_bad"]) == 0
    shown = capsys.readouterr().out
    assert "12 images, " in shown
    assert "; 3 images were there from an earlier run" in shown
    assert "1 images skipped, they have no boxes:\n  03: " in shown
    store = ProposalStore(out)
    assert len(store) == 12
    assert len(store["03"].boxes) == 0
    assert store.size("03") is None
    assert len(store["04"].boxes) > 0


@scikit_image
def test_an_image_that_is_too_small_is_a_bad_one(pictures, tmp_path):
    Image.new("RGB", (6, 40)).save(pictures / "small.png")
    out = tmp_path / "s.safetensors"
    command = ["selective_search", "--data", str(pictures), "-o", str(out), "--scales", "[200]", "--skip_bad"]
    with pytest.raises(DataError, match=r"small\.png: an image of 6 x 40 pixels is too small for selective_search"):
        run_make(command[:-1])
    assert run_make(command) == 0
    assert len(ProposalStore(out)["small"].boxes) == 0


def test_two_images_of_one_name_are_refused(pictures, tmp_path):
    (pictures / "more").mkdir()
    shutil.copy(pictures / "00.png", pictures / "more" / "00.png")
    with pytest.raises(DataError, match="have the same id '00'"):
        run_make(["dense_grid", "--data", str(pictures), "-o", str(tmp_path / "s.safetensors")])


def test_other_settings_do_not_go_on_with_what_is_kept(pictures, tmp_path):
    (pictures / "03.png").write_text("no image")
    command = ["dense_grid", "--data", str(pictures), "-o", str(tmp_path / "s.safetensors")]
    with pytest.raises(DataError, match="3 images are kept"):
        run_make(command)
    with pytest.raises(DataError, match="an interrupted run left it with"):
        run_make([*command, "--stride", "8"])


MISTAKES = [
    (["dense_gird"], "unknown proposal source 'dense_gird'.*did you mean 'dense_grid'"),
    (["dense_grid+edge_boxs"], "unknown proposal source 'edge_boxs'.*did you mean 'edge_boxes'"),
    (["dense_grid"], "data.*see 'detpipe proposals make dense_grid --help'"),
    (["dense_grid", "--data", "D"], "output"),
    (
        ["dense_grid", "--data", "D", "-o", "boxes.npz"],
        r"--output boxes\.npz: the name of a store must end in \.safetensors",
    ),
    (["dense_grid", "--data", "D", "-o", "O", "--workers", "0"], "--workers must be 1 or more, got 0"),
    (["dense_grid", "--data", "D", "-o", "O", "--scale", "3"], "scale"),
    (["dense_grid", "--data", "D", "-o", "O", "--scales", "big"], "scales"),
    (["dense_grid", "--data", "D", "-o", "O", "--stride", "0"], "stride must be positive"),
    (["dense_grid", "--data", "D", "-o", "O", "--split", "val"], "--split val: --data .* is a plain folder of images"),
    (["dense_grid", "--data", "D", "-o", "O", "--images", "D"], "--images .*: --data .* is a plain folder of images"),
    (["dense_grid", "--data", "D/missing", "-o", "O"], "missing does not exist; expected a folder in VOC layout"),
    (["dense_grid", "--data", "D/00.png", "-o", "O"], "has no known layout"),
]


@pytest.mark.parametrize(("arguments", "message"), MISTAKES, ids=[" ".join(mistake[0]) for mistake in MISTAKES])
def test_mistakes_are_said_in_one_line(arguments, message, pictures, tmp_path, capsys):
    places = {"D": str(pictures), "O": str(tmp_path / "s.safetensors"), "D/missing": str(pictures / "missing")}
    places["D/00.png"] = str(pictures / "00.png")
    arguments = [places.get(word, word) for word in arguments]
    with pytest.raises(UsageError, match=message):
        run_make(arguments)
    capsys.readouterr()
    assert cli.main(["proposals", "make", *arguments]) == 2
    shown = capsys.readouterr().err
    assert shown.startswith("detpipe: error: ")
    assert len(shown.splitlines()) == 1
    assert not list(tmp_path.glob("*.safetensors*"))


def test_an_empty_folder_is_said(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match="empty holds no image"):
        run_make(["dense_grid", "--data", str(tmp_path / "empty"), "-o", str(tmp_path / "s.safetensors")])


def test_what_is_missing_is_said_before_images_are_looked_for(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "skimage.segmentation", None)
    monkeypatch.setitem(sys.modules, "skimage", None)
    out = str(tmp_path / "s.safetensors")
    for name in ("selective_search", "dense_grid+selective_search"):
        with pytest.raises(UsageError, match=r"^selective_search needs scikit-image"):
            run_make([name, "--data", str(tmp_path / "missing"), "-o", out])


def test_help(capsys):
    assert run_make(["--help"]) == 0
    assert "usage: detpipe proposals make SOURCE" in capsys.readouterr().out
    assert run_make([]) == 2
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        run_make(["selective_search", "--help"])
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    for option in (
        "--data",
        "--split",
        "--images",
        "--output",
        "--workers",
        "--skip_bad",
        "--color_spaces",
        "--min_region",
    ):
        assert option in shown
    assert "pixel_format" not in shown


def test_the_report_names_five_of_many_skipped_images(pictures, tmp_path):
    store = make("dense_grid", pictures, tmp_path / "s.safetensors")
    summary = Summary(12, 12, 3.0, {str(number): "bad" for number in range(6)})
    lines = report(summary, store, 7.0).splitlines()
    assert "; 0.50 s an image in one process, 7.0 s in all" in lines[0]
    assert "earlier" not in lines[0]
    assert lines[1] == "6 images skipped, they have no boxes:"
    assert lines[2:7] == [f"  {number}: bad" for number in range(5)]
    assert lines[7:] == [f"wrote {store.path}"]


@pytest.fixture
def with_rpn(trained: Path, tmp_path: Path) -> Path:
    """A checkpoint of a detector with an untrained RPN."""
    content = torch.load(trained / "best.ckpt", weights_only=True)
    settings = {"anchors": {"class_path": "detpipe.proposals.Anchors", "init_args": {"sizes": [[16, 24]]}}}
    model = content[checkpoint.KEY]["model"]
    model["proposals"] = {"class_path": "detpipe.proposals.RPN", "init_args": settings}
    rpn = RPN(8, {"c2": 4}, anchors=Anchors([[16, 24]]))
    for parameter in rpn.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    content["state_dict"] |= {f"proposals.{name}": value for name, value in rpn.state_dict().items()}
    torch.save(content, tmp_path / "rpn.ckpt")
    return tmp_path / "rpn.ckpt"


def test_a_checkpoint_gives_its_own_boxes(with_rpn, pictures, tmp_path):
    for path in sorted(pictures.iterdir())[3:]:
        path.unlink()
    store = make(str(with_rpn), pictures, tmp_path / "s.safetensors", "--device", "cpu")
    detector, _ = load_detector(with_rpn)
    assert store.source == "rpn"
    assert sorted(store.settings) == ["max_size", "min_size", "sha256"]
    assert store.settings["min_size"] == detector.min_size == 64
    for path in sorted(pictures.iterdir()):
        image = read_image(path)
        divisor = max(detector.backbone.strides.values())
        batch = frames.to_batch([image], detector.backbone.pixel_format, 64, 64, divisor)
        with torch.no_grad():
            [expected], losses = detector.proposals(batch, detector.backbone(batch.tensors))
        assert losses == {}
        expected = frames.scale_boxes(expected, batch.image_sizes[0], (image.shape[1], image.shape[2]))
        boxes, scores = store[path.stem]
        assert len(boxes) > 10
        assert torch.allclose(torch.from_numpy(boxes.copy()), expected, atol=1e-4)
        assert (np.diff(scores) <= 0).all()
        assert 0 <= scores.min() <= scores.max() <= 1
        assert (boxes >= 0).all()
        assert (boxes[:, 2:] <= [image.shape[2], image.shape[1]]).all()


def test_a_checkpoint_without_an_rpn_or_none_at_all(trained, pictures, tmp_path):
    rest = ["--data", str(pictures), "-o", str(tmp_path / "s.safetensors"), "--device", "cpu"]
    content = torch.load(trained / "best.ckpt", weights_only=True)
    content[checkpoint.KEY]["model"]["proposals"] = {"class_path": "detpipe.DenseGrid"}
    content["state_dict"] = {k: v for k, v in content["state_dict"].items() if not k.startswith("proposals.")}
    torch.save(content, tmp_path / "best.ckpt")
    with pytest.raises(
        UsageError, match=r"best\.ckpt has no region proposal network but DenseGrid; name that source instead$"
    ):
        run_make([str(tmp_path / "best.ckpt"), *rest])
    with pytest.raises(UsageError, match="device 'gpu' cannot be used"):
        run_make([str(trained / "best.ckpt"), *rest[:-1], "gpu"])
    (tmp_path / "text.ckpt").write_text("no checkpoint")
    for name in ("text.ckpt", "missing.ckpt"):
        with pytest.raises(CheckpointError, match=name):
            run_make([str(tmp_path / name), *rest])


def kill_at_random(arguments: list[str], journal: Path, log: Path, seconds: float) -> bool:
    """Start the command, and kill it some time after it has kept an image; says whether it was still at work."""
    before = journal.stat().st_size if journal.exists() else 0
    process, begun = fork(lambda: run_make(arguments), log, log), time.monotonic()
    while process.is_alive() and (not journal.exists() or journal.stat().st_size <= before):
        assert time.monotonic() - begun < 60
        time.sleep(0.002)
    process.join(seconds)
    process.kill()
    process.join()
    return process.exitcode == -signal.SIGKILL


@pytest.mark.slow
@scikit_image
def test_kills_leave_no_trace(pictures, tmp_path, capsys):
    """Runs are killed at five random moments; the last one ends with the file of an undisturbed run."""
    spaces = ["--color_spaces", "[rgb, hsv, lab]", "--scales", "[20, 40, 80]"]
    options = ["selective_search", "--data", str(pictures), *spaces]
    assert run_make([*options, "-o", str(tmp_path / "whole.safetensors")]) == 0
    output, draws, sizes = tmp_path / "killed.safetensors", random.Random(1), []
    journal, rest, log = output.with_name(output.name + ".partial"), [*options, "-o", str(output)], tmp_path / "log"
    while len(sizes) < 5 and kill_at_random(rest, journal, log, draws.random() * 0.1) and journal.exists():
        sizes.append(journal.stat().st_size)
    assert len(sizes) >= 3  # a fast machine may be done by then
    assert 0 < sizes[0] < sizes[-1]
    assert sizes == sorted(sizes)
    finished = output.exists()
    capsys.readouterr()
    assert run_make(rest) == 0
    assert finished or " images were there from an earlier run" in capsys.readouterr().out
    assert output.read_bytes() == (tmp_path / "whole.safetensors").read_bytes()
    assert not journal.exists()

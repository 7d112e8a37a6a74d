"""From boxes ahead of training to prediction: a store is made, trained on, measured, and its kind of boxes made again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import runs
import torch

from detpipe import cli
from detpipe.commands.given_proposals import advice, open_boxes
from detpipe.prediction import ImageWindows
from detpipe.proposal_files import write_store
from detpipe.proposals import DenseGrid
from detpipe.support.errors import DataError, UsageError
from detpipe.training.checkpoint import read

GRID = ["--scales", "[20, 28]", "--ratios", "[1.0]", "--stride", "8"]


def make(demo_root: Path, folder: Path, *options: str) -> dict[str, str]:
    """A store of dense boxes for each split of the tiny demo set."""
    stores = {split: str(folder / f"{split}.safetensors") for split in ("train", "val")}
    for split, store in stores.items():
        data = ["--data", str(demo_root / "coco"), "--split", split]
        assert cli.main(["proposals", "make", "dense_grid", *data, "-o", store, *options]) == 0
    return stores


@pytest.fixture
def trained_on_store(
    demo_root: Path, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> tuple[Path, dict[str, str], str]:
    """A checkpoint of a detector that was trained on a store, the stores, and what training printed."""
    stores = make(demo_root, tmp_path, *GRID)
    options = runs.options(demo_root, epochs=1)
    at = options.index("--model.proposals.anchors.sizes")
    del options[at : at + 2]
    configs = [runs.CONFIG, str(runs.CONFIGS / "proposals" / "store.yaml")]
    command = ["train", *configs, *options, "--data.proposals", json.dumps(stores), "--output", str(tmp_path / "run")]
    assert cli.main(command) == 0
    return tmp_path / "run" / "best.ckpt", stores, capsys.readouterr().out


def detections(checkpoint: Path, images: Path, out: Path, *options: str) -> list[Any]:
    command = ["predict", str(checkpoint), str(images), "-o", str(out), "--device", "cpu", "--score_threshold", "0"]
    assert cli.main([*command, *options]) == 0
    return [record["detections"] for record in json.loads((out / "detections.json").read_text())["images"]]


@pytest.mark.slow
def test_a_store_is_trained_on_and_its_boxes_are_made_again(trained_on_store, demo_root, tmp_path, capsys):
    checkpoint, stores, shown = trained_on_store
    for split in ("train", "val"):
        assert f"proposals of {split}: " in shown
        assert "recall at IoU .5 is " in shown
    assert read(checkpoint)[1].proposals == {
        "source": "dense_grid",
        "settings": {"scales": [20.0, 28.0], "ratios": [1.0], "stride": 8.0, "spacing": 0.25, "max_boxes": 4000},
    }
    images = demo_root / "coco" / "val"
    assert cli.main(["predict", str(checkpoint), str(images), "-o", str(tmp_path / "none")]) == 2
    assert (
        "was trained on proposals of dense_grid and needs boxes for the images: add --proposals dense_grid, which"
        in (capsys.readouterr().err)
    )
    by_store = detections(checkpoint, images, tmp_path / "a", "--proposals", stores["val"])
    on_the_spot = detections(checkpoint, images, tmp_path / "b", "--proposals", "dense_grid")
    assert by_store == on_the_spot
    assert sum(map(len, by_store)) > 0


def test_low_recall_is_warned_of(demo_root, trained, tmp_path, capsys):
    stores = make(demo_root, tmp_path, "--scales", "[60]", "--ratios", "[1.0]")
    configs = [runs.CONFIG, str(runs.CONFIGS / "proposals" / "store.yaml"), *runs.demo(demo_root)]
    short = ["--trainer.max_epochs", "1", "--trainer.limit_train_batches", "1", "--trainer.limit_val_batches", "1"]
    capsys.readouterr()
    assert (
        cli.main(["train", *configs, *short, "--data.proposals", json.dumps(stores), "--output", str(tmp_path / "run")])
        == 0
    )
    shown = capsys.readouterr().err
    assert "warning: the proposals of train miss " in shown
    assert "Likely causes:" in shown


def image_of(height: int, width: int) -> ImageWindows:
    return ImageWindows(torch.zeros(3, height, width, dtype=torch.uint8))


def test_a_store_knows_images_by_their_names(tmp_path, monkeypatch):
    box = np.array([[1, 2, 3, 4]], np.float32)
    records = [("139", box, [0.5], (8, 9)), ("a.b", box + 1, [0.5]), ("c", box + 2, [0.5])]
    store = write_store(tmp_path / "s.safetensors", records, source="by hand", settings={})
    paths = [Path("x/000000000139.jpg"), Path("a.b.png"), Path("c.jpg")]
    boxes = open_boxes(str(store.path), paths, None)
    monkeypatch.setattr(ImageWindows, "read", None)  # which may be large
    assert [boxes(path, image_of(8, 9))[0, 0].item() for path in paths] == [1, 2, 3]
    with pytest.raises(
        DataError, match=r"139\.jpg has 5 x 8 pixels, but .*s\.safetensors has boxes of an image '139' of 9 x 8"
    ):
        boxes(paths[0], image_of(8, 5))
    with pytest.raises(
        DataError, match=r"has no boxes for 2 of 3 images, such as q\.jpg, r\.jpg; it calls its images 139"
    ):
        open_boxes(str(store.path), [Path("q.jpg"), paths[0], Path("r.jpg")], None)


def test_settings_of_training_are_used_for_the_same_source_only():
    image = image_of(64, 64)
    trained_on = {"source": "dense_grid", "settings": DenseGrid(scales=[20], ratios=[1.0]).settings}
    expected = DenseGrid(scales=[20], ratios=[1.0]).propose(np.zeros((64, 64, 3), np.uint8))[0]
    given = open_boxes("dense_grid", [], trained_on)(Path("x"), image)
    np.testing.assert_array_equal(given, expected)
    other = open_boxes("dense_grid", [], {"source": "by hand", "settings": {}})(Path("x"), image)
    np.testing.assert_array_equal(other, DenseGrid().propose(np.zeros((64, 64, 3), np.uint8))[0])


def test_a_union_of_training_is_made_again():
    part = {"source": "dense_grid", "settings": DenseGrid(scales=[20]).settings}
    trained_on = {"source": "union", "settings": {"sources": [part, part], "max_boxes": 7, "duplicate_iou": 0.5}}
    assert len(open_boxes("dense_grid+dense_grid", [], trained_on)(Path("x"), image_of(64, 64))) == 7
    assert "add --proposals dense_grid+dense_grid, which makes the same kind" in advice("c.ckpt", trained_on)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("dense_gird", "unknown proposal source 'dense_gird': expected one of .*; did you mean 'dense_grid'"),
        (
            "boxes.txt",
            r"--proposals boxes\.txt is neither a JSON file, nor a store \(\*\.safetensors\), nor a source: sel",
        ),
    ],
)
def test_what_is_no_source_is_refused(option, message):
    with pytest.raises(UsageError, match=message):
        open_boxes(option, [], None)


def test_settings_that_do_not_fit_are_named():
    with pytest.raises(UsageError, match=r"dense_grid cannot be made with the settings \{'size': 3\}: .*size"):
        open_boxes("dense_grid", [], {"source": "dense_grid", "settings": {"size": 3}})


def test_advice_for_boxes_of_unknown_origin():
    assert (
        "c.ckpt was trained on precomputed proposals and needs boxes for the images: add --proposals selective_search"
        in (advice("c.ckpt", None))
    )
    assert "was trained on proposals of by hand and needs" in advice("c.ckpt", {"source": "by hand", "settings": {}})

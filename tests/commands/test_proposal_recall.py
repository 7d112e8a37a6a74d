"""The command that measures recall."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from detpipe import cli
from detpipe.datasets.formats.recognize import open_split
from detpipe.proposal_files import write_store


@pytest.fixture
def stores(demo_root: Path, trained: Path, tmp_path: Path) -> list[str]:
    """Stores for the validation scenes: one with the very objects, one with a far corner, and one that lacks an image."""
    data = open_split(str(demo_root / "coco"), "val")
    annotations = data.annotations("val")
    rows = range(len(annotations))
    keys = [data.image_key(annotations, row) for row in rows]
    objects = [annotations.boxes[annotations.offsets[row] : annotations.offsets[row + 1]] for row in rows]
    right = [(key, boxes, np.linspace(1, 0.5, len(boxes))) for key, boxes in zip(keys, objects, strict=True)]
    wrong = [(key, [[0, 0, 2, 2]], [1.0]) for key in keys]
    paths = [tmp_path / f"{name}.safetensors" for name in ("right", "wrong", "part")]
    for path, records, source in zip(paths, (right, wrong, right[1:]), ("right", "corner", "right"), strict=True):
        write_store(path, records, source=source, settings={})
    return [str(path) for path in paths]


def recall(demo_root: Path, *arguments: str) -> int:
    return cli.main(["proposals", "recall", *arguments, "--data", str(demo_root / "coco"), "--split", "val"])


def test_tables_json_and_picture(stores, demo_root, tmp_path, capsys):
    out = tmp_path / "report"
    assert recall(demo_root, *stores[:2], "-o", str(out)) == 0
    shown = capsys.readouterr()
    lines = [line.split() for line in shown.out.splitlines()]
    [header] = [line for line in lines if line[:2] == ["source", "boxes"]]
    [right] = [line for line in lines if line and line[0] == "right" and len(line) == len(header)]
    assert dict(zip(header, right, strict=True))["R50@2000"] == "1.000"
    assert "corner, with 2000 boxes, least found classes first" in shown.out
    assert "warning: corner finds 0.0% of the objects at IoU .5, less than 80%" in shown.err
    content = json.loads((out / "recall.json").read_text())
    assert content["right"]["average_recall"][-1] == 1
    assert content["corner"]["recall"][0] == [0] * 6
    picture = np.asarray(Image.open(out / "recall.png").convert("RGB"))
    assert picture.shape[0] > 300
    assert len(np.unique(picture.reshape(-1, 3), axis=0)) > 50


def test_markdown(stores, demo_root, capsys):
    assert recall(demo_root, stores[0], "--markdown") == 0
    assert "| right | " in capsys.readouterr().out


def test_stores_of_one_source_go_by_their_files(stores, demo_root, capsys):
    assert recall(demo_root, stores[0], stores[2], "--skip_missing") == 0
    shown = capsys.readouterr().out
    assert "1 of 6 images are not in every store, they are left out" in shown
    assert "right (right)" in shown
    assert "right (part)" in shown


def test_bad_input_is_one_line(stores, demo_root, tmp_path, capsys):
    def failure(*arguments: str) -> str:
        assert cli.main(["proposals", "recall", *arguments]) in (1, 2)
        [line] = capsys.readouterr().err.splitlines()
        return line

    data = ["--data", str(demo_root / "coco"), "--split", "val"]
    assert "no proposals for 1 of 6 images: " in failure(stores[2], *data)
    assert "is given twice" in failure(stores[0], stores[0], *data)
    assert "does not exist; expected a folder in VOC layout" in failure(stores[0], "--data", str(tmp_path / "nothing"))
    assert "has several splits: name one with --split; there are train, val" in failure(stores[0], *data[:2])
    assert "has no known layout" in failure(stores[0], "--data", str(tmp_path))
    other = write_store(tmp_path / "o.safetensors", [("999", [[0, 0, 1, 1]], [1.0])], source="o", settings={})
    assert "no image of --data" in failure(str(other.path), *data, "--skip_missing")
    assert "the following arguments are required: --data; see 'detpipe proposals recall --help'" in failure(stores[0])

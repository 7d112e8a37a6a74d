"""The commands that ``data info`` prints are run as they are pasted."""

from __future__ import annotations

import argparse
import shlex
from functools import partial
from pathlib import Path

import pytest
import runs
from datasets.builders import coco_content, voc_object, write_coco, write_csv, write_voc
from datasets.layout_cases import LAYOUTS
from datasets.shard_cases import files_in, pack
from test_configs import SHORT

from detpipe import cli
from detpipe.commands.data_advice import next_commands, training_split, validation_split

main = partial(cli.run, group="data")


def make_voc(root: Path) -> Path:
    write_voc(root, split="train")
    return write_voc(root, {"c": [voc_object("dog", (3, 5, 60, 40))], "d": [voc_object()]}, split="val")


def make_table(root: Path) -> Path:
    rows = [
        "train,a.jpg,1,2,31,32,dog",
        "train,a.jpg,30,10,58,39,cat",
        "val,b.jpg,5,5,50,35,dog",
        "val,b.jpg,5,5,5,5,cat",
    ]
    write_csv(root, rows, "split,file_name,x1,y1,x2,y2,label")
    return root / "annotations.csv"


def make_shards(root: Path) -> Path:
    return pack(files_in(root / "files"), root / "shards")


def make_plain(root: Path) -> Path:
    """XML beside the images, no splits."""
    return next(case for case in LAYOUTS if case.name == "xml beside images").write(root)


def pasted(shown: str, command: str) -> list[str]:
    """The words of a command among what was printed, continued lines joined."""
    [line] = [line for line in shown.replace(" \\\n", " ").splitlines() if line.startswith(f"  detpipe {command} ")]
    return shlex.split(line)[1:]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("make", "options"),
    [
        (make_voc, []),
        (make_table, ["--skip-bad"]),
        (make_shards, []),
        pytest.param(make_plain, [], marks=pytest.mark.slow),
    ],
    ids=["voc", "table with a fault", "shards", "xml without splits"],
)
def test_the_printed_commands_train_and_report(make, options, tmp_path, capsys, monkeypatch):
    data = make(tmp_path / "my data")  # a name that a shell has to be told in quotes
    assert main(["info", str(data), *options, "--min-size", "64", "--max-size", "96", "--sizes", "2"]) == 0
    shown = capsys.readouterr().out
    train, evaluate = pasted(shown, "train"), pasted(shown, "evaluate")
    assert "--model.proposals.anchors.sizes" in train
    for line in shown.splitlines():
        assert len(line) <= 132 or "my data" in line
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").symlink_to(runs.CONFIGS)
    quick = SHORT[: SHORT.index("--model.min_size")]
    assert cli.main([*train, *quick, "--data.loader.num_workers", "0"]) == 0
    assert cli.main([*evaluate, "--worst", "1"]) == 0
    assert (tmp_path / "report" / "report.html").is_file()


def test_what_has_no_second_split_is_to_be_divided(tmp_path, capsys):
    write_voc(tmp_path / "voc", {f"im{i}": [voc_object()] for i in range(8)}, "all")
    assert main(["info", str(tmp_path / "voc"), "--skip-bad"]) == 0
    command = pasted(capsys.readouterr().out, "data split")
    assert command[:5] == ["data", "split", str(tmp_path / "voc"), "--skip-bad", "-o"]
    path, images = write_coco(tmp_path / "coco")
    assert main(["info", str(path), "--images", str(images)]) == 0
    command = pasted(capsys.readouterr().out, "data split")
    assert command == ["data", "split", str(path), "--images", str(images), "-o", "FOLDER"]
    out = ["-o", str(tmp_path / "parts"), "--parts", "train=.5,val=.5"]
    assert main([*command[1:-2], *out]) == 0
    assert main(["info", str(tmp_path / "parts")]) == 0
    assert "to train on train, validate on val" in capsys.readouterr().out


def test_data_without_boxes_have_no_advice(tmp_path, capsys):
    for split in ("train", "val"):
        write_coco(tmp_path, {**coco_content(), "annotations": []}, split)
    assert main(["info", str(tmp_path)]) == 0
    assert "detpipe train" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("names", "train", "val"),
    [
        (["test", "train", "trainval", "val"], "train", "val"),
        (["train2017", "val2017"], "train2017", "val2017"),
        (["test", "training"], "training", "test"),
        (["2007:test", "2007:trainval", "2012:trainval", "2012:val"], "2007:trainval", "2007:test"),
        (["2007:train", "2012:val"], "2007:train", "2012:val"),
        (["2007:test", "2007:trainval", "2007:val"], "2007:trainval", "2007:test"),  # val is a part of trainval
        (["trainval", "val"], "trainval", ""),
        (["a", "validation"], "a", "validation"),
        (["TEST", "TRAIN", "VAL"], "TRAIN", "VAL"),
        (["Train", "Validation"], "Train", "Validation"),
        (["dev", "test", "train"], "train", "dev"),
        (["val"], "val", ""),
        ([], "", ""),
    ],
)
def test_which_splits_are_taken(names, train, val):
    assert training_split(names) == train
    assert validation_split(names, train) == val


def test_flags_come_along(tmp_path):
    make_voc(tmp_path)
    (tmp_path / "table").mkdir()
    table = make_table(tmp_path / "table")
    plain = {"images": None, "zero_based": False, "skip_bad": False, "allow_links": False, "split": None}
    shown = next_commands(
        argparse.Namespace(**{**plain, "data": str(tmp_path), "zero_based": True}), ["train", "val"], []
    )
    assert "--data.format.one_based false" in shown
    options = argparse.Namespace(
        **{**plain, "data": str(table), "images": str(tmp_path), "skip_bad": True, "zero_based": True}
    )
    words = pasted(next_commands(options, ["train", "val"], []), "train")
    at = words.index("--data.root")
    assert words[at + 1 : at + 8] == [
        *(str(tmp_path / "table"), "--data.format.file", "annotations.csv"),
        *("--data.format.images", str(tmp_path), "--data.on_bad", "skip"),
    ]

from __future__ import annotations

import os
from pathlib import Path

import pytest
import runs
import torch
from datasets.builders import coco_content, write_coco

from detpipe import cli
from detpipe.evaluation import format_table
from detpipe.support.terminal import printable, say

CLEAR = "cat\x1b[2J\x07\u202edog"  # clears the screen, rings, and turns the direction of what follows


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("cat", "cat"),
        ("Hündin 犬 \U0001f436", "Hündin 犬 \U0001f436"),
        ("a\nb\r\tc", r"a\nb\r\tc"),
        (CLEAR, r"cat\x1b[2J\x07\u202edog"),
        ("\x9b31m", r"\x9b31m"),
        ("\udc80", r"\udc80"),
    ],
)
def test_what_a_terminal_would_obey_is_escaped(text, shown):
    assert printable(text) == shown
    assert printable(shown) == shown


def test_lines_stay_lines(capsys):
    say(f"one\n{CLEAR}")
    assert capsys.readouterr().out == "one\ncat\\x1b[2J\\x07\\u202edog\n"


def test_tables_of_classes():
    assert "\x1b" not in format_table({"mAP": 0.5, "per_class": {CLEAR: 0.5, "a": 1.0}}, "voc07")


def own_data(root: Path) -> list[str]:
    content = coco_content()
    content["categories"][0]["name"] = CLEAR
    for split in ("train", "val"):
        write_coco(root, content, split)
    return ["--data", "COCO", "--data.root", str(root), "--data.train", "train", "--data.val", "val"]


def harmless(text: str) -> bool:
    return bool(text.strip()) and not set(text) & set("\x1b\x07\u202e")


def test_the_commands_print_class_names_escaped(tmp_path, trained, capsys):
    data = own_data(tmp_path / "data")
    for arguments in (
        ["data", "info", str(tmp_path / "data")],
        ["data", "check", str(tmp_path / "data")],
        ["data", "split", str(tmp_path / "data"), "--split", "train", "-o", str(tmp_path / "split")],
        ["evaluate", runs.CONFIG, *data, *runs.MODEL, "--ckpt_path", str(trained / "best.ckpt")],
    ):
        cli.main(arguments)
        captured = capsys.readouterr()
        assert harmless(captured.out + captured.err), arguments


def test_error_lines_and_skipped_files(trained, tmp_path, capsys):
    image = tmp_path / "a\x1b[2J.png"
    image.write_bytes(b"none")
    assert cli.main(["predict", str(trained / "best.ckpt"), str(image), "-o", str(tmp_path / "out")]) == 1
    captured = capsys.readouterr()
    assert harmless(captured.err)
    assert "a\\x1b[2J.png: cannot be decoded" in captured.err
    pipe = tmp_path / "b\x07.png"
    os.mkfifo(pipe)  # which would be waited for
    assert cli.main(["predict", str(trained / "best.ckpt"), str(pipe), "-o", str(tmp_path / "out")]) == 2
    assert "b\\x07.png: is a pipe" in capsys.readouterr().err
    content = torch.load(trained / "best.ckpt", weights_only=True)
    content["detpipe"]["format"] = CLEAR
    torch.save(content, tmp_path / "x\x1b.ckpt")
    assert cli.main(["predict", str(tmp_path / "x\x1b.ckpt"), str(image), "-o", str(tmp_path / "out")]) == 1
    captured = capsys.readouterr()
    assert harmless(captured.err)
    assert len(captured.err.splitlines()) == 1


def test_names_in_checkpoints_that_trainings_begin_with(trained, tmp_path, capsys):
    content = torch.load(trained / "last.ckpt", weights_only=True)
    content["detpipe_training"][f"model.{CLEAR}"] = 1
    torch.save(content, tmp_path / "last.ckpt")
    content["state_dict"][f"{CLEAR}.weight"] = torch.zeros(1)
    torch.save(content, tmp_path / "begin.ckpt")
    for name, option in (("last", "--ckpt_path"), ("begin", "--init_from")):
        again = ["--accept_changes", "all"] if name == "last" else []
        arguments = ["train", str(trained / "config.yaml"), "--output", str(tmp_path / name), *again]
        assert cli.main([*arguments, option, str(tmp_path / f"{name}.ckpt"), "--trainer.max_steps", "0"]) == 0
        captured = capsys.readouterr()
        assert harmless(captured.out + captured.err)
        assert "cat\\x1b[2J" in captured.out

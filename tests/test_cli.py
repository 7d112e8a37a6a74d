from __future__ import annotations

import runpy
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from detpipe import cli
from detpipe.support import terminal
from detpipe.support.errors import CheckpointError, DataError, TrainingError, UsageError

ROOT = Path(__file__).resolve().parents[1]


class Broken(Dataset[int]):
    """Fails in whatever process reads it."""

    def __init__(self, error: Exception) -> None:
        self.error = error

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> int:
        raise self.error


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> Callable[[BaseException], None]:
    """Let ``detpipe train`` raise an error."""

    def fail_with(error: BaseException) -> None:
        def fail(arguments: list[str]) -> int:
            raise error

        monkeypatch.setattr("detpipe.commands.training.train", fail)

    return fail_with


def test_a_tool_runs_from_anywhere(tmp_path):
    tool = [sys.executable, str(ROOT / "tools" / "data.py"), "chek"]  # which needs no PyTorch to be refused
    done = subprocess.run(tool, cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("detpipe: error: unknown command 'chek': expected check, info, ")


PLAIN = ("train", "evaluate", "predict", "pretrain", "train_regions", "classify", "data")
LONGER = {"make_shards": ["data", "shards"], "make_proposals": ["proposals", "make"]}


@pytest.mark.parametrize(("name", "words"), [*{**{name: [name] for name in PLAIN}, **LONGER}.items()])
def test_each_tool_is_its_command(name, words, monkeypatch):
    seen: list[list[str]] = []
    monkeypatch.setattr(cli, "main", lambda arguments: seen.append(arguments) or 7)
    monkeypatch.setattr(sys, "argv", [f"tools/{name}.py", "a", "--b"])
    monkeypatch.setattr(sys, "path", list(sys.path))
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(ROOT / "tools" / f"{name}.py"), run_name="__main__")
    assert (stop.value.code, seen) == (7, [[*words, "a", "--b"]])


def test_the_tool_of_the_example_adds_its_command(monkeypatch, capsys):
    monkeypatch.setitem(cli.COMMANDS, "", dict(cli.COMMANDS[""]))
    monkeypatch.setattr(sys, "argv", ["tools/train_classifier.py", "--help"])
    monkeypatch.setattr(sys, "path", list(sys.path))
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(ROOT / "tools" / "train_classifier.py"), run_name="__main__")
    assert stop.value.code == 0
    assert "usage:" in capsys.readouterr().out


def test_no_command_shows_the_help_as_a_mistake(capsys):
    assert cli.main([]) == 2
    assert capsys.readouterr().out == cli.HELP


def test_version(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("detpipe 0.")


def test_version_of_a_checkout_that_is_not_installed(monkeypatch, capsys):
    def missing(name):
        raise PackageNotFoundError(name)

    monkeypatch.setattr(terminal, "version", missing)
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == "detpipe unknown\n"


def test_unknown_command_is_a_usage_error_with_a_suggestion(capsys):
    assert cli.main(["trian"]) == 2
    captured = capsys.readouterr()
    assert captured.err == (
        f"detpipe: error: unknown command 'trian': expected {', '.join(cli.COMMANDS[''])}; did you mean 'train' or 'pretrain'?\n"
    )
    assert captured.out == ""


@pytest.mark.parametrize("place", [["--debug", "train"], ["train", "--debug"], ["train", "x.yaml", "--debug"]])
def test_debug_shows_the_traceback_wherever_it_stands(place, command, capsys):
    command(DataError("boxes.json: line 3"))
    assert cli.main(place) == 1
    shown = capsys.readouterr().err
    assert "Traceback (most recent call last)" in shown
    assert shown.endswith("\ndetpipe: error: boxes.json: line 3\n")


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (UsageError("depth must be 18"), 2, "depth must be 18"),
        (DataError("a.json: no such file"), 1, "a.json: no such file"),
        (CheckpointError("damaged\n  in two lines"), 1, "damaged in two lines"),
        (TrainingError("step 3: the loss is nan"), 1, "step 3: the loss is nan"),
        (FileNotFoundError(2, "No such file or directory", "x"), 1, "[Errno 2] No such file or directory: 'x'"),
        (KeyError("k"), 1, "KeyError: 'k' (run again with --debug for the traceback)"),
        (RuntimeError("first\nlast"), 1, "RuntimeError: last (run again with --debug for the traceback)"),
        (RuntimeError(), 1, "RuntimeError:  (run again with --debug for the traceback)"),
    ],
)
def test_an_error_is_one_line_without_a_traceback(error, status, line, command, capsys):
    command(error)
    assert cli.main(["train"]) == status
    assert capsys.readouterr().err == f"detpipe: error: {line}\n"


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (DataError("images/7.jpg: cannot be decoded: cut off"), "images/7.jpg: cannot be decoded: cut off"),
        (ZeroDivisionError("by 0"), "ZeroDivisionError: by 0 (run again with --debug for the traceback)"),
    ],
)
def test_an_error_in_a_data_worker_is_the_same_line(error, line):
    with pytest.raises(type(error), match="Caught") as caught:
        list(DataLoader(Broken(error), num_workers=1))
    assert cli.one_line(caught.value) == line


def test_interrupt_ends_with_status_130(command, capsys):
    command(KeyboardInterrupt())
    assert cli.main(["train"]) == 130
    assert capsys.readouterr().err == "\ninterrupted; what was saved before stays\n"


def test_the_exit_by_which_lightning_answers_an_interrupt_counts_as_one(command, capsys):
    stop = SystemExit(1)
    stop.__context__ = KeyboardInterrupt()
    command(stop)
    assert cli.main(["train"]) == 130
    assert "interrupted" in capsys.readouterr().err


@pytest.mark.parametrize(
    "command_line",
    [["train", "--help"], ["evaluate", "--help"], ["evaluate", "-h"], ["predict", "-h"], ["pretrain", "-h"]],
)
def test_each_command_has_help(command_line, capsys):
    assert cli.main(command_line) == 0
    assert "usage:" in capsys.readouterr().out


def test_one_line_of_an_error_made_by_torch():
    with pytest.raises(RuntimeError) as caught:
        torch.zeros(2) + torch.zeros(3)
    assert "\n" not in cli.one_line(caught.value)

"""The script of a GPU machine runs on a CPU with tiny sizes: whoever borrows a GPU for eight minutes finds no typing mistake."""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import runs

BENCHMARKS = runs.CONFIGS.parent / "benchmarks"
script = runpy.run_path(str(BENCHMARKS / "gpu.py"))


@pytest.mark.slow
def test_every_part_runs_without_a_gpu(tmp_path: Path) -> None:
    command = ["bash", str(BENCHMARKS / "gpu.sh"), "--device", "cpu", "--smoke", "--out", str(tmp_path)]
    environment = {**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    parts = [part for part in script["PARTS"] if part != "tests"]
    done = subprocess.run(
        [*command, "--only", *parts], env=environment, capture_output=True, text=True, timeout=550, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads((tmp_path / "gpu.json").read_text())["rows"]
    assert {row["part"] for row in rows} == {"operators", "heads", "launches", "training step", "deterministic", *parts}
    assert all(row["value"] > 0 for row in rows)
    assert (tmp_path / "gpu.md").read_text().count("\n|") == len(rows) + 2


def test_a_row_says_whether_its_target_is_met() -> None:
    row = script["Row"]
    assert row("a", "b", 1.7, ">= 1.6").met is True
    assert row("a", "b", 1.3, "<= 1.25").met is False
    assert row("a", "b", 1.3).met is None
    assert row("a", "b", "failed", "<= 1.25").met is None
    assert "| a | b | 1.3 | <= 1.25 | **no** |" in script["table"]([row("a", "b", 1.3, "<= 1.25")], {"device": "x"})


def test_what_is_not_installed_is_named() -> None:
    assert script["missing"]({"torch": "torch", "no_such_module": "no-such-package"}) == ["no-such-package"]


def test_a_part_that_fails_is_a_row_and_the_status(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(_options: object) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setitem(script["PARTS"], "operators", fails)
    assert script["main"](["--device", "cpu", "--smoke", "--out", str(tmp_path), "--only", "operators"]) == 1
    assert "| operators | failed | RuntimeError: out of memory |" in (tmp_path / "gpu.md").read_text()

"""Files that take a moment to send and a machine to read are refused in one line, at once and with little memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import hostile
import pytest

ROOT = Path(__file__).resolve().parents[1]
SECONDS, MIB = 2.0, 200.0


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    program = [sys.executable, str(ROOT / "tests" / "hostile.py"), str(tmp_path_factory.mktemp("hostile"))]
    done = subprocess.run(
        program, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("case", hostile.collect())
def test_a_hostile_file_is_refused_at_once(case, reports):
    report = reports[case]
    assert not report["told"].startswith("nothing:"), report
    assert "no error of detpipe" not in report["told"]
    assert "\n" not in report["told"]
    assert report["MiB"] < MIB
    assert report["seconds"] < 2 * SECONDS  # twice, on a machine that does other things beside

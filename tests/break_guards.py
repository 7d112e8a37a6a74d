"""Takes guards out of the package at random, one at a time, and says whether the tests notice.

A guard is a ``raise``, or a report to ``faults``. Each that is drawn is replaced by ``pass`` in a copy of the repository, where the
tests of its folder are run first, and all tests if those pass. Exit status 1 if a guard can be taken out unnoticed.

    python tests/break_guards.py --seed 0 --count 40
"""

from __future__ import annotations

import argparse
import ast
import random
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
_REPORTS = ("fatal", "image", "box", "file", "fault")


def guards(path: Path) -> list[ast.stmt]:
    """The statements of a file that refuse something."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        call = node.value if isinstance(node, ast.Return | ast.Expr) else None
        reports = isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute) and call.func.attr in _REPORTS
        if (isinstance(node, ast.Raise) and node.exc is not None) or (reports and "faults" in ast.unparse(call.func)):
            found.append(node)
    return found


def take_out(path: Path, guard: ast.stmt) -> None:
    """Put ``pass`` in the place of a guard, on as many lines."""
    lines = path.read_text(encoding="utf-8").split("\n")
    assert guard.end_lineno is not None
    lines[guard.lineno - 1] = lines[guard.lineno - 1][: guard.col_offset] + "pass"
    lines[guard.lineno : guard.end_lineno] = [""] * (guard.end_lineno - guard.lineno)
    path.write_text("\n".join(lines), encoding="utf-8")


def nearby(file: Path) -> list[str]:
    """The tests of the folder that a file lies in, and those that are named like it or say its name."""
    folder = ROOT / "tests" / file.parent.relative_to("detpipe")
    tests = set(folder.rglob("test_*.py")) if folder != ROOT / "tests" else set()
    for test in (ROOT / "tests").rglob("test_*.py"):
        if test.stem == f"test_{file.stem}" or ".".join(file.with_suffix("").parts) in test.read_text(encoding="utf-8"):
            tests.add(test)
    return sorted(str(test.relative_to(ROOT)) for test in tests)


def notices(copy: Path, tests: list[str], processes: int) -> bool:
    """Whether a test of a copy fails."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-n", str(processes), *tests]
    environment = {
        "PYTHONPATH": str(copy),
        "PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin",
        "HOME": str(Path.home()),
    }
    done = subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True)
    if done.returncode not in (0, 1, 2):
        raise SystemExit(f"pytest ended with {done.returncode}: {done.stdout[-2000:]}{done.stderr[-2000:]}")
    return done.returncode != 0


def main() -> int:
    """Draw guards, take each out, and run tests."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0, help="decides which guards are drawn")
    parser.add_argument("--count", type=int, default=40, help="how many")
    parser.add_argument("--processes", type=int, default=2, help="of pytest-xdist")
    options = parser.parse_args()
    files = [path.relative_to(ROOT) for path in sorted((ROOT / "detpipe").rglob("*.py"))]
    known = [(file, guard) for file in files for guard in guards(ROOT / file)]
    drawn = random.Random(options.seed).sample(known, options.count)
    unnoticed = 0
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "copy"
        shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".git", ".venv", "runs", "__pycache__"))
        for file, guard in drawn:
            text = (copy / file).read_text(encoding="utf-8")
            take_out(copy / file, guard)
            near = nearby(file)
            noticed = "nearby" if near and notices(copy, near, options.processes) else ""
            noticed = noticed or ("elsewhere" if notices(copy, ["tests"], options.processes) else "")
            (copy / file).write_text(text, encoding="utf-8")
            unnoticed += not noticed
            print(f"{file}:{guard.lineno}: {noticed or 'NOT NOTICED'}: {ast.unparse(guard)[:90]}", flush=True)
    print(f"{len(known)} guards, seed {options.seed}: {options.count - unnoticed} of {options.count} noticed")
    return int(unnoticed > 0)


if __name__ == "__main__":
    raise SystemExit(main())

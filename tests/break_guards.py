"""Takes guards out of the package at random, one at a time, and says whether the tests notice.

A guard is a ``raise``, or a report to ``faults``. The tests run once on a copy of the repository in which each guard writes down
the test that reaches it. Then each guard that is drawn is replaced by ``pass``, and the tests that reach it run. A guard that no
test reaches is not noticed. Exit status 1 if there is one.

    python tests/break_guards.py --seed 0 --count 40
    python tests/break_guards.py --reached reached.txt --slow
"""

from __future__ import annotations

import argparse
import ast
import random
import shutil
import subprocess
import sys
import tempfile
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
_REPORTS = ("fatal", "image", "box", "file", "fault")
_MOST_TESTS = 40
_RECORDER = """
import os
def reached(guard):
    test = os.environ.get("PYTEST_CURRENT_TEST", "").rpartition(" (")[0]
    with open(os.environ["GUARDS_REACHED"], "a") as file:
        file.write(f"{guard}\\t{test}\\n")
"""


def guards(path: Path) -> list[ast.stmt]:
    """The statements of a file that refuse something."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        call = node.value if isinstance(node, ast.Return | ast.Expr) else None
        reports = isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute) and call.func.attr in _REPORTS
        if (isinstance(node, ast.Raise) and node.exc is not None) or (reports and "faults" in ast.unparse(call.func)):
            found.append(node)
    return found


def scripted(path: Path) -> bool:
    """Whether TorchScript compiles functions of a file: they cannot call the recorder."""
    return "torch.jit" in path.read_text(encoding="utf-8")


def record(copy: Path, known: list[tuple[Path, ast.stmt]]) -> None:
    """Let the guards of a copy write down which test reaches them."""
    (copy / "guard_recorder.py").write_text(_RECORDER, encoding="utf-8")
    for file in {file for file, _ in known}:
        path = copy / file
        if scripted(path):
            continue
        lines = path.read_text(encoding="utf-8").split("\n")
        for guard in (guard for name, guard in known if name == file):
            line = lines[guard.lineno - 1].encode()  # columns of ast are bytes
            call = f'__import__("guard_recorder").reached("{file}:{guard.lineno}"); '.encode()
            lines[guard.lineno - 1] = (line[: guard.col_offset] + call + line[guard.col_offset :]).decode()
        path.write_text("\n".join(lines), encoding="utf-8")


def take_out(path: Path, guard: ast.stmt) -> None:
    """Put ``pass`` in the place of a guard, on as many lines."""
    lines = path.read_text(encoding="utf-8").split("\n")
    assert guard.end_lineno is not None
    lines[guard.lineno - 1] = lines[guard.lineno - 1].encode()[: guard.col_offset].decode() + "pass"
    lines[guard.lineno : guard.end_lineno] = [""] * (guard.end_lineno - guard.lineno)
    path.write_text("\n".join(lines), encoding="utf-8")


def nearby(file: Path) -> list[str]:
    """The tests that are named like a file or say its name."""
    named = ".".join(file.with_suffix("").parts)
    tests = (ROOT / "tests").rglob("test_*.py")
    return sorted(
        str(test.relative_to(ROOT))
        for test in tests
        if file.stem in test.stem or named in test.read_text(encoding="utf-8")
    )


def run(
    copy: Path, arguments: list[str], processes: int, reached: Path | None = None
) -> subprocess.CompletedProcess[str]:
    """Run tests of a copy."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-n", str(processes), *arguments]
    environment = {
        "PYTHONPATH": str(copy),
        "PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin",
        "HOME": str(Path.home()),
    }
    if reached is not None:
        environment["GUARDS_REACHED"] = str(reached)
    return subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True)


def notices(copy: Path, tests: list[str]) -> bool:
    """Whether a test of a copy fails."""
    done = run(copy, ["-x", "-m", "slow or not slow", *tests], 0)
    if done.returncode not in (0, 1, 2):
        raise SystemExit(f"pytest ended with {done.returncode}: {done.stdout[-2000:]}{done.stderr[-2000:]}")
    return done.returncode != 0


def main() -> int:
    """Record which tests reach which guards, draw guards, take each out, and run its tests."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0, help="decides which guards are drawn")
    parser.add_argument("--count", type=int, default=40, help="how many")
    parser.add_argument("--processes", type=int, default=2, help="of pytest-xdist while recording")
    parser.add_argument(
        "--reached", type=Path, help="a record of an earlier run of the same code, or where to keep this one"
    )
    parser.add_argument("--slow", action="store_true", help="record the slow tests too")
    options = parser.parse_args()
    files = [path.relative_to(ROOT) for path in sorted((ROOT / "detpipe").rglob("*.py"))]
    known = [(file, guard) for file in files for guard in guards(ROOT / file)]
    unnoticed = 0
    with tempfile.TemporaryDirectory() as folder:
        copy, log = Path(folder) / "copy", (options.reached or Path(folder) / "reached.txt").absolute()
        ignored = shutil.ignore_patterns(".git", ".venv", "runs", "__pycache__")
        (Path(folder) / "shared").symlink_to(ROOT.parent / "shared")
        if not log.exists():
            shutil.copytree(ROOT, copy, ignore=ignored)
            record(copy, known)
            print(
                run(copy, ["-m", "slow or not slow"] if options.slow else [], options.processes, log).stdout[-300:],
                flush=True,
            )
            shutil.rmtree(copy)
        shutil.copytree(ROOT, copy, ignore=ignored)
        reaching: dict[str, set[str]] = defaultdict(set)
        for line in log.read_text(encoding="utf-8").splitlines():
            guard, _, test = line.partition("\t")
            reaching[guard].update({test} - {""})
        for file, guard in random.Random(options.seed).sample(known, options.count):
            name = f"{file}:{guard.lineno}"
            tests = nearby(file) if scripted(copy / file) else sorted(reaching[name])[:_MOST_TESTS]
            text = (copy / file).read_text(encoding="utf-8")
            take_out(copy / file, guard)
            noticed = bool(tests) and notices(copy, tests)
            (copy / file).write_text(text, encoding="utf-8")
            unnoticed += not noticed
            outcome = "noticed" if noticed else f"NOT NOTICED, reached by {len(reaching[name])} tests"
            print(f"{name}: {outcome}: {ast.unparse(guard)[:90]}", flush=True)
    reached_at_all = sum(bool(reaching[f"{file}:{guard.lineno}"]) for file, guard in known)
    noticed = f"{options.count - unnoticed} of {options.count} noticed"
    print(f"{len(known)} guards, {reached_at_all} reached; seed {options.seed}: {noticed}")
    return int(unnoticed > 0)


if __name__ == "__main__":
    raise SystemExit(main())

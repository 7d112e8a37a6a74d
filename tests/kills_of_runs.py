"""Trainings that are killed and go on, each in a forked process, so that Python and PyTorch start once."""

from __future__ import annotations

import csv
import os
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import runs
import torch
from together import fork, wait

from detpipe import cli
from detpipe.training import callbacks

SCENES = {"train": 18, "val": 4, "size": 64}
# two epochs of 6 steps, by the number of batches whose gradients are accumulated
STEPS = {
    1: ["--data.loader.batch_size", "3"],
    3: ["--data.loader.batch_size", "1", "--trainer.accumulate_grad_batches", "3"],
}


def command(root: Path, accumulated: int = 1, workers: int = 0) -> list[str]:
    """Train twelve steps in two epochs."""
    options = [*runs.options(root), "--data.scenes", str(SCENES), "--data.loader.num_workers", str(workers)]
    return ["train", runs.CONFIG, *options, *STEPS[accumulated], "--data.augment", "{flip: 0.5}"]


def run(
    arguments: Sequence[str], log: Path, at: tuple[str, int] | None = None, number: int = signal.SIGKILL
) -> int | None:
    """Run a command in a forked process, whose signal comes at a moment: a hook and how often it was called before."""

    def work() -> int:
        if at is not None:
            signal_at(*at, number)
        return cli.main(list(arguments))

    return wait(fork(work, log, log), 300)


def signal_at(hook: str, call: int, number: int) -> None:
    """Let this process send itself a signal when a hook is called once more than so many times."""
    before, calls = getattr(callbacks.StepSeed, hook), [0]

    def hooked(*arguments: Any, **more: Any) -> Any:
        if calls[0] == call:
            os.kill(os.getpid(), number)
        calls[0] += 1
        return before(*arguments, **more)

    setattr(callbacks.StepSeed, hook, hooked)


def state(folder: Path) -> dict[str, Any]:
    """All that a training leaves: tensors and numbers of both checkpoints by name, and the metrics, but for what is a time."""
    found: dict[str, Any] = {}
    for name in ("last.ckpt", "best.ckpt"):
        stored = torch.load(folder / name, weights_only=True)
        for key in ("detpipe_training", "loops") if name == "best.ckpt" else ("detpipe_training",):
            stored.pop(key)
        _flatten(stored, name, found)
    for key in [key for key in found if "val_loop.batch_progress" in key]:
        del found[key]  # Lightning counts a validation before the kill again
    with (folder / "metrics.csv").open(newline="") as stream:
        found["metrics"] = [{k: v for k, v in row.items() if k != "images/s"} for row in csv.DictReader(stream)]
    return found


def _flatten(value: Any, name: str, found: dict[str, Any]) -> None:
    if isinstance(value, dict):
        for key, item in value.items():
            _flatten(item, f"{name}.{key}", found)
    elif isinstance(value, list | tuple):
        for place, item in enumerate(value):
            _flatten(item, f"{name}.{place}", found)
    else:
        found[name] = value


def differences(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """Names of what differs, to the bit."""
    missing = sorted(one.keys() ^ other.keys())
    differing = [key for key in one.keys() & other.keys() if not _equal(one[key], other[key])]
    return missing + sorted(differing)


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and one.dtype == other.dtype and torch.equal(one, other)
    return one == other

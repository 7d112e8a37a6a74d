"""Programs in forked processes, so that Python and PyTorch start once; several that train together, and end in time."""

from __future__ import annotations

import multiprocessing
import os
import socket
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch

import detpipe

for _name in detpipe.__all__:
    getattr(detpipe, _name)  # what is imported here, processes need not import again

TESTS = Path(__file__).resolve().parent


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def fork(work: Callable[[], int | None], out: Path, err: Path) -> BaseProcess:
    """Run something in a forked process, which is as one of its own: streams, warnings, threads.

    Args:
        work: returns the exit status; None for 0.
        out: takes what is printed, behind what it holds.
        err: the same for errors.

    Returns:
        The process.
    """

    def run() -> None:
        for path, number in ((out, 1), (err, 2)):
            stream = os.open(path, os.O_CREAT | os.O_APPEND | os.O_WRONLY)
            os.dup2(stream, number)
            os.close(stream)
        sys.stdout = sys.__stdout__ = os.fdopen(1, "w")
        sys.stderr = sys.__stderr__ = os.fdopen(2, "w")
        warnings.resetwarnings()
        torch.set_num_threads(1)
        sys.exit(work())

    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    return process


def wait(process: BaseProcess, seconds: float) -> int | None:
    """The exit status of a process, negative for the signal that ended it; None, and it is killed, where it takes too long."""
    process.join(seconds)
    status = process.exitcode
    if status is None:
        process.kill()
        process.join()
    return status


def start(program: str, arguments: Sequence[str], size: int, seconds: float = 300) -> list[tuple[int, str, str]]:
    """Run Python source in processes that can meet; none outlives the time limit.

    Args:
        program: source, run with the tests' folder on the path; ``sys.argv[1:]`` are the arguments.
        arguments: the same for all.
        size: how many processes; they are numbered as launchers do it, in the environment.
        seconds: after which all are killed, and the test fails.

    Returns:
        Exit status, output and error output of each.
    """
    port = str(free_port())

    def run(rank: int) -> None:
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=port, NODE_RANK="0", WORLD_SIZE=str(size))
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank))
        sys.argv = ["-c", *arguments]
        sys.path.insert(0, str(TESTS))
        exec(compile(program, "program", "exec"), {"__name__": "__main__"})

    with tempfile.TemporaryDirectory() as folder:
        streams = [(Path(folder) / f"{rank}.out", Path(folder) / f"{rank}.err") for rank in range(size)]
        children = [fork(lambda rank=rank: run(rank), *streams[rank]) for rank in range(size)]
        end = time.monotonic() + seconds
        statuses = [wait(child, max(0.1, end - time.monotonic())) for child in children]
        texts = [(out.read_text(), err.read_text()) for out, err in streams]
    late = statuses.count(None)
    assert not late, f"{late} of {size} processes hung for {seconds} s: {[err[-2000:] for _, err in texts]}"
    return [(status, *text) for status, text in zip(statuses, texts, strict=True) if status is not None]


def succeed(program: str, arguments: Sequence[str], size: int, seconds: float = 300) -> list[str]:
    """As :func:`start`, where every process must succeed; their output."""
    answers = start(program, arguments, size, seconds)
    assert [answer[0] for answer in answers] == [0] * size, [answer[2][-4000:] for answer in answers]
    return [answer[1] for answer in answers]

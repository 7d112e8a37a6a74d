"""Start several processes of one program that train together, and end all of them in time."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

TESTS = Path(__file__).resolve().parent


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


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
    common = {**os.environ, "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    with tempfile.TemporaryDirectory() as folder:
        processes = []
        for rank in range(size):
            place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "NODE_RANK": "0", "WORLD_SIZE": str(size)}
            streams = [(Path(folder) / f"{rank}.{name}").open("w+") for name in ("out", "err")]
            command = [sys.executable, "-c", program, *arguments]
            environment = {**common, **place, "PYTHONPATH": str(TESTS)}
            processes.append(
                (subprocess.Popen(command, env=environment, stdout=streams[0], stderr=streams[1]), streams)
            )
        end = time.monotonic() + seconds
        late = []
        for process, _ in processes:
            try:
                process.wait(max(0.1, end - time.monotonic()))
            except subprocess.TimeoutExpired:
                late.append(process.pid)
                process.kill()
                process.wait()
        answers = []
        for process, streams in processes:
            texts = []
            for stream in streams:
                stream.seek(0)
                texts.append(stream.read())
                stream.close()
            answers.append((process.returncode, *texts))
    assert not late, (
        f"{len(late)} of {size} processes hung for {seconds} s: {[answer[2][-2000:] for answer in answers]}"
    )
    return answers


def succeed(program: str, arguments: Sequence[str], size: int, seconds: float = 300) -> list[str]:
    """As :func:`start`, where every process must succeed; their output."""
    answers = start(program, arguments, size, seconds)
    assert [answer[0] for answer in answers] == [0] * size, [answer[2][-4000:] for answer in answers]
    return [answer[1] for answer in answers]

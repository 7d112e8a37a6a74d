"""Write shards in several processes at a time."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, NamedTuple

import torch

from detpipe.datasets.sharding.tar_files import Contents, Written, write_shard
from detpipe.errors import DataError

_AHEAD = 2  # shards that each process has waiting
_TICK = 0.2  # seconds between reports of progress


class Job(NamedTuple):
    """A shard to write."""

    path: Path
    number: int
    rows: Sequence[int]


def write_all(
    contents: Contents,
    jobs: Sequence[Job],
    workers: int,
    images: int,
    progress: Callable[[int, int], None] | None = None,
) -> Iterator[Written]:
    """Write shards.

    Args:
        contents: of the split.
        jobs: the shards.
        workers: processes; 1 works in this one.
        images: of all shards, those that are there already included.
        progress: called with the number of images done and of all, from time to time.

    Yields:
        What was written, in any order.

    Raises:
        DataError: an image is bad, or a process died; what is written stays.
    """
    done = images - sum(len(job.rows) for job in jobs)

    def tell(more: int = 0) -> None:
        nonlocal done
        done += more
        if progress is not None:
            progress(done, images)

    tell()
    if workers == 1 or len(jobs) < 2:
        for job in jobs:
            yield write_shard(*job, contents, lambda: tell(1))
        return
    # not forked from here, since threads of libraries do not survive it, but from a fresh process that imports them once for all
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    counter = context.Value("q", 0)
    pool = ProcessPoolExecutor(min(workers, len(jobs)), context, initializer=_start, initargs=(contents, counter))
    told = 0
    try:
        queue = iter(jobs)
        waiting: set[Future[Written]] = {pool.submit(_write, j) for j in itertools.islice(queue, _AHEAD * workers)}
        while waiting:
            finished, waiting = wait(waiting, timeout=_TICK, return_when=FIRST_COMPLETED)
            tell(counter.value - told)
            told = counter.value
            for future in finished:
                yield future.result()
                waiting |= {pool.submit(_write, job) for job in itertools.islice(queue, 1)}
        tell(counter.value - told)
    except BrokenProcessPool as error:
        raise DataError(
            "a process that writes shards died, most likely for want of memory: fewer --workers need less; the same command "
            "goes on where this one stopped"
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


_state: tuple[Contents, Any] | None = None  # of a process of the pool


def _start(contents: Contents, counter: Any) -> None:
    """Prepare a process: one thread each, or the processes would wait for each other."""
    global _state
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides
    torch.set_num_threads(1)
    _state = contents, counter
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A parent that is killed cannot end its pool, which would wait for work for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _write(job: Job) -> Written:
    assert _state is not None
    contents, counter = _state

    def told() -> None:
        with counter.get_lock():
            counter.value += 1

    return write_shard(*job, contents, told)

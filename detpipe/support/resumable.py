"""Long work in many parts that may be stopped at any moment: a journal of what is finished, several processes for the rest.

A finished part is its entry in the journal, a file whose first line says what is made of what. An entry that a kill cut short is
dropped and its part made again: nothing is lost, nothing is kept twice, and where a part depends on its content alone, nothing
shows that there was a kill.
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
import signal
import struct
import sys
import threading
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from pathlib import Path
from typing import Any, BinaryIO, Generic, TypeVar

from detpipe.support.errors import DataError
from detpipe.support.files import sole_writer

_HEAD = struct.Struct("<II")  # bytes of an entry, their checksum
_AHEAD = 4  # items that each process has waiting
_TICK = 0.2  # seconds between reports of progress

Item = TypeVar("Item")
Result = TypeVar("Result")
Work = Callable[[Item, Callable[[], None]], Result]  # an item, and what to call after each step -> what is made of it


class Journal(Generic[Result]):
    """An open journal of what is made, such as ``"shards"``, by a plan; no other process can open it at the same time.

    Args:
        path: of the file.
        what: is made.
        plan: says what decides about the parts, in one line.
        pack: a finished part to the bytes of its entry; ``unpack`` is the way back.
        unpack: see ``pack``.
        remedy: what else users can do where the file is in use or not ours, such as ``"give another name"``.
        refuse: the message for a journal of another plan, which it gets.
    """

    def __init__(
        self,
        path: Path,
        what: str,
        plan: str,
        pack: Callable[[Result], bytes],
        unpack: Callable[[bytes], Result],
        remedy: str,
        refuse: Callable[[str], str],
    ) -> None:
        self.path, self._pack, self._unpack = path, pack, unpack
        magic = f"detpipe.{what}.journal 2 ".encode()
        first = magic + plan.encode() + b"\n"
        self._start = len(first)
        busy = DataError(f"{path}: another process is writing it; wait for it, or {remedy}")
        with ExitStack() as stack:
            stack.enter_context(sole_writer(path, busy))
            self._file: BinaryIO = stack.enter_context(open(path, "a+b"))
            self._file.seek(0)
            found = self._file.read(len(first))
            if found != first and first.startswith(found):  # new, or killed within its first line
                self._file.truncate(0)
                self._file.write(first)
                self._file.flush()
            elif found != first:
                self._file.seek(0)
                line = self._file.readline(1 << 20)
                if not line.startswith(magic) or not line.endswith(b"\n"):
                    raise DataError(f"{path}: this is no journal of {what}; move it away, or {remedy}")
                raise DataError(refuse(line[len(magic) :].decode(errors="replace").strip()))
            self._stack = stack.pop_all()

    def __enter__(self) -> Journal[Result]:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file, which stays."""
        self._stack.close()

    def add(self, part: Result) -> None:
        """Append a finished part; it is on its way to the disk when this returns, and survives a kill."""
        content = self._pack(part)
        self._file.write(_HEAD.pack(len(content), zlib.crc32(content)) + content)
        self._file.flush()

    def entries(self) -> Iterator[Result]:
        """Read all finished parts, one at a time; what follows the last whole entry is cut off."""
        self._file.seek(self._start)
        while True:
            whole = self._file.tell()
            head = self._file.read(_HEAD.size)
            length, checksum = _HEAD.unpack(head) if len(head) == _HEAD.size else (0, -1)
            content = self._file.read(length)
            if len(content) < length or zlib.crc32(content) != checksum:
                break
            yield self._unpack(content)
        self._file.truncate(whole)

    def remove(self) -> None:
        """Close and delete it, once what it was kept for is written."""
        self.path.unlink()
        self.close()


def run(
    prepare: Callable[[], Work[Item, Result]],
    items: Sequence[Item],
    workers: int,
    preload: str,
    tell: Callable[[int], None] | None = None,
) -> Iterator[tuple[Item, Result]]:
    """Work on items in several processes at a time, or in this one, and yield each with what was made of it, in any order.

    Args:
        prepare: called once in each process, makes what works on an item; must be picklable, as items are.
        items: to work on.
        workers: processes; 1 works in this one.
        preload: the module that the processes need, imported once for all.
        tell: called with the number of steps since the last call, from time to time.

    Raises:
        DataError: a process died; what is finished stays.
    """
    tell = tell or (lambda steps: None)
    if workers == 1 or len(items) < 2:
        work = prepare()
        for item in items:
            yield item, work(item, lambda: tell(1))
        return
    # not forked from here, since threads of libraries do not survive it, but from a fresh process that imports them once for all
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([preload])
    counter = context.Value("q", 0)
    pool = ProcessPoolExecutor(min(workers, len(items)), context, initializer=_start, initargs=(prepare, counter))
    told = 0
    try:
        queue = iter(items)
        waiting: dict[Future[Any], Item] = {pool.submit(_work, i): i for i in itertools.islice(queue, _AHEAD * workers)}
        while waiting:
            finished, _ = wait(waiting, timeout=_TICK, return_when=FIRST_COMPLETED)
            tell(counter.value - told)
            told = counter.value
            for future in finished:
                yield waiting.pop(future), future.result()
                waiting |= {pool.submit(_work, item): item for item in itertools.islice(queue, 1)}
        tell(counter.value - told)
    except BrokenProcessPool as error:
        raise DataError(
            "a worker process died, most likely for want of memory: fewer --workers need less; the same command goes on "
            "where this one stopped"
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


_state: tuple[Work[Any, Any], Any] | None = None  # of a process of the pool


def _start(prepare: Callable[[], Work[Any, Any]], counter: Any) -> None:
    """Prepare a process: one thread each, or the processes would wait for each other."""
    global _state
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _state = prepare(), counter
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)
    if "cv2" in sys.modules:
        sys.modules["cv2"].setNumThreads(1)


def _end_with_parent() -> None:
    """A parent that is killed cannot end its pool, which would wait for work for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _work(item: Any) -> Any:
    assert _state is not None
    work, counter = _state

    def step() -> None:
        with counter.get_lock():
            counter.value += 1

    return work(item, step)

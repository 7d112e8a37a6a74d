"""Make the boxes of many images in a pool of processes, so that a kill at any moment costs nothing but the images in work."""

from __future__ import annotations

import itertools
import multiprocessing
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from detpipe.errors import DataError, DetpipeError
from detpipe.proposal_files.journal import Journal, Made
from detpipe.proposal_files.store_writer import ProposalWriter

AHEAD = 4  # images that each process has waiting


class Proposer(Protocol):
    """Boxes of one image, the same every time."""

    @property
    def name(self) -> str:
        """What the store calls it."""
        ...

    @property
    def settings(self) -> dict[str, Any]:
        """What decides about its boxes, as JSON can hold it."""
        ...

    def propose(self, image: npt.NDArray[np.uint8]) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
        """``[H, W, 3]`` RGB -> boxes ``[P, 4]`` xyxy and scores ``[P]``, best first."""
        ...


class Item(NamedTuple):
    """An image whose boxes are wanted."""

    image_id: str
    path: Path


@dataclass
class Summary:
    """What a run did."""

    images: int  # of the store
    made: int = 0  # by this run, skipped ones included; the others were in the journal
    seconds: float = 0.0  # that the processes worked, all together
    skipped: dict[str, str] = field(default_factory=dict)  # id -> reason; they have no boxes in the store

    @property
    def seconds_an_image(self) -> float:
        """What one process took for an image, on the mean; 0 if none was made."""
        return self.seconds / max(1, self.made - len(self.skipped))


def make_store(
    build: Callable[[], Proposer],
    items: Sequence[Item],
    output: Path,
    read: Callable[[Path], npt.NDArray[np.uint8]],
    workers: int = 1,
    on_bad: str = "error",
    progress: Callable[[int, int], None] | None = None,
) -> Summary:
    """Make boxes for images and write their store, going on where an earlier run stopped.

    Args:
        build: makes the source, in each process; must be picklable.
        items: the images, of different ids.
        output: the store to write.
        read: path -> ``[H, W, 3]`` uint8 RGB; must be picklable.
        workers: processes; 1 works in this one.
        on_bad: "error" stops at an image that cannot be read or proposed for (what is made stays); "skip" writes no
            boxes for it and counts it.
        progress: called with the number of images done and of all, after each.

    Returns:
        What was done.

    Raises:
        DataError: two images of one id, a journal of other settings, or, unless skipped, an image that is bad.
    """
    if workers < 1:
        raise ValueError(f"workers must be 1 or more, got {workers}")
    if on_bad not in ("error", "skip"):
        raise ValueError(f"on_bad must be 'error' or 'skip', got {on_bad!r}")
    _check_ids(items)
    source = build()
    summary = Summary(len(items))
    with Journal(output, source.name, source.settings) as journal:
        foreign = sorted(journal.done - {item.image_id for item in items})
        if foreign:
            raise DataError(
                f"{journal.path}: an interrupted run left it with {len(foreign)} images that are not asked for, such as "
                f"{', '.join(foreign[:5])}; delete it to begin anew, or ask for the same images"
            )
        left = [item for item in items if item.image_id not in journal.done]
        if progress is not None:
            progress(len(items) - len(left), len(items))
        for item, result in _results(source, build, left, read, workers):
            journal.add(_keep(item, result, on_bad, journal, summary))
            if progress is not None:
                progress(len(journal.done), len(items))
        with ProposalWriter(output, source.name, source.settings) as writer:
            for made in journal.read():
                writer.add(made.image_id, made.boxes, made.scores, made.size if made.size[0] else None)
        journal.remove()
    return summary


def _keep(item: Item, result: _Result | _Failure, on_bad: str, journal: Journal, summary: Summary) -> Made:
    """Count a result, and say what of it goes into the journal."""
    summary.made += 1
    if isinstance(result, _Result):
        summary.seconds += result.seconds
        return result.made
    if on_bad == "error":
        raise DataError(
            f"{item.path}: {result.reason}; {len(journal.done)} images are kept in {journal.path}, and the same command goes "
            "on from there"
        )
    summary.skipped[item.image_id] = result.reason
    return Made(item.image_id, (0, 0), np.zeros((0, 4), np.float32), np.zeros(0, np.float32))


class _Result(NamedTuple):
    made: Made
    seconds: float


class _Failure(NamedTuple):
    reason: str


def _check_ids(items: Sequence[Item]) -> None:
    seen: dict[str, Path] = {}
    for item in items:
        if item.image_id in seen:
            raise DataError(
                f"images {seen[item.image_id]} and {item.path} have the same id {item.image_id!r}: a store has one entry an id"
            )
        seen[item.image_id] = item.path


def _results(
    source: Proposer,
    build: Callable[[], Proposer],
    items: Sequence[Item],
    read: Callable[[Path], npt.NDArray[np.uint8]],
    workers: int,
) -> Iterator[tuple[Item, _Result | _Failure]]:
    if workers == 1 or len(items) < 2:
        for item in items:
            yield item, _make(source, item, read)
        return
    # not forked: libraries with threads of their own do not survive it
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(min(workers, len(items)), context, initializer=_start, initargs=(build, read))
    try:
        queue = iter(items)
        waiting: dict[Future[_Result | _Failure], Item] = {}
        for item in itertools.islice(queue, AHEAD * workers):
            waiting[pool.submit(_make_in_worker, item)] = item
        while waiting:
            finished, _ = wait(waiting, return_when=FIRST_COMPLETED)
            for future in finished:
                item = waiting.pop(future)
                yield item, future.result()
                for following in itertools.islice(queue, 1):
                    waiting[pool.submit(_make_in_worker, following)] = following
    except BrokenProcessPool as error:
        raise DataError(
            "a worker process died, most likely for want of memory: fewer --workers need less; the same command goes on "
            "where this one stopped"
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


_worker: tuple[Proposer, Callable[[Path], npt.NDArray[np.uint8]]] | None = None


def _start(build: Callable[[], Proposer], read: Callable[[Path], npt.NDArray[np.uint8]]) -> None:
    """Prepare a process: one thread each, or the processes would wait for each other."""
    global _worker
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides
    _worker = build(), read
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)
    if "cv2" in sys.modules:
        sys.modules["cv2"].setNumThreads(1)


def _make_in_worker(item: Item) -> _Result | _Failure:
    assert _worker is not None
    return _make(_worker[0], item, _worker[1])


def _make(source: Proposer, item: Item, read: Callable[[Path], npt.NDArray[np.uint8]]) -> _Result | _Failure:
    try:
        start = time.perf_counter()
        image = read(item.path)
        boxes, scores = source.propose(image)
        seconds = time.perf_counter() - start
    except (DetpipeError, ValueError, OSError) as error:
        return _Failure(f"{type(error).__name__}: {error}" if not str(error) else str(error))
    return _Result(Made(item.image_id, (image.shape[0], image.shape[1]), boxes, scores), seconds)

"""Many images through one model: threads decode what comes and draw what was found while the model runs."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from detpipe.datasets.planes import without_advice
from detpipe.prediction.lines import LinesFile
from detpipe.support.errors import DataError, DownloadError
from detpipe.types import Detection

Picture = TypeVar("Picture")
_BATCHES_AHEAD = 2


@dataclass(frozen=True)
class Work(Generic[Picture]):
    """What is done with images, told by their rows.

    Args:
        read: in a thread: what is looked at; a DataError, DownloadError or OSError where it cannot be read.
        look: in the main thread: rows and pictures of a batch -> what is found in each.
        record: in a thread: row, picture, and what was found -> what is written about it, drawn before.
        failed: row and reason -> what is written about an image that could not be read.
    """

    read: Callable[[int], Picture]
    look: Callable[[Sequence[int], Sequence[Picture]], Sequence[Detection]]
    record: Callable[[int, Picture, Detection], dict[str, Any]]
    failed: Callable[[int, str], dict[str, Any]]


def run(
    work: Work[Any],
    batches: Iterable[Sequence[int]],
    lines: LinesFile,
    workers: int,
    tell: Callable[[dict[str, Any]], None],
) -> None:
    """Look at images batch by batch, and write a line about each.

    A batch of which some images are done is looked at as a whole once more, so that a kill changes no bit.

    Args:
        work: what is done.
        batches: rows that are looked at together.
        lines: what is written to; images that it has are left out.
        workers: threads that read and draw.
        tell: called with what was written about an image.
    """
    waiting = deque(batch for batch in batches if not lines.done.issuperset(batch))
    reading: deque[tuple[Sequence[int], list[Future[Any]]]] = deque()
    writing: deque[Future[dict[str, Any]]] = deque()

    def write(most: int) -> None:
        while writing and (len(writing) > most or writing[0].done()):
            record = writing.popleft().result()
            if record["index"] not in lines.done:
                lines.add(record)
                tell(record)

    pool = ThreadPoolExecutor(workers)
    try:
        while waiting or reading:
            while waiting and (len(reading) < _BATCHES_AHEAD or sum(len(r) for _, r in reading) < 2 * workers):
                rows = waiting.popleft()
                reading.append((rows, [pool.submit(work.read, row) for row in rows]))
            for row, picture, found in _look(work, *reading.popleft()):
                if isinstance(found, str):
                    writing.append(pool.submit(work.failed, row, found))
                else:
                    writing.append(pool.submit(work.record, row, picture, found))
            write(2 * workers)
        write(0)
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _look(
    work: Work[Any], rows: Sequence[int], reading: Sequence[Future[Any]]
) -> Iterator[tuple[int, Any, Detection | str]]:
    """Each image of a batch, with what was found in it, or why it could not be looked at."""
    good, pictures = [], []
    for row, future in zip(rows, reading, strict=True):
        try:
            pictures.append(future.result())
            good.append(row)
        except (DataError, DownloadError, OSError) as error:
            yield row, None, without_advice(error)
    if not good:
        return
    try:
        yield from zip(good, pictures, work.look(good, pictures), strict=True)
    except DataError as error:
        if len(good) == 1:
            yield good[0], None, without_advice(error)
            return
        for row, future in zip(rows, reading, strict=True):  # the others are looked at without the one that is at fault
            if row in good:
                yield from _look(work, [row], [future])

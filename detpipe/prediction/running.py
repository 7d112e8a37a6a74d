"""Many images through one model: threads decode what comes and draw what was found while the model runs."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from detpipe.prediction.lines import LinesFile
from detpipe.prediction.windows import Windows
from detpipe.support.errors import DataError, DownloadError
from detpipe.types import Detection

_Look = Callable[[Sequence[int], Sequence[Windows]], Sequence[Detection]]
_BATCHES_AHEAD = 2


def run(
    batches: Iterable[Sequence[int]],
    read: Callable[[int], Windows],
    look: _Look,
    record: Callable[[int, Windows | None, Detection | str], dict[str, Any]],
    lines: LinesFile,
    workers: int,
    tell: Callable[[dict[str, Any]], None],
) -> None:
    """Look at images, told by their rows, batch by batch, and write a line about each.

    A batch of which some images are done is looked at as a whole once more, so that a kill changes no bit.

    Args:
        batches: rows that are looked at together.
        read: in a thread: opens an image; a DataError, DownloadError or OSError where it cannot be read.
        look: in this thread: rows and images of a batch -> what is found in each.
        record: in a thread: row, image, and what was found in it, or None and why not -> what is written about it, drawn before.
        lines: what is written to; images that it has are left out.
        workers: threads that read and draw.
        tell: called with what was written about an image.
    """
    waiting = deque(batch for batch in batches if not lines.done.issuperset(batch))
    reading: deque[tuple[Sequence[int], list[Future[Windows]]]] = deque()
    writing: deque[Future[dict[str, Any]]] = deque()

    def write(most: int) -> None:
        while writing and (len(writing) > most or writing[0].done()):
            written = writing.popleft().result()
            if written["index"] not in lines.done:
                lines.add(written)
                tell(written)

    pool = ThreadPoolExecutor(workers)
    try:
        while waiting or reading:
            while waiting and (len(reading) < _BATCHES_AHEAD or sum(len(r) for _, r in reading) < 2 * workers):
                rows = waiting.popleft()
                reading.append((rows, [pool.submit(read, row) for row in rows]))
            writing += (pool.submit(record, *found) for found in _look(look, *reading.popleft()))
            write(2 * workers)
        write(0)
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _look(
    look: _Look, rows: Sequence[int], reading: Sequence[Future[Windows]]
) -> Iterator[tuple[int, Windows | None, Detection | str]]:
    """Each image of a batch, with what was found in it, or why it could not be looked at."""
    good: dict[int, Future[Windows]] = {}
    for row, future in zip(rows, reading, strict=True):
        error = future.exception()
        if error is None:
            good[row] = future
        elif isinstance(error, (DataError, DownloadError, OSError)):
            yield row, None, str(error)
        else:
            raise error
    images = [future.result() for future in good.values()]
    try:
        yield from zip(good, images, look(list(good), images) if good else [], strict=True)
    except DataError as error:
        if len(good) == 1:
            [row] = good
            yield row, None, str(error)
            return
        for row, future in good.items():  # the others are looked at without the one that is at fault
            yield from _look(look, [row], [future])

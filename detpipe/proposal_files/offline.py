"""Make the boxes of many images in a pool of processes, so that a kill at any moment costs nothing but the images in work."""

from __future__ import annotations

import json
import struct
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from detpipe.proposal_files.box_checks import read_entry
from detpipe.proposal_files.store_format import ProposalWriter, encode_id
from detpipe.support.errors import DataError, DetpipeError
from detpipe.support.resumable import Journal, Work, run

SUFFIX = ".partial"
_HEAD = struct.Struct("<IIII")  # bytes of the id, boxes, height, width


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


class Made(NamedTuple):
    """The boxes of one image."""

    image_id: str
    size: tuple[int, int]  # height, width
    boxes: npt.NDArray[np.float32]  # [P, 4]
    scores: npt.NDArray[np.float32]  # [P]


_Result = tuple[Made, float] | str  # with the seconds that it took; or the reason why there are no boxes


@dataclass
class Summary:
    """What a run did."""

    images: int  # of the store
    made: int = 0  # by this run, skipped ones included; the others were in the journal
    seconds: float = 0.0  # that the processes worked, all together
    skipped: dict[str, str] = field(default_factory=dict)  # id -> reason; they have no boxes in the store

    @staticmethod
    def of_all(parts: Sequence[Summary]) -> Summary:
        """What several processes did together."""
        skipped = {image: reason for part in parts for image, reason in part.skipped.items()}
        images, made = (sum(getattr(part, name) for part in parts) for name in ("images", "made"))
        return Summary(images, made, sum(part.seconds for part in parts), skipped)

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
    share: tuple[int, int] = (0, 1),
    wait: Callable[[], None] = lambda: None,
) -> Summary:
    """Make boxes for images of different ids and write their store, going on where an earlier run stopped.

    Several processes may share the images, each with a journal of its own; the first of them writes the store.

    Args:
        build: makes the source, in each process; must be picklable.
        items: the images.
        output: the store.
        read: path -> ``[H, W, 3]`` uint8 RGB; must be picklable.
        workers: processes; 1 works in this one.
        on_bad: "error" stops at an image that cannot be read or proposed for (what is made stays); "skip" writes no
            boxes for it and counts it.
        progress: called with the number of images done and of all, after each.
        share: the number of this process, from 0 on, and how many there are.
        wait: waits until all processes are there.

    Returns:
        What was done by this process.

    Raises:
        DataError: two images of one id, an id that no store can hold, a journal of other settings, or, unless skipped, an
            image that is bad.
    """
    if workers < 1:
        raise ValueError(f"workers must be 1 or more, got {workers}")
    if on_bad not in ("error", "skip"):
        raise ValueError(f"on_bad must be 'error' or 'skip', got {on_bad!r}")
    _check_ids(items)
    source = build()
    rank, size = share
    own = items[rank::size]
    summary = Summary(len(own))
    with open_journal(output, source.name, source.settings, share) as journal:
        prepare = partial(_maker, (lambda: source) if workers == 1 else build, read)
        _make_all(journal, own, partial(run, prepare, workers=workers, preload=__name__), on_bad, summary, progress)
    wait()
    if rank == 0:
        _write_store(output, source, size, items)
    return summary


def _make_all(
    journal: Journal[Made],
    items: Sequence[Item],
    make: Callable[[list[Item]], Iterator[tuple[Item, _Result]]],
    on_bad: str,
    summary: Summary,
    progress: Callable[[int, int], None] | None,
) -> None:
    """Make what the journal lacks of the images."""
    done = {made.image_id for made in journal.entries()}
    foreign = sorted(done - {item.image_id for item in items})
    if foreign:
        raise DataError(
            f"{journal.path}: an interrupted run left it with {len(foreign)} images that are not asked for, such as "
            f"{', '.join(foreign[:5])}; delete it to begin anew, or ask for the same images"
        )
    tell = progress or (lambda done, of: None)
    tell(len(done), len(items))
    for kept, (item, result) in enumerate(make([item for item in items if item.image_id not in done]), len(done)):
        summary.made += 1
        if not isinstance(result, str):
            made, seconds = result
            summary.seconds += seconds
            journal.add(made)
        elif on_bad == "skip":  # not in the journal: a later run tries it again, and says so
            summary.skipped[item.image_id] = result
        else:
            raise DataError(
                f"{item.path}: {result}; {kept} images are kept in {journal.path}, and the same command goes on from there"
            )
        tell(kept + 1, len(items))


def _write_store(output: Path, source: Proposer, size: int, items: Sequence[Item]) -> None:
    """Write what is in the journals of all processes, and remove them; images that no journal has were skipped: no boxes."""
    with ExitStack() as stack:
        journals = [
            stack.enter_context(open_journal(output, source.name, source.settings, (number, size)))
            for number in range(size)
        ]
        with ProposalWriter(output, source.name, source.settings) as writer:
            for made in chain.from_iterable(journal.entries() for journal in journals):
                writer.add(made.image_id, made.boxes, made.scores, made.size if made.size[0] else None)
            for item in items:
                if item.image_id not in writer:
                    writer.add(item.image_id, [], [])
        for journal in journals:
            journal.remove()


def open_journal(store: Path, source: str, settings: dict[str, Any], share: tuple[int, int] = (0, 1)) -> Journal[Made]:
    """Open the journal ``STORE.partial`` of what is made for a store, or that of one of several processes.

    A DataError if it is of other settings, none, or in use.
    """
    of = f"-{share[0] + 1}-of-{share[1]}" if share[1] > 1 else ""
    path = store.with_name(store.name + SUFFIX + of)
    plan = json.dumps({"source": source, "settings": settings}, sort_keys=True)

    def refuse(found: str) -> str:
        return (
            f"{path}: an interrupted run left it with {found}, now asked for is {plan}; delete it to begin anew, or take those "
            "settings"
        )

    return Journal(path, "proposals", plan, _pack, _unpack, "give another name", refuse)


def _pack(made: Made) -> bytes:
    name = made.image_id.encode()
    arrays = (np.ascontiguousarray(part, dtype="<f4").tobytes() for part in (made.boxes, made.scores))
    return _HEAD.pack(len(name), len(made.boxes), *made.size) + name + b"".join(arrays)


def _unpack(content: bytes) -> Made:
    length, count, height, width = _HEAD.unpack_from(content)
    name, start = content[_HEAD.size : _HEAD.size + length].decode(), _HEAD.size + length
    boxes = np.frombuffer(content, dtype="<f4", count=4 * count, offset=start).reshape(count, 4)
    return Made(name, (height, width), boxes, np.frombuffer(content, dtype="<f4", offset=start + 16 * count))


def _check_ids(items: Sequence[Item]) -> None:
    seen: dict[str, Path] = {}
    for item in items:
        encode_id(item.image_id, item.path)
        if item.image_id in seen:
            raise DataError(
                f"images {seen[item.image_id]} and {item.path} have the same id {item.image_id!r}: a store has one entry an id"
            )
        seen[item.image_id] = item.path


def _maker(build: Callable[[], Proposer], read: Callable[[Path], npt.NDArray[np.uint8]]) -> Work[Item, _Result]:
    source = build()
    return lambda item, step: _make(source, item, read)


def _make(source: Proposer, item: Item, read: Callable[[Path], npt.NDArray[np.uint8]]) -> _Result:
    try:
        start = time.perf_counter()
        image = read(item.path)
        boxes, scores = source.propose(image)
        seconds = time.perf_counter() - start
        read_entry(boxes, scores, source.name, (image.shape[0], image.shape[1]))  # what a store refuses is not kept
    except (DetpipeError, ValueError, OSError) as error:
        return str(error) or type(error).__name__
    return Made(item.image_id, (image.shape[0], image.shape[1]), boxes, scores), seconds

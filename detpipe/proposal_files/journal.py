"""What a long run has made so far, kept image by image, so that a killed run goes on where it stopped.

A journal is one file beside the store that it will become. Its first line says what makes the boxes; then follow records,
each with its length and checksum. A record that a kill cut short is dropped and made again: nothing is lost, nothing is kept
twice, and since a store's bytes depend on its content alone, the store is the one of an undisturbed run.
"""

from __future__ import annotations

import fcntl
import json
import os
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import numpy.typing as npt

from detpipe.errors import DataError

MAGIC = b"detpipe.proposals.journal 1 "
HEAD = struct.Struct("<IIIII")  # bytes of the id, boxes, height, width, checksum of all that
SUFFIX = ".partial"


class Made(NamedTuple):
    """The boxes of one image."""

    image_id: str
    size: tuple[int, int]  # height, width
    boxes: npt.NDArray[np.float32]  # [P, 4]
    scores: npt.NDArray[np.float32]  # [P]


class Journal:
    """The open journal of a store; no other process can open it at the same time.

    Args:
        store: the store that it will become; the journal is ``STORE.partial`` beside it.
        source: what makes the boxes.
        settings: its settings, as JSON can hold them.

    Attributes:
        done: ids of the images that are in it.

    Raises:
        DataError: it is of another source or other settings, is no journal, or another process writes it.
    """

    def __init__(self, store: Path, source: str, settings: dict[str, Any]) -> None:
        self.path = store.with_name(store.name + SUFFIX)
        self.done: set[str] = set()
        described = MAGIC + json.dumps({"source": source, "settings": settings}, sort_keys=True).encode() + b"\n"
        self._file: BinaryIO = open(self.path, "a+b")  # noqa: SIM115 (closed by close)
        try:
            self._lock()
            self._start = len(described)
            self._begin(described)
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the file, which stays."""
        self._file.close()

    def add(self, made: Made) -> None:
        """Append the boxes of one image; they are on their way to the disk when this returns, and survive a kill."""
        name = made.image_id.encode()
        boxes = np.ascontiguousarray(made.boxes, dtype="<f4")
        content = name + boxes.tobytes() + np.ascontiguousarray(made.scores, dtype="<f4").tobytes()
        counts = (len(name), len(boxes), *made.size)
        checksum = zlib.crc32(content, zlib.crc32(HEAD.pack(*counts, 0)))
        self._file.write(HEAD.pack(*counts, checksum) + content)
        self._file.flush()
        self.done.add(made.image_id)

    def read(self) -> Iterator[Made]:
        """Read all records, one at a time."""
        with open(self.path, "rb") as file:
            file.seek(self._start)
            while (made := _read_record(file)) is not None:
                yield made

    def remove(self) -> None:
        """Close and delete it, once its store is written."""
        self.path.unlink()
        self.close()

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise DataError(f"{self.path}: another process is writing it; wait for it, or give another name") from error

    def _begin(self, described: bytes) -> None:
        """Write the first line, or compare it and look which records are whole."""
        self._file.seek(0)
        first = self._file.read(len(described))
        if described.startswith(first) and first != described:  # new, or killed within its first line
            self._file.truncate(0)
            self._file.write(described)
            self._file.flush()
            return
        if first != described:
            self._file.seek(0)
            line = self._file.readline(1 << 20)
            if not line.startswith(MAGIC) or not line.endswith(b"\n"):
                raise DataError(f"{self.path}: this is no journal of proposals; move it away, or give another name")
            raise DataError(
                f"{self.path}: an interrupted run left it with {line[len(MAGIC) :].decode(errors='replace').strip()}, now "
                f"asked for is {described[len(MAGIC) :].decode().strip()}; delete it to begin anew, or take those settings"
            )
        whole = self._file.tell()
        while (made := _read_record(self._file)) is not None:
            self.done.add(made.image_id)
            whole = self._file.tell()
        self._file.truncate(whole)
        self._file.seek(0, os.SEEK_END)


def _read_record(file: BinaryIO) -> Made | None:
    """Read the next record; None at the end, or where one is cut short or damaged."""
    head = file.read(HEAD.size)
    if len(head) < HEAD.size:
        return None
    name, count, height, width, checksum = HEAD.unpack(head)
    expected = name + 20 * count
    content = file.read(expected)
    if len(content) < expected:
        return None
    if zlib.crc32(content, zlib.crc32(HEAD.pack(name, count, height, width, 0))) != checksum:
        return None
    boxes = np.frombuffer(content, dtype="<f4", count=4 * count, offset=name).reshape(count, 4)
    scores = np.frombuffer(content, dtype="<f4", count=count, offset=name + 16 * count)
    return Made(content[:name].decode(), (height, width), boxes, scores)

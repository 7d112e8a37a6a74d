"""The folder that shards are written in until all are there, with a journal of those that are, so that a killed run goes on.

The folder is ``FOLDER.partial`` beside the one that it becomes by a rename: what is visible under its name is complete. The
journal's first line names what the shards are made of; each further line is a shard that is on the disk, after its checksum. A
line that a kill cut short is dropped, and its shard written again: since a shard's bytes depend on its content alone, nothing
shows that there was a kill.
"""

from __future__ import annotations

import fcntl
import json
import os
import zlib
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

from detpipe.datasets.sharding.index import ARRAYS, INDEX, SHARD_NAME, read_plan
from detpipe.datasets.sharding.tar_files import Place, Written
from detpipe.errors import DataError
from detpipe.files import remove_orphans

JOURNAL, SUFFIX = "journal.txt", ".partial"
_MAGIC = "detpipe.shards.journal 1 "


def work_folder_of(folder: Path) -> Path:
    """Where the shards of a folder are written."""
    return folder.with_name(folder.name + SUFFIX)


class WorkFolder:
    """The open work folder of a split; no other process can open it at the same time.

    Args:
        folder: that it will become.
        plan: names what the shards are made of.
        names: of all shards.

    Attributes:
        done: number -> what is on the disk.
        complete: whether everything is written, and only the rename is left.

    Raises:
        DataError: it is of other data or settings, holds what is not ours, or another process writes it.
    """

    def __init__(self, folder: Path, plan: str, names: list[str]) -> None:
        self.folder, self.path = folder, work_folder_of(folder)
        self._plan, self._names = plan, names
        self.done: dict[int, Written] = {}
        self._journal: BinaryIO | None = None
        if self.path.exists() and not self.path.is_dir():
            raise DataError(f"{self.path}: is in the way: move it away, or name another folder")
        self.path.mkdir(parents=True, exist_ok=True)
        self._lock = os.open(self.path, os.O_RDONLY)
        try:
            self._begin()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> WorkFolder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Let other processes open it; what is in it stays."""
        if self._journal is not None:
            self._journal.close()
        os.close(self._lock)

    def add(self, written: Written) -> None:
        """Note a shard that is on the disk."""
        assert self._journal is not None
        text = json.dumps(written._asdict(), separators=(",", ":"))
        self._journal.write(f"{zlib.crc32(text.encode()):08x} {text}\n".encode())
        self._journal.flush()
        self.done[written.number] = written

    def finish(self) -> None:
        """Give the folder its name, once its index is written."""
        (self.path / JOURNAL).unlink(missing_ok=True)
        remove_orphans(self.path, sole_writer=True)
        self._refuse_strangers()
        os.fsync(self._lock)
        os.rename(self.path, self.folder)
        parent = os.open(self.folder.parent, os.O_RDONLY)
        try:
            os.fsync(parent)
        finally:
            os.close(parent)

    def _begin(self) -> None:
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise DataError(
                f"{self.path}: another process is writing it; wait for it, or name another folder"
            ) from error
        if self.folder.exists():  # finished by another process since we looked
            self.path.rmdir()
            raise DataError(f"{self.folder} is there already: another process made it just now")
        self._refuse_strangers()
        remove_orphans(self.path)
        self.complete = (self.path / INDEX).is_file()
        if self.complete:
            if read_plan(self.path) != self._plan:
                raise self._other()
            return
        self._read_journal()

    def _refuse_strangers(self) -> None:
        ours = {JOURNAL, INDEX, ARRAYS}
        for path in sorted(self.path.iterdir()):
            name = path.name.split(".partial-")[0]
            if name not in ours and not SHARD_NAME.fullmatch(name):
                raise DataError(f"{path}: is not of shards that are being made: move it away, or name another folder")

    def _read_journal(self) -> None:
        """Read which shards are whole, and cut off what follows them."""
        path = self.path / JOURNAL
        first = f"{_MAGIC}{self._plan}\n".encode()
        content = path.read_bytes() if path.exists() else b""
        if not content and any(self.path.glob("shard-*")):
            raise DataError(f"{self.path}: holds shards, but no journal of ours: move it away, or name another folder")
        if not content.startswith(first) and not first.startswith(content):
            if not content.startswith(_MAGIC.encode()):
                raise DataError(f"{path}: this is no journal of shards; move it away, or name another folder")
            raise self._other()
        if first != content[: len(first)]:  # new, or killed within its first line
            content = first
            path.write_bytes(first)
        whole = len(first)
        for line in content[len(first) :].splitlines(keepends=True):
            written = _parse(line)
            if written is None:
                break
            whole += len(line)
            shard = self.path / self._names[written.number]
            if shard.is_file() and shard.stat().st_size == written.bytes:
                self.done[written.number] = written
        self._journal = path.open("r+b")
        self._journal.truncate(whole)
        self._journal.seek(whole)

    def _other(self) -> DataError:
        return DataError(
            f"{self.path}: an interrupted run left it with other data or settings than are asked for now; delete it to begin "
            "anew, or ask for the same"
        )


def _parse(line: bytes) -> Written | None:
    """A line of the journal; None if it is cut short or damaged."""
    if not line.endswith(b"\n") or len(line) < 10 or f"{zlib.crc32(line[9:-1]):08x}".encode() != line[:8]:
        return None
    fields = json.loads(line[9:])
    places = {name: [Place(*place) for place in fields[name]] for name in ("images", "proposals")}
    return Written(**{**fields, **places, "skipped": [tuple(one) for one in fields["skipped"]]})

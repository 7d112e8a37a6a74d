"""The folder that shards are written in until all are there, with a journal of those that are, so that a killed run goes on.

The folder is ``FOLDER.partial`` beside the one that it becomes by a rename: what is visible under its name is complete. The
journal has an entry for each shard that is on the disk.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

from detpipe.datasets.shards.index import ARRAYS, INDEX, SHARD_NAME, read_plan
from detpipe.datasets.shards.tar_files import Place, Written
from detpipe.support.errors import DataError
from detpipe.support.files import remove_orphans
from detpipe.support.resumable import Journal, lock

JOURNAL, SUFFIX = "journal.txt", ".partial"
_REMEDY = "name another folder"


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
        self._journal: Journal[Written] | None = None
        if self.path.exists() and not self.path.is_dir():
            raise DataError(f"{self.path}: is in the way: move it away, or {_REMEDY}")
        self.path.mkdir(parents=True, exist_ok=True)
        self._lock = os.open(self.path, os.O_RDONLY)
        try:
            self._begin()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> WorkFolder:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let other processes open it; what is in it stays."""
        if self._journal is not None:
            self._journal.close()
        os.close(self._lock)

    def add(self, written: Written) -> None:
        """Note a shard that is on the disk."""
        assert self._journal is not None
        self._journal.add(written)
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
        lock(self._lock, self.path, _REMEDY)
        if self.folder.exists():  # finished by another process since we looked
            self.path.rmdir()
            raise DataError(f"{self.folder} is there already: another process made it just now")
        self._refuse_strangers()
        remove_orphans(self.path)
        self.complete = (self.path / INDEX).is_file()
        if self.complete:
            if read_plan(self.path) != self._plan:
                raise DataError(self._other())
            return
        self._read_journal()

    def _refuse_strangers(self) -> None:
        ours = {JOURNAL, INDEX, ARRAYS}
        for path in sorted(self.path.iterdir()):
            name = path.name.split(".partial-")[0]
            if name not in ours and not SHARD_NAME.fullmatch(name):
                raise DataError(f"{path}: is not of shards that are being made: move it away, or {_REMEDY}")

    def _read_journal(self) -> None:
        """Read which shards are whole."""
        path = self.path / JOURNAL
        if not (path.exists() and path.stat().st_size) and any(self.path.glob("shard-*")):
            raise DataError(f"{self.path}: holds shards, but no journal of ours: move it away, or {_REMEDY}")
        self._journal = Journal(path, "shards", self._plan, _pack, _unpack, _REMEDY, lambda _: self._other())
        for written in self._journal.entries():
            shard = self.path / self._names[written.number]
            if shard.is_file() and shard.stat().st_size == written.bytes:
                self.done[written.number] = written

    def _other(self) -> str:
        return (
            f"{self.path}: an interrupted run left it with other data or settings than are asked for now; delete it to begin "
            "anew, or ask for the same"
        )


def _pack(written: Written) -> bytes:
    return json.dumps(written._asdict(), separators=(",", ":")).encode()


def _unpack(content: bytes) -> Written:
    fields = json.loads(content)
    places = {name: [Place(*place) for place in fields[name]] for name in ("images", "proposals")}
    return Written(**{**fields, **places, "skipped": [tuple(one) for one in fields["skipped"]]})

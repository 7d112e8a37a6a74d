"""Keeps what was read of large annotation files, so that the next run need not read them again.

An entry is found by the SHA-256 of the annotation file's content: a file that has changed has another one, a copy has the same.
It holds arrays and no code, and their own SHA-256: a damaged entry is reported, and made again. Where entries lie and how much
of them is kept is the user's to say:

==================================  ==========================================================================================
``DETPIPE_CACHE`` in the environment  entries lie in
==================================  ==========================================================================================
not set                             ``$XDG_CACHE_HOME/detpipe/annotations``, by default ``~/.cache/detpipe/annotations``
a folder                            this folder
``off``                             nowhere: every run reads the annotation files
==================================  ==========================================================================================

At most 1 GiB is kept; what was not used for longest is deleted first. To delete a folder of entries is safe at any time.
"""

from __future__ import annotations

import hashlib
import logging
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from detpipe.files import atomic_write, remove_orphans

Arrays = dict[str, np.ndarray]

_VARIABLE = "DETPIPE_CACHE"
_OFF = "off"
_HEADER = b"detpipe annotations sha256 "
_SUFFIX = ".arrays"
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class AnnotationCache:
    """A folder of entries.

    Args:
        folder: where they lie; made when the first is stored.
        limit: bytes that all entries together may take.
        smallest: bytes; a smaller annotation file is read as fast as an entry, and gets none.
    """

    folder: Path
    limit: int = 2**30
    smallest: int = 2**22

    def key(self, path: Path, kind: str) -> str | None:
        """Name the entry of an annotation file.

        Args:
            path: the file.
            kind: what is kept of it, and in which version: another version gets another entry.

        Returns:
            The key; None for a file that gets no entry.

        Raises:
            OSError: the file cannot be read.
        """
        if path.stat().st_size < self.smallest:
            return None
        with path.open("rb") as file:
            return _name(kind, hashlib.file_digest(file, "sha256").hexdigest())

    def load(self, key: str) -> Arrays | None:
        """Read an entry.

        Args:
            key: its name.

        Returns:
            What was stored; None where nothing is there, or nothing that can be trusted.
        """
        path = self._path(key)
        try:
            content = path.read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            _log.warning(f"{path}: cannot be read ({error.strerror or error}); the annotation file is read instead")
            return None
        head, _, payload = content.partition(b"\n")
        try:
            if head != _header(payload):
                raise ValueError("it is not what was written")
            arrays = load(payload)
            os.utime(path)  # used just now
        except (ValueError, SafetensorError) as error:
            _log.warning(f"{path}: damaged ({error}); the annotation file is read instead, and the entry made again")
            return None
        except OSError:  # a folder that one may read only: then nobody deletes what was not used for long either
            pass
        return arrays

    def store(self, key: str, arrays: Arrays) -> None:
        """Write an entry; where that is not possible, say so and go on.

        Any number of processes may write the same entry: each writes a file of its own, which then takes the name.

        Args:
            key: its name.
            arrays: what to keep.
        """
        payload = save(arrays)
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            remove_orphans(self.folder)
            with atomic_write(self._path(key)) as temporary, temporary.open("wb") as file:
                file.write(_header(payload) + b"\n")
                file.write(payload)
            self._make_room(key)
        except OSError as error:
            _log.warning(
                f"{self.folder}: annotations cannot be kept for the next run ({error.strerror or error}); "
                f"set {_VARIABLE} to a folder that can be written, or to {_OFF!r}"
            )

    def _path(self, key: str) -> Path:
        return self.folder / f"{key}{_SUFFIX}"

    def _make_room(self, newest: str) -> None:
        """Delete the entries not used for longest, until the rest is within the limit."""
        entries = []
        for path in self.folder.glob(f"*{_SUFFIX}"):
            try:
                entries.append((path != self._path(newest), -path.stat().st_mtime_ns, path.stat().st_size, path))
            except FileNotFoundError:  # another process made room
                continue
        total = 0
        for older, _, size, path in sorted(entries):
            total += size
            if older and total > self.limit:
                path.unlink(missing_ok=True)


def content_key(kind: str, content: bytes) -> str:
    """As :meth:`AnnotationCache.key`, of content that has been read."""
    return _name(kind, hashlib.sha256(content).hexdigest())


def cache_of(setting: str | Path | None) -> AnnotationCache | None:
    """The cache that is in use.

    Args:
        setting: a folder, ``"off"``, or None for what the environment says.

    Returns:
        The cache; None for none.

    Raises:
        ValueError: the setting is empty text.
    """
    if setting is None:
        setting = os.environ.get(_VARIABLE) or _user_folder()
    if setting == "":
        raise ValueError(f"cache must be a folder, {_OFF!r}, or None for what {_VARIABLE} says, got ''")
    return None if setting in (_OFF, None) else AnnotationCache(Path(setting).expanduser())


def _name(kind: str, digest: str) -> str:
    return f"{kind}-{digest}"


def _user_folder() -> Path | None:
    base = os.environ.get("XDG_CACHE_HOME", "")
    try:
        return (Path(base) if base else Path.home() / ".cache") / "detpipe" / "annotations"
    except RuntimeError:  # a user without a home
        return None


def _header(payload: bytes) -> bytes:
    return _HEADER + hashlib.sha256(payload).hexdigest().encode()

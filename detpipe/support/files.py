"""Writing so that what is visible under its final name is complete: a temporary name beside it, then a rename.

The temporary name ends in ``.partial-<process id>-<8 hex digits>``. A writer that was killed leaves such a name behind,
which ``remove_orphans`` recognizes and deletes at the next start. The temporary file lies in the folder of the final
one, since a rename is atomic only within one file system.
"""

from __future__ import annotations

import errno
import os
import re
import secrets
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import filelock

from detpipe.support.errors import DataError, DetpipeError

_ORPHAN = re.compile(r"\.partial-(?P<pid>[0-9]+)-[0-9a-f]{8}$")
_LONGEST = 220  # bytes of a name that its temporary name begins with


def refuse_special(path: str | os.PathLike[str], kind: type[DetpipeError] = DataError) -> None:
    """Refuse what is no file to read: a pipe or a device may wait for ever, or never end. A missing file is left to the reader."""
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError):
        return
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
        raise kind(f"{path}: is a pipe, a device or a socket; give a regular file")


@contextmanager
def sole_writer(path: str | os.PathLike[str], busy: DetpipeError) -> Iterator[None]:
    """Keep other processes from what this one writes, by a lock on the file ``PATH.lock``, which is removed in the end.

    The lock of a process that ends in whatever way is free again; where another process has it, ``busy`` is raised.
    """
    lock = filelock.FileLock(f"{os.fspath(path)}.lock")
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout as error:
        raise busy from error
    try:
        yield
    finally:
        with suppress(PermissionError):  # Windows removes no open file
            Path(lock.lock_file).unlink(missing_ok=True)
        lock.release()


@contextmanager
def atomic_write(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path to write to, which becomes ``path`` when the block ends without an exception.

    The file and its folder are synchronized to the disk, so that the new file survives a power cut as well. An exception in the
    block removes the temporary file and leaves what was under ``path`` as it was. Missing parent folders are made.

    The temporary path does not end in the suffix of ``path``: tell writers that go by the suffix which format you want, and give
    ``numpy.savez`` an open file, since it appends a suffix to names.

    Raises:
        FileNotFoundError: the block ended without having written to the temporary path.
        IsADirectoryError: ``path`` is an existing folder.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with atomic_write(Path(folder) / "scores.txt") as temporary:
        ...         _ = temporary.write_text("0.83")
        ...     [file.name for file in Path(folder).iterdir()]
        ['scores.txt']
    """
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _temporary_name(path)
    try:
        yield temporary
        synchronize(temporary)
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno is not None and error.filename is None:
            error.filename = os.fspath(path)  # a full disk is told without the file that did not fit
        raise
    synchronize(path.parent)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write a UTF-8 file that is complete when it is visible, as of :func:`atomic_write`."""
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


@contextmanager
def atomic_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield an empty temporary folder, which becomes ``path`` when the block ends without an exception.

    Where a folder with content has appeared under ``path`` in the meantime, that one stays and this one is dropped: of two
    processes that write the same folder, the first to finish wins. The files are not synchronized to the disk one by one, so use
    it for what can be made again.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _temporary_name(path)
    temporary.mkdir()
    try:
        yield temporary
        try:
            os.rename(temporary, path)
        except OSError:
            if not path.is_dir():
                raise
            shutil.rmtree(temporary)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def atomic_remove(path: str | os.PathLike[str]) -> None:
    """Delete a folder so that it is never seen half deleted: it is renamed first, to what ``remove_orphans`` deletes."""
    path = Path(path)
    doomed = _temporary_name(path)
    os.rename(path, doomed)
    shutil.rmtree(doomed)


def remove_orphans(folder: str | os.PathLike[str], *, sole_writer: bool = False) -> list[Path]:
    """Delete what writers that were killed left in a folder, but not in its subfolders, and return the paths, sorted.

    What a running process other than this one is writing stays. Call it before this process writes to the folder.

    Args:
        folder: to clean; a missing one is as good as a clean one.
        sole_writer: whether no other process can be writing there, since this one holds the folder's lock. A running process
            that has the number of a dead writer is then no reason to keep what that one left.
    """
    folder = Path(folder)
    if not folder.is_dir():
        return []
    deleted: list[Path] = []
    for path in sorted(folder.iterdir()):
        match = _ORPHAN.search(path.name)
        if match is None or (not sole_writer and _is_other_process(int(match["pid"]))):
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
        deleted.append(path)
    return deleted


def _temporary_name(path: Path) -> Path:
    """A name beside ``path`` that no other writer uses, not even another thread of this process."""
    start = os.fsencode(path.name)[:_LONGEST].decode(errors="ignore")  # file systems take names of 255 bytes
    return path.with_name(f"{start}.partial-{os.getpid()}-{secrets.token_hex(4)}")


def synchronize(path: Path) -> None:
    """Wait until a file, or the list of names in a folder, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _is_other_process(pid: int) -> bool:
    """Whether ``pid`` is a running process and not this one, which may have been given the number of a dead writer.

    One that has ended but was not waited for (a zombie, which a container without an init process keeps) does not run.
    """
    if pid == os.getpid():
        return False
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:  # it is there, under another user
        pass
    try:
        state = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()[:1]
    except OSError:  # no such files on this system, or it has ended just now: then the next start cleans up
        return True
    return state != ["Z"]

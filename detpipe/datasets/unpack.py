"""Unpack archives of unknown origin: everything is looked at before anything is written.

Refused are names that lead out of the folder (absolute, with ``..``, with a drive or a backslash), links, devices, sparse and
encrypted members, names that are there twice, and archives that would grow beyond all measure. Tar archives must not be
compressed (a header alone may then fill the memory); those of VOC are not. Written are the bytes of plain files alone, without
their modes and owners.
"""

from __future__ import annotations

import errno
import shutil
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import IO, NamedTuple

from tqdm import tqdm

from detpipe.datasets.faults import Fault
from detpipe.datasets.fetch import check_space
from detpipe.support.errors import DownloadError
from detpipe.support.files import refuse_special

_MOST_MEMBERS = 500_000  # files and folders
_MOST_GROWTH = 50  # bytes unpacked for each byte of the archive
_LONGEST = 500  # characters of a name
_DAMAGE = (tarfile.TarError, zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError)


class _Member(NamedTuple):
    name: str  # as in the archive; of a folder with a slash behind it
    size: int  # bytes
    problem: str  # what is wrong with its kind
    open: Callable[[], IO[bytes] | None]

    @property
    def path(self) -> str:
        return self.name.rstrip("/").removeprefix("./")


def unpack(archive: str | Path, folder: str | Path, inner: str = "") -> int:
    """Write what is in a folder of a ``.zip`` or an uncompressed ``.tar`` into another folder, which exists; how many files.

    Files of several archives may meet in it, the later replaces the earlier. ``inner`` is the folder of the archive, such as
    ``VOCdevkit/VOC2007``, by default all of it; members elsewhere are looked at, but not written. A DownloadError if there is
    something in the archive that has no business there (nothing is written then), it is damaged, or the disk is full.
    """
    archive, folder = Path(archive), Path(folder)
    prefix = f"{inner.strip('/')}/" if inner else ""
    files: list[_Member] = []
    try:
        with _open(archive) as opened:
            for fault in _faults(archive, _members(opened), files):
                raise DownloadError(fault.message)
            wanted = [member for member in files if member.path.startswith(prefix)]
            if not wanted:
                raise DownloadError(
                    f"{archive}: has no file in {inner or 'it'}: it is another archive than was expected"
                )
            check_space(folder, sum(member.size for member in wanted), str(archive))
            for member in tqdm(wanted, desc=f"unpacking {archive.name}", unit="file", disable=None, leave=False):
                target = folder / member.path.removeprefix(prefix)
                target.parent.mkdir(parents=True, exist_ok=True)
                source = member.open()
                assert source is not None  # of a plain file
                with source, target.open("wb") as stream:
                    shutil.copyfileobj(source, stream)  # of a zip, checks its CRC at the end
                    found = stream.tell()
                if found != member.size:
                    raise DownloadError(f"{archive}: the member {member.name!r} ends early: the archive is damaged")
            return len(wanted)
    except _DAMAGE as error:
        raise DownloadError(
            f"{archive}: cannot be unpacked ({error}): expected a .zip or an uncompressed .tar; it is damaged, or something else"
        ) from error
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DownloadError(f"{archive}: the disk of {folder} is full; make room and run it again") from error
        raise DownloadError(f"{archive}: cannot be unpacked to {folder} ({error})") from error


def archive_faults(archive: str | Path) -> list[Fault]:
    """All that `unpack` would refuse a ``.zip``, or an uncompressed ``.tar``, for; nothing is unpacked."""
    archive = Path(archive)
    try:
        with _open(archive) as opened:
            return list(_faults(archive, _members(opened), []))
    except (*_DAMAGE, OSError) as error:
        return [Fault("archive: damaged", f"{archive}: cannot be read as a .zip or an uncompressed .tar ({error})")]


def _open(archive: Path) -> zipfile.ZipFile | tarfile.TarFile:
    refuse_special(archive, DownloadError)
    return zipfile.ZipFile(archive) if zipfile.is_zipfile(archive) else tarfile.open(archive, "r:")


def _members(opened: zipfile.ZipFile | tarfile.TarFile) -> Iterator[_Member]:
    if isinstance(opened, tarfile.TarFile):
        for info in opened:
            fine = (info.isreg() or info.isdir()) and not info.issparse()
            name, problem = f"{info.name}/" if info.isdir() else info.name, "a link, a device or sparse"
            yield _Member(name, info.size, "" if fine else problem, partial(opened.extractfile, info))
        return
    for entry in opened.infolist():
        kind = stat.S_IFMT(entry.external_attr >> 16)  # 0 where the archive was made without one
        problem = "" if kind in (0, stat.S_IFREG, stat.S_IFDIR) else "a link or a device"
        problem = "encrypted" if entry.flag_bits & 1 else problem
        # the name as in the archive: reading has cut it at a zero and turned backslashes
        yield _Member(entry.orig_filename, entry.file_size, problem, partial(opened.open, entry))


def _faults(archive: Path, members: Iterator[_Member], files: list[_Member]) -> Iterator[Fault]:
    """What is wrong with each member; the files among them are added to ``files``. Ends at what grows beyond measure."""
    allowed = _MOST_GROWTH * archive.stat().st_size
    paths: set[str] = set()
    total = 0
    for count, member in enumerate(members, start=1):
        name, is_file = member.name, not member.name.endswith("/")
        shown = name if len(name) <= 100 else f"{name[:97]}..."
        total += member.size
        if count > _MOST_MEMBERS:
            text = f"{archive}: refused, it has more than {_MOST_MEMBERS} members"
            return (yield Fault("archive: too many members", text))
        if member.size < 0 or total > allowed:
            grown = f"would take {total} bytes, more than {_MOST_GROWTH} times its own"
            text = f"{archive}: refused, its members up to {shown!r} {grown}"
            return (yield Fault("archive: grows beyond measure", text))
        if not _is_fit(name.rstrip("/")):
            text = f"{archive}: refused, the member {shown!r} leads out of the folder or has no fit name"
            yield Fault("archive: leads out of the folder", text)
        elif member.problem:
            yield Fault(f"archive: {member.problem}", f"{archive}: refused, the member {shown!r} is {member.problem}")
        elif is_file and member.path in paths:
            yield Fault("archive: there twice", f"{archive}: refused, the member {shown!r} is there twice")
        elif is_file:
            files.append(member)
        paths.update([member.path] if is_file else [])
    return None


def _is_fit(name: str) -> bool:
    absolute = name.startswith("/") or name[1:2] == ":"
    unfit = ".." in name.split("/") or "\\" in name or "\0" in name or len(name) > _LONGEST
    return bool(name) and not absolute and not unfit

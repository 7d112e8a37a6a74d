"""Unpack archives of unknown origin: everything is looked at before anything is written.

Refused are names that lead out of the folder (absolute, with ``..``, with a drive or a backslash), links, devices, sparse and
encrypted members, names that are there twice, and archives that would grow beyond all measure. Tar archives must not be
compressed (a header alone may then fill the memory); those of VOC are not. Written is what stands in one folder of the archive.
"""

from __future__ import annotations

import errno
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from detpipe.datasets.faults import Fault
from detpipe.datasets.fetch import check_space
from detpipe.support.errors import DownloadError
from detpipe.support.files import refuse_special

_CHUNK = 1 << 20  # bytes


@dataclass(frozen=True)
class Limits:
    """What an archive may hold.

    Args:
        members: files and folders.
        ratio: bytes unpacked for each byte of the archive.
        length: characters of a name.
    """

    members: int = 500_000
    ratio: float = 50.0
    length: int = 500


_USUAL = Limits()


@dataclass(frozen=True)
class _Member:
    """A file to be written.

    Args:
        name: in the archive.
        target: relative to the folder.
        size: in bytes.
        source: the archive's own record.
    """

    name: str
    target: str
    size: int
    source: Any


_Found = tuple[
    str, int, str, Any
]  # name (of a folder with a slash behind it), bytes, what is wrong, the archive's own record


def unpack(archive: str | Path, folder: str | Path, inner: str = "", limits: Limits = _USUAL) -> int:
    """Write what is in a folder of an archive into another.

    Args:
        archive: a ``.zip``, or a ``.tar`` that is not compressed.
        folder: it must exist; files of several archives may meet in it, the later replaces the earlier.
        inner: the folder of the archive, such as ``VOCdevkit/VOC2007``; all of it by default. Members elsewhere are looked at,
            but not written.
        limits: what the archive may hold.

    Returns:
        How many files were written.

    Raises:
        DownloadError: there is something in the archive that has no business there (nothing is written then), it is damaged,
            or the disk is full.
    """
    archive, folder = Path(archive), Path(folder)
    refuse_special(archive, DownloadError)
    try:
        if zipfile.is_zipfile(archive):
            with zipfile.ZipFile(archive) as opened:
                return _write_zip(opened, _members(archive, _zip_members(opened), inner, limits), folder)
        with tarfile.open(archive, "r:") as opened:
            return _write_tar(opened, _members(archive, _tar_members(opened), inner, limits), folder)
    except (tarfile.TarError, zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError) as error:
        raise DownloadError(
            f"{archive}: cannot be unpacked ({error}): expected a .zip or an uncompressed .tar; it is damaged, or something else"
        ) from error
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DownloadError(f"{archive}: the disk of {folder} is full; make room and run it again") from error
        raise DownloadError(f"{archive}: cannot be unpacked to {folder} ({error})") from error


def archive_faults(archive: str | Path, limits: Limits = _USUAL) -> list[Fault]:
    """Look at an archive without unpacking it.

    Args:
        archive: a ``.zip``, or a ``.tar`` that is not compressed.
        limits: what it may hold.

    Returns:
        All that `unpack` would refuse it for.
    """
    archive = Path(archive)
    refuse_special(archive, DownloadError)
    try:
        if zipfile.is_zipfile(archive):
            with zipfile.ZipFile(archive) as opened:
                return list(_faults(archive, _zip_members(opened), limits, []))
        with tarfile.open(archive, "r:") as opened:
            return list(_faults(archive, _tar_members(opened), limits, []))
    except (tarfile.TarError, zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, OSError) as error:
        return [Fault("archive: damaged", f"{archive}: cannot be read as a .zip or an uncompressed .tar ({error})")]


def _members(archive: Path, found: Iterator[_Found], inner: str, limits: Limits) -> list[_Member]:
    """Look at every member; those that are files in the inner folder are to be written."""
    prefix = f"{inner.strip('/')}/" if inner else ""
    files: list[_Member] = []
    for fault in _faults(archive, found, limits, files):
        raise DownloadError(fault.message)
    wanted = [member for member in files if member.target.startswith(prefix)]
    if not wanted:
        raise DownloadError(f"{archive}: has no file in {inner or 'it'}: it is another archive than was expected")
    return [replace(member, target=member.target.removeprefix(prefix)) for member in wanted]


def _faults(archive: Path, found: Iterator[_Found], limits: Limits, files: list[_Member]) -> Iterator[Fault]:
    """What is wrong with each member; the files among them are added to ``files``. Ends at what grows beyond measure."""
    allowed = limits.ratio * archive.stat().st_size
    names: set[str] = set()
    total = 0
    for count, (name, size, problem, source) in enumerate(found, start=1):
        is_file = not name.endswith("/")
        plain = name.rstrip("/").removeprefix("./")
        shown = name if len(name) <= 100 else f"{name[:97]}..."
        total += size
        if count > limits.members:
            text = f"{archive}: refused, it has more than {limits.members} members"
            return (yield Fault("archive: too many members", text))
        if size < 0 or total > allowed:
            grown = f"would take {total} bytes, more than {limits.ratio:g} times its own"
            text = f"{archive}: refused, its members up to {shown!r} {grown}"
            return (yield Fault("archive: grows beyond measure", text))
        if not _is_fit(name.rstrip("/"), limits):
            text = f"{archive}: refused, the member {shown!r} leads out of the folder or has no fit name"
            yield Fault("archive: leads out of the folder", text)
        elif problem:
            yield Fault(f"archive: {problem}", f"{archive}: refused, the member {shown!r} is {problem}")
        elif is_file and plain in names:
            yield Fault("archive: there twice", f"{archive}: refused, the member {shown!r} is there twice")
        elif is_file:
            files.append(_Member(name, plain, size, source))
        names.update([plain] if is_file else [])
    return None


def _is_fit(name: str, limits: Limits) -> bool:
    absolute = name.startswith("/") or name[1:2] == ":"
    unfit = ".." in name.split("/") or "\\" in name or "\0" in name or len(name) > limits.length
    return bool(name) and not absolute and not unfit


def _zip_members(opened: zipfile.ZipFile) -> Iterator[_Found]:
    for info in opened.infolist():
        kind = stat.S_IFMT(info.external_attr >> 16)  # 0 where the archive was made without one
        problem = "" if kind in (0, stat.S_IFREG, stat.S_IFDIR) else "a link or a device"
        problem = "encrypted" if info.flag_bits & 1 else problem
        # the name as in the archive: reading has cut it at a zero and turned backslashes
        yield info.orig_filename, info.file_size, problem, info


def _tar_members(opened: tarfile.TarFile) -> Iterator[_Found]:
    for info in opened:
        fine = (info.isreg() or info.isdir()) and not info.issparse()
        name = f"{info.name}/" if info.isdir() else info.name
        yield name, info.size, "" if fine else "a link, a device or sparse", info


def _write_zip(opened: zipfile.ZipFile, members: Sequence[_Member], folder: Path) -> int:
    check_space(folder, sum(member.size for member in members), str(opened.filename))
    for member in _progress(members, Path(str(opened.filename)).name):
        target = folder / member.target
        target.parent.mkdir(parents=True, exist_ok=True)
        with opened.open(member.source) as source, target.open("wb") as stream:
            while chunk := source.read(_CHUNK):  # checks its CRC at the end
                stream.write(chunk)
        if target.stat().st_size != member.size:
            raise DownloadError(f"{opened.filename}: the member {member.name!r} ends early: the archive is damaged")
    return len(members)


def _write_tar(opened: tarfile.TarFile, members: Sequence[_Member], folder: Path) -> int:
    check_space(folder, sum(member.size for member in members), str(opened.name))
    for member in _progress(members, Path(str(opened.name)).name):
        info: tarfile.TarInfo = member.source
        opened.extract(info.replace(name=member.target, deep=False), folder, filter="data")
    return len(members)


def _progress(members: Sequence[_Member], name: str) -> Iterator[_Member]:
    yield from tqdm(members, desc=f"unpacking {name}", unit="file", disable=None, leave=False)

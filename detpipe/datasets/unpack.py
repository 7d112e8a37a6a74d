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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from detpipe.datasets.fetch import check_space
from detpipe.errors import DownloadError

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
    try:
        if zipfile.is_zipfile(archive):
            with zipfile.ZipFile(archive) as opened:
                return _write_zip(opened, _members(archive, _zip_members(archive, opened), inner, limits), folder)
        with tarfile.open(archive, "r:") as opened:
            return _write_tar(opened, _members(archive, _tar_members(archive, opened), inner, limits), folder)
    except (tarfile.TarError, zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError) as error:
        raise DownloadError(
            f"{archive}: cannot be unpacked ({error}): expected a .zip or an uncompressed .tar; it is damaged, or something else"
        ) from error
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DownloadError(f"{archive}: the disk of {folder} is full; make room and run it again") from error
        raise DownloadError(f"{archive}: cannot be unpacked to {folder} ({error})") from error


def _members(archive: Path, found: Iterator[tuple[str, int, bool, Any]], inner: str, limits: Limits) -> list[_Member]:
    """Look at every member; those that are files in the inner folder are to be written."""
    prefix = f"{inner.strip('/')}/" if inner else ""
    allowed = limits.ratio * archive.stat().st_size
    names: set[str] = set()
    wanted: list[_Member] = []
    total = 0
    for count, (name, size, is_file, source) in enumerate(found, start=1):
        plain = name.rstrip("/") if not is_file else name
        _check_name(archive, plain, limits)
        total += size
        if count > limits.members:
            raise DownloadError(f"{archive}: refused, it has more than {limits.members} members")
        if size < 0 or total > allowed:
            raise DownloadError(
                f"{archive}: refused, its members up to {name!r} would take {total} bytes, more than {limits.ratio:g} times its own"
            )
        plain = plain.removeprefix("./")
        if is_file:
            if plain in names:
                raise DownloadError(f"{archive}: refused, the member {name!r} is there twice")
            names.add(plain)
            if plain.startswith(prefix):
                wanted.append(_Member(name, plain.removeprefix(prefix), size, source))
    if not wanted:
        raise DownloadError(f"{archive}: has no file in {inner or 'it'}: it is another archive than was expected")
    return wanted


def _check_name(archive: Path, name: str, limits: Limits) -> None:
    parts = name.split("/")
    absolute = name.startswith("/") or name[1:2] == ":"
    if not name or absolute or ".." in parts or "\\" in name or "\0" in name or len(name) > limits.length:
        shown = name if len(name) <= 100 else f"{name[:97]}..."
        raise DownloadError(f"{archive}: refused, the member {shown!r} leads out of the folder or has no fit name")


def _zip_members(archive: Path, opened: zipfile.ZipFile) -> Iterator[tuple[str, int, bool, Any]]:
    for info in opened.infolist():
        kind = stat.S_IFMT(info.external_attr >> 16)  # 0 where the archive was made without one
        if kind not in (0, stat.S_IFREG, stat.S_IFDIR) or info.flag_bits & 1:
            what = "is encrypted" if info.flag_bits & 1 else "is a link or a device"
            raise DownloadError(f"{archive}: refused, the member {info.filename!r} {what}")
        name = info.orig_filename  # as in the archive: reading has cut it at a zero and turned backslashes
        yield name, info.file_size, not name.endswith("/"), info


def _tar_members(archive: Path, opened: tarfile.TarFile) -> Iterator[tuple[str, int, bool, Any]]:
    for info in opened:
        if not (info.isreg() or info.isdir()) or info.issparse():
            raise DownloadError(f"{archive}: refused, the member {info.name!r} is a link, a device or sparse")
        yield info.name, info.size, info.isreg(), info


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

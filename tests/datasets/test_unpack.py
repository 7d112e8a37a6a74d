from __future__ import annotations

import contextlib
import errno
import io
import os
import shutil
import stat
import struct
import tarfile
import zipfile
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from detpipe.datasets import unpack as module
from detpipe.datasets.unpack import unpack
from detpipe.support.errors import DownloadError

GOOD = {"set/a.txt": b"first", "set/deep/b.txt": b"second", "other/c.txt": b"third"}


def tar_of(path: Path, files: dict[str, bytes], *more: tarfile.TarInfo, mode: Any = "w") -> Path:
    with tarfile.open(path, mode) as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
        for info in more:
            archive.addfile(info)
    return path


def zip_of(path: Path, files: dict[str, bytes], *more: zipfile.ZipInfo, kind: int = zipfile.ZIP_DEFLATED) -> Path:
    with zipfile.ZipFile(path, "w", kind) as archive:
        for name, content in files.items():
            archive.writestr(zipfile.ZipInfo(name), content, compress_type=kind)
        for info in more:
            archive.writestr(info, b"target")
    return path


def member(name: str, kind: bytes, **fields: Any) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type = kind
    for key, value in fields.items():
        setattr(info, key, value)
    return info


def contents(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture
def out(tmp_path: Path) -> Path:
    (tmp_path / "room" / "out").mkdir(parents=True)
    return tmp_path / "room" / "out"


def refused(archive: Path, out: Path, message: str) -> None:
    """An error in one line that names the archive, nothing written, and nothing outside."""
    around = sorted(str(path) for path in out.parent.rglob("*"))
    with pytest.raises(DownloadError, match=message) as caught:
        unpack(archive, out)
    assert str(archive) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert sorted(str(path) for path in out.parent.rglob("*")) == around
    assert not (out.parents[1] / "evil").exists()


@pytest.mark.parametrize("make", [tar_of, zip_of])
def test_all_or_one_folder_of_an_archive_is_written(make: Any, tmp_path: Path, out: Path) -> None:
    archive = make(tmp_path / "x", GOOD)
    assert unpack(archive, out, "set") == 2
    assert contents(out) == {"a.txt": b"first", "deep/b.txt": b"second"}
    assert unpack(archive, out) == 3
    assert contents(out) == {"a.txt": b"first", "deep/b.txt": b"second", **GOOD}
    with pytest.raises(DownloadError, match="has no file in nowhere: it is another archive"):
        unpack(archive, out, "nowhere")


@pytest.mark.parametrize("make", [tar_of, zip_of])
def test_files_of_several_archives_meet(make: Any, tmp_path: Path, out: Path) -> None:
    unpack(make(tmp_path / "one", {"set/a": b"1", "set/both": b"1"}), out, "set")
    unpack(make(tmp_path / "two", {"./set/b": b"2", "set/both": b"2"}), out, "set")
    assert contents(out) == {"a": b"1", "b": b"2", "both": b"2"}


def zip_with_mode(path: Path, mode: int) -> Path:
    info = zipfile.ZipInfo("a")
    info.external_attr = (mode | 0o777) << 16
    return zip_of(path, {"fine": b"1"}, info)


def changed(path: Path, old: bytes, new: bytes) -> Path:
    path.write_bytes(path.read_bytes().replace(old, new))
    return path


def encrypted(path: Path) -> Path:
    data = bytearray(zip_of(path, {"secret": b"1"}).read_bytes())
    data[6] |= 1  # the local header
    data[data.index(b"PK\1\2") + 8] |= 1  # the central one
    path.write_bytes(data)
    return path


def claims_more(path: Path) -> Path:
    path.write_bytes(member("huge", tarfile.REGTYPE, size=10**12).tobuf() + bytes(10240))
    return path


def outside(name: str, make: Any) -> Any:
    return lambda path: make(path, {"fine": b"1", name: b"2"})


def linked(kind: bytes, *more: tarfile.TarInfo, **fields: Any) -> Any:
    return lambda path: tar_of(path, {"fine": b"1"}, member("a", kind, **fields), *more)


OUTSIDE = [
    "../evil",
    "a/../../evil",
    "/tmp/evil",
    "..",
    "C:/evil",
    "a\\..\\..\\evil",
    "\\\\host\\evil",
    "a/..",
    "x" * 600,
]
MEMBERS = {str(k): b"" for k in range(11)}
LEADS_OUT, LINK = "refused, the member .* leads out of the folder", "the member 'a' is a link, a device or sparse"
# what makes the archive, and the message
REFUSED: dict[str, tuple[Any, str]] = {
    **{
        f"{make.__name__} {name[:20]}": (outside(name, make), LEADS_OUT)
        for name in OUTSIDE
        for make in (tar_of, zip_of)
    },
    "zero in a name": (
        lambda path: changed(zip_of(path, {"evilXname": b"2"}), b"evilXname", b"evil\0name"),
        "leads out of the folder or has no fit name",
    ),
    "symbolic link": (linked(tarfile.SYMTYPE, linkname="../../evil"), LINK),
    "link within": (linked(tarfile.SYMTYPE, linkname="fine"), LINK),
    "hard link": (linked(tarfile.LNKTYPE, linkname="/etc/passwd"), LINK),
    "device": (linked(tarfile.CHRTYPE, devmajor=1, devminor=3), LINK),
    "block device": (linked(tarfile.BLKTYPE, devmajor=8), LINK),
    "pipe": (linked(tarfile.FIFOTYPE), LINK),
    # the link alone would do no harm; the file behind it would
    "file behind a link": (linked(tarfile.SYMTYPE, member("a/evil", tarfile.REGTYPE), linkname="/tmp"), "is a link"),
    **{
        f"zip {name}": (partial(zip_with_mode, mode=mode), "the member 'a' is a link or a device")
        for name, mode in (("link", stat.S_IFLNK), ("device", stat.S_IFCHR), ("pipe", stat.S_IFIFO))
    },
    "grows": (
        partial(zip_of, files={"zeros": bytes(10**7)}),
        "up to 'zeros' would take 10000000 bytes, more than 50 times",
    ),
    "claims more than there is": (claims_more, "up to 'huge' would take 1000000000000 bytes|cannot be unpacked"),
    "many in a tar": (partial(tar_of, files=MEMBERS), "more than 10 members"),
    "many in a zip": (partial(zip_of, files=MEMBERS), "more than 10 members"),
    **{
        f"compressed {mode}": (partial(tar_of, files=GOOD, mode=mode), "expected a .zip or an uncompressed .tar")
        for mode in ("w:gz", "w:bz2", "w:xz")
    },
    "twice": (partial(tar_of, files={"a": b"", "./a": b""}), r"the member '\./a' is there twice"),
    "encrypted": (encrypted, "the member 'secret' is encrypted"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_row_30_what_has_no_business_in_an_archive_is_refused(
    kind: str, tmp_path: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_MOST_MEMBERS", 10)
    make, message = REFUSED[kind]
    refused(make(tmp_path / "x"), out, message)


def test_row_30_many_members_of_little_growth_add_up(
    tmp_path: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = zip_of(tmp_path / "x", {f"{k}": bytes(4000) + os.urandom(100) for k in range(50)})
    with monkeypatch.context() as patch:
        patch.setattr(module, "_MOST_GROWTH", 10)
        refused(path, out, "more than 10 times its own")
    assert unpack(path, out) == 50


def test_row_30_a_header_that_lies_about_the_size(tmp_path: Path, out: Path) -> None:
    path = changed(zip_of(tmp_path / "x", {"zeros": bytes(10**6)}), struct.pack("<I", 10**6), struct.pack("<I", 100))
    with pytest.raises(DownloadError, match=r"cannot be unpacked .Bad CRC-32"):
        unpack(path, out)
    assert sum(map(len, contents(out).values())) <= 100


@pytest.mark.parametrize("make", [tar_of, zip_of])
def test_damaged_archives_are_one_line(make: Any, tmp_path: Path, out: Path) -> None:
    path = make(tmp_path / "x", {"set/a": os.urandom(50_000)})
    data = path.read_bytes()
    path.write_bytes(data[:20_000])
    refused(path, out, "cannot be unpacked")
    path.write_bytes(b"no archive")
    refused(path, out, "cannot be unpacked")
    flipped = bytearray(data)
    flipped[25_000] ^= 255
    path.write_bytes(flipped)
    if make is zip_of:
        with pytest.raises(DownloadError, match=r"cannot be unpacked .(Bad CRC-32|Error -3)"):
            unpack(path, out)


def test_modes_and_owners_are_not_taken_over(tmp_path: Path, out: Path) -> None:
    unpack(tar_of(tmp_path / "x", {}, member("a", tarfile.REGTYPE, mode=0o4777)), out)
    assert not stat.S_IMODE((out / "a").stat().st_mode) & 0o6022


def test_a_disk_that_is_too_small_or_gets_full(tmp_path: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = zip_of(tmp_path / "x", {"a": b"12345"})
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 6, 4))  # type: ignore[attr-defined]
        refused(path, out, "needs 0.00 GB")

    def full(*_: Any) -> Any:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(zipfile.ZipFile, "open", full)
    with pytest.raises(DownloadError, match=r"the disk of .* is full"):
        unpack(path, out)


@settings(max_examples=50, deadline=None)
@given(
    names=st.lists(st.text("ab./\\:\0é", min_size=1, max_size=8), min_size=1, max_size=4, unique=True),
    zipped=st.booleans(),
)
def test_row_30_nothing_ever_lands_outside(
    tmp_path_factory: pytest.TempPathFactory, names: list[str], zipped: bool
) -> None:
    base = tmp_path_factory.mktemp("any")
    (base / "room" / "out").mkdir(parents=True)
    files = {name: b"x" for name in names if zipped or "\0" not in name}
    files = dict({name.partition("\0")[0]: (name, content) for name, content in files.items()}.values())
    if not files:
        return
    archive = (zip_of if zipped else tar_of)(base / "archive", files)
    with contextlib.suppress(DownloadError):
        unpack(archive, base / "room" / "out")
    outside = [p for p in base.rglob("*") if (base / "room" / "out") not in (p, *p.parents)]
    assert sorted(outside) == sorted([archive, base / "room"])

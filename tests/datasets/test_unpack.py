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
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from detpipe.datasets.unpack import Limits, unpack
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


def refused(archive: Path, out: Path, message: str, **limits: Any) -> None:
    """An error in one line that names the archive, nothing written, and nothing outside."""
    around = sorted(str(path) for path in out.parent.rglob("*"))
    with pytest.raises(DownloadError, match=message) as caught:
        unpack(archive, out, limits=Limits(**limits))
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


NAMES = [
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


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("make", [tar_of, zip_of])
def test_row_30_names_that_lead_out_are_refused(make: Any, name: str, tmp_path: Path, out: Path) -> None:
    refused(make(tmp_path / "x", {"fine": b"1", name: b"2"}), out, "refused, the member .* leads out of the folder")


def test_row_30_a_zero_in_the_name_of_a_zip_member(tmp_path: Path, out: Path) -> None:
    path = zip_of(tmp_path / "x.zip", {"fine": b"1", "evilXname": b"2"})
    path.write_bytes(path.read_bytes().replace(b"evilXname", b"evil\0name"))
    refused(path, out, "leads out of the folder or has no fit name")


LINKS = {
    "symbolic link": member("a", tarfile.SYMTYPE, linkname="../../evil"),
    "link within": member("a", tarfile.SYMTYPE, linkname="fine"),
    "hard link": member("a", tarfile.LNKTYPE, linkname="/etc/passwd"),
    "device": member("a", tarfile.CHRTYPE, devmajor=1, devminor=3),
    "block device": member("a", tarfile.BLKTYPE, devmajor=8),
    "pipe": member("a", tarfile.FIFOTYPE),
}


@pytest.mark.parametrize("kind", LINKS)
def test_row_30_links_and_devices_in_a_tar_are_refused(kind: str, tmp_path: Path, out: Path) -> None:
    refused(tar_of(tmp_path / "x", {"fine": b"1"}, LINKS[kind]), out, "the member 'a' is a link, a device or sparse")


@pytest.mark.parametrize("mode", [stat.S_IFLNK, stat.S_IFCHR, stat.S_IFIFO])
def test_row_30_links_and_devices_in_a_zip_are_refused(mode: int, tmp_path: Path, out: Path) -> None:
    info = zipfile.ZipInfo("a")
    info.external_attr = (mode | 0o777) << 16
    refused(zip_of(tmp_path / "x", {"fine": b"1"}, info), out, "the member 'a' is a link or a device")


def test_row_30_a_write_through_a_link_is_refused(tmp_path: Path, out: Path) -> None:
    """The link alone would do no harm; the file behind it would."""
    link = member("a", tarfile.SYMTYPE, linkname=str(tmp_path))
    path = tmp_path / "x"
    with tarfile.open(path, "w") as archive:
        archive.addfile(link)
        info = tarfile.TarInfo("a/evil")
        info.size = 1
        archive.addfile(info, io.BytesIO(b"1"))
    refused(path, out, "is a link")


def test_row_30_a_zip_that_grows_beyond_measure_is_refused(tmp_path: Path, out: Path) -> None:
    refused(
        zip_of(tmp_path / "x", {"zeros": bytes(10**7)}),
        out,
        "up to 'zeros' would take 10000000 bytes, more than 50 times",
    )


def test_row_30_many_members_of_little_growth_add_up(tmp_path: Path, out: Path) -> None:
    path = zip_of(tmp_path / "x", {f"{k}": bytes(4000) + os.urandom(100) for k in range(50)})
    refused(path, out, "more than 10 times its own", ratio=10)
    assert unpack(path, out, limits=Limits(ratio=30)) == 50


def test_row_30_a_header_that_lies_about_the_size(tmp_path: Path, out: Path) -> None:
    path = zip_of(tmp_path / "x", {"zeros": bytes(10**6)}, kind=zipfile.ZIP_DEFLATED)
    data = path.read_bytes().replace(struct.pack("<I", 10**6), struct.pack("<I", 100))
    path.write_bytes(data)
    with pytest.raises(DownloadError, match=r"cannot be unpacked .Bad CRC-32"):
        unpack(path, out)
    assert sum(map(len, contents(out).values())) <= 100


def test_row_30_a_tar_member_that_claims_more_than_there_is(tmp_path: Path, out: Path) -> None:
    path = tmp_path / "x"
    info = tarfile.TarInfo("huge")
    info.size = 10**12
    path.write_bytes(info.tobuf() + bytes(10240))
    refused(path, out, "up to 'huge' would take 1000000000000 bytes|cannot be unpacked")


def test_row_30_too_many_members(tmp_path: Path, out: Path) -> None:
    for make in (tar_of, zip_of):
        refused(make(tmp_path / "x", {str(k): b"" for k in range(11)}), out, "more than 10 members", members=10)


@pytest.mark.parametrize("mode", ["w:gz", "w:bz2", "w:xz"])
def test_row_30_compressed_tars_are_refused(mode: str, tmp_path: Path, out: Path) -> None:
    refused(tar_of(tmp_path / "x", GOOD, mode=mode), out, "expected a .zip or an uncompressed .tar")


def test_row_30_what_is_there_twice_is_refused(tmp_path: Path, out: Path) -> None:
    path = tmp_path / "x"
    with tarfile.open(path, "w") as archive:
        for name in ("a", "./a"):
            archive.addfile(tarfile.TarInfo(name))
    refused(path, out, r"the member '\./a' is there twice")


def test_row_30_encrypted_members_are_refused(tmp_path: Path, out: Path) -> None:
    path = zip_of(tmp_path / "x", {"secret": b"1"})
    data = bytearray(path.read_bytes())
    data[6] |= 1  # the local header
    data[data.index(b"PK\1\2") + 8] |= 1  # the central one
    path.write_bytes(data)
    refused(path, out, "the member 'secret' is encrypted")


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
    path = tmp_path / "x"
    with tarfile.open(path, "w") as archive:
        info = tarfile.TarInfo("a")
        info.mode = 0o4777
        archive.addfile(info)
    unpack(path, out)
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

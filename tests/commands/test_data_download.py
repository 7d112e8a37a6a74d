from __future__ import annotations

import hashlib
import shutil
import tarfile
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml
from datasets.builders import coco_content, voc_object, write_coco, write_voc
from datasets.file_server import Behavior, serving

from detpipe import cli
from detpipe.datasets import public_sets
from detpipe.datasets.fetch import Patience, RemoteFile
from detpipe.datasets.formats.recognize import open_split, recognize
from detpipe.datasets.public_sets import PUBLIC_SETS, Part, install
from detpipe.support.errors import DownloadError, UsageError

main = partial(cli.run, group="data")

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    defaults = public_sets.fetch.__defaults__ or ()
    monkeypatch.setattr(public_sets.fetch, "__defaults__", (Patience(attempts=2, timeout=5, wait=0), *defaults[1:]))


def small_tar(path: Path, root: Path) -> None:
    """As VOC's archives are: everything under VOCdevkit, and something that nobody needs."""
    with tarfile.open(path, "w") as archive:
        for file in sorted(root.rglob("*")):
            archive.add(file, file.relative_to(root), recursive=False)


def small_zip(path: Path, root: Path, folder: str) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        for file in sorted((root / folder).rglob("*")):
            archive.write(file, file.relative_to(root))


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Behavior]:
    """Small archives with the names, the addresses and the layout of the true ones; their sizes and counts take those' place."""
    source = tmp_path / "source"
    write_voc(source / "VOCdevkit/VOC2007", {"000001": [voc_object()], "000002": []}, "trainval")
    (source / "VOCdevkit/readme.txt").write_text("x")
    write_voc(source / "test/VOCdevkit/VOC2007", {"000003": [voc_object("dog")]}, "test")
    write_voc(source / "12/VOCdevkit/VOC2012", {"2008_000001": [voc_object()]}, "trainval")
    for split in ("train2017", "val2017"):
        write_coco(source, coco_content(), split)
    made = tmp_path / "server"
    made.mkdir()
    small_tar(made / "VOCtest_06-Nov-2007.tar", source / "test")
    shutil.rmtree(source / "test")
    small_tar(made / "VOCtrainval_11-May-2012.tar", source / "12")
    shutil.rmtree(source / "12")
    for name, folder in (
        ("train2017", "train2017"),
        ("val2017", "val2017"),
        ("annotations_trainval2017", "annotations"),
    ):
        small_zip(made / f"{name}.zip", source, folder)
    for folder in ("annotations", "train2017", "val2017"):
        shutil.rmtree(source / folder)
    small_tar(made / "VOCtrainval_06-Nov-2007.tar", source)
    files = {path.name: path.read_bytes() for path in made.iterdir()}
    counts = {9963: 3, 17125: 1, 5000: 3, 118_287: 3}
    with serving(files={f"/{name}": content for name, content in files.items()}) as behavior:
        for name, wanted in PUBLIC_SETS.items():
            parts = tuple(
                replace(
                    part,
                    archives=tuple(shrunk(remote, files[remote.name], behavior.url) for remote in part.archives),
                    files={pattern: counts.get(number, number) for pattern, number in part.files.items()},
                )
                for part in wanted.parts
            )
            monkeypatch.setitem(PUBLIC_SETS, name, replace(wanted, parts=parts))
        yield behavior


def shrunk(remote: RemoteFile, content: bytes, url: str) -> RemoteFile:
    checksum = hashlib.new(remote.algorithm, content).hexdigest()
    return replace(remote, url=f"{url}/{remote.name}", size=len(content), checksum=checksum)


def files_of(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


def test_the_known_archives_are_well_formed():
    assert set(PUBLIC_SETS) == {"voc07", "voc12", "coco2017"}
    for remote in [remote for wanted in PUBLIC_SETS.values() for part in wanted.parts for remote in part.archives]:
        assert len(remote.checksum) == {"md5": 32, "sha256": 64}[remote.algorithm]
        assert int(remote.checksum, 16) > 0
        assert remote.size > 10**8
        assert remote.url.startswith(("https://thor.robots.ox.ac.uk/", "http://images.cocodataset.org/"))


def test_voc_is_laid_out_as_its_configurations_expect(server, tmp_path, capsys):
    out = tmp_path / "data"
    for name in ("voc07", "voc12"):
        assert cli.main(["data", "download", name, "-o", str(out)]) == 0
    shown = capsys.readouterr().out
    assert f"{out}/VOCdevkit/VOC2007: 8 files; the checksums of its archives are as expected" in shown
    assert "read by configs/data/voc07.yaml\n" in shown
    assert f"{server.url}/VOCtrainval_06-Nov-2007.tar  0.00 GB\n" in shown
    assert sorted(path.name for path in out.iterdir()) == ["VOCdevkit"]  # no archives, nothing half-written
    assert sorted(path.name for path in (out / "VOCdevkit").iterdir()) == ["VOC2007", "VOC2012"]
    for config in ("voc07", "voc0712"):
        settings = yaml.safe_load((ROOT / f"configs/data/{config}.yaml").read_text())["data"]["init_args"]
        root = out.parent / settings["root"]
        assert root == out / "VOCdevkit"
        for split in {*settings["train"], *settings["val"], *settings["test"]}:
            assert len(open_split(str(root), split).annotations("val"))


def test_coco_is_laid_out_as_its_configuration_expects(server, tmp_path):
    assert main(["download", "coco2017", "-o", str(tmp_path / "data")]) == 0
    settings = yaml.safe_load((ROOT / "configs/data/coco.yaml").read_text())["data"]["init_args"]
    root = tmp_path / settings["root"]
    assert recognize(str(root)).splits == ("train2017", "val2017")
    for split in (settings["train"], settings["val"]):
        assert len(open_split(str(root), split).annotations("val")) == 3
    assert sorted(path.name for path in root.iterdir()) == ["annotations", "train2017", "val2017"]


def test_what_is_complete_is_left_alone_and_what_is_missing_is_made(server, tmp_path, capsys):
    arguments = ["download", "coco2017", "-o", str(tmp_path)]
    assert main(arguments) == 0
    before = len(server.requests)
    assert main(arguments) == 0
    assert f"{tmp_path}/coco/val2017: complete\n" in capsys.readouterr().out
    assert len(server.requests) == before
    shutil.rmtree(tmp_path / "coco" / "val2017")
    assert main(arguments) == 0
    assert [path for path, _ in server.requests[before:]] == ["/val2017.zip"]


def test_a_folder_with_other_files_is_named_and_left_alone(server, tmp_path):
    mine = tmp_path / "VOCdevkit/VOC2007/JPEGImages/mine.jpg"
    mine.parent.mkdir(parents=True)
    mine.write_text("x")
    with pytest.raises(
        DownloadError, match=r"VOC2007: is there already, but has 1 files JPEGImages/\*\.jpg, expected 3"
    ):
        main(["download", "voc07", "-o", str(tmp_path)])
    assert mine.read_text() == "x"
    assert server.requests == []


def test_a_run_that_was_cut_off_goes_on(server, tmp_path, capsys):
    server.cuts = [None, 1000, 0, 0]
    arguments = ["download", "voc07", "-o", str(tmp_path)]
    assert cli.main(["data", *arguments]) == 1
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert "VOCtest_06-Nov-2007.tar: the connection was closed early; 1000 of" in err
    assert not (tmp_path / "VOCdevkit").exists()
    assert main(arguments) == 0
    shown = capsys.readouterr().out
    assert "VOCtrainval_06-Nov-2007.tar  0.00 GB  is there\n" in shown
    assert "VOCtest_06-Nov-2007.tar  0.00 GB  goes on\n" in shown
    assert server.requests[-1] == ("/VOCtest_06-Nov-2007.tar", "bytes=1000-")


def test_archives_that_lie_elsewhere_are_used_and_kept(server, tmp_path):
    archives = tmp_path / "archives"
    shutil.copytree(tmp_path / "server", archives)
    assert main(["download", "voc12", "-o", str(tmp_path / "data"), "--archives", str(archives)]) == 0
    assert server.requests == []
    assert (archives / "VOCtrainval_11-May-2012.tar").exists()
    (archives / "val2017.zip").write_bytes(b"x")
    with pytest.raises(DownloadError, match=r"val2017\.zip: expected \d+ bytes, found 1; remove it"):
        main(["download", "coco2017", "-o", str(tmp_path / "data"), "--archives", str(archives)])


def test_archives_may_be_kept_and_come_from_a_mirror(server, tmp_path):
    server.files = {f"/copy{path}": content for path, content in server.files.items()}
    arguments = ["download", "voc12", "-o", str(tmp_path / "data"), "--keep-archives"]
    assert main([*arguments, "--mirror", f"{server.url}/copy/"]) == 0
    assert files_of(tmp_path / "data" / "downloads") == ["VOCtrainval_11-May-2012.tar"]
    with pytest.raises(DownloadError, match="only http:// and https:// addresses"):
        main([*arguments, "--mirror", "file:///somewhere"])


def test_mistakes_are_one_line(tmp_path):
    with pytest.raises(
        UsageError, match="unknown data set 'voc7': expected voc07, voc12, coco2017; did you mean 'voc07'"
    ):
        main(["download", "voc7", "-o", str(tmp_path)])
    with pytest.raises(UsageError, match=r"required: voc07\|voc12\|coco2017"):
        main(["download"])


def test_too_small_a_disk_is_known_before_anything_is_fetched(server, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**6, 10**6 - 9000, 9000))  # type: ignore[attr-defined]
    with pytest.raises(DownloadError, match=r"with archives beside what is unpacked: needs .* left; make room"):
        main(["download", "voc07", "-o", str(tmp_path)])
    assert server.requests == []


def test_an_archive_that_lacks_files_leaves_no_folder(server, tmp_path):
    [part] = PUBLIC_SETS["voc12"].parts
    more = replace(part, files={**part.files, "JPEGImages/*.jpg": 5})
    with pytest.raises(DownloadError, match="has 1 files JPEGImages"):
        install(more, tmp_path / "data", tmp_path / "archives")
    assert files_of(tmp_path / "data") == ["VOCdevkit"]


@pytest.mark.parametrize("name", ["../../evil", "/tmp/evil"])
def test_row_30_an_evil_archive_leaves_nothing(name, tmp_path):
    path = tmp_path / "archives" / "evil.zip"
    path.parent.mkdir()
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("set/a.jpg", "x")
        archive.writestr(name, "x")
    checksum = hashlib.sha256(path.read_bytes()).hexdigest()
    remote = RemoteFile("http://127.0.0.1:9/evil.zip", path.stat().st_size, "sha256", checksum)
    part = Part(target="sets/set", inner="set", archives=(remote,), files={"*.jpg": 1})
    with pytest.raises(DownloadError, match="leads out of the folder"):
        install(part, tmp_path / "data", tmp_path / "archives")
    assert files_of(tmp_path / "data") == ["sets"]
    assert files_of(tmp_path) == ["archives", "archives/evil.zip", "data", "data/sets"]


def test_leftovers_of_a_killed_run_are_removed(server, tmp_path):
    left = tmp_path / "VOCdevkit" / "VOC2012.partial-999999999-0123abcd"
    left.mkdir(parents=True)
    assert main(["download", "voc12", "-o", str(tmp_path)]) == 0
    assert sorted(path.name for path in (tmp_path / "VOCdevkit").iterdir()) == ["VOC2012"]


def test_interrupting_an_unpacking_leaves_no_folder(server, tmp_path, monkeypatch):
    def stopped(*_: Any, **__: Any) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(public_sets, "unpack", stopped)
    assert cli.main(["data", "download", "voc12", "-o", str(tmp_path / "data")]) == 130
    assert files_of(tmp_path / "data") == ["VOCdevkit", "downloads", "downloads/VOCtrainval_11-May-2012.tar"]

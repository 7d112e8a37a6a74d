from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets.builders import HEADER, coco_content, write_coco, write_csv, write_voc, write_yolo
from datasets.shard_cases import tiny_annotations, tiny_coco

from detpipe import cli
from detpipe.commands.data_shards import read_bytes, run_shards
from detpipe.datasets import COCO, Shards
from detpipe.datasets.formats.recognize import open_split
from detpipe.datasets.shards import write
from detpipe.datasets.shards.index import ARRAYS, INDEX, read_index
from detpipe.datasets.shards.write import PLAN, Contents, Sharding, finished_shards, make_shards, work_folder
from detpipe.proposal_files import write_store
from detpipe.support.errors import DataError, UsageError

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def table(tmp_path: Path) -> Path:
    """Forty images with a box each, in a table."""
    a = tiny_annotations(tmp_path / "data", 40)
    rows = [f"{name},1,1,5,6,{'cat' if row % 3 else 'dog'}" for row, name in enumerate(a.file_names.tolist())]
    (tmp_path / "data" / "annotations.csv").write_text("\n".join([HEADER, *rows]) + "\n")
    return tmp_path / "data"


def content_of(folder: Path) -> dict[str, bytes]:
    """Everything under a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.parametrize("layout", ["coco", "voc", "yolo", "csv"])
def test_every_layout_can_be_packed(layout, tmp_path, capsys):
    root = tmp_path / "data"
    {"coco": write_coco, "voc": write_voc, "yolo": write_yolo, "csv": write_csv}[layout](root)
    assert cli.main(["data", "shards", str(root), "-o", str(tmp_path / "out"), "--images-per-shard", "2"]) == 0
    files = open_split(str(root), None if layout == "csv" else "train").annotations("val")
    data = Shards(str(tmp_path / "out"), val="train")
    shards = data.annotations("val")
    assert shards.file_names.tolist() == files.file_names.tolist()
    assert np.array_equal(shards.boxes, files.boxes)
    assert np.array_equal(shards.image_ids, files.image_ids)
    assert sum(len(images) for images, _ in data.val_dataloader()) == len(files)
    count = len(files)
    assert f"train: {count} images read = {count} written + 0 skipped" in capsys.readouterr().out
    raw = {str(name): (files.root / str(name)).read_bytes() for name in files.file_names}
    contents = data.contents("val")
    assert {str(name): contents.read(row) for row, name in enumerate(shards.file_names)} == raw


@pytest.mark.slow
def test_any_number_of_workers_makes_the_same_files(table, tmp_path):
    for name, workers in (("one", 1), ("three", 3)):
        arguments = [str(table), "-o", str(tmp_path / name), "--shard-size", "30kB", "--workers", str(workers)]
        assert run_shards(arguments) == 0
    first = content_of(tmp_path / "one")
    assert len(first) > 5
    assert content_of(tmp_path / "three") == first
    assert {path.name for path in (tmp_path / "one").iterdir()} == {"train"}
    shards = read_index(tmp_path / "one" / "train")
    assert max(shard.bytes for shard in shards.shards) <= 30_000
    assert run_shards([str(table), "-o", str(tmp_path / "seed"), "--shard-size", "30kB", "--seed", "1"]) == 0
    assert content_of(tmp_path / "seed") != first


SLOW = f"""
import sys, time
sys.path.insert(0, {str(ROOT)!r})
from detpipe.datasets.shards.write import Contents
read = Contents.read
def slow(self, row):
    time.sleep(0.06)
    return read(self, row)
Contents.read = slow  # in the workers too, which run this file for themselves
if __name__ == "__main__":
    from detpipe.commands.data_shards import run_shards
    run_shards(sys.argv[1:])
"""


def slowly(arguments: list[str]) -> None:
    """The command, which takes its time for each image."""
    read = Contents.read

    def slow(self: Contents, row: int) -> bytes:
        time.sleep(0.03)
        return read(self, row)

    Contents.read = slow  # type: ignore[method-assign]
    run_shards(arguments)


def start(arguments: list[str], workers: int) -> Any:
    """Run the command in a process of its own: a copy of this one, which costs nothing, or a new one with a pool."""
    if workers == 1:
        process = multiprocessing.get_context("fork").Process(target=slowly, args=(arguments,))
        process.start()
        return process
    program = Path(arguments[-1]).with_name("slow.py")
    program.write_text(SLOW)
    return subprocess.Popen(
        [sys.executable, str(program), *arguments, "--workers", str(workers)],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip


def kill_at_random(arguments: list[str], work: Path, workers: int, wait: float) -> bool:
    """Kill the command some time after its first new shard; whether it was killed in time."""
    before = len(list(work.glob("shard-*"))) if work.exists() else 0
    process = start(arguments, workers)
    running = process.is_alive if workers == 1 else lambda: process.poll() is None
    begun = time.monotonic()
    while running() and (not work.exists() or len(list(work.glob("shard-*"))) <= before):
        assert time.monotonic() - begun < 120
        time.sleep(0.002)
    time.sleep(wait)
    children = children_of(process.pid)
    process.kill()
    process.join() if workers == 1 else process.wait()
    end = time.monotonic() + 30
    while any(map(is_running, children)):  # workers must not outlive who started them
        assert time.monotonic() < end, children
        time.sleep(0.02)
    return (process.exitcode if workers == 1 else process.returncode) == -signal.SIGKILL


@pytest.mark.slow
def test_six_kills_leave_no_trace(table, tmp_path):
    """Killed at random moments, the same command always goes on, and ends with the same files."""
    arguments = [str(table), "--images-per-shard", "2"]
    assert run_shards([*arguments, "-o", str(tmp_path / "whole")]) == 0
    output, draws, left = tmp_path / "killed", random.Random(0), []
    work = output / "train.partial"
    for kill in range(6):
        workers = 2 if kill == 2 else 1
        assert kill_at_random([*arguments, "-o", str(output)], work, workers, draws.random() * 0.06), kill
        left.append(len(list(work.glob("shard-*.tar"))))
    assert left == sorted(left)
    assert len(set(left)) >= 4
    assert not (output / "train").exists()
    assert run_shards([*arguments, "-o", str(output)]) == 0
    assert content_of(output) == content_of(tmp_path / "whole")


def children_of(process: int) -> list[int]:
    """The processes that a process started, and theirs."""
    found: list[int] = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[1]) == process:
            child = int(path.parent.name)
            found += [child, *children_of(child)]
    return found


def is_running(process: int) -> bool:
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


def test_what_is_there_is_kept_and_said(table, tmp_path, capsys):
    arguments = [str(table), "-o", str(tmp_path / "out"), "--images-per-shard", "10"]
    assert run_shards(arguments) == 0
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}
    capsys.readouterr()
    assert run_shards(arguments) == 0
    assert "4 shards were there from an earlier run" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")} == times
    with pytest.raises(DataError, match=r"out/train is there already, with something else in it: name a new folder"):
        run_shards([*arguments[:-1], "11"])
    (table / "007.png").write_bytes((table / "007.png").read_bytes() + b"x")
    with pytest.raises(DataError, match="is there already, with something else in it"):
        run_shards(arguments)


def test_foreign_folders_are_left_alone(table, tmp_path):
    out = tmp_path / "out"
    (out / "mine").mkdir(parents=True)
    (out / "mine" / "file").write_text("x")
    with pytest.raises(UsageError, match="holds mine, which is no folder of shards: name a new folder"):
        run_shards([str(table), "-o", str(out)])
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(UsageError, match=r"a\.txt: is a file: name a folder"):
        run_shards([str(table), "-o", str(tmp_path / "a.txt")])
    work = tmp_path / "other" / "train.partial"
    work.mkdir(parents=True)
    (work / "notes.txt").write_text("x")
    with pytest.raises(DataError, match=r"notes\.txt: is not of shards that are being made: move it away"):
        run_shards([str(table), "-o", str(tmp_path / "other")])
    (work / "notes.txt").rename(work / "shard-000000.tar")
    with pytest.raises(DataError, match="holds shards, but not the plan that they were made by"):
        run_shards([str(table), "-o", str(tmp_path / "other")])
    (work / PLAN).write_text("dear diary\n")
    with pytest.raises(DataError, match="other data or settings"):
        run_shards([str(table), "-o", str(tmp_path / "other")])
    assert (work / "shard-000000.tar").read_text() == "x"
    work.joinpath(PLAN).unlink()
    work.joinpath("shard-000000.tar").unlink()
    work.rmdir()
    work.write_text("x")
    with pytest.raises((DataError, UsageError), match=r"train\.partial"):
        run_shards([str(table), "-o", str(tmp_path / "other")])


def test_other_settings_do_not_go_on(table, tmp_path):
    a = tiny_annotations(tmp_path / "data", 6)
    folder = tmp_path / "out"
    with work_folder(folder, "x" * 64):
        pass
    with pytest.raises(DataError, match=r"out\.partial: an interrupted run left it with other data or settings"):
        make_shards(a, folder, "train")


def test_two_runs_at_once_are_refused(tmp_path):
    again = work_folder(tmp_path / "out", "x")
    with work_folder(tmp_path / "out", "x"), pytest.raises(DataError, match=r"out\.partial: another process is"):
        again.__enter__()


def test_what_a_killed_writer_left_does_not_end_up_among_shards(tmp_path, monkeypatch):
    """Whatever runs under its number by now."""
    a, sharding = tiny_annotations(tmp_path / "data", 6), Sharding(images_per_shard=2)
    make_shards(a, tmp_path / "whole", "train", sharding=sharding)
    with monkeypatch.context() as change:
        change.setattr("detpipe.datasets.shards.write.write_all", lambda *_: {})
        with pytest.raises(KeyError):
            make_shards(a, tmp_path / "out", "train", sharding=sharding)
    left = tmp_path / "out.partial" / f"shard-000001.tar.partial-{os.getppid()}-0123abcd"
    left.touch()
    make_shards(a, tmp_path / "out", "train", sharding=sharding)
    assert content_of(tmp_path / "out") == content_of(tmp_path / "whole")


def test_only_a_shard_that_is_as_its_sidecar_says_counts_as_written(tmp_path):
    a, sharding = tiny_annotations(tmp_path / "data", 8), Sharding(images_per_shard=2)
    make_shards(a, tmp_path / "whole", "train", sharding=sharding)
    with pytest.MonkeyPatch.context() as change:
        change.setattr(write.index, "write_index", None)  # a run that ends before it has an index
        with pytest.raises(TypeError):
            make_shards(a, tmp_path / "out", "train", sharding=sharding)
    work = tmp_path / "out.partial"
    assert [*finished_shards(work, 4)] == [0, 1, 2, 3]
    (work / "shard-000000.tar").unlink()
    (work / "shard-000001.tar").write_bytes(b"x" + (work / "shard-000001.tar").read_bytes())
    (work / "shard-000002.json").write_text((work / "shard-000002.json").read_text()[:-1])
    assert [*finished_shards(work, 4)] == [3]
    times = {path.name: path.stat().st_mtime_ns for path in work.glob("*.tar")}
    assert make_shards(a, tmp_path / "out", "train", sharding=sharding).there == 1
    assert content_of(tmp_path / "out") == content_of(tmp_path / "whole")
    made = tmp_path / "out" / "shard-000003.tar"
    assert made.stat().st_mtime_ns == times[made.name]


def test_a_run_that_was_killed_before_the_rename_only_renames(tmp_path, monkeypatch):
    a = tiny_annotations(tmp_path / "data", 6)

    def killed(*_: Path) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as change:
        change.setattr(write, "_finish", killed)
        with pytest.raises(KeyboardInterrupt):
            make_shards(a, tmp_path / "out", "train", sharding=Sharding(images_per_shard=2))
    partial = content_of(tmp_path / "out.partial")
    monkeypatch.setattr("detpipe.datasets.shards.write.write_all", None)  # nothing is left to write
    made = make_shards(a, tmp_path / "out", "train", sharding=Sharding(images_per_shard=2))
    assert made.there == 3
    own = {PLAN, *(f"shard-{number:06d}.json" for number in range(3))}
    assert content_of(tmp_path / "out") == {name: data for name, data in partial.items() if name not in own}


@pytest.mark.parametrize("workers", [1, 2])
def test_rows_23_and_24_a_bad_image_stops_the_run_or_is_counted(tmp_path, workers, capsys):
    data_set = tiny_coco(tmp_path / "data", 40)
    table = data_set / "train"
    (table / "003.png").write_bytes((table / "003.png").read_bytes()[:-30])
    (table / "004.png").write_text("this is text")
    (table / "005.png").write_bytes(b"")
    arguments = [str(data_set), "-o", str(tmp_path / "out"), "--images-per-shard", "9", "--workers", str(workers)]
    with pytest.raises(DataError, match=r"00\d\.png: cannot be (decoded|read) as an image"):
        run_shards(arguments)
    assert not (tmp_path / "out" / "train").exists()
    with pytest.raises(DataError, match="other data or settings"):
        run_shards([*arguments, "--skip-bad"])
    arguments[2] = str(tmp_path / "skipping")
    assert run_shards([*arguments, "--skip-bad"]) == 0
    shown = capsys.readouterr().out
    assert "train: 40 images read = 37 written + 3 skipped; " in shown
    assert "  images skipped: unreadable: 3\n" in shown
    assert "  boxes skipped: image skipped: " in shown
    assert all(f"00{n}.png" in shown for n in (3, 4, 5))
    data = Shards(str(tmp_path / "skipping"), val="train")
    a = data.annotations("val")
    assert not {"003.png", "004.png", "005.png"} & set(a.file_names.tolist())
    assert a.counts["images read"] == a.counts["images used"] + a.counts["images skipped: unreadable"]
    assert a.counts["boxes read"] == a.counts["boxes used"] + a.counts["boxes skipped: image skipped"]
    assert sorted(t["image_id"] for _, ts in data.val_dataloader() for t in ts) == sorted(a.image_ids.tolist())
    assert run_shards([str(tmp_path / "skipping"), "--verify"]) == 0


def test_faults_of_annotations_are_counted_too(tmp_path, capsys):
    content = coco_content()
    content["annotations"][0]["bbox"] = [5, 5, 0, 0]
    content["images"][1]["width"] = 61
    write_coco(tmp_path / "data", content)
    from datasets.builders import picture

    picture(40, 60).save(tmp_path / "data" / "train" / "1.jpg")
    with pytest.raises(DataError, match="zero or negative size"):
        run_shards([str(tmp_path / "data"), "-o", str(tmp_path / "out")])
    assert run_shards([str(tmp_path / "data"), "-o", str(tmp_path / "out"), "--skip-bad"]) == 0
    shown = capsys.readouterr().out
    assert "train: 3 images read = 2 written + 1 skipped; 1 boxes" in shown
    assert "boxes skipped: zero or negative size: 1" in shown
    assert "images skipped: size differs from the annotation: 1" in shown
    content["images"][0]["file_name"] = "../0.jpg"
    write_coco(tmp_path / "data", content)
    with pytest.raises(DataError, match=r"file_name '\.\./0\.jpg' leads out of the image folder.*; correct the annot"):
        run_shards([str(tmp_path / "data"), "-o", str(tmp_path / "more"), "--skip-bad"])


def test_an_image_without_pixels_is_noticed_when_it_is_decoded(tmp_path):
    root = write_coco(tmp_path / "data")[1]
    content = (root / "1.jpg").read_bytes()
    (root / "1.jpg").write_bytes(content[:-60])
    assert run_shards([str(tmp_path / "data"), "-o", str(tmp_path / "unseen"), "--no-decode"]) == 0
    with pytest.raises(DataError, match=r"1\.jpg: cannot be decoded as an image"):
        run_shards([str(tmp_path / "data"), "-o", str(tmp_path / "seen")])


def test_an_image_that_changes_while_shards_are_made_is_refused(tmp_path, monkeypatch):
    a = tiny_annotations(tmp_path / "data", 3)
    size = os.path.getsize
    monkeypatch.setattr(os.path, "getsize", lambda path: size(path) + str(path).endswith("001.png"))
    with pytest.raises(DataError, match=r"001\.png: has \d+ bytes, but had \d+ when the shards were planned"):
        make_shards(a, tmp_path / "out", "train", sharding=Sharding(skip=True))


def test_nothing_left_is_an_error(tmp_path):
    a = tiny_annotations(tmp_path / "data", 2)
    for name in a.file_names.tolist():
        (a.root / name).write_bytes(b"x")
    with pytest.raises(DataError, match="no image of 2 is left: all were skipped"):
        make_shards(a, tmp_path / "out", "train", sharding=Sharding(skip=True))


def test_proposals_ride_along(tmp_path):
    for split in ("train", "val"):
        write_coco(tmp_path / "data", split=split)
    records = {str(i): ([[0, 0, i, 5]], [0.5]) for i in range(10, 13)}
    store = str(write_store(tmp_path / "boxes.safetensors", records, source="x").path)
    out = tmp_path / "out"
    arguments = [str(tmp_path / "data"), "-o", str(out)]
    for wrong in (store, f"test={store}"):
        with pytest.raises(UsageError, match="expected SPLIT=STORE once for a split; the splits are train, val"):
            run_shards([*arguments, "--proposals", wrong])
    assert run_shards([*arguments, "--proposals", f"train={store}"]) == 0
    data = Shards(str(out))
    assert data.dataset("train")[0, 1][1]["proposals"].tolist() == [[0, 0, 11, 5]]
    assert data.proposals("val") is None
    one = [str(tmp_path / "data"), "--split", "val", "-o", str(tmp_path / "one"), "--proposals", store]
    assert run_shards(one) == 0
    assert read_index(tmp_path / "one" / "val").source == {"source": "x", "settings": {}}


def test_splits_get_folders_of_their_own(tmp_path):
    write_voc(tmp_path / "kit" / "VOC2007", split="trainval")
    write_voc(tmp_path / "kit" / "VOC2012", split="trainval")
    assert run_shards([str(tmp_path / "kit"), "-o", str(tmp_path / "out"), "--split", "2007:trainval"]) == 0
    assert run_shards([str(tmp_path / "kit"), "-o", str(tmp_path / "out"), "--split", "2012:trainval"]) == 0
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"2007_trainval", "2012_trainval"}
    data = Shards(str(tmp_path / "out"), train="2007_trainval", val="2012_trainval")
    data.setup("fit")
    assert data.annotations("train").file_names[0] == "VOC2007/JPEGImages/a.jpg"


def test_verify_names_what_is_wrong(table, tmp_path, capsys):
    out = tmp_path / "out"
    assert run_shards([str(table), "-o", str(out), "--images-per-shard", "10"]) == 0
    for folder in (out, out / "train"):
        assert run_shards([str(folder), "--verify"]) == 0
        assert "train: 4 shards with 40 images are as they were written" in capsys.readouterr().out
    path = out / "train" / "shard-000001.tar"
    content = bytearray(path.read_bytes())
    content[2000] ^= 1
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"shard-000001\.tar: "):
        run_shards([str(out), "--verify"])
    with pytest.raises(UsageError, match="no shards here: expected a folder that 'detpipe data shards' wrote"):
        run_shards([str(table), "--verify"])


@pytest.mark.parametrize(
    ("text", "size"), [("256MB", 256_000_000), ("1.5GiB", 3 * 2**29), ("2k", 2000), ("512 kib", 2**19), ("77", 77)]
)
def test_sizes_are_read(text, size):
    assert read_bytes(text) == size


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["x"], "-o FOLDER is missing"),
        (["x", "-o", "y", "--shard-size", "many"], "--shard-size many: expected a size such as 256MB"),
        (["x", "-o", "y", "--shard-size", "0"], "--shard-size 0: expected"),
        (["x", "-o", "y", "--images-per-shard", "0"], "--images-per-shard must be 1 or more, got 0"),
        (["x", "-o", "y", "--workers", "0"], "--workers must be 1 or more, got 0"),
        (["x", "-o", "y", "--seed", "-1"], "--seed must be 0 or more, got -1"),
        (["/nowhere", "-o", "y"], "/nowhere does not exist"),
    ],
)
def test_mistakes_are_one_line(arguments, message):
    with pytest.raises(UsageError, match=message):
        run_shards(arguments)


def test_settings_out_of_range_are_refused():
    for wrong in ({"shard_bytes": 0}, {"images_per_shard": 0}, {"workers": 0}, {"seed": -1}):
        with pytest.raises(ValueError, match="must be at least"):
            Sharding(**wrong)


def test_what_is_said_and_left(tmp_path, capsys):
    write_coco(tmp_path / "data")
    assert run_shards([str(tmp_path / "data"), "-o", str(tmp_path / "out")]) == 0
    shown = capsys.readouterr()
    assert "train: 3 images read = 3 written + 0 skipped; 4 boxes; 1 shards" in shown.out
    assert "3/3" in shown.err  # the bar
    assert {path.name for path in (tmp_path / "out" / "train").iterdir()} == {INDEX, ARRAYS, "shard-000000.tar"}
    index = json.loads((tmp_path / "out" / "train" / INDEX).read_text())
    assert (index["format"], index["version"], index["class_names"]) == ("detpipe.shards", 1, ["cat", "dog", "owl"])
    assert os.listdir(tmp_path / "out") == ["train"]
    assert COCO(str(tmp_path / "data"), "train", "train").class_names == tuple(index["class_names"])

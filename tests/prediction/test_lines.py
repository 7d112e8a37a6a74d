from __future__ import annotations

import errno
import json
import resource
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from detpipe import cli
from detpipe.prediction.batches import WHOLE, Part, plan_batches
from detpipe.prediction.lines import LinesFile, Plan, join, part_name, read_lines
from detpipe.support.errors import DataError, UsageError

PLAN = Plan("a.ckpt", ("cat", "dog"), 6, {"score_threshold": 0.5, "list": "abc"})


def record(index: int, count: int = 1) -> dict[str, Any]:
    found = [{"label": "cat", "score": 0.5, "box": [0.0, 0.0, 1.0, 1.0]}] * count
    return {"index": index, "file": f"{index}.jpg", "width": 4, "height": 3, "detections": found}


def write(folder: Path, part: Part, rows: list[int], plan: Plan = PLAN, done: int | None = None) -> Path:
    path = folder / part_name("detections", part)
    with LinesFile(path, plan, part, rows, resume=False) as lines:
        for row in rows[:done]:
            lines.add(record(row) if row != 4 else {"index": 4, "file": "4.jpg", "reason": "no image"})
    return path


def parts(folder: Path) -> list[Path]:
    return [write(folder, Part(number, 3), rows) for number, rows in ((1, [0, 3]), (2, [1, 4]), (3, [2, 5]))]


def test_parts_are_joined_in_the_order_of_the_images(tmp_path):
    tally = join(parts(tmp_path), tmp_path / "all.json", limit=1)
    assert (tally.images, tally.found, tally.failed, tally.limited) == (5, 5, 1, 5)
    whole = json.loads((tmp_path / "all.json").read_text())
    assert [one["file"] for one in whole["images"]] == ["0.jpg", "1.jpg", "2.jpg", "3.jpg", "5.jpg"]
    assert whole["failed"] == [{"file": "4.jpg", "reason": "no image"}]
    assert (whole["checkpoint"], whole["class_names"]) == ("a.ckpt", ["cat", "dog"])
    one = write(tmp_path, WHOLE, [0, 1, 2, 3, 4, 5])
    join([one], tmp_path / "one.json")
    assert (tmp_path / "one.json").read_bytes() == (tmp_path / "all.json").read_bytes()


def test_there_may_be_more_parts_than_open_files(tmp_path):
    paths = [write(tmp_path, Part(number, 60), [number - 1]) for number in range(1, 61)]
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (len(list(Path("/dev/fd").iterdir())) + 30, hard))
        assert join(paths, tmp_path / "all.json").images == 59
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_nothing_at_all_is_joined_too(tmp_path):
    empty = Plan("a.ckpt", ("cat",), 0, {})
    join([write(tmp_path, WHOLE, [], empty)], tmp_path / "all.json")
    assert json.loads((tmp_path / "all.json").read_text())["images"] == []


def spoil_twice(folder: Path, paths: list[Path]) -> None:
    paths.append(folder / "again" / paths[0].name)
    paths[-1].parent.mkdir()
    paths[-1].write_bytes(paths[0].read_bytes())


def spoil_unfinished(folder: Path, paths: list[Path]) -> None:
    paths[2].write_bytes(b"".join(paths[2].read_bytes().splitlines(keepends=True)[:-1]))


def spoil_number(folder: Path, paths: list[Path]) -> None:
    paths[1] = write(folder, Part(2, 4), [1])


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda folder, paths: paths.pop(1), r"of 3 parts, 2 is missing in .*; predict them with --part NUMBER/3"),
        (spoil_twice, r"part 1 of 3 is there twice: .*part-1-of-3\.jsonl and .*again"),
        (spoil_unfinished, r"part-3-of-3\.jsonl has 1 of its 2 images; go on with .* and --resume"),
        (
            lambda folder, paths: write(folder, Part(3, 3), [2, 0]),
            r"image 0 is in .*part-1-of-3\.jsonl and in .*part-3-of-3\.jsonl",
        ),
        (
            lambda folder, paths: write(folder, Part(3, 3), [2, 5], replace(PLAN, settings={"list": "abc"})),
            r"part-3-of-3\.jsonl does not belong to .*part-1.*score_threshold",
        ),
        (
            lambda folder, paths: write(folder, Part(3, 3), [2, 5], replace(PLAN, images=7)),
            r"part-3-of-3\.jsonl does not belong to .*part-1.*the images are others",
        ),
        (spoil_number, r"part-2-of-4\.jsonl does not belong to .*: it is one of 4 parts, not of 3"),
        (lambda folder, paths: paths[1].write_text("[1, 2]\n"), r"part-2-of-3\.jsonl: is no file of predictions"),
    ],
    ids=["missing", "twice", "unfinished", "image", "settings", "images", "number", "foreign"],
)
def test_what_is_no_whole_is_refused_by_name(spoil, message, tmp_path, capsys):
    paths = parts(tmp_path)
    spoil(tmp_path, paths)
    with pytest.raises(DataError, match=message):
        join(paths, tmp_path / "all.json")
    assert not (tmp_path / "all.json").exists()
    assert cli.main(["merge", *map(str, paths)]) == 1


def test_merge_takes_folders(tmp_path, capsys):
    parts(tmp_path)
    assert cli.main(["merge", str(tmp_path)]) == 3  # an image could not be read
    out = tmp_path / "detections.json"
    assert capsys.readouterr().out == f"5 images, 5 detections, 1 unreadable; see {out}\n"
    assert cli.main(["merge", str(tmp_path / "nowhere")]) == 2
    (tmp_path / "empty").mkdir()
    assert cli.main(["merge", str(tmp_path / "empty")]) == 1
    assert "there are no parts to merge" in capsys.readouterr().err


def test_a_stopped_run_is_gone_on_with(tmp_path):
    whole = write(tmp_path / "whole", WHOLE, [0, 1, 2]).read_bytes()
    path = write(tmp_path, WHOLE, [0, 1, 2], done=2)
    cut = path.read_bytes()
    ends = [at + 1 for at, byte in enumerate(cut) if byte == ord("\n")]
    for end in range(0, len(cut) + 1, 7):  # a kill within any line, the first too
        path.write_bytes(cut[:end])
        with LinesFile(path, PLAN, WHOLE, [0, 1, 2], resume=True) as lines:
            assert lines.done == set(range(sum(end >= one for one in ends[1:])))
            for row in sorted({0, 1, 2} - lines.done):
                lines.add(record(row))
        assert path.read_bytes() == whole


def test_a_stopped_run_is_neither_lost_nor_mixed_with_another(tmp_path):
    path = write(tmp_path, WHOLE, [0, 1, 2], done=2)
    with pytest.raises(
        UsageError, match=r"detections\.jsonl has 2 of 3 images of a run that was stopped: add --resume"
    ):
        LinesFile(path, PLAN, WHOLE, [0, 1, 2], resume=False)
    other = replace(PLAN, settings={"score_threshold": 0.3, "list": "abc"})
    with pytest.raises(UsageError, match=r"for the same command, but score_threshold was 0\.5, is 0\.3; delete it"):
        LinesFile(path, other, WHOLE, [0, 1, 2], resume=True)
    with pytest.raises(UsageError, match=r"the images are others \(6 then, 3 now\)"):
        LinesFile(path, replace(PLAN, images=3), WHOLE, [0, 1, 2], resume=True)
    with LinesFile(path, PLAN, WHOLE, [0, 1, 2], resume=True) as lines:
        with pytest.raises(DataError, match="another process is writing it"):
            LinesFile(path, PLAN, WHOLE, [0, 1, 2], resume=True)
        lines.add(record(2))
    with LinesFile(path, other, WHOLE, [0], resume=False) as lines:  # what is complete is written anew
        assert not lines.done
    assert read_lines(path).plan == other
    path.write_text('{"index": 3}\n')
    with pytest.raises(DataError, match="is no file of predictions"):
        LinesFile(path, PLAN, WHOLE, [0], resume=True)
    assert path.read_text() == '{"index": 3}\n'


@pytest.mark.parametrize("line", ['{"index": 0', "[]", '{"index": "x"}', '{"file": "a"}'])
def test_a_damaged_line_is_named(line, tmp_path):
    path = write(tmp_path, WHOLE, [0, 1], done=1)
    sound = path.read_text()
    path.write_text(sound + line + "\n")
    with pytest.raises(DataError, match=r"detections\.jsonl: line 3 is damaged"):
        read_lines(path)
    path.write_text(sound + json.dumps(record(0)) + "\n")
    with pytest.raises(DataError, match="line 3 is image 0 once more"):
        read_lines(path)


def test_a_full_disk_leaves_whole_lines(tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    path = tmp_path / "detections.jsonl"
    try:
        with LinesFile(path, PLAN, WHOLE, list(range(6)), resume=False) as lines:
            lines.add(record(0))
            resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 50, hard))
            with pytest.raises(OSError, match="File too large") as caught:
                lines.add(record(1))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert (caught.value.errno, caught.value.filename) == (errno.EFBIG, str(path))
    said = cli.one_line(caught.value)
    assert str(path) in said
    assert "MiB are free there; files that were complete before are intact" in said
    with LinesFile(path, PLAN, WHOLE, list(range(6)), resume=True) as lines:
        assert lines.done == {0}


def test_batches_hold_images_of_one_size_and_are_bounded():
    assert plan_batches([], 4) == []
    assert plan_batches([(2, 3)] * 5 + [(3, 2), None], 3) == [[0, 1, 2], [3, 4], [5], [6]]
    large = (4096, 4096)  # four of them are 2^26 pixels
    assert plan_batches([large] * 6, 8) == [[0, 1, 2, 3], [4, 5]]
    assert plan_batches([(100_000, 100_000)] * 2, 8) == [[0], [1]]
    batches = plan_batches([(1, k % 3 + 1) for k in range(50)], 4)
    shares = [Part(number, 3).take(batches) for number in (1, 2, 3)]
    assert sorted(row for share in shares for batch in share for row in batch) == list(range(50))

"""Each row of the fault matrix in each layout: what a check reports, what training refuses, what skipping counts."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from detpipe.datasets.checking import check_data
from detpipe.datasets.formats.recognize import open_split
from detpipe.support.errors import DataError

from .fault_cases import ALL, CASES, Case, sound

IN_PIXELS = {
    "images: unreadable",
    "images: size differs from the annotation",
}  # what only decoding finds in some layouts


def split_of(layout: str) -> str | None:
    return None if layout == "csv" else "train"


@pytest.mark.parametrize("layout", ALL.split())
def test_what_is_sound_has_nothing_to_report(layout: str, tmp_path: Path) -> None:
    root = tmp_path / "set"
    sound(layout, root)
    report = check_data({"train": open_split(str(root), split_of(layout))})
    assert report.grouped(True) == report.grouped(False) == {}
    assert report.counts["train"]["images used"] == 3


@pytest.fixture(scope="session")
def sound_sets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sound data set of each layout, to be copied."""
    folder = tmp_path_factory.mktemp("sound")
    for layout in ALL.split():
        sound(layout, folder / layout)
    return folder


@pytest.mark.parametrize("case", CASES, ids=str)
def test_check_reports(case: Case, sound_sets: Path, tmp_path: Path) -> None:
    """The fault is found, by its kind and with its place, and nothing else is; then training refuses, or skips and counts it."""
    root = shutil.copytree(sound_sets / case.layout, tmp_path / "set")
    case.spoil(root)
    training_refuses_or_skips_and_counts(case, root)
    try:
        opened = open_split(str(root), split_of(case.layout))
    except DataError as error:  # the file that names the splits
        report = {"data set: cannot be read": [str(error)]}
    else:
        report = check_data({"train": opened}).grouped(case.serious)
    if not case.kind:
        assert report == {}
        return
    assert case.kind in report
    assert any(all(part in message for part in case.says) for message in report[case.kind]), report
    assert all("\n" not in message for message in report[case.kind] if case.kind != "data set: cannot be read")
    also = ["boxes: zero or negative size"] if case.row == 18 else []
    assert all(kind in (case.kind, *also) or kind in case.follows for kind in report)


def read_all(root: Path, case: Case) -> None:
    """What training reads: the annotations, and, if these are fine, the images."""
    dataset = open_split(str(root), split_of(case.layout)).dataset("train")
    assert case.kind in IN_PIXELS  # else it is found before the start
    for index in range(len(dataset)):
        dataset[0, index]


def training_refuses_or_skips_and_counts(case: Case, root: Path) -> None:
    if case.skip == "accepted":
        for on_bad in ("error", "skip"):
            a = open_split(str(root), split_of(case.layout), on_bad=on_bad).annotations("train")
            assert len(a) == 3
            assert not any("skipped" in key for key in a.counts)
            assert a.counts["boxes clipped"] == (case.row == 14)
        return
    with pytest.raises(DataError) as caught:
        read_all(root, case)
    if case.skip == "refused":
        with pytest.raises(DataError) as skipping:
            open_split(str(root), split_of(case.layout), on_bad="skip").annotations("train")
        caught = skipping
    assert all(part in str(caught.value) for part in case.says)
    if case.skip == "refused":
        return
    a = open_split(str(root), split_of(case.layout), on_bad="skip").annotations("train")
    what = "boxes" if case.kind.startswith("boxes") else "images"
    assert a.counts[f"{what} skipped: {case.skip}"] == 1
    assert a.counts["boxes used"] == len(a.boxes) > 0
    for part in ("boxes", "images"):
        skipped = sum(n for key, n in a.counts.items() if key.startswith(f"{part} skipped"))
        assert a.counts[f"{part} read"] == a.counts[f"{part} used"] + skipped


def test_the_page_has_every_row_and_names_tests_that_exist() -> None:
    tests = Path(__file__).resolve().parents[1]
    page = (tests.parent / "docs" / "data_faults.md").read_text()
    rows = {int(number): text for number, text in re.findall(r"^\| (\d+) \|(.*)$", page, re.MULTILINE)}
    assert set(rows) == {*range(1, 36), 39, 47, 48}
    for number in {case.row for case in CASES}:
        assert f"`row_{number:02}`" in rows[number], number
    existing = set(re.findall(r"def (test_\w+)", "".join(path.read_text() for path in tests.rglob("test_*.py"))))
    files = {path.name for path in tests.rglob("test_*.py")}
    for name in re.findall(r"\b(test_\w+(?:\.py)?)", page):
        assert name in existing | files or (name.endswith("_") and any(test.startswith(name) for test in existing)), (
            name
        )

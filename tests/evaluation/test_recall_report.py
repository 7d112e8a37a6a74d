"""The table and the picture of proposal recall."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from detpipe.evaluation.proposal_recall import ProposalRecall, class_table, evaluate_recall, recall_table
from detpipe.pictures.recall_plot import plot_recall
from evaluation.test_proposal_recall import annotations_of

SIZES_AND_OVERLAPS = ["ARs", "ARm", "ARl", "ABO", "MABO"]


def report(max_boxes: tuple[int, ...] = (1, 100, 2000), found: bool = True) -> ProposalRecall:
    """Objects of two of three classes, small and large; the second box covers four fifths of the small one."""
    objects = [[0, 0, 20, 20], [100, 100, 300, 300]]
    annotations = annotations_of([{"boxes": objects, "labels": [1, 2]}], classes=3)
    boxes = np.array([[350, 350, 360, 360], [0, 0, 16, 20]][: 1 + found], np.float32)
    return evaluate_recall(annotations, {1: boxes}, max_boxes)


def test_a_line_for_each_source():
    lines = recall_table({"dense": report(), "none": report(found=False)}).splitlines()
    header, dense, none = (line.split() for line in lines)
    assert header == ["source", "boxes", "R50@100", "R50@2000", "AR@100", "AR@2000", *SIZES_AND_OVERLAPS]
    assert dense == ["dense", "2", ".500", ".500", ".350", ".350", ".700", "-", ".000", ".400", ".400"]
    assert none == ["none", "1", ".000", ".000", ".000", ".000", ".000", "-", ".000", ".000", ".000"]
    assert len({len(line) for line in lines}) == 1  # the last column ends where its head ends


def test_few_boxes_are_shown_where_no_number_is_large():
    assert "R50@3 " in recall_table({"dense": report((1, 3))})


def test_markdown():
    header, rule, row = recall_table({"dense": report()}, markdown=True).splitlines()
    assert header.startswith("| source | boxes | R50@100 |")
    assert rule.split("|")[1:3] == [" --- ", " ---: "]
    assert row.startswith("| dense | 2 | .500 |")
    assert header.count("|") == rule.count("|") == row.count("|")


def test_least_found_class_first_and_classes_without_objects_left_out():
    rows = [line.split() for line in class_table(report()).splitlines()]
    assert rows == [
        ["class", "R50", "AR", "ABO"],
        ["b", ".000", ".000", ".000"],
        ["a", "1.000", ".700", ".800"],
    ]
    assert class_table(report(), most=1).splitlines()[1:] == ["b      .000  .000  .000", "... and 1 classes more"]


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(path.read_bytes())).convert("RGB"))


def count_near(picture: np.ndarray, color: str) -> int:
    """How many pixels have about this color, ``#rrggbb``."""
    wanted = np.array([int(color[at : at + 2], 16) for at in (1, 3, 5)])
    return int((np.abs(picture.astype(int) - wanted).max(axis=2) < 12).sum())


def test_each_source_is_drawn_in_its_color(tmp_path):
    blue, red, green = "#2f6fde", "#e4572e", "#2ca25f"
    plot_recall({"one": report(), "two": report(found=False)}, tmp_path / "two.png", title="data val")
    plot_recall({"one": report()}, tmp_path / "one.png")
    two, one = pixels(tmp_path / "two.png"), pixels(tmp_path / "one.png")
    assert [count_near(two, color) > 200 for color in (blue, red, green)] == [True, True, False]
    assert [count_near(one, color) > 200 for color in (blue, red, green)] == [True, False, False]
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["one.png", "two.png"]


def test_nothing_to_find_is_drawn_without_a_line(tmp_path):
    nothing = evaluate_recall(annotations_of([{"boxes": []}]), {1: np.zeros((0, 4), np.float32)})
    plot_recall({"none": nothing}, tmp_path / "none.png")
    assert (pixels(tmp_path / "none.png") < 128).any()
    assert "nan" not in recall_table({"none": nothing})


def test_matplotlib_is_asked_for_in_one_line(tmp_path, monkeypatch):
    import sys

    from detpipe.support.errors import UsageError

    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(UsageError, match=r"matplotlib, which draws curves, is not installed: pip install"):
        plot_recall({"one": report()}, tmp_path / "one.png")
    assert not list(tmp_path.iterdir())

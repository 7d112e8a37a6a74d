from __future__ import annotations

import pytest

from detpipe.evaluation import read_voc_detections
from detpipe.support.errors import DataError

from .builders import truth

TRUTH = truth([], [7, 9], ["person", "traffic_light", "light"])  # files 7.jpg and 9.jpg


def test_lines_become_continuous_boxes(tmp_path):
    (tmp_path / "comp3_det_test_traffic_light.txt").write_text("9 0.25 1 1 10 20\n\n7 1e-3 5.5 6 7 8\n")
    (tmp_path / "comp3_det_test_person.txt").write_text("")
    (tmp_path / "light.txt").write_text("7 0.5 2 3 4 5\n")
    detections = read_voc_detections(tmp_path, TRUTH)
    assert detections.image_ids.tolist() == [9, 7, 7]
    assert detections.labels.tolist() == [2, 2, 3]
    assert detections.scores.tolist() == [0.25, 0.001, 0.5]
    assert detections.boxes.tolist() == [[0, 0, 10, 20], [4.5, 5, 7, 8], [1, 2, 4, 5]]
    zero_based = read_voc_detections([tmp_path / "light.txt"], TRUTH, one_based=False)
    assert zero_based.boxes.tolist() == [[2, 3, 4, 5]]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("8 0.5 1 1 2 2", "the image '8' is not an image"),
        ("7 0.5 1 1 2", "expected a name, score"),
        ("7 nan 1 1 2 2", "expected a name, score"),
        ("7 0.5 1 1 2 two", "expected a name, score"),
    ],
)
def test_a_bad_line_is_named(tmp_path, line, message):
    (tmp_path / "person.txt").write_text(f"7 0.5 1 1 2 2\n{line}\n")
    with pytest.raises(DataError, match=rf"person\.txt: line 2: .*{message}"):
        read_voc_detections(tmp_path, TRUTH)


def test_files_that_fit_no_class_or_the_same_are_refused(tmp_path):
    with pytest.raises(DataError, match=r"expected a folder with a file CLASS\.txt"):
        read_voc_detections(tmp_path / "nowhere", TRUTH)
    (tmp_path / "person.txt").write_text("")
    (tmp_path / "comp3_det_test_person.txt").write_text("")
    with pytest.raises(DataError, match="holds the same class"):
        read_voc_detections(tmp_path, TRUTH)
    (tmp_path / "aardvark.txt").write_text("")
    with pytest.raises(DataError, match=r"aardvark\.txt: the name ends in no class"):
        read_voc_detections(tmp_path, TRUTH)
    with pytest.raises(DataError, match=r"light\.txt: cannot be read as text"):
        read_voc_detections([tmp_path / "light.txt"], TRUTH)

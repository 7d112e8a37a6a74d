from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from detpipe.datasets import YOLO, Augment, Combine, CopyPaste, load_yolo
from detpipe.datasets.formats.recognize import recognize
from detpipe.datasets.formats.yolo_images import label_path
from detpipe.datasets.formats.yolo_yaml import read_yolo_yaml
from detpipe.support.errors import DataError

from ..builders import picture, write_yolo

GOOD = "0 0.5 0.5 0.5 0.25"


def test_boxes_labels_and_sizes_come_through(tmp_path: Path) -> None:
    a = load_yolo(write_yolo(tmp_path), "train")
    assert a.class_names == ("cat", "dog")
    assert a.category_ids == (0, 1)
    assert a.file_names.tolist() == ["images/train/a.jpg", "images/train/b.jpg", "images/train/c.jpg"]
    assert a.image_ids.tolist() == [1, 2, 3]
    assert a.sizes.tolist() == [[40, 60]] * 3
    assert a.offsets.tolist() == [0, 1, 3, 3]
    assert a.boxes.tolist() == [[15, 15, 45, 25], [0, 0, 30, 40], [0, 0, 60, 40]]
    assert a.labels.tolist() == [1, 2, 1]
    assert a.area.tolist() == [300, 1200, 2400]
    assert a.counts == {"images read": 3, "images used": 3, "boxes read": 3, "boxes used": 3, "boxes clipped": 0}


def test_polygons_become_their_boxes(tmp_path: Path) -> None:
    text = "1 0.25 0.5 0.5 0.125 0.75 1\n0 0.1 0.1 0.1 0.2 0.3 0.2 0.3 0.1\n"
    a = load_yolo(write_yolo(tmp_path, {"a": text, "b": ""}), "train")
    np.testing.assert_allclose(a.boxes, [[15, 5, 45, 40], [6, 4, 18, 8]])
    assert a.counts["boxes from polygons"] == 2
    assert a.segmentations is None
    data = YOLO(str(tmp_path), val="train", augment=Augment(combine=Combine(CopyPaste())))
    masks = data.dataset("train", augmented=True).masks(0)
    assert masks.any((1, 2)).all()


@pytest.mark.parametrize("text", [None, "", "\n \n"])
def test_row_17_an_empty_or_missing_label_file_is_an_image_without_objects(tmp_path: Path, text: str | None) -> None:
    a = load_yolo(write_yolo(tmp_path, {"a": GOOD, "b": text}), "train")
    assert a.offsets.tolist() == [0, 1, 1]


def test_no_label_file_at_all_is_a_wrong_path_and_not_a_set_without_objects(tmp_path: Path) -> None:
    write_yolo(tmp_path, {"a": None, "b": None})
    with pytest.raises(
        DataError, match=r"data\.yaml: none of the 2 images of train has a label file; .*labels/train/a\.txt"
    ):
        load_yolo(tmp_path, "train", "skip")


def test_no_image_of_a_list_is_an_export_without_images(tmp_path: Path) -> None:
    root = write_yolo(tmp_path, {"a": GOOD}, train="train.txt")
    (root / "train.txt").write_text("data/images/train/b.jpg\n")
    with pytest.raises(
        DataError, match=r"none of the 1 images of train is there; looked for .*b\.jpg and the like; export"
    ):
        load_yolo(root, "train", "skip")


def test_row_14_boxes_partly_outside_are_clipped_and_counted(tmp_path: Path) -> None:
    a = load_yolo(write_yolo(tmp_path, {"a": "0 0 .5 .5 .5\n0 0.833334 .5 .333333 1\n"}), "train")
    assert a.boxes[0].tolist() == [0, 10, 15, 30]
    assert a.boxes[1, 2] == 60
    assert a.counts["boxes clipped"] == 1  # what six digits cannot hold is rounding


def test_lists_of_images(tmp_path: Path) -> None:
    write_yolo(tmp_path)
    (tmp_path / "few.txt").write_text("./images/train/c.jpg\n\nimages/train/a.jpg\n")
    a = load_yolo(write_yolo(tmp_path, few=["few.txt"]), "few")
    assert a.file_names.tolist() == ["images/train/c.jpg", "images/train/a.jpg"]
    (tmp_path / "few.txt").write_text("images/train/a.jpg\nimages/train/../train/a.jpg\nimages/train/gone.jpg\n")
    with pytest.raises(DataError) as caught:
        load_yolo(tmp_path, "few")
    assert r"few.txt: line 2: 'images/train/../train/a.jpg' is listed twice" in str(caught.value)
    assert "gone.jpg: no such image file" in str(caught.value)
    counts = load_yolo(tmp_path, "few", "skip").counts
    assert (counts["images read"], counts["images used"]) == (3, 1)
    assert counts["images skipped: listed twice"] == counts["images skipped: file missing"] == 1


def test_folders_are_searched_to_their_end_and_links_in_circles_are_not_followed(tmp_path: Path) -> None:
    write_yolo(tmp_path)
    for folder in ("images", "labels"):
        (tmp_path / folder / "train" / "deep").mkdir()
    picture(40, 60).save(tmp_path / "images" / "train" / "deep" / "d.PNG")
    (tmp_path / "labels" / "train" / "deep" / "d.txt").write_text(GOOD)
    (tmp_path / "labels" / "train" / "classes.txt").write_text("cat\ndog\n")
    (tmp_path / "images" / "train" / "deep" / "round").symlink_to(tmp_path / "images")
    (tmp_path / "images" / "train" / ".hidden.jpg").write_text("")
    a = load_yolo(tmp_path, "train")
    assert a.file_names.tolist()[-1] == "images/train/deep/d.PNG"
    assert len(a) == 4


def test_label_paths() -> None:
    assert label_path(Path("images/images/a.jpg")) == Path("images/labels/a.txt")
    assert label_path(Path("train/images/x/a.b.png")) == Path("train/labels/x/a.b.txt")
    assert label_path(Path("pictures/images.jpg")) == Path("pictures/images.txt")


def test_labels_beside_images_and_images_beside_the_root(tmp_path: Path) -> None:
    for name, folder in (("flat", "pictures"), ("beside", "../elsewhere")):
        root = tmp_path / name
        (root / folder).mkdir(parents=True)
        picture(40, 60).save(root / folder / "a.jpg")
        (root / folder / "a.txt").write_text(GOOD)
        (root / folder / "notes.txt").write_text("not labels")
        (root / "data.yaml").write_text(f"train: {folder}\nnames: [cat]\n")
        a = load_yolo(root, "train")
        assert (a.root / str(a.file_names[0])).samefile(root / folder / "a.jpg")
        assert a.boxes.tolist() == [[15, 15, 45, 25]]


def test_roboflow_writes_paths_as_if_the_file_were_a_folder_deeper(tmp_path: Path) -> None:
    write_yolo(tmp_path, train="../images/train")
    assert len(load_yolo(tmp_path, "train")) == 3


def test_path_is_relative_to_the_file(tmp_path: Path) -> None:
    write_yolo(tmp_path / "set")
    (tmp_path / "my.yaml").write_text("path: set\ntrain: [images/train]\nnames: {0: cat, 1: 2}\nnc: 2\n")
    a = load_yolo(tmp_path / "my.yaml", ["train"])
    assert a.class_names == ("cat", "2")
    assert a.root == tmp_path / "set"


YAML_FAULTS = {
    "gap": ("names: {0: cat, 2: dog}\n", r"the keys of names must be 0 to 1 in order, got \[0, 2\]"),
    "repeated": ("names: [cat, cat]\n", "names must be distinct"),
    "nested": ("names: [cat, [dog]]\n", "names must be distinct and of text"),
    "nc": ("names: [cat]\nnc: 2\n", "nc is 2, but names has 1 classes"),
    "ids": ("names: [cat]\ncategory_ids: [1, 2]\n", "category_ids must be 1 whole numbers"),
    "path": ("names: [cat]\npath: nowhere\n", "path is 'nowhere', but .* is no folder"),
    "number": ("names: [cat]\ntrain: 7\n", "train must name a folder"),
    "missing": ("names: [cat]\ntrain: gone\n", "train is 'gone', but .*gone does not exist"),
    "an image": ("names: [cat]\ntrain: images/train/a.jpg\n", "is neither a folder nor a .txt list"),
    "another": ("names: [cat]\nvalid: images/train\n", r"has no split 'train'; there are valid"),
    "misspelt": ("names: [cat]\ntrian: images/train\n", "did you mean 'trian'"),
    "empty": ("names: [cat]\ntrain: labels\n", r"the split train has no images \(\.jpg"),
    "row 45, tag": ("names: !!python/object/apply:os.system [ls]\n", r"line 1: tags are not allowed"),
    "damaged": ("names: [cat\n", "not valid YAML"),
    "a list": ("- cat\n", "expected keys such as path"),
}


@pytest.mark.parametrize("fault", YAML_FAULTS)
def test_faults_of_data_yaml_name_the_key(tmp_path: Path, fault: str) -> None:
    text, message = YAML_FAULTS[fault]
    write_yolo(tmp_path)
    (tmp_path / "data.yaml").write_text(text)
    with pytest.raises(DataError, match=rf"data\.yaml[:,] .*{message}|data\.yaml[:,] {message}"):
        load_yolo(tmp_path, "train")


def test_a_missing_data_yaml_is_explained(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"data\.yaml: no such file; YOLO layout has"):
        read_yolo_yaml(tmp_path)


def test_the_data_set_reads_its_splits(tmp_path: Path) -> None:
    write_yolo(tmp_path)
    write_yolo(tmp_path, {"v": GOOD}, "val")
    data = YOLO(str(tmp_path), val=["val", "train"])
    data.setup("fit")
    assert len(data.annotations("val")) == 4
    assert data.image_key(data.annotations("train"), 0) == "images/train/a.jpg"
    image, target = data.dataset("train")[0, 1]
    assert image.shape == (3, 40, 60)
    assert target["boxes"].tolist() == [[0, 0, 30, 40], [0, 0, 60, 40]]
    with pytest.raises(DataError, match="no test split: set the argument test"):
        data.annotations("test")


BOX = "0 0.8 0.8 0.1 0.1"
POSES: list[tuple[list[int], str, str]] = [  # kpt_shape, what is behind the box, what is wrong with it
    ([4, 2], "0.77 0.77 0.83 0.77 0.83 0.83 0.77 0.83", ""),
    ([3, 2], "0.1 0.1 0.9 0.9 0 0", ""),  # as many numbers as a polygon of five points
    ([1, 3], "0.1 0.1 2", ""),
    ([2, 3], "0.1 0.1 2 0 0 0", ""),
    (
        [2, 3],
        "0.1 0.1 2 0 0",
        "has 10 values: expected class, x, y, width, height and 2 points of 3 numbers, 11 in all",
    ),
    ([4, 2], "", "has 5 values"),
    ([1, 2], "0.1 0.1 2", "has 8 values"),
    ([1, 2], "0.1 nan", "y of point 1 must be a finite number, got 'nan'"),
    ([1, 3], "0.1 0.1 yes", "visibility of point 1 must be a finite number, got 'yes'"),
    ([2, 2], "0.1 0.1 0.2 7", "y of point 2 is 7: expected 0 to 1"),
]


@pytest.mark.parametrize(("shape", "points", "wrong"), POSES, ids=str)
def test_keypoints_stand_behind_the_box(tmp_path: Path, shape: list[int], points: str, wrong: str) -> None:
    write_yolo(tmp_path, {"a": f"{BOX} {points}\n"}, kpt_shape=shape)
    if wrong:
        with pytest.raises(DataError, match=re.escape(f"labels/train/a.txt: line 1: {wrong}")):
            load_yolo(tmp_path, "train")
        return
    a = load_yolo(tmp_path, "train")
    np.testing.assert_allclose(a.boxes, [[45, 30, 51, 34]])
    assert "boxes from polygons" not in a.counts


@pytest.mark.parametrize("shape", [4, [4], [0, 2], [4, 5], "4, 2", [4.0, 2]], ids=str)
def test_a_shape_of_keypoints_that_cannot_be(tmp_path: Path, shape: Any) -> None:
    write_yolo(tmp_path, kpt_shape=shape)
    with pytest.raises(
        DataError, match=r"data\.yaml: kpt_shape must be the number of points and 2 or 3 numbers a point"
    ):
        load_yolo(tmp_path, "train")


def test_names_of_classes_are_wanted_where_nothing_says_them(tmp_path: Path) -> None:
    write_yolo(tmp_path)
    (tmp_path / "data.yaml").unlink()
    with pytest.raises(
        DataError, match=r"labels in labels/train of .* write .*classes\.txt with a name a line"
    ) as caught:
        recognize(str(tmp_path))
    assert "\n" not in str(caught.value)
    (tmp_path / "classes.txt").write_text("cat\ndog\n\n")
    assert recognize(str(tmp_path)).splits == ("train",)
    (tmp_path / "obj.names").write_text("dog\ncat\n")
    with pytest.raises(DataError, match=r"classes\.txt, obj\.names may each describe the data set: name the one"):
        load_yolo(tmp_path, "train")
    assert load_yolo(tmp_path / "obj.names", "train").class_names == ("dog", "cat")


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"obj.data": "names = obj.names\n"}, r"obj\.data: names is 'obj\.names', but there is no such list"),
        ({"obj.data": "classes = 3\nnames = obj.names\n", "obj.names": "cat\n"}, r"classes is '3', but .*obj\.names has 1"),
        ({"obj.data": "names = n\ntrain = data/gone.txt\n", "n": "cat\ndog\n"}, r"train is 'data/gone\.txt', .* does not exist"),
        ({"a.yaml": "names: [cat]\n", "b.yaml": "names: [dog]\n"}, r"a\.yaml, b\.yaml may each describe"),
        ({"notes.json": '{"categories": [{"id": 0}]}'}, r"notes\.json: categories must list the classes"),
        ({"classes.txt": "cat\ncat\n"}, r"classes\.txt: names must be distinct"),
        ({"d.yml": "names: {0: cat, '0': dog}\n"}, r"d\.yml, line 1: key '0' is given twice"),
        ({"d.yml": "names: {a: cat}\n"}, r"d\.yml: the keys of names must be 0 to 0 in order"),
    ],
)  # fmt: skip
def test_faults_of_what_describes_a_folder(tmp_path: Path, files: dict[str, str], message: str) -> None:
    write_yolo(tmp_path)
    (tmp_path / "data.yaml").unlink()
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(DataError, match=message):
        load_yolo(tmp_path, "train")

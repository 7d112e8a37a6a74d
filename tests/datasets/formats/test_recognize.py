import re
from pathlib import Path

import numpy as np
import pytest

from detpipe.datasets import VOC, YOLO, CSVBoxes
from detpipe.datasets.formats.class_list import ClassList, write_class_list
from detpipe.datasets.formats.folders import find_split
from detpipe.datasets.formats.recognize import layout_of, open_split, recognize
from detpipe.support.errors import DetpipeError, UsageError

from ..builders import HEADER, picture, voc_object, write_coco, write_csv, write_voc, write_yolo


def keys(data):
    annotations = data.annotations("val")
    return [data.image_key(annotations, row) for row in range(len(annotations))]


def one_line(caught):
    return "\n" not in str(caught.value)


def test_a_voc_folder(tmp_path):
    write_voc(tmp_path, split="train")
    write_voc(tmp_path, {"c": [voc_object("owl")]}, split="val")
    for split, names in (("train", ["a", "b"]), ("val", ["c"])):
        data = open_split(str(tmp_path), split)
        assert isinstance(data, VOC)
        assert keys(data) == names
        annotations = data.annotations("val")
        assert [(annotations.root / str(name)).is_file() for name in annotations.file_names] == [True] * len(names)
    assert open_split(str(tmp_path), "val").annotations("val").class_names == ("owl",)  # those that occur, not VOC's
    assert np.array_equal(data.annotations("train").boxes, data.annotations("val").boxes)


def test_a_voc_folder_with_years(tmp_path):
    write_voc(tmp_path / "VOC2007", split="trainval")
    write_voc(tmp_path / "VOC2012", {"c": [voc_object()]}, split="trainval")
    assert len(keys(open_split(str(tmp_path), "2007:trainval"))) == 2
    assert len(keys(open_split(str(tmp_path), "2012:trainval"))) == 1
    with pytest.raises(UsageError, match=r"name one with --split; there are 2007:trainval, 2012:trainval$"):
        open_split(str(tmp_path), None)


def test_an_annotation_file(tmp_path, monkeypatch):
    path, folder = write_coco(tmp_path, split="anything")
    data = open_split(str(path), None, str(folder))
    assert keys(data) == ["10", "11", "12"]
    annotations = data.annotations("val")
    assert (annotations.root / str(annotations.file_names[0])).is_file()
    monkeypatch.chdir(tmp_path)
    data = open_split("annotations/instances_anything.json", "not used", "anything")  # relative to where one is
    assert keys(data) == ["10", "11", "12"]
    assert data.annotations("val").root.is_absolute()


def test_an_annotation_file_needs_its_images(tmp_path):
    path, _ = write_coco(tmp_path)
    with pytest.raises(
        UsageError, match=rf"^{re.escape(str(path))} is an annotation file: say with --images where"
    ) as caught:
        open_split(str(path), None)
    assert one_line(caught)


@pytest.mark.parametrize("name", ["missing", "missing.json"])
def test_what_does_not_exist(tmp_path, name):
    with pytest.raises(UsageError, match=rf"--data .*{name} does not exist; expected a folder in VOC layout") as caught:
        open_split(str(tmp_path / name), "val", str(tmp_path))
    assert one_line(caught)


def test_what_has_no_layout(tmp_path):
    picture(20, 30).save(tmp_path / "a.jpg")
    (tmp_path / "notes.txt").write_text("no data")
    for path in (tmp_path, tmp_path / "notes.txt", tmp_path / "a.jpg"):
        with pytest.raises(
            UsageError, match=r"has no known layout; expected .*annotations/instances_SPLIT\.json"
        ) as caught:
            open_split(str(path), "val")
        assert one_line(caught)
        assert layout_of(path) is None


def test_splits_that_are_there_are_named_where_none_is_given(tmp_path):
    voc, coco = tmp_path / "voc", tmp_path / "coco"
    write_voc(voc, split="train")
    for name in ("val", "cat_train", "dog_val"):  # the lists of one class are none
        (voc / "ImageSets" / "Main" / f"{name}.txt").write_text("a\n")
    with pytest.raises(UsageError, match=r"voc has several splits: name one with --split; there are train, val$"):
        open_split(str(voc), None)
    write_coco(coco, split="val2017")
    with pytest.raises(UsageError, match=r"coco has several splits: name one with --split; there are val2017$"):
        open_split(str(coco), None)
    for number in range(9):
        (coco / "annotations" / f"instances_part{number}.json").write_text("{}")
    with pytest.raises(
        UsageError, match=r"there are val2017, part0, part1, part2, part3, part4, part5, part6, \.\.\.$"
    ):
        open_split(str(coco), None)


def test_a_yolo_folder_or_file(tmp_path):
    write_yolo(tmp_path)
    write_yolo(tmp_path, {"v": "0 .5 .5 .5 .5"}, "val")
    for data in (tmp_path, tmp_path / "data.yaml"):
        assert recognize(str(data)).splits == ("train", "val")
        opened = open_split(str(data), "val")
        assert isinstance(opened, YOLO)
        assert keys(opened) == ["images/val/v.jpg"]
    with pytest.raises(UsageError, match=r"has several splits: name one with --split; there are train, val$"):
        open_split(str(tmp_path), None)
    (tmp_path / "data.yaml").write_text("names: [cat, dog]\n")  # the folders then say what the splits are
    assert recognize(str(tmp_path)).splits == ("train", "val")


def test_a_table(tmp_path, monkeypatch):
    path = write_csv(tmp_path)
    for data in (tmp_path, path):
        assert recognize(str(data)).splits == ()
        opened = open_split(str(data), None)
        assert isinstance(opened, CSVBoxes)
        assert keys(opened) == ["a.jpg", "b.jpg"]
    write_csv(tmp_path, ["a.jpg,1,2,3,4,dog,one", "b.jpg,1,2,3,4,cat,two"], f"{HEADER},split")
    assert recognize(str(tmp_path)).splits == ("one", "two")
    assert keys(open_split(str(path), "two")) == ["b.jpg"]
    assert open_split(str(path), "two").class_names == ("cat", "dog")
    with pytest.raises(UsageError, match=r"name one with --split; there are one, two$"):
        open_split(str(path), None)
    (tmp_path / "tables").mkdir()
    path.rename(tmp_path / "tables" / "boxes.csv")
    monkeypatch.chdir(tmp_path / "tables")
    assert keys(open_split("boxes.csv", "one", "..")) == ["a.jpg"]


def test_classes_of_voc_are_numbered_for_all_splits_together(tmp_path):
    write_voc(tmp_path, {"a": [voc_object("dog")]}, "train")
    write_voc(tmp_path, {"b": [voc_object("cat")]}, "val")
    assert open_split(str(tmp_path), "train").class_names == ("dog",)
    assert open_split(str(tmp_path), "train", together=("train", "val")).class_names == ("cat", "dog")
    write_voc(tmp_path, {"c": []}, "test")  # does not say which classes there are
    empty = open_split(str(tmp_path), "test")
    assert (empty.class_names, len(empty.annotations("val"))) == (("cat", "dog"), 1)


def test_voc_counts_from_what_it_says_of_itself_or_what_is_asked_for(tmp_path):
    write_voc(tmp_path, {"a": [voc_object(box=(1, 1, 20, 10))]})
    assert open_split(str(tmp_path), "train").annotations("val").boxes.tolist() == [[0, 0, 20, 10]]
    zero = open_split(str(tmp_path), "train", one_based=False)
    assert zero.annotations("val").boxes.tolist() == [[1, 1, 20, 10]]
    write_class_list(tmp_path, ClassList(("owl", "cat"), (9, 4), one_based=False))
    data = open_split(str(tmp_path), "train")
    assert data.annotations("val").boxes.tolist() == [[1, 1, 20, 10]]
    assert (data.class_names, data.category_ids) == (("owl", "cat"), (9, 4))


def test_every_layout_has_its_sign(tmp_path):
    write_voc(tmp_path / "voc")
    write_coco(tmp_path / "coco")
    write_yolo(tmp_path / "yolo")
    write_csv(tmp_path / "csv")
    write_voc(tmp_path / "years" / "VOC2007")
    (tmp_path / "keypoints" / "annotations").mkdir(parents=True)
    (tmp_path / "keypoints" / "annotations" / "person_val.json").write_text("{}")
    folders = ("voc", "coco", "yolo", "csv", "years", "keypoints")
    assert [layout_of(tmp_path / name) for name in folders] == ["voc", "coco", "yolo", "csv", "voc", None]
    assert layout_of(tmp_path / "voc" / "Annotations") is None
    assert layout_of(tmp_path / "csv" / "a.jpg") is None


def test_two_layouts_in_one_folder(tmp_path: Path) -> None:
    write_voc(tmp_path, split="train")
    write_coco(tmp_path, split="train")
    found = recognize(str(tmp_path))  # of the same splits: one is read, and that is said
    assert (found.layout, found.splits) == ("coco", ("train",))
    assert "; not as VOC: XML in Annotations of the images in JPEGImages, lists in ImageSets/Main" in found.says
    assert recognize(str(tmp_path), layout="voc").says.startswith("read as VOC")
    write_voc(tmp_path, split="val")
    with pytest.raises(
        UsageError, match=r"two layouts with different splits: COCO: .*\(train\), and VOC: .*--layout voc"
    ) as caught:
        recognize(str(tmp_path))
    assert one_line(caught)
    with pytest.raises(UsageError, match="has no known layout in YOLO layout; expected"):
        recognize(str(tmp_path), layout="yolo")


def test_images_without_annotations_are_said_to_be_so(tmp_path: Path) -> None:
    picture(20, 30).save(tmp_path / "a.jpg")
    (tmp_path / "a.txt").write_text("a picture of a cat")  # no label
    with pytest.raises(UsageError, match="holds images without any annotation, and has no known layout; expected"):
        recognize(str(tmp_path))


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        (
            "train/my.jsonl",
            "{}",
            r"holds train/my\.jsonl, which detpipe does not read \(let the tool export COCO",
        ),
        ("a.json", '{"shapes": []}', r"holds a\.json, which detpipe does not read"),
        ("train.csv", "image_id,bbox\na,[1 2 3 4]\n", r"train\.csv: line 1: the header lacks a column x1, y1, label"),
        ("train.csv", "a.jpg,1,2,3,4\n", r"train\.csv: line 1: the header lacks .* must name the columns"),
        ("cars.csv", "image,xmin,ymin,xmax,ymax\n", r"cars\.csv: line 1: the header lacks a column label"),
        (
            "notes.json",
            '{"categories": []}',
            "holds no images \\(let the tool export them with the annotations\\), and has no",
        ),
        ("prices.csv", "name,price\n", r"holds prices\.csv, which"),
    ],
)
def test_files_that_are_not_read_are_named(tmp_path: Path, file: str, content: str, message: str) -> None:
    if file != "notes.json":
        picture(20, 30).save(tmp_path / "a.jpg")
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).write_text(content)
    with pytest.raises(DetpipeError, match=message) as caught:
        recognize(str(tmp_path))
    assert one_line(caught)


@pytest.mark.parametrize(
    ("wanted", "known", "found"),
    [
        ("val", ["train", "valid"], "valid"),
        ("validation", ["val", "train"], "val"),
        ("valid", ["Validation"], "Validation"),
        ("val", ["valid", "validation"], None),
        ("val", ["val", "valid"], "val"),
        ("train", ["Training", "test"], "Training"),
        ("all", ["default"], "default"),
        ("all", ["train", "val"], None),
        ("train", ["train2017"], None),
    ],
)
def test_usual_names_of_a_split_are_understood(wanted: str, known: list[str], found: str | None) -> None:
    assert find_split(wanted, known) == found

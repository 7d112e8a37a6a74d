from __future__ import annotations

from pathlib import Path

import pytest

from detpipe.datasets import CSVBoxes, CSVFormat, load_csv
from detpipe.datasets.formats.class_list import ClassList, read_class_list, write_class_list
from detpipe.support.errors import DataError

from ..builders import HEADER, picture, write_csv

GOOD = "a.jpg,1,2,11,22,dog"


def test_boxes_labels_and_sizes_come_through(tmp_path: Path) -> None:
    a = load_csv(write_csv(tmp_path))
    assert a.class_names == ("cat", "dog")
    assert a.category_ids == (1, 2)
    assert a.file_names.tolist() == ["a.jpg", "b.jpg"]
    assert a.image_ids.tolist() == [1, 2]
    assert a.sizes.tolist() == [[40, 60]] * 2
    assert a.offsets.tolist() == [0, 2, 2]
    assert a.boxes.tolist() == [[1, 2, 11, 22], [30.5, 10.25, 38.5, 19.25]]
    assert a.labels.tolist() == [2, 1]
    assert a.area.tolist() == [200, 72]
    assert a.counts == {"images read": 2, "images used": 2, "boxes read": 2, "boxes used": 2, "boxes clipped": 0}


@pytest.mark.parametrize(
    ("header", "row"),
    [
        ("path,xmin,ymin,xmax,ymax,class", "a.jpg,1,2,11,22,dog"),
        ("filename,width,height,class,xmin,ymin,xmax,ymax", "a.jpg,60,40,dog,1,2,11,22"),
        ("Image,X,Y,W,H,Class Name", "a.jpg,1,2,10,20,dog"),
        ("image-path,x1,y1,width,height,category", "./a.jpg,1,2,10,20,dog"),
        ("file;xmin;ymin;xmax;ymax;label;score", "a.jpg;1;2;11;22;dog;.9"),
        ("file_name\tx1\ty1\tx2\ty2\tlabel", "a.jpg\t1\t2\t11\t22\tdog"),
        ('"file_name", x1,y1,x2,y2,"label"', '"a.jpg", 1 ,2,11,22," dog "'),
    ],
)
def test_columns_are_found_by_their_names(tmp_path: Path, header: str, row: str) -> None:
    a = load_csv(write_csv(tmp_path, [row], header))
    assert a.boxes.tolist() == [[1, 2, 11, 22]]
    assert a.class_names == ("dog",)
    assert a.file_names.tolist() == ["a.jpg"]


def test_flags_areas_and_ids(tmp_path: Path) -> None:
    rows = [f"{GOOD},1,true,7.5,30", "a.jpg,2,2,9,9,dog,,,,30", "b.jpg,2,2,9,9,dog,0,False,,1"]
    a = load_csv(write_csv(tmp_path, rows, f"{HEADER},difficult,iscrowd,area,image_id"))
    assert a.difficult.tolist() == [True, False, False]
    assert a.iscrowd.tolist() == [True, False, False]
    assert a.area.tolist() == [7.5, 49, 49]
    assert a.image_ids.tolist() == [30, 1]


def test_open_images(tmp_path: Path) -> None:
    (tmp_path / "class-descriptions-boxable.csv").write_text('/m/0bt9lr,Dog\n/m/0k5j,"Door, closed"\n')
    rows = ["a,/m/0bt9lr,0,0.5,0.25,0.75,1", "a,/m/0k5j,0,1,0,1,0", "b,/m/none,0,1,0,1,-1"]
    a = load_csv(write_csv(tmp_path, rows, "ImageID,LabelName,XMin,XMax,YMin,YMax,IsGroupOf"))
    assert a.class_names == ("/m/none", "Dog", "Door, closed")
    assert a.boxes.tolist() == [[0, 10, 30, 30], [0, 0, 60, 40], [0, 0, 60, 40]]
    assert a.iscrowd.tolist() == [True, False, False]


HEADER_FAULTS = {
    "no header": (
        "a.jpg,1,2,3,dog",
        r"line 1: the header lacks a column file_name, x1, y1, label, x2 \(or w\), y2 \(or h\)",
    ),
    "half a box": ("file_name,x1,y1,x2,label", "the header lacks a column y2"),
    "twice": (f"{HEADER},label", "the columns 'label' and 'label' mean the same"),
}


@pytest.mark.parametrize("fault", HEADER_FAULTS)
def test_faults_of_the_header_name_the_column(tmp_path: Path, fault: str) -> None:
    header, message = HEADER_FAULTS[fault]
    with pytest.raises(DataError, match=rf"annotations\.csv: .*{message}"):
        load_csv(write_csv(tmp_path, [GOOD], header))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (HEADER.encode() + b"\n\xff", r"byte 28 is not UTF-8"),
        (b"", "the header lacks"),
        (f"{HEADER}\n".encode(), "no row names a class"),
        (f"{HEADER}\na.jpg,,,,,\n".encode(), "no row names a class"),
        (f"{HEADER}\na.jpg,1\n".encode(), r"no row names a class.* \(line 2 has 2 values, but the header 6 columns\)"),
    ],
)
def test_damaged_tables(tmp_path: Path, content: bytes, message: str) -> None:
    path = write_csv(tmp_path)
    path.write_bytes(content)
    with pytest.raises(DataError, match=rf"annotations\.csv: .*{message}"):
        load_csv(path)


def test_spaces_may_stand_before_quotes(tmp_path: Path) -> None:
    path = write_csv(tmp_path, ['a.jpg, 1, 2, 3, 4, "cat, big"'])
    assert load_csv(path).class_names == ("cat, big",)


def test_line_numbers_count_breaks_in_quotes(tmp_path: Path) -> None:
    path = write_csv(tmp_path, [f'{GOOD},"two\nlines"', "a.jpg,x,2,3,4,dog,"], f"{HEADER},note")
    with pytest.raises(DataError, match=r"line 4: column 'x1'"):
        load_csv(path)


def test_splits_in_a_column(tmp_path: Path) -> None:
    path = write_csv(tmp_path, [f"{GOOD},train", "b.jpg,1,2,3,4,cat,val"], f"{HEADER},split")
    data = CSVBoxes(str(tmp_path))
    data.setup("fit")
    assert data.class_names == ("cat", "dog")  # of the whole table
    assert data.annotations("val").file_names.tolist() == ["b.jpg"]
    assert data.image_key(data.annotations("val"), 0) == "b.jpg"
    with pytest.raises(DataError, match="no row of the split 'vla'; there are train, val; did you mean 'val'"):
        CSVBoxes(str(tmp_path), val="vla").annotations("val")
    with pytest.raises(DataError, match="no test split"):
        data.annotations("test")
    with pytest.raises(DataError, match="nowhere: no such folder; the argument root"):
        CSVBoxes(str(tmp_path / "nowhere")).annotations("train")
    path.write_text(f"{HEADER},split\n{GOOD},train\nb.jpg,1,2,3,4,cat,\n")
    collected = data.faults("collect")
    CSVBoxes(str(tmp_path)).annotations("train", collected)
    [fault] = collected.found
    assert (fault.serious, fault.message) == (False, f"{path}: line 3: column 'split' is empty")
    path.write_text(f"{HEADER},split\n{GOOD},train\n{GOOD},val\n")
    with pytest.raises(DataError, match=r"line 2: 'a\.jpg' is in the split 'train', but other rows put it into 'val'"):
        load_csv([(path, "train")], on_bad="skip")


def test_splits_in_tables_of_their_own(tmp_path: Path) -> None:
    write_csv(tmp_path, [GOOD], name="train.csv")
    write_csv(tmp_path, ["b.jpg,1,2,3,4,dog"], name="val.csv")
    data = CSVBoxes(str(tmp_path), train="train.csv", val=["val.csv", "train.csv"])
    assert data.annotations("val").file_names.tolist() == ["b.jpg", "a.jpg"]
    with pytest.raises(DataError, match=r"train\.csv: has no column 'split', but the split 'train' is wanted"):
        CSVBoxes(str(tmp_path), format=CSVFormat(file="train.csv")).annotations("train")


def test_images_in_another_folder(tmp_path: Path) -> None:
    write_csv(tmp_path, [GOOD])
    (tmp_path / "pictures").mkdir()
    (tmp_path / "a.jpg").rename(tmp_path / "pictures" / "a.jpg")
    picture(40, 60).save(tmp_path / "pictures" / "b.jpg")
    data = CSVBoxes(str(tmp_path), train="annotations.csv", format=CSVFormat(images="pictures"))
    assert data.annotations("train").root == tmp_path / "pictures"
    with pytest.raises(DataError, match="nowhere: no such image folder"):
        load_csv(tmp_path / "annotations.csv", tmp_path / "nowhere")


def test_class_names_that_are_given(tmp_path: Path) -> None:
    path = write_csv(tmp_path)
    assert load_csv(path, class_names=["dog", "cat", "owl"]).labels.tolist() == [1, 2]
    with pytest.raises(
        DataError, match=r"line 3: column 'label' is 'cat', which is not among class_names \(dog, cats\); did"
    ):
        load_csv(path, class_names=["dog", "cats"])
    with pytest.raises(DataError, match="class_names must be distinct"):
        load_csv(path, class_names=["dog", "dog"])


def test_class_list_beside_the_table(tmp_path: Path) -> None:
    path = write_csv(tmp_path)
    write_class_list(tmp_path, ClassList(("owl", "dog", "cat"), (90, 7, 1)))
    a = load_csv(path)
    assert (a.class_names, a.category_ids, a.labels.tolist()) == (("owl", "dog", "cat"), (90, 7, 1), [2, 3])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"category_ids": [1]}', "missing required field `class_names`"),
        ('{"class_names": [], "category_ids": []}', "class_names must be distinct names, at least one"),
        ('{"class_names": ["a", "a"], "category_ids": [1, 2]}', "class_names must be distinct"),
        ('{"class_names": ["a"], "category_ids": [1, 2]}', "category_ids must be 1 distinct numbers"),
        ('{"class_names": ["a"], "category_ids": ["x"]}', r"Expected `int`, got `str` - at `\$\.category_ids\[0\]`"),
        (
            '{"class_names": ["a"], "category_ids": [1], "one_based": 1}',
            r"Expected `bool`, got `int` - at `\$\.one_based`",
        ),
    ],
)
def test_faults_of_the_class_list(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "detpipe.json").write_text(text)
    with pytest.raises(DataError, match=rf"detpipe\.json: .*{message}"):
        read_class_list(tmp_path)

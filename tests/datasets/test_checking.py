from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from detpipe.datasets.checking import Report, check_data
from detpipe.datasets.faults import Faults
from detpipe.datasets.formats.recognize import open_split
from detpipe.datasets.image_files import PLAIN_FILES, content_keys
from detpipe.support.errors import DataError

from .builders import coco_content, picture, voc_object, write_coco, write_voc, write_yolo
from .fault_cases import BOMB


def check(folder: Path, *splits: str, decode: bool = False, images: Path | None = None) -> Report:
    where = None if images is None else str(images)
    names = splits or ("train",)
    return check_data({name: open_split(str(folder), name, where, together=names) for name in names}, decode)


def messages(report: Report, serious: bool = True) -> str:
    return "\n".join(message for group in report.grouped(serious).values() for message in group)


def test_a_sound_set_has_nothing_to_say(tmp_path: Path) -> None:
    report = check(write_voc(tmp_path), decode=True)
    assert report.as_json() == {
        "splits": {"train": {"images read": 2, "images used": 2, "boxes read": 3, "boxes used": 3, "boxes clipped": 0}},
        "errors": {},
        "warnings": {},
    }


def test_the_policies_still_raise() -> None:
    with pytest.raises(ValueError, match="on_bad must be 'error' or 'skip', got 'ignore'"):
        Faults("ignore")  # type: ignore[arg-type]
    for on_bad in ("error", "skip"):
        faults = Faults(on_bad)
        faults.source = "x"
        faults.fatal("reason", "message")
        faults.remark("kind", "not looked at")
        with pytest.raises(DataError, match=r"^x: message; correct the annotations$"):
            faults.check()


def test_collecting_writes_down_every_message_and_raises_nothing() -> None:
    faults = Faults("collect", decode=False)
    for number in range(30):
        faults.box("size", f"box {number}", alike="same")
    faults.image("missing", "image")
    faults.fatal("twice", "id")
    faults.remark("boxes: clipped", "a little")
    faults.check()
    assert (faults.collects, faults.decodes) == (True, False)
    assert len(faults.found) == 33
    assert faults.found[29].message == "box 29"
    assert [fault.kind for fault in faults.found[29:]] == [
        "boxes: size", "images: missing", "data set: twice", "boxes: clipped",
    ]  # fmt: skip
    assert [fault.serious for fault in faults.found[29:]] == [True, True, True, False]


def test_every_fault_of_coco_at_once(tmp_path: Path) -> None:
    """What stops reading elsewhere does not hide the rest here."""
    content = coco_content()
    content["images"] += [
        dict(content["images"][0], file_name="1.jpg"),
        {"id": 1, "file_name": "../x.jpg", "height": 9, "width": 9},
    ]
    content["images"].append({"id": 2, "file_name": "gone.jpg", "height": 9, "width": 9})
    content["annotations"] += [
        {"id": 200, "image_id": 10, "category_id": 999, "bbox": [1, 1, 3, 3]},
        {"id": 201, "image_id": 10, "category_id": 1, "bbox": [1, 1, 0, 3]},
        {"id": 202, "image_id": 2, "category_id": 1, "bbox": [1, 1, 3, 3]},
        {"id": 203, "image_id": 11, "category_id": 1, "bbox": [50, 1, 30, 3]},
    ]
    content["categories"].append({"id": 7, "name": "fox"})
    path, folder = write_coco(tmp_path)
    path.write_text(json.dumps(content))
    shutil.copy(folder / "2.jpg", folder / "1.jpg")
    report = check(tmp_path, decode=True)
    assert {kind: len(group) for kind, group in report.grouped(True).items()} == {
        "boxes: bad category_id": 1,
        "boxes: zero or negative size": 1,
        "data set: duplicate category": 1,
        "data set: duplicate image id": 1,
        "data set: leads out of the folder": 1,
        "images: file missing": 1,
        "images: size differs from the annotation": 1,  # 1.jpg, which two records name
    }
    assert report.counts["train"]["boxes skipped: image skipped"] >= 1
    warnings = report.grouped(False)
    assert (
        "annotation id 203 (image 1.jpg): bbox [50.0, 1.0, 30.0, 3.0] sticks out of 60 x 40"
        in warnings["boxes: clipped"][0]
    )


def test_row_21_an_xml_bomb_does_not_hide_the_rest(tmp_path: Path) -> None:
    write_voc(tmp_path, {"a": [voc_object()], "b": [voc_object(box=(5, 5, 5, 9))], "c": [voc_object()]})
    (tmp_path / "Annotations" / "a.xml").write_text(BOMB)
    report = check(tmp_path)
    assert list(report.grouped(True)) == ["boxes: zero or negative size", "data set: XML entity"]


def test_row_1_what_cannot_be_read_at_all_is_one_fault_of_its_split(tmp_path: Path) -> None:
    write_coco(tmp_path, split="train")
    path, _ = write_coco(tmp_path, split="val")
    path.write_text(path.read_text()[:100])
    report = check(tmp_path, "train", "val")
    assert list(report.counts) == ["train"]
    assert list(report.grouped(True)) == ["data set: cannot be read"]
    assert "instances_val.json: line 1 column" in messages(report)


def test_row_12_class_lists_that_differ(tmp_path: Path) -> None:
    write_coco(tmp_path, split="train")
    content = coco_content()
    content["categories"][1] = {"id": 91, "name": "fox"}
    content["annotations"][2]["category_id"] = 7
    content["categories"][0]["id"] = 7
    write_coco(tmp_path, content, "val")
    (tmp_path / "val" / "0.jpg").unlink()
    picture(40, 60, 9).save(tmp_path / "val" / "0.jpg")
    errors = check(tmp_path, "train", "val").grouped(True)
    assert errors["data set: class lists differ"] == [
        "train and val: only in train: 'owl' (id 90); only in val: 'fox' (id 91)"
    ]
    assert "val: 1 classes: 'fox'" not in messages(check(tmp_path, "train", "val"), False)  # said above already


def test_pictures_that_splits_share_are_found_by_their_content(tmp_path: Path) -> None:
    write_yolo(tmp_path, {"a": "0 .5 .5 .5 .5", "b": "1 .5 .5 .5 .5"}, "train")
    write_yolo(tmp_path, {"c": "0 .5 .5 .5 .5", "d": "1 .5 .5 .4 .4"}, "val")
    images = tmp_path / "images"
    shutil.copy(images / "train" / "b.jpg", images / "val" / "c.jpg")
    picture(40, 60, 7).save(images / "val" / "d.jpg")
    report = check(tmp_path, "train", "val")
    [message] = report.grouped(False)["images: the same in several splits"]
    assert message.startswith("train and val: ")
    assert "train/b.jpg and" in message
    assert "val/c.jpg are the same picture" in message
    shutil.copy(images / "train" / "a.jpg", images / "train" / "b.jpg")
    shutil.copy(images / "train" / "a.jpg", images / "val" / "c.jpg")
    groups = check(tmp_path, "train", "val").grouped(False)
    assert [len(groups[kind]) for kind in ("images: repeated in a split", "images: the same in several splits")] == [
        1,
        1,
    ]
    assert report.total(True) == 0


def test_lists_that_share_images(tmp_path: Path) -> None:
    write_voc(tmp_path, {"a": [voc_object()], "b": [voc_object()]}, "trainval")
    (tmp_path / "ImageSets" / "Main" / "train.txt").write_text("a\n")
    groups = check(tmp_path, "train", "trainval").grouped(False)
    assert groups["splits: one holds the other"] == ["train and trainval: all 1 images of train are in trainval too"]
    write_voc(tmp_path, {"b": [voc_object()], "c": [voc_object()]}, "val")
    (tmp_path / "ImageSets" / "Main" / "train.txt").write_text("a\nb\n")
    groups = check(tmp_path, "train", "val").grouped(False)
    assert groups["images: the same in several splits"][0].startswith("train and val: 1 images are in both, such as")


def test_boxes_that_are_there_twice(tmp_path: Path) -> None:
    write_voc(tmp_path, {"a": [voc_object(), voc_object(), voc_object("dog")]})
    assert check(tmp_path).grouped(False)["boxes: repeated"] == [
        "train: JPEGImages/a.jpg: box [0.0, 0.0, 20.0, 10.0] of class 'cat' is there 2 times"
    ]


def test_equal_files(tmp_path: Path) -> None:
    long = b"x" * 2**16
    contents = (b"1", b"22", b"1", b"2", b"22", b"", long, long + b"a", long + b"b", long + b"ab", long + b"a")
    paths = [tmp_path / str(number) for number in range(len(contents))]
    for path, content in zip(paths, contents, strict=True):
        path.write_bytes(content)
    keys = content_keys(paths, PLAIN_FILES)
    assert [keys.index(key) for key in keys] == [contents.index(content) for content in contents]
    with pytest.raises(DataError, match=r"gone: cannot be read \(No such file"):
        content_keys([tmp_path / "gone"], PLAIN_FILES)
    lost: list[Path] = []
    assert len(set(content_keys([tmp_path / "gone", *paths], PLAIN_FILES, lambda path, _: lost.append(path)))) == 9
    assert lost == [tmp_path / "gone"]

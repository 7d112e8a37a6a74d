"""COCO's format in the folders, and with the habits, of labeling tools and hubs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from detpipe.datasets import COCO, load_coco
from detpipe.datasets.formats.coco import COCOFiles, find_splits
from detpipe.support.errors import DataError
from detpipe.types import Annotations

from ..builders import coco_content, picture, write_coco
from ..layout_cases import CLASSES, LAYOUTS, coco, text
from ..layout_cases import picture as picture_of


def hub(root: Path) -> None:
    next(case for case in LAYOUTS if case.name == "hub").write(root)


def test_what_is_not_in_coco_layout_has_no_splits(tmp_path: Path) -> None:
    assert find_splits(tmp_path / "nowhere") == {}
    picture_of(tmp_path / "images" / "a.jpg", "a")
    (tmp_path / "broken.json").write_text('{"settings": [')
    (tmp_path / "names.json").write_text('{"categories": [{"id": 0, "name": "ball"}]}')
    (tmp_path / "results.json").write_text('[{"image_id": 1}]')
    assert find_splits(tmp_path) == {}
    for k in range(51):  # one an image, whatever they are
        text(tmp_path / "images" / f"{k}.json", coco(["a"]))
    assert find_splits(tmp_path) == {}


def test_a_split_whose_file_is_cut_off_is_not_passed_over(tmp_path: Path) -> None:
    hub(tmp_path)
    text(tmp_path / "valid" / "_annotations.coco.json", coco(["c"])[:-40])
    with pytest.raises(DataError, match=r"valid/_annotations\.coco\.json: line 1 column .* damaged or cut off"):
        find_splits(tmp_path)


@pytest.mark.parametrize("file", ["annotations/instances_{}.json", "{}.json", "{}/coco.json"])
def test_images_of_another_split_that_are_called_alike_are_not_taken(tmp_path: Path, file: str) -> None:
    picture_of(tmp_path / "train" / "images" / "a.jpg", "a")
    for split in ("train", "val"):
        text(tmp_path / file.format(split), coco(["a"]))
    assert len(COCO(str(tmp_path), train="train").annotations("train")) == 1
    with pytest.raises(DataError, match=r"no such image folder|a\.jpg' is missing"):
        COCO(str(tmp_path), train="val").annotations("train")


def test_splits_of_one_name_are_told_apart(tmp_path: Path) -> None:
    for part in ("one", "two"):
        picture_of(tmp_path / part / "train" / "a.jpg", "a")
        text(tmp_path / part / "train" / "_annotations.coco.json", coco(["a"]))
    assert find_splits(tmp_path) == {
        "train": COCOFiles("one/train/_annotations.coco.json", "one/train"),
        "two/train/_annotations.coco": COCOFiles("two/train/_annotations.coco.json", "two/train"),
    }


def test_val_and_valid_are_one_split(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    hub(tmp_path)
    assert len(COCO(str(tmp_path), train="train", val="val").annotations("val")) == 1
    assert caplog.messages == [f"{tmp_path}: there is no split 'val'; its split 'valid' is read"]
    (tmp_path / "valid").rename(tmp_path / "val")
    assert len(COCO(str(tmp_path), train="train", val="valid").annotations("val")) == 1
    with pytest.raises(DataError, match=r"wanted for train='tarin'; splits found in .*: test, train, val; name one"):
        COCO(str(tmp_path), train="tarin").annotations("train")


def test_the_root_category_of_a_hub_is_counted(tmp_path: Path) -> None:
    hub(tmp_path)
    data = COCO(str(tmp_path), train="train", val="valid")
    assert (data.class_names, data.category_ids) == (CLASSES, (1, 2))
    assert "classes skipped: the supercategory of all others, without boxes: 1" in data.describe("train")


def spoiled(root: Path, change: Callable[[dict[str, Any]], Any]) -> Annotations:
    path, folder = write_coco(root)
    changed = coco_content()
    change(changed)
    path.write_text(json.dumps(changed))
    return load_coco(path, folder)


SAME: dict[str, Callable[[dict[str, Any]], Any]] = {  # what reads like the file without it
    "sizes as floats": lambda c: [image.update(width=float(image["width"])) for image in c["images"]],
    "no sizes": lambda c: [image.pop(side) for image in c["images"] for side in ("width", "height")],
    "empty sizes": lambda c: [image.update(width=None, height=None) for image in c["images"]],
    "flags as floats": lambda c: [box.update(iscrowd=0.0) for box in c["annotations"]],
    "ids of boxes as text": lambda c: [box.update(id=f"box {box['id']}") for box in c["annotations"]],
    "a folder before the name": lambda c: c["images"][1].update(file_name="train/1.jpg"),
    "backslashes": lambda c: c["images"][1].update(file_name=".\\data\\1.jpg"),
}


@pytest.mark.parametrize("habit", SAME)
def test_what_makes_sense_is_read(habit: str, tmp_path: Path) -> None:
    expected, found = load_coco(*write_coco(tmp_path / "plain")), spoiled(tmp_path, SAME[habit])
    assert found.file_names.tolist() == expected.file_names.tolist()
    assert found.sizes.tolist() == expected.sizes.tolist()
    for name in ("image_ids", "offsets", "boxes", "labels", "iscrowd", "area"):
        assert getattr(found, name).tolist() == getattr(expected, name).tolist()


def test_backslashes_name_folders_that_are_there(tmp_path: Path) -> None:
    path, folder = write_coco(tmp_path)
    (folder / "sub").mkdir()
    (folder / "1.jpg").rename(folder / "sub" / "1.jpg")
    path.write_text(path.read_text().replace("1.jpg", "sub\\\\1.jpg"))
    assert load_coco(path, folder).file_names.tolist() == ["0.jpg", "sub/1.jpg", "2.jpg"]


def test_an_image_is_not_taken_for_two(tmp_path: Path) -> None:
    def change(c: dict[str, Any]) -> None:
        c["images"][0]["file_name"], c["images"][1]["file_name"] = "left/2.jpg", "right/2.jpg"

    with pytest.raises(DataError, match=r"2 faults:\n.*'left/2\.jpg' is missing.*\n.*'right/2\.jpg' is missing"):
        spoiled(tmp_path, change)


def test_sizes_are_those_of_the_upright_picture(tmp_path: Path) -> None:
    path, folder = write_coco(tmp_path)
    turned = picture(40, 60)
    exif = turned.getexif()
    exif[0x0112] = 6
    turned.save(folder / "2.jpg", exif=exif)
    content = json.loads(path.read_text())
    del content["images"][2]["height"], content["images"][2]["width"]
    path.write_text(json.dumps(content))
    assert load_coco(path, folder).sizes[2].tolist() == [60, 40]
    (folder / "2.jpg").write_text("no image")
    with pytest.raises(DataError, match=r"2\.jpg: .*set on_bad to 'skip'"):
        load_coco(path, folder)
    assert load_coco(path, folder, "skip").counts["images skipped: unreadable"] == 1


def test_annotations_of_text_ids_are_named_by_them(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"annotation id box 3 \(image 1\.jpg\): bbox \[5\.0, .* zero or negative size"):
        spoiled(tmp_path, lambda c: c["annotations"][1].update(id="box 3", bbox=[5, 5, 0, 9]))

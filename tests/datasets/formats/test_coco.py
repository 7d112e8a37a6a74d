import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from detpipe.datasets import COCO, COCOFiles, load_coco
from detpipe.support.errors import DataError

from ..builders import coco_content, write_coco

Content = dict[str, Any]


def edit(part: str, row: int, **changes: Any) -> Callable[[Content], None]:
    return lambda content: content[part][row].update(changes)


def drop(part: str, row: int, field: str) -> Callable[[Content], None]:
    return lambda content: content[part][row].pop(field)


def copy(part: str, row: int, **changes: Any) -> Callable[[Content], None]:
    return lambda content: content[part].append({**content[part][row], **changes})


def spoiled(root: Path, *spoils: Callable[[Content], Any]) -> tuple[Path, Path]:
    write_coco(root)
    content = coco_content()
    for spoil in spoils:
        spoil(content)
    path = root / "annotations" / "instances_train.json"
    path.write_text(json.dumps(content))
    return path, root / "train"


def test_boxes_labels_and_ids_come_through(tmp_path: Path) -> None:
    a = load_coco(*write_coco(tmp_path))
    assert a.class_names == ("cat", "dog", "owl")  # in the order of the category ids
    assert a.category_ids == (1, 7, 90)
    assert a.image_ids.tolist() == [10, 11, 12]  # the last has no boxes and stays in
    assert a.file_names.tolist() == ["0.jpg", "1.jpg", "2.jpg"]
    assert a.sizes.tolist() == [[40, 60], [40, 60], [30, 50]]
    assert a.offsets.tolist() == [0, 2, 4, 4]
    assert a.boxes.tolist() == [[1, 2, 11, 22], [30.5, 10.25, 38.5, 19.25], [5, 5, 25, 15], [0, 0, 60, 40]]
    assert a.labels.tolist() == [2, 3, 1, 1]
    assert a.area.tolist() == [50, 52, 51, 53]
    assert a.counts == {"images read": 3, "images used": 3, "boxes read": 4, "boxes used": 4, "boxes clipped": 0}


FILE_FAULTS = {
    "row 2, images": (lambda c: c.pop("images"), ["top-level key 'images' is missing"]),
    "row 2, annotations": (lambda c: c.pop("annotations"), ["top-level key 'annotations' is missing"]),
    "row 2, categories": (lambda c: c.pop("categories"), ["top-level key 'categories' is missing"]),
    "row 2, not a list": (lambda c: c.update(images={}), ["images must be a list", "{}"]),
    "row 2, not objects": (lambda c: c["annotations"].append(5), ["annotations[4] must be an object", "5"]),
    "row 6": (copy("images", 1, file_name="2.jpg"), ["image id 11 is there twice", "'1.jpg'", "'2.jpg'"]),
    "row 9, id twice": (copy("categories", 0, name="x"), ["category id 7", "there twice"]),
    "row 9, name twice": (copy("categories", 0, id=8), ["category id 8", "'dog'", "there twice"]),
    "row 9, no name": (drop("categories", 0, "name"), ["category id 7", "name must be text"]),
    "row 9, id of another kind": (
        edit("categories", 0, id=7.5),
        ["categories[0]", "id must be a whole number or text", "7.5"],
    ),
    "row 9, none": (lambda c: c["categories"].clear(), ["categories is empty"]),
    "row 29, absolute": (edit("images", 0, file_name="/etc/passwd"), ["image id 10", "'/etc/passwd'", "leads out"]),
    "row 29, parent": (edit("images", 0, file_name="../../x.jpg"), ["image id 10", "'../../x.jpg'", "leads out"]),
    "row 29, backslash": (edit("images", 0, file_name="a\\..\\..\\x"), ["image id 10", "leads out"]),
    "row 29, drive": (edit("images", 0, file_name="C:\\x.jpg"), ["image id 10", "leads out"]),
    "row 18": (lambda c: (c["images"].clear(), c["annotations"].clear()), ["no images left of 0 read"]),
}


@pytest.mark.parametrize("on_bad", ["error", "skip"])
@pytest.mark.parametrize("fault", FILE_FAULTS)
def test_faults_of_the_file_are_errors_under_both_policies(tmp_path: Path, fault: str, on_bad: Any) -> None:
    change, fragments = FILE_FAULTS[fault]
    path, folder = spoiled(tmp_path, change)
    with pytest.raises(DataError) as caught:
        load_coco(path, folder, on_bad)
    for fragment in ["instances_train.json", *fragments]:
        assert fragment in str(caught.value)


def spoil(**changes: Any) -> Callable[[Content], None]:
    return edit("annotations", 1, **changes)


def lose(field: str) -> Callable[[Content], None]:
    return drop("annotations", 1, field)


BOX_FAULTS = {
    "row 3, bbox": (lose("bbox"), "bad bbox", ["id 101", "field bbox is missing"]),
    "row 3, image_id": (lose("image_id"), "bad image_id", ["id 101", "image_id is missing"]),
    "row 3, category_id": (lose("category_id"), "bad category_id", ["id 101", "category_id is missing"]),
    "row 3, id": (lose("id"), "bad id", ["annotations[1]", "field id is missing"]),
    "row 3, null": (spoil(bbox=None), "bad bbox", ["id 101", "bbox must be 4 numbers", "None"]),
    "three numbers": (spoil(bbox=[1, 2, 3]), "bad bbox", ["id 101", "[1, 2, 3]"]),
    "text number": (spoil(bbox=[1, 2, "3", 4]), "bad bbox", ["id 101", "'3'"]),
    "row 4, huge": (spoil(bbox=[1, 2, 10**400, 4]), "bad bbox", ["id 101", "4 numbers"]),
    "id of another kind": (spoil(id=[1]), "bad id", ["annotations[1]", "whole number or text", "[1]"]),
    "id of text that no image has": (spoil(image_id="x"), "bad image_id", ["id 101", "field image_id is x"]),
    "id beyond 64 bits": (spoil(image_id=2**70), "bad image_id", ["id 101", str(2**70)]),
    "row 7": (spoil(id=100), "duplicate id", ["annotation id 100 is there twice"]),
    "row 10, category": (spoil(category_id=999), "bad category_id", ["id 101", "999", "90"]),
    "row 10, image": (spoil(image_id=999), "bad image_id", ["id 101", "is 999"]),
    "row 13, zero": (spoil(bbox=[5, 5, 0, 9]), "zero or negative size", ["id 101", "0.0, 9.0]"]),
    "row 13, negative": (spoil(bbox=[5, 5, 7, -3]), "zero or negative size", ["id 101", "-3"]),
    "row 13, float32": (spoil(bbox=[55, 5, 1e-8, 9]), "zero or negative size", ["id 101", "next to no size"]),
    "row 15": (spoil(bbox=[120, 5, 7, 9]), "wholly outside the image", ["id 101", "60 x 40 pixels"]),
    "row 15, touching": (spoil(bbox=[-7, 5, 7, 9]), "wholly outside the image", ["id 101"]),
    "row 16": (spoil(iscrowd=2), "bad iscrowd", ["id 101", "iscrowd must be 0 or 1", "2"]),
    "area": (spoil(area=-1), "bad area", ["id 101", "area must be", "-1"]),
}


@pytest.mark.parametrize("fault", BOX_FAULTS)
def test_faults_of_a_box_are_errors_or_counted_skips(tmp_path: Path, fault: str) -> None:
    change, reason, fragments = BOX_FAULTS[fault]
    path, folder = spoiled(tmp_path, change)
    with pytest.raises(DataError) as caught:
        load_coco(path, folder)
    for fragment in ["instances_train.json", *fragments, "on_bad"]:
        assert fragment in str(caught.value)
    assert "\n" not in str(caught.value)
    a = load_coco(path, folder, on_bad="skip")
    assert a.boxes.tolist() == [[1, 2, 11, 22], [30.5, 10.25, 38.5, 19.25], [0, 0, 60, 40]]
    assert a.counts[f"boxes skipped: {reason}"] == 1
    assert (a.counts["boxes read"], a.counts["boxes used"]) == (4, 3)


IMAGE_FAULTS = {
    "row 3, width": (drop("images", 0, "width"), "bad width", ["image id 10", "(0.jpg)", "width is missing"]),
    "zero height": (edit("images", 0, height=0), "bad height", ["image id 10", "height must be", "0"]),
    "no name": (drop("images", 0, "file_name"), "bad file_name", ["image id 10", "file_name is missing"]),
    "id of another kind": (edit("images", 0, id=True), "bad id", ["images[0]", "id must be", "True"]),
    "width of a part of a pixel": (
        edit("images", 0, width=60.5),
        "bad width",
        ["image id 10", "width must be", "60.5"],
    ),
    "no size, no file": (
        lambda c: c["images"].__setitem__(0, {"id": 10, "file_name": "gone.jpg"}),
        "file missing",
        ["image id 10", "gone.jpg", "no such image file"],
    ),
    "row 22": (edit("images", 0, file_name="gone.jpg"), "file missing", ["image id 10", "gone.jpg", "is missing"]),
    "row 22, folder": (edit("images", 0, file_name="sub/gone.jpg"), "file missing", ["image id 10", "sub/gone.jpg"]),
}


@pytest.mark.parametrize("fault", IMAGE_FAULTS)
def test_faults_of_an_image_are_errors_or_counted_skips(tmp_path: Path, fault: str) -> None:
    change, reason, fragments = IMAGE_FAULTS[fault]
    path, folder = spoiled(tmp_path, change)
    with pytest.raises(DataError) as caught:
        load_coco(path, folder)
    for fragment in ["instances_train.json", *fragments]:
        assert fragment in str(caught.value)
    a = load_coco(path, folder, on_bad="skip")
    assert a.image_ids.tolist() == [11, 12]
    assert a.counts[f"images skipped: {reason}"] == 1
    lost = sum(n for key, n in a.counts.items() if key.startswith("boxes skipped"))
    assert (a.counts["boxes used"], lost) == (2, 2)


def test_row_1_truncated_json_names_line_and_column(tmp_path: Path) -> None:
    path, folder = write_coco(tmp_path)
    text = json.dumps(coco_content(), indent=1)
    path.write_text(text[: len(text) // 2])
    with pytest.raises(DataError, match=r"instances_train\.json: line \d+ column \d+"):
        load_coco(path, folder)


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_row_4_numbers_that_are_not_finite(tmp_path: Path, number: str) -> None:
    path, folder = write_coco(tmp_path)
    path.write_text(path.read_text().replace("[1, 2, 10, 20]", f"[1, 2, {number}, 20]"))
    with pytest.raises(DataError, match=r"instances_train\.json: (line 1 column \d+.*Na?N?|.*annotation id 100.*inf)"):
        load_coco(path, folder)


def test_row_5_duplicate_json_key(tmp_path: Path) -> None:
    path, folder = write_coco(tmp_path)
    path.write_text(path.read_text().replace('"category_id": 7,', '"category_id": 7, "category_id": 1,'))
    with pytest.raises(DataError, match=r"instances_train\.json.*'category_id'.*id 100.*twice"):
        load_coco(path, folder)


def test_row_8_annotation_id_0_is_accepted(tmp_path: Path) -> None:
    a = load_coco(*spoiled(tmp_path, edit("annotations", 0, id=0)))
    assert len(a.boxes) == 4


def test_row_14_boxes_partly_outside_are_clipped_and_counted(tmp_path: Path) -> None:
    path, folder = spoiled(
        tmp_path,
        edit("annotations", 0, bbox=[50, -5, 11, 20]),
        edit("annotations", 1, bbox=[20.1, 1, 39.900000000000006, 5]),
    )
    a = load_coco(path, folder)
    assert a.boxes[0].tolist() == [50, 0, 60, 15]
    assert a.counts["boxes clipped"] == 1  # 7e-15 over the border is rounding
    assert (a.boxes[:, 2:] <= a.sizes[[0, 0, 1, 1]][:, ::-1]).all()


@pytest.mark.parametrize(("value", "expected"), [(None, False), (True, True), (False, False), (1, True)])
def test_row_16_iscrowd_may_be_missing_or_a_bool(tmp_path: Path, value: Any, expected: bool) -> None:
    change = drop("annotations", 0, "iscrowd") if value is None else edit("annotations", 0, iscrowd=value)
    assert load_coco(*spoiled(tmp_path, change)).iscrowd.tolist() == [expected, False, False, False]


def test_a_missing_area_is_that_of_the_box(tmp_path: Path) -> None:
    assert load_coco(*spoiled(tmp_path, drop("annotations", 0, "area"))).area.tolist() == [200, 52, 51, 53]


def test_row_18_nothing_left_after_skipping(tmp_path: Path) -> None:
    path, folder = spoiled(tmp_path, lambda c: [a.update(bbox=[0, 0, 0, 0]) for a in c["annotations"]])
    with pytest.raises(DataError, match=r"no boxes left of 4 read \(boxes skipped: zero or negative size: 4\)"):
        load_coco(path, folder, on_bad="skip")


def test_row_22_all_missing_images_are_listed_with_their_total(tmp_path: Path) -> None:
    content = coco_content()
    content["images"] += [{"id": i, "file_name": f"gone{i}.jpg", "height": 9, "width": 9} for i in range(200, 225)]
    path, folder = write_coco(tmp_path)
    path.write_text(json.dumps(content))
    with pytest.raises(DataError) as caught:
        load_coco(path, folder)
    named = re.findall(r"file_name 'gone(\d+)\.jpg'", str(caught.value))
    assert named == [str(i) for i in range(200, 220)]
    assert "(25 in total)" in str(caught.value)


def test_row_29_links_out_of_the_folder_are_refused_and_links_within_are_not(tmp_path: Path) -> None:
    path, folder = write_coco(tmp_path)
    (folder / "0.jpg").rename(folder / "real.jpg")
    (folder / "0.jpg").symlink_to("real.jpg")
    assert len(load_coco(path, folder)) == 3
    outside = tmp_path / "secret.jpg"
    (folder / "real.jpg").rename(outside)
    (folder / "0.jpg").unlink()
    (folder / "0.jpg").symlink_to(outside)
    with pytest.raises(DataError, match=r"image id 10: file_name '0\.jpg' is a link that leads out"):
        load_coco(path, folder)


def test_row_29_a_linked_folder_out_of_the_root_is_refused(tmp_path: Path) -> None:
    path, folder = spoiled(tmp_path, edit("images", 0, file_name="sub/0.jpg"))
    (tmp_path / "elsewhere").mkdir()
    (folder / "0.jpg").rename(tmp_path / "elsewhere" / "0.jpg")
    (folder / "sub").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(DataError, match=r"'sub/0\.jpg' is a link that leads out"):
        load_coco(path, folder)
    linked = tmp_path / "linked"  # but the image folder itself may be a link: the user named it
    linked.symlink_to(folder)
    (folder / "sub").unlink()
    (folder / "sub").mkdir()
    (tmp_path / "elsewhere" / "0.jpg").rename(folder / "sub" / "0.jpg")
    assert len(load_coco(path, linked)) == 3


def test_skip_decodes_every_image_once_and_counts_the_damaged(tmp_path: Path) -> None:
    path, folder = write_coco(tmp_path)
    data = (folder / "0.jpg").read_bytes()
    (folder / "0.jpg").write_bytes(data[: len(data) // 2])
    (folder / "2.jpg").write_bytes((folder / "1.jpg").read_bytes())  # of another size
    assert len(load_coco(path, folder)) == 3  # under "error" the damage shows when the image is read
    counts = load_coco(path, folder, on_bad="skip").counts
    assert counts["images skipped: unreadable"] == 1
    assert counts["images skipped: size differs from the annotation"] == 1
    assert counts["boxes skipped: image skipped"] == 2


RECORD_FAULTS: list[Callable[[dict[str, Any]], Any]] = [
    lambda a: a.update(bbox=[5, 5, 0, 9]),
    lambda a: a.update(bbox=[5, 5, 3, -9]),
    lambda a: a.update(bbox=[500, 5, 3, 9]),
    lambda a: a.update(bbox=[1, 2]),
    lambda a: a.pop("bbox"),
    lambda a: a.update(category_id=999),
    lambda a: a.update(image_id=999),
    lambda a: a.update(iscrowd=7),
    lambda a: a.update(id=1),
    lambda a: a.update(image_id=1),  # image 1 is missing on disk
    lambda a: a.update(image_id=2),  # image 2 has no width
]


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(faults=st.lists(st.integers(0, len(RECORD_FAULTS)), min_size=1, max_size=30))
def test_p6_read_is_used_plus_skipped(tmp_path: Path, faults: list[int]) -> None:
    content = coco_content()
    content["images"] += [
        {"id": 1, "file_name": "gone.jpg", "height": 9, "width": 9},
        {"id": 2, "file_name": "1.jpg", "height": 9},
    ]
    content["annotations"].append({"id": 1, "image_id": 10, "category_id": 1, "bbox": [1, 1, 3, 3]})
    for b, fault in enumerate(faults):
        annotation = {"id": 1000 + b, "image_id": 10, "category_id": 1, "bbox": [1, 1, 3, 3]}
        if fault < len(RECORD_FAULTS):
            RECORD_FAULTS[fault](annotation)
        content["annotations"].append(annotation)
    path, folder = write_coco(tmp_path)
    path.write_text(json.dumps(content))
    a = load_coco(path, folder, on_bad="skip")
    bad = sum(fault < len(RECORD_FAULTS) for fault in faults)
    for what, read, lost in (("boxes", 5 + len(faults), bad), ("images", 5, 2)):
        skipped = sum(n for key, n in a.counts.items() if key.startswith(f"{what} skipped"))
        assert (a.counts[f"{what} read"], skipped) == (read, lost)
        assert a.counts[f"{what} used"] == read - lost
    assert len(a.boxes) == a.counts["boxes used"]
    assert len(a) == a.counts["images used"]


def test_real_subset_of_coco(shared_data: Path) -> None:
    data = COCO(str(shared_data / "coco_mini"))
    for split, images, boxes, crowd in (("train", 45, 498, 6), ("val", 47, 469, 7)):
        a = data.annotations(split)
        assert (len(a), len(a.boxes), a.iscrowd.sum()) == (images, boxes, crowd)
        assert a.counts["boxes clipped"] == 0
    assert data.num_classes == 80
    assert data.category_ids[-1] == 90
    for index in (0, 44):
        image, target = data.dataset("train")[0, index]
        assert image.shape[1:] == tuple(data.annotations("train").sizes[index].tolist())
        assert target["boxes"].shape[1] == 4


def test_real_fixture_of_coco(shared_data: Path) -> None:
    root = shared_data / "loader_fixtures" / "coco"
    a = load_coco(root / "annotations" / "instances_train2017.json", root / "images" / "train2017")
    np.testing.assert_allclose(a.boxes[0], [359.17, 146.17, 471.62, 359.74])
    assert a.class_names[a.labels[0] - 1] == "motorcycle"


def test_splits_by_name_or_by_files(tmp_path: Path) -> None:
    write_coco(tmp_path, split="train2017")
    path, folder = write_coco(tmp_path / "other")
    path.rename(folder / "_annotations.coco.json")
    data = COCO(str(tmp_path), val=COCOFiles("other/train/_annotations.coco.json", "other/train"))
    assert len(data.annotations("train")) == len(data.annotations("val")) == 3


def test_what_is_missing_is_named_with_what_is_there(tmp_path: Path) -> None:
    write_coco(tmp_path)
    with pytest.raises(DataError, match=r"instances_train2017\.json.*splits found in .*: train;"):
        COCO(str(tmp_path)).annotations("train")
    with pytest.raises(DataError, match=r"nowhere: no such folder; the argument root"):
        COCO(str(tmp_path / "nowhere")).annotations("train")
    with pytest.raises(DataError, match=r"no test split: set the argument test"):
        COCO(str(tmp_path)).test_dataloader()
    (tmp_path / "train").rename(tmp_path / "images")
    with pytest.raises(DataError, match=r"train: no such image folder"):
        COCO(str(tmp_path), train="train").annotations("train")

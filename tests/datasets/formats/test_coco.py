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


def test_null_is_missing(tmp_path: Path) -> None:
    a = load_coco(
        *spoiled(tmp_path, edit("annotations", 0, iscrowd=None, area=None, difficult=None, segmentation=None))
    )
    assert (a.iscrowd.any(), a.difficult.any(), a.area.tolist()) == (False, False, [200, 52, 51, 53])


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
    (tmp_path / "train").rename(tmp_path / ".train")
    with pytest.raises(DataError, match=r"train: no such image folder"):
        COCO(str(tmp_path), train="train").annotations("train")

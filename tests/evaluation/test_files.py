from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from detpipe.evaluation import (
    canonical_order,
    evaluate_coco,
    read_coco_annotations,
    read_detections,
    write_detections,
)
from detpipe.support.errors import DataError
from detpipe.types import DetectionArrays

from .builders import found, shuffled, truth


def sound() -> dict[str, Any]:
    return {
        "images": [
            {"id": 12, "file_name": "b.jpg", "width": 64, "height": 48},
            {"id": 3, "file_name": "a.jpg", "width": 32, "height": 16},
        ],
        "categories": [{"id": 90, "name": "toothbrush"}, {"id": 1, "name": "person"}, {"id": 7, "name": "train"}],
        "annotations": [
            {"id": 5, "image_id": 3, "category_id": 90, "bbox": [1.5, 2, 10, 4], "area": 31.5, "iscrowd": 0},
            {"id": 0, "image_id": 12, "category_id": 7, "bbox": [0, 0, 64, 48], "iscrowd": 1, "area": 900},
            {"id": 9, "image_id": 3, "category_id": 1, "bbox": [-2, 0, 80, 4]},
        ],
    }


def write(path: Path, data: Any) -> Path:
    path.write_text(json.dumps(data))
    return path


def test_a_sound_file_is_read_as_it_is(tmp_path):
    annotations = read_coco_annotations(write(tmp_path / "gt.json", sound()))
    assert annotations.class_names == ("person", "train", "toothbrush")
    assert annotations.category_ids == (1, 7, 90)
    assert annotations.file_names.tolist() == ["b.jpg", "a.jpg"]
    assert annotations.image_ids.tolist() == [12, 3]
    assert annotations.sizes.tolist() == [[48, 64], [16, 32]]
    assert annotations.offsets.tolist() == [0, 1, 3]
    assert annotations.boxes.tolist() == [[0, 0, 64, 48], [1.5, 2, 11.5, 6], [-2, 0, 78, 4]]  # not clipped
    assert annotations.labels.tolist() == [2, 3, 1]
    assert annotations.iscrowd.tolist() == [True, False, False]
    assert annotations.area.tolist() == [900, 31.5, 320]
    assert annotations.counts["areas taken from boxes"] == 1


@pytest.mark.parametrize(
    ("images", "classes", "written"),
    [
        ({12: 12, 3: 3}, {1: 1, 7: 7, 90: 90}, lambda value: float(value)),
        ({12: 12, 3: 3}, {1: 1, 7: 7, 90: 90}, str),
        ({12: "b-1", 3: "a"}, {1: "p", 7: "t", 90: "b"}, str),
        ({12: "b-1", 3: "a"}, {1: 1, 7: 7, 90: 90}, lambda value: value),
    ],
)
def test_ids_in_other_forms_are_those_of_the_ground_truth(tmp_path, images, classes, written):
    data = sound()
    data["images"] = [{**row, "id": images[row["id"]]} for row in data["images"]]
    data["categories"] = [{**row, "id": classes[row["id"]]} for row in data["categories"]]
    for row in data["annotations"]:
        row |= {"image_id": images[row["image_id"]], "category_id": classes[row["category_id"]]}
    annotations = read_coco_annotations(write(tmp_path / "gt.json", data))
    result = {"image_id": written(images[3]), "category_id": written(classes[90]), "bbox": [1, 2, 3, 4], "score": 0.5}
    detections = read_detections(write(tmp_path / "dt.json", [result]), annotations)
    assert annotations.file_names[annotations.image_ids == detections.image_ids].tolist() == ["a.jpg"]
    assert annotations.class_names[detections.labels[0] - 1] == "toothbrush"


def test_images_without_objects_and_bare_images_are_read(tmp_path):
    data = sound() | {"annotations": [], "images": [{"id": 4}]}
    annotations = read_coco_annotations(write(tmp_path / "gt.json", data))
    assert annotations.offsets.tolist() == [0, 0]
    assert annotations.boxes.shape == (0, 4)
    assert annotations.file_names.tolist() == ["4"]


def edit(section: str, row: int, **fields: Any) -> Callable[[dict], None]:
    return lambda data: data[section][row].update(fields)


def drop(section: str, row: int, field: str) -> Callable[[dict], None]:
    return lambda data: data[section][row].pop(field)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (lambda data: data.pop("images"), "the top-level key 'images' is missing"),
        (lambda data: data.pop("annotations"), "the top-level key 'annotations' is missing"),
        (lambda data: data.pop("categories"), "the top-level key 'categories' is missing"),
        (drop("annotations", 0, "bbox"), "annotation id 5: field bbox is missing"),
        (drop("annotations", 0, "image_id"), "annotation id 5: field image_id is missing"),
        (drop("annotations", 1, "id"), r"annotations\[1\]: field id is missing"),
        (drop("categories", 1, "name"), "category id 1: field name must be text"),
        (edit("annotations", 0, bbox=[1, 2, 3]), r"annotation id 5: field bbox must be 4 numbers .*got \[1, 2, 3\]"),
        (edit("annotations", 0, bbox=[1, 2, "3", 4]), "annotation id 5: field bbox must be 4 numbers"),
        (edit("annotations", 0, bbox=[1, 2, -3, 4]), "annotation id 5: field bbox is .*expected finite numbers, width"),
        (edit("annotations", 0, area=-1), "annotation id 5: field area must be a number of at least 0, got -1"),
        (edit("images", 1, id=12), "image id 12 is there twice: file_name 'b.jpg' and 'a.jpg'"),
        (edit("images", 1, id=2**70), r"images\[1\]: field id must be .*got 1180591620717411303424"),
        (edit("annotations", 2, id=5), r"annotation id 5 is there twice: annotations\[0\] and annotations\[2\]"),
        (edit("categories", 2, id=1), "category id 1, name 'train': the id or the name is there twice"),
        (edit("categories", 2, name="person"), "category id 7, name 'person': the id or the name is there twice"),
        (edit("annotations", 0, category_id=999), "annotation id 5: field category_id is 999, which no category has"),
        (edit("annotations", 0, image_id=999), "annotation id 5: field image_id is 999, which no image has"),
        (edit("annotations", 0, iscrowd=2), "annotation id 5: field iscrowd must be 0 or 1, got 2"),
        (edit("images", 0, width="64"), "image id 12 .b.jpg.: field width must be .*got '64'"),
    ],
)
def test_a_fault_names_file_record_and_field(tmp_path, fault, message):
    data = sound()
    fault(data)
    with pytest.raises(DataError, match=rf"gt\.json: {message}") as error:
        read_coco_annotations(write(tmp_path / "gt.json", data))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("value", [True, 1])
def test_iscrowd_may_be_true(tmp_path, value):
    data = sound()
    data["annotations"][2].update(iscrowd=value, difficult=value)
    annotations = read_coco_annotations(write(tmp_path / "gt.json", data))
    assert annotations.iscrowd.tolist() == [True, False, True]
    assert annotations.difficult.tolist() == [False, False, True]


def row(**fields: Any) -> dict[str, Any]:
    return {"image_id": 3, "category_id": 90, "bbox": [1, 2, 3, 4], "score": 0.5} | fields


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (row(image_id=999), "image_id 999 is not an image of the ground truth"),
        (row(category_id=2), "category_id 2 is not a category of the ground truth"),
        (row(score="high"), "the field 'score' is 'high': expected a finite number"),
        (row(score=None), "the field 'score' is None"),
        (row(score=True), "the field 'score' is True"),
        (row(bbox=[1, 2, 3, -4]), r"the field 'bbox' is \[1, 2, 3, -4\]"),
        ({k: v for k, v in row().items() if k != "score"}, "the field 'score' is missing"),
        ({k: v for k, v in row().items() if k != "bbox"}, "the field 'bbox' is missing"),
        ([1, 2], r"expected an object with the field 'image_id', got \[1, 2\]"),
    ],
)
def test_a_bad_detection_names_record_and_field(tmp_path, bad, message):
    annotations = read_coco_annotations(write(tmp_path / "gt.json", sound()))
    with pytest.raises(DataError, match=rf"dets\.json: record 1: {message}"):
        read_detections(write(tmp_path / "dets.json", [row(), bad, bad]), annotations)


def test_a_score_beyond_floats_and_a_nan_are_refused(tmp_path):
    annotations = read_coco_annotations(write(tmp_path / "gt.json", sound()))
    file = write(tmp_path / "dets.json", [row(score=float("nan"))])
    with pytest.raises(DataError, match=r"dets\.json: line 1 column \d+: NaN is not a number"):
        read_detections(file, annotations)
    file.write_text(json.dumps([row()]).replace("0.5", "1e999"))
    with pytest.raises(DataError, match="record 0: the field 'score' is inf"):
        read_detections(file, annotations)
    with pytest.raises(DataError, match="expected a list of detections"):
        read_detections(write(file, {"annotations": []}), annotations)


def prediction(file: str, **found: Any) -> dict[str, Any]:
    return {"file": file, "detections": [{"label": "train", "score": 0.5, "box": [1, 2, 3, 4]} | found]}


@pytest.mark.parametrize(
    ("images", "message"),
    [
        ([prediction("")], "image : is not an image of the ground truth"),
        ([prediction(".")], r"image \.: is not an image of the ground truth"),
        ([prediction("a/" * 100_000)], r"image (a/){100}: is not an image of the ground truth"),
        (5, "the field 'images' is 5: expected a list"),
        ({"a": 1}, "the field 'images' is .*: expected a list"),
        ([prediction("x/a.jpg", box=[5, 2, 3, 4])], r"image x/a\.jpg: the field 'box' is \[5, 2, 3, 4\]: expected"),
        (
            [{"file": "a.jpg", "detections": [{"label": "train", "score": "x"}]}],
            r"image a\.jpg: the field 'score' is 'x'",
        ),
        ([prediction("a.jpg"), prediction("y/a.jpg")], r"image y/a\.jpg: is there twice"),
    ],
)
def test_a_fault_in_predictions_names_the_image(tmp_path, images, message):
    annotations = read_coco_annotations(write(tmp_path / "gt.json", sound()))
    file = write(tmp_path / "detections.json", {"class_names": ["train"], "images": images, "failed": []})
    with pytest.raises(DataError, match=rf"detections\.json: {message}"):
        read_detections(file, annotations)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (None, "no such file: check the path"),
        (b"", "line 1 is no record of detpipe predict"),
        (b"{}\n", "its first line is not that of a file of detpipe predict"),
        (b'{"class_names": []}\n{"file": "a', "line 2 is no record of detpipe predict; is the run complete?"),
        (b'{"class_names": []}\n[]\n', "line 2 is no record"),
        (b'{"class_names": []}\n' + b"[" * 100_000, "line 2 is no record"),
        (b'{"class_names": []}\n\xff\n', "byte 20 is not UTF-8 text: this is not a file of detpipe predict"),
    ],
)
def test_a_fault_in_lines_of_predictions_names_the_line(tmp_path, lines, message):
    annotations = read_coco_annotations(write(tmp_path / "gt.json", sound()))
    if lines is not None:
        (tmp_path / "dets.jsonl").write_bytes(lines)
    with pytest.raises(DataError, match=rf"dets\.jsonl: {message}"):
        read_detections(tmp_path / "dets.jsonl", annotations)


def test_files_keep_ids_and_every_bit(tmp_path):
    rng = np.random.default_rng(0)
    annotations = truth([], [12, 3], ["person", "train", "toothbrush"], category_ids=[1, 7, 2**24 + 1])
    corners = rng.uniform(0, 300, (500, 2, 2)).astype(np.float32)
    boxes = np.concatenate((corners.min(axis=1), corners.max(axis=1)), axis=1).astype(np.float64)
    scores = rng.random(500).astype(np.float32).astype(np.float64)
    detections = DetectionArrays(rng.choice([3, 12], 500), boxes, scores, rng.integers(1, 4, 500))
    write_detections(tmp_path / "a.json", detections, annotations)
    write_detections(tmp_path / "b.json", shuffled(detections, 0), annotations)
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()
    assert {one["category_id"] for one in json.loads((tmp_path / "a.json").read_text())} == {1, 7, 2**24 + 1}
    again, wanted = read_detections(tmp_path / "a.json", annotations), canonical_order(detections)
    for field in ("image_ids", "boxes", "scores", "labels"):
        np.testing.assert_array_equal(getattr(again, field), getattr(wanted, field))


def test_no_detections_make_an_empty_list(tmp_path):
    annotations = truth([(3, 1, (0, 0, 4, 4))], [3])
    write_detections(tmp_path / "dets.json", found([]), annotations)
    assert json.loads((tmp_path / "dets.json").read_text()) == []
    assert evaluate_coco(annotations, read_detections(tmp_path / "dets.json", annotations))["AP"] == 0.0


def test_a_failed_write_leaves_the_previous_file(tmp_path, monkeypatch):
    annotations = truth([], [3])
    file = tmp_path / "dets.json"
    write_detections(file, found([(3, 1, 0.5, (0, 0, 4, 4))]), annotations)
    before = file.read_bytes()
    with pytest.raises(DataError, match="the score is nan"):
        write_detections(file, found([(3, 1, float("nan"), (0, 0, 4, 4))]), annotations)

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(DataError, match=r"dets\.json: cannot be written .No space left on device."):
        write_detections(file, found([(3, 1, 0.25, (0, 0, 4, 4))]), annotations)
    assert file.read_bytes() == before
    assert list(tmp_path.iterdir()) == [file]

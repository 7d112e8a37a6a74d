import contextlib
import csv
import json
import os
import pickle
from collections import OrderedDict
from enum import IntEnum

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.io import savemat

from detpipe.proposal_files.box_orders import CONVENTIONS, to_edges
from detpipe.proposal_files.converters import convert
from detpipe.proposal_files.restricted_pickle import load_plain_pickle
from detpipe.support.errors import DataError, UsageError

EDGES = {"7": [[0, 0, 10, 20], [5, 5, 30, 40]], "139": [[1, 2, 3, 4]], "8": []}
SCORES = {"7": [0.25, 0.75], "139": [0.5], "8": []}


def inverse(edges, convention):
    """Boxes as a file of some convention would have them, written out by hand."""
    rows = []
    for x1, y1, x2, y2 in edges:
        first = 1 if convention.endswith("1") else 0
        last = {"0": -1, "1": 0}.get(convention[-1], 0)
        x1, y1 = x1 + first, y1 + first
        if convention.startswith("xywh"):
            rows.append([x1, y1, x2 + first - x1, y2 + first - y1])
        else:
            x2, y2 = x2 + last, y2 + last
            rows.append([x1, y1, x2, y2] if convention.startswith("xyxy") else [y1, x1, y2, x2])
    return np.array(rows, dtype=np.float64).reshape(-1, 4)


def cells(values):
    array = np.empty((1, len(values)), dtype=object)
    for i, value in enumerate(values):
        array[0, i] = value
    return array


def write_mat(path, edges, scores):
    boxes = [inverse(rows, "yxyx1") for rows in edges.values()]
    savemat(path, {"boxes": cells(boxes), "images": cells([np.array([f"{name}.jpg"]) for name in edges])})


def write_coco(path, edges, scores):
    records = [
        {"image_id": name, "bbox": box.tolist(), "score": float(score), "category_id": 1}
        for name, rows in edges.items()
        for box, score in zip(inverse(rows, "xywh"), scores[name], strict=True)
    ]
    path.write_text(json.dumps(records))


def write_detectron2(path, edges, scores):
    content = {
        "ids": list(edges),
        "boxes": [inverse(rows, "xywh") for rows in edges.values()],
        "objectness_logits": [np.array(values, dtype=np.float32) for values in scores.values()],
        "bbox_mode": 1,
    }
    path.write_bytes(pickle.dumps(content))


def write_mmdetection(path, edges, scores):
    tables = {f"data/val/{name}.jpg": table(edges[name], scores[name]) for name in edges}
    path.write_bytes(pickle.dumps(tables))


def write_csv(path, edges, scores):
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["image_id", "x1", "y1", "x2", "y2", "score"])
        for name, rows in edges.items():
            for box, score in zip(rows, scores[name], strict=True):
                writer.writerow([name, *map(repr, map(float, box)), repr(float(score))])


def write_numpy(path, edges, scores):
    np.savez(path, **{name: table(edges[name], scores[name]) for name in edges})


def table(boxes, scores):
    return np.concatenate([np.array(boxes).reshape(-1, 4), np.array(scores, dtype=float).reshape(-1, 1)], axis=1)


WRITERS = {
    "a.mat": write_mat,
    "a.json": write_coco,
    "detectron2.pkl": write_detectron2,
    "mmdetection.pkl": write_mmdetection,
    "a.csv": write_csv,
    "a.npz": write_numpy,
}
SPARSE = ("a.json", "a.csv")  # these cannot say that an image has no boxes


def converted(tmp_path, name, content, **options):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return convert(path, tmp_path / "out.safetensors", **options)


def annotations(tmp_path, ids=(7, 139, 8), size=(50, 60), names=None):
    path = tmp_path / "annotations.json"
    names = names or [f"{i:012}.jpg" for i in ids]
    images = [
        {"id": i, "file_name": name, "height": size[0], "width": size[1]} for i, name in zip(ids, names, strict=True)
    ]
    path.write_text(json.dumps({"images": images}))
    return path


whole = st.integers(0, 500)


@st.composite
def files(draw):
    edges, scores = {}, {}
    for name in draw(st.lists(st.integers(1, 999).map(str), max_size=4, unique=True)):
        sides = draw(st.lists(st.tuples(whole, whole, whole, whole), max_size=5))
        edges[name] = [[x, y, x + w, y + h] for x, y, w, h in sides]
        scores[name] = draw(st.lists(st.floats(0, 1, width=32), min_size=len(sides), max_size=len(sides)))
    return edges, scores


@pytest.mark.parametrize("name", WRITERS)
@settings(max_examples=15, deadline=None)
@given(content=files())
def test_every_format_comes_back(tmp_path_factory, name, content):
    folder = tmp_path_factory.mktemp("files")
    edges, scores = content
    WRITERS[name](folder / name, edges, scores)
    if name == "a.csv" and not any(edges.values()):
        return  # a table with a head and no rows is an empty store, as below
    done = convert(folder / name, folder / "out.safetensors", on_bad="error")
    expected = {image for image in edges if edges[image] or name not in SPARSE}
    assert set(done.store) == expected
    for image in expected:
        order = np.argsort(-np.array(scores[image]), kind="stable")
        if name == "a.mat":  # has no scores: the order is that of the file
            order = np.arange(len(edges[image]))
        boxes = np.array(edges[image], dtype=np.float32).reshape(-1, 4)
        np.testing.assert_array_equal(done.store[image].boxes, boxes[order])
        if name != "a.mat":
            np.testing.assert_array_equal(done.store[image].scores, np.array(scores[image], dtype=np.float32)[order])
    count = sum(map(len, edges.values()))
    assert (done.counts.get("boxes read", 0), done.counts["boxes written"]) == (count, count)
    done.store.verify()


@pytest.mark.parametrize("convention", CONVENTIONS)
def test_conventions(convention):
    edges = np.array(EDGES["7"], dtype=np.float64)
    np.testing.assert_array_equal(to_edges(inverse(edges, convention), convention), edges)


def test_conventions_by_hand():
    box = np.array([[3.0, 4.0, 7.0, 9.0]])
    by_hand = {
        "xyxy": [3, 4, 7, 9],
        "xyxy0": [3, 4, 8, 10],
        "xyxy1": [2, 3, 7, 9],
        "yxyx": [4, 3, 9, 7],
        "yxyx0": [4, 3, 10, 8],
        "yxyx1": [3, 2, 9, 7],
        "xywh": [3, 4, 10, 13],
        "xywh1": [2, 3, 9, 12],
    }
    assert {name: to_edges(box, name)[0].tolist() for name in CONVENTIONS} == by_hand
    assert box.tolist() == [[3, 4, 7, 9]]
    with pytest.raises(ValueError, match="boxes must be one of xyxy, "):
        to_edges(box, "xyhw")


def test_boxes_without_scores_keep_their_order(tmp_path):
    done = converted(tmp_path, "a.csv", "5,0,0,1,1\n5,0,0,2,2\n5,0,0,3,3\n5,0,0,4,4\n")
    assert done.store["5"].boxes[:, 2].tolist() == [1, 2, 3, 4]
    assert done.store["5"].scores.tolist() == [1, 0.75, 0.5, 0.25]
    assert done.store.settings == {"converted_from": "csv", "file": "a.csv", "boxes": "xyxy"}
    assert done.store.source == "a"


def test_csv_heads_conventions_and_sources(tmp_path):
    text = "score,y,x,width,height,image_id,extra\n0.5,2,1,3,4,img.jpg,z\n\n0.75,20,10,3,4,img.jpg,z\n"
    done = converted(tmp_path, "a.csv", text, source="mine")
    assert done.convention == "xywh"
    assert done.store.source == "mine"
    assert done.store["img"].boxes.tolist() == [[10, 20, 13, 24], [1, 2, 4, 6]]
    done = converted(tmp_path, "a.csv", "a,1,2,3,4\n", boxes="yxyx1")
    assert done.store["a"].boxes.tolist() == [[1, 0, 4, 3]]
    assert len(converted(tmp_path, "a.csv", "image_id,x1,y1,x2,y2\n").store) == 0
    assert converted(tmp_path, "table.txt", "a,1,2,3,4,0.5\n", format="csv").store["a"].scores.tolist() == [0.5]


def test_mat_files_with_one_image_each(tmp_path):
    folder = tmp_path / "mats"
    folder.mkdir()
    savemat(folder / "000004_boxes.mat", {"boxes": np.array([[1, 2, 3, 4]], dtype=np.uint16)})
    savemat(folder / "000005.mat", {"boxes": np.zeros((0, 4))})
    done = convert(folder, tmp_path / "out.safetensors")
    assert done.convention == "xyxy1"
    assert {name: record.boxes.tolist() for name, record in done.store.items()} == {
        "000004": [[0, 1, 3, 4]],
        "000005": [],
    }
    single = convert(folder / "000004_boxes.mat", tmp_path / "out.safetensors", boxes="xyxy0")
    assert single.store["000004"].boxes.tolist() == [[1, 2, 4, 5]]
    savemat(folder / "000005.mat", {"boxes": cells([np.zeros((0, 4))])})
    with pytest.raises(DataError, match=r"000005\.mat: holds a cell array of many images"):
        convert(folder, tmp_path / "out.safetensors")
    with pytest.raises(DataError, match=r"a folder without .mat files"):
        convert(tmp_path, tmp_path / "out.safetensors")


def test_mat_files_in_the_order_of_a_list(tmp_path):
    savemat(tmp_path / "a.mat", {"all_boxes": cells([np.array([[1, 1, 20, 10]]), np.zeros((0, 0))])})
    (tmp_path / "val.txt").write_text("000012 1\n\n000007 -1\n")
    done = convert(tmp_path / "a.mat", tmp_path / "out.safetensors", images=tmp_path / "val.txt")
    assert done.store["000012"].boxes.tolist() == [[0, 0, 10, 20]]
    assert done.store["000007"].boxes.shape == (0, 4)
    with pytest.raises(DataError, match=r"holds 2 lists of boxes in the order of some list .* --images"):
        convert(tmp_path / "a.mat", tmp_path / "out.safetensors")
    (tmp_path / "val.txt").write_text("a\n")
    with pytest.raises(DataError, match="holds boxes of 2 images, but --images lists 1"):
        convert(tmp_path / "a.mat", tmp_path / "out.safetensors", images=tmp_path / "val.txt")
    (tmp_path / "val.txt").write_text("a\na\n")
    with pytest.raises(DataError, match=r"val\.txt: image id a is there twice"):
        convert(tmp_path / "a.mat", tmp_path / "out.safetensors", images=tmp_path / "val.txt")


def test_pickles_of_older_versions(tmp_path):
    old = {"indexes": [np.int64(7)], "boxes": [np.array([[1, 2, 3, 4]])], "scores": [np.array([0.5])]}
    assert converted(tmp_path, "a.pkl", pickle.dumps(old, 2)).store["7"].boxes.tolist() == [[1, 2, 3, 4]]
    listed = pickle.dumps([table(EDGES[name], SCORES[name]) for name in EDGES], 0)
    done = converted(tmp_path, "a.pkl", listed, images=annotations(tmp_path))
    assert {name: len(record.boxes) for name, record in done.store.items()} == {"139": 1, "7": 2, "8": 0}
    assert done.store.size("7") == (50, 60)
    new = {"val/7.jpg": {"bboxes": np.array([[1, 2, 3, 4]]), "scores": np.array([0.5])}, "8.jpg": {"bboxes": []}}
    assert sorted(converted(tmp_path, "a.pkl", pickle.dumps(new)).store) == ["7", "8"]


def test_file_names_find_their_ids(tmp_path):
    images = annotations(tmp_path, ids=(1, 2, 3), names=["x/2.jpg", "y/1.jpg", "y/same.jpg"])
    tables = {"root/x/2.jpg": [[0, 0, 1, 1]], "1.jpg": [[0, 0, 2, 2]], "y\\same": [[0, 0, 3, 3]]}
    done = converted(tmp_path, "a.pkl", pickle.dumps({k: np.array(v) for k, v in tables.items()}), images=images)
    assert {name: record.boxes[0, 2] for name, record in done.store.items()} == {"1": 1, "2": 2, "3": 3}
    done = converted(tmp_path, "a.csv", "2,0,0,2,2\nsame.jpg,0,0,3,3\n", images=images)  # ids come before file names
    assert {name: record.boxes[0, 2] for name, record in done.store.items()} == {"2": 2, "3": 3}
    twice = annotations(tmp_path, ids=(1, 2), names=["x/a.jpg", "y/a.jpg"])
    with pytest.raises(DataError, match=r"image 'a\.jpg': --images lists no image of that name, or several"):
        converted(tmp_path, "a.csv", "a.jpg,0,0,2,2\n", images=twice)
    assert list(converted(tmp_path, "a.csv", "y/a.jpg,0,0,2,2\n", images=twice).store) == ["2"]


def test_images_without_boxes_are_filled_in_when_asked_for(tmp_path):
    images = annotations(tmp_path)
    done = converted(tmp_path, "a.csv", "7,0,0,1,1\n", images=images, fill_missing=True)
    assert sorted(done.store) == ["139", "7", "8"]
    assert done.counts["images filled in: not mentioned"] == 2
    assert list(converted(tmp_path, "a.csv", "7,0,0,1,1\n", images=images).store) == ["7"]
    with pytest.raises(UsageError, match="give --images"):
        converted(tmp_path, "a.csv", "7,0,0,1,1\n", fill_missing=True)


BAD_ROWS = [
    ("7,0,0,nan,1", "line 2 is [0.0, 0.0, nan, 1.0]", "boxes skipped: not finite"),
    ("7,0,0,inf,1", "line 2 is [0.0, 0.0, inf, 1.0]", "boxes skipped: not finite"),
    (
        "7,5,0,4,1",
        "line 2 is [5.0, 0.0, 4.0, 1.0] (x1, y1, x2, y2): x2 is less than x1",
        "boxes skipped: negative size",
    ),
    (
        "7,0,0,5",
        "line 2: expected an image id and 4 numbers, got ['7', '0', '0', '5']",
        "boxes skipped: malformed line",
    ),
    ("7,0,0,5,x", "line 2: expected an image id and 4 numbers", "boxes skipped: malformed line"),
    (" ,0,0,5,5", "line 2: expected an image id and 4 numbers", "boxes skipped: malformed line"),
    (
        "7,0,0,62,5",
        "line 2 is [0.0, 0.0, 62.0, 5.0] (x1, y1, x2, y2): it reaches bey",
        "boxes skipped: outside the image",
    ),
    ("9,0,0,5,5", "image '9': --images lists no image of that name", "images skipped: unknown"),
]


@pytest.mark.parametrize(("row", "message", "counter"), BAD_ROWS)
def test_bad_rows_are_named_or_counted(tmp_path, row, message, counter):
    text = f"7,0,0,61,5\n{row}\n7,1,1,2,2\n"
    images = annotations(tmp_path)
    with pytest.raises(DataError) as error:
        converted(tmp_path, "a.csv", text, images=images)
    assert message in str(error.value)
    assert str(error.value).startswith(f"{tmp_path / 'a.csv'}: ")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out.safetensors").exists()
    done = converted(tmp_path, "a.csv", text, images=images, on_bad="skip")
    assert done.store["7"].boxes[:, 2].tolist() == [61, 2]
    assert done.counts[counter] == 1
    skipped = sum(count for name, count in done.counts.items() if name.startswith("boxes skipped"))
    assert (done.counts["boxes read"], done.counts["boxes written"], skipped) == (3, 2, 1)


def test_on_bad_must_be_known(tmp_path):
    with pytest.raises(ValueError, match="on_bad must be 'error' or 'skip'"):
        converted(tmp_path, "a.csv", "7,0,0,1,1\n", on_bad="ignore")


def test_boxes_of_mat_files_that_start_before_pixel_1(tmp_path):
    boxes = np.array([[0, 0, 5, 5], [1, 1, 5, 5], [3, 0, 1, 1]], dtype=np.uint8)  # unsigned 0 - 1 must not wrap around
    savemat(tmp_path / "a.mat", {"boxes": cells([boxes]), "images": cells([np.array(["7"])])})
    with pytest.raises(
        DataError, match=r"image '7': box 0 is \[0.*read as yxyx1 .* starts before pixel 1: name the right"
    ):
        convert(tmp_path / "a.mat", tmp_path / "out.safetensors")
    done = convert(tmp_path / "a.mat", tmp_path / "out.safetensors", on_bad="skip")
    assert done.store["7"].boxes.tolist() == [[0, 0, 5, 5]]
    assert done.counts["boxes skipped: starts before pixel 1"] == 2
    assert "boxes skipped: negative size" not in done.counts


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"bbox": [0, 0, 1], "score": 1}, "record 1: the field 'bbox'"),
        ({"bbox": [0, 0, 1, "x"], "score": 1}, "record 1: the field 'bbox'"),
        ({"bbox": [0, 0, 1, 1]}, "record 1: the field 'score' is missing"),
        ({"bbox": [0, 0, 1, 1], "score": 1, "image_id": None}, "record 1: the field 'image_id' is None"),
        ({"bbox": [0, 0, 1, 1], "score": 1, "image_id": 1.5}, "record 1: the field 'image_id' is 1.5"),
        (
            {"bbox": [0, 0, -1, 1], "score": 1},
            "image '7': record 1 is [0.0, 0.0, -1.0, 1.0] (x1, y1, x2, y2): x2 is less",
        ),
        ({"bbox": [0, 0, 1, 1], "score": 1e60}, "image '7': record 1 has the score 1e+60: expected a finite number"),
        (3, "record 1: expected an object"),
    ],
)
def test_bad_records_of_coco_results(tmp_path, record, message):
    good = {"image_id": 7, "bbox": [0, 0, 1, 1], "score": 0.5}
    text = json.dumps([good, {"image_id": 7, **record} if isinstance(record, dict) else record, good])
    with pytest.raises(DataError) as error:
        converted(tmp_path, "a.json", text)
    assert message in str(error.value)
    good["image_id"] = 7.0  # as tables write it
    text = json.dumps([good, {"image_id": 7, **record} if isinstance(record, dict) else record, good])
    done = converted(tmp_path, "a.json", text, on_bad="skip")
    assert (len(done.store["7"].boxes), done.counts["boxes read"]) == (2, 3)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", "{", "not valid JSON"),
        ("a.json", '{"annotations": []}', "this is an annotation file; expected a result file"),
        ("a.json", "3", "expected a list of objects"),
        ("a.json", '[{"image_id": 1, "bbox": [0, 0, NaN, 1], "score": 1}]', "NaN is not a number in JSON"),
        ("a.csv", "", "holds no lines"),
        ("a.csv", "id,x1,y1,x2,y2\n", "line 1: expected the names image_id"),
        ("a.csv", "image_id,x1,y1,x2\n", "the column 'y2' is missing"),
        ("a.csv", "7;1;2;3;4\n", "line 1: expected the names image_id"),
        ("a.csv", b"7,1,2,3,4\n\xff,1,2,3,4\n", "byte 10 is not UTF-8"),
        ("a.csv", '7,1,2,3,4\n"7"x,1,2,3,4\n', "line 2: not a valid table"),
        ("a.npz", b"PK\x03\x04broken", "not a readable .npz file"),
        ("a.npz", b"hello", "not a readable .npz file"),
        ("a.npz", pickle.dumps([1]), "not a readable .npz file"),
        ("a.mat", b"hello", "not a readable .mat file"),
        ("a.mat", b"", "not a readable .mat file"),
        ("a.mat", b"MATLAB 7.3 MAT-file".ljust(124) + b"\x00\x02IM", "a MATLAB 7.3 file .HDF5.*-v7"),
        ("a.pkl", b"", "not a readable pickle"),
        ("a.pkl", b"hello", "not a readable pickle"),
        ("a.pkl", pickle.dumps([np.zeros((2, 4))])[:-30], "not a readable pickle"),
        ("a.pkl", pickle.dumps(3), "expected a list of arrays"),
        ("a.pkl", pickle.dumps({"ids": [1], "boxes": [], "scores": []}), "expected as many ids as boxes"),
        ("a.pkl", pickle.dumps({"ids": [1], "boxes": [[]]}), "'objectness_logits' must be a list"),
        ("a.pkl", pickle.dumps({"ids": [], "boxes": [], "scores": [], "bbox_mode": 4}), "bbox_mode is 4: expected 0"),
        ("a.xyz", "", "the suffix '.xyz' does not tell the format .* --format"),
    ],
)
def test_files_that_are_something_else(tmp_path, name, content, message):
    with pytest.raises((DataError, UsageError), match=message) as error:
        converted(tmp_path, name, content)
    assert str(tmp_path / name) in str(error.value)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out.safetensors").exists()


@pytest.mark.parametrize("name", [*WRITERS, "missing"])
def test_files_that_are_not_there(tmp_path, name):
    with pytest.raises((DataError, UsageError), match=r"no such file|does not tell the format"):
        convert(tmp_path / name, tmp_path / "out.safetensors")


def test_unknown_options_are_named(tmp_path):
    with pytest.raises(UsageError, match=r"format must be one of mat, .* got 'cocoo'; did you mean 'coco'"):
        convert(tmp_path / "a.json", tmp_path / "o.safetensors", format="cocoo")
    with pytest.raises(UsageError, match=r"boxes must be one of xyxy, .* got 'xyyx'"):
        convert(tmp_path / "a.json", tmp_path / "o.safetensors", boxes="xyyx")


def test_entries_that_are_no_boxes(tmp_path):
    entries = {
        "a.jpg": np.zeros((2, 3)),
        "b.jpg": {"boxes": 1},
        "c.jpg": np.array(["x"]),
        "d.jpg": [[1, 2], [3]],
        "e.jpg": None,
    }
    good = {"f.jpg": np.array([[1, 2, 3, 4]])}
    for name, message in zip(entries, [r"shape \[2, 3\]", "'bboxes'", "", "unequal", ""], strict=True):
        with pytest.raises(DataError, match=rf"image '{name}': expected .*{message}"):
            converted(tmp_path, "a.pkl", pickle.dumps({name: entries[name]}))
    done = converted(tmp_path, "a.pkl", pickle.dumps({**entries, **good}), on_bad="skip")
    assert list(done.store) == ["f"]
    assert done.counts["images skipped: not boxes"] == 5
    assert done.counts["images read"] == 6


def test_an_image_whose_name_is_no_utf8_text(tmp_path):
    with pytest.raises(DataError, match=r"an image id must be text \(UTF-8\)"):
        converted(tmp_path, "a.pkl", pickle.dumps({"caf\udce9.jpg": np.ones((3, 4))}))


def test_images_that_are_there_twice(tmp_path):
    content = pickle.dumps({"x/a.jpg": np.zeros((1, 4)), "y/a.jpg": np.ones((3, 4))})
    with pytest.raises(DataError, match=r"image 'y/a\.jpg': there twice \(as the id 'a'\)"):
        converted(tmp_path, "a.pkl", content)
    done = converted(tmp_path, "a.pkl", content, on_bad="skip")
    assert len(done.store["a"].boxes) == 1
    assert done.counts["boxes skipped: image skipped"] == 3
    assert done.counts["images skipped: there twice"] == 1


def test_npz_files_with_other_content(tmp_path):
    path = tmp_path / "a.npz"
    np.savez(path, a=np.zeros((1, 4)), b=np.array([None, 1], dtype=object))
    with pytest.raises(DataError, match=r"a\.npz: the array 'b' cannot be read .*allow_pickle"):
        convert(path, tmp_path / "o.safetensors")
    np.savez_compressed(path, a=np.arange(4000.0).reshape(-1, 4))
    content = bytearray(path.read_bytes())
    content[300] ^= 255
    path.write_bytes(content)
    with pytest.raises(DataError, match="the array 'a' cannot be read"):
        convert(path, tmp_path / "o.safetensors")
    np.save(tmp_path / "a.npy", np.zeros((1, 4)))
    with pytest.raises(DataError, match="holds a single array"):
        convert(tmp_path / "a.npy", tmp_path / "o.safetensors", format="numpy")


def test_mat_files_without_boxes_or_names(tmp_path):
    savemat(tmp_path / "a.mat", {"rois": np.zeros((1, 4)), "other": 3})
    with pytest.raises(DataError, match="expected the variable 'boxes' or 'all_boxes', found other, rois"):
        convert(tmp_path / "a.mat", tmp_path / "o.safetensors")
    savemat(tmp_path / "a.mat", {"boxes": cells([np.zeros((1, 4))] * 2), "images": cells([np.array(["a"])])})
    with pytest.raises(DataError, match="holds 2 boxes cells, but 1 names"):
        convert(tmp_path / "a.mat", tmp_path / "o.safetensors")
    savemat(tmp_path / "a.mat", {"boxes": cells([np.zeros((1, 4))]), "images": cells([np.zeros((2, 2))])})
    with pytest.raises(DataError, match=r"images \{1\} must be the name of an image"):
        convert(tmp_path / "a.mat", tmp_path / "o.safetensors")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"images": [{"id": None}]}, r"images\[0\]: field id must be a whole number or text, got None"),
        ({"images": [{"id": 1}, {"id": 1}]}, "image id 1 is there twice"),
        (
            {"images": [{"id": 1, "height": 0, "width": 5}]},
            "image id 1 .None.: field height must be .* above 0, got 0",
        ),
        ({"images": 3}, "images must be a list of objects, got 3"),
        ([], "expected an object"),
    ],
)
def test_bad_lists_of_images(tmp_path, content, message):
    (tmp_path / "i.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match=message):
        converted(tmp_path, "a.csv", "1,2,3,4,5\n", images=tmp_path / "i.json")
    with pytest.raises(DataError, match="no such file"):
        converted(tmp_path, "a.csv", "1,2,3,4,5\n", images=tmp_path / "none.txt")


class Malicious:
    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


class Mode(IntEnum):
    CORNERS = 0


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_malicious_pickle_runs_nothing(tmp_path, protocol):
    marker = tmp_path / "marker"
    evil = Malicious(os.system, f"touch {marker}")
    pickle.loads(pickle.dumps(evil, protocol))  # it works
    assert marker.exists()
    marker.unlink()
    for content in [evil, [np.zeros((1, 4)), evil], {"ids": evil}, {"a": [{"b": (evil,)}]}]:
        with pytest.raises(
            DataError, match=r"refused, since this pickle holds (posix|nt|os)\.system; only numpy arrays"
        ):
            converted(tmp_path, "a.pkl", pickle.dumps(content, protocol))
        assert not marker.exists()


@pytest.mark.parametrize(
    ("content", "name"),
    [
        (Malicious(eval, "1"), "eval"),
        (Malicious(getattr, "x", "y"), "getattr"),
        (Malicious(np.load, "x"), "numpy"),
        (Mode.CORNERS, "test_converters.Mode"),
        (torch.zeros(2, 4), "torch.* save tensors as numpy arrays"),
        (np.zeros(2, dtype=[("a", "f4")]), "an array of the type 'V4'"),
        (np.zeros(2, dtype="datetime64[s]"), "an array of the type 'M8'"),
        (np.matrix([[1]]), "numpy.*matrix"),
        (print, "print"),
        (np.dtype("f4"), "a type or function in the place of a value"),
        (Malicious(bytearray, 10**15), "a call of bytearray"),
    ],
)
def test_other_content_is_refused_by_name(tmp_path, content, name):
    (tmp_path / "a.pkl").write_bytes(pickle.dumps(content, 4))
    with pytest.raises(DataError, match=rf"a\.pkl: refused, since this pickle holds .*{name}"):
        load_plain_pickle(tmp_path / "a.pkl")


def hand_made(opcodes: bytes) -> bytes:
    return b"\x80\x02" + opcodes + b"."


@pytest.mark.parametrize(
    "content",
    [
        hand_made(b"cnumpy.core.multiarray\n_reconstruct\n}X\x08\x00\x00\x00__call__K\x01sb"),  # change a function
        hand_made(b"cnumpy.core.multiarray\n_reconstruct\nN}X\x06\x00\x00\x00_buildK\x01s\x86b"),  # and its slots
        hand_made(b"cnumpy\nndarray\nK\x05\x85R"),  # numpy.ndarray(5)
        hand_made(b"cnumpy\nndarray\n)\x81"),  # numpy.ndarray.__new__
        hand_made(b"cbuiltins\n__import__\nX\x02\x00\x00\x00os\x85R"),
        hand_made(b"X\x01\x00\x00\x00aQ"),  # a persistent id
        hand_made(b"c_codecs\nencode\nX\x01\x00\x00\x00aX\x03\x00\x00\x00hex\x86R"),
    ],
)
def test_hand_made_pickles_change_and_call_nothing(tmp_path, content):
    path = tmp_path / "a.pkl"
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"a\.pkl: (refused|not a readable pickle)"):
        load_plain_pickle(path)
    path.write_bytes(pickle.dumps(np.arange(3)))
    assert load_plain_pickle(path).tolist() == [0, 1, 2]  # the reader itself is as before


class Forged:
    def __init__(self, shape, kind, content):
        function, arguments, state = np.zeros(2, dtype=kind).__reduce__()
        self.parts = function, arguments, (state[0], shape, state[2], state[3], content)

    def __reduce__(self):
        return self.parts


@pytest.mark.parametrize(
    "content",
    [
        Forged((10**12,), "f8", b"\0" * 16),
        Forged((2,), "f8", b"\0" * 15),
        Forged((-1,), "f8", b""),
        Forged((2**40, 2**40), "f8", b""),
        Forged("x", "f8", b""),
        Forged((2,), object, b"\0" * 16),
        Forged((2, 2), object, [1, 2, 3, 4]),
        Forged((2,), "f8", [1, 2]),
    ],
)
def test_forged_arrays_are_refused(tmp_path, content):
    (tmp_path / "a.pkl").write_bytes(pickle.dumps(content, 2))
    with pytest.raises(DataError, match=r"not a readable pickle .ValueError: an array"):
        load_plain_pickle(tmp_path / "a.pkl")


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_plain_pickles_come_back(tmp_path, protocol):
    content = {
        "c": np.arange(12.0).reshape(3, 4),
        "fortran": np.asfortranarray(np.arange(6, dtype=">f4").reshape(2, 3)),
        "text": np.array(["x", "yé"]),
        "empty": np.zeros((0, 4), dtype=np.float32),
        "numbers": [np.float32(3), np.int64(-4), np.bool_(True), np.str_("é"), 2**70, 1.5, True, None, 1j],
        "bytes": [b"", b"\xff\x00", bytearray(b"\x80")],
        "sets": ({1, 2}, frozenset("a")),
        "ordered": OrderedDict(a=1),
    }
    (tmp_path / "a.pkl").write_bytes(pickle.dumps(content, protocol))
    found = load_plain_pickle(tmp_path / "a.pkl")
    assert list(found) == list(content)
    for name in ("c", "fortran", "text", "empty"):
        np.testing.assert_array_equal(found[name], content[name])
        assert found[name].dtype == content[name].dtype.newbyteorder("=") or protocol == 5
    assert {name: found[name] for name in ("numbers", "bytes", "sets", "ordered")} == {
        name: content[name] for name in ("numbers", "bytes", "sets", "ordered")
    }
    objects = np.array([np.zeros((1, 4)), "a", None], dtype=object)
    (tmp_path / "a.pkl").write_bytes(pickle.dumps(objects, protocol))
    first, *rest = load_plain_pickle(tmp_path / "a.pkl")
    assert first.shape == (1, 4)
    assert rest == ["a", None]


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_damaged_pickles_are_data_errors(tmp_path_factory, data):
    content = bytearray(
        pickle.dumps([np.arange(8.0).reshape(2, 4), {"a": [1, (2, "x")]}], data.draw(st.integers(0, 5)))
    )
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.mktemp("pickles") / "a.pkl"
    path.write_bytes(content)
    with contextlib.suppress(DataError):  # a byte may be changed without harm; any other exception fails the test
        load_plain_pickle(path)


def test_real_results_fit_their_images(shared_data, tmp_path):
    folder = shared_data / "golden_eval" / "coco"
    annotated = folder / "instances_val2014_100.json"
    done = convert(
        folder / "instances_val2014_fakebbox100_results.json", tmp_path / "out.safetensors", images=annotated
    )
    assert (done.counts["images written"], done.counts["boxes written"]) == (99, 734)
    images = {
        str(image["id"]): (image["height"], image["width"]) for image in json.loads(annotated.read_text())["images"]
    }
    sizes = [images[name] for name in done.store]
    assert done.store.check(list(done.store), sizes) == []
    half = [(height // 2, width // 2) for height, width in sizes]
    assert len(done.store.check(list(done.store), half)) == 2

"""The whole file decoded at once, and record by record: the same records, the same words for a fault."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets.builders import coco_content
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from detpipe.support import coco_file
from detpipe.support.coco_file import COCOFile, read_coco_file, read_coco_images
from detpipe.support.errors import DataError

Content = dict[str, Any]


def full_content() -> Content:
    """As `coco_content`, with all that COCO's files have besides."""
    content = coco_content()
    for image in content["images"]:
        image |= {"license": 3, "coco_url": "http://x.org/a.jpg", "date_captured": "2013-11-14 11:18:45"}
    for b, annotation in enumerate(content["annotations"]):
        runs = {"counts": [3, 5, 2392], "size": [40, 60]}
        annotation["segmentation"] = runs if b == 1 else [[1.5, 2, 11, 2, 11, 22.25], [1, 2, 3, 4, 5, 6]]
    content["info"] = {"description": "a: b", "contributors": [{"name": "x"}]}
    content["licenses"] = [{"url": "http://y.org", "id": 3, "name": 'a "quoted": name'}]
    return content


def outcome(read: Callable[[], COCOFile]) -> Any:
    try:
        file = read()
    except DataError as error:
        return str(error)
    return {field.name: getattr(file, field.name) for field in fields(file)}


def agree(path: Path) -> Any:
    """Compare both ways to read a file."""
    quick, strict = (outcome(lambda s=strict: read_coco_file(path, strict=s)) for strict in (False, True))
    np.testing.assert_equal(quick, strict)
    return quick


def edit(part: str, row: int, **changes: Any) -> Callable[[Content], Any]:
    return lambda content: content[part][row].update(changes)


SOUND: dict[str, Callable[[Content], Any]] = {
    "as it is": lambda c: None,
    "no optional field": lambda c: [[a.pop(k) for k in ("area", "iscrowd", "segmentation")] for a in c["annotations"]],
    "fields that only some have": lambda c: [a.pop("area") for a in c["annotations"][:2]],
    "no area in the last": lambda c: c["annotations"][-1].pop("area"),
    "flags of both kinds": lambda c: c["annotations"][1].update(iscrowd=True, difficult=1),
    "attributes": lambda c: [a.update(attributes={"occluded": False, "a:b": ["{"]}) for a in c["annotations"]],
    "other fields": lambda c: [a.update({"other": None, "1 2": "x:y", "é": {}}) for a in c["annotations"]],
    "colons in names": edit("images", 0, file_name="a:b.jpg"),
    "a name beyond ASCII": edit("images", 0, file_name="ä/ö\u2028🙂.jpg"),
    "whole numbers for floats": edit("annotations", 0, bbox=[1, 2**53 + 1, 3, 10**25], area=2**60),
    "negative ids": lambda c: (edit("images", 2, id=-(2**63))(c), edit("annotations", 0, id=2**63 - 1)(c)),
    "a box outside": edit("annotations", 1, bbox=[500, 5, 1e300, 9]),
    "no boxes": lambda c: c["annotations"].clear(),
    "an image missing": edit("images", 1, file_name="gone.jpg"),
    "a name that leads out": edit("images", 1, file_name="../x.jpg"),
}


def test_sound_files_are_not_read_record_by_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.json"
    each = coco_file._decode_each
    for name, change in SOUND.items():
        content = full_content()
        change(content)
        for start, spaces, ascii_only in ((b"", None, True), (b"\xef\xbb\xbf", 1, False)):
            path.write_bytes(start + json.dumps(content, indent=spaces, ensure_ascii=ascii_only).encode())
            found = agree(path)
            assert isinstance(found, dict), (name, found)
            with monkeypatch.context() as patch:
                patch.setattr(coco_file, "_decode_each", None)
                np.testing.assert_equal(outcome(lambda: read_coco_file(path)), found)
    assert coco_file._decode_each is each


TWICE = {  # of what is read: what is replaced, and by what
    "a field": ('"category_id": 7', '"category_id": 7, "category_id": 1'),
    "far apart": ('"category_id": 7', '"area": 9, "category_id": 7'),
    "of an optional field": ('"iscrowd": 0', '"iscrowd": 0, "iscrowd": 0'),
    "of an image": ('"width": 60', '"width": 60, "width": 60'),
    "of a category": ('"name": "dog"', '"name": "dog", "name": "dog"'),
    "with a space": ('"category_id": 7', '"category_id": 7, "category_id" \n: 1'),
    "at the top": ('"images": [', '"images": [], "images": ['),
}
TWICE_UNREAD = {
    "of a field": ('"license": 3', '"license": 3, "license": 4'),
    "of run lengths": ('"counts": [', '"counts": [], "counts": ['),
    "at the top": ('"info": {', '"info": {}, "info": {'),
    "further down": ('"contributors": [', '"contributors": [{"a": 1, "a": 2}, '),
}


@pytest.mark.parametrize("strict", [False, True])
def test_a_key_that_is_there_twice_is_found(tmp_path: Path, strict: bool) -> None:
    path = tmp_path / "a.json"
    for old, new in [*TWICE.values(), *(TWICE_UNREAD.values() if strict else ())]:
        text = json.dumps(full_content())
        assert old in text
        path.write_text(text.replace(old, new, 1))
        with pytest.raises(DataError, match="is written twice"):
            read_coco_file(path, strict=strict)


def test_outlines_are_read_as_they_are_written(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    content = full_content()
    content["annotations"][0]["segmentation"] = [[1.5, 2e0, 3, 4, 5, 6]]
    del content["annotations"][2]["segmentation"]
    for change in (None, edit("annotations", 3, id=True)):  # the second file is read record by record
        if change:
            change(content)
        path.write_text(json.dumps(content))
        found = read_coco_file(path, segmentations=True).boxes["segmentation"]
        assert [json.loads(bytes(one)) if one else None for one in found] == [
            one.get("segmentation") for one in content["annotations"] if one["id"] is not True
        ]
    path.write_text(json.dumps(full_content()).replace('"segmentation": [', '"segmentation": [], "segmentation": [', 1))
    with pytest.raises(DataError, match="'segmentation' of the object with id 100 is written twice"):
        read_coco_file(path, segmentations=True)


IDS: dict[str, tuple[Callable[[Content], Any], Any]] = {  # of images and categories, as they are read
    "numbers as text": (lambda c: _rename(c, str), ([10, 11, 12], (1, 7, 90))),
    "whole floats": (lambda c: _rename(c, float), ([10, 11, 12], (1, 7, 90))),
    "text": (lambda c: _rename(c, "id-{}".format), ([1, 2, 3], (1, 2, 3))),
    "leading zeros": (lambda c: _rename(c, "00{}".format), ([1, 2, 3], (1, 2, 3))),
    "of some": (lambda c: [one.update(image_id="10") for one in c["annotations"] if one["image_id"] == 10], None),
}


def _rename(content: Content, change: Callable[[int], Any]) -> None:
    for part in ("images", "annotations", "categories"):
        for record in content[part]:
            record.update(
                {key: change(value) for key, value in record.items() if key in ("id", "image_id", "category_id")}
            )


@pytest.mark.parametrize("kind", IDS)
def test_ids_of_any_kind_name_the_same_boxes(tmp_path: Path, kind: str, caplog: pytest.LogCaptureFixture) -> None:
    path, content = tmp_path / "a.json", coco_content()
    path.write_text(json.dumps(content))
    plain = read_coco_file(path)
    change, ids = IDS[kind]
    change(content)
    path.write_text(json.dumps(content))
    found = agree(path)
    assert not found["faults"]
    assert (found["image_ids"].tolist(), found["category_ids"]) == (ids or ([10, 11, 12], (1, 7, 90)))
    assert found["box_image"].tolist() == plain.box_image.tolist()
    names = [[one["categories"]["name"][label - 1] for label in one["labels"]] for one in (vars(plain), found)]
    assert names[0] == names[1]
    assert ("the ids of images are text" in caplog.text) == (kind in ("text", "leading zeros"))


ROOT = {"id": 0, "name": "things", "supercategory": "none"}
CLASSES = [{"id": 1, "name": "cat", "supercategory": "things"}, {"id": 7, "name": "dog", "supercategory": "things"}]


@pytest.mark.parametrize(
    ("categories", "label", "kept"),
    [
        ([ROOT, *CLASSES], 1, (1, 7)),
        ([*CLASSES, {"id": 99, "name": "things"}], 1, (1, 7)),
        ([ROOT, *CLASSES], 0, (0, 1, 7)),  # it has a box
        ([ROOT, *CLASSES, {"id": 9, "name": "sky", "supercategory": "none"}], 1, (0, 1, 7, 9)),
        ([{**ROOT, "supercategory": "things"}, *CLASSES], 1, (0, 1, 7)),
        ([ROOT], 0, (0,)),
        ([{**one, "supercategory": "none"} for one in CLASSES], 1, (1, 7)),
    ],
)
def test_a_root_category_is_no_class(tmp_path: Path, categories: list[Any], label: int, kept: tuple[int, ...]) -> None:
    content = coco_content() | {"categories": categories}
    for annotation in content["annotations"]:
        annotation["category_id"] = label
    (tmp_path / "a.json").write_text(json.dumps(content))
    found = read_coco_file(tmp_path / "a.json")
    assert found.category_ids == kept
    assert (found.counts == {}) == (len(kept) == len(categories))


def test_a_list_of_images_alone(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text('{"images": [{"id": "x", "width": 64.0}, {"id": 4, "file_name": "b.jpg"}]}')
    columns, ids = read_coco_images(path)
    assert (columns["id"], ids.tolist(), columns["width"][0]) == (["x", 4], [1, 2], 64)
    path.write_text('{"images": [{"id": 4}, {"id": 4}, {"id": null}]}')
    with pytest.raises(DataError, match=r"a\.json: image id 4 is there twice"):
        read_coco_images(path)


FAULTS: dict[str, tuple[bytes, bytes]] = {
    "NaN": (b"[1.5, 2,", b"[NaN, 2,"),
    "NaN in a box": (b"[30.5,", b"[NaN,"),
    "infinity": (b'"license": 3', b'"license": -Infinity'),
    "beyond floats, whole": (b"[30.5,", b"[" + b"9" * 400 + b","),
    "not UTF-8": (b"http://x.org", b"http://\xff.org"),
    "not UTF-8 in a name": (b'"0.jpg"', b'"\xff.jpg"'),
    "a control character": (b"http://x.org", b"a\nb"),
    "an empty name": (b'"0.jpg"', b'""'),
    "a flag of 2": (b'"iscrowd": 0', b'"iscrowd": 2'),
    "null": (b'"image_id": 10', b'"image_id": null'),
    "a negative area": (b'"area": 50', b'"area": -1e-9'),
    "a huge area": (b'"area": 50', b'"area": 9223372036854775808'),
    "a true id": (b'"id": 100', b'"id": true'),
    "an id of 70 bits": (b'"id": 100', b'"id": 1180591620717411303424'),
    "an id twice": (b'"id": 100', b'"id": 101'),
    "an image id twice": (b'"id": 12,', b'"id": 11,'),
    "a category id twice": (b'"id": 7,', b'"id": 1,'),
    "a category name twice": (b'"name": "dog"', b'"name": "owl"'),
    "an unknown image": (b'"image_id": 10', b'"image_id": 13'),
    "an unknown category": (b'"category_id": 7', b'"category_id": 8'),
    "an unknown category beyond all": (b'"category_id": 7', b'"category_id": 99'),
    "no width": (b'"width": 60', b'"width": 0'),
    "a wide image": (b'"width": 60', b'"width": 2147483648'),
    "three numbers": (b"[1, 2, 10, 20]", b"[1, 2, 10]"),
    "five numbers": (b"[1, 2, 10, 20]", b"[1, 2, 10, 20, 30]"),
    "no numbers": (b"[1, 2, 10, 20]", b'[1, 2, 10, "20"]'),
    "a true number": (b"[1, 2, 10, 20]", b"[1, 2, 10, true]"),
    "no images": (b'"images": [', b'"pictures": ['),
    "images of another kind": (b'"images": [', b'"images": {}, "pictures": ['),
    "an image of another kind": (b'"images": [', b'"images": [5, '),
    "an annotation of another kind": (b'"annotations": [', b'"annotations": [[], '),
    "categories of another kind": (b'"categories": [', b'"categories": [null, '),
    "no categories": (b'"categories": [', b'"categories": [], "others": ['),
    "more at the end": (b'name"}]}', b'name"}]} x'),
    "nested deeply": (b"[1.5, 2,", b"[1.5, " + b"[" * 100_000 + b"]" * 100_000 + b","),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_both_ways_say_the_same_of_a_fault(tmp_path: Path, fault: str) -> None:
    data = json.dumps(full_content()).encode()
    old, new = FAULTS[fault]
    assert old in data
    (tmp_path / "a.json").write_bytes(data.replace(old, new, 1))
    found = agree(tmp_path / "a.json")
    assert isinstance(found, str) or found["faults"], found


TOKENS = [
    *[b"{", b"}", b"[", b"]", b",", b":", b'"', b"\\", b"\n", b"-", b"0", b"1e5", b".5", b"NaN", b"null", b"true"],
    *[b"\xff", b"\xc3\xa9", b"\\u003a", b"\\ud83d", b' "id": 7,', b'"x": {"a": 1},', b'"bbox": [1, 2, 3, 4],', b"\x00"],
]
damage = st.one_of(
    st.tuples(st.just("insert"), st.integers(0, 2000), st.sampled_from(TOKENS)),
    st.tuples(st.just("delete"), st.integers(0, 2000), st.integers(1, 30)),
    st.tuples(st.just("copy"), st.integers(0, 2000), st.integers(1, 60)),
    st.tuples(st.just("cut"), st.integers(0, 2000), st.none()),
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(damage, min_size=1, max_size=3))
@example([("insert", 0, b" ")])
def test_both_ways_agree_on_files_that_were_damaged_at_random(
    tmp_path: Path, damages: list[tuple[str, int, Any]]
) -> None:
    path = tmp_path / "a.json"
    data = json.dumps(full_content()).encode()
    for kind, place, what in damages:
        at = place % (len(data) + 1)
        if kind == "insert":
            data = data[:at] + what + data[at:]
        elif kind == "cut":
            data = data[:at]
        else:
            data = data[:at] + (data[at : at + what] * 2 if kind == "copy" else b"") + data[at + what :]
    path.write_bytes(data)
    quick, strict = (outcome(lambda s=strict: read_coco_file(path, strict=s)) for strict in (False, True))
    if not (isinstance(strict, str) and "is written twice" in strict):  # perhaps in what is not read
        np.testing.assert_equal(quick, strict)


VALUES = st.sampled_from(
    [
        *[None, True, False, 0, 1, 2, -1, 7, 10, 90, 100, 2**31, 2**63, 2**70, 0.0, 0.5, 1.0, -3.5, 1e300],
        *["", "x", "a:b", "0.jpg", [], {}, {"counts": [1], "size": [2, 3]}],
        *[[1, 2, 3, 4], [1, 2, 3.5, 4], [1, 2, 3], [0, 0, -1, 5], [100, 0, 5, 5]],
    ]
)
BOX_FIELDS = ["id", "image_id", "category_id", "bbox", "iscrowd", "difficult", "area"]
FIELDS = [*BOX_FIELDS, "file_name", "height", "width", "name", "supercategory", "x"]
changes = st.tuples(
    st.sampled_from(["images", "annotations", "categories"]),
    st.integers(0, 3),
    st.sampled_from(FIELDS),
    st.one_of(VALUES, st.just(...)),
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(changes, min_size=1, max_size=4))
def test_both_ways_agree_on_fields_of_any_value(tmp_path: Path, edits: list[tuple[str, int, str, Any]]) -> None:
    content = copy.deepcopy(full_content())
    for part, row, field, value in edits:
        record = content[part][row % len(content[part])]
        if value is ...:
            record.pop(field, None)
        else:
            record[field] = value
    (tmp_path / "a.json").write_text(json.dumps(content))
    agree(tmp_path / "a.json")

"""The quick reader and the strict one must never disagree: the same annotations, or the same words about the same fault."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from detpipe.datasets.formats.coco_quick import sound_records
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from detpipe.datasets import load_coco
from detpipe.datasets.faults import Collected
from detpipe.datasets.formats import coco_json
from detpipe.support.errors import DataError
from detpipe.types import Annotations

from ..builders import coco_content, write_coco

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


def outcome(read: Callable[[], Annotations]) -> Any:
    try:
        a = read()
    except DataError as error:
        return str(error)
    return {field.name: getattr(a, field.name) for field in fields(a)}


def agree(path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compare both ways to read a file, under every policy."""
    for policy in ("error", "skip", None):
        collected = [Collected(decode=False), Collected(decode=False)]
        quick = outcome(lambda p=policy, c=collected: load_coco(path, folder, p or c[0]))
        with monkeypatch.context() as patch:
            patch.setattr(coco_json, "sound_records", lambda *_: None)
            strict = outcome(lambda p=policy, c=collected: load_coco(path, folder, p or c[1]))
        np.testing.assert_equal(quick, strict)
        assert collected[0] == collected[1]
        if isinstance(quick, dict):
            assert {k: v.dtype for k, v in quick.items() if isinstance(v, np.ndarray)} == {
                k: v.dtype for k, v in strict.items() if isinstance(v, np.ndarray)
            }


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


@pytest.mark.parametrize("spaces", [None, 1], ids=["one line", "many lines"])
@pytest.mark.parametrize("ascii_only", [True, False])
@pytest.mark.parametrize("change", SOUND)
def test_sound_files_are_read_quickly(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str, ascii_only: bool, spaces: int | None
) -> None:
    content = full_content()
    SOUND[change](content)
    path, folder = write_coco(tmp_path)
    data = json.dumps(content, indent=spaces, ensure_ascii=ascii_only).encode()
    for start in (b"", b"\xef\xbb\xbf"):
        path.write_bytes(start + data)
        assert sound_records(path, path.parent) is not None
        agree(path, folder, monkeypatch)


TWICE = {  # what is replaced, and by what
    "a field that is read": ('"category_id": 7', '"category_id": 7, "category_id": 1'),
    "far apart": ('"category_id": 7', '"area": 9, "category_id": 7'),
    "of an optional field": ('"iscrowd": 0', '"iscrowd": 0, "iscrowd": 0'),
    "of an image": ('"width": 60', '"width": 60, "width": 60'),
    "of a category": ('"name": "dog"', '"name": "dog", "name": "dog"'),
    "written in another way": ('"category_id": 7', '"category_id": 7, "categor\\u0079_id": 1'),
    "with a space": ('"category_id": 7', '"category_id": 7, "category_id" \n: 1'),
    "of a field that is not read": ('"license": 3', '"license": 3, "license": 4'),
    "of a field that the first lacks": ('"category_id": 1', '"category_id": 1, "x": 3, "x": 4'),
    "of polygons": ('"segmentation": [', '"segmentation": [], "segmentation": ['),
    "of run lengths": ('"counts": [', '"counts": [], "counts": ['),
    "at the top": ('"images": [', '"images": [], "images": ['),
    "at the top, not read": ('"info": {', '"info": {}, "info": {'),
    "in what is not read": ('"contributors": [', '"contributors": [{"a": 1, "a": 2}, '),
    "hidden behind a colon in a name": ('"0.jpg"', '"0\\u003a.jpg", "height": 40'),
    "of a key with a colon": ('"license": 3', '"a:b": 3, "a:b": 4'),
}


@pytest.mark.parametrize("where", TWICE)
def test_a_key_that_is_there_twice_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    path, folder = write_coco(tmp_path)
    text = json.dumps(full_content())
    old, new = TWICE[where]
    assert old in text
    path.write_text(text.replace(old, new, 1))
    assert sound_records(path, path.parent) is None
    agree(path, folder, monkeypatch)
    with pytest.raises(DataError, match="is written twice"):
        load_coco(path, folder)


FAULTS: dict[str, tuple[bytes, bytes]] = {
    "NaN": (b"[1.5, 2,", b"[NaN, 2,"),
    "NaN in a box": (b"[30.5,", b"[NaN,"),
    "infinity": (b'"license": 3', b'"license": -Infinity'),
    "beyond floats": (b"[30.5,", b"[1e999,"),
    "beyond floats, whole": (b"[30.5,", b"[" + b"9" * 400 + b","),
    "not UTF-8": (b"http://x.org", b"http://\xff.org"),
    "not UTF-8 in a name": (b'"0.jpg"', b'"\xff.jpg"'),
    "half of a pair": (b'"0.jpg"', b'"\\ud800.jpg"'),
    "half of a pair, not read": (b"http://x.org", b"\\udc00"),
    "a control character": (b"http://x.org", b"a\nb"),
    "too many digits": (b"[1.5, 2,", b"[1.5, " + b"2" * 4301 + b","),
    "digits enough": (b"[1.5, 2,", b"[1.5, " + b"2" * 4300 + b","),
    "too many digits at the top": (b'"info": {', b'"extra": ' + b"2" * 9000 + b', "info": {'),
    "a NUL at the end of a name": (b'"0.jpg"', b'"0.jpg\\u0000"'),
    "an empty name": (b'"0.jpg"', b'""'),
    "a whole number as a float": (b'"category_id": 7', b'"category_id": 7.0'),
    "a flag as a float": (b'"iscrowd": 0', b'"iscrowd": 0.0'),
    "a flag of 2": (b'"iscrowd": 0', b'"iscrowd": 2'),
    "null": (b'"area": 50', b'"area": null'),
    "a negative area": (b'"area": 50', b'"area": -1e-9'),
    "a huge area": (b'"area": 50', b'"area": 9223372036854775808'),
    "a true id": (b'"id": 100', b'"id": true'),
    "a text id": (b'"id": 100', b'"id": "100"'),
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
def test_both_readers_say_the_same_of_a_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    path, folder = write_coco(tmp_path)
    data = json.dumps(full_content()).encode()
    old, new = FAULTS[fault]
    assert old in data
    path.write_bytes(data.replace(old, new, 1))
    if fault not in ("half of a pair, not read", "digits enough"):  # sound, but proven by the strict reader only
        assert sound_records(path, path.parent) is None
    agree(path, folder, monkeypatch)


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


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(damage, min_size=1, max_size=3))
@example([("insert", 0, b" ")])
def test_both_readers_agree_on_files_that_were_damaged_at_random(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damages: list[tuple[str, int, Any]]
) -> None:
    path, folder = (
        write_coco(tmp_path) if not (tmp_path / "train").exists() else (tmp_path / "a.json", tmp_path / "train")
    )
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
    agree(path, folder, monkeypatch)


VALUES = st.sampled_from(
    [
        *[None, True, False, 0, 1, 2, -1, 7, 10, 90, 100, 2**31, 2**63, 2**70, 0.0, 0.5, 1.0, -3.5, 1e300],
        *["", "x", "a:b", "0.jpg", [], {}, {"counts": [1], "size": [2, 3]}],
        *[[1, 2, 3, 4], [1, 2, 3.5, 4], [1, 2, 3], [0, 0, -1, 5], [100, 0, 5, 5]],
    ]
)
FIELDS = [
    "id",
    "image_id",
    "category_id",
    "bbox",
    "iscrowd",
    "difficult",
    "area",
    "file_name",
    "height",
    "width",
    "name",
    "x",
]
changes = st.tuples(
    st.sampled_from(["images", "annotations", "categories"]),
    st.integers(0, 3),
    st.sampled_from(FIELDS),
    st.one_of(VALUES, st.just(...)),
)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(changes, min_size=1, max_size=4))
def test_both_readers_agree_on_fields_of_any_value(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, edits: list[tuple[str, int, str, Any]]
) -> None:
    path, folder = (
        write_coco(tmp_path) if not (tmp_path / "train").exists() else (tmp_path / "a.json", tmp_path / "train")
    )
    content = copy.deepcopy(full_content())
    for part, row, field, value in edits:
        record = content[part][row % len(content[part])]
        if value is ...:
            record.pop(field, None)
        else:
            record[field] = value
    path.write_text(json.dumps(content))
    agree(path, folder, monkeypatch)

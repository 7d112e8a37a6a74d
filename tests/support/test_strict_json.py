from __future__ import annotations

import subprocess
import sys

import pytest

from detpipe.support.errors import DataError
from detpipe.support.strict_json import load_json, require, require_numbers, shorten


def test_sound_json_is_read(tmp_path):
    file = tmp_path / "data.json"
    file.write_bytes(b'\xef\xbb\xbf{"a": [1, 2.5, "NaN", null], "b": {"c": true}}')
    assert load_json(file) == load_json(str(file)) == {"a": [1, 2.5, "NaN", None], "b": {"c": True}}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{\n"a": [1, 2,\n 3', "line 3 column 3: not valid JSON .*cut off"),
        ("", "line 1 column 1: not valid JSON"),
        ('{"a": "NaN \\" NaN",\n "b": NaN}', "line 2 column 7: NaN is not a number"),
        ('[1, Infinity, "Infinity"]', "line 1 column 5: Infinity is not a number"),
        ("[-Infinity]", "line 1 column 2: -Infinity is not a number"),
        ('{"id": 7, "a": 1, "a": 2}', "the key 'a' of the object with id 7 is written twice, the second time as 2"),
        ('{"id": 7, "id": 8}', "the key 'id' is written twice"),
        ('[{"x": {"a": 1, "a": 1}}]', "the key 'a' is written twice"),
        ("[" * 200_000, "nested too deeply"),
        ("1" * 5000, "[Ee]xceeds the limit"),
    ],
)
def test_a_fault_is_one_line_with_its_place(tmp_path, text, message):
    file = tmp_path / "data.json"
    file.write_text(text)
    with pytest.raises(DataError, match=rf"data\.json: .*{message}") as error:
        load_json(file)
    assert "\n" not in str(error.value)


def test_a_file_cut_in_half_names_line_and_column(tmp_path):
    file = tmp_path / "data.json"
    file.write_text('{"images": [\n{"id": 1},\n{"id": 2}]}'[:28])
    with pytest.raises(DataError, match=r"line 3 column \d+"):
        load_json(file)


def test_what_is_not_a_text_file_is_named(tmp_path):
    with pytest.raises(DataError, match=r"nowhere\.json: no such file"):
        load_json(tmp_path / "nowhere.json")
    with pytest.raises(DataError, match="is a folder"):
        load_json(tmp_path)
    (tmp_path / "picture.json").write_bytes(b"\xff\xd8\xff\xe0")
    with pytest.raises(DataError, match=r"picture\.json: byte 0 is not UTF-8"):
        load_json(tmp_path / "picture.json")


@pytest.mark.parametrize(
    ("kind", "value"), [(int, 3), (int, 2**63 - 1), (float, 0.5), (str, "x"), (list, [1]), (dict, {"a": 1})]
)
def test_a_field_of_the_right_kind_is_returned(kind, value):
    assert require({"f": value}, "f", kind, "here") == value


def test_a_whole_number_is_a_float_too():
    value = require({"f": 3}, "f", float, "here")
    assert (type(value), value) == (float, 3.0)


@pytest.mark.parametrize(
    ("kind", "value", "expected"),
    [
        (int, True, "a whole number"),
        (int, 1.0, "a whole number"),
        (int, 2**63, "a whole number"),
        (float, True, "a finite number"),
        (float, float("inf"), "a finite number"),
        (float, 10**400, "a finite number"),
        (str, 1, "text"),
        (list, {}, "a list"),
        (dict, [], "an object"),
        (dict, None, "an object"),
    ],
)
def test_a_field_of_another_kind_is_refused(kind, value, expected):
    with pytest.raises(DataError, match=rf"^a\.json: image id 3: the field 'f' is .*: expected {expected}"):
        require({"f": value}, "f", kind, "a.json: image id 3")


def test_a_missing_field_or_record_is_refused():
    with pytest.raises(DataError, match="here: the field 'f' is missing: expected text"):
        require({}, "f", str, "here")
    with pytest.raises(DataError, match="here: expected an object with the field 'f', got None"):
        require(None, "f", str, "here")


def test_lists_of_numbers():
    assert require_numbers({"bbox": [1, 2.5, 3, 4]}, "bbox", 4, "here") == [1.0, 2.5, 3.0, 4.0]
    for bad in ([1, 2, 3], [1, 2, 3, True], [1, 2, 3, float("nan")], [1, 2, 3, "4"], 5):
        with pytest.raises(DataError, match="here: the field 'bbox' is"):
            require_numbers({"bbox": bad}, "bbox", 4, "here")


def test_long_values_are_cut():
    assert shorten("x" * 100) == "'" + "x" * 56 + "..."
    assert shorten([1]) == "[1]"


def test_nothing_heavy_is_imported():
    code = "import sys, detpipe.support.strict_json; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

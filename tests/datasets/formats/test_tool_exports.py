"""What labeling tools export in formats of their own: shapes that are no boxes, classes of several splits, and faults."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from detpipe.datasets import COCO, load_coco
from detpipe.datasets.formats.recognize import open_split, recognize
from detpipe.datasets.formats.tool_exports import read_export
from detpipe.support.errors import DataError, UsageError
from detpipe.types import Annotations

from ..layout_cases import coco, picture, text
from ..tool_cases import alone, exported


def labelme(*shapes: dict[str, Any]) -> str:
    return json.dumps({"imagePath": "a.jpg", "imageHeight": 80, "imageWidth": 100, "shapes": shapes})


def via(*regions: dict[str, Any], attributes: Any = None) -> str:
    kinds = {"kind": "ball"} if attributes is None else attributes
    parts = [{"shape_attributes": region, "region_attributes": kinds} for region in regions]
    return json.dumps({"a.jpg9": {"filename": "a.jpg", "regions": dict(enumerate(parts))}})


def studio(**value: Any) -> str:
    result = {"value": value, "original_width": 100, "original_height": 80}
    return json.dumps(
        [{"data": {"image": "a.jpg"}, "annotations": [{"result": [result, {"value": {"choices": ["day"]}}]}]}]
    )


def cvat(shape: str, more: str = "") -> str:
    image = f'<image id="0" name="a.jpg" width="100" height="80"><tag label="day"></tag>{shape}</image>'
    return f"<annotations>{more}{image}</annotations>"


def shape_of(label: str, kind: str, *points: tuple[float, float]) -> dict[str, Any]:
    return {"label": label, "shape_type": kind, "points": points}


def read(root: Path, name: str, content: str, outlines: bool = False) -> Annotations:
    picture(root / "a.jpg", "a")
    text(root / name, content)
    return load_coco(root if name == "a.json" else root / name, root, segmentations=outlines)


TRIANGLE = [(10.0, 20.0), (40.0, 20.0), (10.0, 60.0)]
SHAPES = [
    ("a.json", labelme(shape_of("ball", "polygon", *TRIANGLE)), [10, 20, 40, 60]),
    ("a.json", labelme(shape_of("ball", "circle", (30, 40), (33, 44))), [25, 35, 35, 45]),
    ("a.json", labelme(shape_of("ball", "rectangle", (40, 60), (10, 20))), [10, 20, 40, 60]),
    (
        "via.json",
        via({"name": "polygon", "all_points_x": [10, 40, 10], "all_points_y": [20, 20, 60]}),
        [10, 20, 40, 60],
    ),
    ("via.json", via({"name": "circle", "cx": 30, "cy": 40, "r": 5}), [25, 35, 35, 45]),
    ("via.json", via({"name": "ellipse", "cx": 30, "cy": 40, "rx": 5, "ry": 2}), [25, 38, 35, 42]),
    ("s.json", studio(points=[[10, 25], [40, 25], [10, 75]], polygonlabels=["ball"]), [10, 20, 40, 60]),
    ("s.json", studio(x=30, y=50, radiusX=5, radiusY=2.5, ellipselabels=["ball"]), [25, 38, 35, 42]),
    ("s.json", studio(x=30, y=50, radiusX=5, radiusY=2.5, rotation=90, ellipselabels=["ball"]), [28, 35, 32, 45]),
    # turned by a right angle about its first corner, in pixels and not in hundredths of the sides
    ("s.json", studio(x=50, y=25, width=20, height=50, rotation=90, rectanglelabels=["ball"]), [10, 20, 50, 40]),
    ("annotations.xml", cvat('<polygon label="ball" points="10,20;40,20;10.0,60"/>'), [10, 20, 40, 60]),
    ("annotations.xml", cvat('<ellipse label="ball" cx="30" cy="40" rx="5" ry="2"/>'), [25, 38, 35, 42]),
    (
        "annotations.xml",
        cvat('<mask label="ball" left="10" top="20" width="30" height="40" rle="9"/>'),
        [10, 20, 40, 60],
    ),
    (
        "annotations.xml",
        cvat('<box label="ball" xtl="20" ytl="30" xbr="60" ybr="50" rotation="90"/>'),
        [30, 20, 50, 60],
    ),
]


@pytest.mark.parametrize(("name", "content", "box"), SHAPES)
def test_a_shape_has_the_box_that_bounds_it(name: str, content: str, box: list[float], tmp_path: Path) -> None:
    a = read(tmp_path, name, content)
    assert a.class_names == ("ball",)
    np.testing.assert_allclose(a.boxes, [box], atol=1e-4)


@pytest.mark.parametrize(("name", "content"), [(name, content) for name, content, _ in SHAPES if "olygon" in content])
def test_polygons_keep_their_outline(name: str, content: str, tmp_path: Path) -> None:
    a = read(tmp_path, name, content, outlines=True)
    assert a.segmentations is not None
    assert json.loads(a.segmentations[0]) == [[n for point in TRIANGLE for n in point]]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.json", labelme(shape_of("ball", "point", (9, 9)), shape_of("ball", "rectangle", (1, 2), (3, 4)))),
        (
            "via.json",
            via({"name": "point", "cx": 9, "cy": 9}, {"name": "rect", "x": 1, "y": 2, "width": 2, "height": 2}),
        ),
        (
            "annotations.xml",
            cvat('<points label="x" points="1,2"/><box label="ball" xtl="1" ytl="2" xbr="3" ybr="4"/>'),
        ),
    ],
)
def test_what_has_no_box_is_left_out_and_counted(name: str, content: str, tmp_path: Path) -> None:
    a = read(tmp_path, name, content)
    assert (a.boxes.tolist(), a.class_names) == ([[1, 2, 3, 4]], ("ball",))
    assert [count for what, count in a.counts.items() if "without a box" in what] == [1]


@pytest.mark.parametrize("attributes", [{"color": "red", "Class name": "ball"}, {"what": {"ball": True, "box": False}}])
def test_the_class_of_via_is_the_attribute_that_says_it(attributes: dict[str, Any], tmp_path: Path) -> None:
    content = via({"name": "rect", "x": 1, "y": 2, "width": 2, "height": 2}, attributes=attributes)
    assert read(tmp_path, "via.json", content).class_names == ("ball",)


def test_splits_have_the_classes_of_all_of_them(tmp_path: Path) -> None:
    for split, stem in (("train", "a"), ("val", "d")):  # a ball; a box
        picture(tmp_path / split / f"{stem}.jpg", stem)
        text(tmp_path / split / f"{stem}.json", alone("LabelMe", stem))
    data = COCO(str(tmp_path), train="train", val="val")
    assert data.class_names == ("ball", "box")
    assert [data.annotations(split).labels.tolist() for split in ("train", "val")] == [[1], [2]]
    assert open_split(str(tmp_path), "val").class_names == ("ball", "box")


def test_classes_that_are_listed_come_first_and_need_no_objects(tmp_path: Path) -> None:
    labels = (
        "<meta><job><labels>"
        + "".join(f"<label><name>{n}</name></label>" for n in ("zebra", "ball"))
        + "</labels></job></meta>"
    )
    picture(tmp_path / "a.jpg", "a")
    text(tmp_path / "annotations.xml", cvat('<box label="ball" xtl="1" ytl="2" xbr="3" ybr="4"/>', labels))
    (split,) = recognize(str(tmp_path)).splits
    data = COCO(str(tmp_path), train=split, val=split)
    assert data.class_names == ("zebra", "ball")


def test_a_folder_of_hundreds_and_images_of_the_test_split_that_are_called_alike(tmp_path: Path) -> None:
    for k in range(60):
        picture(tmp_path / "training" / "image_2" / f"{k}.png", "a")
        picture(tmp_path / "testing" / "image_2" / f"{k}.png", "c")
        text(tmp_path / "training" / "label_2" / f"{k}.txt", alone("KITTI", "a") if k else "")
    assert recognize(str(tmp_path)).says == "read as COCO: training/label_2 (KITTI) of the images in training/image_2"
    a = open_split(str(tmp_path), "training").annotations("val")
    assert (len(a), len(a.labels)) == (60, 59)


def test_a_file_is_read_with_the_folder_of_its_images_and_one_of_voc_is_not(tmp_path: Path) -> None:
    picture(tmp_path / "images" / "a.jpg", "a")
    text(tmp_path / "annotations.xml", exported("CVAT", ["a"]))
    opened = open_split(str(tmp_path / "annotations.xml"), None, images=str(tmp_path / "images"))
    assert opened.annotations("val").boxes.tolist() == [[10, 20, 40, 60]]
    text(tmp_path / "a.xml", "<annotation/>")
    with pytest.raises(UsageError, match=r"a\.xml has no known layout; expected"):
        recognize(str(tmp_path / "a.xml"))


def test_a_coco_file_beside_exports_is_what_counts(tmp_path: Path) -> None:
    picture(tmp_path / "a.jpg", "a")
    text(tmp_path / "coco.json", coco(["a"]))
    text(tmp_path / "project.json", exported("Label Studio", ["a"]))
    assert "coco.json of the images in the folder" in recognize(str(tmp_path)).says


BOX = {"x": 1, "y": 2, "width": 3, "height": 4}
CREATEML = [{"image": "a.jpg", "annotations": [{"label": "ball", "coordinates": {**BOX, "x": "1"}}]}]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "c.json",
            json.dumps(CREATEML),
            r"c\.json: \[0\]: annotations\[0\]: the field 'x' is '1': expected a finite number",
        ),
        (
            "a.json",
            labelme({"label": "ball", "points": [[1]]}),
            r"a\.json: shapes\[0\]: expected pairs of finite numbers",
        ),
        ("a.json", labelme({"points": []}), r"a\.json: shapes\[0\]: the field 'label' is missing"),
        ("via.json", via({"name": "rect"}), r"via\.json: a\.jpg9: regions\[0\]: the field 'x' is missing"),
        ("via.json", via({"name": "rect"}, attributes={}), r"regions\[0\]: expected a region with one class"),
        ("via.json", via({"name": "rect"}, attributes={"a": "1", "b": "2"}), r"expected a region with one class"),
        (
            "via.csv",
            "filename,region_shape_attributes\na.jpg,{\n",
            r"via\.csv: line 2: line 1 column 2: not valid JSON",
        ),
        (
            "via.csv",
            'filename,region_shape_attributes\na.jpg,"{""name"": ""rect""}"\n',
            r"line 2: the field 'region_attr",
        ),
        (
            "s.json",
            studio(**BOX, rectanglelabels=[]),
            r"s\.json: \[0\]: annotations\[0\]: result\[0\]: expected one class, got \[\]",
        ),
        ("s.json", studio(**BOX, rotation="9", rectanglelabels=["a"]), r"result\[0\]: the field 'rotation' is '9'"),
        (
            "m.jsonl",
            '{"file_name": "a.jpg", "objects": {"bbox": [[1, 2, 3, 4]]}}\n',
            r"\[0\]: expected a category for each",
        ),
        ("m.jsonl", '{"file_name": "a.jpg", "objects": {}}\n{', r"m\.jsonl: line 2: line 1 column 2: not valid JSON"),
        (
            "annotations.xml",
            cvat('<box label="ball" xtl="1" ytl="x"/>'),
            r"image a\.jpg: box 1: the field 'ytl' is 'x'",
        ),
        ("annotations.xml", cvat("<box/>"), r"image a\.jpg: box 1: the field 'label' is missing"),
        (
            "annotations.xml",
            "<annotations><track/></annotations>",
            r"CVAT's format for video, .* export 'CVAT for images'",
        ),
        (
            "annotations.xml",
            "<!DOCTYPE a [<!ENTITY b 'c'>]><annotations/>",
            r"cannot be read as XML \(EntitiesForbidden",
        ),
        ("annotations.xml", "<annotations>", r"annotations\.xml: cannot be read as XML \(ParseError"),
    ],
)
def test_what_is_wrong_is_named(name: str, content: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=message) as caught:
        read(tmp_path, name, content)
    assert "\n" not in str(caught.value)


def test_a_line_of_kitti_that_is_cut_off_is_named(tmp_path: Path) -> None:
    for stem, content in (("a", alone("KITTI", "a")), ("d", "ball 0 0 0 1 2 3\n")):
        picture(tmp_path / "image_2" / f"{stem}.png", stem)
        text(tmp_path / "label_2" / f"{stem}.txt", content)
    with pytest.raises(DataError, match=r"label_2/d\.txt: line 1: expected a class and 14 numbers, got 'ball 0 0"):
        recognize(str(tmp_path))


def test_a_file_without_shapes_is_named_and_a_file_of_something_else_is_not_looked_at(tmp_path: Path) -> None:
    for stem in ("a", "d"):
        picture(tmp_path / f"{stem}.jpg", stem)
        text(tmp_path / f"{stem}.json", alone("LabelMe", stem))
    text(tmp_path / "notes.json", '{"by": "me"}')
    text(tmp_path / "list.json", "[[1]]")
    assert len(load_coco(tmp_path, tmp_path)) == 2
    text(tmp_path / "d.json", '{"imagePath": "d.jpg"}')
    with pytest.raises(DataError, match=r"d\.json: the field 'shapes' is missing"):
        load_coco(tmp_path, tmp_path)


def test_a_box_outside_of_its_image_names_the_image_and_the_shape(tmp_path: Path) -> None:
    content = labelme(shape_of("ball", "rectangle", (110, 20), (130, 60)))
    with pytest.raises(DataError, match=r"annotation id a\.jpg#0 \(image a\.jpg\)"):
        read(tmp_path, "a.json", content)


@pytest.mark.parametrize(
    "content", ["{}", "[]", "[[]]", '"text"', '{"a": 1}', '[{"image": "a.jpg"}]', '{"items": 3}', "[3]"]
)
def test_other_json_is_of_no_tool(content: str, tmp_path: Path) -> None:
    text(tmp_path / "a.json", content)
    assert read_export(tmp_path / "a.json") is None
    assert read_export(tmp_path) is None


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Each key of each object and each index of each list, with what holds it."""
    for key in list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield value, key
        yield from places(value[key])


def refusal(path: Path) -> str | None:
    try:
        read_export(path)
    except DataError as error:
        return str(error)
    return None


@pytest.mark.parametrize("tool", ["CreateML", "VIA", "Label Studio", "Label Studio MIN", "LabelMe", "Supervisely"])
def test_any_other_value_is_read_or_refused_by_name(tool: str, tmp_path: Path) -> None:
    alone_ = tool in ("LabelMe", "Supervisely")
    content = alone(tool, "b 1") if alone_ else exported(tool, ["b 1", "d"])
    file = tmp_path / "b 1.jpg.json"
    for k in range(len([*places(json.loads(content))])):
        for other in (None, "x", [], [[1, 2]], {}, {"a": 1}, -1, True, 10**30):
            changed = json.loads(content)
            holder, key = [*places(changed)][k]
            holder[key] = other
            text(file, json.dumps(changed))
            said = refusal(tmp_path if alone_ else file)
            assert said is None or str(file) in said

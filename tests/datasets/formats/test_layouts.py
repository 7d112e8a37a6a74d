"""Every layout of the table is recognized, said in a line, and read with the right splits, classes and boxes."""

from __future__ import annotations

import unicodedata
from pathlib import Path

import pytest

from detpipe.datasets import COCO, VOC, YOLO, CSVBoxes, DetectionData
from detpipe.datasets.formats.folders import Entries, find_split, list_folder
from detpipe.datasets.formats.recognize import open_split, recognize
from detpipe.types import Annotations

from ..layout_cases import CLASSES, LAYOUTS, SCENES, Layout

MODULES: dict[str, type[DetectionData]] = {"coco": COCO, "voc": VOC, "yolo": YOLO, "csv": CSVBoxes}


def boxes(a: Annotations) -> dict[str, list[tuple[object, ...]]]:
    """Stem -> class and corners of each box."""
    return {
        Path(str(name)).stem: [
            (a.class_names[a.labels[b] - 1], *a.boxes[b].round(6).tolist())
            for b in range(a.offsets[i], a.offsets[i + 1])
        ]
        for i, name in enumerate(a.file_names)
    }


@pytest.mark.parametrize("case", LAYOUTS, ids=str)
def test_the_layout_is_read(case: Layout, tmp_path: Path) -> None:
    root = str(case.write(tmp_path / "a set"))
    found = recognize(root)
    assert found.layout == case.layout
    assert case.says in found.says
    assert "\n" not in found.says
    table = case.layout == "csv" and set(case.splits) == {"all"}
    assert set(found.splits) == (set() if table else set(case.splits))
    for split, stems in case.splits.items():
        opened = open_split(root, split, together=found.splits if case.layout == "voc" else ())
        assert type(opened) is MODULES[case.layout]
        a = opened.annotations("val")
        assert boxes(a) == {stem: SCENES[stem] for stem in stems}
        assert a.class_names == CLASSES
        assert all((a.root / str(name)).is_file() for name in a.file_names)


@pytest.mark.parametrize("case", [case for case in LAYOUTS if "train" in case.splits and len(case.splits) > 1], ids=str)
def test_the_data_module_takes_usual_names_of_splits(case: Layout, tmp_path: Path) -> None:
    data = MODULES[case.layout](str(case.write(tmp_path)), train="train", val="val")  # for valid; no class names
    assert set(boxes(data.annotations("train"))) == set(case.splits["train"])
    assert set(boxes(data.annotations("val"))) == set(case.splits.get("val", case.splits.get("valid", ())))
    assert data.class_names == CLASSES


@pytest.mark.parametrize(
    ("name", "known", "found"),
    [
        ("train", ["lvis_v1_train", "lvis_v1_val"], "lvis_v1_train"),
        ("val", ["my train", "my Valid"], "my Valid"),
        ("val", ["a_val", "val"], "val"),
        ("val", ["a_val", "b_val"], None),
        ("val", ["interval"], None),
    ],
)
def test_a_split_is_found_by_the_end_of_its_name(name: str, known: list[str], found: str | None) -> None:
    assert find_split(name, known) == found


def test_an_array_beside_an_image_is_its_copy(tmp_path: Path) -> None:
    for name in ("a.jpg", "a.npy", "b.npy", ".c.npy", "a.xml"):
        (tmp_path / name).touch()
    found = list_folder(tmp_path, ".xml")
    assert (found.images, found.labels) == ({"a": ["a.jpg"], "b": ["b.npy"]}, {"a": "a.xml"})
    assert Entries().find(tmp_path, "a.png") == tmp_path / "a.jpg"


def test_names_are_found_however_accents_are_encoded(tmp_path: Path) -> None:
    (tmp_path / unicodedata.normalize("NFD", "Bäume.JPG")).touch()
    assert Entries().find_image(tmp_path, "bäume.jpg") == unicodedata.normalize("NFD", "Bäume.JPG")

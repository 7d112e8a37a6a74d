from __future__ import annotations

import csv
import json
import os
import tempfile
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pycocotools.coco import COCO as PycocotoolsCOCO

from detpipe.datasets.formats.coco import write_coco
from detpipe.datasets.formats.csv import write_csv
from detpipe.datasets.formats.export import Written
from detpipe.datasets.formats.recognize import open_split, recognize
from detpipe.datasets.formats.voc import write_voc
from detpipe.datasets.formats.yolo import write_yolo
from detpipe.support.errors import DataError
from detpipe.types import Annotations

from ..builders import picture
from ..random_sets import annotation_sets, make

WRITERS: dict[str, Any] = {"coco": write_coco, "voc": write_voc, "yolo": write_yolo, "csv": write_csv}
QUICK = settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))


def read(folder: Path, split: str = "train") -> Annotations:
    assert split in recognize(str(folder)).splits
    return open_split(str(folder), split).annotations("val")


def stems(a: Annotations) -> list[str]:
    return [Path(str(name)).stem.removeprefix("sub__").removeprefix("deep__") for name in a.file_names]


def assert_same(first: Annotations, second: Annotations, ids: bool = True, more: bool = True) -> None:
    """The same images, in any order, with the same boxes."""
    assert first.class_names == second.class_names
    assert first.category_ids == second.category_ids
    rows = {stem: row for row, stem in enumerate(stems(second))}
    assert sorted(rows) == sorted(stems(first))
    second = second.subset(np.array([rows[stem] for stem in stems(first)], dtype=np.int64))
    if ids:
        assert first.image_ids.tolist() == second.image_ids.tolist()
    assert first.sizes.tolist() == second.sizes.tolist()
    assert first.offsets.tolist() == second.offsets.tolist()
    assert first.labels.tolist() == second.labels.tolist()
    np.testing.assert_allclose(first.boxes, second.boxes, rtol=0, atol=1e-9)
    if more:
        assert first.iscrowd.tolist() == second.iscrowd.tolist()
        assert first.difficult.tolist() == second.difficult.tolist()
        np.testing.assert_allclose(first.area, second.area, rtol=1e-9, atol=1e-12)


def content(a: Annotations) -> list[bytes]:
    return [(a.root / str(name)).read_bytes() for name in a.file_names]


@QUICK
@given(data=st.data(), path=st.lists(st.sampled_from(["coco", "voc", "csv"]), min_size=1, max_size=4))
def test_round_trips_through_coco_voc_and_csv_lose_nothing(data: st.DataObject, path: list[str]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        first = now = data.draw(annotation_sets(Path(folder) / "source"))
        for step, layout in enumerate(path):
            WRITERS[layout]({"train": now}, Path(folder) / f"{step}_{layout}")
            now = read(Path(folder) / f"{step}_{layout}")
            assert "boxes clipped" in now.counts
            assert now.counts["boxes clipped"] == 0
        assert_same(first, now)


@QUICK
@given(data=st.data(), back=st.sampled_from(["coco", "voc", "csv", "yolo"]))
def test_round_trips_through_yolo_keep_boxes_within_a_billionth_of_a_pixel(data: st.DataObject, back: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        first = data.draw(annotation_sets(Path(folder) / "source", flags=False))
        write_yolo({"train": first}, Path(folder) / "yolo")
        now = read(Path(folder) / "yolo")
        assert now.counts["boxes clipped"] == 0
        assert_same(first, now, ids=False)
        WRITERS[back]({"train": now}, Path(folder) / "back")
        assert_same(first, read(Path(folder) / "back"), ids=False)


@QUICK
@given(
    st.lists(
        st.sampled_from(["a/x", "b/x", "a/b/x", "x", "a__x", "train__x", "猫/x"]), min_size=2, max_size=7, unique=True
    ),
    st.lists(st.sampled_from(["coco", "voc", "csv", "yolo"]), min_size=1, max_size=3),
)
def test_images_of_one_name_in_several_folders_stay_apart(stems: list[str], path: list[str]) -> None:
    """Each image has a width of its own, by which it is known again whatever it is called."""
    with tempfile.TemporaryDirectory() as folder:
        sizes = [(40, 20 + k) for k in range(len(stems))]
        boxes = [[(0.0, 0.0, 0.5, (k + 1) / 10)] * (k % 3) for k in range(len(stems))]
        names = [f"{stem}.{'png' if k % 2 else 'jpg'}" for k, stem in enumerate(stems)]
        boxes[-1] = boxes[-1] or [(0.0, 0.0, 1.0, 1.0)]
        first = now = make(Path(folder) / "source", names, sizes, boxes)
        for step, layout in enumerate(path):
            WRITERS[layout]({"train": now}, Path(folder) / str(step))
            now = read(Path(folder) / str(step))
        order = np.argsort(now.sizes[:, 1])
        now = now.subset(order)
        assert now.sizes.tolist() == first.sizes.tolist()
        assert now.offsets.tolist() == first.offsets.tolist()
        np.testing.assert_allclose(now.boxes, first.boxes, rtol=0, atol=1e-9)
        assert content(now) == content(first)


BOXES = [[(0.0, 0.0, 1.0, 1.0), (0.25, 0.5, 0.5, 0.5)], []]


def sample(root: Path, **changes: Any) -> Annotations:
    return make(root, ["a.png", "b.png"], [(40, 60), (30, 50)], BOXES, **changes)


@pytest.mark.parametrize("layout", WRITERS)
def test_images_are_copied_linked_or_left(tmp_path: Path, layout: str) -> None:
    a = sample(tmp_path / "source")
    for how in ("copy", "link", "none"):
        written: Written = WRITERS[layout]({"train": a}, tmp_path / how, how)
        assert (written.images, written.boxes, written.splits) == (2, 2, ("train",))
        files = list((tmp_path / how).rglob("*.png"))
        assert len(files) == (0 if how == "none" else 2)
        linked = {path for path in files if path.stat().st_nlink == 2}
        assert len(linked) == (2 if how == "link" else 0)
        if files:
            assert content(read(tmp_path / how)) == content(a)
        for path in linked:
            path.unlink()


def test_without_images_file_names_stay_those_of_the_source(tmp_path: Path) -> None:
    a = sample(tmp_path / "source")
    written = write_coco({"val": a}, tmp_path / "coco", "none")
    assert written.remarks == (f"file names of val are relative to {a.root}",)
    file = tmp_path / "coco" / "annotations" / "instances_val.json"
    assert_same(a, open_split(str(file), None, str(a.root)).annotations("val"))
    write_csv({"val": a}, tmp_path / "csv", "none")
    assert_same(a, open_split(str(tmp_path / "csv"), "val", str(a.root)).annotations("val"))
    other = make(tmp_path / "other", ["c.png"], [(9, 9)], [[]])
    with pytest.raises(DataError, match="the images lie in several folders"):
        write_csv({"train": a, "val": other}, tmp_path / "csv2", "none")


def test_a_table_holds_no_formulas_and_comes_back_as_it_was(tmp_path: Path) -> None:
    names = ["=cmd|' /C calc'!A0.png", "+a.png", "-b.png", "@c.png", "'=d.png", "'e.png", "f.png"]
    classes = ("=1+1", "'=1+1", "''-x", "@SUM(A1)", "'quoted", "-dash", "+plus", "a=b")
    many = len(names)
    labels = np.arange(1, many + 1)
    boxes = [[(0.1, 0.1, 0.5, 0.5)]] * many
    a = make(tmp_path / "source", names, [(20, 20)] * many, boxes, classes, tuple(range(1, 9)), labels=labels)
    write_csv({"=train": a}, tmp_path / "csv", "none")
    with next((tmp_path / "csv").glob("*.csv")).open(newline="") as stream:
        cells = [cell for row in csv.reader(stream) for cell in row]
    assert not [cell for cell in cells if cell[:1] in tuple("=+-@\t\r")]
    again = open_split(str(tmp_path / "csv"), "=train", str(a.root)).annotations("val")
    assert_same(a, again)
    assert sorted(again.file_names.tolist()) == sorted(names)


def test_links_across_disks_are_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    with pytest.raises(
        DataError, match=r"a\.png: cannot be linked \(Invalid cross-device link\): copy the images instead"
    ):
        write_coco({"train": sample(tmp_path / "source")}, tmp_path / "coco", "link")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]  # nothing half done


@pytest.mark.parametrize("layout", WRITERS)
def test_a_folder_that_is_there_stays(tmp_path: Path, layout: str) -> None:
    a = sample(tmp_path / "source")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("mine")
    with pytest.raises(DataError, match="out is there already"):
        WRITERS[layout]({"train": a}, tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine"]
    with pytest.raises(DataError, match="expected at least one split"):
        WRITERS["coco"]({}, tmp_path / "none")


@pytest.mark.parametrize("layout", ["voc", "yolo", "csv"])
def test_splits_with_other_classes_have_no_list_in_common(tmp_path: Path, layout: str) -> None:
    a, b = sample(tmp_path / "a"), sample(tmp_path / "b", category_ids=(1, 7))
    with pytest.raises(DataError, match=r"the classes of train .* and val .* differ"):
        WRITERS[layout]({"train": a, "val": b}, tmp_path / "out")
    with pytest.raises(DataError, match="the class name ' cat' begins or ends with a space"):
        WRITERS[layout]({"train": sample(tmp_path / "a", class_names=(" cat", "dog"))}, tmp_path / "out")
    write_coco({"train": a, "val": b}, tmp_path / "coco")
    assert read(tmp_path / "coco", "val").category_ids == (1, 7)


def test_coco_is_as_pycocotools_reads_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a = sample(tmp_path / "source", iscrowd=np.array([True, False]), image_ids=np.array([7, 3]))
    write_coco({"train": a}, tmp_path / "coco")
    reader = PycocotoolsCOCO(str(tmp_path / "coco" / "annotations" / "instances_train.json"))
    assert sorted(reader.imgs) == [3, 7]
    assert reader.loadAnns(reader.getAnnIds(imgIds=[7], iscrowd=True))[0]["bbox"] == [0, 0, 60, 40]
    assert min(reader.anns) == 1  # an id of 0 is a miss for evaluators
    assert "Done" in capsys.readouterr().out


def test_coco_orders_classes_by_their_ids(tmp_path: Path) -> None:
    written = write_coco({"train": sample(tmp_path / "source", category_ids=(9, 2))}, tmp_path / "coco")
    assert "numbered by ascending category id" in written.remarks[0]
    assert read(tmp_path / "coco").class_names == ("dog", "cat")


def test_voc_is_as_the_official_files_are(tmp_path: Path) -> None:
    write_voc({"2007:trainval": sample(tmp_path / "source")}, tmp_path / "voc")
    assert (tmp_path / "voc" / "ImageSets" / "Main" / "2007_trainval.txt").read_text() == "a\nb\n"
    root = ElementTree.parse(tmp_path / "voc" / "Annotations" / "a.xml").getroot()
    assert [child.tag for child in root] == ["folder", "filename", "size", "segmented", "object", "object"]
    assert [root.findtext(f"size/{key}") for key in ("width", "height", "depth")] == ["60", "40", "3"]
    corners = " ".join(str(element.text) for element in root.findall("object/bndbox/*"))
    assert corners == "1 1 60 40 16 21 37.5 30"
    assert not root.findall(".//detpipe")  # nothing but what VOC knows, where that is enough
    assert all(not element.attrib for element in root.iter())


def test_voc_keeps_what_it_has_no_place_for_in_tags_of_ours(tmp_path: Path) -> None:
    a = sample(
        tmp_path / "source", iscrowd=np.array([True, False]), area=np.array([3.5, 600.0]), image_ids=np.array([70, 7])
    )
    write_voc({"train": a}, tmp_path / "voc")
    root = ElementTree.parse(tmp_path / "voc" / "Annotations" / "a.xml").getroot()
    assert root.findtext("detpipe/image_id") == "70"
    assert [root.findtext(f"object/detpipe/{key}") for key in ("iscrowd", "area")] == ["1", "3.5"]
    assert_same(a, read(tmp_path / "voc"))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("<image_id>70<", "<image_id>x<", "detpipe/image_id must be a whole number, got 'x'"),
        ("<image_id>70<", "<image_id>7<", "image id 7 is there twice"),
        ("<iscrowd>1<", "<iscrowd>2<", "object 1 .*: detpipe/iscrowd must be 0 or 1, got '2'"),
        ("<area>3.5<", "<area>-3<", "object 1 .*: detpipe/area must be a number of at least 0, got '-3'"),
        ("<area>3.5<", "<area>x<", "object 1 .*: detpipe/area must be a number"),
    ],
)
def test_faults_of_our_tags_are_named(tmp_path: Path, old: str, new: str, message: str) -> None:
    a = sample(
        tmp_path / "source", iscrowd=np.array([True, False]), area=np.array([3.5, 600.0]), image_ids=np.array([70, 7])
    )
    write_voc({"train": a}, tmp_path / "voc")
    path = tmp_path / "voc" / "Annotations" / "a.xml"
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))
    with pytest.raises(DataError, match=message):
        read(tmp_path / "voc")


def test_voc_with_boxes_of_a_pixel_counts_from_0_and_says_so(tmp_path: Path) -> None:
    a = make(tmp_path / "source", ["a.png"], [(40, 60)], [[(0.0, 0.0, 1 / 60, 0.5), (0.5, 0.5, 0.5, 0.5)]])
    written = write_voc({"train": a}, tmp_path / "voc")
    assert "corners count from 0" in written.remarks[0]
    assert_same(a, read(tmp_path / "voc"))
    from detpipe.datasets import load_voc

    with pytest.raises(DataError, match="says that one_based is false: set it so"):
        load_voc(tmp_path / "voc", "train", "auto")


def test_images_of_one_name_in_several_splits_are_renamed(tmp_path: Path) -> None:
    a = make(tmp_path / "a", ["x/1.png", "y/1.png"], [(9, 9), (8, 8)], [[(0.0, 0.0, 1.0, 1.0)], []])
    b = make(tmp_path / "b", ["1.png", "x__1.png"], [(7, 7), (6, 6)], [[], [(0.0, 0.0, 0.5, 0.5)]])
    written = write_voc({"train": a, "val": b}, tmp_path / "voc")
    assert written.remarks == ("1 images are renamed: others have their names, but for folders or suffixes",)
    assert read(tmp_path / "voc", "train").file_names.tolist() == ["JPEGImages/x__1.png", "JPEGImages/y__1.png"]
    assert read(tmp_path / "voc", "val").file_names.tolist() == ["JPEGImages/1.png", "JPEGImages/val__x__1.png"]
    assert read(tmp_path / "voc", "val").sizes.tolist() == [[7, 7], [6, 6]]
    picture(9, 9).save(tmp_path / "a" / "1.png")
    picture(9, 9).save(tmp_path / "a" / "1.jpg")
    c = make(tmp_path / "a", ["1.png"], [(9, 9)], [[(0.0, 0.0, 1.0, 1.0)]])
    d = Annotations(**{**vars(c), "file_names": np.array(["1.jpg"])})
    same = Annotations(**{**vars(c), "file_names": np.array(["1.jpg", "1.png"]), "image_ids": np.array([1, 2]),
                          "sizes": np.repeat(c.sizes, 2, 0), "offsets": np.array([0, 1, 1])})  # fmt: skip
    written = write_yolo({"train": same, "val": d}, tmp_path / "yolo")
    assert written.remarks == ("1 images are renamed: others have their names, but for folders or suffixes",)
    assert len(read(tmp_path / "yolo")) == 2


@pytest.mark.parametrize("layout", WRITERS)
def test_no_name_of_a_split_leads_out_of_the_folder(tmp_path: Path, layout: str) -> None:
    a = sample(tmp_path / "source")
    WRITERS[layout]({"..": a, "/x": a}, tmp_path / "in" / "out")
    assert [path.name for path in (tmp_path / "in").iterdir()] == ["out"]


def test_the_same_image_in_two_lists_of_voc_is_written_once(tmp_path: Path) -> None:
    a = sample(tmp_path / "source")
    write_voc({"train": a.subset(np.array([0])), "trainval": a}, tmp_path / "voc")
    assert len(list((tmp_path / "voc" / "JPEGImages").iterdir())) == 2
    assert read(tmp_path / "voc", "trainval").file_names.tolist() == ["JPEGImages/a.png", "JPEGImages/b.png"]


@pytest.mark.parametrize("layout", ["voc", "yolo"])
def test_images_that_a_layout_cannot_name_are_refused(tmp_path: Path, layout: str) -> None:
    a = make(tmp_path / "source", ["a.pcx"], [(9, 9)], [[]])
    with pytest.raises(DataError, match=rf"a\.pcx: {layout.upper()} layout has images that end in .*, but 1 do not"):
        WRITERS[layout]({"train": a}, tmp_path / "out")


def test_yolo_refuses_drops_or_leaves_out_what_is_flagged(tmp_path: Path) -> None:
    flags = {"iscrowd": np.array([True, False]), "area": np.array([2400.0, 1.0])}
    a = sample(tmp_path / "source", **flags)
    with pytest.raises(
        DataError, match=r"1 crowd regions and 0 difficult objects are flagged, .* --drop-flags .* --drop-flagged"
    ):
        write_yolo({"train": a}, tmp_path / "yolo")
    assert not (tmp_path / "yolo").exists()
    written = write_yolo({"train": a}, tmp_path / "yolo", flags="drop")
    assert "written as ordinary objects" in written.remarks[0]
    assert "areas of 1 boxes" in written.remarks[1]
    assert len(read(tmp_path / "yolo").boxes) == 2
    written = write_yolo({"train": a}, tmp_path / "few", flags="leave out")
    assert "are left out" in written.remarks[0]
    now = read(tmp_path / "few")
    assert now.offsets.tolist() == [0, 1, 1]
    np.testing.assert_allclose(now.boxes, a.boxes[1:], atol=1e-9)


def test_yolo_names_splits_as_other_programs_expect(tmp_path: Path) -> None:
    a = sample(tmp_path / "source")
    written = write_yolo({"train2017": a, "val2017": a, "extra": a}, tmp_path / "yolo")
    text = yaml.safe_load((tmp_path / "yolo" / "data.yaml").read_text())
    assert text == {
        "train": "images/train2017",
        "val": "images/val2017",
        "extra": "images/extra",
        "names": {0: "cat", 1: "dog"},
        "category_ids": [1, 2],
    }
    assert written.splits == recognize(str(tmp_path / "yolo")).splits == ("train", "val", "extra")
    write_yolo({"train1": a, "train2": a}, tmp_path / "two")
    assert recognize(str(tmp_path / "two")).splits == ("train1", "train2")


def test_ids_that_splits_share_are_not_kept(tmp_path: Path) -> None:
    a, b = sample(tmp_path / "a", image_ids=np.array([5, 6])), sample(tmp_path / "b", image_ids=np.array([6, 7]))
    for layout in ("voc", "csv"):
        written = WRITERS[layout]({"train": a, "val": b}, tmp_path / layout)
        assert "image ids are not kept: several splits use the same" in written.remarks
        assert read(tmp_path / layout, "val").image_ids.tolist() == [1, 2]


def test_the_table_is_as_documented(tmp_path: Path) -> None:
    write_csv({"val": sample(tmp_path / "source", difficult=np.array([False, True]))}, tmp_path / "csv")
    with (tmp_path / "csv" / "annotations.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert list(rows[1].items()) == [
        ("split", "val"), ("file_name", "images/val/a.png"), ("image_id", ""), ("x1", "15"), ("y1", "20"), ("x2", "37.5"),
        ("y2", "30"), ("label", "dog"), ("difficult", "1"), ("iscrowd", "0"), ("area", ""),
    ]  # fmt: skip
    assert rows[2]["file_name"] == "images/val/b.png"
    assert rows[2]["x1"] == rows[2]["label"] == ""
    assert json.loads((tmp_path / "csv" / "detpipe.json").read_text())["class_names"] == ["cat", "dog"]


def test_odd_names_are_made_fit(tmp_path: Path) -> None:
    names = [".hidden.png", "a:b.png", " lead.png"]
    a = make(tmp_path / "source", names, [(9, 9)] * 3, [[(0.0, 0.0, 1.0, 1.0)], [], []])
    for layout in ("voc", "yolo", "csv"):
        WRITERS[layout]({"train": a}, tmp_path / layout)
        found = sorted(Path(str(name)).name for name in read(tmp_path / layout).file_names)
        assert found == ["_.hidden.png", "a_b.png", "lead.png"]


@pytest.mark.parametrize("layout", ["voc", "csv", "coco"])
def test_real_coco_comes_back(shared_data: Path, tmp_path: Path, layout: str) -> None:
    names = ("train2017", "val2017")
    splits = {name: open_split(str(shared_data / "coco_mini"), name).annotations("val") for name in names}
    WRITERS[layout](splits, tmp_path / layout)
    for name, a in splits.items():
        assert_same(a, read(tmp_path / layout, name))
    with pytest.raises(DataError, match="13 crowd regions"):
        write_yolo(splits, tmp_path / "yolo")


def test_real_voc_comes_back_through_yolo(shared_data: Path, tmp_path: Path) -> None:
    a = open_split(str(shared_data / "bccd"), "test").annotations("val")
    write_yolo({"test": a}, tmp_path / "yolo", "link")
    write_voc({"test": read(tmp_path / "yolo", "test")}, tmp_path / "voc", "link")
    now = read(tmp_path / "voc", "test")
    assert_same(a, now, ids=False)
    assert now.boxes.tolist() == a.boxes.tolist()  # whole numbers stay whole

import re
import sys
from pathlib import Path
from types import FrameType

import pytest

import detpipe
from detpipe.datasets import VOC, Loader, VOCFormat, load_voc
from detpipe.datasets.formats import voc_xml
from detpipe.support.errors import DataError

from ..builders import picture, voc_object, write_voc
from ..fault_cases import BOMB


def test_official_coordinates_become_continuous(tmp_path: Path) -> None:
    a = load_voc(write_voc(tmp_path), "train", ["cat", "dog"])
    assert a.boxes.tolist() == [[0, 0, 20, 10], [2, 4, 60, 40], [0, 0, 20, 10]]
    assert a.labels.tolist() == [1, 2, 1]
    assert a.image_ids.tolist() == [1, 2]
    assert a.file_names.tolist() == ["JPEGImages/a.jpg", "JPEGImages/b.jpg"]  # not what <filename> says
    assert a.area.tolist() == [200, 58 * 36, 200]
    assert a.category_ids == (1, 2)


def test_row_19_counting_from_0_or_1_is_the_users_word(tmp_path: Path) -> None:
    root = write_voc(tmp_path, {"a": [voc_object(box=(0, 3, 20, 10))]})
    with pytest.raises(DataError, match=r"a\.xml: object 1 \(cat\): bndbox/xmin is 0, but one_based is on.*one_based"):
        load_voc(root, "train", ["cat"])
    assert load_voc(root, "train", ["cat"], one_based=False).boxes.tolist() == [[0, 3, 20, 10]]


def test_row_20_difficult_is_kept_flagged_or_dropped_counted(tmp_path: Path) -> None:
    root = write_voc(tmp_path, {"a": [voc_object(difficult=1), voc_object(difficult=0), voc_object(difficult=None)]})
    assert load_voc(root, "train", ["cat"]).difficult.tolist() == [True, False, False]
    a = load_voc(root, "train", ["cat"], keep_difficult=False)
    assert a.difficult.tolist() == [False, False]
    assert a.counts["boxes skipped: difficult"] == 1
    assert a.counts["boxes read"] == 3


def test_an_unknown_class_is_reported_once_with_its_number(tmp_path: Path) -> None:
    root = write_voc(tmp_path, {"a": [voc_object("zebra")] * 30})
    with pytest.raises(DataError, match=r"'zebra', which is not among class_names .*'auto' \(and 29 more like it\)"):
        load_voc(root, "train")


def test_a_missing_size_is_read_from_the_image(tmp_path: Path) -> None:
    root = write_voc(tmp_path, size=None)
    assert load_voc(root, "train", ["cat", "dog"]).sizes.tolist() == [[40, 60], [40, 60]]
    (root / "JPEGImages" / "a.jpg").unlink()
    with pytest.raises(DataError, match=r"a\.xml: has no size, and its image: .*a\.jpg: no such image file"):
        load_voc(root, "train", ["cat", "dog"])


def test_years_text_files_and_several_lists(tmp_path: Path) -> None:
    write_voc(tmp_path / "VOC2007", {"a": [voc_object()], "b": [voc_object()]}, "trainval")
    write_voc(tmp_path / "VOC2012", {"c": [voc_object("dog")]}, "trainval")
    (tmp_path / "few.txt").write_text("b\n")
    both = load_voc(tmp_path, ["2007:trainval", "2012:trainval"], "auto")
    assert both.file_names.tolist() == [
        f"VOC{y}/JPEGImages/{s}.jpg" for y, s in ((2007, "a"), (2007, "b"), (2012, "c"))
    ]
    assert both.class_names == ("cat", "dog")
    assert load_voc(tmp_path, "2007:few.txt", ["cat"]).file_names.tolist() == ["VOC2007/JPEGImages/b.jpg"]
    with pytest.raises(DataError, match=r"JPEGImages: no such folder.*name one: '2007:trainval'"):
        load_voc(tmp_path, "trainval")


def test_other_suffixes_and_lists_of_one_class(tmp_path: Path) -> None:
    root = write_voc(tmp_path)
    (root / "JPEGImages" / "a.jpg").unlink()
    picture(40, 60).save(root / "JPEGImages" / "a.PNG")
    (root / "ImageSets" / "Main" / "cat_train.txt").write_text("a -1\nb\t1\n\n")
    a = load_voc(root, "cat_train", ["cat", "dog"])
    assert a.file_names.tolist() == ["JPEGImages/a.PNG", "JPEGImages/b.jpg"]


def test_a_wrong_layout_is_explained(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere: no such folder; the argument root"):
        load_voc(tmp_path / "nowhere", "train")
    with pytest.raises(DataError, match=r"JPEGImages: no such folder.*VOC layout is"):
        load_voc(tmp_path, "train")
    root = write_voc(tmp_path)
    with pytest.raises(DataError, match=r"trian\.txt: no such list.*found: train.*did you mean 'train'"):
        load_voc(root, "trian")
    (root / "ImageSets" / "Main" / "empty.txt").write_text("\n")
    with pytest.raises(DataError, match=r"'empty' name no image"):
        load_voc(root, "empty")
    (root / "ImageSets" / "Main").rename(root / "lists")
    with pytest.raises(DataError, match=r"ImageSets/Main: no such folder.*make it with a file train\.txt"):
        load_voc(root, "train")


def test_auto_takes_the_classes_of_the_training_split(tmp_path: Path) -> None:
    write_voc(tmp_path, {"a": [voc_object("dog")], "b": [voc_object("cat")]}, "train")
    write_voc(tmp_path, {"c": [voc_object("cat")]}, "val")
    data = VOC(str(tmp_path), format=VOCFormat(class_names="auto"))
    assert data.class_names == data.annotations("val").class_names == ("cat", "dog")
    write_voc(tmp_path, {"c": [voc_object("fox")]}, "val")
    with pytest.raises(DataError, match=r"c\.xml: object 1 \(fox\)"):
        VOC(str(tmp_path), format=VOCFormat(class_names="auto")).annotations("val")


def test_real_blood_cells(shared_data: Path) -> None:
    root = str(shared_data / "bccd")
    data = VOC(root, test="test", format=VOCFormat(class_names="auto"), on_bad="skip")
    assert data.class_names == ("Platelets", "RBC", "WBC")
    counts = [data.annotations(split).counts for split in ("train", "val", "test")]
    assert [c["images used"] for c in counts] == [205, 87, 72]
    assert sum(c["boxes read"] for c in counts) == 4888
    assert sum(c["boxes used"] for c in counts) == 4886
    assert sum(c.get("boxes skipped: zero or negative size", 0) for c in counts) == 2
    with pytest.raises(DataError, match=r"BloodImage_00343\.xml: object 4 \(RBC\): .* zero or negative size"):
        VOC(root, format=VOCFormat(class_names="auto")).annotations("train")


def test_real_fixture_of_voc(shared_data: Path) -> None:
    a = load_voc(shared_data / "loader_fixtures" / "pascal", "train")
    assert a.boxes.tolist() == [[47, 239, 195, 371], [7, 11, 352, 498]]
    assert [a.class_names[label - 1] for label in a.labels] == ["dog", "person"]


@pytest.mark.parametrize(
    ("encoding", "name"),
    [
        ("big5", "貓"),
        *[(encoding, "猫") for encoding in ("gbk", "GB2312", "utf-16", "utf-8", "gb18030", "UTF-7")],
        *[(encoding, "ネコ") for encoding in ("euc-jp", "shift_jis", "iso-2022-jp")],
        *[("euc-kr", "고양이"), ("latin-1", "Kätzchen"), ("iso-8859-1", "ä"), ("windows-1252", "Kätz€"), ("koi8-r", "кот")],
    ],
)  # fmt: skip
def test_an_xml_is_read_in_the_encoding_that_it_declares(tmp_path: Path, encoding: str, name: str) -> None:
    root = write_voc(tmp_path, {"a": [voc_object(name)]})
    path = root / "Annotations" / "a.xml"
    text = path.read_text(encoding="utf-8")
    path.write_bytes(f'<?xml version="1.0" encoding="{encoding}"?>\n{text}'.encode(encoding))
    assert load_voc(root, "train", "auto").class_names == (name,)


@pytest.mark.parametrize(
    ("content", "kind", "says"),
    [
        ('<?xml version="1.0" encoding="gbk"?><annotation>\x80\xff</annotation>', "annotation unreadable", "is not in gbk"),
        ('<?xml version="1.0" encoding="klingon"?><annotation/>', "annotation unreadable", "unknown encoding: klingon"),
        ('<?xml version="1.0" encoding="hex"?><annotation/>', "annotation unreadable", "'hex'"),
        ("<annotation>\xe4</annotation>", "annotation unreadable", "not well-formed"),
        ("", "annotation unreadable", "no element found"),
        ("<html><body/></html>", "no annotation", "its root is 'html', expected 'annotation'"),
        ("<annotations><image/></annotations>", "no annotation", "its root is 'annotations'"),
    ],
)  # fmt: skip
def test_an_xml_that_annotates_nothing_is_named(tmp_path: Path, content: str, kind: str, says: str) -> None:
    root = write_voc(tmp_path)
    (root / "Annotations" / "a.xml").write_bytes(content.encode("latin-1"))
    with pytest.raises(DataError) as caught:
        load_voc(root, "train", ["cat", "dog"])
    assert "a.xml: " in str(caught.value)
    assert says in str(caught.value)
    assert load_voc(root, "train", ["cat", "dog"], on_bad="skip").counts[f"images skipped: {kind}"] == 1


@pytest.mark.parametrize("encoding", ["utf-16", "utf-32"])
def test_a_declaration_that_the_file_itself_contradicts(tmp_path: Path, encoding: str) -> None:
    root = write_voc(tmp_path, {"a": [voc_object("Kätzchen")]})
    path = root / "Annotations" / "a.xml"
    path.write_text(f'<?xml version="1.0" encoding="{encoding}"?>{path.read_text("utf-8")}', "utf-8")
    assert load_voc(root, "train", "auto").class_names == ("Kätzchen",)


def test_entities_are_refused_in_every_encoding(tmp_path: Path) -> None:
    root = write_voc(tmp_path)
    for encoding in ("gbk", "utf-7", "utf-16"):
        (root / "Annotations" / "a.xml").write_bytes(
            f'<?xml version="1.0" encoding="{encoding}"?>{BOMB}'.encode(encoding)
        )
        with pytest.raises(DataError, match=r"a\.xml: refused, it declares an XML entity"):
            load_voc(root, "train", ["cat", "dog"])


def test_sizes_may_be_written_with_decimals_or_be_empty(tmp_path: Path) -> None:
    root = write_voc(tmp_path)
    for old, new in (("<width>60", "<width>60.0"), ("<height>40", "<height>")):
        xml = root / "Annotations" / "a.xml"
        xml.write_text(xml.read_text().replace(old, new))
        assert load_voc(root, "train", ["cat", "dog"]).sizes[0].tolist() == [40, 60]


def test_tags_may_be_written_in_capitals(tmp_path: Path) -> None:
    root = write_voc(tmp_path)
    boxes = load_voc(root, "train", ["cat", "dog"]).boxes.tolist()
    for xml in (root / "Annotations").iterdir():
        xml.write_text(re.sub(r"<[^>]+>", lambda tag: tag[0].upper(), xml.read_text()))
    assert load_voc(root, "train", ["cat", "dog"]).boxes.tolist() == boxes


def test_of_images_with_one_name_the_xml_decides(tmp_path: Path) -> None:
    root = write_voc(tmp_path)
    picture(40, 60).save(root / "JPEGImages" / "a.png")
    with pytest.raises(
        DataError, match=r"a\.xml: is the annotation of a\.jpg and a\.png, and its filename 'wrong-name' is neither"
    ):
        load_voc(root, "train", ["cat", "dog"])
    xml = root / "Annotations" / "a.xml"
    xml.write_text(xml.read_text().replace("wrong-name", "C:\\pictures\\a.png"))
    assert load_voc(root, "train", ["cat", "dog"]).file_names[0] == "JPEGImages/a.png"
    (root / "ImageSets" / "Main" / "train.txt").write_text("a.jpg\nb\n")  # or the list
    assert load_voc(root, "train", ["cat", "dog"]).file_names[0] == "JPEGImages/a.jpg"


def test_lists_with_suffixes_name_what_is_missing(tmp_path: Path) -> None:
    root = write_voc(tmp_path)
    (root / "ImageSets" / "Main" / "train.txt").write_text("a.jpg\nb.png\nz.bmp\n")
    picture(40, 60).save(root / "JPEGImages" / "b.bmp")
    (root / "JPEGImages" / "b.jpg").unlink()
    with pytest.raises(DataError, match=r"z\.xml: no such annotation file"):
        load_voc(root, "train", ["cat", "dog"])
    (root / "Annotations" / "z.xml").write_text("<annotation/>")
    with pytest.raises(DataError, match=r"z\.bmp: no such image file"):
        load_voc(root, "train", ["cat", "dog"])
    names = load_voc(root, "train", ["cat", "dog"], on_bad="skip").file_names.tolist()
    assert names == ["JPEGImages/a.jpg", "JPEGImages/b.bmp"]


def test_without_lists_each_image_has_an_xml_and_each_xml_an_image(tmp_path: Path) -> None:
    for stem in "abc":
        picture(40, 60).save(tmp_path / f"{stem}.jpg")
        (tmp_path / f"{stem}.xml").write_text(f"<annotation>{voc_object()}</annotation>")
    (tmp_path / "a.xml").unlink()
    (tmp_path / "b.jpg").unlink()
    with pytest.raises(DataError) as caught:
        load_voc(tmp_path, "all", "auto")
    assert "a.xml: no such annotation file" in str(caught.value)
    assert "b.xml: has no size, and its image: " in str(caught.value)
    a = load_voc(tmp_path, "all", "auto", on_bad="skip")
    assert a.file_names.tolist() == ["c.jpg"]
    assert a.counts["images read"] == 3


def test_each_xml_is_parsed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_voc(tmp_path, {"a": [voc_object("lynx")]}, "train")
    write_voc(tmp_path, {"b": [voc_object("lynx")]}, "val")
    parsed: list[str] = []
    read = voc_xml.read_xml
    monkeypatch.setattr(voc_xml, "read_xml", lambda path: (parsed.append(path.name), read(path))[1])
    for class_names in (None, "auto"):
        VOC(str(tmp_path), format=VOCFormat(class_names=class_names)).setup("fit")
        assert sorted(parsed) == ["a.xml", "b.xml"]
        parsed.clear()


def test_few_files_lie_between_xml_and_the_batch_of_a_training_step(tmp_path: Path) -> None:
    write_voc(tmp_path)
    data = VOC(str(tmp_path), val="train", loader=Loader(batch_size=2, num_workers=0))
    package, entered = Path(str(detpipe.__file__)).parent, dict[str, None]()

    def note(frame: FrameType, event: str, _: object) -> None:
        path, name = Path(frame.f_code.co_filename), frame.f_code.co_name
        if event == "call" and path.is_relative_to(package) and (entered or name == "read_xml"):
            entered.setdefault(path.relative_to(package).as_posix())

    before = sys.getprofile()
    sys.setprofile(note)
    try:
        data.annotations("train")
        images, targets = next(iter(data.train_dataloader()))
    finally:
        sys.setprofile(before)
    assert len(images) == len(targets) == 2
    assert next(iter(entered)) == "datasets/formats/voc_xml.py"
    assert len(entered) <= 12, list(entered)


def test_the_classes_are_vocs_unless_others_occur(tmp_path: Path) -> None:
    write_voc(tmp_path, {"a": [voc_object("dog")]}, "train")
    write_voc(tmp_path, {"b": [voc_object("cat")]}, "val")
    assert VOC(str(tmp_path)).num_classes == 20
    assert VOC(str(tmp_path), train="gone").num_classes == 20  # evaluated alone
    write_voc(tmp_path, {"a": [voc_object("dog")], "c": [voc_object("lynx")], "d": [voc_object("cat")]}, "train")
    assert VOC(str(tmp_path)).class_names == ("cat", "dog", "lynx")


def test_a_split_that_is_not_there_is_told_what_is(tmp_path: Path) -> None:
    picture(40, 60).save(tmp_path / "a.jpg")
    (tmp_path / "a.xml").write_text(f"<annotation>{voc_object('lynx')}</annotation>")
    with pytest.raises(DataError, match=r"wanted for the split 'train'; make it .*'all'.*split: \{val: 0\.2\}"):
        VOC(str(tmp_path)).annotations("train")

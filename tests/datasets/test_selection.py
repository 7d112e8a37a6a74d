"""Settings that all data sets share: which part is what split, which classes are learned, and where images may lie."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from detpipe.datasets import COCO, VOC, YOLO, CSVBoxes, DetectionData
from detpipe.datasets.classes import Classes
from detpipe.support.errors import DataError

from .builders import picture, voc_object, write_csv, write_voc, write_yolo
from .fault_cases import FIRST, TEXT, listed, sound
from .layout_cases import LAYOUTS

MODULES: dict[str, Callable[..., DetectionData]] = {"coco": COCO, "voc": VOC, "yolo": YOLO, "csv": CSVBoxes}
ONE_SPLIT = [
    case
    for case in LAYOUTS
    if case.name in ("xml beside images", "bmp and a list", "classes.txt", "obj.data", "table of another name")
]


@pytest.mark.parametrize("case", ONE_SPLIT, ids=str)
def test_the_only_split_is_divided(case: Any, tmp_path: Path) -> None:
    data = MODULES[case.layout](str(case.write(tmp_path)), split={"val": 0.25, "test": 0.25})
    data.setup("fit")
    parts = {split: set(data.annotations(split).file_names.tolist()) for split in ("train", "val", "test")}
    assert sum(map(len, parts.values())) == len(set().union(*parts.values())) == 4
    assert all(parts.values())
    counts = [data.annotations(split).counts for split in ("train", "val", "test")]
    assert sum(c["images read"] for c in counts) == sum(c["images used"] for c in counts) == 4
    assert sum(c["boxes used"] for c in counts) == 4
    assert data.class_names == ("ball", "box")
    batches = data.val_dataloader()
    assert sum(len(images) for images, _ in batches) == len(parts["val"])


@pytest.fixture
def animals(tmp_path: Path) -> Path:
    objects = {"a": [voc_object("cat"), voc_object("kitty")], "b": [voc_object("dog")], "c": [voc_object("owl")]}
    return write_voc(tmp_path, objects)


def read(root: Path, **classes: Any) -> Any:
    return VOC(str(root), classes=Classes(**classes)).annotations("train")


def test_classes_are_kept_renamed_and_merged(animals: Path) -> None:
    a = read(animals, keep=["dog", "cat"], rename={"kitty": "cat"})
    assert a.class_names == ("dog", "cat")
    assert a.labels.tolist() == [2, 2, 1]
    assert a.offsets.tolist() == [0, 2, 3, 3]  # the owl's image is background
    assert (a.counts["boxes read"], a.counts["boxes used"], a.counts["boxes skipped: class not kept"]) == (4, 3, 1)
    assert read(animals, rename={"owl": "bird", "dog": "pet", "cat": "pet", "kitty": "pet"}).class_names == (
        "pet",
        "bird",
    )
    exchanged = read(animals, rename={"cat": "dog", "dog": "cat"})
    assert [exchanged.class_names[label - 1] for label in exchanged.labels] == ["dog", "kitty", "cat", "owl"]
    assert read(animals, keep=["cat"], rename={"kitty": "cat"}).category_ids == (1,)
    moved = read(animals, rename={"cat": "dog", "dog": "owl"})
    assert (moved.class_names, moved.category_ids) == (("dog", "owl", "kitty"), (1, 4, 3))


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        ({"keep": ["cat", "dgo"]}, r"classes\.keep names 'dgo', which .* did you mean 'dog'"),
        ({"rename": {"kity": "cat"}}, r"classes\.rename names 'kity', .* there are cat, dog, kitty, owl.*'kitty'"),
        ({"keep": ["kitty"], "rename": {"kitty": "cat"}}, r"'kitty', which .* has no class of after renaming"),
    ],
)
def test_classes_that_are_not_there_are_named(animals: Path, classes: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        read(animals, **classes)


def test_splits_agree_on_chosen_classes_in_each_format(tmp_path: Path) -> None:
    for layout, module in MODULES.items():
        sound(layout, tmp_path / layout)
        names = {"train": "train", "val": "train"} if layout != "csv" else {"train": "all", "val": "all"}
        data = module(str(tmp_path / layout), classes=Classes(keep=["cat"], rename={"dog": "cat"}), **names)
        data.setup("fit")
        assert data.class_names == ("cat",)
        assert set(data.annotations("val").labels.tolist()) == {1}


@pytest.mark.parametrize("layout", ["coco", "voc", "yolo", "csv"])
def test_linked_images_are_read_if_that_is_allowed(layout: str, tmp_path: Path) -> None:
    sound(layout, tmp_path / "set")
    image = tmp_path / "set" / FIRST[layout]
    image.rename(tmp_path / "outside.jpg")
    image.symlink_to(tmp_path / "outside.jpg")
    name = "all" if layout == "csv" else "train"
    with pytest.raises(DataError, match="is a link that leads out of the folder; allow_links: true permits it"):
        MODULES[layout](str(tmp_path / "set"), train=name).annotations("train")
    data = MODULES[layout](str(tmp_path / "set"), train=name, allow_links=True)
    assert len(data.annotations("train")) == 3
    assert data.dataset("train")[0, 0][0].shape == (3, 40, 60)


def test_absolute_lists_are_read_if_that_is_allowed(tmp_path: Path) -> None:
    outside = tmp_path / "elsewhere" / "images"
    outside.mkdir(parents=True)
    picture(40, 60).save(outside / "x.jpg")
    (tmp_path / "elsewhere" / "labels").mkdir()
    (tmp_path / "elsewhere" / "labels" / "x.txt").write_text("0 .5 .5 .5 .5\n")
    yolo = write_yolo(tmp_path / "yolo", few="few.txt")
    (yolo / "few.txt").write_text(f"{outside / 'x.jpg'}\n./images/train/a.jpg\n")
    csv = write_csv(tmp_path / "csv", [f"{outside / 'x.jpg'},1,2,3,4,cat"])
    voc = write_voc(tmp_path / "voc", {"x": [voc_object()]})
    (voc / "JPEGImages" / "x.jpg").unlink()
    (voc / "ImageSets" / "Main" / "few.txt").write_text(f"{outside / 'x.jpg'}\n")
    for module, root, name in ((YOLO, yolo, "few"), (CSVBoxes, csv.parent, "all"), (VOC, voc, "few")):
        with pytest.raises(DataError, match=r"leads out of .*allow_links: true permits it"):
            module(str(root), train=name).annotations("train")
        data = module(str(root), train=name, allow_links=True)
        a = data.annotations("train")
        assert (a.root / str(a.file_names[0])).samefile(outside / "x.jpg")
        assert a.offsets[1] == 1
        assert data.dataset("train")[0, 0][0].shape == (3, 40, 60)


@pytest.mark.parametrize("layout", ["coco", "voc", "yolo", "csv"])
def test_another_suffix_or_capitals_than_the_annotations_name_are_found(layout: str, tmp_path: Path) -> None:
    sound(layout, tmp_path)
    image = tmp_path / FIRST[layout]
    picture(40, 60).save(image.with_suffix(".BMP"))
    image.unlink()
    if layout == "yolo":
        listed("images/train/A.JPG\n")(tmp_path)
    name = "all" if layout == "csv" else "train"
    data = MODULES[layout](str(tmp_path), train=name)
    assert data.annotations("train").file_names[0] == Path(FIRST[layout]).with_suffix(".BMP").as_posix().removeprefix(
        "train/" if layout == "coco" else ""
    )
    assert data.dataset("train")[0, 0][0].shape == (3, 40, 60)


@pytest.mark.parametrize("layout", ["coco", "csv"])
def test_one_file_is_not_two_images_that_are_called_otherwise(layout: str, tmp_path: Path) -> None:
    sound(layout, tmp_path)
    first = tmp_path / FIRST[layout]
    second = first.with_name("1.jpg" if layout == "coco" else "b.jpg")
    second.unlink()
    text = tmp_path / TEXT[layout]
    text.write_text(text.read_text().replace(second.name, first.with_suffix(".png").name))
    with pytest.raises(DataError, match=rf"{first.with_suffix('.png').name}.*(is missing|no such image file)"):
        MODULES[layout](str(tmp_path), train="all" if layout == "csv" else "train").annotations("train")

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from datasets.builders import HEADER, coco_content, picture, voc_object, write_coco, write_csv, write_voc, write_yolo
from datasets.test_unpack import tar_of, zip_of
from PIL import Image

from detpipe import cli
from detpipe.commands.data_split import read_parts
from detpipe.datasets.formats.recognize import open_split, recognize
from detpipe.support.errors import DataError, UsageError

main = partial(cli.run, group="data")


@pytest.fixture
def voc(tmp_path: Path) -> Path:
    """Twelve images in a list: eight with a cat and a dog, four with two cats."""
    both, cats = [voc_object(), voc_object("dog", (3, 5, 60, 40))], [voc_object(), voc_object(box=(2, 2, 30, 30))]
    root = write_voc(tmp_path / "voc", {f"im{i}": both if i < 8 else cats for i in range(12)}, "all")
    for i in range(12):  # builders paint alike what is far apart
        picture(40, 60, 3 * i + 1).save(root / "JPEGImages" / f"im{i}.jpg", quality=95)
    return root


def test_help_and_mistakes(capsys, tmp_path):
    assert main(["--help"]) == 0
    assert "check PATH" in capsys.readouterr().out
    assert main([]) == 2
    with pytest.raises(
        UsageError, match=r"unknown command 'chek': expected check, info, show, .*; did you mean 'check'"
    ):
        main(["chek"])
    with pytest.raises(UsageError, match="required: PATH; see 'detpipe data check --help'"):
        main(["check"])
    with pytest.raises(UsageError, match=r"^\S*nowhere does not exist; expected a folder in VOC layout"):
        main(["info", str(tmp_path / "nowhere")])
    with pytest.raises(UsageError, match=r"has no known layout; expected"):
        main(["info", str(tmp_path)])


@pytest.mark.parametrize("command", cli.COMMANDS["data"])
def test_each_command_has_help(command, capsys):
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0
    assert f"usage: detpipe data {command}" in capsys.readouterr().out


def test_the_command_line_knows_it(capsys, voc):
    assert cli.main(["data", "check", str(voc), "--no-decode"]) == 0
    assert "0 errors, 0 warnings; images not decoded" in capsys.readouterr().out
    assert cli.main(["data", "check", str(voc), "--split", "test"]) == 1
    assert cli.main(["data", "check"]) == 2


def test_check_lists_every_kind_with_the_first_of_each(voc, capsys, tmp_path):
    write_voc(voc, {"bad": [voc_object(), *[voc_object(box=(5, 5, 5, 9))] * 3, voc_object(difficult="x")]}, "more")
    (voc / "JPEGImages" / "im1.jpg").write_bytes(b"x")
    (voc / "JPEGImages" / "im2.jpg").unlink()
    out = tmp_path / "report.json"
    assert main(["check", str(voc), "--show", "2", "--json", str(out)]) == 1
    shown = capsys.readouterr().out
    assert (
        "all: 10 of 12 images and 20 of 24 boxes can be used; boxes skipped: image skipped: 4; images skipped" in shown
    )
    assert "6 errors\n  boxes: zero or negative size (3)\n    more: " in shown
    assert "    and 1 more\n" in shown
    assert "images: unreadable (1)" in shown
    assert "images: file missing (1)" in shown
    assert "with on_bad 'skip' it leaves out faulty boxes and images" in shown
    report = json.loads(out.read_text())
    assert len(report["errors"]["boxes: zero or negative size"]) == 3
    assert report["data"] == str(voc)
    assert set(report) == {"data", "splits", "errors", "warnings"}
    assert main(["check", str(voc), "--show", "0", "--split", "more"]) == 1
    shown = capsys.readouterr().out
    assert "bad.xml" not in shown
    assert "boxes: zero or negative size (3)" in shown
    with pytest.raises(UsageError, match="--show must be 0 or more, got -1"):
        main(["check", str(voc), "--show", "-1"])


def test_check_says_once_what_several_splits_share(voc, capsys):
    write_voc(voc, {"bad": [voc_object(), voc_object(box=(5, 5, 5, 9))]}, "more")
    (voc / "ImageSets" / "Main" / "most.txt").write_text("bad\nim0\n")
    assert main(["check", str(voc)]) == 1
    shown = capsys.readouterr().out
    assert "1 errors\n  boxes: zero or negative size (1)\n    more, most: " in shown


@pytest.mark.parametrize(("name", "status"), [("a.jpg", 0), ("../../evil", 1)])
def test_check_looks_at_archives_without_unpacking(name, status, tmp_path, capsys):
    for make in (tar_of, zip_of):
        path = make(
            tmp_path / f"set.{make.__name__[:3]}", {"fine": b"1", name: b"2", "/also": b"3"} if status else {name: b"2"}
        )
        assert main(["check", str(path)]) == status
        shown = capsys.readouterr().out
        assert f"{2 * status} errors; its images and annotations" in shown
        assert shown.count("leads out of the folder") == 2 * status
    assert {path.name for path in tmp_path.iterdir()} == {"set.tar", "set.zip"}
    (tmp_path / "set.zip").write_bytes(b"x")
    assert main(["check", str(tmp_path / "set.zip")]) == 1
    assert "cannot be read as a .zip" in capsys.readouterr().out
    with pytest.raises(UsageError, match=r"gone\.zip does not exist"):
        main(["check", str(tmp_path / "gone.zip")])


def test_check_says_what_skipping_would_not_help(tmp_path, capsys):
    content = coco_content()
    content["images"].append(dict(content["images"][0]))
    path, _ = write_coco(tmp_path)
    path.write_text(json.dumps(content))
    assert main(["check", str(tmp_path)]) == 1
    assert "training refuses these data; even with on_bad skip" in capsys.readouterr().out


def test_a_file_needs_its_images_and_has_no_splits(tmp_path, capsys):
    path, folder = write_coco(tmp_path, split="val2017")
    with pytest.raises(UsageError, match="is an annotation file: say with --images where"):
        main(["check", str(path)])
    assert main(["check", str(path), "--images", str(folder)]) == 0
    assert "val2017: 3 of 3 images" in capsys.readouterr().out
    with pytest.raises(UsageError, match=r"--split x: .*\.json has no splits"):
        main(["check", str(path), "--images", str(folder), "--split", "x"])
    with pytest.raises(UsageError, match="has no such split; there are val2017; did you mean 'val2017'"):
        main(["check", str(tmp_path), "--split", "val2016"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["info", "{voc}", "--images", "{voc}"], "--images .* is for an annotation file or a table, but .* is read as VOC: XML"),
        (["info", "{yolo}", "--zero-based"], "--zero-based: is for VOC layout, but .* is read as YOLO: data.yaml; leave it out"),
        (["info", "{yolo}/data.yaml", "--layout", "voc"], "--layout voc: .* is a file, which is read as YOLO"),
        (["info", "{voc}", "--min-size", "900", "--max-size", "300"], "--min-size 900 is above --max-size 300"),
        (["info", "{voc}", "-o", "{yolo}/data.yaml"], r"--output .*data\.yaml: is a file: name a folder"),
        (["show", "{voc}", "-o", "x.png", "--classes", "dog", "cta"], "--classes cta: there are no such classes; did you mean"),
        (["check", "{voc}", "--range", "many"], "--range many: expected dtype, or black and white as 0,65535"),
        (["check", "{voc}", "--json", "{voc}"], "--json .*: is a folder: name a file"),
        (["convert", "{yolo}", "--to", "coco", "-o", "x", "--drop-flagged"], "--drop-flagged: is for YOLO layout, coco keeps"),
        (["split", "{voc}", "-o", "x", "--parts", "..=.5,b=.5"], "expected NAME=SHARE .* got '..=.5'"),
    ],
)  # fmt: skip
def test_options_without_effect_and_wrong_values_are_refused(voc, tmp_path, monkeypatch, arguments, message):
    yolo = write_yolo(tmp_path / "yolo", {"a": "0 .5 .5 .5 .5"})
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=message) as caught:
        main([argument.format(voc=voc, yolo=yolo) for argument in arguments])
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "x").exists()


def test_splits_that_can_be_read_are_named_where_one_cannot(tmp_path, capsys):
    root = write_yolo(tmp_path, {"a": "0 .5 .5 .5 .5"})
    write_yolo(root, {"b": "0 .5 .5 .5 .5"}, "val")
    (root / "labels" / "val" / "b.txt").unlink()
    with pytest.raises(
        DataError, match=r"none of the 1 images of val has a label file.*; --split train leaves the split val out"
    ):
        main(["info", str(root)])
    assert main(["info", str(root), "--split", "train"]) == 0


@pytest.mark.parametrize(
    ("given", "sizes"), [([], (480, 800)), (["--min-size", "900"], (900, 900)), (["--max-size", "300"], (300, 300))]
)
def test_a_size_that_is_not_given_makes_room_for_the_other(voc, capsys, given, sizes):
    assert main(["info", str(voc), *given]) == 0
    assert f"--model.min_size {sizes[0]} --model.max_size {sizes[1]}" in capsys.readouterr().out


@pytest.mark.parametrize("write", [write_voc, write_coco, write_yolo, write_csv])
def test_images_that_links_lead_to_are_taken_on_request(write, tmp_path, capsys):
    root = tmp_path / "set"
    write(root)
    for number, image in enumerate([path for path in root.rglob("*") if path.suffix in (".jpg", ".png")]):
        image.rename(elsewhere := tmp_path / f"{number}{image.suffix}")
        image.symlink_to(elsewhere)
    with pytest.raises(DataError, match="leads out of the folder; --allow-links permits it"):
        main(["info", str(root)])
    assert main(["info", str(root), "--allow-links"]) == 0
    assert "--data.allow_links true" in capsys.readouterr().out
    assert main(["check", str(root), "--allow-links"]) == 0


def test_info_counts_measures_and_draws(voc, capsys, tmp_path):
    out = tmp_path / "info"
    assert main(["info", str(voc), "-o", str(out), "--min-size", "80", "--max-size", "200", "--sizes", "2"]) == 0
    shown = capsys.readouterr().out
    assert "all: 12 images, 24 boxes, 2 classes" in shown
    assert "  cat       16      12\n  dog        8       8\n" in shown
    assert "anchors for images resized to 80 (at most 200): sizes [" in shown
    assert sorted(path.name for path in out.iterdir()) == ["boxes_all.png", "classes.png", "images.png", "info.json"]
    facts = json.loads((out / "info.json").read_text())
    assert facts["splits"]["all"]["classes"]["dog"] == {"boxes": 8, "images": 8}
    assert len(facts["anchors"]["splits"]["all"]["sizes"]) == 2
    with pytest.raises(UsageError, match="--min-size must be 1 or more, got 0"):
        main(["info", str(voc), "--min-size", "0"])


def test_info_refuses_faults_or_counts_them(voc, capsys):
    write_voc(voc, {"im0": [voc_object(), voc_object(box=(5, 5, 5, 9))]}, "one")
    with pytest.raises(DataError, match="zero or negative size; correct them, or add --skip-bad to leave"):
        main(["info", str(voc), "--split", "one"])
    assert main(["info", str(voc), "--split", "one", "--skip-bad"]) == 0
    assert "  boxes skipped: zero or negative size: 1\n" in capsys.readouterr().out


def test_info_of_many_classes_and_of_no_boxes(tmp_path, capsys):
    root = write_yolo(tmp_path, {"a": "0 .5 .5 .5 .5"}, names=[f"class {k}" for k in range(30)])
    write_yolo(root, {"b": ""}, "val")
    assert main(["info", str(root), "-o", str(tmp_path / "out")]) == 0
    shown = capsys.readouterr().out
    assert "10 more classes with 0 boxes" in shown
    assert "val: 1 images, 0 boxes, 30 classes" in shown
    assert not (tmp_path / "out" / "boxes_val.png").exists()


def test_show_draws_a_sheet_that_follows_the_seed(voc, tmp_path, capsys):
    pixels = []
    for name, seed in (("a", "0"), ("b", "0"), ("c", "1")):
        assert main(["show", str(voc), "-o", str(tmp_path / f"{name}.png"), "-n", "4", "--seed", seed]) == 0
        pixels.append(np.asarray(Image.open(tmp_path / f"{name}.png")))
    assert "wrote 4 images to" in capsys.readouterr().out
    assert np.array_equal(pixels[0], pixels[1])
    assert not np.array_equal(pixels[0], pixels[2])
    assert pixels[0].shape[1] == 2 * 370 + 10


def test_show_writes_a_picture_an_image_of_some_classes(voc, tmp_path):
    out = tmp_path / "pictures"
    assert main(["show", str(voc), "-o", str(out), "--classes", "dog", "-n", "99"]) == 0
    assert sorted(path.name for path in out.iterdir()) == [f"all_JPEGImages_im{i}.png" for i in range(8)]
    with pytest.raises(
        UsageError, match=r"--classes dgo: there are no such classes; did you mean 'dog'.*; there are cat, dog"
    ):
        main(["show", str(voc), "-o", str(out), "--classes", "dgo"])
    with pytest.raises(UsageError, match=r"expected a name that ends in \.png, or a folder"):
        main(["show", str(voc), "-o", "sheet.jpg"])
    with pytest.raises(UsageError, match="-n must be 1 or more"):
        main(["show", str(voc), "-o", str(out), "-n", "0"])
    (voc / "ImageSets" / "Main" / "cats.txt").write_text("im9\n")
    (voc / "detpipe.json").write_text('{"class_names": ["cat", "dog"], "category_ids": [1, 2]}')
    with pytest.raises(UsageError, match="no image has an object of these classes"):
        main(["show", str(voc), "--split", "cats", "-o", str(out), "--classes", "dog"])


def test_show_writes_a_picture_for_each_of_several_images_of_one_stem(tmp_path):
    root = write_csv(tmp_path, ["a.jpg,1,2,11,22,dog", "a.png,1,2,11,22,dog"]).parent
    picture(40, 60).save(root / "a.png")
    assert main(["show", str(root), "-o", str(tmp_path / "out")]) == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["train_a.png", "train_a_2.png"]


def test_show_of_splits_with_other_classes(tmp_path):
    write_coco(tmp_path, split="train")
    content = coco_content()
    content["categories"].append({"id": 91, "name": "fox"})
    write_coco(tmp_path, content, "val")
    with pytest.raises(UsageError, match="the splits have other classes: show one at a time"):
        main(["show", str(tmp_path), "-o", str(tmp_path / "a.png")])
    assert main(["show", str(tmp_path), "-o", str(tmp_path / "a.png"), "--split", "val"]) == 0


@pytest.mark.parametrize("layout", ["coco", "voc", "yolo", "csv"])
def test_convert_writes_each_layout(voc, tmp_path, layout, capsys):
    out = tmp_path / "out"
    assert main(["convert", str(voc), "--to", layout, "-o", str(out), "--image-files", "link"]) == 0
    assert f"wrote 12 images with 24 boxes to {out} (all)" in capsys.readouterr().out
    first, second = (open_split(str(root), "all").annotations("val") for root in (voc, out))
    np.testing.assert_allclose(sorted(first.boxes.tolist()), sorted(second.boxes.tolist()), atol=1e-9)
    with pytest.raises(UsageError, match=r"--output .*out is there already"):
        main(["convert", str(voc), "--to", layout, "-o", str(out)])


def test_convert_says_what_is_not_kept(tmp_path, capsys):
    content = coco_content()
    content["annotations"][0].update(iscrowd=1, segmentation=[[1, 2, 3, 4, 5, 6]])
    content["annotations"][1].update(bbox=[50, 5, 20, 20], keypoints=[1, 2, 2])
    content["annotations"][2]["bbox"] = [5, 5, 0, 0]
    write_coco(tmp_path, content)
    arguments = ["convert", str(tmp_path), "--to", "yolo", "-o", str(tmp_path / "yolo"), "--skip-bad"]
    with pytest.raises(DataError, match="1 crowd regions and 0 difficult objects are flagged"):
        main(arguments)
    assert main([*arguments, "--drop-flagged"]) == 0
    shown = capsys.readouterr().out
    for line in (
        "wrote 3 images with 2 boxes",
        "train: boxes clipped: 1",
        "train: boxes skipped: zero or negative size: 1",
        "1 crowd regions and 0 difficult objects are left out",
        "image ids are not kept",
        "train: field keypoints of 1 annotations is not kept",
    ):
        assert line in shown
    assert "segmentation" not in shown  # it went with its object
    with pytest.raises(UsageError, match="not allowed with argument --drop-flags"):
        main([*arguments, "--drop-flags", "--drop-flagged"])


POLYGON, RUNS = [[1, 2, 11, 2.5, 11, 22]], {"size": [40, 60], "counts": [5, 10, 2385]}


@pytest.mark.parametrize("path", [["coco"], ["voc"], ["csv"], ["yolo"], ["yolo", "voc", "csv", "yolo"]], ids="-".join)
def test_segmentations_come_back_whatever_the_way(path, tmp_path):
    """As they were, to the digit; faulty boxes are left out with theirs, and splits may be divided anew on the way."""
    content = coco_content()
    content["annotations"][0]["segmentation"] = POLYGON
    content["annotations"][1]["bbox"] = [5, 5, 0, 0]  # out of the file's order: the second of its image
    content["annotations"][1]["segmentation"] = [[0, 0, 1, 0, 1, 1]]
    content["annotations"][3]["segmentation"] = RUNS
    write_coco(tmp_path / "0", content)
    for step, layout in enumerate([*path, "coco"]):
        out = str(tmp_path / str(step + 1))
        assert main(["convert", str(tmp_path / str(step)), "--to", layout, "-o", out, "--skip-bad"]) == 0
    found = json.loads((Path(out) / "annotations" / "instances_train.json").read_text())
    assert [a.get("segmentation") for a in found["annotations"]] == [POLYGON, None, RUNS]
    assert main(["split", out, "-o", str(tmp_path / "parts"), "--parts", "a=1,b=1,c=1", "--to", "voc"]) == 0
    assert main(["convert", str(tmp_path / "parts"), "--to", "coco", "-o", str(tmp_path / "end")]) == 0
    ends = [json.loads(file.read_text())["annotations"] for file in (tmp_path / "end" / "annotations").iterdir()]
    kept = [a["segmentation"] for annotations in ends for a in annotations if "segmentation" in a]
    assert sorted(kept, key=str) == sorted([POLYGON, RUNS], key=str)


def test_segmentations_that_no_longer_fit_are_named(tmp_path, capsys):
    content = coco_content()
    content["annotations"][0]["segmentation"] = POLYGON
    write_coco(tmp_path / "coco", content)
    assert main(["convert", str(tmp_path / "coco"), "--to", "yolo", "-o", str(tmp_path / "yolo")]) == 0
    shown = capsys.readouterr().out
    assert (
        "train: 1 segmentations are in segmentations_train.json, for a conversion back; this layout has boxes" in shown
    )
    labels = tmp_path / "yolo" / "labels" / "train" / "0.txt"
    labels.write_text(labels.read_text() + "0 .5 .5 .1 .1\n")
    with pytest.raises(DataError, match=r"segmentations_train\.json: 'images/train/0\.jpg' has 3 boxes, but here"):
        main(["convert", str(tmp_path / "yolo"), "--to", "coco", "-o", str(tmp_path / "back")])
    assert not (tmp_path / "back").exists()


def test_polygons_of_yolo_become_segmentations(tmp_path):
    root = write_yolo(tmp_path / "yolo", {"a": "0 .1 .1 .5 .1 .5 .75\n1 .5 .5 .5 .5\n", "b": ""})
    assert main(["convert", str(root), "--to", "coco", "-o", str(tmp_path / "coco")]) == 0
    found = json.loads((tmp_path / "coco" / "annotations" / "instances_train.json").read_text())["annotations"]
    assert found[0]["segmentation"] == [pytest.approx([6, 4, 30, 4, 30, 30])]
    assert found[0]["bbox"] == pytest.approx([6, 4, 24, 26])
    assert "segmentation" not in found[1]
    write_yolo(root, {"a": "0 .1 .1 .5 .1 .5 .75\n1 .5 .5 0 .5\n"})
    assert main(["convert", str(root), "--to", "coco", "-o", str(tmp_path / "other"), "--skip-bad"]) == 0
    other = json.loads((tmp_path / "other" / "annotations" / "instances_train.json").read_text())["annotations"]
    assert [one["segmentation"] for one in other] == [found[0]["segmentation"]]


def test_real_segmentations_come_back(shared_data, tmp_path):
    source = shared_data / "coco_mini"
    for step, (layout, given) in enumerate([("voc", source), ("csv", tmp_path / "0"), ("coco", tmp_path / "1")]):
        assert (
            main(["convert", str(given), "--to", layout, "-o", str(tmp_path / str(step)), "--image-files", "link"]) == 0
        )
    for split in ("train2017", "val2017"):
        one, other = (
            json.loads((root / "annotations" / f"instances_{split}.json").read_text())["annotations"]
            for root in (source, tmp_path / "2")
        )
        key = lambda a: (a["image_id"], a["category_id"], [round(v, 6) for v in a["bbox"]], a["iscrowd"])  # noqa: E731
        assert sorted(([*key(a), a["segmentation"]] for a in one), key=str) == sorted(
            ([*key(a), a["segmentation"]] for a in other), key=str
        )


def test_convert_of_voc_counted_from_0(tmp_path):
    root = write_voc(tmp_path / "voc", {"a": [voc_object(box=(0, 3, 20, 10))]})
    with pytest.raises(DataError, match=r"one_based is on.*; add --zero-based if this data counts from 0"):
        main(["convert", str(root), "--to", "csv", "-o", str(tmp_path / "csv")])
    assert main(["convert", str(root), "--zero-based", "--to", "csv", "-o", str(tmp_path / "csv")]) == 0
    assert open_split(str(tmp_path / "csv"), "train").annotations("val").boxes.tolist() == [[0, 3, 20, 10]]


def test_split_shares_out_the_classes(voc, tmp_path, capsys):
    out = tmp_path / "parts"
    assert main(["split", str(voc), "-o", str(out), "--parts", "train=.5,val=.25,test=.25"]) == 0
    shown = capsys.readouterr().out
    assert "images       12        6  50.0%        3  25.0%        3  25.0%\n" in shown
    assert "dog           8        4  50.0%        2  25.0%        2  25.0%\n" in shown
    assert recognize(str(out)).splits == ("train", "val", "test")  # in the layout that it had
    names = [
        str(n)
        for split in recognize(str(out)).splits
        for n in open_split(str(out), split).annotations("val").file_names
    ]
    assert sorted(names) == sorted(f"JPEGImages/im{i}.jpg" for i in range(12))
    assert (
        main(["split", str(voc), "-o", str(tmp_path / "again"), "--parts", "train=2,val=1,test=1", "--to", "csv"]) == 0
    )
    for split in ("train", "val", "test"):
        first = open_split(str(out), split).annotations("val").file_names
        second = open_split(str(tmp_path / "again"), split).annotations("val").file_names
        assert [Path(str(n)).name for n in first] == [Path(str(n)).name for n in second]  # by the seed alone


def test_split_keeps_groups_and_equal_pictures_together(voc, tmp_path):
    (voc / "JPEGImages" / "im3.jpg").write_bytes((voc / "JPEGImages" / "im9.jpg").read_bytes())
    for seed in range(5):
        out = tmp_path / str(seed)
        arguments = ["--parts", "a=.5,b=.5", "--seed", str(seed), "--group-by", r"im(\d)\d?\.", "--image-files", "none"]
        assert main(["split", str(voc), "-o", str(out), *arguments]) == 0
        parts = {
            line: name for name in "ab" for line in (out / "ImageSets" / "Main" / f"{name}.txt").read_text().split()
        }
        assert parts["im1"] == parts["im10"] == parts["im11"]
        assert parts["im3"] == parts["im9"]
    with pytest.raises(UsageError, match=r"--group-by 'x\+' finds nothing in the name 'JPEGImages/im0\.jpg'"):
        main(["split", str(voc), "-o", str(tmp_path / "x"), "--group-by", "x+"])
    with pytest.raises(UsageError, match=r"--group-by '\(' is no regular expression"):
        main(["split", str(voc), "-o", str(tmp_path / "x"), "--group-by", "("])


def test_split_of_a_table_and_of_several_splits(tmp_path, capsys):
    rows = ["a.jpg,1,2,31,32,dog,one", "b.jpg,3,4,30,30,cat,two"]
    path = write_csv(tmp_path / "csv", rows, f"{HEADER},split")
    with pytest.raises(UsageError, match="has several splits: name those that are to be divided anew with --split"):
        main(["split", str(path), "-o", str(tmp_path / "out"), "--parts", "x=1,y=1"])
    arguments = f"split {path} -o {tmp_path / 'out'} --split one --split two --parts x=1,y=1".split()
    assert main(arguments) == 0
    assert "wrote 2 images with 2 boxes" in capsys.readouterr().out
    assert recognize(str(tmp_path / "out")).splits == ("x", "y")
    with pytest.raises(UsageError, match="has 1 images: too few for 3 parts"):
        main(["split", str(path), "-o", str(tmp_path / "few"), "--split", "one"])
    assert main([*arguments[:-1], "x=99,y=1", "-o", str(tmp_path / "few")]) == 0
    assert recognize(str(tmp_path / "few")).splits == ("x", "y")  # no part is left without images
    with pytest.raises(UsageError, match="--seed must be 0 or more"):
        main([*arguments, "--seed", "-1"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train", "expected NAME=SHARE"),
        ("train=x", "expected NAME=SHARE"),
        ("train=0,val=1", "got 'train=0'"),
        ("train=nan", "expected NAME=SHARE"),
        ("train=.5,train=.5", "the part 'train' is there twice"),
        ("a/b=1", "got 'a/b=1'"),
        ("=1", "expected NAME=SHARE"),
    ],
)
def test_wrong_parts_are_refused(text, message):
    with pytest.raises(UsageError, match=rf"--parts {text}: .*{message}"):
        read_parts(text)
    assert read_parts("train=3, val=1") == {"train": 0.75, "val": 0.25}


def test_real_blood_cells(shared_data, tmp_path, capsys):
    root = str(shared_data / "bccd")
    assert main(["check", root, "--split", "train", "--split", "val", "--no-decode"]) == 1
    shown = capsys.readouterr().out
    assert "boxes: zero or negative size (2)" in shown
    assert "2 errors, 0 warnings" in shown
    out = tmp_path / "parts"
    arguments = [
        "--split",
        "trainval",
        "--split",
        "test",
        "--parts",
        "train=.7,val=.3",
        "--skip-bad",
        "--image-files",
        "link",
    ]
    assert main(["split", root, "-o", str(out), *arguments]) == 0
    shares = [line.split() for line in capsys.readouterr().out.splitlines() if line.startswith(("RBC", "WBC", "Plat"))]
    assert len(shares) == 3
    assert all(abs(float(line[3].rstrip("%")) - 70) < 1 for line in shares)
    assert main(["check", str(out), "--no-decode"]) == 0

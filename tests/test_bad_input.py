"""What goes wrong ends with one clear line, the right exit status, and nothing half-written."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import runs
import torch
from datasets.builders import coco_content, voc_object, write_coco, write_voc

from detpipe import cli

Case = Callable[[Path, Path, Path], list[str]]  # folder to write to, demo set, trained run -> arguments


def voc(root: Path, *more: str) -> list[str]:
    return ["train", runs.CONFIG, "--data", "VOC", "--data.root", str(root), *more, "--trainer.accelerator", "cpu"]


def coco(root: Path, *more: str) -> list[str]:
    return [
        "train",
        runs.CONFIG,
        "--data",
        "COCO",
        "--data.root",
        str(root),
        "--data.train",
        "train",
        "--data.val",
        "val",
        *more,
    ]


def demo(root: Path, *more: str) -> list[str]:
    return ["train", runs.CONFIG, *runs.options(root), *more]


def missing_folder(folder: Path, data: Path, run: Path) -> list[str]:
    return voc(folder / "nowhere")


def wrong_layout(folder: Path, data: Path, run: Path) -> list[str]:
    (folder / "flat").mkdir()
    (folder / "flat" / "a.jpg").write_bytes(b"")
    return voc(folder / "flat")


def wrong_layout_coco(folder: Path, data: Path, run: Path) -> list[str]:
    (folder / "flat").mkdir()
    return coco(folder / "flat")


def unknown_list(folder: Path, data: Path, run: Path) -> list[str]:
    write_voc(folder / "own", split="train")
    return voc(folder / "own", "--data.val", "vall", "--data.format.class_names", "auto")


def unknown_class(folder: Path, data: Path, run: Path) -> list[str]:
    for split in ("train", "val"):
        write_voc(folder / "own", {"a": [voc_object("catt", (1, 1, 20, 20))]}, split)
    return voc(folder / "own", "--data.format.class_names", "[cat, dog]")


def empty_split(folder: Path, data: Path, run: Path) -> list[str]:
    write_voc(folder / "own", split="val")
    write_voc(folder / "own", {}, split="train")
    return voc(folder / "own", "--data.format.class_names", "[cat, dog]")


def empty_split_coco(folder: Path, data: Path, run: Path) -> list[str]:
    write_coco(folder / "own", coco_content(), "val")
    write_coco(folder / "own", {**coco_content(), "images": [], "annotations": []}, "train")
    return coco(folder / "own")


def damaged_image(folder: Path, data: Path, run: Path) -> list[str]:
    for split in ("train", "val"):
        write_coco(folder / "own", coco_content(), split)
    for image in (folder / "own" / "train").iterdir():
        image.write_bytes(image.read_bytes()[:200])
    return coco(folder / "own", *runs.MODEL, "--trainer.accelerator", "cpu", "--data.loader.num_workers", "1")


def missing_weights(folder: Path, data: Path, run: Path) -> list[str]:
    squeezenet = str(runs.CONFIGS / "fast_rcnn_squeezenet.yaml")
    return ["train", squeezenet, *runs.demo(data), "--model.backbone.weights", str(folder / "nowhere.pth")]


def unknown_weights(folder: Path, data: Path, run: Path) -> list[str]:
    squeezenet = str(runs.CONFIGS / "fast_rcnn_squeezenet.yaml")
    return ["train", squeezenet, *runs.demo(data), "--model.backbone.weights", "IMAGENET1K_V9"]


def weights_of_another_network(folder: Path, data: Path, run: Path) -> list[str]:
    torch.save({"features.0.weight": torch.zeros(3)}, folder / "other.pth")
    squeezenet = str(runs.CONFIGS / "fast_rcnn_squeezenet.yaml")
    return ["train", squeezenet, *runs.demo(data), "--model.backbone.weights", str(folder / "other.pth")]


def other_classes(folder: Path, data: Path, run: Path) -> list[str]:
    for split in ("train", "val"):
        write_coco(folder / "own", coco_content(), split)
    options = ["--data.root", str(folder / "own"), "--data.train", "train", "--data.val", "val"]
    return ["evaluate", runs.CONFIG, "--data", "COCO", *options, *runs.MODEL, "--ckpt_path", str(run / "best.ckpt")]


def other_classes_to_resume(folder: Path, data: Path, run: Path) -> list[str]:
    return ["train", *other_classes(folder, data, run)[1:]]


def another_model(folder: Path, data: Path, run: Path) -> list[str]:
    return [
        "evaluate",
        runs.CONFIG,
        *runs.demo(data),
        *runs.MODEL,
        "--model.head.fc",
        "[8]",
        "--ckpt_path",
        str(run / "best.ckpt"),
    ]


def another_model_to_resume(folder: Path, data: Path, run: Path) -> list[str]:
    return demo(data, "--model.head.fc", "[8]", "--ckpt_path", str(run / "last.ckpt"))


def missing_checkpoint(folder: Path, data: Path, run: Path) -> list[str]:
    return ["evaluate", str(run / "config.yaml"), "--ckpt_path", str(folder / "nowhere.ckpt")]


def no_checkpoint(folder: Path, data: Path, run: Path) -> list[str]:
    return ["evaluate", str(run / "config.yaml")]


def no_test_split(folder: Path, data: Path, run: Path) -> list[str]:
    return ["evaluate", str(run / "config.yaml"), "--ckpt_path", str(run / "best.ckpt"), "--split", "test"]


def no_such_split(folder: Path, data: Path, run: Path) -> list[str]:
    return ["evaluate", str(run / "config.yaml"), "--ckpt_path", str(run / "best.ckpt"), "--split", "tset"]


def detections_without_annotations(folder: Path, data: Path, run: Path) -> list[str]:
    return ["evaluate", "--detections", "d.json"]


def unknown_protocol(folder: Path, data: Path, run: Path) -> list[str]:
    return ["evaluate", "--detections", "d.json", "--annotations", "a.json", "--protocol", "voc"]


def missing_detections(folder: Path, data: Path, run: Path) -> list[str]:
    truth = data / "coco" / "annotations" / "instances_val.json"
    return ["evaluate", "--detections", str(folder / "d.json"), "--annotations", str(truth)]


def foreign_detections(folder: Path, data: Path, run: Path) -> list[str]:
    record = {"image_id": 10**6, "category_id": 1, "bbox": [0, 0, 1, 1], "score": 0.5}
    (folder / "d.json").write_text(json.dumps([record]))
    return missing_detections(folder, data, run)


def unusable_accelerator(folder: Path, data: Path, run: Path) -> list[str]:
    return demo(data, "--trainer.accelerator", "gpuu")


def demo_in_a_foreign_folder(folder: Path, data: Path, run: Path) -> list[str]:
    (folder / "holiday").mkdir()
    (folder / "holiday" / "beach.txt").write_text("mine")
    return demo(folder / "holiday")


CASES: list[tuple[Case, int, list[str]]] = [
    (missing_folder, 1, ["nowhere: no such folder; the argument root must name the folder of the VOC data"]),
    (wrong_layout, 1, ["JPEGImages: no such folder, wanted for the split", "VOC layout is JPEGImages/NAME.jpg"]),
    (wrong_layout_coco, 1, ["instances_val.json: no such file", "splits found in", "none"]),
    (unknown_list, 1, ["vall.txt: no such list of images; lists found: train"]),
    (unknown_class, 1, ["a.xml", "'catt'", "cat, dog"]),
    (empty_split, 1, ["the lists of the split 'train' name no image"]),
    (empty_split_coco, 1, ["instances_train.json", "no image"]),
    (damaged_image, 1, [".jpg: ", "decoded"]),
    (missing_weights, 1, ["nowhere.pth: no such file; give the path of a file with the backbone's weights"]),
    (
        unknown_weights,
        2,
        ["unknown weights 'IMAGENET1K_V9': expected a local file", "squeezenet1_1's", "did you mean 'IMAGENET1K_V1'"],
    ),
    (weights_of_another_network, 1, ["other.pth does not fit squeezenet1_1: it lacks"]),
    (other_classes, 1, ["best.ckpt knows 10 classes, the data have 3; they differ in '0' / 'cat'"]),
    (other_classes_to_resume, 1, ["best.ckpt knows 10 classes, the data have 3"]),
    (another_model, 1, ["best.ckpt belongs to another model", "head.shared.1.weight has shape"]),
    (
        another_model_to_resume,
        1,
        ["last.ckpt belongs to another model", "use the configuration that it was trained with"],
    ),
    (missing_checkpoint, 1, ["nowhere.ckpt does not exist; expected a file such as RUN/best.ckpt"]),
    (no_checkpoint, 2, ["--ckpt_path is missing: give the checkpoint to evaluate"]),
    (no_test_split, 1, ["no test split: the demo set has train and val only"]),
    (no_such_split, 2, ["split: expected 'train' or 'val' or 'test' or null, got tset; did you mean 'test'?"]),
    (
        detections_without_annotations,
        2,
        ["the following arguments are required: --annotations; see 'detpipe evaluate --help'"],
    ),
    (unknown_protocol, 2, ["--protocol", "invalid choice: 'voc'", "voc07"]),
    (missing_detections, 1, ["d.json: no such file: check the path"]),
    (foreign_detections, 1, ["d.json: record 0: image_id 1000000 is not an image of the ground truth"]),
    (unusable_accelerator, 2, ["trainer: ", "gpuu"]),
    (demo_in_a_foreign_folder, 1, ["holiday"]),
]


@pytest.mark.parametrize(("case", "status", "parts"), CASES, ids=[case.__name__ for case, _, _ in CASES])
def test_bad_input(
    case: Case, status: int, parts: list[str], demo_root: Path, trained: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    arguments = case(tmp_path, demo_root, trained)
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    capsys.readouterr()
    assert cli.main(arguments) == status
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("detpipe: error: ")]
    assert len(errors) == 1
    for part in parts:
        assert part in errors[0]
    assert len(errors[0]) < 900
    left = [path.relative_to(tmp_path / "work") for path in (tmp_path / "work").rglob("*") if not path.is_dir()]
    assert left == []
    assert list((tmp_path / "work").glob("runs/*/*")) == []  # no run folder either


def test_a_failed_start_leaves_a_folder_of_the_users_own(demo_root, tmp_path):
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "notes.txt").write_text("mine")
    assert cli.main(demo(demo_root, "--output", str(folder), "--trainer.accelerator", "gpuu")) == 2
    assert [path.name for path in folder.iterdir()] == ["notes.txt"]


def test_numbers_are_not_written_over_a_folder(trained, demo_root, tmp_path):
    arguments = ["evaluate", str(trained / "config.yaml"), "--ckpt_path", str(trained / "best.ckpt")]
    for option in ("--json", "--detections_out"):
        assert cli.main([*arguments, option, str(tmp_path)]) == 2
    assert list(tmp_path.iterdir()) == []
    assert not list(trained.glob("val_*"))

"""Training, resuming and evaluating through the command, on a tiny demo set."""

from __future__ import annotations

import json
import re
import shutil
import sys
import traceback
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import runs
import torch
from PIL import Image

from detpipe import cli
from detpipe.datasets import read_image
from detpipe.evaluation import read_coco_annotations, read_detections
from detpipe.training import callbacks, run_folder
from detpipe.training.models import load_detector

RESULT = re.compile(r"AP (-?\d\.\d{3}) AP50 (-?\d\.\d{3}) checkpoint (\S+)")


def truth(demo_root: Path) -> Path:
    return demo_root / "coco" / "annotations" / "instances_val.json"


def evaluate(folder: Path, name: str, *options: str) -> tuple[dict[str, Any], Path]:
    """Evaluate the best checkpoint of a run by the configuration in its folder."""
    numbers, detections = folder.parent / f"{name}.json", folder.parent / f"{name}_detections.json"
    arguments = f"evaluate {folder / 'config.yaml'} --ckpt_path {folder / 'best.ckpt'} --json {numbers}".split()
    assert cli.main([*arguments, "--detections_out", str(detections), *options]) == 0
    return json.loads(numbers.read_text()), detections


def test_a_run_leaves_everything_in_its_folder(trained):
    names = {path.name for path in trained.iterdir()}
    assert names == {
        *("config.yaml", "metrics.csv", "tensorboard", "summary.json"),
        *(
            "best.ckpt",
            "best.ckpt.sha256",
            "last.ckpt",
            "last.ckpt.sha256",
            "training.png",
            "validation.png",
            "curves.png",
        ),
    }
    assert list((trained / "tensorboard").glob("events.out.tfevents.*"))
    for name in ("training.png", "validation.png", "curves.png"):
        with Image.open(trained / name) as picture:
            assert min(picture.size) > 100
    result = runs.summary(trained)
    assert {"AP", "AP50", "AP75", "per_class", "seconds", "images_per_second", "checkpoint"} <= result.keys()
    assert 0 <= result["AP"] <= result["AP50"] <= 1
    assert result["seconds"] > 0
    assert result["images_per_second"] > 0
    assert result["checkpoint"] == str(trained / "best.ckpt")
    assert result["epochs"] == 2


def test_the_metrics_hold_training_and_validation(trained):
    table = runs.rows(trained)
    train, val = [[row for row in table if row[key]] for key in ("train/loss", "val/AP")]
    assert len(train) == 6  # 12 images, 4 a step, 2 epochs
    assert len(val) == 2
    parts = ("loss_objectness", "loss_rpn_box_reg", "loss_classifier", "loss_box_reg")
    for row, stage in [*((row, "train") for row in train), *((row, "val") for row in val)]:
        assert float(row[f"{stage}/loss"]) == pytest.approx(
            sum(float(row[f"{stage}/{part}"]) for part in parts), abs=1e-5
        )
    assert [int(row["step"]) for row in train] == list(range(6))
    assert all(float(row["val/AP50"]) >= float(row["val/AP"]) for row in val)


def test_the_best_checkpoint_is_that_of_the_best_epoch(trained):
    scores = [float(row["val/AP"]) for row in runs.rows(trained) if row["val/AP"]]
    result = runs.summary(trained)
    assert result["AP"] == pytest.approx(max(scores), abs=1e-6)
    assert result["epoch"] == int(np.argmax(scores))
    stored = torch.load(trained / "best.ckpt", weights_only=True)
    assert callbacks.MeanAveragePrecision.stored(stored)["AP"] == result["AP"]
    assert torch.load(trained / "last.ckpt", weights_only=True)["global_step"] == 6


def test_the_last_line_is_the_result_and_training_twice_gives_identical_weights(trained, tmp_path, capsys):
    again = tmp_path / "again"
    assert cli.main(["train", str(trained / "config.yaml"), "--output", str(again)]) == 0
    last = capsys.readouterr().out.rstrip("\n").splitlines()[-1]
    match = RESULT.fullmatch(last)
    assert match is not None, last
    assert match[3] == str(again / "best.ckpt")
    assert float(match[1]) == pytest.approx(runs.summary(again)["AP"], abs=5e-4)
    assert float(match[2]) == pytest.approx(runs.summary(again)["AP50"], abs=5e-4)
    for name in ("best.ckpt", "last.ckpt"):
        runs.assert_equal_weights(trained / name, again / name)
    assert runs.summary(again)["AP"] == runs.summary(trained)["AP"]
    assert (again / "config.yaml").read_text() == (trained / "config.yaml").read_text()


@pytest.mark.slow
def test_another_seed_gives_other_weights_and_no_output_means_a_dated_folder(trained, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments = [str(trained / "config.yaml"), "--seed_everything", "1", "--trainer.max_epochs", "1"]
    assert cli.main(["train", *arguments]) == 0
    [folder] = (tmp_path / "runs" / "config").iterdir()
    assert re.fullmatch(r"\d{8}-\d{6}-\d{3}", folder.name)
    first, second = runs.weights(trained / "last.ckpt"), runs.weights(folder / "last.ckpt")
    assert not torch.equal(first["backbone.stem.conv1.weight"], second["backbone.stem.conv1.weight"])


@pytest.mark.slow
def test_a_run_that_goes_on_in_another_folder_ends_with_the_weights_of_an_undisturbed_one(trained, tmp_path, capsys):
    """In the folder of the run itself: ``test_resume.py``."""
    first, second = tmp_path / "first", tmp_path / "second"
    runs.interrupt(["train", str(trained / "config.yaml"), "--output", str(first)])
    assert "interrupted" in capsys.readouterr().err
    assert not (first / "summary.json").exists()
    assert torch.load(first / "last.ckpt", weights_only=True)["global_step"] == 3
    resume = f"--output {second} --ckpt_path {first / 'last.ckpt'} --data.loader.num_workers 2".split()
    assert cli.main(["train", str(trained / "config.yaml"), *resume]) == 0
    runs.assert_equal_weights(second / "last.ckpt", trained / "last.ckpt")
    known = [row["val/AP"] for row in runs.rows(trained) if row["val/AP"]]
    assert [row["val/AP"] for row in runs.rows(second) if row["val/AP"]] == known[1:]
    assert len([row for row in runs.rows(second) if row["train/loss"]]) == 3
    best = torch.load(second / "best.ckpt", weights_only=True)
    assert callbacks.MeanAveragePrecision.stored(best)["AP"] == runs.summary(second)["AP"]


def test_a_folder_with_a_finished_run_is_not_used_again(trained, capsys):
    before = sorted((path.name, path.stat().st_mtime_ns) for path in trained.iterdir())
    assert cli.main(["train", str(trained / "config.yaml"), "--output", str(trained)]) == 1
    assert (
        f"{trained} holds a finished run (summary.json); give another --output or remove it" in capsys.readouterr().err
    )
    assert sorted((path.name, path.stat().st_mtime_ns) for path in trained.iterdir()) == before


@pytest.mark.slow
def test_the_last_step_is_validated_and_saved_in_the_middle_of_an_epoch(trained, tmp_path):
    folder = tmp_path / "run"
    limit = ["--trainer.max_epochs", "-1", "--trainer.max_steps", "5"]
    assert cli.main(["train", str(trained / "config.yaml"), "--output", str(folder), *limit]) == 0
    assert torch.load(folder / "last.ckpt", weights_only=True)["global_step"] == 5
    assert [int(row["step"]) for row in runs.rows(folder) if row["val/AP"]] == [2, 4]


def test_evaluation_repeats_the_numbers_of_training(trained, demo_root, tmp_path, capsys):
    numbers, detections = evaluate(trained, "plain")
    expected = {key: value for key, value in runs.summary(trained).items() if key in numbers}
    assert len(expected) == 13
    assert numbers.pop("per_class") == pytest.approx(expected.pop("per_class"), abs=1e-9)
    assert numbers == pytest.approx(expected, abs=1e-9)
    shown = capsys.readouterr().out
    assert "AP50" in shown
    assert "AP of each class" in shown
    again = tmp_path / "again.json"
    files = ["--detections", str(detections), "--annotations", str(truth(demo_root))]
    assert cli.main(["evaluate", *files, "--json", str(again)]) == 0
    assert json.loads(again.read_text()) == json.loads((trained.parent / "plain.json").read_text())


def test_evaluation_writes_beside_the_checkpoint(trained, tmp_path, capsys):
    checkpoint = tmp_path / "best.ckpt"
    shutil.copy(trained / "best.ckpt", checkpoint)
    assert cli.main(["evaluate", str(trained / "config.yaml"), "--ckpt_path", str(checkpoint)]) == 0
    numbers = json.loads((tmp_path / "val_coco.json").read_text())
    assert numbers["AP"] == pytest.approx(runs.summary(trained)["AP"], abs=1e-9)
    records = json.loads((tmp_path / "val_detections.json").read_text())
    assert all(set(record) == {"image_id", "category_id", "bbox", "score"} for record in records)
    assert str(tmp_path / "val_detections.json") in capsys.readouterr().out


@pytest.mark.parametrize("protocol", ["voc07", "voc10"])
def test_evaluation_by_another_protocol(protocol, trained, demo_root, tmp_path):
    numbers, detections = evaluate(trained, protocol, "--protocol", protocol)
    assert numbers.keys() == {"mAP", "per_class"}
    files = ["--detections", str(detections), "--annotations", str(truth(demo_root))]
    assert cli.main(["evaluate", *files, "--protocol", protocol, "--json", str(tmp_path / "out.json")]) == 0
    assert json.loads((tmp_path / "out.json").read_text()) == numbers


def test_settings_that_are_not_those_of_training_are_named(trained, tmp_path, capsys):
    out = ["--json", str(tmp_path / "a.json"), "--detections_out", str(tmp_path / "b.json")]
    arguments = ["evaluate", str(trained / "config.yaml"), "--ckpt_path", str(trained / "best.ckpt"), *out]
    assert cli.main(arguments) == 0
    assert "not as in training" not in capsys.readouterr().out
    assert cli.main([*arguments, "--model.proposals.anchors.sizes", "[10, 14]"]) == 0
    shown = capsys.readouterr().out
    assert (
        "note: not as in training: model.proposals.anchors.sizes was [20.0, 28.0], is [10.0, 14.0]; RUN/config" in shown
    )
    assert shown.count("not as in training") == 1


@pytest.mark.slow
@pytest.mark.parametrize(("batch_size", "workers"), [(1, 0), (4, 2)])
def test_evaluation_does_not_depend_on_batch_size_and_workers(batch_size, workers, trained, demo_root):
    expected, expected_file = evaluate(trained, "reference", "--data.loader.eval_batch_size", "2")
    options = ["--data.loader.eval_batch_size", str(batch_size), "--data.loader.num_workers", str(workers)]
    numbers, file = evaluate(trained, f"batch_{batch_size}_{workers}", *options)
    assert numbers["AP"] == pytest.approx(expected["AP"], abs=1e-6)
    annotations = read_coco_annotations(truth(demo_root))
    one, other = read_detections(expected_file, annotations), read_detections(file, annotations)
    assert len(one.scores) > 0
    assert one.image_ids.tolist() == other.image_ids.tolist()
    assert one.labels.tolist() == other.labels.tolist()
    np.testing.assert_allclose(one.scores, other.scores, atol=1e-5)
    np.testing.assert_allclose(one.boxes, other.boxes, atol=1e-3)


def test_evaluation_of_the_training_split(trained, demo_root, capsys):
    _, detections = evaluate(trained, "train_split", "--split", "train")
    assert "train: 12 images" in capsys.readouterr().out
    found = [record for record in json.loads(detections.read_text()) if record["image_id"] == 3]
    detector, _ = load_detector(trained / "best.ckpt")
    image = read_image(demo_root / "coco" / "train" / "000003.jpg")
    with torch.no_grad():
        [expected] = detector([image])
    assert len(expected["scores"])
    assert sorted(record["score"] for record in found) == pytest.approx(sorted(expected["scores"].tolist()), abs=1e-5)


def test_a_share_of_the_training_split_is_a_test_split(trained, tmp_path, capsys):
    """Which evaluation takes where a configuration has one."""
    out = ["--json", str(tmp_path / "a.json"), "--detections_out", str(tmp_path / "b.json")]
    shares = ["--data.split", "{val: 0.25, test: 0.25}"]
    arguments = ["evaluate", str(trained / "config.yaml"), "--ckpt_path", str(trained / "best.ckpt"), *out, *shares]
    assert cli.main(arguments) == 0
    assert "\ntest: 3 images" in f"\n{capsys.readouterr().out}"


@pytest.mark.slow
def test_both_layouts_of_the_demo_set_train_alike(trained, tmp_path):
    folder = tmp_path / "voc"
    assert cli.main(["train", str(trained / "config.yaml"), "--output", str(folder), "--data.layout", "voc"]) == 0
    runs.assert_equal_weights(trained / "last.ckpt", folder / "last.ckpt")


@pytest.mark.slow
def test_coco_mini_trains_two_epochs_and_evaluates(shared_data, tmp_path):
    folder = tmp_path / "run"
    arguments = [
        *(runs.CONFIG, "--data", "COCO", "--data.root", str(shared_data / "coco_mini"), "--output", str(folder)),
        *(*runs.MODEL, "--data.loader.batch_size", "8", "--trainer.accelerator", "cpu", "--trainer.max_epochs", "2"),
        *("--trainer.limit_train_batches", "2", "--data.augment.flip", "0.5"),
    ]
    assert cli.main(["train", *arguments]) == 0
    result = runs.summary(folder)
    assert len(result["per_class"]) == 80
    numbers, detections = evaluate(folder, "coco_mini")
    assert numbers["AP"] == pytest.approx(result["AP"], abs=1e-9)
    annotations = read_coco_annotations(shared_data / "coco_mini" / "annotations" / "instances_val2017.json")
    assert annotations.iscrowd.sum() == 7
    assert set(read_detections(detections, annotations).image_ids) <= set(annotations.image_ids)


def test_the_way_from_a_configuration_to_the_training_is_short(demo_root, tmp_path, monkeypatch):
    """Command, run folder, Lightning: each file once, and nothing below calls back up."""
    stacks: list[list[str]] = []
    entered: list[str] = []

    def fit(self: Any, *arguments: Any, **settings: Any) -> None:
        sys.setprofile(None)
        frames = [frame.filename for frame in traceback.extract_stack()]
        stacks.append([name.partition("/detpipe/")[2] for name in frames if "/detpipe/" in name])
        raise KeyboardInterrupt

    def enter(frame: Any, event: str, _: Any) -> None:
        name = frame.f_code.co_filename.partition("/detpipe/")[2]
        if event == "call" and name.startswith(("cli", "commands/", "training/")):
            entered.append(name)

    from lightning.pytorch import Trainer

    import detpipe.commands.training  # noqa: F401  (what is defined when it is imported is not on the way)

    monkeypatch.setattr(Trainer, "fit", fit)
    command = ["train", runs.CONFIG, *runs.options(demo_root), "--output", str(tmp_path / "run")]
    sys.setprofile(enter)
    try:
        assert cli.main(command) == 130
    finally:
        sys.setprofile(None)
    [stack] = stacks
    assert list(dict.fromkeys(stack)) == ["cli.py", "commands/training.py", "training/run_folder.py"]
    assert [name for name, before in zip(stack[1:], stack, strict=False) if name != before] == list(
        dict.fromkeys(stack)
    )[1:]
    built = {name for name in entered if name not in ("training/allowed.py", "training/config_errors.py")}
    assert len(built) <= 9, sorted(built)


def test_the_way_from_detections_to_the_printed_ap_is_short(demo_root, tmp_path, monkeypatch):
    """At most eight files of ours; the numbers of the best checkpoint are not read from it."""
    entered: set[str] = set()

    def enter(frame: Any, event: str, _: Any) -> None:
        if event in ("call", "return"):
            entered.add(frame.f_code.co_filename.partition("/detpipe/")[2])

    def traced(owner: Any, name: str, to_the_end: bool = False) -> None:
        method = getattr(owner, name)

        def call(*arguments: Any) -> Any:
            sys.setprofile(enter)
            result = method(*arguments)
            if not to_the_end:
                sys.setprofile(None)
            return result

        monkeypatch.setattr(owner, name, call)

    for name in ("on_validation_batch_end", "on_validation_epoch_end", "on_validation_end"):
        traced(callbacks.MeanAveragePrecision, name)
    traced(run_folder, "_ended", to_the_end=True)
    command = ["train", runs.CONFIG, *runs.options(demo_root, 1), "--trainer.limit_train_batches", "1"]
    try:
        assert cli.main([*command, "--output", str(tmp_path / "run")]) == 0
    finally:
        sys.setprofile(None)
    # beside the way: the peak of memory, the file of the summary, and what ends the command
    walked = entered - {"", "support/allocator.py", "support/files.py", "cli.py"}
    assert walked == {
        *("training/callbacks.py", "types.py", "training/run_folder.py", "commands/training.py"),
        *(f"evaluation/{name}.py" for name in ("metrics", "coco", "matches", "records")),
    }

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import runs
from report_cases import evil_truth, some_detections, write_images

from detpipe import cli
from detpipe.evaluation import read_coco_annotations, read_detections, write_detections

FIGURES = {"pr_curves.png", "ap_by_size.png", "error_types.png", "confusion.png", "calibration.png"}


@pytest.fixture
def given(tmp_path: Path) -> dict[str, str]:
    """Files of a small ground truth, its images, and two runs."""
    annotations = evil_truth()
    annotations = replace(annotations, file_names=np.array([f"part/{i}.png" for i in range(len(annotations))]))
    images = [
        {"id": int(i), "file_name": str(f)} for i, f in zip(annotations.image_ids, annotations.file_names, strict=True)
    ]
    owners = np.repeat(annotations.image_ids, np.diff(annotations.offsets)).tolist()
    rows = [
        {
            "id": i,
            "image_id": owner,
            "category_id": int(label),
            "bbox": [x1, y1, x2 - x1, y2 - y1],
            "iscrowd": int(crowd),
        }
        for i, (owner, label, (x1, y1, x2, y2), crowd) in enumerate(
            zip(owners, annotations.labels, annotations.boxes.tolist(), annotations.iscrowd, strict=True)
        )
    ]
    categories = [{"id": i, "name": name} for i, name in enumerate(annotations.class_names, start=1)]
    truth = tmp_path / "truth.json"
    truth.write_text(json.dumps({"images": images, "annotations": rows, "categories": categories}))
    for name, seed in (("first", 0), ("second", 1)):
        write_detections(tmp_path / f"{name}.json", some_detections(annotations, seed), annotations)
    (tmp_path / "images" / "part").mkdir(parents=True)
    write_images(annotations, tmp_path / "images")
    return {
        name.split(".")[0]: str(tmp_path / name)
        for name in ("truth.json", "first.json", "second.json", "images", "out")
    }


def command(given: dict[str, str], *more: str) -> list[str]:
    return ["evaluate", "--detections", given["first"], "--annotations", given["truth"], *more]


def test_a_report_of_a_file(given, capsys):
    out = Path(given["out"])
    assert cli.main(command(given, "--report", str(out))) == 0
    assert capsys.readouterr().out.endswith(f"report {out / 'report.html'}\n")
    assert {path.name for path in out.iterdir()} == {"report.html", "report.json", *FIGURES}
    numbers = json.loads((out / "report.json").read_text())
    assert numbers["run"] == "first"
    assert numbers["comparison"] is None
    page = (out / "report.html").read_text()
    assert "Evaluation report: first" in page
    assert "--images FOLDER" in page
    annotations = read_coco_annotations(given["truth"])
    assert numbers["data"]["detections"] == len(read_detections(given["first"], annotations).scores)


@pytest.mark.slow
def test_a_report_with_images_and_other_runs(given):
    out = Path(given["out"])
    others = ["--compare", f"second={given['second']}", f"same={given['first']}", "--resamples", "20"]
    assert cli.main(command(given, "--report", str(out), "--images", given["images"], "--worst", "3", *others)) == 0
    drawings = {f"worst_{i:02}_{side}.png" for i in (1, 2, 3) for side in ("truth", "found")}
    assert {path.name for path in out.iterdir()} == {
        "report.html",
        "report.json",
        "comparison.png",
        *FIGURES,
        *drawings,
    }
    assert (out / "report.html").read_text().count("src='data:image/jpeg;base64,") == 6
    comparison = json.loads((out / "report.json").read_text())["comparison"]
    assert [run["name"] for run in comparison["runs"]] == ["first", "second", "same"]
    assert comparison["resamples"] == 20
    assert comparison["runs"][2]["difference"]["AP"] == {"value": 0, "low": 0, "high": 0, "better": 0}
    first = (out / "report.json").read_bytes(), (out / "report.html").read_bytes()
    again = command(given, "--report", str(out), "--images", given["images"], "--worst", "3", *others)
    assert cli.main(again) == 0
    assert ((out / "report.json").read_bytes(), (out / "report.html").read_bytes()) == first
    assert cli.main(command(given, "--report", str(out), "--images", given["images"], "--worst", "1")) == 0
    assert {path.name for path in out.glob("worst_*")} == {"worst_01_truth.png", "worst_01_found.png"}
    assert not (out / "comparison.png").exists()  # of the report before


def test_options_reach_the_report(given):
    out = Path(given["out"])
    more = f"--report {out} --protocol voc10 --score_threshold 0.7 --run_name mine --worst 0".split()
    assert cli.main(command(given, *more)) == 0
    numbers = json.loads((out / "report.json").read_text())
    assert (numbers["run"], numbers["protocol"], numbers["worst_images"]) == ("mine", "voc10", [])
    assert numbers["operating_point"]["score"] == 0.7
    assert set(numbers["metrics"]) == {"mAP", "per_class"}
    assert "No image was asked for." in (out / "report.html").read_text()


@pytest.mark.parametrize(("limits", "names"), [(["1", "10", "1000"], ["AR1", "AR10", "AR1000"]), (["2"], ["AR2"])])
def test_other_numbers_of_detections(given, limits, names, capsys):
    out = Path(given["out"])
    others = ["--compare", f"same={given['first']}", "--resamples", "5"]
    assert cli.main(command(given, "--report", str(out), "--max_detections", *limits, *others)) == 0
    table, numbers = capsys.readouterr().out, json.loads((out / "report.json").read_text())
    assert [row.split()[0] for row in table.splitlines() if row[:3] in ("AR1", "AR2")] == names
    assert f"all areas      {limits[-1]:>3} detections" in table
    assert numbers["metrics"]["AP50"] == pytest.approx(numbers["errors"]["AP50"], abs=1e-12)
    assert numbers["metrics"]["AP"] == pytest.approx(numbers["sizes"][0]["AP"], abs=1e-12)
    assert numbers["comparison"]["runs"][0]["metrics"]["AP"]["value"] == pytest.approx(numbers["metrics"]["AP"])
    assert f"of at most {int(limits[-1]):,} detections" in (out / "report.html").read_text()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--max_detections", "10", "1"], "--max_detections must be one or more rising numbers from 1 on, got [10, 1]"),
        (["--max_detections", "0"], "rising numbers from 1 on, got [0]"),
        (["--max_detections", "10", "--protocol", "voc10"], "--max_detections belongs to the protocol coco, not voc10"),
        (["--compare", "b={second}"], "--compare belongs to a report: give its folder by --report FOLDER"),
        (["--images", "{images}"], "--images belongs to a report"),
        (["--score_threshold", "0.0"], "--score_threshold belongs to a report"),
        (["--worst", "12"], "--worst belongs to a report: give its folder by --report FOLDER"),
        (["--resamples", "9"], "--resamples belongs to a report"),
        (["--run_name", "b"], "--run_name belongs to a report"),
        (["--json", "{images}"], "is a folder; give the name of a file for --json"),
        (
            ["--report", "{out}", "--resamples", "5"],
            "--resamples belongs to a comparison: name other runs by --compare",
        ),
        (["--report", "{truth}"], "is a file; give the name of a folder"),
        (["--report", "{out}", "--compare", "{second}"], "expected NAME=DETECTIONS.json"),
        (["--report", "{out}", "--compare", "=x.json"], "expected NAME=DETECTIONS.json"),
        (["--report", "{out}", "--compare", "b={second}", "b={second}"], "the name 'b' occurs twice"),
        (["--report", "{out}", "--compare", "b=missing.json"], "--compare b=missing.json: there is no such file"),
        (["--report", "{out}", "--compare", "first={second}"], "'first' is the name of the run itself"),
        (["--report", "{out}", "--run_name", "b", "--compare", "b={second}"], "'b' is the name of the run itself"),
        (["--report", "{out}", "--images", "nowhere"], "--images nowhere is not a folder"),
        (["--report", "{out}", "--protocol", "lvis"], "--report follows the protocols coco, voc07, voc10, not lvis"),
        (["--report", "{out}", "--resamples", "0"], "--resamples must be 1 or more"),
        (["--report", "{out}", "--score_threshold", "nan"], "--score_threshold must be a finite number, got nan"),
        (["--report", "{out}", "--worst", "-1"], "--worst 0 or more, got 1000 and -1"),
    ],
)
def test_what_users_get_wrong(given, options, message, capsys):
    assert cli.main(command(given, *(option.format(**given) for option in options))) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not Path(given["out"]).exists()


def test_a_fault_in_another_run_names_its_file(given, capsys):
    Path(given["second"]).write_text('[{"image_id": 999, "category_id": 1, "bbox": [0, 0, 1, 1], "score": 1}]')
    assert cli.main(command(given, "--report", given["out"], "--compare", f"b={given['second']}")) == 1
    shown = capsys.readouterr()
    assert f"{given['second']}: record 0: image_id 999" in shown.err
    assert shown.out == ""


def test_a_missing_image_is_named(given, capsys):
    for path in Path(given["images"]).rglob("*.png"):
        path.unlink()
    assert cli.main(command(given, "--report", given["out"], "--images", given["images"])) == 1
    assert "no such image file" in capsys.readouterr().err
    assert not Path(given["out"]).exists()


@pytest.mark.parametrize("name", ["../secret.png", "{folder}/secret.png", "part/../../secret.png"])
def test_images_outside_of_the_folder_are_not_shown(given, name, tmp_path, capsys):
    (Path(given["images"]) / "part" / "0.png").rename(tmp_path / "secret.png")
    truth = json.loads(Path(given["truth"]).read_text())
    for image in truth["images"]:
        image["file_name"] = name.format(folder=tmp_path)
    Path(given["truth"]).write_text(json.dumps(truth))
    assert cli.main(command(given, "--report", given["out"], "--images", given["images"])) == 1
    assert "secret.png: this file name leads out of the folder of images" in capsys.readouterr().err
    assert not Path(given["out"]).exists()


def test_without_matplotlib_nothing_is_computed(given, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert cli.main(command(given, "--report", given["out"])) == 2
    shown = capsys.readouterr()
    assert "pip install 'detpipe[train]'" in shown.err
    assert shown.out == ""
    assert cli.main(command(given)) == 0  # which needs none


def model_command(trained: Path, *more: str) -> list[str]:
    return ["evaluate", str(trained / "config.yaml"), "--ckpt_path", str(trained / "best.ckpt"), *more]


def test_a_report_of_a_model(trained, tmp_path, capsys):
    out, found = tmp_path / "report", tmp_path / "found.json"
    files = ["--json", str(tmp_path / "numbers.json"), "--detections_out", str(found)]
    assert cli.main(model_command(trained, *files)) == 0
    more = ["--report", str(out), "--worst", "2", "--compare", f"before={found}", f"again={found}", "--resamples", "10"]
    assert cli.main(model_command(trained, *files, *more)) == 0
    assert capsys.readouterr().out.endswith(f"report {out / 'report.html'}\n")
    numbers: dict[str, Any] = json.loads((out / "report.json").read_text())
    assert numbers["metrics"] == json.loads((tmp_path / "numbers.json").read_text())
    assert numbers["run"] == trained.name
    assert numbers["data"]["images"] == runs.SCENES["val"]
    assert [run["name"] for run in numbers["comparison"]["runs"]] == [trained.name, "before", "again"]
    assert (
        len(list(out.glob("worst_*_truth.png"))) == len(numbers["worst_images"]) == 2
    )  # the images are found by themselves


def test_a_model_is_not_run_for_a_report_that_cannot_be(trained, capsys):
    assert cli.main(model_command(trained, "--report", str(trained / "best.ckpt"))) == 2
    assert "is a file; give the name of a folder" in capsys.readouterr().err
    assert cli.main(model_command(trained, "--report", "x", "--compare", "nonsense")) == 2
    assert "expected NAME=DETECTIONS.json" in capsys.readouterr().err
    for option in ("--json", "--detections_out"):
        assert cli.main(model_command(trained, option, str(trained / "best.ckpt" / "a.json"))) == 2
        assert "a.json cannot be written (File exists); name files elsewhere by --json" in capsys.readouterr().err

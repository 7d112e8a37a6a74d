from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import runs
from PIL import Image

from detpipe import cli
from detpipe.commands import ablation
from detpipe.commands.ablation import Result, plot_results, read_study, results_table
from detpipe.support.errors import TrainingError, UsageError

STUDY = f"""
base: [{runs.CONFIG}]
split: val
seeds: [0, 1]
variants:
  none: {{model: {{backbone: {{init_args: {{attention: null}}}}}}}}
  se:
"""


def write(folder: Path, text: str = STUDY) -> Path:
    path = folder / "study.yaml"
    path.write_text(text)
    return path


def results(first: list[float], second: list[float]) -> dict[str, list[Result]]:
    return {
        name: [Result(seed, value, value + 0.2, 11_000_000) for seed, value in enumerate(values)]
        for name, values in (("none", first), ("se", second))
    }


@pytest.mark.slow
def test_a_study_is_trained_once(demo_root, tmp_path, capfd, monkeypatch):
    study, out = write(tmp_path), tmp_path / "out"
    command = ["ablate", str(study), "-o", str(out), *runs.options(demo_root, epochs=1), "--workers", "2"]
    assert cli.main(command) == 0
    shown = capfd.readouterr().out
    assert "4 runs, 0 of them done" in shown
    for name in ("none", "se"):
        found = json.loads((out / f"{name}_1" / "result.json").read_text())
        assert found.keys() == {"AP", "AP50", "parameters", "peak_memory_mib"}
        assert found["peak_memory_mib"] > 100
        assert f"| {name} |" in (out / "table.md").read_text()
    stored = json.loads((out / "results.json").read_text())
    assert (stored["split"], stored["seeds"]) == ("val", [0, 1])
    assert stored["results"]["se"][0]["parameters"] > stored["results"]["none"][0]["parameters"]
    assert "attention: null" in (out / "none_0" / "config.yaml").read_text()
    assert "attention: se" in (out / "se_0" / "config.yaml").read_text()
    assert (out / "results.png").is_file()

    called: list[str] = []
    monkeypatch.setattr(ablation, "_train_one", lambda run, split, threads: called.append(f"{run.variant}_{run.seed}"))
    assert cli.main(command) == 0
    assert called == []
    assert "4 runs, 4 of them done" in capfd.readouterr().out
    (out / "se_1" / "result.json").unlink()  # as if it had been stopped there
    with pytest.raises(FileNotFoundError):
        ablation.run_ablate(command[1:])
    assert called == ["se_1"]
    with pytest.raises(UsageError, match=r"none_0 holds a finished run of other settings; give another folder with -o"):
        ablation.run_ablate([*command[1:], "--model.head.fc", "[8]"])
    (out / "none_0.asked.json").unlink()
    with pytest.raises(UsageError, match=r"none_0 was not made by this study; give another folder with -o"):
        ablation.run_ablate(command[1:])
    assert called == ["se_1"]
    assert (out / "none_0" / "result.json").is_file()


@pytest.mark.slow
def test_a_run_that_fails_is_named(demo_root, tmp_path):
    study = write(tmp_path, STUDY.replace("attention: null", "attention: nul"))
    with pytest.raises(TrainingError, match=r"a run failed: detpipe: error: .*attention.*; its log is .*none_0\.log$"):
        ablation.run_ablate([str(study), "-o", str(tmp_path / "out"), "--seeds", "0", *runs.options(demo_root, 1)])


def test_the_test_split_is_evaluated(monkeypatch, tmp_path):
    calls: list[list[str]] = []

    def call(arguments: list[str], threads: int, output: Any, log: Path) -> None:
        calls.append(list(arguments))
        if arguments[0] == "evaluate":
            Path(arguments[arguments.index("--json") + 1]).write_text('{"AP": 0.5, "AP50": 0.75, "APs": 0.1}')
        else:
            folder = Path(arguments[arguments.index("--output") + 1])
            folder.mkdir()
            (folder / "summary.json").write_text('{"peak_memory_mib": 321}')

    monkeypatch.setattr(ablation, "_call", call)
    monkeypatch.setattr(ablation, "_parameters", lambda checkpoint: 7)
    monkeypatch.setattr(ablation, "milliseconds_an_image", lambda folders: dict.fromkeys(folders, 12.3))
    study = write(tmp_path, STUDY.replace("split: val", "split: test"))
    assert ablation.run_ablate([str(study), "-o", str(tmp_path / "out"), "--seeds", "3", "--data.root", "ROOT"]) == 0
    assert [call[0] for call in calls] == ["train", "evaluate"] * 2
    given = [runs.CONFIG, str(tmp_path / "out" / "none.yaml"), "--seed_everything", "3", "--data.root", "ROOT"]
    assert calls[0][1:7] == given
    run = tmp_path / "out" / "none_3"  # whose configuration lacks what only trainings take, such as --init_from
    assert calls[1][1:4] == [str(run / "config.yaml"), "--ckpt_path", str(run / "best.ckpt")]
    assert "| 12 | 321 | 0.500 |" in (tmp_path / "out" / "table.md").read_text()


def test_a_run_without_a_validation_is_named(monkeypatch, tmp_path):
    run = ablation.Run("none", 0, tmp_path / "none_0", ())

    def call(arguments: list[str], threads: int, output: Any, log: Path) -> None:
        run.folder.mkdir()
        (run.folder / "summary.json").write_text('{"seconds": 3}')

    monkeypatch.setattr(ablation, "_call", call)
    with pytest.raises(TrainingError, match="none_0 was not validated, so there is nothing to compare"):
        ablation._train_one(run, "val", 1)


def test_a_difference_inside_the_spread_is_called_so():
    times = {"none": 20.2, "se": 25.6}
    table = results_table(results([0.50, 0.54], [0.51, 0.56]), [0, 1], "val", times)
    assert (
        "| se | 11.00 M | 26 |  | 0.535 | 0.510 to 0.560 | 0.735 | 0.710 to 0.760 | +0.015, inside the spread |"
        in table
    )
    assert (
        results_table(results([0.50, 0.52], [0.60, 0.61]), [0, 1], "val", times).splitlines()[3].endswith("| +0.095 |")
    )
    assert (
        results_table(results([0.60, 0.61], [0.50, 0.52]), [0, 1], "val", times).splitlines()[3].endswith("| -0.095 |")
    )
    assert "one seed: says nothing" in results_table(results([0.1], [0.9]), [0], "val", times)
    assert table.splitlines()[2].endswith("|  |")


def test_the_picture(tmp_path):
    plot_results(results([0.50, 0.54], [0.51, 0.56]), "val", tmp_path / "p.png")
    with Image.open(tmp_path / "p.png") as picture:
        assert min(picture.size) > 200
        assert len(picture.convert("RGB").getcolors(1 << 24)) > 50


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("base: [x", "not valid YAML: "),
        ("3", "expected the keys base, split, seeds, variants, got 3"),
        (STUDY + "sedes: [1]", "unknown key 'sedes'.*did you mean 'seeds'"),
        (STUDY.replace(runs.CONFIG, "nowhere.yaml"), "base: .*nowhere.yaml does not exist"),
        (STUDY.replace(f"[{runs.CONFIG}]", "3"), "base: expected a list of configurations"),
        (STUDY.replace("[0, 1]", "[a]"), r"seeds: expected a list of whole numbers, got \['a'\]"),
        (STUDY.replace("split: val", "split: train"), "split: expected one of val, test, got 'train'"),
        (STUDY.replace("  se:", "  a/b:"), "variants: expected name"),
        (STUDY.partition("variants")[0], "variants: expected name"),
    ],
)
def test_bad_studies(text, message, tmp_path):
    with pytest.raises(UsageError, match=rf"study\.yaml.*{message}"):
        read_study(write(tmp_path, text))


def test_bad_arguments(tmp_path):
    with pytest.raises(UsageError, match=r"study nowhere\.yaml does not exist"):
        ablation.run_ablate(["nowhere.yaml", "-o", str(tmp_path)])
    with pytest.raises(UsageError, match=r"^\.: cannot be read \(Is a directory\)"):
        ablation.run_ablate([".", "-o", str(tmp_path)])
    with pytest.raises(UsageError, match="--workers must be 1 or more, got 0"):
        ablation.run_ablate([str(write(tmp_path)), "-o", str(tmp_path), "--workers", "0"])
    for options, message in (
        (["--seed_everything", "7"], "--seed_everything: each run has its own seed; give them by --seeds"),
        (["--seed_everything=7"], "--seed_everything: each run has its own seed"),
        (["--seeds", "1", "1"], "seeds: expected whole numbers from 0 on, each once, got 1, 1"),
        (["--seeds", "-1"], "seeds: expected whole numbers from 0 on, each once, got -1"),
    ):
        with pytest.raises(UsageError, match=message):
            ablation.run_ablate([str(write(tmp_path)), "-o", str(tmp_path / "out"), *options])
    with pytest.raises(UsageError, match=r"required: -o.*see 'detpipe ablate --help'"):
        ablation.run_ablate(["study.yaml"])


def test_the_studies_that_come_along_can_be_read():
    studies = sorted((runs.CONFIGS / "ablation").glob("*.yaml"))
    assert studies
    for path in studies:
        study = read_study(path)
        variants = list(study.variants)
        assert variants[0] in ("none", "plain")  # what the others are compared with
        assert path.stem.startswith(("heads", "recipe")) or variants == ["none", "se", "sk", "eca", "cbam"]
        assert len(study.seeds) == 3
        assert f"python tools/ablate.py configs/ablation/{path.name}" in path.read_text()


def test_what_is_trusted_is_trusted_in_every_run(tmp_path, monkeypatch):
    from types import SimpleNamespace

    from detpipe.training import allowed

    commands: list[list[str]] = []
    monkeypatch.setattr(
        ablation.subprocess, "run", lambda command, **_: commands.append(command) or SimpleNamespace(returncode=0)
    )
    with allowed.trusted(["my_head", "my_data"]):
        ablation._call(["train", "a.yaml"], 1, None, tmp_path / "log")
    assert commands[0][3:] == ["train", "a.yaml", "--trust=my_head", "--trust=my_data"]

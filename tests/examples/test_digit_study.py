from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from runs import CONFIGS

from detpipe.support.errors import DataError, TrainingError, UsageError
from detpipe.training.configuration import quiet
from stn_digits import study as digit_study
from stn_digits.classifier import MODELS, DigitClassifier
from stn_digits.digits import DISTORTIONS, DistortedDigits
from stn_digits.pictures import CELL, EXAMPLE, GAP, LABEL, LINE, WIDE, draw_looks, look, save_gif
from stn_digits.run import Recipe, Result, Run, train
from stn_digits.study import Animation, Study, read_arguments, results_table

CONFIG = str(CONFIGS / "stn_digits.yaml")
TINY = [
    *("--epochs", "1", "--batch_size", "256", "--test_views", "1", "--parameters", "30000", "--seeds", "[4]"),
    *("--distortions", "[E, R]", "--models", "[cnn, affine]", "--workers", "1"),
    *("--animation", "{distortion: R, model: affine}"),
]
NAMES = {f"{distortion}_{model}_4" for distortion in ("E", "R") for model in ("cnn", "affine")}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny study; read it, do not write to it."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("runs") / "digits"
    assert digit_study.train_classifier([CONFIG, *TINY, "-o", str(folder)]) == 0
    return folder


def copy(folder: Path, target: Path) -> Path:
    target.mkdir()
    for path in folder.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    return target


def test_a_study_leaves_table_pictures_and_weights(finished: Path) -> None:
    files = {path.name for path in finished.iterdir()}
    weights = {f"{name}.safetensors" for name in NAMES}
    assert files == weights | {"table.md", "results.json", "affine.png", "R_affine_4.gif"}
    table = (finished / "table.md").read_text().splitlines()
    assert table[0] == "| model | parameters | E | R | CPU seconds a run |"
    assert [row.split(" | ")[0] for row in table[2:4]] == ["| cnn", "| affine"]
    stored = json.loads((finished / "results.json").read_text())
    assert stored["recipe"]["epochs"] == 1
    assert {(run["distortion"], run["model"], run["seed"]) for run in stored["runs"]} == {
        (distortion, model, 4) for distortion in ("E", "R") for model in ("cnn", "affine")
    }
    for run in stored["runs"]:
        assert abs(run["parameters"] - 30_000) < 300
        assert 0 < run["error"] < 95
        assert run["seconds"] > 0
    error = next(run["error"] for run in stored["runs"] if (run["distortion"], run["model"]) == ("R", "cnn"))
    assert f"{error:.2f} ({error:.2f} to {error:.2f})" in table[2]


def test_the_weights_give_the_error_of_the_table(finished: Path) -> None:
    _, recipe, _ = read_arguments([CONFIG, *TINY])
    run = Run("R", "affine", 4, recipe, finished)
    images, labels = run.data().test_set()
    with torch.no_grad():
        wrong = run.trained()(images).argmax(dim=1) != labels
    assert run.result().error == pytest.approx(100 * float(wrong.double().mean()), abs=1e-3)


@pytest.mark.slow
def test_the_pictures_have_their_sizes(finished: Path) -> None:
    with Image.open(finished / "affine.png") as picture:
        assert picture.size == (LABEL + 3 * (EXAMPLE + 2 * GAP), 2 * LINE + 2 * GAP + 2 * (WIDE + GAP))
        assert len(picture.convert("RGB").getcolors(1 << 24)) > 100
    with Image.open(finished / "R_affine_4.gif") as film:
        assert film.n_frames == 2  # before training, and after the only epoch
        assert film.size == (GAP + 2 * (EXAMPLE + 2 * GAP), 2 * LINE + 2 * GAP + 4 * (WIDE + GAP))
        assert film.info["loop"] == 0
        first = np.asarray(film.convert("RGB"))
        film.seek(1)
        assert not np.array_equal(np.asarray(film.convert("RGB")), first)


@pytest.mark.slow
def test_a_study_goes_on_where_it_stopped(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = copy(finished, tmp_path / "again")
    trained: list[str] = []

    def note(run: Run) -> Result:
        trained.append(run.file.stem)
        return train(run)

    monkeypatch.setattr(digit_study, "train", note)
    command = [CONFIG, *TINY, "-o", str(folder)]
    assert digit_study.train_classifier(command) == 0
    assert trained == []
    shown = capsys.readouterr().out
    assert "4 runs, 4 of them done" in shown
    assert shown.splitlines()[-1] == f"table {folder / 'table.md'}"
    before = Run("R", "affine", 4, read_arguments([CONFIG, *TINY])[1], folder).trained().state_dict()
    (folder / "R_affine_4.safetensors").unlink()  # as if it had been stopped there
    (folder / "E_cnn_4.safetensors.partial-99999999-0123abcd").write_bytes(b"torn")
    assert digit_study.train_classifier(command) == 0
    assert trained == ["R_affine_4"]
    assert not list(folder.glob("*.partial-*"))
    after = Run("R", "affine", 4, read_arguments([CONFIG, *TINY])[1], folder).trained().state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())  # the same run, to the bit
    (folder / "R_affine_4.gif").unlink()  # needs the training again
    assert digit_study.train_classifier(command) == 0
    assert trained == ["R_affine_4"] * 2
    assert (folder / "R_affine_4.gif").is_file()
    assert digit_study.train_classifier([*command, "--animation", "null", "--models", "[cnn]"]) == 0
    assert trained == ["R_affine_4"] * 2
    assert "affine" not in (folder / "table.md").read_text()


def test_other_settings_are_refused(finished: Path, tmp_path: Path) -> None:
    folder = copy(finished, tmp_path / "other")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(UsageError, match=r"E_cnn_4.safetensors holds a finished run with epochs 1, asked for 2; give"):
        digit_study.train_classifier([CONFIG, *TINY, "--epochs", "2", "-o", str(folder)])
    with pytest.raises(UsageError, match=r"with optimizer .*'lr': 0.00.*asked for .*'lr': 0.5"):
        digit_study.train_classifier([CONFIG, *TINY, "--optimizer.lr", "0.5", "-o", str(folder)])
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    (folder / "R_cnn_4.safetensors").write_bytes(b"no weights")
    with pytest.raises(UsageError, match=r"R_cnn_4.safetensors is not the file of a finished run of this study; give"):
        digit_study.train_classifier([CONFIG, *TINY, "-o", str(folder)])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--epoch", "2"], "epoch: unknown key; did you mean 'epochs'"),
        (["--optimizer.nam", "sgd"], "optimizer.nam: unknown key; did you mean 'name'"),
        (["--distortions", "[RTX]"], "distortions: expected .*got RTX; did you mean 'RTS'"),
        (["--models", "[afine]"], "models: .*did you mean 'affine'"),
        (["--seeds", "[a]"], "seeds: expected a whole number"),
        (["--seeds", "[]"], r"seeds must be at least one, each once, got \[\]"),
        (["--models", "[cnn, cnn]"], "models must be at least one, each once"),
        (["--seeds", "[-1]"], r"seeds of at least 0.*got \[-1\]"),
        (["--workers", "0"], "workers of at least 1"),
        (["--epochs", "0"], "epochs must be at least 1, got 0"),
        (["--split", "-1"], "split must be at least 0, got -1"),
        (["--optimizer.lr", "0"], "optimizer.lr must be positive and finite"),
        (["--animation.model", "cnn"], "animation.model must have a transformer, got 'cnn'"),
        (["--parameters", "100"], "parameters must be at least [0-9]+ for 'cnn', got 100"),
        (["--glimpse", "4"], "glimpse must be at least 8 pixels, got 4"),
    ],
)
def test_bad_settings_are_one_line(options: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        digit_study.train_classifier([CONFIG, *options, "-o", str(tmp_path / "never")])
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "never").exists()


@pytest.mark.slow
def test_the_tool_runs_from_anywhere_and_tells_mistakes_as_commands_do(tmp_path: Path) -> None:
    tool = [sys.executable, str(CONFIGS.parent / "tools" / "train_classifier.py"), CONFIG, "--epoch", "2"]
    done = subprocess.run(tool, cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "detpipe: error: epoch: unknown key; did you mean 'epochs'?\n"


def test_the_configuration_is_the_whole_study() -> None:
    study, recipe, output = read_arguments([CONFIG])
    assert (tuple(study.distortions), tuple(study.models), study.seeds) == (DISTORTIONS, MODELS, [0, 1, 2])
    assert study.animation is not None
    assert output is None
    assert recipe.optimizer.backbone_scale < 1
    study, recipe, _ = read_arguments([CONFIG, "--epochs", "2", "--seeds", "[0]", "--animation", "null"])
    assert (study.seeds, study.animation, recipe.epochs) == ([0], None, 2)


def test_the_table_has_means_and_ranges() -> None:
    study = Study(["R", "P"], ["cnn", "tps"], [0, 1], Animation(), 1)
    results = {
        (distortion, model, seed): Result(10.0 * seed + row + column / 10, 59_000 + row, 2.0 + seed)
        for column, distortion in enumerate(study.distortions)
        for row, model in enumerate(study.models)
        for seed in study.seeds
    }
    lines = results_table(study, results).splitlines()
    assert lines[2] == "| cnn | 59,000 | 5.00 (0.00 to 10.00) | 5.10 (0.10 to 10.10) | 2.5 |"
    assert lines[3] == "| tps | 59,001 | 6.00 (1.00 to 11.00) | 6.10 (1.10 to 11.10) | 2.5 |"
    assert lines[-1] == "Test error in percent; seeds 0, 1: mean, and lowest to highest."


def test_weights_that_are_not_finite_leave_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, recipe, _ = read_arguments([CONFIG, *TINY])
    run = Run("R", "cnn", 0, recipe, tmp_path)
    whole = DistortedDigits.train_epoch

    def torn(self: DistortedDigits, epoch: int) -> tuple[torch.Tensor, torch.Tensor]:
        images, labels = whole(self, epoch)
        return images / 0, labels

    monkeypatch.setattr(DistortedDigits, "train_epoch", torn)
    quiet()
    with pytest.raises(TrainingError, match=r"R_cnn_0: the weights are no longer finite; lower optimizer.lr"):
        train(run)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_two_processes_train_what_one_trains(finished: Path, tmp_path: Path) -> None:
    folder = tmp_path / "two"
    assert digit_study.train_classifier([CONFIG, *TINY, "--workers", "2", "-o", str(folder)]) == 0
    one, two = (json.loads((path / "results.json").read_text())["runs"] for path in (finished, folder))
    assert [run["error"] for run in one] == [run["error"] for run in two]
    assert (folder / "R_affine_4.gif").read_bytes() == (finished / "R_affine_4.gif").read_bytes()


def die(run: Run) -> Result:
    os._exit(9)


@pytest.mark.slow
def test_a_process_that_is_killed_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(digit_study, "train", die)
    with pytest.raises(DataError, match=r"a worker process died, .* the same command goes on where this one stopped"):
        digit_study.train_classifier([CONFIG, *TINY, "--workers", "2", "-o", str(tmp_path)])
    assert list(tmp_path.iterdir()) == []


def test_the_region_is_drawn_where_it_is() -> None:
    classifier, images = DigitClassifier("affine").eval(), torch.zeros(2, 1, 28, 28)
    assert classifier.transformer is not None
    theta = classifier.transformer.localization[1].choose.theta  # type: ignore[index,union-attr]
    with torch.no_grad():
        theta.bias.copy_(torch.tensor([0.0, -0.5, 0, 0.5, 0, 0]))  # half as large, its upper edge to the right
    found = look(classifier.train(), images, torch.tensor([0, 1]))
    assert classifier.training
    picture = np.asarray(draw_looks({"row": found}, "title")).astype(int)
    left, top = LABEL + CELL + GAP, 2 * LINE + GAP
    middle, reach = WIDE // 2, CELL // 4
    red, green, blue = np.moveaxis(picture[top : top + WIDE, left : left + WIDE], 2, 0)
    assert blue[middle, middle + reach] > red[middle, middle + reach] + 60  # the upper edge of the output
    for y, x in ((middle, middle - reach), (middle - reach, middle), (middle + reach, middle)):
        assert red[y, x] > blue[y, x] + 60
        assert green[y, x] > blue[y, x]
    assert (red[middle, middle], green[middle, middle], blue[middle, middle]) == (0, 0, 0)
    assert abs(red[3, 3] - blue[3, 3]) < 20  # what is around the image


def test_right_and_wrong_have_their_colors() -> None:
    classifier = DigitClassifier("tps").eval()
    with torch.no_grad():
        classifier.head[-1].bias[7] = 50.0
    found = look(classifier, torch.zeros(2, 1, 42, 42), torch.tensor([7, 3]))
    assert found.predicted.tolist() == [7, 7]
    assert (found.confidence > 0.99).all()
    picture = np.asarray(draw_looks({"": found}, "title")).astype(int)
    ends = [GAP + EXAMPLE - GAP, GAP + 2 * EXAMPLE + GAP]  # of the last column
    cells = [picture[2 * LINE + GAP :, end - CELL : end] for end in ends]
    greens, reds = ([int((cell[..., a] - cell[..., b] > 60).sum()) for cell in cells] for a, b in ((1, 0), (0, 1)))
    assert min(greens[0], reds[1]) > 100
    assert greens[1] == reds[0] == 0


def test_an_animation_keeps_its_colors(tmp_path: Path) -> None:
    found = look(DigitClassifier("affine"), torch.rand(2, 1, 28, 28), torch.tensor([0, 1]))
    frames = [draw_looks({"": found}, f"frame {number}") for number in range(3)]
    save_gif(frames, tmp_path / "film.gif")
    with Image.open(tmp_path / "film.gif") as film:
        assert film.n_frames == 3
        for number, frame in enumerate(frames):
            film.seek(number)
            gap = np.abs(np.asarray(film.convert("RGB")).astype(int) - np.asarray(frame).astype(int))
            assert gap.mean() < 1
            assert film.info["duration"] == (3000 if number == 2 else 220)


def test_the_defaults_of_a_recipe_are_legal() -> None:
    assert Recipe().epochs > 0

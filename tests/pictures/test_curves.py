import csv
import sys

import numpy as np
import pytest
from PIL import Image

from detpipe.pictures import curves
from detpipe.pictures.curves import plot_curves
from detpipe.support.errors import DataError, UsageError

COLUMNS = ("epoch", "lr", "step", "train/loss", "val/AP", "val/AP50", "val/loss")


def write_metrics(path, rows):
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
    return path


def rows_of_a_run(epochs=3, steps=40, every=10):
    rows = []
    for epoch in range(epochs):
        for step in range(epoch * steps + every - 1, (epoch + 1) * steps, every):
            rows.append({"epoch": epoch, "step": step, "lr": 1e-3, "train/loss": 2 / (1 + step)})
        last = (epoch + 1) * steps - 1
        rows.append({"epoch": epoch, "step": last, "val/loss": 1.0, "val/AP": 0.1 * epoch, "val/AP50": 0.3 * epoch})
    return rows


def colored_pixels(image, box, color):
    pixels = np.asarray(image.crop(box).convert("RGB")).astype(int)
    wanted = np.array([int(color[k : k + 2], 16) for k in (1, 3, 5)])
    return int((np.abs(pixels - wanted).max(axis=2) < 30).sum())


def panels(path):
    with Image.open(path) as image:
        image.load()
        assert image.format == "PNG"
        middle = image.width // 2
        return image, (0, 0, middle, image.height), (middle, 0, image.width, image.height)


def test_sparse_rows_become_columns_over_epochs(tmp_path):
    columns = curves._read_metrics(write_metrics(tmp_path / "metrics.csv", rows_of_a_run()))
    assert columns["val/AP"] == ([1.0, 2.0, 3.0], [0.0, 0.1, 0.2])
    x, y = columns["train/loss"]
    assert x == [k / 4 for k in range(1, 13)]
    assert y[0] == pytest.approx(0.2)


def test_an_epoch_that_was_cut_short_does_not_move_the_others(tmp_path):
    rows = [*rows_of_a_run(), {"epoch": 3, "step": 129, "train/loss": 0.1}]
    columns = curves._read_metrics(write_metrics(tmp_path / "metrics.csv", rows))
    assert columns["val/AP"][0] == [1.0, 2.0, 3.0]
    assert columns["train/loss"][0][-1] == 3.25


def test_both_panels_are_filled(tmp_path):
    plot_curves(write_metrics(tmp_path / "metrics.csv", rows_of_a_run()), tmp_path / "plots" / "curves.png")
    image, left, right = panels(tmp_path / "plots" / "curves.png")
    for panel, color in ((left, curves._TRAIN), (left, curves._VAL), (right, curves._TRAIN), (right, curves._OTHER)):
        assert colored_pixels(image, panel, color) > 100
    assert colored_pixels(image, right, curves._VAL) == 0


def test_many_steps_are_smoothed_and_not_finite_ones_left_out(tmp_path):
    rows = rows_of_a_run(steps=400)
    rows[3]["train/loss"], rows[4]["train/loss"] = float("nan"), float("inf")
    metrics = write_metrics(tmp_path / "metrics.csv", rows)
    assert len(curves._read_metrics(metrics)["train/loss"][0]) == 118
    plot_curves(metrics, tmp_path / "curves.png")
    image, left, _ = panels(tmp_path / "curves.png")
    assert colored_pixels(image, left, curves._TRAIN) > 100


def test_losses_below_zero_are_drawn(tmp_path):
    rows = [{"epoch": 0, "step": step, "train/loss": 0.1 - step, "val/loss": -5.0} for step in range(10)]
    plot_curves(write_metrics(tmp_path / "metrics.csv", rows), tmp_path / "curves.png")
    image, left, _ = panels(tmp_path / "curves.png")
    assert colored_pixels(image, left, curves._TRAIN) > 1000
    assert colored_pixels(image, left, curves._VAL) > 1000


@pytest.mark.parametrize("kept", [("train/loss",), ("val/AP", "val/AP50"), ("lr",)])
def test_a_run_without_some_columns(tmp_path, kept):
    rows = [{k: v for k, v in row.items() if k in (*kept, "epoch", "step")} for row in rows_of_a_run()]
    plot_curves(write_metrics(tmp_path / "metrics.csv", rows), tmp_path / "curves.png")
    image, left, right = panels(tmp_path / "curves.png")
    assert (colored_pixels(image, left, curves._TRAIN) > 100) == ("train/loss" in kept)
    assert (colored_pixels(image, right, curves._OTHER) > 100) == ("val/AP50" in kept)


def test_accuracy_of_a_classifier_is_drawn(tmp_path):
    path = tmp_path / "metrics.csv"
    path.write_text("epoch,step,train/loss,val/top1,val/top5\n0,9,2.0,,\n0,9,,0.2,0.6\n1,19,1.5,,\n1,19,,0.3,0.9\n")
    plot_curves(path, tmp_path / "curves.png")
    image, left, right = panels(tmp_path / "curves.png")
    assert colored_pixels(image, left, curves._TRAIN) > 100
    assert colored_pixels(image, right, curves._TRAIN) > 100
    assert colored_pixels(image, right, curves._OTHER) > 100


def test_running_mean_of_the_last_values():
    assert curves._running_mean([1.0, 3.0, 5.0, 7.0], 2) == [1.0, 2.0, 4.0, 6.0]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "does not exist"),
        ("", "no rows"),
        ("epoch,step,train/loss\n", "no rows"),
        ("epoch,step,train/loss\n0,9,0.5\n0,19,many\n", r"line 3.*many"),
    ],
)
def test_unreadable_metrics_are_one_line(tmp_path, text, message):
    path = tmp_path / "metrics.csv"
    if text is not None:
        path.write_text(text)
    with pytest.raises(DataError, match=message) as caught:
        plot_curves(path, tmp_path / "curves.png")
    assert "metrics.csv" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "curves.png").exists()


def test_without_matplotlib_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(UsageError, match=r"detpipe\[train\]"):
        plot_curves(write_metrics(tmp_path / "metrics.csv", rows_of_a_run()), tmp_path / "curves.png")


def test_no_global_figures_are_made(tmp_path):
    plot_curves(write_metrics(tmp_path / "metrics.csv", rows_of_a_run()), tmp_path / "curves.png")
    pyplot = sys.modules.get("matplotlib.pyplot")
    assert pyplot is None or pyplot.get_fignums() == []

"""Every option of Lightning's Trainer is used, or refused by name."""

from __future__ import annotations

import csv
import inspect
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import runs
import torch
from lightning import Trainer
from lightning.pytorch.callbacks import (
    EarlyStopping,
    EMAWeightAveraging,
    LearningRateMonitor,
    ModelCheckpoint,
    TQDMProgressBar,
)
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins import DoublePrecision
from lightning.pytorch.plugins.io import AsyncCheckpointIO, TorchCheckpointIO
from lightning.pytorch.profilers import SimpleProfiler
from lightning.pytorch.strategies import DDPStrategy

from detpipe import cli
from detpipe.support.errors import TrainingError, UsageError
from detpipe.training import callbacks
from detpipe.training.callbacks import AveragedWeights, StepSeed
from detpipe.training.checkpoint import AtomicCheckpointIO
from detpipe.training.trainer import DEFAULTS, MetricsTable, build_trainer

CPU = {"accelerator": "cpu", "devices": 1, "use_distributed_sampler": False}
CALLBACKS, LOGGER = [LearningRateMonitor()], CSVLogger("logs")
# of every argument of Trainer: a value, and what of the trainer shows that it is used
HONORED: dict[str, tuple[Any, Callable[[Trainer], Any]]] = {
    "accelerator": ("cpu", lambda t: "cpu" if type(t.accelerator).__name__ == "CPUAccelerator" else None),
    "strategy": ("ddp", lambda t: "ddp" if isinstance(t.strategy, DDPStrategy) else None),
    "devices": (2, lambda t: t.num_devices),
    "num_nodes": (2, lambda t: t.num_nodes),
    "precision": ("64-true", lambda t: t.precision),
    "logger": (LOGGER, lambda t: t.loggers[0]),
    "callbacks": (CALLBACKS, lambda t: [one for one in t.callbacks if one in CALLBACKS]),
    "fast_dev_run": (3, lambda t: t.fast_dev_run),
    "max_epochs": (7, lambda t: t.max_epochs),
    "min_epochs": (2, lambda t: t.min_epochs),
    "max_steps": (70, lambda t: t.max_steps),
    "min_steps": (3, lambda t: t.min_steps),
    "max_time": (
        "00:01:00:00",
        lambda t: "00:01:00:00" if any(type(one).__name__ == "Timer" for one in t.callbacks) else 0,
    ),
    "limit_train_batches": (3, lambda t: t.limit_train_batches),
    "limit_val_batches": (3, lambda t: t.limit_val_batches),
    "limit_test_batches": (3, lambda t: t.limit_test_batches),
    "limit_predict_batches": (3, lambda t: t.limit_predict_batches),
    "overfit_batches": (3, lambda t: t.overfit_batches),
    "val_check_interval": (3, lambda t: t.val_check_interval),
    "check_val_every_n_epoch": (3, lambda t: t.check_val_every_n_epoch),
    "num_sanity_val_steps": (3, lambda t: t.num_sanity_val_steps),
    "log_every_n_steps": (3, lambda t: t.log_every_n_steps),
    "enable_checkpointing": (False, lambda t: bool(t.checkpoint_callbacks)),
    "enable_progress_bar": (False, lambda t: t.progress_bar_callback is not None),
    "enable_model_summary": (True, lambda t: any("Summary" in type(one).__name__ for one in t.callbacks)),
    "accumulate_grad_batches": (3, lambda t: t.accumulate_grad_batches),
    "gradient_clip_val": (3, lambda t: t.gradient_clip_val),
    "gradient_clip_algorithm": ("value", lambda t: t.gradient_clip_algorithm),
    "deterministic": (True, lambda t: torch.are_deterministic_algorithms_enabled()),
    "benchmark": (True, lambda t: torch.backends.cudnn.benchmark),
    "inference_mode": (False, lambda t: t.predict_loop.inference_mode),
    "profiler": ("simple", lambda t: "simple" if isinstance(t.profiler, SimpleProfiler) else None),
    "detect_anomaly": (True, lambda t: t._detect_anomaly),
    "barebones": (True, lambda t: t.barebones and not t.loggers and not t.callbacks),
    "plugins": (DoublePrecision(), lambda t: HONORED["plugins"][0] if t.precision == "64-true" else None),
    "sync_batchnorm": (True, lambda t: t._accelerator_connector._layer_sync is not None),
    "reload_dataloaders_every_n_epochs": (3, lambda t: t.reload_dataloaders_every_n_epochs),
    "default_root_dir": ("elsewhere", lambda t: os.path.basename(t.default_root_dir)),
    "enable_autolog_hparams": (False, lambda t: t.enable_autolog_hparams),
    "model_registry": ("mine", lambda t: t._model_registry),
}
REFUSED = {"use_distributed_sampler"}  # by several processes


@pytest.fixture(autouse=True)
def _settings_of_torch() -> Any:
    before = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark
    yield
    torch.use_deterministic_algorithms(before[0])
    torch.backends.cudnn.benchmark = before[1]


@pytest.mark.parametrize("name", list(inspect.signature(Trainer).parameters))
def test_every_option_of_the_trainer_is_honored(name, tmp_path):
    if name in REFUSED:
        settings = {**DEFAULTS, "accelerator": "cpu", "devices": 2, "strategy": "ddp", name: True}
        with pytest.raises(UsageError, match="the data deal their images out"):
            build_trainer(settings, tmp_path)
        return
    value, shown = HONORED[name]
    trainer = build_trainer({**DEFAULTS, **CPU, name: value}, tmp_path, [], [], AtomicCheckpointIO())
    assert shown(trainer) == value


def test_ours_run_beside_those_of_the_user(tmp_path):
    settings = {
        "callbacks": [TQDMProgressBar(), ModelCheckpoint(tmp_path)],
        "logger": [LOGGER],
        "plugins": AsyncCheckpointIO(),
    }
    ours, table = StepSeed(0), MetricsTable(tmp_path)
    trainer = build_trainer({**DEFAULTS, **CPU, **settings}, tmp_path, [ours], [table], AtomicCheckpointIO())
    assert ours in trainer.callbacks
    assert [type(one).__name__ for one in trainer.callbacks].count("TQDMProgressBar") == 1
    assert trainer.loggers == [LOGGER, table]
    assert trainer.default_root_dir == str(tmp_path)
    assert isinstance(trainer.strategy.checkpoint_io, AsyncCheckpointIO)
    assert isinstance(trainer.strategy.checkpoint_io.checkpoint_io, AtomicCheckpointIO)
    other = build_trainer(
        {**DEFAULTS, **CPU, "plugins": [TorchCheckpointIO()]}, tmp_path, checkpoint_io=AtomicCheckpointIO()
    )
    assert type(other.strategy.checkpoint_io) is TorchCheckpointIO
    for wanted, loggers in ((None, [table]), (True, [table]), (False, [])):
        assert build_trainer({**CPU, "logger": wanted}, tmp_path, [], [table]).loggers == loggers


def test_what_contradicts_itself_is_refused(tmp_path):
    for wrong in (
        {"enable_checkpointing": False, "callbacks": ModelCheckpoint(tmp_path)},
        {"enable_progress_bar": False, "callbacks": TQDMProgressBar()},
        {"callbacks": [EarlyStopping("val/AP"), EarlyStopping("val/AP")]},
    ):
        with pytest.raises(UsageError, match=r"^trainer: "):
            build_trainer({**DEFAULTS, **CPU, **wrong}, tmp_path)
    with pytest.raises(UsageError, match="averaged twice, by AveragedWeights and EMAWeightAveraging: leave out ema"):
        build_trainer({**DEFAULTS, **CPU, "callbacks": EMAWeightAveraging()}, tmp_path, [AveragedWeights(0.9)])


@pytest.mark.parametrize(
    ("name", "value", "rule"),
    [
        ("accumulate_grad_batches", 0, "must be at least 1"),
        ("accumulate_grad_batches", -1, "must be at least 1"),
        ("check_val_every_n_epoch", 0, "must be at least 1"),
        ("val_check_interval", 0, "must be positive and finite"),
        ("log_every_n_steps", -1, "must be at least 0"),
        ("num_sanity_val_steps", -2, "must be at least -1"),
        ("gradient_clip_val", -1, "must not be negative or infinite"),
    ],
)
def test_numbers_that_lightning_would_divide_by_or_leave_out_are_refused(name, value, rule, tmp_path):
    with pytest.raises(UsageError, match=rf"^trainer: {name} {rule}, got {value}$"):
        build_trainer({**DEFAULTS, **CPU, name: value}, tmp_path)


@pytest.mark.parametrize(
    ("trainer", "told"),
    [
        (
            "val_check_interval: 100",
            "val_check_interval` (100) must be less than or equal to the number of the training",
        ),
        ("limit_train_batches: 0.01", "Please increase the `limit_train_batches` argument"),
        ("callbacks: [{class_path: LearningRateFinder}]", "When using the learning rate finder, either"),
    ],
)
def test_what_lightning_refuses_when_it_trains_is_a_wrong_setting(trainer, told, demo_root, tmp_path, capsys):
    path = overlay(tmp_path, f"trainer: {{{trainer}}}")
    arguments = ["train", runs.CONFIG, path, *runs.options(demo_root), "--output", str(tmp_path / "run")]
    assert cli.main(arguments) == 2
    line = capsys.readouterr().err.rstrip("\n").splitlines()[-1]
    assert told in line
    assert "--debug" not in line
    assert not (tmp_path / "run").exists()


def train(root: Path, folder: Path, *options: str, epochs: int = 2) -> int:
    return cli.main(["train", runs.CONFIG, *runs.options(root, epochs), "--output", str(folder), *options])


def overlay(folder: Path, text: str) -> str:
    path = folder / "overlay.yaml"
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_callbacks_and_loggers_of_a_configuration_are_used(demo_root, tmp_path, capsys):
    path = overlay(
        tmp_path,
        f"""
trainer:
  callbacks:
  - {{class_path: EarlyStopping, init_args: {{monitor: val/AP, mode: max, patience: 1, min_delta: 1.0}}}}
  - {{class_path: ModelCheckpoint, init_args: {{dirpath: {tmp_path / "theirs"}, filename: "{{epoch}}", save_top_k: -1}}}}
  - {{class_path: Timer, init_args: {{duration: "01:00:00:00"}}}}
  logger: {{class_path: CSVLogger, init_args: {{save_dir: {tmp_path / "logs"}, flush_logs_every_n_steps: 1}}}}
""",
    )
    folder = tmp_path / "run"
    arguments = [
        runs.CONFIG,
        path,
        *runs.options(demo_root, 4),
        "--output",
        str(folder),
        "--data.loader.batch_size",
        "6",
    ]
    assert cli.main(["train", *arguments]) == 0
    assert json.loads((folder / "summary.json").read_text())["epochs"] == 2  # of four
    assert {one.name for one in (tmp_path / "theirs").iterdir()} >= {"epoch=0.ckpt", "epoch=1.ckpt"}
    theirs = tmp_path / "logs" / "lightning_logs" / "version_0" / "metrics.csv"
    for table in (folder / "metrics.csv", theirs):
        with table.open(newline="") as stream:
            assert len([row for row in csv.DictReader(stream) if row["val/AP"]]) == 2
    capsys.readouterr()
    evaluated = f"evaluate {folder / 'config.yaml'} --ckpt_path {folder / 'best.ckpt'} --json {tmp_path / 'a'}".split()
    assert cli.main([*evaluated, "--trainer.limit_predict_batches", "1", "--data.loader.eval_batch_size", "2"]) == 0
    assert "the numbers are of 2 of 6 images, since trainer limits the batches" in capsys.readouterr().out
    assert cli.main([*evaluated, "--trainer.limit_val_batches", "0"]) == 2
    assert "give --trainer.limit_predict_batches 1.0 to evaluate all" in capsys.readouterr().err
    logged = (tmp_path / "logs" / "lightning_logs" / "version_1" / "metrics.csv").read_text()
    assert "val/AP" in logged.splitlines()[0]


@pytest.mark.parametrize(
    ("options", "left", "line"),
    [
        (["--trainer.limit_val_batches", "0"], {"last.ckpt"}, "checkpoint {}/last.ckpt"),
        *(
            pytest.param(
                ["--trainer.check_val_every_n_epoch", "5", *more],
                *({"last.ckpt"}, "checkpoint {}/last.ckpt"),
                marks=pytest.mark.slow,
            )
            for more in ([], ["--trainer.num_sanity_val_steps", "1"])
        ),
        (["--trainer.fast_dev_run", "true"], {"best.ckpt", "last.ckpt"}, "AP 0.000 AP50 0.000 checkpoint {}/best.ckpt"),
        pytest.param(["--trainer.enable_checkpointing", "false"], set(), " nothing was saved", marks=pytest.mark.slow),
        (["--trainer.barebones", "true", "--trainer.log_every_n_steps", "10"], set(), " nothing was saved"),
    ],
)
def test_what_is_not_validated_or_saved_is_a_training_too(options, left, line, demo_root, tmp_path, capsys):
    folder = tmp_path / "run"
    assert train(demo_root, folder, *options, epochs=1) == 0
    shown = capsys.readouterr().out
    assert shown.rstrip("\n").splitlines()[-1].endswith(line.format(folder).removeprefix("AP 0.000 AP50 0.000"))
    assert {one.name for one in folder.glob("*.ckpt")} == left
    assert ("AP" in runs.summary(folder)) == (left != {"last.ckpt"})


def test_limited_batches_are_said_and_a_profile_is_shown(demo_root, tmp_path, capfd, caplog):
    limits = [
        "--trainer.limit_val_batches",
        "1",
        "--trainer.profiler",
        "simple",
        "--trainer.enable_progress_bar",
        "false",
    ]
    assert train(demo_root, tmp_path / "run", *limits, epochs=1) == 0
    shown = capfd.readouterr()
    assert "the numbers are those of 1 of 2 batches of validation images, since trainer limits them" in shown.out
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["images"] == 4
    assert "run_training_batch" in shown.err + caplog.text
    assert "it/s" not in shown.err


@pytest.mark.slow
def test_averaged_weights_are_validated_saved_and_predicted_with(demo_root, tmp_path, capsys):
    seen: list[dict[str, torch.Tensor]] = []

    class Steps(StepSeed):
        def on_before_zero_grad(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
            seen.append({name: value.detach().clone() for name, value in pl_module.named_parameters()})

    from detpipe.training import callbacks

    folder = tmp_path / "run"
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(callbacks, "StepSeed", Steps)
        assert train(demo_root, folder, "--ema", "0.5") == 0
    stored = torch.load(folder / "last.ckpt", weights_only=True)
    weights = [*seen[1:], {name: stored["current_model_state"][name] for name in seen[0]}]  # after each of six steps
    average = weights[0]
    for step, now in enumerate(weights[1:], start=2):
        decay = min(0.5, (1 + step) / (10 + step))
        average = {name: torch.lerp(average[name], value, 1 - decay) for name, value in now.items()}
    for name, value in average.items():
        torch.testing.assert_close(stored["state_dict"][name], value)
    best = json.loads((folder / "summary.json").read_text())["AP"]
    assert (
        cli.main(
            f"evaluate {folder / 'config.yaml'} --ckpt_path {folder / 'best.ckpt'} --json {tmp_path / 'a'}".split()
        )
        == 0
    )
    assert json.loads((tmp_path / "a").read_text())["AP"] == pytest.approx(best, abs=1e-9)
    for wrong in ("1", "-0.1"):
        assert train(demo_root, tmp_path / "wrong", "--ema", wrong) == 2
        assert "ema must be at least 0 and less than 1" in capsys.readouterr().err


def test_what_averages_the_weights_at_the_end_is_saved(demo_root, tmp_path):
    path = overlay(
        tmp_path, "trainer: {callbacks: [{class_path: StochasticWeightAveraging, init_args: {swa_lrs: 0.05}}]}"
    )
    with pytest.MonkeyPatch.context() as patched:
        ends: list[dict[str, torch.Tensor]] = []
        patched.setattr(
            callbacks.Throughput, "teardown", lambda self, trainer, module, stage: ends.append(module.state_dict())
        )
        options = ["--model.backbone.regime.norm", "group", "--trainer.limit_train_batches", "1"]
        arguments = [runs.CONFIG, path, *runs.options(demo_root, 2), "--output", str(tmp_path / "run"), *options]
        assert cli.main(["train", *arguments, "--trainer.limit_val_batches", "0"]) == 0
    stored = runs.weights(tmp_path / "run" / "last.ckpt")
    assert [name for name, value in ends[0].items() if not torch.equal(value, stored[name])] == []


def test_an_average_of_many_steps_follows_its_decay():
    average = AveragedWeights(0.9)
    decays = []
    for step in (0, 10, 200):
        average._latest_update_step = step
        value = torch.zeros(1)
        average._average([value], [torch.ones(1)], None)
        decays.append(1 - value.item())
    assert decays == pytest.approx([2 / 11, 12 / 21, 0.9])


@pytest.mark.slow
def test_early_stopping_ends_a_training(demo_root, tmp_path, capsys):
    class MeanAveragePrecision(callbacks.MeanAveragePrecision):
        def on_validation_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            self.metrics = {"AP": 0.5, "AP50": 0.5, "epoch": trainer.current_epoch}
            pl_module.log("val/AP", 0.5)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(callbacks, "MeanAveragePrecision", MeanAveragePrecision)
        assert train(demo_root, tmp_path / "run", "--early_stopping", "2", epochs=8) == 0
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["epochs"] == 3
    assert "ended after epoch 2: 2 validations brought no better val/AP" in capsys.readouterr().out
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(callbacks, "MeanAveragePrecision", MeanAveragePrecision)
        each = ["--early_stopping", "1", "--trainer.val_check_interval", "1"]
        assert train(demo_root, tmp_path / "first epoch", *each, epochs=2) == 0
    assert "ended after epoch 0: 1 validations brought no better val/AP" in capsys.readouterr().out
    assert train(demo_root, tmp_path / "other", "--early_stopping", "2", "--trainer.limit_val_batches", "0") == 2
    assert "early_stopping needs validations, but trainer.limit_val_batches is 0" in capsys.readouterr().err
    assert train(demo_root, tmp_path / "other", "--early_stopping", "2", "--trainer.barebones", "true") == 2
    assert "early_stopping needs numbers that trainer.barebones does not log" in capsys.readouterr().err
    assert train(demo_root, tmp_path / "other", "--early_stopping", "0") == 2
    assert "early_stopping must be at least 1 epoch, got 0" in capsys.readouterr().err


def test_any_number_is_better_than_none(demo_root, tmp_path):
    class MeanAveragePrecision(callbacks.MeanAveragePrecision):
        def on_validation_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            value = [float("nan"), 0.5, 0.25][trainer.current_epoch]
            self.metrics = {"AP": value, "AP50": value, "epoch": trainer.current_epoch}
            pl_module.log("val/AP", value)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(callbacks, "MeanAveragePrecision", MeanAveragePrecision)
        assert train(demo_root, tmp_path / "run", "--trainer.limit_train_batches", "1", epochs=3) == 0
    assert runs.summary(tmp_path / "run")["epoch"] == 1


def test_row_41_a_disk_that_is_full_is_named_with_what_is_intact(demo_root, tmp_path, monkeypatch, capsys):
    real, saves = torch.save, []

    def save(content: Any, path: Any, *arguments: Any, **more: Any) -> None:
        saves.append(path)
        if len(saves) == 3:
            raise RuntimeError(
                "[enforce fail at inline_container.cc:858] . PytorchStreamWriter failed writing file data/3"
            )
        real(content, path, *arguments, **more)

    monkeypatch.setattr(torch, "save", save)
    folder = tmp_path / "run"
    assert train(demo_root, folder, "--trainer.limit_val_batches", "0", "--checkpoint.every_n_steps", "1") == 1
    line = capsys.readouterr().err.rstrip("\n").splitlines()[-1]
    assert line.startswith(
        f"detpipe: error: {folder / 'last.ckpt'} could not be written after step 3: the disk is full, or"
    )
    assert "MiB are free there. Intact: last.ckpt, previous.ckpt. Make room, and go on with --ckpt_path last" in line
    assert torch.load(folder / "last.ckpt", weights_only=True)["global_step"] == 2


def test_the_metrics_table_goes_on_after_a_kill(tmp_path):
    table = MetricsTable(tmp_path)
    table.begin(0)
    for step in range(3):
        table.log_metrics({"loss": torch.tensor(step / 2)}, step)
    table.save()
    table.log_metrics({"AP": 0.25}, 2)
    table.save()
    with (tmp_path / "metrics.csv").open("a") as stream:
        stream.write("1.5,")  # a kill in the middle of a line
    again = MetricsTable(tmp_path)
    again.begin(2)
    again.log_metrics({"loss": 1.0, "AP": None}, 2)
    again.finalize("success")
    with (tmp_path / "metrics.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert rows == [
        {"AP": "", "loss": "0.0", "step": "0"},
        {"AP": "", "loss": "0.5", "step": "1"},
        {"AP": "", "loss": "1.0", "step": "2"},
    ]
    MetricsTable(tmp_path).begin(1)
    assert len((tmp_path / "metrics.csv").read_text().splitlines()) == 2
    for content in (b"a;step\n1;2\n", b"\xff\xfe\x00,step\n1,2\n"):  # as of a program for tables
        (tmp_path / "metrics.csv").write_bytes(content)
        with pytest.raises(TrainingError, match=r"metrics\.csv: not the table that was written there; move it away"):
            MetricsTable(tmp_path).begin(1)
    (tmp_path / "metrics.csv").unlink()
    late = MetricsTable(tmp_path)
    late.begin(0)
    late.log_metrics({"loss": 0.0}, 5)
    late.save()
    MetricsTable(tmp_path).begin(5)  # no row is of an earlier step
    assert not (tmp_path / "metrics.csv").exists()
    MetricsTable(tmp_path).begin(0)
    assert not (tmp_path / "metrics.csv").exists()
    broken = MetricsTable(tmp_path / "gone")
    (tmp_path / "gone").write_text("a file where the folder should be")
    broken.log_metrics({"loss": 1.0}, 0)
    with pytest.raises(TrainingError, match=r"metrics.csv cannot be written: .*; checkpoints are intact"):
        broken.save()

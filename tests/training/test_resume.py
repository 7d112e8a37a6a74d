"""Trainings that are killed, asked to end, or go on with other settings."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import kills_of_runs as kills
import pytest
import runs
import torch
from lightning.pytorch.callbacks import Timer
from together import fork, start, wait

from detpipe import cli
from detpipe.commands.training import add_arguments
from detpipe.demo import Demo, DemoScenes
from detpipe.support.errors import UsageError
from detpipe.training import resume
from detpipe.training.checkpoint import BEST, LAST, PREVIOUS, check_sums

EVERY_STEP = ["--checkpoint.every_n_steps", "1"]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, killed_root: Path) -> dict[tuple[str, ...], Path]:
    """Runs that nothing disturbed, by their options."""
    return {}


@pytest.fixture(scope="module")
def killed_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the scenes lie."""
    return tmp_path_factory.mktemp("killed") / "demo"


def compare(command: list[str], folder: Path, known: dict[tuple[str, ...], Path]) -> list[str]:
    """What differs between a run and an undisturbed one."""
    key = tuple(command)
    if key not in known:
        known[key] = folder.parent / "undisturbed"
        assert kills.run([*command, "--output", str(known[key])], folder.parent / "log") == 0
    return kills.differences(kills.state(known[key]), kills.state(folder))


CASES = [  # accumulated batches, workers, more options, hook and call at which the kill comes
    (1, 0, [*EVERY_STEP, "--ema", "0.9", "--trainer.val_check_interval", "3"], ("on_train_batch_start", 9)),
    (3, 2, EVERY_STEP, ("on_train_batch_start", 13)),
    (1, 2, ["--checkpoint.every_n_steps", "3"], ("on_train_batch_start", 8)),
    (1, 0, [*EVERY_STEP, "--trainer.max_epochs", "-1", "--trainer.max_steps", "11"], ("on_train_epoch_end", 0)),
    *(
        (1, 2, EVERY_STEP, ("on_train_batch_start", step)) for step in (1, 6, 11)
    ),  # of the first epoch, on its border, the last
    *((3, 0, EVERY_STEP, ("on_train_batch_start", batch)) for batch in (1, 17)),
    *((1, 0, EVERY_STEP, ("on_train_batch_end", step)) for step in (0, 5, 11)),
]


@pytest.mark.slow
@pytest.mark.parametrize(("accumulated", "workers", "options", "at"), CASES)
def test_p1_a_killed_run_ends_as_an_undisturbed_one(
    accumulated, workers, options, at, killed_root, undisturbed, tmp_path
):
    """Weights, optimizer, averages, numbers, progress and metrics, to the bit; no batch comes twice, and none is left out."""
    command, folder = [*kills.command(killed_root, accumulated, workers), *options], tmp_path / "run"
    assert kills.run([*command, "--output", str(folder)], tmp_path / "log", at) == -signal.SIGKILL
    assert not (folder / "summary.json").exists()
    again = [*command, "--output", str(folder), "--ckpt_path", "last"]
    assert kills.run(again, tmp_path / "log") == 0, (tmp_path / "log").read_text()
    before_the_first_step = at in (("on_train_batch_start", 1), ("on_train_batch_end", 0)) and (
        accumulated > 1 or "end" in at[0]
    )
    told = "training starts anew" if before_the_first_step else "going on from"
    assert told in (tmp_path / "log").read_text()
    assert compare(command, folder, undisturbed) == []
    assert not list(folder.glob("*.partial-*"))
    assert not list(folder.glob("previous*"))


@pytest.mark.parametrize(
    ("name", "at", "accumulated", "workers", "options", "status", "step"),
    [
        pytest.param("SIGTERM", ("on_train_batch_start", 2), 1, 2, [], 143, 3, marks=pytest.mark.slow),
        pytest.param("SIGUSR1", ("on_train_batch_end", 2), 1, 0, [], 143, 3, marks=pytest.mark.slow),
        # met in the validation, which is run again
        pytest.param("SIGINT", ("on_train_batch_end", 5), 1, 0, [], 130, 6, marks=pytest.mark.slow),
        # met in a validation in the middle of the second step, whose gradients would be lost
        pytest.param(
            *("SIGTERM", ("on_train_batch_end", 3), 3, 0, ["--trainer.val_check_interval", "4"], 143, 2),
            marks=pytest.mark.slow,
        ),
        pytest.param("SIGHUP", ("on_train_batch_start", 0), 1, 0, [], 129, 1, marks=pytest.mark.slow),
    ],
)
def test_a_signal_ends_a_run_after_its_step(
    name, at, accumulated, workers, options, status, step, killed_root, undisturbed, tmp_path
):
    command = [*kills.command(killed_root, accumulated, workers), *options]
    folder, log = tmp_path / "run", tmp_path / "log"
    assert kills.run([*command, "--output", str(folder)], log, at, getattr(signal, name)) == status
    told = f"detpipe: {name}: stopped after step {step}; saved {folder / LAST}; go on with the same command, --output {folder} and"
    assert told in log.read_text()
    assert torch.load(folder / LAST, weights_only=True)["global_step"] == step
    assert kills.run([*command, "--output", str(folder), "--ckpt_path", "last"], log) == 0
    assert compare(command, folder, undisturbed) == []


@pytest.mark.slow
@pytest.mark.parametrize("accumulated", [1, 3])
def test_a_training_that_ended_within_an_epoch_goes_on_alike(
    accumulated, killed_root, undisturbed, tmp_path, monkeypatch
):
    """Its time was up, with three accumulated batches in the middle of a step, whose batches come again.

    Statistics of batch normalization have seen these twice, so there are none.
    """
    limit = ["--trainer.max_time", "01:00:00:00", "--trainer.limit_val_batches", "0"]
    limit += ["--model.backbone.init_args.regime.norm", "group"]
    command, first, second = [*kills.command(killed_root, accumulated), *limit], tmp_path / "first", tmp_path / "run"
    batches: list[int] = []

    def check(self: Timer, trainer: Any) -> None:
        batches.append(trainer.fit_loop.total_batch_idx + 1)
        trainer.should_stop = batches[-1] == 8

    with monkeypatch.context() as patched:
        patched.setattr(Timer, "_check_time_remaining", check)
        assert cli.main([*command, "--output", str(first)]) == 0
    assert batches[-1] == 8
    assert torch.load(first / LAST, weights_only=True)["global_step"] == 8 // accumulated
    assert cli.main([*command, "--output", str(second), "--ckpt_path", str(first / LAST)]) == 0
    assert cli.main([*command, "--output", str(tmp_path / "whole")]) == 0
    runs.assert_equal_weights(second / LAST, tmp_path / "whole" / LAST)


def test_a_group_of_processes_that_is_asked_to_end_saves_too(killed_root, tmp_path):
    """As Slurm and a terminal do it: the data workers get the signal as well."""
    command, log = [*kills.command(killed_root, 1, 2), "--trainer.max_epochs", "400", *EVERY_STEP], tmp_path / "log"

    def work() -> int:
        os.setsid()
        return cli.main([*command, "--output", str(tmp_path / "run")])

    process = fork(work, log, log)
    while process.is_alive() and not (tmp_path / "run" / LAST).exists():
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGTERM)
    assert wait(process, 60) == 143, log.read_text()
    assert "SIGTERM: stopped after step" in (tmp_path / "log").read_text()
    assert "Traceback" not in (tmp_path / "log").read_text()


@pytest.mark.slow
def test_slurm_is_asked_to_queue_a_job_again(killed_root, tmp_path, monkeypatch):
    """When the checkpoint is written, and not where something else does it."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "scontrol").write_text(
        f'#!/bin/sh\ntest -f {tmp_path}/run/{LAST} && echo "$@" >> {tmp_path}/asked\n'
    )
    (tmp_path / "bin" / "scontrol").chmod(0o755)
    job = {"JOB_ID": "4711", "JOB_NAME": "train", "NTASKS": "1", "PROCID": "0", "LOCALID": "0", "NODEID": "0"}
    for name, value in job.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    command, at = (
        [*kills.command(killed_root), "--output", str(tmp_path / "run"), "--ckpt_path", "last"],
        ("on_train_batch_start", 1),
    )
    assert kills.run(command, tmp_path / "log", at, signal.SIGUSR1) == 143, (tmp_path / "log").read_text()
    assert (tmp_path / "asked").read_text() == "requeue 4711\n"
    others = ["--trainer.plugins", "SLURMEnvironment", "--trainer.plugins.auto_requeue", "false"]
    assert kills.run([*command, *others], tmp_path / "log", at, signal.SIGUSR1) == 143, (tmp_path / "log").read_text()
    assert kills.run(command, tmp_path / "log", at, signal.SIGTERM) == 143
    assert (tmp_path / "asked").read_text() == "requeue 4711\n"


def test_one_command_line_serves_a_job_that_is_queued_again(killed_root, tmp_path, capsys):
    command = [*kills.command(killed_root), "--output", str(tmp_path / "run"), "--ckpt_path", "last"]
    assert cli.main([*command, "--trainer.max_epochs", "1"]) == 0
    assert f"no checkpoint in {tmp_path / 'run'}: training starts anew" in capsys.readouterr().out
    assert cli.main([*command, "--trainer.max_epochs", "1"]) == 1
    assert "holds a finished run" in capsys.readouterr().err
    assert cli.main([*kills.command(killed_root), "--ckpt_path", "last"]) == 2
    assert "--ckpt_path last needs the folder of the run: give --output RUN" in capsys.readouterr().err


def stopped(root: Path, folder: Path, step: int = 3) -> list[str]:
    """A run that a signal has ended, and its command."""
    command = [*kills.command(root), *EVERY_STEP, "--output", str(folder)]
    assert kills.run(command, folder.parent / "log", ("on_train_batch_start", step - 1), signal.SIGTERM) == 143
    return command


@pytest.fixture(scope="module")
def broken_off(killed_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was stopped after three steps; copy it."""
    folder = tmp_path_factory.mktemp("stopped") / "run"
    stopped(killed_root, folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("path", ["last", "file"])
def test_row_42_a_damaged_checkpoint_is_named_and_the_one_before_is_used(
    path, broken_off, killed_root, tmp_path, capsys
):
    folder = tmp_path / "run"
    shutil.copytree(broken_off, folder)
    content = bytearray((folder / LAST).read_bytes())
    content[len(content) // 2] ^= 1
    (folder / LAST).write_bytes(content)
    command = [*kills.command(killed_root), "--output", str(folder), "--trainer.max_epochs", "2"]
    assert cli.main([*command, "--ckpt_path", "last" if path == "last" else str(folder / LAST)]) == 0
    shown = capsys.readouterr()
    assert f"WARNING: checkpoint {folder / LAST} is damaged" in shown.err
    assert "it does not match its check sum in last.ckpt.sha256" in shown.err
    assert f"WARNING: going on from {folder / PREVIOUS} (step 2) instead" in shown.err
    assert f"going on from {folder / PREVIOUS}, step 2" in shown.out


def test_a_folder_whose_checkpoints_are_all_damaged(broken_off, killed_root, tmp_path, capsys):
    folder = tmp_path / "run"
    shutil.copytree(broken_off, folder)
    for name in (LAST, PREVIOUS):
        (folder / name).write_bytes(b"cut")
    assert cli.main([*kills.command(killed_root), "--output", str(folder), "--ckpt_path", "last"]) == 1
    assert f"no other checkpoint in {folder} is sound" in capsys.readouterr().err.splitlines()[-1]


CHANGED = [
    ("lr", ["--model.optimizer.lr", "0.5"], "model.optimizer.lr was 0.0015, is 0.5"),
    ("lr", ["--model.optimizer.name", "sgd"], "model.optimizer.name was 'adamw', is 'sgd'"),
    ("schedule", ["--trainer.max_epochs", "3"], "trainer.max_epochs was 2, is 3"),
    ("schedule", ["--model.lr_scheduler.warmup", "0.5"], "model.lr_scheduler.warmup was 0.1, is 0.5"),
    ("batch_size", ["--data.loader.batch_size", "2"], "data.loader.batch_size was 3, is 2"),
    ("seed", ["--seed_everything", "7"], "seed_everything was 0, is 7"),
    ("data", ["--data.augment.flip", "0.25"], "data.augment.flip was 0.5, is 0.25"),
    ("precision", ["--trainer.precision", "bf16-mixed"], "trainer.precision was '32-true', is 'bf16-mixed'"),
    ("accumulation", ["--trainer.accumulate_grad_batches", "2"], "trainer.accumulate_grad_batches was 1, is 2"),
    ("clipping", ["--trainer.gradient_clip_val", "1"], "trainer.gradient_clip_val was 10.0, is 1"),
    ("limits", ["--trainer.limit_train_batches", "5"], "trainer.limit_train_batches was None, is 5"),
    ("ema", ["--ema", "0.9"], "ema was None, is 0.9"),
    (
        "model",
        ["--model.proposals.anchors.sizes", "[20, 24]"],
        "model.proposals.anchors.sizes was [20.0, 28.0], is [20.0, 24.0]",
    ),
]


@pytest.fixture(scope="module")
def scenes(killed_root: Path) -> Demo:
    """The data of these runs."""
    return Demo(str(killed_root), scenes=DemoScenes(**kills.SCENES))


@pytest.mark.parametrize(("name", "options", "told"), CHANGED)
def test_row_43_a_changed_setting_is_listed_and_refused(name, options, told, broken_off, killed_root, scenes):
    stored = torch.load(broken_off / LAST, weights_only=True)
    config = runs.Parsed([*kills.command(killed_root)[1:], *options], add_arguments).config
    now = {**resume.record(config.as_dict(), scenes), "processes": 1}
    with pytest.raises(UsageError) as caught:
        resume.check_changes(stored, now, (), broken_off / LAST)
    assert f"was trained with other settings: {told}" in str(caught.value)
    assert str(caught.value).endswith(f"or --accept_changes {name}")


def test_row_43_through_the_command(broken_off, killed_root, tmp_path, capsys):
    ckpt = ["--ckpt_path", str(broken_off / LAST), "--model.optimizer.lr", "0.5"]
    assert cli.main([*kills.command(killed_root), "--output", str(tmp_path / "run"), *ckpt]) == 2
    assert "settings: model.optimizer.lr was 0.0015, is 0.5. Give" in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "run").exists()


def test_a_resumption_that_lightning_refuses_leaves_the_configuration(broken_off, killed_root, tmp_path, capsys):
    folder = tmp_path / "run"
    shutil.copytree(broken_off, folder)
    before = (folder / "config.yaml").read_bytes()
    more = ["--ckpt_path", "last", "--trainer.val_check_interval", "100"]
    assert cli.main([*kills.command(killed_root), "--output", str(folder), *more]) == 2
    assert "`val_check_interval` (100) must be less than" in capsys.readouterr().err.splitlines()[-1]
    assert (folder / "config.yaml").read_bytes() == before


@pytest.mark.slow
def test_row_43_other_images_are_listed_and_refused(broken_off, tmp_path, capsys):
    """The same number of images with the same names, another one more, and the same ones in another folder."""
    ckpt = ["--ckpt_path", str(broken_off / LAST), "--output", str(tmp_path / "run")]
    more = [*kills.command(tmp_path / "more"), *ckpt, "--data.scenes", "{train: 19, val: 4, size: 64}"]
    assert cli.main(more) == 2
    assert "data.content other images or boxes" in capsys.readouterr().err
    assert cli.main([*kills.command(tmp_path / "moved"), *ckpt]) == 0


@pytest.mark.slow
@pytest.mark.parametrize("plugins", [[], ["--trainer.plugins", "TorchCheckpointIO"]])
def test_accepted_changes_are_used(plugins, broken_off, killed_root, tmp_path, capsys):
    """A checkpoint would bring back its own learning rate, and one of a training that had ended the rate at its end: 0."""
    folder = tmp_path / "run"
    accepted = [
        "--accept_changes",
        "lr, schedule,batch_size",
        "--ckpt_path",
        str(broken_off / LAST),
        "--output",
        str(folder),
    ]
    changes = ["--model.optimizer.lr", "0.05", "--trainer.max_epochs", "4", "--data.loader.batch_size", "2"]
    changes += [
        "--model.optimizer.weight_decay",
        "0.25",
        "--model.lr_scheduler",
        "{name: step, warmup: 0, milestones: []}",
    ]
    assert cli.main([*kills.command(killed_root), *accepted, *changes, *plugins]) == 0
    shown = capsys.readouterr().out
    for line in ("model.optimizer.lr was 0.0015, is 0.05", "trainer.max_epochs was 2, is 4", "the epoch begins anew"):
        assert f"note: {line}" in shown
    stored = torch.load(folder / LAST, weights_only=True)
    groups = stored["optimizer_states"][0]["param_groups"]
    assert [(group["lr"], group["weight_decay"]) for group in groups] == [(0.05, 0.25), (0.05, 0.0)] * 2
    assert stored["global_step"] == 3 + 4 * 9


@pytest.mark.slow
@pytest.mark.parametrize(
    ("before", "now"),
    [
        (["--model.optimizer.name", "sgd"], ["--model.optimizer.name", "adamw"]),
        ([], ["--model.optimizer.backbone_scale", "0.1"]),  # further groups of parameters
    ],
)
def test_another_optimizer_begins_anew(before, now, killed_root, tmp_path, capsys):
    command, first, second = kills.command(killed_root), tmp_path / "first", tmp_path / "second"
    assert cli.main([*command, *before, "--output", str(first), "--trainer.max_epochs", "1"]) == 0
    more = ["--ckpt_path", str(first / LAST), "--accept_changes", "lr,schedule", "--output", str(second)]
    assert cli.main([*command, *now, *more]) == 0
    assert "note: the optimizer begins anew, since it is another one, or has other groups" in capsys.readouterr().out
    states = torch.load(second / LAST, weights_only=True)["optimizer_states"][0]["state"]
    assert {int(state["step"]) for state in states.values()} == {6}  # of twelve


@pytest.mark.slow
def test_without_averages_the_weights_that_are_trained_go_on(killed_root, tmp_path):
    command, first, second = kills.command(killed_root), tmp_path / "first", tmp_path / "second"
    assert cli.main([*command, "--ema", "0.9", "--output", str(first), "--trainer.max_epochs", "1"]) == 0
    still = ["--model.optimizer.lr", "1e-30", "--model.optimizer.weight_decay", "0"]
    more = ["--ckpt_path", str(first / LAST), "--accept_changes", "ema,lr,schedule", "--output", str(second)]
    assert cli.main([*command, *still, *more]) == 0
    trained = torch.load(first / LAST, weights_only=True)["current_model_state"]["head.classifier.weight"]
    assert torch.equal(runs.weights(second / LAST)["head.classifier.weight"], trained)


@pytest.mark.slow
def test_a_longer_training_goes_on_at_the_rate_of_its_schedule(killed_root, tmp_path):
    command = kills.command(killed_root)
    first, second = tmp_path / "first", tmp_path / "second"
    assert cli.main([*command, "--output", str(first), "--trainer.max_epochs", "1"]) == 0
    assert torch.load(first / LAST, weights_only=True)["optimizer_states"][0]["param_groups"][0]["lr"] == 0
    rates = []

    class Rates(resume.UseConfigured):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):  # type: ignore[no-untyped-def]
            rates.append(trainer.optimizers[0].param_groups[0]["lr"])

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(resume, "UseConfigured", Rates)
        more = ["--ckpt_path", str(first / LAST), "--accept_changes", "schedule", "--output", str(second)]
        assert cli.main([*command, *more]) == 0
    assert len(rates) == 6
    assert all(earlier > later > 0 for earlier, later in pairwise(rates))


@pytest.mark.parametrize("text", ["lrr", "lr,dat"])
def test_an_unknown_change(text):
    with pytest.raises(UsageError, match=r"--accept_changes: unknown change .*; expected lr, schedule, .*did you mean"):
        resume.read_accepted(text)


def test_row_50_a_folder_in_which_another_process_trains(killed_root, tmp_path, capsys):
    folder = tmp_path / "run"
    folder.mkdir()
    program = "import filelock, sys, time\nwith filelock.FileLock(sys.argv[1]):\n    print('held', flush=True)\n    time.sleep(600)"
    other = subprocess.Popen([sys.executable, "-c", program, str(folder / ".lock")], stdout=subprocess.PIPE)
    try:
        assert other.stdout is not None
        assert other.stdout.readline() == b"held\n"
        assert cli.main([*kills.command(killed_root), "--output", str(folder)]) == 1
        assert f"{folder} is in use: another process trains there; wait for it" in capsys.readouterr().err
        assert [path.name for path in folder.iterdir()] == [".lock"]
    finally:
        other.kill()
        other.communicate()


def test_a_folder_with_nothing_but_a_best_checkpoint_is_not_used_again(broken_off, killed_root, tmp_path, capsys):
    """As a kill before the end of the first epoch leaves it: its weights would pass for those of the new training."""
    folder = tmp_path / "run"
    folder.mkdir()
    shutil.copy(broken_off / LAST, folder / BEST)
    command = [*kills.command(killed_root), "--output", str(folder), "--trainer.limit_val_batches", "0"]
    assert cli.main(command) == 1
    assert f"{folder} holds a training that has not ended: go on with --ckpt_path last" in capsys.readouterr().err


def test_check_sums_are_those_of_sha256sum(broken_off):
    if shutil.which("sha256sum") is None:
        pytest.skip("no sha256sum on this machine")
    names = [f"{name}.sha256" for name in (LAST, PREVIOUS)]
    subprocess.run(["sha256sum", "--check", "--strict", *names], cwd=broken_off, check=True)
    assert all(len(check_sums(broken_off / name)) == 1 for name in (LAST, PREVIOUS))


def of_shards(root: Path) -> list[str]:
    """Train on the scenes in shards."""
    folder = root.parent / "shards"
    if not folder.exists():
        Demo(str(root), scenes=DemoScenes(**kills.SCENES)).annotations("train")
        for split in ("train", "val"):
            assert cli.main(["data", "shards", str(root / "coco"), "--split", split, "-o", str(folder)]) == 0
    data = [
        "--data",
        "Shards",
        "--data.root",
        str(folder),
        "--data.augment",
        "{flip: 0.5}",
        "--data.loader.num_workers",
        "2",
    ]
    return ["train", runs.CONFIG, *runs.MODEL, *data, "--data.loader.batch_size", "3"]


@pytest.mark.slow
def test_a_training_on_shards_goes_on_alike(killed_root, undisturbed, tmp_path):
    short = ["--trainer.accelerator", "cpu", "--trainer.max_epochs", "2", "--trainer.log_every_n_steps", "1"]
    command, folder = [*of_shards(killed_root), *short, *EVERY_STEP], tmp_path / "run"
    at = ("on_train_batch_start", 8)
    assert kills.run([*command, "--output", str(folder)], tmp_path / "log", at) == -signal.SIGKILL
    again = [*command, "--output", str(folder), "--ckpt_path", "last"]
    assert kills.run(again, tmp_path / "log") == 0, (tmp_path / "log").read_text()
    assert compare(command, folder, undisturbed) == []


BOTH = """
import json, os, signal, sys
import torch
torch.set_num_threads(1)
import kills_of_runs as kills
from detpipe import cli
at, rank, number, arguments = json.loads(sys.argv[1])
if at and os.environ["RANK"] in rank:
    kills.signal_at(*at, number)
sys.exit(cli.main(arguments))
"""


def both(at: tuple[str, int] | None, rank: str, number: int, arguments: list[str]) -> list[int]:
    """Run a command in two processes, of which some get a signal; their statuses."""
    return [status for status, _, _ in start(BOTH, [json.dumps([at, rank, number, arguments])], 2, 200)]


@pytest.mark.slow
@pytest.mark.parametrize("accumulated", [1, 3])
def test_two_processes_stop_together_and_go_on(accumulated, killed_root, tmp_path):
    """Both are killed, or one of them is asked to end."""
    Demo(str(killed_root), scenes=DemoScenes(**kills.SCENES)).annotations("train")
    two = ["--trainer.devices", "2", "--trainer.accelerator", "cpu", *EVERY_STEP]
    command = [*kills.command(killed_root, accumulated, 2 if accumulated > 1 else 0), *two]
    whole = tmp_path / "whole"
    assert both(None, "", 0, [*command, "--output", str(whole)]) == [0, 0]
    moments = ((4, "01", signal.SIGKILL), (2, "1", signal.SIGTERM))
    for batch, rank, number in moments:
        folder = tmp_path / f"{number}"
        statuses = both(("on_train_batch_start", batch), rank, number, [*command, "--output", str(folder)])
        assert statuses == ([-signal.SIGKILL] * 2 if number == signal.SIGKILL else [143, 0])
        assert both(None, "", 0, [*command, "--output", str(folder), "--ckpt_path", "last"]) == [0, 0]
        assert kills.differences(kills.state(whole), kills.state(folder)) == []


def test_another_number_of_processes_is_a_change_and_begins_the_epoch_anew(broken_off):
    stored = torch.load(broken_off / LAST, weights_only=True)
    now = {**stored[resume.RECORD], "processes": 2}
    with pytest.raises(UsageError, match=r"processes was 1, is 2\. Give .* --accept_changes devices$"):
        resume.check_changes(stored, now, (), broken_off / LAST)
    lines = resume.check_changes(stored, now, ("devices",), broken_off / LAST)
    assert lines == ["processes was 1, is 2", "the epoch begins anew, since it has other batches"]
    progress = stored["loops"]["fit_loop"]["epoch_progress"]
    assert set(progress["current"].values()) == {0}
    del stored[resume.RECORD]
    assert "does not say which settings" in resume.check_changes(stored, now, (), broken_off / LAST)[0]


def test_weights_alone_are_nothing_to_go_on_from(broken_off, killed_root, tmp_path, capsys):
    stored = torch.load(broken_off / LAST, weights_only=True)
    torch.save({key: stored[key] for key in ("state_dict", "detpipe", "global_step")}, tmp_path / "weights.ckpt")
    command = [*kills.command(killed_root), "--output", str(tmp_path / "run")]
    assert cli.main([*command, "--ckpt_path", str(tmp_path / "weights.ckpt")]) == 1
    assert "weights.ckpt has weights alone, nothing to go on from; begin with --init_from" in capsys.readouterr().err
    (tmp_path / "overlay.yaml").write_text("checkpoint: null")
    assert cli.main([*command[:2], str(tmp_path / "overlay.yaml"), *command[2:]]) == 2
    assert "checkpoint: expected keys with values, got " in capsys.readouterr().err

"""Which processes belong together, by what launchers leave in the environment; and one that is lost."""

from __future__ import annotations

from typing import Any

import pytest
from together import start

from detpipe.prediction.batches import WHOLE
from detpipe.prediction.machines import Team, launched, processes_and_machines, team
from detpipe.training.trainer import build_trainer

TORCHRUN = {
    "TORCHELASTIC_RUN_ID": "x", "RANK": "5", "WORLD_SIZE": "6", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "GROUP_RANK": "2",
}  # fmt: skip
SLURM = {
    "SLURM_NTASKS": "6", "SLURM_NNODES": "3", "SLURM_PROCID": "5", "SLURM_LOCALID": "1", "SLURM_STEP_ID": "0",
    "SLURM_JOB_NAME": "x", "SLURM_NODEID": "2", "SLURM_NTASKS_PER_NODE": "2",
}  # fmt: skip


@pytest.mark.parametrize("environment", [TORCHRUN, SLURM], ids=["torchrun", "slurm"])
def test_launchers_say_how_many_there_are(environment, monkeypatch):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    found = launched()
    assert found is not None
    assert (found.global_rank(), found.world_size(), found.local_rank()) == (5, 6, 1)
    assert processes_and_machines() == (2, 3)


def test_who_is_alone(monkeypatch):
    assert launched() is None
    assert processes_and_machines() == (1, 1)
    with team() as own:
        assert (own, own.is_first) == (Team(WHOLE), True)
        own.wait("")
    for name, value in SLURM.items():
        if name != "SLURM_STEP_ID":  # a batch script before srun
            monkeypatch.setenv(name, value)
    assert launched() is None


def test_a_trainer_takes_what_was_launched(monkeypatch):
    given: list[dict[str, Any]] = []
    monkeypatch.setattr("detpipe.training.trainer.Trainer", lambda **settings: given.append(settings))
    monkeypatch.setattr("detpipe.training.trainer._check_processes", lambda *_: None)
    monkeypatch.setattr("detpipe.training.trainer.processes_and_machines", lambda: (2, 3))
    build_trainer({"devices": 1})
    build_trainer({"devices": 4, "num_nodes": 2, "strategy": "ddp_spawn"})
    assert [(one["devices"], one["num_nodes"], one["strategy"]) for one in given] == [
        (2, 3, "ddp"),
        (4, 2, "ddp_spawn"),
    ]


LOST = """
import os, sys
from detpipe.prediction.machines import team
from detpipe.support.errors import TrainingError
os.environ.update(TORCHELASTIC_RUN_ID="x", LOCAL_WORLD_SIZE="3")
with team() as own:
    if own.part.number == 2:
        os._exit(0)
    try:
        own.wait("the rest is kept")
    except TrainingError as error:
        print(error)
        sys.stdout.flush()
        os._exit(0)
"""


@pytest.mark.slow
def test_a_process_that_is_lost_is_named():
    first, _, third = (answer[1] for answer in start(LOST, [], 3))
    assert "rank 1 on " in first
    assert "ended before its images were done, of 3 processes; the rest is kept" in first
    assert "the first one, of rank 0, says which" in third

"""Several processes that share images, on one machine or several: started by torchrun or Slurm, told apart by Lightning.

All of them see the output folder. Each writes files of its own; the first joins them when all are done.
"""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch.distributed as group
from lightning.fabric.plugins.environments.cluster_environment import ClusterEnvironment
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment

from detpipe.prediction.batches import WHOLE, Part
from detpipe.support.errors import TrainingError
from detpipe.support.processes import gather_objects

_PATIENCE = timedelta(days=7)  # a process may have the slow half of the images; one that dies is noticed at once
_LOST = re.compile(r"Ranks? ([0-9, ]+) failed to pass monitoredBarrier")


@dataclass(frozen=True)
class Team:
    """The processes that share the work.

    Args:
        part: the share of this one.
        local_rank: its number among those of its machine, by which it takes a GPU.
        machines: the name of the machine of each process.
    """

    part: Part = WHOLE
    local_rank: int = 0
    machines: tuple[str, ...] = ()

    @property
    def is_first(self) -> bool:
        """Whether it is the one that joins what all have made, and speaks."""
        return self.part.number == 1

    def wait(self, kept: str) -> None:
        """Wait until all processes are here; a TrainingError names those that ended before, and says what is ``kept``."""
        if self.part == WHOLE:
            return
        try:
            group.monitored_barrier(timeout=_PATIENCE, wait_all_ranks=self.is_first)
        except RuntimeError as error:
            found = _LOST.search(str(error))
            if not self.is_first or found is None:
                raise TrainingError("another process has ended; the first one, of rank 0, says which") from error
            lost = [int(rank) for rank in found[1].split(",")]
            named = ", ".join(f"rank {rank} on {self.machines[rank]}" for rank in lost)
            raise TrainingError(
                f"{named}: ended before its images were done, of {self.part.of} processes; {kept}"
            ) from error


@contextmanager
def team() -> Iterator[Team]:
    """Join the processes that torchrun or Slurm started this one with, if any, by messages over CPUs."""
    environment = launched()
    if environment is None:
        yield Team()
        return
    rank, size = environment.global_rank(), environment.world_size()
    os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"] = environment.main_address, str(environment.main_port)
    group.init_process_group("gloo", rank=rank, world_size=size)
    try:
        machines = tuple(gather_objects(socket.gethostname()))
        yield Team(Part(rank + 1, size), environment.local_rank(), machines)
    finally:
        group.destroy_process_group()


def launched() -> ClusterEnvironment | None:
    """What started this process with others, torchrun or Slurm; None where it is alone."""
    if TorchElasticEnvironment.detect():
        environment = TorchElasticEnvironment()
    elif (
        SLURMEnvironment.detect() and "SLURM_STEP_ID" in os.environ
    ):  # a batch script itself is alone, srun starts many
        environment = SLURMEnvironment()
    else:
        return None
    return environment if environment.world_size() > 1 else None


def processes_and_machines() -> tuple[int, int]:
    """How many processes a launcher has started on each machine, and on how many machines; 1 and 1 where none has."""
    environment = launched()
    if environment is None:
        return 1, 1
    size = environment.world_size()
    if isinstance(environment, SLURMEnvironment):
        machines = int(os.environ.get("SLURM_NNODES", 1))
        return size // machines, machines
    here = int(os.environ.get("LOCAL_WORLD_SIZE", size))
    return here, size // here

from __future__ import annotations

import platform
import subprocess
import sys

import pytest
import torch

FAULTS = """
import resource, sys, torch
from detpipe.support.allocator import keep_freed_memory
kept = keep_freed_memory() if sys.argv[1] == "keep" else None
for _ in range(5):
    torch.zeros(2**24).add_(1)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    torch.zeros(2**24).add_(1)
print(kept, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def page_faults(mode: str) -> tuple[str, int]:
    run = subprocess.run([sys.executable, "-c", FAULTS, mode], capture_output=True, text=True, check=True)
    kept, faults = run.stdout.split()
    return kept, int(faults)


@pytest.mark.slow
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the settings are glibc's")
def test_freed_memory_is_used_again_without_asking_the_system():
    kept, few = page_faults("keep")
    _, many = page_faults("default")
    assert kept == "True"
    assert few * 10 < many


def test_memory_of_a_gpu_is_not_said_where_none_is_used():
    from detpipe.support.allocator import peak_gpu_memory

    assert torch.cuda.is_initialized() or peak_gpu_memory() is None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_memory_of_a_gpu():
    from detpipe.support.allocator import peak_gpu_memory

    torch.zeros(2**24, device="cuda")
    peak = peak_gpu_memory()
    assert peak is not None
    assert peak >= 64


def test_nothing_happens_elsewhere(monkeypatch):
    from detpipe.support import allocator

    monkeypatch.setattr(allocator.sys, "platform", "darwin")
    assert allocator.keep_freed_memory() is False

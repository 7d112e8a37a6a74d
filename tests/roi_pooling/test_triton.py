"""Triton kernels: interpreted, which needs no GPU; compiled for a GPU that is not here; and on a GPU if there is one."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from roi_pooling import triton_checks

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def gpu(test: Callable[..., None]) -> Callable[..., None]:
    return pytest.mark.gpu(on_gpu(needs_triton(test)))


def run_as_script(job: str, **environment: str) -> dict[str, str] | list[str]:
    """Run the checks in a process of their own."""
    done = subprocess.run(
        [sys.executable, "-W", "error::UserWarning", triton_checks.__file__, job],
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def failures() -> dict[str, str]:
    return run_as_script("check", TRITON_INTERPRET="1")


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize("name", triton_checks.CHECKS)
def test_in_the_interpreter(name: str, failures: dict[str, str]) -> None:
    assert name not in failures, failures[name]


@needs_triton
@pytest.mark.slow
def test_all_kernels_compile_for_a_gpu_that_is_not_here(tmp_path: Path) -> None:
    made = run_as_script("compile", TRITON_INTERPRET="0", TRITON_CACHE_DIR=str(tmp_path))
    assert set(made) == {"_dot_kernel", "_sum_kernel"}


def test_import_needs_no_triton() -> None:
    code = "import sys; sys.modules['triton'] = None; import detpipe.roi_pooling"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


# on a GPU


@gpu
@pytest.mark.parametrize("name", triton_checks.CHECKS)
def test_on_the_gpu(name: str) -> None:
    getattr(triton_checks, name)("cuda")


@gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_maps_larger_than_32_bits_can_number(dtype: torch.dtype) -> None:
    from detpipe.roi_pooling import roi_align

    height, width, channels = 4100, 2050, 256  # 2 ** 31 numbers and some more
    if torch.cuda.get_device_properties(0).total_memory < 4 * height * width * channels * dtype.itemsize:
        pytest.skip("the map and its gradient do not fit into the GPU's memory")
    features = torch.zeros(1, height, width, channels, dtype=dtype, device="cuda").permute(0, 3, 1, 2).requires_grad_()
    with torch.no_grad():
        features[0, :, -1, -1] = torch.arange(channels, device="cuda").to(dtype)
    box = torch.tensor([[0.0, width - 1, height - 1, width, height]], device="cuda")
    pooled = roi_align(features, box, 1)
    assert torch.equal(pooled[0, :, 0, 0], features[0, :, -1, -1])
    [grad] = torch.autograd.grad(pooled, features, pooled.detach())
    assert torch.equal(grad[0, :, -1, -1], features[0, :, -1, -1])

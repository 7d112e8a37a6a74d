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
    separable = ["_adjoint_kernel", "_pool_kernel", "_strips_kernel", "_weight_grad_kernel"]
    assert set(made) == {*separable, "_dot_kernel", "_sum_kernel"}


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
def test_tables_larger_than_32_bits_can_number(dtype: torch.dtype) -> None:
    from detpipe.roi_pooling.triton_separable import separable, separable_adjoint

    height, width, channels = 4100, 2050, 256  # 2 ** 31 numbers and some more
    if torch.cuda.get_device_properties(0).total_memory < 4 * height * width * channels * dtype.itemsize:
        pytest.skip("the table and its gradient do not fit into the GPU's memory")
    rows = torch.zeros(height * width, channels, dtype=dtype, device="cuda")
    rows[-1] = torch.arange(channels, device="cuda").to(dtype)
    y, x = (torch.full((1, 1, 1), size - 1, dtype=torch.int32, device="cuda") for size in (height, width))
    one, chosen = torch.ones(1, 1, 1, device="cuda"), torch.zeros(1, dtype=torch.int64, device="cuda")
    operands = (chosen, 1, [height, width], y, one, x, one)
    pooled = separable(rows, *operands)
    assert torch.equal(pooled[0, 0, 0], rows[-1])
    assert torch.equal(separable_adjoint(pooled, *operands)[-1], rows[-1])

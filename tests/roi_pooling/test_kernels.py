"""Kernels on raw boxes without a GPU: interpreted, counted, and compiled for GPUs that are not here."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from unittest import mock

import pytest
import runs
import torch
from torch import Tensor

from detpipe.roi_pooling import RoIMaxPool, RotatedRoIAlign, max_ops, mean_ops, pool_points, roi_max_pool
from detpipe.roi_pooling.layouts import unchecked_values
from roi_pooling import kernel_checks
from roi_pooling.kernel_checks import Launches

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
STRIDES = {"p2": 4, "p3": 8, "p4": 16, "p5": 32}


run_as_script = partial(kernel_checks.run_as_script, kernel_checks.__file__)


@pytest.mark.parametrize("name", runs.mostly_slow(kernel_checks.CHECKS, "max"))
def test_some_random_cases_in_the_interpreter(name: str) -> None:
    run_as_script("interpret", name, "0", "5", TRITON_INTERPRET="1")


@pytest.mark.slow
def test_bags_in_the_interpreter() -> None:
    run_as_script("interpret", "bags", "0", "4", TRITON_INTERPRET="1")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("seed", range(4))
def test_bags_on_the_gpu(seed: int) -> None:
    kernel_checks.check_bags(seed, "cuda")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_maps_larger_than_32_bits_can_number(dtype: torch.dtype) -> None:
    height, width, channels = 4100, 2050, 256  # 2 ** 31 numbers and some more
    if torch.cuda.get_device_properties(0).total_memory < 4 * height * width * channels * dtype.itemsize:
        pytest.skip("the map and its gradient do not fit into the GPU's memory")
    leaf = torch.zeros(1, height, width, channels, dtype=dtype, device="cuda")
    leaf[0, -1, -1] = torch.arange(channels, device="cuda").to(dtype)
    leaf = leaf.permute(0, 3, 1, 2).requires_grad_()
    box = torch.tensor([[[width - 1.0, height - 1.0, width - 0.9, height - 0.9]]], device="cuda")
    pooled = roi_max_pool(leaf, box, 1)
    assert torch.equal(pooled[0, 0, :, 0, 0], leaf[0, :, -1, -1])
    pooled.backward(pooled)
    assert torch.equal(leaf.grad[0, :, -1, -1], leaf[0, :, -1, -1])


@pytest.mark.slow
def test_import_needs_no_triton() -> None:
    code = "import sys; sys.modules['triton'] = None; import detpipe.roi_pooling"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "end"), [("max", 20), ("points", 15), ("rotated", 9)])
def test_more_random_cases_in_the_interpreter(name: str, end: int) -> None:
    run_as_script("interpret", name, "5", str(end), TRITON_INTERPRET="1")


@pytest.mark.exhaustive
@pytest.mark.parametrize("begin", [5, 70, 135])
@pytest.mark.parametrize("name", kernel_checks.CHECKS)
def test_two_hundred_random_cases_in_the_interpreter(name: str, begin: int) -> None:
    run_as_script("interpret", name, str(begin), str(begin + 65), TRITON_INTERPRET="1")


@pytest.mark.parametrize(
    "architecture",
    [pytest.param(90, marks=pytest.mark.slow), *(pytest.param(a, marks=pytest.mark.exhaustive) for a in (80, 100))],
)
def test_machine_code(architecture: int, tmp_path: Path) -> None:
    import triton

    if not (Path(triton.__file__).parent / "backends/nvidia/bin/ptxas").exists():
        pytest.skip("this wheel of Triton brings no ptxas")
    made = json.loads(
        run_as_script("compile", str(architecture), TRITON_INTERPRET="0", TRITON_CACHE_DIR=str(tmp_path)).splitlines()[
            -1
        ]
    )
    assert {name for name, _, _ in made} == set(kernel_checks.KERNELS)
    for name, dtype, code in made:
        # the adjoint of maxima on four levels spills a number or two; how many registers it may take does not change that
        assert code["spills"] <= (8 if name == "adjoint_kernel" else 0), (name, dtype, code)
        assert code["div_full"] == 0, (name, dtype, code)
        assert code["registers"] <= kernel_checks.KERNELS[name], (name, dtype, code)
        assert code["wide_loads"] or name not in kernel_checks.WIDE or dtype == "torch.float16", (name, dtype, code)


def count(module, call: Callable[[list[Tensor]], Tensor], maps: list[Tensor]) -> list[Launches]:
    """Forward, and backward to the maps."""
    passes = [Launches(), Launches()]
    with mock.patch.object(module, "kernels_for", return_value="triton"), unchecked_values():
        with passes[0], passes[0].counting():
            pooled = call(maps)
        grad = torch.ones(pooled.shape)
        with passes[1], passes[1].counting():
            torch.autograd.grad(pooled, maps, grad)
    return passes


def make_maps(levels: int) -> tuple[dict[str, int], list[Tensor]]:
    strides = dict(list(STRIDES.items())[:levels])
    maps = [torch.zeros(2, 8, 64 // stride, 96 // stride) for stride in strides.values()]
    return strides, [one.contiguous(memory_format=torch.channels_last).requires_grad_() for one in maps]


def laid_out(padded: Tensor, layout: str) -> Tensor | list[Tensor]:
    rows = torch.cat((torch.arange(2.0).repeat_interleave(2)[:, None], padded.flatten(0, 1)), dim=1)
    return {"rows": rows, "list": list(padded), "padded": padded}[layout]


CORNERS = torch.tensor([[[1.0, 2, 30, 40], [5, 5, 60, 60]]]).expand(2, 2, 4)
TURNED = torch.tensor([[[20.0, 20, 30, 40, 10], [30, 30, 60, 60, -50]]]).expand(2, 2, 5)


@pytest.mark.parametrize("layout", ["rows", "list", "padded"])
@pytest.mark.parametrize("levels", [1, 4])
def test_launches_of_max_pooling(levels: int, layout: str) -> None:
    strides, maps = make_maps(levels)
    boxes = laid_out(CORNERS, layout)

    def pool(maps: list[Tensor]) -> Tensor:
        return RoIMaxPool(3)(dict(zip(strides, maps, strict=True)), boxes, strides)

    forward, backward = count(max_ops, pool, maps)
    assert forward.kernels == ["max_kernel"]
    assert len(forward.operations) <= 2, forward.operations
    assert backward.kernels == ["prepare_kernel", "adjoint_kernel"]
    assert len(backward.operations) <= 2, backward.operations


@pytest.mark.parametrize("layout", ["rows", "list", "padded"])
@pytest.mark.parametrize("levels", [1, 4])
@pytest.mark.parametrize("samples", [0, 2])
def test_launches_of_rotated_boxes(levels: int, layout: str, samples: int) -> None:
    strides, maps = make_maps(levels)
    boxes = laid_out(TURNED, layout)

    def pool(maps: list[Tensor]) -> Tensor:
        return RotatedRoIAlign(3, samples)(dict(zip(strides, maps, strict=True)), boxes, strides)

    forward, backward = count(mean_ops, pool, maps)
    assert forward.kernels == ["pool_kernel"]
    assert len(forward.operations) <= 2, forward.operations
    assert backward.kernels == ["prepare_kernel", "adjoint_kernel"]
    assert len(backward.operations) <= 2, backward.operations


@pytest.mark.parametrize("levels", [1, 4])
def test_launches_of_points(levels: int) -> None:
    strides, maps = make_maps(levels)
    points = torch.rand(2, 2, 3, 3, 4, 2) * 60

    def pool(maps: list[Tensor]) -> Tensor:
        return pool_points(dict(zip(strides, maps, strict=True)), points, CORNERS, strides)

    forward, backward = count(mean_ops, pool, maps)
    assert forward.kernels == ["pool_kernel"]
    assert len(forward.operations) <= 2, forward.operations
    assert backward.kernels == ["prepare_kernel", "adjoint_kernel"]
    assert len(backward.operations) <= 2, backward.operations

"""Kernels of RoIAlign and precise pooling without a GPU: interpreted, counted, and compiled for GPUs that are not here."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from unittest import mock

import pytest
import torch
from torch import Tensor

from detpipe.roi_pooling import FPNLevels, PreciseRoIPool, RoIAlign, mean_ops
from detpipe.roi_pooling.cuda import align, geometry
from detpipe.roi_pooling.layouts import unchecked_values
from detpipe.roi_pooling.scene import Scene
from roi_pooling import box_checks, kernel_checks
from roi_pooling.kernel_checks import Launches

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
STRIDES = {"p2": 4, "p3": 8, "p4": 16, "p5": 32}
POOLERS = [RoIAlign(3), RoIAlign(3, sampling_ratio=0), PreciseRoIPool(3)]


run_as_script = partial(kernel_checks.run_as_script, box_checks.__file__)


@pytest.mark.slow
def test_some_random_cases_in_the_interpreter() -> None:
    run_as_script("interpret", "0", "6", TRITON_INTERPRET="1")


@pytest.mark.slow
def test_more_random_cases_in_the_interpreter() -> None:
    run_as_script("interpret", "6", "26", TRITON_INTERPRET="1")
    run_as_script("interpret", "42", "43", TRITON_INTERPRET="1")  # no boxes, and second derivatives


@pytest.mark.exhaustive
@pytest.mark.parametrize("begin", [26, 70, 115, 160])
def test_two_hundred_random_cases_in_the_interpreter(begin: int) -> None:
    run_as_script("interpret", str(begin), str(begin + 45), TRITON_INTERPRET="1")


@pytest.mark.slow
def test_are_proper_operators_with_derivatives() -> None:
    run_as_script("operators", TRITON_INTERPRET="1")


@pytest.mark.parametrize(
    "architecture",
    [pytest.param(90, marks=pytest.mark.slow), *(pytest.param(a, marks=pytest.mark.exhaustive) for a in (80, 100))],
)
def test_machine_code(architecture: int, tmp_path: Path) -> None:
    import triton

    if not (Path(triton.__file__).parent / "backends/nvidia/bin/ptxas").exists():
        pytest.skip("this wheel of Triton brings no ptxas")
    printed = run_as_script("compile", str(architecture), TRITON_INTERPRET="0", TRITON_CACHE_DIR=str(tmp_path))
    made = json.loads(printed.splitlines()[-1])
    most = {"sample_kernel": 80, "cell_kernel": 80, "prepare_kernel": 80, "adjoint_kernel": 128, "slopes_kernel": 168}
    assert {name for name, _, _ in made} == set(most)
    for name, dtype, code in made:
        assert code["spills"] == code["div_full"] == 0, (name, dtype, code)
        assert code["registers"] <= most[name], (name, dtype, code)
        narrow = name == "prepare_kernel" or (name == "adjoint_kernel" and dtype == "torch.float16")
        assert code["wide_loads"] or narrow, (name, dtype, code)


def boxes_in(layout: str) -> Tensor | list[Tensor]:
    padded = torch.tensor([[[1.0, 2, 30, 40], [5, 5, 160, 160]]]).expand(2, 2, 4)
    rows = torch.cat((torch.arange(2.0).repeat_interleave(2)[:, None], padded.flatten(0, 1)), dim=1)
    return {"rows": rows, "list": list(padded), "padded": padded}[layout]


def passes(call: Callable[[], Tensor], leaves: list[Tensor]) -> tuple[Launches, Launches]:
    """What a forward and a backward pass launch; kernels are not run."""
    forward, backward = Launches(), Launches()
    with mock.patch.object(mean_ops, "kernels_for", return_value="triton"), unchecked_values():
        for record in (forward, backward):
            with record.counting(), record:
                if record is forward:
                    pooled = call()
                else:
                    torch.autograd.grad(pooled, leaves, torch.zeros(1).expand(pooled.shape))
    return forward, backward


@pytest.mark.parametrize("pooler", POOLERS)
@pytest.mark.parametrize("layout", ["rows", "list", "padded"])
@pytest.mark.parametrize("levels", [1, 4])
def test_launches(pooler: RoIAlign | PreciseRoIPool, layout: str, levels: int) -> None:
    strides = dict(list(STRIDES.items())[:levels])
    maps = [torch.zeros(2, 8, 64 // stride, 96 // stride) for stride in strides.values()]
    maps = [one.contiguous(memory_format=torch.channels_last).requires_grad_() for one in maps]
    boxes = boxes_in(layout)
    forward, backward = passes(lambda: pooler(dict(zip(strides, maps, strict=True)), boxes, strides), maps)
    pool = "sample_kernel" if isinstance(pooler, RoIAlign) and pooler.sampling_ratio else "cell_kernel"
    assert forward.kernels == [pool]
    assert len(forward.operations) <= (1 if layout == "list" else 0), forward.operations
    assert backward.kernels == ["prepare_kernel", "adjoint_kernel"]
    assert len(backward.operations) <= 2, backward.operations


def test_launches_with_a_gradient_to_the_boxes() -> None:
    maps = torch.zeros(2, 8, 16, 24).contiguous(memory_format=torch.channels_last).requires_grad_()
    boxes = boxes_in("padded").clone().requires_grad_()
    forward, backward = passes(lambda: RoIAlign(3)({"p2": maps}, boxes, {"p2": 4}), [maps, boxes])
    assert forward.kernels == ["sample_kernel"]
    assert sorted(backward.kernels) == ["adjoint_kernel", "prepare_kernel", "slopes_kernel"]
    assert len(backward.operations) <= 2, backward.operations


def test_other_layouts_of_memory_cost_one_copy_a_level() -> None:
    maps = [torch.zeros(2, 8, 64 // stride, 96 // stride) for stride in STRIDES.values()]
    features = dict(zip(STRIDES, maps, strict=True))
    boxes = boxes_in("rows").requires_grad_()
    forward, _ = passes(lambda: RoIAlign(3)(features, boxes, STRIDES), [boxes])
    assert forward.kernels == ["sample_kernel"]
    assert len(forward.operations) == len(maps), forward.operations


def test_nothing_else_runs_around_the_kernels() -> None:
    maps, record = [torch.zeros(2, 4, 6, 8)], Launches()
    scene = Scene(torch.zeros(5, 5), None, (), (0.25,), (), 2, (4, 6), 3, 3, 2)
    grad = torch.zeros(5, 3, 3, 8)
    with record.counting(), record:
        align.pool(maps, scene)
        align.adjoint(grad, scene)
        align.slopes(grad, maps, scene)
    assert set(record.operations) <= {"aten.promote_types.default"}  # of types, on the host
    assert len(record.kernels) == 4


def test_memory_beside_the_result_is_36_bytes_a_box() -> None:
    scene = Scene(torch.zeros(1000, 5), None, (), (0.25,), (), 2, (16, 24), 7, 7, 2)
    with mock.patch.object(geometry, "launch"):
        tables = geometry.prepare(align.prepare_kernel, scene, geometry.make_task(scene, torch.float32), 4)
    assert sum(table.numel() * table.element_size() for table in tables) == 36 * 1000


def test_scales_are_exact_in_three_parts() -> None:
    for value in (1 / 3, 1 / 16, 0.1, 12543.123456789, 3e-5):
        high, middle, low = geometry.exact_parts((value,))
        assert high + (middle + low) == value
        assert torch.tensor([high, middle, low]).double().tolist() == [high, middle, low]


@pytest.mark.parametrize("rounding", ["floor", "nearest"])
@pytest.mark.parametrize("strides", [[4, 8, 16, 32], [4, 32], [8], [2, 4, 8, 16, 32, 64]])
def test_areas_tell_the_level(strides: list[int], rounding: str) -> None:
    levels = FPNLevels(rounding=rounding)
    sides = torch.rand(300, 2).square() * 1500 + 1
    boxes = torch.cat((torch.zeros(300, 2), sides), dim=1)
    reached = sum((sides.prod(1) >= area).long() for area in levels.areas(strides)) + torch.zeros(300).long()
    assert torch.equal(levels(boxes, strides), reached)
    reverse = len(strides) - 1 - levels(boxes, strides[::-1])
    assert torch.equal(reverse, reached)

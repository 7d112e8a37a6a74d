"""Suppression against its definition, on the CPU, by the kernels of a GPU in Triton's interpreter, and on a GPU if there is one."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from samples import random_boxes
from torch import Tensor
from torchvision.ops import nms

from detpipe.boxes import iou
from detpipe.nms import _by_overlaps, keep_best

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
DTYPES = (torch.float32, torch.float64)
KERNELS = Path(__file__).parent / "kernel_checks.py"


def definition(boxes: Tensor, most: float, groups: Tensor | None) -> Tensor:
    """Box by box."""
    kept = torch.zeros(boxes.shape[:2], dtype=torch.bool)
    for row, own in enumerate(boxes):
        overlaps = iou(own, own)
        for index, (x1, y1, x2, y2) in enumerate(own.tolist()):
            rivals = kept[row].clone()
            if groups is not None:
                rivals &= groups[row] == groups[row, index]
            kept[row, index] = x2 > x1 and y2 > y1 and not (overlaps[index][rivals] > most).any()
    return kept


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("count", [0, 1, 33, 90])
def test_equals_the_definition(dtype: torch.dtype, grouped: bool, count: int) -> None:
    boxes = torch.stack([random_boxes(count), random_boxes(count)]).to(dtype)
    boxes[:, ::7] = 0
    groups = torch.randint(0, 3, (2, count)) if grouped else None
    assert torch.equal(keep_best(boxes, 0.3, groups), definition(boxes, 0.3, groups))


def test_equals_torchvision() -> None:
    boxes, scores = random_boxes(200), torch.rand(200).sort(descending=True).values
    [kept] = keep_best(boxes[None], 0.4)
    assert torch.equal(kept.nonzero()[:, 0], nms(boxes, scores, 0.4))


def test_a_row_does_not_depend_on_its_neighbors() -> None:
    near = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 5.001], [0, 0, 10, 4.999]])  # IoU: just above, below .5
    found = keep_best(torch.stack([near, near + 99_000]).double(), 0.5, torch.ones(2, 3, dtype=torch.int64))
    assert found[0].tolist() == [True, False, True]


@pytest.mark.slow
@pytest.mark.parametrize("grouped", [False, True])
def test_pytorchs_own_operators_keep_the_same(grouped: bool) -> None:
    boxes = torch.stack([random_boxes(200), random_boxes(200)])
    boxes[:, 3::7] = 0
    groups = torch.randint(0, 3, (2, 200)) if grouped else None
    assert torch.equal(_by_overlaps(boxes, groups, 0.3), keep_best(boxes, 0.3, groups))


def run_kernels(job: str, **environment: str) -> list[str]:
    done = subprocess.run(
        [sys.executable, KERNELS, job], env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@needs_triton
@pytest.mark.slow
def test_the_kernels_in_the_interpreter() -> None:
    assert run_kernels("check", TRITON_INTERPRET="1") == []


@needs_triton
@pytest.mark.slow
def test_the_kernels_compile_for_a_gpu_that_is_not_here(tmp_path: Path) -> None:
    made = run_kernels("compile", TRITON_INTERPRET="0", TRITON_CACHE_DIR=str(tmp_path))
    assert made == ["_overlap_kernel", "_sweep_kernel"]


@needs_triton
@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("count", [1, 33, 2000])
def test_on_a_gpu(count: int, dtype: torch.dtype, grouped: bool) -> None:
    boxes = torch.stack([random_boxes(count), random_boxes(count)]).to(dtype)
    groups = torch.randint(0, 3, (2, count)) if grouped else None
    device_groups = groups.cuda() if groups is not None else None
    assert torch.equal(keep_best(boxes.cuda(), 0.6, device_groups).cpu(), keep_best(boxes, 0.6, groups))

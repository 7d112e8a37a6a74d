"""Triton kernels against their formulas, on any device, and their compilation for a GPU that is not here.

Whether kernels are interpreted is settled when Triton is imported, so this file is also a script, for a process of its own:
``check`` prints which checks fail, ``compile`` which kernels are compiled. :mod:`test_triton` runs it.
"""

from __future__ import annotations

import json
import random
import sys
import traceback
from collections.abc import Callable

import torch
from torch import Tensor

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}
# images, sizes of levels, boxes, h, w, channels
CASES = (
    ((1, (4, 6), 2, 2, 3, 17), torch.float32),
    ((2, (3, 6, 2, 2), 4, 3, 2, 3), torch.float32),  # two levels
    ((2, (3, 5, 3, 5, 1, 1), 5, 1, 1, 40), torch.float64),  # two levels of one size, and a level of single cells
    ((1, (2, 5), 2, 2, 1, 8), torch.float16),
    ((1, (3, 2), 2, 1, 2, 5), torch.bfloat16),
)


# the formulas


def taps(boxes: int, bins: int, extents: Tensor, most: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Up to ``most`` ascending cells a bin, with gaps; some bins have none."""
    cell = torch.full((boxes, bins, most), -1, dtype=torch.int32)
    weight = torch.zeros(boxes, bins, most, dtype=dtype)
    for r in range(boxes):
        for b in range(bins):
            count = random.randint(0, min(most, int(extents[r])))
            cell[r, b, :count] = torch.tensor(sorted(random.sample(range(int(extents[r])), count)), dtype=torch.int32)
            weight[r, b, :count] = torch.rand(count, dtype=dtype) + 0.1
            if count > 1:
                weight[r, b, 0] = 0.0  # a cell that exists and counts nothing
    return cell, weight


def maps_of(images: int, sizes: tuple[int, ...], chosen: Tensor) -> list[tuple[int, int, int]]:
    """First row, height and width of the map of each box."""
    found, first = [], 0
    for height, width in zip(sizes[::2], sizes[1::2], strict=True):
        found += [(first + image * height * width, height, width) for image in range(images)]
        first += images * height * width
    return [found[m] for m in chosen.tolist()]


def matrix(maps, cells: int, y_cell: Tensor, y_weight: Tensor, x_cell: Tensor, x_weight: Tensor) -> Tensor:
    """``[R * h * w, T]``: what pooling multiplies the cells with, tap by tap."""
    (boxes, h, _), w = y_cell.shape, x_cell.shape[1]
    dense = torch.zeros(boxes, h, w, cells, dtype=torch.float64)
    for r, (first, _, width) in enumerate(maps):
        for i, ky in torch.nonzero(y_cell[r] >= 0).tolist():
            for j, kx in torch.nonzero(x_cell[r] >= 0).tolist():
                weight = float(y_weight[r, i, ky]) * float(x_weight[r, j, kx])
                dense[r, i, j, first + int(y_cell[r, i, ky]) * width + int(x_cell[r, j, kx])] += weight
    return dense.view(-1, cells)


class Case:
    """Random operands of one size and type."""

    def __init__(self, case: tuple, dtype: torch.dtype = torch.float32, y_most: int = 3, x_most: int = 5) -> None:
        torch.manual_seed(0)
        random.seed(0)
        self.images, self.sizes, boxes, self.h, self.w, channels = case
        self.cells = self.images * sum(a * b for a, b in zip(self.sizes[::2], self.sizes[1::2], strict=True))
        self.chosen = torch.randint(self.images * len(self.sizes) // 2, (boxes,))
        self.maps = maps_of(self.images, self.sizes, self.chosen)
        self.rows = torch.randn(self.cells, channels).to(dtype)
        self.grad = torch.randn(boxes, self.h, self.w, channels).to(dtype)
        exact = torch.promote_types(dtype, torch.float32)
        heights, widths = (torch.tensor([place[axis] for place in self.maps], dtype=torch.int64) for axis in (1, 2))
        self.y_cell, self.y_weight = taps(boxes, self.h, heights, y_most, exact)
        self.x_cell, self.x_weight = taps(boxes, self.w, widths, x_most, exact)

    @property
    def where(self) -> tuple:
        return self.chosen, self.images, list(self.sizes)

    @property
    def taps(self) -> tuple[Tensor, ...]:
        return self.y_cell, self.y_weight, self.x_cell, self.x_weight

    def to(self, device: str) -> Case:
        for name, value in list(vars(self).items()):
            if isinstance(value, Tensor):
                setattr(self, name, value.to(device))
        return self


def same(result: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    assert result.dtype == dtype
    torch.testing.assert_close(result.cpu().double(), expected.double(), atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


def twice(call: Callable[[], Tensor]) -> Tensor:
    """A result that is the same to the last bit a second time."""
    first = call()
    assert torch.equal(first, call())
    return first


# checks of the kernels, run wherever the kernels run


def check_separable(device: str = "cpu") -> None:
    from detpipe.roi_pooling.triton_separable import separable

    for case, dtype in CASES:
        given = Case(case, dtype)
        expected = (matrix(given.maps, given.cells, *given.taps) @ given.rows.double()).view(given.grad.shape)
        given.to(device)
        same(twice(lambda: separable(given.rows, *given.where, *given.taps)), expected, dtype)  # noqa: B023


def check_separable_many_taps(device: str = "cpu") -> None:
    """More cells a bin than are read at once, and several bins a program."""
    from detpipe.roi_pooling import triton_separable

    given = Case((1, (12, 21), 2, 2, 5, 4), y_most=13, x_most=22)
    dense = matrix(given.maps, given.cells, *given.taps)
    expected = (dense @ given.rows.double()).view(given.grad.shape)
    adjoint = dense.T @ given.grad.double().flatten(0, 2)
    given.to(device)
    same(triton_separable.separable(given.rows, *given.where, *given.taps), expected, torch.float32)
    same(triton_separable.separable_adjoint(given.grad, *given.where, *given.taps), adjoint, torch.float32)
    programs, triton_separable.PROGRAMS = triton_separable.PROGRAMS, 10
    try:
        same(triton_separable.separable(given.rows, *given.where, *given.taps), expected, torch.float32)
    finally:
        triton_separable.PROGRAMS = programs


def check_separable_adjoint(device: str = "cpu") -> None:
    from detpipe.roi_pooling.triton_separable import separable_adjoint

    for case, dtype in CASES:
        given = Case(case, dtype)
        expected = matrix(given.maps, given.cells, *given.taps).T @ given.grad.double().flatten(0, 2)
        given.to(device)
        same(twice(lambda: separable_adjoint(given.grad, *given.where, *given.taps)), expected, dtype)  # noqa: B023


def check_separable_adjoint_of_many_boxes(device: str = "cpu") -> None:
    """More boxes than are looked at once, in any order of maps; more bins of a tile than are read at once."""
    from detpipe.roi_pooling.triton_separable import separable_adjoint

    given = Case((2, (2, 2), 140, 2, 1, 2), y_most=1, x_most=2)
    expected = matrix(given.maps, given.cells, *given.taps).T @ given.grad.double().flatten(0, 2)
    given.to(device)
    same(twice(lambda: separable_adjoint(given.grad, *given.where, *given.taps)), expected, torch.float32)


def check_separable_weight_grad(device: str = "cpu") -> None:
    from detpipe.roi_pooling.triton_separable import separable_weight_grad

    for case, dtype in CASES:
        given = Case(case, dtype)
        rows, grad = given.rows.double(), given.grad.double()
        exact = given.y_weight.dtype
        y, x = (weight.double().requires_grad_() for weight in (given.y_weight, given.x_weight))
        total = torch.zeros((), dtype=torch.float64)
        for r, (first, _, width) in enumerate(given.maps):
            for i, ky in torch.nonzero(given.y_cell[r] >= 0).tolist():
                for j, kx in torch.nonzero(given.x_cell[r] >= 0).tolist():
                    row = rows[first + int(given.y_cell[r, i, ky]) * width + int(given.x_cell[r, j, kx])]
                    total = total + y[r, i, ky] * x[r, j, kx] * (grad[r, i, j] @ row)
        expected = torch.autograd.grad(total, (y, x))
        given.to(device)
        cells = (given.y_cell, given.x_cell)
        for axis, other in ((0, given.x_weight), (1, given.y_weight)):
            result = twice(
                lambda: separable_weight_grad(given.grad, given.rows, *given.where, *cells, other, axis)  # noqa: B023
            )
            same(result, expected[axis], exact)


def check_no_boxes_and_far_boxes(device: str = "cpu") -> None:
    from detpipe.roi_pooling import triton_separable

    given = Case((2, (3, 4), 0, 2, 3, 5)).to(device)
    assert triton_separable.separable(given.rows, *given.where, *given.taps).shape == (0, 2, 3, 5)
    assert not triton_separable.separable_adjoint(given.grad, *given.where, *given.taps).any()
    cells = (given.y_cell, given.x_cell)
    grads = triton_separable.separable_weight_grad(given.grad, given.rows, *given.where, *cells, given.x_weight, 0)
    assert grads.shape == given.y_weight.shape

    given = Case((1, (3, 4), 2, 2, 3, 5)).to(device)  # off the map: bins without cells
    given.y_cell.fill_(-1)
    given.y_weight.zero_()
    assert not triton_separable.separable(given.rows, *given.where, *given.taps).any()
    assert not triton_separable.separable_adjoint(given.grad, *given.where, *given.taps).any()
    for axis, other in ((0, given.x_weight), (1, given.y_weight)):
        cells = (given.y_cell, given.x_cell)
        grads = triton_separable.separable_weight_grad(given.grad, given.rows, *given.where, *cells, other, axis)
        assert not grads.any()


def check_bags(device: str = "cpu") -> None:
    from detpipe.roi_pooling.triton_bags import bag_dot, bag_sum

    for channels, dtype in ((3, torch.float32), (17, torch.float64), (40, torch.float16), (17, torch.bfloat16)):
        torch.manual_seed(0)
        sizes = torch.tensor([0, 1, 35, 0, 16, 3, 0])  # of bags
        offsets = torch.cat((torch.zeros(1, dtype=torch.int64), sizes.cumsum(0)))
        index = torch.randint(11, (int(offsets[-1]),))
        weight = torch.rand(len(index), dtype=torch.promote_types(dtype, torch.float32))
        rows, grad = torch.randn(11, channels).to(dtype), torch.randn(len(sizes), channels).to(dtype)
        bag = torch.arange(len(sizes)).repeat_interleave(sizes)
        products = weight.double()[:, None] * rows.double()[index]
        total = torch.zeros(len(sizes), channels, dtype=torch.float64).index_add(0, bag, products)
        dots = (rows.double()[index] * grad.double()[bag]).sum(1)
        rows, index, weight, offsets, grad = (value.to(device) for value in (rows, index, weight, offsets, grad))
        same(twice(lambda: bag_sum(rows, index, weight, offsets)), total, dtype)  # noqa: B023
        same(twice(lambda: bag_dot(grad, rows, index, offsets)), dots, weight.dtype)  # noqa: B023
    assert not bag_sum(rows, index[:0], weight[:0], torch.zeros_like(offsets)).any()
    assert bag_sum(rows, index[:0], weight[:0], offsets[:1]).shape == (0, channels)
    assert bag_dot(grad, rows, index[:0], torch.zeros_like(offsets)).shape == (0,)


def check_operands_need_not_be_contiguous(device: str = "cpu") -> None:
    from detpipe.roi_pooling import triton_bags, triton_separable

    given = Case(CASES[0][0]).to(device)
    expected = triton_separable.separable(given.rows, *given.where, *given.taps)
    adjoint = triton_separable.separable_adjoint(given.grad, *given.where, *given.taps)
    given.rows, given.grad = given.rows.T.contiguous().T, given.grad.transpose(0, 3).contiguous().transpose(0, 3)
    given.y_cell = given.y_cell.transpose(0, 1).contiguous().transpose(0, 1)
    given.x_weight = given.x_weight.transpose(0, 1).contiguous().transpose(0, 1)
    assert torch.equal(triton_separable.separable(given.rows, *given.where, *given.taps), expected)
    assert torch.equal(triton_separable.separable_adjoint(given.grad, *given.where, *given.taps), adjoint)
    entries = (torch.tensor([1, 0, 2], device=device), torch.ones(3, device=device))
    offsets = torch.tensor([0, 3], device=device)
    same(triton_bags.bag_sum(given.rows, *entries, offsets), given.rows[:3].sum(0, True).cpu(), torch.float32)


CHECKS = sorted(name for name in globals() if name.startswith("check_"))


def report() -> dict[str, str]:
    """The traceback of each check that fails."""
    failed = {}
    for name in CHECKS:
        try:
            globals()[name]()
        except Exception:
            failed[name] = traceback.format_exc()
    return failed


# compilation for a GPU that is not there: its code is made, and not run


def compile_for_hopper() -> list[str]:
    """Launch each kernel with typical operands on a made-up device -> those whose machine code could be made."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    class Hopper:
        """A driver of a device that only names itself."""

        def get_current_target(self) -> GPUTarget:
            return GPUTarget("cuda", 90, 32)

        def get_current_device(self) -> int:
            return 0

        def get_current_stream(self, device: int) -> int:
            return 0

    made, run = [], JITFunction.run

    def compile_only(self, *args, grid, warmup, **options):
        kernel = run(self, *args, grid=grid, warmup=True, **options)
        assert kernel.asm["cubin"]
        made.append(self.__name__)
        return kernel

    driver.set_active(Hopper())
    JITFunction.run = compile_only
    from detpipe.roi_pooling import triton_bags, triton_separable

    given = Case((2, (6, 8), 4, 7, 7, 256), torch.float32, 4, 4)
    triton_separable.separable(given.rows, *given.where, *given.taps)
    triton_separable.separable_adjoint(given.grad, *given.where, *given.taps)
    cells = (given.y_cell, given.x_cell)
    triton_separable.separable_weight_grad(given.grad, given.rows, *given.where, *cells, given.x_weight, 0)
    index, offsets = torch.zeros(8, dtype=torch.int64), torch.zeros(5, dtype=torch.int64)
    triton_bags.bag_sum(given.rows, index, given.x_weight.flatten()[:8], offsets)
    triton_bags.bag_dot(given.rows[:4], given.rows, index, offsets)
    return sorted(set(made))


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps({"check": report, "compile": compile_for_hopper}[sys.argv[1]]()))

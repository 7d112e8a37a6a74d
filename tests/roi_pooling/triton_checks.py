"""Triton kernels against their formulas, on any device, and their compilation for a GPU that is not here.

Whether kernels are interpreted is settled when Triton is imported, so this file is also a script, for a process of its own:
``check`` prints which checks fail, ``compile`` which kernels are compiled. :mod:`test_triton` runs it.
"""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Callable

import torch
from torch import Tensor

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}


def same(result: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    assert result.dtype == dtype
    torch.testing.assert_close(result.cpu().double(), expected.double(), atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


def twice(call: Callable[[], Tensor]) -> Tensor:
    """A result that is the same to the last bit a second time."""
    first = call()
    assert torch.equal(first, call())
    return first


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
    from detpipe.roi_pooling.triton_bags import bag_sum

    rows = torch.randn(5, 17, device=device).T.contiguous().T
    entries = (torch.tensor([1, 0, 2], device=device), torch.ones(3, device=device))
    offsets = torch.tensor([0, 3], device=device)
    same(bag_sum(rows, *entries, offsets), rows[:3].sum(0, True).cpu(), torch.float32)


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
    from detpipe.roi_pooling import triton_bags

    rows, weight = torch.zeros(96, 256), torch.zeros(8)
    index, offsets = torch.zeros(8, dtype=torch.int64), torch.zeros(5, dtype=torch.int64)
    triton_bags.bag_sum(rows, index, weight, offsets)
    triton_bags.bag_dot(rows[:4], rows, index, offsets)
    return sorted(set(made))


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps({"check": report, "compile": compile_for_hopper}[sys.argv[1]]()))

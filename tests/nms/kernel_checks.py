"""The kernels of suppression without a GPU: whether Triton interprets is settled at its import, so this is a script.

``check`` prints which cases differ from the CPU, ``compile`` which kernels could be compiled for a GPU.
"""

from __future__ import annotations

import json
import sys

import torch

from detpipe.nms import keep_best

CASES = ((1, 1), (2, 31), (2, 32), (3, 33), (2, 150))  # rows, boxes


def check() -> list[str]:
    """Cases that differ."""
    from detpipe.nms import kernels

    torch.manual_seed(0)
    failed = []
    for rows, count in CASES:
        corner = torch.rand(rows, count, 2) * 60
        boxes = torch.cat((corner, corner + torch.rand(rows, count, 2) * 30), dim=-1)
        boxes[:, 3::7] = 0
        for dtype in (torch.float32, torch.float64):
            for groups in (None, torch.randint(0, 3, (rows, count))):
                operands = (boxes.to(dtype), 0.3, groups)
                if not torch.equal(kernels.keep_best(operands[0], groups, 0.3), keep_best(*operands)):
                    failed.append(f"{rows} x {count}, {dtype}, groups {groups is not None}")
    return failed


def compile_for_hopper() -> list[str]:
    """Kernels whose machine code could be made."""
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
    from detpipe.nms import kernels

    for dtype in (torch.float32, torch.float64):
        for groups in (None, torch.zeros(2, 70, dtype=torch.int64)):
            kernels.keep_best(torch.zeros(2, 70, 4, dtype=dtype), groups, 0.5)
    return sorted(set(made))


if __name__ == "__main__":
    print(json.dumps({"check": check, "compile": compile_for_hopper}[sys.argv[1]]()))

"""Kernels on raw boxes without a GPU: interpreted, counted, and compiled for GPUs that are not here.

Whether kernels are interpreted is settled when Triton is imported, so this file is also a script, for a process of its own:
``interpret OPERATOR BEGIN END`` compares random cases with torchvision or the CPU's path, ``compile ARCHITECTURE`` prints what
is in the machine code of each kernel. :mod:`test_kernels` runs it.
"""

from __future__ import annotations

import json
import math
import os
import random
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision import ops as torchvision_ops

from detpipe.roi_pooling import FPNLevels, max_ops, mean_ops, pool_points, rotated
from detpipe.roi_pooling.layouts import ROTATED_SIDES, read_layout, unchecked_values
from detpipe.roi_pooling.scene import EQUAL_STEP, FAST_RCNN, Choice, Scene, make_scene

SMALL = {
    "TAPS": 2,
    "ROWS": 2,
    "COLUMNS": 2,
    "BOXES": 2,
    "BINS": 2,
}  # of programs, so that loops go round in small cases


# random cases


class Case:
    """Maps of some levels, and boxes in one of three layouts."""

    def __init__(self, seed: int) -> None:
        draw = random.Random(seed)
        torch.manual_seed(seed)
        self.images, levels, channels = draw.randint(1, 2), 1 + seed % 5, draw.choice([1, 3, 5])
        sizes = [(draw.randint(1, 6), draw.randint(1, 7)) for _ in range(levels)]
        self.maps = [(torch.randn(self.images, channels, *size) * 2).round() for size in sizes]  # many equal cells
        if draw.random() < 0.2:
            self.maps[0].view(-1)[0] = math.nan
        if draw.random() < 0.5:
            self.maps = [one.contiguous(memory_format=torch.channels_last) for one in self.maps]
        self.scales = [draw.choice([1.0, 0.5, 0.25, 1 / 3]) for _ in range(levels)]
        self.size = draw.choice([(1, 1), (2, 1), (2, 3)])
        counts = [draw.randint(0, 3) for _ in range(self.images)]
        self.layout = ("rows", "list", "padded")[seed // 5 % 3]
        if self.layout == "padded":
            counts = counts[:1] * self.images
        self.image = torch.arange(self.images).repeat_interleave(torch.tensor(counts))
        self.corners = self.draw_boxes(draw, sum(counts))
        self.level = torch.randint(levels, (sum(counts),)) if levels > 1 else None
        rows = torch.cat((self.image[:, None].float(), self.corners), dim=1)
        parts = list(self.corners.split(counts))
        if self.layout == "padded":
            self.boxes = torch.stack(parts)
        else:
            self.boxes = rows if self.layout == "rows" else parts

    def draw_boxes(self, draw: random.Random, count: int) -> Tensor:
        """Inside, over the border, off the map, of whole cells, without area, and not a number."""
        center, half = torch.rand(count, 2) * 14 - 2, torch.exp(torch.randn(count, 2) * 1.5)
        boxes = torch.cat((center - half, center + half), dim=1)
        for box in boxes:
            kind = draw.random()
            if kind < 0.3:
                box.copy_(box.round())
            elif kind < 0.4:
                box[2:] = box[:2]
            elif kind < 0.5:
                box += 1e3
            elif kind < 0.55:
                box[draw.randrange(4)] = math.nan
        return boxes


@contextmanager
def poisoned() -> Iterator[None]:
    """New tensors hold numbers that no operator gives."""
    new_empty = Tensor.new_empty

    def poison(self, *args, **options):
        made = new_empty(self, *args, **options)
        return made.fill_(-1234567 if made.dtype in (torch.float32, torch.float64, torch.int32) else -1234)

    with mock.patch.object(Tensor, "new_empty", poison):
        yield


@contextmanager
def reversed_programs() -> Iterator[None]:
    """Programs run in the opposite order."""
    from triton.runtime.interpreter import InterpreterBuilder

    forth = InterpreterBuilder.set_grid_idx

    def back(self, *index):
        return forth(self, *(extent - 1 - own for own, extent in zip(index, self.grid_dim, strict=True)))

    with mock.patch.object(InterpreterBuilder, "set_grid_idx", back):
        yield


def on_cpu_path(call: Callable[[], list[Tensor]], module) -> list[Tensor]:
    with mock.patch.object(module, "kernels_for", return_value="torch"):
        return call()


def same_bits(some: list[Tensor], others: list[Tensor]) -> None:
    for one, other in zip(some, others, strict=True):
        assert torch.equal(one.nan_to_num(99), other.nan_to_num(99))


# max pooling


def max_pool(case: Case, equal_step: bool) -> list[Tensor]:
    """Values, the gradient to each map, and the gradient to that gradient."""
    leaves = [one.clone().requires_grad_() for one in case.maps]
    given = read_layout(case.boxes, leaves[0])
    choice = Choice(case.scales, case.level)
    scene = make_scene(leaves, given, choice, case.size, samples=EQUAL_STEP if equal_step else FAST_RCNN)
    pooled = max_ops.max_pool(leaves, scene)
    torch.manual_seed(1)
    sent = torch.randn(pooled.shape).requires_grad_()
    grads = torch.autograd.grad(pooled, leaves, sent, create_graph=True)
    back = torch.autograd.grad(sum(grad.square().sum() for grad in grads), sent)
    return [pooled.detach(), *(grad.detach() for grad in grads), *back]


def torchvision_max(case: Case) -> list[Tensor]:
    """The same of finite boxes and maps, from torchvision, level by level."""
    leaves = [one.clone().requires_grad_() for one in case.maps]
    rows = torch.cat((case.image[:, None].float(), case.corners), dim=1)
    pooled = torch.zeros(len(rows), case.maps[0].shape[1], *case.size)
    for index, (leaf, scale) in enumerate(zip(leaves, case.scales, strict=True)):
        own = torch.ones(len(rows), dtype=torch.bool) if case.level is None else case.level == index
        pooled = pooled.index_put((own.nonzero()[:, 0],), torchvision_ops.roi_pool(leaf, rows[own], case.size, scale))
    torch.manual_seed(1)
    return [pooled.detach(), *torch.autograd.grad(pooled, leaves, torch.randn(pooled.shape))]


def check_max(seed: int) -> None:
    from detpipe.roi_pooling.cuda import maximum

    case = Case(seed)
    with mock.patch.multiple(maximum, **SMALL), poisoned():
        found = max_pool(case, equal_step=False)
        if seed % 4 == 0:
            with reversed_programs():
                same_bits(found, max_pool(case, equal_step=False))
        if seed % 4 == 1:
            other = max_pool(case, equal_step=True)
    expected = on_cpu_path(lambda: max_pool(case, equal_step=False), max_ops)
    for one, want in zip(found, expected, strict=True):
        torch.testing.assert_close(one, want, rtol=1e-5, atol=1e-5, equal_nan=True)
    if case.corners.isfinite().all() and case.maps[0].isfinite().all() and len(case.image):
        for one, want in zip(found, torchvision_max(case), strict=False):
            torch.testing.assert_close(one, want, rtol=1e-5, atol=1e-5)
    if seed % 4 == 1:
        expected = on_cpu_path(lambda: max_pool(case, equal_step=True), max_ops)
        for one, want in zip(other, expected, strict=True):
            torch.testing.assert_close(one, want, rtol=1e-5, atol=1e-5, equal_nan=True)


# points and rotated boxes


def turned_case(seed: int, fixed: int) -> Case:
    """Rotated boxes of the corners of a case, some of them unturned."""
    case = Case(seed)
    torch.manual_seed(seed + 1)
    low, high = case.corners[:, :2], case.corners[:, 2:]
    angle = torch.randn(len(low), 1) * 200 * (torch.rand(len(low), 1) < 0.7)
    turned = torch.cat(((low + high) / 2, high - low, angle), dim=1)
    sizes = [len(part) for part in case.boxes] if case.layout == "list" else None
    if case.layout == "padded":
        case.boxes = turned.view(*case.boxes.shape[:2], 5)
    else:
        case.boxes = (
            torch.cat((case.image[:, None].float(), turned), dim=1) if sizes is None else list(turned.split(sizes))
        )
    case.maps = [torch.randn_like(one).nan_to_num() for one in case.maps]
    return case


def turned(case: Case, samples: int) -> list[Tensor]:
    """Values, and the gradients to the maps and to the boxes."""
    leaves = [one.clone().requires_grad_() for one in case.maps]
    listed = case.boxes if isinstance(case.boxes, list) else [case.boxes]
    boxes = [one.clone().requires_grad_() for one in listed]
    given = read_layout(boxes if isinstance(case.boxes, list) else boxes[0], leaves[0], ROTATED_SIDES)
    choice = Choice(case.scales, case.level)
    scene = make_scene(leaves, given, choice, case.size, samples=samples, rotated=True)
    pooled = mean_ops.pool(rotated.compose, leaves, scene)
    torch.manual_seed(1)
    return [pooled.detach(), *torch.autograd.grad(pooled, [*leaves, *boxes], torch.randn(pooled.shape))]


def check_rotated(seed: int) -> None:
    from detpipe.roi_pooling.cuda import points

    samples = seed // 2 % 3
    case = turned_case(seed, samples)
    with mock.patch.multiple(points, ROWS=2, COLUMNS=2, BOXES=2, LANES=4), poisoned():
        found = turned(case, samples)
        if seed % 4 == 0:
            with reversed_programs():
                same_bits(found, turned(case, samples))
    expected = on_cpu_path(lambda: turned(case, samples), mean_ops)
    for one, want in zip(found, expected, strict=True):  # a box that is not a number has a gradient of 0 from kernels
        torch.testing.assert_close(one, want.nan_to_num(0), rtol=1e-4, atol=1e-5)


def free_points(case: Case, points: Tensor, boxes: Tensor) -> list[Tensor]:
    """Values, the gradients to the maps and to the points, and the gradients of these to maps and points."""
    names = [f"p{index}" for index in range(len(case.maps))]
    strides = {name: 2**index for index, name in enumerate(names)}
    leaves, points = [one.clone().requires_grad_() for one in case.maps], points.clone().requires_grad_()
    pooled = pool_points(dict(zip(names, leaves, strict=True)), points, boxes, strides, FPNLevels(8.0, 4))
    torch.manual_seed(1)
    sent = torch.randn(pooled.shape)
    first = torch.autograd.grad(pooled, [*leaves, points], sent, retain_graph=True)
    again = torch.autograd.grad(pooled, points, sent, create_graph=True)[0]
    second = torch.autograd.grad(again.square().sum(), [*leaves, points], allow_unused=True, materialize_grads=True)
    return [pooled.detach(), *first, *second]


def check_points(seed: int) -> None:
    from detpipe.roi_pooling.cuda import points as kernels

    case = Case(seed)
    case.maps = [torch.randn_like(one) for one in case.maps]
    torch.manual_seed(seed)
    boxes = torch.rand(case.images, seed % 3, 4) * 6
    boxes[..., 2:] += boxes[..., :2] + 30 * torch.rand(case.images, seed % 3, 2) ** 4
    points = torch.randn(case.images, seed % 3, *case.size, 1 + seed % 4, 2) * 6 + 4
    if points.numel():
        points.view(-1)[0] = math.nan
        points.view(-1)[-2:] = points.view(-1)[-2:].round() + 0.5  # on a cell
    with mock.patch.multiple(kernels, ROWS=2, COLUMNS=2, BOXES=2, LANES=4), poisoned():
        found = free_points(case, points, boxes)
        if seed % 4 == 0:
            with reversed_programs():
                same_bits(found, free_points(case, points, boxes))
    expected = on_cpu_path(lambda: free_points(case, points, boxes), mean_ops)
    for one, want in zip(found, expected, strict=True):
        torch.testing.assert_close(one, want, rtol=1e-4, atol=1e-5)


# bags


def check_bags(seed: int, device: str = "cpu") -> None:
    from detpipe.roi_pooling.cuda.bags import bag_dot, bag_sum

    dtype, channels = (
        (torch.float32, 3), (torch.float64, 17), (torch.float16, 40), (torch.bfloat16, 17)
    )[seed % 4]  # fmt: skip
    limit = {torch.float32: 1e-5, torch.float64: 1e-12, torch.float16: 2e-3, torch.bfloat16: 2e-2}[dtype]
    torch.manual_seed(seed)
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
    for given in (rows, rows.T.contiguous().T):  # operands need not be contiguous
        found = bag_sum(given, index, weight, offsets)
        assert found.dtype == dtype
        assert torch.equal(found, bag_sum(given, index, weight, offsets))
        torch.testing.assert_close(found.double().cpu(), total, rtol=limit, atol=limit)
        found = bag_dot(grad, given, index, offsets)
        assert found.dtype == weight.dtype
        torch.testing.assert_close(found.double().cpu(), dots, rtol=limit, atol=limit)
    assert not bag_sum(rows, index[:0], weight[:0], torch.zeros_like(offsets)).any()
    assert bag_sum(rows, index[:0], weight[:0], offsets[:1]).shape == (0, channels)
    assert bag_dot(grad, rows, index[:0], torch.zeros_like(offsets)).shape == (0,)


CHECKS = {"max": check_max, "rotated": check_rotated, "points": check_points}
# kernels and the most registers that each may take
KERNELS = {
    "_sum_kernel": 128,
    "_dot_kernel": 128,
    "max_kernel": 80,
    "read_kernel": 80,
    "prepare_kernel": 80,
    "adjoint_kernel": 168,  # 128 on one level; four levels of points and rotated boxes take 168
    "pool_kernel": 80,
    "slopes_kernel": 128,
}
WIDE = ("max_kernel", "adjoint_kernel", "pool_kernel", "slopes_kernel")  # those that read rows of channels


def run_as_script(script: str, *arguments: str, **environment: str) -> str:
    """What a script beside the tests prints, in a process of its own: Triton interprets or compiles from its import on."""
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(
        [sys.executable, script, *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{root}{os.pathsep}{root / 'tests'}", **environment},
        capture_output=True,
        text=True,
        timeout=3000,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


# launches


class Launches(TorchDispatchMode):
    """Counts what runs on the device: operations of PyTorch that compute something, and kernels, which are not run."""

    SILENT = (
        "view",
        "as_strided",
        "permute",
        "slice",
        "select",
        "expand",
        "unsqueeze",
        "split",
        "detach",
        "alias",
        "t.",
    )

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[str] = []
        self.kernels: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = str(func)
        own = name.startswith("detpipe") or "empty" in name
        if not own and not any(word in name for word in self.SILENT):
            self.operations.append(name)
        return func(*args, **(kwargs or {}))

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Count what is launched for boxes."""
        from detpipe.roi_pooling.cuda import geometry

        with mock.patch.object(geometry, "launch", self.launch):
            yield

    def launch(self, kernel, *operands, **constants) -> None:
        self.kernels.append(kernel.__name__)


# compilation


def machine_code(kernel) -> dict[str, object]:
    """Registers, spills, loads and divisions of a compiled kernel."""
    import triton

    tools = Path(triton.__file__).parent / "backends/nvidia/bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage = subprocess.run(
            [tools / "cuobjdump", "-res-usage", file.name], capture_output=True, text=True, check=True
        )
        listing = subprocess.run([tools / "nvdisasm", "-c", file.name], capture_output=True, text=True, check=True)
    registers = re.search(r"REG:(\d+)", usage.stdout)
    assert registers
    return {
        "registers": int(registers[1]),
        "spills": len(re.findall(r"\b(?:STL|LDL)\b", listing.stdout)),
        "wide_loads": len(re.findall(r"\bLDG\.E(?:\.\w+)*\.128\b", listing.stdout)),
        "div_full": kernel.asm["ptx"].count("div.full"),
    }


def compile_all(architecture: int) -> list[tuple[str, str, dict[str, object]]]:
    """Launch each kernel with typical operands on a made-up device -> name, type of the maps, what its code holds."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    class Absent:
        """A driver of a device that only names itself."""

        def get_current_target(self) -> GPUTarget:
            return GPUTarget("cuda", architecture, 32)

        def get_current_device(self) -> int:
            return 0

        def get_current_stream(self, device: int) -> int:
            return 0

    made, run = [], JITFunction.run

    def compile_only(self, *args, grid, warmup, **options):
        kernel = run(self, *args, grid=grid, warmup=True, **options)
        made.append((self.__name__, str(dtype), machine_code(kernel)))
        return kernel

    driver.set_active(Absent())
    JITFunction.run = compile_only
    dtype = torch.float32
    launch_bags()
    for dtype in (torch.float32, torch.float16):
        for levels in (1, 4):
            launch_max(levels, dtype)
            for is_rotated, samples in ((True, 2), (True, 0), (False, 4)):
                launch_samples(levels, dtype, is_rotated, samples)
    return made


def launch_bags() -> None:
    from detpipe.roi_pooling.cuda import bags

    rows, index, offsets = torch.zeros(64, 256), torch.zeros(8, dtype=torch.int64), torch.zeros(5, dtype=torch.int64)
    bags.bag_sum(rows, index, torch.zeros(8), offsets)
    bags.bag_dot(rows[:4], rows, index, offsets)


def typical(levels: int, dtype: torch.dtype, boxes: Tensor) -> tuple[list[Tensor], Scene]:
    """Maps with channels last, and a scene of 7 x 7 bins."""
    maps = [torch.zeros(2, 48 >> k, 64 >> k, 256, dtype=dtype) for k in range(levels)]
    sizes = [side for one in maps for side in one.shape[1:3]]
    scales, areas = [0.25 / 2**k for k in range(levels)], [100.0 * 4**k for k in range(levels - 1)]
    return maps, Scene(boxes, None, (), scales, areas, 2, sizes, 7, 7)


def launch_max(levels: int, dtype: torch.dtype) -> None:
    from detpipe.roi_pooling.cuda import maximum

    maps, scene = typical(levels, dtype, torch.zeros(16, 5))
    scene = scene._replace(samples=FAST_RCNN)
    values, winner = maximum.pool(maps, scene, True)
    maximum.read_winners(maps, winner, scene)
    maximum.adjoint(values, winner, scene)


def launch_samples(levels: int, dtype: torch.dtype, is_rotated: bool, samples: int) -> None:
    from detpipe.roi_pooling.cuda import points

    boxes, free = torch.zeros(16, 6), None
    if not is_rotated:
        boxes, free = torch.zeros(2, 8, 4), torch.zeros(2, 8, 7, 7, samples, 2)
    maps, scene = typical(levels, dtype, boxes)
    scene = scene._replace(samples=samples, rotated=is_rotated)
    values = points.pool(maps, free, scene)
    points.adjoint(values, free, scene)
    points.slopes(values, maps, free, scene)


if __name__ == "__main__":
    torch.set_num_threads(1)
    if sys.argv[1] == "interpret":
        for seed in range(int(sys.argv[3]), int(sys.argv[4])):
            try:
                with unchecked_values():
                    {**CHECKS, "bags": check_bags}[sys.argv[2]](seed)
            except Exception as error:
                raise AssertionError(f"case {seed}") from error
    else:
        print(json.dumps(compile_all(int(sys.argv[2]))))

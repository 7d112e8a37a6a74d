"""Kernels of RoIAlign and precise pooling without a GPU; run as a script, as :mod:`kernel_checks` is, whose cases these are.

``interpret BEGIN END`` compares random cases with the CPU's path and with torchvision, ``operators`` runs PyTorch's own checks
of operators and gradients, ``compile ARCHITECTURE`` prints what is in the machine code of each kernel.
"""

from __future__ import annotations

import json
import sys
from unittest import mock

import torch
from torch import Tensor
from torchvision import ops as torchvision_ops

from detpipe.roi_pooling import align, mean_ops, roi_align
from detpipe.roi_pooling.layouts import read_layout, unchecked_values
from detpipe.roi_pooling.scene import ADAPTIVE, PRECISE, Choice, Scene, make_scene
from roi_pooling import kernel_checks
from roi_pooling.kernel_checks import Case, on_cpu_path, poisoned, reversed_programs, same_bits

KINDS = (2, ADAPTIVE, PRECISE, 1, 3)
LIMIT = {torch.float32: 1e-5, torch.float64: 1e-11, torch.float16: 2e-3, torch.bfloat16: 2e-2}


class BoxCase(Case):
    """A case of a type, and of samples; one of four has as many bins as are read at once, and more."""

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        self.samples, self.aligned = KINDS[seed % len(KINDS)], seed // 5 % 2 == 0
        dtype = (torch.float32, torch.float32, torch.float64, torch.float16, torch.bfloat16)[seed // 3 % 5]
        torch.manual_seed(seed)
        self.maps = [torch.randn_like(one).to(dtype) for one in self.maps]
        if seed % 7 == 0:  # the kernel chooses the level
            self.level = None

    def areas(self) -> list[float]:
        return [] if self.level is not None else [4.0 * 3**index for index in range(len(self.maps) - 1)]

    def levels(self) -> Tensor:
        """The level of each box."""
        area = (self.corners[:, 2:] - self.corners[:, :2]).prod(1)
        chosen = sum((area >= least).long() for least in self.areas())
        return self.level if self.level is not None else chosen + torch.zeros_like(self.image)


def pool(case: BoxCase, second: bool) -> list[Tensor]:
    """Values, the gradients to maps and boxes, and, if wanted, the gradients of these."""
    maps = [one.clone().requires_grad_() for one in case.maps]
    listed = case.boxes if isinstance(case.boxes, list) else [case.boxes]
    boxes = [one.clone().requires_grad_() for one in listed]
    given = read_layout(boxes if isinstance(case.boxes, list) else boxes[0], maps[0])
    choice = Choice(case.scales, case.level, case.areas())
    scene = make_scene(maps, given, choice, case.size, samples=case.samples, aligned=case.aligned)
    pooled = align.align(maps, scene)
    torch.manual_seed(1)
    sent = torch.randn(pooled.shape).to(pooled.dtype)
    grads = torch.autograd.grad(pooled, [*maps, *boxes], sent, create_graph=second)
    found = [pooled, *grads]
    if second:
        found += torch.autograd.grad(sum(grad.double().square().sum() for grad in grads), [*maps, *boxes])
    return [one.detach() for one in found]


def torchvision_align(case: BoxCase) -> list[Tensor]:
    """Values and gradients to the maps from torchvision, level by level."""
    maps = [one.clone().requires_grad_() for one in case.maps]
    rows = torch.cat((case.image[:, None].to(maps[0].dtype), case.corners.to(maps[0].dtype)), dim=1)
    pooled = maps[0].new_zeros(len(rows), maps[0].shape[1], *case.size)
    for index, (one, scale) in enumerate(zip(maps, case.scales, strict=True)):
        own = (case.levels() == index).nonzero()[:, 0]
        there = torchvision_ops.roi_align(one, rows[own], case.size, scale, case.samples, case.aligned)
        pooled = pooled.index_put((own,), there)
    torch.manual_seed(1)
    return [pooled.detach(), *torch.autograd.grad(pooled, maps, torch.randn(pooled.shape).to(pooled.dtype))]


def largest(case: BoxCase) -> list[Tensor]:
    """The largest of fixed samples, and its gradients."""
    leaf, corners = case.maps[0].clone().requires_grad_(), case.corners.clone().requires_grad_()
    boxes = torch.cat((case.image[:, None].float(), corners), dim=1)
    pooled = roi_align(leaf, boxes, case.size, case.scales[0], case.samples, case.aligned, reduce="max")
    return [pooled.detach(), *torch.autograd.grad(pooled.square().sum(), (leaf, corners))]


def check(seed: int) -> None:
    """One case: poisoned, now and then with programs in the opposite order, and in small programs."""
    from detpipe.roi_pooling.cuda import align as kernels

    case = BoxCase(seed)
    dtype, second = case.maps[0].dtype, seed % 6 == 0
    small = {"ROWS": 2, "COLUMNS": 2 + seed % 2 * 2, "BOXES": 2, "BINS": 2}
    with mock.patch.multiple(kernels, **small), poisoned():
        found = pool(case, second)
        if seed % 4 == 0:
            with reversed_programs():
                same_bits(found, pool(case, second))
    if second and not len(case.image):  # the CPU's path has no second derivative without boxes
        found, second = found[: 1 + len(found) // 2], False
    expected = on_cpu_path(lambda: pool(case, second), mean_ops)
    first = (
        len(found) - second * (len(found) - 1) // 2
    )  # second derivatives are those of the CPU's path: NaN for a box that is NaN
    found = [*found[:first], *(one.nan_to_num() for one in found[first:])]
    for one, want in zip(found, expected, strict=True):
        assert one.dtype == want.dtype
        assert one.shape == want.shape
        scale = max(1.0, want.double().nan_to_num().abs().max().item()) if want.numel() else 1.0
        least = max(LIMIT[dtype], LIMIT[one.dtype]) if second else LIMIT[dtype]  # boxes may be less precise than maps
        limit = least * scale * (50 if second else 1)  # squares of gradients are far larger than these
        torch.testing.assert_close(one.double(), want.double().nan_to_num(), rtol=0, atol=limit)
    if seed % 10 == 0:
        for one, want in zip(largest(case), on_cpu_path(lambda: largest(case), mean_ops), strict=True):
            torch.testing.assert_close(one, want.nan_to_num(), rtol=LIMIT[dtype], atol=10 * LIMIT[dtype])
    is_plain = case.corners.isfinite().all() and (case.corners[:, 2:] > case.corners[:, :2]).all()
    if case.samples >= 0 and dtype in (torch.float32, torch.float64) and is_plain and len(case.image):
        for one, want in zip(found, torchvision_align(case), strict=False):
            torch.testing.assert_close(one, want, rtol=0, atol=LIMIT[dtype] * max(1.0, want.abs().max().item()))


def check_operators() -> None:
    """PyTorch's checks of operators, and of first and second derivatives."""
    torch.manual_seed(0)
    maps = [torch.randn(1, 1, *size, dtype=torch.float64) for size in ((4, 5), (2, 3))]
    boxes = torch.tensor([[0, 0.63, 0.71, 3.27, 2.9], [0, -1.37, -0.3, 7.1, 6.2]], dtype=torch.float64)
    grad = torch.randn(2, 2, 1, 1, dtype=torch.float64)
    for samples in (2, ADAPTIVE, PRECISE):
        scene = Scene(boxes, None, [], [1.0, 0.5], [20.0], 1, [4, 5, 2, 3], 2, 1, samples)
        ops = torch.ops.detpipe
        torch.library.opcheck(ops.box_mean.default, (maps, None, *scene))
        torch.library.opcheck(ops.box_mean_adjoint.default, (grad, None, *scene))
        torch.library.opcheck(ops.box_mean_slopes.default, (grad, maps, None, *scene))

        def pooled(sides: Tensor, *maps: Tensor, scene: Scene = scene) -> Tensor:
            scene = scene._replace(boxes=torch.cat((boxes[:, :1], sides), dim=1))
            return mean_ops.pool(align.compose, maps, scene)

        leaves = [one.clone().requires_grad_() for one in (boxes[:, 1:], *maps)]
        assert torch.autograd.gradcheck(pooled, leaves, fast_mode=True)
        if samples == 2:  # the second derivatives of the others are compared with the CPU's, which are checked there
            assert torch.autograd.gradgradcheck(pooled, leaves, fast_mode=True)
        compiled = torch.compile(pooled, backend="aot_eager", fullgraph=True)
        sent = torch.randn(2, 1, 2, 1, dtype=torch.float64)
        for one, other in zip(
            torch.autograd.grad(compiled(*leaves), leaves, sent),
            torch.autograd.grad(pooled(*leaves), leaves, sent),
            strict=True,
        ):
            torch.testing.assert_close(one, other)


def launch_all(levels: int, dtype: torch.dtype) -> None:
    """Launch each kernel with typical operands."""
    from detpipe.roi_pooling.cuda import align as kernels

    maps, scene = kernel_checks.typical(levels, dtype, torch.zeros(2, 8, 4))
    for samples in (2, ADAPTIVE, PRECISE):
        own = scene._replace(samples=samples)
        pooled = kernels.pool(maps, own)
        kernels.adjoint(pooled, own)
        kernels.slopes(pooled, maps, own)


if __name__ == "__main__":
    torch.set_num_threads(1)
    if sys.argv[1] == "interpret":
        for seed in range(int(sys.argv[2]), int(sys.argv[3])):
            try:
                with unchecked_values():
                    check(seed)
            except Exception as error:
                raise AssertionError(f"case {seed}") from error
    elif sys.argv[1] == "operators":
        check_operators()
    else:
        nothing = {"launch_bags": lambda: None, "launch_samples": lambda *operands: None}
        with mock.patch.multiple(kernel_checks, launch_max=launch_all, **nothing):
            print(json.dumps(kernel_checks.compile_all(int(sys.argv[2]))))

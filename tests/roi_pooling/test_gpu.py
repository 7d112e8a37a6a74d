"""The operators on a GPU: what they give on the CPU, the same each time, and without waiting for the device."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
TOLERANCE = {torch.float64: 1e-11, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 2e-1}


def operators() -> dict[str, Callable[[Tensor, Tensor], Tensor]]:
    """Public operators by name, of features ``[N, C, H, W]`` and boxes ``[N, P, 4]``."""
    from detpipe import roi_pooling

    def rotated(features: Tensor, boxes: Tensor) -> Tensor:
        angle = boxes[..., :1] * 0 + 30
        turned = torch.cat(((boxes[..., :2] + boxes[..., 2:]) / 2, boxes[..., 2:] - boxes[..., :2], angle), -1)
        return roi_pooling.rotated_roi_align(features, turned, (3, 2), 0.25, 2)

    def superpixels(features: Tensor, boxes: Tensor) -> Tensor:
        labels = torch.arange(features.shape[2] * features.shape[3], device=features.device) % 7 - 1
        labels = labels.view(1, *features.shape[2:]).expand(features.shape[0], -1, -1)
        return roi_pooling.superpixel_pool(features, labels, 6)[0]

    return {
        "roi_align": lambda features, boxes: roi_pooling.roi_align(features, boxes, (3, 2), 0.25, 2),
        "roi_align, adaptive": lambda features, boxes: roi_pooling.roi_align(features, boxes, (3, 2), 0.25),
        "precise_roi_pool": lambda features, boxes: roi_pooling.precise_roi_pool(features, boxes, (3, 2), 0.25),
        "roi_max_pool": lambda features, boxes: roi_pooling.roi_max_pool(features, boxes, (3, 2), 0.25),
        "rotated_roi_align": rotated,
        "superpixel_pool": superpixels,
    }


OPERATORS = (
    "roi_align",
    "roi_align, adaptive",
    "precise_roi_pool",
    "roi_max_pool",
    "rotated_roi_align",
    "superpixel_pool",
)


def operands(dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    features = torch.randn(2, 40, 13, 17).to(dtype)
    corner = torch.rand(2, 70, 2) * 60 - 10  # some lie over the border
    boxes = torch.cat((corner, corner + 1 + torch.rand(2, 70, 2) * 40), -1)
    return features.to(device).requires_grad_(), boxes.to(device).requires_grad_()


def results(name: str, dtype: torch.dtype, device: str) -> list[Tensor]:
    """What an operator gives, and its gradients to the features and, where it has them, to the boxes."""
    features, boxes = operands(dtype, device)
    pooled = operators()[name](features, boxes)
    torch.manual_seed(1)
    grad = torch.randn(pooled.shape).to(dtype).to(device)
    grads = torch.autograd.grad(pooled, (features, boxes), grad, allow_unused=True)
    return [value.cpu().double() for value in (pooled.detach(), *grads) if value is not None]


@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_operators_on_the_gpu_equal_those_on_the_cpu(name: str, dtype: torch.dtype) -> None:
    there, again, here = results(name, dtype, "cuda"), results(name, dtype, "cuda"), results(name, dtype, "cpu")
    for first, second, expected in zip(there, again, here, strict=True):
        assert torch.equal(first, second)
        torch.testing.assert_close(first, expected, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


@pytest.mark.parametrize("name", ["roi_align, adaptive", "roi_max_pool"])
def test_boxes_of_whole_cells_have_as_many_cells_as_on_the_cpu(name: str) -> None:
    """Where a bin ends on a cell, a last bit decides whether it has the next one too."""
    features = torch.randn(1, 8, 40, 40)
    size = torch.arange(1, 40, dtype=torch.float32)
    boxes = torch.cat((torch.zeros(39, 2), (4 * size[:, None]).expand(-1, 2)), -1)[None]
    expected = operators()[name](features, boxes)
    found = operators()[name](features.cuda(), boxes.cuda()).cpu()
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
@pytest.mark.parametrize(
    "name", ["roi_align", "roi_align, adaptive", "precise_roi_pool", "roi_max_pool", "rotated_roi_align"]
)
def test_operators_do_not_wait_for_the_gpu(name: str) -> None:
    features, boxes = operands(torch.float32, "cuda")
    operator = operators()[name]
    operator(features, boxes).sum().backward()  # compiles
    torch.cuda.synchronize()
    try:
        torch.cuda.set_sync_debug_mode("error")
        operator(features, boxes).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")

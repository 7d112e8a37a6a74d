import math

import pytest
import torch
from roi_cases import SMOOTH, backward, box_operator, difference, random_case, tolerance, whole_boxes
from torch.autograd import gradcheck, gradgradcheck

from detpipe.roi_pooling import PreciseRoIPool, precise_roi_pool, roi_align
from detpipe.roi_pooling.layouts import unchecked_values


def hat_integral(low, high, cell):
    """The integral of max(0, 1 - |t - cell|) from low to high, from its antiderivative on each side of the cell."""

    def below(edge):
        edge = min(max(edge - cell, -1.0), 1.0)
        return (edge + 1) ** 2 / 2 if edge < 0 else 1 - (1 - edge) ** 2 / 2

    return below(high) - below(low)


def slow(features, rois, size, scale):
    """Equation 5 of the paper: for each bin a sum over all cells of value times integral, over the bin's area."""
    height, width = features.shape[2:]
    pooled = features.new_zeros(len(rois), features.shape[1], *size)
    for r, (image, *edges) in enumerate(rois.tolist()):
        x1, y1, x2, y2 = (edge * scale for edge in edges)
        step_y, step_x = (y2 - y1) / size[0], (x2 - x1) / size[1]
        for i in range(size[0]):
            for j in range(size[1]):
                along_y = [hat_integral(y1 + i * step_y, y1 + (i + 1) * step_y, cell) for cell in range(height)]
                along_x = [hat_integral(x1 + j * step_x, x1 + (j + 1) * step_x, cell) for cell in range(width)]
                weight = torch.tensor(along_y, dtype=torch.float64)[:, None] * torch.tensor(
                    along_x, dtype=torch.float64
                )
                pooled[r, :, i, j] = (features[int(image)] * weight).sum((1, 2)) / (step_y * step_x)
    return pooled


@pytest.mark.parametrize("seed", range(200))
def test_equals_the_definition(seed):
    features, boxes, size, scale = random_case(seed)
    size = (size, size) if isinstance(size, int) else size
    # two differences of integrals lose digits of a small bin, in the loop as well as anywhere else
    pooled = precise_roi_pool(features, boxes, size, scale)
    expected = slow(features.double(), boxes.double(), size, scale)
    limit = {"rtol": 1e-4, "atol": 1e-5} if features.dtype == torch.float32 else tolerance(torch.float64)
    torch.testing.assert_close(pooled.double(), expected, **{**limit, "atol": max(limit["atol"], 1e-11)})


def test_a_case_by_hand():
    # over one square the surface is 1 + x + 2 y: each quarter's mean is its value at the middle
    surface = torch.tensor([[[[1.0, 2.0], [3.0, 4.0]]]])
    pooled = precise_roi_pool(surface, [torch.tensor([[0.0, 0.0, 1.0, 1.0]])], 2)
    torch.testing.assert_close(pooled, torch.tensor([[[[1.75, 2.25], [2.75, 3.25]]]]))
    # around a single cell of value 8 the surface is a tent of volume 8; a box of 4 x 4 around it averages a sixteenth
    tent = torch.zeros(1, 1, 5, 5)
    tent[0, 0, 2, 2] = 8
    assert precise_roi_pool(tent, [torch.tensor([[0.0, 0.0, 4.0, 4.0]])], 1).item() == pytest.approx(0.5)
    # half a cell outside the map the tents are cut in the middle
    assert precise_roi_pool(torch.ones(1, 1, 1, 1), [torch.tensor([[0.0, -1.0, 1.0, 1.0]])], 1).item() == pytest.approx(
        0.25
    )


def test_is_the_limit_of_many_samples():
    features, boxes = torch.randn(2, 3, 9, 8, dtype=torch.float64), SMOOTH.clone()
    boxes[:, 1:] = boxes[:, 1:].clamp(0.6, 6.9)
    sampled = roi_align(features, boxes, (2, 3), sampling_ratio=200)
    torch.testing.assert_close(precise_roi_pool(features, boxes, (2, 3), aligned=True), sampled, rtol=0, atol=1e-4)


def test_gradients_to_features_and_boxes():
    torch.manual_seed(0)
    features = torch.randn(2, 2, 6, 7, dtype=torch.float64, requires_grad=True)
    sides = SMOOTH[:, 1:].clone().requires_grad_()
    operator = box_operator(lambda features, boxes: precise_roi_pool(features, boxes, (2, 1)))
    assert gradcheck(operator, (features, sides))
    assert gradgradcheck(operator, (features, sides))


def test_the_gradient_to_an_edge_has_no_jump():
    # unlike samples, the integral has a continuous derivative where an edge crosses a cell's center
    features = torch.randn(1, 1, 8, 8, dtype=torch.float64)

    def slope(edge):
        box = torch.tensor([[[edge, 1.3, 6.2, 5.9]]], dtype=torch.float64, requires_grad=True)
        precise_roi_pool(features, box, 1).sum().backward()
        return box.grad[0, 0, 0]

    torch.testing.assert_close(slope(3 - 1e-7), slope(3 + 1e-7), rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_tiny_and_huge_boxes(dtype):
    features = torch.rand(1, 1, 6, 6, dtype=dtype) + 1
    tiny = torch.tensor([[[2.25, 3.5, 2.2501, 3.5001]]], dtype=dtype)
    expected = torch.nn.functional.grid_sample(
        features, (tiny[:, :, None, :2] + 0.5) / 3 - 1, align_corners=False, mode="bilinear"
    )
    torch.testing.assert_close(precise_roi_pool(features, tiny, 1).flatten(), expected.flatten(), rtol=1e-3, atol=0)
    huge = torch.tensor([[[-1e4, -1e4, 1e4, 1e4]]], dtype=dtype)
    torch.testing.assert_close(
        precise_roi_pool(features, huge, 1).flatten() * 4e8, features.sum()[None], rtol=1e-3, atol=0
    )


def test_outside_is_zero():
    boxes = torch.tensor([[0, 100.0, 100.0, 120.0, 130.0], [0, -50.0, 1.0, -20.0, 3.0], [0, 8.0, 0.0, 9.0, 4.0]])
    pooled, grad = backward(lambda leaf: precise_roi_pool(leaf, boxes, 3), torch.ones(1, 2, 8, 8))
    assert not pooled.any()
    assert not grad.any()


def test_normalized_and_shifted():
    features = torch.randn(2, 3, 10, 20)
    pixels = torch.tensor([[[32.0, 16.0, 160.0, 80.0]]]).expand(2, 1, 4)
    relative = pixels / torch.tensor([320.0, 160.0, 320.0, 160.0])
    torch.testing.assert_close(
        precise_roi_pool(features, relative, 3, normalized=True), precise_roi_pool(features, pixels, 3, 1 / 16)
    )
    torch.testing.assert_close(
        precise_roi_pool(features, pixels, 3, 1 / 16, aligned=True), precise_roi_pool(features, pixels - 8, 3, 1 / 16)
    )


@pytest.mark.parametrize("boxes", [torch.zeros(0, 5), [torch.zeros(0, 4)] * 2, torch.zeros(2, 0, 4)])
def test_no_boxes_keep_the_graph(boxes):
    leaf = torch.randn(2, 3, 4, 5, requires_grad=True)
    pooled = precise_roi_pool(leaf, boxes, (3, 2))
    assert pooled.shape[-3:] == (3, 3, 2)
    assert pooled.numel() == 0
    pooled.sum().backward()
    assert leaf.grad is not None


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_accumulates_in_float32(dtype):
    features = torch.randn(2, 5, 9, 12).to(dtype)
    pooled, grad = backward(lambda leaf: precise_roi_pool(leaf, SMOOTH, 3), features)
    exact, _ = backward(lambda leaf: precise_roi_pool(leaf, SMOOTH, 3), features.float())
    assert pooled.dtype == grad.dtype == dtype
    assert torch.equal(pooled, exact.to(dtype))


def test_memory_layouts_vmap_and_compile_agree():
    features, boxes = torch.randn(2, 5, 9, 12), SMOOTH.float()
    expected = backward(lambda leaf: precise_roi_pool(leaf, boxes, 3), features)
    channels_last = backward(
        lambda leaf: precise_roi_pool(leaf, boxes, 3), features.contiguous(memory_format=torch.channels_last)
    )
    assert all(torch.equal(a, b) for a, b in zip(channels_last, expected, strict=True))
    compiled = torch.compile(lambda leaf: precise_roi_pool(leaf, boxes, 3), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(backward(compiled, features), expected)
    batched = torch.func.vmap(lambda one: precise_roi_pool(one, boxes, 3))(torch.stack((features, 2 * features)))
    torch.testing.assert_close(batched, torch.stack((expected[0], 2 * expected[0])))


def test_bad_boxes_are_named():
    with pytest.raises(ValueError, match=r"box 1.*has no area"):
        precise_roi_pool(torch.zeros(1, 1, 4, 4), torch.tensor([[0, 1.0, 1, 2, 2], [0, 1.0, 1, 1, 2]]), 2)
    with pytest.raises(ValueError, match=r"box 0.*is not finite"):
        PreciseRoIPool(2)({"f": torch.zeros(1, 1, 4, 4)}, torch.tensor([[0, 1.0, 1, math.nan, 2]]), {"f": 1})


def test_the_gradient_to_edges_on_cells_by_hand():
    # a plane of slope 1 along x and 2 along y: its mean over four bins moves by half of that with each edge, and each bin counts
    plane = torch.tensor([[[[1.0, 2.0], [3.0, 4.0]]]])
    box = torch.tensor([[[0.0, 0.0, 1.0, 1.0]]], requires_grad=True)
    precise_roi_pool(plane, box, 2).sum().backward()
    assert box.grad is not None
    assert box.grad.flatten().tolist() == [2, 4, 2, 4]


@pytest.mark.parametrize("aligned", [False, True])
def test_the_gradient_to_edges_on_cells(aligned):
    torch.manual_seed(0)
    features, boxes = torch.randn(1, 2, 9, 9, dtype=torch.float64), whole_boxes(40, 0).requires_grad_()
    weight = torch.rand(2, 3, 2, dtype=torch.float64)

    def pool(boxes):
        return precise_roi_pool(features, boxes, (3, 2), aligned=aligned) * weight

    pool(boxes).sum().backward()
    for column in range(1, 5):
        central = difference(pool, boxes.detach(), column, -1, 1)
        torch.testing.assert_close(boxes.grad[:, column], central, rtol=0, atol=1e-3)


@pytest.mark.parametrize("box", [[2, 3, 2, 5], [2, 3, 4, 3], [3, 3, 1, 5], [math.nan, 1, 2, 3]])
def test_boxes_without_area_are_0_where_they_are_not_checked(box):
    boxes = torch.tensor([[0, *box], [0, 1.0, 1.0, 3.0, 4.0]], requires_grad=True)
    leaf = torch.ones(1, 1, 6, 6, requires_grad=True)
    with unchecked_values():
        pooled = precise_roi_pool(leaf, boxes, 2)
    assert not pooled[0].any()
    torch.testing.assert_close(pooled[1], torch.ones(1, 2, 2))
    pooled.sum().backward()
    assert not boxes.grad[0].any()
    assert leaf.grad.sum().item() == pytest.approx(4)

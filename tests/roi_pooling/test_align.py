import math

import pytest
import runs
import torch
from roi_cases import SMOOTH, backward, box_operator, difference, random_case, tolerance, whole_boxes
from torch.autograd import gradcheck, gradgradcheck
from torchvision.ops import roi_align as peer

from detpipe.roi_pooling import roi_align, torch_separable
from detpipe.roi_pooling.layouts import unchecked_values


def bilinear(plane, y, x):
    """One sample of a [H, W] plane: 0 more than a cell outside, else moved onto the border and interpolated."""
    height, width = plane.shape
    if y < -1 or y > height or x < -1 or x > width:
        return plane.new_zeros(())
    y, x = min(max(y, 0.0), height - 1.0), min(max(x, 0.0), width - 1.0)
    top, left = min(int(y), max(height - 2, 0)), min(int(x), max(width - 2, 0))
    total = plane.new_zeros(())
    for row in {top, min(top + 1, height - 1)}:
        for column in {left, min(left + 1, width - 1)}:
            total = total + (1 - abs(y - row)) * (1 - abs(x - column)) * plane[row, column]
    return total


def slow(features, rois, size, scale, ratio, aligned, reduce="mean"):
    """RoIAlign from its definition, one sample at a time."""
    pooled = features.new_zeros(len(rois), features.shape[1], *size)
    for r, (image, *edges) in enumerate(rois.tolist()):
        x1, y1, x2, y2 = (edge * scale - (0.5 if aligned else 0.0) for edge in edges)
        least = 0.0 if aligned else 1.0
        steps = [max(y2 - y1, least) / size[0], max(x2 - x1, least) / size[1]]
        counts = [ratio if ratio > 0 else math.ceil(step) for step in steps]
        for channel in range(features.shape[1]):
            plane = features[int(image), channel]
            for i in range(size[0]):
                for j in range(size[1]):
                    samples = [
                        bilinear(
                            plane,
                            y1 + (i + (ky + 0.5) / counts[0]) * steps[0],
                            x1 + (j + (kx + 0.5) / counts[1]) * steps[1],
                        )
                        for ky in range(counts[0])
                        for kx in range(counts[1])
                    ]
                    value = sum(samples) / len(samples) if reduce == "mean" else torch.stack(samples).max()
                    pooled[r, channel, i, j] = value
    return pooled


@pytest.mark.parametrize("ratio", [0, 1, 2, 3])
@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("reduce", ["mean", "max"])
def test_equals_the_definition(ratio, aligned, reduce):
    torch.manual_seed(0)
    features = torch.randn(2, 2, 5, 7, dtype=torch.float64)
    rois = torch.tensor([[1, 0.7, 0.4, 11.3, 8.6], [0, -7.1, 3.3, 29.0, 4.1], [0, 3.3, 3.2, 3.9, 3.5]]).double()
    expected = slow(features, rois, (2, 3), 0.5, ratio, aligned, reduce)
    pooled = roi_align(features, rois, (2, 3), 0.5, ratio, aligned, reduce=reduce)
    torch.testing.assert_close(pooled, expected, **tolerance(torch.float64))


@pytest.mark.parametrize("seed", range(200))
def test_equals_torchvision(seed):
    features, boxes, size, scale = random_case(seed)
    ratio, aligned = (seed // 2) % 5 - 1, seed % 3 > 0
    pooled, grad = backward(lambda leaf: roi_align(leaf, boxes, size, scale, ratio, aligned), features)
    expected, expected_grad = backward(lambda leaf: peer(leaf, boxes, size, scale, ratio, aligned), features)
    torch.testing.assert_close(pooled, expected, **tolerance(features.dtype))
    torch.testing.assert_close(grad, expected_grad, **tolerance(features.dtype))


def test_huge_boxes():
    features = torch.randn(1, 2, 9, 11, dtype=torch.float64)
    boxes = torch.tensor([[0, -3e3, -2e3, 3e3, 2.5e3], [0, 2.0, 3.0, 2e3, 5e3]], dtype=torch.float64)
    torch.testing.assert_close(roi_align(features, boxes, 7, 0.5), peer(features, boxes, 7, 0.5, 0, True))
    # torchvision runs out of memory for this one
    assert roi_align(features, boxes * torch.tensor([1, 1e3, 1e3, 1e3, 1e3]), 7).isfinite().all()


def test_a_case_by_hand():
    # a ramp of 0..24 in rows of five: bilinear samples of a plane are the plane, so each bin is the value at its center
    ramp = torch.arange(25.0).reshape(1, 1, 5, 5)
    pooled = roi_align(ramp, [torch.tensor([[1.0, 1.0, 3.0, 3.0]])], 4, sampling_ratio=2)
    row = torch.tensor([0.75, 1.25, 1.75, 2.25])  # centers of four half-cell bins, moved by half a cell
    torch.testing.assert_close(pooled[0, 0], row[None, :] + 5 * row[:, None])
    unaligned = roi_align(ramp, [torch.tensor([[1.0, 1.0, 3.0, 3.0]])], 4, sampling_ratio=2, aligned=False)
    torch.testing.assert_close(unaligned, pooled + 3)


def test_largest_sample_by_hand():
    # samples at (.25, .75) of each bin along both axes of a plane that grows to the right and down
    ramp = torch.arange(25.0).reshape(1, 1, 5, 5)
    pooled = roi_align(ramp, [torch.tensor([[1.0, 1.0, 3.0, 3.0]])], 1, sampling_ratio=2, reduce="max")
    assert pooled.item() == 2 + 5 * 2


def test_outside_is_zero():
    boxes = torch.tensor([[0, 100.0, 100.0, 120.0, 130.0], [0, -50.0, 1.0, -20.0, 3.0]])
    for ratio in (0, 2):
        pooled, grad = backward(
            lambda leaf, n=ratio: roi_align(leaf, boxes, 3, sampling_ratio=n), torch.ones(1, 2, 8, 8)
        )
        assert not pooled.any()
        assert not grad.any()


@pytest.mark.parametrize("ratio", runs.mostly_slow([0, 2], 2))
@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("reduce", ["mean", "max"])
def test_gradients_to_features_and_boxes(ratio, aligned, reduce):
    torch.manual_seed(0)
    features = torch.randn(2, 1, 6, 7, dtype=torch.float64, requires_grad=True)
    sides = SMOOTH[:, 1:].clone().requires_grad_()
    operator = box_operator(
        lambda features, boxes: roi_align(features, boxes, (2, 1), 1.0, ratio, aligned, reduce=reduce)
    )
    assert gradcheck(operator, (features, sides))
    if aligned:
        assert gradgradcheck(operator, (features, sides))


def test_a_box_is_learned_through_the_pooler():
    grid = torch.arange(32.0)
    blob = torch.exp(-((grid[:, None] - 12.0) ** 2 + (grid[None] - 20.0) ** 2) / 50)[None, None]
    wanted = roi_align(blob, torch.tensor([[[14.0, 6.0, 26.0, 18.0]]]), 7, sampling_ratio=2)
    box = torch.tensor([[[10.0, 9.0, 23.0, 22.0]]], requires_grad=True)
    optimizer = torch.optim.Adam([box], lr=0.1)
    for _ in range(400):
        optimizer.zero_grad()
        (roi_align(blob, box, 7, sampling_ratio=2) - wanted).square().sum().backward()
        optimizer.step()
    torch.testing.assert_close(box.detach(), torch.tensor([[[14.0, 6.0, 26.0, 18.0]]]), rtol=0, atol=0.05)


def test_normalized_boxes():
    features = torch.randn(2, 3, 10, 20)
    pixels = torch.tensor([[[32.0, 16.0, 160.0, 80.0]]]).expand(2, 1, 4)
    relative = pixels / torch.tensor([320.0, 160.0, 320.0, 160.0])
    for reduce in ("mean", "max"):
        expected = roi_align(features, pixels, 3, 1 / 16, reduce=reduce)
        torch.testing.assert_close(roi_align(features, relative, 3, normalized=True, reduce=reduce), expected)


@pytest.mark.parametrize("ratio", [0, 2])
def test_layouts_of_memory_agree(ratio):
    features, boxes = torch.randn(2, 5, 9, 12), SMOOTH.float()
    expected, expected_grad = backward(lambda leaf: roi_align(leaf, boxes, 3, sampling_ratio=ratio), features)
    channels_last = features.contiguous(memory_format=torch.channels_last)
    strided = torch.randn(2, 5, 12, 18)[..., ::2].copy_(features.mT).mT
    for other in (channels_last, strided):
        assert other.shape == features.shape
        assert not other.is_contiguous()
        pooled, grad = backward(lambda leaf: roi_align(leaf, boxes, 3, sampling_ratio=ratio), other)
        assert torch.equal(pooled, expected)
        assert torch.equal(grad, expected_grad)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("ratio", [0, 2])
def test_half_precision_accumulates_in_float32(dtype, ratio):
    features, boxes = torch.randn(2, 5, 9, 12).to(dtype), SMOOTH.float()
    pooled, grad = backward(lambda leaf: roi_align(leaf, boxes, 3, sampling_ratio=ratio), features)
    exact, _ = backward(lambda leaf: roi_align(leaf, boxes, 3, sampling_ratio=ratio), features.float())
    assert pooled.dtype == grad.dtype == dtype
    assert torch.equal(pooled, exact.to(dtype))


def test_half_precision_boxes():
    features, boxes = torch.randn(2, 3, 9, 12), SMOOTH.half()
    assert torch.equal(roi_align(features, boxes, 3), roi_align(features, boxes.float(), 3))


@pytest.mark.parametrize("ratio", runs.mostly_slow([0, 2], 2))
def test_autocast_changes_nothing(ratio):
    features, boxes = torch.randn(2, 5, 9, 12), SMOOTH.float().requires_grad_()
    leaf = features.clone().requires_grad_()
    roi_align(leaf, boxes, 3, sampling_ratio=ratio).square().sum().backward()
    other, other_boxes = features.clone().requires_grad_(), boxes.detach().clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        roi_align(other, other_boxes, 3, sampling_ratio=ratio).square().sum().backward()
    assert torch.equal(leaf.grad, other.grad)
    assert torch.equal(boxes.grad, other_boxes.grad)


@pytest.mark.parametrize("ratio", runs.mostly_slow([0, 2], 2))
@pytest.mark.parametrize("taps", [torch_separable.TAPS_AT_ONCE, 400])
def test_backward_is_the_same_every_time(ratio, taps, monkeypatch):
    monkeypatch.setattr(torch_separable, "TAPS_AT_ONCE", taps)
    monkeypatch.setattr(torch_separable, "FEW_TAPS", 0)
    features, boxes = torch.randn(2, 16, 20, 30), torch.rand(64, 4) * 15
    boxes = torch.cat((torch.arange(64)[:, None] % 2, boxes[:, :2], boxes[:, :2] + boxes[:, 2:] + 1), dim=1)
    sides = boxes[:, 1:].clone().requires_grad_()
    threads = torch.get_num_threads()
    results = []
    for count in (1, 2, 3, 1):
        torch.set_num_threads(count)
        leaf = features.clone().requires_grad_()
        pooled = roi_align(leaf, torch.cat((boxes[:, :1], sides), dim=1), 7, 0.5, ratio)
        results.append(torch.autograd.grad(pooled.square().sum(), (leaf, sides)))
    torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for grads in results[1:] for a, b in zip(grads, results[0], strict=True))


@pytest.mark.parametrize("ratio", [0, 2])
@pytest.mark.parametrize("boxes", [torch.zeros(0, 5), [torch.zeros(0, 4)] * 2, torch.zeros(2, 0, 4)])
def test_no_boxes_keep_the_graph(ratio, boxes):
    for reduce in ("mean", "max"):
        leaf = torch.randn(2, 3, 4, 5, requires_grad=True)
        pooled = roi_align(leaf, boxes, (3, 2), sampling_ratio=ratio, reduce=reduce)
        lead = (2, 0) if isinstance(boxes, torch.Tensor) and boxes.ndim == 3 else (0,)
        assert pooled.shape == (*lead, 3, 3, 2)
        pooled.sum().backward()
        assert leaf.grad is not None
        assert not leaf.grad.any()


@pytest.mark.parametrize("ratio", [0, 2])
def test_vmap_equals_a_loop(ratio):
    features, boxes = torch.randn(3, 2, 4, 9, 8), torch.stack([SMOOTH.float() + 0.3 * k for k in range(3)])
    boxes[..., 0] = SMOOTH[:, 0]

    def pool(features, boxes):
        return roi_align(features, boxes, 3, sampling_ratio=ratio)

    looped = torch.stack([pool(one, own) for one, own in zip(features, boxes, strict=True)])
    torch.testing.assert_close(torch.func.vmap(pool)(features, boxes), looped)
    shared = torch.stack([pool(features[0], own) for own in boxes])
    torch.testing.assert_close(torch.func.vmap(pool, (None, 0))(features[0], boxes), shared)


@pytest.mark.parametrize("ratio", runs.mostly_slow([0, 2], 2))
def test_compiles_without_a_break(ratio):
    features, boxes = torch.randn(2, 4, 9, 8), SMOOTH.float()
    operator = lambda leaf: roi_align(leaf, boxes, 3, sampling_ratio=ratio)  # noqa: E731
    compiled = torch.compile(operator, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(backward(compiled, features), backward(operator, features))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sampling_ratio": 1.5}, r"sampling_ratio must be 0 \(adaptive\) or a positive whole number, got 1.5"),
        ({"sampling_ratio": True}, "sampling_ratio must be .* got True"),
        ({"reduce": "median"}, "reduce must be 'mean' or 'max', got 'median'"),
        ({"output_size": 0}, "output_size must be one or two positive whole numbers, got 0"),
        ({"output_size": (3, 2.0)}, "output_size must be"),
        ({"output_size": 2.0}, "output_size must be one or two positive whole numbers, got 2.0"),
        ({"features": [[[[1.0]]]]}, r"features must be a tensor \[N, C, H, W\], got list"),
        ({"spatial_scale": 0.0}, "spatial_scale must be positive"),
        ({"spatial_scale": math.nan}, "spatial_scale must be positive"),
        ({"spatial_scale": (0.5, 0.5)}, r"spatial_scale must be positive, .* got \(0.5, 0.5\)"),
        ({"boxes": None}, r"boxes must be \[R, 5\] .*got NoneType"),
        ({"features": torch.zeros(3, 4, 5)}, r"features must be \[N, C, H, W\]"),
        ({"features": torch.zeros(1, 3, 4, 5).long()}, "features must be floating-point, got torch.int64"),
    ],
)
def test_bad_arguments(change, message):
    given = {"features": torch.zeros(1, 3, 4, 5), "boxes": torch.tensor([[0, 0.0, 0, 1, 1]]), "output_size": 2}
    with pytest.raises(ValueError, match=message):
        roi_align(**{**given, **change})


@pytest.mark.parametrize("aligned", [False, True])
@pytest.mark.parametrize("ratio", [1, 2, 4])  # with bins a power of two too, samples are exactly where they seem
def test_the_gradient_to_edges_on_cells(ratio, aligned):
    # many samples lie on cells, where the slope has a jump: the gradient is the slope to the right
    torch.manual_seed(0)
    features, boxes = torch.randn(1, 2, 9, 9, dtype=torch.float64), whole_boxes(40, 0).requires_grad_()
    weight = torch.rand(2, 4, 2, dtype=torch.float64)

    def pool(boxes):
        return roi_align(features, boxes, (4, 2), 1.0, ratio, aligned) * weight

    pool(boxes).sum().backward()
    for column in range(1, 5):
        to_the_right = difference(pool, boxes.detach(), column, 0, 1)
        # a sample on the border of what counts steps over it
        steps = difference(pool, boxes.detach(), column, 0, 0.5)
        smooth = (to_the_right - steps).abs() < 1e-6
        assert smooth.float().mean() > 0.7
        torch.testing.assert_close(boxes.grad[smooth, column], to_the_right[smooth], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("aligned", [False, True])
def test_the_gradient_of_adaptive_samples_is_that_of_as_many_fixed_ones(aligned):
    torch.manual_seed(0)
    features = torch.randn(1, 2, 9, 9, dtype=torch.float64)
    for samples in (1, 2, 3):
        low = torch.randint(-2, 7, (20, 2))
        boxes = torch.cat((torch.zeros(20, 1), low, low + samples * torch.tensor([2, 3])), dim=1).double()
        grads = []
        for ratio in (0, samples):
            leaf = boxes.clone().requires_grad_()
            roi_align(features, leaf, (3, 2), 1.0, ratio, aligned).square().sum().backward()
            grads.append(leaf.grad)
        torch.testing.assert_close(grads[0], grads[1], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("aligned", [False, True])
@pytest.mark.parametrize("ratio", [0, 2])
@pytest.mark.parametrize("box", [[2, 3, 2, 5], [2, 3, 4, 3], [3, 3, 3, 3], [4.2, 5, 1.1, 2]])
def test_boxes_without_area_are_torchvisions_where_they_are_not_checked(box, ratio, aligned):
    boxes = torch.tensor([[0, *box], [0, 1.0, 1.0, 3.0, 4.0]])
    features = torch.randn(1, 2, 6, 6)
    with unchecked_values():
        found = backward(lambda leaf: roi_align(leaf, boxes, 2, 1.0, ratio, aligned), features)
        largest = roi_align(features, boxes, 2, 1.0, ratio, aligned, reduce="max")
    torch.testing.assert_close(found, backward(lambda leaf: peer(leaf, boxes, 2, 1.0, ratio, aligned), features))
    if ratio == 0 and aligned:
        assert not largest[0].any()


@pytest.mark.parametrize("ratio", [0, 2])
def test_boxes_that_are_no_numbers_are_0_where_they_are_not_checked(ratio):
    boxes = torch.tensor([[0, math.nan, 1, 2, 3], [0, 1.0, 1.0, 3.0, 4.0]])
    with unchecked_values():
        pooled, grad = backward(lambda leaf: roi_align(leaf, boxes, 2, 1.0, ratio), torch.ones(1, 1, 6, 6))
    assert not pooled[0].any()
    assert grad.isfinite().all()

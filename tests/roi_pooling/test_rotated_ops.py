"""What holds of the operators behind rotated boxes whatever they compute."""

import math
from pathlib import Path

import pytest
import torch
from roi_cases import backward
from torch.autograd import gradgradcheck

from detpipe.roi_pooling import rotated_samples
from detpipe.roi_pooling.rotated import rotated_roi_align
from detpipe.roi_pooling.rotated_samples import Frames, sample_blocks

ROTATED = torch.tensor(
    [[0, 3.1, 2.8, 4.3, 3.9, 30.7], [1, 0.6, 4.1, 5.3, 9.2, -117.3], [1, 2.6, 1.4, 0.7, 0.73, 200.9]],
    dtype=torch.float64,
)


def test_gradients_of_any_order():
    features = torch.randn(1, 1, 5, 6, dtype=torch.float64, requires_grad=True)
    sides = ROTATED[:1, 1:].clone().requires_grad_()

    def first_grads(features, sides):
        pooled = rotated_roi_align(features, sides[None], (2, 1), sampling_ratio=1)
        return torch.autograd.grad(pooled.square().sum(), (features, sides), create_graph=True)

    assert gradgradcheck(first_grads, (features, sides))


@pytest.mark.parametrize("ratio", [0, 2])
def test_layouts_of_memory_agree(ratio):
    features, rois = torch.randn(2, 5, 9, 12), ROTATED.float()
    expected, expected_grad = backward(lambda leaf: rotated_roi_align(leaf, rois, 3, 1, ratio), features)
    channels_last = features.contiguous(memory_format=torch.channels_last)
    strided = torch.randn(2, 5, 12, 18)[..., ::2].copy_(features.mT).mT
    spread_rois = torch.stack((rois, rois), dim=-1)[..., 0]
    for other in (channels_last, strided):
        assert not other.is_contiguous()
        pooled, grad = backward(lambda leaf: rotated_roi_align(leaf, spread_rois, 3, 1, ratio), other)
        assert torch.equal(pooled, expected)
        assert torch.equal(grad, expected_grad)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("ratio", [0, 2])
@pytest.mark.parametrize("at_once", [20, rotated_samples.SAMPLES_AT_ONCE])
def test_half_precision_accumulates_in_float32(dtype, ratio, at_once, monkeypatch):
    monkeypatch.setattr(rotated_samples, "SAMPLES_AT_ONCE", at_once)
    features, rois = torch.randn(2, 5, 9, 12).to(dtype), ROTATED.float()
    pooled, grad = backward(lambda leaf: rotated_roi_align(leaf, rois, 3, 1, ratio), features)
    exact, _ = backward(lambda leaf: rotated_roi_align(leaf, rois, 3, 1, ratio), features.float())
    assert pooled.dtype == grad.dtype == dtype
    assert torch.equal(pooled, exact.to(dtype))


def gradients(features, rois, ratio):
    """Of the features and the boxes, and second ones of the boxes."""
    leaf, sides = features.clone().requires_grad_(), rois.clone().requires_grad_()
    pooled = rotated_roi_align(leaf, sides, 3, 1, ratio)
    first = torch.autograd.grad(pooled.square().sum(), (leaf, sides), create_graph=True)
    second = torch.autograd.grad(first[1].square().sum(), sides)
    return [pooled.detach(), *(grad.detach() for grad in first), *second]


@pytest.mark.parametrize("ratio", [0, 2])
def test_autocast_changes_nothing(ratio):
    features, rois = torch.randn(2, 5, 9, 12), ROTATED.float()
    expected = gradients(features, rois, ratio)
    with torch.autocast("cpu", torch.bfloat16):
        assert all(torch.equal(a, b) for a, b in zip(gradients(features, rois, ratio), expected, strict=True))


@pytest.mark.parametrize("ratio", [0, 2])
@pytest.mark.parametrize("at_once", [rotated_samples.SAMPLES_AT_ONCE, 2000])
def test_backward_is_the_same_every_time(ratio, at_once, monkeypatch):
    monkeypatch.setattr(rotated_samples, "SAMPLES_AT_ONCE", at_once)
    features, rois = torch.randn(2, 16, 20, 30), torch.rand(32, 6) * 15 + 1
    rois[:, 0], rois[:, 5] = torch.arange(32) % 2, torch.rand(32) * 360
    threads = torch.get_num_threads()
    results = []
    for count in (1, 2, 3, 1):
        torch.set_num_threads(count)
        results.append(gradients(features, rois, ratio))
    torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for grads in results[1:] for a, b in zip(grads, results[0], strict=True))


@pytest.mark.parametrize("ratio", [0, 2])
def test_vmap_equals_a_loop(ratio):
    features = torch.randn(3, 2, 4, 9, 8)
    rois = ROTATED.float() + torch.tensor([0, 0.3, -0.2, 0.1, 0.2, 11.0]) * torch.arange(3.0)[:, None, None]

    def pool(features, rois):
        return rotated_roi_align(features, rois, 3, 1, ratio)

    looped = torch.stack([pool(one, own) for one, own in zip(features, rois, strict=True)])
    torch.testing.assert_close(torch.func.vmap(pool)(features, rois), looped)
    shared = torch.stack([pool(features[0], own) for own in rois])
    torch.testing.assert_close(torch.func.vmap(pool, (None, 0))(features[0], rois), shared)
    inner = torch.func.vmap(pool, (1, None), 1)(features.transpose(0, 1), rois[0])
    torch.testing.assert_close(inner, torch.stack([pool(one, rois[0]) for one in features], dim=1))


@pytest.mark.parametrize("ratio", [0, 2])
@pytest.mark.parametrize("which", [0, 1])
def test_gradients_of_many_results_at_once(ratio, which):
    torch.manual_seed(0)
    leaves = [torch.randn(2, 2, 5, 4, dtype=torch.float64), ROTATED[:2].clone()]

    def pool(leaf):
        features, rois = (leaf if index == which else other for index, other in enumerate(leaves))
        return rotated_roi_align(features, rois, (2, 1), 1, ratio)

    for derivative, function in (
        (torch.autograd.functional.jacobian, pool),
        (torch.autograd.functional.hessian, lambda leaf: pool(leaf).square().sum()),
    ):
        one_by_one, batched = (derivative(function, leaves[which], vectorize=vectorize) for vectorize in (False, True))
        assert one_by_one.any()
        torch.testing.assert_close(batched, one_by_one)


@pytest.mark.slow
@pytest.mark.parametrize("ratio", [0, 2])
def test_compiles_without_a_break(ratio):
    features, rois = torch.randn(2, 4, 9, 8), ROTATED.float()

    def both(operator):
        leaf, sides = features.clone().requires_grad_(), rois.clone().requires_grad_()
        pooled = operator(leaf, sides)
        return [pooled, *torch.autograd.grad(pooled.sin().sum(), (leaf, sides))]

    def operator(leaf, sides):
        return rotated_roi_align(leaf, sides, 3, 1, ratio)

    torch.testing.assert_close(both(torch.compile(operator, backend="aot_eager", fullgraph=True)), both(operator))


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # of opcheck's own
@pytest.mark.parametrize("name", ["pooled", "adjoint", "frames"])
def test_operators_keep_their_promises(name):
    rows, grad = torch.randn(70, 2, requires_grad=True), torch.randn(2, 2, 3, 2, requires_grad=True)
    frame = torch.tensor([[[3.1, 2, 1], [2.7, -0.5, 4]], [[2.3, 0.5, -3], [3.3, 3, 0.5]]], requires_grad=True)
    where = (frame, torch.tensor([[0, 5, 7], [35, 5, 7]]), torch.full((2, 2), 2))
    operands = {
        "pooled": (None, rows, *where, 2, 3, 70),
        "adjoint": (grad, None, *where, 2, 3, 70),
        "frames": (grad, rows, *where),
    }
    checks = ["test_schema", "test_autograd_registration", "test_faketensor"]
    if name != "frames":  # its gradient lists samples, whose number is not known beforehand
        checks.append("test_aot_dispatch_dynamic")
    called = torch.ops.detpipe.rotated_frames if name == "frames" else torch.ops.detpipe.rotated
    torch.library.opcheck(called.default, operands[name], test_utils=checks)


def frames(count, side):
    """Boxes around the middle of a map of 40 x 60, in an adaptive number of bins of 7 x 7."""
    frame = torch.tensor([[20.0, side * 0.8, -side * 0.6], [30.0, side * 0.6, side * 0.8]]).expand(count, 2, 3)
    return Frames(frame, torch.tensor([[0, 40, 60]]).expand(count, 3), torch.full((count, 2), math.ceil(side / 7)))


def test_samples_of_a_pass_are_bounded(monkeypatch):
    monkeypatch.setattr(rotated_samples, "SAMPLES_AT_ONCE", 10_000)
    # at most 42 x 62 cells are on or next to the map, and samples are 20 / 21 of a cell apart
    for side in (20.0, 2e4):
        sizes = [len(samples.row) for _, _, samples in sample_blocks(frames(30, side), (7, 7))]
        assert len(sizes) > 1
        assert max(sizes) < 10_000 + 42 * 62 * 1.2
    assert sum(sizes) / 30 == pytest.approx(42 * 62, rel=0.1)  # those on the map, and few more


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak is read from Linux's /proc")
def test_memory_of_huge_boxes_is_bounded():
    features = torch.randn(1, 4, 40, 60, requires_grad=True)
    boxes = torch.tensor([[[30.0, 20.0, 1e6, 2e6, 37.0]]]).repeat(1, 100, 1).requires_grad_()

    def resident(field):
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 1024

    rotated_roi_align(features, boxes[:, :1], 7).sum().backward()
    Path("/proc/self/clear_refs").write_text("5")  # the highest resident size starts again from the present one
    before = resident("VmRSS")
    rotated_roi_align(features, boxes, 7).sum().backward()
    assert resident("VmHWM") - before < 150  # a single box has 2e12 samples

import math

import pytest
import runs
import torch
from roi_cases import SMOOTH, backward, box_operator, random_case
from torch.autograd import gradcheck, gradgradcheck
from torchvision.ops import roi_pool as peer

from detpipe.roi_pooling import RoIMaxPool, roi_max_pool, torch_max
from detpipe.roi_pooling.max_ops import FARTHEST
from detpipe.roi_pooling.scene import FAST_RCNN, Scene


def slow(features, rois, size, scale, bins):
    """RoI max pooling from its definition, one cell at a time; also the winners."""
    height, width = features.shape[2:]
    pooled, winners = features.new_zeros(len(rois), features.shape[1], *size), {}
    for r, (image, *edges) in enumerate(rois.tolist()):
        if bins == "fast_rcnn":
            x1, y1, x2, y2 = (math.copysign(math.floor(abs(edge * scale) + 0.5), edge) for edge in edges)
            rows = edges_rounded_outwards(y1, max(y2 - y1 + 1, 1), size[0])
            columns = edges_rounded_outwards(x1, max(x2 - x1 + 1, 1), size[1])
        else:
            x1, y1, x2, y2 = (math.floor(edge * scale) for edge in edges)
            rows, columns = equal_steps(y1, y2, size[0]), equal_steps(x1, x2, size[1])
        for i, (top, bottom) in enumerate(rows):
            for j, (left, right) in enumerate(columns):
                cells = [
                    (y, x)
                    for y in range(max(top, 0), min(bottom, height))
                    for x in range(max(left, 0), min(right, width))
                ]
                for c in range(features.shape[1]) if cells else ():
                    best = max(cells, key=lambda cell: features[int(image), c, cell[0], cell[1]].item())
                    pooled[r, c, i, j] = features[int(image), c, best[0], best[1]]
                    winners[r, c, i, j] = (int(image), c, *best)
    return pooled, winners


def edges_rounded_outwards(first, length, bins):
    return [
        (int(first + math.floor(i * length / bins)), int(first + math.ceil((i + 1) * length / bins)))
        for i in range(bins)
    ]


def equal_steps(first, end, bins):
    step = (end - first) // bins
    return [(first + i * step, first + (i + 1) * step if i + 1 < bins else end) for i in range(bins)]


PATHS = ["winner", "packed", "gathered"]


@pytest.fixture(params=PATHS)
def path(request, monkeypatch):
    """Which of the three ways to a maximum is taken."""
    if request.param == "packed":
        monkeypatch.setattr(torch_max, "_is_worth_packing", lambda rows, *_: rows.dtype == torch.float32)
    elif request.param == "winner":
        monkeypatch.setattr(torch_max, "_is_worth_packing", lambda *_: False)
    else:
        monkeypatch.setattr(torch_max, "_is_worth_packing", lambda *_: False)
        monkeypatch.setattr(torch_max, "_product_with_winner", torch_max._gathered)
        monkeypatch.setattr(torch_max, "_product", lambda rows, block: torch_max._gathered(rows, block)[0])
    return request.param


@pytest.mark.parametrize("bins", ["fast_rcnn", "equal_step"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equals_the_definition(bins, dtype, path):
    torch.manual_seed(0)
    features = torch.randn(2, 2, 7, 9, dtype=dtype).relu().requires_grad_()  # zeros tie
    rois = torch.tensor(
        [[1, 1.0, 3.0, 12.9, 9.0], [0, -7.1, 3.3, 29.0, 4.1], [0, 3.3, 3.2, 3.9, 3.5], [1, -9, -9, -8, -7]], dtype=dtype
    )
    expected, winners = slow(features.detach(), rois, (2, 3), 0.5, bins)
    pooled = roi_max_pool(features, rois, (2, 3), 0.5, bins)
    assert torch.equal(pooled, expected)
    grad = torch.randn_like(expected)
    expected_grad = torch.zeros_like(features)
    for position, cell in winners.items():
        expected_grad[cell] += grad[position]
    pooled.backward(grad)
    torch.testing.assert_close(features.grad, expected_grad)
    with torch.no_grad():
        assert torch.equal(roi_max_pool(features, rois, (2, 3), 0.5, bins), expected)


@pytest.mark.parametrize("seed", range(200))
def test_equals_torchvision(seed):
    features, boxes, size, scale = random_case(seed)
    pooled, grad = backward(lambda leaf: roi_max_pool(leaf, boxes, size, scale), features)
    expected, expected_grad = backward(lambda leaf: peer(leaf, boxes, size, scale), features)
    assert torch.equal(pooled, expected)
    torch.testing.assert_close(grad, expected_grad)
    assert torch.equal(roi_max_pool(features, boxes, size, scale), expected)


def test_all_ways_agree_in_blocks(path, monkeypatch):
    monkeypatch.setattr(torch_max, "VALUES_AT_ONCE", 5000)
    monkeypatch.setattr(torch_max, "TAPS_AT_ONCE", 300)
    torch.manual_seed(0)
    features, corners = torch.randn(3, 7, 20, 30), torch.rand(64, 4) * 15
    image = torch.arange(64)[:, None] % 3
    boxes = torch.cat((image, corners[:, :2], corners[:, :2] + corners[:, 2:] + 0.1), dim=1)
    pooled, grad = backward(lambda leaf: roi_max_pool(leaf, boxes, (3, 4), 1.3), features)
    expected, expected_grad = backward(lambda leaf: peer(leaf, boxes, (3, 4), 1.3), features)
    assert torch.equal(pooled, expected)
    torch.testing.assert_close(grad, expected_grad)


def test_packs_values_and_cells_without_loss():
    least, most = torch.finfo(torch.float32).smallest_normal, torch.finfo(torch.float32).max
    values = [-math.inf, -most, -1.0, -least, -least / 8, 0.0, -0.0, least / 8, least, 1.0, most, math.inf, math.nan]
    rows = torch.tensor(values)[:, None].repeat(1, 3)
    rows[-1, 1] = -rows[-1, 1]  # the other NaN
    keys = torch_max._pack(rows)
    ascending = keys.clone()
    ascending[5:7] = ascending[5:7].flip(0)  # of 0 and -0 the first is the larger
    assert (ascending.diff(dim=0) > 0).all()
    assert (keys.view(torch.int64) & torch_max.LAST_ROW == torch_max.LAST_ROW - torch.arange(13)[:, None]).all()


def test_a_case_by_hand():
    ramp = torch.arange(25.0).reshape(1, 1, 5, 5)
    # cells 1 to 4, both included: bins of two cells
    pooled = roi_max_pool(ramp, [torch.tensor([[1.4, 0.6, 3.6, 4.4]])], 2)
    assert pooled[0, 0].tolist() == [[12, 14], [22, 24]]
    # cells 1 and 2 of 1 to 3, bins of one cell, the last two cells in the last bin
    pooled = roi_max_pool(ramp, [torch.tensor([[1.4, 0.6, 3.6, 4.4]])], 2, bins="equal_step")
    assert pooled[0, 0].tolist() == [[6, 7], [16, 17]]


def test_halves_are_rounded_away_from_zero():
    ramp = torch.arange(49.0).reshape(1, 1, 7, 7)
    boxes = torch.tensor([[0, 0.5, 1.5, 2.5, 4.5], [0, -0.5, -2.5, 1.4999999, 0.49999997]])
    assert torch.equal(roi_max_pool(ramp, boxes, 3), peer(ramp, boxes, 3))


def test_the_keras_layer_s_example():
    # a map of ones, 200 x 100, with 50 in one cell; two boxes; 3 x 7 bins
    features = torch.ones(1, 1, 200, 100)
    features[0, 0, 199, 97] = 50
    boxes = torch.tensor([[[0.2, 0.5, 0.4, 0.7], [0.0, 0.0, 1.0, 1.0]]])
    pooled = roi_max_pool(features, boxes, (3, 7), bins="equal_step", normalized=True)
    assert pooled.shape == (1, 2, 1, 3, 7)
    expected = torch.ones(2, 3, 7)
    expected[1, 2, 6] = 50
    assert torch.equal(pooled[0, :, 0], expected)


def test_empty_bins_are_zero():
    features = -torch.ones(1, 2, 8, 8)
    boxes = [torch.tensor([[1.0, 1.0, 3.0, 3.0]])]
    pooled, grad = backward(lambda leaf: roi_max_pool(leaf, boxes, 3, bins="equal_step"), features)
    assert pooled[0, 0].tolist() == [[0, 0, 0], [0, 0, 0], [0, 0, -1]]  # steps of 0 cells, and two left
    assert grad.count_nonzero() == 2
    outside = [torch.tensor([[100.0, 100.0, 120.0, 130.0], [-50.0, 1.0, -20.0, 3.0]])]
    for bins in ("fast_rcnn", "equal_step"):
        pooled, grad = backward(lambda leaf, b=bins: roi_max_pool(leaf, outside, 3, bins=b), features)
        assert not pooled.any()
        assert not grad.any()


def test_huge_boxes():
    features = torch.randn(1, 2, 9, 11)
    boxes = torch.tensor([[0, -3e3, -2e3, 3e3, 2.5e3], [0, 2.0, 3.0, 2e3, 5e3], [0, -2e6, -3e6, 4e6, 5e6]])
    assert torch.equal(roi_max_pool(features, boxes, 7, 0.5), peer(features, boxes, 7, 0.5))
    beyond = torch.tensor([[0, -1e30, -1e35, 1e30, 1e36], [0, 1e20, 0, 3e20, 4.0]])
    assert FARTHEST < 1e20
    pooled = roi_max_pool(features, beyond, 1)
    assert torch.equal(pooled[0, :, 0, 0], features.amax((2, 3))[0])
    assert not pooled[1].any()


def test_nan_wins(path):
    features = torch.tensor([[[[1.0, math.nan, math.inf, math.nan]]]])
    features[0, 0, 0, 3] *= -1
    boxes = [torch.tensor([[0.0, 0.0, 3.0, 0.4], [2.0, 0.0, 3.0, 0.4], [0.0, 0.0, 0.4, 0.4]])]
    pooled, grad = backward(lambda leaf: roi_max_pool(leaf, boxes, 1), features)
    assert pooled.flatten().isnan().tolist() == [True, True, False]
    sent = (grad != 0).flatten().tolist()
    assert sent[0]
    assert sent[3]  # the only NaN of the second box; that of the first is either
    assert not sent[2]
    with torch.no_grad():
        torch.testing.assert_close(roi_max_pool(features, boxes, 1), pooled, equal_nan=True)


@pytest.mark.parametrize("bins", runs.mostly_slow(["fast_rcnn", "equal_step"], "fast_rcnn"))
def test_gradients_to_features(bins):
    torch.manual_seed(0)
    features = torch.randn(2, 2, 6, 7, dtype=torch.float64, requires_grad=True)
    sides = SMOOTH[:, 1:].clone()
    operator = box_operator(lambda features, boxes: roi_max_pool(features, boxes, (2, 3), 1.0, bins))
    assert gradcheck(operator, (features, sides))
    assert gradgradcheck(operator, (features, sides))


def test_boxes_have_no_gradient():
    boxes = SMOOTH.float().requires_grad_()
    roi_max_pool(torch.randn(2, 1, 6, 7, requires_grad=True), boxes, 2).sum().backward()
    assert boxes.grad is None


@pytest.mark.parametrize("bins", ["fast_rcnn", "equal_step"])
def test_normalized_boxes(bins):
    features = torch.randn(2, 3, 10, 20)
    pixels = torch.tensor([[[32.0, 16.0, 160.0, 80.0]]]).expand(2, 1, 4)
    relative = pixels / torch.tensor([320.0, 160.0, 320.0, 160.0])
    expected = roi_max_pool(features, pixels, 3, 1 / 16, bins)
    assert torch.equal(roi_max_pool(features, relative, 3, bins=bins, normalized=True), expected)


def test_layouts_of_memory_agree():
    features, boxes = torch.randn(2, 5, 9, 12), SMOOTH.float()
    expected, expected_grad = backward(lambda leaf: roi_max_pool(leaf, boxes, 3), features)
    channels_last = features.contiguous(memory_format=torch.channels_last)
    strided = torch.randn(2, 5, 12, 18)[..., ::2].copy_(features.mT).mT
    for other in (channels_last, strided):
        assert not other.is_contiguous()
        pooled, grad = backward(lambda leaf: roi_max_pool(leaf, boxes, 3), other)
        assert torch.equal(pooled, expected)
        assert torch.equal(grad, expected_grad)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_accumulates_in_float32(dtype, path):
    features = torch.randn(2, 5, 9, 12).to(dtype)
    boxes = SMOOTH.float().repeat(40, 1)  # the same cells win many times
    sent, grads = torch.randn(120, 5, 3, 3).to(dtype), []
    for leaf in (features.clone().requires_grad_(), features.float().requires_grad_()):
        pooled = roi_max_pool(leaf, boxes, 3)
        assert torch.equal(pooled, peer(features.float(), boxes, 3).to(leaf.dtype))
        grads += torch.autograd.grad(pooled, leaf, sent.to(leaf.dtype))
    assert torch.equal(grads[0], grads[1].to(dtype))


def test_backward_is_the_same_every_time(path):
    torch.manual_seed(0)
    features, corners = torch.randn(2, 16, 20, 30), torch.rand(64, 4) * 15
    boxes = torch.cat((torch.arange(64)[:, None] % 2, corners[:, :2], corners[:, :2] + corners[:, 2:] + 1), dim=1)
    threads = torch.get_num_threads()
    results = []
    for count in (1, 2, 3, 1):
        torch.set_num_threads(count)
        results.append(backward(lambda leaf: roi_max_pool(leaf, boxes, 7, 0.5), features))
    torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for result in results[1:] for a, b in zip(result, results[0], strict=True))


@pytest.mark.parametrize("boxes", [torch.zeros(0, 5), [torch.zeros(0, 4)] * 2, torch.zeros(2, 0, 4)])
def test_no_boxes_keep_the_graph(boxes):
    leaf = torch.randn(2, 3, 4, 5, requires_grad=True)
    pooled = roi_max_pool(leaf, boxes, (3, 2))
    lead = (2, 0) if isinstance(boxes, torch.Tensor) and boxes.ndim == 3 else (0,)
    assert pooled.shape == (*lead, 3, 3, 2)
    pooled.sum().backward()
    assert leaf.grad is not None
    assert not leaf.grad.any()


@pytest.mark.parametrize("bins", ["fast_rcnn", "equal_step"])
def test_vmap_equals_a_loop(bins):
    features, boxes = torch.randn(3, 2, 4, 9, 8), torch.stack([SMOOTH.float() + 0.7 * k for k in range(3)])
    boxes[..., 0] = SMOOTH[:, 0]

    def pool(features, boxes):
        return roi_max_pool(features, boxes, 3, bins=bins)

    looped = torch.stack([pool(one, own) for one, own in zip(features, boxes, strict=True)])
    assert torch.equal(torch.func.vmap(pool)(features, boxes), looped)
    shared = torch.stack([pool(features[0], own) for own in boxes])
    assert torch.equal(torch.func.vmap(pool, (None, 0))(features[0], boxes), shared)
    leaf = features.clone().requires_grad_()
    torch.func.vmap(pool)(leaf, boxes).square().sum().backward()
    other = features.clone().requires_grad_()
    torch.stack([pool(one, own) for one, own in zip(other, boxes, strict=True)]).square().sum().backward()
    torch.testing.assert_close(leaf.grad, other.grad)


@pytest.mark.parametrize("bins", ["fast_rcnn", "equal_step"])
def test_compiles_without_a_break(bins):
    features, boxes = torch.randn(2, 4, 9, 8), SMOOTH.float()
    operator = lambda leaf: roi_max_pool(leaf, boxes, 3, bins=bins)  # noqa: E731
    compiled = torch.compile(operator, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(backward(compiled, features), backward(operator, features))


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # of opcheck's own
def test_operators_pass_opcheck():
    torch.manual_seed(0)
    maps = [torch.randn(2, 4, 3, 4), torch.randn(2, 4, 2, 3)]
    boxes, level = torch.tensor([[0, 0.0, 0, 1, 3], [1, 1, 1, 2, 9], [1, 9, 2, 10, 3]]), torch.tensor([0, 1, 0])
    ops = torch.ops.detpipe
    scene = Scene(boxes, level, [], [1.0, 0.5], [], 2, [3, 4, 2, 3], 2, 1, FAST_RCNN)
    values, winner = ops.roi_max(maps, False, *scene)
    assert values.any()
    assert not values[2].any()  # off the map
    torch.library.opcheck(ops.roi_max.default, (maps, False, *scene))
    torch.library.opcheck(ops.roi_max.default, ([one.clone().requires_grad_() for one in maps], False, *scene))
    torch.library.opcheck(ops.roi_max_adjoint.default, (values, winner, maps, *scene))
    torch.library.opcheck(ops.roi_max_winners.default, (maps, winner, maps, *scene))
    assert torch.equal(ops.roi_max_winners(maps, winner, maps, *scene), values)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bins": "slow_rcnn"}, "bins must be 'fast_rcnn' or 'equal_step', got 'slow_rcnn'"),
        ({"output_size": 0}, "output_size must be one or two positive whole numbers, got 0"),
        ({"spatial_scale": -1.0}, "spatial_scale must be positive"),
        ({"features": torch.zeros(3, 4, 5)}, r"features must be \[N, C, H, W\]"),
        ({"boxes": torch.tensor([[0, 0.0, 0, 1, 1], [0, 3.0, 0, 3, 1]])}, r"box 1, .* has no area"),
        ({"boxes": torch.tensor([[0, 0.0, 0, math.nan, 1]])}, "box 0, .* is not finite"),
        ({"boxes": torch.tensor([[2, 0.0, 0, 1, 1]])}, "box 0 has image index 2"),
    ],
)
def test_bad_arguments(change, message):
    given = {"features": torch.zeros(1, 3, 4, 5), "boxes": torch.tensor([[0, 0.0, 0, 1, 1]]), "output_size": 2}
    with pytest.raises(ValueError, match=message):
        roi_max_pool(**{**given, **change})


def test_pooler_takes_its_options():
    features = {"c3": torch.randn(1, 2, 16, 16), "c4": torch.randn(1, 2, 8, 8)}
    boxes = [torch.tensor([[3.0, 5.0, 100.0, 90.0]])]
    pooled = RoIMaxPool(3, bins="equal_step")(features, boxes, {"c4": 16})
    assert torch.equal(pooled, roi_max_pool(features["c4"], boxes, 3, 1 / 16, "equal_step"))
    with pytest.raises(ValueError, match="bins must be"):
        RoIMaxPool(3, bins="mean")

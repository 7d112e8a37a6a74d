import math

import pytest
import runs
import torch
from roi_cases import backward, difference, random_case, tolerance, whole_boxes
from samples import pyramid, random_boxes
from torch.autograd import gradcheck, gradgradcheck
from torchvision.ops import roi_align as peer

from detpipe.roi_pooling import FPNLevels, MultiLevel, RoIAlign, roi_align, rotated_samples
from detpipe.roi_pooling.layouts import unchecked_values
from detpipe.roi_pooling.rotated import RotatedRoIAlign, rotated_roi_align

ROTATED = torch.tensor(
    [[0, 3.1, 2.8, 4.3, 3.9, 30.7], [1, 0.6, 4.1, 5.3, 9.2, -117.3], [1, 2.6, 1.4, 0.7, 0.73, 200.9]],
    dtype=torch.float64,
)
FOUR = {"p2": 4, "p3": 8, "p4": 16, "p5": 32}


def turned(boxes, angle=0.0):
    """``[..., 4]`` xyxy -> ``[..., 5]`` of that angle."""
    low, high = boxes[..., :2], boxes[..., 2:]
    return torch.cat(((low + high) / 2, high - low, torch.full_like(boxes[..., :1], angle)), dim=-1)


def turned_rois(rois, angle=0.0):
    return torch.cat((rois[:, :1], turned(rois[:, 1:], angle)), dim=1)


def bilinear(plane, y, x):
    """One sample of a plane, a list of rows: 0 more than a cell outside, else moved onto the border and interpolated."""
    height, width = len(plane), len(plane[0])
    if y < -1 or y > height or x < -1 or x > width:
        return 0.0
    y, x = min(max(y, 0.0), height - 1.0), min(max(x, 0.0), width - 1.0)
    total = 0.0
    for row in {int(y), min(int(y) + 1, height - 1)}:
        for column in {int(x), min(int(x) + 1, width - 1)}:
            total += (1 - abs(y - row)) * (1 - abs(x - column)) * plane[row][column]
    return total


def slow(features, rois, size, scale, ratio):
    """Rotated RoIAlign from its definition, one sample at a time."""
    size = (size, size) if isinstance(size, int) else size
    pooled = features.new_zeros(len(rois), features.shape[1], *size)
    for r, (image, *sides) in enumerate(rois.tolist()):
        cx, cy, width, height = (side * scale for side in sides[:4])
        theta = sides[4] * math.pi / 180
        steps = height / size[0], width / size[1]
        counts = [ratio if ratio > 0 else max(math.ceil(step), 1) for step in steps]
        for channel in range(features.shape[1]):
            plane = features[int(image), channel].tolist()
            for i in range(size[0]):
                for j in range(size[1]):
                    total = 0.0
                    for ky in range(counts[0]):
                        for kx in range(counts[1]):
                            yy = -height / 2 + (i + (ky + 0.5) / counts[0]) * steps[0]
                            xx = -width / 2 + (j + (kx + 0.5) / counts[1]) * steps[1]
                            y = yy * math.cos(theta) - xx * math.sin(theta) + cy - 0.5
                            x = yy * math.sin(theta) + xx * math.cos(theta) + cx - 0.5
                            total += bilinear(plane, y, x)
                    pooled[r, channel, i, j] = total / (counts[0] * counts[1])
    return pooled


@pytest.mark.parametrize("seed", range(80))
def test_equals_the_definition(seed, monkeypatch):
    features, rois, size, scale = random_case(seed, channels=(1, 2))
    monkeypatch.setattr(rotated_samples, "SAMPLES_AT_ONCE", (1, 60, rotated_samples.SAMPLES_AT_ONCE)[seed % 3])
    features, rois = features.double(), turned_rois(rois[:4].double())
    rois[:, 3:5] = rois[:, 3:5].clamp(max=40 / scale)  # the loop takes its time
    rois[:, 5] = torch.randn(len(rois)) * 200
    ratio = (seed // 2) % 4
    expected = slow(features, rois, size, scale, ratio)
    torch.testing.assert_close(
        rotated_roi_align(features, rois, size, scale, ratio), expected, **tolerance(torch.float64)
    )


@pytest.mark.parametrize("seed", range(200))
def test_without_an_angle_equals_torchvision(seed):
    features, rois, size, scale = random_case(seed)
    ratio = (seed // 2) % 4
    pooled, grad = backward(lambda leaf: rotated_roi_align(leaf, turned_rois(rois), size, scale, ratio), features)
    expected, expected_grad = backward(lambda leaf: peer(leaf, rois, size, scale, ratio, True), features)
    torch.testing.assert_close(pooled, expected, **tolerance(features.dtype))
    torch.testing.assert_close(grad, expected_grad, **tolerance(features.dtype))


@pytest.mark.parametrize("ratio", [0, 3])
def test_without_an_angle_has_the_gradients_of_roi_align(ratio):
    features = torch.randn(2, 3, 9, 8, dtype=torch.float64)
    boxes = torch.tensor([[[1.13, 0.71, 5.27, 4.9]], [[-2.1, -1.3, 3.3, 9.2]]], dtype=torch.float64, requires_grad=True)
    both = [
        torch.autograd.grad(pooled.sin().sum(), boxes)[0]
        for pooled in (
            rotated_roi_align(features, turned(boxes), 3, sampling_ratio=ratio),
            roi_align(features, boxes, 3, sampling_ratio=ratio),
        )
    ]
    torch.testing.assert_close(*both, **tolerance(torch.float64))


def test_a_quarter_turn_by_hand():
    # cells 0..15 in rows of four; a box of 4 x 2 around the middle, turned left: its left end is below, its top to the left
    ramp = torch.arange(16.0, dtype=torch.float64).reshape(1, 1, 4, 4)
    box = [torch.tensor([[2.0, 2.0, 4.0, 2.0, 90.0]])]
    pooled = rotated_roi_align(ramp, box, (2, 4))
    torch.testing.assert_close(pooled[0, 0], torch.tensor([[13.0, 9, 5, 1], [14, 10, 6, 2]]).double())
    # one bin a half of the box, one sample in its middle: one cell and a half below and above the map's middle of 7.5
    pooled = rotated_roi_align(ramp, box, (1, 2), sampling_ratio=1)
    torch.testing.assert_close(pooled.flatten(), torch.tensor([11.5, 3.5]).double())
    # an eighth of a turn: the middle of the right half lies up and to the right of the center
    pooled = rotated_roi_align(ramp, [torch.tensor([[2.0, 2.0, 4.0, 2.0, 45.0]])], (1, 2), sampling_ratio=1)
    step = math.sqrt(0.5)
    torch.testing.assert_close(pooled.flatten(), torch.tensor([7.5 + 3 * step, 7.5 - 3 * step]).double())


@pytest.mark.parametrize("ratio", [0, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_whole_and_half_and_quarter_turns(ratio, dtype):
    features, rois = torch.randn(2, 3, 9, 8, dtype=dtype), ROTATED.to(dtype)

    def pool(turn, rois=rois, features=features):
        return rotated_roi_align(features, rois + torch.tensor([0, 0, 0, 0, 0, turn], dtype=dtype), (3, 2), 1, ratio)

    limit = {"rtol": 0, "atol": 1e-5 if dtype == torch.float32 else 1e-12}
    for turn in (360.0, -720.0):
        torch.testing.assert_close(pool(turn), pool(0.0), **limit)
    torch.testing.assert_close(pool(180.0), pool(0.0).flip(-1, -2), **limit)
    # the map and the box turned together: counter-clockwise by 90 degrees, (x, y) goes to (y, width - x)
    moved = torch.stack((rois[:, 0], rois[:, 2], 8 - rois[:, 1], *rois[:, 3:].unbind(1)), dim=1)
    torch.testing.assert_close(pool(90.0, moved, features.rot90(1, (2, 3))), pool(0.0), **limit)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_huge_boxes(dtype):
    features = torch.rand(1, 2, 9, 11, dtype=dtype)
    for side in (1e3, 1e6, 1e12, 1e30):
        boxes = torch.tensor([[[4.3, 5.1, side, side / 2, 33.0], [-side, 2.0, 2 * side, side, 0.1]]]).to(dtype)
        for ratio in (0, 2):
            pooled = rotated_roi_align(features, boxes, 7, sampling_ratio=ratio)
            assert pooled.isfinite().all()
            assert pooled.amin() >= 0
            assert pooled.amax() <= 1
    # samples a cell apart count where y is in -1..9 and x in -1..11: 10 x 12 of them
    box = torch.tensor([[[4.3, 5.1, 3e4, 3e4, 33.0]]]).to(dtype)
    ones = rotated_roi_align(torch.ones_like(features), box, 1)
    torch.testing.assert_close(ones.flatten() * 9e8, torch.full((2,), 10.0 * 12).to(dtype), rtol=0.02, atol=0)


def test_tiny_boxes_and_maps():
    features = torch.rand(1, 1, 6, 6, dtype=torch.float64)
    for side in (1e-3, 1e-30, 1e-300):
        box = torch.tensor([[[2.25, 3.5, side, side, 70.0]]], dtype=torch.float64)
        expected = bilinear(features[0, 0].tolist(), 3.0, 1.75)
        torch.testing.assert_close(
            rotated_roi_align(features, box, 2).flatten(), torch.full((4,), expected).double(), rtol=0, atol=2e-3
        )
    for size in ((1, 1), (1, 5), (4, 1)):
        rows = torch.rand(2, 1, *size, dtype=torch.float64)
        for ratio in (0, 3):
            torch.testing.assert_close(
                rotated_roi_align(rows, ROTATED, 2, 0.4, ratio), slow(rows, ROTATED, 2, 0.4, ratio)
            )


@pytest.mark.parametrize("ratio", [0, 2])
def test_outside_is_zero(ratio):
    boxes = torch.tensor([[0, 100.0, 100.0, 120.0, 30.0, 40.0], [0, -50.0, 1.0, 20.0, 3.0, 10.0]])
    sides = boxes.requires_grad_()
    pooled, grad = backward(lambda leaf: rotated_roi_align(leaf, sides, 3, 1, ratio), torch.ones(1, 2, 8, 8))
    assert not pooled.any()
    assert not grad.any()
    assert not sides.grad.any()


@pytest.mark.parametrize("ratio", runs.mostly_slow([0, 2], 2))
def test_gradients_to_features_and_boxes(ratio):
    torch.manual_seed(0)
    features = torch.randn(2, 1, 6, 7, dtype=torch.float64, requires_grad=True)
    sides = ROTATED[:, 1:].clone().requires_grad_()

    def operator(features, sides):
        return rotated_roi_align(features, torch.cat((ROTATED[:, :1], sides), dim=1), (2, 1), 1.0, ratio)

    assert gradcheck(operator, (features, sides))
    assert gradgradcheck(operator, (features, sides))


def test_an_angle_is_learned_through_the_pooler():
    grid = torch.arange(32.0)
    y, x = grid[:, None] - 14.0, grid[None] - 17.0
    slope = math.radians(25)
    along, across = x * math.cos(slope) - y * math.sin(slope), x * math.sin(slope) + y * math.cos(slope)
    features = {"f": torch.exp(-(along**2) / 60 - across**2 / 10)[None, None]}
    pooler = RotatedRoIAlign(7)
    wanted = pooler(features, torch.tensor([[[17.5, 14.5, 18.0, 10.0, 25.0]]]), {"f": 1})
    angle = torch.tensor(-10.0, requires_grad=True)
    optimizer = torch.optim.Adam([angle], lr=1.0)
    for _ in range(150):
        optimizer.zero_grad()
        box = torch.cat((torch.tensor([17.5, 14.5, 18.0, 10.0]), angle[None]))[None, None]
        (pooler(features, box, {"f": 1}) - wanted).square().sum().backward()
        optimizer.step()
    assert angle.item() == pytest.approx(25.0, abs=0.1)


def test_normalized_boxes():
    features = torch.randn(2, 3, 10, 20)
    pixels = torch.tensor([[[90.0, 50.0, 130.0, 64.0, 20.0]]]).expand(2, 1, 5)
    relative = pixels / torch.tensor([320.0, 160.0, 320.0, 160.0, 1.0])
    expected = rotated_roi_align(features, pixels, 3, 1 / 16)
    torch.testing.assert_close(rotated_roi_align(features, relative, 3, normalized=True), expected)


def test_three_layouts_of_boxes_agree():
    features, boxes = torch.randn(2, 3, 9, 12), torch.stack((ROTATED[:, 1:], ROTATED[:, 1:] + 1)).float()
    rois = torch.cat((torch.tensor([0.0] * 3 + [1.0] * 3)[:, None], boxes.flatten(0, 1)), dim=1)
    flat = rotated_roi_align(features, rois, (2, 4))
    assert flat.shape == (6, 3, 2, 4)
    assert torch.equal(rotated_roi_align(features, list(boxes), (2, 4)), flat)
    assert torch.equal(rotated_roi_align(features, boxes, (2, 4)), flat.unflatten(0, (2, 3)))


@pytest.mark.parametrize("ratio", [0, 2])
@pytest.mark.parametrize("boxes", [torch.zeros(0, 6), [torch.zeros(0, 5)] * 2, torch.zeros(2, 0, 5)])
def test_no_boxes_keep_the_graph(ratio, boxes):
    leaf = torch.randn(2, 3, 4, 5, requires_grad=True)
    pooled = rotated_roi_align(leaf, boxes, (3, 2), sampling_ratio=ratio)
    lead = (2, 0) if isinstance(boxes, torch.Tensor) and boxes.ndim == 3 else (0,)
    assert pooled.shape == (*lead, 3, 3, 2)
    pooled.sum().backward()
    assert leaf.grad is not None
    assert not leaf.grad.any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sampling_ratio": 1.5}, "sampling_ratio must be .* whole number"),
        ({"output_size": 0}, "output_size must be one or two positive whole numbers, got 0"),
        ({"spatial_scale": math.nan}, "spatial_scale must be positive"),
        ({"features": torch.zeros(3, 4, 5)}, r"features must be \[N, C, H, W\]"),
        ({"boxes": torch.zeros(2, 5)}, r"boxes must be \[R, 6\] \(image, cx, cy, w, h, angle\).*got \[2, 5\]"),
        ({"boxes": [torch.zeros(2, 4)]}, r"boxes\[0\] must be \[P, 5\] \(cx, cy, w, h, angle\), got \[2, 4\]"),
        (
            {"boxes": torch.tensor([[0, 1.0, 1, 2, 2, 0], [0, 1, 1, 2, -3, 9]])},
            r"box 1, \(cx, cy, w, h, angle\) = \[1.0, 1.0, 2.0, -3.0, 9.0\], has no area",
        ),
        ({"boxes": torch.tensor([[0, 1.0, 1, 2, 2, math.inf]])}, r"box 0.*inf\], is not finite"),
        ({"boxes": torch.tensor([[0, math.nan, 1, 2, 2, 0]])}, r"box 0.*nan.*is not finite"),
        ({"boxes": torch.tensor([[0, 1, 1.0, 2, 2, 0], [3, 1, 1, 2, 2, 0]])}, "box 1 has image index 3"),
    ],
)
def test_bad_arguments(change, message):
    given = {"features": torch.zeros(1, 3, 4, 5), "boxes": torch.tensor([[0, 1.0, 1, 1, 1, 0]]), "output_size": 2}
    with pytest.raises(ValueError, match=message):
        rotated_roi_align(**{**given, **change})


@pytest.mark.parametrize("ratio", [0, 2])
def test_pooler_takes_boxes_without_an_angle(ratio):
    features, boxes = pyramid(2, FOUR, height=320, width=480), [random_boxes(9, 320, 480), random_boxes(4, 320, 480)]
    expected = RoIAlign(3, ratio)(features, boxes, FOUR)
    pooler = RotatedRoIAlign(3, ratio)
    torch.testing.assert_close(pooler(features, boxes, FOUR), expected, rtol=1e-5, atol=1e-5)
    rois = torch.cat([torch.nn.functional.pad(box, (1, 0), value=image) for image, box in enumerate(boxes)])
    torch.testing.assert_close(pooler(features, rois, FOUR), expected, rtol=1e-5, atol=1e-5)
    same = torch.stack((boxes[0], boxes[0]))
    torch.testing.assert_close(pooler(features, same, FOUR)[0], expected[:9], rtol=1e-5, atol=1e-5)


def test_pooler_takes_rotated_boxes_from_their_levels():
    features = pyramid(2, FOUR, height=640, width=960)
    boxes = torch.cat((torch.rand(40, 2) * 600, torch.rand(40, 2).square() * 900 + 4, torch.rand(40, 1) * 360), dim=1)
    rois = torch.cat((torch.randint(0, 2, (40, 1)).float(), boxes), dim=1)
    sizes = torch.cat((torch.zeros(40, 2), boxes[:, 2:4]), dim=1)
    levels = FPNLevels()(sizes, list(FOUR.values()))
    assert len(levels.unique()) == 4
    pooler = MultiLevel(RotatedRoIAlign((2, 3)), FOUR)
    pooled = pooler(features, rois)
    for row, level in enumerate(levels.tolist()):
        name, stride = list(FOUR.items())[level]
        expected = rotated_roi_align(features[name], rois[row : row + 1], (2, 3), 1 / stride, 2)
        torch.testing.assert_close(pooled[row : row + 1], expected)
    assert torch.equal(pooler(features, torch.stack((boxes, boxes)))[1], pooler(features, [boxes[:0], boxes]))


@pytest.mark.parametrize("boxes", [torch.zeros(0, 6), torch.zeros(0, 5), [torch.zeros(0, 4)] * 2, torch.zeros(2, 0, 5)])
def test_pooler_keeps_the_graph_without_boxes(boxes):
    features = {name: level.requires_grad_() for name, level in pyramid(2, FOUR).items()}
    RotatedRoIAlign(2)(features, boxes, FOUR).sum().backward()
    assert all(level.grad is not None and not level.grad.any() for level in features.values())


def test_pooler_names_what_is_wrong():
    features = {"f": torch.zeros(1, 1, 4, 4)}
    with pytest.raises(ValueError, match="sampling_ratio must be 0"):
        RotatedRoIAlign(7, sampling_ratio=-1)
    with pytest.raises(ValueError, match=r"boxes must be \[R, 6\].*got \[2, 7\]"):
        RotatedRoIAlign()(features, torch.zeros(2, 7), {"f": 1})
    with pytest.raises(ValueError, match=r"box 0, \(x1, y1, x2, y2\) = .* has no area"):
        RotatedRoIAlign()(features, torch.zeros(1, 1, 4), {"f": 1})
    with pytest.raises(ValueError, match=r"box 0, \(cx, cy, w, h, angle\) = .* has no area"):
        RotatedRoIAlign()(features, torch.zeros(1, 1, 5), {"f": 1})


@pytest.mark.parametrize("ratio", [1, 2, 4])  # with bins a power of two too, samples are exactly where they seem
def test_the_gradient_to_centers_on_cells(ratio):
    # many samples lie on cells, where the slope has a jump: the gradient is the slope to the right
    torch.manual_seed(0)
    features, corners = torch.randn(1, 2, 9, 9, dtype=torch.float64), whole_boxes(40, 0)
    boxes = turned_rois(corners).requires_grad_()
    weight = torch.rand(2, 4, 2, dtype=torch.float64)

    def pool(boxes):
        return rotated_roi_align(features, boxes, (4, 2), 1.0, ratio) * weight

    pool(boxes).sum().backward()
    for column in (1, 2):
        to_the_right = difference(pool, boxes.detach(), column, 0, 1)
        # a sample on the border of what counts steps over it
        steps = difference(pool, boxes.detach(), column, 0, 0.5)
        smooth = (to_the_right - steps).abs() < 1e-6
        assert smooth.float().mean() > 0.7
        torch.testing.assert_close(boxes.grad[smooth, column], to_the_right[smooth], rtol=1e-6, atol=1e-6)


def test_the_gradient_of_adaptive_samples_is_that_of_as_many_fixed_ones():
    torch.manual_seed(0)
    features = torch.randn(1, 2, 9, 9, dtype=torch.float64)
    for samples in (1, 2, 3):
        low, size = torch.randint(-2, 7, (20, 2)), samples * torch.tensor([2, 3])
        boxes = turned_rois(torch.cat((torch.zeros(20, 1), low, low + size), dim=1).double())
        grads = []
        for ratio in (0, samples):
            leaf = boxes.clone().requires_grad_()
            rotated_roi_align(features, leaf, (3, 2), 1.0, ratio).square().sum().backward()
            grads.append(leaf.grad)
        torch.testing.assert_close(grads[0], grads[1], rtol=1e-9, atol=1e-9)


def test_boxes_without_area_have_no_adaptive_samples_where_they_are_not_checked():
    features = torch.rand(1, 2, 9, 9) + 1
    boxes = torch.tensor([[[4.0, 4, 0, 3, 20], [4, 4, 3, 0, 20], [4, 4, -1, 2, 20], [4, 4, 3, 3, 20]]]).requires_grad_()
    with unchecked_values():
        pooled = rotated_roi_align(features, boxes, 2)
    assert not pooled[0, :3].any()
    assert pooled[0, 3].all()
    pooled.sum().backward()
    assert boxes.grad.isfinite().all()

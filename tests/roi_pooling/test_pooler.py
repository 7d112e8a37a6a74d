import math

import pytest
import torch
from samples import pyramid, random_boxes
from torch._subclasses.fake_tensor import FakeTensorMode
from torchvision.ops import roi_align, roi_pool

from detpipe.roi_pooling import (
    FPNLevels,
    MultiLevel,
    PreciseRoIPool,
    RoIAlign,
    RoIMaxPool,
    RotatedRoIAlign,
    precise_roi_pool,
)

ONE, FOUR = {"c4": 16}, {"p2": 4, "p3": 8, "p4": 16, "p5": 32}
POOLERS = [RoIAlign(3), RoIAlign((2, 4), sampling_ratio=0), RoIMaxPool((3, 2)), PreciseRoIPool(3), RotatedRoIAlign(3)]
STRIDES = [ONE, FOUR]


def operator(pooler, features, rois, stride):
    """The operator, called by hand for one level; torchvision's where it has one."""
    if isinstance(pooler, PreciseRoIPool):
        return precise_roi_pool(features, rois, pooler.output_size, 1 / stride)
    if isinstance(pooler, RoIMaxPool):
        return roi_pool(features, rois, pooler.output_size, 1 / stride)
    return roi_align(features, rois, pooler.output_size, 1 / stride, pooler.sampling_ratio, aligned=True)


@pytest.mark.parametrize("pooler", POOLERS)
@pytest.mark.parametrize("strides", STRIDES)
def test_three_layouts_of_boxes_agree(pooler, strides):
    features, boxes = (
        pyramid(2, strides, height=320, width=480),
        torch.stack([random_boxes(9, 320, 480) for _ in range(2)]),
    )
    rois = torch.cat((torch.tensor([0.0] * 9 + [1.0] * 9)[:, None], boxes.reshape(18, 4)), dim=1)
    flat = pooler(features, rois, strides)
    assert flat.shape == (18, 4, *pooler.output_size)
    assert torch.equal(pooler(features, list(boxes), strides), flat)
    assert torch.equal(pooler(features, boxes, strides), flat.reshape(2, 9, 4, *pooler.output_size))


@pytest.mark.parametrize("pooler", POOLERS)
def test_each_box_is_pooled_from_its_level(pooler):
    features = pyramid(2, FOUR, height=640, width=960)
    sizes = torch.rand(40, 2).square() * torch.tensor([900.0, 600.0]) + 4
    boxes = torch.cat((torch.rand(40, 2), torch.rand(40, 2) + sizes), dim=1)
    rois = torch.cat((torch.randint(0, 2, (40, 1)).float(), boxes), dim=1)
    levels = FPNLevels()(boxes, list(FOUR.values()))
    assert len(levels.unique()) == 4
    pooled = pooler(features, rois, FOUR)
    for row, level in enumerate(levels.tolist()):
        name, stride = list(FOUR.items())[level]
        expected = operator(pooler, features[name], rois[row : row + 1], stride)
        torch.testing.assert_close(pooled[row : row + 1], expected)


@pytest.mark.parametrize("strides", STRIDES)
def test_lists_of_unequal_length(strides):
    features = pyramid(3, strides)
    boxes = [random_boxes(4), torch.zeros(0, 4), random_boxes(2)]
    pooled = RoIAlign(3)(features, boxes, strides)
    assert pooled.shape == (6, 4, 3, 3)
    alone = RoIAlign(3)({name: level[2:] for name, level in features.items()}, [boxes[2]], strides)
    torch.testing.assert_close(pooled[4:], alone)


def test_a_worked_number():
    # cells of 2 pixels hold 0..11 in rows of 4; the box covers the cells 1, 2, 5, 6 exactly
    features = {"f": torch.arange(12.0).reshape(1, 1, 3, 4)}
    boxes = [torch.tensor([[2.0, 0.0, 6.0, 4.0]])]
    assert RoIAlign(2, sampling_ratio=1)(features, boxes, {"f": 2}).flatten().tolist() == [1, 2, 5, 6]
    assert RoIAlign(1, sampling_ratio=2)(features, boxes, {"f": 2}).flatten().tolist() == [3.5]
    # max pooling rounds the last edge outwards: cells 1 to 3 and 0 to 2
    assert RoIMaxPool(1)(features, boxes, {"f": 2}).flatten().tolist() == [11]


@pytest.mark.parametrize("pooler", POOLERS)
@pytest.mark.parametrize("strides", STRIDES)
@pytest.mark.parametrize("boxes", [torch.zeros(0, 5), [torch.zeros(0, 4)] * 2, torch.zeros(2, 0, 4)])
def test_no_boxes_keep_the_graph(pooler, strides, boxes):
    features = {name: level.requires_grad_() for name, level in pyramid(2, strides).items()}
    pooled = pooler(features, boxes, strides)
    lead = (2, 0) if isinstance(boxes, torch.Tensor) and boxes.ndim == 3 else (0,)
    assert pooled.shape == (*lead, 4, *pooler.output_size)
    pooled.sum().backward()
    assert all(level.grad is not None and not level.grad.any() for level in features.values())


@pytest.mark.parametrize("pooler", POOLERS)
def test_no_images_keep_the_graph(pooler):
    features = {name: torch.zeros(0, 4, 8, 8, requires_grad=True) for name in FOUR}
    pooler(features, torch.zeros(0, 5), FOUR).sum().backward()
    assert all(level.grad is not None for level in features.values())


@pytest.mark.parametrize("learns", [False, True])
def test_maxima_of_levels_compile_without_a_break(learns):
    two = {"p2": 4, "p3": 8}
    features, pooler = {name: level.requires_grad_(learns) for name, level in pyramid(2, two).items()}, RoIMaxPool(3)
    boxes = [random_boxes(3), random_boxes(2)]
    compiled = torch.compile(pooler, backend="aot_eager", fullgraph=True, dynamic=True)(features, boxes, two)
    plain = pooler(features, boxes, two)
    torch.testing.assert_close(compiled, plain)
    if learns:
        grads = (torch.autograd.grad(one.square().sum(), list(features.values())) for one in (compiled, plain))
        torch.testing.assert_close(*grads)


@pytest.mark.parametrize("pooler", POOLERS)
def test_shapes_are_known_without_values(pooler):
    with FakeTensorMode() as mode:
        features = {name: mode.from_tensor(level) for name, level in pyramid(2, FOUR).items()}
        pooled = pooler(features, mode.from_tensor(torch.stack([random_boxes(3)] * 2)), FOUR)
    assert pooled.shape == (2, 3, 4, *pooler.output_size)


@pytest.mark.parametrize("strides", STRIDES)
def test_gradients_are_right(strides):
    features = [
        level.double().requires_grad_() for level in pyramid(2, strides, channels=1, height=32, width=48).values()
    ]
    boxes = torch.stack([random_boxes(2, 32, 48).double() for _ in range(2)])
    boxes[0, 0] = torch.tensor([-300.0, -300.0, 300.0, 300.0])

    def pool(*levels):
        return RoIAlign(2)(dict(zip(strides, levels, strict=True)), boxes, strides)

    assert torch.autograd.gradcheck(pool, features)


@pytest.mark.parametrize("pooler", [RoIAlign(2), RoIMaxPool(2)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_features_keep_exact_coordinates(pooler, dtype):
    # bfloat16 would round 1003.3 to 1004 and 1021.9 to 1024
    ramp = torch.arange(1200.0)[None, None, None] / 1200
    features, boxes = ramp.expand(1, 1, 4, 1200).contiguous(), torch.tensor([[[1003.3, 0.0, 1021.9, 4.0]]])
    halved = features.to(dtype)
    pooled = pooler({"f": halved}, boxes, {"f": 1})
    assert pooled.dtype == dtype
    torch.testing.assert_close(pooled, pooler({"f": halved.float()}, boxes, {"f": 1}).to(dtype), rtol=0, atol=0)


def test_float64_stays_float64():
    features = {name: level.double() for name, level in pyramid(1, FOUR).items()}
    assert RoIAlign(2)(features, [random_boxes(3)], FOUR).dtype == torch.float64


def test_maps_that_do_not_agree_are_named():
    features = {"p2": torch.zeros(1, 4, 8, 8), "p3": torch.zeros(1, 5, 4, 4)}
    with pytest.raises(ValueError, match=r"features\['p3'\] is \[1, 5, 4, 4\].*must agree"):
        RoIAlign(2)(features, [random_boxes(1)], {"p2": 4, "p3": 8})
    with pytest.raises(ValueError, match=r"features\['p3'\] must be \[N, C, H, W\]"):
        RoIAlign(2)({**features, "p3": torch.zeros(4, 4)}, [random_boxes(1)], {"p2": 4, "p3": 8})


def test_levels_by_another_rule():
    features = pyramid(1, FOUR, height=320, width=480)
    boxes = [random_boxes(9, 320, 480)]
    last = RoIAlign(3, levels=lambda boxes, strides: torch.full((len(boxes),), 3))(features, boxes, FOUR)
    torch.testing.assert_close(last, RoIAlign(3)(features, boxes, {"p5": 32}))


def test_multi_level_keeps_the_strides():
    features, boxes = pyramid(2, FOUR, height=320, width=480), [random_boxes(5, 320, 480) for _ in range(2)]
    pooler = RoIAlign(3)
    assert torch.equal(MultiLevel(pooler, FOUR)(features, boxes), pooler(features, boxes, FOUR))
    for strides in ({}, {"p2": 0}, {"p2": math.nan}, [4]):
        for call in (MultiLevel, lambda pooler, strides: pooler(features, boxes, strides)):
            with pytest.raises(ValueError, match="strides must name at least one level"):
                call(pooler, strides)
    with pytest.raises(ValueError, match=r"features must be a dictionary, level name -> \[N, C, H, W\], got list"):
        pooler(list(features.values()), boxes, FOUR)


@pytest.mark.parametrize("size", [320, 640])
def test_one_call_for_all_levels(size):
    # the same number of operations, however many levels there are boxes on
    features, boxes = pyramid(1, FOUR, height=size, width=size), [random_boxes(30, size, size)]
    counts = []
    for chosen in ([8, 8, 8], [4, 100, 500]):
        sides = torch.tensor(chosen).repeat(10)[:, None].float()
        given = [torch.cat((boxes[0][:, :2] * 0, boxes[0][:, :2] * 0 + sides), dim=1)]
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as record:
            RoIAlign(3)(features, given, FOUR)
        counts.append(sum(event.count for event in record.key_averages() if event.key == "detpipe::separable"))
    assert counts == [1, 1]


def test_missing_levels_are_named():
    with pytest.raises(ValueError, match=r"features lack the levels \['p5'\]"):
        RoIAlign(2)(pyramid(1, {"p2": 4}), [random_boxes(1)], {"p2": 4, "p5": 32})


@pytest.mark.parametrize("size", [0, (3, 0), (1, 2, 3)])
def test_bad_output_size(size):
    with pytest.raises(ValueError, match="output_size must be one or two positive whole numbers"):
        RoIMaxPool(size)


@pytest.mark.parametrize("ratio", [-1, 2.5])
def test_bad_sampling_ratio(ratio):
    with pytest.raises(ValueError, match=f"sampling_ratio must be 0 .* got {ratio}"):
        RoIAlign(7, sampling_ratio=ratio)


@pytest.mark.parametrize(
    ("level", "message"),
    [
        (torch.tensor([0, 2, 0]), r"levels must tell indices in 0..1, got \[0, 2\]"),
        (torch.tensor([0, -1, 0]), r"levels must tell indices in 0..1, got \[-1, 0\]"),
        (torch.tensor([0, 1]), r"levels must tell .* integers \[3\], got \[2\] torch.int64"),
        (torch.zeros(3), r"integers \[3\], got \[3\] torch.float32"),
        ([0, 0, 0], r"integers \[3\], got list"),
    ],
)
def test_a_rule_that_tells_no_levels_is_refused(level, message):
    strides = {"p2": 4, "p3": 8}
    with pytest.raises(ValueError, match=message):
        RoIAlign(2, levels=lambda *_: level)(pyramid(1, strides), [random_boxes(3)], strides)

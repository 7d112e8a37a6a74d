import pytest
import torch
from samples import pyramid, random_boxes
from torch.autograd import gradcheck

from detpipe.roi_pooling import FPNLevels, MultiLevel, RoIPooler, roi_align
from detpipe.roi_pooling.feature_superpixels import feature_superpixels
from detpipe.roi_pooling.superpixel import superpixel_smooth
from detpipe.roi_pooling.superpixel_pooler import SuperpixelPool

ONE, FOUR = {"c4": 16}, {"p2": 4, "p3": 8, "p4": 16, "p5": 32}


def rois_of(boxes):
    return torch.cat([torch.nn.functional.pad(box, (1, 0), value=float(image)) for image, box in enumerate(boxes)])


@pytest.mark.parametrize("strides", [ONE, FOUR])
@pytest.mark.parametrize("own", [False, True])
def test_constant_maps_stay_constant(strides, own):
    features = {name: torch.full_like(level, 0.3) for name, level in pyramid(2, strides).items()}
    if own:
        features["superpixels"] = torch.randint(-1, 9, (2, 64, 96))
    pooled = SuperpixelPool(3)(features, [random_boxes(4), random_boxes(3)], strides)
    torch.testing.assert_close(pooled, torch.full((7, 4, 3, 3), 0.3))


def test_two_superpixels_give_their_means():
    # the image is cut at 3/4 of its width; each bin lies in one part, a cell from the cut at least
    values = torch.arange(64.0).view(1, 1, 8, 8)
    features = {"f": values, "superpixels": (torch.arange(8) >= 6).long().expand(1, 8, 8)}
    pooled = SuperpixelPool((1, 2))(features, [torch.tensor([[2.0, 0.0, 10.0, 16.0]])], {"f": 2})
    left, right = values[..., :6].mean(), values[..., 6:].mean()
    assert pooled.flatten().tolist() == [left, left]
    pooled = SuperpixelPool(1)(features, [torch.tensor([[13.0, 3.0, 15.0, 9.0]])], {"f": 2})
    assert pooled.item() == right
    # and such superpixels are found in a map that has two parts
    parts = torch.where(torch.arange(8) < 6, 1.0, 5.0).expand(1, 1, 8, 8)
    noise = 0.1 * torch.randn(1, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    found = SuperpixelPool(1, spacing=6, compactness=0.1)(
        {"f": parts + noise}, [torch.tensor([[0.0, 0, 6, 12]])], {"f": 2}
    )
    torch.testing.assert_close(found.item(), (parts + noise)[..., :6, :6].mean().item(), atol=0.05, rtol=0)


@pytest.mark.parametrize("settings", [{}, {"spacing": 2, "iterations": 1, "compactness": 0.1, "sampling_ratio": 0}])
def test_equals_smoothing_and_alignment(settings):
    features, boxes = pyramid(2, ONE, height=160, width=240), [random_boxes(4, 160, 240), random_boxes(2, 160, 240)]
    pooled = SuperpixelPool((3, 2), **settings)(features, boxes, ONE)
    clustering = {name: value for name, value in settings.items() if name != "sampling_ratio"}
    smooth = superpixel_smooth(features["c4"], feature_superpixels(features["c4"], **clustering))
    want = roi_align(smooth, boxes, (3, 2), 1 / 16, settings.get("sampling_ratio", 2))
    assert torch.equal(pooled, want)
    assert not torch.allclose(pooled, roi_align(features["c4"], boxes, (3, 2), 1 / 16, 2))


@pytest.mark.parametrize("size", [(64, 96), (3, 5), (50, 31)])
@pytest.mark.parametrize("strides", [ONE, FOUR])
def test_the_superpixels_of_the_image_are_used(size, strides):
    features, boxes = pyramid(2, strides), [random_boxes(3), random_boxes(2)]
    labels = torch.randint(-1, 6, (2, *size), generator=torch.Generator().manual_seed(0))
    smooth = {name: superpixel_smooth(level, labels) for name, level in features.items()}
    want = MultiLevel(SuperpixelPool(2, spacing=1, iterations=0), strides)(smooth, boxes)  # leaves maps as they are
    features["superpixels"] = labels
    torch.testing.assert_close(SuperpixelPool(2)(features, boxes, strides), want)


def test_each_box_is_pooled_from_its_level():
    features = pyramid(2, FOUR, height=320, width=480)
    corner = torch.rand(30, 2)
    boxes = [torch.cat((corner, corner + torch.rand(30, 2) * 300 + 4), dim=1) for _ in range(2)]
    rois = rois_of(boxes)
    levels = FPNLevels()(rois[:, 1:], list(FOUR.values()))
    assert len(levels.unique()) > 2
    pooler = SuperpixelPool(3)
    pooled = pooler(features, boxes, FOUR)
    for row, level in enumerate(levels.tolist()):
        name, stride = list(FOUR.items())[level]
        want = pooler({name: features[name]}, rois[row : row + 1], {name: stride})
        torch.testing.assert_close(pooled[row : row + 1], want)


def test_three_layouts_of_boxes_agree():
    features, boxes = pyramid(2, FOUR), torch.stack([random_boxes(5), random_boxes(5)])
    pooler = SuperpixelPool(3)
    assert isinstance(pooler, RoIPooler)
    flat = pooler(features, rois_of(boxes), FOUR)
    assert flat.shape == (10, 4, 3, 3)
    assert torch.equal(pooler(features, list(boxes), FOUR), flat)
    assert torch.equal(pooler(features, boxes, FOUR), flat.view(2, 5, 4, 3, 3))


@pytest.mark.parametrize("strides", [ONE, FOUR])
@pytest.mark.parametrize("boxes", [torch.zeros(0, 5), [torch.zeros(0, 4)] * 2, torch.zeros(2, 0, 4)])
def test_no_boxes_keep_the_graph(strides, boxes):
    features = {name: level.requires_grad_() for name, level in pyramid(2, strides).items()}
    pooled = SuperpixelPool(3)(features, boxes, strides)
    lead = (2, 0) if isinstance(boxes, torch.Tensor) and boxes.ndim == 3 else (0,)
    assert pooled.shape == (*lead, 4, 3, 3)
    pooled.sum().backward()
    assert all(level.grad is not None and not level.grad.any() for level in features.values())


@pytest.mark.parametrize("own", [False, True])
def test_gradients_reach_features_and_boxes(own):
    draw = torch.Generator().manual_seed(0)
    features = torch.randn(2, 1, 6, 7, generator=draw, dtype=torch.float64)
    given = {"superpixels": torch.randint(-1, 5, (2, 13, 20), generator=draw)} if own else {}
    boxes = torch.tensor([[[3.3, 2.1, 20.7, 18.9]], [[1.7, 5.3, 26.9, 22.1]]], dtype=torch.float64)
    pooler = SuperpixelPool(2, spacing=3)

    def pool(features, boxes):
        return pooler({"f": features, **given}, boxes, {"f": 4})

    leaves = features.requires_grad_(), boxes.requires_grad_()
    assert gradcheck(pool, leaves)  # steps of 1e-6 do not move a cell from one superpixel to another here
    grads = torch.autograd.grad(pool(*leaves).square().sum(), leaves)
    assert all(grad.abs().sum() > 0 for grad in grads)


@pytest.mark.slow
def test_compiles_without_a_break():
    features, boxes = pyramid(2, FOUR), torch.stack([random_boxes(3), random_boxes(3)])
    pooler = SuperpixelPool(2)
    compiled = torch.compile(pooler, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(features, boxes, FOUR), pooler(features, boxes, FOUR))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"output_size": 0}, "output_size must be one or two positive whole numbers"),
        ({"spacing": 0}, "spacing must be a whole number, 1 or larger, got 0"),
        ({"iterations": -1}, "iterations must be a whole number, 0 or larger, got -1"),
        ({"compactness": -1.0}, "compactness must be 0 or larger, and finite, got -1.0"),
        ({"sampling_ratio": -1}, r"sampling_ratio must be 0 \(adaptive\) or .* got -1"),
    ],
)
def test_bad_construction(wrong, message):
    with pytest.raises(ValueError, match=message):
        SuperpixelPool(**wrong)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (torch.zeros(2, 64, 96), r"features\['superpixels'\] must be of an integer type, got torch.float32"),
        (
            torch.zeros(3, 64, 96).long(),
            r"features\['superpixels'\] must be \[N, Hl, Wl\] with N = 2.*got \[3, 64, 96\]",
        ),
        (torch.zeros(2, 1, 64, 96).long(), r"features\['superpixels'\] must be \[N, Hl, Wl\].*got \[2, 1, 64, 96\]"),
        (
            torch.zeros(2, 64, 96, device="meta").long(),
            r"features\['superpixels'\] are on meta and the features on cpu",
        ),
        (torch.full((2, 64, 96), -3), r"labels\[0, 0, 0\] is -3: expected -1 \(ignored\)"),
    ],
)
def test_bad_superpixels(labels, message):
    features = {**pyramid(2, FOUR), "superpixels": labels}
    with pytest.raises(ValueError, match=message):
        SuperpixelPool(2)(features, [random_boxes(2)] * 2, FOUR)


def test_missing_levels_are_named():
    with pytest.raises(ValueError, match=r"features lack the levels \['p5'\]"):
        SuperpixelPool(2)(pyramid(1, {"p2": 4}), [random_boxes(1)], {"p2": 4, "p5": 32})

import math

import pytest
import torch
from samples import pyramid, random_boxes, random_target
from torch import nn

from detpipe.heads import FastRCNNHead, Glimpse, GlimpseSettings, RoISampler
from detpipe.roi_pooling import RoIAlign, RoIMaxPool
from detpipe.spatial_transformer import cell_centers

STRIDES = {"c3": 8, "c4": 16}
SIZES = [(60, 80), (64, 96)]
KINDS = ("affine", "attention", "projective", "tps")


def heads(kind, fuse="sum", pooler=None):
    """A plain head, and one with a glimpse and the same weights otherwise."""
    common = {"pooler": pooler or RoIAlign((3, 4), sampling_ratio=2), "fc": [16, 12], "sampler": RoISampler(8)}
    plain = FastRCNNHead(4, 3, STRIDES, **common)
    for layer in (plain.classifier, plain.regressor):
        nn.init.normal_(layer.weight)
    glimpsing = FastRCNNHead(4, 3, STRIDES, **common, glimpse=GlimpseSettings(kind, fuse, hidden=8))
    state = plain.state_dict()
    if fuse == "concat":
        fresh = glimpsing.shared[1].weight
        assert (fresh[:, state["shared.1.weight"].shape[1] :] == 0).all()
        state["shared.1.weight"] = torch.cat(
            (state["shared.1.weight"], torch.zeros_like(state["shared.1.weight"])), dim=1
        )
    found = glimpsing.load_state_dict(state, strict=False)
    assert not found.unexpected_keys
    assert all(key.startswith("glimpse.") for key in found.missing_keys)
    return plain, glimpsing


def inputs():
    return pyramid(2, STRIDES), torch.stack([random_boxes(6), random_boxes(6)])


@pytest.mark.parametrize(("kind", "fuse"), [*zip(KINDS, ("sum", "concat", "max", "sum"), strict=True)])
def test_the_untrained_glimpse_changes_nothing(kind, fuse):
    plain, glimpsing = heads(kind, fuse)
    features, boxes = inputs()
    for got, want in zip(glimpsing.predict(features, boxes), plain.predict(features, boxes), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
        if fuse != "max":
            torch.testing.assert_close(got, want, rtol=0, atol=1e-6)


@pytest.mark.parametrize("fuse", ["sum", "concat"])
def test_with_any_pooler(fuse):
    plain, glimpsing = heads("affine", fuse, RoIMaxPool(3))
    features, boxes = inputs()
    torch.testing.assert_close(glimpsing.predict(features, boxes)[0], plain.predict(features, boxes)[0])


@pytest.mark.parametrize("kind", KINDS)
def test_the_identity_sees_what_roi_align_sees(kind):
    features, boxes = inputs()
    glimpse = Glimpse(4, (3, 4), GlimpseSettings(kind, "concat"), samples=2)
    pooled = RoIAlign((3, 4), sampling_ratio=2)(features, boxes, STRIDES)
    both = glimpse(features, boxes, pooled, STRIDES)
    assert both.features.shape == (2, 6, 8, 3, 4)
    torch.testing.assert_close(both.features[:, :, 4:], pooled, rtol=1e-5, atol=1e-5)
    assert torch.equal(both.features[:, :, :4], pooled)


def test_a_glimpse_twice_as_wide_and_shifted_sees_that_box():
    """Attention with scale s and shift (tx, ty), in halves of the box, is RoIAlign of another box, also beyond the first."""
    features = {"c3": torch.rand(1, 4, 12, 16)}
    boxes = torch.tensor([[[40.0, 30.0, 64.0, 50.0]]])  # 24 x 20 around (52, 40)
    glimpse = Glimpse(
        4, (3, 3), GlimpseSettings("attention", "concat", max_change=5.0, max_shift=5.0, step=1.0), samples=2
    )
    wanted = torch.tensor([math.log(1.5), 0.5, -1.0])  # 36 x 30 around (58, 30)
    with torch.no_grad():  # the bound is a hyperbolic tangent
        glimpse.localization.theta.bias.copy_(5 * torch.atanh(wanted / 5))
    pooled = torch.zeros(1, 1, 4, 3, 3)
    got = glimpse(features, boxes, pooled, {"c3": 8})
    box = torch.tensor([[[40.0, 15.0, 76.0, 45.0]]])
    torch.testing.assert_close(got.features[:, :, 4:], RoIAlign(3, sampling_ratio=2)(features, box, {"c3": 8}))
    outline = glimpse.outline(got.theta, boxes)[0, 0]
    torch.testing.assert_close(torch.stack((outline.amin(0), outline.amax(0))), box.view(2, 2))
    statistics = glimpse.statistics(got.theta, torch.ones(1, 1, dtype=torch.bool))
    assert statistics["glimpse_shift"].item() == pytest.approx(math.hypot(0.5, 1.0))
    assert statistics["glimpse_scale"].item() == pytest.approx(1.5)


def test_a_quarter_turn_turns_what_is_seen():
    features = {"c3": torch.rand(1, 1, 8, 8)}
    boxes = torch.tensor([[[16.0, 16.0, 48.0, 48.0]]])
    glimpse = Glimpse(1, (4, 4), GlimpseSettings("affine", "concat", max_change=50.0, step=1.0), samples=1)
    quarter = torch.tensor([0.0, -1, 0, 1, 0, 0])  # x turns to y: content turns counter-clockwise
    limit = torch.tensor([50.0, 50, 1, 50, 50, 1])
    start = glimpse.grid.identity()
    with torch.no_grad():
        glimpse.localization.theta.bias.copy_(start + limit * torch.atanh((quarter - start) / limit))
    got = glimpse(features, boxes, torch.zeros(1, 1, 1, 4, 4), {"c3": 8}).features[0, 0, 1]
    torch.testing.assert_close(got, torch.rot90(features["c3"][0, 0, 2:6, 2:6], 1), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("kind", "fuse"), [*zip(KINDS, ("sum", "concat", "max", "sum"), strict=True)])
def test_localization_learns_and_its_place_is_logged(kind, fuse):
    _, head = heads(kind, fuse)
    features, targets = pyramid(2, STRIDES), [random_target(3), random_target(2)]
    proposals = [target["boxes"] for target in targets]
    optimizer = torch.optim.SGD(head.parameters(), lr=0.1)
    for _ in range(2):
        _, losses = head(features, proposals, SIZES, targets)
        assert sorted(losses) == ["glimpse_scale", "glimpse_shift", "loss_box_reg", "loss_classifier"]
        assert not losses["glimpse_shift"].requires_grad
        optimizer.zero_grad()
        (losses["loss_classifier"] + losses["loss_box_reg"]).backward()
        optimizer.step()
    assert losses["glimpse_scale"].item() == pytest.approx(1.0, abs=0.2)
    assert head.glimpse.localization.theta.weight.abs().sum() > 0
    _, losses = head(features, proposals, SIZES, targets)
    assert losses["glimpse_shift"] > 0


@pytest.mark.parametrize("kind", KINDS)
def test_wild_parameters_stay_bounded_and_finite(kind):
    _, head = heads(kind, "concat")
    nn.init.normal_(head.shared[1].weight)
    for value in (1e30, -1e30, math.nan, math.inf):
        with torch.no_grad():
            head.glimpse.localization.theta.bias.fill_(value)
        features, boxes = inputs()
        features = {name: level.requires_grad_() for name, level in features.items()}
        logits, deltas = head.predict(features, boxes)
        (logits.sum() + deltas.sum()).backward()
        assert logits.isfinite().all()
        assert all(level.grad.isfinite().all() for level in features.values())
        gradients = [parameter.grad for parameter in head.parameters() if parameter.grad is not None]
        assert all(gradient.isfinite().all() for gradient in gradients)
        outline = head.glimpse.outline(torch.full((2, 6, head.glimpse.grid.parameters_count), value), boxes)
        sides = (boxes[..., 2:] - boxes[..., :2])[:, :, None]
        away = (outline - (boxes[..., :2] + boxes[..., 2:])[:, :, None] / 2).abs() / sides
        assert (away < 6).all()
        head.zero_grad()


def test_glimpses_wholly_outside_the_map_are_zero():
    glimpse = Glimpse(4, (3, 3), GlimpseSettings("attention", "concat", max_shift=50.0, step=1.0), samples=2)
    with torch.no_grad():
        glimpse.localization.theta.bias.copy_(torch.tensor([0.0, 40.0, 0.0]))
    seen = glimpse(
        {"c3": torch.rand(1, 4, 4, 4)}, torch.tensor([[[0.0, 0, 16, 16]]]), torch.zeros(1, 1, 4, 3, 3), {"c3": 8}
    )
    assert (seen.features[:, :, 4:] == 0).all()


def test_points_of_the_frame_are_never_in_half_precision():
    glimpse = Glimpse(4, (3, 7), samples=2)
    points = glimpse.points.clone()
    assert torch.equal(points[: 6 * 14].unflatten(0, (6, 14)), cell_centers((6, 14)))
    for dtype, kept in (
        (torch.bfloat16, torch.float32),
        (torch.float64, torch.float64),
        (torch.float32, torch.float32),
    ):
        assert glimpse.to(dtype).points.dtype == kept
        torch.testing.assert_close(glimpse.points.float(), points, rtol=0, atol=0)
    assert "points" not in glimpse.state_dict()
    with torch.device("meta"):
        empty = Glimpse(4, (3, 7), samples=2)
    assert torch.equal(empty.to_empty(device="cpu").points, points)


def test_detections_carry_the_frame_on_request():
    _, head = heads("affine")
    head.eval().return_glimpses = True
    features, boxes = inputs()
    found, _ = head(features, list(boxes), SIZES)
    for one, rows in zip(found, boxes, strict=True):
        count = len(one["scores"])
        assert count
        assert one["glimpses"].shape == (count, 1, 32, 2)
        assert one["proposals"].shape == (count, 4)
        assert all(any(torch.equal(proposal, row) for row in rows) for proposal in one["proposals"])
        outline = one["glimpses"][:, 0]
        torch.testing.assert_close(torch.cat((outline.amin(1), outline.amax(1)), dim=1), one["proposals"])
    head.return_glimpses = False
    again, _ = head(features, list(boxes), SIZES)
    assert sorted(again[0]) == ["boxes", "labels", "scores"]
    assert torch.equal(again[0]["boxes"], found[0]["boxes"])


def test_a_plain_head_has_no_glimpses_to_return():
    plain, _ = heads("affine")
    plain.eval().return_glimpses = True
    features, boxes = inputs()
    found, _ = plain(features, list(boxes), SIZES)
    assert found[0]["glimpses"].shape[1] == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "afine"}, "glimpse kind must be one of"),
        ({"fuse": "add"}, "glimpse fuse must be one of"),
        ({"max_shift": 0.0}, "max_shift must be positive"),
        ({"max_change": math.inf}, "max_change must be positive and finite"),
        ({"hidden": 0}, "hidden must be at least 1"),
        ({"samples": 0}, "glimpse samples must be at least 1, got 0"),
    ],
)
def test_settings_that_leave_nothing_to_choose_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        GlimpseSettings(**change)


def test_a_glimpse_reads_one_point_or_more():
    with pytest.raises(ValueError, match="samples must be at least 1, got 0"):
        Glimpse(4, (3, 3), samples=0)

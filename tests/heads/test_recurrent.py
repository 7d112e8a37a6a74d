import importlib.util
import math
from functools import partial
from pathlib import Path

import pytest
import torch
from samples import pyramid, random_boxes, random_target
from torch import nn

from detpipe import boxes as box_ops
from detpipe.heads import AttentionalHead, FastRCNNHead, GlimpseSequence, Pathwise, Reinforce, RoISampler, estimators
from detpipe.heads.estimators import Episodes, GlimpseEstimator, reward
from detpipe.heads.objective import box_losses
from detpipe.heads.sampling import RoITargets
from detpipe.roi_pooling import PreciseRoIPool, RoIAlign, RoIMaxPool

STRIDES = {"c3": 8, "c4": 16}
SIZES = [(60, 80), (64, 96)]
ESTIMATORS = {
    "reinforce": lambda: Reinforce(4),
    "pathwise": lambda: Pathwise(0.1),
    "pathwise without noise": lambda: Pathwise(0),
}


def make(length=2, estimator=None, trained=True, **arguments) -> AttentionalHead:
    """A small head; trained means that recurrence, policy and outputs have left zero."""
    settings = {"pooler": RoIAlign(2), "fc": [12, 10], "sampler": RoISampler(8, 0.5), **arguments}
    head = AttentionalHead(
        4, 3, STRIDES, **settings, glimpses=GlimpseSequence(length), estimator=estimator or Reinforce(4)
    )
    if trained:
        for layer in (head.classifier, head.regressor):
            nn.init.normal_(layer.weight)
        if length > 1:
            for layer in (*head.recurrent, head.policy):
                nn.init.normal_(layer.weight, std=0.5 if layer is not head.policy else 5.0)
    return head


def inputs(objects=(3, 2)):
    targets = [random_target(count) for count in objects]
    return pyramid(len(objects), STRIDES), [torch.cat((random_boxes(9), t["boxes"])) for t in targets], targets


@pytest.mark.parametrize(("class_agnostic", "pooler"), [(False, RoIAlign(2)), (True, RoIMaxPool(2))])
def test_one_glimpse_is_fast_rcnn_to_the_bit(class_agnostic, pooler):
    common = {"pooler": pooler, "fc": [12, 10], "sampler": RoISampler(8), "class_agnostic": class_agnostic}
    plain, head = FastRCNNHead(4, 3, STRIDES, **common), make(1, **common)
    head.load_state_dict(plain.state_dict())
    features, proposals, targets = inputs()
    torch.manual_seed(3)
    _, want = plain(features, proposals, SIZES, targets)
    torch.manual_seed(3)
    _, got = head(features, proposals, SIZES, targets)
    assert sorted(got) == sorted(want)
    assert all(torch.equal(got[name], want[name]) for name in want)
    for values in (want, got):
        sum(values.values()).backward()
    for name, parameter in plain.named_parameters():
        assert torch.equal(head.get_parameter(name).grad, parameter.grad), name
    found, expected = head.eval()(features, proposals, SIZES)[0], plain.eval()(features, proposals, SIZES)[0]
    for one, other in zip(found, expected, strict=True):
        assert all(torch.equal(one[key], other[key]) for key in ("boxes", "scores", "labels"))


def test_untrained_it_is_fast_rcnn_at_any_length():
    plain = FastRCNNHead(4, 3, STRIDES, pooler=RoIAlign(2), fc=[12, 10])
    head = make(3, trained=False)
    assert set(head.load_state_dict(plain.state_dict(), strict=False).missing_keys) == {
        "recurrent.0.weight", "recurrent.1.weight", "policy.weight", "policy.bias",
    }  # fmt: skip
    features, boxes = pyramid(2, STRIDES), torch.stack([random_boxes(5)] * 2)
    for got, want in zip(head.predict(features, boxes), plain.predict(features, boxes), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_glimpses_equal_a_slow_loop():
    head = make(3).eval()
    features, boxes = pyramid(2, STRIDES), torch.stack([random_boxes(5), random_boxes(5)])
    head.return_glimpses = True
    found = head.detect(features, boxes, SIZES)
    for n in range(2):
        for p in range(5):
            maps = {name: level[n : n + 1] for name, level in features.items()}
            place, states, steps = boxes[n, p], [torch.zeros(12), torch.zeros(10)], []
            for t in range(3):
                value = head.pooler(maps, place[None, None], STRIDES).flatten()
                for k, layer in enumerate((head.shared[1], head.shared[3])):
                    states[k] = value = torch.relu(layer(value) + head.recurrent[k](states[k]))
                steps.append(value)
                mean = head.glimpses.step * head.policy(value)
                dx, dy, dw, dh = torch.tanh(mean).tolist()  # both limits are 1
                x1, y1, x2, y2 = boxes[n, p].tolist()
                w, h = x2 - x1, y2 - y1
                cx, cy, w2, h2 = (
                    (x1 + x2) / 2 + dx * w,
                    (y1 + y2) / 2 + dy * h,
                    w * math.exp(dw) / 2,
                    h * math.exp(dh) / 2,
                )
                place = torch.tensor([cx - w2, cy - h2, cx + w2, cy + h2])
                if t < 2:
                    corners = found.glimpses[n, p, t]
                    torch.testing.assert_close(corners[0], place[:2], rtol=1e-4, atol=1e-3)
                    torch.testing.assert_close(corners[2], place[2:], rtol=1e-4, atol=1e-3)
            evidence = torch.stack(steps).amax(0)
            scores = head.classifier(evidence).softmax(0)[1:]
            torch.testing.assert_close(found.scores[n, p], scores, rtol=1e-3, atol=1e-4)


def test_reward_is_probability_times_overlap():
    boxes = torch.tensor([[[0.0, 0, 10, 10], [0.0, 0, 10, 10]]])
    rois = RoITargets(
        boxes,
        torch.tensor([[2, 0]]),
        torch.tensor([[[0.0, 0, 10, 5], [0, 0, 10, 10]]]),
        torch.ones(1, 2) > 0,
        torch.tensor([[True, False]]),
    )
    logits = torch.tensor([[[0.0, 0.0, math.log(2)], [math.log(3), 0.0, 0.0]]])
    deltas = torch.zeros(1, 2, 2, 4)
    deltas[0, 0, 0] = 100  # of another class
    torch.testing.assert_close(reward(rois, logits, deltas), torch.tensor([[0.5 * 0.5, 3 / 5]]))


@pytest.mark.parametrize("length", [2, 3])
@pytest.mark.parametrize("name", ESTIMATORS)
def test_everything_learns(name, length):
    head = make(length, ESTIMATORS[name]())
    features, proposals, targets = inputs()
    features = {key: level.requires_grad_() for key, level in features.items()}
    _, losses = head(features, proposals, SIZES, targets)
    expected = ["glimpse_scale", "glimpse_shift", "loss_box_reg", "loss_classifier"]
    if name != "pathwise without noise":
        expected.append("glimpse_gradient_variance")
        assert losses["glimpse_gradient_variance"] > 0
    if name == "reinforce":
        expected += ["glimpse_return", "loss_policy"]
        assert 0 < losses["glimpse_return"] < 1
    assert sorted(losses) == sorted(expected)
    assert all(losses[key].requires_grad == key.startswith("loss_") for key in losses)
    sum(value for key, value in losses.items() if key.startswith("loss_")).backward()
    for key, parameter in head.named_parameters():
        assert parameter.grad is not None, key
        assert parameter.grad.isfinite().all(), key
        assert parameter.grad.abs().sum() > 0, key


class Guided(GlimpseEstimator):
    """A third estimator: the policy shall go where the objects are."""

    needs_box_gradient = False
    through_time = False

    def act(self, mean):
        return mean.detach()

    def losses(self, episodes):
        rois = episodes.rois
        wanted = box_ops.encode(rois.boxes, rois.rois, (1.0, 1.0, 1.0, 1.0))
        away = (torch.stack(episodes.walk.means, dim=2) - wanted[:, :, None]).square().sum((-1, -2)) * rois.foreground
        return {"loss_guide": away.sum() / rois.foreground.sum().clamp(min=1), "guided": rois.foreground.sum().float()}


@pytest.mark.parametrize("length", [1, 2, 3])
def test_a_third_estimator_trains_the_policy(length):
    head = make(length, Guided(0.0))
    features, proposals, targets = inputs()
    optimizer, history = torch.optim.Adam(head.parameters(), lr=0.02), []
    for _ in range(30):
        torch.manual_seed(0)
        _, losses = head(features, proposals, SIZES, targets)
        assert ("loss_guide" in losses) == ("guided" in losses) == (length > 1)
        if length == 1:
            return
        optimizer.zero_grad()
        losses["loss_guide"].backward()
        assert head.policy.weight.grad.abs().sum() > 0
        optimizer.step()
        history.append(losses["loss_guide"].item())
    assert history[-1] < 0.6 * history[0]


def test_an_estimator_says_what_it_learns_from():
    class Silent(GlimpseEstimator):
        def act(self, mean):
            return mean

    with pytest.raises(TypeError, match="losses"):
        Silent(0.1)


def test_where_the_policys_gradient_goes():
    """Into the layers before it, as in back-propagation through time, or nowhere."""
    features, proposals, targets = inputs()
    for through_time in (True, False):
        head = make(3, Reinforce(4, through_time=through_time))
        torch.manual_seed(0)
        _, losses = head(features, proposals, SIZES, targets)
        losses["loss_policy"].backward()
        assert head.policy.weight.grad.abs().sum() > 0
        assert head.classifier.weight.grad is None
        gradient = head.shared[1].weight.grad
        reached = gradient is not None and bool(gradient.abs().sum() > 0)
        assert reached == through_time


def scene():
    """Features that change slowly from place to place, so that returns do too."""
    torch.manual_seed(5)
    slopes, maps = torch.randn(4, 2), {}
    for name, stride in STRIDES.items():
        y, x = (torch.arange(size // stride) * stride / 60.0 for size in (96, 128))
        maps[name] = (slopes[:, 0, None, None] * y[:, None] + slopes[:, 1, None, None] * x)[None]
    features = maps
    target = {"boxes": torch.tensor([[30.0, 20.0, 70.0, 60.0]]), "labels": torch.tensor([2])}
    return features, [torch.zeros(0, 4)], [(96, 128)], [target]


@pytest.mark.slow
def test_the_policys_gradient_agrees_with_a_finite_difference_of_the_expected_return():
    """16,384 episodes with the same noise on both sides of the difference; within 6% of the gradient's length."""
    torch.manual_seed(1)
    head = make(
        3, Reinforce(16_384, 0.3, standardize=False, weight=1.0), sampler=RoISampler(1, 1.0), pooler=RoIAlign(2)
    )
    arguments = scene()

    def run() -> dict[str, torch.Tensor]:
        torch.manual_seed(11)
        return head(*arguments)[1]

    run()["loss_policy"].backward()
    got = -head.policy.bias.grad
    slopes = []
    for k in range(4):
        values = []
        for step in (0.2, -0.2):
            with torch.no_grad():
                head.policy.bias[k] += step
                values.append(run()["glimpse_return"].item())
                head.policy.bias[k] -= step
        slopes.append((values[0] - values[1]) / 0.4)
    slope = torch.tensor(slopes)
    assert slope.norm() > 1e-4
    assert (got - slope).norm() < 0.06 * slope.norm()


def test_the_pathwise_gradient_is_that_of_the_loss():
    torch.manual_seed(1)
    head = make(2, Pathwise(0.2), sampler=RoISampler(1, 1.0), pooler=PreciseRoIPool(2)).double()
    features, proposals, sizes, targets = scene()
    features = {name: level.double() for name, level in features.items()}
    targets[0]["boxes"] = targets[0]["boxes"].double()
    proposals = [proposals[0].double()]

    def run() -> torch.Tensor:
        torch.manual_seed(11)
        losses = head(features, proposals, sizes, targets)[1]
        return losses["loss_classifier"] + losses["loss_box_reg"]

    run().backward()
    for k in range(4):
        with torch.no_grad():
            values = []
            for step in (1e-2, -1e-2):
                head.policy.bias[k] += step
                values.append(run().item())
                head.policy.bias[k] -= step
        assert head.policy.bias.grad[k].item() == pytest.approx((values[0] - values[1]) / 2e-2, rel=2e-2, abs=1e-5)


def test_the_variance_of_the_pathwise_gradient_is_that_between_draws(monkeypatch):
    """Each RoI and draw on its own, as a slow loop, with the noise that the head drew."""
    torch.manual_seed(5)
    head = make(3, Pathwise(0.2))
    features, proposals, targets = inputs((1, 2))
    rois = RoISampler(8, 0.25)(proposals, targets)
    assert rois.foreground[:, : estimators.PROBE_ROIS].any()
    assert not rois.foreground[:, : estimators.PROBE_ROIS].all()
    walk = head._walk(features, rois.rois, head.estimator.act)
    drawn = []
    act = head.estimator.act

    def recording(mean):
        drawn.append(act(mean) - mean)
        return mean + drawn[-1]

    monkeypatch.setattr(head.estimator, "act", recording)
    outputs = head._outputs(walk.evidence, rois.labels.shape)
    again = partial(head._again, features, rois, walk)
    got = head.estimator.losses(Episodes(rois, walk, *outputs, 2, again, head._outputs, head))[
        "glimpse_gradient_variance"
    ]
    noise = [step.detach().unflatten(1, (estimators.PROBE_DRAWS, estimators.PROBE_ROIS)) for step in drawn]
    variances = []
    for n, r in rois.foreground[:, : estimators.PROBE_ROIS].nonzero().tolist():
        one = RoITargets(*(getattr(rois, name)[n : n + 1, r : r + 1] for name in rois.__dataclass_fields__))
        maps = {level: value[n : n + 1] for level, value in features.items()}
        gradients = []
        for draw in range(estimators.PROBE_DRAWS):
            steps = iter([step[n, draw, r] for step in noise])
            alone = head._walk(maps, one.rois, lambda mean, steps=steps: mean + next(steps))
            losses = box_losses(one, *head._outputs(alone.evidence, (1, 1)))
            gradients.append(torch.autograd.grad(sum(losses.values()), alone.means[0])[0].flatten())
        variances.append(torch.stack(gradients).var(0).mean())
    torch.testing.assert_close(got, torch.stack(variances).mean(), rtol=1e-4, atol=1e-7)


def test_the_probe_of_the_pathwise_gradient_teaches_nothing(monkeypatch):
    head = make(2, Pathwise(0.2))
    features, proposals, targets = inputs()
    gradients = []
    for probe in (Pathwise.losses, lambda *_: {}):
        monkeypatch.setattr(Pathwise, "losses", probe)
        torch.manual_seed(1)
        head.zero_grad()
        maps = {level: value.clone().requires_grad_() for level, value in features.items()}
        _, losses = head(maps, proposals, SIZES, targets)
        assert ("glimpse_gradient_variance" in losses) == (len(gradients) == 0)
        sum(value for name, value in losses.items() if name.startswith("loss_")).backward()
        gradients.append(
            [*(p.grad.clone() for p in head.parameters()), *(m.grad for m in maps.values()), torch.rand(3)]
        )
    assert all(map(torch.equal, *gradients))
    monkeypatch.undo()
    with torch.inference_mode():
        _, losses = head(features, proposals, SIZES, targets)
    assert "glimpse_gradient_variance" not in losses


@pytest.mark.parametrize("background", ["none", "probability"])
def test_which_rois_have_episodes(background):
    head = make(2, Reinforce(3, background_reward=background))
    features, proposals, targets = inputs((1, 0))
    looked = []
    pool = head.pooler.forward
    head.pooler.forward = lambda f, boxes, strides: (looked.append(tuple(boxes.shape[:2])), pool(f, boxes, strides))[1]
    _, losses = head(features, proposals, SIZES, targets)
    assert looked == [(2, 8), (2, 8), (2, 2 * (4 if background == "none" else 8))]
    assert losses["glimpse_return"] > 0


@pytest.mark.parametrize("name", ESTIMATORS)
def test_batches_without_objects_or_proposals_are_finite(name):
    for objects, count in (((0, 0), 5), ((0, 2), 0), ((0, 0), 0)):
        head = make(2, ESTIMATORS[name]())
        targets = [random_target(n) for n in objects]
        features = {key: level.requires_grad_() for key, level in pyramid(2, STRIDES).items()}
        _, losses = head(features, [random_boxes(count)] * 2, SIZES, targets)
        assert all(value.isfinite() for value in losses.values())
        sum(value for key, value in losses.items() if key.startswith("loss_")).backward()
        assert all(p.grad is None or p.grad.isfinite().all() for p in head.parameters())
        found, _ = head.eval()(features, [random_boxes(count)] * 2, SIZES)
        assert all((len(one["scores"]) > 0) == (count > 0) for one in found)


@pytest.mark.parametrize("name", ESTIMATORS)
def test_wild_policies_stay_bounded_and_finite(name):
    for value in (1e4, -1e4, 1e30):
        head = make(3, ESTIMATORS[name]())
        with torch.no_grad():
            head.policy.bias.fill_(value)
        features, proposals, targets = inputs()
        _, losses = head(features, proposals, SIZES, targets)
        assert all(value.isfinite() for value in losses.values())
        sum(losses[key] for key in losses if key.startswith("loss_")).backward()
        assert all(p.grad.isfinite().all() for p in head.parameters())


@pytest.mark.parametrize(
    ("name", "dtype"),
    [*zip(ESTIMATORS, (torch.bfloat16, torch.float16, torch.bfloat16), strict=True)],
)
def test_under_autocast(name, dtype):
    head = make(2, ESTIMATORS[name]())
    features, proposals, targets = inputs()
    with torch.autocast("cpu", dtype):
        _, losses = head(features, proposals, SIZES, targets)
    total = sum(value for key, value in losses.items() if key.startswith("loss_"))
    total.backward()
    assert total.isfinite()
    assert all(p.grad.isfinite().all() for p in head.parameters())
    assert head.policy.weight.grad.abs().sum() > 0


def test_an_image_does_not_depend_on_its_neighbors():
    head = make(2).eval()
    features, proposals, _ = inputs()
    both, _ = head(features, proposals, SIZES)
    alone, _ = head({name: level[1:] for name, level in features.items()}, proposals[1:], SIZES[1:])
    for key in ("boxes", "scores", "labels"):
        torch.testing.assert_close(alone[0][key], both[1][key], rtol=1e-4, atol=1e-4)


def test_detections_carry_the_glimpses_on_request():
    head = make(3).eval()
    head.return_glimpses = True
    features, proposals, _ = inputs()
    found, _ = head(features, proposals, SIZES)
    assert all(one["glimpses"].shape == (len(one["scores"]), 2, 4, 2) for one in found)
    widths = box_ops.area(found[0]["proposals"])
    assert (widths > 0).all()


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: GlimpseSequence(0), "glimpses.length must be at least 1"),
        (lambda: GlimpseSequence(max_shift=0.0), "max_shift must be positive"),
        (lambda: GlimpseSequence(max_log_scale=math.inf), "max_log_scale must be positive and finite"),
        (
            lambda: AttentionalHead(4, 3, STRIDES, RoIMaxPool(2), estimator=Pathwise()),
            "Pathwise needs gradients to boxes",
        ),
        (lambda: AttentionalHead(4, 0, STRIDES), "num_classes must be at least 1"),
        (lambda: AttentionalHead(4, 3, STRIDES, fc=[]), "at least one layer"),
    ],
)
def test_bad_settings_are_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_default_poolers_suit_the_estimator():
    assert isinstance(AttentionalHead(4, 3, STRIDES).pooler, RoIMaxPool)
    assert isinstance(AttentionalHead(4, 3, STRIDES, estimator=Pathwise()).pooler, RoIAlign)


@pytest.fixture(scope="module")
def toy():
    path = Path(__file__).parents[2] / "benchmarks" / "glimpse_toy.py"
    spec = importlib.util.spec_from_file_location("glimpse_toy", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arm", "low", "high"), [("T=1", 0.4, 0.6), ("T=2 reinforce", 0.9, 1.0), ("T=2 pathwise", 0.9, 1.0)]
)
def test_what_lies_beside_the_proposal_is_found_by_a_second_glimpse_only(toy, arm, low, high):
    assert low <= toy.train(arm, seed=0, steps=200)[0] <= high

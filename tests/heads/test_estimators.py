import math

import pytest
import torch

from detpipe.heads import Pathwise, Reinforce

PLAIN = {"standardize": False, "weight": 1.0}


def case(episodes=6, rois=5, actions=2):
    torch.manual_seed(0)
    means = torch.randn(episodes, rois, actions, 4, dtype=torch.float64).float()
    return (
        means,
        means + torch.randn_like(means),
        torch.rand(episodes, rois),
        torch.tensor([True, False, True, True, False]),
    )


@pytest.mark.parametrize("baseline", ["none", "roi", "batch"])
@pytest.mark.parametrize("standardize", [False, True])
def test_gradient_equals_its_closed_form(baseline, standardize):
    """1 / n sum_i R_i (a_i - mean_i) / sigma^2, averaged over the RoIs that count, by a loop."""
    means, actions, returns, counts = case()
    estimator = Reinforce(6, 0.3, baseline, standardize, weight=0.5)
    means.requires_grad_()
    found = estimator.policy_loss(means, actions, returns, counts)
    found.loss.backward()
    rows = [r for r in range(5) if counts[r]]
    advantage = {}
    everything = [returns[i, r].item() for i in range(6) for r in rows]
    for r in rows:
        for i in range(6):
            others = [returns[j, r].item() for j in range(6) if j != i]
            off = {"none": 0.0, "roi": sum(others) / 5, "batch": sum(everything) / len(everything)}[baseline]
            advantage[i, r] = returns[i, r].item() - off
    if standardize:
        spread = math.sqrt(sum(value**2 for value in advantage.values()) / len(advantage))
        advantage = {key: value / spread for key, value in advantage.items()}
    for i in range(6):
        for r in range(5):
            want = torch.zeros(2, 4)
            if counts[r]:
                want = -0.5 * advantage[i, r] * (actions[i, r] - means[i, r].detach()) / 0.3**2 / 6 / len(rows)
            torch.testing.assert_close(means.grad[i, r], want, rtol=1e-4, atol=1e-6)
    assert found.mean_return.item() == pytest.approx(sum(everything) / len(everything), rel=1e-5)


def test_a_baseline_lowers_the_variance_that_is_reported():
    means, actions, returns, counts = case(64)
    values = {
        baseline: Reinforce(64, 1.0, baseline, **PLAIN)
        .policy_loss(means, actions, 5 + returns, counts)
        .gradient_variance
        for baseline in ("none", "roi")
    }
    assert values["roi"] < 0.1 * values["none"]


def test_the_reported_variance_is_that_of_the_episodes():
    means, actions, returns, counts = case(6, actions=1)
    estimator = Reinforce(6, 0.5, "none", **PLAIN)
    got = estimator.policy_loss(means, actions, returns, counts).gradient_variance
    gradients = returns[..., None] * (actions - means)[:, :, 0] / 0.25
    assert got.item() == pytest.approx(gradients[:, counts].var(0).mean().item(), rel=1e-4)


@pytest.mark.parametrize("baseline", ["none", "roi", "batch"])
def test_equal_returns_teach_nothing_and_nothing_counts_without_rois(baseline):
    means, actions, returns, counts = case()
    means.requires_grad_()
    estimator = Reinforce(6, 0.2, baseline)
    if baseline != "none":
        estimator.policy_loss(means, actions, torch.full_like(returns, 0.5), counts).loss.backward()
        assert means.grad.abs().max() < 1e-3
        means.grad = None
    found = estimator.policy_loss(means, actions, returns, torch.zeros_like(counts))
    found.loss.backward()
    assert found.loss == 0
    assert (means.grad == 0).all()
    assert found.mean_return == 0
    assert found.gradient_variance == 0


def test_one_episode_is_finite():
    means, actions, returns, counts = case(1)
    found = Reinforce(1, 0.2, "batch").policy_loss(means, actions, returns, counts)
    assert found.loss.isfinite()
    assert found.gradient_variance == 0


def test_actions():
    mean = torch.zeros(20_000, 4, requires_grad=True)
    tried = Reinforce(sigma=0.3).act(mean)
    assert not tried.requires_grad
    assert tried.std().item() == pytest.approx(0.3, rel=0.02)
    moved = Pathwise(0.3).act(mean)
    moved.sum().backward()
    assert (mean.grad == 1).all()
    assert moved.std().item() == pytest.approx(0.3, rel=0.02)
    assert torch.equal(Pathwise(0).act(mean), mean)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sigma": 0.0}, "sigma must be positive for Reinforce"),
        ({"sigma": -1.0}, "sigma must not be negative"),
        ({"sigma": math.nan}, "sigma must not be negative or infinite, got nan"),
        ({"episodes": 0}, "episodes must be at least 1"),
        ({"episodes": 1}, "no others to be compared with"),
        ({"weight": 0.0}, "weight must be positive"),
        ({"baseline": "mean"}, "baseline must be one of"),
        ({"background_reward": "half"}, "background_reward one of"),
    ],
)
def test_settings_that_cannot_learn_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        Reinforce(**change)
    if "sigma" in change and change["sigma"] != 0:
        with pytest.raises(ValueError, match="sigma must not be negative"):
            Pathwise(change["sigma"])

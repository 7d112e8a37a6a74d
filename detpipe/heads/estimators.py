"""How a head learns where to glimpse: by trying places and rewarding good ones, or through the pooled features.

Williams, "Simple Statistical Gradient-Following Algorithms for Connectionist Reinforcement Learning" (REINFORCE), 1992; Hara,
Liu, Tuzel and Farahmand, "Attentional Network for Visual Object Detection", 2017, arXiv 1702.01478:

    grad J = 1 / n  sum_i R_i  sum_t (a_it - mean_it) x_it^T / sigma^2

What the paper leaves open is an argument, and its default was chosen here: it states neither sigma nor n, neither a baseline
nor the scale of returns, nor what a background RoI earns.

n episodes of a RoI, A = T - 1 actions of an episode, each of four numbers: the place of the next glimpse relative to the
proposal, (dx / w, dy / h, log w, log h). Shapes [...] are of RoIs.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from detpipe import boxes as box_ops
from detpipe.heads.base import ProposalHead
from detpipe.heads.objective import ClassLoss, of_label
from detpipe.heads.sampling import RoITargets
from detpipe.stages import Losses
from detpipe.support.numbers import check_numbers, check_whole
from detpipe.support.processes import count_per_rank, mean_over_ranks

Baseline = Literal["roi", "batch", "none"]
BackgroundReward = Literal["none", "probability"]
LEAST_SPREAD = 1e-4  # returns, which lie in 0..1, that differ by less are not blown up to unit spread
PROBE_ROIS, PROBE_DRAWS = 4, 4  # of an image: what the variance of the pathwise gradient is estimated from


class Walk(NamedTuple):
    """A sequence of glimpses of P RoIs of N images."""

    boxes: list[Tensor]  # T of [N, P, 4]
    means: list[Tensor]  # A of [N, P, 4]: what the policy said, float32
    actions: list[Tensor]  # A of [N, P, 4]: what was done
    states: list[list[Tensor]]  # after each glimpse, of each layer [N P, width]

    @property
    def evidence(self) -> Tensor:
        """The element-wise maximum of what the last layer said: ``[N P, width]``."""
        best = self.states[0][-1]
        for state in self.states[1:]:
            best = torch.maximum(best, state[-1])
        return best


@dataclass(frozen=True)
class Episodes:
    """What an estimator learns from: the episode of a training step that class and box are trained on, and more if it asks.

    N images, S RoIs an image, K classes.
    """

    rois: RoITargets  # S of each image
    walk: Walk  # the glimpses at them
    logits: Tensor  # [N, S, K + 1] at the end of it
    deltas: Tensor  # [N, S, B, 4]
    most_foreground: int  # RoIs of an image; they come first
    # (size, times, detached=False, with_graph=None): that many walks more at the first RoIs of each image, each RoI from its
    # state after the first glimpse; detached from features and state; with a graph for so many glimpses
    again: Callable[..., tuple[RoITargets, Walk]]
    outputs: Callable[[Tensor, Sequence[int]], tuple[Tensor, Tensor]]  # evidence, [N, S] -> logits and deltas
    head: ProposalHead  # whose objective counts


class PolicyLoss(NamedTuple):
    """What the score function gives, all scalars."""

    loss: Tensor  # its gradient is that of the expected return, negative
    mean_return: Tensor
    gradient_variance: (
        Tensor  # between episodes, of the gradient to the mean of the first action, averaged over its numbers
    )


class GlimpseEstimator(ABC):
    """How the gradient reaches the policy.

    Args:
        sigma: standard deviation of actions in training, the same for all four numbers.

    Raises:
        ValueError: ``sigma`` negative or not finite.
    """

    needs_box_gradient: bool  # whether the pooler has to pass gradients on to its boxes
    through_time: bool  # whether the gradient goes on from the policy into the layers before it

    def __init__(self, sigma: float) -> None:
        check_numbers("must not be negative or infinite", sigma=sigma)
        self.sigma = sigma

    @abstractmethod
    def act(self, mean: Tensor) -> Tensor:
        """Draw actions ``[..., 4]`` around their means, for training."""

    @abstractmethod
    def losses(self, episodes: Episodes) -> Losses:
        """Make what the policy learns from beside the losses of class and box.

        Args:
            episodes: a training step.

        Returns:
            Scalars: those named ``loss_*`` are trained on, others logged; none where the losses of class and box reach the
            policy by themselves.
        """


class Pathwise(GlimpseEstimator):
    """Learn through the pooled features: the loss is differentiated through the pooler, to the box, to the policy.

    The pooler must have a gradient to its boxes, as RoIAlign and PreciseRoIPool do, and RoIMaxPool has not.

    Args:
        sigma: standard deviation of noise on the place of a glimpse in training; 0 for none.

    Raises:
        ValueError: ``sigma`` negative or not finite.
    """

    needs_box_gradient = True
    through_time = True

    def __init__(self, sigma: float = 0.1) -> None:
        super().__init__(sigma)

    def act(self, mean: Tensor) -> Tensor:
        """Move the means by noise: the gradient goes on to them."""
        return mean + self.sigma * torch.randn_like(mean) if self.sigma else mean

    def losses(self, episodes: Episodes) -> Losses:
        """The variance between draws of the noise of a RoI's gradient to the mean of its first action, on a few RoIs.

        It needs several draws of the same step, so a few RoIs walk again, for the log alone: nothing learns from them.
        """
        if not torch.is_grad_enabled() or self.sigma == 0:
            return {}
        few = episodes.rois.first(PROBE_ROIS)
        device = few.rois.device
        with torch.random.fork_rng([device] if device.type == "cuda" else []):  # what is logged changes no later draw
            again, probe = episodes.again(PROBE_ROIS, PROBE_DRAWS, detached=True)
        if not probe.means[0].requires_grad:  # the policy is frozen
            return {}
        parts = episodes.head.box_losses(again, *episodes.outputs(probe.evidence, again.labels.shape))
        total = torch.stack(list(parts.values())).sum() * again.valid.sum()  # of RoIs: each has its own gradient
        [gradient] = torch.autograd.grad(total, probe.means[0])
        spread = gradient.unflatten(1, (PROBE_DRAWS, -1)).var(1).mean(-1)  # [N, PROBE_ROIS]
        counted = few.foreground.float()
        return {"glimpse_gradient_variance": (spread * counted).sum() / counted.sum().clamp(min=1)}


class Reinforce(GlimpseEstimator):
    """Learn by trying: n episodes of each RoI, rewarded with P(true class) x IoU of what is predicted at the last glimpse.

    Args:
        episodes: n, of each RoI that can earn a reward. The first one is also what class and box are trained on.
        sigma: standard deviation of the actions.
        baseline: what is taken off a return: "roi", the mean of the RoI's other episodes (unbiased); "batch", the mean of
            all; "none".
        standardize: divide by the root mean square of the batch, so that the step does not depend on how large
            rewards are.
        weight: factor of the loss.
        background_reward: "none", then background RoIs have no episodes; or "probability", P(background).
        through_time: let the gradient go on from the policy into recurrent layers, pooled features and backbone, as
            the paper does; else it ends at the policy.

    Raises:
        ValueError: a number outside its range, an unknown name, or a single episode with a baseline of its RoI.
    """

    needs_box_gradient = False

    def __init__(
        self,
        episodes: int = 8,
        sigma: float = 0.2,
        baseline: Baseline = "roi",
        standardize: bool = True,
        weight: float = 0.1,
        background_reward: BackgroundReward = "none",
        through_time: bool = True,
    ) -> None:
        super().__init__(sigma)
        if sigma == 0:
            raise ValueError("sigma must be positive for Reinforce: without noise nothing is tried; Pathwise takes 0")
        check_whole(episodes=episodes)
        check_numbers("must be positive and finite", weight=weight)
        if baseline not in get_args(Baseline) or background_reward not in get_args(BackgroundReward):
            raise ValueError(
                f"baseline must be one of {list(get_args(Baseline))} and background_reward one of "
                f"{list(get_args(BackgroundReward))}, got {baseline!r} and {background_reward!r}"
            )
        if episodes == 1 and baseline == "roi":
            raise ValueError("a single episode has no others to be compared with: give episodes 2, or baseline 'batch'")
        self.episodes, self.baseline, self.standardize, self.weight = episodes, baseline, standardize, weight
        self.background_reward, self.through_time = background_reward, through_time

    def act(self, mean: Tensor) -> Tensor:
        """Draw actions; they have no gradient."""
        return (mean + self.sigma * torch.randn_like(mean)).detach()

    def losses(self, episodes: Episodes) -> Losses:
        """Run the other n - 1 episodes of the RoIs that can earn a reward, and make the loss of the policy of all n."""
        rois, walk = episodes.rois, episodes.walk
        counts = rois.valid if self.background_reward == "probability" else rois.foreground
        size, classes = counts.shape[1], episodes.head.objective.classes
        if self.background_reward == "none":  # foreground comes first in a sample: the rest need not be looked at
            size = min(size, episodes.most_foreground)
        means, actions = (
            [torch.stack(values, dim=2)[:, :size]] for values in (walk.means, walk.actions)
        )  # [N, F, A, 4]
        returns, others = [reward(rois, episodes.logits, episodes.deltas, classes)[:, :size]], self.episodes - 1
        if others:
            looks = len(walk.means) if self.through_time else 0  # what follows the last action needs no gradient
            again, more = episodes.again(size, others, with_graph=looks)
            with torch.no_grad():
                earned = reward(again, *episodes.outputs(more.evidence, again.labels.shape), classes)
                returns += earned.unflatten(1, (others, size)).unbind(1)
            for kept, new in ((means, more.means), (actions, more.actions)):
                kept += torch.stack(new, dim=2).unflatten(1, (others, size)).unbind(1)
        policy = self.policy_loss(torch.stack(means), torch.stack(actions), torch.stack(returns), counts[:, :size])
        return {
            "loss_policy": policy.loss,
            "glimpse_return": policy.mean_return,
            "glimpse_gradient_variance": policy.gradient_variance,
        }

    def policy_loss(self, means: Tensor, actions: Tensor, returns: Tensor, counts: Tensor) -> PolicyLoss:
        """Make the loss whose gradient is that of the expected return.

        Args:
            means: ``[n, ..., A, 4]`` of the policy.
            actions: ``[n, ..., A, 4]`` that were taken.
            returns: ``[n, ...]`` of the episodes.
            counts: ``[...]`` bool, the RoIs that have a reward.

        Returns:
            The loss, a mean over RoIs that count and episodes, times ``weight``; 0 where no RoI counts. The mean return, and the
            variance of the gradient (0 with one episode).
        """
        means, actions, counted = means.float(), actions.detach().float(), counts.float()
        returns = returns.detach().float() * counted
        rois = count_per_rank(counted.sum())
        advantages = self._advantages(returns, counted)
        score = (actions - means) / self.sigma**2
        log_probability = -(actions - means).square().sum((-1, -2)) / (2 * self.sigma**2)
        loss = -self.weight * (advantages * log_probability * counted).mean(0).sum() / rois
        with torch.no_grad():
            gradients = advantages[..., None] * score[..., 0, :]  # [n, ..., 4]
            spread = gradients.var(0, correction=min(1, self.episodes - 1)).mean(-1)
            variance = (spread * counted).sum() / rois
        return PolicyLoss(loss, returns.mean(0).sum() / rois, variance)

    def _advantages(self, returns: Tensor, counted: Tensor) -> Tensor:
        if self.baseline == "roi":  # the mean of the others: r_i - (sum - r_i) / (n - 1)
            returns = (returns - returns.mean(0)) * (self.episodes / (self.episodes - 1))
        elif self.baseline == "batch":
            returns = (returns - mean_over_ranks(returns.mean(0).sum(), counted.sum())) * counted
        if self.standardize:
            mean_square = mean_over_ranks(returns.square().mean(0).sum(), counted.sum())
            returns = returns / mean_square.sqrt().clamp(min=LEAST_SPREAD)
        return returns


@torch.no_grad()
def reward(rois: RoITargets, logits: Tensor, deltas: Tensor, classes: ClassLoss = ClassLoss()) -> Tensor:  # noqa: B008 (frozen)
    """Compute what an episode earns at its end: P(true class) x IoU of the predicted box with the object; P alone for background.

    Args:
        rois: S RoIs of each image.
        logits: ``[N, S, K + 1]``.
        deltas: ``[N, S, B, 4]``.
        classes: what the logits are trained on.

    Returns:
        ``[N, S]`` in 0..1.
    """
    probability = classes.probabilities(logits).gather(-1, rois.labels[..., None])[..., 0]
    predicted = box_ops.decode(of_label(deltas.float(), rois.labels), rois.rois)
    overlap = box_ops.iou(predicted[..., None, :], rois.boxes[..., None, :])[..., 0, 0]
    return probability * torch.where(rois.labels > 0, overlap, torch.ones_like(overlap))

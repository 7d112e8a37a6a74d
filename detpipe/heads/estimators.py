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

import math
from abc import ABC, abstractmethod
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from detpipe.processes import common_count, common_mean

Baseline = Literal["roi", "batch", "none"]
BackgroundReward = Literal["none", "probability"]
LEAST_SPREAD = 1e-4  # returns, which lie in 0..1, that differ by less are not blown up to unit spread


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
        if not 0 <= sigma < math.inf:
            raise ValueError(f"sigma must not be negative, got {sigma}")
        self.sigma = sigma

    @abstractmethod
    def act(self, mean: Tensor) -> Tensor:
        """Draw actions ``[..., 4]`` around their means, for training."""


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
        if episodes < 1 or not 0 < weight < math.inf:
            raise ValueError(f"episodes must be at least 1 and weight positive, got {episodes=}, {weight=}")
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
        rois = common_count(counted.sum())
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
            returns = (returns - common_mean(returns.mean(0).sum(), counted.sum())) * counted
        if self.standardize:
            mean_square = common_mean(returns.square().mean(0).sum(), counted.sum())
            returns = returns / mean_square.sqrt().clamp(min=LEAST_SPREAD)
        return returns

"""The attentional head: a sequence of glimpses, each at a place that what was seen before suggests.

Hara, Liu, Tuzel and Farahmand, "Attentional Network for Visual Object Detection", 2017, arXiv 1702.01478::

    G_1 = proposal
    h_t = recurrent layers(pooled features of G_t, h_{t-1})
    G_{t+1} ~ Gaussian(policy(h_t), sigma), relative to the proposal: (dx / w, dy / h, log w, log h)
    class and box from the element-wise maximum of h_1 .. h_T

Deviations, or what the paper leaves open:
1. The recurrence is added to the fully connected layers of Fast R-CNN, h_t = relu(W x_t + b + U h_{t-1}), and U and the
   policy start at zero: the untrained head computes what Fast R-CNN does, and with T = 1 it is Fast R-CNN, weights and all.
2. Actions are bounded by a hyperbolic tangent before they become a box; the policy stays linear and Gaussian.
3. All RoIs are trained on one drawn sequence of glimpses, background too; a RoI with a reward has n - 1 sequences more, without a
   gradient, for REINFORCE (:mod:`detpipe.heads.estimators` has the estimators and what the paper does not state).
4. Boxes are regressed from the proposal, not from the last glimpse.
5. What the policy's layer says is multiplied by ``step``, .1: Adam's steps are as large for noise as for a signal, and at 1 all
   glimpses of the demo set were at their bounds after an epoch.

N images, P proposals an image, S sampled RoIs an image, K foreground classes, B = K boxes a RoI (1 if class-agnostic), T
glimpses, A = T - 1 actions, n episodes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from detpipe import boxes as box_ops
from detpipe.heads.base import Found, ProposalHead, in_parts, outlines
from detpipe.heads.estimators import Episodes, GlimpseEstimator, Reinforce, Walk
from detpipe.heads.layers import box_outputs, hidden_layers, output_layers, quality_layer
from detpipe.heads.objective import Objective
from detpipe.heads.postprocess import Postprocess
from detpipe.heads.sampling import RoISampler, RoITargets
from detpipe.roi_pooling import RoIAlign, RoIMaxPool, RoIPooler
from detpipe.spatial_transformer.base import bounded
from detpipe.stages import Losses
from detpipe.support.numbers import check_numbers, check_whole
from detpipe.types import Features, Target

PLAIN = (1.0, 1.0, 1.0, 1.0)  # actions are deltas without weights


@dataclass(frozen=True)
class GlimpseSequence:
    """How many glimpses, and how far they may be from the proposal.

    Args:
        length: T, with the proposal itself.
        max_shift: largest shift of the center along each axis, in widths and heights of the proposal.
        max_log_scale: largest absolute logarithm of the size relative to the proposal's.
        step: what the policy's layer says counts this much, which under Adam, whose steps do not know the size of a gradient,
            divides its learning rate.

    Raises:
        ValueError: ``length`` below 1, or a limit or step that is not positive and finite.
    """

    length: int = 2
    max_shift: float = 1.0
    max_log_scale: float = 1.0
    step: float = 0.1

    def __post_init__(self) -> None:
        check_whole(1, "glimpses.", length=self.length)
        limits = {"max_shift": self.max_shift, "max_log_scale": self.max_log_scale, "step": self.step}
        check_numbers("must be positive and finite", "glimpses.", **limits)

    def bounded(self, actions: Tensor) -> Tensor:
        """Keep actions ``[..., 4]`` within the limits; differentiable, and the same near zero."""
        if self.max_shift == self.max_log_scale:
            return bounded(actions, self.max_shift)
        shift, log_scale = actions.split(2, dim=-1)
        return torch.cat((bounded(shift, self.max_shift), bounded(log_scale, self.max_log_scale)), dim=-1)

    def boxes(self, actions: Tensor, rois: Tensor) -> Tensor:
        """Take actions ``[..., 4]`` to boxes ``[..., 4]``, relative to RoIs ``[..., 4]``; differentiable."""
        return box_ops.decode(self.bounded(actions), rois.to(actions.dtype), PLAIN)


class AttentionalHead(ProposalHead):
    """Classify and refine proposals after several glimpses.

    Args:
        in_channels: C of the features.
        num_classes: K, foreground classes; there is one output more for the background.
        strides: image pixels a cell of each level that the pooler shall use.
        pooler: cuts a small map out of the features for each glimpse; None is RoIMaxPool(7) as in the paper, or RoIAlign(7)
            where the estimator needs gradients to boxes.
        fc: widths of the recurrent layers; the paper has two.
        class_agnostic: one refined box for all classes instead of one for each.
        sampler: which RoIs are trained on.
        postprocess: what becomes a detection.
        glimpses: how many, and how far from the proposal.
        estimator: how the policy learns; None is :class:`Reinforce` with its defaults.
        objective: which losses.

    Raises:
        ValueError: ``num_classes`` below 1, no layer in ``fc``, no level in ``strides``, or an estimator that needs
            gradients to boxes and a pooler without.

    Example:
        >>> head = AttentionalHead(8, num_classes=2, strides={"c4": 16}, fc=[16, 16]).eval()
        >>> head.return_glimpses = True
        >>> boxes = torch.tensor([[0.0, 0.0, 32.0, 32.0]])
        >>> [found], _ = head({"c4": torch.zeros(1, 8, 4, 4)}, [boxes], [(64, 64)])
        >>> sorted(found)
        ['boxes', 'glimpses', 'labels', 'proposals', 'scores']
    """

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        strides: dict[str, int],
        pooler: RoIPooler | None = None,
        fc: Sequence[int] = (1024, 1024),
        class_agnostic: bool = False,
        sampler: RoISampler = RoISampler(),  # noqa: B008 (frozen)
        postprocess: Postprocess = Postprocess(),  # noqa: B008 (frozen)
        glimpses: GlimpseSequence = GlimpseSequence(),
        estimator: GlimpseEstimator | None = None,
        objective: Objective = Objective(),  # noqa: B008 (frozen)
    ) -> None:
        super().__init__(num_classes, strides, sampler, postprocess, objective)
        check_whole(in_channels=in_channels)
        self.class_agnostic, self.glimpses = class_agnostic, glimpses
        self.estimator = Reinforce() if estimator is None else estimator
        if pooler is None:
            pooler = RoIAlign(7) if self.estimator.needs_box_gradient else RoIMaxPool(7)
        if self.estimator.needs_box_gradient and not pooler.has_box_gradient and glimpses.length > 1:
            raise ValueError(
                f"{type(self.estimator).__name__} needs gradients to boxes, which {type(pooler).__name__} rounds; take the "
                "pooler RoIAlign or PreciseRoIPool, or the estimator Reinforce"
            )
        self.pooler = pooler
        height, width = pooler.output_size
        self.shared = hidden_layers(in_channels * height * width, fc)
        self.classifier, self.regressor = output_layers(fc[-1], num_classes, class_agnostic)
        self.quality = quality_layer(fc[-1], num_classes, class_agnostic, objective.quality)
        if glimpses.length > 1:
            self.recurrent = nn.ModuleList(nn.Linear(width, width, bias=False) for width in fc)
            self.policy = nn.Linear(fc[-1], 4)
            for parameter in (*self.recurrent.parameters(), *self.policy.parameters()):
                nn.init.zeros_(parameter)

    def predict(self, features: Features, rois: Tensor) -> tuple[Tensor, Tensor]:
        """Compute what :meth:`FastRCNNHead.predict` does, with glimpses at the means of the policy."""
        return self._outputs(self._walk(features, rois).evidence, rois.shape[:2])

    def losses(
        self, features: Features, rois: RoITargets, image_sizes: list[tuple[int, int]], targets: list[Target]
    ) -> Losses:
        """Compute ``loss_classifier`` and ``loss_box_reg``, what the estimator adds, and where it looks, to log it."""
        walk = self._walk(features, rois.rois, self.estimator.act)
        logits, deltas = self._outputs(walk.evidence, rois.labels.shape)
        losses = self.box_losses(rois, logits, deltas, quality=self._quality(walk.evidence, rois.labels.shape))
        if self.glimpses.length == 1:
            return losses
        most = max(1, int(self.sampler.rois_per_image * self.sampler.positive_fraction))
        again = partial(self._again, features, rois, walk)
        losses |= self.estimator.losses(Episodes(rois, walk, logits, deltas, most, again, self._outputs, self))
        return losses | self._statistics(walk, rois.valid)

    def detect(
        self, features: Features, boxes: Tensor, image_sizes: list[tuple[int, int]], valid: Tensor | None = None
    ) -> Found:
        """Classify and refine boxes ``[N, P, 4]``; the glimpses are those after the proposal."""
        return in_parts(partial(self._detect, features), boxes)

    def _detect(self, features: Features, boxes: Tensor) -> Found:
        walk = self._walk(features, boxes)
        logits, deltas = self._outputs(walk.evidence, boxes.shape[:2])
        glimpses = outlines(torch.stack(walk.boxes, dim=2)[:, :, 1:])
        quality = self._quality(walk.evidence, boxes.shape[:2])
        return Found.of(logits, deltas, boxes, glimpses, self.objective.classes, quality)

    def _walk(
        self,
        features: Features,
        rois: Tensor,
        act: Callable[[Tensor], Tensor] | None = None,
        first: list[Tensor] | None = None,
        with_graph: int | None = None,
    ) -> Walk:
        """Look T times, at the means or where ``act`` says; from a known state after the first glimpse on, if given.

        There is a graph for so many glimpses, if given.
        """
        walk = Walk([rois], [], [], [self._look(features, rois, None) if first is None else first])
        for step in range(1, self.glimpses.length):
            mean = self._mean(walk.states[-1][-1], rois.shape[:2])
            action = mean if act is None else act(mean)
            box = self.glimpses.boxes(action, rois)
            walk.boxes.append(box)
            walk.means.append(mean)
            walk.actions.append(action)
            with torch.set_grad_enabled(torch.is_grad_enabled() and (with_graph is None or step < with_graph)):
                walk.states.append(self._look(features, box, walk.states[-1]))
        return walk

    def _look(self, features: Features, boxes: Tensor, before: Sequence[Tensor] | None) -> list[Tensor]:
        """Pool boxes ``[N, P, 4]`` and run the layers, on top of their state before if there is one."""
        value, state = self.pooler(features, boxes, self.strides).flatten(0, 1), []
        for layer in self.shared:
            value = layer(value)
            if before is not None and isinstance(layer, nn.Linear):
                value = value + self.recurrent[len(state)](before[len(state)])
            if isinstance(layer, nn.ReLU):
                state.append(value)
        return state

    def _mean(self, hidden: Tensor, shape: Sequence[int]) -> Tensor:
        """What the policy says, in float32: ``[..., 4]``."""
        hidden = hidden if self.estimator.through_time else hidden.detach()
        return self.glimpses.step * self.policy(hidden).float().reshape(*shape, 4)

    def _outputs(self, evidence: Tensor, shape: Sequence[int]) -> tuple[Tensor, Tensor]:
        return box_outputs(self.classifier, self.regressor, evidence.unflatten(0, shape))

    def _quality(self, evidence: Tensor, shape: Sequence[int]) -> Tensor | None:
        return None if self.quality is None else self.quality(evidence).unflatten(0, shape)

    def _again(
        self,
        features: Features,
        rois: RoITargets,
        walk: Walk,
        size: int,
        times: int,
        detached: bool = False,
        with_graph: int | None = None,
    ) -> tuple[RoITargets, Walk]:
        """Walk several times more at the first RoIs of each image, from the state after their first glimpse on."""
        again = rois.first(size).repeated(times)
        of_images = [state.unflatten(0, rois.labels.shape)[:, :size] for state in walk.states[0]]
        first = [state.repeat(1, times, 1).flatten(0, 1) for state in of_images]  # as `RoITargets.repeated` puts them
        if detached:
            features = {level: value.detach() for level, value in features.items()}
            first = [state.detach() for state in first]
        return again, self._walk(features, again.rois, self.estimator.act, first, with_graph)

    @torch.no_grad()
    def _statistics(self, walk: Walk, counts: Tensor) -> Losses:
        """Where the policy looks on average; units as in :meth:`detpipe.heads.glimpse.Glimpse.statistics`."""
        means = self.glimpses.bounded(torch.stack(walk.means, dim=2))  # [N, S, A, 4]
        counted = counts[..., None].float()
        total = (counted.sum() * means.shape[2]).clamp(min=1)
        shift = (2 * means[..., :2].norm(dim=-1) * counted).sum() / total
        return {"glimpse_shift": shift, "glimpse_scale": (means[..., 2:].mean(-1) * counted).sum().div(total).exp()}

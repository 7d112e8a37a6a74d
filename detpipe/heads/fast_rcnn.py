"""The Fast R-CNN head: pool each proposal, classify it, and refine its box; on request with a second look.

Girshick, "Fast R-CNN", 2015, arXiv 1504.08083, sections 2.1 to 2.3; its losses: :mod:`detpipe.heads.objective`; the second
look: :mod:`detpipe.heads.glimpse`.

N images, P proposals an image, S sampled RoIs an image, K foreground classes, B = K boxes a RoI (1 if class-agnostic).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn

from detpipe.heads.base import Found, ProposalHead, in_parts
from detpipe.heads.glimpse import Glimpse, GlimpseSettings, Kind
from detpipe.heads.layers import (
    Convolutions,
    ResidualStage,
    box_outputs,
    hidden_layers,
    output_layers,
    quality_layer,
)
from detpipe.heads.objective import Objective
from detpipe.heads.postprocess import Postprocess
from detpipe.heads.sampling import RoISampler, RoITargets
from detpipe.roi_pooling import RoIAlign, RoIPooler
from detpipe.stages import Losses
from detpipe.support.numbers import check_whole
from detpipe.types import Features, Target


class FastRCNNHead(ProposalHead):
    """Classify and refine proposals.

    Args:
        in_channels: C of the features.
        num_classes: K, foreground classes; there is one output more for the background.
        strides: image pixels a cell of each level that the pooler shall use.
        pooler: cuts a small map out of the features for each box.
        fc: widths of the shared fully connected layers; may be empty where ``conv`` is a :class:`ResidualStage`.
        class_agnostic: one refined box for all classes instead of one for each.
        sampler: which RoIs are trained on.
        postprocess: what becomes a detection.
        glimpse: a second look at the map: a kind of transform, or :class:`GlimpseSettings`; None for none.
        conv: layers before the fully connected ones; None for none.
        extra_outputs: logits after those of the classes that take part in the softmax, and are dropped then: what weights have for
            classes that do not exist, such as the ten gaps in COCO's ids.
        objective: which losses.

    Raises:
        ValueError: ``num_classes`` below 1, no layer in ``fc``, no level in ``strides``, an unknown kind of glimpse, or a glimpse
            with ``conv``, or a negative number.

    Example:
        >>> head = FastRCNNHead(8, num_classes=2, strides={"c4": 16}, fc=[16]).eval()
        >>> boxes = torch.tensor([[0.0, 0.0, 32.0, 32.0]])
        >>> detections, losses = head({"c4": torch.zeros(1, 8, 4, 4)}, [boxes], [(64, 64)])
        >>> sorted(detections[0]), losses
        (['boxes', 'labels', 'scores'], {})
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
        glimpse: GlimpseSettings | Kind | None = None,
        conv: Convolutions | ResidualStage | None = None,
        extra_outputs: int = 0,
        objective: Objective = Objective(),  # noqa: B008 (frozen)
    ) -> None:
        super().__init__(num_classes, strides, sampler, postprocess, objective)
        check_whole(0, extra_outputs=extra_outputs)
        check_whole(in_channels=in_channels)
        if glimpse is not None and conv is not None:
            raise ValueError(f"expected no glimpse with conv, got {glimpse=}, {conv=}")
        if extra_outputs and objective.classes.kind == "seesaw":
            raise ValueError(f"the loss seesaw counts classes, and extra_outputs={extra_outputs} have none: give 0")
        self.class_agnostic = class_agnostic
        self.pooler = RoIAlign(7) if pooler is None else pooler
        height, width = self.pooler.output_size
        first, numbers = (
            ([], in_channels * height * width) if conv is None else conv.build(in_channels, (height, width))
        )
        bare = isinstance(conv, ResidualStage) and not fc
        self.shared = nn.Sequential(*first, *([nn.Flatten()] if bare else hidden_layers(numbers, fc)))
        last = numbers if bare else fc[-1]
        self.classifier, self.regressor = output_layers(last, num_classes, class_agnostic, extra_outputs)
        self.quality = quality_layer(last, num_classes, class_agnostic, objective.quality)
        self.glimpse = None
        if glimpse is not None:
            settings = glimpse if isinstance(glimpse, GlimpseSettings) else GlimpseSettings(glimpse)
            samples = settings.samples_beside(self.pooler)
            self.glimpse = Glimpse(in_channels, (height, width), settings, samples, self.pooler.levels)
            _widen(self.shared, self.glimpse.out_channels // in_channels)

    def predict(self, features: Features, rois: Tensor) -> tuple[Tensor, Tensor]:
        """Compute the outputs of the network for boxes.

        Args:
            features: level name -> ``[N, C, H_l, W_l]``.
            rois: ``[N, P, 4]`` xyxy in pixels of the batch.

        Returns:
            logits ``[N, P, K + 1]``, and those of extra outputs behind them, and deltas ``[N, P, B, 4]``.
        """
        return self._predict(features, rois)[:2]

    def losses(
        self, features: Features, rois: RoITargets, image_sizes: list[tuple[int, int]], targets: list[Target]
    ) -> Losses:
        """Compute ``loss_classifier`` and ``loss_box_reg``; with a glimpse also where it looks, to log it."""
        has_norm = any(isinstance(layer, nn.BatchNorm2d | nn.SyncBatchNorm) for layer in self.shared)
        logits, deltas, theta, quality = self._predict(features, rois.cycled() if has_norm else rois.rois)
        losses = self.box_losses(rois, logits, deltas, quality=quality)
        if self.glimpse is not None and theta is not None:
            losses |= self.glimpse.statistics(theta, rois.valid)
        return losses

    def detect(
        self, features: Features, boxes: Tensor, image_sizes: list[tuple[int, int]], valid: Tensor | None = None
    ) -> Found:
        """Classify and refine boxes ``[N, P, 4]``; the outline of the transform is the only glimpse."""
        logits, deltas, theta, quality = in_parts(partial(self._predict, features), boxes)
        outline = None
        if self.glimpse is not None and theta is not None and self.return_glimpses:
            outline = self.glimpse.outline(theta, boxes)[:, :, None]
        return Found.of(logits, deltas, boxes, outline, self.objective.classes, quality, self.num_classes)

    def _predict(self, features: Features, rois: Tensor) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        pooled, theta = self.pooler(features, rois, self.strides), None  # [N, P, C, h, w]
        if self.glimpse is not None:
            pooled, theta = self.glimpse(features, rois, pooled, self.strides)
        hidden = self.shared(pooled.flatten(0, 1)).unflatten(0, rois.shape[:2])
        quality = None if self.quality is None else self.quality(hidden)
        return *box_outputs(self.classifier, self.regressor, hidden), theta, quality


def _widen(shared: nn.Sequential, times: int) -> None:
    """Let the first linear layer read maps of more channels, with weights of zero for what is new."""
    if times > 1:
        linear = shared[1]
        assert isinstance(linear, nn.Linear)
        new = torch.zeros(linear.out_features, linear.in_features * (times - 1))
        linear.weight = nn.Parameter(torch.cat((linear.weight.detach(), new), dim=1))
        linear.in_features *= times

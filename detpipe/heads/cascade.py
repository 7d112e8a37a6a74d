"""The cascade head: stages that pool, classify and refine again, each trained on better boxes.

Cai and Vasconcelos, "Cascade R-CNN: Delving into High Quality Object Detection", 2018, arXiv 1712.00726: the deterministic
cousin of glimpsing, whose next place to look is the box found so far.

Deviations:
1. Scores are the mean of what each stage says of its own boxes; the paper lets all classifiers judge the last boxes.
2. Losses of later stages count half and a quarter, as in its authors' code; deltas are weighed twice and three times as
   much, which stands in for their smaller standard deviations (.1, .05, .033 for shifts).
3. The objects' own boxes, which the sampler adds, go through all stages.

N images, P proposals an image, S sampled RoIs an image, K foreground classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from detpipe import boxes as box_ops
from detpipe.boxes import DELTA_WEIGHTS, DeltaWeights
from detpipe.heads.base import Found, ProposalHead, in_parts, outlines, rank
from detpipe.heads.layers import box_outputs, hidden_layers, output_layers, quality_layer
from detpipe.heads.objective import Objective
from detpipe.heads.postprocess import Postprocess
from detpipe.heads.sampling import RoISampler, RoITargets
from detpipe.roi_pooling import RoIAlign, RoIPooler
from detpipe.stages import Losses
from detpipe.support.numbers import check_numbers, check_whole
from detpipe.types import Features, Target


@dataclass(frozen=True)
class LaterStages:
    """What the stages after the first one are trained on; there are as many as numbers.

    Args:
        ious: a RoI is foreground from this IoU with an object on.
        loss_weights: factors of the losses; the first stage's is 1.
        delta_factors: factors of the weights of deltas, since better boxes need smaller ones; the first stage's is 1.

    Raises:
        ValueError: unequal numbers, or one outside its range.
    """

    ious: Sequence[float] = (0.6, 0.7)
    loss_weights: Sequence[float] = (0.5, 0.25)
    delta_factors: Sequence[float] = (2.0, 3.0)

    def __post_init__(self) -> None:
        if not len(self.ious) == len(self.loss_weights) == len(self.delta_factors):
            raise ValueError(f"ious, loss_weights and delta_factors must have one number for each stage, got {self}")
        check_numbers("must be in 0..1, above 0", "later.", ious=self.ious)
        check_numbers(
            "must be positive and finite", "later.", loss_weights=self.loss_weights, delta_factors=self.delta_factors
        )


class CascadeHead(ProposalHead):
    """Classify and refine proposals in several stages, with one box for all classes.

    Args:
        in_channels: C of the features.
        num_classes: K, foreground classes; there is one output more for the background.
        strides: image pixels a cell of each level that the pooler shall use.
        pooler: cuts a small map out of the features for each box.
        fc: widths of the fully connected layers of each stage.
        later: the stages after the first; the first one is trained on what the sampler says.
        sampler: which RoIs are trained on.
        postprocess: what becomes a detection.
        objective: which losses; the quality is of the last stage's boxes.

    Raises:
        ValueError: ``num_classes`` below 1, no layer in ``fc``, or no level in ``strides``.

    Example:
        >>> head = CascadeHead(8, num_classes=2, strides={"c4": 16}, fc=[16]).eval()
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
        later: LaterStages = LaterStages(),
        sampler: RoISampler = RoISampler(),  # noqa: B008 (frozen)
        postprocess: Postprocess = Postprocess(),  # noqa: B008 (frozen)
        objective: Objective = Objective(),  # noqa: B008 (frozen)
    ) -> None:
        super().__init__(num_classes, strides, sampler, postprocess, objective)
        check_whole(in_channels=in_channels)
        self.pooler = RoIAlign(7) if pooler is None else pooler
        self.later = later
        height, width = self.pooler.output_size
        factors = (1.0, *later.delta_factors)
        width = in_channels * height * width
        self.stages = nn.ModuleList(Stage(width, fc, num_classes, _scaled(factor)) for factor in factors)
        self.quality = quality_layer(fc[-1], num_classes, True, objective.quality)

    def losses(
        self, features: Features, rois: RoITargets, image_sizes: list[tuple[int, int]], targets: list[Target]
    ) -> Losses:
        """Compute ``loss_classifier`` and ``loss_box_reg``, and those of later stages with their number behind the name."""
        losses: Losses = {}
        for index, stage in enumerate(self.stages):
            assert isinstance(stage, Stage)
            factor = 1.0 if index == 0 else self.later.loss_weights[index - 1]
            hidden = stage.hidden(self.pooler(features, rois.rois, self.strides))
            logits, deltas = stage.outputs(hidden)
            suffix, is_last = "" if index == 0 else f"_{index + 1}", index + 1 == len(self.stages)
            quality = self.quality(hidden) if is_last and self.quality is not None else None
            found = self.box_losses(rois, logits, deltas, stage.delta_weights, quality)
            losses |= {f"{name}{suffix}": factor * value for name, value in found.items()}
            if not is_last:
                boxes = _refine(deltas.detach(), rois.rois, stage.delta_weights, image_sizes)
                rois = self.sampler.rematch(boxes, rois.valid, targets, self.later.ious[index])
        return losses

    def detect(
        self, features: Features, boxes: Tensor, image_sizes: list[tuple[int, int]], valid: Tensor | None = None
    ) -> Found:
        """Classify and refine boxes ``[N, P, 4]``; the glimpses are the boxes that later stages start from."""
        return in_parts(partial(self._detect, features, image_sizes), boxes)

    def _detect(self, features: Features, image_sizes: list[tuple[int, int]], boxes: Tensor) -> Found:
        scores, seen, hidden = [], [], boxes
        for index, stage in enumerate(self.stages):
            assert isinstance(stage, Stage)
            if index:
                boxes = box_ops.fill(boxes, box_ops.valid(boxes))
                seen.append(boxes)
            hidden = stage.hidden(self.pooler(features, boxes, self.strides))
            logits, deltas = stage.outputs(hidden)
            scores.append(self.objective.classes.probabilities(logits)[..., 1:])
            boxes = _refine(deltas, boxes, stage.delta_weights, image_sizes)
        glimpses = torch.stack(seen, dim=2) if seen else boxes[:, :, None][:, :, :0]
        quality = None if self.quality is None else self.quality(hidden)
        return Found(rank(torch.stack(scores).mean(0), quality), boxes[:, :, None], outlines(glimpses))


class Stage(nn.Module):
    """One stage: layers of its own.

    Args:
        width: numbers of a pooled map, C h w.
        fc: widths of the fully connected layers.
        num_classes: K.
        delta_weights: factors of dx, dy, dw, dh.
    """

    def __init__(self, width: int, fc: Sequence[int], num_classes: int, delta_weights: DeltaWeights) -> None:
        super().__init__()
        self.shared = hidden_layers(width, fc)
        self.classifier, self.regressor = output_layers(fc[-1], num_classes, class_agnostic=True)
        self.delta_weights = delta_weights

    def hidden(self, pooled: Tensor) -> Tensor:
        """``[N, P, C, h, w]`` -> ``[N, P, width]``."""
        return self.shared(pooled.flatten(0, 1)).unflatten(0, pooled.shape[:2])

    def outputs(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """``[N, P, width]`` -> logits ``[N, P, K + 1]`` and deltas ``[N, P, 1, 4]``."""
        return box_outputs(self.classifier, self.regressor, hidden)


def _scaled(factor: float) -> DeltaWeights:
    x, y, w, h = DELTA_WEIGHTS
    return factor * x, factor * y, factor * w, factor * h


def _refine(deltas: Tensor, boxes: Tensor, weights: DeltaWeights, image_sizes: list[tuple[int, int]]) -> Tensor:
    """Apply deltas ``[N, P, 1, 4]`` to boxes ``[N, P, 4]``, and clip them to their images."""
    moved = box_ops.decode(deltas[:, :, 0].float(), boxes.float(), weights)
    return box_ops.clip(moved, *box_ops.image_sides(image_sizes, moved))

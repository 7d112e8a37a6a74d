"""From scored anchors to proposals: the best of each level, refined, clipped, and thinned by non-maximum suppression.

Ren et al., "Faster R-CNN", 2015, arXiv 1506.01497, section 3.3; suppression within each level of a pyramid, as in torchvision.

The same anchors, logits and deltas give the same proposals in the same order: best first, ties by level and rank within it.

N images, P anchors of an image, M candidates of an image.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from detpipe import boxes as box_ops
from detpipe.nms import keep_best
from detpipe.support.numbers import check_numbers, check_whole

WEIGHTS = (1.0, 1.0, 1.0, 1.0)  # of the deltas


@dataclass(frozen=True)
class ProposalSelection:
    """What becomes a proposal.

    Args:
        pre_nms_top_n: candidates of each level and image, the best: in training, and at inference.
        post_nms_top_n: proposals of an image, likewise.
        nms_iou: of two candidates of one level with a higher IoU the lower-scoring one is dropped.
        min_size: width and height of a proposal, in pixels inside the image, exceed this.
        score_threshold: the probability of an object in a proposal, the sigmoid of its logit, is at least this.
        rank_by: "logit", or "probability" in float32, in which high logits are equal, as torchvision's.
        frozen_as: which of the two numbers a frozen network uses while the rest of the detector trains.

    Raises:
        ValueError: a number outside its range.
    """

    pre_nms_top_n: tuple[int, int] = (2000, 1000)
    post_nms_top_n: tuple[int, int] = (2000, 1000)
    nms_iou: float = 0.7
    min_size: float = 0.001
    frozen_as: Literal["training", "inference"] = "inference"
    score_threshold: float = 0.0
    rank_by: Literal["logit", "probability"] = "logit"

    def __post_init__(self) -> None:
        check_whole(pre_nms_top_n=self.pre_nms_top_n, post_nms_top_n=self.post_nms_top_n)
        if len(self.pre_nms_top_n) != 2 or len(self.post_nms_top_n) != 2:
            raise ValueError(
                "pre_nms_top_n and post_nms_top_n are two numbers each, for training and for inference; got "
                f"{self.pre_nms_top_n} and {self.post_nms_top_n}"
            )
        check_numbers("must be in 0..1, above 0", nms_iou=self.nms_iou)
        check_numbers("must not be negative or infinite", min_size=self.min_size)
        check_numbers("must be in 0..1", score_threshold=self.score_threshold)
        if self.frozen_as not in ("training", "inference"):
            raise ValueError(f"frozen_as must be 'training' or 'inference', got {self.frozen_as!r}")
        if self.rank_by not in ("logit", "probability"):
            raise ValueError(f"rank_by must be 'logit' or 'probability', got {self.rank_by!r}")

    @torch.no_grad()
    def __call__(
        self,
        logits: Tensor,
        deltas: Tensor,
        anchors: Tensor,
        level_sizes: Sequence[int],
        image_sizes: Sequence[tuple[int, int]],
        training: bool,
        fill_up: bool = False,
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Select proposals.

        Args:
            logits: ``[N, P]`` float32, one level after the other.
            deltas: ``[N, P, 4]`` float32.
            anchors: ``[P, 4]`` xyxy.
            level_sizes: how many of the P anchors each level has.
            image_sizes: height and width of each image inside the batch; boxes are clipped to it.
            training: which of the two numbers count.
            fill_up: give every image as many boxes, those that are missing without an area, and look at no value: nothing waits
                for the device.

        Returns:
            N boxes ``[P_i, 4]``, best first, and their N logits ``[P_i]``.

        Raises:
            NotFiniteError: a logit or delta of a candidate is NaN or infinite; not with ``fill_up``.
        """
        boxes, scores, present = self.padded(
            logits, deltas, anchors, level_sizes, image_sizes, training, checked=not fill_up
        )
        if fill_up:
            return [*boxes.masked_fill(~present[..., None], 0.0)], [*scores]
        found = present.sum(dim=1).tolist()
        return (
            [row[:number] for row, number in zip(boxes, found, strict=True)],
            [row[:number] for row, number in zip(scores, found, strict=True)],
        )

    def padded(
        self,
        logits: Tensor,
        deltas: Tensor,
        anchors: Tensor,
        level_sizes: Sequence[int],
        image_sizes: Sequence[tuple[int, int]],
        training: bool,
        checked: bool = False,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Select proposals, as many for each image, by operations that do not depend on how many there are.

        Args:
            logits: as of a call.
            deltas: as of a call.
            anchors: as of a call.
            level_sizes: as of a call.
            image_sizes: as of a call, or one size for all.
            training: as of a call.
            checked: look at the values.

        Returns:
            boxes ``[N, P, 4]``, best first, their logits ``[N, P]``, and ``[N, P]`` bool, False for what is no proposal.

        Raises:
            NotFiniteError: as of a call, where ``checked``.
        """
        phase = 0 if training else 1
        starts = [0, *accumulate(level_sizes)]
        best = [self._best(level, phase) for level in logits.split(list(level_sizes), dim=1)]
        index = torch.cat([found.indices + start for found, start in zip(best, starts, strict=False)], dim=1)
        scores = torch.cat([found.values for found in best], dim=1)  # [N, M]
        deltas = box_ops.take(deltas, index)
        if checked:  # in a graph, what comes after the anchors of a level fills it up
            own = [found.values[:, :size] for found, size in zip(best, level_sizes, strict=True)]
            _refuse_non_finite(torch.cat(own, dim=1), deltas)
        boxes = box_ops.decode(deltas, anchors[index], WEIGHTS)
        boxes = box_ops.clip(boxes, *box_ops.image_sides(image_sizes, boxes))
        keep = box_ops.valid(boxes, self.min_size)
        if torch.compiler.is_compiling():
            keep &= scores > -torch.inf
        if self.score_threshold:
            keep &= scores.sigmoid() >= self.score_threshold
        keep &= self._survivors(boxes * keep[..., None], [found.values.shape[1] for found in best])
        ranks = scores.sigmoid() if self.rank_by == "probability" else scores
        order = ranks.masked_fill(~keep, -torch.inf).argsort(dim=1, descending=True, stable=True)
        order = order[:, : self.post_nms_top_n[phase]]
        return box_ops.take(boxes, order), scores.gather(1, order), keep.gather(1, order)

    def _best(self, logits: Tensor, phase: int) -> Candidates:
        """The best anchors of a level, ``[N, P]`` logits; in a graph, where P may be a symbol, always as many: others are -inf."""
        count, size = self.pre_nms_top_n[phase], logits.shape[1]
        if not torch.compiler.is_compiling():
            return Candidates(*logits.topk(min(count, size)))
        values, indices = pad(logits, (0, count), value=-torch.inf).topk(count)
        return Candidates(values, indices.clamp(max=size - 1))

    def _survivors(self, boxes: Tensor, counts: list[int]) -> Tensor:
        """Suppress within each image and level, best first: ``[N, M]`` bool. Boxes of area 0 neither suppress nor matter."""
        if torch.compiler.is_compiling():
            return torch.cat([keep_best(level, self.nms_iou) for level in boxes.split(counts, dim=1)], dim=1)
        missing = [max(counts) - count for count in counts]
        levels = [
            pad(level, (0, 0, 0, more)) if more else level
            for level, more in zip(boxes.split(counts, dim=1), missing, strict=True)
        ]
        kept = keep_best(torch.stack(levels, dim=1).flatten(0, 1), self.nms_iou).unflatten(0, (-1, len(counts)))
        return torch.cat([kept[:, level, :count] for level, count in enumerate(counts)], dim=1)


class Candidates(NamedTuple):
    """Anchors of a level."""

    values: Tensor  # [N, M] logits
    indices: Tensor  # [N, M] int64 into the anchors of the level


class NotFiniteError(ValueError):
    """A score or a box is NaN or infinite.

    Args:
        image: which of the batch, from 0 on.
        what: ``"score"`` or ``"box"``.
        value: NaN or infinite.
    """

    def __init__(self, image: int, what: str, value: float) -> None:
        super().__init__(f"image {image}: a {what} is {value}")
        self.image, self.what, self.value = image, what, value


def _refuse_non_finite(scores: Tensor, deltas: Tensor) -> None:
    if torch.isfinite(scores).all() & torch.isfinite(deltas).all():
        return
    for what, values in (("score", scores), ("box", deltas)):
        wrong = ~torch.isfinite(values.flatten(1))
        if wrong.any():
            image = int(wrong.any(dim=1).nonzero()[0])
            raise NotFiniteError(image, what, values[image].flatten()[wrong[image]][0].item())

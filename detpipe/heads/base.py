"""What every head of ours shares: train on sampled proposals, or detect among all and tell where it looked.

N images, P proposals an image, S sampled RoIs an image, K foreground classes, B = K boxes a RoI (1 if class-agnostic), T
glimpses of a RoI, M points of the outline of one, D detections of an image.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from detpipe import boxes as box_ops
from detpipe import matching
from detpipe.boxes import DELTA_WEIGHTS, DeltaWeights
from detpipe.heads.objective import ClassLoss, Objective, box_losses
from detpipe.heads.postprocess import Postprocess
from detpipe.heads.sampling import RoISampler, RoITargets
from detpipe.heads.suppression import Kept
from detpipe.stages import Losses, RoIHead, check_tensor
from detpipe.support.numbers import check_whole
from detpipe.types import Detection, Features, GlimpsedDetection, Target

ROIS_PER_PASS = 4096  # of :func:`in_parts`; bounds the memory of pooled features
Results = TypeVar("Results")


class Found(NamedTuple):
    """What a head says about boxes."""

    scores: Tensor  # [N, P, K] in 0..1, of the foreground classes
    boxes: Tensor  # [N, P, B, 4] xyxy
    # [N, P, T, M, 2] (x, y): outlines of where it looked beside the proposal, in order; None for a head that looks nowhere else
    glimpses: Tensor | None = None

    @classmethod
    def of(
        cls,
        logits: Tensor,
        deltas: Tensor,
        boxes: Tensor,
        glimpses: Tensor | None = None,
        classes: ClassLoss = ClassLoss(),  # noqa: B008 (frozen)
        quality: Tensor | None = None,
        num_classes: int | None = None,
    ) -> Found:
        """Turn outputs of a network into scores and boxes, in float32.

        Args:
            logits: ``[N, P, K + 1]``, the background first.
            deltas: ``[N, P, B, 4]``.
            boxes: ``[N, P, 4]`` xyxy, what the deltas refine.
            glimpses: where the head looked.
            classes: what the logits are trained on.
            quality: ``[N, P, B]`` logits of the IoU of the refined boxes, which scores are multiplied with.
            num_classes: K, where there are more logits than K + 1, which are dropped after the softmax; None for all.
        """
        refined = box_ops.decode(deltas.float(), boxes[:, :, None].float())
        scores = classes.probabilities(logits)[..., 1:][..., :num_classes]
        return cls(rank(scores, quality), refined, glimpses)


def rank(scores: Tensor, quality: Tensor | None) -> Tensor:
    """Multiply scores ``[N, P, K]`` with the IoU that logits ``[N, P, B]`` predict, if there are any."""
    return scores if quality is None else scores * quality.float().sigmoid()


class ProposalHead(RoIHead, ABC):
    """A head that is trained on sampled proposals, and classifies and refines all of them to detect.

    A subclass has :meth:`losses` and :meth:`detect`; :mod:`detpipe.heads.toolkit` has what they are written with.

    Args:
        num_classes: K, foreground classes; there is one output more for the background.
        strides: image pixels a cell of each level that the pooler shall use.
        sampler: which RoIs are trained on.
        postprocess: what becomes a detection.
        objective: which losses.

    Attributes:
        classes_seen: ``[K]``, how many RoIs of each class were trained on; None unless the objective needs it.
        return_glimpses: whether detections are :class:`detpipe.types.GlimpsedDetection`, with the proposal that each came
            from and where the head looked; False unless set.

    Raises:
        ValueError: ``num_classes`` below 1, or no level in ``strides``.
    """

    drops_empty = True

    def __init__(
        self,
        num_classes: int,
        strides: dict[str, int],
        sampler: RoISampler = RoISampler(),  # noqa: B008 (frozen)
        postprocess: Postprocess = Postprocess(),  # noqa: B008 (frozen)
        objective: Objective = Objective(),  # noqa: B008 (frozen)
    ) -> None:
        super().__init__()
        check_whole(num_classes=num_classes)
        if not isinstance(strides, dict) or not strides:
            raise ValueError(f"expected a dict with at least one level in strides, got {strides=}")
        self.num_classes, self.strides = num_classes, dict(strides)
        self.sampler, self.postprocess, self.objective = sampler, postprocess, objective
        self.classes_seen: Tensor | None
        counts = torch.zeros(num_classes, dtype=torch.int64) if objective.classes.kind == "seesaw" else None
        self.register_buffer("classes_seen", counts)
        self.return_glimpses = False

    @abstractmethod
    def losses(
        self, features: Features, rois: RoITargets, image_sizes: list[tuple[int, int]], targets: list[Target]
    ) -> Losses:
        """Compute the losses on sampled RoIs.

        Args:
            features: level name -> ``[N, C, H_l, W_l]``.
            rois: S RoIs of each image; where ``rois.valid`` is False, a unit box stands in that must not count.
            image_sizes: height and width of each image inside the padded batch.
            targets: N targets.

        Returns:
            Scalars: those named ``loss_*`` are trained on, others are numbers to log, without gradient.
        """

    def box_losses(
        self,
        rois: RoITargets,
        logits: Tensor,
        deltas: Tensor,
        weights: DeltaWeights = DELTA_WEIGHTS,
        quality: Tensor | None = None,
    ) -> Losses:
        """Compute the losses that the objective names; arguments as of :func:`detpipe.heads.objective.box_losses`."""
        return box_losses(rois, logits, deltas, weights, self.objective, self.classes_seen, quality)

    @abstractmethod
    def detect(self, features: Features, boxes: Tensor, image_sizes: list[tuple[int, int]], valid: Tensor) -> Found:
        """Classify and refine boxes.

        All boxes of an image come in one call, so that they may look at each other; :func:`in_parts` keeps the memory of what
        is pooled for each box bounded.

        Args:
            features: level name -> ``[N, C, H_l, W_l]``.
            boxes: ``[N, P, 4]`` xyxy in pixels of the batch, finite and with an area.
            image_sizes: height and width of each image inside the padded batch.
            valid: ``[N, P]`` bool, False where a unit box stands in, since an image has fewer than P. What is said about it is
                dropped; what is said about others must not depend on it. An image may have no valid box.

        Returns:
            Scores and boxes for all P.
        """

    def forward(
        self,
        features: Features,
        proposals: list[Tensor],
        image_sizes: list[tuple[int, int]],
        targets: list[Target] | None = None,
    ) -> tuple[list[Detection], Losses]:
        """Train on sampled proposals, or detect among all.

        Args:
            features: level name -> ``[N, C, H_l, W_l]``.
            proposals: N tensors ``[P_i, 4]`` xyxy in pixels of the batch.
            image_sizes: height and width of each image inside the padded batch.
            targets: N targets with ``boxes`` and ``labels``; needed in training.

        Returns:
            In training ``[]`` and the losses; else N detections and ``{}``.

        Raises:
            ValueError: training without targets, or with a label outside 1..K, as far as they lie on a CPU; or a subclass found
                what has another shape than :class:`Found` says.
        """
        if self.training:
            if targets is None:
                raise ValueError("the head is in training mode and needs targets; call eval() to detect")
            matching.check_objects(targets, self.num_classes)
            rois = self.sampler(proposals, targets)
            if self.classes_seen is not None and torch.is_grad_enabled():  # not in validation
                index = (rois.labels - 1).clamp(min=0).flatten()
                self.classes_seen.index_add_(0, index, rois.foreground.flatten().to(torch.int64))
            return [], self.losses(features, rois, image_sizes, targets)
        boxes, valid, found = self._found(features, *matching.pad(proposals), image_sizes)
        detections, rows = self.postprocess.select(found.scores, found.boxes, valid, image_sizes)
        if not self.return_glimpses:
            return detections, {}
        glimpses = boxes.new_zeros((*valid.shape, 0, 4, 2)) if found.glimpses is None else found.glimpses
        glimpsed = [
            GlimpsedDetection(**detection, proposals=boxes[image, kept], glimpses=glimpses[image, kept])
            for image, (detection, kept) in enumerate(zip(detections, rows, strict=True))
        ]
        return list[Detection](glimpsed), {}

    def detect_padded(
        self,
        features: Features,
        boxes: Tensor,
        present: Tensor,
        image_sizes: list[tuple[int, int]],
        threshold: Tensor | float | None = None,
    ) -> tuple[Kept, Tensor]:
        """Detect as tensors of fixed size: what a call does, for compiled and exported graphs.

        Args:
            features: level name -> ``[N, C, H_l, W_l]``.
            boxes: ``[N, P, 4]`` xyxy in pixels of the batch.
            present: ``[N, P]`` bool, False where an image has fewer than P.
            image_sizes: height and width of each image inside the padded batch, or one size for all.
            threshold: of scores, in the place of that of ``postprocess``.

        Returns:
            What :meth:`detpipe.heads.postprocess.Postprocess.padded` returns.
        """
        _, valid, found = self._found(features, boxes, present, image_sizes)
        return self.postprocess.padded(found.scores, found.boxes, valid, image_sizes, threshold)

    def _found(
        self, features: Features, boxes: Tensor, present: Tensor, image_sizes: list[tuple[int, int]]
    ) -> tuple[Tensor, Tensor, Found]:
        valid = present & box_ops.valid(boxes)
        boxes = box_ops.fill(boxes, valid)
        found = self.detect(features, boxes, image_sizes, valid)
        self._check(found, *valid.shape)
        return boxes, valid, found

    def _check(self, found: object, images: int, proposals: int) -> None:
        if not isinstance(found, Found):
            raise ValueError(
                f"{type(self).__name__}.detect must return Found(scores, boxes), got {type(found).__name__}"
            )
        where, classes = f"{type(self).__name__}.detect", self.num_classes
        check_tensor(where, "scores", found.scores, "N, P, K", (images, proposals, classes))
        count = 1 if getattr(found.boxes, "shape", ())[2:3] == (1,) else classes
        check_tensor(where, "boxes", found.boxes, "N, P, K or 1, 4", (images, proposals, count, 4))


def in_parts(function: Callable[[Tensor], Results], boxes: Tensor) -> Results:
    """Call a function on boxes, a bounded number at a time: what it keeps of one part, it need not keep of all.

    Args:
        function: ``[N, p, 4]`` -> a tensor ``[N, p, ...]``, or a tuple of such and None; what it says about a box must not depend
            on the others.
        boxes: ``[N, P, 4]``.

    Returns:
        As the function does, for all P.

    Example:
        >>> in_parts(lambda part: part.sum(-1), torch.ones(2, 3, 4)).shape
        torch.Size([2, 3])
    """
    if torch.compiler.is_compiling():  # a number of parts that depends on the boxes would be another graph for each
        return function(boxes)
    size = max(1, ROIS_PER_PASS // max(1, len(boxes)))
    parts = [function(part) for part in boxes.split(size, dim=1)]
    return parts[0] if len(parts) == 1 else _joined(parts)


def _joined(parts: Sequence[Any]) -> Any:
    first = parts[0]
    if first is None or isinstance(first, Tensor):
        return None if first is None else torch.cat(list(parts), dim=1)
    joined = [_joined(values) for values in zip(*parts, strict=True)]
    return type(first)(*joined) if hasattr(first, "_fields") else tuple(joined)


def outlines(boxes: Tensor) -> Tensor:
    """Draw boxes as outlines of four corners, clockwise from the upper left.

    Args:
        boxes: ``[..., 4]`` xyxy.

    Returns:
        ``[..., 4, 2]`` (x, y).
    """
    x1, y1, x2, y2 = boxes.unbind(-1)
    return torch.stack((x1, y1, x2, y1, x2, y2, x1, y2), dim=-1).unflatten(-1, (4, 2))

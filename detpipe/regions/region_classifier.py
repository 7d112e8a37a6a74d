"""Given boxes, name what is in each, in one pass over the image and with what lies around it: RoI pooling as attention.

The use beside detection that RoI pooling is good for: the boxes come from people, a tracker or another detector. Pooling:
Girshick, "Fast R-CNN", 2015, arXiv 1504.08083. Context as larger boxes around a box: Gidaris and Komodakis, "Object detection
via a multi-region and semantic segmentation-aware CNN model", 2015, arXiv 1505.01749.

Deviation: the larger boxes are whole, not rings around the box, and share the pooling of the box itself.

Where it looks: :mod:`detpipe.regions.region_context`.

Frames: boxes are in pixels of the images as passed; the network sees the resized, padded batch.

Letters: N images, P_i boxes of image i, R boxes of all images, K classes (no background), C channels, h x w pooled cells.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar, TypedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from detpipe import boxes as box_ops
from detpipe import images as frames
from detpipe import matching
from detpipe.regions.base import RegionModel
from detpipe.regions.region_context import Context, check_regions, enlarge
from detpipe.roi_pooling import RoIAlign, RoIPooler
from detpipe.roi_pooling.layouts import to_rois
from detpipe.stages import Backbone, Losses, mark_class_outputs
from detpipe.support.errors import DataError
from detpipe.support.numbers import check_numbers, check_whole
from detpipe.support.processes import is_repeat, sharing_counts, weight_per_rank
from detpipe.types import Target

ROIS_PER_PASS = 4096  # at inference; bounds the memory of pooled features
RegionBatch = tuple[list[Tensor], list[Target]]


class RegionPrediction(TypedDict):
    """What is in the boxes of one image, in their order."""

    labels: Tensor  # [P] int64 in 1..K
    scores: Tensor  # [P] float32 in 0..1, the probability of that class


@dataclass(frozen=True)
class Classification:
    """How a class is made of what is pooled, and what its loss is.

    Args:
        fc: widths of the fully connected layers below the last one; none for a linear classifier.
        dropout: probability of dropping an output of such a layer, 0 to 1, 1 excluded.
        label_smoothing: part of the target that is spread over all classes, 0 to 1, 1 excluded.
        class_weights: [K] factor of each class in the loss, such as more for a rare one; None for equal ones.

    Raises:
        ValueError: a number outside its range.
    """

    fc: tuple[int, ...] = (256,)
    dropout: float = 0.0
    label_smoothing: float = 0.0
    class_weights: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        where = "classification."
        check_whole(1, where, fc=self.fc)
        check_numbers("must be positive and finite", where, class_weights=self.class_weights)
        check_numbers("must be in 0..1, below 1", where, dropout=self.dropout, label_smoothing=self.label_smoothing)

    def build(self, inputs: int, num_classes: int) -> nn.Sequential:
        """Make the layers: ``[R, C', h, w]`` with ``inputs`` numbers a region -> logits ``[R, K]``."""
        layers: list[nn.Module] = [nn.Flatten()]
        for before, after in pairwise((inputs, *self.fc)):
            layers += [nn.Linear(before, after), nn.ReLU(inplace=True), nn.Dropout(self.dropout)]
        last = nn.Linear((inputs, *self.fc)[-1], num_classes)
        nn.init.normal_(last.weight, std=0.01)
        nn.init.zeros_(last.bias)
        mark_class_outputs(last, background=0, each=1)
        return nn.Sequential(*layers, last)


class RegionClassifier(RegionModel):
    """Classify given boxes: one pass of the backbone over an image, then RoI pooling for each of its boxes.

    In evaluation mode images that are padded to different sizes go through the backbone apart, so that the result for an
    image does not depend on the others; in training all images of a batch are padded to one size, as in detectors.

    Args:
        backbone: images to feature maps.
        num_classes: K, without a background.
        pooler: cuts a small map out of the features for each place to look at; RoIAlign of 7 x 7 cells by default.
        context: where to look for each region.
        classification: layers and loss.
        common: ``optimizer``, ``lr_scheduler``, ``min_size`` and ``max_size``, as of
            :class:`~detpipe.regions.base.RegionModel`.

    Raises:
        ValueError: ``num_classes`` below 1, another number of class weights, not 0 < ``min_size`` <= ``max_size``.

    Example:
        >>> from detpipe.backbones import SEResNet
        >>> model = RegionClassifier(SEResNet(18, levels=["c3"]), num_classes=3, min_size=64, max_size=128).eval()
        >>> [found] = model.predict([torch.rand(3, 48, 64)], [torch.tensor([[4.0, 8.0, 30.0, 40.0]])])
        >>> {name: list(value.shape) for name, value in found.items()}
        {'labels': [1], 'scores': [1]}
    """

    watched: ClassVar[str] = "val/mean_class_accuracy"
    top = "layers"

    def __init__(
        self,
        backbone: Backbone,
        num_classes: int,
        pooler: RoIPooler | None = None,
        context: Context = Context(),  # noqa: B008 (frozen)
        classification: Classification = Classification(),
        **common: Any,
    ) -> None:
        super().__init__(backbone, num_classes, **common)
        weights = classification.class_weights
        if weights is not None and len(weights) != num_classes:
            raise ValueError(f"classification.class_weights: expected {num_classes}, one a class, got {list(weights)}")
        self.strides = dict(backbone.roi_strides)
        self.pooler = RoIAlign(7) if pooler is None else pooler
        self.context = context
        height, width = self.pooler.output_size
        self.layers = classification.build(backbone.out_channels * height * width * context.places, num_classes)
        self.label_smoothing = classification.label_smoothing
        self.class_weights: Tensor
        self.register_buffer("class_weights", torch.tensor(weights or (1.0,) * num_classes), persistent=False)

    def forward(self, images: Sequence[Tensor], boxes: Sequence[Tensor]) -> list[Tensor]:
        """Classify regions.

        Args:
            images: N tensors ``[3, H_i, W_i]`` RGB, uint8 in 0..255 or floating point in 0..1.
            boxes: N tensors ``[P_i, 4]`` xyxy in pixels of the images; what lies outside of the image is cut off. P_i may
                be 0. Their values are checked where they are on the CPU, where that costs nothing.

        Returns:
            N logits ``[P_i, K]`` (column 0 is label 1); no softmax is applied.

        Raises:
            ValueError: images or boxes of another number or shape; or a box that is not finite, has no area, or lies
                outside of its image: image and box are named.
        """
        check_regions(images, boxes)
        found: list[Tensor] = [torch.empty(0)] * len(images)
        for rows in self._together(images, self.divisor):
            logits = self._logits([images[row] for row in rows], [boxes[row].float() for row in rows])
            for row, part in zip(rows, logits.split([len(boxes[row]) for row in rows]), strict=True):
                found[row] = part
        return found

    def losses(self, images: Sequence[Tensor], targets: Sequence[Target]) -> Losses:
        """Compute the loss of the objects that count; crowd regions and difficult objects are left out.

        Args:
            images: as of :meth:`forward`.
            targets: N targets with ``boxes`` and ``labels``, in pixels of the images.

        Returns:
            ``loss_classifier``: the mean cross-entropy, weighted by class; 0 where there is nothing to learn from.

        Raises:
            ValueError: as of :meth:`forward`; or a target without boxes or labels, or with a label outside 1..K.
        """
        logits, truth = self._with_truth(images, targets)
        classes = _classes(truth).flatten()
        weights = self.class_weights[classes] * truth.valid.flatten()
        entropy = F.cross_entropy(
            *(logits.flatten(0, 1), classes, self.class_weights.float()),
            reduction="none",
            label_smoothing=self.label_smoothing,
        )
        # the entropies are weighted already: their sum is divided by that of the weights, as in torch's own mean
        total = weight_per_rank(weights.sum())
        return {"loss_classifier": (entropy * truth.valid.flatten()).sum() / total.where(total > 0, 1.0)}

    @torch.no_grad()
    def predict(self, images: Sequence[Tensor], boxes: Sequence[Tensor]) -> list[RegionPrediction]:
        """Tell the likeliest class of each region, on the CPU; the arguments of :meth:`forward` may be on any device.

        Raises:
            ValueError: as of :meth:`forward`, or the model is in training mode.
        """
        if self.training:
            raise ValueError("the model is in training mode, where norms and dropout disturb predictions; call eval()")
        boxes = [one.cpu() for one in boxes]
        check_regions(images, boxes)
        logits = self([image.to(self.device) for image in images], [one.to(self.device) for one in boxes])
        return [_prediction(one) for one in logits]

    def training_step(self, batch: RegionBatch, batch_idx: int) -> Tensor:
        """Compute and log the loss of a batch."""
        images, targets = batch
        counted = not is_repeat(targets)
        with sharing_counts(counted):
            loss = self.losses(images, targets)["loss_classifier"] * counted
        self.log("train/loss", loss.detach(), prog_bar=True, batch_size=len(images))
        return loss

    def validation_step(self, batch: RegionBatch, batch_idx: int) -> None:
        """Count regions and hits by class, and sum the cross-entropy, without label smoothing and class weights."""
        logits, truth = self._with_truth(*batch)
        classes = _classes(truth)
        loss = F.cross_entropy(logits.flatten(0, 1), classes.flatten(), reduction="none").view(classes.shape)
        hit = logits.argmax(-1) == classes
        of_class = F.one_hot(classes, self.num_classes) * truth.valid[..., None]  # [N, G, K]
        self._validated.append(  # [3, K]: regions, hits, and losses by class
            torch.stack([(of_class * value[..., None]).sum((0, 1)).float() for value in (truth.valid, hit, loss)])
        )

    def on_validation_epoch_end(self) -> None:
        """Log accuracies over all regions and by class, from counts, so that no batch size changes them.

        Raises:
            DataError: there is no region that counts.
        """
        regions, hits, losses = self._counted(3, self.num_classes)
        if not regions.sum():
            raise DataError(
                "the validation images have no region that counts; expected objects, not difficult or crowd"
            )
        seen = regions > 0
        values = {
            "mean_class_accuracy": (hits[seen] / regions[seen]).mean(),
            "accuracy": hits.sum() / regions.sum(),
            "loss": losses.sum() / regions.sum(),
        }
        self.log_dict({f"val/{name}": value.float() for name, value in values.items()}, prog_bar=True)

    def predict_step(self, batch: RegionBatch, batch_idx: int) -> list[RegionPrediction]:
        """Classify the boxes of the targets of a batch."""
        images, targets = batch
        return self.predict(images, [target["boxes"] for target in targets])  # type: ignore[typeddict-item]

    def _with_truth(self, images: Sequence[Tensor], targets: Sequence[Target]) -> tuple[Tensor, matching.GroundTruth]:
        """Logits of the objects ``[N, G, K]``, padded as their truth is."""
        truth = matching.gather_targets(targets)
        matching.check_objects(targets, self.num_classes)
        logits = self(images, [target["boxes"] for target in targets])  # type: ignore[typeddict-item]
        return matching.pad(logits)[0].float(), truth

    def _logits(self, images: Sequence[Tensor], boxes: Sequence[Tensor]) -> Tensor:
        """Logits ``[R, K]`` of the boxes of all images, one image after the other."""
        batch = self._batch(images)
        sizes = [(image.shape[1], image.shape[2]) for image in images]
        moved = [frames.scale_boxes(*row) for row in zip(boxes, sizes, batch.image_sizes, strict=True)]
        looks = [
            to_rois([enlarge(one, factor, *size) for one, size in zip(moved, batch.image_sizes, strict=True)])
            for factor in self.context.factors
        ]  # [R, 5] each
        features = self.backbone(batch.tensors)
        whole = None
        if self.context.whole_image:
            edges = [box_ops.constants((0.0, 0.0, width, height), moved[0]) for height, width in batch.image_sizes]
            whole = self.pooler(features, to_rois([box[None] for box in edges]), self.strides)  # [N, C, h, w]
        size = max(1, len(looks[0])) if torch.is_grad_enabled() else ROIS_PER_PASS
        parts = []
        for chunk in zip(*(look.split(size) for look in looks), strict=True):
            seen = [self.pooler(features, rois, self.strides) for rois in chunk]
            if whole is not None:
                seen.append(whole[chunk[0][:, 0].long()])
            parts.append(self.layers(torch.cat(seen, dim=1)))
        return torch.cat(parts)


def _classes(truth: matching.GroundTruth) -> Tensor:
    """``[N, G]`` in 0..K-1; 0 for what does not count, whose label may be anything."""
    return torch.where(truth.valid, truth.labels - 1, 0)


def _prediction(logits: Tensor) -> RegionPrediction:
    scores, classes = logits.float().softmax(-1).cpu().max(-1)
    return RegionPrediction(labels=classes + 1, scores=scores)

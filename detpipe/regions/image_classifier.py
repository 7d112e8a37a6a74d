"""A backbone with a linear layer on top: what backbones are pretrained as.

He et al., "Deep Residual Learning for Image Recognition", 2015, arXiv 1512.03385: global average pooling and one linear layer.
Label smoothing, and an auxiliary head whose loss weighs 0.4 as in its authors' code: Szegedy et al., "Rethinking the Inception
Architecture for Computer Vision", 2015, arXiv 1512.00567.

Letters: N images, K classes, C channels of the coarsest level.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from detpipe import images as frames
from detpipe.regions.base import BackboneModel
from detpipe.stages import Backbone, mark_class_outputs
from detpipe.support.errors import UsageError
from detpipe.support.numbers import check_numbers, check_whole
from detpipe.types import Features

AUXILIARY_WEIGHT = 0.4
TOP = (1, 5)
ClassificationBatch = tuple[Tensor, Tensor, list[str]]  # images [N, 3, H, W], labels [N] in 0..K-1, file names


class ImageClassifier(BackboneModel):
    """Classify whole images: the average over the coarsest level of a backbone, dropout, one linear layer.

    Where the backbone is built with an auxiliary head (it then has ``auxiliary_classes`` and ``forward_with_auxiliary``),
    its loss is added in training with a weight of 0.4.

    Args:
        backbone: images to feature maps.
        num_classes: K.
        dropout: probability of dropping a channel of the average, 0 to 1, 1 excluded.
        label_smoothing: part of the target that is spread over all classes in training, 0 to 1, 1 excluded.
        training: ``optimizer``, how weights are updated, and ``lr_scheduler``, how the learning rate changes.

    Raises:
        ValueError: a number outside its range, or an auxiliary head of another number of classes.

    Example:
        >>> from detpipe.backbones import SEResNet
        >>> classifier = ImageClassifier(SEResNet(18, levels=["c5"]), num_classes=10).eval()
        >>> list(classifier(torch.zeros(2, 3, 64, 64, dtype=torch.uint8)).shape)
        [2, 10]
    """

    top = "classifier"

    def __init__(
        self,
        backbone: Backbone,
        num_classes: int,
        dropout: float = 0.0,
        label_smoothing: float = 0.0,
        **training: Any,
    ) -> None:
        super().__init__(backbone, **training)
        check_whole(num_classes=num_classes)
        check_numbers("must be in 0..1, below 1", dropout=dropout, label_smoothing=label_smoothing)
        auxiliary = getattr(backbone, "auxiliary_classes", None)
        if auxiliary and auxiliary != num_classes:
            raise ValueError(
                f"backbone.auxiliary_classes is {auxiliary}, but there are {num_classes} classes; give the same number"
            )
        self.has_auxiliary = bool(auxiliary)
        self.dropout = nn.Dropout(dropout)
        self.classifier = nn.Linear(backbone.level_channels[self.level], num_classes)
        mark_class_outputs(self.classifier, background=0, each=1)
        self.label_smoothing = label_smoothing

    def forward(self, images: Tensor) -> Tensor:
        """Classify images.

        Args:
            images: ``[N, 3, H, W]`` RGB, uint8 in 0..255 or floating point in 0..1.

        Returns:
            Logits ``[N, K]``; no softmax is applied.

        Raises:
            ValueError: images of another shape.
        """
        return self._logits(self.backbone(self._normalized(images)))

    def losses(self, images: Tensor, labels: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """Compute the losses of training, label smoothing and auxiliary head included, for labels ``[N]`` int64 in 0..K-1.

        Returns:
            Scalars to be summed, and the logits ``[N, K]``.

        Raises:
            ValueError: images of another shape.
            UsageError: a single image so small that batch norm, in training, has one value of a channel.
        """
        normalized, auxiliary = self._normalized(images), None
        try:
            if self.has_auxiliary:
                features, auxiliary = self.backbone.forward_with_auxiliary(normalized)  # type: ignore[operator]
            else:
                features = self.backbone(normalized)
        except ValueError as error:
            if "more than 1 value per channel" not in str(error):
                raise
            raise UsageError(
                f"batch norm cannot train on a single image of {images.shape[-2]} x {images.shape[-1]} pixels, of which one cell "
                "is left; give data.loader.batch_size 2 or more, or larger data.views.size"
            ) from error
        logits = self._logits(features)
        losses = {"loss_classifier": self._cross_entropy(logits, labels)}
        if auxiliary is not None:
            losses["loss_auxiliary"] = AUXILIARY_WEIGHT * self._cross_entropy(auxiliary, labels)
        return losses, logits

    def training_step(self, batch: ClassificationBatch, batch_idx: int) -> Tensor:
        """Compute the loss of a batch, and log it with its parts and the accuracy."""
        images, labels, _ = batch
        losses, logits = self.losses(images, labels)
        parts = losses if len(losses) > 1 else {}
        return self._trained_on(losses, len(labels), {**parts, **top_accuracy(logits, labels)})

    def validation_step(self, batch: ClassificationBatch, batch_idx: int) -> None:
        """Count the hits of a batch, and sum its cross-entropy, without label smoothing."""
        images, labels, _ = batch
        logits = self(images).float()
        loss, hits = F.cross_entropy(logits, labels, reduction="sum"), top_hits(logits, labels)
        self._validated.append(  # images, sum of their losses, hits for each of TOP
            torch.stack([loss.new_tensor(len(labels)), loss, *(hit.sum().float() for hit in hits.values())])
        )

    def on_validation_epoch_end(self) -> None:
        """Log loss and accuracy over all images: the hits are counted, so no batch size changes the quotient."""
        names = ["loss", *(f"top{k}" for k in TOP)]
        images, *sums = self._counted(1 + len(names)).tolist()
        self.log_dict({f"val/{name}": value / images for name, value in zip(names, sums, strict=True)}, prog_bar=True)

    def _normalized(self, images: Tensor) -> Tensor:
        if images.ndim != 4 or images.shape[1] != 3 or 0 in images.shape[2:]:
            raise ValueError(f"images must be [N, 3, H, W] with H, W > 0, got {list(images.shape)}")
        normalized = frames.normalize(images, self.backbone.pixel_format)
        return normalized.to(dtype=self.backbone.input_dtype, memory_format=torch.channels_last)

    def _logits(self, features: Features) -> Tensor:
        return self.classifier(self.dropout(features[self.level].mean((2, 3))))

    def _cross_entropy(self, logits: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(logits.float(), labels, label_smoothing=self.label_smoothing)


@torch.no_grad()
def top_accuracy(logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """Compute ``top1`` and ``top5``, scalars in 0..1: how many of N images, at least 1, have their class among the likeliest.

    Logits are ``[N, K]``, labels ``[N]`` int64 in 0..K-1; with up to five classes ``top5`` is 1.

    Example:
        >>> top_accuracy(torch.tensor([[0.1, 0.9], [0.8, 0.2]]), torch.tensor([1, 1]))
        {'top1': tensor(0.5000), 'top5': tensor(1.)}
    """
    return {name: hits.float().mean() for name, hits in top_hits(logits, labels).items()}


@torch.no_grad()
def top_hits(logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """Tell which of logits ``[N, K]`` hit labels ``[N]``: ``top1``, the class is the likeliest, and ``top5``, each ``[N]`` bool."""
    ranked = logits.topk(min(max(TOP), logits.shape[1])).indices == labels[:, None]  # [N, up to 5]
    return {f"top{k}": ranked[:, :k].any(1) for k in TOP}

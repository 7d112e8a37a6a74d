"""A small network that classifies digits, alone or behind a spatial transformer: as many parameters either way.

Jaderberg et al., "Spatial Transformer Networks", 2015, arXiv 1506.02025, section 4.1.

Deviations:
1. The networks are small, a few ten thousand parameters: they are trained on 1,438 digits, in seconds.
2. Parameters are made equal by the width of the hidden layer: what a plain network saves on localization, it has there.
3. Three strided convolutions with batch norm, trained by AdamW: what it takes to learn in some thousand steps.

N images, S pixels a side.
"""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch.nn.functional as F
from lightning import LightningModule
from torch import Tensor, nn

from detpipe.optimization import LRSchedule, Optimizer, configure
from detpipe.spatial_transformer import (
    AffineGrid,
    ConvLocalization,
    Grid,
    ProjectiveGrid,
    Sampler,
    SpatialTransformer,
    ThinPlateSplineGrid,
    Transformed,
)

Model = Literal["cnn", "affine", "projective", "tps"]
MODELS: tuple[Model, ...] = get_args(Model)
CLASSES = 10
WIDTHS = (16, 32, 32)  # channels of the convolutions
CELLS = 4  # what they leave is pooled to CELLS x CELLS
OPTIMIZER = Optimizer(name="adamw", lr=0.003, weight_decay=0.01, backbone_scale=0.4)
SCHEDULE = LRSchedule(name="cosine", warmup=0.05)


class DigitClassifier(LightningModule):
    """Classify images of one digit each.

    A transformer reads its input at half the size for localization, starts at the identity, and hands what it looks at to
    the classifier in ``glimpse`` x ``glimpse`` pixels; what it reads outside of the image is zero, as the empty paper is.

    Args:
        model: "cnn" is the classifier alone; "affine", "projective" and "tps" put such a transformer before it.
        parameters: of the whole network; the width of the hidden layer is what comes closest to it.
        glimpse: side of what a transformer hands on, pixels.
        optimizer: how weights are updated; its ``backbone_scale`` is that of the localization network.
        lr_scheduler: how the learning rate changes.

    Raises:
        ValueError: an unknown model, a glimpse below 8, or too few parameters.

    Example:
        >>> import torch
        >>> classifier = DigitClassifier("affine").eval()
        >>> classifier(torch.zeros(2, 1, 42, 42)).shape, classifier.transform(torch.zeros(2, 1, 42, 42)).output.shape
        (torch.Size([2, 10]), torch.Size([2, 1, 28, 28]))
    """

    def __init__(
        self,
        model: Model = "affine",
        parameters: int = 60_000,
        glimpse: int = 28,
        optimizer: Optimizer = OPTIMIZER,
        lr_scheduler: LRSchedule = SCHEDULE,
    ) -> None:
        super().__init__()
        if model not in MODELS:
            raise ValueError(f"model must be one of {', '.join(MODELS)}, got {model!r}")
        if glimpse < 8:
            raise ValueError(f"glimpse must be at least 8 pixels, got {glimpse}")
        self.transformer = None if model == "cnn" else _transformer(_grid(model), glimpse)
        self.features = _features()
        left = parameters - sum(parameter.numel() for parameter in self.parameters()) - CLASSES
        inputs = WIDTHS[-1] * CELLS**2
        hidden = round(left / (inputs + 1 + CLASSES))
        if hidden < 1:
            least = parameters - left + inputs + 1 + CLASSES
            raise ValueError(f"parameters must be at least {least} for {model!r}, got {parameters}")
        self.head = nn.Sequential(nn.Linear(inputs, hidden), nn.ReLU(), nn.Linear(hidden, CLASSES))
        self.optimizer, self.lr_scheduler = optimizer, lr_scheduler

    def forward(self, images: Tensor) -> Tensor:
        """Classify images ``[N, 1, S, S]``, floating point in 0..1, ink is 1, S from 8 on: logits ``[N, 10]``, without softmax.

        Raises:
            ValueError: images of another shape.
        """
        seen = self._checked(images) if self.transformer is None else self.transform(images).output
        return self.head(self.features(seen).flatten(1))

    def transform(self, images: Tensor) -> Transformed:
        """Tell what the transformer makes of images, and where it looks: output ``[N, 1, glimpse, glimpse]``, parameters and grid.

        Raises:
            ValueError: images of another shape, or a classifier without a transformer.
        """
        if self.transformer is None:
            raise ValueError("this classifier has no transformer (model 'cnn')")
        return self.transformer.transform(self._checked(images))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Compute the cross-entropy of a batch of images and labels."""
        images, labels = batch
        loss = F.cross_entropy(self(images), labels)
        self.log("train/loss", loss.detach(), batch_size=len(labels))
        return loss

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Log the part of a batch that is classified wrongly, ``test/error``; Lightning averages over all images."""
        images, labels = batch
        wrong = self(images).argmax(dim=1) != labels
        self.log("test/error", wrong.double().mean(), batch_size=len(labels), on_step=False, on_epoch=True)

    def configure_optimizers(self) -> Any:
        """Build the optimizer and the schedule, which is stepped after every batch."""
        localization = nn.Module() if self.transformer is None else self.transformer
        steps = self.trainer.estimated_stepping_batches
        return configure(self.optimizer, self.lr_scheduler, steps, localization, self.features, self.head)

    @staticmethod
    def _checked(images: Tensor) -> Tensor:
        if images.ndim != 4 or images.shape[1] != 1 or min(images.shape[2:]) < 8 or not images.is_floating_point():
            raise ValueError(
                f"images must be floating-point [N, 1, S, S] with S at least 8, got {list(images.shape)} {images.dtype}"
            )
        return images


def _grid(model: Model) -> Grid:
    if model == "affine":
        return AffineGrid()
    return ProjectiveGrid() if model == "projective" else ThinPlateSplineGrid(points=4)


def _transformer(grid: Grid, glimpse: int) -> SpatialTransformer:
    # where a digit is can be seen at half the size, in a quarter of the time
    localization = nn.Sequential(nn.AvgPool2d(2), ConvLocalization(1, grid, widths=(8, 16), cells=4, hidden=32))
    return SpatialTransformer(localization, grid, Sampler(padding="zeros"), glimpse)


def _features() -> nn.Sequential:
    """``[N, 1, S, S]`` -> ``[N, 32, 4, 4]``, whatever S is."""
    layers: list[nn.Module] = []
    for before, after in zip((1, *WIDTHS), WIDTHS, strict=False):
        size = 5 if before == 1 else 3
        layers += [
            nn.Conv2d(before, after, size, stride=2, padding=size // 2, bias=False),
            nn.BatchNorm2d(after),
            nn.ReLU(inplace=True),
        ]
    return nn.Sequential(*layers, nn.AdaptiveMaxPool2d(CELLS))

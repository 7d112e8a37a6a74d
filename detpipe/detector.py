"""The pipeline: ``images -> backbone -> proposals -> head -> detections``, as the one module that is trained.

Girshick, "Fast R-CNN", 2015, arXiv 1504.08083. Read :meth:`TwoStageDetector._run`: it is the whole data path.

Frames: what goes in and comes out is in pixels of the images as passed; the stages see the resized, padded batch. Where the data
have resized an image, its target says so (``content_size``): it is taken as it is, and the steps of validation and prediction give
detections in pixels of the image file.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, get_args

import torch
from lightning import LightningModule
from torch import Tensor, nn

from detpipe import images as frames
from detpipe.optimization import LRSchedule, Optimizer, configure
from detpipe.stages import (
    Backbone,
    ImageList,
    Losses,
    ProposalSource,
    RoIHead,
    check_detections,
    check_features,
    check_proposals,
)
from detpipe.support.numbers import check_whole
from detpipe.support.processes import MeanValues, is_repeat, sharing_counts
from detpipe.types import Detection, Features, Target
from detpipe.winograd import QuickConvolutions


class TwoStageDetector(LightningModule):
    """Detect objects in two stages: propose boxes, then classify and refine them.

    Torchvision's parts fit too: its ``RegionProposalNetwork`` as ``proposals``, its ``RoIHeads`` as ``head``.

    Args:
        backbone: images to feature maps.
        proposals: features to boxes.
        head: features and boxes to detections.
        optimizer: how weights are updated.
        lr_scheduler: how the learning rate changes.
        min_size: images are resized so that the shorter side has this many pixels ...
        max_size: ... unless the longer side would exceed this.
        divisor: height and width of a batch are multiples of it; None for the coarsest stride.
        resize: how images are resized; another library's rule for the weights that it trained.

    Raises:
        ValueError: ``min_size`` or ``max_size`` not positive, ``min_size`` above ``max_size``, ``divisor`` not positive, or an
            unknown ``resize``.

    Example:
        >>> from detpipe.backbones import SEResNet
        >>> from detpipe.proposals import DenseGrid
        >>> from detpipe.heads import FastRCNNHead
        >>> backbone = SEResNet(18, levels=["c3"])
        >>> head = FastRCNNHead(backbone.out_channels, num_classes=3, strides=backbone.strides, fc=[32])
        >>> detector = TwoStageDetector(backbone, DenseGrid(scales=[32]), head, min_size=64, max_size=128).eval()
        >>> sorted(detector([torch.rand(3, 48, 64)])[0])
        ['boxes', 'labels', 'scores']
    """

    def __init__(
        self,
        backbone: Backbone,
        proposals: ProposalSource,
        head: RoIHead,
        optimizer: Optimizer = Optimizer(),  # noqa: B008 (frozen)
        lr_scheduler: LRSchedule = LRSchedule(),  # noqa: B008 (frozen)
        min_size: int = 600,
        max_size: int = 1000,
        divisor: int | None = None,
        resize: frames.ResizeRule = "detpipe",
    ) -> None:
        super().__init__()
        frames.check_sizes(min_size, max_size)
        check_whole(divisor=divisor)
        if resize not in get_args(frames.ResizeRule):
            raise ValueError(f"resize must be one of {', '.join(get_args(frames.ResizeRule))}, got {resize!r}")
        backbone.to(memory_format=torch.channels_last)  # convolutions are faster so, on CPUs and GPUs
        self.backbone, self.proposals, self.head = backbone, proposals, head
        self.optimizer, self.lr_scheduler = optimizer, lr_scheduler
        self.min_size, self.max_size = min_size, max_size
        self.divisor = divisor
        self.resize: frames.ResizeRule = resize
        self._convolutions, self._validated = QuickConvolutions(), MeanValues()

    def forward(self, images: Sequence[Tensor], targets: Sequence[Target] | None = None) -> list[Detection]:
        """Detect objects, in training mode too.

        Args:
            images: N tensors ``[C, H_i, W_i]``, of three channels RGB, uint8 in 0..255 or floating point in 0..1.
            targets: only needed by a source that takes its ``proposals`` from them, in pixels of the images.

        Returns:
            N detections in pixels of the images.
        """
        return self._run(images, targets, ("detections",))[0]

    def losses(self, images: Sequence[Tensor], targets: Sequence[Target]) -> Losses:
        """Compute the losses, in evaluation mode too.

        Args:
            images: N tensors ``[C, H_i, W_i]``, of three channels RGB, uint8 in 0..255 or floating point in 0..1.
            targets: N targets with ``boxes`` and ``labels``, in pixels of the images.

        Returns:
            scalars; those named ``loss_*`` are to be summed.

        Raises:
            ValueError: the head returns no loss, a source with parameters to train returns none, or both use one name.
        """
        return self._run(images, targets, ("losses",))[1]

    def _run(
        self,
        images: Sequence[Tensor],
        targets: Sequence[Target] | None,
        wanted: Sequence[Literal["detections", "losses"]],
    ) -> tuple[list[Detection], Losses]:
        if targets is not None and len(targets) != len(images):
            raise ValueError(f"expected one target for each image, got {len(targets)} for {len(images)} images")
        contents = frames.contents_of(targets)
        batch = self.to_batch(images, contents)
        sizes = frames.picture_sizes(images, contents)
        moved = None if targets is None else frames.targets_to_batch(targets, sizes, batch.image_sizes)
        with self._convolutions.on(batch.tensors):
            features = check_features(self.backbone, self.backbone(batch.tensors), batch.tensors)
        detections: list[Detection] = []
        losses: Losses = {}
        for want in wanted:
            stages = _mode(want == "losses", self.proposals, self.head)
            with stages, self._convolutions.on(batch.tensors):
                with _widths(self.proposals, features):
                    proposed = self.proposals(batch, features, moved)
                boxes, source_losses = check_proposals(self.proposals, proposed, len(images))
                with _widths(self.head, features):
                    answer = self.head(features, boxes, batch.image_sizes, moved)
                found, head_losses = check_detections(self.head, answer)
            if want == "losses":
                losses = _together(self.proposals, boxes, source_losses, self.head, head_losses)
            elif len(found) != len(images):
                raise _not_told(self.head, f"returned {len(found)} detections for {len(images)} images")
            else:
                detections = frames.detections_to_images(found, batch.image_sizes, sizes)
        return detections, losses

    def to_batch(self, images: Sequence[Tensor], contents: Sequence[frames.Size | None] | None = None) -> ImageList:
        """Normalize, resize and pad images as the stages see them: :func:`detpipe.images.to_batch` with the detector's settings.

        Args:
            images: N tensors ``[C, H_i, W_i]``.
            contents: of pictures that have their final size; see :func:`detpipe.images.contents_of`.

        Returns:
            The batch.
        """
        divisor = self.divisor or max(self.backbone.strides.values())
        sizes, dtype = (self.min_size, self.max_size), self.backbone.input_dtype
        return frames.to_batch(images, self.backbone.pixel_format, *sizes, divisor, contents, dtype, self.resize)

    def training_step(self, batch: tuple[list[Tensor], list[Target]], batch_idx: int) -> Tensor:
        """Compute the loss of a batch and log its parts."""
        images, targets = batch
        counted = not is_repeat(targets)
        with sharing_counts(counted):
            losses = self.losses(images, targets)
        total = total_loss(losses) * counted
        self.log("train/loss", total.detach(), prog_bar=True, batch_size=len(images))
        self.log_dict({f"train/{name}": value.detach() for name, value in losses.items()}, batch_size=len(images))
        return total

    def on_validation_epoch_start(self) -> None:
        """Forget the last validation."""
        self._validated = MeanValues()

    def validation_step(self, batch: tuple[list[Tensor], list[Target]], batch_idx: int) -> list[Detection]:
        """Compute the loss of a batch and its detections, in pixels of the image files, from the same features."""
        images, targets = batch
        detections, losses = self._run(images, targets, ("losses", "detections"))
        self._validated.add({"loss": total_loss(losses), **losses}, len(images))
        return frames.detections_to_files(detections, targets)

    def on_validation_epoch_end(self) -> None:
        """Log the mean losses over the images of all processes."""
        for name, value in self._validated.means().items():
            self.log(f"val/{name}", value, prog_bar=name == "loss")

    def predict_step(self, batch: tuple[list[Tensor], list[Target]], batch_idx: int) -> list[Detection]:
        """Detect objects in a batch; boxes are in pixels of the image files."""
        images, targets = batch
        return frames.detections_to_files(self(images, targets), targets)

    def configure_optimizers(self) -> Any:
        """Build the optimizer and the schedule, which is stepped after every batch."""
        steps = self.trainer.estimated_stepping_batches
        return configure(self.optimizer, self.lr_scheduler, steps, self.backbone, self.proposals, self.head)


def total_loss(losses: Losses) -> Tensor:
    """Sum the losses that are trained on.

    Args:
        losses: scalars by name.

    Returns:
        The sum of those named ``loss_*``, a scalar.

    Raises:
        ValueError: there is none.
    """
    parts = [value for name, value in losses.items() if name.startswith("loss_")]
    if not parts:
        raise ValueError(f"expected at least one loss named 'loss_*', got {sorted(losses)}")
    return torch.stack(parts).sum()


def _together(
    source: nn.Module, boxes: Sequence[Tensor], source_losses: Losses, head: nn.Module, head_losses: Losses
) -> Losses:
    """The losses of both stages, where none is missing and no name is taken twice."""
    if not any(name.startswith("loss_") for name in head_losses):
        raise _not_told(head, f"returned no loss named 'loss_*', got {sorted(head_losses)}")
    learns = any(parameter.requires_grad for parameter in source.parameters())
    if learns and not source_losses and not any(part.requires_grad for part in boxes):
        raise _not_told(
            source, "has parameters to train, but returned no losses", "or freeze them: requires_grad_(False)"
        )
    if twice := sorted(source_losses.keys() & head_losses.keys()):
        names = " and ".join(type(stage).__name__ for stage in (source, head))
        raise ValueError(f"{names} both return a loss {twice[0]!r}: rename it in one of them")
    return {**source_losses, **head_losses}


def _not_told(stage: nn.Module, what: str, otherwise: str = "") -> ValueError:
    return ValueError(
        f"{type(stage).__name__} {what}: its flag 'training' decides between losses and detections; a module around a stage "
        f"must pass it on before each call, inner.training = self.training{otherwise and f'; {otherwise}'}"
    )


@contextmanager
def _widths(stage: nn.Module, features: Features) -> Iterator[None]:
    """Name the stage whose layers are not as wide as what they are given, where PyTorch names none."""
    try:
        yield
    except (RuntimeError, IndexError) as error:
        text, name = str(error), type(stage).__name__
        if "shapes cannot be multiplied" in text or "channels, but got" in text:
            shapes = {level: [*values.shape] for level, values in features.items()}
            raise ValueError(
                f"{name}: layers and features differ in width ({text}); the features are {shapes}"
            ) from error
        if "out of bounds" in text and text.startswith("Target "):
            raise ValueError(
                f"{name}: {text.rstrip('.')}: for K classes it needs K + 1 outputs, the first of the background"
            ) from error
        raise


@contextmanager
def _mode(training: bool, source: nn.Module, head: nn.Module) -> Iterator[None]:
    """Tell stages whether to return losses or detections, but leave the layers inside (dropout, norms) as they are."""
    before = source.training, head.training
    source.training = head.training = training
    vars(source)["fills_up"] = getattr(head, "drops_empty", False)
    try:
        yield
    finally:
        source.training, head.training = before
        vars(source).pop("fills_up", None)  # another thread may have been faster

"""What the models on images and regions share: a backbone with layers on top, how they are trained, and sums over a validation."""

from __future__ import annotations

from abc import ABC
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from lightning import LightningModule
from torch import Tensor
from torchvision.models.detection.image_list import ImageList

from detpipe import images as frames
from detpipe.optimization import LRSchedule, Optimizer, configure
from detpipe.stages import Backbone
from detpipe.support.numbers import check_whole
from detpipe.support.processes import gather_objects, mean_factor, sharing_counts


class BackboneModel(LightningModule, ABC):
    """A backbone with layers on top.

    Args:
        backbone: images to feature maps.
        optimizer: how weights are updated.
        lr_scheduler: how the learning rate changes.
    """

    top: ClassVar[str]  # the attribute with the layers on top

    def __init__(
        self,
        backbone: Backbone,
        optimizer: Optimizer = Optimizer(),  # noqa: B008 (frozen)
        lr_scheduler: LRSchedule = LRSchedule(),  # noqa: B008 (frozen)
    ) -> None:
        super().__init__()
        self.backbone = backbone.to(memory_format=torch.channels_last)  # convolutions are faster so, on CPUs and GPUs
        self.level = max(backbone.strides, key=lambda level: backbone.strides[level])  # the coarsest
        self.optimizer, self.lr_scheduler = optimizer, lr_scheduler
        self._validated: list[Tensor] = []  # what is counted in each batch

    def predict_step(self, batch: Any, batch_idx: int) -> Any:
        """Run on the images of a batch."""
        return self(batch[0])

    def on_validation_epoch_start(self) -> None:
        """Forget the last validation."""
        self._validated = []

    def configure_optimizers(self) -> Any:
        """Build the optimizer and the schedule, which is stepped after every batch."""
        steps = self.trainer.estimated_stepping_batches
        return configure(self.optimizer, self.lr_scheduler, steps, self.backbone, getattr(self, self.top))

    def _trained_on(
        self, losses: Mapping[str, Tensor], images: int, logged: Mapping[str, Tensor], counted: bool = True
    ) -> Tensor:
        """The loss of a batch, as a mean over the images of all processes; it is logged, and what else is to be."""
        with sharing_counts(counted):
            total = torch.stack(list(losses.values())).sum() * mean_factor(images, self.device)
        self.log("train/loss", total.detach(), prog_bar=True, batch_size=images)
        self.log_dict({f"train/{name}": value.detach() for name, value in logged.items()}, batch_size=images)
        return total

    def _counted(self, *shape: int) -> Tensor:
        """The sum of what was counted in the batches of all processes, of which some may have none."""
        own = torch.stack([torch.zeros(shape), *(part.cpu() for part in self._validated)]).double().sum(0)
        return torch.stack(gather_objects(own)).sum(0)


class RegionModel(BackboneModel):
    """A model that resizes images as detectors do.

    Args:
        backbone: images to feature maps.
        num_classes: K.
        min_size: images are resized so that the shorter side has this many pixels ...
        max_size: ... unless the longer side would exceed this.
        training: ``optimizer``, how weights are updated, and ``lr_scheduler``, how the learning rate changes.

    Raises:
        ValueError: ``num_classes`` below 1, or not 0 < ``min_size`` <= ``max_size``.
    """

    def __init__(
        self, backbone: Backbone, num_classes: int, min_size: int = 600, max_size: int = 1000, **training: Any
    ) -> None:
        super().__init__(backbone, **training)
        check_whole(num_classes=num_classes)
        frames.check_sizes(min_size, max_size)
        self.num_classes, self.min_size, self.max_size = num_classes, min_size, max_size
        self.divisor = max(backbone.strides.values())

    def _batch(self, images: Sequence[Tensor]) -> ImageList:
        sizes = (self.min_size, self.max_size)
        return frames.to_batch(
            images, self.backbone.pixel_format, *sizes, self.divisor, dtype=self.backbone.input_dtype
        )

    def _together(self, images: Sequence[Tensor], divisor: int) -> list[list[int]]:
        """Which images make a batch: all in training, else those whose resized sides, in units of a divisor, are the same."""
        if self.training or not len(images):
            return [list(range(len(images)))]
        groups: dict[tuple[int, int], list[int]] = {}
        for row, image in enumerate(images):
            height, width = frames.resized_size((image.shape[-2], image.shape[-1]), self.min_size, self.max_size)
            groups.setdefault((-(-height // divisor), -(-width // divisor)), []).append(row)
        return list(groups.values())

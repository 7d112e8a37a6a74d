"""Find where the classes of an image are, trained without a single box: superpixel pooling, image-level labels.

Kwak, Hong and Han, "Weakly Supervised Semantic Segmentation Using Superpixel Pooling Network", AAAI 2017; the network and its
deviations are in :mod:`detpipe.regions.superpixel_pooling`.

Training reads the set of classes in a target's ``labels`` and nothing else. Validation compares with masks: those of the data set,
or masks made of its boxes (:mod:`detpipe.datasets.masks`); the log says. No weight depends on them, but the best checkpoint is
chosen by them. Superpixels are computed on the CPU when a batch comes (19 ms for 160 x 160 pixels, 320 ms for 480 x 640) and
remembered by their pixels.

Frames: images and maps are in pixels of the images as passed; superpixels are those of the resized image, in the padded batch.

Letters: N images, K classes, S superpixels an image.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.models.detection.image_list import ImageList

from detpipe.datasets import DetectionData
from detpipe.datasets.datamodule import Split
from detpipe.datasets.masks import Kind, Masks, open_masks
from detpipe.evaluation.segmentation import all_background, confusion_matrix, segmentation_scores
from detpipe.regions.base import RegionModel
from detpipe.regions.superpixel_pooling import Localization, Localized, SuperpixelPoolingHead, segment
from detpipe.regions.superpixels import Segmentation, Segmenter
from detpipe.stages import Backbone, Losses
from detpipe.support.errors import DataError
from detpipe.support.processes import MeanValues, gather_objects, is_repeat
from detpipe.types import Target

Batch = tuple[list[Tensor], list[Target]]


class SuperpixelLocalizer(RegionModel):
    """Score each superpixel of an image for each class, having seen only which images have the class.

    In evaluation mode images that are resized to different sizes go through the network apart, so that none depends on the others.

    Args:
        backbone: images to feature maps, of which the coarsest is used.
        num_classes: K, without background.
        localization: the layers on top, how maps are read, and from which score on a pixel is of a class.
        segmentation: how images are divided into superpixels.
        common: ``optimizer``, ``lr_scheduler``, ``min_size`` and ``max_size``, as of
            :class:`~detpipe.regions.base.RegionModel`.

    Raises:
        ValueError: ``num_classes`` below 1, or not 0 < ``min_size`` <= ``max_size``.

    Example:
        >>> from detpipe.backbones import SEResNet
        >>> localizer = SuperpixelLocalizer(SEResNet(18, levels=["c3"]), num_classes=3, min_size=64, max_size=128).eval()
        >>> [maps] = localizer([torch.rand(3, 48, 64)])
        >>> list(maps.shape)
        [3, 48, 64]
    """

    watched: ClassVar[str] = "val/mIoU"
    top = "head"

    def __init__(
        self,
        backbone: Backbone,
        num_classes: int,
        localization: Localization = Localization(),  # noqa: B008 (frozen)
        segmentation: Segmentation = Segmentation(),  # noqa: B008 (frozen)
        **common: Any,
    ) -> None:
        super().__init__(backbone, num_classes, **common)
        self.head = SuperpixelPoolingHead(backbone.level_channels[self.level], num_classes, localization)
        self.segmenter = Segmenter(segmentation)
        self.truth: Masks | None = None  # what validation compares with
        self.confusion: dict[str, npt.NDArray[np.int64]] = {}

    def forward(self, images: Sequence[Tensor], present: Tensor | None = None) -> list[Tensor]:
        """Localize classes, in training mode too.

        Args:
            images: N tensors ``[3, H_i, W_i]`` RGB, uint8 in 0..255 or floating point in 0..1.
            present: ``[N, K]`` 1 for classes that an image is known to have, else 0; None: as likely as it looks.

        Returns:
            N maps ``[K, H_i, W_i]`` of scores in 0..1, constant on superpixels; column 0 is label 1.

        Raises:
            ValueError: no images, or an argument of another shape.
        """
        if present is not None and present.shape != (len(images), self.num_classes):
            raise ValueError(f"present must be [{len(images)}, {self.num_classes}], got {list(present.shape)}")
        maps: list[Tensor] = [torch.empty(0)] * len(images)
        for rows in self._together(images, 1):
            batch, superpixels, found = self._find([images[row] for row in rows])
            given = None if present is None else present[rows]
            for place, row in enumerate(rows):
                maps[row] = self._map(place, batch, superpixels, found, given, images[row])
        return maps

    def superpixels(self, images: Sequence[Tensor]) -> list[Tensor]:
        """Give the superpixels that the maps of images are constant on: N ``[H_i, W_i]`` int32 from 0, in pixels of the images."""
        found = []
        for image in images:
            batch = self._batch([image])
            height, width = batch.image_sizes[0]
            labels = self.segmenter.batch(batch, self.backbone.pixel_format)[0][:, None, :height, :width]
            size = (image.shape[1], image.shape[2])
            found.append(F.interpolate(labels.float(), size, mode="nearest-exact")[0, 0].int())
        return found

    def losses(self, images: Sequence[Tensor], targets: Sequence[Target]) -> Losses:
        """Compute ``loss_global`` and ``loss_superpixels`` from the set of classes of each image, its ``labels``; it may be empty.

        Raises:
            ValueError: images and targets of another number, or a label outside 1..K.
        """
        present = image_classes(targets, self.num_classes, len(images))
        _, _, found = self._find(images)
        return self.head.losses(found, present.to(found.region_logits.device))

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Compute the loss of a batch, and log it with its parts."""
        images, targets = batch
        losses = self.losses(images, targets)
        return self._trained_on(losses, len(images), losses, counted=not is_repeat(targets))

    def on_validation_epoch_start(self) -> None:
        """Forget the last epoch, and find the true masks of the validation split."""
        self.confusion, self._means = {}, MeanValues()
        if self.truth is None:
            self.truth = open_masks(self.trainer.datamodule, "val")  # type: ignore[attr-defined]
            print(f"mIoU is measured on {self.truth.source}")

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Compute the loss of a batch, and count its pixels by what they are and what they were taken for."""
        images, targets = batch
        if self.truth is None:
            raise DataError("no true masks to compare with: validate with a trainer, or call evaluate()")
        found, present = self._count(images, targets, self.truth)
        loss = torch.stack(list(self.head.losses(found, present).values())).sum()
        self._means.add({"loss": loss}, len(images))

    def on_validation_epoch_end(self) -> None:
        """Log mean IoU over all pixels: with the classes found, with the true ones given, and of background alone."""
        names = [str(label) for label in range(1, self.num_classes + 1)]
        parts = gather_objects(self.confusion)
        self.confusion = {
            name: np.sum([part[name] for part in parts if name in part], axis=0)
            for name in ("mIoU", "mIoU_classes_given")
        }
        scores = {name: values["mIoU"] for name, values in self._scores(names).items()}
        self.log_dict(
            {f"val/{name}": value for name, value in {**self._means.means(), **scores}.items()}, prog_bar=True
        )

    @torch.no_grad()
    def evaluate(self, data: DetectionData, split: Split = "val", kind: Kind = "auto") -> dict[str, dict[str, Any]]:
        """Compare with the true masks of a split.

        Args:
            data: the data set.
            split: ``"train"``, ``"val"`` or ``"test"``.
            kind: of masks, see :func:`detpipe.datasets.masks.open_masks`.

        Returns:
            ``mIoU``: with the classes that were found; ``mIoU_classes_given``: with the true classes of each image given, as the
            paper makes its maps; ``mIoU_background``: everything called background. Each as from
            :func:`detpipe.evaluation.segmentation.segmentation_scores`.

        Raises:
            DataError: the masks cannot be read.
            ValueError: the model is in training mode, or has another number of classes.
        """
        if self.training:
            raise ValueError("the model is in training mode, where batches change what is found; call eval()")
        if data.num_classes != self.num_classes:
            raise ValueError(f"the model has {self.num_classes} classes, the data set {data.num_classes}")
        truth, self.confusion = open_masks(data, split, kind), {}
        for images, targets in data.eval_dataloader(split):
            self._count([image.to(self.device) for image in images], targets, truth)
        return self._scores(data.class_names)

    def _find(self, images: Sequence[Tensor]) -> tuple[ImageList, Tensor, Localized]:
        """The whole path: ``images -> batch -> features and superpixels -> head``."""
        batch = self._batch(images)
        superpixels, count = self.segmenter.batch(batch, self.backbone.pixel_format)
        features = self.backbone(batch.tensors)[self.level]
        return batch, superpixels, self.head(features, superpixels, count)

    def _map(
        self, place: int, batch: ImageList, superpixels: Tensor, found: Localized, present: Tensor | None, image: Tensor
    ) -> Tensor:
        """Maps ``[K, H, W]`` of one image of a batch in its own pixels."""
        height, width = batch.image_sizes[place]
        one = slice(place, place + 1)
        maps = self.head.maps(found.image(place), superpixels[one], None if present is None else present[one])
        maps, size = maps[:, :, :height, :width], (image.shape[1], image.shape[2])
        if size == (height, width):
            return maps[0]
        if self.head.settings.pooling == "none":
            return F.interpolate(maps, size, mode="bilinear", align_corners=False)[0]
        return F.interpolate(maps, size, mode="nearest-exact")[0]  # what is constant stays so

    def _count(self, images: Sequence[Tensor], targets: Sequence[Target], truth: Masks) -> tuple[Localized, Tensor]:
        """Add a batch to the confusion matrices; what was found in it, and which classes it has."""
        batch, superpixels, found = self._find(images)
        present = image_classes(targets, self.num_classes, len(images)).to(found.region_logits.device)
        for place, (image, target) in enumerate(zip(images, targets, strict=True)):
            mask = truth.read(image, target)
            for name, given in (("mIoU", None), ("mIoU_classes_given", present)):
                maps = self._map(place, batch, superpixels, found, given, image)
                predicted = segment(maps, self.head.settings.threshold).cpu().numpy()
                counted = confusion_matrix(mask, predicted, self.num_classes + 1)
                self.confusion[name] = self.confusion.get(name, np.zeros_like(counted)) + counted
        return found, present

    def _scores(self, names: Sequence[str]) -> dict[str, dict[str, Any]]:
        matrices = {**self.confusion, "mIoU_background": all_background(self.confusion["mIoU"])}
        return {name: segmentation_scores(matrix, names) for name, matrix in matrices.items()}


def image_classes(targets: Sequence[Target], num_classes: int, images: int | None = None) -> Tensor:
    """Tell which classes the ``images``, if their number is given, have: all that training reads of its targets.

    Crowd regions and difficult objects count, too: ``[N, K]`` float32, 1 where the image has the class; column 0 is label 1.

    Raises:
        ValueError: another number of targets, one without labels, or a label outside 1..K; the image is named.

    Example:
        >>> image_classes([{"labels": torch.tensor([3, 1, 3])}, {"labels": torch.tensor([], dtype=torch.long)}], 3).tolist()
        [[1.0, 0.0, 1.0], [0.0, 0.0, 0.0]]
    """
    if images is not None and images != len(targets):
        raise ValueError(f"expected one target for each image, got {len(targets)} targets for {images} images")
    present = torch.zeros(len(targets), num_classes)
    for index, (row, target) in enumerate(zip(present, targets, strict=True)):
        name = target.get("file_name", target.get("image_id", f"{index} of the batch"))
        labels = target.get("labels")
        if labels is None:
            raise ValueError(f"image {name}: the target has no labels; expected those of its objects, in any number")
        known = labels.unique().cpu()
        if known.numel() and not (known.min() >= 1 and known.max() <= num_classes):
            raise ValueError(f"image {name}: labels {known.tolist()} are not all in 1..{num_classes}")
        row[known - 1] = 1
    return present

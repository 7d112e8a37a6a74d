"""The data that flows through the pipeline, as plain tensors and packed arrays.

Letters used everywhere: N images, C channels, P proposals an image, R RoIs of the batch, G ground truths, D detections,
K foreground classes, I images of a data set, B boxes of a data set.

Boxes are ``[x1, y1, x2, y2]`` in continuous pixel coordinates: the top left pixel covers [0, 1) x [0, 1), so a box of the
whole image is ``[0, 0, width, height]`` and its area is ``(x2 - x1) * (y2 - y1)``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, TypedDict

import numpy as np
import numpy.typing as npt
from torch import Tensor

from detpipe.support.numbers import check_numbers

Features = dict[str, Tensor]  # level name, such as "c4" -> [N, C, H_l, W_l], finest level first


class Target(TypedDict, total=False):
    """What is known about one image. Every box is in the frame of the image that travels with it."""

    boxes: Tensor  # [G, 4] float32 xyxy, x2 > x1, y2 > y1
    labels: Tensor  # [G] int64 in 1..K; 0 is background
    image_id: int
    iscrowd: Tensor  # [G] bool: a region of many objects (COCO), neither positive nor negative
    difficult: Tensor  # [G] bool: an object that is hard to recognize (VOC), neither positive nor negative
    area: Tensor  # [G] float32, square pixels
    proposals: Tensor  # [P, 4] float32 xyxy
    file_name: str  # for messages
    # height and width of the picture in an image that the data resized, which nothing resizes again; at its right and bottom
    # there may be padding
    content_size: tuple[int, int]
    file_size: tuple[int, int]  # height and width of the image file, where the whole of it is the picture, resized
    repeated: bool  # another process trains on this image: it must not count a second time


class Detection(TypedDict):
    """What is found in one image, best score first; the layout that torchvision and torchmetrics use."""

    boxes: Tensor  # [D, 4] float32 xyxy in pixels of the image that was passed
    scores: Tensor  # [D] float32 in 0..1
    labels: Tensor  # [D] int64 in 1..K


class GlimpsedDetection(Detection):
    """A detection with the proposal that each box came from, and where a head looked beside it, in order."""

    proposals: Tensor  # [D, 4] xyxy in pixels of the image that was passed
    glimpses: Tensor  # [D, T, M, 2] (x, y): outlines of T glimpses, which may reach beyond the image


@dataclass(frozen=True)
class PixelFormat:
    """How a network expects its pixels; belongs to the backbone, because it comes with the weights.

    Args:
        mean: subtracted from each of the C channels, in ``value_range`` units, in ``channel_order``.
        std: divides each channel after the subtraction, in ``value_range`` units, in ``channel_order``.
        channel_order: ``"rgb"`` or ``"bgr"``, of three channels; others keep the order of the images.
        value_range: the value of a white pixel before normalization: 1.0 or 255.0.

    Raises:
        ValueError: an argument outside these choices.
    """

    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    channel_order: str = "rgb"
    value_range: float = 1.0

    def __post_init__(self) -> None:
        if self.channel_order not in ("rgb", "bgr"):
            raise ValueError(f"channel_order must be 'rgb' or 'bgr', got {self.channel_order!r}")
        check_numbers("must be positive and finite", value_range=self.value_range, std=self.std)
        check_numbers("must be finite", mean=self.mean)
        if not self.mean or len(self.mean) != len(self.std):
            raise ValueError(
                f"mean and std need a value a channel each, three for RGB; got mean {self.mean}, std {self.std}"
            )
        if self.channel_order == "bgr" and self.channels != 3:
            raise ValueError(f"channel_order 'bgr' is one of three channels, mean and std have {self.channels}")

    @property
    def channels(self) -> int:
        """C, how many channels the network takes."""
        return len(self.mean)

    def spread(self, channels: int) -> PixelFormat:
        """The format of a network whose weights were spread over other channels.

        Args:
            channels: C; one has the mean over all, others are repeated in order.

        Returns:
            Mean and std of C values, as :func:`detpipe.backbones.input_channels.spread_weight` spreads weights.

        Example:
            >>> PixelFormat(mean=(0.1, 0.2, 0.3), std=(1.0, 1.0, 1.0)).spread(4).mean
            (0.1, 0.2, 0.3, 0.1)
        """
        if channels == self.channels:
            return self
        mean, std = (
            (sum(values) / len(values),) if channels == 1 else tuple(values[k % len(values)] for k in range(channels))
            for values in (self.mean, self.std)
        )
        return replace(self, mean=mean, std=std, channel_order="rgb")


Range = tuple[float, float] | Literal["dtype"] | None


@dataclass(frozen=True)
class PixelType:
    """What image files are read as: ``[channels, H, W]``, 8 bits or floating point.

    Args:
        channels: C. One is grey, three are RGB; other numbers are planes as they lie in the file.
        range: which values of the files are black and white. None: all that 8 or 16 bits hold, and images are uint8, of 16 bits
            the high byte. ``"dtype"``: the same, in floating point 0..1 at full depth. Two values, such as ``[0, 4095]``: these, in
            floating point 0..1; values beyond are clipped.

    Raises:
        ValueError: an argument outside these choices.
    """

    channels: int = 3
    range: Range = None

    def __post_init__(self) -> None:
        if isinstance(self.channels, bool) or not 1 <= self.channels <= MOST_CHANNELS:
            raise ValueError(f"channels must lie in 1..{MOST_CHANNELS}, got {self.channels}")
        if self.range is None or self.range == "dtype":
            return
        if isinstance(self.range, str) or len(self.range) != 2 or not self.range[0] < self.range[1]:
            raise ValueError(f"range must be null, 'dtype' or [black, white], such as [0, 65535], got {self.range!r}")
        object.__setattr__(self, "range", (float(self.range[0]), float(self.range[1])))

    @property
    def white(self) -> float:
        """The value of a white pixel in images."""
        return 255 if self.range is None else 1.0


MOST_CHANNELS = 256
RGB = PixelType()  # what images are unless the data say otherwise


@dataclass(frozen=True)
class Federation:
    """For which classes the images of a set were searched, where that is not all of them (LVIS).

    A class that has a box in an image was searched for there.
    """

    negative: npt.NDArray[np.int64]  # [M, 2] image id, label: known not to be there
    not_exhaustive: npt.NDArray[np.int64]  # [M', 2] image id, label: there may be more than the boxes say
    frequencies: tuple[str, ...]  # [K], "r", "c" or "f": in few, some, many images of the training split


@dataclass(frozen=True)
class Segmentations:
    """The outlines of the B boxes of a data set as JSON in COCO's format, polygons or run lengths, packed and unchecked."""

    text: npt.NDArray[np.uint8]  # [W] UTF-8
    offsets: npt.NDArray[np.int64]  # [B + 1], box b has text[offsets[b]:offsets[b + 1]], empty where there is none
    ids: npt.NDArray[np.int64]  # [B] of the annotations in their file, for messages
    source: str = ""  # that file

    @classmethod
    def pack(
        cls, texts: Sequence[bytes | memoryview], ids: npt.NDArray[np.int64] | None = None, source: str = ""
    ) -> Segmentations:
        """Pack the outlines of B boxes, whose ids are 1..B where none are given."""
        ends = np.cumsum([0, *map(len, texts)], dtype=np.int64)
        ids = np.arange(1, len(texts) + 1) if ids is None else ids
        return cls(np.frombuffer(b"".join(texts), dtype=np.uint8), ends, ids, source)

    @classmethod
    def concat(cls, parts: Sequence[Segmentations]) -> Segmentations:
        """Put those of several data sets one after the other."""
        starts = np.cumsum([0, *(len(part.text) for part in parts)]).tolist()
        return cls(
            np.concatenate([part.text for part in parts]),
            np.concatenate([[0], *(part.offsets[1:] + start for part, start in zip(parts, starts[:-1], strict=True))]),
            np.concatenate([part.ids for part in parts]),
            parts[0].source,
        )

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, box: int) -> bytes:
        return self.text[self.offsets[box] : self.offsets[box + 1]].tobytes()

    def take(self, boxes: npt.NDArray[np.int64]) -> Segmentations:
        """Keep those of some of the boxes, in the order of the indices ``boxes``."""
        text: Any = self.text
        view, starts, ends = memoryview(text), self.offsets[boxes].tolist(), self.offsets[boxes + 1].tolist()
        return Segmentations.pack(
            [view[start:end] for start, end in zip(starts, ends, strict=True)], self.ids[boxes], self.source
        )


BOX_FIELDS = ("boxes", "labels", "iscrowd", "difficult", "area")  # of Annotations, [B]


@dataclass(frozen=True)
class Annotations:
    """The ground truth of one split in packed arrays, so that data workers share it instead of copying it.

    Boxes of image ``i`` are the rows ``offsets[i]:offsets[i + 1]`` of the box arrays.
    """

    root: Path  # the folder that file_names are relative to
    file_names: npt.NDArray[np.str_]  # [I]
    image_ids: npt.NDArray[np.int64]  # [I] unique
    sizes: npt.NDArray[np.int32]  # [I, 2] height, width
    offsets: npt.NDArray[np.int64]  # [I + 1]
    boxes: npt.NDArray[np.float64]  # [B, 4] xyxy
    labels: npt.NDArray[np.int64]  # [B] in 1..K
    iscrowd: npt.NDArray[np.bool_]  # [B]
    difficult: npt.NDArray[np.bool_]  # [B]
    area: npt.NDArray[np.float64]  # [B] square pixels
    class_names: tuple[str, ...]  # [K], the name of label 1 first
    category_ids: tuple[int, ...]  # [K], the ids of the annotation file; 1..K where it has none
    federation: Federation | None = None  # None: every image was searched for every class
    counts: dict[str, int] = field(default_factory=dict)  # "images read", "boxes clipped", "boxes skipped: ..."
    segmentations: Segmentations | None = None  # only read where something asks for masks
    # [I, 4] x1, y1, x2, y2 of images that are parts of their files; None: none is
    windows: npt.NDArray[np.int32] | None = None

    def __len__(self) -> int:
        return len(self.image_ids)

    @property
    def num_classes(self) -> int:
        """K, the number of foreground classes."""
        return len(self.class_names)

    @property
    def box_image(self) -> npt.NDArray[np.int64]:
        """[B] the row of the image that each box belongs to."""
        return np.repeat(np.arange(len(self)), np.diff(self.offsets))

    def rows_of(self, image: int) -> range:
        """The rows of the boxes of an image, by its row."""
        first, last = self.offsets[image : image + 2].tolist()
        return range(first, last)

    def subset(self, rows: npt.NDArray[np.int64]) -> Annotations:
        """Keep some of the images, by the rows ``[J]`` of the I images, in that order."""
        spans = [np.arange(*span) for span in np.stack([self.offsets[rows], self.offsets[rows + 1]], axis=1).tolist()]
        boxes = np.concatenate([np.zeros(0, dtype=np.int64), *spans])
        names = ("file_names", "image_ids", "sizes", *(() if self.windows is None else ("windows",)))
        images: dict[str, Any] = {name: getattr(self, name)[rows] for name in names}
        return replace(self._with_boxes(boxes, np.cumsum([0, *map(len, spans)])), **images)

    def keep_boxes(self, keep: npt.NDArray[np.bool_]) -> Annotations:
        """Keep some of the boxes, ``[B]`` bool, and all images."""
        return self._with_boxes(np.flatnonzero(keep), np.concatenate([[0], np.cumsum(keep)])[self.offsets])

    def _with_boxes(self, rows: npt.NDArray[np.int64], offsets: npt.NDArray[np.int64]) -> Annotations:
        boxes: dict[str, Any] = {name: getattr(self, name)[rows] for name in BOX_FIELDS}
        segmentations = None if self.segmentations is None else self.segmentations.take(rows)
        return replace(self, offsets=offsets, segmentations=segmentations, **boxes)


@dataclass(frozen=True)
class DetectionArrays:
    """Detections of a whole data set in packed arrays, boxes in pixels of the original images."""

    image_ids: npt.NDArray[np.int64]  # [D]
    boxes: npt.NDArray[np.float64]  # [D, 4] xyxy
    scores: npt.NDArray[np.float64]  # [D]
    labels: npt.NDArray[np.int64]  # [D] in 1..K

    def take(self, rows: npt.NDArray[np.int64] | npt.NDArray[np.bool_]) -> DetectionArrays:
        """Keep some of the detections, by indices, whose order is kept, or ``[D]`` bool."""
        return DetectionArrays(self.image_ids[rows], self.boxes[rows], self.scores[rows], self.labels[rows])

"""What each pixel of an image truly shows: VOC's segmentation masks, COCO's segmentations, or what can be made of boxes.

Masks are ``[H, W]`` int32 in the frame of the image file: 0 is background, 1..K the classes, -1 is ignored.

::

    root/JPEGImages/2007_000032.jpg             VOC: palette PNGs in which 255 is ignored; only the images of the lists in
    root/SegmentationClass/2007_000032.png      ImageSets/Segmentation have them
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from PIL import Image
from torch import Tensor

from detpipe.datasets.datamodule import DetectionData, Split
from detpipe.datasets.decode import naming
from detpipe.datasets.formats.coco import COCO
from detpipe.datasets.formats.voc import VOC
from detpipe.datasets.planes import Refused, check_pixels
from detpipe.datasets.segmentations import IGNORED, Mask, draw_classes
from detpipe.regions.superpixels import Segmentation, Segmenter
from detpipe.support.errors import DataError
from detpipe.types import Annotations, Segmentations, Target

Kind = Literal["auto", "superpixels", "boxes"]

VOC_IGNORED = 255
_STEPS: dict[Any, int] = {"L;2": 85, "L;4": 17}  # gray of 2 and 4 bits is spread over 0 to 255 when it is decoded
TRUTH_SEGMENTS = 400  # superpixels an image of masks that are made of boxes, whatever a model uses


@dataclass(frozen=True)
class Masks:
    """The true masks of a split."""

    source: str  # what they are and where they come from, for a log
    # an image ``[3, H, W]`` uint8 RGB as in its file, nothing augmented, and its target -> its mask ``[H, W]``; a DataError names
    # the file if there is none, or it does not fit the image
    read: Callable[[Tensor, Target], Mask]


def open_masks(data: DetectionData, split: Split, kind: Kind = "auto") -> Masks:
    """Find the true masks of a split; ``source`` says which they are.

    "auto" takes the masks of the data set, and where it has none "superpixels", which gives each superpixel the class of the box
    that covers most of it; "boxes" gives each pixel that of its box. A ValueError for another kind; a DataError if the data set
    has masks for some images only, or they cannot be read.
    """
    if kind not in ("auto", "superpixels", "boxes"):
        raise ValueError(f"kind must be 'auto', 'superpixels' or 'boxes', got {kind!r}")
    annotations, why = data.annotations(split), "as asked for"
    if kind == "auto":
        if annotations.windows is not None:
            why = "tiles have boxes only"
        elif isinstance(data, VOC):
            if any((annotations.root / path).parent.is_dir() for path in map(_png, annotations.file_names)):
                return _voc_masks(annotations)
            why = f"{data.root} has no folder SegmentationClass"
        elif isinstance(data, COCO):
            outlined = data.with_outlines(split)
            if outlined.segmentations is not None and len(outlined.segmentations.text):
                return _coco_masks(outlined, outlined.segmentations)
            why = f"{data.files(split)[0]} has no segmentations"
        else:
            why = f"{type(data).__name__} has boxes only"
    if kind == "boxes":
        return Masks(f"boxes: {why}", partial(mask_of_boxes, None))
    source = f"superpixel-majority masks of boxes ({TRUTH_SEGMENTS} SLIC superpixels an image): {why}"
    return Masks(source, partial(mask_of_boxes, Segmenter(Segmentation(TRUTH_SEGMENTS))))


def _voc_masks(annotations: Annotations) -> Masks:
    """Palette PNGs in ``SegmentationClass``; a DataError if an image of the split has none."""
    root = annotations.root
    missing = [path for path in map(_png, annotations.file_names) if not (root / path).is_file()]
    if missing:
        raise DataError(
            f"{root / missing[0]}: no such mask, and {len(missing) - 1} more of {len(annotations)} are missing; name a "
            "list of images that have masks as the split, such as ImageSets/Segmentation/val.txt"
        )

    def read(image: Tensor, target: Target) -> Mask:
        path = root / _png(target["file_name"])  # type: ignore[typeddict-item]
        return voc_mask(path, (image.shape[1], image.shape[2]), annotations.num_classes)

    return Masks(f"segmentation masks of {root} (SegmentationClass)", read)


def _coco_masks(annotations: Annotations, outlines: Segmentations) -> Masks:
    """Polygons and run lengths of an annotation file; a DataError if an annotation has none."""
    without = np.flatnonzero(np.diff(outlines.offsets) == 0)
    if len(without):
        raise DataError(
            f"{outlines.source}: annotation id {outlines.ids[without[0]]} has no segmentation, but others have; add it, or "
            "remove all"
        )
    rows = {key: row for row, key in enumerate(annotations.image_ids.tolist())}

    def read(_: Tensor, target: Target) -> Mask:
        return draw_classes(annotations, rows[int(target["image_id"])])  # type: ignore[typeddict-item]

    return Masks(f"segmentations of {outlines.source}", read)


def mask_of_boxes(segmenter: Segmenter | None, image: Tensor, target: Target) -> Mask:
    """Make the mask of an image of its boxes: of each superpixel that they cover most of, or without a segmenter of each pixel."""
    height, width = image.shape[1:]
    regions = np.arange(height * width).reshape(height, width) if segmenter is None else segmenter(image)
    labels = target["labels"].cpu().numpy()  # type: ignore[typeddict-item]
    if (crowd := target.get("iscrowd")) is not None:
        labels = np.where(crowd.cpu().numpy(), IGNORED, labels)
    return majority_mask(regions, target["boxes"].cpu().numpy(), labels)  # type: ignore[typeddict-item]


def voc_mask(path: str | Path, size: tuple[int, int], classes: int) -> Mask:
    """Read a segmentation mask of VOC, ``[H, W]``: a palette (or gray) PNG whose values are classes 0..K; 255 is ignored.

    A DataError if the file is missing, is not such a PNG, is of another size than the image, or has a class that is not known.
    """
    with naming(path, None, "decoded"), Image.open(path) as png:
        check_pixels(png.height, png.width)
        if png.mode not in ("P", "L"):
            raise Refused(f"expected a palette or gray PNG, whose values are classes, got mode {png.mode!r}")
        step = _STEPS.get(png.tile[0].args, 1)  # loading empties the list
        mask = np.array(png, dtype=np.int32) // step
    if mask.shape != size:
        raise DataError(
            f"{path}: the mask is {mask.shape[1]} x {mask.shape[0]} pixels, but its image {size[1]} x {size[0]}"
        )
    mask[mask == VOC_IGNORED] = IGNORED
    if mask.max() > classes:
        raise DataError(f"{path}: has the class {mask.max()}, expected 0 (background) to {classes}, or 255 (ignored)")
    return mask


def majority_mask(regions: npt.NDArray[np.integer], boxes: npt.NDArray[Any], labels: npt.NDArray[Any]) -> Mask:
    """Give each region the class of the box that covers most of it, if that is more than half; background otherwise.

    ``regions`` is ``[H, W]`` the region of each pixel, from 0; boxes ``[G, 4]`` xyxy cover pixels whose center they hold. Of
    boxes that cover as much, the smaller one counts.

    Example:
        >>> majority_mask(np.array([[0, 0, 0, 1]]), np.array([[1.0, 0.0, 3.0, 1.0]]), np.array([7])).tolist()
        [[7, 7, 7, 0]]
    """
    pixels = np.bincount(regions.ravel())
    best, label = pixels / 2, np.zeros(len(pixels), np.int32)
    areas = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    for g in np.argsort(areas, kind="stable").tolist():
        x1, y1, x2, y2 = np.ceil(boxes[g] - 0.5).clip(min=0).astype(int).tolist()  # pixels whose centers are inside
        covered = np.bincount(regions[y1:y2, x1:x2].ravel(), minlength=len(pixels))
        better = covered > best
        best[better], label[better] = covered[better], labels[g]
    return label[regions]


def _png(file_name: str) -> str:
    """``VOC2012/JPEGImages/a.jpg`` -> ``VOC2012/SegmentationClass/a.png``."""
    path = PurePosixPath(file_name)
    return str(path.parent.parent / "SegmentationClass" / f"{path.stem}.png")

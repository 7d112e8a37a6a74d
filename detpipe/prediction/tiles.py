"""Detection in large images, whose objects are too small once the image is resized: tile by tile, and the whole image too.

Akyon, Altinuc and Temizel, "Slicing Aided Hyper Inference", 2022, arXiv 2202.06934.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from detpipe import boxes as box_ops
from detpipe.datasets.tiling import View, tile_views
from detpipe.prediction.detector import Detector
from detpipe.prediction.merging import Merge
from detpipe.prediction.windows import ImageWindows, Windows
from detpipe.types import Detection, Target

_OVERVIEW = 2048  # pixels of the longer side of a large file at least, when the whole of it is looked at
_VISIBLE = 0.5  # a proposal is looked at in the tiles that hold at least so much of it


@dataclass(frozen=True)
class TiledDetector:
    """A detector that looks at each image tile by tile.

    Args:
        detector: what looks at a tile.
        size: of a tile, height and width in pixels.
        overlap: share of a tile that the next one has too: an object that is smaller is whole in one of them.
        whole: whether the whole image is looked at too, for objects that are larger than a tile.
        merge: how what several tiles find becomes one.
        batch_size: tiles that the detector gets at a time.

    Raises:
        ValueError: a size or batch size below 1, or an overlap outside 0 to .9.

    Example:
        >>> import torch
        >>> class Bright:  # one box around all that is not black
        ...     def __call__(self, images, targets=None):
        ...         return [self.find(image) for image in images]
        ...     def find(self, image):
        ...         y, x = (image[0] > 0).nonzero(as_tuple=True)
        ...         boxes = [[x.min(), y.min(), x.max() + 1, y.max() + 1]] if len(x) else []
        ...         count = len(boxes)
        ...         return {"boxes": torch.tensor(boxes).reshape(-1, 4).float(), "scores": torch.ones(count),
        ...                 "labels": torch.ones(count, dtype=torch.int64)}
        >>> image = torch.zeros(3, 40, 100)
        >>> image[:, 5:20, 30:60] = 1
        >>> [found] = TiledDetector(Bright(), size=40, overlap=0.25, whole=False)([image])
        >>> found["boxes"]
        tensor([[30.,  5., 60., 20.]])
    """

    detector: Detector
    size: int = 640
    overlap: float = 0.2
    whole: bool = True
    merge: Merge = Merge()  # noqa: RUF009 (frozen)
    batch_size: int = 4

    def __post_init__(self) -> None:
        if min(self.size, self.batch_size) < 1 or not 0 <= self.overlap <= 0.9:
            raise ValueError(
                f"expected size and batch_size of at least 1 and an overlap of 0 to .9, got {self.size}, {self.batch_size} and "
                f"{self.overlap}"
            )

    def __call__(self, images: Sequence[Tensor], targets: Sequence[Target] | None = None) -> list[Detection]:
        """Detect in N images ``[C, H_i, W_i]``; see `Detector`."""
        own = targets or [None] * len(images)
        return [self.detect(ImageWindows(image), target) for image, target in zip(images, own, strict=True)]

    def detect(self, image: Windows, target: Target | None = None) -> Detection:
        """Detect in one image that is read by parts, of which no more than a batch of tiles is held at a time."""
        height, width = image.size
        views = tile_views(height, width, self.size, self.overlap)
        if len(views) == 1:
            return self._look(image, views, target)[0]
        found = []
        for start in range(0, len(views), self.batch_size):
            found += self._look(image, views[start : start + self.batch_size], target)
        if self.whole:
            found.append(self._look_at_whole(image, target))
            views = [*views, (0, 0, width, height)]
        return self.merge(found, views)

    def _look(self, image: Windows, views: Sequence[View], target: Target | None) -> list[Detection]:
        parts = [image.read(y1, x1, y2 - y1, x2 - x1) for x1, y1, x2, y2 in views]
        targets = None if target is None else [_part_of(target, view) for view in views]
        return [_moved(found, view) for found, view in zip(self.detector(parts, targets), views, strict=True)]

    def _look_at_whole(self, image: Windows, target: Target | None) -> Detection:
        reduced, factor = image.reduced(_OVERVIEW)
        if target is not None and "proposals" in target:
            target = {"proposals": target["proposals"] / factor}
        [found] = self.detector([reduced], None if target is None else [target])
        boxes = box_ops.clip(found["boxes"] * factor, *image.size)  # the last squares may reach beyond it
        return Detection(boxes=boxes, scores=found["scores"], labels=found["labels"])


def _part_of(target: Target, view: View) -> Target:
    """The proposals of an image that lie in a view, in its pixels."""
    if "proposals" not in target:
        return {}
    boxes = target["proposals"]
    x1, y1, x2, y2 = view
    moved = box_ops.clip(boxes - box_ops.constants((x1, y1, x1, y1), boxes), y2 - y1, x2 - x1)
    visible = box_ops.valid(moved) & (box_ops.area(moved) >= _VISIBLE * box_ops.area(boxes))
    return {"proposals": moved[visible]}


def _moved(found: Detection, view: View) -> Detection:
    boxes = found["boxes"] + box_ops.constants((view[0], view[1]) * 2, found["boxes"])
    return Detection(boxes=boxes, scores=found["scores"], labels=found["labels"])

"""A detector that can be calculated with: it finds each bright spot, exactly as far as it is seen."""

from __future__ import annotations

from collections.abc import Sequence

import cv2
import numpy as np
import torch
from torch import Tensor

from detpipe.types import Detection, Target


class Bright:
    """Finds 4-connected spots that are not black; a spot's gray level is its class; larger spots score higher."""

    def __init__(self) -> None:
        self.shapes: list[tuple[int, ...]] = []
        self.targets: list[Target] = []

    def __call__(self, images: Sequence[Tensor], targets: Sequence[Target] | None = None) -> list[Detection]:
        self.shapes += [tuple(image.shape[1:]) for image in images]
        self.targets += targets or []
        return [self._find(image[0].numpy()) for image in images]

    def _find(self, image: np.ndarray) -> Detection:
        rows = []
        for label in np.unique(image[image > 0]).tolist():
            _, _, found, _ = cv2.connectedComponentsWithStats((image == label).astype(np.uint8), connectivity=4)
            rows += [(label, area, x, y, x + w, y + h) for x, y, w, h, area in found[1:].tolist()]
        rows.sort(key=lambda row: -row[1])
        table = torch.tensor(rows, dtype=torch.float32).reshape(-1, 6)
        return {"boxes": table[:, 2:], "scores": table[:, 1] / 1e6, "labels": table[:, 0].long()}


def scene(height: int, width: int, boxes: Sequence[Sequence[int]], labels: Sequence[int] | None = None) -> Tensor:
    """An image ``[3, H, W]`` of black with spots."""
    image = torch.zeros(3, height, width, dtype=torch.uint8)
    for (x1, y1, x2, y2), label in zip(boxes, labels or [1] * len(boxes), strict=True):
        image[:, y1:y2, x1:x2] = label
    return image


def rows(found: Detection) -> list[list[float]]:
    """Label and box of each detection, sorted; what fusion has computed is rounded."""
    boxes = found["boxes"].double().round(decimals=3).tolist()
    return sorted([label, *box] for label, box in zip(found["labels"].tolist(), boxes, strict=True))

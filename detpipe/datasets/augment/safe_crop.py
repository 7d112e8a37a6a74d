"""The step behind `SafeCrop`; importing this module imports albumentations and OpenCV."""

from __future__ import annotations

from detpipe.datasets.augment.rectangles import areas, clipped  # isort: skip

from typing import Any

import albumentations
import numpy as np
import numpy.typing as npt
from albumentations.core.type_definitions import Targets

from detpipe.datasets.augment.settings import SafeCrop

_ATTEMPTS = 50  # as SSD
_ROUNDING = 1e-9
CROWD_OR_PROPOSAL, DIFFICULT, OBJECT = 0, 1, 2  # the kinds of boxes


class SafeCropStep(albumentations.DualTransform):
    """Cut a random window of whole pixels that keeps an object.

    Boxes come as ``[M, 7]``: x1, y1, x2, y2 in image sizes, place, kind, and the share that is left of them.

    Args:
        settings: what is promised.
        min_visibility: of the whole augmentation; the larger of both is promised.
    """

    _targets = (Targets.IMAGE, Targets.BBOXES)

    def __init__(self, settings: SafeCrop, min_visibility: float) -> None:
        super().__init__(p=settings.p)
        self.settings = settings
        self.least = max(settings.min_visibility, min_visibility) - _ROUNDING

    def get_params_dependent_on_data(self, params: dict[str, Any], data: dict[str, Any]) -> dict[str, Any]:
        """Draw the window ``x1, y1, x2, y2``, the whole image if none was found that keeps an object."""
        height, width = params["shape"][:2]
        rows = np.asarray(data["bboxes"], dtype=np.float64)
        wanted = rows[rows[:, 5] == OBJECT]
        for _ in range(_ATTEMPTS):
            window = self._draw(width, height)
            if len(wanted) == 0 or (_visible(wanted, window, width, height) >= self.least).any():
                return {"window": window}
        return {"window": None}

    def _draw(self, width: int, height: int) -> tuple[int, int, int, int]:
        scale = self.py_random.uniform(*self.settings.scale)
        shape = float(np.exp(self.py_random.uniform(*np.log(self.settings.ratio)) / 2))
        w = min(width, max(1, round(width * scale * shape)))
        h = min(height, max(1, round(height * scale / shape)))
        x, y = self.py_random.randint(0, width - w), self.py_random.randint(0, height - h)
        return x, y, x + w, y + h

    def apply(self, img: npt.NDArray[Any], window: Any, **params: Any) -> npt.NDArray[Any]:
        """Cut the window out of ``[H, W, 3]``."""
        if window is None:
            return img
        x1, y1, x2, y2 = window
        return img[y1:y2, x1:x2]

    def apply_to_bboxes(self, bboxes: npt.NDArray[np.float64], window: Any, **params: Any) -> npt.NDArray[np.float64]:
        """Move boxes into the window, and remove objects of which it shows too little."""
        if window is None:
            return bboxes
        height, width = params["shape"][:2]
        x1, y1, x2, y2 = window
        kept = bboxes[(_visible(bboxes, window, width, height) >= self.least) | (bboxes[:, 5] == CROWD_OR_PROPOSAL)]
        size, inner = np.array([width, height] * 2), np.array([x2 - x1, y2 - y1] * 2)
        kept[:, :4] = (kept[:, :4] * size - np.array([x1, y1] * 2)) / inner
        return kept


def _visible(rows: npt.NDArray[np.float64], window: Any, width: int, height: int) -> npt.NDArray[np.float64]:
    """The part [M] of what was annotated that is left inside the window."""
    boxes = rows[:, :4] * np.array([width, height] * 2)
    return rows[:, 6] * areas(clipped(boxes, window)) / areas(boxes).clip(min=1e-12)

"""Boxes to look at that somebody sends with an image, in the place of those that a detector finds itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
from torch import Tensor

from detpipe.detector import TwoStageDetector
from detpipe.proposal_files.box_checks import explain, find_faults, read_boxes
from detpipe.proposals import PrecomputedProposals
from detpipe.support.errors import DataError
from detpipe.support.strict_json import parse_json
from detpipe.types import Detection, Target

MOST = 5000  # boxes of an image: what a detector needs grows with them


def parse_boxes(text: str, size: tuple[int, int]) -> Tensor:
    """Read JSON ``[[x1, y1, x2, y2], ...]`` in pixels of an image of a size (height, width).

    Returns:
        ``[P, 4]`` float32 xyxy.

    Raises:
        DataError: it is something else, there are too many, or a box is not finite, has a negative side or lies outside of the
            image; the first such box is named.

    Example:
        >>> parse_boxes("[[0, 0, 4, 5.5]]", (10, 10))
        tensor([[0.0000, 0.0000, 4.0000, 5.5000]])
    """
    boxes = read_boxes(parse_json(text, "boxes"), "boxes")
    if len(boxes) > MOST:
        raise DataError(f"boxes: {len(boxes)} are too many, at most {MOST} are looked at: send the best")
    for reason, rows in find_faults(boxes, np.ones(len(boxes)), size).items():
        first = int(rows.argmax())
        raise DataError(f"boxes: box {first} {explain(reason, boxes[first], 1.0, size)}")
    return torch.from_numpy(boxes).float()


@dataclass(frozen=True)
class AtGivenBoxes:
    """A detector that looks at the ``proposals`` of targets where there are any, and else where it does by itself.

    It is not to be called from several threads at a time.

    Args:
        detector: that looks.
    """

    detector: TwoStageDetector

    @torch.inference_mode()
    def __call__(self, images: Sequence[Tensor], targets: Sequence[Target] | None = None) -> list[Detection]:
        """Detect in N images ``[C, H_i, W_i]``: N detections on the CPU, in pixels of the images."""
        detector = self.detector
        own, device = detector.proposals, detector.device
        moved: list[Target] | None = None
        if targets is not None:
            detector.proposals = PrecomputedProposals(max_boxes=None)
            moved = [{"proposals": target["proposals"].to(device)} for target in targets]
        try:
            found = detector([image.to(device) for image in images], moved)
        finally:
            detector.proposals = own
        return [on_cpu(one) for one in found]


def on_cpu(found: Detection) -> Detection:
    """Detections with all that they have, on the CPU."""
    return cast(Detection, {name: values.cpu() for name, values in cast(dict[str, Tensor], found).items()})

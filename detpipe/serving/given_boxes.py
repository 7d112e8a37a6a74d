"""Boxes to look at that somebody sends with an image, in the place of those that a detector finds itself."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from detpipe.detector import TwoStageDetector
from detpipe.prediction import PlacedDetector
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


@contextmanager
def at_given_boxes(detector: TwoStageDetector) -> Iterator[None]:
    """Let a detector look at the ``proposals`` of targets while it lasts; what other threads ask it meanwhile looks there too."""
    own = detector.proposals
    detector.proposals = PrecomputedProposals(max_boxes=None)
    try:
        yield
    finally:
        detector.proposals = own


@dataclass(frozen=True)
class AtGivenBoxes:
    """A detector that looks at the ``proposals`` of targets where there are any, and else where it does by itself.

    Args:
        detector: that looks, from one thread at a time.
    """

    detector: TwoStageDetector

    def __call__(self, images: Sequence[Tensor], targets: Sequence[Target] | None = None) -> list[Detection]:
        """Detect in N images ``[C, H_i, W_i]``: N detections on the CPU, in pixels of the images."""
        with nullcontext() if targets is None else at_given_boxes(self.detector):
            return PlacedDetector(self.detector, self.detector.device)(images, targets)

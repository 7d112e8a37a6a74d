"""Whether an exported file finds what the detector finds, on images that are easy to get wrong."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from detpipe.detector import TwoStageDetector
from detpipe.heads.base import ProposalHead
from detpipe.proposals import PrecomputedProposals
from detpipe.types import Detection

SHAPES = ((1, 1), (3, 4), (4, 3), (1, 3), (5, 2))  # height to width
BOX_ERROR, SCORE_ERROR = 1e-3, 1e-5  # pixels; probability
ROUNDING = 4  # or so many times what the detector itself loses by rounding
FAR = 0.1, 1e-2  # a detection that differs more was not moved by rounding, but decided otherwise
Arrays = npt.NDArray[Any]
Run = Callable[[Arrays, Arrays | None], Sequence[dict[str, Arrays]]]  # that of `OnnxDetector`


@dataclass(frozen=True)
class Parity:
    """What a comparison found."""

    images: int
    detections: int
    box_error: float  # the largest, in pixels
    score_error: float
    faults: tuple[str, ...]  # one for each image that is not alike

    def joined(self, other: Parity) -> Parity:
        """What two comparisons found together."""
        return Parity(
            self.images + other.images,
            self.detections + other.detections,
            max(self.box_error, other.box_error),
            max(self.score_error, other.score_error),
            self.faults + other.faults,
        )

    def __str__(self) -> str:
        errors = f"boxes within {self.box_error:.1e} px, scores within {self.score_error:.1e}"
        return f"{self.images} images, {self.detections} detections: {errors}; {len(self.faults)} images differ"


def sample_images(detector: TwoStageDetector, seed: int = 0) -> list[Tensor]:
    """Make batches ``[N, C, H, W]`` uint8: five shapes, a batch of three, a size without padding, a grey image.

    Pictures are smooth, with noise on them, so that features differ from place to place; of boxes with equal scores, as a wholly
    blank image has them, any may come first. The grey image has noise of one level.
    """
    generator = torch.Generator().manual_seed(seed)
    divisor = detector.divisor or max(detector.backbone.strides.values())
    area = detector.min_size * min(detector.max_size, 1.25 * detector.min_size) / 4
    sizes = [(round((area * a / b) ** 0.5), round((area * b / a) ** 0.5)) for a, b in SHAPES]
    whole = max(divisor, detector.min_size // divisor * divisor)
    channels = detector.backbone.pixel_format.channels
    shapes = [*((1, *size) for size in sizes), (3, *sizes[1]), (1, whole, whole)]
    batches = [_picture((count, channels), size, generator) for count, *size in shapes]
    batches.append(torch.randint(127, 129, (1, channels, *sizes[0]), generator=generator, dtype=torch.uint8))
    return batches


def _picture(maps: tuple[int, int], size: Sequence[int], generator: torch.Generator) -> Tensor:
    coarse = torch.rand(*maps, 6, 6, generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, tuple(size), mode="bicubic")
    noise = torch.rand(*maps, *size, generator=generator) - 0.5
    return ((smooth + 0.2 * noise).clamp(0, 1) * 255).to(torch.uint8)


def sample_boxes(images: Tensor, count: int = 60, seed: int = 0) -> Tensor:
    """Draw boxes ``[N, P, 4]`` inside of images."""
    generator = torch.Generator().manual_seed(seed)
    corners = torch.rand(len(images), count, 2, 2, generator=generator).sort(dim=2).values
    sides = torch.tensor([images.shape[3], images.shape[2]], dtype=torch.float32)
    return (corners * sides).flatten(2)


@torch.no_grad()
def compare(
    detector: TwoStageDetector, run: Run, batches: Sequence[Tensor], takes_boxes: bool, threshold: float | None = None
) -> Parity:
    """Compare what a detector and a file of it find.

    Args:
        detector: in evaluation mode.
        run: the file.
        batches: ``[N, C, H, W]`` uint8 each.
        takes_boxes: whether the file takes boxes; both get those of :func:`sample_boxes` then.
        threshold: of the scores that the detector finds; None for its own.

    Returns:
        How far apart they are, and what differs.
    """
    detector = copy.deepcopy(detector)
    assert isinstance(detector.head, ProposalHead)
    if takes_boxes and not isinstance(detector.proposals, PrecomputedProposals):
        detector.proposals = PrecomputedProposals(max_boxes=None)
    if threshold is not None:
        detector.head.postprocess = replace(detector.head.postprocess, score_threshold=threshold)
    given = [sample_boxes(batch) if takes_boxes else None for batch in batches]

    def detect() -> list[list[Detection]]:
        targets: list[Any] = [None if own is None else [{"proposals": one} for one in own] for own in given]
        return [detector([*batch], target) for batch, target in zip(batches, targets, strict=True)]

    expected = detect()
    detector.double()
    limits = _limits([*chain(*expected)], [*chain(*detect())])
    errors: list[tuple[float, float]] = []
    faults = []
    for batch, boxes, wanted in zip(batches, given, expected, strict=True):
        found = run(batch.numpy(), None if boxes is None else boxes.numpy())
        for index, (own, other) in enumerate(zip(wanted, found, strict=True)):
            box_error, score_error, fault = _differences(own, other, *limits)
            errors.append((box_error, score_error))
            if fault:
                faults.append(f"image {index} of a batch {list(batch.shape)}: {fault}")
    box_error, score_error = (max(column) for column in zip((0.0, 0.0), *errors, strict=True))
    count = sum(len(one["scores"]) for one in chain(*expected))
    return Parity(len(errors), count, box_error, score_error, tuple(faults))


def _limits(own: Sequence[Detection], exact: Sequence[Detection]) -> tuple[float, float]:
    """How far boxes and scores may be apart, by how far they are from those of float64."""
    box_error, score_error = BOX_ERROR / ROUNDING, SCORE_ERROR / ROUNDING
    for one, true in zip(own, exact, strict=True):
        boxes = (one["boxes"][:, None].double() - true["boxes"]).abs().amax(2)  # [D, those of float64]
        scores = (one["scores"][:, None].double() - true["scores"]).abs()
        near = (one["labels"][:, None] == true["labels"]) & (boxes < FAR[0]) & (scores < FAR[1])
        if near.any():
            nearest = near & (boxes == boxes.where(near, torch.inf).amin(1, keepdim=True))
            box_error = max(box_error, float(boxes[nearest].max()))
            score_error = max(score_error, float(scores[nearest].max()))
    return ROUNDING * box_error, ROUNDING * score_error


def _differences(
    own: Detection, other: dict[str, Any], box_limit: float, score_limit: float
) -> tuple[float, float, str]:
    """The largest differences of boxes and scores, and what is wrong; detections with equal scores may change places."""
    boxes, scores, labels = (own[key].numpy() for key in ("boxes", "scores", "labels"))
    if len(scores) != len(other["scores"]):
        return 0.0, 0.0, f"{len(scores)} detections, the file has {len(other['scores'])}"
    box_error = score_error = 0.0
    free = np.ones(len(scores), dtype=bool)
    for place in range(len(scores)):
        apart = np.abs(other["scores"] - scores[place])
        may = free & (other["labels"] == labels[place]) & (apart <= score_limit)
        distance = np.where(may, np.abs(other["boxes"] - boxes[place]).max(1), np.inf)
        best = int(distance.argmin())
        if not distance[best] <= box_limit:
            what = f"label {labels[place]}, score {scores[place]:.6f}, box {boxes[place].round(3).tolist()}"
            same = [other[key][place].round(6).tolist() for key in ("labels", "scores", "boxes")]
            return box_error, score_error, f"detection {place}, {what}, is {same} in the file"
        free[best] = False
        box_error, score_error = max(box_error, float(distance[best])), max(score_error, float(apart[best]))
    return box_error, score_error, ""

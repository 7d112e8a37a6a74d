"""What came of one image at a score: objects found and missed, detections right and wrong, ready to be drawn or listed."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from detpipe.evaluation.error_types import FALSE_POSITIVES, Errors
from detpipe.evaluation.matches import Matches
from detpipe.evaluation.pairs import Floats, Integers
from detpipe.evaluation.records import image_ranks
from detpipe.evaluation.worst_images import image_costs
from detpipe.types import Annotations


@dataclass(frozen=True)
class ImageOutcome:
    """One image with G objects, and its D detections of at least a score, best score first.

    Args:
        row: of the image in the annotations.
        image_id: its id.
        file_name: as the annotations give it.
        cost: AP50 that would be gained if everything in this image were detected right.
        boxes: ``[G, 4]`` xyxy of the objects.
        labels: ``[G]`` in 1..K.
        states: G times ``"found"``, ``"missed"`` or ``"ignored"``.
        found_boxes: ``[D, 4]`` xyxy of the detections.
        found_labels: ``[D]`` in 1..K.
        scores: ``[D]``.
        found_states: D times ``"right"``, ``"ignored"``, or one of ``FALSE_POSITIVES``.
    """

    row: int
    image_id: int
    file_name: str
    cost: float
    boxes: Floats
    labels: Integers
    states: tuple[str, ...]
    found_boxes: Floats
    found_labels: Integers
    scores: Floats
    found_states: tuple[str, ...]


def worst_images(
    annotations: Annotations, matches: Matches, errors: Errors, score: float, count: int
) -> list[ImageOutcome]:
    """Choose the images that cost most AP50.

    Args:
        annotations: the ground truth.
        matches: of it, at an IoU of 0.5.
        errors: of the matches.
        score: detections below it are not listed, and find nothing.
        count: at most so many images; those that cost nothing are left out.

    Returns:
        The outcomes, most costly first.
    """
    costs = image_costs(matches)
    row_of_rank = np.empty(len(annotations), np.int64)
    row_of_rank[image_ranks(annotations, annotations.image_ids)] = np.arange(len(annotations))
    order = np.argsort(-costs, kind="stable")[:count]
    return [
        _outcome(annotations, matches, errors, score, rank, int(row_of_rank[rank]), float(costs[rank]))
        for rank in order.tolist()
        if costs[rank] > 0
    ]


def _outcome(
    annotations: Annotations, matches: Matches, errors: Errors, score: float, rank: int, row: int, cost: float
) -> ImageOutcome:
    kept = matches.detections.scores >= score
    rows = np.flatnonzero(kept & (matches.images == rank))
    rows = rows[np.argsort(-matches.detections.scores[rows], kind="stable")]
    taken = matches.objects[0, 0]
    objects = slice(int(annotations.offsets[row]), int(annotations.offsets[row + 1]))
    found = np.isin(np.arange(objects.start, objects.stop), taken[kept & (taken >= 0)])
    states = np.where(matches.object_ignored[0, objects], "ignored", np.where(found, "found", "missed"))
    names = np.array([*FALSE_POSITIVES, "right"])  # a kind of -1 is the last
    found_states: npt.NDArray = np.where(matches.ignored[0, 0, rows], "ignored", names[errors.kinds[rows]])
    return ImageOutcome(
        row=row,
        image_id=int(annotations.image_ids[row]),
        file_name=str(annotations.file_names[row]),
        cost=cost,
        boxes=annotations.boxes[objects],
        labels=annotations.labels[objects],
        states=tuple(states.tolist()),
        found_boxes=matches.detections.boxes[rows],
        found_labels=matches.detections.labels[rows],
        scores=matches.detections.scores[rows],
        found_states=tuple(found_states.tolist()),
    )

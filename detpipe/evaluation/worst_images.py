"""Which images cost most, the AP50 that would be gained if everything in one of them were detected right; and what came of them.

I images, n true positives of a class.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from detpipe.evaluation.coco import average_precision, class_counts
from detpipe.evaluation.error_types import FALSE_POSITIVES, Errors
from detpipe.evaluation.matches import Floats, Integers, Matches

_BLOCK = 1 << 21  # images times true positives that are looked at together


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


def worst_images(matches: Matches, errors: Errors, score: float, count: int) -> list[ImageOutcome]:
    """Choose at most ``count`` images that cost AP50, the most costly first; detections below a score are not listed."""
    costs = image_costs(matches)
    row_of_rank = np.argsort(matches.annotations.image_ids)
    order = np.argsort(-costs, kind="stable")[:count]
    return [
        _outcome(matches, errors, score, rank, int(row_of_rank[rank]), float(costs[rank]))
        for rank in order.tolist()
        if costs[rank] > 0
    ]


def _outcome(matches: Matches, errors: Errors, score: float, rank: int, row: int, cost: float) -> ImageOutcome:
    annotations = matches.annotations
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


def image_costs(matches: Matches) -> Floats:
    """Compute what each image costs, all others left as they are, at the first threshold.

    Returns:
        ``[I]`` by rank of the image: the mean AP, if the image had no false positives and its missed objects were found with
        the best score of all, less the mean AP as it is. 0 or more.
    """
    objects = matches.object_counts()
    gains = np.zeros(len(matches.annotations))
    false, missed = matches.false(), matches.missed()
    for label in (np.flatnonzero(objects) + 1).tolist():
        rows = matches.class_slice(label)
        wrong = np.flatnonzero(false[rows])
        wrong_images = matches.images[rows][wrong]
        missed_images = matches.object_images[missed & (matches.labels == label)]
        touched = np.union1d(wrong_images, missed_images)
        places, counted = class_counts(matches, label)
        hits = np.arange(1, len(places) + 1)
        total = objects[label - 1 : label]
        base = average_precision(hits[None], counted[None], total)[0]
        misses = np.bincount(np.searchsorted(touched, missed_images), minlength=len(touched))
        errors = np.searchsorted(touched, wrong_images), np.searchsorted(places, wrong)
        block = max(1, _BLOCK // (len(places) + 1))
        for start in range(0, len(touched), block):
            part = slice(start, start + block)
            removed = _removed(errors, start, len(touched[part]), len(places))
            added = misses[part, None]
            with_front = np.concatenate((added, hits + added), axis=1)  # the missed objects come before everything
            ranked = np.concatenate((added, counted - removed + added), axis=1)
            mended = average_precision(with_front, ranked, np.repeat(total, len(added)))
            gains[touched[part]] += mended - base
    return gains / max(int(np.count_nonzero(objects)), 1)


def _removed(errors: tuple[Integers, Integers], start: int, images: int, places: int) -> Integers:
    """``[images, n]`` false positives of each image, from row ``start`` on, before each true positive."""
    owner, before = errors
    inside = (owner >= start) & (owner < start + images)
    cells = (owner[inside] - start) * (places + 1) + before[inside]
    counts = np.bincount(cells, minlength=images * (places + 1)).reshape(images, places + 1)
    return np.cumsum(counts[:, :places], axis=1)

"""Why average precision is lost: six types of errors, and the AP50 that mending each of them alone would give.

Bolya et al., "TIDE: A General Toolbox for Identifying Object Detection Errors", 2020, arXiv 2008.08115, section 2, with a
foreground threshold t_f = 0.5 and a background threshold t_b = 0.1. IoU_max of a false positive is its largest overlap with
objects of its own or of other classes. In the order in which the authors' tool tests them:

    localization    t_b <= IoU_max <= t_f with its own class          mended: its box becomes that of the object
    classification  IoU_max >= t_f with another class                 mended: it gets the class of the object
    duplicate       IoU_max >= t_f with its own class, object taken   mended: left out
    background      IoU_max <= t_b with every class                   mended: left out
    both            what remains: t_b < IoU_max < t_f, another class  mended: left out
    missed          an object that was not found, and that no classification or localization error stands for
                                                                      mended: not asked for

Where mending would find an object a second time, the lower score of the two is left out.

Deviations:
1. Matches are COCO's (crowd regions and difficult objects are ignored), so that the AP50 is COCO's too.
2. The authors' tool leaves a mended detection out wherever its object was found, even by a detection of a lower score; this
   follows the paper's text. A tie goes to the detection that found it.
3. A mended type is not clamped at 0: leaving out a class without anything left to find may move the mean either way.

D detections, B objects, K classes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from detpipe.evaluation.coco import average_precision, mean_known
from detpipe.evaluation.matches import Flags, Floats, Integers, Matches, overlapping_pairs
from detpipe.evaluation.records import rank_in_run

FALSE_POSITIVES = ("classification", "localization", "both", "duplicate", "background")
ERROR_TYPES = (*FALSE_POSITIVES, "missed")
FOREGROUND, BACKGROUND = 0.5, 0.1
_CLASSIFICATION, _LOCALIZATION, _BOTH, _DUPLICATE, _BACKGROUND = range(5)


@dataclass(frozen=True)
class Errors:
    """What is wrong, detection by detection and object by object.

    Args:
        kinds: ``[D]`` index into ``FALSE_POSITIVES``, -1 for what is right or ignored.
        targets: ``[D]`` row of the object that a classification or localization error was meant for, else -1.
        missed: ``[B]`` objects that nothing stands for.
    """

    kinds: npt.NDArray[np.int8]
    targets: Integers
    missed: Flags

    def counts(self) -> dict[str, int]:
        """How many errors there are of each type, by name."""
        numbers = np.bincount(self.kinds[self.kinds >= 0], minlength=len(FALSE_POSITIVES)).tolist()
        return dict(zip(ERROR_TYPES, [*numbers, int(self.missed.sum())], strict=True))


def find_errors(matches: Matches) -> Errors:
    """Tell the type of each false positive, and which objects are missed, at the first threshold of matches.

    Raises:
        ValueError: that threshold is not 0.5.
    """
    if matches.thresholds[0] != FOREGROUND:
        raise ValueError(f"error types need matches at an IoU of {FOREGROUND}, got {matches.thresholds[0]}")
    false = np.flatnonzero(matches.false())
    own, own_object, other, other_object = _largest_overlaps(matches, false)
    conditions = [
        (own >= BACKGROUND) & (own <= FOREGROUND),
        other >= FOREGROUND,
        own >= FOREGROUND,
        np.maximum(own, other) <= BACKGROUND,
    ]
    types = [_LOCALIZATION, _CLASSIFICATION, _DUPLICATE, _BACKGROUND]
    kinds = np.full(len(matches), -1, np.int8)
    kinds[false] = np.select(conditions, types, _BOTH)
    targets = np.full(len(matches), -1, np.int64)
    targets[false] = np.select(conditions[:2], [own_object, other_object], -1)
    missed = matches.missed()
    missed[targets[targets >= 0]] = False
    return Errors(kinds, targets, missed)


def _largest_overlaps(matches: Matches, rows: Integers) -> tuple[Floats, Integers, Floats, Integers]:
    """For some detections: [R] IoU with and row of the object overlapped most, of its own class and of the others."""
    counted = np.flatnonzero(~matches.object_ignored[0])
    pairs = overlapping_pairs(
        matches.detections.boxes[rows],
        matches.images[rows],
        matches.annotations.boxes[counted],
        matches.object_images[counted],
        np.zeros(len(counted), np.bool_),
        minimum=BACKGROUND,
    )
    same = matches.detections.labels[rows][pairs.found] == matches.labels[counted[pairs.objects]]
    counted = np.append(counted, -1)  # for no object
    (own, own_object), (other, other_object) = (pairs.take(chosen).best(len(rows)) for chosen in (same, ~same))
    return own, counted[own_object], other, counted[other_object]


def error_gains(matches: Matches, errors: Errors) -> dict[str, float]:
    """Compute how much AP50 rises when the errors of a type are mended, and no others.

    Returns:
        ``AP50`` as it is; the gain by each of ``ERROR_TYPES``; ``false_positives``, the gain if all of them were left out;
        ``false_negatives``, the gain if only what was found had been asked for. NaN where nothing is left to find.
    """
    true, labels = matches.true(), matches.detections.labels
    counted = ~matches.ignored[0, 0]
    objects = matches.object_counts()
    base = _mean_ap(matches, labels, true, counted, objects)
    gains = {"AP50": base}
    for kind, name in enumerate(FALSE_POSITIVES):
        wrong = errors.kinds == kind
        if kind in (_CLASSIFICATION, _LOCALIZATION):
            mended = _mend(matches, errors.targets, wrong)
        else:
            mended = labels, true, counted & ~wrong
        gains[name] = _mean_ap(matches, *mended, objects) - base
    left = objects - np.bincount(matches.labels[errors.missed] - 1, minlength=len(objects))
    found = np.bincount(labels[true] - 1, minlength=len(objects))
    gains["missed"] = _mean_ap(matches, labels, true, counted, left) - base
    gains["false_positives"] = _mean_ap(matches, labels, true, true, objects) - base
    gains["false_negatives"] = _mean_ap(matches, labels, true, counted, found) - base
    return gains


def _mend(matches: Matches, targets: Integers, wrong: Flags) -> tuple[Integers, Flags, Flags]:
    """``[D]`` labels, true positives, and what counts, when each wrong detection gets its object; of one object the best stays."""
    true = matches.true()
    meant = np.where(wrong, targets, np.where(true, matches.objects[0, 0], -1))
    rivals = np.flatnonzero(meant >= 0)
    scores = matches.detections.scores[rivals]
    order = rivals[np.lexsort((wrong[rivals], -scores, meant[rivals]))]
    first = rank_in_run(meant[order]) == 0
    counted = ~matches.ignored[0, 0]
    counted[order[~first]] = False
    labels = matches.detections.labels.copy()
    labels[order] = matches.labels[meant[order]]
    mended = np.zeros_like(true)
    mended[order[first]] = True
    return labels, mended, counted


def _mean_ap(matches: Matches, labels: Integers, true: Flags, counted: Flags, objects: Integers) -> float:
    """AP50 of the detections that count, in the mean over classes that have objects."""
    rows = np.flatnonzero(counted)
    rows = rows[np.lexsort((-matches.detections.scores[rows], labels[rows]))]
    right = true[rows]
    bounds = np.searchsorted(labels[rows], np.arange(1, len(objects) + 2))
    values = np.full(len(objects), np.nan)
    for k in np.flatnonzero(objects):
        places = np.flatnonzero(right[bounds[k] : bounds[k + 1]])
        hits = np.arange(1, len(places) + 1)
        values[k] = average_precision(hits[None], places[None] + 1, objects[k : k + 1])[0]
    return float(mean_known(values))

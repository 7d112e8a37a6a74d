"""Which images cost most: the AP50 that would be gained if everything in one image were detected right.

I images, n true positives of a class.
"""

from __future__ import annotations

import numpy as np

from detpipe.evaluation.matches import Matches
from detpipe.evaluation.pairs import Floats, Integers
from detpipe.evaluation.precision_recall import average_precision, class_counts

_BLOCK = 1 << 21  # images times true positives that are looked at together


def image_costs(matches: Matches, threshold: int = 0) -> Floats:
    """Compute what each image costs, all others left as they are.

    Args:
        matches: of I images.
        threshold: index of the IoU threshold.

    Returns:
        ``[I]`` by rank of the image: the mean AP at that threshold, if the image had no false positives and its missed
        objects were found with the best score of all, less the mean AP as it is. 0 or more.
    """
    objects = matches.object_counts()
    gains = np.zeros(matches.image_count)
    false, missed = matches.false(0, threshold), matches.missed(0, threshold)
    for label in (np.flatnonzero(objects) + 1).tolist():
        rows = matches.class_slice(label)
        wrong = np.flatnonzero(false[rows])
        wrong_images = matches.images[rows][wrong]
        missed_images = matches.object_images[missed & (matches.labels == label)]
        touched = np.union1d(wrong_images, missed_images)
        places, counted = class_counts(matches, label, 0, threshold)
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

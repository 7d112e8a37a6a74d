"""Hierarchical grouping: similar neighbors merge until one region is left, and every region on the way is a proposal.

Uijlings, van de Sande, Gevers, Smeulders, "Selective Search for Object Recognition", 2013, sections 3.1 and 3.2.

Deviation: the paper merges the one most similar pair of the image at a time. Here all pairs merge at once in which each region is
the other's most similar neighbor, as the one most similar pair always is. That is some hundred rounds over arrays
instead of thousands of single merges, and the hierarchies of all segmentations of an image grow side by side.

Shapes: R regions, E pairs of neighbors, H hierarchies, M regions of all hierarchies with the merged ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from detpipe.proposals.regions import COLOR_BINS, TEXTURE_BINS, Floats, Ints, Regions

SIMILARITIES = ("color", "texture", "size", "fill")
_CHUNK = 1024  # pairs of neighbors compared at once, so that their histograms stay in the cache


class Grouping(NamedTuple):
    """All regions of several hierarchies."""

    boxes: Floats  # [M, 4] xyxy
    hierarchy: Ints  # [M] 0..H-1
    rank: Ints  # [M] place in its hierarchy, counted from the whole image (1) downwards, against the order of merging


class _State(NamedTuple):
    """Arrays with room for all regions that there will be; they change in place."""

    sizes: Floats  # [M]
    boxes: Floats  # [M, 4]
    histograms: Floats  # [M, color and texture]
    hierarchy: Ints  # [M]
    reached: Floats  # [M] the lowest similarity of the merges that made a region; infinite for the first ones
    successor: Ints  # [M] the region that a region became part of; itself at first
    best: Ints  # [M] room to work


class _Pairs(NamedTuple):
    """Neighbors that may merge."""

    first: Ints  # [E]
    second: Ints  # [E]
    similarity: Floats  # [E]

    def select(self, rows: npt.NDArray[np.bool_] | npt.NDArray[np.int64]) -> _Pairs:
        return _Pairs(self.first[rows], self.second[rows], self.similarity[rows])


def group(segmentations: Sequence[Regions], strategies: Sequence[Sequence[str]], area: float) -> Grouping:
    """Build a hierarchy for each segmentation and each strategy: the similarities, of `SIMILARITIES`, that are added up.

    Args:
        segmentations: the first regions, of images with as many channels or not.
        strategies: one list of similarities each.
        area: of the image in square pixels.

    Returns:
        The regions, those of a segmentation and then those that merged from them.
    """
    weights = np.array([[name in strategy for name in SIMILARITIES] for strategy in strategies], np.float32)
    weights = np.tile(weights, (len(segmentations), 1))  # [H, 4]
    colors = max(regions.color.shape[1] for regions in segmentations)
    state, starts = _first_regions(segmentations, len(strategies), colors)
    pairs = []
    for number, start in enumerate(starts):
        regions = segmentations[number // len(strategies)]
        pairs.append((regions.first + start, regions.second + start))
    first, second = (np.concatenate(side).astype(np.int32) for side in zip(*pairs, strict=True))
    count = starts[-1] + len(segmentations[-1].sizes)
    rows = _Pairs(first, second, _similarity(state, first, second, weights, area, colors))
    while len(rows.first):
        rows = rows.select(np.argsort(-rows.similarity, kind="stable"))
        merging = _mutual(state, rows)
        merged = _merge(state, rows.select(merging), count)
        rows = _renew(state, rows, count, weights, area, colors)
        count += merged
    return Grouping(state.boxes[:count], state.hierarchy[:count], _ranks(state, count, len(weights)))


def _first_regions(segmentations: Sequence[Regions], copies: int, colors: int) -> tuple[_State, list[int]]:
    """Lay out each segmentation once a strategy, and say where each copy starts."""
    total = copies * sum(len(regions.sizes) for regions in segmentations)
    width = colors + max(regions.texture.shape[1] for regions in segmentations)
    room = 2 * total
    state = _State(
        np.zeros(room, np.float32),
        np.zeros((room, 4), np.float32),
        np.zeros((room, width), np.float32),
        np.zeros(room, np.int32),
        np.full(room, np.inf, np.float32),
        np.arange(room, dtype=np.int32),
        np.zeros(room, np.int32),
    )
    starts, start = [], 0
    for regions in segmentations:
        for _ in range(copies):
            rows = slice(start, start + len(regions.sizes))
            state.sizes[rows], state.boxes[rows], state.hierarchy[rows] = regions.sizes, regions.boxes, len(starts)
            state.histograms[rows, : regions.color.shape[1]] = regions.color
            state.histograms[rows, colors : colors + regions.texture.shape[1]] = regions.texture
            starts.append(start)
            start = rows.stop
    return state, starts


def _similarity(state: _State, first: Ints, second: Ints, weights: Floats, area: float, colors: int) -> Floats:
    """Add up the similarities of pairs (section 3.2): ``[E]``."""
    parts = np.empty((len(first), 4), np.float32)
    for start in range(0, len(first), _CHUNK):
        rows = slice(start, start + _CHUNK)
        shared = np.minimum(state.histograms[first[rows]], state.histograms[second[rows]])
        for part, histograms, bins in ((0, shared[:, :colors], COLOR_BINS), (1, shared[:, colors:], 4 * TEXTURE_BINS)):
            # channel by channel, so that those that only other segmentations have do not change how a sum is rounded
            parts[rows, part] = histograms.reshape(len(shared), -1, bins).sum(axis=2).sum(axis=1)
    both = state.sizes[first] + state.sizes[second]
    sides = np.maximum(state.boxes[first, 2:], state.boxes[second, 2:])
    sides = sides - np.minimum(state.boxes[first, :2], state.boxes[second, :2])
    parts[:, 2] = 1 - both / area
    parts[:, 3] = 1 - (sides.prod(axis=1) - both) / area
    return (parts * weights[state.hierarchy[first]]).sum(axis=1)


def _mutual(state: _State, pairs: _Pairs) -> npt.NDArray[np.bool_]:
    """Tell which pairs, sorted by similarity, are the best one of both their regions: ``[E]``."""
    index = np.arange(len(pairs.first), dtype=np.int32)
    # of several values that are assigned to one place the last one stays: the most similar pair
    state.best[np.stack(pairs[:2], axis=1).ravel()[::-1]] = np.repeat(index[::-1], 2)
    return (state.best[pairs.first] == index) & (state.best[pairs.second] == index)


def _merge(state: _State, pairs: _Pairs, count: int) -> int:
    """Make a new region of each pair, after the ``count`` that are there; returns how many."""
    first, second, similarity = pairs
    new = np.arange(count, count + len(first), dtype=np.int32)
    state.sizes[new] = state.sizes[first] + state.sizes[second]
    share = (state.sizes[first] / state.sizes[new])[:, None]
    state.histograms[new] = state.histograms[first] * share + state.histograms[second] * (1 - share)
    state.boxes[new, :2] = np.minimum(state.boxes[first, :2], state.boxes[second, :2])
    state.boxes[new, 2:] = np.maximum(state.boxes[first, 2:], state.boxes[second, 2:])
    state.hierarchy[new] = state.hierarchy[first]
    state.reached[new] = np.minimum(similarity, np.minimum(state.reached[first], state.reached[second]))
    state.successor[first] = state.successor[second] = new
    return len(first)


def _renew(state: _State, pairs: _Pairs, count: int, weights: Floats, area: float, colors: int) -> _Pairs:
    """Give the pairs whose regions merged to the new regions, each pair once, and compare them anew."""
    first, second = state.successor[pairs.first], state.successor[pairs.second]
    changed = (first >= count) | (second >= count)
    kept = pairs.select(~changed)
    moved = changed & (first != second)
    first, second = first[moved].astype(np.int64), second[moved].astype(np.int64)
    room = len(state.sizes)
    both = np.unique(np.minimum(first, second) * room + np.maximum(first, second))
    first, second = (both // room).astype(np.int32), (both % room).astype(np.int32)
    similarity = _similarity(state, first, second, weights, area, colors)
    return _Pairs(
        np.concatenate((kept.first, first)),
        np.concatenate((kept.second, second)),
        np.concatenate((kept.similarity, similarity)),
    )


def _ranks(state: _State, count: int, hierarchies: int) -> Ints:
    """Number the regions of each hierarchy, the last one merged first: ``[M]``."""
    hierarchy = state.hierarchy[:count]
    order = np.lexsort((-np.arange(count), state.reached[:count], hierarchy))
    starts = np.searchsorted(hierarchy[order], np.arange(hierarchies))
    rank = np.empty(count, np.int32)
    rank[order] = np.arange(count) - starts[hierarchy[order]] + 1
    return rank

import itertools

import numpy as np
import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from detpipe.proposals.region_grouping import SIMILARITIES, group
from detpipe.proposals.regions import COLOR_BINS, TEXTURE_BINS, Regions, describe, quantize_color, quantize_texture

ALL = ("color", "texture", "size", "fill")


def regions_of(height, width, most, seed, channels=3):
    """Random regions of a random image, some of them in several pieces."""
    random = np.random.default_rng(seed)
    coarse = random.integers(0, most, (-(-height // 2), -(-width // 2))).repeat(2, axis=0).repeat(2, axis=1)
    labels = np.unique(coarse[:height, :width], return_inverse=True)[1].reshape(height, width).astype(np.int32)
    image = random.integers(0, 256, (height, width, channels)).astype(np.uint8)
    return describe(labels, quantize_color(image), quantize_texture(image))


sizes = st.integers(1, 14)
random_regions = st.builds(regions_of, sizes, sizes, st.integers(1, 20), st.integers(0, 10**6), st.sampled_from([1, 3]))
strategies = st.lists(
    st.lists(st.sampled_from(SIMILARITIES), min_size=1, max_size=4, unique=True), min_size=1, max_size=3
)


def area_of(regions):
    return float(regions.sizes.sum())


def likeness(one, other, strategy, area):
    """Section 3.2 of the paper, equations 1, 3, 5 and 6, of two regions (size, box, color, texture)."""
    bound = max(one[1][2], other[1][2]) - min(one[1][0], other[1][0])
    bound *= max(one[1][3], other[1][3]) - min(one[1][1], other[1][1])
    parts = {
        "color": sum(min(a, b) for a, b in zip(one[2], other[2], strict=True)),
        "texture": sum(min(a, b) for a, b in zip(one[3], other[3], strict=True)),
        "size": 1 - (one[0] + other[0]) / area,
        "fill": 1 - (bound - one[0] - other[0]) / area,
    }
    return sum(parts[name] for name in strategy)


def join(one, other):
    """The region of two: equations 2 and 4."""
    size = one[0] + other[0]
    box = [*np.minimum(one[1][:2], other[1][:2]).tolist(), *np.maximum(one[1][2:], other[1][2:]).tolist()]
    histograms = [(one[0] * np.array(one[i]) + other[0] * np.array(other[i])) / size for i in (2, 3)]
    return size, box, histograms[0].tolist(), histograms[1].tolist()


def slow_group(regions, strategy, area):
    """Merge round by round: boxes in the order of merging, their ranks, and how close the closest decision was."""
    found = [tuple(part.tolist() for part in row) for row in zip(*(regions[i] for i in (0, 1, 4, 5)), strict=True)]
    reached = [float("inf")] * len(found)
    pairs = {frozenset(pair) for pair in zip(regions.first.tolist(), regions.second.tolist(), strict=True)}
    close = float("inf")
    while pairs:
        alike = {pair: likeness(*(found[i] for i in pair), strategy, area) for pair in pairs}
        ordered = sorted(alike.values())
        close = min([close, *(b - a for a, b in itertools.pairwise(ordered))])
        best = {}
        for pair in sorted(pairs, key=alike.get):
            best |= dict.fromkeys(pair, pair)
        became = {}
        for pair in sorted(pairs, key=alike.get, reverse=True):
            if all(best[region] == pair for region in pair):
                became |= dict.fromkeys(pair, len(found))
                found.append(join(*(found[i] for i in pair)))
                reached.append(min(alike[pair], *(reached[i] for i in pair)))
        pairs = {frozenset(became.get(region, region) for region in pair) for pair in pairs}
        pairs = {pair for pair in pairs if len(pair) == 2}
    order = sorted(range(len(found)), key=lambda i: (reached[i], -i))
    rank = [order.index(i) + 1 for i in range(len(found))]
    levels = sorted({value for value in reached if value != float("inf")})
    close = min([close, *(b - a for a, b in itertools.pairwise(levels))])
    return [region[1] for region in found], rank, close


@given(random_regions, st.lists(st.sampled_from(SIMILARITIES), min_size=1, max_size=4, unique=True))
@settings(max_examples=60, deadline=None)
def test_equals_a_slow_loop(regions, strategy):
    boxes, rank, close = slow_group(regions, strategy, area_of(regions))
    assume(close > 1e-5)  # single precision decides as double precision does
    found = group([regions], [strategy], area_of(regions))
    assert found.boxes.tolist() == boxes
    assert found.rank.tolist() == rank


def test_the_slow_loop_decides_more_than_trivial_cases():
    regions = regions_of(14, 13, 20, 5)
    boxes, rank, close = slow_group(regions, ALL, area_of(regions))
    assert close > 1e-5
    assert len(boxes) == 2 * len(regions.sizes) - 1 > 30
    found = group([regions], [ALL], area_of(regions))
    assert (found.boxes.tolist(), found.rank.tolist()) == (boxes, rank)


def by_hand(sizes, boxes, pairs, color):
    """Regions whose histograms have something in two bins."""
    shares = np.array([[1 - share, share] for share in color], np.float32)
    color, texture = (np.pad(shares, ((0, 0), (0, bins - 2))) for bins in (COLOR_BINS, 4 * TEXTURE_BINS))
    first, second = np.array(pairs, np.int32).T
    return Regions(np.float32(sizes), np.float32(boxes), first, second, color, texture)


def test_three_regions_by_hand():
    # a row of 2 x 10 pixels: 0 is 2 wide, 1 is 3 wide and like 2, which is 5 wide
    boxes = [[0, 0, 2, 2], [2, 0, 5, 2], [5, 0, 10, 2]]
    regions = by_hand([4, 6, 10], boxes, [(0, 1), (1, 2)], [0.0, 0.75, 1.0])
    color = group([regions], [["color"]], 20)  # .25 and .75
    assert color.boxes[3:].tolist() == [[2, 0, 10, 2], [0, 0, 10, 2]]
    assert color.rank.tolist() == [5, 4, 3, 2, 1]
    size = group([regions], [["size"]], 20)  # .5 and .2
    assert size.boxes[3:].tolist() == [[0, 0, 5, 2], [0, 0, 10, 2]]


def test_four_regions_merge_two_pairs_in_one_round():
    boxes = [[0, 0, 2, 2], [2, 0, 4, 2], [4, 0, 6, 2], [6, 0, 8, 2]]
    regions = by_hand([4] * 4, boxes, [(0, 1), (1, 2), (2, 3)], [0.0, 0.25, 0.75, 0.9])
    found = group([regions], [["color"]], 16)  # .75, .5, .85
    assert found.boxes[4:].tolist() == [[4, 0, 8, 2], [0, 0, 4, 2], [0, 0, 8, 2]]
    assert found.rank.tolist() == [7, 6, 5, 4, 3, 2, 1]


def test_a_merge_that_came_late_in_time_but_was_sure_ranks_by_its_likeness():
    # first round: 0+1 (.6) and 3+4 (.95); second: 2 joins 3+4 (.9); last: the two halves
    boxes = [[2 * i, 0, 2 * i + 2, 2] for i in range(5)]
    regions = by_hand([4] * 5, boxes, [(0, 1), (1, 2), (2, 3), (3, 4)], [0.0, 0.4, 0.85, 0.95, 1.0])
    found = group([regions], [["color"]], 20)
    assert found.boxes[5:].tolist() == [[6, 0, 10, 2], [0, 0, 4, 2], [4, 0, 10, 2], [0, 0, 10, 2]]
    assert found.rank[5:].tolist() == [4, 2, 3, 1]


def test_fill_prefers_what_closes_gaps():
    # 1 fills a notch of 0; 2 lies diagonally below
    boxes = [[0, 0, 4, 4], [2, 2, 4, 4], [4, 2, 8, 4]]
    regions = by_hand([12, 4, 8], boxes, [(0, 1), (0, 2), (1, 2)], [0.5, 0.5, 0.5])
    assert group([regions], [["fill"]], 32).boxes[3].tolist() == [0, 0, 4, 4]
    assert group([regions], [["size"]], 32).boxes[3].tolist() == [2, 2, 8, 4]


@given(st.lists(random_regions, min_size=1, max_size=3), strategies)
@settings(max_examples=60, deadline=None)
def test_every_hierarchy_is_whole(segmentations, strategies):
    found = group(segmentations, strategies, 200.0)
    assert (np.sort(np.unique(found.hierarchy)) == np.arange(len(segmentations) * len(strategies))).all()
    for number in range(len(segmentations) * len(strategies)):
        regions = segmentations[number // len(strategies)]
        count = len(regions.sizes)
        boxes, rank = found.boxes[found.hierarchy == number], found.rank[found.hierarchy == number]
        assert len(boxes) == 2 * count - 1
        assert sorted(rank.tolist()) == list(range(1, 2 * count))
        assert np.array_equal(boxes[:count], regions.boxes)
        assert rank[-1] == 1  # the last one merged is the whole image
        whole = [*regions.boxes[:, :2].min(axis=0), *regions.boxes[:, 2:].max(axis=0)]
        assert boxes[-1].tolist() == whole
        assert (rank[:count] >= count).all()  # the first regions come last


@pytest.mark.slow
@example([regions_of(1, 1, 1, 0), regions_of(5, 10, 5, 787785, 1)], [["color"]])
@given(st.lists(random_regions, min_size=1, max_size=3), strategies)
@settings(max_examples=60, deadline=None)
def test_hierarchies_do_not_influence_one_another(segmentations, strategies):
    together = group(segmentations, strategies, 200.0)
    for number in range(len(segmentations) * len(strategies)):
        which, how = divmod(number, len(strategies))
        alone = group([segmentations[which]], [strategies[how]], 200.0)
        rows = together.hierarchy == number
        assert np.array_equal(together.boxes[rows], alone.boxes)
        assert np.array_equal(together.rank[rows], alone.rank)


def test_one_region_is_its_own_hierarchy():
    regions = regions_of(4, 6, 1, 0)
    found = group([regions, regions], [ALL, ("size",)], 24)
    assert found.boxes.tolist() == [[0, 0, 6, 4]] * 4
    assert found.hierarchy.tolist() == [0, 1, 2, 3]
    assert found.rank.tolist() == [1, 1, 1, 1]


@pytest.mark.parametrize("count", [2, 1025, 2500])
def test_blocks_of_pairs_are_compared_alike(count):
    """Pairs are compared in blocks of 1024."""
    labels = np.arange(count, dtype=np.int32).repeat(2).reshape(1, -1)
    image = np.random.default_rng(1).integers(0, 256, (1, 2 * count, 1)).astype(np.uint8)
    regions = describe(labels, quantize_color(image), quantize_texture(image))
    found = group([regions], [("color",)], 2.0 * count)
    assert len(found.boxes) == 2 * count - 1
    shared = np.minimum(regions.color[:-1], regions.color[1:]).sum(axis=1)
    first = int(shared.argmax())
    assert found.boxes[count].tolist() == [2 * first, 0, 2 * first + 4, 1]


def test_equal_likeness_is_decided_the_same_way_every_time():
    labels = np.arange(64, dtype=np.int32).reshape(8, 8)
    image = np.full((8, 8, 3), 9, np.uint8)
    regions = describe(labels, quantize_color(image), quantize_texture(image))
    one, other = (group([regions], [ALL, ("size", "fill")], 64) for _ in range(2))
    assert all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))
    assert len(one.boxes) == 2 * (2 * 64 - 1)

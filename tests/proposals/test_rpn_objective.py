import math

import pytest
import torch
from samples import overlap, random_boxes

from detpipe.boxes import decode
from detpipe.matching import gather_targets
from detpipe.proposals import rpn_objective as module
from detpipe.proposals.anchors import Anchors
from detpipe.proposals.rpn_objective import RPNObjective, sample
from detpipe.types import Target

ANCHORS = Anchors(sizes=[[16, 24], [32, 48]])
CELLS, STRIDES = [(6, 9), (3, 5)], [8, 16]
GRIDS = ANCHORS.grids(CELLS, STRIDES)
BOXES = torch.cat([grid.boxes() for grid in GRIDS])  # [P, 4]


def target(boxes, crowd=(), difficult=()) -> Target:
    boxes = torch.as_tensor(boxes, dtype=torch.float32).reshape(-1, 4)
    flags = [
        torch.tensor([row in chosen for row in range(len(boxes))], dtype=torch.bool) for chosen in (crowd, difficult)
    ]
    return Target(boxes=boxes, labels=torch.ones(len(boxes), dtype=torch.int64), iscrowd=flags[0], difficult=flags[1])


def slow_assign(target: Target, settings: RPNObjective) -> list[str]:
    """The definition, anchor by anchor: "positive", "negative" or "ignored"."""
    anchors, boxes = BOXES.tolist(), target["boxes"].tolist()
    crowd, difficult = target["iscrowd"].tolist(), target["difficult"].tolist()
    counted = [i for i in range(len(boxes)) if not crowd[i] and not difficult[i]]
    highest = {i: max(overlap(anchor, boxes[i]) for anchor in anchors) for i in counted}
    found = []
    for anchor in anchors:
        overlaps = [(overlap(anchor, box), overlap(anchor, box, over_first=True)) for box in boxes]
        best = max((overlaps[i][0] for i in counted), default=0.0)
        attains = any(0 < highest[i] <= overlaps[i][0] * (1 + 1e-6) for i in counted)
        ignored = any(
            (crowd[i] and overlaps[i][1] >= settings.ignore_overlap * (1 - 1e-6))
            or (difficult[i] and overlaps[i][0] >= settings.ignore_overlap * (1 - 1e-6))
            for i in range(len(boxes))
        )
        if best >= settings.positive_iou * (1 - 1e-6) or (attains and settings.allow_low_quality):
            found.append("positive")
        elif best < settings.negative_iou * (1 - 1e-6) and not ignored:
            found.append("negative")
        else:
            found.append("ignored")
    return found


def names(positive, negative) -> list[str]:
    assert not (positive & negative).any()
    return [
        "positive" if p else "negative" if n else "ignored"
        for p, n in zip(positive.tolist(), negative.tolist(), strict=True)
    ]


@pytest.mark.parametrize(
    ("low_quality", "whole", "block"), [(True, True, 1), (True, False, 2**20), (False, True, 2**20), (False, False, 1)]
)
def test_assignment_equals_a_slow_loop(low_quality, whole, block, monkeypatch):
    monkeypatch.setitem(module.BLOCK, "cpu", block)
    settings = RPNObjective(positive_iou=0.5, negative_iou=0.25, allow_low_quality=low_quality, ignore_overlap=0.4)
    seen = set()
    for _ in range(6):
        batch = [
            target(random_boxes(5, 48, 72, whole=whole), crowd=(0,), difficult=(1,)),
            target(random_boxes(2, 48, 72, whole=whole)),
            target([]),
            target(random_boxes(2, 48, 72, whole=whole), crowd=(0,), difficult=(1,)),  # none that counts
        ]
        positive, negative = settings.assign(GRIDS, gather_targets(batch))
        for row, image in enumerate(batch):
            expected = slow_assign(image, settings)
            assert names(positive[row], negative[row]) == expected
            seen.update(expected)
    assert seen == {"positive", "negative", "ignored"}


def test_assignment_by_hand():
    grids = Anchors(sizes=[[10]], ratios=[1]).grids(
        [(1, 4)], [10]
    )  # [0, 10], [10, 20], [20, 30], [30, 40] wide, 10 high
    settings = RPNObjective(positive_iou=0.7, negative_iou=0.3)
    strict = RPNObjective(positive_iou=0.7, negative_iou=0.3, allow_low_quality=False)

    def assign(*boxes, settings=settings, **flags):
        positive, negative = settings.assign(grids, gather_targets([target(list(boxes), **flags)]))
        return names(positive[0], negative[0])

    assert assign() == ["negative"] * 4
    assert assign([0, 0, 10, 7]) == ["positive", "negative", "negative", "negative"]  # IoU .7 exactly
    assert assign([10, 0, 20, 10], [13, 0, 23, 10]) == ["negative", "positive", "negative", "negative"]  # 3/17
    # the best of its object, though only 1/3; the other one of the same IoU too
    assert assign([5, 0, 15, 10]) == ["positive", "positive", "negative", "negative"]
    assert assign([5, 0, 15, 10], settings=strict) == ["ignored", "ignored", "negative", "negative"]
    assert assign([0, 0, 10, 10], [16, 0, 26, 10]) == ["positive", "negative", "positive", "negative"]  # 4/16, 6/14
    assert assign([0, 0, 20, 10], crowd=(0,)) == ["ignored", "ignored", "negative", "negative"]
    assert assign([0, 0, 10, 10], difficult=(0,)) == ["ignored", "negative", "negative", "negative"]
    assert assign([0, 0, 10, 10], [0, 0, 40, 10], crowd=(1,)) == ["positive", "ignored", "ignored", "ignored"]
    assert assign([100, 100, 110, 110]) == ["negative"] * 4  # touched by none


def test_an_object_is_given_to_its_anchors():
    objects = torch.tensor([[4.0, 4.0, 28.0, 20.0], [30.0, 10.0, 66.0, 44.0], [31.0, 12.0, 60.0, 44.0]])
    objective = RPNObjective(anchors_per_image=10**6, positive_iou=0.5, positive_fraction=1.0)
    found = objective(GRIDS, BOXES, [target(objects), target(objects[:1]), target([])])
    assert found.index.shape == (3, len(BOXES))
    assert found.positive.sum(1).tolist()[2] == 0
    assert found.positive[:2].any(1).all()
    boxes = decode(found.deltas, BOXES[found.index], module.WEIGHTS)
    for image, row in found.positive.nonzero().tolist():
        anchor = BOXES[found.index[image, row]].tolist()
        own = objects if image == 0 else objects[:1]
        best = max(own.tolist(), key=lambda box: overlap(anchor, box))
        torch.testing.assert_close(boxes[image, row], torch.tensor(best), rtol=1e-4, atol=1e-3)
    assert not found.deltas[~found.positive].any()


@pytest.mark.parametrize("size", [1, 7, 40, 500])
def test_samples(size):
    state = torch.randint(0, 3, (4, 60))
    state[1] = 0  # nothing but ignored
    state[2, 3:] = 2  # hardly any positive
    state[3, :55] = 1  # hardly any negative
    positive, negative = state == 1, state == 2
    index, valid = sample(positive, negative, size, 0.5)
    assert index.shape == valid.shape == (4, min(size, 60))
    for image in range(4):
        drawn = index[image][valid[image]]
        assert len(drawn.unique()) == len(drawn)
        picked = state[image][drawn]
        positives = min(int(size * 0.5), int(positive[image].sum()))
        negatives = min(size - positives, int(negative[image].sum()))
        assert picked.tolist() == [1] * positives + [2] * negatives
        assert not index[image][~valid[image]].any()


def test_every_anchor_has_the_same_chance():
    positive = torch.arange(10)[None].expand(4000, 10) < 4
    index, valid = sample(positive, ~positive, 4, 0.5)
    assert valid.all()
    counts = index.flatten().bincount(minlength=10).tolist()
    for count, expected in zip(counts, [2000] * 4 + [8000 / 6] * 6, strict=True):
        assert abs(count - expected) < 5 * math.sqrt(expected)


def test_the_same_seed_draws_the_same_anchors():
    batch = [target(random_boxes(4, 48, 72)), target(random_boxes(1, 48, 72))]
    found = []
    for _ in range(2):
        torch.manual_seed(5)
        found.append(RPNObjective(anchors_per_image=32)(GRIDS, BOXES, batch))
    assert torch.equal(found[0].index, found[1].index)
    torch.manual_seed(6)
    assert not torch.equal(RPNObjective(anchors_per_image=32)(GRIDS, BOXES, batch).index, found[0].index)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"anchors_per_image": 0}, "anchors_per_image must be at least 1"),
        ({"positive_fraction": 1.5}, "positive_fraction must be in 0..1"),
        ({"positive_iou": 0.2}, "negative_iou must not exceed positive_iou 0.2, got 0.3"),
        ({"positive_iou": 0.0, "negative_iou": 0.0}, "positive_iou must be in 0..1, above 0"),
        ({"negative_iou": -0.1}, "negative_iou must be in 0..1"),
        ({"ignore_overlap": 0.0}, "ignore_overlap must be in 0..1, above 0"),
        ({"beta": -1.0}, "beta must not be negative"),
        ({"beta": float("nan")}, "beta must not be negative or infinite, got nan"),
        ({"anchors_per_image": 1.5}, "anchors_per_image must be a whole number"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        RPNObjective(**arguments)

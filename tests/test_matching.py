import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from samples import overlap, random_boxes

from detpipe import matching
from detpipe.types import Target


def slow_assign(proposals, target, positive_iou, negative_iou, ignore_overlap):
    """One image by the definition: (foreground, background, best IoU) of each proposal."""
    objects = list(zip(target["boxes"].tolist(), target["iscrowd"].tolist(), target["difficult"].tolist(), strict=True))
    result = []
    for box in proposals.tolist():
        to_find = [overlap(box, other) for other, crowd, difficult in objects if not crowd and not difficult]
        best = max(to_find, default=0.0)
        foreground = bool(to_find) and best >= positive_iou
        ignored = any(
            overlap(box, other, over_first=crowd) >= ignore_overlap
            for other, crowd, difficult in objects
            if crowd or difficult
        )
        background = not foreground and not ignored and negative_iou[0] <= best < negative_iou[1]
        result.append((foreground, background, best))
    return result


def scene(seed: int) -> tuple[list[torch.Tensor], list[Target]]:
    """Up to three images on a coarse grid, where overlaps often hit a threshold exactly; some without anything."""
    torch.manual_seed(seed)
    proposals, targets = [], []
    for _ in range(int(torch.randint(1, 4, ()))):
        objects, count = (int(torch.randint(0, high, ())) for high in (5, 12))
        boxes = random_boxes(objects, 6, 8, whole=True).double()
        crowd, difficult = (torch.rand(objects) < 0.25 for _ in range(2))
        labels = torch.randint(1, 4, (objects,))
        targets.append(Target(boxes=boxes, labels=labels, iscrowd=crowd, difficult=difficult))
        proposals.append(torch.cat((random_boxes(count, 6, 8, whole=True).double(), boxes[: objects // 2])))
    return proposals, targets


@settings(deadline=None, max_examples=200)
@given(
    st.integers(0, 10_000),
    st.sampled_from([(0.5, (0.0, 0.5)), (0.5, (0.1, 0.5)), (0.7, (0.25, 0.4)), (0.25, (0.0, 0.25))]),
    st.sampled_from([0.5, 0.75, 1.0]),
)
def test_assignment_equals_a_slow_loop(seed, thresholds, ignore_overlap):
    proposals, targets = scene(seed)
    boxes, present = matching.pad(proposals)
    truth = matching.gather_targets(targets)
    got = matching.assign(boxes, present, truth, *thresholds, ignore_overlap)
    assert not (got.foreground & got.background).any()
    for image, target in enumerate(targets):
        count = len(proposals[image])
        expected = slow_assign(proposals[image], target, *thresholds, ignore_overlap)
        rows = zip(
            got.foreground[image, :count], got.background[image, :count], got.overlap[image, :count], strict=True
        )
        assert [tuple(value.item() for value in row) for row in rows] == expected
        assert not got.foreground[image, count:].any()  # padding is nothing
        assert not got.background[image, count:].any()
        for row in got.foreground[image].nonzero().flatten().tolist():
            index = got.matched[image, row]
            assert truth.valid[image, index]
            assert overlap(proposals[image][row].tolist(), target["boxes"][index].tolist()) == got.overlap[image, row]


@settings(deadline=None)
@given(st.integers(0, 10_000))
def test_permuting_the_images_permutes_the_assignment(seed):
    proposals, targets = scene(seed)
    order = torch.randperm(len(targets)).tolist()
    boxes, present = matching.pad(proposals)
    straight = matching.assign(boxes, present, matching.gather_targets(targets))
    permuted = matching.assign(boxes[order], present[order], matching.gather_targets([targets[i] for i in order]))
    for field in ("foreground", "background", "overlap"):
        assert torch.equal(getattr(permuted, field), getattr(straight, field)[order])


def test_a_crowd_region_counts_over_the_area_of_the_box():
    crowd = torch.tensor([[0.0, 0.0, 100.0, 100.0]])
    target = Target(boxes=crowd, labels=torch.tensor([1]), iscrowd=torch.tensor([True]))
    proposals = torch.tensor([[0.0, 0, 10, 10], [95, 0, 105, 10], [96, 0, 106, 10], [0, 0, 100, 100]])  # 1, .5, .4, 1
    present = torch.ones(1, 4, dtype=torch.bool)
    got = matching.assign(proposals[None], present, matching.gather_targets([target]))
    assert not got.foreground.any()  # not even the region's own box
    assert got.background[0].tolist() == [False, False, True, False]


def test_a_difficult_object_counts_by_iou_and_an_object_beside_it_wins():
    boxes = torch.tensor([[0.0, 0.0, 10.0, 10.0], [0.0, 0.0, 10.0, 8.0]])
    target = Target(boxes=boxes, labels=torch.tensor([1, 2]), difficult=torch.tensor([True, False]))
    proposals = torch.tensor([[0.0, 0, 10, 10], [0, 0, 3, 3], [0, 10, 10, 20], [0, 2, 10, 14]])
    got = matching.assign(proposals[None], torch.ones(1, 4, dtype=torch.bool), matching.gather_targets([target]))
    assert got.foreground[0].tolist() == [True, False, False, False]
    assert got.matched[0, 0] == 1
    assert got.background[0].tolist() == [False, True, True, False]  # the last has .57 with the difficult one


@pytest.mark.parametrize("low", [0.0, 0.1])
def test_an_image_without_objects_is_background_from_iou_zero_on_only(low):
    target = Target(boxes=torch.zeros(0, 4), labels=torch.zeros(0, dtype=torch.int64))
    present = torch.tensor([[True, True, False]])
    got = matching.assign(random_boxes(3)[None], present, matching.gather_targets([target]), negative_iou=(low, 0.5))
    assert not got.foreground.any()
    assert got.background[0].tolist() == [low == 0, low == 0, False]


def test_no_proposals():
    target = Target(boxes=random_boxes(2), labels=torch.tensor([1, 1]))
    boxes, present = matching.pad([torch.zeros(0, 4), torch.zeros(0, 4)])
    got = matching.assign(boxes, present, matching.gather_targets([target, target]))
    assert got.foreground.shape == got.overlap.shape == (2, 0)
    indices, chosen = matching.sample(got.foreground, got.background, 5, 0.5)
    assert indices.shape == (2, 5)
    assert not chosen.any()


def test_pad():
    rows, present = matching.pad([torch.ones(2, 4), torch.zeros(0, 4), torch.full((3, 4), 2.0)])
    assert rows[..., 0].tolist() == [[1, 1, 0], [0, 0, 0], [2, 2, 2]]
    assert present.tolist() == [[True, True, False], [False, False, False], [True, True, True]]


def test_flags_may_be_missing_or_whole_numbers():
    boxes, labels = random_boxes(2), torch.tensor([1, 2])
    flagged = Target(boxes=boxes, labels=labels, iscrowd=torch.tensor([0, 1]), difficult=torch.tensor([1, 1]))
    truth = matching.gather_targets([Target(boxes=boxes, labels=labels), flagged])
    assert truth.valid.tolist() == [[True, True], [False, False]]
    assert truth.crowd.tolist() == [[False, False], [False, True]]
    assert truth.difficult.tolist() == [[False, False], [True, False]]


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ({"boxes": torch.zeros(1, 4)}, r"targets\[1\] needs 'boxes' and 'labels'.*\['boxes'\]"),
        (
            {"boxes": torch.zeros(1, 4), "labels": torch.ones(2)},
            r"targets\[1\]: boxes must be \[G, 4\].*\[1, 4\] and \[2\]",
        ),
        ({"boxes": torch.zeros(1, 5), "labels": torch.ones(1)}, r"targets\[1\]: boxes must be"),
    ],
)
def test_bad_targets_are_named(target, message):
    with pytest.raises(ValueError, match=message):
        matching.gather_targets([Target(boxes=torch.zeros(0, 4), labels=torch.zeros(0)), target])


def masks(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(seed)
    kind = torch.randint(0, 3, (3, int(torch.randint(1, 40, ()))))
    kind[0] = kind[0].clamp(max=1)  # no background in the first image
    kind[1] = kind[1].where(kind[1] != 1, torch.zeros(()).long())  # no foreground in the second
    return kind == 1, kind == 2


@settings(deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 30), st.sampled_from([0.0, 0.25, 0.5, 1.0]))
def test_samples_have_a_fixed_size_and_the_wanted_mixture(seed, size, fraction):
    foreground, background = masks(seed)
    indices, chosen = matching.sample(foreground, background, size, fraction)
    assert indices.shape == chosen.shape == (3, size)
    for image in range(3):
        drawn = indices[image][chosen[image]]
        assert len(drawn.unique()) == len(drawn)
        positive = foreground[image][drawn]
        wanted = min(int(foreground[image].sum()), int(size * fraction))
        assert positive.sum() == wanted
        assert (~positive).sum() == min(int(background[image].sum()), size - wanted)
        assert (positive | background[image][drawn]).all()
        assert positive.tolist() == sorted(positive.tolist(), reverse=True)  # foreground first
        assert chosen[image].tolist() == sorted(chosen[image].tolist(), reverse=True)  # padding last
        assert not indices[image][~chosen[image]].any()


@settings(deadline=None)
@given(st.integers(0, 10_000))
def test_permuting_the_images_permutes_what_is_drawn_where_all_are_drawn(seed):
    foreground, background = masks(seed)
    order = torch.randperm(3)
    straight = matching.sample(foreground, background, 80, 0.5)
    permuted = matching.sample(foreground[order], background[order], 80, 0.5)
    for row, image in enumerate(order.tolist()):
        assert set(permuted[0][row][permuted[1][row]].tolist()) == set(straight[0][image][straight[1][image]].tolist())


def test_a_generator_makes_sampling_repeatable():
    foreground, background = masks(3)
    draws = [matching.sample(foreground, background, 6, 0.5, torch.Generator().manual_seed(s))[0] for s in (1, 1, 2)]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


def test_every_proposal_is_as_likely_to_be_drawn():
    foreground = torch.arange(20)[None] < 8
    counts = torch.zeros(20)
    for _ in range(2000):
        indices, _ = matching.sample(foreground, ~foreground, 10, 0.4)
        counts[indices[0]] += 1
    assert (counts[:8] / 2000 - 4 / 8).abs().max() < 0.06  # five standard deviations
    assert (counts[8:] / 2000 - 6 / 12).abs().max() < 0.06


def test_objects_are_packed_in_float32_at_least():
    """The data come in half precision where Lightning's precision is 16-true."""
    for dtype, expected in ((torch.float16, torch.float32), (torch.float64, torch.float64)):
        target = {"boxes": torch.ones(1, 4, dtype=dtype), "labels": torch.ones(1, dtype=torch.int64)}
        assert matching.gather_targets([target]).boxes.dtype == expected


@pytest.mark.parametrize("label", [-1, 0, 4])
@pytest.mark.parametrize("flag", [None, "iscrowd", "difficult"])
def test_labels_of_objects_that_count_are_1_to_k(label, flag):
    good = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}
    target = {"boxes": torch.ones(2, 4), "labels": torch.tensor([3, label])}
    if flag is not None:
        matching.check_objects([good, {**target, flag: torch.tensor([False, True])}], 3)
        return
    with pytest.raises(ValueError, match=rf"targets\[1\], box 1: label {label}, expected 1\.\.3"):
        matching.check_objects([good, target], 3)


def test_boxes_that_are_not_finite_are_named():
    """One of them would leave all proposals of its image without a match, and out of the loss."""
    for value in (math.nan, math.inf):
        target = {"boxes": torch.tensor([[0.0, 0.0, 1.0, 1.0], [0.0, value, 1.0, 1.0]]), "labels": torch.ones(2).long()}
        with pytest.raises(ValueError, match=r"targets\[0\], box 1: expected finite numbers"):
            matching.check_objects([target], 3)
        matching.check_objects([{**target, "iscrowd": torch.tensor([False, True])}], 3)

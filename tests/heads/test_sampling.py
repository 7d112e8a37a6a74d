import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from samples import random_boxes, random_target

from detpipe.boxes import iou
from detpipe.heads import RoISampler
from detpipe.types import Target


def scene(seed: int) -> tuple[list[torch.Tensor], list[Target]]:
    """Three images, one of them without objects; one object in four is crowd, one difficult."""
    torch.manual_seed(seed)
    targets = [random_target(objects) for objects in (4, 0, 2)]
    for target in targets:
        kind = torch.randint(0, 4, (len(target["labels"]),))
        target["iscrowd"], target["difficult"] = kind == 0, kind == 1
    near = [target["boxes"].repeat(5, 1) for target in targets]
    proposals = [
        torch.cat((random_boxes(20), boxes + torch.rand_like(boxes) * torch.tensor([0.0, 0.0, 6.0, 6.0])))
        for boxes in near
    ]
    return proposals, targets


@settings(deadline=None)
@given(st.integers(0, 10_000), st.booleans())
def test_each_roi_says_what_the_definition_says(seed, add_ground_truth):
    proposals, targets = scene(seed)
    rois = RoISampler(rois_per_image=16, add_ground_truth=add_ground_truth)(proposals, targets)
    assert rois.rois.shape == rois.boxes.shape == (3, 16, 4)
    assert not (rois.foreground & ~rois.valid).any()
    for image, target in enumerate(targets):
        wanted = ~target["iscrowd"] & ~target["difficult"]
        boxes, labels = target["boxes"][wanted], target["labels"][wanted]
        allowed = torch.cat((proposals[image], boxes)) if add_ground_truth else proposals[image]
        for i in rois.valid[image].nonzero().flatten().tolist():
            roi = rois.rois[image, i]
            assert (allowed == roi).all(dim=1).any()
            overlaps = iou(roi[None], boxes)[0]
            if rois.foreground[image, i]:
                assert overlaps.max() >= 0.5
                assert rois.labels[image, i] == labels[overlaps.argmax()]
                assert torch.equal(rois.boxes[image, i], boxes[overlaps.argmax()])
            else:
                assert not (overlaps >= 0.5).any()
                assert not (iou(roi[None], target["boxes"][target["difficult"]]) >= 0.5).any()
                assert rois.labels[image, i] == 0
                assert torch.equal(rois.boxes[image, i], roi)
        assert rois.foreground[image].sum() <= 4


def test_ground_truth_is_trained_on_where_no_proposal_hits():
    target = Target(boxes=torch.tensor([[10.0, 10.0, 20.0, 20.0]]), labels=torch.tensor([3]))
    far = [torch.tensor([[50.0, 50.0, 60.0, 60.0]])]
    with_truth = RoISampler(rois_per_image=8)(far, [target])
    assert with_truth.labels.tolist() == [[3] + [0] * 7]
    assert with_truth.valid.tolist() == [[True, True] + [False] * 6]
    assert not RoISampler(rois_per_image=8, add_ground_truth=False)(far, [target]).foreground.any()


def test_regions_of_many_objects_are_not_added_as_proposals():
    boxes = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 8]])  # the region would be foreground of the object
    target = Target(boxes=boxes, labels=torch.tensor([1, 2]), iscrowd=torch.tensor([False, True]))
    rois = RoISampler(rois_per_image=8, positive_fraction=1.0)([torch.zeros(0, 4)], [target])
    assert rois.rois[rois.valid].tolist() == [[0, 0, 10, 10]]


def test_boxes_without_area_or_value_are_never_trained_on():
    bad = torch.tensor([[float("nan"), 0, 5, 5], [5, 5, 5, 9], [9, 9, 4, 4], [0, 0, float("inf"), 9], [1, 1, 9, 9]])
    target = Target(boxes=torch.zeros(0, 4), labels=torch.zeros(0, dtype=torch.int64))
    rois = RoISampler(rois_per_image=6)([bad], [target])
    assert rois.valid.sum() == 1
    assert rois.rois[rois.valid].tolist() == [[1, 1, 9, 9]]
    assert torch.isfinite(rois.rois).all()  # padding is not taken from a bad box either


@pytest.mark.parametrize("proposals", [0, 5])
@pytest.mark.parametrize("objects", [0, 2])
def test_empty_inputs(proposals, objects):
    rois = RoISampler(rois_per_image=4)([random_boxes(proposals)] * 2, [random_target(objects)] * 2)
    assert rois.rois.shape == rois.boxes.shape == (2, 4, 4)
    assert rois.labels.shape == rois.valid.shape == rois.foreground.shape == (2, 4)
    assert rois.labels.dtype == torch.int64
    assert rois.valid.any() == (proposals + objects > 0)
    assert rois.foreground.any() == (objects > 0)


def test_one_seed_gives_one_sample():
    proposals, targets = scene(0)
    draws = []
    for seed in (5, 5, 6):
        torch.manual_seed(seed)
        draws.append(RoISampler(rois_per_image=8)(proposals, targets).rois)
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rois_per_image": 0}, "rois_per_image must be at least 1, got 0"),
        ({"positive_fraction": 1.5}, "positive_fraction must be in 0..1, got 1.5"),
        ({"negative_iou": (0.6, 0.5)}, "negative_iou"),
        ({"negative_iou": (0.0, 0.6)}, "negative_iou"),
        ({"negative_iou": (-0.1, 0.5)}, "negative_iou"),
        ({"positive_iou": 1.1}, "positive_iou"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        RoISampler(**arguments)

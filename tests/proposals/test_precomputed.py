import pytest
import torch

from detpipe.proposals import PrecomputedProposals
from detpipe.stages import ImageList

IMAGES = ImageList(torch.zeros(2, 3, 64, 96), [(40, 50), (64, 96)])
BOXES = torch.tensor([[-5.0, 3.0, 70.0, 30.0], [1.0, 2.0, 3.0, 4.0], [10.0, 20.0, 30.0, 60.0]])


def test_boxes_are_taken_in_order_and_clipped_to_their_image():
    boxes, losses = PrecomputedProposals()(IMAGES, {}, [{"proposals": BOXES}, {"proposals": BOXES[1:]}])
    assert boxes[0].tolist() == [[0, 3, 50, 30], [1, 2, 3, 4], [10, 20, 30, 40]]
    assert boxes[1].tolist() == BOXES[1:].tolist()
    assert losses == {}
    assert BOXES[0, 0] == -5  # the caller's tensor is left alone


def test_the_first_are_kept():
    boxes, _ = PrecomputedProposals(max_boxes=2)(IMAGES, {}, [{"proposals": BOXES}, {"proposals": BOXES[:1]}])
    assert [len(found) for found in boxes] == [2, 1]
    assert boxes[0].tolist() == [[0, 3, 50, 30], [1, 2, 3, 4]]
    every = PrecomputedProposals(max_boxes=None, remove_duplicates=False)
    boxes, _ = every(IMAGES, {}, [{"proposals": BOXES.repeat(999, 1)}] * 2)
    assert len(boxes[0]) == 2997


def test_the_first_of_equal_boxes_is_kept():
    boxes = torch.cat((BOXES[2:], BOXES[1:], BOXES[2:] + 0.01, BOXES[1:2] + 0.1))
    found, _ = PrecomputedProposals()(IMAGES, {}, [{"proposals": boxes}] * 2)
    assert torch.equal(found[1], boxes[[0, 1, 4]])
    found, _ = PrecomputedProposals(max_boxes=2)(IMAGES, {}, [{"proposals": boxes}] * 2)
    assert torch.equal(found[1], boxes[:2])


def test_small_boxes_are_left_out():
    boxes = torch.tensor([[0.0, 0, 0.5, 9], [0, 0, 9, 0.9], [0, 0, 2, 2], [60, 0, 70, 9], [3, 3, 3, 9]])
    found, _ = PrecomputedProposals()(IMAGES, {}, [{"proposals": boxes}] * 2)
    assert torch.equal(found[0], boxes[2:3])  # the fourth lies outside of the first image
    assert torch.equal(found[1], boxes[2:4])
    found, _ = PrecomputedProposals(min_size=0)(IMAGES, {}, [{"proposals": boxes}] * 2)
    assert torch.equal(found[1], boxes[:4])


def test_what_is_not_finite_is_named():
    boxes = BOXES.clone()
    boxes[1, 2] = torch.inf
    with pytest.raises(ValueError, match=r"image 3: proposal 1 is not finite: \[1.0, 2.0, inf, 4.0\]"):
        PrecomputedProposals()(IMAGES, {}, [{"proposals": BOXES, "image_id": 2}, {"proposals": boxes, "image_id": 3}])


def test_no_proposals_are_proposals_too():
    boxes, _ = PrecomputedProposals()(IMAGES, {}, [{"proposals": torch.zeros(0, 4)}] * 2)
    assert [found.shape for found in boxes] == [(0, 4), (0, 4)]


@pytest.mark.parametrize(
    ("target", "name"),
    [({"file_name": "cat.jpg", "image_id": 7}, "cat.jpg"), ({"image_id": 7}, "7"), ({}, r"targets\[1\]")],
)
def test_absence_names_the_image(target, name):
    with pytest.raises(ValueError, match=rf"image {name} has no proposals: add 'proposals' \[P, 4\]"):
        PrecomputedProposals()(IMAGES, {}, [{"proposals": BOXES}, target])
    with pytest.raises(ValueError, match=rf"image {name}: proposals must be \[P, 4\], got \[3, 5\]"):
        PrecomputedProposals()(IMAGES, {}, [{"proposals": BOXES}, {**target, "proposals": torch.zeros(3, 5)}])


def test_absence_of_all_targets():
    with pytest.raises(ValueError, match=r"pass targets=\[\{'proposals': boxes\}"):
        PrecomputedProposals()(IMAGES, {})


@pytest.mark.parametrize("count", [0, -1])
def test_bad_arguments(count):
    with pytest.raises(ValueError, match=f"max_boxes must be at least 1, got {count}"):
        PrecomputedProposals(max_boxes=count)
    with pytest.raises(ValueError, match="min_size must not be negative or infinite, got -2"):
        PrecomputedProposals(min_size=-2)

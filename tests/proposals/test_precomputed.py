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
    boxes, _ = PrecomputedProposals(max_boxes=None)(IMAGES, {}, [{"proposals": BOXES.repeat(999, 1)}] * 2)
    assert len(boxes[0]) == 2997


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
    with pytest.raises(ValueError, match=f"max_boxes must be positive or null, got {count}"):
        PrecomputedProposals(max_boxes=count)

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from detpipe.datasets import Augment
from detpipe.datasets.augment.settings import Combine, CopyPaste, Neighbors

from ..pixel_oracle import FIRST_LABEL, Drawn, check_against_pixels, drawn_images, left, seen, transformed

SIZE = (80, 100)


def pasting(min_visibility: float = 0.0, **changes: Any) -> Augment:
    settings_ = {"p": 1.0, "objects": 1.0, **changes}
    return Augment(flip=0, min_visibility=min_visibility, combine=Combine(copy_paste=CopyPaste(**settings_)))


STILL = {"scale": (1.0, 1.0), "flip": 0.0}  # images of one size then lie one on the other


def two(below: tuple, above: tuple, **changes: Any) -> list[Drawn]:
    return [Drawn(*SIZE, below), Drawn(*SIZE, above, **changes)]


@settings(max_examples=20, deadline=None)
@given(images=drawn_images(3), seed=st.integers(0, 2**31))
def test_boxes_are_where_the_pixels_are(images: list[Drawn], seed: int) -> None:
    """Also of objects that are partly hidden: their boxes shrink to what is seen."""
    check_against_pixels(pasting(objects=0.5), images, seed, 1.0)


@settings(max_examples=20, deadline=None)
@given(images=drawn_images(3), seed=st.integers(0, 2**31))
def test_flags_labels_and_ids_stay_in_step(images: list[Drawn], seed: int) -> None:
    crowd, difficult = (sum((getattr(one, name) for one in images), ()) for name in ("crowd", "difficult"))
    image, target = transformed(pasting(), images, seed)
    assert image.shape == (3, images[0].height, images[0].width)
    k = (target["labels"] - FIRST_LABEL).tolist()
    assert target["iscrowd"].tolist() == [crowd[i] for i in k]
    assert target["difficult"].tolist() == [difficult[i] for i in k]
    own = len(images[0].boxes)
    if not any(not crowd[i] and not difficult[i] for i in k if i >= own):
        assert (
            max(k, default=-1) < own
        )  # crowd regions and difficult objects are not pasted, but seen on those that are
    assert (target["image_id"], target["file_name"]) == (0, "0.png")


def test_a_hidden_object_is_removed_and_its_neighbor_stays() -> None:
    images = two(((10, 10, 30, 30), (60, 20, 90, 70)), ((5, 5, 40, 40),))
    _, target = transformed(pasting(**STILL), images, 0)
    assert left(target) == {1: [[60, 20, 90, 70]], 2: [[5, 5, 40, 40]]}


def test_a_half_hidden_object_shrinks_on_the_hidden_side_only() -> None:
    images = two(((10, 10, 50, 30),), ((30, 5, 70, 40),))
    _, target = transformed(pasting(**STILL), images, 0)
    assert left(target) == {0: [[10, 10, 30, 30]], 1: [[30, 5, 70, 40]]}
    torch.testing.assert_close(target["area"], torch.tensor([200.0, 700.0]))
    assert len(transformed(pasting(0.6, **STILL), images, 0)[1]["boxes"]) == 1  # half is less than is asked for


def test_an_object_that_is_seen_on_all_sides_keeps_its_box() -> None:
    images = two(((10, 10, 70, 70),), ((30, 30, 50, 50),))
    assert left(transformed(pasting(**STILL), images, 0)[1])[0] == [[10, 10, 70, 70]]


def test_only_the_mask_is_pasted() -> None:
    """The other image is white all over; only its object arrives."""
    images = two((), ((20, 20, 60, 50),))
    white = torch.full((3, *SIZE), 255, dtype=torch.uint8)
    black = torch.zeros(3, *SIZE, dtype=torch.uint8)
    read = lambda index: ((black, white)[index], images[index].target(index, 1))  # noqa: E731
    image, _ = pasting(**STILL)(*read(0), 0, Neighbors(2, 0, read, lambda index: images[index].masks()))
    assert image[0, 20:50, 20:60].min() == 255
    assert int((image[0] > 0).sum()) == 30 * 40


def test_objects_with_next_to_nothing_to_show_are_not_pasted() -> None:
    images = two((), ((0, 0, 100, 80),))
    for seed in range(20):
        augment = pasting(0.5, scale=(2.0, 2.0), flip=0.0)  # a window of a quarter
        assert not seen(augment, images, seed, 0).any()
        assert len(transformed(augment, images, seed)[1]["boxes"]) == 0


def test_what_is_seen_of_an_object_on_a_pasted_one_has_a_box() -> None:
    images = two((), ((30, 10, 70, 50), (60, 20, 90, 40)), difficult=(False, True))
    _, target = transformed(pasting(**STILL), images, 0)
    assert left(target) == {0: [[30, 10, 70, 50]], 1: [[60, 20, 70, 40]]}
    assert target["difficult"].tolist() == [False, True]
    assert len(transformed(pasting(0.5, **STILL), images, 0)[1]["boxes"]) == 1  # a third is less


def test_proposals_of_pasted_objects_come_along() -> None:
    images = two(((10, 10, 20, 20),), ((30, 5, 70, 40), (5, 50, 25, 70)), crowd=(False, True))
    _, target = transformed(pasting(**STILL), images, 0)
    assert target["proposals"].tolist() == [[10, 10, 20, 20], [30, 5, 70, 40]]


def test_scale_and_flip() -> None:
    images = two((), ((10, 20, 40, 60),))
    [[box]] = left(transformed(pasting(scale=(0.5, 0.5), flip=0.0), images, 3)[1]).values()
    assert [box[2] - box[0], box[3] - box[1]] == [15, 20]
    assert left(transformed(pasting(scale=(1.0, 1.0), flip=1.0), images, 3)[1]) == {0: [[60, 20, 90, 60]]}
    boxes = {tuple(left(transformed(pasting(), images, seed)[1]).get(0, [[0]])[0]) for seed in range(20)}
    assert len(boxes) > 15


def test_a_part_of_the_objects_is_pasted_and_at_least_one() -> None:
    images = two((), tuple((x, 10, x + 8, 30) for x in range(0, 96, 12)))
    counts = [len(transformed(pasting(objects=0.3, **STILL), images, seed)[1]["boxes"]) for seed in range(60)]
    assert min(counts) == 1
    assert 1.8 < np.mean(counts) < 3.2  # of 8


@pytest.mark.parametrize("flags", [{}, {"crowd": (True,)}, {"difficult": (True,)}])
def test_an_image_with_nothing_to_paste_leaves_the_other_alone(flags: dict[str, Any]) -> None:
    images = two(((10, 10, 30, 30),), ((30, 5, 70, 40),) if flags else (), **flags)
    _, target = transformed(pasting(**STILL), images, 0)
    assert left(target) == {0: [[10, 10, 30, 30]]}


def test_an_object_too_thin_for_a_pixel_is_hidden_with_its_center() -> None:
    images = two(((10, 10, 30, 30),), ((30, 5, 70, 40),))
    target = images[0].target(0, 1)
    target["boxes"] = torch.tensor([[40.2, 10.2, 40.3, 10.4]])
    masks = [np.zeros((1, *SIZE), dtype=bool), images[1].masks()]
    read = lambda index: (torch.zeros(3, *SIZE, dtype=torch.uint8), (target, images[1].target(1, 2))[index])  # noqa: E731
    _, out = pasting(**STILL)(*read(0), 0, Neighbors(2, 0, read, lambda index: masks[index]))
    assert out["labels"].tolist() == [2]


def test_without_masks_nothing_can_be_pasted() -> None:
    read = lambda index: (torch.zeros(3, *SIZE, dtype=torch.uint8), Drawn(*SIZE, ()).target(index, 1))  # noqa: E731
    with pytest.raises(ValueError, match="copy_paste needs instance masks; use data with segmentations, or set"):
        pasting()(*read(0), 0, Neighbors(2, 0, read))

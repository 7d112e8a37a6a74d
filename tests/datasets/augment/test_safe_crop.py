import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from detpipe.datasets import Augment
from detpipe.datasets.augment.settings import SafeCrop

from ..pixel_oracle import FIRST_LABEL, Drawn, check_against_pixels, drawn_images, left, seen, transformed

ALWAYS = SafeCrop(p=1.0, min_visibility=0.6)


@settings(max_examples=30, deadline=None)
@given(images=drawn_images(1), seed=st.integers(0, 2**31), least=st.floats(0.2, 1.0))
def test_no_kept_box_loses_more_than_promised_and_one_stays(images: list[Drawn], seed: int, least: float) -> None:
    augment = Augment(flip=0.5, min_visibility=0.0, safe_crop=SafeCrop(p=1.0, min_visibility=least))
    _, target = transformed(augment, images, seed)
    kept, (image,) = left(target), images
    for k, (x1, y1, x2, y2) in enumerate(image.boxes):
        visible = int(seen(augment, images, seed, k).sum()) / ((x2 - x1) * (y2 - y1))  # pixels are cut, not resized
        if image.crowd[k]:
            assert (k in kept) == (visible > 0)  # what is left of a region of many objects is still to be ignored
        elif abs(visible - least) > 1e-6:
            assert (k in kept) == (visible > least)
    plain = [k for k in range(len(image.boxes)) if not image.crowd[k] and not image.difficult[k]]
    assert not plain or set(plain) & set(kept)


@settings(max_examples=25, deadline=None)
@given(images=drawn_images(1), seed=st.integers(0, 2**31))
def test_boxes_and_proposals_move_as_the_pixels_do(images: list[Drawn], seed: int) -> None:
    augment = Augment(flip=0.5, min_visibility=0.0, safe_crop=ALWAYS)
    check_against_pixels(augment, images, seed, 0.01, complete=False)
    _, target = transformed(augment, images, seed)
    boxes = {tuple(box) for box in target["boxes"].tolist()}
    assert boxes <= {tuple(box) for box in target["proposals"].tolist()}  # proposals may lose more


def test_the_image_is_cut() -> None:
    image = Drawn(100, 120, ((40, 30, 80, 70),))
    augment = Augment(flip=0, safe_crop=ALWAYS)
    shapes = [tuple(transformed(augment, [image], seed)[0].shape[1:]) for seed in range(60)]
    assert sum(shape != (100, 120) for shape in shapes) > 40
    assert len(set(shapes)) > 30
    assert min(h for h, _ in shapes) < 60
    assert all(len(transformed(augment, [image], seed)[1]["boxes"]) == 1 for seed in range(60))


def test_where_no_window_keeps_an_object_the_image_stays_whole() -> None:
    image = Drawn(100, 100, ((0, 0, 100, 100),))
    augment = Augment(flip=0, safe_crop=SafeCrop(p=1.0, min_visibility=0.9, scale=(0.1, 0.3)))
    pixels, target = transformed(augment, [image], 0)
    assert pixels.shape == (3, 100, 100)
    assert left(target) == {0: [[0, 0, 100, 100]]}


def test_what_was_lost_before_counts() -> None:
    """A zoom leaves a quarter of an object; a crop may not take that for the whole object."""
    image = Drawn(100, 100, ((0, 0, 100, 100),))
    augment = Augment(flip=0, scale_jitter=(2.0, 2.0), min_visibility=0.0, safe_crop=ALWAYS)
    pixels, target = transformed(augment, [image], 0)
    assert pixels.shape == (3, 100, 100)  # no window keeps an object
    assert left(target) == {0: [[0, 0, 100, 100]]}


def test_the_visibility_of_the_whole_augmentation_is_promised_where_it_is_larger() -> None:
    image = Drawn(100, 120, ((10, 10, 90, 90),))
    augment = Augment(flip=0, min_visibility=0.8, safe_crop=SafeCrop(p=1.0, min_visibility=0.1))
    for seed in range(40):
        target = transformed(augment, [image], seed)[1]
        assert target["labels"].tolist() == [FIRST_LABEL]
        assert (target["boxes"][:, 2:] - target["boxes"][:, :2]).prod() >= 0.8 * 80 * 80 - 1


def test_an_image_without_objects_is_cut_anywhere() -> None:
    pixels, target = transformed(Augment(safe_crop=ALWAYS), [Drawn(100, 120, (), proposals=False)], 1)
    assert pixels.shape != (3, 100, 120)
    assert target["boxes"].shape == (0, 4)
    assert torch.equal(target["labels"], torch.zeros(0, dtype=torch.int64))


def test_the_probability_is_kept() -> None:
    augment = Augment(flip=0, safe_crop=SafeCrop(p=0.3))
    cut = [transformed(augment, [Drawn(80, 90, ())], seed)[0].shape != (3, 80, 90) for seed in range(200)]
    assert 0.2 < np.mean(cut) < 0.4

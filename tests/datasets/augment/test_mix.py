from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from detpipe.datasets import Augment
from detpipe.datasets.augment.mix import draw_others
from detpipe.datasets.augment.settings import Combine, CopyPaste, MixUp, Mosaic, Neighbors, SafeCrop, Transform

from ..pixel_oracle import FIRST_LABEL, Drawn, check_against_pixels, drawn_images, extents, left, seen, transformed

MOSAIC, MIXUP = Combine(mosaic=Mosaic(p=1.0)), Combine(mixup=MixUp(p=1.0))
EMPTY = Drawn(64, 80, ())


def plain(combine: Combine, **changes: object) -> Augment:
    return Augment(**{"flip": 0, "min_visibility": 0, "combine": combine, **changes})  # type: ignore[arg-type]


@settings(max_examples=50, deadline=None)
@given(
    images=drawn_images(5, most=2),
    seed=st.integers(0, 2**31),
    # where both images of a blend are, the weaker leaves a fifth; at that, an edge enlarged 2.3 times reaches a pixel further
    which=st.sampled_from([(MOSAIC, 1.0, 0.5), (MIXUP, 2.0, 0.15)]),
)
def test_boxes_move_as_the_pixels_do_and_all_else_with_them(
    images: list[Drawn], seed: int, which: tuple[Combine, float, float]
) -> None:
    combine, tolerance, part = which
    check_against_pixels(plain(combine), images, seed, tolerance, part=part)
    target = transformed(plain(combine), images, seed)[1]
    check_in_step(target, images)
    assert torch.equal(target["boxes"], target["proposals"])  # there is one at each box


@settings(max_examples=25, deadline=None)
@given(
    images=drawn_images(5, most=2),
    seed=st.integers(0, 2**31),
    combine=st.sampled_from([Combine(CopyPaste(p=1.0)), MOSAIC, MIXUP]),
)
def test_all_steps_together_keep_boxes_where_the_pixels_are(images: list[Drawn], seed: int, combine: Combine) -> None:
    """One way of combining at a time: two may bring the same object, and its color, to two places."""
    augment = Augment(
        *(0.5, (0.7, 1.4), 0.3, 0.0, 0.0, 0.5),
        safe_crop=SafeCrop(p=0.5, min_visibility=0.2),
        combine=combine,
        transforms=(Transform("RandomRotate90"), Transform("RandomScale", {"scale_limit": [-0.2, 0.3], "p": 0.5})),
    )
    check_against_pixels(augment, images, seed, 3.0, tight=lambda seen, size: False, complete=False)
    every = replace(augment, combine=Combine(CopyPaste(p=0.5), Mosaic(p=0.5), MixUp(p=0.5)))
    for one in (augment, every):
        check_in_step(transformed(one, images, seed)[1], images)


def check_in_step(target: dict, images: list[Drawn]) -> None:
    """Flags and areas are still those of the object that the label names."""
    crowd, difficult = (sum((getattr(one, name) for one in images), ()) for name in ("crowd", "difficult"))
    sizes = [(x2 - x1) * (y2 - y1) for one in images for x1, y1, x2, y2 in one.boxes]
    assert target["image_id"] == 0
    assert target["file_name"] == "0.png"
    k = (target["labels"] - FIRST_LABEL).tolist()
    assert target["iscrowd"].tolist() == [crowd[i] for i in k]
    assert target["difficult"].tolist() == [difficult[i] for i in k]
    G = len(k)
    assert {name: tuple(target[name].shape) for name in ("boxes", "area", "labels")} == {
        "boxes": (G, 4), "area": (G,), "labels": (G,),
    }  # fmt: skip
    now = (target["boxes"][:, 2:] - target["boxes"][:, :2]).prod(1)
    before = torch.tensor([sizes[i] for i in k], dtype=torch.float32)
    torch.testing.assert_close(target["area"], before / 2 * now / before)


def test_a_mosaic_has_the_size_of_the_first_image_and_four_images() -> None:
    images = [Drawn(h, w, ((0, 0, w, h),)) for h, w in ((90, 120), (60, 200), (200, 60), (70, 70))]
    for seed in range(20):
        image, target = transformed(plain(MOSAIC), images, seed)
        assert image.shape == (3, 90, 120)
        assert len(target["boxes"]) == 4
        assert float((target["boxes"][:, 2:] - target["boxes"][:, :2]).prod(1).sum()) == 90 * 120  # they tile the image
    places = {tuple(transformed(plain(MOSAIC), images, seed)[1]["boxes"][0, :2].tolist()) for seed in range(20)}
    assert len(places) > 10  # the first image comes to any quadrant


def test_what_a_mosaic_took_still_counts_after_later_steps() -> None:
    """A crop that keeps all that the mosaic left must not make the rest look whole."""
    images = [Drawn(80, 100, ((0, 0, 100, 80),)) for _ in range(4)]
    zoomed = Combine(mosaic=Mosaic(p=1.0, zoom=(2.0, 2.0)))  # leaves a quarter, or less, of each image
    assert len(transformed(plain(zoomed, min_visibility=0.1), images, 0)[1]["boxes"]) == 4
    assert len(transformed(plain(zoomed, min_visibility=0.3, flip=1.0), images, 0)[1]["boxes"]) == 0


def test_a_blend_shows_both_images() -> None:
    images = [Drawn(60, 80, ((5, 5, 40, 50),)), Drawn(120, 160, ((60, 20, 140, 100),))]
    for seed in range(10):
        image, target = transformed(plain(MIXUP), images, seed, painted=1)
        assert image.shape == (3, 60, 80)
        assert 255 * 0.2 - 1 <= int(image.max()) <= 255 * 0.8 + 1
        assert left(target) == {0: [[5, 5, 40, 50]], 1: [[30, 10, 70, 50]]}  # the other is halved


def test_an_image_that_is_blended_in_stays_whole_where_shapes_differ() -> None:
    images = [Drawn(60, 80, ()), Drawn(60, 30, ((0, 0, 30, 60),))]
    boxes = {tuple(transformed(plain(MIXUP), images, seed)[1]["boxes"][0].tolist()) for seed in range(20)}
    assert {(y1, y2, x2 - x1) for x1, y1, x2, y2 in boxes} == {(0, 60, 30)}
    assert len(boxes) > 5


@pytest.mark.parametrize("combine", [MOSAIC, MIXUP, Combine(CopyPaste(p=1.0))])
@pytest.mark.parametrize("proposals", [False, True])
def test_images_without_objects(combine: Combine, proposals: bool) -> None:
    empty = Drawn(64, 80, (), proposals=proposals)
    image, target = transformed(plain(combine), [empty] * 4, 0)
    assert image.shape == (3, 64, 80)
    assert target["boxes"].shape == (0, 4)
    assert ("proposals" in target) == proposals
    some = Drawn(64, 80, ((10, 10, 40, 40),), proposals=proposals)
    for seed in range(5):
        _, target = transformed(plain(combine), [empty, some, some, some], seed)
        assert len(target["boxes"]) == len(target["labels"]) == len(target["area"])


def test_a_strip_of_one_pixel_is_no_mosaic() -> None:
    strip = Drawn(1, 90, ((0, 0, 50, 1),))
    assert left(transformed(plain(MOSAIC), [strip] * 4, 0)[1]) == {0: [[0, 0, 50, 1]]}
    assert left(transformed(plain(MOSAIC), [Drawn(2, 2, ())] + [strip] * 3, 0)[1])


def test_only_what_is_drawn_is_read() -> None:
    read: list[int] = []

    def note(index: int) -> tuple:
        read.append(index)
        return torch.zeros(3, 20, 20, dtype=torch.uint8), Drawn(20, 20, ()).target(index, 1)

    image, target = note(0)
    read.clear()
    augment, counts = plain(Combine(mosaic=Mosaic(p=0.4))), []
    for seed in range(100):
        augment(image, target, seed, Neighbors(1000, 0, note))
        counts.append(len(read))
        read.clear()
    assert set(counts) == {0, 3}
    assert 25 < np.count_nonzero(counts) < 55


def test_an_error_of_a_neighbor_is_passed_on() -> None:
    def fail(index: int) -> tuple:
        raise OSError(f"{index}.jpg is damaged")

    with pytest.raises(OSError, match=r"\d\.jpg is damaged"):
        plain(MIXUP)(torch.zeros(3, 9, 9, dtype=torch.uint8), EMPTY.target(0, 1), 0, Neighbors(5, 0, fail))


def test_all_other_images_are_drawn_none_twice_and_never_the_image_itself() -> None:
    neighbors, random = Neighbors(5, 2, lambda i: (torch.zeros(0), {})), np.random.default_rng(0)
    drawn = [draw_others(random, neighbors, 3) for _ in range(200)]
    assert all(len(set(three)) == 3 for three in drawn)
    counts = np.bincount(np.ravel(drawn), minlength=5)
    assert len(counts) == 5
    assert counts[2] == 0
    assert np.delete(counts, 2).min() > 120


def test_turning_one_step_on_leaves_the_draws_of_another() -> None:
    images = [Drawn(60, 80, ((5, 5, 40, 50),)), *[Drawn(60 + k, 80, ((20, 20, 60, 50),)) for k in range(4)]]
    alone = transformed(plain(MOSAIC), images, 5)[0]
    with_another = transformed(plain(Combine(mosaic=Mosaic(p=1.0), mixup=MixUp(p=0.0))), images, 5)[0]
    assert torch.equal(alone, with_another)
    both = plain(Combine(mosaic=Mosaic(p=1.0), mixup=MixUp(p=1.0)))
    boxes = transformed(plain(MOSAIC), images, 5)[1]["boxes"]
    assert torch.equal(transformed(both, images, 5)[1]["boxes"][: len(boxes)], boxes)


@pytest.mark.parametrize(
    ("combine", "count", "message"),
    [
        (MOSAIC, 3, "augment.combine: mosaic needs 4 images or more, got 3; set it to null, or add images"),
        (MIXUP, 1, "augment.combine: mixup and copy_paste need 2 images or more, got 1"),
        (Combine(CopyPaste()), 1, "mixup and copy_paste need 2 images"),
    ],
)
def test_too_few_images(combine: Combine, count: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        transformed(plain(combine), [EMPTY] * count, 0)


def test_images_alone_cannot_be_combined() -> None:
    with pytest.raises(ValueError, match="combine needs the other images of the set: give neighbors"):
        plain(MOSAIC)(torch.zeros(3, 9, 9, dtype=torch.uint8), EMPTY.target(0, 1), 0)


def test_images_that_say_different_things_cannot_be_combined() -> None:
    images = [EMPTY, Drawn(64, 80, (), proposals=False)]
    with pytest.raises(ValueError, match=r"must say the same of their objects: only 0\.png have proposals"):
        transformed(plain(MIXUP), images, 0)


def test_the_oracle_sees_a_box_that_is_wrong() -> None:
    image = Drawn(60, 80, ((10, 20, 40, 50),))
    assert extents(seen(plain(Combine()), [image], 0, 0)) == [10, 20, 40, 50]
    assert extents(seen(plain(Combine(), flip=1.0), [image], 0, 0)) == [40, 20, 70, 50]

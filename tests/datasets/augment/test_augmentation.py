import time
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from detpipe.datasets import Augment, Resize
from detpipe.datasets.augment.settings import Combine, Mosaic, SafeCrop, Transform

from ..pixel_oracle import FIRST_LABEL, Drawn, check_against_pixels, drawn_images, left, seen, transformed

ALL = Augment(flip=0.5, scale_jitter=(0.5, 2.0), crop=0.5, min_visibility=0.0, vertical_flip=0.5)
SEEDS = st.integers(0, 2**31)
NOISE = torch.randint(0, 256, (3, 60, 80), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
ONE, EMPTY = Drawn(60, 80, ((10, 10, 50, 50),)), Drawn(60, 80, ())


@settings(max_examples=40, deadline=None)
@given(images=drawn_images(), seed=SEEDS)
def test_boxes_and_proposals_move_as_the_pixels_do(images: list[Drawn], seed: int) -> None:
    check_against_pixels(ALL, images, seed, 1.5)
    image, out = transformed(ALL, images, seed)
    assert image.dtype == torch.uint8
    assert torch.equal(out["boxes"], out["proposals"])


def check_kept(augment: Augment, image: Drawn, seed: int, enlarged: float, tolerance: float) -> None:
    """Boxes are kept of which the promised part is seen."""
    kept = left(transformed(augment, [image], seed)[1])
    for k, (x1, y1, x2, y2) in enumerate(image.boxes):
        visible = int(seen(augment, [image], seed, k).sum()) / (enlarged * (x2 - x1) * (y2 - y1))
        if abs(visible - augment.min_visibility) > tolerance:
            assert (k in kept) == (visible > augment.min_visibility)


@settings(max_examples=40, deadline=None)
@given(images=drawn_images(), seed=SEEDS, least=st.floats(0.1, 1.0))
def test_boxes_with_little_left_are_removed(images: list[Drawn], seed: int, least: float) -> None:
    check_kept(Augment(0.5, crop=1.0, min_visibility=least), images[0], seed, 1, 1e-6)


@settings(max_examples=40, deadline=None)
@given(seed=SEEDS)
def test_what_is_left_is_measured_over_all_steps_together(seed: int) -> None:
    image = Drawn(100, 120, ((10, 10, 60, 70), (40, 30, 110, 80), (70, 5, 118, 98)))
    check_kept(Augment(0.5, (2.0, 2.0), crop=1.0, min_visibility=0.5), image, seed, 4, 0.03)


def test_row_11_labels_flags_and_the_rest_stay_exact() -> None:
    boxes, flags = ((5, 5, 30, 30), (20, 10, 60, 50), (1, 2, 90, 70)), (False, True, False)
    before = Drawn(80, 100, boxes, flags, flags[::-1]).target(7, FIRST_LABEL)
    _, after = Augment(flip=1.0)(torch.zeros(3, 80, 100, dtype=torch.uint8), before, 0)
    assert after["labels"].tolist() == [2**24 + 1, 2**24 + 2, 2**24 + 3]
    assert after["labels"].dtype == torch.int64
    assert after["boxes"].dtype == torch.float32
    torch.testing.assert_close(after["boxes"], torch.tensor([[70.0, 5, 95, 30], [40, 10, 80, 50], [10, 2, 99, 70]]))
    for name in ("iscrowd", "difficult"):
        assert torch.equal(after[name], before[name])
    torch.testing.assert_close(after["area"], before["area"])
    assert (after["image_id"], after["file_name"]) == (7, "7.png")
    assert before["boxes"].tolist() == [list(map(float, box)) for box in boxes]  # not changed in place


def test_zoom_keeps_the_size_of_the_image_and_scales_the_area() -> None:
    image, before = torch.full((3, 60, 80), 255, dtype=torch.uint8), ONE.target(0, 1)
    out, after = Augment(flip=0, scale_jitter=(0.5, 0.5))(image, before, 3)
    assert out.shape == image.shape
    assert out.max() == 255
    assert out[:, 0, 0].tolist() != [255] * 3 or out[:, -1, -1].tolist() != [255] * 3  # a ground is seen
    torch.testing.assert_close(after["area"], before["area"] / 4)


def test_boxes_outside_the_image_do_not_raise() -> None:
    target = Drawn(80, 100, ((0, 0, 9, 9),)).target(0, 1)
    target["boxes"] = torch.tensor([[-3.0, 5, 101, 30]])
    target["proposals"] = torch.tensor([[-9.0, -9, -1, -1], [90, 70, 130, 99], [0, 0, 100, 80]])
    _, after = Augment(flip=1.0)(torch.zeros(3, 80, 100, dtype=torch.uint8), target, 0)
    torch.testing.assert_close(after["boxes"], torch.tensor([[0.0, 5, 100, 30]]))
    torch.testing.assert_close(after["proposals"], torch.tensor([[0.0, 70, 10, 80], [0, 0, 100, 80]]))


@pytest.mark.parametrize("proposals", [None, [], [[1.0, 2, 30, 40]]])
def test_images_without_boxes_pass(proposals: list[list[float]] | None) -> None:
    target = Drawn(60, 80, (), proposals=False).target(0, 1)
    if proposals is not None:
        target["proposals"] = torch.tensor(proposals).reshape(-1, 4)
    for seed in range(5):
        _, after = ALL(NOISE, target, seed)
        assert (after["boxes"].shape, after["labels"].shape) == ((0, 4), (0,))
        assert ("proposals" in after) == (proposals is not None)
        assert proposals != [] or after["proposals"].shape == (0, 4)


def test_equal_seeds_give_equal_results_and_others_differ() -> None:
    augment = Augment(0.5, (0.5, 2.0), 0.5, 0.5)
    (first, boxes), (other, _), (again, same) = (augment(NOISE, ONE.target(0, 1), (1, 2, i)) for i in (0, 1, 0))
    assert torch.equal(first, again)
    assert torch.equal(boxes["boxes"], same["boxes"])
    assert first.shape != other.shape or not torch.equal(first, other)


def test_the_steps_draw_independently() -> None:
    ramp = torch.arange(0, 200, 2, dtype=torch.uint8).expand(3, 100, 100).contiguous()
    draws = []
    for seed in range(300):
        image, _ = Augment(flip=0.5, crop=0.5)(ramp, EMPTY.target(0, 1), seed)
        draws.append([bool(image[0, 0, 0] > image[0, 0, -1]), image.shape != ramp.shape])
    assert abs(np.corrcoef(np.array(draws).T)[0, 1]) < 0.2
    assert 0.35 < np.mean(draws, axis=0).min() < 0.65


def test_color_changes_pixels_only() -> None:
    out, after = Augment(flip=0, color=0.5)(NOISE, ONE.target(0, 1), 0)
    assert not torch.equal(out, NOISE)
    assert after["boxes"].tolist() == [[10, 10, 50, 50]]


def test_reseeding_is_cheap_and_the_pipeline_is_built_once() -> None:
    ALL(NOISE, EMPTY.target(0, 1), 0)
    start = time.process_time()
    for seed in range(50):
        ALL(NOISE, EMPTY.target(0, 1), seed)
    assert (time.process_time() - start) / 50 < 0.01  # building it takes tens of milliseconds


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, 1.0),
        ({"scale_jitter": (0.5, 0.8)}, 1.0),
        ({"scale_jitter": (0.5, 2.0)}, 2.0),
        ({"crop": 0.1}, 1 / 0.6),
        ({"crop": 0.1, "scale_jitter": (1.0, 1.5)}, 2.5),
        # what needs the pixels of the files
        ({"combine": Combine(mosaic=Mosaic(p=1.0))}, np.inf),
        ({"safe_crop": SafeCrop()}, np.inf),
        ({"transforms": (Transform("RandomRotate90"),)}, np.inf),
    ],
)
def test_how_much_a_part_is_enlarged(settings: dict[str, Any], expected: float) -> None:
    magnification = Augment(**settings).magnification
    assert magnification == pytest.approx(expected)
    read = Resize("shortest_side", 100, 200).size_to_read((400, 600), 100, magnification)
    assert read == (400, 600) if expected == np.inf else read[0] == round(100 * expected)

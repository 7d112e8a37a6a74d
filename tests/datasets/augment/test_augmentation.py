import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from detpipe.datasets import Augment
from detpipe.types import Target

ALL = Augment(flip=0.5, scale_jitter=(0.5, 2.0), crop=0.5, min_visibility=0.0, vertical_flip=0.5)


def target_of(boxes: list[list[float]], proposals: list[list[float]] | None = None) -> Target:
    G = len(boxes)
    box = torch.tensor(boxes).reshape(-1, 4)
    target = Target(
        boxes=box,
        labels=torch.arange(G) + 2**24 + 1,
        image_id=7,
        iscrowd=torch.arange(G) % 2 == 1,
        difficult=torch.arange(G) % 3 == 1,
        area=(box[:, 2:] - box[:, :2]).prod(1) / 2,
        file_name="x.jpg",
    )
    if proposals is not None:
        target["proposals"] = torch.tensor(proposals).reshape(-1, 4)
    return target


def paint(height: int, width: int, boxes: list[list[int]]) -> Tensor:
    """Up to three objects, each in a channel of its own on black, so that they may overlap."""
    image = torch.zeros(3, height, width, dtype=torch.uint8)
    for channel, (x1, y1, x2, y2) in enumerate(boxes):
        image[channel, y1:y2, x1:x2] = 255
    return image


def extents(channel: Tensor) -> list[int] | None:
    rows, columns = torch.nonzero(channel > 160, as_tuple=True)  # more than the ground that is padded with
    if len(rows) == 0:
        return None
    return [int(columns.min()), int(rows.min()), int(columns.max()) + 1, int(rows.max()) + 1]


@st.composite
def scenes(draw: st.DrawFn) -> tuple[int, int, list[list[int]]]:
    height, width = draw(st.integers(60, 140)), draw(st.integers(60, 140))
    boxes = []
    for _ in range(draw(st.integers(0, 3))):
        x, y = draw(st.integers(0, width - 14)), draw(st.integers(0, height - 14))
        boxes.append([x, y, draw(st.integers(x + 13, width)), draw(st.integers(y + 13, height))])
    return height, width, boxes


@settings(max_examples=40, deadline=None)
@given(scene=scenes(), seed=st.integers(0, 2**31))
def test_boxes_and_proposals_move_as_the_pixels_do(scene: tuple[int, int, list[list[int]]], seed: int) -> None:
    height, width, boxes = scene
    image, out = ALL(paint(height, width, boxes), target_of(boxes, boxes), seed)
    assert image.dtype == torch.uint8
    assert torch.equal(out["boxes"], out["proposals"])
    left = {int(label) - 2**24 - 1: box.tolist() for label, box in zip(out["labels"], out["boxes"], strict=True)}
    for k in range(len(boxes)):
        seen = extents(image[k])
        if seen is None:
            assert k not in left or min(left[k][2] - left[k][0], left[k][3] - left[k][1]) < 2
        elif k not in left:
            assert min(seen[2] - seen[0], seen[3] - seen[1]) <= 2
        else:
            assert np.abs(np.subtract(left[k], seen)).max() <= 1.5


@settings(max_examples=40, deadline=None)
@given(scene=scenes(), seed=st.integers(0, 2**31), least=st.floats(0.1, 1.0))
def test_boxes_with_little_left_are_removed(scene: tuple[int, int, list[list[int]]], seed: int, least: float) -> None:
    height, width, boxes = scene
    image, out = Augment(0.5, crop=1.0, min_visibility=least)(paint(height, width, boxes), target_of(boxes), seed)
    kept = (out["labels"] - 2**24 - 1).tolist()
    for k, (x1, y1, x2, y2) in enumerate(boxes):
        visible = int((image[k] > 160).sum()) / ((x2 - x1) * (y2 - y1))
        if abs(visible - least) > 1e-6:
            assert (k in kept) == (visible > least)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**31))
def test_what_is_left_is_measured_over_all_steps_together(seed: int) -> None:
    boxes = [[10, 10, 60, 70], [40, 30, 110, 80], [70, 5, 118, 98]]
    augment = Augment(0.5, (2.0, 2.0), crop=1.0, min_visibility=0.5)
    image, out = augment(paint(100, 120, boxes), target_of(boxes), seed)
    kept = (out["labels"] - 2**24 - 1).tolist()
    for k, (x1, y1, x2, y2) in enumerate(boxes):
        visible = int((image[k] > 127).sum()) / (4 * (x2 - x1) * (y2 - y1))
        if abs(visible - 0.5) > 0.03:
            assert (k in kept) == (visible > 0.5)


def test_row_11_labels_flags_and_the_rest_stay_exact() -> None:
    before = target_of([[5, 5, 30, 30], [20, 10, 60, 50], [1, 2, 90, 70]])
    _, after = Augment(flip=1.0)(torch.zeros(3, 80, 100, dtype=torch.uint8), before, 0)
    assert after["labels"].tolist() == [2**24 + 1, 2**24 + 2, 2**24 + 3]
    assert after["labels"].dtype == torch.int64
    assert after["boxes"].dtype == torch.float32
    torch.testing.assert_close(after["boxes"], torch.tensor([[70.0, 5, 95, 30], [40, 10, 80, 50], [10, 2, 99, 70]]))
    for name in ("iscrowd", "difficult"):
        assert torch.equal(after[name], before[name])
    torch.testing.assert_close(after["area"], before["area"])
    assert (after["image_id"], after["file_name"]) == (7, "x.jpg")
    assert before["boxes"][0].tolist() == [5, 5, 30, 30]  # not changed in place


def test_zoom_keeps_the_size_of_the_image_and_scales_the_area() -> None:
    image = torch.full((3, 90, 120), 255, dtype=torch.uint8)
    before = target_of([[40, 30, 80, 60]])
    out, after = Augment(flip=0, scale_jitter=(0.5, 0.5))(image, before, 3)
    assert out.shape == image.shape
    assert extents(out[0]) is not None
    assert out[:, 0, 0].tolist() != [255] * 3 or out[:, -1, -1].tolist() != [255] * 3  # a ground is seen
    torch.testing.assert_close(after["area"], before["area"] / 4)


def test_boxes_outside_the_image_do_not_raise() -> None:
    target = target_of([[-3, 5, 101, 30]], [[-9, -9, -1, -1], [90, 70, 130, 99], [0, 0, 100, 80]])
    _, after = Augment(flip=1.0)(torch.zeros(3, 80, 100, dtype=torch.uint8), target, 0)
    torch.testing.assert_close(after["boxes"], torch.tensor([[0.0, 5, 100, 30]]))
    torch.testing.assert_close(after["proposals"], torch.tensor([[0.0, 70, 10, 80], [0, 0, 100, 80]]))


@pytest.mark.parametrize("proposals", [None, [], [[1.0, 2, 30, 40]]])
def test_images_without_boxes_pass(proposals: list[list[float]] | None) -> None:
    for seed in range(5):
        _, after = ALL(torch.zeros(3, 80, 100, dtype=torch.uint8), target_of([], proposals), seed)
        assert after["boxes"].shape == (0, 4)
        assert after["labels"].shape == (0,)
        assert ("proposals" in after) == (proposals is not None)
        if proposals == []:
            assert after["proposals"].shape == (0, 4)


def test_equal_seeds_give_equal_results_and_others_differ() -> None:
    image = torch.randint(0, 256, (3, 60, 80), dtype=torch.uint8)
    augment = Augment(0.5, (0.5, 2.0), 0.5, 0.5)
    results = [augment(image, target_of([[10, 10, 50, 50]]), (1, 2, i)) for i in (0, 1, 0)]
    assert torch.equal(results[0][0], results[2][0])
    assert torch.equal(results[0][1]["boxes"], results[2][1]["boxes"])
    assert results[0][0].shape != results[1][0].shape or not torch.equal(results[0][0], results[1][0])


def test_the_steps_draw_independently() -> None:
    ramp = torch.arange(0, 200, 2, dtype=torch.uint8).expand(3, 100, 100).contiguous()
    draws = []
    for seed in range(300):
        image, _ = Augment(flip=0.5, crop=0.5)(ramp, target_of([]), seed)
        draws.append([bool(image[0, 0, 0] > image[0, 0, -1]), image.shape != ramp.shape])
    assert abs(np.corrcoef(np.array(draws).T)[0, 1]) < 0.2
    assert 0.35 < np.mean(draws, axis=0).min() < 0.65


def test_color_changes_pixels_only() -> None:
    image = torch.randint(0, 256, (3, 60, 80), dtype=torch.uint8)
    out, after = Augment(flip=0, color=0.5)(image, target_of([[10, 10, 50, 50]]), 0)
    assert not torch.equal(out, image)
    torch.testing.assert_close(after["boxes"], torch.tensor([[10.0, 10, 50, 50]]))


def test_reseeding_is_cheap_and_the_pipeline_is_built_once() -> None:
    image = torch.zeros(3, 32, 32, dtype=torch.uint8)
    ALL(image, target_of([]), 0)
    start = time.process_time()
    for seed in range(50):
        ALL(image, target_of([]), seed)
    assert (time.process_time() - start) / 50 < 0.01  # building it takes tens of milliseconds


@pytest.mark.parametrize(
    ("augment", "expected"),
    [
        (Augment(), 1.0),
        (Augment(scale_jitter=(0.5, 0.8)), 1.0),
        (Augment(scale_jitter=(0.5, 2.0)), 2.0),
        (Augment(crop=0.1), 1 / 0.6),
        (Augment(crop=0.1, scale_jitter=(1.0, 1.5)), 2.5),
    ],
)
def test_how_much_a_part_is_enlarged(augment: Augment, expected: float) -> None:
    assert augment.magnification == pytest.approx(expected)


def test_what_needs_the_pixels_of_the_files_is_not_read_smaller() -> None:
    from detpipe.datasets import Resize
    from detpipe.datasets.augment.settings import Combine, Mosaic, SafeCrop, Transform

    resize = Resize("shortest_side", 100, 200)
    assert resize.size_to_read((400, 600), 100, Augment().magnification) == (100, 150)
    for augment in (
        Augment(combine=Combine(mosaic=Mosaic(p=1.0))),
        Augment(safe_crop=SafeCrop()),
        Augment(transforms=(Transform("RandomRotate90"),)),
    ):
        assert resize.size_to_read((400, 600), 100, augment.magnification) == (400, 600)

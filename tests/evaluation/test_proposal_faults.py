"""Each usual mistake of coordinates is planted and must be named; right boxes, good or weak, must be called right."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from detpipe.datasets.formats.recognize import open_split
from detpipe.evaluation.proposal_faults import likely_faults, recall_note
from detpipe.proposals import DenseGrid
from detpipe.types import Annotations
from evaluation.test_proposal_recall import Boxes, annotations_of

Change = Callable[[np.ndarray, tuple[int, int]], np.ndarray]  # boxes [P, 4] and (width, height) -> boxes


def scenes(count: int = 40) -> tuple[Annotations, Boxes, dict[int, tuple[int, int]]]:
    """Images of several sizes; whole-number boxes near the objects, and some that touch every border, as segments do."""
    rng = np.random.default_rng(5)
    images, near, sizes = [], [], []
    for _ in range(count):
        width, height = int(rng.integers(300, 640)), int(rng.integers(240, 480))
        start = rng.integers(0, (width - 90, height - 90), (4, 2))
        objects = np.concatenate((start, start + rng.integers(30, 90, (4, 2))), axis=1)
        boxes = np.repeat(objects, 6, axis=0) + rng.integers(-5, 6, (24, 4))
        borders = np.array([[0, 0, width, height], [0, 10, 60, height], [width - 50, 0, width, 70]])
        boxes = np.clip(np.concatenate((boxes, borders)), 0, [width, height, width, height])
        images.append({"boxes": objects})
        near.append(boxes.astype(np.float32))
        sizes.append((width, height))
    annotations = annotations_of(images)
    annotations.sizes[:] = [(height, width) for width, height in sizes]
    ids = annotations.image_ids.tolist()
    return annotations, dict(zip(ids, near, strict=True)), dict(zip(ids, sizes, strict=True))


def box_form(boxes: np.ndarray) -> np.ndarray:
    return np.concatenate((boxes[:, :2], boxes[:, 2:] - boxes[:, :2]), axis=1)


MISTAKES: list[tuple[str, Change]] = [
    ("x and y are swapped", lambda b, s: b[:, [1, 0, 3, 2]]),
    ("x, y, width, height were taken for x1, y1, x2, y2", lambda b, s: box_form(b)),
    ("x1, y1, x2, y2 were taken for x, y, width, height", lambda b, s: np.c_[b[:, :2], b[:, :2] + b[:, 2:]]),
    (
        "center x, center y, width, height were taken for x1, y1, x2, y2",
        lambda b, s: np.c_[(b[:, :2] + b[:, 2:]) / 2, b[:, 2:] - b[:, :2]],
    ),
    ("the boxes are mirrored left to right", lambda b, s: np.c_[s[0] - b[:, 2], b[:, 1], s[0] - b[:, 0], b[:, 3]]),
    ("the boxes are normalized to 0..1", lambda b, s: b / np.array([*s, *s])),
    ("the boxes are of images resized to a shorter side of 600 pixels", lambda b, s: b * 600 / min(s)),
    ("the boxes are of images resized to 224 x 224 pixels", lambda b, s: b * 224 / np.array([*s, *s])),
    ("the boxes are of images 0.50 times as large", lambda b, s: b / 2),
]


@pytest.mark.parametrize(("name", "change"), MISTAKES, ids=[name for name, _ in MISTAKES])
def test_a_mistake_is_named_with_the_recall_that_it_costs(name, change):
    annotations, proposals, sizes = scenes()
    wrong = {image: change(boxes.astype(float), sizes[image]) for image, boxes in proposals.items()}
    first, *others = likely_faults(annotations, wrong)
    assert first.startswith(f"{name}: recall at IoU .5 is ")
    assert first.endswith(", and would be 1.000 without it")
    assert not others


def test_another_frame_is_named_though_no_box_reaches_the_border():
    annotations, proposals, sizes = scenes()
    wrong = {image: boxes[:24] * (800 / min(sizes[image])) for image, boxes in proposals.items()}
    [fault] = likely_faults(annotations, wrong)
    assert fault.startswith("the boxes are of images resized to a shorter side of 800 pixels")


def test_boxes_of_other_images_are_suspected():
    annotations, proposals, _ = scenes()
    ids = list(proposals)
    wrong = dict(zip(ids, [proposals[image] for image in ids[7:] + ids[:7]], strict=True))
    [fault] = likely_faults(annotations, wrong)
    assert "the boxes of the next image would find as many objects" in fault


def test_pixels_counted_from_one_are_told_by_the_borders():
    annotations, proposals, _ = scenes()
    [fault] = likely_faults(annotations, {image: np.c_[b[:, :2] + 1, b[:, 2:]] for image, b in proposals.items()})
    assert fault.startswith("pixels are counted from 1")
    [fault] = likely_faults(annotations, {image: np.c_[b[:, :2], b[:, 2:] - 1] for image, b in proposals.items()})
    assert fault.startswith("the last pixel of a box is left out")


def grid(scale: float) -> Change:
    source = DenseGrid(scales=[scale], ratios=[1.0])
    return lambda b, s: source.boxes((s[1], s[0])).numpy()


def random_boxes(b: np.ndarray, s: tuple[int, int]) -> np.ndarray:
    rng = np.random.default_rng(s)
    center, side = rng.random((300, 2)) * s, 20 + rng.random((300, 2)) * 150
    return np.clip(np.c_[center - side / 2, center + side / 2], 0, [*s, *s])


@pytest.mark.parametrize(
    "change",
    [
        lambda b, s: b,
        lambda b, s: b[::9],
        lambda b, s: b + np.array([9.5, 9.5, 9.5, 9.5]),
        lambda b, s: b[:0],
        grid(16),
        grid(64),
        grid(300),
    ],
    ids=["right", "few", "shifted", "none", "small", "medium", "large"],
)
def test_right_boxes_are_called_right(change):
    annotations, proposals, sizes = scenes()
    assert likely_faults(annotations, {i: change(b.astype(float), sizes[i]) for i, b in proposals.items()}) == []


def test_random_boxes_are_at_most_called_independent_of_the_image():
    annotations, proposals, sizes = scenes()
    for fault in likely_faults(annotations, {i: random_boxes(b, sizes[i]) for i, b in proposals.items()}):
        assert "boxes that do not depend on the image" in fault


def test_the_note_before_training():
    annotations, proposals, _ = scenes()
    assert recall_note(annotations, proposals, "train") == (
        "proposals of train: 27 an image, recall at IoU .5 is 1.000",
        [],
    )
    line, warnings = recall_note(
        annotations, {image: boxes[::9] for image, boxes in proposals.items()}, "val", images=20
    )
    assert line.startswith("proposals of val: 3 an image, recall at IoU .5 is 0.")
    assert line.endswith("(in 20 of 40 images)")
    assert warnings[0].startswith("warning: the proposals of val miss ")
    assert "more boxes" in warnings[1]
    swapped = {image: boxes[:, [1, 0, 3, 2]] for image, boxes in proposals.items()}
    assert "x and y are swapped" in recall_note(annotations, swapped, "train")[1][1]
    assert "no objects" in recall_note(annotations_of([{"boxes": []}]), {1: np.zeros((0, 4))}, "val")[0]


@pytest.mark.slow
def test_real_boxes_of_real_images(shared_data):
    data = open_split(
        str(shared_data / "coco_mini" / "annotations" / "instances_val2017.json"),
        None,
        str(shared_data / "coco_mini" / "val2017"),
    )
    annotations = data.annotations("val")
    source = DenseGrid()
    sizes = {int(i): (int(s[0]), int(s[1])) for i, s in zip(annotations.image_ids, annotations.sizes, strict=True)}
    proposals = {i: source.propose(np.zeros((*size, 3), np.uint8))[0] for i, size in sizes.items()}
    assert likely_faults(annotations, proposals) == []
    resized = {i: b * (800 / min(sizes[i])) for i, b in proposals.items()}
    assert "resized to a shorter side of 800 pixels" in likely_faults(annotations, resized)[0]

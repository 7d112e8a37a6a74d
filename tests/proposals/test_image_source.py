import json
from types import SimpleNamespace
from typing import ClassVar

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from detpipe.images import normalize, to_pixels
from detpipe.proposals import FromDetector, PrecomputedProposals
from detpipe.proposals.image_source import Candidates, ImageProposals, select
from detpipe.stages import ImageList
from detpipe.support.errors import DataError
from detpipe.types import PixelFormat

FORMATS = {
    "rgb": PixelFormat(),
    "bgr": PixelFormat((103.939, 116.779, 123.68), (1.0, 1.0, 1.0), "bgr", 255.0),
    "bgr, scaled": PixelFormat((0.4, 0.5, 0.45), (0.2, 0.25, 0.3), "bgr", 1.0),
}


class Bright(ImageProposals):
    """Boxes at places that the pixels decide, some of them outside, twice, or empty."""

    name: ClassVar[str] = "bright"
    smallest_image: ClassVar[int] = 5

    def __init__(self, depth=(1, (2, 3)), max_boxes=None, min_size=0.0, pixel_format=FORMATS["rgb"]):
        super().__init__(max_boxes, min_size, pixel_format)
        self.depth = depth
        self.seen = []

    def find(self, image):
        assert image.flags.c_contiguous
        self.seen.append(image.copy())
        rows, columns = np.nonzero(image[:, :, 0] > 200)
        reach = 1 + image[rows, columns, 1:].astype(np.float32) / 20
        center = np.stack((columns, rows), axis=1).astype(np.float32)
        return Candidates(np.concatenate((center - reach, center + reach), axis=1), image[rows, columns, 2] / 7)


def slow_select(found, size, min_size, max_boxes):
    """Keep boxes one by one, the best one first."""
    height, width = size
    rows = []
    for place in sorted(range(len(found.boxes)), key=lambda place: (-np.float32(found.scores[place]), place)):
        x1, y1, x2, y2 = (float(value) for value in np.float32(found.boxes[place]))
        box = [min(max(x1, 0), width), min(max(y1, 0), height), min(max(x2, 0), width), min(max(y2, 0), height)]
        wide, high = np.float32(box[2]) - np.float32(box[0]), np.float32(box[3]) - np.float32(box[1])
        if wide <= 0 or high <= 0 or wide < min_size or high < min_size or box in [row[0] for row in rows]:
            continue
        rows.append((box, float(np.float32(found.scores[place]))))
    rows = rows[:max_boxes]
    return [row[0] for row in rows], [row[1] for row in rows]


coordinates = st.one_of(st.integers(-3, 14), st.floats(-3, 14, width=32))
records = st.lists(st.tuples(*[coordinates] * 4, st.sampled_from([0.0, 0.25, 0.5, -1.0, -7.5, 3.0])), max_size=25)


@given(
    records,
    st.integers(1, 12),
    st.integers(1, 12),
    st.sampled_from([0, 1, 2.5]),
    st.one_of(st.none(), st.integers(1, 8)),
)
@settings(max_examples=150, deadline=None)
def test_select_equals_a_slow_loop_and_keeps_its_promises(rows, height, width, min_size, max_boxes):
    table = np.array(rows, np.float64).reshape(-1, 5)
    found = Candidates(table[:, :4].astype(np.float32), table[:, 4].astype(np.float32))
    boxes, scores = select(found, (height, width), min_size, max_boxes)
    assert boxes.dtype == scores.dtype == np.float32
    assert (boxes.tolist(), scores.tolist()) == slow_select(found, (height, width), min_size, max_boxes)
    assert (boxes >= 0).all()
    assert (boxes[:, 2:] <= [width, height]).all()
    assert (boxes[:, 2:] - boxes[:, :2] >= min_size).all()
    assert (boxes[:, 2:] > boxes[:, :2]).all()
    assert (np.diff(scores) <= 0).all()
    assert len(np.unique(boxes, axis=0)) == len(boxes) <= (max_boxes or 25)
    again = select(Candidates(boxes, scores), (height, width), min_size, max_boxes)
    assert np.array_equal(again[0], boxes)


def test_select_by_hand():
    found = Candidates(
        np.float32([[0, 0, 4, 4], [-2, -2, 20, 20], [1, 1, 1, 5], [0, 0, 9, 9], [2, 2, 4, 3], [8, 0, 12, 4]]),
        np.float32([0.5, 0.5, 9, 0.75, 0.5, 2]),
    )
    boxes, scores = select(found, (9, 8))  # the second one and the fourth are one box when they are clipped
    assert boxes.tolist() == [[0, 0, 8, 9], [0, 0, 4, 4], [2, 2, 4, 3]]
    assert scores.tolist() == [0.75, 0.5, 0.5]
    assert select(found, (9, 8), min_size=2)[0].tolist() == [[0, 0, 8, 9], [0, 0, 4, 4]]
    assert select(found, (9, 8), max_boxes=1)[0].tolist() == [[0, 0, 8, 9]]
    boxes, scores = select(Candidates(np.zeros((0, 4), np.float32), np.zeros(0, np.float32)), (9, 8))
    assert (boxes.shape, scores.shape) == ((0, 4), (0,))


@pytest.mark.parametrize("pixel_format", FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_all_values_survive_normalizing(pixel_format, dtype):
    values = torch.arange(256, dtype=torch.uint8)
    image = torch.stack((values, values.flip(0), values.roll(99)))[:, None]
    passed = image if dtype == torch.uint8 else image.float() / 255
    back = to_pixels(normalize(passed, pixel_format), pixel_format)
    assert back.dtype == torch.uint8
    assert torch.equal(back, image)
    beyond = to_pixels(normalize(torch.full((3, 1, 1), 1.2), pixel_format), pixel_format)
    assert beyond.flatten().tolist() == [255] * 3


@pytest.mark.parametrize(
    ("image", "what"),
    [
        (np.zeros((9, 9), np.uint8), r"uint8 \[9, 9\]"),
        (np.zeros((3, 9, 9), np.uint8), r"uint8 \[3, 9, 9\]"),
        (np.zeros((9, 9, 4), np.uint8), r"uint8 \[9, 9, 4\]"),
        (np.zeros((9, 9, 3), np.float32), r"float32 \[9, 9, 3\]"),
    ],
)
def test_what_is_no_image_is_refused(image, what):
    with pytest.raises(ValueError, match=rf"^an image must be uint8 \[H, W, 3\], got {what}$"):
        Bright().propose(image)


@pytest.mark.parametrize("size", [(4, 20), (20, 4), (0, 0)])
def test_an_image_that_is_too_small_is_named_in_one_line(size):
    with pytest.raises(DataError) as caught:
        Bright().propose(np.zeros((*size, 3), np.uint8))
    assert str(caught.value) == (
        f"an image of {size[1]} x {size[0]} pixels is too small for bright, which needs at least 5 pixels a side; leave it "
        "out, or enlarge it"
    )


@pytest.mark.parametrize(
    ("target", "name"),
    [
        ({"file_name": "cat.jpg", "image_id": 7}, "cat.jpg"),
        ({"image_id": 7}, "7"),
        ({}, "1 of the batch"),
        (None, "1 of the"),
    ],
)
def test_an_image_of_a_batch_that_is_too_small_is_called_by_its_name(target, name):
    images = ImageList(torch.zeros(2, 3, 20, 30), [(20, 30), (20, 3)])
    with pytest.raises(DataError, match=rf"^image {name}.*: an image of 3 x 20 pixels is too small for bright"):
        Bright()(images, {}, None if target is None else [{}, target])


@pytest.mark.parametrize("pixel_format", FORMATS.values(), ids=FORMATS)
def test_a_batch_gets_what_each_image_gets_alone(pixel_format):
    sizes = [(20, 30), (31, 17)]
    pixels = [torch.randint(0, 256, (3, *size), dtype=torch.uint8) for size in sizes]
    tensors = torch.full((2, 3, 32, 32), 9.0)  # padding that would be found
    for row, image in zip(tensors, pixels, strict=True):
        row[:, : image.shape[1], : image.shape[2]] = normalize(image, pixel_format)
    source = Bright(max_boxes=40, min_size=4, pixel_format=pixel_format)
    boxes, losses = source(ImageList(tensors, sizes), {})
    assert losses == {}
    for found, seen, image, (height, width) in zip(boxes, source.seen, pixels, sizes, strict=True):
        image = image.permute(1, 2, 0).numpy()
        assert np.array_equal(seen, image)
        alone, scores = Bright(max_boxes=40, min_size=4).propose(image)
        assert np.array_equal(found.numpy(), alone)
        assert 10 < len(alone) <= 40
        assert (np.diff(scores) <= 0).all()
        assert (alone >= 0).all()
        assert (alone[:, 2:] <= [width, height]).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_boxes_take_the_type_of_the_batch_but_are_not_rounded_to_half_precision(dtype):
    images = ImageList(torch.rand(1, 3, 20, 1040, dtype=dtype, requires_grad=True), [(20, 1040)])
    boxes = torch.tensor([[501.3, 2.0, 1033.7, 18.0]])
    detector = SimpleNamespace(detect=lambda image: (boxes, [0.5]))
    for source in (PrecomputedProposals(), FromDetector(detector)):
        [found], _ = source(images, {}, [{"proposals": boxes}])
        assert found.tolist() == boxes.tolist()
        assert found.dtype == torch.promote_types(dtype, torch.float32)
        assert not found.requires_grad


def test_a_compiled_source_looks_at_pixels_as_it_does_elsewhere():
    class Binned(Bright):
        def find(self, image):
            return super().find((image.astype(np.uint16) * 25 >> 8).astype(np.uint8))  # no type of a compiled graph

    source, images = Binned(), ImageList(torch.rand(1, 3, 20, 30), [(20, 30)])
    expected, _ = source(images, {})
    found, _ = torch.compile(source, backend="eager")(images, {})
    assert torch.equal(found[0], expected[0])


def test_settings_are_all_arguments_but_the_pixel_format():
    source = Bright(max_boxes=3, min_size=2, pixel_format=FORMATS["bgr"])
    assert source.settings == {"depth": [1, [2, 3]], "max_boxes": 3, "min_size": 2}
    assert json.loads(json.dumps(source.settings)) == source.settings


def test_the_image_is_left_alone_and_need_not_be_contiguous():
    image = np.random.default_rng(0).integers(0, 256, (30, 40, 3)).astype(np.uint8)
    before = image.copy()
    flipped, _ = Bright().propose(image[:, ::-1])
    again, _ = Bright().propose(np.ascontiguousarray(image[:, ::-1]))
    assert np.array_equal(flipped, again)
    assert np.array_equal(image, before)


@pytest.mark.parametrize("count", [0, -1])
def test_bad_arguments(count):
    with pytest.raises(ValueError, match=f"max_boxes must be at least 1, got {count}"):
        Bright(max_boxes=count)
    for size in (-1, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=f"min_size must not be negative or infinite, got {size}"):
            Bright(min_size=size)

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from samples import random_boxes

from detpipe.boxes import valid
from detpipe.images import (
    contents_of,
    detections_to_files,
    detections_to_images,
    normalize,
    picture_sizes,
    resized_size,
    scale_boxes,
    targets_to_batch,
    to_batch,
    to_canvas,
)
from detpipe.types import PixelFormat

CAFFE = PixelFormat(mean=(103.939, 116.779, 123.68), std=(1, 1, 1), channel_order="bgr", value_range=255.0)
PLAIN = PixelFormat(mean=(0, 0, 0), std=(1, 1, 1))
SIDE = st.integers(1, 2000)


@pytest.mark.parametrize(
    ("size", "expected"),
    [((480, 640), (600, 800)), ((640, 480), (800, 600)), ((300, 900), (333, 1000)), ((600, 600), (600, 600))],
)
def test_resized_size_by_hand(size, expected):
    assert resized_size(size, 600, 1000) == expected


@settings(deadline=None)
@given(SIDE, SIDE, st.integers(1, 800), st.integers(0, 800))
def test_resized_size_keeps_its_bounds(height, width, min_size, more):
    new = resized_size((height, width), min_size, min_size + more)
    assert 1 <= min(new) <= min_size
    assert max(new) <= min_size + more
    assert min(new) == min_size or max(new) == min_size + more  # one of the two is reached


def test_normalize_by_hand():
    image = torch.tensor([255, 128, 0], dtype=torch.uint8)[:, None, None]  # red, green, blue
    rgb = normalize(image, PixelFormat(mean=(0.5, 0.25, 0.125), std=(0.5, 0.25, 2.0)))
    assert rgb.flatten().tolist() == pytest.approx([(1 - 0.5) / 0.5, (128 / 255 - 0.25) / 0.25, -0.125 / 2])
    bgr = normalize(image, CAFFE)
    assert bgr.flatten().tolist() == pytest.approx([0 - 103.939, 128 - 116.779, 255 - 123.68], rel=1e-5)


@pytest.mark.parametrize("pixel_format", [PixelFormat(), CAFFE])
def test_bytes_and_floats_give_the_same_batch(pixel_format):
    image = torch.randint(0, 256, (3, 20, 30), dtype=torch.uint8)
    as_bytes = to_batch([image], pixel_format, 24, 40, 8).tensors
    as_floats = to_batch([image / 255], pixel_format, 24, 40, 8).tensors
    torch.testing.assert_close(as_bytes, as_floats, rtol=1e-5, atol=1e-4)


def test_normalize_leaves_its_input_as_it_is():
    for image in (torch.full((3, 2, 2), 7, dtype=torch.uint8), torch.full((3, 2, 2), 0.5)):
        before = image.clone()
        normalize(image, CAFFE)
        assert torch.equal(image, before)


def test_batch_is_padded_at_the_right_and_the_bottom_with_zeros():
    images = [torch.rand(3, 20, 30), torch.rand(3, 24, 20)]
    batch = to_batch(images, PLAIN, 20, 40, 16)
    assert batch.image_sizes == [(20, 30), (24, 20)]  # neither needs resizing
    assert batch.tensors.shape == (2, 3, 32, 32)
    for row, image in zip(batch.tensors, images, strict=True):
        height, width = image.shape[1:]
        assert torch.equal(row[:, :height, :width], image)
        assert not row[:, height:].any()
        assert not row[:, :, width:].any()


@pytest.mark.parametrize(("min_size", "antialias"), [(10, True), (40, False)])
def test_images_are_resized_bilinearly(min_size, antialias):
    image = torch.rand(3, 20, 30)
    batch = to_batch([image], PLAIN, min_size, 100, 1)
    size = (min_size, min_size * 3 // 2)
    assert batch.image_sizes == [size]
    expected = F.interpolate(image[None], size, mode="bilinear", align_corners=False, antialias=antialias)
    torch.testing.assert_close(batch.tensors, expected)


def test_an_image_in_a_batch_is_what_it_is_alone():
    images = [torch.rand(3, 20, 30), torch.rand(3, 50, 20)]
    batch = to_batch(images, PixelFormat(), 24, 40, 8)
    for row, image, (height, width) in zip(batch.tensors, images, batch.image_sizes, strict=True):
        alone = to_batch([image], PixelFormat(), 24, 40, 8).tensors[0]
        assert torch.equal(row[:, :height, :width], alone[:, :height, :width])


def test_a_colored_rectangle_stays_inside_its_box():
    image = torch.zeros(3, 40, 60)
    image[:, 10:20, 30:50] = 1
    batch = to_batch([image], PLAIN, 80, 200, 1)
    x1, y1, x2, y2 = scale_boxes(torch.tensor([30.0, 10.0, 50.0, 20.0]), (40, 60), batch.image_sizes[0]).int().tolist()
    assert batch.tensors[0, :, y1 + 1 : y2 - 1, x1 + 1 : x2 - 1].min() == 1
    outside = batch.tensors[0].clone()
    outside[:, y1 - 1 : y2 + 1, x1 - 1 : x2 + 1] = 0
    assert outside.max() == 0


@settings(deadline=None)
@given(SIDE, SIDE, SIDE, SIDE)
def test_boxes_go_there_and_come_back(height, width, new_height, new_width):
    old, new = (height, width), (new_height, new_width)
    boxes = torch.tensor([[0.0, 0.0, width, height], [0.25 * width, 0.5 * height, width, 0.75 * height]])
    target = {"boxes": boxes, "proposals": boxes[:1], "area": boxes[:, 2] * boxes[:, 3], "labels": torch.tensor([1, 2])}
    [moved] = targets_to_batch([target], [old], [new])
    torch.testing.assert_close(moved["boxes"][0], torch.tensor([0.0, 0.0, new_width, new_height]))
    torch.testing.assert_close(moved["proposals"], moved["boxes"][:1])
    torch.testing.assert_close(moved["area"], moved["boxes"][:, 2] * moved["boxes"][:, 3])
    assert moved["labels"] is target["labels"]
    found = {"boxes": moved["boxes"], "scores": torch.ones(2), "labels": torch.tensor([1, 2])}
    [back] = detections_to_images([found], [new], [old])
    torch.testing.assert_close(back["boxes"], boxes)
    assert (back["boxes"] <= torch.tensor([width, height, width, height])).all()  # to the last bit


def test_targets_are_not_changed_in_place():
    boxes = random_boxes(3)
    target = {"boxes": boxes.clone(), "image_id": 7}
    [moved] = targets_to_batch([target], [(60, 80)], [(30, 40)])
    assert torch.equal(target["boxes"], boxes)
    assert moved["image_id"] == 7
    assert valid(moved["boxes"]).all()


@pytest.mark.parametrize(
    ("images", "message"),
    [
        ([], "at least one image"),
        ([torch.zeros(3, 4, 4), torch.zeros(1, 4, 4)], r"images\[1\] must be \[3, H, W\].*\[1, 4, 4\]"),
        ([torch.zeros(4, 4)], r"images\[0\] must be"),
        ([torch.zeros(3, 0, 4)], "H, W > 0"),
    ],
)
def test_bad_images_are_named(images, message):
    with pytest.raises(ValueError, match=message):
        to_batch(images, PLAIN, 4, 4, 1)


def test_integer_images_other_than_bytes_are_refused():
    with pytest.raises(TypeError, match=r"uint8.*int64"):
        to_batch([torch.zeros(3, 4, 4, dtype=torch.int64)], PLAIN, 4, 4, 1)


@pytest.mark.parametrize("pixel_format", [PixelFormat(), CAFFE])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_the_order_in_memory_does_not_change_a_value(pixel_format, dtype):
    images = [torch.randint(0, 256, (3, *size), dtype=torch.uint8).to(dtype) for size in ((20, 30), (24, 20), (50, 41))]
    last = [image.permute(1, 2, 0).contiguous().permute(2, 0, 1) for image in images]
    for image, other in zip(images, last, strict=True):
        assert torch.equal(normalize(image, pixel_format), normalize(other, pixel_format))
    contents = [(20, 30), (22, 11), (50, 41)]
    one, two = (to_batch(given, pixel_format, 20, 40, 16, contents) for given in (images, last))
    assert torch.equal(one.tensors, two.tensors)
    assert one.tensors.is_contiguous()
    assert two.tensors.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(
        to_batch(images, pixel_format, 20, 40, 16).tensors, to_batch(last, pixel_format, 20, 40, 16).tensors
    )


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
@pytest.mark.parametrize(("size", "new"), [((3, 900), (1, 300)), ((900, 3), (300, 1)), ((7, 7), (1, 1))])
def test_images_become_one_row_or_column(size, new, dtype):
    """PyTorch mixes up the rows of a single column."""
    image = (torch.arange(size[0] * size[1]).reshape(1, *size).expand(3, -1, -1) * 255 // (size[0] * size[1])).byte()
    pixels = PixelFormat(mean=(0, 0, 0), std=(1, 1, 1), value_range=255)
    found = to_batch([image], pixels, 1, 1000, 1, rule="detectron2" if dtype == torch.uint8 else "detpipe")
    wanted = F.adaptive_avg_pool2d(image.float(), new)
    assert found.image_sizes == [new]
    assert (found.tensors[0] - wanted).abs().max() <= 1


def test_pictures_that_have_their_size_are_not_resized():
    images = [torch.rand(3, 20, 30), torch.rand(3, 50, 20)]
    contents = contents_of([{"content_size": (12, 30)}, {}])
    batch = to_batch(images, PLAIN, 25, 40, 8, contents)
    assert batch.image_sizes == [(12, 30), (40, 16)]
    assert batch.tensors.shape == (2, 3, 40, 32)
    assert torch.equal(batch.tensors[0, :, :12, :30], images[0][:, :12])
    assert not batch.tensors[0, :, 12:].any()  # what the data put there is not looked at
    assert picture_sizes(images, contents) == [(12, 30), (50, 20)]
    assert picture_sizes(images) == [(20, 30), (50, 20)]
    assert contents_of([{}, {}]) is contents_of(None) is None


@pytest.mark.parametrize("content", [(21, 30), (20, 31), (0, 5)])
def test_a_picture_larger_than_its_image_is_refused(content):
    with pytest.raises(ValueError, match=r"content_size of images\[0\] must lie within its \(20, 30\), got"):
        to_batch([torch.rand(3, 20, 30)], PLAIN, 20, 40, 8, [content])


def test_detections_of_resized_images_go_to_the_file_and_back():
    found = {"boxes": random_boxes(5) / 4, "scores": torch.ones(5), "labels": torch.ones(5, dtype=torch.int64)}
    targets = [{"content_size": (30, 40), "file_size": (90, 80)}, {"content_size": (30, 40)}, {"file_size": (9, 9)}, {}]
    moved = detections_to_files([found] * 4, targets)
    [wanted] = detections_to_images([found], [(30, 40)], [(90, 80)])
    assert torch.equal(moved[0]["boxes"], wanted["boxes"])
    assert all(one is found for one in moved[1:])  # there is no way back from a part, and none is needed
    clipped = detections_to_images([found], [(30, 40)], [(30, 40)])[0]["boxes"]
    torch.testing.assert_close(detections_to_files(moved[:1], targets[:1], back=True)[0]["boxes"], clipped)


@pytest.mark.parametrize(
    ("rule", "size", "expected"),
    [
        ("torchvision", (375, 500), (800, 1066)),  # 1066.67 is rounded down
        ("detpipe", (375, 500), (800, 1067)),
        ("detectron2", (375, 500), (800, 1067)),
        ("torchvision", (427, 640), (800, 1199)),
        ("torchvision", (100, 1000), (133, 1333)),
        ("detectron2", (100, 1000), (133, 1333)),
        ("torchvision", (1, 4000), (1, 1333)),
    ],
)
def test_rules_of_other_libraries(rule, size, expected):
    assert resized_size(size, 800, 1333, rule) == expected


def test_torchvisions_rule_does_not_smooth():
    image = torch.zeros(3, 64, 64)
    image[:, :, ::2] = 1.0  # lines that smoothing turns gray
    sharp, smooth = (to_batch([image], PLAIN, 31, 31, 1, rule=rule).tensors for rule in ("torchvision", "detpipe"))
    assert sharp.std() > 2 * smooth.std()
    wanted = F.interpolate(image[None], (31, 31), mode="bilinear", align_corners=False)
    assert torch.equal(sharp, wanted)


@pytest.mark.parametrize("rule", ["detpipe", "torchvision", "detectron2"])
@pytest.mark.parametrize("size", [(20, 30), (90, 61), (40, 64), (150, 33), (1, 90)])
def test_the_canvas_of_exported_graphs_is_the_batch(rule, size):
    images = torch.randint(0, 256, (2, 3, *size), dtype=torch.uint8)
    expected = to_batch([*images], CAFFE, 40, 64, 16, rule=rule)
    canvas, content = to_canvas(images, CAFFE, 40, 64, 16, rule=rule)
    assert [content] * 2 == expected.image_sizes
    torch.testing.assert_close(canvas, expected.tensors, rtol=0, atol=0 if rule == "detectron2" else 1e-4)


def test_boxes_in_half_precision_become_float32_before_they_are_scaled():
    target = {"boxes": torch.tensor([[3.0, 4.0, 600.0, 500.0]]).half(), "proposals": torch.zeros(0, 4).bfloat16()}
    [moved] = targets_to_batch([target], [(600, 700)], [(601, 703)])
    expected = target["boxes"].float() * torch.tensor([703 / 700, 601 / 600] * 2)
    torch.testing.assert_close(moved["boxes"], expected)
    assert moved["proposals"].dtype == torch.float32

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from detpipe.datasets import COCO, Augment, DetectionDataset, Loader, Resize, read_image
from detpipe.datasets.decode import read_reduced
from detpipe.datasets.resize import PADDING, resample
from detpipe.images import contents_of, detections_to_files, to_batch
from detpipe.types import Detection, PixelFormat

from .builders import annotations, coco_content, write_coco
from .pixel_oracle import Drawn, drawn_images, extents

SIDE = st.integers(1, 3000)
FILE = (180, 240)  # height, width
SHORTEST = Resize("shortest_side", 60, 100)
LETTERBOX = Resize("letterbox", 96)


@pytest.mark.parametrize(
    ("policy", "size", "expected"),
    [
        (Resize("shortest_side", 600, 1000), (480, 640), (600, 800)),
        (Resize("shortest_side", 600, 1000), (300, 900), (333, 1000)),
        (Resize("letterbox", 640), (480, 640), (480, 640)),
        (Resize("letterbox", 640), (1280, 960), (640, 480)),
        (Resize("letterbox", 640), (100, 200), (320, 640)),
    ],
)
def test_sizes_by_hand(policy: Resize, size: tuple[int, int], expected: tuple[int, int]) -> None:
    assert policy.content_size(size, policy.evaluation_size) == expected


@settings(deadline=None)
@given(SIDE, SIDE, st.integers(1, 900), st.integers(0, 900))
def test_what_was_resized_keeps_its_size(height: int, width: int, min_size: int, more: int) -> None:
    for policy in (Resize("shortest_side", min_size, min_size + more), Resize("letterbox", min_size)):
        once = policy.content_size((height, width), min_size)
        assert policy.content_size(once, min_size) == once
        assert max(once) <= (policy.max_size or min_size)


@settings(max_examples=60, deadline=None)
@given(drawn_images(), st.integers(20, 300), st.booleans())
def test_boxes_and_proposals_move_as_the_pixels_do(images: list[Drawn], size: int, letterbox: bool) -> None:
    """The oracle: each object is painted, and its extent in the resized image must be its box."""
    [drawn] = images
    height, width = drawn.height, drawn.width
    resize = Resize("letterbox", size) if letterbox else Resize("shortest_side", size, 2 * size)
    before = drawn.target(7, 1)
    image, after = resize(drawn.in_channels(), before, size)
    h, w = after["content_size"]
    assert image.dtype == torch.uint8
    assert tuple(image.shape[1:]) == ((size, size) if letterbox else (h, w))
    if letterbox:
        assert max(h, w) == size
        ground = torch.tensor(PADDING, dtype=torch.uint8)[:, None, None]
        assert (image[:, h:] == ground).all()
        assert (image[:, :, w:] == ground).all()
    assert torch.equal(after["boxes"], after["proposals"])
    scale = torch.tensor([w / width, h / height, w / width, h / height])
    torch.testing.assert_close(after["boxes"], before["boxes"] * scale)
    torch.testing.assert_close(after["area"], (after["boxes"][:, 2:] - after["boxes"][:, :2]).prod(1) / 2)
    for name in ("labels", "iscrowd", "difficult", "image_id", "file_name"):
        assert after[name] is before[name]  # type: ignore[literal-required]
    for k, box in enumerate(after["boxes"].tolist()):
        if min(box[2] - box[0], box[3] - box[1]) < 4:
            continue  # smoothing leaves no pixel bright enough
        assert np.abs(np.subtract(box, painted(image[:, :h, :w], k))).max() <= 1.0


def triangles(old: int, new: int) -> np.ndarray:
    """``[new, old]``: what each pixel counts for each new one, by a triangle as wide as the scale, a pixel at least."""
    scale = old / new
    width = max(scale, 1.0)
    centers = (np.arange(new)[:, None] + 0.5) * scale
    weight = np.clip(1 - np.abs((np.arange(old) + 0.5 - centers) / width), 0, None)
    return weight / weight.sum(1, keepdims=True)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 90), st.integers(1, 90), st.integers(1, 120), st.integers(1, 120), st.booleans())
@example(2, 2, 3, 1, True)  # a single new column: torch 2.14 fills it with its first row
@example(2, 2, 3, 1, False)
@example(1, 5, 7, 1, False)
@example(5, 1, 1, 7, True)
def test_resampled_bytes_are_within_one_level_of_floating_point(h: int, w: int, new_h: int, new_w: int, last: bool):
    pixels = np.random.default_rng(h * 91 + w).integers(0, 256, (h, w, 3), dtype=np.uint8)
    image = torch.from_numpy(pixels).permute(2, 0, 1)
    image = image if last else image.contiguous()
    out = resample(image, (new_h, new_w))
    exact = np.einsum("ih,hwc,jw->cij", triangles(h, new_h), pixels.astype(float), triangles(w, new_w), optimize=True)
    assert out.dtype == torch.uint8
    assert out.shape == (3, new_h, new_w)
    assert np.abs(out.numpy() - exact).max() <= 1.01
    assert not last or out.permute(1, 2, 0).is_contiguous()


def test_an_image_of_the_right_size_is_not_touched() -> None:
    image = torch.zeros(3, 20, 30, dtype=torch.uint8)
    assert resample(image, (20, 30)) is image


@pytest.mark.parametrize("size", [(40, 60), (31, 47), (1, 47)])
def test_a_part_of_the_last_pixel_is_left_out(size: tuple[int, int]) -> None:
    """A ramp of 60.5 x 40.5 pixels: the map is that of its extent, not of the 61 x 41 pixels that hold it."""
    ramp = (4 * torch.arange(61)).to(torch.uint8).expand(3, 41, 61)
    out = resample(ramp, size, (40.5, 60.5))[0, size[0] // 2].double()
    wanted, whole = (4 * ((torch.arange(size[1]) + 0.5) * w / size[1] - 0.5) for w in (60.5, 61))
    assert out.shape == wanted.shape
    assert (out - wanted)[2:-2].abs().max() < 1.1
    assert (out - whole)[-8:-2].mean() < -1.2


def test_sizes_are_drawn_from_seed_epoch_and_index() -> None:
    resize = Resize("shortest_side", [480, 512, 600], 1000)
    draws = [resize.draw((0, epoch, index)) for epoch in range(20) for index in range(30)]
    assert draws == [resize.draw((0, epoch, index)) for epoch in range(20) for index in range(30)]
    assert draws[:30] != draws[30:60]  # another epoch
    counts = [draws.count(size) for size in (480, 512, 600)]
    assert sum(counts) == 600
    assert min(counts) > 150
    assert draws != [resize.draw((1, epoch, index)) for epoch in range(20) for index in range(30)]
    between = Resize("letterbox", [320, 640], sampling="range")
    drawn = {between.draw((0, 0, index)) for index in range(400)}
    assert min(drawn) >= 320
    assert max(drawn) <= 640
    assert len(drawn) > 150


def test_evaluation_takes_the_last_size_or_the_one_given() -> None:
    assert Resize("shortest_side", [480, 600], 1000).for_evaluation().sizes == (600,)
    assert Resize("shortest_side", [480, 600], 1000, eval_size=512).for_evaluation().sizes == (512,)
    assert Resize("letterbox", [320, 480]).detector_sizes == (480, 480)


def test_a_detector_of_other_sizes_is_refused() -> None:
    resize = Resize("shortest_side", [480, 600], 1000)
    resize.check_detector(600, 1000)
    with pytest.raises(ValueError, match=r"min_size 600 and max_size 1000 .* model.min_size is 480 and .* is 1000"):
        resize.check_detector(480, 1000)
    with pytest.raises(ValueError, match=r"model\.resize is 'torchvision'; give resize: null"):
        resize.check_detector(600, 1000, "torchvision")


@pytest.mark.parametrize(
    ("magnification", "expected"), [(1.0, (60, 80)), (2.0, (120, 160)), (2.999, (180, 240)), (9.0, (180, 240))]
)
def test_as_much_is_read_as_the_augmentation_may_show(magnification: float, expected: tuple[int, int]) -> None:
    assert Resize("shortest_side", 60, 100).size_to_read(FILE, 60, magnification) == expected
    assert Resize("shortest_side", 600, 1000).size_to_read(FILE, 600, magnification) == FILE  # never enlarged before


def dataset_of(folder: Path, size: tuple[int, int] = FILE, suffix: str = "jpg", **arguments: Any) -> DetectionDataset:
    """One image with three painted objects, each in a channel of its own."""
    height, width = size
    boxes = [[9, 11, width - 40, height - 50], [50, 30, 120, 101], [width // 2, height // 2, width, height]]
    image = Drawn(height, width, tuple(map(tuple, boxes))).in_channels()
    Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / f"x.{suffix}", quality=100, subsampling=0)
    a = annotations(folder, boxes, [0, 3], [size], ("red", "green", "blue"), file_names=np.array([f"x.{suffix}"]))
    return DetectionDataset(a, proposals={1: np.array(boxes, dtype=np.float32)}, **arguments)


def painted(image: Tensor, k: int) -> list[int]:
    found = extents((image[k] > 127).numpy())
    assert found is not None
    return found


@pytest.mark.parametrize("suffix", ["jpg", "png"])
@pytest.mark.parametrize("augment", [None, Augment(flip=1.0, vertical_flip=1.0), Augment(0.5, (0.7, 1.5), crop=1.0)])
@pytest.mark.parametrize(
    ("size", "resize"),
    [
        (FILE, SHORTEST),
        (FILE, LETTERBOX),
        (FILE, Resize("shortest_side", 300, 500)),
        ((361, 483), SHORTEST),  # no factor divides its sides
        ((361, 483), LETTERBOX),
        ((481, 643), Resize("shortest_side", [50, 61, 97, 160], 400)),
    ],
)
def test_files_arrive_resized_with_their_boxes(
    tmp_path: Path, size: tuple[int, int], resize: Resize, augment: Augment | None, suffix: str
) -> None:
    dataset = dataset_of(tmp_path, size, suffix, resize=resize, augment=augment)
    for epoch in range(4):
        image, target = dataset[epoch, 0]
        side = resize.draw((0, epoch, 0))
        h, w = target["content_size"]
        assert min(h, w) == side or max(h, w) == (resize.max_size or side)
        assert ("file_size" in target) == (augment is None)
        assert image.shape[1:] == ((side, side) if resize.policy == "letterbox" else (h, w))
        for box, label in zip(target["boxes"].tolist(), target["labels"].tolist(), strict=True):
            assert np.abs(np.subtract(box, painted(image[:, :h, :w], label - 1))).max() <= 1.5
        assert torch.isin(target["boxes"], target["proposals"]).all()
        torch.testing.assert_close(target["area"], (target["boxes"][:, 2:] - target["boxes"][:, :2]).prod(1))


def test_a_large_jpeg_is_decoded_at_a_part_of_its_scale(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from detpipe.datasets import dataset as module

    factors = []

    def noted(*arguments: Any) -> Any:
        found = module_read(*arguments)
        factors.append(found.factor)
        return found

    module_read = module.read_reduced
    monkeypatch.setattr(module, "read_reduced", noted)
    for resize in (
        None,
        Resize("shortest_side", 180, 240),
        Resize("shortest_side", 90, 240),
        SHORTEST,
        Resize("letterbox", 60),
    ):
        dataset_of(tmp_path, resize=resize)[0, 0]
    dataset_of(tmp_path, resize=SHORTEST, augment=Augment(scale_jitter=(1.0, 2.0)))[0, 0]
    dataset_of(tmp_path, resize=Resize("letterbox", 60), augment=Augment(scale_jitter=(1.0, 2.0)))[0, 0]
    assert factors == [1, 1, 2, 2, 4, 1, 2]


def test_without_resize_all_is_as_in_the_file(tmp_path: Path) -> None:
    dataset = dataset_of(tmp_path)
    image, target = dataset[0, 0]
    assert torch.equal(image, read_image(tmp_path / "x.jpg"))
    assert "content_size" not in target
    assert "file_size" not in target
    assert target["boxes"].tolist() == dataset.annotations.boxes.tolist()


def test_detections_go_back_to_the_pixels_of_the_file(tmp_path: Path) -> None:
    for resize in (SHORTEST, LETTERBOX, Resize("shortest_side", 300, 500)):
        dataset = dataset_of(tmp_path, resize=resize)
        _, target = dataset[0, 0]
        found = Detection(boxes=target["boxes"], scores=torch.ones(3), labels=target["labels"])
        [moved] = detections_to_files([found], [target])
        torch.testing.assert_close(moved["boxes"].double(), torch.from_numpy(dataset.annotations.boxes))
        [again] = detections_to_files([moved], [target], back=True)
        torch.testing.assert_close(again["boxes"], found["boxes"])


def test_the_detector_takes_resized_images_as_they_are(tmp_path: Path) -> None:
    plain = PixelFormat(mean=(0, 0, 0), std=(1, 1, 1), value_range=255.0)
    for resize in (Resize("shortest_side", [40, 60, 77], 100), Resize("letterbox", [40, 96])):
        dataset = dataset_of(tmp_path, resize=resize)
        samples = [dataset[epoch, 0] for epoch in range(5)]
        images, targets = [image for image, _ in samples], [target for _, target in samples]
        batch = to_batch(images, plain, 33, 44, 16, contents_of(targets))
        assert batch.image_sizes == [target["content_size"] for target in targets]
        assert batch.tensors.shape[2] == -(-max(image.shape[1] for image in images) // 16) * 16
        assert batch.tensors.is_contiguous(memory_format=torch.channels_last)
        for row, image, (h, w) in zip(batch.tensors, images, batch.image_sizes, strict=True):
            assert torch.equal(row[:, :h, :w], image[:, :h, :w].float())
            assert not row[:, h:].any()
            assert not row[:, :, w:].any()


def test_a_file_of_another_size_than_annotated_is_still_refused(tmp_path: Path) -> None:
    dataset = dataset_of(tmp_path, resize=SHORTEST)
    for size, hint in (((240, 180), "swapped"), ((1440, 1920), "the image is 1920 x 1440")):
        Image.fromarray(np.zeros((*size, 3), dtype=np.uint8)).save(tmp_path / "x.jpg")
        with pytest.raises(Exception, match=hint):
            dataset[0, 0]


@pytest.mark.parametrize("letterbox", [True, False])
def test_evaluation_batches_are_of_one_size(tmp_path: Path, letterbox: bool) -> None:
    write_coco(tmp_path, coco_content(((80, 120), (120, 80), (80, 120), (60, 100))), "val")
    resize = Resize("letterbox", [32, 48]) if letterbox else Resize("shortest_side", [32, 48], 90)
    loader = Loader(batch_size=2, num_workers=0)
    for images, targets in COCO(str(tmp_path), val="val", loader=loader, resize=resize).val_dataloader():
        assert len({image.shape for image in images}) == 1
        assert {target["content_size"] for target in targets} == {resize.content_size(targets[0]["file_size"], 48)}


@pytest.mark.slow
def test_what_is_lost_on_real_photographs(shared_data: Path, tmp_path: Path) -> None:
    """Mean difference to the same resize of the whole picture, in gray levels."""
    differences = {}
    for path in sorted((shared_data / "coco_mini" / "val2017").iterdir())[:12]:
        full = read_image(path)
        for part in (0.5, 0.4, 0.26):
            size = (int(full.shape[1] * part), int(full.shape[2] * part))
            reduced = read_reduced(path, size)
            assert reduced.factor == 2
            extent = (full.shape[1] / 2, full.shape[2] / 2)
            difference = (resample(reduced.pixels, size, extent).float() - resample(full, size)).abs().mean()
            differences.setdefault(part, []).append(float(difference))
    means = {part: np.mean(values) for part, values in differences.items()}
    assert means[0.5] < 3.0
    assert means[0.4] < 2.0
    assert means[0.26] < 1.5


@pytest.mark.parametrize("side", [180, 150, 100])
def test_pixels_line_up_with_the_whole_picture(tmp_path: Path, side: int) -> None:
    """A smooth picture of odd sides, decoded at half its scale, is what the whole picture resized is."""
    dataset = dataset_of(tmp_path, (361, 483), resize=Resize("shortest_side", side, 1000))
    rows, columns = np.mgrid[0:361, 0:483]
    waves = [127 + 120 * np.sin(columns / 17), 127 + 120 * np.sin(rows / 13), 127 + 120 * np.cos((rows + columns) / 19)]
    buffer = io.BytesIO()
    Image.fromarray(np.stack(waves, 2).astype(np.uint8)).save(buffer, "jpeg", quality=100, subsampling=0)
    (tmp_path / "x.jpg").write_bytes(buffer.getvalue())
    image, target = dataset[0, 0]
    whole = resample(read_image(tmp_path / "x.jpg"), target["content_size"])
    assert read_reduced(tmp_path / "x.jpg", target["content_size"]).factor == 2
    assert (image.float() - whole).abs()[:, 2:-2, 2:-2].max() < 4

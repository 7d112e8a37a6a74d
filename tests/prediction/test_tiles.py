from __future__ import annotations

import itertools
import random

import numpy as np
import pytest
import tifffile
import torch
from torch import Tensor

from detpipe.datasets import read_image
from detpipe.datasets.tiling import tile_views
from detpipe.prediction import ImageWindows, Merge, TiledDetector, Windows
from detpipe.prediction.inputs import ImageInput
from detpipe.prediction.tiff import open_windows
from detpipe.support.errors import DataError
from detpipe.types import Detection, PixelType
from tests.prediction.bright import Bright, rows, scene


def spots(seed: int, height: int, width: int, sides: tuple[int, int], count: int) -> list[list[int]]:
    """Boxes of random sides that neither overlap nor touch."""
    draw, boxes = random.Random(seed), []
    while len(boxes) < count:
        w, h = (draw.randint(*sides) for _ in range(2))
        x, y = draw.randint(0, width - w), draw.randint(0, height - h)
        if all(x > b[2] + 1 or b[0] > x + w + 1 or y > b[3] + 1 or b[1] > y + h + 1 for b in boxes):
            boxes.append([x, y, x + w, y + h])
    return boxes


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("method", ["nms", "box_fusion"])
@pytest.mark.parametrize(
    ("sides", "count"),
    [((3, 12), 60), ((10, 30), 30), ((40, 90), 8)],  # in tiles of 64 that share 16: whole in one; cut by all
)
def test_objects_that_tiles_cut_are_found_once_and_whole(sides, count, method, whole):
    for seed in range(3):
        boxes = spots(seed, 200, 300, sides, count)
        detector = TiledDetector(Bright(), 64, 0.25, whole, Merge(method))
        [found] = detector([scene(200, 300, boxes)])
        assert rows(found) == sorted([1, *map(float, box)] for box in boxes)
        assert (found["scores"].diff() <= 0).all()


def test_parts_are_kept_apart_by_class():
    image = scene(60, 100, [[10, 10, 80, 30], [10, 30, 80, 50]], [1, 2])
    [found] = TiledDetector(Bright(), 60, 0.2, whole=False)([image])
    assert rows(found) == [[1, 10, 10, 80, 30], [2, 10, 30, 80, 50]]


def test_a_small_object_inside_a_large_one_of_its_class_stays():
    """Neither is cut, so neither can be a part of the other."""
    large, small = [10.0, 10.0, 90.0, 90.0], [40.0, 40.0, 60.0, 60.0]
    found = {"boxes": torch.tensor([large, small]), "scores": torch.tensor([0.9, 0.8]), "labels": torch.tensor([1, 1])}
    merged = Merge()([Detection(**found), Detection(**found)], [(0, 0, 100, 100), (0, 0, 200, 100)])
    assert rows(merged) == [[1, *large], [1, *small]]


def test_a_cut_box_stays_where_nothing_holds_the_rest_of_it():
    found = {
        "boxes": torch.tensor([[60.0, 10.0, 100.0, 20.0]]),
        "scores": torch.tensor([0.9]),
        "labels": torch.tensor([1]),
    }
    none = {key: value[:0] for key, value in found.items()}
    merged = Merge()([Detection(**found), Detection(**none)], [(0, 0, 100, 100), (80, 0, 180, 100)])
    assert rows(merged) == [[1, 60, 10, 100, 20]]


def test_a_worthless_box_does_not_take_the_place_of_good_parts():
    part, everything = [60.0, 10.0, 100.0, 20.0], [0.0, 0.0, 180.0, 100.0]
    views = [(0, 0, 100, 100), (0, 0, 180, 100)]
    for score, expected in ((0.1, [part, everything]), (0.8, [everything])):
        found = [
            Detection(boxes=torch.tensor([box]), scores=torch.tensor([value]), labels=torch.tensor([1]))
            for box, value in ((part, 0.9), (everything, score))
        ]
        assert [row[1:] for row in rows(Merge()(found, views))] == sorted(expected)


@pytest.mark.parametrize(("height", "width"), [(1, 1), (640, 640), (641, 640), (100, 5000), (1500, 1777)])
@pytest.mark.parametrize("overlap", [0.0, 0.2, 0.5])
def test_tiles_cover_an_image_and_share_what_is_asked_for(height, width, overlap):
    views = tile_views(height, width, 640, overlap)
    seen = torch.zeros(height, width, dtype=torch.int16)
    for x1, y1, x2, y2 in views:
        assert 0 <= x1 < x2 <= width
        assert 0 <= y1 < y2 <= height
        assert (x2 - x1, y2 - y1) == (min(640, width), min(640, height))
        seen[y1:y2, x1:x2] += 1
    assert seen.min() == 1 or overlap
    assert seen.min() >= 1
    starts = sorted({view[0] for view in views})
    assert all(b - a <= 640 * (1 - overlap) + 1 for a, b in itertools.pairwise(starts))
    assert len(set(views)) == len(views)


def test_an_image_of_one_tile_is_looked_at_once_and_as_it_is():
    detector = Bright()
    image = scene(50, 64, [[0, 0, 20, 20]])
    [found] = TiledDetector(detector, 64)([image])
    assert detector.shapes == [(50, 64)]
    assert rows(found) == [[1, 0, 0, 20, 20]]


@pytest.mark.parametrize("image", [(64, 64), (64, 500)])
def test_nothing_found_is_an_empty_detection(image):
    [found] = TiledDetector(Bright(), 64)([torch.zeros(3, *image, dtype=torch.uint8)])
    assert found["boxes"].shape == (0, 4)


def test_proposals_are_those_of_each_tile():
    detector = Bright()
    proposals = torch.tensor([[0.0, 0.0, 10.0, 10.0], [70.0, 5.0, 90.0, 15.0], [55.0, 0.0, 67.0, 10.0]])
    TiledDetector(detector, 64, 0.0, batch_size=1)([torch.zeros(3, 64, 128)], [{"proposals": proposals}])
    seen = [target["proposals"].tolist() for target in detector.targets]
    assert seen == [
        [[0, 0, 10, 10], [55, 0, 64, 10]],  # nine of twelve columns of the last lie in the first tile
        [[6, 5, 26, 15]],
        proposals.tolist(),
    ]


class Counted(Windows):
    """An image of one value for each pixel that is never held as a whole; the largest part that was read."""

    def __init__(self, height: int, width: int) -> None:
        self.size = (height, width)
        self.largest = 0

    def read(self, top: int, left: int, height: int, width: int) -> Tensor:
        self.largest = max(self.largest, height * width)
        assert top + height <= self.size[0]
        assert left + width <= self.size[1]
        return (torch.arange(left, left + width) % 256).to(torch.uint8).expand(3, height, width)


def test_a_large_image_is_never_read_as_a_whole():
    image = Counted(900, 3000)
    reduced, factor = image.reduced(205)
    assert factor == 14
    assert reduced.shape == (3, -(-900 // 14), -(-3000 // 14))
    assert image.largest <= (14 * 51) ** 2
    assert reduced[0, 0, :3].tolist() == [6, 20, 34]  # means of 0..13, 14..27, 28..41, halves to the even one
    image = Counted(900, 300)
    detector = TiledDetector(lambda images, targets=None: [_none() for _ in images], 100, whole=False)
    detector.detect(image)
    assert image.largest == 100 * 100


def test_what_is_found_in_a_reduced_image_lies_where_its_squares_do():
    """Of 5 x 4097 pixels the last squares of 2 x 2 reach beyond the image."""
    found = {
        "boxes": torch.tensor([[0.0, 0, 2049, 3], [0, 0, 500, 2]]),
        "scores": torch.ones(2),
        "labels": torch.ones(2),
    }

    def detector(images, targets=None):
        return [Detection(**found) if image.shape[1:] == (3, 2049) else _none() for image in images]

    merged = TiledDetector(detector, 4000).detect(Counted(5, 4097))
    assert merged["boxes"].tolist() == [[0, 0, 4097, 5], [0, 0, 1000, 4]]


def _none() -> Detection:
    return {"boxes": torch.zeros(0, 4), "scores": torch.zeros(0), "labels": torch.zeros(0, dtype=torch.int64)}


def test_grey_pages_that_are_channels(tmp_path):
    path = tmp_path / "pages.tif"
    pages = np.random.default_rng(0).integers(0, 256, (4, 9, 12), dtype=np.uint8)
    tifffile.imwrite(path, pages, photometric="minisblack")
    image = open_windows(ImageInput(path.name, path), PixelType(4))
    assert torch.equal(image.read(2, 3, 4, 5), torch.from_numpy(pages)[:, 2:6, 3:8])


# photometric interpretation, samples, what those beyond the colors are
SAMPLES = [
    ("minisblack", 1, []), ("miniswhite", 1, []), ("minisblack", 2, ["unassalpha"]), ("minisblack", 2, ["assocalpha"]),
    ("minisblack", 4, ["unspecified"] * 3), ("rgb", 3, []), ("rgb", 4, ["unassalpha"]), ("rgb", 4, ["assocalpha"]),
    ("rgb", 5, ["unassalpha", "unspecified"]),
]  # fmt: skip


@pytest.mark.parametrize("case", SAMPLES, ids=lambda case: "-".join(map(str, case)))
@pytest.mark.parametrize("planar", ["contig", "separate"])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_windows_have_the_samples_of_the_whole(tmp_path, case, planar, dtype):
    (photometric, samples, extra), path = case, tmp_path / "x.tif"
    values = np.random.default_rng(0).integers(0, np.iinfo(dtype).max, (20, 30, samples)).astype(dtype)
    if extra == ["assocalpha"]:
        values[:, :, -1] = np.iinfo(dtype).max
    several = {"planarconfig": planar, "extrasamples": extra} if samples > 1 else {}
    stored = np.moveaxis(values, 2, 0) if planar == "separate" and samples > 1 else values
    tifffile.imwrite(path, stored, photometric=photometric, **several)
    for pixels in (PixelType(), PixelType(1), PixelType(samples), PixelType(3, "dtype")):
        windows = open_windows(ImageInput(path.name, path), pixels)
        if photometric == "minisblack" and samples == 4 and pixels.channels != 4:
            for read in (lambda pixels=pixels: read_image(path, pixels=pixels), lambda of=windows: of.read(2, 3, 4, 5)):
                with pytest.raises(DataError, match=r"x\.tif: has 4 channels, but channels is"):
                    read()
        else:
            whole, atol = read_image(path, pixels=pixels)[:, 2:6, 3:8], 1 if pixels.range is None else 1e-6
            # grey of high bytes, or the high byte of grey
            torch.testing.assert_close(windows.read(2, 3, 4, 5), whole, rtol=0, atol=atol)


def test_windows_of_a_tensor_are_views():
    image = torch.rand(3, 20, 30)
    part = ImageWindows(image).read(2, 3, 4, 5)
    assert part.shape == (3, 4, 5)
    assert part.untyped_storage().data_ptr() == image.untyped_storage().data_ptr()
    assert ImageWindows(image).size == (20, 30)


@pytest.mark.parametrize(
    "settings", [{"size": 0}, {"overlap": 1.0}, {"overlap": -0.1}, {"batch_size": 0}], ids=lambda one: next(iter(one))
)
def test_settings_are_checked(settings):
    with pytest.raises(ValueError, match=r"expected size and batch_size of at least 1 and an overlap of 0 to .9, got"):
        TiledDetector(Bright(), **settings)
    with pytest.raises(ValueError, match=r"expected method nms or box_fusion and iou in \(0, 1\], got"):
        Merge(iou=0)

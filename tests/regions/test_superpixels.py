from __future__ import annotations

import sys

import numpy as np
import pytest
import torch
from torchvision.models.detection.image_list import ImageList

from detpipe import images as frames
from detpipe.regions.superpixels import Segmentation, Segmenter, slic
from detpipe.support.errors import UsageError
from detpipe.types import PixelFormat

BGR = PixelFormat((10.0, 20.0, 30.0), (2.0, 2.0, 2.0), "bgr", 255.0)


def picture(height: int = 40, width: int = 60, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    image = torch.full((3, height, width), 60) + torch.randint(0, 20, (3, height, width), generator=generator)
    image[0, 10:30, 20:50] = 220
    return image.to(torch.uint8)


def test_superpixels_follow_borders() -> None:
    labels = Segmenter(Segmentation(30))(picture())
    assert labels.dtype == np.int32
    assert labels.shape == (40, 60)
    assert (np.unique(labels) == np.arange(labels.max() + 1)).all()
    assert 12 < labels.max() < 60
    inside = np.zeros((40, 60), bool)
    inside[10:30, 20:50] = True

    def across(regions: np.ndarray) -> float:
        """The part of the image that is on the wrong side of the border, where each region takes the side of its majority."""
        pixels, of_object = np.bincount(regions.ravel()), np.bincount(regions.ravel(), inside.ravel())
        return np.minimum(of_object, pixels - of_object).sum() / regions.size

    squares = Segmenter(Segmentation(30, compactness=1e4))(picture())
    assert across(labels) < 0.02 < 0.06 < across(squares)


@pytest.mark.parametrize("size", [(1, 1), (1, 5), (7, 1), (3, 3), (8, 300)])
def test_any_size(size: tuple[int, int]) -> None:
    labels = Segmenter(Segmentation(200))(picture(40, 300)[:, : size[0], : size[1]])
    assert labels.shape == size
    assert (np.unique(labels) == np.arange(labels.max() + 1)).all()


@pytest.mark.parametrize("pixel_format", [PixelFormat(), BGR])
def test_a_batch_is_its_images_and_padding(pixel_format: PixelFormat) -> None:
    images = [picture(), picture(32, 40, 1)]
    batch = frames.to_batch(images, pixel_format, 48, 72, 32)
    segmenter = Segmenter(Segmentation(30))
    labels, count = segmenter.batch(batch, pixel_format)
    assert labels.shape == (2, *batch.tensors.shape[2:])
    assert labels.dtype == torch.int32
    assert count == labels.max() + 1
    for row, tensor, (height, width) in zip(labels, batch.tensors, batch.image_sizes, strict=True):
        pixels = frames.to_pixels(tensor[:, :height, :width], pixel_format)
        assert (row[:height, :width].numpy() == slic(pixels.permute(1, 2, 0).numpy(), 30)).all()
        assert (row[height:] == -1).all()
        assert (row[:, width:] == -1).all()
    assert segmenter.computed == 2


def test_the_same_pixels_are_divided_once() -> None:
    segmenter = Segmenter(Segmentation(30))
    first = segmenter(picture())
    first_again = segmenter(picture())
    assert (first == first_again).all()
    assert first_again.dtype == np.int32
    first_again[:] = 0  # what is given away is a copy
    assert (segmenter(picture()) == first).all()
    assert segmenter.computed == 1
    segmenter(picture(seed=1))
    segmenter(picture().reshape(3, 60, 40))  # the same bytes in another shape
    assert segmenter.computed == 3


def test_what_was_used_least_recently_is_forgotten() -> None:
    segmenter = Segmenter(Segmentation(30, cache_megabytes=1))  # 524,288 pixels
    big = [picture(400, 500, seed) for seed in range(3)]
    for image in (big[0], big[1], big[0], big[2]):
        segmenter(image)
    assert segmenter.computed == 3
    segmenter(big[0])
    assert segmenter.computed == 3
    segmenter(big[1])
    assert segmenter.computed == 4
    none = Segmenter(Segmentation(30, cache_megabytes=0))
    none(picture())
    none(picture())
    assert none.computed == 2


@pytest.mark.parametrize("bad", [{"segments": 1}, {"compactness": 0.0}, {"cache_megabytes": -1}])
def test_bad_settings(bad: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(bad))} must be"):
        Segmentation(**bad)  # type: ignore[arg-type]


@pytest.mark.parametrize("image", [torch.zeros(3, 4, 4), torch.zeros(1, 4, 4).byte(), torch.zeros(3, 0, 4).byte()])
def test_bad_images(image: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"an image must be uint8 \[3, H, W\], got"):
        Segmenter()(image)


def test_scikit_image_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "skimage.segmentation", None)
    with pytest.raises(
        UsageError, match=r"superpixels by SLIC needs scikit-image, .* pip install 'detpipe\[proposals\]'"
    ):
        Segmenter()(picture())


def test_an_empty_batch() -> None:
    labels, count = Segmenter().batch(ImageList(torch.zeros(0, 3, 4, 4), []), PixelFormat())
    assert labels.shape == (0, 4, 4)
    assert count == 0

import math

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from detpipe.proposals.regions import (
    COLOR_BINS,
    STEEPEST,
    TEXTURE_BINS,
    bounding_boxes,
    describe,
    neighbors,
    quantize_color,
    quantize_texture,
)


def random_labels(height, width, most, seed):
    """Regions numbered without gaps, in one piece or not."""
    labels = np.random.default_rng(seed).integers(0, most, (height, width))
    return np.unique(labels, return_inverse=True)[1].reshape(height, width).astype(np.int32)


label_maps = st.builds(random_labels, st.integers(1, 9), st.integers(1, 9), st.integers(1, 12), st.integers(0, 10**6))


def described(labels, seed=0, channels=3):
    random = np.random.default_rng(seed)
    image = random.integers(0, 256, (*labels.shape, channels)).astype(np.uint8)
    color, texture = quantize_color(image), quantize_texture(image)
    return describe(labels, color, texture), color, texture


@given(label_maps)
@settings(max_examples=80, deadline=None)
def test_sizes_and_boxes_equal_a_slow_loop(labels):
    regions, _, _ = described(labels)
    for region in range(labels.max() + 1):
        places = [(y, x) for y in range(labels.shape[0]) for x in range(labels.shape[1]) if labels[y, x] == region]
        rows, columns = [y for y, _ in places], [x for _, x in places]
        assert regions.sizes[region] == len(places)
        assert regions.boxes[region].tolist() == [min(columns), min(rows), max(columns) + 1, max(rows) + 1]


@given(label_maps)
@settings(max_examples=80, deadline=None)
def test_neighbors_equal_a_slow_loop(labels):
    pairs = set()
    for y in range(labels.shape[0]):
        for x in range(labels.shape[1]):
            for below, right in ((1, 0), (0, 1)):
                if y + below < labels.shape[0] and x + right < labels.shape[1]:
                    one, other = int(labels[y, x]), int(labels[y + below, x + right])
                    if one != other:
                        pairs.add((min(one, other), max(one, other)))
    first, second = neighbors(labels, int(labels.max()) + 1)
    assert list(zip(first.tolist(), second.tolist(), strict=True)) == sorted(pairs)
    assert first.dtype == second.dtype == np.int32


@given(label_maps, st.sampled_from([1, 3]))
@settings(max_examples=40, deadline=None)
def test_histograms_equal_a_slow_loop(labels, channels):
    regions, color, texture = described(labels, channels=channels)
    for found, bins, number in ((regions.color, color, COLOR_BINS), (regions.texture, texture, TEXTURE_BINS)):
        assert bins.max() < number
        assert found.shape == (labels.max() + 1, bins.shape[2] * number)
        expected = np.zeros(found.shape)
        for y in range(labels.shape[0]):
            for x in range(labels.shape[1]):
                for channel in range(bins.shape[2]):
                    expected[labels[y, x], channel * number + bins[y, x, channel]] += 1
        expected /= expected.sum(axis=1, keepdims=True)
        np.testing.assert_allclose(found, expected, rtol=1e-6)
        np.testing.assert_allclose(found.sum(axis=1), 1, rtol=1e-5)


def test_many_regions_do_not_overflow():
    labels = np.arange(300 * 300, dtype=np.int32).reshape(300, 300)  # more pairs of numbers than 32 bits hold
    first, second = neighbors(labels, labels.size)
    assert len(first) == 2 * 300 * 299
    assert ((second - first == 1) | (second - first == 300)).all()


def test_a_region_without_pixels_has_a_box_of_zeros():
    boxes = bounding_boxes(np.array([[0, 2]], np.int32), 4)
    assert boxes.tolist() == [[0, 0, 1, 1], [0, 0, 0, 0], [1, 0, 2, 1], [0, 0, 0, 0]]


def test_color_bins_are_of_equal_width():
    bins = quantize_color(np.arange(256, dtype=np.uint8).reshape(1, -1, 1)).ravel()
    assert bins.tolist() == [math.floor(value * COLOR_BINS / 256) for value in range(256)]
    assert set(np.bincount(bins).tolist()) == {10, 11}


def ramp(slope_x, slope_y, base=0.0):
    y, x = np.mgrid[0:21, 0:31]
    return np.clip(base + slope_x * x + slope_y * y, 0, 255).astype(np.uint8)[..., None]


def expected_bin(slope):
    """Bins are narrow for small slopes; the middle one begins at 0."""
    signed = math.copysign(math.sqrt(min(abs(slope) / STEEPEST, 1)), slope)
    return min(int(signed * TEXTURE_BINS / 2 + TEXTURE_BINS / 2), TEXTURE_BINS - 1)


@pytest.mark.parametrize(
    ("x", "y", "base"), [(9, 0, 0), (-9, 0, 255), (0, 10, 0), (0, -5, 200), (3, 4, 0), (-4, 3, 130)]
)
def test_texture_of_a_slope_by_hand(x, y, base):
    bins = quantize_texture(ramp(x, y, base))[10, 15]
    half = math.sqrt(0.5)
    assert bins.tolist() == [expected_bin(slope) for slope in (x, y, (x + y) * half, (x - y) * half)]


def test_texture_equals_a_slow_loop():
    image = np.random.default_rng(3).integers(0, 256, (12, 15, 3)).astype(np.uint8)
    smooth = np.stack([cv2.GaussianBlur(image[:, :, c].astype(np.float32), (0, 0), 1.0) for c in range(3)], axis=2)
    bins = quantize_texture(image)
    assert bins.shape == (12, 15, 12)
    half, differences = math.sqrt(0.5), 0
    for row in range(1, 11):
        for column in range(1, 14):
            for c in range(3):
                x = (float(smooth[row, column + 1, c]) - float(smooth[row, column - 1, c])) / 2
                y = (float(smooth[row + 1, column, c]) - float(smooth[row - 1, column, c])) / 2
                expected = [expected_bin(slope) for slope in (x, y, (x + y) * half, (x - y) * half)]
                differences += bins[row, column, c::3].tolist() != expected
    assert differences <= 2  # of 390: a slope that lies on the border of two bins


@pytest.mark.parametrize("size", [(1, 1), (1, 9), (9, 1)])
@pytest.mark.parametrize("channels", [1, 3])
def test_lines_of_pixels_can_be_described(size, channels):
    regions, _, texture = described(np.zeros(size, np.int32), channels=channels)
    assert regions.boxes.tolist() == [[0, 0, size[1], size[0]]]
    assert texture.shape == (*size, 4 * channels)


def test_a_constant_image_has_no_texture():
    texture = quantize_texture(np.full((9, 9, 3), 77, np.uint8))
    assert (texture == TEXTURE_BINS // 2).all()

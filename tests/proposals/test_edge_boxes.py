import math

import numpy as np
import pytest

from detpipe.proposals import EdgeBoxes
from detpipe.proposals.edge_boxes import find_edges

from .needs import PLACES, best_overlap, contrib, noise, planted


@contrib
def test_the_object_is_among_the_first_boxes():
    """Scores mean something: the window around the only contour is good."""
    for seed, box in enumerate(PLACES):
        boxes, scores = EdgeBoxes().propose(planted(box, seed=seed))
        assert best_overlap(boxes[:50], box) > 0.7
        assert scores[0] > 0


@contrib
@pytest.mark.parametrize("value", [0, 128, 255])
def test_a_constant_image_has_no_edges(value):
    boxes, scores = EdgeBoxes().propose(np.full((40, 60, 3), value, np.uint8))
    assert boxes.shape == (0, 4)
    assert scores.shape == (0,)


@contrib
def test_boxes_are_no_longer_than_allowed():
    boxes, _ = EdgeBoxes(max_aspect_ratio=1.5, min_size=10).propose(planted(PLACES[1]))
    sides = boxes[:, 2:] - boxes[:, :2]
    assert len(boxes) > 0
    assert (sides.max(axis=1) / sides.min(axis=1)).max() < 1.5 * 1.15  # the search rounds to whole pixels


@pytest.mark.parametrize("degrees", range(0, 180, 15))
def test_direction_and_place_of_a_straight_edge(degrees):
    """Dark on one side of a line, bright on the other: the edge is on the line, the direction across it."""
    angle = math.radians(degrees)
    rows, columns = np.mgrid[0:61, 0:81].astype(np.float64)
    distance = (columns - 40) * math.cos(angle) + (rows - 30) * math.sin(angle)
    image = np.repeat((255 / (1 + np.exp(-4 * distance))).astype(np.uint8)[..., None], 3, axis=2)
    edges, orientation = find_edges(image, 2.0)
    assert edges.dtype == orientation.dtype == np.float32
    assert edges.shape == orientation.shape == (61, 81)
    inner = np.zeros(edges.shape, bool)
    inner[8:-8, 8:-8] = True
    strong = (edges > 0.3) & inner
    assert strong.sum() > 25
    assert np.abs(distance[strong]).max() <= 1.5
    apart = np.abs((orientation[strong] - angle + math.pi / 2) % math.pi - math.pi / 2)
    assert apart.max() < 0.06
    assert ((orientation >= 0) & (orientation <= np.float32(math.pi))).all()
    across = edges[inner & (np.abs(distance) < 6)]
    assert (across > 0).mean() < 0.3  # one or two pixels of twelve


def test_a_small_object_on_an_even_ground_has_edges():
    """Its edges are less than a hundredth of the pixels."""
    image = np.zeros((300, 400, 3), np.uint8)
    image[100:110, 200:212] = 200
    edges, _ = find_edges(image, 2.0)
    assert edges.max() == 1
    rows, columns = np.nonzero(edges > 0.3)
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == pytest.approx((99.5, 109.5, 199.5, 211.5), abs=1)


def test_strength_is_relative_to_the_strongest_hundredth():
    weak = (noise(60, 80).astype(np.float32) * 0.2).astype(np.uint8)
    for image in (noise(60, 80), weak, planted(PLACES[0])):
        edges, _ = find_edges(image, 2.0)
        assert edges.min() == 0
        assert 0.9 <= edges.max() <= 1


def test_the_steepest_channel_decides():
    image = np.full((40, 60, 3), 100, np.uint8)
    image[:, 30:, 0] = 110
    image[20:, :, 2] = 250
    edges, orientation = find_edges(image, 1.5)
    row = 19 + int(edges[19:21, 10].argmax())
    assert edges[row, 10] == 1
    assert orientation[row, 10] == pytest.approx(math.pi / 2, abs=1e-3)
    column = 29 + int(edges[5, 29:31].argmax())
    assert 0 < edges[5, column] < 0.2
    assert orientation[5, column] == pytest.approx(0, abs=1e-3)

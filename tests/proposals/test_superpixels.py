import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from detpipe.proposals import Superpixels
from detpipe.proposals.superpixels import _pairs, _possible, _seeds, _slic

from .needs import PLACES, contrib, planted, scikit_image

each_method = pytest.mark.parametrize(
    "method", [pytest.param("slic", marks=scikit_image), pytest.param("seeds", marks=contrib)]
)


@each_method
def test_the_number_of_superpixels_is_about_what_is_asked_for(method):
    image = planted(PLACES[0], size=(120, 160))
    divide = _slic if method == "slic" else _seeds
    for number in (20, 100, 300):
        labels = divide(image, number, 10.0)
        assert labels.shape == (120, 160)
        assert labels.dtype == np.int32
        assert (np.unique(labels) == np.arange(labels.max() + 1)).all()
        assert number / 2 < labels.max() + 1 < number * 2


@given(st.integers(8, 400), st.integers(8, 400), st.integers(10, 4000))
def test_numbers_that_opencv_would_crash_at_are_moved(height, width, segments):
    """What its source does with the number: rows and columns of the first grid, then cells of at least 2 x 2 pixels."""
    possible = _possible(segments, height, width)
    rows = int(np.sqrt(np.float32(possible) * np.float32(height) / np.float32(width)))
    columns = rows * width // height
    assert min(rows, columns) >= 2
    assert min(height / rows, width / columns) >= 2
    wanted = int(np.sqrt(segments * height / width))
    if (
        wanted >= 2
        and wanted * width // height >= 2
        and height / wanted >= 2
        and width / (wanted * width // height) >= 2
    ):
        assert possible == segments


@contrib
@pytest.mark.parametrize("size", [(8, 8), (8, 200), (200, 8), (17, 290), (22, 90), (90, 22)])
@pytest.mark.parametrize("segments", [2, 10, 30, 3000])
def test_seeds_divides_images_of_any_shape(size, segments):
    labels = _seeds(planted((2, 2, 6, 6), size=size), segments, 10.0)
    assert labels.shape == size
    assert 2 <= labels.max() + 1 <= max(100, size[0] * size[1] / 4)


@scikit_image
def test_parts_add_up():
    """Superpixels alone, with pairs, and with what they grow to: each adds boxes to the one before."""
    image, found = planted(PLACES[0]), {}
    for pairs in (False, True):
        for grow in (False, True):
            source = Superpixels([60], pairs=pairs, grow=grow, max_boxes=None, min_size=0)
            found[pairs, grow] = {tuple(box) for box in source.propose(image)[0].tolist()}
    labels = _slic(image, 60, 10.0)
    alone = {
        (float(x.min()), float(y.min()), float(x.max() + 1), float(y.max() + 1))
        for y, x in (np.nonzero(labels == number) for number in range(labels.max() + 1))
    }
    assert found[False, False] == alone
    assert found[False, False] < found[True, False] < found[True, True]
    assert found[False, False] < found[False, True] < found[True, True]
    assert (0, 0, 140, 100) in found[False, True]
    assert (0, 0, 140, 100) not in found[True, False]


def test_pairs_by_hand():
    from detpipe.proposals.regions import describe

    labels = np.array([[0, 0, 1], [2, 2, 1]], np.int32)
    regions = describe(labels, np.zeros((2, 3, 1), np.uint8), np.zeros((2, 3, 4), np.uint8))
    assert _pairs(regions).tolist() == [[0, 0, 3, 2], [0, 0, 2, 2], [0, 0, 3, 2]]  # 0+1, 0+2, 1+2


@contrib
def test_each_method_needs_its_own_package_only(monkeypatch):
    monkeypatch.setitem(sys.modules, "skimage.segmentation", None)
    assert len(Superpixels([50], "seeds").propose(planted(PLACES[0]))[0]) > 0

import hashlib
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest

from detpipe.proposals import OpenCVSelectiveSearch
from detpipe.proposals.opencv_selective_search import MODES
from detpipe.support.errors import DataError, UsageError

from .needs import PLACES, contrib, planted
from .recall import recall
from .source_checks import (
    finds_planted_objects,
    is_the_same_every_time,
    settings_make_the_source_again,
    takes_any_image,
)

PROGRAM = """
from proposals.test_opencv_selective_search import digest
print(digest())
"""


def digest() -> str:
    image = np.random.default_rng(0).integers(0, 256, (24, 32, 3)).astype(np.uint8).repeat(3, axis=0).repeat(3, axis=1)
    boxes, scores = OpenCVSelectiveSearch().propose(image)
    return f"{len(boxes)} {hashlib.sha256(boxes.tobytes() + scores.tobytes()).hexdigest()}"


@contrib
@pytest.mark.parametrize("mode", MODES)
def test_planted_objects_are_found(mode):
    finds_planted_objects(OpenCVSelectiveSearch(mode))


@contrib
def test_odd_images():
    takes_any_image(OpenCVSelectiveSearch())
    takes_any_image(OpenCVSelectiveSearch("single", 1, min_size=0, max_boxes=3))


@contrib
def test_the_same_every_time():
    is_the_same_every_time(OpenCVSelectiveSearch)
    settings_make_the_source_again(OpenCVSelectiveSearch("quality", 100, 50, 0.6, 99, 6, 3))


@contrib
def test_two_processes_order_boxes_alike():
    """OpenCV itself draws its order from the clock."""
    tests = Path(__file__).resolve().parents[1]
    told = subprocess.run([sys.executable, "-c", PROGRAM], cwd=tests, capture_output=True, text=True, check=True).stdout
    assert told.strip() == digest()
    assert int(told.split()[0]) > 100


@contrib
def test_all_of_opencvs_boxes_are_there():
    image = planted(PLACES[0])
    search = cv2.ximgproc.segmentation.createSelectiveSearchSegmentation()
    search.setBaseImage(np.ascontiguousarray(image[:, :, ::-1]))
    search.switchToSelectiveSearchFast(150, 150, 0.8)
    theirs = {(x, y, x + w, y + h) for x, y, w, h in np.asarray(search.process()).tolist()}
    ours, _ = OpenCVSelectiveSearch(max_boxes=None, min_size=0).propose(image)
    assert {tuple(map(int, box)) for box in ours.tolist()} == theirs
    other, _ = OpenCVSelectiveSearch(max_boxes=None, min_size=0, seed=1).propose(image)
    assert not np.array_equal(ours, other)
    assert {tuple(map(int, box)) for box in other.tolist()} == theirs


@contrib
def test_modes_from_few_to_many_boxes():
    image = np.random.default_rng(1).integers(0, 256, (20, 24, 3)).astype(np.uint8).repeat(4, axis=0).repeat(4, axis=1)
    counts = [len(OpenCVSelectiveSearch(mode, max_boxes=None).propose(image)[0]) for mode in MODES]
    assert 0 < counts[0] < counts[1] < counts[2]


@contrib
def test_an_image_that_is_too_small():
    with pytest.raises(
        DataError, match="7 x 9 pixels is too small for opencv_selective_search, which needs at least 8"
    ):
        OpenCVSelectiveSearch().propose(np.zeros((9, 7, 3), np.uint8))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mode": "fats"}, "mode must be one of single, fast, quality, got 'fats'.*did you mean 'fast'"),
        ({"scale": 0}, "expected scale and increment of at least 1.* scale=0"),
        ({"increment": 0}, "increment=0"),
        ({"sigma": 0}, "sigma=0"),
        ({"sigma": float("inf")}, "sigma=inf"),
        ({"seed": -1}, "seed=-1"),
        ({"max_boxes": 0}, "max_boxes must be positive or null, got 0"),
        ({"min_size": -1}, "min_size must be 0 or more pixels, got -1"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message) as caught:
        OpenCVSelectiveSearch(**arguments)
    assert "\n" not in str(caught.value)


def test_without_the_extra_modules_the_package_to_install_is_named(monkeypatch):
    monkeypatch.delattr(cv2, "ximgproc", raising=False)
    with pytest.raises(
        UsageError, match=r"^opencv_selective_search needs OpenCV's extra modules .*opencv-contrib-python-headless"
    ):
        OpenCVSelectiveSearch()


@contrib
def test_recall(shared_data):
    assert recall(OpenCVSelectiveSearch(), "bccd", shared_data) > 0.7

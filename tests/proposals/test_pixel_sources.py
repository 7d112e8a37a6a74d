"""What every source that works on pixels must do: a table of them, and of the arguments that each refuses."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import cv2
import numpy as np
import pytest

from detpipe.proposals import EdgeBoxes, ImageProposals, OpenCVSelectiveSearch, SelectiveSearch, Superpixels
from detpipe.proposals.opencv_selective_search import MODES
from detpipe.proposals.selective_search import COLOR_SPACES
from detpipe.proposals.superpixels import METHODS
from detpipe.support.errors import DataError, UsageError

from .needs import (
    PLACES,
    best_overlap,
    boxes_are_sound,
    contrib,
    is_the_same_every_time,
    odd_images,
    planted,
    scikit_image,
)
from .recall import recall

slic, seeds = partial(Superpixels, method="slic"), partial(Superpixels, method="seeds")
SOURCES: dict[str, tuple[Any, Callable[..., ImageProposals]]] = {
    "selective_search": (scikit_image, SelectiveSearch),
    "opencv_selective_search": (contrib, OpenCVSelectiveSearch),
    "slic": (scikit_image, slic),
    "seeds": (contrib, seeds),
    "edge_boxes": (contrib, EdgeBoxes),
}


def table(*names: str, **rows: Any) -> pytest.MarkDecorator:
    """A case for each of some sources, or for each of a source's lists of arguments."""
    cases = [pytest.param(SOURCES[name][1], marks=SOURCES[name][0], id=name) for name in names]
    for name, given in rows.items():
        marks, make = SOURCES[name]
        cases += [pytest.param(partial(make, **some), marks=marks, id=f"{name}-{some}") for some in given]
    return pytest.mark.parametrize("make", cases)


def test_all_methods_are_tested():
    assert METHODS == ("slic", "seeds")


@table(
    *("slic", "seeds", "edge_boxes"),
    selective_search=[{}, *({"color_spaces": [space], "strategies": [["size", "fill"]]} for space in COLOR_SPACES)],
    opencv_selective_search=[{"mode": mode} for mode in MODES],
)
def test_planted_objects_are_found(make):
    """Rectangles and ellipses in several places, on several grounds."""
    for seed, box in enumerate(PLACES):
        for shape in ("rectangle", "ellipse"):
            boxes, _ = make().propose(planted(box, shape, seed))
            assert best_overlap(boxes, box) > 0.8, (shape, box)


@table(
    selective_search=[
        {},
        {"color_spaces": ["gray"], "scales": [1, 500], "min_region": 1, "max_boxes": 5, "min_size": 0},
    ],
    opencv_selective_search=[{}, {"mode": "single", "scale": 1, "min_size": 0, "max_boxes": 3}],
    slic=[{}, {"segments": [2, 3000], "min_size": 0, "max_boxes": 7}],
    seeds=[{}, {"segments": [2, 3000], "min_size": 0, "max_boxes": 7}],
    edge_boxes=[
        {},
        {"min_size": 0, "max_boxes": None, "max_aspect_ratio": 1, "sigma": 0.5, "min_strength": 0.01},
    ],
)
def test_odd_images_do_no_harm(make):
    """Boxes, if any, lie inside the image, each once, best first, no smaller or more than asked for."""
    source = make()
    for name, image in odd_images().items():
        if min(image.shape[:2]) < source.smallest_image:
            continue
        before = image.copy()
        boxes, scores = source.propose(image)
        assert np.array_equal(image, before), name
        boxes_are_sound(boxes, scores, image, source)


@table(
    "selective_search",
    "opencv_selective_search",
    "edge_boxes",
    slic=[{"segments": [50, 100]}],
    seeds=[{"segments": [50]}],
)
def test_the_same_every_time(make):
    is_the_same_every_time(make)


grown = {"segments": [40], "compactness": 5.0, "pairs": False, "max_boxes": 70, "min_size": 6, "seed": 2}


@table(
    selective_search=[
        {
            "color_spaces": ["rgb", "gray"],
            "scales": [30, 80.5],
            "strategies": [["color"], ["fill", "size"]],
            "min_region": 20,
            "sigma": 0.6,
            "max_boxes": 99,
            "min_size": 2,
        }
    ],
    opencv_selective_search=[
        {"mode": "quality", "scale": 100, "increment": 50, "sigma": 0.6, "max_boxes": 99, "min_size": 6, "seed": 3}
    ],
    slic=[grown],
    seeds=[grown],
    edge_boxes=[
        {
            "alpha": 0.6,
            "beta": 0.8,
            "sigma": 1.5,
            "min_strength": 0.1,
            "max_aspect_ratio": 2.0,
            "max_boxes": 77,
            "min_size": 6,
        }
    ],
)
def test_settings_make_the_source_again(make):
    """JSON holds all that is needed to make the same boxes."""
    source = make()
    stored = json.loads(json.dumps(source.settings))
    again = type(source)(**stored)
    assert again.settings == stored
    assert stored.items() >= json.loads(json.dumps(make.keywords)).items()
    image = planted(PLACES[2])
    assert np.array_equal(again.propose(image)[0], source.propose(image)[0])


@table("selective_search", slic=[{"segments": [50]}])
def test_the_seed_changes_the_order_alone(make):
    image = planted(PLACES[0])
    one, other = (make(max_boxes=None, seed=seed).propose(image)[0] for seed in (0, 1))
    assert not np.array_equal(one, other)
    assert np.array_equal(np.unique(one, axis=0), np.unique(other, axis=0))


@table(*SOURCES)
def test_an_image_that_is_too_small(make):
    least = 16 if make is EdgeBoxes else 8
    with pytest.raises(
        DataError, match=rf"{least - 1} x 40 pixels is too small for \w+, which needs at least {least} pix"
    ):
        make().propose(np.zeros((40, least - 1, 3), np.uint8))


BAD = {
    SelectiveSearch: [
        ({"color_spaces": ["hvs"]}, "color_spaces: unknown 'hvs'.*did you mean 'hsv'"),
        ({"color_spaces": []}, r"color_spaces must be a list of at least one of rgb, hsv, lab, rgi, gray; got \[\]"),
        ({"color_spaces": "hsv"}, "color_spaces must be a list .* got 'hsv'"),
        ({"strategies": []}, "strategies must be a list of at least one of color, texture, size, fill"),
        ({"strategies": [[]]}, "strategies must be a list"),
        ({"strategies": ["size"]}, "strategies must be a list .* got 'size'"),
        ({"strategies": [["size", "shape"]]}, "strategies: unknown 'shape'"),
        ({"scales": []}, "scales need at least one"),
        ({"scales": [50, 0]}, "scales must be positive"),
        ({"sigma": 0}, "sigma must be positive"),
        ({"sigma": float("nan")}, "sigma must be .* got nan"),
        ({"min_region": 0}, "min_region must be at least 1"),
        ({"seed": -1}, "seed must be at least 0"),
    ],
    OpenCVSelectiveSearch: [
        ({"mode": "fats"}, "mode must be one of single, fast, quality, got 'fats'.*did you mean 'fast'"),
        ({"scale": 0}, "scale must be at least 1"),
        ({"increment": 0}, "increment must be at least 1"),
        ({"sigma": 0}, "sigma must be positive"),
        ({"sigma": float("inf")}, "sigma must be .* got inf"),
        ({"seed": -1}, "seed must be at least 0"),
    ],
    Superpixels: [
        ({"method": "slik"}, "method must be one of slic, seeds, got 'slik'.*did you mean 'slic'"),
        ({"segments": []}, "segments need at least one"),
        ({"segments": [50, 1]}, "segments must be at least 2"),
        ({"compactness": 0}, "compactness must be positive"),
        ({"segments": [float("nan")]}, "segments must be a whole number"),
        ({"seed": -1}, "seed must be at least 0"),
    ],
    EdgeBoxes: [
        ({"alpha": 1}, "expected alpha, beta and min_strength between 0 and 1.* alpha=1,"),
        ({"alpha": 0}, "alpha=0,"),
        ({"alpha": float("nan")}, "alpha=nan"),
        ({"beta": 1.5}, "beta=1.5"),
        ({"min_strength": 0}, "min_strength=0"),
        ({"sigma": 0}, "sigma=0"),
        ({"sigma": float("nan")}, "sigma=nan"),
        ({"max_aspect_ratio": 0.5}, "max_aspect_ratio=0.5"),
    ],
}


@pytest.mark.parametrize(
    ("source", "arguments", "message"), [(source, *case) for source, own in BAD.items() for case in own]
)
def test_bad_arguments(source, arguments, message):
    with pytest.raises(ValueError, match=message) as caught:
        source(**arguments)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (SelectiveSearch, r"^selective_search needs scikit-image, .* pip install 'detpipe\[proposals\]'$"),
        (slic, r"^superpixels needs scikit-image, .* pip install 'detpipe\[proposals\]'$"),
        (seeds, r"^superpixels by SEEDS needs OpenCV's extra modules \(cv2.ximgproc\), which"),
        (
            OpenCVSelectiveSearch,
            r"^opencv_selective_search needs OpenCV's extra modules .*opencv-contrib-python-headless",
        ),
        (EdgeBoxes, r"^edge_boxes needs OpenCV's extra modules \(cv2.ximgproc\), .* pip install .*opencv-contrib"),
    ],
)
def test_what_is_missing_is_named(make, message, monkeypatch):
    monkeypatch.setitem(sys.modules, "skimage.segmentation", None)
    monkeypatch.setitem(sys.modules, "skimage", None)
    monkeypatch.delattr(cv2, "ximgproc", raising=False)
    with pytest.raises(UsageError, match=message) as caught:
        make()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("make", "data", "floor"),
    [
        pytest.param(SelectiveSearch, "coco_mini", 0.6, marks=[scikit_image, pytest.mark.slow]),
        pytest.param(OpenCVSelectiveSearch, "bccd", 0.7, marks=contrib),
        pytest.param(partial(slic, [50, 200, 800]), "bccd", 0.8, marks=scikit_image),
        pytest.param(partial(seeds, [50, 200, 800]), "coco_mini", 0.4, marks=contrib),
        pytest.param(EdgeBoxes, "coco_mini", 0.4, marks=contrib),
    ],
)
def test_recall(make, data, floor, shared_data):
    assert recall(make(), data, shared_data) > floor

import inspect
import json
import pickle
from functools import partial

import cv2
import numpy as np
import pytest

from detpipe.proposals import SOURCES, DenseGrid, SelectiveSearch, Union, make_source
from detpipe.proposals.registry import find_class, remake_source
from detpipe.support.errors import UsageError

from .needs import PLACES, contrib, planted, scikit_image

NAMES = ("selective_search", "opencv_selective_search", "superpixels", "edge_boxes", "dense_grid", "detector")
each_source = pytest.mark.parametrize(
    "name",
    [
        pytest.param("selective_search", marks=scikit_image),
        pytest.param("opencv_selective_search", marks=contrib),
        pytest.param("superpixels", marks=scikit_image),
        pytest.param("edge_boxes", marks=contrib),
        "dense_grid",
    ],
)


def test_names():
    assert tuple(SOURCES) == NAMES
    assert [find_class(name).name for name in SOURCES] == list(NAMES)


@each_source
def test_settings_hold_every_argument_but_the_pixel_format(name):
    source = pickle.loads(pickle.dumps(partial(make_source, name)))()  # as builders travel to other processes
    assert (type(source), source.name) == (SOURCES[name], name)
    arguments = dict(inspect.signature(SOURCES[name]).parameters)
    arguments.pop("pixel_format", None)
    assert list(source.settings) == list(arguments)
    defaults = {key: parameter.default for key, parameter in arguments.items()}
    assert json.loads(json.dumps(source.settings)) == json.loads(json.dumps(defaults))


@scikit_image
def test_names_joined_make_a_union():
    union = make_source("dense_grid+selective_search")
    assert isinstance(union, Union)
    assert [type(source) for source in union.sources] == [DenseGrid, SelectiveSearch]
    assert union.name == "union"


def test_a_union_of_other_settings_is_remade():
    union = Union([DenseGrid([16.0], [1.0]), Union([DenseGrid()], None, 1.0)], 77, 0.5)
    again = remake_source("union", json.loads(json.dumps(union.settings)))
    assert again.settings == union.settings
    image = planted(PLACES[0])
    assert np.array_equal(again.propose(image)[0], union.propose(image)[0])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("selective_serach", "unknown proposal source 'selective_serach'.*did you mean 'selective_search'"),
        ("", r"unknown proposal source '': expected one of selective_search, .*, or several joined by \+"),
        ("dense_grid+", "unknown proposal source ''"),
        ("dense_grid+edgeboxes", "unknown proposal source 'edgeboxes'.*did you mean 'edge_boxes'"),
        ("dense_grid + superpixels", "unknown proposal source 'dense_grid '.*did you mean 'dense_grid'"),
        ("rpn", "unknown proposal source 'rpn'"),
    ],
)
def test_unknown_names(name, message):
    with pytest.raises(UsageError, match=message) as caught:
        make_source(name)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("dense_grid", {"scale": [3]}, r"dense_grid cannot be made with the settings \{'scale': \[3\]\}: .*scale"),
        ("dense_grid", {"stride": 0}, "dense_grid cannot be made .*stride must be positive"),
        ("union", {"max_boxes": 3}, "union cannot be made with the settings .*sources"),
        ("union", {"sources": [{"source": "slow", "settings": {}}]}, "unknown proposal source 'slow'"),
        ("mine", {}, "unknown proposal source 'mine'"),
    ],
)
def test_settings_that_do_not_fit(name, settings, message):
    with pytest.raises(UsageError, match=message) as caught:
        remake_source(name, settings)
    assert "\n" not in str(caught.value)


def test_what_is_missing_is_said_by_name(monkeypatch):
    monkeypatch.delattr(cv2, "ximgproc", raising=False)
    for name in ("opencv_selective_search", "edge_boxes", "dense_grid+edge_boxes"):
        with pytest.raises(UsageError, match="needs OpenCV's extra modules"):
            make_source(name)

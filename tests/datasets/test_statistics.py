from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from detpipe.datasets import load_coco
from detpipe.datasets.resize import Resize
from detpipe.datasets.statistics import (
    box_sizes,
    cluster,
    fit,
    quantiles,
    refine,
    statistics,
    suggest_anchors,
)

from .builders import coco_content, write_coco


def test_counts_and_measures(tmp_path: Path) -> None:
    content = coco_content()
    content["annotations"][1]["iscrowd"] = 1
    content["annotations"][3]["area"] = 5000
    facts = statistics(load_coco(*write_coco(tmp_path, content)))
    assert [facts[key] for key in ("images", "boxes", "images without boxes", "crowd", "difficult")] == [3, 4, 1, 1, 0]
    assert facts["small, medium, large"] == [3, 1, 0]  # by the areas of the file
    assert facts["classes"]["cat"] == {"boxes": 2, "images": 1}
    assert facts["classes"]["owl"] == {"boxes": 1, "images": 1}
    assert facts["boxes per image"]["max"] == 2
    assert facts["image height"]["min"] == 30
    assert facts["box height / width"]["max"] == 2
    assert facts["box area / image area"]["max"] == 1
    assert facts["counts"]["boxes used"] == 4


def test_sizes_in_the_resized_image(tmp_path: Path) -> None:
    a = load_coco(*write_coco(tmp_path))
    np.testing.assert_allclose(box_sizes(a)[0], [10, 20])
    np.testing.assert_allclose(box_sizes(a, Resize(min_size=80, max_size=1000))[0], [20, 40])
    np.testing.assert_allclose(box_sizes(a, Resize(min_size=80, max_size=90))[0], [15, 30])


def test_quantiles_of_nothing_and_of_one() -> None:
    assert quantiles(np.zeros(0)) == {}
    assert quantiles(np.array([3])) == {"min": 3, "5%": 3, "25%": 3, "median": 3, "75%": 3, "95%": 3, "max": 3}


def test_clusters_are_found_where_they_are() -> None:
    values = np.array([1.0, 1.1, 0.9, 5.0, 5.2, 9.0])
    np.testing.assert_allclose(cluster(values, 3), [1, 5.1, 9])
    np.testing.assert_allclose(cluster(np.array([2.0, 2.0]), 3), [2])


def test_suggested_anchors_are_those_that_made_the_boxes() -> None:
    rng = np.random.default_rng(0)
    sizes, ratios = rng.choice([16, 64, 256], 300), rng.choice([0.5, 2.0], 300)
    sides = np.column_stack([sizes / ratios**0.5, sizes * ratios**0.5])
    found = suggest_anchors(sides, 3, 2)
    assert (found.sizes, found.ratios) == ((16, 64, 256), (0.5, 2.0))
    assert found.iou == pytest.approx(1)
    assert found.recall == 1
    assert fit(sides, (32,), (1.0,)).max() < 0.5


def test_anchors_are_moved_until_they_fit_together() -> None:
    rng = np.random.default_rng(1)
    sides = np.exp(rng.normal([3.5, 3.8], [0.8, 0.9], (3000, 2)))
    size, aspect = np.log(sides.prod(axis=1)) / 2, np.log(sides[:, 1] / sides[:, 0])
    start = cluster(size, 4), cluster(aspect, 3)
    ends = refine(sides, *start)
    before, after = (fit(sides, np.exp(s).tolist(), np.exp(r).tolist()).mean() for s, r in (start, ends))
    assert after > before + 0.005
    assert suggest_anchors(sides, 4, 3).iou == pytest.approx(after, abs=0.01)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.floats(0.5, 2000), st.floats(0.5, 2000)), min_size=1, max_size=30))
def test_anchors_are_suggested_for_any_boxes(sides: list[tuple[float, float]]) -> None:
    found = suggest_anchors(np.array(sides))
    assert 1 <= len(found.sizes) <= 4
    assert 1 <= len(found.ratios) <= 3
    assert min(found.sizes) >= 1
    assert min(found.ratios) > 0
    assert 0 < found.iou <= 1

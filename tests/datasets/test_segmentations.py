import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from detpipe.datasets import COCO, Augment, load_coco
from detpipe.datasets.augment.settings import Combine, CopyPaste
from detpipe.datasets.segmentations import draw_classes, draw_masks
from detpipe.support.errors import DataError
from detpipe.types import Segmentations

from .builders import coco_content, write_coco

PASTE = Augment(combine=Combine(copy_paste=CopyPaste(p=1.0)))


def corners(box: list[float]) -> list[float]:
    x, y, w, h = box
    return [x, y, x + w, y, x + w, y + h, x, y + h]


def outlined(**changes: Any) -> dict[str, Any]:
    """The set of `coco_content` in which every box is its own outline, the first as two halves."""
    content = coco_content()
    for record in content["annotations"]:
        record["segmentation"] = [corners(record["bbox"])]
    first = content["annotations"][0]
    x, y, w, h = first["bbox"]
    first["segmentation"] = [corners([x, y, w, h / 2]), corners([x, y + h / 2, w, h / 2])]
    return content | changes


def test_polygons_are_drawn_in_the_order_of_the_boxes(tmp_path: Path) -> None:
    path, folder = write_coco(tmp_path, outlined())
    a = load_coco(path, folder, segmentations=True)
    for index in range(len(a)):
        masks = draw_masks(a, index)
        boxes = a.boxes[a.offsets[index] : a.offsets[index + 1]]
        assert masks.shape == (len(boxes), *a.sizes[index])
        for mask, (x1, y1, x2, y2) in zip(masks, boxes, strict=True):
            expected = np.zeros_like(mask)
            expected[round(y1) : round(y2), round(x1) : round(x2)] = True
            assert (mask != expected).mean() < 0.05


@settings(max_examples=60, deadline=None)
@given(texts=st.lists(st.binary(max_size=5), max_size=8), data=st.data())
def test_any_choice_of_boxes_keeps_their_outlines(texts: list[bytes], data: st.DataObject) -> None:
    rows = data.draw(st.lists(st.sampled_from(range(len(texts))), max_size=8)) if texts else []
    packed = Segmentations.pack(texts, np.arange(len(texts)) + 7, "a.json")
    assert [packed[b] for b in range(len(packed))] == texts
    chosen = packed.take(np.array(rows, dtype=np.int64))
    assert [chosen[b] for b in range(len(chosen))] == [texts[row] for row in rows]
    assert (chosen.ids.tolist(), chosen.source) == ([row + 7 for row in rows], "a.json")
    both = Segmentations.concat([packed, chosen])
    assert [both[b] for b in range(len(both))] == texts + [texts[row] for row in rows]


def test_a_subset_of_the_images_keeps_their_masks(tmp_path: Path) -> None:
    path, folder = write_coco(tmp_path, outlined())
    a = load_coco(path, folder, segmentations=True)
    part = a.subset(np.array([1, 0]))
    for new, old in enumerate((1, 0)):
        np.testing.assert_array_equal(draw_masks(part, new), draw_masks(a, old))
    assert load_coco(path, folder).subset(np.array([1])).segmentations is None


def test_records_that_were_left_out_do_not_shift_the_others(tmp_path: Path) -> None:
    content = outlined()
    good = content["annotations"]
    bad = [
        {**good[0], "id": 900, "bbox": [1, 2, 0, 5]},  # no size
        {**good[1], "id": 901, "category_id": 999},
        {**good[2], "id": good[0]["id"]},  # an id twice
        {**good[3], "id": 903, "bbox": "none"},
        {**good[3], "id": 904, "image_id": [1]},
    ]
    for record in bad:
        record["segmentation"] = [corners([0, 0, 1, 1])]
    content["annotations"] = [bad[0], bad[1], *good[:2], bad[3], bad[4], *good[2:], bad[2]]
    path, folder = write_coco(tmp_path, content)
    a = load_coco(path, folder, "skip", segmentations=True)
    assert a.counts["boxes used"] == 4
    assert a.segmentations is not None
    first = [json.loads(a.segmentations[b])[0][:2] for b in range(4)]  # the first point of each box is its corner
    np.testing.assert_allclose(first, a.boxes[:, :2], atol=1e-4)
    assert a.segmentations.ids.tolist() == [100, 102, 101, 103]


@pytest.mark.parametrize("segmentation", [None, [], [[1, 2, 3, 4]], {"size": [40, 60], "counts": [-3, 2403]}])
def test_an_outline_that_cannot_be_read_names_its_annotation(tmp_path: Path, segmentation: Any) -> None:
    """What may be wrong with one stands in test_masks.py."""
    content = outlined()
    content["annotations"][1]["segmentation"] = segmentation
    write_coco(tmp_path, content)
    says = r"instances_train\.json: copy_paste needs .* 1 of 4 .*annotation id 101 \(image 1\.jpg\): segmentation .* cannot be"
    with pytest.raises(DataError, match=says) as caught:
        COCO(str(tmp_path), "train", "train", augment=PASTE).setup("fit")
    assert "\n" not in str(caught.value)


def test_outlines_are_only_read_where_they_are_asked_for(tmp_path: Path) -> None:
    write_coco(tmp_path, outlined())
    write_coco(tmp_path, outlined(), "val")
    for augment, split, wanted in ((Augment(), "train", False), (PASTE, "train", True), (PASTE, "val", False)):
        data = COCO(str(tmp_path), "train", "val", augment=augment)
        data.setup("fit")
        assert (data.annotations(split).segmentations is not None) == wanted  # type: ignore[arg-type]
    assert data.with_outlines("train").segmentations is not None  # asked for later
    assert data.annotations("val").segmentations is None


def test_smaller_objects_lie_over_larger_ones_and_crowds_under_both(tmp_path: Path) -> None:
    content = coco_content(((10, 20),))
    content["annotations"] = [
        {"id": 1, "image_id": 10, "category_id": 90, "bbox": [4, 2, 4, 4]},
        {"id": 2, "image_id": 10, "category_id": 7, "bbox": [0, 0, 10, 8]},
        {"id": 3, "image_id": 10, "category_id": 1, "bbox": [0, 0, 20, 10], "iscrowd": 1},
    ]
    for record in content["annotations"]:
        record["segmentation"] = [corners(record["bbox"])]
    expected = np.full((10, 20), -1)
    expected[:8, :10] = 2
    expected[2:6, 4:8] = 3
    for order in (1, -1):
        written = write_coco(tmp_path, content | {"annotations": content["annotations"][::order]})
        assert (draw_classes(load_coco(*written, segmentations=True), 0) == expected).all()

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from detpipe.datasets import COCO, Augment, load_coco
from detpipe.datasets.augment.settings import Combine, CopyPaste
from detpipe.datasets.segmentations import coco_mask, draw_masks, read_segmentations
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
    a = load_coco(path, folder)
    a = replace(a, segmentations=read_segmentations(path, a))
    for index in range(len(a)):
        masks = draw_masks(a, index)
        boxes = a.boxes[a.offsets[index] : a.offsets[index + 1]]
        assert masks.shape == (len(boxes), *a.sizes[index])
        for mask, (x1, y1, x2, y2) in zip(masks, boxes, strict=True):
            expected = np.zeros_like(mask)
            expected[round(y1) : round(y2), round(x1) : round(x2)] = True
            assert (mask != expected).mean() < 0.05


def test_run_lengths_in_both_writings(tmp_path: Path) -> None:
    content = outlined()
    plain, packed = content["annotations"][1], content["annotations"][3]
    plain["segmentation"] = {"size": [40, 60], "counts": [200, 300, 1900]}  # 40 pixels a column
    packed["segmentation"] = {"size": [40, 60], "counts": "P[2"}
    path, folder = write_coco(tmp_path, content)
    a = load_coco(path, folder)
    s = read_segmentations(path, a)
    assert np.diff(s.runs).tolist() == [0, 0, 3, 1]
    masks = draw_masks(replace(a, segmentations=s), 1)
    expected = np.zeros(2400, dtype=bool)
    expected[200:500] = True
    assert (masks[0] == expected.reshape(60, 40).T).all()
    assert not masks[1].any()  # background only


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_subset_keeps_the_outlines_of_its_boxes(data: st.DataObject) -> None:
    outlines = data.draw(
        st.lists(
            st.one_of(
                st.lists(st.lists(st.integers(0, 99), min_size=6, max_size=10), min_size=1, max_size=3),
                st.lists(st.integers(0, 99), min_size=1, max_size=5).map(tuple),
            ),
            max_size=8,
        )
    )
    outlines = [one if isinstance(one, tuple) else [p[: len(p) // 2 * 2] for p in one] for one in outlines]
    from detpipe.datasets.segmentations import _packed

    def pack(chosen: list) -> Segmentations:
        empty = np.zeros(0, dtype=np.int32)
        return _packed(
            [
                ([], np.array(one, dtype=np.int32)) if isinstance(one, tuple) else ([np.array(p) for p in one], empty)
                for one in chosen
            ]
        )

    rows = data.draw(st.lists(st.sampled_from(range(len(outlines))), max_size=8)) if outlines else []
    got, want = pack(outlines).take(np.array(rows, dtype=np.int64)), pack([outlines[row] for row in rows])
    for name in ("points", "corners", "polygons", "counts", "runs"):
        np.testing.assert_array_equal(getattr(got, name), getattr(want, name))
        assert getattr(got, name).dtype == getattr(want, name).dtype


def test_a_subset_of_the_images_keeps_their_masks(tmp_path: Path) -> None:
    path, folder = write_coco(tmp_path, outlined())
    a = load_coco(path, folder)
    a = replace(a, segmentations=read_segmentations(path, a))
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
    a = load_coco(path, folder, "skip")
    assert a.counts["boxes used"] == 4
    s = read_segmentations(path, a)
    first = s.points[s.corners[s.polygons[:-1]]]  # the first point of each box is its corner
    np.testing.assert_allclose(first, a.boxes[:, :2], atol=1e-4)


@pytest.mark.parametrize(
    ("segmentation", "message"),
    [
        (
            None,
            "annotation id 101 .image 1.jpg.: segmentation None cannot be read .expected polygons, or counts and size",
        ),
        ([], "annotation id 101 .image 1.jpg.: segmentation .* cannot be read .expected polygons"),
        ([[1, 2, 3, 4]], "annotation id 101 .*a polygon is at least 3 points"),
        ([[1, 2, 3, 4, 5, 1e9]], "annotation id 101 .*a polygon is at least 3 points"),
        ([["a"] * 6], "annotation id 101 "),
        (
            {"size": [9, 9], "counts": [81]},
            r"annotation id 101 .*its size \[height, width\] is \[9, 9\], that of the image \[40, 60\]",
        ),
        ({"size": [40, 60], "counts": [-3, 2403]}, "counts must be whole numbers that sum up to the 2400 pixels"),
        ({"size": [40, 60], "counts": "~"}, "is no character of a run length"),
        ({"counts": [2400]}, "annotation id 101 .*'size'"),
        (7, "segmentation 7 cannot be read .expected polygons, or counts and size"),
    ],
)
def test_an_outline_that_cannot_be_read_names_its_annotation(tmp_path: Path, segmentation: Any, message: str) -> None:
    content = outlined()
    content["annotations"][1]["segmentation"] = segmentation
    write_coco(tmp_path, content)
    data = COCO(str(tmp_path), "train", "train", augment=PASTE)
    with pytest.raises(DataError, match=rf"instances_train\.json: copy_paste needs .* 1 of 4 .*{message}") as caught:
        data.setup("fit")
    assert "\n" not in str(caught.value)


def test_a_file_that_changed_after_its_boxes_were_read(tmp_path: Path) -> None:
    content = outlined()
    path, folder = write_coco(tmp_path, content)
    a = load_coco(path, folder)
    content["annotations"][0]["bbox"][0] += 1
    path.write_text(json.dumps(content))
    with pytest.raises(DataError, match="its boxes are not those that were read before"):
        read_segmentations(path, a)


def test_outlines_are_only_read_where_they_are_asked_for(tmp_path: Path) -> None:
    write_coco(tmp_path, outlined())
    write_coco(tmp_path, outlined(), "val")
    for augment, split, wanted in ((Augment(), "train", False), (PASTE, "train", True), (PASTE, "val", False)):
        data = COCO(str(tmp_path), "train", "val", augment=augment)
        data.setup("fit")
        assert (data.annotations(split).segmentations is not None) == wanted  # type: ignore[arg-type]


def test_the_outlines_of_coco_itself(shared_data: Path) -> None:
    """Drawn one by one and laid over each other, they are the mask that is drawn from the file."""
    root = shared_data / "coco_mini"
    data = COCO(str(root), augment=PASTE)
    data.setup("fit")
    a = data.annotations("train")
    assert a.segmentations is not None
    assert (np.diff(a.segmentations.runs) > 0).sum() == a.iscrowd.sum()  # run lengths are those of crowds
    records = json.loads((root / "annotations" / "instances_train2017.json").read_text())["annotations"]
    labels, gaps = dict.fromkeys(a.category_ids, 1), []
    for index in range(len(a)):
        masks, crowd = draw_masks(a, index), a.iscrowd[a.offsets[index] : a.offsets[index + 1]]
        own = [one for one in records if one["image_id"] == a.image_ids[index]]
        drawn = coco_mask(own, tuple(a.sizes[index].tolist()), labels)
        different = (masks[~crowd].any(0) != (drawn == 1)).sum()
        assert (
            different <= 0.01 * (drawn == 1).sum() + 4
        )  # corners are kept in float32: at edges a pixel may go either way
        for mask, box in zip(masks, a.boxes[a.offsets[index] : a.offsets[index + 1]], strict=True):
            if mask.any():
                rows, columns = np.nonzero(mask)
                found = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
                gaps.append(np.abs(np.subtract(found, box)).max())
    assert np.percentile(gaps, 95) <= 2  # a tip may be too thin for a pixel

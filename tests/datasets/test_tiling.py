from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from detpipe.datasets import COCO
from detpipe.datasets.formats.coco import COCOFiles
from detpipe.datasets.masks import open_masks
from detpipe.datasets.tiling import Tiling

BOXES = [
    [5, 5, 20, 10],
    [50, 30, 40, 20],
    [90, 0, 8, 8],
    [60, 55, 30, 5],
]  # x, y, width, height in an image of 100 x 60


@pytest.fixture
def coco(tmp_path: Path) -> Path:
    """One image, each pixel of which tells its column and row, and a small one without objects."""
    y, x = np.mgrid[:60, :100]
    Image.fromarray(np.stack([x, y, x + y], axis=2).astype(np.uint8)).save(tmp_path / "wide.png")
    Image.new("RGB", (30, 20)).save(tmp_path / "small.png")
    images = [{"id": 7, "file_name": "wide.png", "width": 100, "height": 60}]
    images += [{"id": 8, "file_name": "small.png", "width": 30, "height": 20}]
    boxes = [{"id": k, "image_id": 7, "category_id": 1, "bbox": box} for k, box in enumerate(BOXES, start=1)]
    content = {"images": images, "annotations": boxes, "categories": [{"id": 1, "name": "cat"}]}
    (tmp_path / "instances.json").write_text(json.dumps(content))
    return tmp_path


def data(root: Path, tiling: Tiling | None, **more: object) -> COCO:
    files = COCOFiles("instances.json", ".")
    return COCO(str(root), files, files, tiles=tiling, **more)


def test_tiles_have_their_part_of_pixels_and_objects(coco):
    split = data(coco, Tiling(size=60, overlap=0.2)).dataset("val")
    a = split.annotations
    assert a.windows is not None
    assert a.windows.tolist() == [[0, 0, 60, 60], [40, 0, 100, 60], [0, 0, 30, 20]]
    assert (a.sizes.tolist(), a.image_ids.tolist()) == ([[60, 60], [60, 60], [20, 30]], [1, 2, 3])
    image, target = split[(0, 1)]
    assert image.shape == (3, 60, 60)
    assert (int(image[0, 0, 0]), int(image[1, 5, 3])) == (40, 5)  # its first column is the 40th of the file
    assert target["boxes"].tolist() == [[10, 30, 50, 50], [50, 0, 58, 8], [20, 55, 50, 60]]
    assert target["difficult"].tolist() == [False, False, False]
    _, target = split[(0, 0)]
    assert target["boxes"].tolist() == [[5, 5, 25, 15], [50, 30, 60, 50]]
    assert target["difficult"].tolist() == [False, True]  # a quarter of the second is seen
    assert target["area"].tolist() == [200, 200]
    assert len(split[(0, 2)][1]["boxes"]) == 0
    assert a.subset(np.array([2, 0])).windows.tolist() == [[0, 0, 30, 20], [0, 0, 60, 60]]


@pytest.mark.parametrize(("visible", "difficult"), [(0.25, False), (0.26, True)])
def test_what_is_hardly_visible_is_neither_object_nor_background(visible, difficult, coco):
    _, target = data(coco, Tiling(60, 0.2, visible)).dataset("val")[(0, 0)]
    assert target["difficult"].tolist() == [False, difficult]


def test_tiles_without_objects_are_left_out_on_request(coco):
    split = data(coco, Tiling(size=25, overlap=0.0, empty=False)).annotations("val")
    assert len(split) < len(data(coco, Tiling(size=25, overlap=0.0)).annotations("val"))
    own = [slice(*split.offsets[k : k + 2]) for k in range(len(split))]
    assert all((~split.difficult[rows]).any() for rows in own)
    assert len(data(coco, None).annotations("val")) == 2


def test_parts_of_a_split_are_cut_too(coco):
    whole = data(coco, Tiling(60), split={"val": 0.5})
    assert {len(whole.annotations("train")), len(whole.annotations("val"))} == {1, 2}


def test_masks_of_tiles_are_made_of_their_boxes(coco):
    assert open_masks(data(coco, Tiling(60)), "val").source.endswith("tiles have boxes only")


def test_what_does_not_go_with_tiles_is_refused(coco):
    with pytest.raises(ValueError, match="proposals of a store are of whole images"):
        data(coco, Tiling(60), proposals={"val": "x.safetensors"})
    with pytest.raises(ValueError, match=r"tiles: expected size >= 1, overlap in 0 to \.9 and visible in"):
        Tiling(size=0)

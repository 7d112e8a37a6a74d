from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as reference_masks
from pycocotools.coco import COCO as Reference

from detpipe.datasets import COCO, VOC
from detpipe.datasets.masks import majority_mask, mask_of_boxes, open_masks, voc_mask
from detpipe.datasets.segmentations import check_segmentations, draw_masks, run_lengths
from detpipe.demo import Demo, DemoScenes
from detpipe.regions.superpixels import Segmentation, Segmenter
from detpipe.support.errors import DataError
from detpipe.types import Segmentations, Target

from .builders import annotations, coco_content, png, voc_object, write_coco, write_voc


def write_png(path: Path, values: np.ndarray, mode: str = "P") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(values.astype(np.uint8))
    if mode == "P":
        image.putpalette(np.random.default_rng(0).integers(0, 256, 768).astype(np.uint8).tobytes())
    image.convert(mode).save(path)
    return path


def polygon(x1: float, y1: float, x2: float, y2: float) -> list[list[float]]:
    return [[x1, y1, x2, y1, x2, y2, x1, y2]]


def drawn(segmentation: Any, size: tuple[int, int]) -> np.ndarray:
    """The mask of one object, the fifth of its file."""
    outlines = Segmentations.pack([json.dumps(segmentation).encode()], np.array([5]), "a.json")
    a = annotations(Path(), [[0, 0, *size[::-1]]], [0, 1], [size], segmentations=outlines)
    return draw_masks(a, 0)[0]


def test_voc_values_are_classes_and_255_is_ignored(tmp_path: Path) -> None:
    values = np.array([[0, 1, 2], [255, 2, 0]])
    for mode in ("P", "L"):
        path = write_png(tmp_path / f"{mode}.png", values, mode)
        assert voc_mask(path, (2, 3), 2).tolist() == [[0, 1, 2], [-1, 2, 0]]


@pytest.mark.parametrize("bits", [2, 4])
def test_gray_of_a_few_bits_is_not_spread(tmp_path: Path, bits: int) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(png((1, 4), bits, 0, {2: b"\0\x1b", 4: b"\0\x01\x23"}[bits]))
    assert voc_mask(path, (1, 4), 255).tolist() == [[0, 1, 2, 3]]


@pytest.mark.parametrize(
    ("name", "size", "classes", "message"),
    [
        ("a.png", (1, 2), 2, r"a\.png: has the class 3, expected 0 \(background\) to 2, or 255"),
        ("a.png", (2, 1), 3, r"a\.png: the mask is 2 x 1 pixels, but its image 1 x 2"),
        ("gone.png", (1, 2), 2, r"gone\.png: no such image file"),
        ("rgb.png", (1, 2), 2, r"rgb\.png: expected a palette or gray PNG, .* got mode 'RGB'"),
        ("text.png", (1, 2), 2, r"text\.png: cannot be decoded as an image"),
        ("cut.png", (1, 2), 3, r"cut\.png: cannot be decoded as an image"),
    ],
)
def test_voc_masks_that_cannot_be_used(
    tmp_path: Path, name: str, size: tuple[int, int], classes: int, message: str
) -> None:
    path = write_png(tmp_path / "a.png", np.array([[0, 3]]))
    write_png(tmp_path / "rgb.png", np.zeros((1, 2)), "RGB")
    (tmp_path / "text.png").write_text("no image")
    (tmp_path / "cut.png").write_bytes(path.read_bytes()[:60])
    with pytest.raises(DataError, match=message):
        voc_mask(tmp_path / name, size, classes)


def test_masks_of_a_folder_in_voc_layout(tmp_path: Path) -> None:
    root = write_voc(tmp_path, {"a": [voc_object()], "b": [voc_object("dog")]}, "val")
    data = VOC(str(root))
    assert open_masks(data, "val").source.endswith("has no folder SegmentationClass")
    values = np.zeros((40, 60), int)
    values[3:9, 5:20] = 8
    write_png(root / "SegmentationClass" / "a.png", values)
    with pytest.raises(DataError, match=r"SegmentationClass/b\.png: no such mask, and 0 more of 2 .*Segmentation/val"):
        open_masks(data, "val")
    write_png(root / "SegmentationClass" / "b.png", values * 0)
    masks = open_masks(data, "val")
    assert masks.source == f"segmentation masks of {root} (SegmentationClass)"
    image, target = data.dataset("val")[(0, 0)]
    assert (masks.read(image, target) == values).all()
    # the list of images with masks as the split
    (root / "ImageSets" / "Segmentation").mkdir()
    (root / "ImageSets" / "Segmentation" / "val.txt").write_text("a\n")
    (root / "SegmentationClass" / "b.png").unlink()
    assert "SegmentationClass" in open_masks(VOC(str(root), val="ImageSets/Segmentation/val.txt"), "val").source


def test_masks_of_several_years(tmp_path: Path) -> None:
    write_voc(tmp_path / "VOC2012", {"a": [voc_object()]}, "val")
    write_png(tmp_path / "VOC2012" / "SegmentationClass" / "a.png", np.full((40, 60), 255))
    data = VOC(str(tmp_path), val="2012:val")
    masks = open_masks(data, "val")
    assert (masks.read(*data.dataset("val")[(0, 0)]) == -1).all()


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
@pytest.mark.parametrize("split", ["train2017", "val2017"])
def test_real_segmentations_are_decoded_as_by_pycocotools(shared_data: Path, split: str) -> None:
    data = COCO(str(shared_data / "coco_mini"), val=split)
    masks = open_masks(data, "val")
    assert masks.source == f"segmentations of {shared_data / 'coco_mini' / 'annotations' / f'instances_{split}.json'}"
    check_segmentations(data.with_outlines("val"))
    reference = Reference(str(shared_data / "coco_mini" / "annotations" / f"instances_{split}.json"))
    order = sorted(reference.getCatIds())
    dataset = data.dataset("val")
    kinds = set()
    for row in range(0, len(dataset), 3):
        target = dataset.target(row)
        height, width = data.annotations("val").sizes[row].tolist()
        found = masks.read(torch.zeros(3, height, width, dtype=torch.uint8), target)
        covers = [(one, reference.annToMask(one)) for one in reference.imgToAnns[target["image_id"]]]
        expected = np.zeros((height, width), int)
        for one, cover in covers:
            kinds.add(type(one["segmentation"]))
            if one["iscrowd"]:
                expected[cover > 0] = -1
        for one, cover in sorted(covers, key=lambda pair: -int(pair[1].sum())):
            if not one["iscrowd"]:
                expected[cover > 0] = order.index(one["category_id"]) + 1
        assert (found == expected).all()
    assert list in kinds


@pytest.mark.parametrize(
    ("segmentation", "reason"),
    [
        ([[1, 2, 3]], "a polygon is at least 3 points x, y"),
        ([[1, 2, 3, 4, 5, 6, 7]], "a polygon is at least 3 points x, y"),
        ([[1, 2, 3, 4, 5, None]], "a polygon is at least 3 points x, y"),
        ([[1, 2, 3, 4, 5, 1e9]], "each within 100000 pixels"),
        ([["a"] * 6], "could not convert string"),
        ([], "expected polygons, or counts and size"),
        ("polygon", "expected polygons, or counts and size"),
        ({"size": [10, 20]}, "'counts'"),
        ({"size": [2, 3], "counts": [0, 6]}, r"its size \[height, width\] is \[2, 3\], that of the image \[10, 20\]"),
        ({"size": [10, 20], "counts": [0, 6]}, "sum up to the 200 pixels"),
        ({"size": [10, 20], "counts": [-6, 206]}, "sum up to the 200 pixels"),
        ({"size": [10, 20], "counts": [0.5, 199.5]}, "counts must be whole numbers"),
        ({"size": [10, 20], "counts": "12"}, "sum up to the 200 pixels"),
        ({"size": [10, 20], "counts": "1 2"}, "' ' is no character of a run length"),
        ({"size": [10, 20], "counts": "1oooooooooooo"}, "'o' is no character of a run length"),
        ({"size": [10, 20], "counts": "1o"}, "it ends in the middle of a run length"),
    ],
)
def test_segmentations_that_cannot_be_used(segmentation: Any, reason: str) -> None:
    match = rf"a\.json: annotation id 5 \(image 0\.jpg\): segmentation .* cannot be read \(.*{reason}"
    with pytest.raises(DataError, match=match):
        drawn(segmentation, (10, 20))


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
def test_run_lengths_are_those_of_pycocotools() -> None:
    random = np.random.default_rng(0)
    for density in (0.0, 0.03, 0.5, 1.0):
        cover = (random.random((50, 37)) < density).astype(np.uint8)
        counts = reference_masks.encode(np.asfortranarray(cover))["counts"].decode()
        segmentation = {"size": [50, 37], "counts": counts}
        assert (drawn(segmentation, (50, 37)) == cover).all()
        segmentation["counts"] = run_lengths(counts)
        assert (drawn(segmentation, (50, 37)) == cover).all()


def test_masks_of_a_coco_file(tmp_path: Path) -> None:
    content = coco_content()
    for annotation in content["annotations"]:
        x, y, width, height = annotation["bbox"]
        annotation["segmentation"] = polygon(x, y, x + width, y + height)
    write_coco(tmp_path, content, "val2017")
    data = COCO(str(tmp_path))
    masks, dataset = open_masks(data, "val"), data.dataset("val")
    assert masks.source.startswith("segmentations of ")
    mask = masks.read(*dataset[(0, 0)])
    assert (mask[2:22, 1:11] == 2).all()
    assert mask[30, 50] == 0
    assert not masks.read(*dataset[(0, 2)]).any()  # an image without objects
    content["annotations"][1]["segmentation"] = [[1, 2]]  # of the second image
    data = COCO(str(tmp_path))
    write_coco(tmp_path, content, "val2017")
    with pytest.raises(DataError, match=r"instances_val2017\.json: annotation id 101 .* cannot be read"):
        open_masks(data, "val").read(*dataset[(0, 1)])
    del content["annotations"][1]["segmentation"]
    data = COCO(str(tmp_path))
    write_coco(tmp_path, content, "val2017")
    with pytest.raises(DataError, match=r"instances_val2017\.json: annotation id 101 has no segmentation, but others"):
        open_masks(data, "val")
    for annotation in content["annotations"]:
        annotation.pop("segmentation", None)
    path, _ = write_coco(tmp_path, content, "val2017")
    data = COCO(str(tmp_path))
    assert "segmentation" not in json.dumps(content)
    masks = open_masks(data, "val")
    assert masks.source == (
        f"superpixel-majority masks of boxes (400 SLIC superpixels an image): {path} has no segmentations"
    )


def test_majority_is_what_a_loop_counts() -> None:
    random = np.random.default_rng(0)
    for _ in range(20):
        regions = random.integers(0, 6, (4, 5)).repeat(4, 0).repeat(4, 1)
        low = random.uniform(-2, 12, (5, 2))
        boxes = np.concatenate([low, low + random.uniform(1, 12, (5, 2))], axis=1)
        labels = random.integers(1, 4, 5)
        expected = np.zeros_like(regions)
        for region in np.unique(regions):
            places = np.argwhere(regions == region)
            best, area_of_best = 0, np.inf
            for (x1, y1, x2, y2), label in zip(boxes, labels, strict=True):
                covered = sum(x1 <= x + 0.5 < x2 and y1 <= y + 0.5 < y2 for y, x in places)
                area = (x2 - x1) * (y2 - y1)
                if covered * 2 > len(places) and (covered, -area) > (best, -area_of_best):
                    best, area_of_best = covered, area
                    expected[regions == region] = label
        assert (majority_mask(regions, boxes, labels) == expected).all()


def test_exactly_half_is_background_and_no_box_leaves_all_of_it() -> None:
    regions = np.zeros((2, 4), int)
    assert not majority_mask(regions, np.array([[0.0, 0, 2, 2]]), np.array([1])).any()
    assert (majority_mask(regions, np.array([[0.0, 0, 2.6, 2]]), np.array([1])) == 1).all()
    assert not majority_mask(regions, np.zeros((0, 4)), np.zeros(0, int)).any()


def test_masks_of_boxes(tmp_path: Path) -> None:
    data = Demo(str(tmp_path / "demo"), scenes=DemoScenes(train=1, val=2, size=64))
    dataset = data.dataset("val")
    masks, whole = open_masks(data, "val"), open_masks(data, "val", "boxes")
    assert masks.source == "superpixel-majority masks of boxes (400 SLIC superpixels an image): Demo has boxes only"
    assert whole.source == "boxes: as asked for"
    seen = 0
    for row in range(2):
        image, target = dataset[(0, row)]
        mask, box_mask = masks.read(image, target), whole.read(image, target)
        assert mask.shape == box_mask.shape == (64, 64)
        regions = Segmenter(Segmentation(400))(image)
        for region in np.unique(regions):
            assert len(np.unique(mask[regions == region])) == 1
        assert (mask == box_mask).mean() > 0.85
        for (x1, y1, x2, y2), label in zip(target["boxes"].int().tolist(), target["labels"].tolist(), strict=True):
            assert box_mask[(y1 + y2) // 2, (x1 + x2) // 2] > 0
            seen += int((box_mask[y1:y2, x1:x2] == label).mean() > 0.5)
    assert seen


def test_crowds_are_ignored() -> None:
    target = Target(
        boxes=torch.tensor([[0.0, 0, 8, 8], [0, 0, 4, 4]]),
        labels=torch.tensor([3, 2]),
        iscrowd=torch.tensor([True, False]),
    )
    mask = mask_of_boxes(None, torch.zeros(3, 8, 12, dtype=torch.uint8), target)
    assert (mask[:4, :4] == 2).all()
    assert (mask[4:, :8] == -1).all()
    assert (mask[:, 8:] == 0).all()


def test_an_unknown_kind(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="kind must be 'auto', 'superpixels' or 'boxes', got 'polygons'"):
        open_masks(Demo(str(tmp_path)), "val", "polygons")  # type: ignore[arg-type]

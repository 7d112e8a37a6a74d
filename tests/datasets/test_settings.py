"""Settings out of range, refused where they are made, by their names and values."""

from __future__ import annotations

import re
from typing import Any

import pytest

from detpipe.datasets import COCO, VOC, YOLO, Augment, ImageFolder, Loader, PixelType, Resize, Sampling, Shards, Views
from detpipe.datasets.augment.settings import (
    Combine,
    CopyPaste,
    Degrade,
    MixUp,
    Mosaic,
    Photometric,
    SafeCrop,
    Transform,
)
from detpipe.datasets.classes import Classes
from detpipe.datasets.shards.remote import ShardCache
from detpipe.datasets.tiling import Tiling
from detpipe.demo import DemoScenes
from detpipe.support.errors import UsageError
from detpipe.types import PixelFormat

SPLIT, RANGE, LIMITS = {"root": "x"}, "must be [smallest, largest] within", "range must be null, 'dtype' or"
ONE_OF_BOTH = "must give one of repeat_factor"
# what is made, its arguments, and what the message says
CASES: list[tuple[Any, dict[str, Any], str]] = [
    (Augment, {"flip": 1.5}, "flip must be in 0..1, got 1.5"),
    (Augment, {"color": -0.1}, "color must be in 0..1"),
    (Augment, {"scale_jitter": (2.0, 0.5)}, f"scale_jitter {RANGE}"),
    (Augment, {"scale_jitter": (0.0, 1.0)}, f"scale_jitter {RANGE}"),
    (COCO, {**SPLIT, "augment": Augment(transforms=(Transform("Affine", {"rotat": 3}),))}, "Affine has no argument 'rotat'"),
    *[(YOLO, {**SPLIT, "channels": 4, "augment": augment}, message) for augment, message in (
        (Augment(color=0.4), "augment.color is for RGB images, but channels is 4; set it to 0"),
        (Augment(photometric=Photometric()), "augment.photometric is for RGB images, but channels is 4; set it to null"),
        (Augment(degrade=Degrade(jpeg=0.1)), "augment.degrade.jpeg is for RGB images, but channels is 4; set it to 0"),
        (Augment(transforms=(Transform("HueSaturationValue"),)), "HueSaturationValue does not take images of 4 channels"),
    )],
    (Mosaic, {"p": -0.1}, "mosaic.p must be in 0..1"),
    (Mosaic, {"center": (0.0, 0.5)}, f"mosaic.center {RANGE} 0.1..0.9"),
    (Mosaic, {"zoom": (0.5, 1.0)}, f"mosaic.zoom {RANGE}"),
    (MixUp, {"p": 2.0}, "mixup.p must be in 0..1"),
    (MixUp, {"alpha": 0.0}, "mixup.alpha must lie in 0.1..1000, got 0.0"),
    (MixUp, {"alpha": float("nan")}, "mixup.alpha must lie in 0.1..1000, got nan"),
    (CopyPaste, {"p": 2.0}, "copy_paste.p must be in 0..1"),
    (CopyPaste, {"objects": 0.0}, "copy_paste.objects must be above 0"),
    (CopyPaste, {"scale": (0.0, 1.0)}, f"copy_paste.scale {RANGE}"),
    (SafeCrop, {"p": 1.1}, "safe_crop.p must be in 0..1, got 1.1"),
    (SafeCrop, {"min_visibility": 0.0}, "safe_crop.min_visibility must be above 0"),
    (SafeCrop, {"scale": (0.0, 1.0)}, f"safe_crop.scale {RANGE} 0.05..1, got [0.0, 1.0]"),
    (SafeCrop, {"scale": (0.9, 0.3)}, f"safe_crop.scale {RANGE}"),
    (SafeCrop, {"ratio": (0.5, 20.0)}, f"safe_crop.ratio {RANGE}"),
    (SafeCrop, {"ratio": (0.5,)}, f"safe_crop.ratio {RANGE}"),
    (Resize, {"policy": "stretch"}, "policy must be 'shortest_side' or 'letterbox', got 'stretch'"),
    (Resize, {}, "max_size is missing: shortest_side needs it"),
    (Resize, {"policy": "letterbox", "max_size": 9}, "max_size must be left out for letterbox"),
    (Resize, {"min_size": 0, "max_size": 9}, "0 < min_size <= max_size, got min_size 0"),
    (Resize, {"min_size": [8, 10], "max_size": 9}, "got min_size [8, 10], eval_size None and max_size 9"),
    (Resize, {"min_size": 8, "max_size": 9, "eval_size": 10}, "eval_size 10 and max_size 9"),
    (Resize, {"min_size": [], "max_size": 9}, "got min_size []"),
    (Resize, {"min_size": [9, 8], "max_size": 9, "sampling": "range"}, "[smallest, largest] for sampling 'range', got [9, 8]"),
    (Resize, {"min_size": 8, "max_size": 9, "sampling": "range"}, "[smallest, largest] for sampling 'range', got 8"),
    (Resize, {"min_size": 8, "max_size": 9, "sampling": "all"}, "sampling must be 'choice' or 'range', got 'all'"),
    (Views, {"size": 4}, "views.size must be 8 to 4096 pixels, got 4"),
    (Views, {"scale": (0.5, 1.5)}, f"views.scale {RANGE} 0..1, got [0.5, 1.5]"),
    (Views, {"scale": (0.5,)}, "views.scale must be"),
    (Views, {"ratio": (2.0, 1.0)}, "views.ratio must be"),
    (Views, {"flip": 2.0}, "views.flip must be in 0..1, got 2.0"),
    (Views, {"center": 0.0}, "views.center must lie in 0.1..1, got 0.0"),
    (Views, {"scale": (0.0, 1.0)}, "views.scale must begin above 0, got [0.0, 1.0]"),
    (Loader, {"batch_size": 0}, "loader.batch_size must be at least 1, got 0"),
    (Loader, {"eval_batch_size": 0}, "loader.eval_batch_size must be at least 1, got 0"),
    (Loader, {"num_workers": -1}, "loader.num_workers must be at least 0, got -1"),
    *[(kind, {**SPLIT, "seed": -1}, "seed must not be negative, got -1") for kind in (COCO, ImageFolder)],
    *[(kind, {**SPLIT, "on_bad": "ignore"}, "on_bad must be 'error' or 'skip', got 'ignore'") for kind in (COCO, ImageFolder)],
    *[(VOC, {**SPLIT, "split": split}, "split")
      for split in ({"val": 1.0}, {"val": 0}, {"train": 0.5, "val": 0.2}, {"vall": 0.2}, {"train": 1})],
    (Classes, {"keep": []}, "classes.keep must be distinct names, at least one, got []"),
    (Classes, {"keep": ["a", "a"]}, "classes.keep must be distinct names"),
    (Classes, {"rename": {"a": " "}}, "classes.rename must give each class a name"),
    (Shards, {**SPLIT, "window": 0}, "window must be at least 1, got 0"),
    *[(Shards, {**SPLIT, **more}, "is for image files, not for shards") for more in ({"split": {"val": 0.2}}, {"tiles": Tiling()})],
    (COCO, {**SPLIT, "tiles": Tiling(), "augment": Augment(combine=Combine(CopyPaste()))}, "copy_paste needs masks"),
    (ShardCache, {"gigabytes": 0}, "cache.gigabytes must be positive, got 0"),
    *[(Sampling, given, ONE_OF_BOTH) for given in ({}, {"repeat_factor": 0.1, "class_balanced": True})],
    *[(Sampling, {"repeat_factor": t}, "repeat_factor must be in 0..1, above 0") for t in (0, -1, 1.5)],
    *[(PixelType, {"channels": channels}, "channels must lie in 1..256") for channels in (0, -1, 257, True)],
    *[(PixelType, {"range": limits}, LIMITS) for limits in ((1, 1), (5, 2), (1,), "file")],
    (PixelFormat, {"mean": (0.5,), "std": (0.5,), "channel_order": "bgr"}, "'bgr' is one of three channels"),
    *[(DemoScenes, {name: value}, name) for name, value in (("train", 0), ("val", 0), ("size", 20), ("seed", -1))],
]  # fmt: skip


@pytest.mark.parametrize(("kind", "arguments", "message"), CASES)
def test_settings_out_of_range_are_refused(kind: Any, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, UsageError), match=re.escape(message)):
        kind(**arguments)

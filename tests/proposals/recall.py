"""The share of the objects of a few real images that a source finds."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from detpipe.boxes import iou
from detpipe.datasets import read_image
from detpipe.datasets.formats.recognize import open_split
from detpipe.proposals.image_source import ImageProposals

SPLITS = {"bccd": "test", "coco_mini": "val2017"}
STEP = {"bccd": 36, "coco_mini": 12}


def recall(source: ImageProposals, data: str, shared_data: Path) -> float:
    """Objects of every 12th or 36th image that a box overlaps with IoU .5 or more, of all that are no crowd."""
    annotations = open_split(str(shared_data / data), SPLITS[data], on_bad="skip").annotations("val")
    found = total = 0
    for row in range(0, len(annotations), STEP[data]):
        span = slice(annotations.offsets[row], annotations.offsets[row + 1])
        truth = torch.from_numpy(annotations.boxes[span][~annotations.iscrowd[span]]).float()
        if not len(truth):
            continue
        image = read_image(annotations.root / str(annotations.file_names[row])).permute(1, 2, 0).numpy()
        boxes, _ = source.propose(np.ascontiguousarray(image))
        assert len(boxes) <= 2000
        found += int((iou(truth, torch.from_numpy(boxes)).amax(dim=1) >= 0.5).sum())
        total += len(truth)
    assert total >= 10
    return found / total

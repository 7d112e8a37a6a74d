"""Non-maximum suppression of many groups of boxes in one call, as a mask of fixed size: nothing waits for the device.

torchvision's ``nms`` returns as many rows as are left, which a GPU has to tell the host first.

B rows of M boxes.
"""

from __future__ import annotations

import importlib.util

import torch
from torch import Tensor
from torchvision.ops import nms

from detpipe import boxes as box_ops
from detpipe.roi_pooling.grid_samples import is_torch_alone

HAS_TRITON = importlib.util.find_spec("triton") is not None


def keep_best(boxes: Tensor, iou: float, groups: Tensor | None = None) -> Tensor:
    """Go through the boxes of each row in order, and drop those that overlap one that was kept.

    Args:
        boxes: ``[B, M, 4]`` xyxy, float32 or float64, best first. One without area is not kept, and drops none.
        iou: a box is dropped above this IoU.
        groups: ``[B, M]`` int64; of a row, only boxes of one group drop each other. None: all.

    Returns:
        ``[B, M]`` bool.

    Example:
        >>> boxes = torch.tensor([[[0.0, 0.0, 4.0, 4.0], [0.0, 0.0, 4.0, 3.0], [9.0, 9.0, 9.0, 9.0]]])
        >>> keep_best(boxes, 0.5)
        tensor([[ True, False, False]])
    """
    if is_torch_alone():
        return _by_overlaps(boxes, groups, iou)
    return torch.ops.detpipe.keep_best(boxes, groups, iou)


def _keep_best(boxes: Tensor, groups: Tensor | None, iou: float) -> Tensor:
    if boxes.is_cuda and HAS_TRITON:
        from detpipe.nms import kernels

        return kernels.keep_best(boxes, groups, iou)
    kept = torch.zeros(boxes.shape[:2], dtype=torch.bool, device=boxes.device)
    row, column = (boxes[..., 2:] > boxes[..., :2]).all(-1).nonzero(as_tuple=True)
    found = boxes[row, column]
    if groups is None:  # the time of a call is quadratic: one for each row
        first = 0
        for index, count in enumerate(row.bincount(minlength=len(boxes)).tolist()):
            part = slice(first, first + count)
            kept[index, column[part][_nms(found[part], iou)]] = True
            first += count
    elif len(found):  # moved apart in float64, where the shift is exact
        group = groups[row, column]
        apart = (row * (group.max() + 1) + group) * (found.max().double() - found.min().double() + 1)
        best = _nms(found.double() + apart[:, None], iou)
        kept[row[best], column[best]] = True
    return kept


def _by_overlaps(boxes: Tensor, groups: Tensor | None, iou: float) -> Tensor:
    """Ask all boxes at once which of those that are kept drop them, until nothing changes: the same answer.

    As in Zheng et al., "Enhancing Geometric Factors in Model Learning and Inference for Object Detection and Instance
    Segmentation", 2020, arXiv 2005.03572 (Cluster-NMS).
    """
    from torch._higher_order_ops import while_loop

    solid, place = (boxes[..., 2:] > boxes[..., :2]).all(-1), torch.arange(boxes.shape[1], device=boxes.device)
    drops = (box_ops.iou(boxes, boxes) > iou) & (place[:, None] > place)  # [B, M, M]: the row, by the column
    if groups is not None:
        drops = drops & (groups[:, :, None] == groups[:, None])

    def step(kept: Tensor, _: Tensor) -> tuple[Tensor, Tensor]:
        after = solid & ~(drops & kept[:, None]).any(2)
        return after, (after != kept).any()

    changed = torch.ones((), dtype=torch.bool, device=boxes.device)
    return while_loop(lambda _, changed: changed.any(), step, (solid.clone(), changed))[0]


def _nms(boxes: Tensor, iou: float) -> Tensor:
    return nms(boxes, torch.arange(len(boxes), 0, -1, dtype=boxes.dtype, device=boxes.device), iou)


# what torch.library.custom_op does, without the import of the compiler at its first call
torch.library.define("detpipe::keep_best", "(Tensor boxes, Tensor? groups, float iou) -> Tensor")
torch.library.impl("detpipe::keep_best", "default", _keep_best)
torch.library.register_fake(
    "detpipe::keep_best", lambda boxes, _groups, _iou: boxes.new_empty(boxes.shape[:2], dtype=torch.bool)
)

"""Lets ``torch.jit.script`` take the operators that users of torchvision script.

TorchScript compiles neither the operators' Python nor their keyword-rich signatures, so that a scripted function calls back
into Python: it runs, and cannot be saved. PyTorch itself advises ``torch.compile`` and ``torch.export`` instead. What is
scripted was written for torchvision, which takes boxes without area; so they are taken here, and only here.
"""

# annotations are read by TorchScript, which knows neither the postponed kind nor int | Sequence
from typing import List, Union  # noqa: UP035

import torch
from torch import Tensor
from torch._jit_internal import BroadcastingList2  # pyright: ignore

from detpipe.roi_pooling.align import roi_align
from detpipe.roi_pooling.layouts import unchecked_values
from detpipe.roi_pooling.max_pool import roi_max_pool

BoxesOrList = Union[Tensor, List[Tensor]]  # noqa: UP006, UP007


@torch.jit.ignore  # pyright: ignore
def _call_align(
    features: Tensor,
    boxes: BoxesOrList,
    size: list[int],
    scale: float,
    sampling_ratio: int,
    aligned: bool,
) -> Tensor:
    with unchecked_values():
        return roi_align(features, boxes, size, scale, sampling_ratio, aligned)


@torch.jit.ignore  # pyright: ignore
def _call_max_pool(features: Tensor, boxes: BoxesOrList, size: List[int], scale: float) -> Tensor:  # noqa: UP006
    with unchecked_values():
        return roi_max_pool(features, boxes, size, scale)


def _roi_align(
    features: Tensor,
    boxes: BoxesOrList,
    output_size: BroadcastingList2[int],  # pyright: ignore
    spatial_scale: float = 1.0,
    sampling_ratio: int = 0,
    aligned: bool = True,
) -> Tensor:
    return _call_align(features, boxes, output_size, spatial_scale, sampling_ratio, aligned)


def _roi_max_pool(
    features: Tensor,
    boxes: BoxesOrList,
    output_size: BroadcastingList2[int],  # pyright: ignore
    spatial_scale: float = 1.0,
) -> Tensor:
    return _call_max_pool(features, boxes, output_size, spatial_scale)


def make_scriptable() -> None:
    """Tell TorchScript what to compile in the place of the operators."""
    roi_align.__prepare_scriptable__ = lambda: _roi_align  # pyright: ignore
    roi_max_pool.__prepare_scriptable__ = lambda: _roi_max_pool  # pyright: ignore

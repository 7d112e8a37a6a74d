"""How operators of a detector are written in ONNX, opset 18, where PyTorch's exporter does not know, or not well enough.

``torch.onnx.export(custom_translation_table=translations())``. The functions are run by the exporter, which records what they do.
"""

# onnxscript types its functions for tensors of one kind each.
# pyright: reportArgumentType=false, reportOptionalMemberAccess=false, reportAttributeAccessIssue=false

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any

import onnx
import torch
import torchvision.ops  # noqa: F401 (registers its operators)
from onnxscript import opset18 as op

import detpipe.nms  # noqa: F401 (registers its operator)

DOUBLE, FLOAT, INT64, INT32, BOOL = (
    getattr(onnx.TensorProto, name) for name in ("DOUBLE", "FLOAT", "INT64", "INT32", "BOOL")
)


def translations() -> dict[Callable[..., Any], Callable[..., Any]]:
    """The functions, by what they are called for."""
    return {
        torch.ops.detpipe.keep_best.default: _keep_best,
        torch.ops.aten.sort.stable: _sort_stable,
        torch.ops.torchvision.roi_align.default: _roi_align,
        torch.ops.torchvision.roi_pool.default: _roi_pool,
        operator.truediv: _divide,
        operator.mul: _exactly(op.Mul),
        operator.add: _exactly(op.Add),
        operator.sub: _exactly(op.Sub),
        torch.sym_min: _exactly(op.Min),
        torch.sym_max: _exactly(op.Max),
        math.trunc: _truncate,
    }


def _keep_best(boxes, groups, iou: float):
    """Rows are batches, groups classes; the order of the boxes, best first, is their score."""
    size = op.Shape(boxes, start=1, end=2)
    boxes = op.Cast(boxes, to=FLOAT)
    begin, end = _columns(boxes, 0, 2, axis=2), _columns(boxes, 2, 4, axis=2)
    solid = op.ReduceMin(op.Cast(op.Less(begin, end), to=INT32), op.Constant(value_ints=[-1]), keepdims=0)  # [B, M]
    zero, one = op.Constant(value_int=0), op.Constant(value_int=1)
    ramp = op.Cast(op.Range(op.Squeeze(size), zero, op.Constant(value_int=-1)), to=FLOAT)  # M, ..., 1
    scores = op.Unsqueeze(op.Mul(ramp, op.Cast(solid, to=FLOAT)), [1])  # [B, 1, M], 0 does not take part
    if groups is not None:
        most = op.ReduceMax(groups, keepdims=0)
        labels = op.Unsqueeze(op.Range(zero, op.Add(most, one), one), [0, 2])  # [1, G, 1]
        scores = op.Mul(scores, op.Cast(op.Equal(op.Unsqueeze(groups, [1]), labels), to=FLOAT))
    all_of_them = op.Constant(value_int=2**31 - 1)
    found = op.NonMaxSuppression(boxes, scores, all_of_them, op.Constant(value_float=iou), op.Constant(value_float=0.5))
    where = op.Gather(found, op.Constant(value_ints=[0, 2]), axis=1)  # [D, 2] row, box
    none = op.Mul(solid, op.Constant(value=onnx.helper.make_tensor("zero", INT32, [], [0])))
    marks = op.Expand(
        op.Constant(value=onnx.helper.make_tensor("one", INT32, [1], [1])), op.Shape(where, start=0, end=1)
    )
    return op.Cast(op.ScatterND(none, where, marks), to=BOOL)


def _sort_stable(self, stable: bool | None = None, dim: int = -1, descending: bool = False):
    """Of equal values TopK gives the first ones first; OpenVINO does not, so whole numbers are made different."""
    size = op.Reshape(op.Gather(op.Shape(self), op.Constant(value_int=dim), axis=0), op.Constant(value_ints=[1]))
    kind = self.dtype
    if kind is not None and kind.is_integer():
        count, zero, one = op.Squeeze(size), op.Constant(value_int=0), op.Constant(value_int=1)
        place = op.Range(zero, count, one)
        place = op.Sub(op.Sub(count, one), place) if descending else place
        key = op.Add(op.Mul(op.Cast(self, to=INT64), count), place)
        _, indices = op.TopK(key, size, axis=dim, largest=int(descending), sorted=1)  # pyright: ignore
        return op.GatherElements(self, indices, axis=dim), indices
    return op.TopK(self, size, axis=dim, largest=int(descending), sorted=1)


def _roi_align(
    input, rois, spatial_scale: float, pooled_height: int, pooled_width: int, sampling_ratio: int, aligned: bool
):
    return op.RoiAlign(
        input,
        _columns(rois, 1, 5, axis=1),
        op.Cast(op.Squeeze(_columns(rois, 0, 1, axis=1), [1]), to=INT64),
        mode="avg",
        coordinate_transformation_mode="half_pixel" if aligned else "output_half_pixel",
        output_height=pooled_height,
        output_width=pooled_width,
        sampling_ratio=max(sampling_ratio, 0),  # written, as some readers take another default
        spatial_scale=spatial_scale,
    )


def _roi_pool(input, rois, spatial_scale: float, pooled_height: int, pooled_width: int):
    pooled = op.MaxRoiPool(input, rois, pooled_shape=[pooled_height, pooled_width], spatial_scale=spatial_scale)
    return pooled, op.Cast(pooled, to=INT64)  # torchvision's second result are the winners, which a gradient needs


def _columns(values, first: int, last: int, axis: int):
    begin, end, along = (op.Constant(value_ints=[number]) for number in (first, last, axis))
    return op.Slice(values, begin, end, along)


# numbers of Python: what it computes in floating point is computed in 64 bits


def _exact(value):
    if isinstance(value, int | float):
        return op.Constant(value=onnx.helper.make_tensor("number", DOUBLE, [], [float(value)]))
    return op.Cast(value, to=DOUBLE)


def _is_whole(value) -> bool:
    if isinstance(value, int | float):
        return isinstance(value, int)
    return value.dtype is not None and value.dtype.is_integer()


def _divide(self, other):
    return op.Div(_exact(self), _exact(other))


def _exactly(operation: Callable[..., Any]) -> Callable[..., Any]:
    """Whole numbers stay whole; others are computed in 64 bits."""

    def compute(self, other):
        if _is_whole(self) and _is_whole(other):
            return operation(self, other)
        return operation(_exact(self), _exact(other))

    return compute


def _truncate(self):
    return op.Cast(self, to=INT64)

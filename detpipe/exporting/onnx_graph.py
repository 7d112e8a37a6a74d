"""From a program to one ONNX graph with dynamic sizes, without metadata.

A program is exported in two halves, which are joined afterwards: what makes the batch of the images, and what detects in the batch.
The size of the batch is a formula of that of the images; in one piece, every size in the network would be a formula of it too,
which takes PyTorch minutes to reason about.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
import onnx.helper
import onnx.numpy_helper
import torch
from onnx import compose
from torch import Tensor, nn
from torch.export import Dim

from detpipe.exporting.onnx_operators import translations
from detpipe.exporting.program import LARGEST, Program, example_inputs

OPSET = 18


class _Half(nn.Module):
    """One of a program's methods as a module."""

    def __init__(self, program: Program, method: str) -> None:
        super().__init__()
        self.program, self.method = program, method

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        return getattr(self.program, self.method)(*inputs)


def to_onnx(program: Program) -> onnx.ModelProto:
    """Write a program in evaluation mode as ONNX: inputs ``images`` and, where it takes boxes, ``proposals``, all sizes dynamic."""
    [images, *boxes], [image_sizes, *box_sizes] = example_inputs(program)
    first = _export(_Half(program, "prepare"), [images], [image_sizes], ["images"], ["batch", "sizes"])
    rows, columns = (Dim(name, min=1, max=LARGEST) for name in ("rows", "columns"))
    batch = torch.zeros(2, images.shape[1], 3 * program.divisor, 5 * program.divisor)
    given = [batch, torch.tensor([*batch.shape[2:], *images.shape[2:]], dtype=torch.float32), *boxes]
    batch_sizes = {0: image_sizes[0], 2: program.divisor * rows, 3: program.divisor * columns}
    shapes, names = [batch_sizes, {}, *box_sizes], ["batch", "sizes", "proposals"][: len(given)]
    second = _export(_Half(program, "detect"), given, shapes, names, program.outputs)
    return _name_sizes(_joined(first, second), program)


def _export(
    half: _Half,
    inputs: Sequence[Tensor],
    shapes: Sequence[dict[int, Any]],
    names: Sequence[str],
    results: Sequence[str],
) -> onnx.ModelProto:
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        exported = torch.export.export(half.eval(), tuple(inputs), dynamic_shapes=(tuple(shapes),), strict=False)
        written = torch.onnx.export(
            exported,
            dynamo=True,
            verbose=False,
            input_names=list(names),
            output_names=list(results),
            opset_version=OPSET,
            custom_translation_table=translations(),
        )
    assert written is not None
    model = written.model_proto
    for node in model.graph.node:
        del node.metadata_props[:]
        node.doc_string = ""
    del model.graph.value_info[:]
    del model.graph.metadata_props[:]
    return model


def _joined(first: onnx.ModelProto, second: onnx.ModelProto) -> onnx.ModelProto:
    joined = compose.merge_models(
        first, second, io_map=[(name, name) for name in ("batch", "sizes")], prefix1="prepare/"
    )
    del joined.opset_import[1:]  # that of the second half is the same
    return joined


def _name_sizes(model: onnx.ModelProto, program: Program) -> onnx.ModelProto:
    """Name the images, and the sizes of inputs and outputs that are not fixed."""
    graph = model.graph
    for node in graph.node:
        node.input[:] = ["images" if name == "prepare/images" else name for name in node.input]
    graph.input[0].name = "images"
    images = ("batch", program.backbone.pixel_format.channels, "height", "width")
    for value in graph.input:
        _write_shape(value, images if value.name == "images" else ("batch", "proposals", 4))
    for value in graph.output:
        fixed = [size.dim_value for size in value.type.tensor_type.shape.dim[2:]]
        _write_shape(value, ("batch",) if value.name == "count" else ("batch", "detections", *fixed))
    return model


def _write_shape(value: onnx.ValueInfoProto, sizes: Sequence[str | int]) -> None:
    shape = value.type.tensor_type.shape
    del shape.dim[:]
    for size in sizes:
        shape.dim.add(**({"dim_param": size} if isinstance(size, str) else {"dim_value": size}))


def write_metadata(model: onnx.ModelProto, texts: dict[str, str]) -> None:
    """Write what a file says about itself."""
    onnx.helper.set_model_props(model, texts)
    model.producer_name, model.doc_string = "detpipe", ""


def with_threshold(model: onnx.ModelProto, threshold: float) -> onnx.ModelProto:
    """Copy a model, with another threshold of scores."""
    changed = onnx.ModelProto()
    changed.CopyFrom(model)
    [held] = [value for value in changed.graph.initializer if value.name == "program.score_threshold"]
    held.CopyFrom(onnx.numpy_helper.from_array(np.array(threshold, dtype=np.float32), held.name))
    return changed

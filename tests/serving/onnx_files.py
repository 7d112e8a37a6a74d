"""A small ONNX file with the inputs and outputs of an exported detector."""

from __future__ import annotations

import json
from pathlib import Path

from onnx import ModelProto, TensorProto, helper, save

NAMES = ("cat", "dog")


def write_detector(path: Path, form: str = "detpipe-detector-1", names: str = json.dumps(NAMES)) -> Path:
    """Two slots an image: the first holds a box from (0, 0) to its first red value, label 2, score .75; the other is padding."""
    first = helper.make_tensor("first", TensorProto.INT64, [4], [0, 0, 0, 0])
    second = helper.make_tensor("second", TensorProto.INT64, [4], [2**31 - 1, 1, 1, 1])
    zero_one = helper.make_tensor("mask", TensorProto.FLOAT, [1, 2, 4], [0, 0, 1, 1, 0, 0, 0, 0])
    constants = [
        first, second, zero_one,
        helper.make_tensor("to_one", TensorProto.INT64, [3], [-1, 1, 1]),
        helper.make_tensor("to_flat", TensorProto.INT64, [1], [-1]),
        helper.make_tensor("zero", TensorProto.FLOAT, [1], [0.0]),
        helper.make_tensor("score", TensorProto.FLOAT, [1, 2], [0.75, 0.0]),
        helper.make_tensor("label", TensorProto.INT64, [1, 2], [2, 0]),
    ]  # fmt: skip
    nodes = [
        helper.make_node("Slice", ["images", "first", "second"], ["corner"]),
        helper.make_node("Cast", ["corner"], ["number"], to=TensorProto.FLOAT),
        helper.make_node("Reshape", ["number", "to_one"], ["side"]),
        helper.make_node("Mul", ["side", "mask"], ["boxes"]),
        helper.make_node("Reshape", ["side", "to_flat"], ["sides"]),
        helper.make_node("Greater", ["sides", "zero"], ["there"]),
        helper.make_node("Cast", ["there"], ["count"], to=TensorProto.INT64),
        helper.make_node("Mul", ["side", "zero"], ["none_of_it"]),
        helper.make_node("Reshape", ["none_of_it", "to_row"], ["none"]),
        helper.make_node("Add", ["none", "score"], ["scores"]),
        helper.make_node("Cast", ["none"], ["no_label"], to=TensorProto.INT64),
        helper.make_node("Add", ["no_label", "label"], ["labels"]),
    ]
    constants.append(helper.make_tensor("to_row", TensorProto.INT64, [2], [-1, 1]))
    images = helper.make_tensor_value_info("images", TensorProto.UINT8, ["batch", 3, "height", "width"])
    outputs = [
        helper.make_tensor_value_info("boxes", TensorProto.FLOAT, ["batch", 2, 4]),
        helper.make_tensor_value_info("scores", TensorProto.FLOAT, ["batch", 2]),
        helper.make_tensor_value_info("labels", TensorProto.INT64, ["batch", 2]),
        helper.make_tensor_value_info("count", TensorProto.INT64, ["batch"]),
    ]
    graph = helper.make_graph(nodes, "detector", [images], outputs, constants)
    model: ModelProto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    said = {"format": form, "class_names": names, "category_ids": "[7, 3]", "detpipe": "1.0"}
    helper.set_model_props(model, said)
    save(model, path)
    return path

"""Smaller weights in an ONNX graph: 16 bits, or 8 bits by calibration."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import onnx.helper
import onnx.numpy_helper
from torch import Tensor

FEWEST = 1024  # numbers; smaller tensors stay as they are
LARGEST = np.finfo(np.float16).max  # a tensor with larger numbers stays as it is too
HEAVY = ("Conv", "Gemm", "MatMul")  # operators with nearly all weights
OUTPUTS = ("classifier.weight", "regressor.weight", "quality.weight")  # of layers whose numbers are scores and boxes


def to_half(model: onnx.ModelProto) -> None:
    """Store weights in 16 bits, and cast them where they are used: half the size, computed in 32 bits."""
    used = {name for node in model.graph.node if node.op_type in HEAVY for name in node.input}
    casts = []
    for held in model.graph.initializer:
        values = onnx.numpy_helper.to_array(held)
        if held.name not in used or values.dtype != np.float32 or values.size < FEWEST or abs(values).max() > LARGEST:
            continue
        name, stored = held.name, f"{held.name}/half"
        held.CopyFrom(onnx.numpy_helper.from_array(values.astype(np.float16), stored))
        casts.append(onnx.helper.make_node("Cast", [stored], [name], to=onnx.TensorProto.FLOAT))
    nodes = [*casts, *model.graph.node]
    del model.graph.node[:]
    model.graph.node.extend(nodes)


def quantize(model: onnx.ModelProto, images: Sequence[Tensor]) -> onnx.ModelProto:
    """Turn weights and activations of convolutions and linear layers into 8 bits, with ranges measured on images.

    The layers that give scores and boxes stay as they are: steps of 8 bits are too coarse for boxes that fit closely.

    Args:
        model: that takes images alone.
        images: ``[3, H, W]`` uint8 each.

    Returns:
        The model, with the operators QuantizeLinear and DequantizeLinear around those layers.
    """
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Images(CalibrationDataReader):
        def __init__(self) -> None:
            self.left = iter(images)

        def get_next(self) -> dict[str, np.ndarray] | None:  # type: ignore[override]
            image = next(self.left, None)
            return None if image is None else {"images": image[None].numpy()}

    props = {entry.key: entry.value for entry in model.metadata_props}
    with tempfile.TemporaryDirectory() as folder:
        whole, ready, small = (Path(folder) / name for name in ("whole.onnx", "ready.onnx", "small.onnx"))
        onnx.save(model, whole)
        quant_pre_process(str(whole), str(ready), skip_symbolic_shape=True)
        heavy = [node for node in onnx.load(ready).graph.node if node.op_type in HEAVY]
        quantize_static(
            str(ready),
            str(small),
            Images(),
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=list(HEAVY),
            nodes_to_exclude=[node.name for node in heavy if _gives_results(node.input[1])],
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
        )
        quantized = onnx.load(small)
    onnx.helper.set_model_props(quantized, props)
    return quantized


def _gives_results(weight: str) -> bool:
    """Whether a layer with weights of this name gives scores or boxes; those of an RPN are joined, and are no parameter."""
    return weight.endswith(OUTPUTS) or not weight.startswith("program.")

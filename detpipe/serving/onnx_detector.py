"""A detector in an ONNX file, run by ONNX Runtime.

Input: ``images``, uint8 RGB ``[batch, 3, height, width]``. Outputs: ``boxes`` ``[batch, detections, 4]`` xyxy in pixels of the
input, ``scores`` and ``labels`` (0 is padding), ``[batch, detections]``, and ``count`` ``[batch]``. The class names, label 1 first,
are JSON under ``class_names`` in the metadata of the file.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import onnxruntime
import torch
from torch import Tensor

from detpipe.support.errors import CheckpointError, DataError, UsageError
from detpipe.support.files import refuse_special
from detpipe.support.strict_json import parse_json
from detpipe.types import Detection, Target

OUTPUTS = ["boxes", "scores", "labels", "count"]


class OnnxDetector:
    """Detect with an ONNX file.

    Args:
        path: of the file.
        device: "auto", "cpu", or "cuda", with a number or without.

    Attributes:
        class_names: K, the name of label 1 first.
        size: height and width that images must have; None for any.

    Raises:
        CheckpointError: the file is missing, damaged, or has other inputs or outputs.
        UsageError: the runtime has no such device.
    """

    def __init__(self, path: str | Path, device: str = "auto") -> None:
        refuse_special(path, CheckpointError)
        if not Path(path).is_file():
            raise CheckpointError(f"ONNX file {path} does not exist")
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        providers = _providers(device)
        try:
            self._session = onnxruntime.InferenceSession(str(path), options, providers=providers)
        except Exception as error:  # the runtime has no common class for what is wrong with a file
            raise CheckpointError(f"ONNX file {path} cannot be run: {str(error).splitlines()[0]}") from error
        if device.startswith("cuda") and self._session.get_providers()[0] != providers[0][0]:
            raise UsageError(f"device {device!r} cannot be used: ONNX Runtime did not find its libraries for CUDA")
        inputs = {one.name: one.shape for one in self._session.get_inputs()}
        outputs = {one.name for one in self._session.get_outputs()}
        text = self._session.get_modelmeta().custom_metadata_map.get("class_names")
        if list(inputs) != ["images"] or not outputs.issuperset(OUTPUTS) or text is None:
            raise CheckpointError(
                f"ONNX file {path} is not of a detector: expected the input images, the outputs {', '.join(OUTPUTS)}, and "
                f"class_names in its metadata, got {', '.join(inputs)}; {', '.join(sorted(outputs))}; "
                f"{'no ' if text is None else ''}class_names"
            )
        self.class_names = tuple(map(str, parse_json(text, f"{path}: class_names")))
        batch, _, *size = inputs["images"]
        self._batch = batch if isinstance(batch, int) else None
        self.size = tuple(side if isinstance(side, int) else None for side in size)

    def __call__(self, images: Sequence[Tensor], targets: Sequence[Target] | None = None) -> list[Detection]:
        """Detect in N images ``[3, H, W]`` uint8 RGB of one size; a DataError if the file is for another one."""
        height, width = images[0].shape[1:]
        if any(own not in (None, side) for own, side in zip(self.size, (height, width), strict=True)):
            wanted = " x ".join("any" if side is None else str(side) for side in self.size[::-1])
            raise DataError(f"image: {width} x {height} pixels, but the model takes {wanted}: resize it")
        found: list[Detection] = []
        step = self._batch or len(images)
        for start in range(0, len(images), step):
            part = list(images[start : start + step])
            part += [part[-1]] * ((self._batch or 0) - len(part))  # a batch of fixed size is filled up
            found += self._detect(torch.stack(part))
        return found[: len(images)]

    def _detect(self, images: Tensor) -> list[Detection]:
        values = self._session.run(OUTPUTS, {"images": images.contiguous().numpy()})
        boxes, scores, labels, counts = (torch.from_numpy(value) for value in values)
        return [
            Detection(boxes=boxes[k, :count].float(), scores=scores[k, :count].float(), labels=labels[k, :count].long())
            for k, count in enumerate(counts.tolist())
        ]


def _providers(device: str) -> list[str | tuple[str, dict[str, str]]]:
    """ONNX Runtime's names of a device."""
    name, _, number = device.partition(":")
    has_cuda = "CUDAExecutionProvider" in onnxruntime.get_available_providers()
    if name == "cpu" or (name == "auto" and not has_cuda):
        return ["CPUExecutionProvider"]
    if name not in ("auto", "cuda") or not has_cuda:
        raise UsageError(
            f"device {device!r} cannot be used by this ONNX Runtime: give cpu, or install onnxruntime-gpu for cuda"
        )
    return [("CUDAExecutionProvider", {"device_id": number or "0"}), "CPUExecutionProvider"]

"""A detector in a file of ``detpipe export``, run by ONNX Runtime: what the file says about itself, and detections in images."""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from detpipe.support.errors import CheckpointError, UsageError
from detpipe.support.files import refuse_special
from detpipe.types import Detection, Target

FORMAT = "detpipe-detector-1"
_JSON = ("class_names", "category_ids", "resize", "thresholds")  # of what a file says; the rest is text


def need_packages(*names: str) -> None:
    """Refuse to go on without packages; a UsageError names the first that is missing."""
    for name in names:
        if find_spec(name) is None:
            raise UsageError(
                f"ONNX files need the package {name}, which is not installed: pip install 'detpipe[export]'"
            )


class OnnxDetector:
    """Detect objects with a file of ``detpipe export``.

    Args:
        model: the path of the file, or its content.
        device: "cpu", "cuda" with a number or without, or "auto".
        threads: of the runtime; None for as many as it takes.

    Attributes:
        metadata: what the file says about itself, see ``docs/export.md``.
        class_names: K, the name of label 1 first.
        takes_boxes: whether it looks at ``proposals`` of targets, and nowhere else.

    Raises:
        UsageError: ONNX Runtime is not installed, or has no such device.
        CheckpointError: the file is missing, damaged, or not written by ``detpipe export``.
    """

    def __init__(self, model: str | Path | bytes, device: str = "cpu", threads: int | None = None) -> None:
        need_packages("onnxruntime")
        import onnxruntime

        name = "the model" if isinstance(model, bytes) else f"ONNX file {model}"
        if not isinstance(model, bytes):
            refuse_special(model, CheckpointError)
            if not Path(model).is_file():
                raise CheckpointError(f"{name} does not exist; expected what detpipe export wrote")
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        if threads is not None:
            options.intra_op_num_threads = options.inter_op_num_threads = threads
        providers = _providers(device)
        given = model if isinstance(model, bytes) else str(model)
        try:
            self.session = onnxruntime.InferenceSession(given, options, providers=providers)
        except Exception as error:  # the runtime has no common class for what is wrong with a file
            raise CheckpointError(f"{name} cannot be run: {str(error).strip().splitlines()[0]}") from error
        if device.startswith("cuda") and self.session.get_providers()[0] != providers[0][0]:
            raise UsageError(f"device {device!r} cannot be used: ONNX Runtime did not find its libraries for CUDA")
        stored = self.session.get_modelmeta().custom_metadata_map
        if stored.get("format") != FORMAT:
            raise CheckpointError(f"{name} is not a detector of detpipe export (format {stored.get('format')!r})")
        try:
            known = {key: json.loads(value) if key in _JSON else value for key, value in stored.items()}
            self.metadata: dict[str, Any] = known
            self.class_names = tuple(map(str, known["class_names"]))
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"{name} says of itself what cannot be read ({error}); export it again") from error
        self.takes_boxes = len(self.session.get_inputs()) == 2

    def __call__(self, images: Sequence[Tensor], targets: Sequence[Target] | None = None) -> list[Detection]:
        """Detect in N images ``[3, H_i, W_i]`` uint8 RGB, those of one size together; see `detpipe.prediction.Detector`."""
        own = targets or [Target() for _ in images]
        if len({image.shape for image in images}) > 1:
            return [found for pair in zip(images, own, strict=True) for found in self([pair[0]], [pair[1]])]
        boxes = [target["proposals"] for target in own if "proposals" in target]
        padded = pad_sequence(boxes, batch_first=True).float().numpy() if boxes else None  # rows of zeros do not count
        outputs = self.run(torch.stack(list(images)).contiguous().numpy(), padded)
        names = ("boxes", "scores", "labels")
        return [cast(Detection, {name: torch.from_numpy(found[name]) for name in names}) for found in outputs]

    def run(
        self, images: npt.NDArray[np.uint8], boxes: npt.NDArray[np.float32] | None = None
    ) -> list[dict[str, npt.NDArray[Any]]]:
        """Detect objects.

        Args:
            images: ``[N, C, H, W]``, of three channels RGB.
            boxes: ``[N, P, 4]`` xyxy in pixels, where the model takes boxes.

        Returns:
            For each image ``boxes [D, 4]``, ``scores [D]`` and ``labels [D]``, best first, and ``vectors`` where the file has them.

        Raises:
            UsageError: the images have other channels than the model takes.
            ValueError: boxes are missing, or there are boxes and the model takes none.
        """
        if images.shape[1] != (channels := self.session.get_inputs()[0].shape[1]):
            raise UsageError(f"the model takes images [N, {channels}, H, W]; got {list(images.shape)}")
        if (boxes is not None) != self.takes_boxes:
            wanted = "needs boxes [N, P, 4]" if self.takes_boxes else "takes no boxes"
            raise ValueError(f"the model {wanted}; got {'none' if boxes is None else list(boxes.shape)}")
        feed = {"images": images} if boxes is None else {"images": images, "proposals": boxes}
        return by_image([output.name for output in self.session.get_outputs()], self.session.run(None, feed))


def by_image(names: Sequence[str], values: Sequence[Any]) -> list[dict[str, npt.NDArray[Any]]]:
    """Cut the outputs of a graph to what each image has."""
    found = dict(zip(names, values, strict=True))
    counts = found.pop("count").tolist()
    return [{name: value[row, :count] for name, value in found.items()} for row, count in enumerate(counts)]


def _providers(device: str) -> list[str | tuple[str, dict[str, str]]]:
    """ONNX Runtime's names of a device."""
    import onnxruntime

    name, _, number = device.partition(":")
    has_cuda = "CUDAExecutionProvider" in onnxruntime.get_available_providers()
    if name == "cpu" or (name == "auto" and not has_cuda):
        return ["CPUExecutionProvider"]
    if name not in ("auto", "cuda") or not has_cuda:
        raise UsageError(
            f"device {device!r} cannot be used by this ONNX Runtime: give cpu, or install onnxruntime-gpu for cuda"
        )
    return [("CUDAExecutionProvider", {"device_id": number or "0"}), "CPUExecutionProvider"]

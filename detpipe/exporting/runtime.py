"""A detector in an ONNX file, run by onnxruntime: what a file says about itself, and detections in images."""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from detpipe.support.errors import DataError, UsageError
from detpipe.support.files import refuse_special

FORMAT = "detpipe-detector-1"
PACKAGES = ("onnx", "onnxscript", "onnxruntime")
INSTALL = "install the extra: pip install 'detpipe[export]'"


def need_packages() -> None:
    """Say which package is missing.

    Raises:
        UsageError: one is.
    """
    for name in PACKAGES:
        if find_spec(name) is None:
            raise UsageError(f"export: the package {name} is not installed; {INSTALL}")


class OnnxDetector:
    """Detect objects with a file of ``detpipe export``.

    Args:
        model: the path of the file, or its content.
        threads: of onnxruntime; None for as many as it takes.

    Attributes:
        metadata: what the file says about itself, see ``docs/export.md``.
        takes_boxes: whether a call needs boxes.

    Raises:
        UsageError: onnxruntime is not installed.
        DataError: the file is missing, no ONNX, or not written by ``detpipe export``.
    """

    def __init__(self, model: str | Path | bytes, threads: int | None = None) -> None:
        need_packages()
        import onnxruntime

        name = "the model" if isinstance(model, bytes) else str(model)
        if not isinstance(model, bytes):
            refuse_special(model)
            if not Path(model).is_file():
                raise DataError(f"{name} does not exist; expected a file that detpipe export wrote")
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        if threads is not None:
            options.intra_op_num_threads = options.inter_op_num_threads = threads
        given = model if isinstance(model, bytes) else str(model)
        try:
            self.session = onnxruntime.InferenceSession(given, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime's errors have no common class
            reason = str(error).strip().splitlines()[0]
            raise DataError(f"{name} cannot be read by onnxruntime: {reason}") from error
        stored = self.session.get_modelmeta().custom_metadata_map
        if stored.get("format") != FORMAT:
            raise DataError(f"{name}: is not a detector of detpipe export (format {stored.get('format')!r})")
        self.metadata: dict[str, Any] = {key: _read(value) for key, value in stored.items()}
        self.takes_boxes = len(self.session.get_inputs()) == 2

    def __call__(
        self, images: npt.NDArray[np.uint8], boxes: npt.NDArray[np.float32] | None = None
    ) -> list[dict[str, npt.NDArray[Any]]]:
        """Detect objects.

        Args:
            images: ``[N, 3, H, W]`` RGB.
            boxes: ``[N, P, 4]`` xyxy in pixels, where the model takes boxes.

        Returns:
            For each image ``boxes [D, 4]``, ``scores [D]`` and ``labels [D]``, best first, and ``vectors`` where the file has them.

        Raises:
            ValueError: boxes are missing, or there are boxes and the model takes none.
        """
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


def _read(value: str) -> Any:
    try:
        return json.loads(value)
    except ValueError:
        return value

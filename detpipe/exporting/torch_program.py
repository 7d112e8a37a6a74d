"""A program as a ``.pt2`` file of PyTorch's own operators, which a process runs that imports nothing but torch.

Suppression and RoIAlign are written in these operators; see ``torch_alone`` of ``roi_pooling``. Beside the program the file
holds ``detpipe.json``, what an ONNX file has as metadata.
"""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor
from torch.export import Dim

from detpipe.exporting.parity import Arrays
from detpipe.exporting.program import Program
from detpipe.prediction.onnx_detector import by_image
from detpipe.roi_pooling.grid_samples import torch_alone

ABOUT = "detpipe.json"


def write_pt2(program: Program, file: IO[bytes], about: dict[str, str]) -> None:
    """Export a program, all sizes dynamic.

    Args:
        program: in evaluation mode.
        file: to write to.
        about: what the file says about itself.
    """
    count, height, width = (
        Dim("batch", min=1, max=4096),
        Dim("height", min=16, max=8192),
        Dim("width", min=16, max=8192),
    )
    given: tuple[Tensor, ...] = (torch.zeros(2, program.backbone.pixel_format.channels, 96, 112, dtype=torch.uint8),)
    shapes: list[dict[int, Any]] = [{0: count, 2: height, 3: width}]
    if program.takes_boxes:
        given = (*given, torch.tensor([0.0, 0.0, 32.0, 32.0]).repeat(2, 7, 1))
        shapes.append({0: count, 1: Dim("proposals", min=2, max=2**20)})
    token = torch_alone.set(True)
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            exported = torch.export.export(program, given, dynamic_shapes=tuple(shapes), strict=False)
            torch.export.save(exported, file, extra_files={ABOUT: json.dumps(about)})
    finally:
        torch_alone.reset(token)


class PT2Detector:
    """Detect objects with a ``.pt2`` file; called as :meth:`detpipe.prediction.onnx_detector.OnnxDetector.run` is.

    Args:
        path: of the file.
        names: of the outputs.
    """

    def __init__(self, path: Path, names: tuple[str, ...]) -> None:
        with path.open("rb") as file:
            self.module, self.names = torch.export.load(file).module(), names  # pyright: ignore[reportArgumentType]

    @torch.no_grad()
    def __call__(self, images: Arrays, boxes: Arrays | None = None) -> list[dict[str, Arrays]]:
        """Detect objects in images ``[N, 3, H, W]``, with boxes ``[N, P, 4]`` where the program takes some."""
        given = [torch.from_numpy(values) for values in (images, boxes) if values is not None]
        return by_image(self.names, [values.numpy() for values in self.module(*given)])

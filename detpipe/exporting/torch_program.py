"""A program as a ``.pt2`` file of PyTorch's own operators, which a process runs that imports nothing but torch.

Suppression and RoIAlign are written in these operators; see ``torch_alone`` of ``roi_pooling``. Beside the program the file
holds ``detpipe.json``, what an ONNX file has as metadata.
"""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import torch

from detpipe.exporting.parity import Arrays
from detpipe.exporting.program import Program, example_inputs
from detpipe.prediction.onnx_detector import by_image
from detpipe.roi_pooling.grid_samples import torch_alone

ABOUT = "detpipe.json"


def write_pt2(program: Program, path: Path, about: dict[str, str]) -> None:
    """Export a program, all sizes dynamic.

    Args:
        program: in evaluation mode.
        path: to write to.
        about: what the file says about itself.
    """
    given, sizes = example_inputs(program)
    with torch_alone(), warnings.catch_warnings(), torch.no_grad(), path.open("wb") as file:
        warnings.simplefilter("ignore")
        exported = torch.export.export(program, given, dynamic_shapes=sizes, strict=False)
        torch.export.save(exported, file, extra_files={ABOUT: json.dumps(about)})


class PT2Detector:
    """Detect objects with a ``.pt2`` file; called as :meth:`detpipe.prediction.onnx_detector.OnnxDetector.run` is.

    Args:
        path: of the file.
        names: of the outputs.
        threshold: of scores.
    """

    def __init__(self, path: Path, names: tuple[str, ...], threshold: float) -> None:
        with path.open("rb") as file:
            self.module, self.names = torch.export.load(file).module(), names  # pyright: ignore[reportArgumentType]
        self.module.get_buffer("score_threshold").fill_(threshold)

    @torch.no_grad()
    def __call__(self, images: Arrays, boxes: Arrays | None = None) -> list[dict[str, Arrays]]:
        """Detect objects in images ``[N, 3, H, W]``, with boxes ``[N, P, 4]`` where the program takes some."""
        given = [torch.from_numpy(values) for values in (images, boxes) if values is not None]
        return by_image(self.names, [values.numpy() for values in self.module(*given)])

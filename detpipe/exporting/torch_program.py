"""A program as a ``.pt2`` file of PyTorch's own operators, which a process runs that imports nothing but torch.

Suppression and RoIAlign are written in these operators; see ``torch_alone`` of ``roi_pooling``. Beside the program the file
holds ``detpipe.json``, what an ONNX file has as metadata.
"""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import torch

from detpipe.exporting.parity import Arrays, Run
from detpipe.exporting.program import Program, example_inputs
from detpipe.prediction.onnx_detector import by_image
from detpipe.roi_pooling.grid_samples import torch_alone

ABOUT = "detpipe.json"


def write_pt2(program: Program, path: Path, about: dict[str, str]) -> None:
    """Export a program in evaluation mode, all sizes dynamic; ``about`` is what the file says about itself."""
    given, sizes = example_inputs(program)
    with torch_alone(), warnings.catch_warnings(), torch.no_grad(), path.open("wb") as file:
        warnings.simplefilter("ignore")
        exported = torch.export.export(program, given, dynamic_shapes=sizes, strict=False)
        exported._guards_code.clear()  # they refuse sizes of one pixel or one cell, for which the program is right too
        torch.export.save(exported, file, extra_files={ABOUT: json.dumps(about)})


def open_pt2(path: Path, names: tuple[str, ...], threshold: float) -> Run:
    """Open a ``.pt2`` file with outputs of these names and a threshold of scores, to detect with."""
    with path.open("rb") as file:
        module = torch.export.load(file).module()  # pyright: ignore[reportArgumentType]
    module.get_buffer("score_threshold").fill_(threshold)

    @torch.no_grad()
    def run(images: Arrays, boxes: Arrays | None) -> list[dict[str, Arrays]]:
        given = [torch.from_numpy(values) for values in (images, boxes) if values is not None]
        return by_image(names, [values.numpy() for values in module(*given)])

    return run

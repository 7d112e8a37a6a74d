"""A trained detector's own proposals, image by image: its region proposal network as a source for others."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from detpipe import images as frames
from detpipe.proposals import RPN
from detpipe.support.errors import UsageError
from detpipe.training.models import load_detector
from detpipe.types import RGB


class CheckpointProposals:
    """Propose boxes by the RPN of a detector on a device of PyTorch, or "auto"; a UsageError if it has none."""

    name = "rpn"

    def __init__(self, path: str, device: str = "auto") -> None:
        self.detector, description = load_detector(path)
        if description.pixels != RGB:
            raise UsageError(
                f"{path} is of images of {description.pixels}; boxes are proposed for 8-bit RGB alone, predict with the detector"
            )
        if not isinstance(self.detector.proposals, RPN):
            raise UsageError(
                f"{path} has no region proposal network but {type(self.detector.proposals).__name__}; name that source instead"
            )
        chosen = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
        self.detector.to(chosen)
        self._sha256 = hashlib.sha256(Path(path).read_bytes()).hexdigest()

    @property
    def settings(self) -> dict[str, Any]:
        """What decides about the boxes: the hash of the checkpoint, and the size that images are resized to."""
        return {"sha256": self._sha256, "min_size": self.detector.min_size, "max_size": self.detector.max_size}

    @torch.inference_mode()
    def propose(self, image: npt.NDArray[np.uint8]) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
        """Propose ``[P, 4]`` xyxy boxes in pixels of an image ``[H, W, 3]`` uint8 RGB, best first, with scores ``[P]`` in 0..1."""
        model, rpn = self.detector, self.detector.proposals
        assert isinstance(rpn, RPN)
        tensor = torch.from_numpy(image).permute(2, 0, 1).to(model.device)
        batch = model.to_batch([tensor])
        [boxes], [scores] = rpn.propose(batch, model.backbone(batch.tensors))
        boxes = frames.scale_boxes(boxes, batch.image_sizes[0], (image.shape[0], image.shape[1]))
        boxes = boxes.clamp(min=0).minimum(boxes.new_tensor([image.shape[1], image.shape[0]] * 2))
        return boxes.float().cpu().numpy(), scores.float().cpu().numpy()

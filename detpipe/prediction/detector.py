"""What detects: the contract of detectors and of what is put around them, and the one that moves images to a device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, cast

import torch
from lightning.fabric.utilities import move_data_to_device
from torch import Tensor

from detpipe.types import Detection, Target


class Detector(Protocol):
    """What detects: `TwoStageDetector`, and what is put around one."""

    def __call__(self, images: Sequence[Tensor], targets: Sequence[Target] | None = None) -> list[Detection]:
        """N images ``[C, H_i, W_i]``, and their ``proposals`` for what needs some -> N detections in pixels of the images."""
        ...


@dataclass(frozen=True)
class PlacedDetector:
    """A detector on a device, for images and detections on the CPU.

    Args:
        detector: on that device.
        device: where it is.
        score_threshold: detections below it are left out.
    """

    detector: Detector
    device: torch.device
    score_threshold: float = 0.0

    @torch.inference_mode()
    def __call__(self, images: Sequence[Tensor], targets: Sequence[Target] | None = None) -> list[Detection]:
        """Detect in N images ``[C, H_i, W_i]``; proposals and glimpses of a head that returns them come too."""
        images, targets = move_data_to_device((list(images), targets), self.device)
        return [self._kept(found) for found in self.detector(images, targets)]

    def _kept(self, found: Detection) -> Detection:
        keep = found["scores"] >= self.score_threshold
        return cast(Detection, {name: values[keep].cpu() for name, values in cast(dict[str, Tensor], found).items()})

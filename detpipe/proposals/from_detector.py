"""Boxes of somebody else's detector as proposals: those of torchvision by name, and any module from an image to boxes.

A detector that was trained on other classes may still know where objects are; Fast R-CNN then learns what they are (Girshick, 2015,
arXiv 1504.08083).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torchvision.models import detection, get_model_weights, list_models

from detpipe.proposals.image_source import Candidates, Image, ImageProposals
from detpipe.support.errors import CheckpointError, UsageError
from detpipe.support.files import refuse_special
from detpipe.support.numbers import check_numbers
from detpipe.support.suggest import did_you_mean
from detpipe.support.untrusted import check_saved
from detpipe.types import PixelFormat

_WITHOUT_EPS = ("fasterrcnn_resnet50_fpn", "retinanet_resnet50_fpn")  # torchvision's with their weights of COCO


class FromDetector(ImageProposals):
    """Propose what a detector finds, whatever it takes it for. It is not trained.

    Args:
        detector: a name of torchvision's, such as ``fcos_resnet50_fpn`` or ``retinanet_resnet50_fpn``; in Python also any module.
            One with a method ``detect``: from an image ``[H, W, 3]`` uint8 to boxes ``[P, 4]`` xyxy in its pixels, or None, and
            scores ``[P]``, such as ``facenet_pytorch.MTCNN``. Or one that takes a list of images ``[3, H, W]`` in 0..1 and returns
            a list of dicts with ``boxes`` and ``scores``, as torchvision's do.
        weights: of a name: a name of torchvision's weights, which downloads, a local file, or None for random ones.
        min_score: leave out boxes with lower scores.
        max_boxes: keep at most this many of an image, the best ones; None keeps all.
        min_size: leave out boxes that are less wide or less high, in pixels of the image.
        pixel_format: how the images of a batch were normalized: that of the backbone; None for the default one.

    Raises:
        UsageError: an unknown name; near ones are listed.
        CheckpointError: the weights are missing, damaged, or of another detector.
        ValueError: a number outside its range.

    Example:
        >>> class Whole(torch.nn.Module):
        ...     def detect(self, image):
        ...         return [[0, 0, image.shape[1], image.shape[0]]], [0.5]
        >>> FromDetector(Whole()).propose(np.zeros((8, 12, 3), np.uint8))[0].tolist()
        [[0.0, 0.0, 12.0, 8.0]]
    """

    name = "detector"

    def __init__(
        self,
        detector: str | Any = "fcos_resnet50_fpn",
        weights: str | None = "DEFAULT",
        min_score: float = 0.05,
        max_boxes: int | None = 1000,
        min_size: float = 4.0,
        pixel_format: PixelFormat | None = None,
    ) -> None:
        super().__init__(max_boxes, min_size, pixel_format)
        check_numbers("must be in 0..1", min_score=min_score)
        if not isinstance(detector, str) and not callable(detector) and not hasattr(detector, "detect"):
            raise ValueError(f"detector must be a name or a module, got {detector!r}")
        self.detector = detector if isinstance(detector, str) else type(detector).__qualname__  # for settings
        self.weights, self.min_score = weights, min_score
        self.network: Any = _build(detector, weights) if isinstance(detector, str) else detector
        if isinstance(self.network, nn.Module):
            self.network.requires_grad_(False)
        self.train(False)

    def train(self, mode: bool = True) -> FromDetector:
        """Switch to training, except for the detector."""
        super().train(mode)
        if isinstance(self.network, nn.Module):
            self.network.eval()
        return self

    @torch.no_grad()
    def find(self, image: Image) -> Candidates:
        """Detect in one image; see :class:`ImageProposals`.

        Raises:
            ValueError: the detector returns something else than boxes and scores.
        """
        found = self.network.detect(image) if hasattr(self.network, "detect") else self._call(image)
        boxes, scores = (found["boxes"], found["scores"]) if isinstance(found, Mapping) else found[:2]
        boxes = np.zeros((0, 4), np.float32) if boxes is None else _numbers(boxes).reshape(-1, 4)
        scores = _numbers(scores).reshape(-1) if len(boxes) else np.zeros(0, np.float32)
        if len(scores) != len(boxes):
            name = type(self.network).__name__
            raise ValueError(f"{name} returned {len(boxes)} boxes with {len(scores)} scores; expected one for each")
        keep = (scores >= self.min_score) & np.isfinite(boxes).all(axis=1)
        return Candidates(boxes[keep], scores[keep])

    def _call(self, image: Image) -> Any:
        parameter = next(iter(self.network.parameters()), None) if isinstance(self.network, nn.Module) else None
        tensor = torch.from_numpy(image).permute(2, 0, 1).float() / 255
        returned = self.network([tensor if parameter is None else tensor.to(parameter)])
        if not isinstance(returned, list | tuple) or len(returned) != 1 or not isinstance(returned[0], Mapping):
            raise ValueError(
                f"{type(self.network).__name__} returned a {type(returned).__name__} for a list of one image; expected a list of "
                "one dict with 'boxes' and 'scores', or give a module with a method 'detect'"
            )
        return returned[0]


def _numbers(values: Any) -> npt.NDArray[np.float32]:
    values = values.detach().cpu() if isinstance(values, Tensor) else values
    return np.asarray(values).astype(np.float32)


def _build(name: str, weights: str | None) -> nn.Module:
    known = list_models(module=detection)
    if name not in known:
        raise UsageError(
            f"unknown detector {name!r}: expected one of torchvision's, {', '.join(known)}{did_you_mean(name, known)}"
        )
    network = getattr(detection, name)(weights=None, weights_backbone=None)
    if weights is None:
        return network
    state = _read(name, weights)
    if name in _WITHOUT_EPS:
        for module in network.modules():
            if hasattr(module, "running_var"):
                module.eps = 0.0
    try:
        network.load_state_dict(state)
    except (RuntimeError, TypeError, AttributeError) as error:
        problems = [line.strip() for line in str(error).splitlines()[1:]] or [str(error)]
        raise CheckpointError(f"weights {weights} do not fit {name}: {'; '.join(problems[:2])}"[:500]) from error
    return network


def _read(name: str, weights: str) -> Any:
    """The state dict of a local file, or of a name of torchvision's."""
    if not Path(weights).suffix and "/" not in weights:
        names = get_model_weights(name).__members__
        if weights not in names:
            raise UsageError(
                f"unknown weights {weights!r} of {name}: expected a local file or one of {sorted(names)}"
                f"{did_you_mean(weights, names)}"
            )
        entry: Any = names[weights]
        try:
            return entry.get_state_dict(check_hash=True, weights_only=True, map_location="cpu")
        except (OSError, RuntimeError) as error:
            reason = str(error).strip().partition("\n")[0]
            path = Path(torch.hub.get_dir()) / "checkpoints" / entry.url.rpartition("/")[2]
            raise CheckpointError(
                f"weights of {name} cannot be downloaded ({reason}); put {entry.url} at {path}, or give that file as weights"
            ) from error
    refuse_special(weights, CheckpointError)
    if not Path(weights).is_file():
        raise CheckpointError(f"weights file {weights}: no such file; give torchvision's file of {name}, or DEFAULT")
    try:
        check_saved(Path(weights))
        return torch.load(weights, map_location="cpu", weights_only=True)
    except Exception as error:  # what a damaged file makes the reader raise is any of a dozen types
        reason = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
        raise CheckpointError(f"weights file {weights} cannot be read as a state dict: {reason}") from error

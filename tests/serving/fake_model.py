"""A model that finds what it is given, or the whole image, and waits or fails where an image says so."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from io import BytesIO
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from detpipe.serving.batching import Served
from detpipe.support.errors import DataError
from detpipe.types import Detection, Target

FAILS, REFUSED = 66, 77  # widths of images that the model fails on, and does not take


@dataclass
class FakeModel:
    """Answers once it may, and remembers the sizes of its batches."""

    may: threading.Event = field(default_factory=threading.Event)
    batches: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.may.set()

    def __call__(self, images: Sequence[Tensor], targets: Sequence[Target] | None = None) -> list[Detection]:
        assert self.may.wait(20)
        self.batches.append(len(images))
        assert len({image.shape for image in images}) == 1
        width = images[0].shape[2]
        if width == FAILS and len(images) > 1:
            raise RuntimeError("one of these images")
        if width == FAILS and images[0][0, 0, 0] > 0:
            raise RuntimeError("secret detail")
        if width == REFUSED:
            raise DataError("image: too wide")
        whole = [torch.tensor([[0.0, 0.0, width, image.shape[1]]]) for image in images]
        boxes = whole if targets is None else [target["proposals"] for target in targets]
        return [
            Detection(
                boxes=one, scores=torch.linspace(0.9, 0.3, len(one)), labels=torch.ones(len(one), dtype=torch.int64)
            )
            for one in boxes
        ]


def served(model: FakeModel, **settings: Any) -> Served:
    return Served("fake", ("<cat>",), model, **settings)


def picture(width: int = 30, height: int = 20, kind: str = "PNG", color: str = "black") -> bytes:
    stream = BytesIO()
    Image.new("RGB", (width, height), color).save(stream, kind)
    return stream.getvalue()


def wait_until(true: Any, seconds: float = 20) -> None:
    """Wait for what another thread does."""
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.005)

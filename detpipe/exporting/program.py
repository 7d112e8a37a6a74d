"""A detector as one graph: a tensor of images in, tensors of fixed size out, from pixels to suppression.

What it computes is what the detector computes, by the same modules; see :meth:`Program.forward`. It runs as it is, and it can be
compiled, exported by ``torch.export``, and written as ONNX.

N images, P boxes an image, K foreground classes, D detections of an image, at most.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import Dim
from torchvision.models.detection.image_list import ImageList

from detpipe import boxes as box_ops
from detpipe import images as frames
from detpipe.detector import TwoStageDetector
from detpipe.exporting.support import check_exportable
from detpipe.heads import CascadeHead
from detpipe.heads.base import ProposalHead
from detpipe.proposals import RPN, PrecomputedProposals

OUTPUTS = ("boxes", "scores", "labels", "count")
LARGEST = 8192  # pixels along a side, and images; a bound for PyTorch's reasoning, which ONNX files do not have


class Program(nn.Module):
    """Detect by operations that are the same for any number of images, any size, and any number of objects.

    Args:
        detector: in evaluation mode.
        takes_boxes: whether boxes are a second input, in the place of the detector's own source.
        gives_vectors: whether the vectors that the head classifies are a fifth output.

    Raises:
        UsageError: a part of the detector cannot be written as a graph; it is named.
    """

    score_threshold: Tensor

    def __init__(self, detector: TwoStageDetector, takes_boxes: bool = False, gives_vectors: bool = False) -> None:
        super().__init__()
        is_given = isinstance(detector.proposals, PrecomputedProposals)
        self.takes_boxes = takes_boxes or is_given
        check_exportable(detector, self.takes_boxes)
        assert isinstance(detector.head, ProposalHead)
        self.backbone, self.head = detector.backbone, detector.head
        self.source = PrecomputedProposals(max_boxes=None) if takes_boxes and not is_given else detector.proposals
        self.gives_vectors = gives_vectors
        self.divisor = detector.divisor or max(detector.backbone.strides.values())
        self.sizes = detector.min_size, detector.max_size
        self.rule: frames.ResizeRule = detector.resize
        threshold = torch.tensor(detector.head.postprocess.score_threshold)
        self.register_buffer("score_threshold", threshold, persistent=False)

    @property
    def outputs(self) -> tuple[str, ...]:
        """Names of what is returned."""
        return (*OUTPUTS, "vectors") if self.gives_vectors else OUTPUTS

    def forward(self, images: Tensor, boxes: Tensor | None = None) -> tuple[Tensor, ...]:
        """Detect objects.

        Args:
            images: ``[N, C, H, W]`` of one size, of three channels RGB, uint8.
            boxes: ``[N, P, 4]`` xyxy in pixels of the images, where the program takes boxes; rows without an area do not count.

        Returns:
            boxes ``[N, D, 4]`` xyxy in pixels of the images, best first, scores ``[N, D]``, labels ``[N, D]`` int64, count ``[N]``
            int64; and vectors ``[N, D, V]``, if asked for. Behind the first ``count`` of an image all are zero.
        """
        return self.detect(*self.prepare(images), boxes)

    def prepare(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Normalize, resize and pad: the batch ``[N, C, h', w']``, and ``[4]`` float32 height and width there, and as given."""
        dtype = self.backbone.input_dtype
        batch, size = frames.to_canvas(images, self.backbone.pixel_format, *self.sizes, self.divisor, dtype, self.rule)
        return batch, box_ops.constants((*size, images.shape[2], images.shape[3]), self.score_threshold)

    def detect(self, batch: Tensor, sizes: Tensor, boxes: Tensor | None = None) -> tuple[Tensor, ...]:
        """Detect in what :meth:`prepare` returns; boxes and results as of a call."""
        h, w, height, width = sizes.unbind()
        image_sizes: Any = [(h, w)]  # of all images
        features = self.backbone(batch)
        if isinstance(self.source, RPN):
            proposals, present = self.source.propose_padded(ImageList(batch, image_sizes), features)
        else:
            assert isinstance(self.source, PrecomputedProposals)
            assert boxes is not None
            torch._check(boxes.shape[0] == batch.shape[0])
            factors = torch.stack((w / width, h / height)).repeat(2)
            boxes = F.pad(boxes, (0, 0, 0, 1))  # one more without area, so that an image may have no boxes at all
            proposals = box_ops.clip(boxes * factors, h, w)
            present = self.source.chosen(proposals)
        with classified(self.head, self.gives_vectors) as vectors:
            kept, count = self.head.detect_padded(features, proposals, present, image_sizes, self.score_threshold)
        found = box_ops.clip(kept.boxes * torch.stack((width / w, height / h)).repeat(2), height, width)
        counts = torch.arange(kept.scores.shape[1], device=count.device) < count[:, None]  # [N, D]
        results = (found * counts[..., None], kept.scores * counts, kept.labels * counts, count)
        if not self.gives_vectors:
            return results
        [flat] = vectors
        own = flat.unflatten(0, present.shape)
        own = own.gather(1, kept.index[..., None].expand(-1, -1, own.shape[2]))
        return *results, own.float() * counts[..., None]


def example_inputs(program: Program) -> tuple[tuple[Tensor, ...], tuple[dict[int, Any], ...]]:
    """Images, and boxes where a program takes some, to export it by; and for each which of its sizes may be others."""
    count, height, width = (Dim(name, min=1, max=LARGEST) for name in ("batch", "height", "width"))
    images = torch.zeros(2, program.backbone.pixel_format.channels, 96, 112, dtype=torch.uint8)
    boxes = torch.tensor([0.0, 0.0, 32.0, 32.0]).repeat(2, 7, 1)
    sizes: list[dict[int, Any]] = [{0: count, 2: height, 3: width}, {0: count, 1: Dim("proposals", min=0, max=2**20)}]
    taken = 2 if program.takes_boxes else 1
    return (images, boxes)[:taken], tuple(sizes[:taken])


@contextmanager
def classified(head: ProposalHead, wanted: bool) -> Iterator[list[Tensor]]:
    """Collect what a head's classifier is given, ``[N P, V]``; of a cascade the last one."""
    seen: list[Tensor] = []
    layer = head.stages[-1].classifier if isinstance(head, CascadeHead) else head.get_submodule("classifier")
    handle = layer.register_forward_pre_hook(lambda _, given: seen.append(given[0])) if wanted else None  # pyright: ignore
    try:
        yield seen
    finally:
        if handle is not None:
            handle.remove()

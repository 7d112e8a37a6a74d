"""Mean average precision as torchmetrics metrics: fed batch by batch, in one process or several.

    metric.update(detections, image_ids)   # as often as there are batches, in any order, on any process
    metric.compute()                       # the same numbers on all processes, from one gathering of all detections
    metric.reset()                         # before the next epoch

The state is one array of 7 columns, so that one gathering moves all of it: float32 while all that comes is float32 or less, else
float64. Each image writes a row that says that it was seen, then its detections; images are told by their row in the ground
truth, since ids may be larger than what a float holds exactly. What is computed is a function of the set of detections alone: the
same bits for any number of processes and any order of arrival. The work is done by the first process, and its result sent to the
others.

On Apple's GPUs, which have no float64, the state stays on the CPU.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from detpipe.evaluation.coco import Backend, evaluate_coco
from detpipe.evaluation.lvis import evaluate_lvis
from detpipe.evaluation.voc import evaluate_voc
from detpipe.support.errors import DataError
from detpipe.types import Annotations, Detection, DetectionArrays

_PIECES = 64  # of batches that are kept apart: memory of small tensors is not given back
_WHOLE = 2**24  # up to here float32 holds every whole number
_COLUMNS = 7  # image, label, score, x1, y1, x2, y2; the row that says that image i was seen: -1 - i, the process, zeros
_HELD_BY_FLOAT32 = (torch.float32, torch.float16, torch.bfloat16)


class DetectionMetric(Metric, ABC):
    """Collect detections of images whose ground truth is known, and evaluate them together.

    An image that several processes saw, because a sampler filled up the last batch, counts once. Images that no process saw are
    left out of the ground truth, as with ``trainer.limit_val_batches``.

    Args:
        annotations: the ground truth of I images.
        settings: of torchmetrics, such as ``process_group``.
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False
    rows: list[Tensor]

    def __init__(self, annotations: Annotations, **settings: Any) -> None:
        super().__init__(**settings)
        self.annotations = annotations
        self.images_seen = 0  # by all processes, when the numbers were computed
        self._row_of = {image_id: row for row, image_id in enumerate(annotations.image_ids.tolist())}
        self.add_state("rows", default=[], dist_reduce_fx="cat")
        self._start()

    @abstractmethod
    def evaluate(self, annotations: Annotations, detections: DetectionArrays) -> dict[str, Any]:
        """Compute the numbers by name, of the detections of the images that were seen."""

    def update(self, detections: Sequence[Detection], image_ids: Sequence[int]) -> None:
        """Take the detections of a batch of images, in pixels of the original images, with their ids in the ground truth.

        Raises:
            ValueError: detections and ids differ in number, or boxes, scores and labels of an image do.
            DataError: an id that the ground truth does not have.
        """
        if len(detections) != len(image_ids):
            raise ValueError(f"one image id an image is needed: got {len(detections)} images and {len(image_ids)} ids")
        parts = []
        for found, image_id in zip(detections, image_ids, strict=True):
            parts.append(self._packed(found, int(image_id)))  # before any is kept: a faulty batch leaves nothing behind
        if parts:
            self.rows.append(torch.cat(parts))
            self._batches += 1
        if self._batches == _PIECES:
            self.rows[-_PIECES:] = [torch.cat(self.rows[-_PIECES:])]
            self._batches = 0

    def compute(self) -> dict[str, Any]:
        """Evaluate what all processes have collected; the numbers by name are the same on all processes.

        Raises:
            DataError: no image was seen, a detection is not sound, or an image came twice with other detections, as it does
                where the metric was not reset between epochs.
        """
        if not self._is_synced or not _several():
            return self._result()
        group = self.process_group
        first = torch.distributed.get_process_group_ranks(group or torch.distributed.group.WORLD)[0]
        answer: list[Any] = [None, 0]
        if torch.distributed.get_rank() == first:
            try:
                answer = [self._result(), self.images_seen]
            except Exception as error:  # the others are waiting: all of them shall stop with it
                answer = [error, 0]
        torch.distributed.broadcast_object_list(answer, src=first, group=group)
        if isinstance(answer[0], Exception):
            raise answer[0]
        self.images_seen = answer[1]
        return answer[0]

    def collected(self) -> tuple[Annotations, DetectionArrays]:
        """Return the ground truth of the images that were seen and their detections, of all processes within ``sync_context()``.

        Raises:
            DataError: no image was seen, or an image came twice with other detections.
        """
        if isinstance(self.rows, list):
            self.rows, self._batches = [dim_zero_cat(self.rows)], 0  # the pieces are not needed twice
        rows = dim_zero_cat(self.rows).cpu().numpy()
        first = self._first_sight(rows)
        seen = first & (rows[:, 0] < 0)
        if not seen.any():
            raise DataError(f"{self.annotations.root}: nothing to evaluate: no image was given to update()")
        annotations = self.annotations
        if seen.sum() < len(annotations):
            annotations = annotations.subset(np.sort(-1 - rows[seen, 0].astype(np.int64)))
        kept = np.flatnonzero(first & ~seen)
        ids = self.annotations.image_ids[rows[kept, 0].astype(np.int64)]
        boxes, scores = (rows[kept, part].astype(np.float64, copy=False) for part in (slice(3, None), 2))
        return annotations, DetectionArrays(ids, boxes, scores, rows[kept, 1].astype(np.int64))

    def sync(self, *args: Any, **kwargs: Any) -> None:
        """Gather what all processes have, as float64, since one of them may have seen other numbers than the others."""
        if _several() and not self._is_synced:
            self.rows, self._batches = [dim_zero_cat(self.rows).double()], 0
        super().sync(*args, **kwargs)

    def reset(self) -> None:
        """Forget everything."""
        super().reset()
        self._start()

    def _start(self) -> None:
        """An empty table: a process that never sees an image has something to gather too."""
        self._batches = 0  # that are in pieces of their own, at the end of the rows
        self.rows.append(torch.zeros((0, _COLUMNS), dtype=torch.float32, device=self._place()))

    def _place(self) -> torch.device:
        return torch.device("cpu") if self.device.type == "mps" else self.device

    def _result(self) -> dict[str, Any]:
        annotations, detections = self.collected()
        self.images_seen = len(annotations)
        return self.evaluate(annotations, detections)

    def _packed(self, found: Detection, image_id: int) -> Tensor:
        row = self._row_of.get(image_id)
        if row is None:
            raise DataError(
                f"image id {image_id} is not one of the {len(self.annotations)} images of the ground truth "
                f"({self.annotations.root}): evaluate on the split that the images come from"
            )
        lengths = {key: len(found[key]) for key in ("boxes", "scores", "labels")}
        if len(set(lengths.values())) != 1:
            raise ValueError(f"image id {image_id}: boxes, scores and labels must be equally many, got {lengths}")
        small = len(self.annotations) < _WHOLE and self.annotations.num_classes < _WHOLE
        exact = small and all(found[key].dtype in _HELD_BY_FLOAT32 for key in ("boxes", "scores"))
        dtype = torch.float32 if exact else torch.float64
        packed = torch.zeros((lengths["scores"] + 1, _COLUMNS), dtype=dtype, device=self._place())
        packed[0, 0], packed[0, 1] = -1 - row, torch.distributed.get_rank() if _several() else 0
        packed[1:, 0] = row
        packed[1:, 1] = found["labels"].detach().to(packed.device)
        packed[1:, 2] = found["scores"].detach().to(packed.device)
        packed[1:, 3:] = found["boxes"].detach().reshape(-1, 4).to(packed.device)
        return packed

    def _first_sight(self, rows: npt.NDArray[np.floating]) -> npt.NDArray[np.bool_]:
        """Which rows belong to the first time that their image was seen."""
        starts = np.flatnonzero(rows[:, 0] < 0)
        lengths = np.diff(np.append(starts, len(rows)))
        _, first, inverse = np.unique(rows[starts, 0], return_index=True, return_inverse=True)
        again = np.flatnonzero(first[inverse] != np.arange(len(starts)))
        for block in again.tolist():
            one, two = (rows[starts[b] : starts[b] + lengths[b]] for b in (first[inverse[block]], block))
            if one[0, 1] == two[0, 1] and not np.array_equal(one, two):
                image_id = self.annotations.image_ids[-1 - int(one[0, 0])]
                raise DataError(
                    f"image id {image_id} came twice, with other detections the second time: call reset() before the next epoch"
                )
        keep = np.ones(len(starts), np.bool_)
        keep[again] = False
        return np.repeat(keep, lengths)


class CocoEvaluator(DetectionMetric):
    """COCO's twelve numbers and AP of each class; see :func:`~detpipe.evaluation.coco.evaluate_coco`.

    Args:
        annotations: the ground truth of I images.
        backend: ``"detpipe"``, or ``"pycocotools"``, the reference.
        max_detections: how many detections of a class in an image count, rising.
        settings: of torchmetrics, such as ``process_group``.

    Example:
        >>> from detpipe.evaluation import CocoEvaluator, read_coco_annotations
        >>> metric = CocoEvaluator(read_coco_annotations("instances_val2017.json"))  # doctest: +SKIP
        >>> for images, targets in loader:  # doctest: +SKIP
        ...     metric.update(detector(images), [target["image_id"] for target in targets])
        >>> metric.compute()["AP"]  # doctest: +SKIP
    """

    def __init__(
        self,
        annotations: Annotations,
        backend: Backend = "detpipe",
        max_detections: Sequence[int] = (1, 10, 100),
        **settings: Any,
    ) -> None:
        super().__init__(annotations, **settings)
        self.backend: Backend = backend
        self.max_detections = tuple(max_detections)

    def evaluate(self, annotations: Annotations, detections: DetectionArrays) -> dict[str, Any]:
        """Compute COCO's numbers."""
        return evaluate_coco(annotations, detections, self.backend, self.max_detections)


class VocEvaluator(DetectionMetric):
    """VOC's average precision of each class and their mean; arguments as of :func:`~detpipe.evaluation.voc.evaluate_voc`.

    ``settings`` are those of torchmetrics, such as ``process_group``.
    """

    def __init__(
        self,
        annotations: Annotations,
        protocol: Literal["voc07", "voc10"] = "voc10",
        iou_threshold: float = 0.5,
        strict: bool = False,
        **settings: Any,
    ) -> None:
        super().__init__(annotations, **settings)
        self.protocol: Literal["voc07", "voc10"] = protocol
        self.iou_threshold, self.strict = iou_threshold, strict

    def evaluate(self, annotations: Annotations, detections: DetectionArrays) -> dict[str, Any]:
        """Compute VOC's numbers."""
        return evaluate_voc(annotations, detections, self.protocol, self.iou_threshold, self.strict)


class LvisEvaluator(DetectionMetric):
    """LVIS's numbers, of images that were searched for some classes only; as :func:`~detpipe.evaluation.lvis.evaluate_lvis`.

    ``settings`` are those of torchmetrics, such as ``process_group``.
    """

    def __init__(self, annotations: Annotations, max_detections: int = 300, **settings: Any) -> None:
        super().__init__(annotations, **settings)
        self.max_detections = max_detections

    def evaluate(self, annotations: Annotations, detections: DetectionArrays) -> dict[str, Any]:
        """Compute LVIS's numbers."""
        return evaluate_lvis(annotations, detections, self.max_detections)


def _several() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()

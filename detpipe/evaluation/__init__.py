"""Detections and ground truth -> mean average precision, by named protocols.

    Detection tensors, batch by batch --CocoEvaluator.update--> DetectionArrays --evaluate--> metrics --format_table--> text
    result file --read_detections-------------------------------^

Every number is a function of the set of detections alone: they are put into one total order first, so that neither the
order of arrival nor batch size, worker count or number of processes moves it.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from detpipe.evaluation.coco import evaluate_coco
from detpipe.evaluation.files import read_coco_annotations, read_detections, write_detections
from detpipe.evaluation.lvis import evaluate_lvis
from detpipe.evaluation.protocols import PROTOCOLS, evaluate
from detpipe.evaluation.records import canonical_order
from detpipe.evaluation.table import format_table
from detpipe.evaluation.voc import evaluate_voc
from detpipe.evaluation.voc_files import read_voc_detections

if TYPE_CHECKING:
    from detpipe.evaluation.metrics import CocoEvaluator, LvisEvaluator, VocEvaluator

__all__ = [
    "PROTOCOLS",
    "CocoEvaluator",
    "LvisEvaluator",
    "VocEvaluator",
    "canonical_order",
    "evaluate",
    "evaluate_coco",
    "evaluate_lvis",
    "evaluate_voc",
    "format_table",
    "read_coco_annotations",
    "read_detections",
    "read_voc_detections",
    "write_detections",
]


def __getattr__(name: str) -> Any:
    """Import the metrics when they are first used: torchmetrics takes seconds."""
    if name in ("CocoEvaluator", "LvisEvaluator", "VocEvaluator"):
        return getattr(import_module("detpipe.evaluation.metrics"), name)
    raise AttributeError(f"module 'detpipe.evaluation' has no attribute {name!r}")

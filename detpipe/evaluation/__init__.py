"""Detections and ground truth -> mean average precision, by named protocols.

    Detection tensors, image by image --pack--> DetectionArrays --evaluate--> metrics --format_table--> text
    result file --read_detections--------------------^

Every number is a function of the set of detections alone: they are put into one total order first, so that neither the
order of arrival nor batch size, worker count or number of processes moves it.
"""

from detpipe.evaluation.coco import evaluate_coco
from detpipe.evaluation.files import read_coco_annotations, read_detections, write_detections
from detpipe.evaluation.lvis import evaluate_lvis
from detpipe.evaluation.pack import concatenate, pack
from detpipe.evaluation.protocols import PROTOCOLS, evaluate
from detpipe.evaluation.records import canonical_order
from detpipe.evaluation.table import format_table
from detpipe.evaluation.voc import evaluate_voc
from detpipe.evaluation.voc_files import read_voc_detections

__all__ = [
    "PROTOCOLS",
    "canonical_order",
    "concatenate",
    "evaluate",
    "evaluate_coco",
    "evaluate_lvis",
    "evaluate_voc",
    "format_table",
    "pack",
    "read_coco_annotations",
    "read_detections",
    "read_voc_detections",
    "write_detections",
]

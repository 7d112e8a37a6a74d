"""Proposal sources: boxes worth a look."""

from detpipe.proposals.anchors import Anchors
from detpipe.proposals.dense_grid import DenseGrid
from detpipe.proposals.edge_boxes import EdgeBoxes
from detpipe.proposals.from_detector import FromDetector
from detpipe.proposals.image_source import ImageProposals
from detpipe.proposals.opencv_selective_search import OpenCVSelectiveSearch
from detpipe.proposals.precomputed import PrecomputedProposals
from detpipe.proposals.registry import SOURCES, make_source
from detpipe.proposals.rpn import RPN
from detpipe.proposals.rpn_objective import RPNObjective
from detpipe.proposals.rpn_selection import ProposalSelection
from detpipe.proposals.selective_search import SelectiveSearch
from detpipe.proposals.superpixels import Superpixels
from detpipe.proposals.union import Union

__all__ = [
    "RPN",
    "SOURCES",
    "Anchors",
    "DenseGrid",
    "EdgeBoxes",
    "FromDetector",
    "ImageProposals",
    "OpenCVSelectiveSearch",
    "PrecomputedProposals",
    "ProposalSelection",
    "RPNObjective",
    "SelectiveSearch",
    "Superpixels",
    "Union",
    "make_source",
]

"""Proposal sources: boxes worth a look."""

from detpipe.proposals.anchors import Anchors
from detpipe.proposals.dense_grid import DenseGrid
from detpipe.proposals.precomputed import PrecomputedProposals
from detpipe.proposals.rpn import RPN
from detpipe.proposals.rpn_objective import RPNObjective
from detpipe.proposals.rpn_selection import ProposalSelection

__all__ = ["RPN", "Anchors", "DenseGrid", "PrecomputedProposals", "ProposalSelection", "RPNObjective"]

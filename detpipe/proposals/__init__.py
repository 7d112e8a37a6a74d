"""Proposal sources: boxes worth a look."""

from detpipe.proposals.dense_grid import DenseGrid
from detpipe.proposals.precomputed import PrecomputedProposals

__all__ = ["DenseGrid", "PrecomputedProposals"]

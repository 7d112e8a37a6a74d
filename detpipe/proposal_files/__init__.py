"""Proposals in files: a store that is opened in no time, converters for other programs' files, and making them in bulk.

Needs neither PyTorch nor Lightning.
"""

from detpipe.proposal_files.converters import convert
from detpipe.proposal_files.store import ProposalStore, write_store
from detpipe.proposal_files.store_format import ProposalWriter

__all__ = ["ProposalStore", "ProposalWriter", "convert", "write_store"]

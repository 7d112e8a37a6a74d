"""Stages of one's own: a backbone, a proposal source and a head, as docs/own_stage.md writes them."""

from .backbone import SmallNet
from .head import RelationHead
from .source import CenterProposals

__all__ = ["CenterProposals", "RelationHead", "SmallNet"]

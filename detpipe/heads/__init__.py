"""RoI heads: features and proposals to detections."""

from detpipe.heads.base import ProposalHead
from detpipe.heads.cascade import CascadeHead, LaterStages
from detpipe.heads.estimators import GlimpseEstimator, Pathwise, Reinforce
from detpipe.heads.fast_rcnn import FastRCNNHead
from detpipe.heads.glimpse import Glimpse, GlimpseSettings
from detpipe.heads.objective import BoxLoss, ClassLoss, Objective
from detpipe.heads.postprocess import Postprocess
from detpipe.heads.recurrent import AttentionalHead, GlimpseSequence
from detpipe.heads.sampling import RoISampler

__all__ = [
    "AttentionalHead",
    "BoxLoss",
    "CascadeHead",
    "ClassLoss",
    "FastRCNNHead",
    "Glimpse",
    "GlimpseEstimator",
    "GlimpseSequence",
    "GlimpseSettings",
    "LaterStages",
    "Objective",
    "Pathwise",
    "Postprocess",
    "ProposalHead",
    "Reinforce",
    "RoISampler",
]

"""What a head is written with; ``docs/own_stage.md`` writes one.

A head is a :class:`ProposalHead` with two methods: ``losses`` is trained on sampled RoIs, ``detect`` says about all proposals
what becomes a detection. Everything here takes and gives the boxes of a batch as ``[N, P, ...]``, with a mask ``[N, P]``.

N images, P boxes an image, S sampled RoIs an image, C channels, h x w bins, K foreground classes, B = K boxes a RoI (1 if
class-agnostic).

==================  =====================================================================================================
ProposalHead        samples, calls ``losses`` or ``detect``, and postprocesses
RoISampler          N proposals ``[P_i, 4]`` and targets -> :class:`RoITargets`, S of each image
RoITargets          rois ``[N, S, 4]``, labels ``[N, S]``, boxes ``[N, S, 4]``, valid and foreground ``[N, S]``
Found               scores ``[N, P, K]`` and boxes ``[N, P, B, 4]``; ``Found.of`` makes them of logits and deltas
Postprocess         of what was found, the detections
in_parts            pools, and what is done for each box by itself, a bounded number of boxes at a time
RoIPooler, RoIAlign features and ``[N, P, 4]`` -> ``[N, P, C, h, w]``
hidden_layers       ``[R, C, h, w]`` -> ``[R, width]``
output_layers       the classifier ``[R, width]`` -> ``[R, K + 1]`` and the regressor ``[R, width]`` -> ``[R, 4 B]``
box_outputs         both of ``[N, P, width]``: logits ``[N, P, K + 1]`` and deltas ``[N, P, B, 4]``
box_losses          ``loss_classifier`` and ``loss_box_reg`` of RoIs, logits and deltas; ``self.box_losses`` by the head's objective
Objective           which losses: ClassLoss, BoxLoss, the hardest RoIs, and a quality that ranks
of_label            the box of each RoI's label: ``[N, S, B, 4]`` -> ``[N, S, 4]``
mark_class_outputs  which rows of a layer belong to classes, so that fine-tuning takes them over class by class
pad                 N tensors ``[P_i, ...]`` -> ``[N, P, ...]`` and their mask
box_ops             ``encode``, ``decode``, ``clip``, ``iou``, ``valid``, ``fill`` of :mod:`detpipe.boxes`
outlines            boxes ``[..., 4]`` -> the corners ``[..., 4, 2]`` that ``Found.glimpses`` takes
Features, Target    what a head is given, Detection and Losses what it returns: types, no code
==================  =====================================================================================================
"""

from __future__ import annotations

from detpipe import boxes as box_ops
from detpipe.heads.base import Found, ProposalHead, in_parts, outlines
from detpipe.heads.layers import box_outputs, hidden_layers, output_layers
from detpipe.heads.objective import BoxLoss, ClassLoss, Objective, box_losses, of_label
from detpipe.heads.postprocess import Postprocess
from detpipe.heads.sampling import RoISampler, RoITargets
from detpipe.matching import pad
from detpipe.roi_pooling import RoIAlign, RoIPooler
from detpipe.stages import Losses, mark_class_outputs
from detpipe.types import Detection, Features, Target

__all__ = [
    "BoxLoss",
    "ClassLoss",
    "Detection",
    "Features",
    "Found",
    "Losses",
    "Objective",
    "Postprocess",
    "ProposalHead",
    "RoIAlign",
    "RoIPooler",
    "RoISampler",
    "RoITargets",
    "Target",
    "box_losses",
    "box_ops",
    "box_outputs",
    "hidden_layers",
    "in_parts",
    "mark_class_outputs",
    "of_label",
    "outlines",
    "output_layers",
    "pad",
]

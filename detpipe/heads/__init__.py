"""RoI heads: features and proposals to detections."""

from detpipe.heads.fast_rcnn import FastRCNNHead
from detpipe.heads.postprocess import Postprocess
from detpipe.heads.sampling import RoISampler

__all__ = ["FastRCNNHead", "Postprocess", "RoISampler"]

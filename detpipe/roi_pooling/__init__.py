"""RoI pooling: feature maps and boxes to one small map a box. Needs PyTorch and torchvision, not Lightning."""

from detpipe.roi_pooling.align import RoIAlign
from detpipe.roi_pooling.max_pool import RoIMaxPool
from detpipe.roi_pooling.pooler import RoIPooler

__all__ = ["RoIAlign", "RoIMaxPool", "RoIPooler"]

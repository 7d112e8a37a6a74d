"""RoI pooling: feature maps and boxes to one small map a box. Needs PyTorch and torchvision, not Lightning."""

from detpipe.roi_pooling.align import RoIAlign, roi_align
from detpipe.roi_pooling.feature_superpixels import feature_superpixels
from detpipe.roi_pooling.levels import FPNLevels
from detpipe.roi_pooling.max_pool import RoIMaxPool, roi_max_pool
from detpipe.roi_pooling.points import pool_points
from detpipe.roi_pooling.pooler import MultiLevel, RoIPooler
from detpipe.roi_pooling.precise import PreciseRoIPool, precise_roi_pool
from detpipe.roi_pooling.rotated import RotatedRoIAlign, rotated_roi_align
from detpipe.roi_pooling.scripting import make_scriptable
from detpipe.roi_pooling.superpixel import superpixel_pool, superpixel_smooth
from detpipe.roi_pooling.superpixel_pooler import SuperpixelPool

__all__ = [
    "FPNLevels",
    "MultiLevel",
    "PreciseRoIPool",
    "RoIAlign",
    "RoIMaxPool",
    "RoIPooler",
    "RotatedRoIAlign",
    "SuperpixelPool",
    "feature_superpixels",
    "pool_points",
    "precise_roi_pool",
    "roi_align",
    "roi_max_pool",
    "rotated_roi_align",
    "superpixel_pool",
    "superpixel_smooth",
]

make_scriptable()

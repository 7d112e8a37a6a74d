"""RoI pooling: feature maps and boxes to one small map a box. Needs PyTorch and torchvision, not Lightning.

Words of this package:
    cell: a number of channels at a place of a feature map; cell k sits at coordinate k.
    table, row: all cells of all maps of a call, one row of channels each; ``chosen`` is the map of each box in it.
    bin: one cell of the result; a sample is a point in it that is read bilinearly.
    axis taps: the cells that a bin reads along one axis, each with a weight.
    bag: rows that are summed with weights, whatever they are.
    given boxes: boxes in the user's layout, which kernels read; RoIs: the same as one row a box with its image.
    scene: given boxes, the sizes of the maps that they lie on, and how bins are read: what every operator is called with.
    placement: the RoIs of a scene with the map, and the scale, of each.
    tile: the cells that a program owns on the way back from bins to cells.
"""

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

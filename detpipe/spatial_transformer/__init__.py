"""Spatial transformers: a network chooses where to look, a grid is laid there, and the map is sampled on it.

Jaderberg et al., "Spatial Transformer Networks", 2015, arXiv 1506.02025. Needs PyTorch, not Lightning::

    localization    [N, C, H, W] -> theta [N, P]               ConvLocalization, PooledLocalization, or any module
      |
    grid            theta, (h, w) -> points [N, h, w, 2]       AffineGrid, SimilarityGrid, AttentionGrid, ProjectiveGrid,
      |                                                        ThinPlateSplineGrid
    sampler         [N, C, H, W], points -> [N, C, h, w]       Sampler

:class:`SpatialTransformer` is the three in a row; :class:`ParallelTransformers` are several beside each other, and
``nn.Sequential`` is several in series.

Convention, of every number in this package:

- A point is (x, y): x along the width, to the right, before y along the height, downwards. A size is (height, width).
- Coordinates are relative to the map, from -1 to 1 along each axis, and measured to its edges: -1 is the left (upper) edge
  of the first cell and 1 the right (lower) edge of the last one, as with ``align_corners=False``. The center of cell j of
  W is at (2 j + 1) / W - 1, and coordinate x is W (x + 1) / 2 - 1/2 in cells whose centers are whole numbers.
- A transform goes from the output to the input: it takes a point of the output and says where in the input its value is
  read. A scale below one therefore enlarges what the map shows, and a shift to the right moves its content to the left.
- A positive angle turns the place that is looked at from x towards y, clockwise as seen, so the content turns back,
  counter-clockwise.

Deviations from the paper, which all parts share:

1. The paper, and texts after it, put -1 and 1 on the centers of the first and the last cell; here they are the edges, so that
   sizes may change without a shift and a map may have a single cell.
2. A parameter that is not a number, or is infinite, makes its whole transform the identity, without a gradient;
   parameters are clamped at a million. The parameters that a transformer returns on request are those that the
   localization gave, so that such a fault can be seen.

Precision: grids are computed in float32 at least, whatever the data type of the maps and under autocast, because in half
precision a coordinate of a large map is wrong by whole cells.
"""

from detpipe.spatial_transformer.base import Grid, cell_centers
from detpipe.spatial_transformer.grids import AffineGrid, AttentionGrid, ProjectiveGrid, SimilarityGrid
from detpipe.spatial_transformer.localization import ConvLocalization, PooledLocalization, ThetaLayer
from detpipe.spatial_transformer.sampler import Sampler
from detpipe.spatial_transformer.thin_plate_spline import ThinPlateSplineGrid
from detpipe.spatial_transformer.transformer import ParallelTransformers, SpatialTransformer, Transformed

__all__ = [
    "AffineGrid",
    "AttentionGrid",
    "ConvLocalization",
    "Grid",
    "ParallelTransformers",
    "PooledLocalization",
    "ProjectiveGrid",
    "Sampler",
    "SimilarityGrid",
    "SpatialTransformer",
    "ThetaLayer",
    "ThinPlateSplineGrid",
    "Transformed",
    "cell_centers",
]

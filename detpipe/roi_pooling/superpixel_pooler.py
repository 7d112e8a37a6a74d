"""A pooler that reads whole superpixels: regions of free form in the place of squares.

After Kwak, Hong and Han, "Weakly Supervised Semantic Segmentation Using Superpixel Pooling Network", AAAI 2017.

Deviations: superpixels stand in for cells, and boxes are pooled from them by RoIAlign, so that the result has the shape that
a box head expects; superpixels are of the feature map itself (:mod:`detpipe.roi_pooling.feature_superpixels`), unless the
image's own are given.

N images, C channels, R boxes of the batch, P boxes an image, h x w bins.
"""

from __future__ import annotations

from torch import Tensor

from detpipe.roi_pooling.align import align
from detpipe.roi_pooling.feature_superpixels import check_clustering, feature_superpixels
from detpipe.roi_pooling.layouts import Boxes, read_samples
from detpipe.roi_pooling.levels import FPNLevels
from detpipe.roi_pooling.pooler import RoIPooler, read_levels
from detpipe.roi_pooling.scene import Scene
from detpipe.roi_pooling.superpixel import read_labels, superpixel_smooth

SUPERPIXELS = "superpixels"  # the key of features under which the image's own may be given


class SuperpixelPool(RoIPooler):
    """Average bilinear samples in each bin of each box, of a map in which every cell holds its superpixel's mean.

    Differentiable in the features and in the boxes; which cells make a superpixel has no gradient.

    Args:
        output_size: cells of the result, one number or (height, width).
        spacing: cells between the seeds of superpixels, at each level.
        iterations: rounds of assigning cells to seeds and moving the seeds; 0 gives squares of ``spacing`` cells.
        compactness: 0 clusters by the features alone; at 1 a distance of ``spacing`` cells weighs as much as one of one
            standard deviation of the features.
        sampling_ratio: samples along each axis of a bin; 0 takes as many as the bin has cells, rounded up.
        levels: which pyramid level a box is pooled from; in Python any function (boxes ``[R, 4]``, strides) -> ``[R]``.

    Raises:
        ValueError: a number is out of range.

    Example:
        >>> import torch
        >>> features = {"c4": torch.ones(1, 2, 8, 8)}
        >>> SuperpixelPool(3)(features, [torch.tensor([[0.0, 0.0, 64.0, 64.0]])], {"c4": 16}).shape
        torch.Size([1, 2, 3, 3])
    """

    def __init__(
        self,
        output_size: int | tuple[int, int] = 7,
        spacing: int = 4,
        iterations: int = 3,
        compactness: float = 0.5,
        sampling_ratio: int = 2,
        levels: FPNLevels = FPNLevels(),  # noqa: B008 (frozen)
    ) -> None:
        super().__init__(output_size, levels)
        check_clustering(spacing, iterations, compactness)
        self.spacing, self.iterations, self.compactness = spacing, iterations, compactness
        self.sampling_ratio = read_samples(sampling_ratio)

    def pool(self, maps: list[Tensor], scene: Scene) -> Tensor:
        """Pool the boxes of a scene: ``[R, C, h, w]``."""
        return align(maps, scene._replace(samples=self.sampling_ratio))

    def forward(self, features: dict[str, Tensor], boxes: Boxes, strides: dict[str, int]) -> Tensor:
        """Pool each box from the level that suits its size; see :meth:`RoIPooler.forward`.

        Args:
            features: level name -> ``[N, C, H_l, W_l]``; and, if the image's own superpixels are to be read at every
                level, ``"superpixels"`` -> ``[N, Hl, Wl]`` of an integer type, of any size, over the same image edge to
                edge. Its label -1 leaves cells as they are. Its number of superpixels is looked up, which waits for a GPU.
            boxes: ``[R, 5]``, a list of N tensors ``[P_i, 4]``, or ``[N, P, 4]``, xyxy in image pixels.
            strides: image pixels a cell of each level.

        Returns:
            ``[R, C, h, w]``, or ``[N, P, C, h, w]`` for boxes ``[N, P, 4]``.
        """
        maps = dict(zip(strides, read_levels(features, strides), strict=True))
        if SUPERPIXELS in features:
            first = next(iter(maps.values()))
            labels, superpixels = read_labels(features[SUPERPIXELS], first, name=f"features[{SUPERPIXELS!r}]")
            smooth = {level: superpixel_smooth(values, labels, superpixels) for level, values in maps.items()}
        else:
            smooth = {level: self._smooth(values) for level, values in maps.items()}
        return super().forward(smooth, boxes, strides)

    def _smooth(self, values: Tensor) -> Tensor:
        labels = feature_superpixels(values, self.spacing, self.iterations, self.compactness)
        seeds = -(-values.shape[2] // self.spacing) * -(-values.shape[3] // self.spacing)
        return superpixel_smooth(values, labels, seeds)

"""Superpixel pooling: the mean, sum or maximum of the features over each superpixel.

Kwak, Hong and Han, "Weakly Supervised Semantic Segmentation Using Superpixel Pooling Network", AAAI 2017.

Deviations: also sum and maximum; labels need not have the resolution of the features, and may leave pixels out.

Convention: label maps and feature maps cover the same image, edge to edge, and the value of a cell or pixel sits at its
center. Differentiable in the features, any number of times.

N images, C channels, S superpixels an image, H x W cells, Hl x Wl label pixels.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from detpipe.roi_pooling.bags import bag_sum
from detpipe.roi_pooling.layouts import check_features, describe
from detpipe.roi_pooling.maps import cell_table
from detpipe.roi_pooling.superpixel_ops import read_axes, read_cells


def superpixel_pool(
    features: Tensor,
    labels: Tensor,
    num_superpixels: int | None = None,
    reduce: Literal["mean", "max", "sum"] = "mean",
    resolution: Literal["labels", "features"] = "labels",
) -> tuple[Tensor, Tensor]:
    """Pool the features of each superpixel of each image.

    The two resolutions are the same where labels and features have one size. Where they have not:

    - ``"labels"`` reads the features at the center of each label pixel by bilinear interpolation, as
      ``interpolate(mode="bilinear", align_corners=False)`` would, but without making that map. The count is in pixels.
      A label map smaller than the features reads those around its pixels' centers, and none between.
    - ``"features"`` reads each cell by the share of it that the superpixel covers. The count is an area in cells. All
      cells are read whichever map is larger, and those that no ignored pixel touches are read with weight 1 in all.

    A maximum is over the pixels that are read (``"labels"``), or over the cells that are covered at all
    (``"features"``); its gradient goes to where it was found, the first in row-major order of several.

    Without ``num_superpixels`` the labels must be looked at, which waits for a GPU, breaks a compiled graph and is not
    possible inside ``torch.func.vmap``; with it none of that is so. Ids are checked on the CPU, where that costs nothing,
    and on another device only inside ``torch.autograd.detect_anomaly()``; without a check an id out of range is ignored.

    Args:
        features: ``[N, C, H, W]``.
        labels: ``[N, Hl, Wl]`` of an integer type: the superpixel of each pixel, from 0; -1 is ignored. Ids may have
            gaps, and other ids may occur in each image.
        num_superpixels: S; by default the largest id of the batch, plus 1.
        reduce: what to make of the features of a superpixel.
        resolution: at which resolution features and labels meet.

    Returns:
        ``[N, S, C]`` in the features' dtype, 0 for an absent id; and ``[N, S]`` counts, float32 at least.

    Raises:
        ValueError: an argument of another shape, type, device or range, or an id that is out of range.

    Example:
        >>> features = torch.tensor([[[[0.1, 0.2], [0.3, 0.4]]]])
        >>> pooled, count = superpixel_pool(features, torch.tensor([[[0, 0], [1, 2]]]))
        >>> pooled[0, :, 0], count[0]
        (tensor([0.1500, 0.3000, 0.4000]), tensor([2., 1., 1.]))
    """
    if reduce not in ("mean", "max", "sum"):
        raise ValueError(f"reduce must be 'mean', 'max' or 'sum', got {reduce!r}")
    if resolution not in ("labels", "features"):
        raise ValueError(f"resolution must be 'labels' or 'features', got {resolution!r}")
    labels, superpixels = read_labels(labels, features, num_superpixels)
    return _pool(features, labels, superpixels, reduce, resolution)


def superpixel_smooth(features: Tensor, labels: Tensor, num_superpixels: int | None = None) -> Tensor:
    """Replace what each cell holds by the means of the superpixels that it belongs to, by the area of each in the cell.

    The part of a cell that is ignored (-1) keeps the cell's own value.

    Args:
        features: ``[N, C, H, W]``.
        labels: ``[N, Hl, Wl]`` of an integer type, as :func:`superpixel_pool` takes them.
        num_superpixels: S; by default the largest id of the batch, plus 1.

    Returns:
        ``[N, C, H, W]``, channels last in memory. Differentiable in the features.

    Raises:
        ValueError: an argument of another shape, type, device or range, or an id that is out of range.

    Example:
        >>> features = torch.tensor([[[[1.0, 2.0], [3.0, 4.0]]]])
        >>> superpixel_smooth(features, torch.tensor([[[0, 0], [1, -1]]]))
        tensor([[[[1.5000, 1.5000],
                  [3.0000, 4.0000]]]])
    """
    labels, superpixels = read_labels(labels, features, num_superpixels)
    images, channels, height, width = features.shape
    exact = features.to(torch.promote_types(features.dtype, torch.float32))
    means, count = superpixel_pool(exact, labels, superpixels, resolution="features")
    spread = torch.ops.detpipe.superpixel_sum_adjoint
    where = (labels, height, width, superpixels, "features")
    smooth = spread(means.flatten(0, 1), *where)
    known = spread((count.flatten()[:, None] > 0).to(means.dtype), *where)  # [cells, 1] area with a label
    rows = cell_table([exact]).rows
    mixed = smooth + torch.where(known < 1 - 1e-5, 1 - known, 0) * rows
    return mixed.to(features.dtype).view(images, height, width, channels).permute(0, 3, 1, 2)


def read_labels(
    labels: Tensor, features: Tensor, num_superpixels: int | None = None, name: str = "labels"
) -> tuple[Tensor, int]:
    """Check a label map against a feature map, but for the ids.

    Args:
        labels: ``[N, Hl, Wl]`` of an integer type.
        features: ``[N, C, H, W]``.
        num_superpixels: S; by default the largest id of the batch, plus 1.
        name: of the labels, for messages.

    Returns:
        The labels, int32 or int64; and S.

    Raises:
        ValueError: an argument of another shape, type, device or range.
    """
    check_features(features)
    if not isinstance(labels, Tensor):
        raise ValueError(f"{name} must be a tensor [N, Hl, Wl], got {describe(labels)}")
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise ValueError(f"{name} must be of an integer type, got {labels.dtype}: convert them with .long()")
    if labels.ndim != 3 or labels.shape[0] != features.shape[0] or 0 in labels.shape[1:]:
        raise ValueError(
            f"{name} must be [N, Hl, Wl] with N = {features.shape[0]}, as the features have, and at least one pixel; "
            f"got {list(labels.shape)}"
        )
    if labels.device != features.device:
        raise ValueError(f"{name} are on {labels.device} and the features on {features.device}: move one of them")
    if labels.dtype not in (torch.int32, torch.int64):
        labels = labels.long()
    if num_superpixels is None:
        return labels, max(0, int(labels.max()) + 1) if labels.numel() else 0
    if isinstance(num_superpixels, bool) or not isinstance(num_superpixels, int | torch.SymInt) or num_superpixels < 0:
        raise ValueError(f"num_superpixels must be a whole number, 0 or larger, got {num_superpixels!r}")
    return labels, num_superpixels


def _pool(features: Tensor, labels: Tensor, superpixels: int, reduce: str, resolution: str) -> tuple[Tensor, Tensor]:
    images, channels, height, width = features.shape
    exact = torch.promote_types(features.dtype, torch.float32)
    pixels = torch.ops.detpipe.superpixel_count(labels, superpixels)
    area = 1.0 if resolution == "labels" else height * width / (labels.shape[1] * labels.shape[2])
    count = pixels.to(exact) * area
    rows = cell_table([features]).rows
    if reduce == "max":
        pooled = _pool_max(rows, labels, (height, width), superpixels, resolution).to(exact)
    else:
        pooled = torch.ops.detpipe.superpixel_sum(rows, labels, height, width, superpixels, resolution)
    pooled = pooled.view(images, superpixels, channels)
    if reduce == "mean":
        pooled = pooled / torch.where(count > 0, count, 1)[..., None]
    return pooled.to(features.dtype), count


def _pool_max(rows: Tensor, labels: Tensor, size: tuple[int, int], superpixels: int, resolution: str) -> Tensor:
    """Read ``[N * S, C]`` maxima where they were found, so that gradients go there."""
    place = torch.ops.detpipe.superpixel_argmax(rows.detach(), labels, *size, superpixels, resolution)
    exact = torch.promote_types(rows.dtype, torch.float32)
    at_cells = resolution == "features" or labels.shape[1:] == size
    each = size[0] * size[1] if at_cells else labels.shape[1] * labels.shape[2]
    first = (torch.arange(place.shape[0], device=rows.device) // max(1, superpixels) * each)[:, None]
    found = (place.clamp(min=0) + first).flatten()
    if at_cells:
        cells, weights = found[:, None], torch.ones_like(found, dtype=exact)
    else:
        y, x = read_axes(labels, size, resolution)
        cells, weights = read_cells(found, torch.ones_like(found), y, x, size, exact)
    channels = rows.shape[1]
    channel = torch.arange(channels, device=rows.device).repeat(place.shape[0])
    index = (cells * channels + channel[:, None]).flatten()
    offsets = torch.arange(found.shape[0] + 1, device=rows.device) * cells.shape[1]
    values = bag_sum(rows.reshape(-1, 1), index, weights.flatten(), offsets)
    return torch.where(place >= 0, values.view(place.shape), 0)

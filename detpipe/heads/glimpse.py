"""A second look, at a place that the head chooses itself: a spatial transformer inside of the proposal's frame.

Jaderberg et al., "Spatial Transformer Networks", 2015, arXiv 1506.02025. From the pooled features of a proposal a localization
network predicts a transform relative to the proposal's box; the feature map itself is sampled there, so that the glimpse can
zoom, rotate and look beyond the proposal, and what it sees joins the pooled features.

Deviations:
1. The transform acts on the frame of a box instead of the whole image, and all boxes of a batch share one map.
2. Its parameters are bounded, by a hyperbolic tangent; what the last layer says is multiplied by ``step``, in the place of the
   lower learning rate that localization networks are given.
3. The untrained glimpse changes nothing: with "sum" it is weighed by a gain for each channel that starts at zero, with "concat"
   a head starts the weights of its part at zero, and with "max" it sees what the pooler sees, if that is RoIAlign with
   fixed samples. Localization learns as soon as gain or weights have left zero.

Convention: the frame of a box goes from -1 to 1, left to right and top to bottom; a transform takes a point of the glimpse to
where it is read, in that frame. :mod:`detpipe.spatial_transformer` says the rest. Differentiable in features and parameters;
boxes are taken as they are, without a gradient.

N images, P boxes an image, C channels, h x w bins, S samples a bin, M points of an outline.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn

from detpipe.roi_pooling import FPNLevels, RoIPooler, pool_points
from detpipe.roi_pooling.grid_samples import is_exporting
from detpipe.spatial_transformer import (
    AffineGrid,
    AttentionGrid,
    Grid,
    ProjectiveGrid,
    ThetaLayer,
    ThinPlateSplineGrid,
    cell_centers,
)
from detpipe.support.numbers import check_numbers, check_whole
from detpipe.types import Features

Kind = Literal["affine", "attention", "projective", "tps"]
Fusion = Literal["sum", "concat", "max"]
LARGEST_PERSPECTIVE = 0.4  # below it every homography is exact within the box
EDGE_POINTS = 8  # of an outline, on each side: thin-plate splines bend
OUTLINE = 4 * EDGE_POINTS  # M


@dataclass(frozen=True)
class GlimpseSettings:
    """Where a glimpse may look, and what becomes of what it sees.

    Args:
        kind: "affine" (six parameters), "attention" (scale and shift), "projective" (eight), "tps" (4 x 4 control points).
        fuse: "sum" adds the glimpse, weighed by channel, to the pooled features; "concat" puts it behind them; "max" takes
            the larger of each.
        max_change: how far the entries of the matrix may be from the identity's; of "attention", the logarithm of the scale.
            Below one half no matrix can collapse.
        max_shift: how far the glimpse, of "tps" each control point, may move, in halves of the box: 1 brings the center to
            the box's edge.
        hidden: width of the localization network's hidden layer.
        step: what the last layer says counts this much, which under Adam, whose steps do not know the size of a gradient, divides
            its learning rate.
        samples: bilinear samples along each axis of a bin of the glimpse, 1 as in the paper; None is 1, but with "max" as many
            as the pooler takes.

    Raises:
        ValueError: an unknown kind or fusion, or a number that is not positive and finite.
    """

    kind: Kind = "affine"
    fuse: Fusion = "sum"
    max_change: float = 0.5
    max_shift: float = 1.0
    hidden: int = 64
    step: float = 0.1
    samples: int | None = None

    def __post_init__(self) -> None:
        for name, value, known in (("kind", self.kind, Kind), ("fuse", self.fuse, Fusion)):
            if value not in get_args(known):
                raise ValueError(f"glimpse {name} must be one of {list(get_args(known))}, got {value!r}")
        limits = {"max_change": self.max_change, "max_shift": self.max_shift, "step": self.step}
        check_numbers("must be positive and finite", "glimpse ", **limits)
        check_whole(1, "glimpse ", hidden=self.hidden, samples=self.samples)

    def samples_beside(self, pooler: RoIPooler) -> int:
        """How many samples a glimpse takes beside a pooler."""
        if self.samples is not None:
            return self.samples
        return getattr(pooler, "sampling_ratio", 0) or 2 if self.fuse == "max" else 1

    def grid(self) -> Grid:
        """Make the family of transforms."""
        if self.kind == "affine":
            return AffineGrid(self.max_change, self.max_shift)
        if self.kind == "attention":
            return AttentionGrid(self.max_change, self.max_shift)
        if self.kind == "projective":
            return ProjectiveGrid(self.max_change, self.max_shift, min(self.max_change, LARGEST_PERSPECTIVE))
        return ThinPlateSplineGrid(4, self.max_shift)


class Glimpsed(NamedTuple):
    """What a glimpse saw, and where it looked."""

    features: Tensor  # [N, P, C, h, w], or [N, P, 2 C, h, w] with "concat": box and glimpse together
    theta: Tensor  # [N, P, parameters], as the localization network gave it


class Glimpse(nn.Module):
    """Look again, where the pooled features of a box say, and join what is seen to them.

    Args:
        in_channels: C of the features.
        output_size: h x w of the pooled features.
        settings: where it may look, and what becomes of what it sees.
        samples: bilinear samples along each axis of a bin, whatever the settings say.
        levels: which pyramid level a region is read from; asked with the box around the glimpse.

    Raises:
        ValueError: ``samples`` below 1.

    Example:
        >>> glimpse = Glimpse(8, (5, 5))
        >>> features, boxes = {"c4": torch.ones(1, 8, 4, 4)}, torch.tensor([[[0.0, 0.0, 32.0, 32.0]]])
        >>> glimpse(features, boxes, torch.ones(1, 1, 8, 5, 5), {"c4": 16}).features.shape
        torch.Size([1, 1, 8, 5, 5])
    """

    points: Tensor  # [h s w s + M + 3, 2] of the frame of a box, see _points_of_frame

    def __init__(
        self,
        in_channels: int,
        output_size: tuple[int, int],
        settings: GlimpseSettings = GlimpseSettings(),
        samples: int = 1,
        levels: Callable[[Tensor, Sequence[int]], Tensor] = FPNLevels(),  # noqa: B008 (frozen)
    ) -> None:
        super().__init__()
        check_whole(samples=samples)
        self.output_size, self.settings, self.samples, self.levels = output_size, settings, samples, levels
        self.grid = settings.grid()
        with torch.device("cpu"):  # of a network that is built on the device "meta", too
            self._exact = _points_of_frame(output_size[0] * samples, output_size[1] * samples)
        self.register_buffer("points", self._exact.float(), persistent=False)
        width = in_channels * output_size[0] * output_size[1]
        self.localization = Localization(width, self.grid, settings.hidden, settings.step)
        self.gain = nn.Parameter(torch.zeros(in_channels)) if settings.fuse == "sum" else None
        self.out_channels = in_channels * (2 if settings.fuse == "concat" else 1)

    def forward(self, features: Features, boxes: Tensor, pooled: Tensor, strides: dict[str, int]) -> Glimpsed:
        """Look.

        Args:
            features: level name -> ``[N, C, H_l, W_l]``.
            boxes: ``[N, P, 4]`` xyxy in image pixels, each with an area.
            pooled: ``[N, P, C, h, w]``, what was pooled from the boxes.
            strides: image pixels a cell of each level.

        Returns:
            Features of box and glimpse together, and the parameters of the transforms.
        """
        boxes = boxes.detach()
        theta = self.localization(pooled.flatten(0, 1))
        maps = {level: features[level] for level in strides if level in features}
        dynamic = is_exporting()  # then sizes are not known
        weigh_maps = (
            not dynamic and self.gain is not None and sum(values.numel() for values in maps.values()) < pooled.numel()
        )
        if weigh_maps:  # the same, and fewer products than weighing what is seen
            maps = {level: self._weighed(values) for level, values in maps.items()}
        around = boxes if len(strides) == 1 else self._around(theta, boxes)  # chooses the level
        seen = pool_points(maps, self._points(theta, boxes), around, strides, self.levels)
        if self.settings.fuse == "sum":
            joined = pooled + (seen if weigh_maps else self._weighed(seen))
        else:
            joined = torch.cat((pooled, seen), dim=2) if self.settings.fuse == "concat" else torch.maximum(pooled, seen)
        return Glimpsed(joined, theta.unflatten(0, boxes.shape[:2]))

    def _weighed(self, values: Tensor) -> Tensor:
        """Multiply ``[..., C, H, W]`` with the gain of each channel."""
        assert self.gain is not None
        return values * self.gain[:, None, None].to(values.dtype)

    def _points(self, theta: Tensor, boxes: Tensor) -> Tensor:
        """Where each sample of each bin is read: ``[N, P, h, w, S, 2]`` in image pixels."""
        (h, w), s = self.output_size, self.samples
        grid = self.grid.warp(theta, self.points[: h * s * w * s]).unflatten(0, boxes.shape[:2])
        bins = grid.unflatten(2, (h, s, w, s)).transpose(3, 4).flatten(4, 5)
        return from_frames(bins, boxes)

    @torch.no_grad()
    def _around(self, theta: Tensor, boxes: Tensor) -> Tensor:
        """The box around each glimpse's outline, never smaller than a pixel: ``[N, P, 4]``; of the identity the box itself."""
        outline = self.outline(theta.unflatten(0, boxes.shape[:2]), boxes)
        low, high = outline.amin(dim=-2), outline.amax(dim=-2)
        return torch.cat((low, torch.maximum(high, low + 1)), dim=-1)

    def outline(self, theta: Tensor, boxes: Tensor) -> Tensor:
        """Draw the edge of what each glimpse shows.

        Args:
            theta: ``[N, P, parameters]``.
            boxes: ``[N, P, 4]`` xyxy in image pixels.

        Returns:
            ``[N, P, M, 2]`` (x, y) in image pixels, clockwise from the upper left; M = 32.
        """
        warped = self.grid.warp(theta.flatten(0, 1), self.points[-OUTLINE - 3 : -3]).unflatten(0, boxes.shape[:2])
        return from_frames(warped, boxes)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Move to another device or type; points follow from their exact form, and never to half precision."""
        super()._apply(fn, recurse)
        self.points = self._exact.to(self.points.device, torch.promote_types(self.points.dtype, torch.float32))
        return self

    @torch.no_grad()
    def statistics(self, theta: Tensor, counts: Tensor) -> dict[str, Tensor]:
        """Say where glimpses look, to log it.

        Args:
            theta: ``[N, P, parameters]``.
            counts: ``[N, P]`` bool, the boxes that count.

        Returns:
            ``glimpse_shift``, the mean distance of the glimpse's center from the box's, in halves of the box, and
            ``glimpse_scale``, the geometric mean of the glimpse's size over the box's: scalars, 0 and 1 without boxes.
        """
        center, right, down = self.grid.warp(theta.flatten(0, 1), self.points[-3:]).unbind(1)
        (a, b), (c, d) = ((2 * (right - center)).unbind(1), (2 * (down - center)).unbind(1))
        log_scale = (a * d - b * c).abs().clamp(min=1e-6).log() / 2
        weight = counts.flatten().float()
        shift, log_scale = (torch.stack((center.norm(dim=1), log_scale)) * weight).sum(1) / weight.sum().clamp(min=1)
        return {"glimpse_shift": shift, "glimpse_scale": log_scale.exp()}


class Localization(nn.Module):
    """Two linear layers that choose a transform for each box; untrained, they choose the identity.

    Args:
        width: numbers of a pooled map, C h w.
        grid: what the parameters are for.
        hidden: width of the layer between.
        step: factor of what the last layer says.
    """

    identity: Tensor

    def __init__(self, width: int, grid: Grid, hidden: int, step: float) -> None:
        super().__init__()
        self.hidden = nn.Linear(width, hidden)
        self.theta = ThetaLayer(hidden, grid)
        self.step = step
        self.register_buffer("identity", grid.identity(), persistent=False)

    def forward(self, pooled: Tensor) -> Tensor:
        """``[R, C, h, w]`` -> theta ``[R, parameters]``, float32 at least; read with the channels last, as poolers lay them out."""
        theta = self.theta(torch.relu(self.hidden(pooled.permute(0, 2, 3, 1).flatten(1))))
        return torch.lerp(self.identity.to(theta).expand_as(theta), theta, self.step)


def _points_of_frame(height: int, width: int) -> Tensor:
    """The samples of a glimpse, row by row, its outline, clockwise from the upper left, and three points that tell its place."""
    centers = cell_centers((height, width), dtype=torch.float64).flatten(0, 1)
    edge = cell_centers((1, EDGE_POINTS), dtype=torch.float64)[0, :, 0] - 1 / EDGE_POINTS  # from -1 on, without 1
    one = torch.ones_like(edge)
    sides = [torch.stack(side, dim=-1) for side in ((edge, -one), (one, edge), (-edge, one), (-one, -edge))]
    center_right_down = torch.tensor([[0.0, 0.0], [0.5, 0.0], [0.0, 0.5]], dtype=torch.float64)
    return torch.cat((centers, *sides, center_right_down))


def from_frames(points: Tensor, boxes: Tensor) -> Tensor:
    """Take points of the frames of boxes to image pixels.

    Args:
        points: ``[N, P, ..., 2]`` (x, y), -1..1 inside of the box.
        boxes: ``[N, P, 4]`` xyxy.

    Returns:
        ``[N, P, ..., 2]`` (x, y).
    """
    boxes = boxes.to(points.dtype)
    center, half = (boxes[..., :2] + boxes[..., 2:]) / 2, (boxes[..., 2:] - boxes[..., :2]) / 2
    shape = (*boxes.shape[:2], *(1,) * (points.ndim - 3), 2)
    return torch.addcmul(center.reshape(shape), points, half.reshape(shape))

"""Networks that look at a map and choose a transform; untrained, they choose the identity.

Jaderberg et al. 2015, section 3.1.

N images, C channels, H x W cells, P parameters of a transform.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from detpipe.spatial_transformer.base import Grid, full_precision


class ThetaLayer(nn.Linear):
    """The last layer of a localization network: linear, with as many outputs as the grid has parameters, and zero weights.

    Its bias is the identity, so that whatever comes before, the first transform is the identity. It computes in float32
    at least, whatever the data type of the network and under autocast.

    Args:
        width: numbers that come in.
        grid: what the parameters are for; it is asked for their number and the identity, and not kept.

    Example:
        >>> from detpipe.spatial_transformer import AffineGrid
        >>> ThetaLayer(32, AffineGrid())(torch.randn(1, 32))
        tensor([[1., 0., 0., 0., 1., 0.]], grad_fn=<AddmmBackward0>)
    """

    def __init__(self, width: int, grid: Grid) -> None:
        super().__init__(width, grid.parameters_count)
        with torch.no_grad():
            self.weight.zero_()
            self.bias.copy_(grid.identity())

    def forward(self, input: Tensor) -> Tensor:
        """``[N, width]`` -> ``[N, P]``, float32 at least."""
        dtype = torch.promote_types(torch.promote_types(input.dtype, self.weight.dtype), torch.float32)
        with full_precision(input):
            return functional.linear(input.to(dtype), self.weight.to(dtype), self.bias.to(dtype))


class ConvLocalization(nn.Module):
    """A small convolutional network for maps of any size: convolutions that halve, a pooled grid of cells, two linear layers.

    Args:
        channels: C of the map.
        grid: what the parameters are for.
        widths: output channels of the convolutions, each followed by a rectifier and a maximum over 2 x 2.
        kernel_size: of the convolutions, odd.
        cells: what is left is averaged in ``cells x cells`` parts, so that the network knows where things are.
        hidden: width of the layer before the parameters.

    Raises:
        ValueError: a number below 1, no widths, or an even ``kernel_size``.

    Example:
        >>> from detpipe.spatial_transformer import AffineGrid
        >>> ConvLocalization(3, AffineGrid())(torch.ones(2, 3, 20, 33)).shape
        torch.Size([2, 6])
    """

    def __init__(
        self,
        channels: int,
        grid: Grid,
        widths: Sequence[int] = (16, 32),
        kernel_size: int = 5,
        cells: int = 4,
        hidden: int = 32,
    ) -> None:
        super().__init__()
        widths = list(widths)
        if not widths or min(channels, *widths, kernel_size, cells, hidden) < 1:
            raise ValueError(
                f"expected numbers of at least 1, got {channels=}, {widths=}, {kernel_size=}, {cells=}, {hidden=}"
            )
        if kernel_size % 2 == 0:
            raise ValueError(f"kernel_size must be odd, got {kernel_size}")
        layers: list[nn.Module] = []
        for before, after in zip([channels, *widths], widths, strict=False):
            layers += [
                nn.Conv2d(before, after, kernel_size, padding=kernel_size // 2),
                nn.ReLU(inplace=True),
                nn.MaxPool2d(2, ceil_mode=True),  # a single cell stays one
            ]
        self.features = nn.Sequential(*layers)
        self.choose = PooledLocalization(widths[-1], grid, cells, hidden)

    def forward(self, features: Tensor) -> Tensor:
        """``[N, C, H, W]`` -> theta ``[N, P]``, float32 at least."""
        return self.choose(self.features(features))


class PooledLocalization(nn.Module):
    """Two linear layers on the map's means, of the whole of it or of a grid of cells.

    Args:
        channels: C of the map.
        grid: what the parameters are for.
        cells: the map is averaged in ``cells x cells`` parts; 1 takes the mean of each channel, which cannot say where.
        hidden: width of the layer before the parameters.

    Raises:
        ValueError: a number below 1.

    Example:
        >>> from detpipe.spatial_transformer import AttentionGrid
        >>> PooledLocalization(64, AttentionGrid(), cells=7)(torch.ones(2, 64, 7, 7)).shape
        torch.Size([2, 3])
    """

    def __init__(self, channels: int, grid: Grid, cells: int = 1, hidden: int = 64) -> None:
        super().__init__()
        if min(channels, cells, hidden) < 1:
            raise ValueError(f"expected numbers of at least 1, got {channels=}, {cells=}, {hidden=}")
        self.pool = nn.AdaptiveAvgPool2d(cells)
        self.hidden = nn.Linear(channels * cells**2, hidden)
        self.theta = ThetaLayer(hidden, grid)

    def forward(self, features: Tensor) -> Tensor:
        """``[N, C, H, W]`` -> theta ``[N, P]``, float32 at least."""
        return self.theta(torch.relu(self.hidden(self.pool(features).flatten(1))))

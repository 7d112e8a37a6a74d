"""The spatial transformer: localization, grid and sampler in a row, and several of them beside each other.

Jaderberg et al. 2015, section 3.4. In series, transformers are an ``nn.Sequential``, with or without layers between them.

N images, C channels, H x W cells of the map, h x w of the output, P parameters, M transformers. The package's docstring
states the convention.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from detpipe.spatial_transformer.base import Grid
from detpipe.spatial_transformer.sampler import Sampler, cell_steps


class Transformed(NamedTuple):
    """What a transformer saw, and where it looked."""

    output: Tensor  # [N, C, h, w], of the type of the input
    theta: Tensor  # [N, P], as the localization gave it
    grid: Tensor  # [N, h, w, 2] (x, y), -1..1 in the input, float32 at least


class SpatialTransformer(nn.Module):
    """Look at a map where a network says.

    Args:
        localization: any module ``[N, C, H, W]`` -> ``[N, P]``; with :class:`ConvLocalization`, :class:`PooledLocalization`
            or one that ends in :class:`ThetaLayer`, the untrained transformer returns its input, to the bit where the size
            stays the same.
        grid: the family of transforms, with P parameters.
        sampler: how the map is read; None is bilinear with zeros outside.
        size: (h, w) of the output, or one number for both; None is the size of the input.

    Raises:
        ValueError: a size that is not one or two positive whole numbers.

    Example:
        >>> from detpipe.spatial_transformer import AffineGrid, ConvLocalization
        >>> grid = AffineGrid()
        >>> transformer = SpatialTransformer(ConvLocalization(3, grid), grid, size=(16, 24))
        >>> transformer(torch.ones(2, 3, 40, 50)).shape
        torch.Size([2, 3, 16, 24])
    """

    def __init__(
        self,
        localization: nn.Module,
        grid: Grid,
        sampler: Sampler | None = None,
        size: int | Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        self.localization, self.grid = localization, grid
        self.sampler = Sampler() if sampler is None else sampler
        self.size = None if size is None else _read_size(size)

    def forward(self, features: Tensor) -> Tensor:
        """Transform ``[N, C, H, W]`` to ``[N, C, h, w]``, of the same type.

        Raises:
            ValueError: the localization does not give ``[N, P]``, or features that are not a batch of maps.
        """
        return self.transform(features).output

    def transform(self, features: Tensor) -> Transformed:
        """Transform, and tell where the transformer looked, for pictures and logs.

        Args:
            features: ``[N, C, H, W]``.

        Returns:
            Output, parameters and grid.

        Raises:
            ValueError: as for :meth:`forward`.
        """
        theta = self.localization(features)
        expected = (features.shape[0], self.grid.parameters_count)
        if not isinstance(theta, Tensor) or tuple(theta.shape) != expected:
            got = list(theta.shape) if isinstance(theta, Tensor) else type(theta).__name__
            raise ValueError(
                f"localization must give [N, P] = {list(expected)} for {type(self.grid).__name__}, got {got}"
            )
        h, w = self.size if self.size is not None else features.shape[2:]
        grid = self.grid(theta, (h, w))
        return Transformed(self.sampler(features, grid, self._steps(theta, h, w)), theta, grid)

    def _steps(self, theta: Tensor, h: int, w: int) -> Tensor | None:
        """The extent of the cells where their centers alone, in a single row or column, do not tell it."""
        if not self.sampler.antialias or min(h, w) > 1:
            return None
        halves = self.grid(theta, (2 * h, 2 * w))
        return 2 * cell_steps(halves)[:, ::2, ::2]


class ParallelTransformers(nn.Module):
    """Several transformers that look at the same map, each at a place of its own (section 3.4).

    Args:
        transformers: M of them, with outputs of the same size.
        combine: "concat" along the channels, or "stack" along a new dimension.

    Raises:
        ValueError: no transformers, sizes that differ, or an unknown ``combine``.

    Example:
        >>> from detpipe.spatial_transformer import AttentionGrid, PooledLocalization
        >>> grid = AttentionGrid()
        >>> heads = [SpatialTransformer(PooledLocalization(8, grid), grid, size=7) for _ in range(2)]
        >>> ParallelTransformers(heads)(torch.ones(3, 8, 14, 14)).shape
        torch.Size([3, 16, 7, 7])
    """

    def __init__(
        self, transformers: Sequence[SpatialTransformer], combine: Literal["concat", "stack"] = "concat"
    ) -> None:
        super().__init__()
        sizes = [transformer.size for transformer in transformers]
        if not sizes or len(set(sizes)) > 1:
            raise ValueError(f"expected at least one transformer, all of one output size, got the sizes {sizes}")
        if combine not in ("concat", "stack"):
            raise ValueError(f"combine must be 'concat' or 'stack', got {combine!r}")
        self.transformers, self.combine = nn.ModuleList(transformers), combine

    def forward(self, features: Tensor) -> Tensor:
        """Transform ``[N, C, H, W]`` to ``[N, M C, h, w]`` (concat), or ``[N, M, C, h, w]`` (stack)."""
        outputs = [transformer(features) for transformer in self.transformers]
        return torch.cat(outputs, dim=1) if self.combine == "concat" else torch.stack(outputs, dim=1)

    def transform(self, features: Tensor) -> list[Transformed]:
        """Transform, and tell where each transformer looked: one :class:`Transformed` each."""
        return [transformer.transform(features) for transformer in self.transformers]  # pyright: ignore[reportCallIssue]


def _read_size(size: int | Sequence[int]) -> tuple[int, int]:
    sides = tuple(size) if isinstance(size, Sequence) else (size, size)
    whole = all(isinstance(side, int) and not isinstance(side, bool) and side > 0 for side in sides)
    if len(sides) != 2 or not whole:
        raise ValueError(f"size must be one or two positive whole numbers (height, width), got {size}")
    return sides[0], sides[1]

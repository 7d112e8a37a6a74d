"""The network of a region proposal network: 3 x 3 convolutions, then for each anchor one logit and four deltas.

Ren et al., "Faster R-CNN", 2015, arXiv 1506.01497, section 3.1; the same network at every level: Lin et al., "Feature Pyramid
Networks", 2017, arXiv 1612.03144.

Two ways to the same numbers. ``forward`` computes all anchors, which is what proposals need. ``at`` computes only some
anchors, from the 3 x 3 cells around each, which is all that the loss of a few hundred sampled anchors depends on: its
gradient with respect to weights and features is exactly that of the dense convolution, at a fraction of the cost, because
the dense backward pass multiplies zeros nearly everywhere.

N images, C channels, A anchors a cell, P anchors of an image, ordered as in :mod:`detpipe.proposals.anchors`.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from detpipe.support.numbers import check_whole


class RPNHead(nn.Module):
    """Score anchors and refine their boxes.

    Args:
        in_channels: C.
        per_cell: A.
        conv_dims: widths of the 3 x 3 convolutions, one at least.

    Raises:
        ValueError: a number that is not positive, or no convolution.

    Example:
        >>> logits, deltas = RPNHead(8, 3, [16])([torch.zeros(2, 8, 4, 6), torch.zeros(2, 8, 2, 3)])
        >>> list(logits.shape), list(deltas.shape)
        ([2, 90], [2, 90, 4])
    """

    def __init__(self, in_channels: int, per_cell: int, conv_dims: Sequence[int]) -> None:
        super().__init__()
        if not conv_dims:
            raise ValueError(f"conv_dims need at least one width, got {conv_dims}")
        check_whole(in_channels=in_channels, per_cell=per_cell, conv_dims=conv_dims)
        self.per_cell = per_cell
        self.convs = nn.ModuleList(nn.Conv2d(a, b, 3, padding=1) for a, b in pairwise([in_channels, *conv_dims]))
        self.objectness = nn.Conv2d(conv_dims[-1], per_cell, 1)
        self.regressor = nn.Conv2d(conv_dims[-1], 4 * per_cell, 1)
        for layer in (*self.convs, self.objectness, self.regressor):
            nn.init.normal_(layer.get_parameter("weight"), std=0.01)
            nn.init.zeros_(layer.get_parameter("bias"))
        self.to(memory_format=torch.channels_last)

    def forward(self, features: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Compute the outputs for all anchors.

        Args:
            features: levels ``[N, C, H, W]``.

        Returns:
            logits ``[N, P]`` and deltas ``[N, P, 4]``.
        """
        weight, bias = self._outputs()
        levels = []
        for level in features:
            for conv in self.convs:
                level = F.relu_(conv(level))
            levels.append(F.conv2d(level, weight, bias).permute(0, 2, 3, 1).flatten(1, 2))
        outputs = levels[0] if len(levels) == 1 else torch.cat(levels, dim=1)  # [N, cells, 5 A]
        return outputs[..., : self.per_cell].flatten(1), outputs[..., self.per_cell :].flatten(1).unflatten(1, (-1, 4))

    def computes_less_at(self, features: Sequence[Tensor], anchors: int) -> bool:
        """Tell whether `at` is the cheaper way to train on this many anchors of each image."""
        cells = sum(level.shape[2] * level.shape[3] for level in features)
        return len(self.convs) == 1 and 2 * anchors <= cells

    def at(self, features: Sequence[Tensor], index: Tensor) -> tuple[Tensor, Tensor]:
        """Compute the outputs for some anchors; for a network of one 3 x 3 convolution.

        Args:
            features: levels ``[N, C, H, W]``, channels last to be fast.
            index: ``[N, S]`` int64 into the P anchors.

        Returns:
            logits ``[N, S]`` and deltas ``[N, S, 4]``, as `forward` has them there.
        """
        patches = _patches(features, torch.div(index, self.per_cell, rounding_mode="floor"))
        kernel = self.convs[0].get_parameter("weight").permute(0, 2, 3, 1).flatten(1)  # [C', 9 C]
        hidden = F.relu_(F.linear(patches, kernel, self.convs[0].get_parameter("bias")))
        weight, bias = self._outputs()
        outputs = F.linear(hidden, weight.flatten(1), bias)  # [N * S, 5 A]
        anchor = (index % self.per_cell).flatten()[:, None]
        logits = outputs[:, : self.per_cell].gather(1, anchor)
        deltas = outputs[:, self.per_cell :].unflatten(1, (-1, 4)).gather(1, anchor[..., None].expand(-1, 1, 4))
        return logits.view(index.shape), deltas.view(*index.shape, 4)

    def _outputs(self) -> tuple[Tensor, Tensor]:
        """Join the two output layers, so that the hidden map is read once: ``[5 A, C, 1, 1]`` and ``[5 A]``."""
        weight, bias = (
            torch.cat((self.objectness.get_parameter(kind), self.regressor.get_parameter(kind)))
            for kind in ("weight", "bias")
        )
        return weight, bias


def _patches(levels: Sequence[Tensor], cell: Tensor) -> Tensor:
    """Cut out the 3 x 3 cells around some cells, without asking the device how many of them each level has.

    Args:
        levels: ``[N, C, H, W]`` each.
        cell: ``[N, S]`` which cell, one level after the other: ``start + row * W + column``.

    Returns:
        ``[N * S, 9 * C]``, zeros beyond the border; by row, column and channel.
    """
    sizes = [(level.shape[2], level.shape[3]) for level in levels]
    starts = accumulate((height * width for height, width in sizes[:-1]), initial=0)
    table = torch.tensor([(start, *size) for start, size in zip(starts, sizes, strict=True)]).T.contiguous()
    table = table.to(cell.device, non_blocking=True)  # [3, L]
    level_of = torch.bucketize(cell, table[0, 1:], right=True)
    start, height, width = table[:, level_of, None, None]  # [N, S, 1, 1] each
    around = torch.arange(-1, 2, device=cell.device)
    own = cell[..., None, None] - start
    row, column = torch.div(own, width, rounding_mode="floor") + around[:, None], own % width + around
    inside = (row >= 0) & (row < height) & (column >= 0) & (column < width)  # [N, S, 3, 3]
    image = torch.arange(len(cell), device=cell.device).view(-1, 1, 1, 1)
    where = (image * height + row) * width + column
    total = None
    for index, level in enumerate(
        levels
    ):  # one without an anchor too: it stays in the graph, as other processes expect
        seen = inside & (level_of == index)[..., None, None]
        cells = level.permute(0, 2, 3, 1).reshape(-1, level.shape[1])  # a view of a channels-last map
        patches = F.embedding(where.where(seen, 0), cells) * seen[..., None]
        total = patches if total is None else total + patches
    assert total is not None
    return total.flatten(0, 1).flatten(1)

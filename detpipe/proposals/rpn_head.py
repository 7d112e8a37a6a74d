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

_AROUND = (-1, 0, 1)


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
        if not conv_dims or min(in_channels, per_cell, *conv_dims) < 1:
            raise ValueError(f"expected positive widths, at least one; got {in_channels=}, {per_cell=}, {conv_dims=}")
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
        logits, deltas = [], []
        for level in features:
            for conv in self.convs:
                level = F.relu_(conv(level))
            outputs = F.conv2d(level, weight, bias).permute(0, 2, 3, 1)  # [N, H, W, 5 A]
            logits.append(outputs[..., : self.per_cell].flatten(1))
            deltas.append(outputs[..., self.per_cell :].reshape(len(outputs), -1, 4))
        return torch.cat(logits, dim=1), torch.cat(deltas, dim=1)

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
        sizes = [level.shape[2] * level.shape[3] for level in features]
        starts = [0, *accumulate(sizes)]
        cell = torch.div(index, self.per_cell, rounding_mode="floor").flatten()
        image = torch.arange(len(index), device=index.device).repeat_interleave(index.shape[1])
        level_of = sum((cell >= start for start in starts[1:-1]), start=torch.zeros_like(cell))
        order = level_of.argsort(stable=True)
        counts = level_of.bincount(minlength=len(sizes)).tolist() if len(sizes) > 1 else [len(cell)]
        patches = [  # of levels without an anchor too: they stay in the graph, as other processes expect
            _patches(level, image[rows], cell[rows] - start)
            for level, start, rows in zip(features, starts, order.split(counts), strict=False)
        ]
        kernel = self.convs[0].get_parameter("weight").permute(0, 2, 3, 1).flatten(1)  # [C', 9 C]
        hidden = F.relu_(F.linear(torch.cat(patches), kernel, self.convs[0].get_parameter("bias")))
        weight, bias = self._outputs()
        outputs = F.linear(hidden, weight.flatten(1), bias)[order.argsort()]  # [N * S, 5 A]
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


def _patches(level: Tensor, image: Tensor, cell: Tensor) -> Tensor:
    """Cut out the 3 x 3 cells around some cells.

    Args:
        level: ``[N, C, H, W]``.
        image: ``[M]`` which image.
        cell: ``[M]`` which cell, ``row * W + column``.

    Returns:
        ``[M, 9 * C]``, zeros beyond the border; by row, column and channel.
    """
    height, width = level.shape[2:]
    around = torch.tensor(_AROUND, device=cell.device)
    row = (torch.div(cell, width, rounding_mode="floor")[:, None] + around)[:, :, None]  # [M, 3, 1]
    column = (cell[:, None] % width + around)[:, None, :]  # [M, 1, 3]
    inside = (row >= 0) & (row < height) & (column >= 0) & (column < width)  # [M, 3, 3]
    where = (image[:, None, None] * height + row.clamp(0, height - 1)) * width + column.clamp(0, width - 1)
    table = level.permute(0, 2, 3, 1).reshape(-1, level.shape[1])  # a view of a channels-last map
    return (F.embedding(where, table) * inside[..., None]).flatten(1)

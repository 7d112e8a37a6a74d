"""Selective kernel: a convolution that chooses its kernel size for each channel by what the whole map contains.

Li et al., "Selective Kernel Networks", 2019, arXiv 1903.06586, section 3.1: split into branches with growing kernels, fuse
(equations 1 to 4), select (equations 5 and 6).

Deviations:
1. A kernel of side 2k + 1 is a 3 x 3 kernel of dilation k, as in the paper's efficient form.
2. In training, the normalization of the squeezed vector needs more than one image; on a single one it uses the statistics stored
   so far.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from detpipe.attention.base import Attention, Gates, squeeze
from detpipe.support.numbers import check_whole


class SelectiveKernel(Attention):
    """Convolve with several kernel sizes and mix the results, for each channel by weights that sum to one.

    Args:
        in_channels: C of the input.
        out_channels: C' of the output.
        stride: of the convolutions.
        branches: M, how many kernel sizes: 3, 5, 7, ...
        reduction: the squeezed width is ``out_channels / reduction``, but at least ``min_width``.
        min_width: least width of the squeezed vector (the paper's L).
        groups: of the convolutions.
        dilation: of all kernels, in addition to that of the branch.
        split_input: give each branch an equal part of the channels instead of all of them, as timm's ``skresnet18`` does.

    Raises:
        ValueError: channels that are no multiple of ``groups`` (or cannot be split), a number below 1, or ``reduction`` above
            ``out_channels``.

    Example:
        >>> SelectiveKernel(64, 128, stride=2)(torch.ones(2, 64, 10, 14)).shape
        torch.Size([2, 128, 5, 7])
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        stride: int = 1,
        branches: int = 2,
        reduction: int = 16,
        min_width: int = 32,
        groups: int = 32,
        dilation: int = 1,
        split_input: bool = False,
    ) -> None:
        super().__init__()
        check_whole(in_channels=in_channels, out_channels=out_channels, stride=stride, branches=branches)
        check_whole(reduction=reduction, min_width=min_width, groups=groups, dilation=dilation)
        if reduction > out_channels:
            raise ValueError(f"reduction must be in 1..out_channels ({out_channels}), got {reduction}")
        part = in_channels // branches if split_input else in_channels
        if part * (branches if split_input else 1) != in_channels or part % groups or out_channels % groups:
            split = f" in {branches} parts" if split_input else ""
            raise ValueError(
                f"in_channels{split} and out_channels must be multiples of groups ({groups}), got {in_channels} and {out_channels}"
            )
        self.split_input, self.part = split_input, part
        self.branches = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(part, out_channels, 3, stride, step, step, groups=groups, bias=False),
                nn.BatchNorm2d(out_channels),
                nn.ReLU(inplace=True),
            )
            for step in range(dilation, dilation * branches + 1, dilation)
        )
        width = max(out_channels // reduction, min_width)
        self.squeeze = nn.Conv2d(out_channels, width, 1, bias=False)
        self.norm = SqueezedBatchNorm(width)
        self.select = nn.Conv2d(width, out_channels * branches, 1, bias=False)

    def forward(self, features: Tensor) -> Tensor:
        """Convolve: ``[N, C, H, W]`` -> ``[N, C', ceil(H / stride), ceil(W / stride)]``."""
        first, *rest = self._split(features)
        weights = self._weights(sum(rest, first))
        mixed = first * weights[:, 0]
        for index, branch in enumerate(rest, start=1):
            mixed = torch.addcmul(mixed, branch, weights[:, index])
        return mixed

    def gates(self, features: Tensor) -> Gates:
        """Compute the weights of the branches: ``[N, C, H, W]`` -> "branch" ``[N, M, C', 1, 1]``; they sum to one over M."""
        first, *rest = self._split(features)
        return {"branch": self._weights(sum(rest, first))}

    def _split(self, features: Tensor) -> list[Tensor]:
        parts = features.split(self.part, dim=1) if self.split_input else [features] * len(self.branches)
        return [branch(part) for branch, part in zip(self.branches, parts, strict=True)]

    def _weights(self, fused: Tensor) -> Tensor:
        logits = self.select(torch.relu(self.norm(self.squeeze(squeeze(fused)))))  # [N, M C', 1, 1]
        return logits.unflatten(1, (len(self.branches), fused.shape[1])).softmax(dim=1)


class SqueezedBatchNorm(nn.BatchNorm2d):
    """Batch normalization of maps of one cell; a batch of one image is normalized by the stored statistics."""

    def forward(self, input: Tensor) -> Tensor:
        """``[N, C, 1, 1]`` -> ``[N, C, 1, 1]``."""
        if self.training and input.shape[0] * input.shape[2] * input.shape[3] == 1:
            return nn.functional.batch_norm(
                input, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps
            )
        return super().forward(input)

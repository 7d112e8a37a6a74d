"""A proposal source of one's own: squares around the cells that look most like the center of an object."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from detpipe.matching import gather_targets
from detpipe.stages import Features, ImageList, Losses, ProposalSource, Target


class CenterProposals(ProposalSource):
    """Learn which cells are centers, and propose squares of several sides around the best of each image."""

    def __init__(self, in_channels: int, strides: dict[str, int], sides: list[int], centers: int = 16) -> None:
        super().__init__()
        [(self.level, self.stride)] = strides.items()
        self.sides, self.centers = sides, centers
        self.score = nn.Conv2d(in_channels, 1, kernel_size=1)

    def forward(
        self, images: ImageList, features: Features, targets: list[Target] | None = None
    ) -> tuple[list[Tensor], Losses]:
        """Boxes ``[P, 4]`` of each image, and in training ``loss_center``."""
        scores = self.score(features[self.level])[:, 0]  # [N, h, w]
        y, x = (torch.arange(n, device=scores.device) * self.stride + self.stride / 2 for n in scores.shape[1:])
        size = torch.tensor(images.image_sizes, device=scores.device)[:, :, None, None]  # [N, 2, 1, 1]
        inside = (y[:, None] < size[:, 0]) & (x < size[:, 1])  # the rest is padding
        best = scores.where(inside, -torch.inf).flatten(1).topk(min(self.centers, inside[0].numel())).indices  # [N, k]
        center = torch.stack((x[best % len(x)], y[best // len(x)]), dim=-1)[:, :, None]  # [N, k, 1, 2]
        half = torch.tensor(self.sides, device=x.device)[:, None] / 2
        boxes = torch.cat((center - half, center + half), dim=-1).flatten(1, 2)  # [N, P, 4]
        if not self.training or targets is None:
            return list(boxes), {}
        truth = gather_targets(targets)  # padded to the fullest image
        column, row = ((truth.boxes[..., :2] + truth.boxes[..., 2:]) / 2 / self.stride).long().unbind(-1)  # [N, G]
        wanted = torch.zeros_like(scores).flatten(1)
        wanted = wanted.scatter_reduce(1, row * len(x) + column, truth.valid.to(wanted), "amax").view_as(scores)
        return list(boxes), {"loss_center": F.binary_cross_entropy_with_logits(scores, wanted, weight=inside.float())}

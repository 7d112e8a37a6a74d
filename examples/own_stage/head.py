"""A head of one's own, whose RoIs look at each other: Hu et al., "Relation Networks for Object Detection", 2018, arXiv 1711.11575.

Deviations: one relation behind one layer; what geometry says is added to the attention's logits; RoIs of training are sampled.
"""

import torch
from torch import Tensor, nn

from detpipe.heads import toolkit as tk


class RelationHead(tk.ProposalHead):
    """Classify and refine each RoI by what is in it, and by the other RoIs of its image."""

    def __init__(self, in_channels: int, num_classes: int, strides: dict[str, int], width: int = 128) -> None:
        super().__init__(num_classes, strides, tk.RoISampler(rois_per_image=32))
        self.pooler, self.shared = tk.RoIAlign(5, sampling_ratio=1), tk.hidden_layers(in_channels * 5 * 5, [width])
        self.geometry, self.attention = nn.Linear(4, 1), nn.Linear(width, 3 * width)
        self.classifier, self.regressor = tk.output_layers(width, num_classes, class_agnostic=True)

    def predict(self, features: tk.Features, boxes: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
        """Boxes ``[N, P, 4]`` and their mask ``[N, P]`` -> logits ``[N, P, K + 1]`` and deltas ``[N, P, 1, 4]``."""

        def pooled(part: Tensor) -> Tensor:
            return self.shared(self.pooler(features, part, self.strides).flatten(0, 1)).unflatten(0, part.shape[:2])

        hidden = tk.in_parts(pooled, boxes)  # [N, P, width]
        center, size = (boxes[..., :2] + boxes[..., 2:]) / 2, boxes[..., 2:] - boxes[..., :2]
        shift = (center[:, None] - center[:, :, None]).abs() / size[:, :, None]  # [N, P, P, 2]
        pairs = torch.cat((shift.clamp(min=1e-3), size[:, None] / size[:, :, None]), dim=-1).log()
        bias = self.geometry(pairs)[..., 0].masked_fill(~valid[:, None], -1e4)  # finite, for images without a valid box
        related = nn.functional.scaled_dot_product_attention(*self.attention(hidden).chunk(3, dim=-1), attn_mask=bias)
        return tk.box_outputs(self.classifier, self.regressor, hidden + related)

    def losses(self, features, rois, image_sizes, targets) -> tk.Losses:  # noqa: D102
        return tk.box_losses(rois, *self.predict(features, rois.rois, rois.valid))

    def detect(self, features, boxes, image_sizes, valid) -> tk.Found:  # noqa: D102
        return tk.Found.of(*self.predict(features, boxes, valid), boxes)

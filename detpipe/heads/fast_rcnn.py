"""The Fast R-CNN head: pool each proposal, classify it, and refine its box.

Girshick, "Fast R-CNN", 2015, arXiv 1504.08083, sections 2.1 to 2.3.

Deviations:
1. Both losses are sums over the sampled RoIs divided by max(1, their number), so that a batch without any is finite.
2. Smooth L1 acts on weighted deltas, see :mod:`detpipe.boxes`.

N images, P proposals an image, S sampled RoIs an image, K foreground classes, B = K boxes a RoI (1 if class-agnostic).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from detpipe import boxes as box_ops
from detpipe import matching
from detpipe.heads.postprocess import Postprocess
from detpipe.heads.sampling import RoISampler, RoITargets
from detpipe.roi_pooling import RoIAlign, RoIPooler
from detpipe.stages import Losses, RoIHead
from detpipe.types import Detection, Features, Target

ROIS_PER_PASS = 4096  # at inference; bounds the memory of pooled features


class FastRCNNHead(RoIHead):
    """Classify and refine proposals.

    Args:
        in_channels: C of the features.
        num_classes: K, foreground classes; there is one output more for the background.
        strides: image pixels a cell of each level that the pooler shall use.
        pooler: cuts a small map out of the features for each box.
        fc: widths of the shared fully connected layers.
        class_agnostic: one refined box for all classes instead of one for each.
        sampler: which RoIs are trained on.
        postprocess: what becomes a detection.

    Raises:
        ValueError: ``num_classes`` below 1, no layer in ``fc``, or no level in ``strides``.

    Example:
        >>> head = FastRCNNHead(8, num_classes=2, strides={"c4": 16}, fc=[16]).eval()
        >>> boxes = torch.tensor([[0.0, 0.0, 32.0, 32.0]])
        >>> detections, losses = head({"c4": torch.zeros(1, 8, 4, 4)}, [boxes], [(64, 64)])
        >>> sorted(detections[0]), losses
        (['boxes', 'labels', 'scores'], {})
    """

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        strides: dict[str, int],
        pooler: RoIPooler | None = None,
        fc: Sequence[int] = (1024, 1024),
        class_agnostic: bool = False,
        sampler: RoISampler = RoISampler(),  # noqa: B008 (frozen)
        postprocess: Postprocess = Postprocess(),  # noqa: B008 (frozen)
    ) -> None:
        super().__init__()
        if num_classes < 1 or not fc or min(fc) < 1 or not strides:
            raise ValueError(
                f"expected num_classes >= 1, at least one layer in fc and one level in strides; got {num_classes=}, "
                f"{fc=}, {strides=}"
            )
        self.num_classes, self.strides, self.class_agnostic = num_classes, dict(strides), class_agnostic
        self.pooler = RoIAlign(7) if pooler is None else pooler
        self.sampler, self.postprocess = sampler, postprocess
        height, width = self.pooler.output_size
        widths = [in_channels * height * width, *fc]
        layers: list[nn.Module] = [nn.Flatten()]
        for before, after in pairwise(widths):
            layers += [nn.Linear(before, after), nn.ReLU(inplace=True)]
        self.shared = nn.Sequential(*layers)
        self.classifier = nn.Linear(widths[-1], num_classes + 1)
        self.regressor = nn.Linear(widths[-1], 4 * (1 if class_agnostic else num_classes))
        for layer, std in ((self.classifier, 0.01), (self.regressor, 0.001)):
            nn.init.normal_(layer.weight, std=std)
            nn.init.zeros_(layer.bias)

    def forward(
        self,
        features: Features,
        proposals: list[Tensor],
        image_sizes: list[tuple[int, int]],
        targets: list[Target] | None = None,
    ) -> tuple[list[Detection], Losses]:
        """Train on sampled proposals, or detect among all.

        Args:
            features: level name -> ``[N, C, H_l, W_l]``.
            proposals: N tensors ``[P_i, 4]`` xyxy in pixels of the batch.
            image_sizes: height and width of each image inside the padded batch.
            targets: N targets with ``boxes`` and ``labels``; needed in training.

        Returns:
            In training ``[]`` and ``loss_classifier``, ``loss_box_reg``; else N detections and ``{}``.

        Raises:
            ValueError: training without targets.
        """
        if self.training:
            if targets is None:
                raise ValueError("the head is in training mode and needs targets; call eval() to detect")
            rois = self.sampler(proposals, targets)
            return [], self._losses(rois, *self.predict(features, rois.rois))
        boxes, present = matching.pad(proposals)
        valid = present & box_ops.valid(boxes)
        boxes = box_ops.fill(boxes, valid)
        scores, refined = self._detect(features, boxes)
        return self.postprocess(scores, refined, valid, image_sizes), {}

    def predict(self, features: Features, rois: Tensor) -> tuple[Tensor, Tensor]:
        """Compute the outputs of the network for boxes.

        Args:
            features: level name -> ``[N, C, H_l, W_l]``.
            rois: ``[N, P, 4]`` xyxy in pixels of the batch.

        Returns:
            logits ``[N, P, K + 1]`` and deltas ``[N, P, B, 4]``.
        """
        pooled = self.pooler(features, rois, self.strides)  # [N, P, C, h, w]
        hidden = self.shared(pooled.flatten(0, 1))
        logits, deltas = self.classifier(hidden), self.regressor(hidden)
        return logits.unflatten(0, rois.shape[:2]), deltas.unflatten(0, rois.shape[:2]).unflatten(-1, (-1, 4))

    def _losses(self, targets: RoITargets, logits: Tensor, deltas: Tensor) -> Losses:
        logits, deltas = logits.float(), deltas.float()
        count = targets.valid.sum().clamp(min=1)
        entropy = F.cross_entropy(logits.flatten(0, 1), targets.labels.flatten(), reduction="none")
        loss_classifier = (entropy * targets.valid.flatten()).sum() / count
        column = torch.zeros_like(targets.labels) if self.class_agnostic else (targets.labels - 1).clamp(min=0)
        chosen = deltas.gather(2, column[..., None, None].expand(-1, -1, 1, 4))[:, :, 0]
        # what is not foreground is compared with itself: log() stays finite, and the mask takes it out
        counts = targets.foreground[..., None]
        rois, boxes = box_ops.fill(targets.rois, counts[..., 0]), box_ops.fill(targets.boxes, counts[..., 0])
        wanted = box_ops.encode(boxes, rois)
        distance = F.smooth_l1_loss(chosen, wanted, reduction="none") * counts
        return {"loss_classifier": loss_classifier, "loss_box_reg": distance.sum() / count}

    def _detect(self, features: Features, boxes: Tensor) -> tuple[Tensor, Tensor]:
        """Compute scores ``[N, P, K]`` and refined boxes ``[N, P, B, 4]``, a bounded number of RoIs at a time."""
        size = max(1, ROIS_PER_PASS // len(boxes))
        parts = [self.predict(features, part) for part in boxes.split(size, dim=1)]
        logits, deltas = (torch.cat(part, dim=1).float() for part in zip(*parts, strict=True))
        return F.softmax(logits, dim=-1)[..., 1:], box_ops.decode(deltas, boxes[:, :, None].float())

"""Where the classes of an image are, learned from which classes it has: superpixel-pooled features, image-level labels.

Kwak, Hong and Han, "Weakly Supervised Semantic Segmentation Using Superpixel Pooling Network", AAAI 2017. Class activation maps:
Zhou et al., "Learning Deep Features for Discriminative Localization", 2016, arXiv 1512.04150. Smooth maximum: Pinheiro and
Collobert, "From Image-level to Pixel-level Labeling with Convolutional Networks", 2015, arXiv 1411.6228.

::

    features --conv--> encoded --+--> mean over the image ----------------------------> global logits --> loss
                                 +--> upsampled --> mean of each superpixel --linear--> activations, one a class
                                                                         mean over superpixels --> region logits --> loss

As in the paper: two branches, each trained with a binary cross-entropy a class; the branch of the whole image regularizes the
other one and is not used for maps; upsampling is learned (transposed convolutions, batch norm, ReLU); a superpixel's score is the
linear classifier of the branch, without its bias, applied to the mean of its features (SP-CAM).

Deviations:
1. Any backbone, trained or frozen as its configuration says, in the place of a frozen VGG-16 that ImageNet has trained.
2. What upsampling leaves between features and superpixels is bridged by bilinear interpolation at the center of each pixel.
3. ``sharpness`` above 0 replaces the mean over superpixels by a smooth maximum, which finds small objects; 0 is the paper's mean.
4. The maps of a class are divided by their highest score in the image, as a class activation map is, and multiplied by the
   probability that the image has the class (the mean of both branches), or by 1 and 0 where the classes are given. The paper
   makes maps of training images, whose classes are known.
5. ``pooling="none"`` takes each cell of the upsampled map in the place of a superpixel: the same network and training without
   superpixels, to see what they bring.
6. Padding takes part in no mean. One scale; DecoupledNet, which the paper trains on these maps, is not part of this.

N images, C channels in, D channels inside, K classes, S superpixels (or cells) an image, H' x W' pixels of the superpixel maps.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from detpipe.roi_pooling import superpixel_pool
from detpipe.stages import mark_class_outputs
from detpipe.support.numbers import check_numbers, check_whole
from detpipe.support.suggest import did_you_mean

POOLINGS = ("superpixel", "none")


@dataclass(frozen=True)
class Localization:
    """Settings of :class:`SuperpixelPoolingHead`.

    Args:
        channels: D.
        doublings: how many times the features are enlarged to twice their size, by learned upsampling.
        pooling: "superpixel", or "none" for the same network without superpixels.
        sharpness: of the smooth maximum over superpixels that makes the score of the image; 0 is the mean.
        threshold: where no class has a score of at least this, a pixel is background; 0 to 1.

    Raises:
        ValueError: a number outside its range, or an unknown pooling.
    """

    channels: int = 128
    doublings: int = 1
    pooling: Literal["superpixel", "none"] = "superpixel"
    sharpness: float = 0.0
    threshold: float = 0.3

    def __post_init__(self) -> None:
        if self.pooling not in POOLINGS:
            near = did_you_mean(str(self.pooling), POOLINGS)
            raise ValueError(f"pooling must be one of {', '.join(POOLINGS)}, got {self.pooling!r}{near}")
        check_whole(channels=self.channels)
        check_whole(0, doublings=self.doublings)
        check_numbers("must not be negative or infinite", sharpness=self.sharpness)
        check_numbers("must be in 0..1", threshold=self.threshold)


class Localized(NamedTuple):
    """What the head finds in a batch. With ``pooling="none"`` the S regions are the cells of the upsampled map."""

    global_logits: Tensor  # [N, K] of the branch of the whole image
    region_logits: Tensor  # [N, K] of the branch of superpixels
    activations: Tensor  # [N, S, K] the classifier without its bias
    weights: Tensor  # [N, S] 0 for what is not there, or only padding
    size: tuple[int, int]  # height and width of the upsampled map

    @property
    def probabilities(self) -> Tensor:
        """``[N, K]`` that the image has the class, the mean of both branches."""
        return (_exact(self.global_logits).sigmoid() + _exact(self.region_logits).sigmoid()) / 2

    def image(self, place: int) -> Localized:
        """What was found in one image, as a batch of one."""
        one = slice(place, place + 1)
        logits = self.global_logits[one], self.region_logits[one]
        return Localized(*logits, self.activations[one], self.weights[one], self.size)


class SuperpixelPoolingHead(nn.Module):
    """Find out which classes an image has, and which superpixels make it so.

    Args:
        in_channels: C.
        num_classes: K.
        settings: see :class:`Localization`.

    Raises:
        ValueError: ``in_channels`` or ``num_classes`` not positive.

    Example:
        >>> head = SuperpixelPoolingHead(8, num_classes=3, settings=Localization(channels=4))
        >>> superpixels = torch.arange(4).repeat_interleave(16).view(1, 8, 8)
        >>> found = head(torch.rand(1, 8, 2, 2), superpixels)
        >>> list(found.region_logits.shape), list(head.maps(found, superpixels).shape)
        ([1, 3], [1, 3, 8, 8])
    """

    def __init__(self, in_channels: int, num_classes: int, settings: Localization = Localization()) -> None:
        super().__init__()
        check_whole(in_channels=in_channels, num_classes=num_classes)
        self.num_classes, self.settings = num_classes, settings
        width = settings.channels
        self.encode = nn.Sequential(nn.Conv2d(in_channels, width, 3, padding=1, bias=False), *_norm(width))
        self.upsample = nn.Sequential(*(_double(width) for _ in range(settings.doublings)))
        self.global_classifier = nn.Linear(width, num_classes)
        self.region_classifier = nn.Linear(width, num_classes)
        for layer in (self.global_classifier, self.region_classifier):
            mark_class_outputs(layer, background=0, each=1)

    def forward(self, features: Tensor, superpixels: Tensor, num_superpixels: int | None = None) -> Localized:
        """Classify an image by its whole and by its superpixels.

        Args:
            features: ``[N, C, H, W]``.
            superpixels: ``[N, H', W']`` of an integer type: the superpixel of each pixel from 0, -1 in the padding; it covers
                what the features cover, edge to edge.
            num_superpixels: S; by default the largest label of the batch, plus 1.

        Returns:
            Logits and activations.

        Raises:
            ValueError: an argument of another shape or type, or a superpixel out of range.
        """
        _check(features, superpixels)
        encoded = self.encode(features)
        mean = _mean(encoded.flatten(2).transpose(1, 2), _inside(superpixels, encoded).flatten(1))
        upsampled = self.upsample(encoded)
        if self.settings.pooling == "superpixel":
            pooled, weights = superpixel_pool(upsampled, superpixels, num_superpixels)
            weights = (weights > 0).to(weights.dtype)  # each superpixel counts the same, whatever its size
        else:
            pooled, weights = upsampled.flatten(2).transpose(1, 2), _inside(superpixels, upsampled).flatten(1)
        activations = F.linear(pooled, self.region_classifier.weight)
        scores = activations + self.region_classifier.bias
        return Localized(
            self.global_classifier(mean),
            _aggregate(_exact(scores), weights, self.settings.sharpness),
            activations,
            weights,
            (upsampled.shape[2], upsampled.shape[3]),
        )

    def losses(self, found: Localized, present: Tensor) -> dict[str, Tensor]:
        """Compute ``loss_global`` and ``loss_superpixels``, binary cross-entropies, the mean over images and classes.

        ``present`` is ``[N, K]``, 1 where the image has the class, 0 where not; another shape is a ValueError.
        """
        if present.shape != found.region_logits.shape:
            raise ValueError(f"present must be {list(found.region_logits.shape)}, got {list(present.shape)}")
        logits = {"loss_global": _exact(found.global_logits), "loss_superpixels": _exact(found.region_logits)}
        return {name: F.binary_cross_entropy_with_logits(values, present.to(values)) for name, values in logits.items()}

    def scores(self, found: Localized, present: Tensor | None = None) -> Tensor:
        """Score each region for each class: ``[N, S, K]`` in 0..1.

        A score is the activation, where positive, by its highest in the image, times the probability of the class. That is 1 or 0
        where ``present`` ``[N, K]`` says which classes the image has; None: as likely as it looks.
        """
        there = (found.weights > 0)[..., None]
        positive = torch.where(there, _exact(found.activations), 0).clamp(min=0)
        highest = positive.amax(1, keepdim=True) if positive.shape[1] else positive.sum(1, keepdim=True)
        relative = positive / highest.clamp(min=torch.finfo(positive.dtype).tiny)
        likely = found.probabilities if present is None else present.to(relative)
        return relative * likely[:, None]

    def maps(self, found: Localized, superpixels: Tensor, present: Tensor | None = None) -> Tensor:
        """Put the :meth:`scores` where the superpixels ``[N, H', W']`` are that were given to :meth:`forward`.

        Returns:
            ``[N, K, H', W']`` in 0..1, constant on each superpixel, 0 in the padding. With ``pooling="none"`` the scores of the
            cells, bilinearly enlarged.
        """
        scores = self.scores(found, present)  # [N, S, K]
        inside = superpixels >= 0
        if self.settings.pooling == "none":
            cells = scores.transpose(1, 2).unflatten(2, found.size)
            size = (superpixels.shape[1], superpixels.shape[2])
            maps = F.interpolate(cells, size, mode="bilinear", align_corners=False)
        else:
            index = superpixels.clamp(min=0).long().flatten(1)[:, None].expand(-1, self.num_classes, -1)
            maps = scores.transpose(1, 2).gather(2, index).unflatten(2, superpixels.shape[1:])
        return maps * inside[:, None]


def segment(maps: Tensor, threshold: float) -> Tensor:
    """Give each pixel of maps ``[..., K, H, W]`` the class of the highest score, or background where none reaches the threshold.

    Returns:
        ``[..., H, W]`` int64 in 0..K, 0 is background; of equal scores the first class counts.

    Example:
        >>> segment(torch.tensor([[[0.9, 0.1]], [[0.3, 0.2]]]), 0.3).tolist()
        [[1, 0]]
    """
    score, best = maps.max(-3)
    return torch.where((score >= threshold) & (score > 0), best + 1, 0)


def _norm(width: int) -> tuple[nn.Module, ...]:
    return nn.BatchNorm2d(width), nn.ReLU()


def _double(width: int) -> nn.Sequential:
    """Enlarge to twice the size; a kernel of 4 covers each pixel equally often, which leaves no checkerboard."""
    return nn.Sequential(nn.ConvTranspose2d(width, width, 4, stride=2, padding=1, bias=False), *_norm(width))


def _exact(values: Tensor) -> Tensor:
    """In float32 at least."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def _inside(superpixels: Tensor, features: Tensor) -> Tensor:
    """The part of each cell that is no padding, ``[N, H, W]``."""
    share = _exact((superpixels >= 0).to(features.dtype))
    return F.interpolate(share[:, None], features.shape[2:], mode="area")[:, 0]


def _mean(values: Tensor, weights: Tensor) -> Tensor:
    """Average ``[N, S, C]`` by ``[N, S]`` to ``[N, C]``; 0 where there is nothing."""
    total = weights.sum(1).clamp(min=torch.finfo(weights.dtype).tiny)
    return ((values * weights[..., None]).sum(1) / total[:, None]).to(values.dtype)


def _aggregate(scores: Tensor, weights: Tensor, sharpness: float) -> Tensor:
    """The mean ``[N, K]`` of ``[N, S, K]``, or a smooth maximum: log(mean(exp(sharpness * score))) / sharpness."""
    if sharpness == 0:
        return _mean(scores, weights)
    share = weights / weights.sum(1, keepdim=True).clamp(min=torch.finfo(weights.dtype).tiny)
    logs = torch.where(share > 0, share.clamp(min=torch.finfo(share.dtype).tiny).log(), -torch.inf)
    empty = (share == 0).all(1)[:, None, None]  # nothing but padding: no log of 0, whose gradient is not finite
    logs = torch.where(empty, 0.0, logs[..., None])
    return torch.where(empty[:, 0], 0.0, torch.logsumexp(sharpness * scores + logs, 1) / sharpness)


def _check(features: Tensor, superpixels: Tensor) -> None:
    if features.ndim != 4 or 0 in features.shape[1:]:
        raise ValueError(f"features must be [N, C, H, W] with C, H, W > 0, got {list(features.shape)}")
    if superpixels.ndim != 3 or superpixels.shape[0] != features.shape[0] or 0 in superpixels.shape[1:]:
        raise ValueError(
            f"superpixels must be [N, H', W'] with N = {features.shape[0]}, as the features have, and at least one pixel; "
            f"got {list(superpixels.shape)}"
        )

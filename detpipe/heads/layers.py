"""The layers that box heads share: convolutions and fully connected ones over a pooled map, a classifier, and a box regressor.

Girshick, "Fast R-CNN", 2015, arXiv 1504.08083, sections 2.1 and 2.3: the regressor starts ten times closer to zero.
Convolutions before the fully connected layers: Wu and He, "Group Normalization", 2018, arXiv 1803.08494, section 4.2. The last
stage of a residual network in the place of all: He et al., "Deep Residual Learning", 2015, arXiv 1512.03385, appendix A.

R RoIs, C channels, h x w bins, K foreground classes, B = K boxes a RoI (1 if class-agnostic).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from torch import Tensor, nn
from torchvision.models.resnet import Bottleneck
from torchvision.ops import FrozenBatchNorm2d

from detpipe.stages import initialize, mark_class_outputs
from detpipe.support.numbers import check_whole


@dataclass(frozen=True)
class Convolutions:
    """3 x 3 convolutions before the fully connected layers, each followed by a rectifier.

    Args:
        widths: of each.
        norm: "batch" normalization after each, and no bias; None for none.

    Raises:
        ValueError: no width, one below 1, or an unknown norm.
    """

    widths: Sequence[int] = (256, 256, 256, 256)
    norm: Literal["batch"] | None = None

    def __post_init__(self) -> None:
        check_whole(1, "conv.", widths=self.widths)
        if not self.widths or self.norm not in ("batch", None):
            raise ValueError(f"conv: expected widths of 1 or more and norm 'batch' or null, got {self}")

    def build(self, channels: int, size: tuple[int, int]) -> tuple[list[nn.Module], int]:
        """Make the layers: ``[R, channels, h, w]`` -> ``[R, widths[-1], h, w]``; and how many numbers are in that."""
        layers: list[nn.Module] = []
        for before, after in pairwise([channels, *self.widths]):
            layers.append(nn.Conv2d(before, after, 3, padding=1, bias=self.norm is None))
            layers += [nn.BatchNorm2d(after)] if self.norm == "batch" else []
            layers.append(nn.ReLU(inplace=True))
        initialize(nn.ModuleList(layers))
        return layers, self.widths[-1] * size[0] * size[1]


@dataclass(frozen=True)
class ResidualStage:
    """The last stage of a residual network of bottlenecks, its norms frozen, and the mean of each map.

    Args:
        width: channels of its maps.
        blocks: how many bottlenecks there are; the first one halves height and width.
        stride_in_1x1: by its first convolution, not by that of 3 x 3.

    Raises:
        ValueError: a width that is no positive multiple of 4, or no block.
    """

    width: int = 2048
    blocks: int = 3
    stride_in_1x1: bool = False

    def __post_init__(self) -> None:
        check_whole(1, "conv.", width=self.width, blocks=self.blocks)
        if self.width % 4:
            raise ValueError(f"conv: expected a width that is a multiple of 4, got {self}")

    def build(self, channels: int, size: tuple[int, int]) -> tuple[list[nn.Module], int]:
        """Make the layers: ``[R, channels, h, w]`` -> ``[R, width, 1, 1]``; and how many numbers are in that."""
        inner, make = self.width // 4, FrozenBatchNorm2d
        shortcut = nn.Sequential(nn.Conv2d(channels, self.width, 1, 2, bias=False), make(self.width))
        layers: list[nn.Module] = [Bottleneck(channels, inner, 2, shortcut, norm_layer=make)]
        layers += [Bottleneck(self.width, inner, norm_layer=make) for _ in range(self.blocks - 1)]
        if self.stride_in_1x1:
            layers[0].conv1.stride, layers[0].conv2.stride = (2, 2), (1, 1)  # pyright: ignore
        initialize(nn.ModuleList(layers))
        return [*layers, nn.AdaptiveAvgPool2d(1)], self.width


def hidden_layers(width: int, widths: Sequence[int]) -> nn.Sequential:
    """Make the layers that turn a pooled map into features of its RoI.

    Args:
        width: numbers of a pooled map, C h w.
        widths: of the layers, each followed by a rectifier.

    Returns:
        ``[R, C, h, w]`` -> ``[R, widths[-1]]``.

    Raises:
        ValueError: no layer, or one without width.
    """
    check_whole(fc=list(widths))
    if not widths:
        raise ValueError("expected at least one layer in fc, of width 1 or more; got fc=[]")
    layers: list[nn.Module] = [nn.Flatten()]
    for before, after in pairwise([width, *widths]):
        layers += [nn.Linear(before, after), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers)


def output_layers(
    width: int, num_classes: int, class_agnostic: bool, extra_outputs: int = 0
) -> tuple[nn.Linear, nn.Linear]:
    """Make the classifier and the box regressor.

    Args:
        width: features of a RoI.
        num_classes: K.
        class_agnostic: one box for all classes.
        extra_outputs: logits after those of the classes.

    Returns:
        ``[R, width]`` -> logits ``[R, K + 1 + extra_outputs]``, and -> deltas ``[R, 4 B]``.
    """
    classifier = nn.Linear(width, num_classes + 1 + extra_outputs)
    regressor = nn.Linear(width, 4 * (1 if class_agnostic else num_classes))
    for layer, std in ((classifier, 0.01), (regressor, 0.001)):
        nn.init.normal_(layer.weight, std=std)
        nn.init.zeros_(layer.bias)
    mark_class_outputs(classifier, background=1, each=1)
    if not class_agnostic:
        mark_class_outputs(regressor, background=0, each=4)
    return classifier, regressor


def quality_layer(width: int, num_classes: int, class_agnostic: bool, weight: float) -> nn.Linear | None:
    """Make the layer that predicts the IoU of refined boxes, ``[R, width]`` -> logits ``[R, B]``; None without a weight."""
    if weight == 0:
        return None
    layer = nn.Linear(width, 1 if class_agnostic else num_classes)
    nn.init.normal_(layer.weight, std=0.01)
    nn.init.zeros_(layer.bias)
    if not class_agnostic:
        mark_class_outputs(layer, background=0, each=1)
    return layer


def box_outputs(classifier: nn.Module, regressor: nn.Module, hidden: Tensor) -> tuple[Tensor, Tensor]:
    """Ask the classifier and the regressor about the RoIs of each image.

    Args:
        classifier: ``[R, width]`` -> ``[R, K + 1]``.
        regressor: ``[R, width]`` -> ``[R, 4 B]``.
        hidden: ``[N, P, width]``.

    Returns:
        logits ``[N, P, K + 1]`` and deltas ``[N, P, B, 4]``.
    """
    shape, flat = hidden.shape[:2], hidden.flatten(0, 1)
    return classifier(flat).unflatten(0, shape), regressor(flat).unflatten(0, shape).unflatten(-1, (-1, 4))

"""The layers that box heads share: fully connected ones over a pooled map, a classifier, and a box regressor.

Girshick, "Fast R-CNN", 2015, arXiv 1504.08083, sections 2.1 and 2.3: the regressor starts ten times closer to zero.

R RoIs, C channels, h x w bins, K foreground classes, B = K boxes a RoI (1 if class-agnostic).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor, nn

from detpipe.stages import mark_class_outputs


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
    if not widths or min(widths) < 1:
        raise ValueError(f"expected at least one layer in fc, of width 1 or more; got fc={list(widths)}")
    layers: list[nn.Module] = [nn.Flatten()]
    for before, after in pairwise([width, *widths]):
        layers += [nn.Linear(before, after), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers)


def output_layers(width: int, num_classes: int, class_agnostic: bool) -> tuple[nn.Linear, nn.Linear]:
    """Make the classifier and the box regressor.

    Args:
        width: features of a RoI.
        num_classes: K.
        class_agnostic: one box for all classes.

    Returns:
        ``[R, width]`` -> logits ``[R, K + 1]``, and -> deltas ``[R, 4 B]``.
    """
    classifier = nn.Linear(width, num_classes + 1)
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

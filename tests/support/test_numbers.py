"""Numbers that no setting takes, in every argument of the stages that is a number: each is refused by the argument's name."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from detpipe import DenseGrid, TwoStageDetector
from detpipe.attention import CBAM, ECA, ConcurrentSqueezeExcitation, SelectiveKernel, SqueezeExcitation
from detpipe.backbones import FPN, Level, Regime, SEInceptionV3, SEResNet, Variant, ViTPyramid
from detpipe.heads import (
    AttentionalHead,
    BoxLoss,
    CascadeHead,
    ClassLoss,
    FastRCNNHead,
    GlimpseSequence,
    GlimpseSettings,
    LaterStages,
    Objective,
    Pathwise,
    Postprocess,
    Reinforce,
    RoISampler,
)
from detpipe.heads.layers import Convolutions, ResidualStage
from detpipe.optimization import LRSchedule, Optimizer
from detpipe.regions.image_classifier import ImageClassifier
from detpipe.regions.region_classifier import Classification, RegionClassifier
from detpipe.regions.region_context import Context
from detpipe.regions.superpixel_pooling import Localization
from detpipe.regions.superpixels import Segmentation
from detpipe.support.numbers import check_numbers, check_whole
from detpipe.types import PixelFormat

HEAD = {"in_channels": 4, "num_classes": 2, "strides": {"c2": 4}, "fc": [4]}
BACKBONE = SEResNet(18, levels=["c2"])
TAKEN: dict[Callable[..., Any], dict[str, Any]] = {  # the arguments that have no default
    **{key: {} for key in (ClassLoss, BoxLoss, Objective, Postprocess, RoISampler, LaterStages, GlimpseSettings)},
    **{key: {} for key in (GlimpseSequence, Pathwise, Reinforce, Convolutions, ResidualStage, Optimizer, LRSchedule)},
    **{key: {} for key in (Classification, Context, Localization, Segmentation, PixelFormat, Regime, Variant)},
    **dict.fromkeys((FastRCNNHead, CascadeHead, AttentionalHead), HEAD),
    **{key: {"channels": 32} for key in (CBAM, ECA, ConcurrentSqueezeExcitation, SqueezeExcitation)},
    **{key: {"backbone": BACKBONE, "num_classes": 2} for key in (ImageClassifier, RegionClassifier)},
    SelectiveKernel: {"in_channels": 32, "out_channels": 32},
    Level: {"node": "x", "stride": 4},
    SEResNet: {"levels": ["c2"], "in_channels": 3, "padding": 0, "out_channels": 8},
    SEInceptionV3: {"levels": ["c2"]},
    FPN: {"backbone": SEResNet(18, levels=["c2", "c3"], out_channels="own")},
    ViTPyramid: {"backbone": BACKBONE},
    TwoStageDetector: {"backbone": BACKBONE, "proposals": DenseGrid(scales=[32]), "head": FastRCNNHead(**HEAD)},
}


def numbers() -> Iterator[tuple[Callable[..., Any], str, bool, bool]]:
    """What takes a number, the name of the argument, whether it is whole, and whether there are several."""
    for make, taken in TAKEN.items():
        known = inspect.signature(make).parameters
        for name in {**known, **taken}:
            kind = str(known[name].annotation) if name in known else type(taken[name]).__name__
            if kind.startswith(("int", "float", "Sequence[", "tuple[", "Width")) and "str" not in kind:
                yield make, name, "float" not in kind, kind.startswith(("Sequence", "tuple"))


@pytest.mark.parametrize(("make", "name", "whole", "several"), [*numbers()])
def test_what_is_no_number_of_the_kind_is_refused_by_name(make, name, whole, several):
    length = len(getattr(make(**TAKEN[make]), name, None) or [1]) if several else 0
    for value in (True, math.nan, math.inf, -math.inf, *([2.5] if whole else [])):
        given = {name: (value,) * max(1, length) if several else value}
        with pytest.raises(ValueError, match=name):
            make(**{**TAKEN[make], **given})


def test_numbers_of_numpy_and_lists_are_numbers():
    check_whole(one=np.int64(1), several=[1, np.int32(2)], none=None)
    check_numbers("must be positive and finite", one=np.float32(0.5), several=(1, np.float64(2)), none=None)
    with pytest.raises(ValueError, match=r"^head\.fc must be a whole number, got \[1, 2\.0\]"):
        check_whole(1, "head.", fc=[1, 2.0])
    with pytest.raises(ValueError, match=r"^rate must be in 0..1, got 'a'"):
        check_numbers("must be in 0..1", rate="a")

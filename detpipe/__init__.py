"""Region-based object detection with attention.

The data path, and where each part lives::

    datasets      annotated images          COCO, VOC, YOLO, ...      ->  images, targets
      |
    images        resize, normalize, pad    [3, H_i, W_i]             ->  [N, 3, H, W]
      |
    backbones     feature maps              SEResNet, Extractor, FPN  ->  {"c4": [N, C, H/16, W/16]}
      |
    proposals     boxes worth a look        SelectiveSearch, RPN, ... ->  N x [P_i, 4]
      |
    heads         pool, classify, refine    FastRCNNHead (roi_pooling: RoIAlign, RoIMaxPool)
      |
    evaluation    mean average precision    COCO, VOC 2007, VOC 2010

:class:`detpipe.TwoStageDetector` (``detector.py``) is the pipeline; :mod:`detpipe.stages` says what a stage must do.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from detpipe.attention import (
        CBAM,
        ECA,
        ConcurrentSqueezeExcitation,
        SelectiveKernel,
        SpatialSqueezeExcitation,
        SqueezeExcitation,
        add_attention,
    )
    from detpipe.backbones import (
        FPN,
        Extractor,
        Level,
        Pretrained,
        Regime,
        SEInceptionV3,
        SEResNet,
        SEResNeXt,
        SKNet,
        Variant,
        ViTPyramid,
    )
    from detpipe.datasets import (
        COCO,
        VOC,
        YOLO,
        Augment,
        ClassificationData,
        CSVBoxes,
        DetectionData,
        ImageFolder,
        Loader,
        Shards,
        Views,
    )
    from detpipe.demo import Demo, DemoDigits
    from detpipe.detector import TwoStageDetector
    from detpipe.evaluation.metrics import CocoEvaluator, LvisEvaluator, VocEvaluator
    from detpipe.exporting.files import export
    from detpipe.heads import (
        AttentionalHead,
        CascadeHead,
        FastRCNNHead,
        Glimpse,
        GlimpseSequence,
        GlimpseSettings,
        LaterStages,
        Pathwise,
        Postprocess,
        Reinforce,
        RoISampler,
    )
    from detpipe.optimization import LRSchedule, Optimizer
    from detpipe.proposal_files import ProposalStore
    from detpipe.proposals import (
        RPN,
        Anchors,
        DenseGrid,
        EdgeBoxes,
        FromDetector,
        OpenCVSelectiveSearch,
        PrecomputedProposals,
        ProposalSelection,
        RPNObjective,
        SelectiveSearch,
        Superpixels,
        Union,
    )
    from detpipe.regions.image_classifier import ImageClassifier
    from detpipe.regions.region_classifier import Classification, RegionClassifier
    from detpipe.regions.region_context import Context
    from detpipe.regions.superpixel_localizer import SuperpixelLocalizer
    from detpipe.regions.superpixel_pooling import Localization, SuperpixelPoolingHead
    from detpipe.regions.superpixels import Segmentation
    from detpipe.roi_pooling import PreciseRoIPool, RoIAlign, RoIMaxPool, RotatedRoIAlign, SuperpixelPool
    from detpipe.spatial_transformer import Sampler, SpatialTransformer
    from detpipe.training.models import load_classifier, load_detector, load_region_classifier
    from detpipe.types import Detection, Features, PixelFormat, Target

_HOMES = {
    "detpipe.attention": (
        *("SqueezeExcitation", "SpatialSqueezeExcitation", "ConcurrentSqueezeExcitation"),
        *("SelectiveKernel", "ECA", "CBAM", "add_attention"),
    ),
    "detpipe.backbones": (
        *("SEResNet", "SEResNeXt", "SKNet", "SEInceptionV3", "Extractor", "Level", "FPN", "ViTPyramid"),
        *("Pretrained", "Regime", "Variant"),
    ),
    "detpipe.training.models": ("load_classifier", "load_detector", "load_region_classifier"),
    "detpipe.regions.image_classifier": ("ImageClassifier",),
    "detpipe.datasets": (
        *("COCO", "VOC", "YOLO", "CSVBoxes", "Shards", "Augment", "DetectionData", "Loader"),
        *("ClassificationData", "ImageFolder", "Views"),
    ),
    "detpipe.demo": ("Demo", "DemoDigits"),
    "detpipe.detector": ("TwoStageDetector",),
    "detpipe.evaluation.metrics": ("CocoEvaluator", "LvisEvaluator", "VocEvaluator"),
    "detpipe.exporting.files": ("export",),
    "detpipe.heads": (
        *("FastRCNNHead", "AttentionalHead", "CascadeHead", "Postprocess", "RoISampler"),
        *("Glimpse", "GlimpseSettings", "GlimpseSequence", "Reinforce", "Pathwise", "LaterStages"),
    ),
    "detpipe.optimization": ("LRSchedule", "Optimizer"),
    "detpipe.proposal_files": ("ProposalStore",),
    "detpipe.proposals": (
        *("DenseGrid", "SelectiveSearch", "OpenCVSelectiveSearch", "Superpixels", "EdgeBoxes", "FromDetector", "Union"),
        *("PrecomputedProposals", "RPN", "Anchors", "ProposalSelection", "RPNObjective"),
    ),
    "detpipe.roi_pooling": ("PreciseRoIPool", "RoIAlign", "RoIMaxPool", "RotatedRoIAlign", "SuperpixelPool"),
    "detpipe.regions.region_classifier": ("Classification", "RegionClassifier"),
    "detpipe.regions.region_context": ("Context",),
    "detpipe.spatial_transformer": ("Sampler", "SpatialTransformer"),
    "detpipe.regions.superpixel_localizer": ("SuperpixelLocalizer",),
    "detpipe.regions.superpixel_pooling": ("Localization", "SuperpixelPoolingHead"),
    "detpipe.regions.superpixels": ("Segmentation",),
    "detpipe.types": ("Detection", "Features", "PixelFormat", "Target"),
}
_HOME = {name: module for module, names in _HOMES.items() for name in names}

__all__ = [  # noqa: RUF022 (the order of the data path)
    "COCO", "VOC", "YOLO", "CSVBoxes", "Shards", "Demo", "DetectionData", "Loader", "Augment",
    "SEResNet", "SEResNeXt", "SKNet", "SEInceptionV3", "Extractor", "Level", "FPN", "ViTPyramid",
    "Pretrained", "Regime", "Variant", "PixelFormat",
    "SqueezeExcitation", "SpatialSqueezeExcitation", "ConcurrentSqueezeExcitation", "SelectiveKernel", "ECA", "CBAM",
    "add_attention",
    "DenseGrid", "SelectiveSearch", "OpenCVSelectiveSearch", "Superpixels", "EdgeBoxes", "FromDetector", "Union",
    "PrecomputedProposals", "ProposalStore", "RPN", "Anchors", "RPNObjective", "ProposalSelection",
    "RoIAlign", "RoIMaxPool", "PreciseRoIPool", "RotatedRoIAlign", "SuperpixelPool",
    "FastRCNNHead", "AttentionalHead", "CascadeHead", "RoISampler", "Postprocess",
    "Glimpse", "GlimpseSettings", "GlimpseSequence", "Reinforce", "Pathwise", "LaterStages",
    "TwoStageDetector", "Optimizer", "LRSchedule", "load_detector", "export",
    "ImageClassifier", "ClassificationData", "ImageFolder", "DemoDigits", "Views", "load_classifier",
    "RegionClassifier", "Context", "Classification", "load_region_classifier",
    "SuperpixelLocalizer", "SuperpixelPoolingHead", "Localization", "Segmentation",
    "SpatialTransformer", "Sampler",
    "CocoEvaluator", "VocEvaluator", "LvisEvaluator",
    "Detection", "Features", "Target",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used, so that ``import detpipe`` is instant."""
    if name not in _HOME:
        raise AttributeError(f"module 'detpipe' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)

"""Which parts of a detector can be written as a graph; what cannot is named."""

from __future__ import annotations

from torch import nn

from detpipe.detector import TwoStageDetector
from detpipe.heads import AttentionalHead, CascadeHead, FastRCNNHead
from detpipe.heads.base import ProposalHead
from detpipe.proposals import RPN
from detpipe.roi_pooling import RoIAlign, RoIMaxPool
from detpipe.support.errors import UsageError

MOST_COMPARED = 12_000  # boxes of an image; their overlaps take 4.5 GB
HEADS = (FastRCNNHead, CascadeHead, AttentionalHead)


def check_torch_alone(detector: TwoStageDetector, takes_boxes: bool) -> None:
    """Refuse what PyTorch's own operators cannot do, or not in memory; arguments and errors as of :func:`check_exportable`."""
    pooler = detector.head.get_submodule("pooler")
    if isinstance(pooler, RoIMaxPool) or getattr(pooler, "sampling_ratio", 0) == 0:
        how = " with sampling_ratio=0" if isinstance(pooler, RoIAlign) else ""
        raise _refused("pooler", pooler, "PyTorch alone has no operator for it: write an .onnx file", how)
    assert isinstance(detector.head, ProposalHead)
    counts = {"postprocess.candidates_per_image": detector.head.postprocess.candidates_per_image}
    if isinstance(detector.proposals, RPN) and not takes_boxes:
        selection = detector.proposals.selection
        pairs = selection.post_nms_top_n[1] * detector.head.num_classes
        counts = {name: min(count, pairs) for name, count in counts.items()}
        counts["selection.pre_nms_top_n"] = selection.pre_nms_top_n[1]
    for name, count in counts.items():
        if count > MOST_COMPARED:
            raise UsageError(
                f"export: PyTorch alone compares each of {count} boxes with each other, which memory does not hold; lower {name} "
                f"to {MOST_COMPARED} or less, or write an .onnx file"
            )


def check_exportable(detector: TwoStageDetector, takes_boxes: bool) -> None:
    """Refuse a detector with a part that has no graph.

    Args:
        detector: any.
        takes_boxes: whether boxes are an input.

    Raises:
        UsageError: a part of it has none; it is named, with what to do.
    """
    head, source = detector.head, detector.proposals
    if not isinstance(head, HEADS):
        raise _refused("head", head, f"expected {', '.join(kind.__name__ for kind in HEADS)}")
    if not takes_boxes and not isinstance(source, RPN):
        raise _refused("source of proposals", source, "let boxes be an input: --boxes, or boxes=True in Python")
    suppression = head.postprocess.suppression
    if suppression != "nms":
        raise UsageError(
            f"export: postprocess.suppression {suppression!r} takes as many steps as there are boxes, which a graph does not have; "
            "set it to 'nms'"
        )
    pooler, how = head.get_submodule("pooler"), ""
    if isinstance(pooler, RoIAlign):
        how = "" if pooler.reduce == "mean" else " with reduce='max'"
    elif isinstance(pooler, RoIMaxPool):
        how = "" if pooler.bins == "fast_rcnn" else f" with bins={pooler.bins!r}"
    if how or not isinstance(pooler, RoIAlign | RoIMaxPool):
        advice = "expected RoIAlign that takes the mean, or RoIMaxPool with bins='fast_rcnn'"
        raise _refused("pooler", pooler, advice, how)


def _refused(kind: str, part: nn.Module, advice: str, how: str = "") -> UsageError:
    return UsageError(f"export: the {kind} {type(part).__name__}{how} cannot be written as a graph; {advice}")

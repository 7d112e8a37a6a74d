"""Write a detector to a file that runs without detpipe, after a comparison with what the detector finds.

An ONNX file says about itself, in ``metadata_props``: ``format``, ``detpipe`` (the version), ``source`` (what it was made of, a
checkpoint or name), ``sha256`` (of the weights), ``license``, ``boxes`` (what coordinates mean), and as JSON ``class_names``,
``category_ids`` (label 1 first), ``resize`` and ``thresholds``.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from detpipe.detector import TwoStageDetector
from detpipe.exporting.parity import Parity, Run, compare, sample_images
from detpipe.exporting.program import Program
from detpipe.exporting.support import check_torch_alone
from detpipe.exporting.torch_program import open_pt2, write_pt2
from detpipe.heads.base import ProposalHead
from detpipe.prediction.onnx_detector import FORMAT, OnnxDetector, need_packages
from detpipe.support.errors import DetpipeError, UsageError
from detpipe.support.files import atomic_write
from detpipe.support.terminal import package_version

LOWERED = 0.001  # the threshold of the second comparison, by which a weak model detects something too


class ParityError(DetpipeError, ArithmeticError):
    """An exported file does not find what the detector finds."""


@dataclass(frozen=True)
class Labels:
    """What a file says about its detector.

    Args:
        class_names: of label 1 first; "1", "2" .. where they are not known.
        category_ids: of annotation files; 1..K where they are not known.
        source: the checkpoint or name it was made of.
        license: of the weights.
    """

    class_names: Sequence[str] = ()
    category_ids: Sequence[int] = ()
    source: str = ""
    license: str = ""


def export(
    detector: TwoStageDetector,
    path: str | Path,
    labels: Labels = Labels(),
    *,
    boxes: bool = False,
    vectors: bool = False,
    half: bool = False,
    calibration: Sequence[Tensor] = (),
    check: bool = True,
    say: Callable[[str], object] = lambda _: None,
) -> Parity | None:
    """Write a detector to a file, which gets its name when it finds what the detector finds.

    The graph takes ``images`` ``[batch, C, height, width]`` uint8, of three channels RGB, all sizes dynamic, and gives ``boxes``
    ``[batch, detections, 4]`` xyxy in pixels of these images, ``scores``, ``labels`` (1..K, 0 behind the last detection) and
    ``count`` ``[batch]``.

    Args:
        detector: what to write, computing in float32; it stays as it is, on whatever device.
        path: ends in ``.onnx``, or ``.pt2`` for :func:`torch.export.load`.
        labels: what the file says about it.
        boxes: take proposals as a second input ``proposals`` ``[batch, proposals, 4]`` in pixels of the images; a detector on
            precomputed proposals always does.
        vectors: give a fifth output ``vectors`` ``[batch, detections, width]``, what the head classifies.
        half: store the weights in 16 bits, half the size; what is computed stays in 32 bits. Not compared with the detector.
        calibration: images ``[3, H, W]`` uint8 by which weights and activations become 8-bit numbers; not compared either.
        check: compare, by :func:`detpipe.exporting.parity.compare`.
        say: told what is done, since it takes minutes.

    Returns:
        What the comparison found, if there was one.

    Raises:
        UsageError: another suffix, a package is missing, or a part of the detector that has no graph; it is named.
        ParityError: the file differs from the detector.
        OSError: the file cannot be written.

    Example:
        >>> export(detector, "model.onnx", Labels(class_names=["cat", "dog"]))  # doctest: +SKIP
    """
    path = check_path(path, half, bool(calibration))
    own = copy.deepcopy(detector).cpu().float().eval()
    program = Program(own, boxes, vectors).eval()
    if path.suffix == ".pt2":
        check_torch_alone(own, program.takes_boxes)
    if calibration and program.takes_boxes:
        raise UsageError("export: 8 bits are measured on images alone, and this detector needs boxes; leave --int8 out")
    about = _metadata(detector, labels)
    with atomic_write(path) as temporary:
        temporary.touch()  # a path that cannot be written is told before minutes of work
        say(f"exporting {type(own.head).__name__}, which takes a few minutes")
        compared = partial(_compared, own, program, say) if check else lambda open_at: None
        if path.suffix == ".pt2":
            write_pt2(program, temporary, about)
            return compared(partial(open_pt2, temporary, program.outputs))
        return _write_onnx(program, temporary, about, compared, half, calibration, say)


def _write_onnx(
    program: Program,
    path: Path,
    about: dict[str, str],
    compared: Callable[[Callable[[float], Run]], Parity | None],
    half: bool,
    calibration: Sequence[Tensor],
    say: Callable[[str], object],
) -> Parity | None:
    """Write a program as ONNX, with smaller weights once it is compared, if that is asked for; see :func:`export`."""
    from detpipe.exporting import onnx_graph, weights

    model = onnx_graph.to_onnx(program)
    onnx_graph.write_metadata(model, about)
    parity = compared(
        lambda threshold: OnnxDetector(onnx_graph.with_threshold(model, threshold).SerializeToString()).run
    )
    if calibration:
        say(f"quantizing by {len(calibration)} images")
        model = weights.quantize(model, calibration)
    elif half:
        weights.to_half(model)
    path.write_bytes(model.SerializeToString())
    return parity


def check_path(path: str | Path, half: bool = False, int8: bool = False) -> Path:
    """Refuse a name that says no format, a folder, and what the format does not have or the packages for it lack."""
    path = Path(path)
    if path.suffix not in (".onnx", ".pt2"):
        raise UsageError(f"{path}: expected the name of a file that ends in .onnx or .pt2")
    if path.is_dir():
        raise UsageError(f"{path} is a folder; give the name of a file")
    if half and int8:
        raise UsageError(
            f"{path}: weights are stored in 16 bits or in 8; give half or images for calibration, not both"
        )
    if path.suffix == ".onnx":
        need_packages("onnx", "onnxscript", "onnxruntime")
    elif half or int8:
        raise UsageError(
            f"{path}: 16 and 8 bits are for .onnx files; leave --half and --int8 out, or name it {path.stem}.onnx"
        )
    return path


def check_file(detector: TwoStageDetector, found: OnnxDetector, batches: Sequence[Tensor]) -> Parity:
    """Compare a file with its detector on images ``[N, 3, H, W]``.

    Raises:
        UsageError: the detector has other weights than the file was made of.
    """
    if found.metadata["sha256"] != weights_hash(detector):
        raise UsageError(
            f"the file was made of other weights than the detector given (sha256 {found.metadata['sha256'][:12]}...): give its "
            f"checkpoint, {found.metadata['source'] or 'whose name it does not say'}"
        )
    return compare(detector, found.run, batches, found.takes_boxes)


def weights_hash(detector: TwoStageDetector) -> str:
    """The sha256 of a detector's weights, by name."""
    total = hashlib.sha256()
    for name, value in sorted(detector.state_dict().items()):
        total.update(name.encode())
        total.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return total.hexdigest()


def _compared(
    detector: TwoStageDetector, program: Program, say: Callable[[str], object], open_at: Callable[[float], Run]
) -> Parity:
    """Compare with the threshold of scores as it is, and lowered; refuse a file that differs."""
    say("comparing the file with the detector")
    own, batches = program.head.postprocess.score_threshold, sample_images(detector)
    parity, lowered = (
        compare(detector, open_at(threshold), batches, program.takes_boxes, threshold)
        for threshold in (own, min(LOWERED, own))
    )
    parity = parity.joined(lowered)
    if parity.faults:
        raise ParityError(
            f"the file does not find what the detector finds, so it was not written ({parity}); {parity.faults[0]}"
        )
    return parity


def _metadata(detector: TwoStageDetector, labels: Labels) -> dict[str, str]:
    head = detector.head
    assert isinstance(head, ProposalHead)
    numbers = list(range(1, head.num_classes + 1))
    names = list(labels.class_names) or [str(number) for number in numbers]
    category_ids = list(labels.category_ids) or numbers
    for given, what in ((names, "names"), (category_ids, "category ids")):
        if len(given) != head.num_classes:
            raise UsageError(f"export: the detector has {head.num_classes} classes, and {len(given)} {what} are given")
    post = head.postprocess
    resize = {"min_size": detector.min_size, "max_size": detector.max_size, "rule": detector.resize}
    thresholds = {"score": post.score_threshold, "nms_iou": post.nms_iou, "detections": post.detections_per_image}
    return {
        "format": FORMAT,
        "detpipe": package_version(),
        "source": labels.source,
        "sha256": weights_hash(detector),
        "license": labels.license,
        "boxes": "x1, y1, x2, y2 in pixels of the image given, edges between pixels",
        "class_names": json.dumps(names),
        "category_ids": json.dumps(category_ids),
        "resize": json.dumps(resize),
        "thresholds": json.dumps(thresholds),
    }

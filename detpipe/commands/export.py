"""The ``export`` command: a detector in a file that runs without detpipe, or a comparison of such a file with its detector."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from torch import Tensor

from detpipe import zoo
from detpipe.commands.parser import Parser
from detpipe.detector import TwoStageDetector
from detpipe.exporting.files import Labels, ParityError, check_file, check_path, export
from detpipe.prediction.inputs import find_images
from detpipe.prediction.onnx_detector import OnnxDetector
from detpipe.support.errors import UsageError
from detpipe.support.terminal import say
from detpipe.training.checkpoint import Description
from detpipe.types import RGB

_WRITING = ("output", "boxes", "vectors", "license", "half", "int8", "unchecked")


def run_export(arguments: Sequence[str]) -> int:
    """Write a file, or check one.

    Args:
        arguments: ``CHECKPOINT|NAME -o FILE`` or ``--check FILE IMAGES``, and options.

    Returns:
        0.

    Raises:
        DetpipeError: what users can mend.
    """
    options = _parse(arguments)
    if options.check is not None:
        return _check(options)
    [source] = options.given
    path = check_path(options.output, options.half, options.int8 is not None)
    images = [] if options.int8 is None else _images(options.int8)
    detector, description = load(source, options.weights)
    published = zoo.entries().get(source)
    owner = options.license or (published.license if published else "")
    labels = Labels(description.class_names, description.category_ids, source, owner)
    how = {"boxes": options.boxes, "vectors": options.vectors, "half": options.half, "calibration": images}
    parity = export(detector, path, labels, **how, check=not options.unchecked, say=say)
    say(f"wrote {path}, {path.stat().st_size / 1e6:.1f} MB; {'not compared' if parity is None else parity}")
    return 0


def load(source: str, weights: str | None) -> tuple[TwoStageDetector, Description]:
    """Load a detector of color images, of a checkpoint or a published one."""
    detector, description = zoo.load(source, weights)
    if description.pixels != RGB:
        raise UsageError(
            f"export: {source} looks at images read as {description.pixels}; files take uint8 images of three channels"
        )
    return detector, description


def _check(options: argparse.Namespace) -> int:
    found = OnnxDetector(options.check)
    source = options.checkpoint or found.metadata["source"]
    if not source:
        raise UsageError(f"{options.check} does not say what it was made of: name its checkpoint with --checkpoint")
    batches = [image[None] for image in _images(options.given)]
    detector, _ = load(source, options.weights)
    parity = check_file(detector, found, batches)
    say(f"{options.check} against {source}: {parity}")
    if parity.faults:
        raise ParityError(f"{options.check} does not find what {source} finds: {parity.faults[0]}")
    return 0


def _images(names: Sequence[str]) -> list[Tensor]:
    return [one.read(RGB) for one in find_images(names)]


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = Parser(
        prog="detpipe export",
        description="Write a detector as .onnx or .pt2, from pixels to detections in one graph; or compare such a file with it.",
    )
    parser.add_argument(
        "given",
        nargs="+",
        metavar="CHECKPOINT|NAME",
        help="RUN/best.ckpt or a name of 'detpipe zoo'; with --check images, or folders of images",
    )
    parser.add_argument("-o", "--output", metavar="FILE", help="model.onnx or model.pt2")
    parser.add_argument(
        "--weights", metavar="FILE", help="the published file of a name, where it lies in no usual place"
    )
    parser.add_argument("--boxes", action="store_true", help="take proposals as a second input, for any source of them")
    parser.add_argument(
        "--vectors", action="store_true", help="give the vector of each detection's region as an output"
    )
    parser.add_argument("--license", help="of the weights, to be written into the file; that of a name by default")
    smaller = parser.add_mutually_exclusive_group()
    smaller.add_argument("--half", action="store_true", help="store the weights in 16 bits")
    smaller.add_argument(
        "--int8", nargs="+", metavar="IMAGES", help="compute in 8 bits, with ranges measured on these images or folders"
    )
    parser.add_argument("--unchecked", action="store_true", help="do not compare the file with the detector")
    parser.add_argument("--check", metavar="FILE", help="compare this .onnx file with its detector, on the images")
    parser.add_argument("--checkpoint", help="with --check: the detector, where it is not what the file was made of")
    options = parser.parse_args(list(arguments))
    if options.check is not None:
        _refuse(options, _WRITING, "is for writing a file; leave it out of --check")
        if options.check.endswith(".pt2"):
            raise UsageError(f"export: --check is for .onnx files; {options.check} was compared when it was written")
        return options
    _refuse(options, ["checkpoint"], "is for --check FILE; name what is to be written as the first argument")
    if len(options.given) != 1:
        raise UsageError(
            f"export: expected one checkpoint or name, got {len(options.given)}: {' '.join(options.given)}"
        )
    if options.output is None:
        raise UsageError("export: give -o model.onnx or -o model.pt2, the file to write")
    return options


def _refuse(options: argparse.Namespace, names: Sequence[str], why: str) -> None:
    """Refuse options that would not be looked at."""
    for name in names:
        if getattr(options, name):
            raise UsageError(f"export: --{name} {why}")
